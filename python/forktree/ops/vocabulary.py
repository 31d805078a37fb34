"""What all backends of `score_tokens` share: the request as tensors, and the parts that need no pass over lm_head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from forktree.device.transfer import upload
from forktree.ops.reference.precision import math_dtype
from forktree.ops.token_request import Ragged, TokenRequest, TokenScores

GATHERED = 4 << 20  # bytes of rows of lm_head held at once, in the type of the math


class Vocabulary(NamedTuple):
    """What a pass over the whole vocabulary found; fp32 (fp64 for fp64 hidden states), empty where not asked for."""

    lse: Tensor  # [T]
    entropy: Tensor  # [T]
    top_ids: Tensor  # [T, k] int64, best first, lower ids first among equals
    top_logits: Tensor  # [T, k]
    token: Tensor  # [T] int64
    token_logit: Tensor  # [T] as the model gives it; NaN where the row is not finite or nothing is left
    shaped_log_prob: Tensor  # [T] likewise

    @classmethod
    def empty(cls, hidden: Tensor, top_k: int, entropy: bool, draws: bool) -> Vocabulary:
        """Room for it, on the device of hidden [T, ...]."""
        rows, real = hidden.shape[0], math_dtype(hidden)
        drawn = rows if draws else 0
        return cls(
            lse=hidden.new_empty(rows, dtype=real),
            entropy=hidden.new_empty(rows if entropy else 0, dtype=real),
            top_ids=hidden.new_empty(rows, top_k, dtype=torch.long),
            top_logits=hidden.new_empty(rows, top_k, dtype=real),
            token=hidden.new_empty(drawn, dtype=torch.long),
            token_logit=hidden.new_empty(drawn, dtype=real),
            shaped_log_prob=hidden.new_empty(drawn, dtype=real),
        )


Launch = Callable[..., Any]  # the arguments of `forktree::score_tokens` (forktree.ops.library) -> those of Vocabulary


def answer(
    launch: Launch,
    hidden: Tensor,
    lm_head: Tensor,
    request: TokenRequest,
    *,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> TokenScores:
    """The whole request: `launch` passes over the vocabulary, if that is needed; the rest is gathered."""

    def logits(products: Tensor, ids: Tensor) -> Tensor:
        z = scale * (products if bias is None else products + bias[ids].to(products.dtype))
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    return complete(
        hidden,
        lm_head.shape[0],
        request,
        launch=lambda *wanted: launch(hidden, lm_head, bias, scale, softcap or 0.0, *wanted),
        of_pairs=lambda rows, ids: logits(paired(hidden, lm_head, rows, ids), ids),
        of_all=lambda ids: logits(crossed(hidden, lm_head, ids), ids),
    )


def complete(
    hidden: Tensor,
    vocab: int,
    request: TokenRequest,
    *,
    launch: Launch,
    of_pairs: Callable[[Tensor, Tensor], Tensor],
    of_all: Callable[[Tensor], Tensor],
) -> TokenScores:
    """The whole request, wherever the logits come from.

    launch: takes its arguments from top_k on. of_pairs: the logits of rows and ids `[n]`. of_all: those of ids `[n]` in
    every row, `[T, n]`.
    """
    found: dict[str, Tensor] = {}
    if request.needs_vocabulary:
        top_k = min(max(request.top_k, 2 if request.margin else 0), vocab)
        found |= _of_vocabulary(Vocabulary(*launch(top_k, *tensors(request, hidden))), request)
    lse = found.get("lse")

    def every() -> Tensor:
        return torch.arange(len(hidden), device=hidden.device)

    if request.targets is not None and lse is not None:
        found["target_log_probs"] = of_pairs(every(), request.targets.long()) - lse
    if isinstance(request.select, Ragged):
        rows = every().repeat_interleave(request.select.indptr.long().diff(), output_size=len(request.select.ids))
        found["selected_logits"] = z = of_pairs(rows, request.select.ids.long())
        if lse is not None:
            found["selected_log_probs"] = z - lse[rows]
    elif request.select is not None:
        found["selected_logits"] = z = of_all(request.select.long())
        if lse is not None:
            found["selected_log_probs"] = z - lse[:, None]
    if request.value is not None:
        found["values"] = request.value(hidden)
    if request.rewards is not None:
        if request.top_k:
            ids = found["top_ids"]
            found["top_rewards"] = paired(hidden, request.rewards, every()[:, None].expand_as(ids), ids)
        if request.draw is not None:
            found["token_reward"] = paired(hidden, request.rewards, every(), found["token"])
    return TokenScores(**found)


def tensors(request: TokenRequest, hidden: Tensor) -> tuple[Any, ...]:
    """What `launch` takes behind top_k: entropy, keys, settings, truncates, the four columns of edits, allowed."""
    draw, device = request.draw, hidden.device
    if draw is None:
        return request.entropy, None, None, False, None, None, None, None, None

    edits: tuple[Tensor | None, ...] = (None,) * 4
    if draw.edits is not None and len(draw.edits.ids):
        columns = (draw.edits.indptr, draw.edits.ids, draw.edits.ops, draw.edits.values)
        edits = tuple(upload(x, device) for x in columns)
    allowed = None if draw.allowed is None else draw.allowed.to(device, non_blocking=True).contiguous()
    numbers = upload(np.vstack([draw.keys.view(np.float64), draw.settings]), device)  # of 8 bytes all: one copy
    return request.entropy, numbers[0].view(torch.int64), numbers[1:], draw.truncates, *edits, allowed


def _of_vocabulary(found: Vocabulary, request: TokenRequest) -> dict[str, Tensor]:
    scores = {"lse": found.lse}
    if request.entropy:
        scores["entropy"] = found.entropy
    if request.margin:
        best = found.top_logits
        scores["margin"] = best[:, 0] - best[:, 1] if best.shape[1] > 1 else torch.full_like(found.lse, torch.inf)
    if request.top_k:
        scores["top_ids"] = found.top_ids[:, : request.top_k]
        scores["top_log_probs"] = found.top_logits[:, : request.top_k] - found.lse[:, None]
    if request.draw is not None:
        scores["token"] = found.token
        scores["log_prob"] = found.token_logit - found.lse
        scores["shaped_log_prob"] = found.shaped_log_prob
    return scores


def crossed(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """hidden[t] · weight[id] for all rows and ids, [T, n], summed in fp32 (fp64 for fp64)."""
    math = math_dtype(hidden)
    some = max(1, GATHERED // (hidden.shape[1] * math.itemsize))
    rows = hidden.to(math)
    return torch.cat([rows @ weight[of].to(math).T for of in ids.split(some)], dim=1)


def paired(hidden: Tensor, weight: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """hidden[row] · weight[id] for every pair, in their shape, summed in fp32 (fp64 for fp64)."""
    math = math_dtype(hidden)
    shape, rows, ids = rows.shape, rows.reshape(-1), ids.reshape(-1)
    some = max(1, GATHERED // (hidden.shape[1] * math.itemsize))
    parts = [
        torch.linalg.vecdot(hidden[at].to(math), weight[of].to(math))
        for at, of in zip(rows.split(some), ids.split(some), strict=True)
    ]
    return torch.cat(parts).reshape(shape)
