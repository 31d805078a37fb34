"""`ModelSpec`: what is known of a model that `attach` has verified."""

from dataclasses import dataclass, replace

import torch

from forktree.model.head import LinearHead, OwnHead
from forktree.model.interface import PackedModel
from forktree.model.layer_spec import LayerSpec


@dataclass(frozen=True)
class ModelSpec:
    """A verified model, and what watching it has shown.

    Attributes:
        name: its model type.
        packed: the way to run it.
        layers: by layer_idx.
        residual_note: why hooks cannot see the hidden states between layers; None if they can.
        head: None without a language-model head.
        head_note: which of the three it is, and why.
        hidden_size: of the hidden states that come out, after the last norm.
        hidden_dtype: of the same.
        vocab_size: number of logits, or of embeddings without a head.
        max_position: positions 0 to max_position - 1 are valid; NO_LIMIT where nothing ends them.
        max_position_note: why.
        trained_positions: what the config names as its limit: beyond it, texts may get worse.
    """

    name: str
    packed: PackedModel
    layers: tuple[LayerSpec, ...]
    residual_note: str | None
    head: LinearHead | OwnHead | None
    head_note: str
    hidden_size: int
    hidden_dtype: torch.dtype
    vocab_size: int
    max_position: int
    max_position_note: str
    trained_positions: int

    @property
    def bytes_per_slot(self) -> int:
        """Keys and values of one token in all layers."""
        return sum(layer.format.bytes_per_token for layer in self.layers)

    def with_packed(self, packed: PackedModel | None) -> "ModelSpec":
        """The same for another replica of the model; None: only what was verified, not to be run."""
        head = self.head and replace(self.head, packed=packed)  # type: ignore[arg-type]
        return replace(self, packed=packed, head=head)  # type: ignore[arg-type]
