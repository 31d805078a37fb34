"""What tokens should be sampled: distributions by transformers' own processors, and the tokens themselves in fp64."""

import numpy as np
import torch
from scipy import stats
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from forktree import KeyedSampling, Sampling
from forktree.ops.splitmix import splitmix64

TILE = 64


def by_transformers(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The shaped distribution `[n, V]`, by transformers' warpers in the order of its `generate`."""
    warpers = LogitsProcessorList()
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers(torch.zeros(len(logits), 1, dtype=torch.long), logits).softmax(dim=-1)


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """p-value of counts against expected counts; cells too rare to count are pooled. Impossible ones must be 0."""
    assert observed[expected == 0].sum() == 0, "something impossible was sampled"
    order = np.argsort(expected)
    expected, observed = expected[order], observed[order]
    rare = max(int(np.searchsorted(np.cumsum(expected), 5)) + 1, 1)
    pooled = [np.concatenate([[x[:rare].sum()], x[rare:]]) for x in (observed, expected)]
    return stats.chisquare(*pooled).pvalue if len(pooled[0]) > 1 else 1.0


def spread(observed: np.ndarray, expected: np.ndarray) -> float:
    """`chi_square` of many cells, too rare to be counted one by one: the lesser p-value of the counts by tile of 64 and
    by place in the tile."""
    assert observed[expected == 0].sum() == 0, "something impossible was sampled"
    folded = [np.pad(x, (0, -len(x) % TILE)).reshape(-1, TILE) for x in (observed, expected)]
    return min(chi_square(*(x.sum(axis=axis) for x in folded)) for axis in (0, 1))


def changed(logits: torch.Tensor, sample: KeyedSampling) -> torch.Tensor:
    """logits `[T, V]` with edits and mask, token by token."""
    changed = logits.numpy().copy()
    if sample.edits is not None:
        e = sample.edits
        for row in range(len(logits)):
            for at in range(e.indptr[row], e.indptr[row + 1]):
                z, value = float(changed[row, e.ids[at]]), float(e.values[at])
                changed[row, e.ids[at]] = z + value if e.ops[at] == 0 else z / value if z > 0 else z * value
    if sample.allowed is not None:
        bits = np.unpackbits(sample.allowed.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
        changed[bits[:, : logits.shape[1]] == 0] = -np.inf
    return torch.from_numpy(changed)


def shaped(logits: torch.Tensor, sample: KeyedSampling) -> torch.Tensor:
    """Of logits `[T, V]` the probabilities that tokens are sampled with, `[T, V]`."""
    rows, z = len(logits), changed(logits, sample)
    each = [sample.sampling] * rows if isinstance(sample.sampling, Sampling) else list(sample.sampling)
    probabilities = torch.zeros_like(z)
    for kind in set(each):
        at = [row for row in range(rows) if each[row] == kind]
        if kind.temperature < 1e-5:
            probabilities[at, z[at].argmax(dim=1)] = 1
        else:
            probabilities[at] = by_transformers(z[at], kind)
    return probabilities


def sampled(probabilities: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens sampled from `[T, V]` as `KeyedSampling` says, `[T]`, and how far each is from another: the lesser of the
    lead of the winning tile, and of the distance of the uniform number from where the token begins and ends."""
    tokens, distance = [], []
    for p, key in zip(probabilities, keys, strict=True):
        tiles = np.pad(p, (0, -len(p) % TILE)).reshape(-1, TILE)
        bits = splitmix64(key ^ np.arange(len(tiles), dtype=np.uint64))
        high, low = (bits >> np.uint64(32)).astype(float), (bits & np.uint64(0xFFFFFFFF)).astype(float)
        with np.errstate(divide="ignore"):
            score = np.log(tiles.sum(axis=1)) - np.log(-np.log1p(-(high + 0.5) / 2**32))
        tile = int(score.argmax())
        ends = np.cumsum(tiles[tile]) / tiles[tile].sum()
        uniform = low[tile] / 2**32
        within = int(np.searchsorted(ends, uniform, side="right"))
        tokens.append(tile * TILE + within)
        lead = score[tile] - np.sort(score)[-2] if len(score) > 1 else np.inf
        inner = ends[ends < 1 - 1e-9]
        distance.append(min(lead, np.abs(inner - uniform).min(initial=np.inf)))
    return np.array(tokens), np.array(distance)
