"""Damaged tokens: NaN and infinities in K and V, and which outputs may know of them."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layouts import Case

Attend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def seers(case: Case, slot: int, window: int | None) -> list[int]:
    """Output tokens one of whose rows sees a slot."""
    row_pos = case.layout.row_pos.tolist()

    def near(row: int, pos: int) -> bool:
        return window is None or -window < pos - row_pos[row] <= 0

    rows = [row for row, seen in enumerate(case.seen) if any(s == slot and near(row, pos) for s, pos in seen)]
    return case.layout.row_token[rows].tolist()


def check_damage(
    case: Case, k: Tensor, v: Tensor, heads: int, attend: Attend, window: int | None, seed: int, same: Any = torch.equal
) -> None:
    """Outputs that see no damaged token are `same` as without damage; those that see one are not finite, NaN for NaN.

    attend: of pools. Damage is that of a whole token, or of one element of one of its heads.
    """
    rng = np.random.default_rng(seed)
    group, clean = heads // k.shape[1], attend(k, v)
    for bad, where in itertools.product((torch.nan, torch.inf, -torch.inf), ("k", "v", "kv")):
        pools = {"k": k.clone(), "v": v.clone()}
        reached = torch.zeros(case.layout.num_tokens, heads, dtype=torch.bool)
        element = slice(None) if rng.random() < 0.5 else int(rng.integers(min(k.shape[2], v.shape[2])))
        for slot in rng.choice(sorted(case.used), min(len(case.used), 3), replace=False).tolist():
            head = None if isinstance(element, slice) else int(rng.integers(k.shape[1]))
            kv_heads = slice(None) if head is None else head
            for name in where:
                pools[name][slot, kv_heads, element] = bad
            of_heads = slice(None) if head is None else slice(head * group, (head + 1) * group)
            reached[seers(case, slot, window), of_heads] = True
        out, lse = attend(pools["k"], pools["v"])
        assert same(out[~reached], clean[0][~reached]) and same(lse[~reached], clean[1][~reached]), (bad, where)
        if where == "v":
            assert same(lse, clean[1]) and not out[reached][:, element].isfinite().any()
        if np.isnan(bad):
            assert out[reached][:, element].isnan().all()
