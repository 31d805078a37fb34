"""How tokens are sampled. Sampling is keyed: a token does not depend on what else is in the batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from forktree.checks import integer, number
from forktree.ops.splitmix import splitmix64_torch

TILE = 64  # tokens whose mass shares one Gumbel number


@dataclass(frozen=True)
class Sampling:
    """How one token is sampled. Names and order of application are those of transformers' `GenerationConfig`.

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
        number("temperature", self.temperature, "finite and at least 0", lambda t: t >= 0)
        integer("top_k (0 keeps all)", self.top_k, 0)
        number("top_p", self.top_p, "a number in (0, 1]", lambda p: 0 < p <= 1)
        number("min_p", self.min_p, "a number in [0, 1]", lambda p: 0 <= p <= 1)


def noise(keys: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    """What sampling a row needs for each tile of its vocabulary: an exponential and a uniform number, fp64.

    keys: int64 `[T]`, the bits of `KeyedSampling.keys`. Returns `[T, tiles]` each: E = -log1p(-v), so that -log E is a
    Gumbel number, with v = (h + 1/2) / 2^32; and u = l / 2^32 in [0, 1). h and l are the halves of
    `splitmix64(key ^ tile)`.
    """
    return noise_of(keys, torch.arange(tiles, device=keys.device))


def noise_of(keys: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """The same for tiles of these numbers, int64 `[n]` or `[T, n]`."""
    bits = splitmix64_torch(keys[:, None] ^ tiles)
    high, low = bits >> 32 & 0xFFFFFFFF, bits & 0xFFFFFFFF
    return -torch.log1p(-(high.double() + 0.5) * 2.0**-32), low.double() * 2.0**-32
