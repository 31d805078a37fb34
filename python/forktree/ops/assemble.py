"""`forktree.ops.score_tokens` from its parts: one pass over the vocabulary by a backend, and what is gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from forktree.device.transfer import upload
from forktree.ops.checks import math_dtype
from forktree.ops.token_request import RaggedIds, TokenRequest, TokenScores

GATHERED = 4 << 20  # bytes of rows of lm_head held at once, in the type of the math


class LmHead(NamedTuple):
    """logits = softcap * tanh(scale * (h W^T + b) / softcap), without the tanh where softcap is None."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    def finish(self, products: Tensor, ids: Tensor) -> Tensor:
        """Logits of products h W^T, with the tokens that they belong to."""
        z = self.scale * (products if self.bias is None else products + self.bias[ids].to(products.dtype))
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


class VocabPass(NamedTuple):
    """What one pass over the vocabulary is to find, of each row of hidden states [T, H]; all on their device."""

    top_k: int = 0  # at most V
    entropy: bool = False
    keys: Tensor | None = None  # [T] int64, bits of `KeyedSampling.keys`; None: nothing is sampled
    settings: Tensor | None = None  # [4, T] fp64, `KeyedSampling.settings`
    has_truncation: bool = False
    edit_indptr: Tensor | None = None  # [T + 1] int32, `KeyedSampling.edits` by its columns
    edit_ids: Tensor | None = None  # [E] int32
    edit_ops: Tensor | None = None  # [E] int32
    edit_values: Tensor | None = None  # [E] fp32
    allowed: Tensor | None = None  # [T, ceil(V / 32)] int32

    @classmethod
    def of(cls, request: TokenRequest, hidden: Tensor, vocab: int) -> VocabPass:
        """What `request` asks of hidden [T, H] and V logits each."""
        top_k, sample, device = min(request.top_k, vocab), request.sample, hidden.device
        if sample is None:
            return cls(top_k, request.entropy)
        numbers = upload(np.vstack([sample.keys.view(np.float64), sample.settings]), device)  # of 8 bytes all: one copy
        wanted = cls(top_k, request.entropy, numbers[0].view(torch.int64), numbers[1:], sample.has_truncation)
        if sample.allowed is not None:
            wanted = wanted._replace(allowed=sample.allowed.to(device, non_blocking=True).contiguous())
        if sample.edits is not None and len(sample.edits.ids):
            edits = sample.edits
            indptr, ids, ops, values = (upload(x, device) for x in (edits.indptr, edits.ids, edits.ops, edits.values))
            wanted = wanted._replace(edit_indptr=indptr, edit_ids=ids, edit_ops=ops, edit_values=values)
        return wanted

    @property
    def edits(self) -> tuple[Tensor | None, ...]:
        """indptr, ids, ops and values."""
        return self.edit_indptr, self.edit_ids, self.edit_ops, self.edit_values


class VocabPassResult(NamedTuple):
    """What the pass found; fp32 (fp64 for fp64 hidden states), empty where it was not asked for."""

    lse: Tensor  # [T]
    entropy: Tensor  # [T]
    top_ids: Tensor  # [T, k] int64, best first, lower ids first among equals
    top_logits: Tensor  # [T, k]
    token: Tensor  # [T] int64
    token_logit: Tensor  # [T] as the model gives it; NaN where the row is not finite or nothing is left
    shaped_log_prob: Tensor  # [T] likewise

    @classmethod
    def empty(cls, like: Tensor, wanted: VocabPass) -> VocabPassResult:
        """Room for it, on the device of `like [T, ...]`."""
        rows, real = like.shape[0], math_dtype(like)
        sampled = 0 if wanted.keys is None else rows
        return cls(
            lse=like.new_empty(rows, dtype=real),
            entropy=like.new_empty(rows if wanted.entropy else 0, dtype=real),
            top_ids=like.new_empty(rows, wanted.top_k, dtype=torch.long),
            top_logits=like.new_empty(rows, wanted.top_k, dtype=real),
            token=like.new_empty(sampled, dtype=torch.long),
            token_logit=like.new_empty(sampled, dtype=real),
            shaped_log_prob=like.new_empty(sampled, dtype=real),
        )


def assemble_scores(
    hidden: Tensor,
    vocab: int,
    request: TokenRequest,
    *,
    vocab_pass: Callable[[VocabPass], VocabPassResult],
    logits_of_pairs: Callable[[Tensor, Tensor], Tensor],
    logits_of_all: Callable[[Tensor], Tensor],
) -> TokenScores:
    """The whole request, wherever the logits come from.

    Args:
        hidden: [T, H].
        vocab: V.
        request: what is asked.
        vocab_pass: passes over the vocabulary, if that is needed.
        logits_of_pairs: the logits of rows and ids, [n] each.
        logits_of_all: the logits of ids [n] in every row, [T, n].
    """
    found: dict[str, Tensor] = {}
    if request.needs_vocabulary:
        found |= _of_vocabulary(vocab_pass(VocabPass.of(request, hidden, vocab)), request)
    lse = found.get("lse")

    def every() -> Tensor:
        return torch.arange(len(hidden), device=hidden.device)

    if request.targets is not None and lse is not None:
        found["target_log_probs"] = logits_of_pairs(every(), request.targets.long()) - lse
    if isinstance(request.select, RaggedIds):
        rows = every().repeat_interleave(request.select.indptr.long().diff(), output_size=len(request.select.ids))
        found["selected_logits"] = z = logits_of_pairs(rows, request.select.ids.long())
        if lse is not None:
            found["selected_log_probs"] = z - lse[rows]
    elif request.select is not None:
        found["selected_logits"] = z = logits_of_all(request.select.long())
        if lse is not None:
            found["selected_log_probs"] = z - lse[:, None]
    if request.rewards is not None:
        if request.top_k:
            ids = found["top_ids"]
            found["top_rewards"] = gather_dot(hidden, request.rewards, every()[:, None].expand_as(ids), ids)
        if request.sample is not None:
            found["token_reward"] = gather_dot(hidden, request.rewards, every(), found["token"])
    return TokenScores(**found)


def _of_vocabulary(found: VocabPassResult, request: TokenRequest) -> dict[str, Tensor]:
    scores = {"lse": found.lse}
    if request.entropy:
        scores["entropy"] = found.entropy
    if request.top_k:
        scores["top_ids"] = found.top_ids
        scores["top_log_probs"] = found.top_logits - found.lse[:, None]
    if request.sample is not None:
        scores["token"] = found.token
        scores["log_prob"] = found.token_logit - found.lse
        scores["shaped_log_prob"] = found.shaped_log_prob
    return scores


def matmul_columns(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """hidden[t] · weight[id] for all rows and ids, [T, n], summed in fp32 (fp64 for fp64)."""
    math = math_dtype(hidden)
    some = max(1, GATHERED // (hidden.shape[1] * math.itemsize))
    rows = hidden.to(math)
    return torch.cat([rows @ weight[of].to(math).T for of in ids.split(some)], dim=1)


def gather_dot(hidden: Tensor, weight: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """hidden[row] · weight[id] for every pair, in their shape, summed in fp32 (fp64 for fp64)."""
    math = math_dtype(hidden)
    shape, rows, ids = rows.shape, rows.reshape(-1), ids.reshape(-1)
    some = max(1, GATHERED // (hidden.shape[1] * math.itemsize))
    parts = [
        torch.linalg.vecdot(hidden[at].to(math), weight[of].to(math))
        for at, of in zip(rows.split(some), ids.split(some), strict=True)
    ]
    return torch.cat(parts).reshape(shape)
