"""Tile sizes and launch options by architecture."""

from __future__ import annotations

from dataclasses import dataclass

from forktree.plan.cost_model import ROOFLINE_ROWS

SEGS = 32  # segments of the stream that are looked up together


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options."""

    block_m: int  # packed rows of a row tile
    block_n: int  # columns of a tile
    num_warps: int
    num_stages: int


INTERPRETED = Config(64, 16, 4, 1)  # small tiles, so that small tests have several
INTERPRETED_PROGRAMS = 3


def config(arch: int, itemsize: int, dim: int, packed_rows: int, biased: bool) -> Config:
    """Returns what to launch on an architecture (80, 90, ...) for `packed_rows` packed rows.

    dim: head dim, rounded up to a power of two.
    biased: with soft cap or ALiBi, whose terms take registers.

    In 16-bit types a tile of K and V takes 4 * block_n * dim bytes of shared memory in each stage but one, and Q takes
    2 * dim a row. All configurations fit the 99 KB of the smallest GPUs, except the widest, which fits the 227 KB of
    sm_90 and sm_100. One program runs on a multiprocessor, and its 256 threads fill the registers; more columns, or
    fewer warps, spill in the loop over tiles (bench/kernels.py). 32 KB in flight keep the memory of an H200 busy: 4.3
    TB/s for 0.8 us, over 132 multiprocessors. A row tile of 64 is the smallest that `wgmma` takes; narrow steps wait
    for memory, so that unused rows cost nothing. Wide steps have row tiles of 128, which halves how often a tile is
    read. fp32 products run on the ordinary cores.
    """
    if itemsize == 4:
        return Config(16, 32 if dim <= 128 else 16, 4, 2)
    if dim > 128:
        return Config(64, 32, 8, 2)
    if packed_rows <= ROOFLINE_ROWS:
        return Config(64, 64, 8, 3) if dim <= 64 else Config(64, 32, 8, 4)
    return Config(128, 64 if dim > 64 and 90 <= arch < 120 and not biased else 32, 8, 3)
