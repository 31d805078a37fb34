"""Specification of `forktree.ops.score_tokens`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from forktree.ops.reference.precision import math_dtype
from forktree.ops.sampling import TILE, noise
from forktree.ops.token_request import REPETITION, Draw, Ragged, TokenRequest, TokenScores


def score_tokens(
    hidden: Tensor, lm_head: Tensor, request: TokenRequest, *, bias: Tensor | None, scale: float, softcap: float | None
) -> TokenScores:
    return score_logits(dense_logits(hidden, lm_head, bias, scale, softcap), request, hidden)


def dense_logits(hidden: Tensor, lm_head: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    math = math_dtype(hidden)
    z = scale * F.linear(hidden.to(math), lm_head.to(math), None if bias is None else bias.to(math))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def score_logits(z: Tensor, request: TokenRequest, hidden: Tensor) -> TokenScores:
    """z [T, V]: the logits."""
    found: dict[str, Tensor] = {}
    lse = z.logsumexp(dim=-1)
    log_probs = z - lse[:, None]
    if request.needs_vocabulary:
        found["lse"] = lse
    if request.entropy:
        found["entropy"] = torch.special.entr(log_probs.exp()).sum(dim=-1)
    best, order = z.sort(dim=-1, descending=True, stable=True)
    if request.margin:
        found["margin"] = best[:, 0] - best[:, 1] if z.shape[1] > 1 else torch.full_like(lse, torch.inf)
    if request.top_k:
        found["top_ids"] = order[:, : request.top_k]
        found["top_log_probs"] = best[:, : request.top_k] - lse[:, None]
    if request.draw is not None:
        s = shaped(z, request.draw)
        token, masked = drawn(s, request.draw), (s == -torch.inf).all(dim=-1)
        wrong = masked | ~lse.isfinite()
        token = found["token"] = token.masked_fill(wrong, 0)
        picked = log_probs.gather(1, token[:, None]).squeeze(1)
        found["log_prob"] = picked.masked_fill(wrong, torch.nan)
        picked = s.log_softmax(dim=-1).gather(1, token[:, None]).squeeze(1)
        found["shaped_log_prob"] = picked.masked_fill(wrong, torch.nan)
    if request.targets is not None:
        found["target_log_probs"] = log_probs.gather(1, request.targets.long()[:, None]).squeeze(1)
    if request.select is not None:
        if isinstance(request.select, Ragged):
            row = torch.arange(len(z), device=z.device).repeat_interleave(request.select.indptr.long().diff())
            found["selected_logits"] = z[row, request.select.ids.long()]
            found["selected_log_probs"] = log_probs[row, request.select.ids.long()]
        else:
            found["selected_logits"] = z[:, request.select.long()]
            found["selected_log_probs"] = log_probs[:, request.select.long()]
        if not request.needs_vocabulary:
            del found["selected_log_probs"]
    if request.value is not None:
        found["values"] = request.value(hidden)
    if request.rewards is not None:
        rewards = hidden.to(z.dtype) @ request.rewards.to(z.dtype).T
        if request.top_k:
            found["top_rewards"] = rewards.gather(1, found["top_ids"])
        if request.draw is not None:
            found["token_reward"] = rewards.gather(1, found["token"][:, None]).squeeze(1)
    return TokenScores(**found)


def shaped(z: Tensor, draw: Draw) -> Tensor:
    """s of `Draw`, -inf where a token is not left. Of a greedy row only its most likely token is left."""
    s = z.clone()
    if draw.edits is not None:
        edits = draw.edits
        for t in range(len(s)):
            for e in range(edits.indptr[t], edits.indptr[t + 1]):
                v, value = edits.ids[e], float(edits.values[e])
                if edits.ops[e] == REPETITION:
                    s[t, v] = s[t, v] / value if s[t, v] > 0 else s[t, v] * value
                else:
                    s[t, v] += value
    if draw.allowed is not None:
        token = torch.arange(s.shape[1], device=s.device)
        bits = draw.allowed.to(s.device)[:, token // 32] >> (token % 32) & 1
        s = s.masked_fill(bits == 0, -torch.inf)
    for row, temperature, top_k, top_p, min_p in zip(s, *draw.settings.tolist(), strict=True):
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


def drawn(s: Tensor, draw: Draw) -> Tensor:
    """The token of each row, `[T]`; any one where there is none."""
    rows, vocab = s.shape
    tiles = F.pad(s, (0, -vocab % TILE), value=-torch.inf).view(rows, -(-vocab // TILE), TILE)
    keys = torch.from_numpy(draw.keys.view("int64")).to(s.device)
    exponential, uniform = noise(keys, tiles.shape[1])
    tile = (tiles.logsumexp(dim=-1) - exponential.log().to(s.dtype)).nan_to_num(nan=-torch.inf).argmax(dim=-1)
    row = torch.arange(rows, device=s.device)
    mass = (tiles[row, tile] - tiles[row, tile].amax(dim=-1, keepdim=True)).exp().nan_to_num().cumsum(dim=-1)
    aim = uniform[row, tile, None].to(s.dtype) * mass[:, -1:]
    within = torch.searchsorted(mass, aim, right=True).squeeze(1)
    last = (mass < mass[:, -1:]).sum(dim=-1)  # the first to reach it all: none behind it has any
    return (tile * TILE + torch.minimum(within, last)).clamp(max=vocab - 1)
