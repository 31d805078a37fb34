"""Hugging Face models as something that runs packed tokens of many branches at once.

Reading order: `interface` (how a model is entered), `layers` (what a layer does in a step), `runner` (a model
with its KV pools); then `head` (hidden states to logits), `proof_tree` and `attach` (the proof that all this
computes what the model computes).
"""

from forktree.model.attach import ModelSpec, attach
from forktree.model.head import LinearHead, OwnHead
from forktree.model.layers import LayerKind
from forktree.model.runner import Runner

__all__ = ["LayerKind", "LinearHead", "ModelSpec", "OwnHead", "Runner", "attach"]
