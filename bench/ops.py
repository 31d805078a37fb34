"""What one call of an operation costs on the CPU, in microseconds: smallest tensors, so nearly all of it is overhead.

    python bench/ops.py

Medians of rounds in which operations and baselines alternate. Baseline: the fewest PyTorch calls that do the same
without checking anything.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from forktree import TokenRequest, TreeLayout, ops, plan_attention

ROUNDS, CALLS = 25, 400
HEADS, DIM, SLOTS = 2, 64, 16


def cases() -> dict[str, tuple[Callable[[], Any], str, Callable[[], Any]]]:
    """By operation: its call, and name and call of its baseline."""
    k, v = torch.randn(2, 1, HEADS, DIM)
    k_slots, v_slots = torch.zeros(2, SLOTS, HEADS, DIM)
    pool, slots = ops.KVPool(k_slots, v_slots), torch.tensor([3])
    inv_freq = 10000.0 ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    cos, sin = torch.randn(2, 1, 1, DIM)
    o, lse = torch.randn(2, HEADS, DIM), torch.randn(2, HEADS)
    indptr, index = torch.tensor([0, 2]), torch.tensor([0, 1])

    layout = TreeLayout.from_pages([[0]], [4], 8)
    made = plan_attention(layout, num_qo_heads=HEADS, num_kv_heads=HEADS, head_dim=DIM)
    seen = [x[:4].transpose(0, 1) for x in (k_slots, v_slots)]

    def attention() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(k.transpose(0, 1), *seen)

    def index_copies() -> None:
        k_slots.index_copy_(0, slots, k)
        v_slots.index_copy_(0, slots, v)

    def rotated() -> torch.Tensor:
        first, second = k.chunk(2, -1)
        return k * cos + torch.cat((-second, first), -1) * sin

    def merged() -> tuple[torch.Tensor, torch.Tensor]:
        return (lse.softmax(0).unsqueeze(-1) * o).sum(0), lse.logsumexp(0)

    hidden, lm_head, request = torch.randn(1, DIM), torch.randn(32, DIM), TokenRequest(top_k=4)

    def scored() -> tuple[torch.Tensor, torch.Tensor]:
        return tuple((hidden @ lm_head.T).log_softmax(-1).topk(4))

    return {
        "tree_attention": (lambda: ops.tree_attention(k, pool, made), "sdpa on a slice", attention),
        "append_kv": (lambda: ops.append_kv(k, v, slots, pool), "2 index_copy_", index_copies),
        "rotate_rows": (lambda: ops.rotate_rows(k, slots, inv_freq), "cos and sin given", rotated),
        "merge_states": (lambda: ops.merge_states(o, lse, indptr, index), "softmax, logsumexp", merged),
        "score_tokens": (lambda: ops.score_tokens(hidden, lm_head, request), "product, log_softmax, topk", scored),
    }


def cost(call: Callable[[], Any]) -> float:
    """Microseconds a call."""
    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - began) / CALLS * 1e6


def main() -> None:
    """Measures and prints medians."""
    print(f"{'operation':15}{'us a call':>10}   baseline")
    for name, (call, baseline, baseline_call) in cases().items():
        rounds = [(cost(call), cost(baseline_call)) for _ in range(ROUNDS)]
        ours, theirs = (median(times) for times in zip(*rounds, strict=True))
        print(f"{name:15}{ours:10.1f}{theirs:10.1f}  {baseline}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
