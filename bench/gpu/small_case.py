"""One small step through every operation of a backend, against the specification: for memory and race checkers.

    export PYTHONPATH=bench
    FORKTREE_BACKEND=cuda compute-sanitizer --tool racecheck python bench/gpu/small_case.py
    python bench/gpu/small_case.py --device cpu
"""

import argparse

import torch

from common.workloads import layout, levels, slots
from forktree import ops
from forktree.ops.dispatch import launcher
from forktree.ops.plan_tensors import PlanTensors
from forktree.plan.cost_model import memory_bound_gpu
from forktree.plan.plan import plan_attention

HEADS, KV_HEADS, DIM = 8, 2, 64


def main() -> None:
    """Raises AssertionError on a wrong result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    tree = levels([1, 2, 24], [300, 40, 7])
    slot_of = slots(tree, 5)
    rows = len(tree.rows)
    step = layout(tree, slot_of)
    # work is cut wherever it can be: partials, and tokens that several blocks finish
    eager = memory_bound_gpu()
    heads = {"num_qo_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM}
    made = plan_attention(step, **heads, device=device, cost_model=eager)
    q = torch.randn(rows, HEADS, DIM, dtype=torch.bfloat16)
    new = torch.randn(2, slot_of.size, KV_HEADS, DIM, dtype=torch.bfloat16)
    shift, inv_freq = torch.arange(rows), torch.rand(DIM // 2)
    pools = torch.full_like(new, torch.nan).to(device)
    ops.append_kv(*new.to(device), torch.arange(slot_of.size, device=device), ops.KVPool(*pools))
    turned = ops.rotate_rows(q.to(device), shift.to(device), inv_freq.to(device))
    out, lse = ops.tree_attention(turned, ops.KVPool(*pools), made, return_lse=True)
    merged, _ = ops.merge_states(out, lse, *(x.to(device) for x in (torch.arange(rows + 1), torch.arange(rows))))

    expected = launcher("reference", "rotate_rows")(q, shift, inv_freq, False, DIM)
    attend = launcher("reference", "tree_attention")
    expected, _ = attend(expected, ops.KVPool(*new), PlanTensors.of(made, q.device), ops.AttentionOptions())
    torch.testing.assert_close(merged.cpu(), expected, atol=2e-2, rtol=2e-2)
    print(f"{rows} rows, {made.num_partials} partials: as it should be")


if __name__ == "__main__":
    with torch.no_grad():
        main()
