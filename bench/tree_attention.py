"""The attention of one layer and step beside PyTorch's, all sides in turns within one run.

    python bench/tree_attention.py                      # every case, 2 threads, a few minutes
    python bench/tree_attention.py --case "64 branches" # those whose name contains it; writes no file
    # on a GPU: bench/gpu/attention.py

Sides: `forktree` (the op, its plan made beforehand), `avx2` (the same, held to AVX2), `grouped` (forktree's PyTorch
backend), and `scaled_dot_product_attention` on the batch of all branches: `sdpa` as users write it, with enable_gqa,
and `sdpa fast`, the same result by the formulation PyTorch is faster at: a KV head's queries as rows of one matrix
(decoding), K and V repeated for every query head (prefill). Both find every branch's K and V gathered into one tensor
already: the copying and the memory are not charged to them. Before each call a buffer larger than the caches is read,
as other layers' weights and keys are between two calls of a decoder's layer.

GB/s counts every token once, however many branches see it; GFLOP/s counts (row, token) pairs that are seen. Beside
them stands what the machine does in the same run: reading a large tensor, and a large square matrix product.
Prints a table and writes bench/results/tree_attention-cpu.json.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from common import baselines, workloads
from common.baselines import Problem
from common.measure import Call, Stopwatch, about, host_us, write
from common.workloads import Tree, levels, star
from forktree import TreeLayout, _core
from forktree.ops import KVPool, tree_attention
from forktree.plan.plan import AttentionPlan, plan_attention

SECONDS = 3.0  # a side gets no more rounds once it took this long, but five at least
BF16, FP32 = torch.bfloat16, torch.float32
TOLERANCE = {BF16: 0.02, FP32: 1e-4}  # of the largest output


@dataclass(frozen=True)
class Case:
    name: str
    tree: Tree
    heads: tuple[int, int, int]  # Hq, Hk, D
    dtypes: tuple[torch.dtype, ...] = (BF16,)
    chunk: bool = False  # one causal chunk of all tokens instead of one row a leaf


CASES = [
    Case("64 branches", star(64, 4096, 64), (32, 8, 128), (BF16, FP32)),
    Case("16 branches", star(16, 1024, 64), (14, 2, 64), (BF16, FP32)),
    Case("deep tree", levels([2**i for i in range(9)], [256, 128, 64, 64, 32, 32, 16, 16, 16]), (32, 8, 128)),
    Case("no sharing", Tree([-1] * 16, [2048] * 16, list(range(16))), (32, 8, 128)),
    Case("prefill 32/8", Tree([-1], [2048], [0]), (32, 8, 128), chunk=True),
    Case("prefill 14/2", Tree([-1], [2048], [0]), (14, 2, 64), chunk=True),
]


def layout(case: Case, p: Problem) -> TreeLayout:
    """One row a leaf, or one chunk."""
    made = workloads.layout(case.tree, p.slot_of)
    if not case.chunk:
        return made
    rows = np.arange(case.tree.length[0])
    return replace(made, row_indptr=[0, rows.size], causal=[1], row_token=rows, row_pos=rows)


def problem(case: Case, dtype: torch.dtype) -> Problem:
    """Tips that grew from another node have their slots in scattered extents."""
    slot_of = workloads.slots(case.tree, workloads.EXTENT)
    p = baselines.problem(case.tree, slot_of, *case.heads, "cpu", dtype)
    heads, _, dim = case.heads
    return replace(p, q=torch.randn(case.tree.length[0], heads, dim, dtype=dtype)) if case.chunk else p


def sides(case: Case, p: Problem, made: AttentionPlan) -> dict[str, Call]:
    """Calls by name; all return [rows, Hq, D] values, SDPA's in a shape of its own."""

    pool = KVPool(p.k_slots, p.v_slots)

    def ours() -> Tensor:
        out = tree_attention(p.q, pool, made)
        assert isinstance(out, Tensor)
        return out

    def avx2() -> Tensor:
        best = _core.isa()
        _core.use_isa("avx2")
        try:
            return ours()
        finally:
            _core.use_isa(best)

    def grouped() -> Tensor:
        os.environ["FORKTREE_BACKEND"] = "torch"
        try:
            return ours()
        finally:
            del os.environ["FORKTREE_BACKEND"]

    calls: dict[str, Call] = {"forktree": ours, "avx2": avx2, "grouped": grouped}
    batch = baselines.expanded(p)
    if case.chunk:
        q = p.q.transpose(0, 1)[None]
        group = case.heads[0] // case.heads[1]
        k, v = (x.repeat_interleave(group, 1) for x in (batch.k, batch.v))
        calls["sdpa"] = lambda: sdpa(q, batch.k, batch.v, is_causal=True, enable_gqa=True)
        calls["sdpa fast"] = lambda: sdpa(q, k, v, is_causal=True)
    else:
        calls["sdpa"] = baselines.sdpa_batch(p, batch).run
        calls["sdpa fast"] = baselines.sdpa_grouped(p, batch).run
    return calls


def check(case: Case, dtype: torch.dtype, calls: dict[str, Call]) -> None:
    """That all sides compute the same."""
    outs = {name: call() for name, call in calls.items()}
    heads, _, dim = case.heads
    expected = outs.pop("sdpa")
    rows = expected[0].transpose(0, 1) if case.chunk else expected.reshape(-1, heads, dim)
    for name, out in outs.items():
        out = out[0].transpose(0, 1) if case.chunk and out.ndim == 4 else out.reshape(-1, heads, dim)
        worst = ((out - rows).abs().max() / rows.abs().max()).item()
        assert worst < TOLERANCE[dtype], f"{case.name}: {name} differs from sdpa by {worst:.2g} of the largest output"


def planning(case: Case, tree: TreeLayout) -> tuple[AttentionPlan, float]:
    """The plan and the microseconds that making it takes."""
    heads, kv_heads, dim = case.heads

    def made() -> AttentionPlan:
        return plan_attention(tree, num_qo_heads=heads, num_kv_heads=kv_heads, head_dim=dim)

    return made(), host_us(made, 15)


def machine() -> dict[str, float]:
    """What it does at best: GB/s read, GFLOP/s of matrix products."""
    large = torch.ones(128 << 20)
    rates = {"read": max(large.nbytes / host_us(large.sum, 1) for _ in range(8)) / 1e3}
    size = 2048
    for name, dtype in (("bf16", BF16), ("fp32", FP32)):
        x = torch.randn(size, size, dtype=dtype)
        x @ x
        rates[name] = max(2 * size**3 / host_us(lambda x=x: x @ x, 1) for _ in range(5)) / 1e3
    return rates


def measured(args: argparse.Namespace, rates: dict[str, float]) -> Iterator[dict[str, Any]]:
    """The report of each case."""
    for case in CASES:
        if args.case not in case.name:
            continue
        for dtype in case.dtypes:
            p = problem(case, dtype)
            made, plan_us = planning(case, layout(case, p))
            calls = sides(case, p, made)
            check(case, dtype, calls)
            us = Stopwatch("cpu").turns(calls, args.repeat, SECONDS)
            times = {side: [x / 1e3 for x in of_side] for side, of_side in us.items()}
            stats = made.stats()  # at 2 bytes an element
            name = str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
            seconds = median(times["forktree"]) / 1e3
            yield dict(
                case=case.name,
                dtype=name,
                heads=case.heads,
                median_ms={side: median(ms) for side, ms in times.items()},
                p90_ms={side: float(np.percentile(ms, 90)) for side, ms in times.items()},
                rounds={side: len(ms) for side, ms in times.items()},
                plan_us=plan_us,
                gb_per_s=stats.distinct_bytes * dtype.itemsize / 2 / seconds / 1e9,
                gflop_per_s=4 * case.heads[0] * case.heads[2] * stats.attended / seconds / 1e9,
                read_gb_per_s=rates["read"],
                matmul_gflop_per_s=rates[name],
            )


def digits(ms: float) -> str:
    """Three of them, at least."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def show(report: list[dict[str, Any]], title: str) -> None:
    """Prints the table."""
    table = Table(title=title, caption="ms: median (p90)")
    names = list(report[0]["median_ms"])
    rest = ("x sdpa", "x best sdpa", "plan us", "GB/s (read)", "GFLOP/s (matmul)")
    for column in ("", "", *(f"{n} ms" for n in names), *rest):
        table.add_column(column, justify="right")
    for case in report:
        ms = case["median_ms"]
        table.add_row(
            case["case"],
            case["dtype"],
            *(f"{digits(ms[n])} ({digits(case['p90_ms'][n])})" for n in names),
            f"{ms['sdpa'] / ms['forktree']:.2f}",
            f"{min(ms['sdpa'], ms['sdpa fast']) / ms['forktree']:.2f}",
            f"{case['plan_us']:.0f}",
            f"{case['gb_per_s']:.1f} ({case['read_gb_per_s']:.1f})",
            f"{case['gflop_per_s']:.0f} ({case['matmul_gflop_per_s']:.0f})",
        )
    Console(width=190).print(table)


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="part of the names of the cases to run")
    parser.add_argument("--repeat", type=int, default=40, help="rounds; slow sides get fewer")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = about("cpu")
    rates = machine()
    report = list(measured(args, rates))
    show(report, f"tree_attention, {run['machine']}, {args.threads} threads, {_core.isa()}")
    if not args.case:
        path = Path(__file__).parent / "results" / "tree_attention-cpu.json"
        write(path, run | dict(isa=_core.isa(), threads=args.threads, rates=rates, cases=report))


if __name__ == "__main__":
    with torch.no_grad():
        main()
