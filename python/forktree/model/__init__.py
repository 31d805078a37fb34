"""Hugging Face models as something that runs packed tokens of many branches at once.

Reading order: `replica` and `interface` (how a model is entered), `layers` (what a layer does in a step), `runner` (a
model with its KV pools); then `head` (hidden states to logits), `proof_tree` and `attach` (the proof that all this
computes what the model computes), `fingerprint` and `attached` (whether it still does).
"""

from forktree.model.attach import ModelSpec, attach
from forktree.model.attached import attached
from forktree.model.fingerprint import Fingerprint
from forktree.model.head import LinearHead, OwnHead
from forktree.model.layer_spec import LayerKind
from forktree.model.runner import Runner

__all__ = ["Fingerprint", "LayerKind", "LinearHead", "ModelSpec", "OwnHead", "Runner", "attach", "attached"]
