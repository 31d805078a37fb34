"""The attention of one layer and decode step on a GPU, beside its baselines and its floor: 32/8 heads, D 128, bf16.

    export PYTHONPATH=bench
    python bench/gpu/attention.py --out attention.json
    python bench/gpu/attention.py --dry-run --out /tmp/attention.json    # tiny trees on the CPU: proves the script only

Sides: `forktree` as it chooses by itself; held to each of its backends, on plans for narrow and for wide steps
(`forktree.plan.cost_model`); and `common/baselines.py`. All take turns; the L2 cache holds nothing of them; launches
are hidden by work that keeps the GPU busy. Every side's result is compared with an fp32 computation before it is timed.

Planning is not in those times. It is done once a tree for all layers; here one layer bears all of it. `included`: a
plan for every step. `amortised`: a plan for as many steps as it serves, all rows growing by a token a step until the
tree is a quarter larger, and growing it in between.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common.baselines import Problem, Side, problem, sides
from common.measure import Call, Stopwatch, about, ceilings, gpu, host_us, summary, write
from common.roofline import floor, partial_bytes, targets
from common.workloads import EXTENT, FIVE, STARS, Tree, layout, levels, slots, star, trace
from forktree import TreeLayout, ops
from forktree.plan.cost_model import CostModel, compute_bound_gpu, memory_bound_gpu, multiprocessors
from forktree.plan.plan import AttentionPlan, plan_attention

HEADS = (32, 8, 128)
TOLERANCE = 0.02  # of the largest output
SLOTS_TREE = star(64, 8192, 64)
EXTENTS = {"contiguous": None, "extents of 8": 8, "scattered": 1}
COMPILED = [*FIVE, "beam", "particles", "64 branches, 8k"]  # cases FlexAttention is compiled for
TINY = {"1,2,4/9,5,3": levels([1, 2, 4], [9, 5, 3]), "3 branches": star(3, 20, 4)}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Holds forktree to one; "" leaves the choice to it."""
    before = os.environ.pop("FORKTREE_BACKEND", None)
    if name:
        os.environ["FORKTREE_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("FORKTREE_BACKEND", None)
        if before is not None:
            os.environ["FORKTREE_BACKEND"] = before


def ours(p: Problem, names: list[str]) -> tuple[dict[str, Side], dict[str, float]]:
    """forktree's sides, and what planning costs: microseconds of a plan, of growing it, and steps it serves."""
    tree = layout(p.tree, p.slot_of)
    device, sms = p.q.device, multiprocessors(p.q.device)
    chosen = made_for(p, tree)
    found = {"forktree": Side(partial(attend, p, chosen, ""))}
    for kind, cost_model in (("narrow", memory_bound_gpu(sms)), ("wide", compute_bound_gpu(sms))):
        held = made_for(p, tree, cost_model)
        found |= {f"forktree {name} {kind}": Side(partial(attend, p, held, name)) for name in names}
    costs = dict(
        plan_us=host_us(lambda: made_for(p, tree).on(device)),
        grow_us=host_us(lambda: chosen.grow(tree.node_len, tree.row_pos).on(device)),
        steps=max(1, p.tree.distinct // 4 // len(p.tree.rows)),
    )
    return found, costs


def made_for(p: Problem, tree: TreeLayout, cost_model: CostModel | None = None) -> AttentionPlan:
    """A plan for the problem's heads and device."""
    heads = dict(num_qo_heads=p.q.shape[1], num_kv_heads=p.k_slots.shape[1], head_dim=p.q.shape[2])
    return plan_attention(tree, **heads, device=p.q.device, cost_model=cost_model)


def attend(p: Problem, made: AttentionPlan, name: str) -> Tensor:
    """By the backend of that name."""
    with backend(name):
        out = ops.tree_attention(p.q, ops.KVPool(p.k_slots, p.v_slots), made)
    assert isinstance(out, Tensor)
    return out


def check(p: Problem, made: dict[str, Side]) -> tuple[dict[str, float], dict[str, str]]:
    """Largest errors of the sides that are right, in parts of the largest output; and what is wrong with the others."""
    tree = made_for(p, layout(p.tree, p.slot_of))
    with backend("torch"):
        expected = ops.tree_attention(p.q.float(), ops.KVPool(p.k_slots.float(), p.v_slots.float()), tree)
    assert isinstance(expected, Tensor)
    errors, wrong = {}, {}
    for name, side in made.items():
        try:
            out = side.run().float().reshape(expected.shape)
            error = ((out - expected).abs().max() / expected.abs().max()).item()
            if error <= TOLERANCE:
                errors[name] = error
            else:  # also NaN
                wrong[name] = f"its result differs by {error:.2g} of the largest output"
        except Exception as failure:
            wrong[name] = f"{type(failure).__name__}: {failure}"[:400]
    return errors, wrong


def measured(tree: Tree, watch: Stopwatch, rates: dict[str, float], args: Any, leave_out: dict[str, str]) -> Any:
    """The report of one case."""
    p = problem(tree, slots(tree, EXTENT), *args.heads, watch.device)
    mine, planning = ours(p, args.backends)
    others, absent = sides(p, leave_out)
    made = mine | others
    errors, wrong = check(p, made)
    times = watch.turns({name: made[name].run for name in errors}, args.rounds, args.seconds_per_side)
    found: dict[str, Any] = {}
    for name, us in times.items():
        prepare = made[name].plan
        found[name] = summary(us) | dict(error=errors[name])
        if name == "forktree":
            median, steps = found[name]["median_us"], planning["steps"]
            shared = (planning["plan_us"] + (steps - 1) * planning["grow_us"]) / steps
            found[name] |= dict(included_us=median + planning["plan_us"], amortised_us=median + shared)
        elif prepare is not None:
            found[name] |= dict(plan_us=host_us(_waited(prepare, watch), 3))
    least = floor(tree, *args.heads, p.q.element_size())
    floors = least.us(rates)
    medians = {name: side["median_us"] for name, side in found.items()}
    return dict(
        rows=len(tree.rows),
        nodes=len(tree.length),
        depth=tree.depth,
        distinct=tree.distinct,
        attended=tree.attended,
        bytes=least.bytes,
        flops=least.flops,
        partial_bytes_unfolded=partial_bytes(tree, args.heads[0], args.heads[2]),
        floor_us=floors,
        planning=planning,
        sides=found,
        absent=absent | wrong,
        targets={name: targets(tree, medians, name, floors) for name in mine if name in medians},
    )


def scattered(tree: Tree, watch: Stopwatch, args: Any) -> dict[str, Any]:
    """The same tree with its slots in order, in extents, and anywhere: all in the same turns."""
    calls: dict[str, Call] = {}
    wrong: dict[str, str] = {}
    for how, extent in EXTENTS.items():
        p = problem(tree, slots(tree, extent, grown_only=False), *args.heads, watch.device)
        mine, _ = ours(p, args.backends)
        right, failed = check(p, mine)
        calls |= {f"{name}, {how}": mine[name].run for name in right}
        wrong |= {f"{name}, {how}": why for name, why in failed.items()}
    found = {name: summary(us) for name, us in watch.turns(calls, args.rounds, args.seconds_per_side).items()}
    for name, side in found.items():
        who, _, _ = name.partition(",")
        if (whole := found.get(f"{who}, contiguous")) is not None:
            side["of_contiguous"] = side["median_us"] / whole["median_us"]
    return dict(sides=found, absent=wrong)


def _waited(call: Call, watch: Stopwatch) -> Call:
    def run() -> None:
        call()
        watch.synchronize()

    return run


def show(report: dict[str, Any], backends: list[str]) -> None:
    """Prints a table: us, that of each backend on the plan it is faster with, and how many of the targets are met."""
    table = Table(title="attention of one layer, us: median")
    for column in ("", "floor", "limit", "forktree", *backends, "best baseline", "", "targets met"):
        table.add_column(column, justify="right")

    def us(case: dict[str, Any], name: str) -> str:
        times = [side["median_us"] for found, side in case["sides"].items() if found.startswith(name)]
        return f"{min(times):.1f}" if times else "-"

    for name, case in report["cases"].items():
        limit = max(case["floor_us"], key=case["floor_us"].get)
        others = {n: s["median_us"] for n, s in case["sides"].items() if not n.startswith("forktree")}
        best = min(others, key=others.__getitem__, default="")
        aims = case["targets"].get("forktree", [])
        table.add_row(
            name,
            f"{case['floor_us'][limit]:.1f}",
            limit,
            f"{case['sides']['forktree']['median_us']:.1f}" if "forktree" in case["sides"] else "-",
            *(us(case, f"forktree {name}") for name in backends),
            f"{others[best]:.1f}" if best else "-",
            best,
            f"{sum(a['met'] for a in aims)} of {len(aims)}",
        )
    Console(width=150).print(table)
    for name, side in report.get("slots", {}).get("sides", {}).items():
        print(f"slots: {name}: {side['median_us']:.1f} us, {side.get('of_contiguous', 1):.3f} of contiguous")


def main() -> None:
    """Measures and reports; the file grows with every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    parser.add_argument("--dry-run", action="store_true", help="tiny trees on the CPU")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=140, help="no case begins after so many")
    parser.add_argument("--warm", type=Path, help="report of baselines.py: what it could not run is not tried")
    args = parser.parse_args()
    began = time.perf_counter()
    device = "cpu" if args.dry_run else "cuda"
    args.heads = (4, 2, 16) if args.dry_run else HEADS
    args.backends = ["torch", "cpu"] if args.dry_run else ["triton", "cuda"]
    args.seconds_per_side = 0.05 if args.dry_run else 0.4
    args.rounds = 5 if args.dry_run else args.rounds
    cases = TINY if args.dry_run else {**FIVE, "beam": trace("beam"), "particles": trace("particles"), **STARS}
    leave_out = {}
    if args.warm is not None:
        warm = json.loads(args.warm.read_text()) if args.warm.exists() else {}
        for name in ("flex", "flashinfer decode", "flashinfer cascade", "xformers tree"):
            if isinstance(why := warm.get(name, "it did not compile in time"), str):
                leave_out[name] = why

    rates = ceilings(device)
    watch = Stopwatch(device)
    report: dict[str, Any] = dict(about=about(device), heads=args.heads, dtype="bf16", ceilings=rates, cases={})

    def keep() -> None:
        report["gpu_after"] = gpu()
        write(args.out, report)

    keep()
    for name, tree in cases.items():
        if time.perf_counter() - began > args.seconds:
            report.setdefault("left_out_for_time", []).append(name)
            continue
        slow = {} if name in COMPILED or args.dry_run else {"flex": "compiled for other cases only: it takes seconds"}
        try:
            report["cases"][name] = measured(tree, watch, rates, args, slow | leave_out)
        except Exception as error:  # the cases that follow are measured all the same
            report.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"[:400]
        if device == "cuda":
            torch.cuda.empty_cache()
        keep()
    report["slots"] = scattered(TINY["3 branches"] if args.dry_run else SLOTS_TREE, watch, args)
    keep()
    show(report, args.backends)
    if "failed" in report:
        raise SystemExit(f"failed: {report['failed']}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
