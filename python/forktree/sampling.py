"""Choosing the next token from logits. Every draw is keyed, so it does not depend on what else is in the batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from forktree.errors import InvalidInput
from forktree.kv.tree import mix

TILE = 64  # tokens whose mass shares one Gumbel number


@dataclass(frozen=True)
class Sampling:
    """How one token is drawn. Names and order of application are those of transformers' `GenerationConfig`.

    temperature: divides the logits; 0 takes the most likely token.
    top_k: keep the k most likely tokens (0 = all).
    top_p: keep the smallest set of most likely tokens whose probability reaches p.
    min_p: keep tokens at least this fraction as likely as the most likely one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidInput(f"temperature must be finite and at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise InvalidInput(f"top_k must be at least 0 (0 keeps all), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InvalidInput(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise InvalidInput(f"min_p must lie in [0, 1], got {self.min_p}")

    @property
    def is_greedy(self) -> bool:
        """True when no random number is needed."""
        return self.temperature == 0


def uniforms(keys: NDArray[np.uint64], positions: NDArray[np.integer]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (key, position): the draw of that branch at that place, always the same."""
    bits = mix(mix(keys) ^ positions.astype(np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def noise(keys: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    """What the draw of a row needs for each tile of its vocabulary: an exponential and a uniform number, fp64.

    keys: int64 `[T]`, the bits of `Draw.keys`. Returns `[T, tiles]` each: E = -log1p(-v), so that -log E is a Gumbel
    number, with v = (h + 1/2) / 2^32; and u = l / 2^32 in [0, 1). h and l are the halves of `mix(key ^ tile)`.
    """
    return noise_of(keys, torch.arange(tiles, device=keys.device))


def noise_of(keys: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """The same for tiles of these numbers, int64 `[n]` or `[T, n]`."""
    bits = _mix(keys[:, None] ^ tiles)
    high, low = bits >> 32 & 0xFFFFFFFF, bits & 0xFFFFFFFF
    return -torch.log1p(-(high.double() + 0.5) * 2.0**-32), low.double() * 2.0**-32


def _mix(z: Tensor) -> Tensor:
    """`mix` on the bits of int64, whose shifts keep the sign and must not."""
    z = z + (0x9E3779B97F4A7C15 - 2**64)
    z = (z ^ (z >> 30 & 2**34 - 1)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ (z >> 27 & 2**37 - 1)) * (0x94D049BB133111EB - 2**64)
    return z ^ (z >> 31 & 2**33 - 1)


def shaped_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, top-k, top-p and min-p applied to `logits [n, V]`; -inf where a token is excluded."""
    scores = logits
    if sampling.temperature not in (0, 1):  # the largest becomes 0, so that no small temperature overflows
        scores = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        smallest = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = scores.sort(dim=-1)
        below = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        below[:, -1] = False
        scores = scores.masked_fill(torch.zeros_like(below).scatter(1, index, below), -torch.inf)
    if sampling.min_p > 0:
        floor = scores.amax(dim=-1, keepdim=True) + float(np.log(sampling.min_p))
        scores = scores.masked_fill(scores < floor, -torch.inf)
    return scores


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """One token id a row, int64 `[n]`: inverse CDF in fp64 of the shaped distribution of `logits [n, V]` fp32.

    uniform: fp64 `[n]`, on the logits' device.
    """
    if sampling.is_greedy:
        return logits.argmax(dim=-1)
    probabilities = shaped_logits(logits, sampling).softmax(dim=-1, dtype=torch.float32)
    mass = probabilities.cumsum(dim=-1, dtype=torch.float64)
    aim = uniform[:, None] * mass[:, -1:]
    return torch.searchsorted(mass, aim, right=True).squeeze(1).clamp_(max=logits.shape[-1] - 1)


def choose(logits: Tensor, sampling: Sequence[Sampling], uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each row of `logits [n, V]`, drawn as its `sampling` says, int64 `[n]`, and its log-prob under the
    logits as they are, fp64 `[n]`, NaN or infinite where they are not finite. All on the logits' device.

    Neighbouring rows of one `sampling` are drawn together. uniform: fp64 `[n]`, on the logits' device.
    """
    tokens, begin = [], 0
    for kind, run in groupby(sampling):
        rows = slice(begin, begin := begin + len(list(run)))
        tokens.append(draw(logits[rows], kind, uniform[rows]))
    chosen = torch.cat(tokens)
    picked = logits.gather(1, chosen[:, None]).squeeze(1)
    return chosen, (picked - logits.logsumexp(dim=-1)).double()
