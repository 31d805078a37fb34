"""`verify`: what `attach` checks of a model.

Flags cannot be trusted: `_supports_attention_backend` is True for models that keep convolution states or
chunk their attention, and those come out silently wrong. So a small tree is decoded. Four things must hold:

1. our `Window` arrives at every layer as `attention_mask`; it is the truth about windows, some models state
   them nowhere else;
2. transformers' own mask function equals causal-and-window around the multiples of the window;
3. every layer calls attention exactly once;
4. the tree's logits equal those of the model's own eager attention on each path alone.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from forktree.model.decoder_layers import watched
from forktree.model.head import LinearHead, OwnHead, find_linear_head, is_scored_alike, largest
from forktree.model.interface import PackedModel, execution_devices, find_decoder
from forktree.model.layer_inspector import LayerInspector
from forktree.model.model_spec import ModelSpec
from forktree.model.positions import PositionTables, find_max_position, trained_positions
from forktree.model.precision import Precision, relative_error
from forktree.model.refusal import Refusal, refusing
from forktree.model.replica import Replica
from forktree.model.verification_tree import VerificationStep, VerificationTree


@torch.no_grad()
def verify(model: PreTrainedModel) -> ModelSpec:
    """Returns what is known of the model; raises `Refusal` if it is not one that forktree computes."""
    if model.config.is_encoder_decoder:
        raise Refusal("expected a decoder, got an encoder-decoder; use a model without cross attention")
    config = model.config.get_text_config(decoder=True)
    _check_devices(model)
    packed = PackedModel(model)
    embeddings: Any = model.get_input_embeddings()
    vocab_size: int = embeddings.weight.shape[0]
    if "position_ids" not in packed.parameters:
        raise Refusal(
            "expected a decoder that takes position_ids, got one without: it counts the tokens of a row, or reads them "
            "one after the other; use a model that can run tokens of several texts in one row"
        )
    tree = VerificationTree(vocab_size)
    steps = [tree.step(step) for step in range(tree.num_steps)]
    with refusing(model, "the model's own eager forward to run", "mend the model first"):
        own = _run_eagerly(packed, tree, steps)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} | own.dtypes

    head: LinearHead | OwnHead | None = None
    head_note = "no language-model head: hidden states only"
    if own.logits is not None:
        vocab_size = own.logits.shape[-1]
        with refusing(model, "logits that follow from the last hidden state", "use the model without its head"):
            own_head = OwnHead(packed, own.output_class)
            head, head_note = _verify_head(own_head, own.hidden, own.logits, Precision.of(dtypes, own.batch_errors))

    inspector = LayerInspector(packed, config.num_hidden_layers)
    hidden, tables = _run_packed(packed, steps, inspector)
    if own.logits is None or head is None or _is_constant(own.logits):
        what, errors = "hidden states", relative_error(hidden, own.hidden)
    else:
        what, errors = "logits", relative_error(head.logits(hidden), own.logits)
    Precision.of(dtypes | {spec.format.dtype for spec in inspector.specs.values()}, own.batch_errors).check(
        errors,
        f"a tree of {len(errors)} tokens to give the model's own eager {what}",
        "use a model whose logits follow from its tokens, at positions 0, 1, …, and its KV cache alone",
    )

    max_position, max_position_note = find_max_position(config, tables)
    return ModelSpec(
        name=model.config.model_type,
        packed=packed,
        layers=tuple(inspector.specs[layer] for layer in range(config.num_hidden_layers)),
        residual_note=inspector.residual_note,
        head=head,
        head_note=head_note,
        hidden_size=own.hidden.shape[-1],
        hidden_dtype=hidden.dtype,
        vocab_size=vocab_size,
        max_position=max_position,
        max_position_note=max_position_note,
        trained_positions=trained_positions(config),
    )


def _check_devices(model: PreTrainedModel) -> None:
    devices = sorted(map(str, execution_devices(model)))
    if len(devices) != 1:
        raise Refusal(
            f"expected a model that computes on one device, got {' and '.join(devices) or 'weights on meta only'}; "
            "load it on one, as by device_map={'': 0} (weights may lie elsewhere if accelerate brings them there)"
        )


# ---- what the model says ----


@dataclass(frozen=True)
class _Own:
    """What the model itself computes of the tree's tokens, in the order of their steps."""

    hidden: Tensor  # [tokens, H]
    logits: Tensor | None  # [tokens, V]
    output_class: type[ModelOutput]  # what the decoder returns
    batch_errors: Tensor  # [n] relative errors between one path in the batch of all, and alone

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {x.dtype for x in (self.hidden, self.logits) if x is not None}


def _run_eagerly(packed: PackedModel, tree: VerificationTree, steps: list[VerificationStep]) -> _Own:
    """Every path is a row of its own; short ones are padded on the right, where causal models never look."""
    ids = torch.zeros(len(tree.paths), max(map(len, tree.paths)), dtype=torch.long)
    for row, path in zip(ids, tree.paths, strict=True):
        row[: len(path)] = torch.as_tensor(path)
    longest = max(range(len(tree.paths)), key=lambda n: len(tree.paths[n]))
    all_hidden, all_logits, output_class = _eager(packed, ids)
    hidden, logits, _ = _eager(packed, ids[longest : longest + 1])
    if logits is None or all_logits is None:
        batch_errors = relative_error(hidden[0], all_hidden[longest])
    else:
        batch_errors = relative_error(logits[0], all_logits[longest])
    node, position = (np.concatenate([getattr(step, name) for step in steps]) for name in ("node", "positions"))
    own = _Own(
        hidden=all_hidden[node, position],
        logits=None if all_logits is None else all_logits[node, position],
        output_class=output_class,
        batch_errors=batch_errors,
    )
    rows = own.hidden if own.logits is None else own.logits.float()
    if not (own.hidden.isfinite().all() and rows.logsumexp(-1).isfinite().all()):
        raise Refusal(
            "expected finite hidden states and logits from the model's own eager forward, got NaN or infinity: its "
            "weights are damaged, or overflow at this dtype"
        )
    if _is_constant(own.hidden):
        raise Refusal("expected hidden states that depend on the text, got the same for all; load the weights first")
    return own


def _eager(packed: PackedModel, ids: Tensor) -> tuple[Tensor, Tensor | None, type[ModelOutput]]:
    """ids [n, L] -> hidden [n, L, H], logits [n, L, V] and the class of what the decoder returns."""
    root = Replica(packed.model, "eager").root
    decoder, outputs = find_decoder(root), []
    has_head = packed.model.get_output_embeddings() is not None
    ids = ids.to(packed.device)
    with watched([decoder], lambda _, output: outputs.append(output)):
        output: Any = (root if has_head else decoder)(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, return_dict=True
        )
    return outputs[0].last_hidden_state, output.logits if has_head else None, type(outputs[0])


def _is_constant(rows: Tensor) -> bool:
    return bool((rows == rows[0]).all())


def _verify_head(
    own_head: OwnHead, hidden: Tensor, logits: Tensor, precision: Precision
) -> tuple[LinearHead | OwnHead, str]:
    """hidden [n, H], logits [n, V] of the model itself."""
    precision.check(
        relative_error(own_head.logits(hidden), logits),
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


# ---- what forktree computes ----


def _run_packed(
    packed: PackedModel, steps: list[VerificationStep], inspector: LayerInspector
) -> tuple[Tensor, PositionTables]:
    """Hidden states [tokens, H], and what was looked up by position."""
    # in the second step, whose positions are told from everything else that is looked up: they rise and fall
    tables = PositionTables(packed.padded(torch.as_tensor(steps[1].positions, device=packed.device)))
    passes = []
    for step in steps:
        tokens = torch.as_tensor(step.tokens, device=packed.device)
        packed_step = inspector.begin(step)
        with (
            refusing(
                packed.model,
                "the model to run packed tokens with its attention replaced",
                "use a model whose every layer is softmax attention by transformers' attention function",
                inspector.calls,
            ),
            inspector.watching(),
            tables if step is steps[1] else nullcontext(),
        ):
            passes.append(packed.forward(tokens, packed_step))
        inspector.check_pass()
    return torch.cat(passes), tables
