"""`LayerInspector`: watches verification passes and learns what every layer attends with."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from forktree.model.decoder_layers import hidden_of, watched
from forktree.model.hooks import Rows
from forktree.model.interface import PackedModel, Window
from forktree.model.layer_spec import LayerSpec
from forktree.model.positions import NO_LIMIT
from forktree.model.refusal import Refusal
from forktree.model.step import HostPlans, Step
from forktree.model.verification_tree import VerificationStep, VerificationTree
from forktree.ops import KVFormat, KVPool
from forktree.plan.plan import AttentionPlan


class LayerInspector:
    """Gives each layer that calls attention a spec and a pool, and in every pass a plan.

    Attributes:
        specs: by layer_idx.
        calls: layers that have called attention in this pass, in order.
        residual_note: why hooks cannot see the hidden states between layers, as far as passes have shown; None if they
            can.
    """

    def __init__(self, packed: PackedModel, num_layers: int) -> None:
        self.specs: dict[int, LayerSpec] = {}
        self.calls: list[int] = []
        self.residual_note: str | None = None
        try:
            self._modules = packed.layers
        except LookupError as error:
            self._modules, self.residual_note = [], str(error)
        self._packed = packed
        self._num_layers = num_layers
        self._pools: dict[int, KVPool] = {}
        self._outputs: list[tuple[int, int]] = []  # of decoder layers: which, and how many layers had attended by then

    def begin(self, step: VerificationStep) -> Step:
        """The step of a new pass."""
        self.calls, self._outputs = [], []
        self._layout = step.layout
        self._plans: dict[LayerSpec, AttentionPlan] = {}
        self._by_layer: dict[int, AttentionPlan] = {}
        positions, slots = (torch.as_tensor(x, device=self._packed.device) for x in (step.positions, step.slots))
        return Step(Rows(positions, slots, {}), self._pools, HostPlans(self._by_layer), inspect=self._inspect)

    def _inspect(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: Any) -> None:
        self.calls.append(layer)
        (_, num_qo_heads, head_dim), (_, num_kv_heads, value_dim) = query.shape, value.shape
        if not query.dtype == key.dtype == value.dtype:
            raise Refusal(
                f"expected queries, keys and values of one dtype, as transformers' eager attention does, got "
                f"{query.dtype}, {key.dtype} and {value.dtype} in layer {layer}; cast them in the model"
            )
        size = _verified_size(window, query.device)
        spec = LayerSpec(size, num_qo_heads, KVFormat(key.dtype, num_kv_heads, head_dim, value_dim))
        known = self.specs.setdefault(layer, spec)
        if known != spec:
            raise Refusal(f"expected layer {layer} to stay, got {known}, then {spec}")
        if layer not in self._pools:
            # NaN: reading a slot that nobody wrote spoils the logits
            self._pools[layer] = spec.format.pool(VerificationTree.num_tokens, self._packed.device)
            for tensor in self._pools[layer].tensors:
                tensor.fill_(torch.nan)
        if spec not in self._plans:
            self._plans[spec] = spec.plan(self._layout, self._packed.device)
        self._by_layer[layer] = self._plans[spec]

    def watching(self) -> AbstractContextManager[None]:
        """Within, decoder layers are watched."""
        return watched(self._modules, self._see_output)

    def _see_output(self, layer: int, output: Any) -> None:
        hidden = hidden_of(output)
        fits = isinstance(hidden, Tensor) and hidden.ndim == 3 and len(hidden) == 1
        if self.residual_note is None and not fits:
            kind = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            self.residual_note = f"expected decoder layer {layer} to return hidden states [1, T, H], got {kind}"
        self._outputs.append((layer, len(self.calls)))

    def check_pass(self) -> None:
        """Looks back on the pass that has ended. Raises `Refusal` unless every layer called attention once."""
        layers = range(self._num_layers)
        if sorted(self.calls) != list(layers):
            raise Refusal(self._calls_refused())
        if self.residual_note is None and self._outputs != [(layer, layer + 1) for layer in layers]:
            self.residual_note = (
                "expected decoder layers to run one after the other, each around its attention, got (layer, layers "
                f"that had attended when it ended) {self._outputs}"
            )

    def _calls_refused(self) -> str:
        if len(set(self.calls)) < len(self.calls):
            otherwise = "attends once a pass: there is room for one key and value of a token"
        else:
            otherwise = (
                "is softmax attention by transformers' attention function: state-space, convolution and linear "
                "attention layers keep a state that cannot be forked, and some models attend by themselves"
            )
        return (
            f"expected each of the layers 0 to {self._num_layers - 1} to call attention once, got calls from layers "
            f"{self.calls}; use a model whose every layer {otherwise}"
        )


def _verified_size(window: Any, device: torch.device) -> int | None:
    """The size of a window whose mask function is causal-and-window at all positions where others differ."""
    if not isinstance(window, Window):
        raise Refusal(
            f"expected forktree's Window as the attention mask of every layer, got {type(window).__name__}; "
            "use a model that leaves its masks to transformers"
        )
    near = [2**e for e in range(21)] + ([] if window.size is None else [m * window.size for m in (1, 2, 3)])
    at = torch.tensor(sorted({max(0, pos + d) for pos in near for d in (-2, -1, 0, 1)}), device=device)
    q, k = at[:, None], at[None, :]
    expected = (k <= q) & (k > q - (NO_LIMIT if window.size is None else window.size))
    got = window.mask_function(0, 0, q, k).expand_as(expected)
    if not torch.equal(got, expected):
        i, j = (got != expected).nonzero()[0].tolist()
        raise Refusal(
            f"expected position {at[i]} {'to see' if expected[i, j] else 'not to see'} position {at[j]}, as "
            f"in causal attention with window {window.size}, got the opposite; use a model without chunked "
            "or bidirectional attention"
        )
    return window.size
