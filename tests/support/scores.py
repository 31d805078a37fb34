"""Problems for `score_tokens`, and what they are held against: fp64, and transformers' own processors."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from backends import Backend, on, sentinels
from distributions import sampled, shaped
from forktree import KeyedSampling, RaggedIds, Sampling, TokenRequest, TokenScores, ops

KINDS = [
    Sampling(),
    Sampling(0.0),
    Sampling(0.6),
    Sampling(0.9, top_k=5),
    Sampling(1.1, top_p=0.8),
    Sampling(1.2, min_p=0.05),
    Sampling(0.9, top_k=50, top_p=0.9, min_p=0.01),
    Sampling(1.0, top_k=1),
    Sampling(1.0, top_p=1e-6),
    Sampling(1.0, top_k=10**6),
    Sampling(2.0, top_k=200),  # these leave more than 64 tokens
    Sampling(3.0, top_p=0.9),
    Sampling(3.0, top_k=150, top_p=0.9),
    Sampling(3.0, min_p=0.001),
]
GREEDY = Sampling(temperature=0.0)
# By what the best 64 of 400 tokens say of the threshold.
SETTLED = [
    Sampling(top_k=20),
    Sampling(top_k=64),
    Sampling(temperature=0.3, top_p=0.8),
    Sampling(temperature=0.6, min_p=0.2),
    Sampling(temperature=0.8, top_k=30, top_p=0.7, min_p=0.05),
    Sampling(top_k=1),
    Sampling(top_p=1e-6),
    Sampling(top_k=100, min_p=0.9),
]
OPEN = [
    Sampling(top_k=65),
    Sampling(top_k=333),
    Sampling(temperature=3.0, top_p=0.9),
    Sampling(temperature=3.0, top_p=0.999999),
    Sampling(temperature=5.0, min_p=0.001),
    Sampling(temperature=2.0, top_k=150, top_p=0.8),
    Sampling(temperature=2.0, top_k=150, top_p=0.8, min_p=0.3),
    Sampling(temperature=2.0, top_k=390, top_p=0.99, min_p=1e-4),
]
FREE = [Sampling(), Sampling(temperature=0.5), GREEDY, Sampling(top_k=10**6), Sampling(temperature=40.0)]


def problem(
    rows: int, vocab: int, size: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 2.0
) -> tuple[Tensor, Tensor]:
    """hidden and lm_head whose logits have this standard deviation."""
    torch.manual_seed(seed)
    return torch.randn(rows, size).to(dtype), (torch.randn(vocab, size) * (spread / size**0.5)).to(dtype)


def given_logits(z: Tensor) -> tuple[Tensor, Tensor]:
    """hidden and lm_head that give these finite logits [T, V] to the bit."""
    return torch.eye(len(z), dtype=z.dtype), z.T.contiguous()


def same_logits(z: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """hidden and lm_head that give every row these finite logits [V] to the bit."""
    return z.new_ones(rows, 1), z[:, None].contiguous()


def words(allowed: Tensor) -> Tensor:
    """allowed: bool [T, V], as bits."""
    bits = F.pad(allowed, (0, -allowed.shape[1] % 32)).unflatten(1, (-1, 32)).long() << torch.arange(32)
    return bits.sum(dim=2).to(torch.int32)


def logits(
    hidden: Tensor, lm_head: Tensor, bias: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """By PyTorch, in the type given."""
    z = scale * F.linear(hidden, lm_head, None if bias is None else bias.to(hidden.dtype))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def exact_logits(hidden: Tensor, lm_head: Tensor, **head: Any) -> tuple[Tensor, float]:
    """In fp64, and what a number may be off: little more than PyTorch's own are at this type, products not rounded."""
    z = logits(hidden.double(), lm_head.double(), **head)
    largest = 1 + float(z[z.isfinite()].abs().max())
    if hidden.dtype == torch.float64:
        return z, 1e-14 * largest
    own = logits(hidden.float(), lm_head.float(), **head).log_softmax(dim=1).double() - z.log_softmax(dim=1)
    return z, 3 * float(own.nan_to_num().abs().max()) + 4 * torch.finfo(torch.float32).eps * largest


def close(found: Tensor | None, expected: Tensor, off: float) -> None:
    assert found is not None and found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, atol=off, rtol=0)


def agree(found: TokenScores, request: TokenRequest, z: Tensor, off: float) -> None:
    """Everything but sampling and heads, with exact logits z."""
    lse = z.logsumexp(dim=1)
    log_probs = z - lse[:, None]
    close(found.lse, lse, off)
    if request.entropy:
        close(found.entropy, torch.special.entr(log_probs.exp()).sum(dim=1), off * (1 + math.log(z.shape[1])))
    best, order = z.sort(dim=1, descending=True, stable=True)
    if request.top_k:
        k, ids = min(request.top_k, z.shape[1]), found.top_ids
        assert ids is not None and ids.dtype == torch.long and ids.shape == (len(z), k)
        assert (ids.sort(dim=1).values.diff(dim=1) > 0).all()
        torch.testing.assert_close(z.gather(1, ids), best[:, :k], atol=2 * off, rtol=0)
        close(found.top_log_probs, log_probs.gather(1, ids), off)
        gap = F.pad(-best.diff(dim=1), (1, 1), value=torch.inf).nan_to_num(nan=0)
        alone = (torch.minimum(gap[:, 1:], gap[:, :-1]) > 2 * off)[:, :k]
        assert torch.equal(ids[alone], order[:, :k][alone])
    if request.targets is not None:
        close(found.target_log_probs, log_probs.gather(1, request.targets.long()[:, None])[:, 0], off)
    if isinstance(request.select, RaggedIds):
        at = torch.arange(len(z)).repeat_interleave(request.select.indptr.long().diff()), request.select.ids.long()
        close(found.selected_logits, z[at], 2 * off)
        close(found.selected_log_probs, log_probs[at], off)
    elif request.select is not None:
        close(found.selected_logits, z[:, request.select.long()], 2 * off)
        close(found.selected_log_probs, log_probs[:, request.select.long()], off)


def is_clear(z: Tensor, sample: KeyedSampling, off: float) -> Tensor:
    """Rows [T] of which rounding by `off` takes or gives no token to sample."""
    rows = len(z)
    each = [sample.sampling] * rows if isinstance(sample.sampling, Sampling) else sample.sampling
    clear = torch.ones(rows, dtype=torch.bool)
    left = shaped(z, sample) > 0
    for near in (1 - off, 1 + off):
        around = [
            Sampling(s.temperature, s.top_k, s.top_p if s.top_p == 1 else min(s.top_p * near, 1.0), s.min_p * near)
            for s in each
        ]
        other = KeyedSampling(around, sample.seed, sample.position, sample.edits, sample.allowed)
        clear &= ((shaped(z, other) > 0) == left).all(dim=1)
    everything = KeyedSampling(Sampling(), sample.seed, sample.position, sample.edits, sample.allowed)
    s = shaped(z, everything).log()
    lowest = s.where(left, torch.inf).amin(dim=1)
    highest_lost = s.where(~left, -torch.inf).amax(dim=1)
    return clear & (lowest - highest_lost > 2 * off)


def samples_agree(found: TokenScores, sample: KeyedSampling, z: Tensor, off: float) -> Tensor:
    """The samples of exact logits z, except where a number is within rounding of where they change. Returns which were
    compared, [T]."""
    p = shaped(z, sample)
    tokens, distance = sampled(p.numpy(), sample.keys)
    assert found.token.dtype == torch.long
    sure = is_clear(z, sample, off) & (torch.from_numpy(distance) > 10 * off)
    assert torch.equal(found.token[sure], torch.from_numpy(tokens)[sure])
    at = found.token[:, None]
    close(found.log_prob, z.log_softmax(dim=1).gather(1, at)[:, 0], off)
    # 2e-7 is the resolution of fp32 near 1; temperatures below 1 enlarge what logits are off
    coldest = min(t for t in [1.0, *sample.settings[0].tolist()] if t > 0)
    close(found.shaped_log_prob[sure], p.log().gather(1, at)[:, 0][sure], 2 * off / coldest + 2e-7)
    return sure


def keyed(rows: int, sampling: Any, seed: int = 0, **options: Any) -> KeyedSampling:
    """With a seed and a position of its own for each row."""
    return KeyedSampling(sampling, seed=np.arange(rows) + 1000 * seed, position=np.arange(rows) * 7, **options)


def by_specification(hidden: Tensor, lm_head: Tensor, request: TokenRequest, **head: Any) -> TokenScores:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FORKTREE_BACKEND", "reference")
        return ops.score_tokens(hidden, lm_head, request, **head, check=False)


def scored(
    backend: Backend, hidden: Tensor, lm_head: Tensor, request: TokenRequest, *, check: bool = False, **head: Any
) -> TokenScores:
    """By a backend, on the CPU."""
    names = ("targets", "select", "rewards")
    moved = dict(zip(names, on(backend.device, *(getattr(request, name) for name in names)), strict=True))
    hidden, lm_head, *values = on(backend.device, hidden, lm_head, *head.values())
    with sentinels(backend.device):
        found = ops.score_tokens(
            hidden, lm_head, replace(request, **moved), **dict(zip(head, values, strict=True)), check=check
        )
    return TokenScores(**{name: x.cpu() for name, x in vars(found).items()})


def compare(
    backend: Backend, hidden: Tensor, lm_head: Tensor, request: TokenRequest, *, tolerance: float = 2e-5, **head: Any
) -> TokenScores:
    """With the specification in fp64: same ids, same samples."""
    found = scored(backend, hidden, lm_head, request, **head)
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in head.items()}
    expected = by_specification(hidden.double(), lm_head.double(), request, **wide)
    assert vars(found).keys() == vars(expected).keys()
    for name, value in vars(expected).items():
        ours = getattr(found, name)
        if value.dtype == torch.long:
            assert torch.equal(ours, value), name
        else:
            assert ours.dtype == (torch.float64 if hidden.dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(ours.double(), value, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)
    return found
