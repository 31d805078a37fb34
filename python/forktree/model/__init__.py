"""Hugging Face models as something that runs packed tokens of many branches at once.

Reading order: `replica` and `interface` (how a model is entered); `layer_spec`, `hooks` and `step` (what a layer does
in a step); `runner` and `captured` (a model with its KV pools); `head` (from hidden states to logits); `attach` and
`verify` (whether all this computes what the model computes); `fingerprint` and `attached` (whether it still does).
"""

from forktree.model.attach import attach
from forktree.model.attached import attached
from forktree.model.fingerprint import Fingerprint
from forktree.model.head import LinearHead, OwnHead
from forktree.model.hooks import LayerHook, Rows
from forktree.model.layer_spec import LayerSpec
from forktree.model.model_spec import ModelSpec
from forktree.model.runner import Runner

__all__ = [
    "Fingerprint",
    "LayerHook",
    "LayerSpec",
    "LinearHead",
    "ModelSpec",
    "OwnHead",
    "Rows",
    "Runner",
    "attach",
    "attached",
]
