"""`attach`: prove that forktree computes what the model computes, or refuse the model by name.

Flags cannot be trusted: `_supports_attention_backend` is True for models that keep convolution states or
chunk their attention, and those come out silently wrong. So a small tree is decoded. Four things must hold:

1. our `Window` arrives at every layer as `attention_mask`; it is the truth about windows, some models state
   them nowhere else;
2. transformers' own mask function equals causal-and-window around the multiples of the window;
3. every layer calls attention exactly once;
4. the tree's logits equal those of the model's own eager attention on each path alone.
"""

import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from forktree.errors import InvalidInput, UnsupportedModel
from forktree.model.head import LinearHead, OwnHead, find_linear_head, is_scored_alike, largest
from forktree.model.interface import PackedModel, Window, execution_devices, find_decoder
from forktree.model.layer_spec import LayerKind, append_and_attend
from forktree.model.positions import NO_LIMIT, PositionTables, find_max_position, trained_positions
from forktree.model.replica import Replica
from forktree.model.verify import ProofStep, ProofTree
from forktree.ops import check_settings
from forktree.ops.pool import KVPool
from forktree.plan.plan import AttentionPlan

# Correct models measure 1e-6 in fp32; up to 0.02 in fp16 and 0.1 in bf16, at 48 layers with peaked attention.
# Wrong ones are near 1, or at 0.1 to 0.3 if one layer of 24 is: half precision refuses clear mismatches only.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
_COARSE = 0.2  # for anything less precise


@dataclass(frozen=True)
class ModelSpec:
    """A model that passed the proof, and what watching it has shown."""

    name: str
    packed: PackedModel
    layers: tuple[LayerKind, ...]  # by layer_idx
    head: LinearHead | OwnHead | None  # None: no language-model head
    head_note: str  # which of the three, and why
    hidden_size: int
    hidden_dtype: torch.dtype
    vocab_size: int
    max_position: int  # positions 0 .. max_position - 1 are valid; NO_LIMIT where nothing ends them
    max_position_note: str
    trained_positions: int  # what the config names as its limit: beyond, texts may get worse

    @property
    def bytes_per_slot(self) -> int:
        """Keys and values of one token in all layers."""
        return sum(kind.kv_format.bytes_per_token for kind in self.layers)


def attach(model: PreTrainedModel) -> ModelSpec:
    """Proves the model, in a few forward passes over 24 tokens, and leaves it as it was.

    Raises UnsupportedModel, naming the model type, if the proof fails; InvalidInput in training mode, or if the
    environment asks for a backend or instruction set that is not there.
    """
    name = getattr(getattr(model, "config", None), "model_type", None)
    if name is None:
        raise InvalidInput(f"expected a transformers model, got {type(model).__name__}")
    if model.training:
        raise InvalidInput(f"{name}: expected evaluation mode, got training mode; call model.eval()")
    try:
        check_settings()
    except ValueError as error:
        raise InvalidInput(str(error)) from None
    try:
        with _refusing(model, "a decoder of text", "use a causal language model of transformers"):
            return _prove(model)
    except _Refusal as refusal:
        raise UnsupportedModel(f"{name}: {refusal}") from refusal.__cause__


class _Refusal(Exception):
    """Expected, got, what to do; `attach` puts the model type in front."""


@contextmanager
def _refusing(model: nn.Module, expected: str, otherwise: str, calls: list[int] | None = None) -> Iterator[None]:
    """Models that are not what they are taken for fail in their own ways: whatever is raised within is a refusal, which
    names the innermost of their modules that raised it. calls: of attention, if there should be any."""
    try:
        yield
    except (_Refusal, torch.OutOfMemoryError):  # the latter says nothing about the model
        raise
    except Exception as error:
        what = next(iter(str(error).splitlines()), "")
        owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        names = {id(module): name for name, module in model.named_modules() if name}
        where = next((f" in {names[id(owner)]}" for owner in reversed(owners) if id(owner) in names), "")
        if calls == []:
            where += " before any layer called transformers' attention function"
        raise _Refusal(f"expected {expected}, got {type(error).__name__}{where}: {what}; {otherwise}") from error


@torch.no_grad()
def _prove(model: PreTrainedModel) -> ModelSpec:
    if model.config.is_encoder_decoder:
        raise _Refusal("expected a decoder, got an encoder-decoder; use a model without cross attention")
    config = model.config.get_text_config(decoder=True)
    _check_devices(model)
    packed = PackedModel(model)
    embeddings: Any = model.get_input_embeddings()
    vocab_size: int = embeddings.weight.shape[0]
    if "position_ids" not in packed.parameters:
        raise _Refusal(
            "expected a decoder that takes position_ids, got one without: it counts the tokens of a row, or reads them "
            "one after the other; use a model that can run tokens of several texts in one row"
        )
    tree = ProofTree(vocab_size)
    steps = [tree.step(step) for step in range(tree.num_steps)]
    with _refusing(model, "the model's own eager forward to run", "mend the model first"):
        own = _run_eagerly(packed, tree, steps)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} | own.dtypes

    head: LinearHead | OwnHead | None = None
    head_note = "no language-model head: hidden states only"
    if own.logits is not None:
        vocab_size = own.logits.shape[-1]
        with _refusing(model, "logits that follow from the last hidden state", "use the model without its head"):
            own_head = OwnHead(packed, own.output_class)
            head, head_note = _prove_head(own_head, own.hidden, own.logits, _Precision.of(dtypes, own.by_company))

    probe = _Probe(packed)
    hidden, tables = _run_packed(packed, steps, probe, config.num_hidden_layers)
    if own.logits is None or head is None or _is_constant(own.logits):
        what, errors = "hidden states", _relative_error(hidden, own.hidden)
    else:
        what, errors = "logits", _relative_error(head.logits(hidden), own.logits)
    _Precision.of(dtypes | {kind.dtype for kind in probe.kinds.values()}, own.by_company).check(
        errors,
        f"a tree of {len(errors)} tokens to give the model's own eager {what}",
        "use a model whose logits follow from its tokens, at positions 0, 1, …, and its KV cache alone",
    )

    max_position, max_position_note = find_max_position(config, tables)
    return ModelSpec(
        name=model.config.model_type,
        packed=packed,
        layers=tuple(probe.kinds[layer] for layer in range(config.num_hidden_layers)),
        head=head,
        head_note=head_note,
        hidden_size=own.hidden.shape[-1],
        hidden_dtype=hidden.dtype,
        vocab_size=vocab_size,
        max_position=max_position,
        max_position_note=max_position_note,
        trained_positions=trained_positions(config),
    )


# ---- what the model says ----


@dataclass(frozen=True)
class _Own:
    """Of the tree's tokens in the order of their steps."""

    hidden: Tensor  # [tokens, H]
    logits: Tensor | None  # [tokens, V]
    output_class: type[ModelOutput]  # what the decoder returns
    by_company: Tensor  # [n] relative errors: one path in the batch of all, and alone

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {x.dtype for x in (self.hidden, self.logits) if x is not None}


def _run_eagerly(packed: PackedModel, tree: ProofTree, steps: list[ProofStep]) -> _Own:
    """Every path is a row of its own; short ones are padded on the right, where causal models never look."""
    ids = torch.zeros(len(tree.paths), max(map(len, tree.paths)), dtype=torch.long)
    for row, path in zip(ids, tree.paths, strict=True):
        row[: len(path)] = torch.as_tensor(path)
    longest = max(range(len(tree.paths)), key=lambda n: len(tree.paths[n]))
    all_hidden, all_logits, output_class = _eager(packed, ids)
    hidden, logits, _ = _eager(packed, ids[longest : longest + 1])
    if logits is None or all_logits is None:
        by_company = _relative_error(hidden[0], all_hidden[longest])
    else:
        by_company = _relative_error(logits[0], all_logits[longest])
    node, position = (np.concatenate([getattr(step, name) for step in steps]) for name in ("node", "positions"))
    own = _Own(
        all_hidden[node, position], None if all_logits is None else all_logits[node, position], output_class, by_company
    )
    rows = own.hidden if own.logits is None else own.logits.float()
    if not (own.hidden.isfinite().all() and rows.logsumexp(-1).isfinite().all()):
        raise _Refusal(
            "expected finite hidden states and logits from the model's own eager forward, got NaN or infinity: its "
            "weights are damaged, or overflow at this dtype"
        )
    if _is_constant(own.hidden):
        raise _Refusal("expected hidden states that depend on the text, got the same for all; load the weights first")
    return own


def _eager(packed: PackedModel, ids: Tensor) -> tuple[Tensor, Tensor | None, type[ModelOutput]]:
    """ids [n, L] -> hidden [n, L, H], logits [n, L, V] and the class of what the decoder returns."""
    root = Replica(packed.model, "eager").root
    decoder, outputs = find_decoder(root), []
    vars(decoder)["_forward_hooks"] = decoder._forward_hooks.copy()  # it shares them with the model's own
    decoder.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    has_head = packed.model.get_output_embeddings() is not None
    ids = ids.to(packed.device)
    output: Any = (root if has_head else decoder)(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, return_dict=True
    )
    return outputs[0].last_hidden_state, output.logits if has_head else None, type(outputs[0])


def _prove_head(
    own_head: OwnHead, hidden: Tensor, logits: Tensor, precision: "_Precision"
) -> tuple[LinearHead | OwnHead, str]:
    """hidden [n, H], logits [n, V] of the model itself."""
    precision.check(
        _relative_error(own_head.logits(hidden), logits),
        "the logits to follow from the last hidden state",
        "use the model without its head",
    )
    # Also where logits reach 100: a cap, stated in the config or not, cannot hide there.
    hidden = torch.cat([hidden, hidden * (100 / largest(logits).clamp(min=1e-3))])
    logits = own_head.logits(hidden)
    linear = find_linear_head(own_head.packed, hidden, logits)
    if linear is None:
        return own_head, "the head is not cap(scale * (h W^T + b)): logits come unfused, from the model's own head"
    if not is_scored_alike(linear, hidden, logits):
        return own_head, "score_tokens does not reproduce the logits: they come unfused, from the model's own head"
    bias = "no bias" if linear.parameters[1] is None else "bias"
    return linear, f"linear head, scale {linear.scale:g}, cap {linear.cap}, {bias}"


# ---- what forktree sees ----


def _run_packed(
    packed: PackedModel, steps: list[ProofStep], probe: "_Probe", num_layers: int
) -> tuple[Tensor, PositionTables]:
    """Hidden states [tokens, H], and what was looked up by position."""
    # in the second step, whose positions are told from everything else that is looked up: they rise and fall
    tables = PositionTables(packed.padded(torch.as_tensor(steps[1].positions, device=packed.device)))
    passes = []
    for step in steps:
        tokens, positions = (torch.as_tensor(x, device=packed.device) for x in (step.tokens, step.positions))
        probe.begin(step)
        with (
            _refusing(
                packed.model,
                "the model to run packed tokens with its attention replaced",
                "use a model whose every layer is softmax attention by transformers' attention function",
                probe.calls,
            ),
            tables if step is steps[1] else nullcontext(),
        ):
            passes.append(packed.forward(tokens, positions, probe))
        _check_layers(probe.calls, num_layers)
    return torch.cat(passes), tables


class _Probe:
    """A `Step` that learns the kind of each layer when it calls, then computes as every other step does."""

    def __init__(self, packed: PackedModel) -> None:
        self.packed = packed
        self.kinds: dict[int, LayerKind] = {}  # by layer_idx
        self.pools: dict[int, KVPool] = {}

    def begin(self, step: ProofStep) -> None:
        self.num_tokens = len(step.tokens)
        self.slots = torch.as_tensor(step.slots, device=self.packed.device)
        self.layout = step.layout
        self.plans: dict[LayerKind, AttentionPlan] = {}
        self.calls: list[int] = []

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, window: Any, **options: Any) -> Tensor:
        self.calls.append(layer_idx)
        (_, num_qo_heads, head_dim), (_, num_kv_heads, value_dim) = query.shape, value.shape
        if not query.dtype == key.dtype == value.dtype:
            raise _Refusal(
                f"expected queries, keys and values of one dtype, as transformers' eager attention does, got "
                f"{query.dtype}, {key.dtype} and {value.dtype} in layer {layer_idx}; cast them in the model"
            )
        size = _proved_size(window, query.device)
        kind = LayerKind(size, num_qo_heads, num_kv_heads, head_dim, value_dim, key.dtype)
        known = self.kinds.setdefault(layer_idx, kind)
        if known != kind:
            raise _Refusal(f"expected layer {layer_idx} to stay, got {known}, then {kind}")
        if layer_idx not in self.pools:
            # NaN: reading a slot that nobody wrote spoils the logits
            self.pools[layer_idx] = kind.kv_format.pool(ProofTree.num_tokens, self.packed.device)
            for tensor in self.pools[layer_idx].tensors:
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


def _check_devices(model: PreTrainedModel) -> None:
    devices = sorted(map(str, execution_devices(model)))
    if len(devices) != 1:
        raise _Refusal(
            f"expected a model that computes on one device, got {' and '.join(devices) or 'weights on meta only'}; "
            "load it on one, as by device_map={'': 0} (weights may lie elsewhere if accelerate brings them there)"
        )


def _check_layers(calls: list[int], num_layers: int) -> None:
    if sorted(calls) == list(range(num_layers)):
        return
    if len(set(calls)) < len(calls):
        otherwise = "attends once a pass: there is room for one key and value of a token"
    else:
        otherwise = (
            "is softmax attention by transformers' attention function: state-space, convolution and linear attention "
            "layers keep a state that cannot be forked, and some models attend by themselves"
        )
    raise _Refusal(
        f"expected each of the layers 0 to {num_layers - 1} to call attention once, got calls from layers {calls}; use "
        f"a model whose every layer {otherwise}"
    )


def _relative_error(ours: Tensor, own: Tensor) -> Tensor:
    """[n, X], [n, X] -> [n]: error of each row, relative to its spread, or to that of all rows where it has less:
    rounding is no smaller in a row of zeros. Infinities count as equal where they are the same, else as infinitely
    wrong."""
    ours, own = ours.float(), own.float()
    numbers = own.masked_fill(own.isinf(), torch.nan)
    spread = (numbers - numbers.nanmean(-1, keepdim=True)).nan_to_num().norm(dim=-1)
    spread = spread.clamp(min=spread.square().mean().sqrt())
    error = (ours - own).masked_fill(ours == own, 0).norm(dim=-1)
    return error / spread.clamp(min=torch.finfo(torch.float32).tiny)


def _is_constant(rows: Tensor) -> bool:
    return bool((rows == rows[0]).all())


@dataclass(frozen=True)
class _Precision:
    """How exactly a model computes, and so how exactly it can be compared with itself."""

    tolerance: float
    by_median: bool  # in half precision some tokens may choose other experts for rounding alone
    note: str

    @classmethod
    def of(cls, dtypes: set[torch.dtype], by_company: Tensor) -> "_Precision":
        """dtypes: all that are involved; the coarsest counts. by_company: what being alone changes, by which arithmetic
        shows that is coarser than its dtypes, as of quantised activations."""
        coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        stated = cls(_TOLERANCE.get(coarsest, _COARSE), torch.finfo(coarsest).bits < 32, str(coarsest))
        if stated.error(by_company) <= stated.tolerance:
            return stated
        error = by_company.median().item()
        if not error <= _COARSE:
            raise _Refusal(
                "expected a text's logits not to depend on what else is in the batch, got a relative error of "
                f"{error:.2g} between the model's own eager results alone and in a batch; use a model whose rows are "
                "independent"
            )
        tolerance = max(stated.tolerance, min(4 * error, _COARSE))
        return cls(tolerance, True, f"its own results vary by {error:.2g} with what else is in the batch")

    def error(self, errors: Tensor) -> float:
        return (errors.median() if self.by_median else errors.max()).item()

    def check(self, errors: Tensor, expected: str, otherwise: str) -> None:
        """errors: of each token of the tree. An infinite one is no rounding."""
        error = math.inf if errors.isinf().any() else self.error(errors)
        if not error <= self.tolerance:
            raise _Refusal(
                f"expected {expected} within {self.tolerance:g} of their spread ({self.note}), got {error:.2g}; "
                f"{otherwise}"
            )
