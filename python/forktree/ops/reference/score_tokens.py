"""Specification of `forktree.ops.score_tokens`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from forktree.ops.assemble import LmHead, VocabPass, VocabPassResult
from forktree.ops.checks import math_dtype
from forktree.ops.sampling import TILE, noise
from forktree.ops.token_request import REPETITION


def launch(hidden: Tensor, lm_head: LmHead, wanted: VocabPass) -> VocabPassResult:
    z = dense_logits(hidden, lm_head)
    lse = z.logsumexp(dim=-1)
    best, order = z.sort(dim=-1, descending=True, stable=True)
    found = VocabPassResult.empty(hidden, wanted)._replace(
        lse=lse, top_ids=order[:, : wanted.top_k], top_logits=best[:, : wanted.top_k]
    )
    if wanted.entropy:
        found = found._replace(entropy=torch.special.entr((z - lse[:, None]).exp()).sum(dim=-1))
    if wanted.keys is None:
        return found
    s = shaped(z, wanted)
    wrong = (s == -torch.inf).all(dim=-1) | ~lse.isfinite()
    token = sampled(s, wanted.keys).masked_fill(wrong, 0)
    logit, log_prob = (x.gather(1, token[:, None]).squeeze(1) for x in (z, s.log_softmax(dim=-1)))
    return found._replace(
        token=token,
        token_logit=logit.masked_fill(wrong, torch.nan),
        shaped_log_prob=log_prob.masked_fill(wrong, torch.nan),
    )


def dense_logits(hidden: Tensor, lm_head: LmHead) -> Tensor:
    """Logits [T, V]."""
    (weight, bias, scale, softcap), math = lm_head, math_dtype(hidden)
    z = scale * F.linear(hidden.to(math), weight.to(math), None if bias is None else bias.to(math))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def shaped(z: Tensor, wanted: VocabPass) -> Tensor:
    """s of `KeyedSampling`, -inf where a token is not left. Of a greedy row only its most likely token is left."""
    s = z.clone()
    if wanted.edit_indptr is not None:
        indptr, *columns = (x.tolist() for x in wanted.edits if x is not None)
        for t in range(len(s)):
            for v, op, value in zip(*(column[indptr[t] : indptr[t + 1]] for column in columns), strict=True):
                if op == REPETITION:
                    s[t, v] = s[t, v] / value if s[t, v] > 0 else s[t, v] * value
                else:
                    s[t, v] += value
    if wanted.allowed is not None:
        token = torch.arange(s.shape[1], device=s.device)
        bits = wanted.allowed[:, token // 32] >> (token % 32) & 1
        s = s.masked_fill(bits == 0, -torch.inf)
    assert wanted.settings is not None
    for row, temperature, top_k, top_p, min_p in zip(s, *wanted.settings.tolist(), strict=True):
        if temperature == 0:
            best = row.argmax()
            row[torch.arange(len(row), device=s.device) != best] = -torch.inf
            continue
        row /= temperature
        ordered = row.sort(descending=True).values
        threshold = -torch.inf
        if 0 < top_k < len(row):
            threshold = float(ordered[int(top_k) - 1])
        if top_p < 1:
            mass = ordered.masked_fill(ordered < threshold, -torch.inf).softmax(dim=0)
            left = mass.cumsum(dim=0) - mass < top_p  # those before it do not reach p
            left[0] = True  # also where there is no mass
            threshold = max(threshold, float(ordered[left][-1]))
        if min_p > 0:
            threshold = max(threshold, float(ordered[0] + torch.tensor(min_p, dtype=s.dtype).log()))
        row[row < threshold] = -torch.inf
    return s


def sampled(s: Tensor, keys: Tensor) -> Tensor:
    """The token of each row, `[T]`; any one where there is none."""
    rows, vocab = s.shape
    tiles = F.pad(s, (0, -vocab % TILE), value=-torch.inf).view(rows, -(-vocab // TILE), TILE)
    exponential, uniform = noise(keys, tiles.shape[1])
    tile = (tiles.logsumexp(dim=-1) - exponential.log().to(s.dtype)).nan_to_num(nan=-torch.inf).argmax(dim=-1)
    row = torch.arange(rows, device=s.device)
    mass = (tiles[row, tile] - tiles[row, tile].amax(dim=-1, keepdim=True)).exp().nan_to_num().cumsum(dim=-1)
    aim = uniform[row, tile, None].to(s.dtype) * mass[:, -1:]
    within = torch.searchsorted(mass, aim, right=True).squeeze(1)
    last = (mass < mass[:, -1:]).sum(dim=-1)  # the first to reach it all: none after it has any
    return (tile * TILE + torch.minimum(within, last)).clamp(max=vocab - 1)
