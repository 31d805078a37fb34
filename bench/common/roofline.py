"""The least a step of attention can cost on a machine, and whether a measured time meets what is aimed at."""

from dataclasses import dataclass
from typing import Any

from common.workloads import Tree

LAUNCH_US = 5.0
OF_BANDWIDTH, OF_MATMUL = 0.85, 0.60
OVER_CASCADE, CASCADE_LEVELS = 1.5, 3


@dataclass(frozen=True)
class Floor:
    """bytes: of distinct K and V, and of queries and outputs. flops, exps: of the (row, token) pairs attended."""

    bytes: int
    flops: int
    exps: int

    def us(self, rates: dict[str, float]) -> dict[str, float]:
        """Microseconds of each at the machine's rates (`measure.ceilings`)."""
        return dict(
            bytes=self.bytes / rates["bytes_per_s"] * 1e6,
            flops=self.flops / rates["flop_per_s"] * 1e6,
            exps=self.exps / rates["exp_per_s"] * 1e6,
        )


def floor(tree: Tree, heads: int, kv_heads: int, dim: int, itemsize: int) -> Floor:
    """Of one layer."""
    kv = tree.distinct * 2 * kv_heads * dim * itemsize
    rows = len(tree.rows) * 2 * heads * dim * itemsize
    return Floor(kv + rows, 4 * heads * dim * tree.attended, heads * tree.attended)


def partial_bytes(tree: Tree, heads: int, dim: int, split: int = 1024) -> int:
    """fp32 states written and read again where every node is attended to by itself, `split` tokens at a time."""
    return 2 * tree.partials(split) * heads * (dim + 1) * 4


def targets(tree: Tree, us: dict[str, float], ours: str, floors: dict[str, float]) -> list[dict[str, Any]]:
    """What one side aims at in one case, and whether it gets there.

    us: median of every side. ours: names of our own begin alike ("forktree triton"), others are baselines.
    """
    time, least = us[ours], max(floors.values())
    found = []

    def aim(what: str, limit: float) -> None:
        found.append(dict(target=what, limit_us=limit, us=time, met=bool(time <= limit)))

    if floors["bytes"] == least:
        aim("85 % of copy bandwidth + 5 us", least / OF_BANDWIDTH + LAUNCH_US)
    else:
        aim("60 % of the matmul rate", floors["flops"] / OF_MATMUL)
    baselines = {name: t for name, t in us.items() if not name.startswith("forktree")}
    if baselines:
        best = min(baselines, key=lambda name: baselines[name])
        aim(f"not slower than the best baseline ({best})", baselines[best])
    if "flashinfer cascade" in us and tree.depth >= CASCADE_LEVELS:
        aim("1.5x flashinfer cascade", us["flashinfer cascade"] / OVER_CASCADE)
    return found
