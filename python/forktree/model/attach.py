"""`attach`: prove that forktree computes what the model computes, or refuse the model by name.

Flags cannot be trusted: `_supports_attention_backend` is True for models that keep convolution states or
chunk their attention, and those come out silently wrong. So a small tree is decoded. Four things must hold:

1. our `Window` arrives at every layer as `attention_mask`; it is the truth about windows, some models state
   them nowhere else;
2. transformers' own mask function equals causal-and-window around the multiples of the window;
3. every layer calls attention exactly once;
4. the tree's logits equal those of the model's own eager attention on each path alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from forktree.errors import InvalidInput, UnsupportedModel
from forktree.model.head import LinearHead, OwnHead, find_linear_head, is_scored_alike
from forktree.model.interface import PackedModel, Window, find_decoder
from forktree.model.layers import LayerKind, Pool, append_and_attend
from forktree.model.proof_tree import ProofStep, ProofTree
from forktree.model.replica import Replica
from forktree.ops import check_settings
from forktree.plan import AttentionPlan

NO_LIMIT = 2**31 - 1  # positions are int32

# Correct models measure 1e-6 in fp32; up to 0.02 in fp16 and 0.1 in bf16, at 48 layers with peaked attention.
# Wrong ones are near 1, or at 0.1 to 0.3 if one layer of 24 is: half precision refuses clear mismatches only.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}


@dataclass(frozen=True)
class ModelSpec:
    """A model that passed the proof, and what watching it has shown."""

    name: str
    packed: PackedModel
    layers: tuple[LayerKind, ...]  # by layer_idx
    head: LinearHead | OwnHead | None  # None: no language-model head
    head_note: str  # which of the three, and why
    hidden_size: int
    vocab_size: int
    max_position: int  # positions 0 .. max_position - 1 are valid; NO_LIMIT where the model states none
    max_position_note: str

    @property
    def bytes_per_slot(self) -> int:
        """Keys and values of one token in all layers."""
        numbers = sum(kind.num_kv_heads * (kind.head_dim + kind.value_dim) for kind in self.layers)
        return numbers * self.packed.dtype.itemsize


def attach(model: PreTrainedModel) -> ModelSpec:
    """Proves the model, in a few forward passes over 24 tokens, and leaves it as it was.

    Raises UnsupportedModel, naming the model type, if the proof fails; InvalidInput in training mode, or if the
    environment asks for a backend or instruction set that is not there.
    """
    name = model.config.model_type
    if model.training:
        raise InvalidInput(f"{name}: expected evaluation mode, got training mode; call model.eval()")
    try:
        check_settings()
    except ValueError as error:
        raise InvalidInput(str(error)) from None
    try:
        return _prove(model)
    except _Refusal as refusal:
        raise UnsupportedModel(f"{name}: {refusal}") from None
    except torch.OutOfMemoryError:
        raise  # says nothing about the model
    except Exception as error:  # models that expect a cache of their own fail in their own ways
        raise UnsupportedModel(
            f"{name}: expected the model to run packed tokens with its attention replaced, got "
            f"{type(error).__name__}: {error}; use a model whose every layer is ordinary softmax attention"
        ) from error


class _Refusal(Exception):
    """Expected, got, what to do; `attach` puts the model type in front."""


@torch.no_grad()
def _prove(model: PreTrainedModel) -> ModelSpec:
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise _Refusal("expected a decoder, got an encoder-decoder; use a model without cross attention")
    packed = PackedModel(model)
    embeddings: Any = model.get_input_embeddings()
    vocab_size: int = embeddings.weight.shape[0]
    tree = ProofTree(vocab_size)
    own = _run_eagerly(packed, tree)

    head: LinearHead | OwnHead | None = None
    head_note = "no language-model head: hidden states only"
    if own.logits is not None:
        vocab_size = own.logits.shape[-1]
        head, head_note = _prove_head(OwnHead(packed, own.output_class), own.hidden[0], own.logits[0])

    probe = _Probe(packed)
    errors = []
    for step in map(tree.step, range(tree.num_steps)):
        tokens, positions = (torch.as_tensor(x, device=packed.device) for x in (step.tokens, step.positions))
        probe.begin(step)
        hidden = packed.forward(tokens, positions, probe)
        _check_layers(probe.calls, config.num_hidden_layers)
        if own.logits is None or head is None:
            errors.append(_relative_error(hidden, own.hidden[step.node, step.positions]))
        else:
            errors.append(_relative_error(head.logits(hidden), own.logits[step.node, step.positions]))
    _check_errors(torch.cat(errors), packed.dtype)

    max_position, max_position_note = _max_position(config)
    return ModelSpec(
        name=model.config.model_type,
        packed=packed,
        layers=tuple(probe.kinds[layer] for layer in range(config.num_hidden_layers)),
        head=head,
        head_note=head_note,
        hidden_size=own.hidden.shape[-1],
        vocab_size=vocab_size,
        max_position=max_position,
        max_position_note=max_position_note,
    )


# ---- what the model says ----


@dataclass(frozen=True)
class _Own:
    hidden: Tensor  # [nodes, L, H] of each node's path
    logits: Tensor | None  # [nodes, L, V]
    output_class: type[ModelOutput]  # what the decoder returns


def _run_eagerly(packed: PackedModel, tree: ProofTree) -> _Own:
    """Every path is a row of its own; short ones are padded on the right, where causal models never look."""
    ids = torch.zeros(len(tree.paths), max(map(len, tree.paths)), dtype=torch.long)
    for row, path in zip(ids, tree.paths, strict=True):
        row[: len(path)] = torch.as_tensor(path)
    ids = ids.to(packed.device)
    root = Replica(packed.model, "eager").root
    decoder, outputs = find_decoder(root), []
    vars(decoder)["_forward_hooks"] = decoder._forward_hooks.copy()  # it shares them with the model's own
    decoder.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    has_head = packed.model.get_output_embeddings() is not None
    output: Any = (root if has_head else decoder)(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, return_dict=True
    )
    return _Own(outputs[0].last_hidden_state, output.logits if has_head else None, type(outputs[0]))


def _prove_head(own: OwnHead, hidden: Tensor, logits: Tensor) -> tuple[LinearHead | OwnHead, str]:
    """hidden [n, H], logits [n, V] of the model itself."""
    error = _relative_error(own.logits(hidden), logits).max().item()
    if not error <= _TOLERANCE[hidden.dtype]:
        raise _Refusal(
            f"expected logits to follow from the last hidden state, got a relative error of {error:.2g}; "
            "use the model without its head"
        )
    # Also where logits reach 100: a cap, stated in the config or not, cannot hide there.
    hidden = torch.cat([hidden, hidden * (100 / logits.abs().max())])
    logits = own.logits(hidden)
    linear = find_linear_head(own.packed, hidden, logits)
    if linear is None:
        return own, "the head is not cap(scale * (h W^T + b)): logits come unfused, from the model's own head"
    if not is_scored_alike(linear, hidden, logits):
        return own, "score_tokens does not reproduce the logits: they come unfused, from the model's own head"
    return (
        linear,
        f"linear head, scale {linear.scale:g}, cap {linear.cap}, {'no ' if linear.parameters[1] is None else ''}bias",
    )


def _max_position(config: Any) -> tuple[int, str]:
    """How many positions the model has, and why.

    RoPE of type `dynamic` and `longrope` picks its frequencies by the longest position of the whole packed
    row: beyond the original length, one long sequence would change every other one.
    """
    limit = getattr(config, "max_position_embeddings", None) or NO_LIMIT
    note = f"max_position_embeddings is {limit}"
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *rope.values()]:  # one dict, or one for each type of layer
        if isinstance(parameters, dict) and parameters.get("rope_type") in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings") or limit
            if original <= limit:
                limit = original
                note = (
                    f"{parameters['rope_type']} RoPE changes for the whole batch beyond "
                    f"original_max_position_embeddings, which is {original}"
                )
    return limit, note


# ---- what forktree sees ----


class _Probe:
    """A `Step` that learns the kind of each layer when it calls, then computes as every other step does."""

    def __init__(self, packed: PackedModel) -> None:
        self.packed = packed
        self.kinds: dict[int, LayerKind] = {}  # by layer_idx
        self.pools: dict[int, Pool] = {}

    def begin(self, step: ProofStep) -> None:
        self.num_tokens = len(step.tokens)
        self.slots = torch.as_tensor(step.slots, device=self.packed.device)
        self.layout = step.layout
        self.plans: dict[LayerKind, AttentionPlan] = {}
        self.calls: list[int] = []

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, window: Any, **options: Any) -> Tensor:
        self.calls.append(layer_idx)
        (_, num_qo_heads, head_dim), (_, num_kv_heads, value_dim) = query.shape, value.shape
        size = _proved_size(window, query.device)
        kind = LayerKind(size, num_qo_heads, num_kv_heads, head_dim, value_dim)
        known = self.kinds.setdefault(layer_idx, kind)
        if known != kind:
            raise _Refusal(f"expected layer {layer_idx} to stay, got {known}, then {kind}")
        if layer_idx not in self.pools:
            # NaN: reading a slot that nobody wrote spoils the logits
            self.pools[layer_idx] = kind.pool(ProofTree.num_tokens, self.packed.dtype, self.packed.device)
            for tensor in self.pools[layer_idx]:
                tensor.fill_(torch.nan)
        if kind not in self.plans:
            self.plans[kind] = kind.plan(self.layout, self.packed.device)
        pool, plan = self.pools[layer_idx], self.plans[kind]
        return append_and_attend(query, key, value, self.slots, pool, plan, **options)


def _proved_size(window: Any, device: torch.device) -> int | None:
    """The size of a window whose mask function is causal-and-window at all positions where others differ."""
    if not isinstance(window, Window):
        raise _Refusal(
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
        raise _Refusal(
            f"expected position {at[i]} {'to see' if expected[i, j] else 'not to see'} position {at[j]}, as "
            f"in causal attention with window {window.size}, got the opposite; use a model without chunked "
            "or bidirectional attention"
        )
    return window.size


def _check_layers(calls: list[int], num_layers: int) -> None:
    if sorted(calls) != list(range(num_layers)):
        raise _Refusal(
            f"expected each of the layers 0 to {num_layers - 1} to call attention once, got calls from "
            f"layers {calls}; use a model without state-space, convolution or linear attention layers: they "
            "keep a state that cannot be forked"
        )


def _relative_error(ours: Tensor, own: Tensor) -> Tensor:
    """[n, X], [n, X] -> [n]: error of each row, relative to the spread of the row."""
    own = own.float()
    error: Tensor = (ours.float() - own).norm(dim=-1) / (own - own.mean(-1, keepdim=True)).norm(dim=-1)
    return error


def _check_errors(errors: Tensor, dtype: torch.dtype) -> None:
    """errors: of each token of the tree. In half precision the median counts: some tokens may choose other
    experts for rounding alone."""
    tolerance = _TOLERANCE[dtype]
    error = (errors.max() if torch.finfo(dtype).bits >= 32 else errors.median()).item()
    if not error <= tolerance:
        raise _Refusal(
            f"expected a tree of {len(errors)} tokens to give the model's own eager logits within "
            f"{tolerance:g} of their spread, got {error:.2g}; use a model that keeps no state outside its KV "
            "cache"
        )
