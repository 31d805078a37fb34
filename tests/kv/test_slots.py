"""Free slots against a naive set of them."""

import numpy as np
import pytest

from forktree.kv import OutOfSlots, SlotAllocator


@pytest.mark.parametrize("limit", [1, 700, 5000, 10**9])
def test_random_takes(limit: int) -> None:
    rng = np.random.default_rng(limit)
    slots, pieces, used, most, furthest = SlotAllocator(limit), [], set(), 0, 0
    for _ in range(800):
        count = int(rng.integers(0, 9)) if rng.random() < 0.9 else int(rng.integers(0, 1500))
        if count > limit - len(used):
            with pytest.raises(OutOfSlots, match=f"{count} KV slots needed, {limit - len(used)} free of {limit}"):
                slots.allocate(count)
        else:
            extent = int(rng.integers(1, count + 1)) if count and rng.random() < 0.5 else 0
            taken = slots.allocate(count, extent).tolist()
            assert len(set(taken)) == count and not used & set(taken) and all(0 <= slot < limit for slot in taken)
            longest = np.diff([-1, *sorted(used), furthest + 1]).max() - 1
            assert extent or (np.diff(taken) == 1).all() or count > longest, "a contiguous run would have fit"
            pieces.append(np.array(taken, np.int32))
            used |= set(taken)
            most, furthest = max(most, len(used)), max([furthest, *taken])
        for i in sorted(rng.permutation(len(pieces))[: int(rng.integers(0, 3))].tolist(), reverse=True):
            gone = pieces.pop(i)
            slots.free(gone)
            used -= set(gone.tolist())
        assert (slots.in_use, slots.num_free) == (len(used), limit - len(used))
        assert used == set(np.flatnonzero(~slots.is_free()).tolist())
    assert furthest < 3 * most + 1024 and len(slots.is_free()) <= min(limit, 40_000)
