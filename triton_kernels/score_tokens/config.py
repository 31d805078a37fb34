"""Sizes of launches: tiles by architecture, splits of the vocabulary, scratch."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from forktree.triton_kernels.score_tokens.nucleus_kernel import BINS

MAX_LIST = 64  # capacity of a list: best tokens, and candidates of truncated samples
MAX_ROWS = 256  # of a launch, which bounds scratch
SCRATCH_BYTES = 16 << 20
RADIX_PASSES = 7  # of `_search_again`: three digits for top-k, three for top-p, sampling
STATE_FIELDS = 8  # of a row in a split: top, mass, weighted, shaped top, shaped mass, score, shaped logit, token
RECORD_FIELDS = 7  # of a row left over: todo, digits, prefix, need, top-k's threshold, threshold, shaped top


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options of the passes over the vocabulary."""

    block_v: int  # tokens of a vocab tile
    block_t: int  # rows of a tile
    block_k: int  # hidden elements read at once
    num_warps: int
    num_stages: int


INTERPRETED = Config(128, 16, 32, 4, 1)  # small tiles: several of each for small tests
INTERPRETED_PROGRAMS = 3


def config(arch: int, itemsize: int, rows: int) -> Config:
    """Returns what to launch on an architecture (80, 90, ...) for `rows` rows.

    Two programs of four warps share a multiprocessor's registers: while one looks at its logits, the other streams. On
    sm_80 and sm_100, however, 64 rows spill heavily in four warps, even in the loop over elements; they get eight
    warps, so that one program runs at a time. The remaining spills lie outside that loop (bench/kernels.py), mostly in
    sorting. A stage takes (block_v + block_t) * block_k elements of shared memory. fp32 products run on the ordinary
    cores. None of this was measured.
    """
    if itemsize == 4:
        return Config(64, 16, 32, 4, 3)
    block_t = 16 if rows <= 16 else 32 if rows <= 32 else 64
    large = 90 <= arch < 120  # shared memory is large
    return Config(128, block_t, 64, 4 if block_t < 64 or arch == 90 else 8, 4 if large else 3)


def split_vocabulary(
    rows: int, vocab: int, chosen: Config, programs: int, listed: int, truncates: bool
) -> tuple[int, int]:
    """Returns the number of splits, and tiles of each, for `programs` programs in bounded scratch.

    listed: keys in the lists of a row in a split.
    """
    left = SCRATCH_BYTES - truncates * rows * (BINS.value + RECORD_FIELDS) * 8
    max_splits = left // (rows * (STATE_FIELDS * 4 + listed * 8))
    tiles = triton.cdiv(vocab, chosen.block_v)
    tiles_per_split = triton.cdiv(tiles, max(1, min(programs // triton.cdiv(rows, chosen.block_t), max_splits)))
    return triton.cdiv(tiles, tiles_per_split), tiles_per_split
