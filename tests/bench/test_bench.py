"""The arithmetic of the GPU benchmarks, against numbers worked out by hand; and their sides, on the CPU."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    """The benchmarks' folder, as their scripts see it."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def workloads(bench):
    return bench("common.workloads")


@pytest.fixture
def floors(bench):
    return bench("common.roofline")


# Of five published trees at 32/8 heads, D 128, bf16, 4.3 TB/s and 780 TFLOP/s: tokens read once a row over distinct
# tokens, partials in percent of K and V, us of memory, us of memory with partials, us of arithmetic.
TABLE = [
    (6, 5, 7.7, 8.0, 0.9),
    (9, 49, 9.0, 12.9, 1.5),
    (61, 71, 37, 61, 45),
    (36, 81, 21, 37, 16),
    (26, 352, 24, 95, 12),
]


def rounds_to(value, digits):
    """Whether a value is printed like that, give or take one in the last place."""
    unit = 0.1 if isinstance(digits, float) else 1
    return abs(value - digits) <= unit


@pytest.mark.parametrize("i", range(5))
def test_published_trees(i, workloads, floors):
    tree = list(workloads.FIVE.values())[i]
    least = floors.floor(tree, 32, 8, 128, 2)
    us = least.us(dict(bytes_per_s=4.3e12, flop_per_s=780e12, exp_per_s=1e12))
    kv = tree.distinct * 2 * 8 * 128 * 2
    partials = floors.partial_bytes(tree, 32, 128)
    found = (
        tree.attended / tree.distinct,
        100 * partials / kv,
        us["bytes"],
        us["bytes"] + partials / 4.3e6,
        us["flops"],
    )
    assert all(rounds_to(value, digits) for value, digits in zip(found, TABLE[i], strict=True)), (found, TABLE[i])
    assert us["exps"] == pytest.approx(tree.attended * 32 / 1e6)


def test_counts_of_a_small_tree(workloads):
    tree = workloads.levels([1, 2, 4], [9, 5, 3])
    assert tree.parent == [-1, 0, 0, 1, 1, 2, 2] and tree.rows == [3, 4, 5, 6]
    assert tree.path == [[0, 1, 3], [0, 1, 4], [0, 2, 5], [0, 2, 6]]
    assert (tree.distinct, tree.attended, tree.depth, tree.is_regular) == (9 + 10 + 12, 4 * 17, 3, True)
    assert tree.partials(4) == 4 * (3 + 2 + 1)
    with pytest.raises(ValueError, match="multiple of 2, those above, got 3"):
        workloads.levels([1, 2, 3], [1, 1, 1])


def test_tree_of_paths(workloads):
    tree = workloads.from_paths([[7, 8, 9], [7, 8, 4, 5], [7, 8, 4, 6], [7, 8], [7, 8, 4, 6]])
    assert tree.parent == [-1, 0, 0, 2, 2] and tree.length == [2, 1, 1, 1, 1]
    assert tree.rows == [0, 1, 3, 4, 4]
    assert tree.distinct == 6 and tree.attended == 2 + 3 + 4 + 4 + 4 and not tree.is_regular


@pytest.mark.parametrize("name", ["beam", "particles"])
def test_traces(name, workloads):
    tree = workloads.trace(name)
    assert len(tree.rows) == 64 and tree.length[0] == workloads.PROMPT and tree.parent.count(-1) == 1
    assert all(n % workloads.STRETCH == 0 for n in tree.length) and tree.depth > 2
    assert tree.distinct < 0.2 * tree.attended  # or there would be little to share


@pytest.mark.parametrize("extent", [None, 1, 3, 16])
def test_every_token_has_a_slot(extent, workloads):
    tree = workloads.levels([1, 3], [10, 7])
    for grown_only in (True, False):
        slot_of = workloads.slots(tree, extent, grown_only=grown_only)
        assert sorted(slot_of) == list(range(31))
        jumps = (np.diff(slot_of) != 1).sum()
        assert jumps == 0 if extent is None else jumps <= 31 // extent + 4
        if grown_only:
            assert (np.diff(slot_of[:10]) == 1).all()
    assert workloads.layout(tree, workloads.slots(tree, extent)).row_pos.tolist() == [16, 16, 16]


def test_targets(workloads, floors):
    shallow, deep = workloads.star(4, 100, 10), workloads.levels([1, 2, 4], [9, 5, 3])
    floor_us = dict(bytes=85.0, flops=30.0, exps=1.0)
    us = {"forktree": 104.0, "forktree cuda": 1.0, "sdpa": 103.0, "flashinfer cascade": 150.0}
    bound, best = floors.targets(shallow, us, "forktree", floor_us)
    assert bound["limit_us"] == pytest.approx(105) and bound["met"]
    assert best["limit_us"] == 103 and not best["met"] and "sdpa" in best["target"]
    assert floors.targets(deep, us, "forktree", floor_us)[2] == dict(
        target="1.5x flashinfer cascade", limit_us=100.0, us=104.0, met=False
    )
    (arithmetic, _) = floors.targets(shallow, us, "forktree", dict(bytes=5.0, flops=60.0, exps=1.0))
    assert arithmetic["limit_us"] == pytest.approx(100) and not arithmetic["met"]


@pytest.mark.parametrize("name", ["1,4,16,512/1024,256,128,32", "9 levels to 1024/256 to 16", "beam", "particles"])
def test_cascades_see_what_rows_see(name, bench, workloads):
    """Each level's runs, put together, are the slots of the row's path in order."""
    baselines = bench("common.baselines")
    tree = workloads.FIVE[name] if name in workloads.FIVE else workloads.trace(name)
    slot_of = workloads.slots(tree, 16)
    p = baselines.Problem(tree, slot_of, *torch.zeros(3, 1, 1, 1))
    for depth in {baselines.trunk(tree), 2}:
        seen = [[] for _ in tree.rows]
        for level in baselines.cascade_levels(p, depth):
            assert level.rows[0] == 0 and level.rows[-1] == len(tree.rows) and (np.diff(level.rows) > 0).all()
            for group, (begin, end) in enumerate(zip(level.rows, level.rows[1:], strict=False)):
                run = level.slots[level.runs[group] : level.runs[group + 1]]
                assert run.size  # FlashInfer merges empty states to NaN
                for row in range(begin, end):
                    seen[row] += run.tolist()
        assert seen == [row.tolist() for row in p.row_slots]
    with pytest.raises(baselines.Absent, match="levels"):
        baselines.cascade_levels(p, tree.depth + 1)


def test_sides_agree_and_the_absent_say_why(bench, workloads):
    attention, baselines = bench("gpu.attention"), bench("common.baselines")
    tree = workloads.from_paths([[0, 1, 2, 3], [0, 1, 2, 4, 5], [0, 1, 6], [0, 1, 6]])
    p = baselines.problem(tree, workloads.slots(tree, 2), 4, 2, 16, "cpu")
    made, absent = baselines.sides(p, {"flex": "not now"})
    mine, planning = attention.ours(p, ["cpu", "torch"])
    errors, wrong = attention.check(p, mine | made)
    assert set(errors) == set(mine) | {"sdpa", "sdpa grouped"} and not wrong
    assert absent["flex"] == "not now" and {"flashinfer decode", "flashinfer cascade", "xformers tree"} <= set(absent)
    assert planning["plan_us"] > 0 and planning["steps"] == 1
    bad = baselines.Side(lambda: torch.full((4, 4, 16), torch.nan))
    _, wrong = attention.check(p, {"bad": bad})
    assert "nan" in wrong["bad"]


def test_a_step_that_fails_or_hangs_stops_no_other(bench, tmp_path):
    gpu, reports = bench("gpu.run"), []
    runner = gpu.Runner(tmp_path, dict(os.environ), lambda r: reports.append(list(r.results)))
    runner.run(gpu.Step("fails", [sys.executable, "-c", "print('why'); raise SystemExit(7)"], 60))
    hangs = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    runner.run(gpu.Step("hangs", [sys.executable, "-c", hangs], 1))
    runner.run(gpu.Step("skipped", [sys.executable], 60, skip="no need"))
    runner.run(gpu.Step("succeeds", [sys.executable, "-c", "print('done')"], 60))
    results = runner.results
    assert results["fails"]["rc"] == 7 and "why" in results["fails"]["tail"]
    assert results["hangs"]["timed_out"] and results["hangs"]["seconds"] < 20
    assert results["skipped"] == dict(skipped="no need") and results["succeeds"]["last_line"] == "done"
    assert runner.failed == ["fails", "hangs"] and reports[-1] == list(results)
    assert gpu.sanitizers(["x"])[0].name == "memcheck-cuda"


def test_dry_run_of_a_benchmark_writes_a_report(tmp_path):
    """The whole of attention's, which has most parts; `gpu/run.sh --dry-run` runs all of them."""
    out = tmp_path / "attention.json"
    command = [sys.executable, str(BENCH / "gpu/attention.py"), "--dry-run", "--out", str(out)]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")
    subprocess.run(command, check=True, timeout=200, capture_output=True, env=env)
    report = json.loads(out.read_text())
    assert set(report["cases"]) == {"1,2,4/9,5,3", "3 branches"} and "failed" not in report
    for case in report["cases"].values():
        assert {"forktree", "flex", "sdpa"} <= set(case["sides"]) and case["targets"]["forktree"]
        assert case["sides"]["forktree"]["included_us"] > case["sides"]["forktree"]["median_us"]
    assert len(report["slots"]["sides"]) == 15 and report["ceilings"]["flop_per_s"] > 0
