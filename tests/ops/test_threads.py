"""Results of the operations do not depend on the number of threads.

Each piece of work is large enough for several of them, so that `make sanitize` sees them side by side.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from forktree import KeyedSampling, Sampling, TokenRequest, ops
from forktree.ops import KVPool
from forktree.plan.cost_model import CPU
from forktree.plan.plan import plan_attention
from layouts import shared_prompt


def rotated() -> Tensor:
    rows, heads, dim = 2048, 8, 64
    return ops.rotate_rows(torch.randn(rows, heads, dim), torch.arange(rows), torch.rand(dim // 2))


def appended() -> Tensor:
    tokens, heads, dim = 2048, 8, 64
    pools = [torch.zeros(tokens, heads, dim) for _ in "kv"]
    k, v = (torch.randn(tokens, heads, dim) for _ in "kv")
    ops.append_kv(k, v, torch.randperm(tokens), KVPool(*pools))
    return torch.stack(pools)


def merged() -> Tensor:
    states, heads, dim = 2048, 8, 64
    indptr = torch.arange(0, states + 1, 8)
    out, lse = ops.merge_states(
        torch.randn(states, heads, dim), torch.randn(states, heads), indptr, torch.randperm(states)
    )
    return torch.cat([out, lse[..., None]], -1)


def attended() -> Tensor:
    """Several items, and partials to be merged."""
    layout = shared_prompt(1, 2, 6000, 70)
    made = plan_attention(layout, num_qo_heads=8, num_kv_heads=4, head_dim=64, cost_model=replace(CPU, grain=10**7))
    assert len(made.item) > 4 and made.num_partials
    k, v = torch.randn(2, layout.slot_index.size, 4, 64).bfloat16()
    out = ops.tree_attention(torch.randn(2, 8, 64).bfloat16(), KVPool(k, v), made)
    assert isinstance(out, Tensor)
    return out


def scored() -> Tensor:
    """Samples of one pass and of several."""
    rows, vocab, size = 80, 6000, 64
    kinds = [Sampling(), Sampling(0.0), Sampling(0.7, top_p=0.9), Sampling(3.0, top_p=0.95)]
    sample = KeyedSampling([kinds[i % 4] for i in range(rows)], torch.arange(rows), torch.arange(rows))
    scores = ops.score_tokens(
        torch.randn(rows, size), torch.randn(vocab, size) / 4, TokenRequest(top_k=9, sample=sample, entropy=True)
    )
    columns = (scores.lse, scores.entropy, scores.token, scores.log_prob, scores.shaped_log_prob)
    numbers = torch.stack([x.double() for x in columns if x is not None], dim=1)
    assert scores.top_ids is not None and scores.top_log_probs is not None
    return torch.cat([numbers, scores.top_ids, scores.top_log_probs], dim=1)


@pytest.mark.parametrize("work", [rotated, appended, merged, attended, scored])
def test_same_bits_on_any_number_of_threads(work: Callable[[], Tensor], threads: tuple[int, ...]) -> None:
    results = []
    for number in threads:
        torch.set_num_threads(number)
        torch.manual_seed(0)
        results.append(work())
    assert all(torch.equal(results[0], other) for other in results[1:])
