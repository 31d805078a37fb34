"""The structs that cross the binding: the mirror in Python is the one in C++, and keeps what it points to alive."""

import ctypes
import gc
import weakref

import pytest
import torch

from forktree import _core
from forktree.ops import KVPool, params


def test_every_struct_is_mirrored():
    mirrors = {name for name, x in vars(params).items() if isinstance(x, type) and issubclass(x, ctypes.Structure)}
    assert mirrors - {"Structure", "Params"} == set(_core.params)


@pytest.mark.parametrize("name", _core.params)
def test_sizes_and_offsets_are_those_of_the_core(name):
    mirror = getattr(params, name)
    size, members = _core.params[name]
    ours = {member: (getattr(mirror, member).offset, getattr(mirror, member).size) for member, _ in mirror._fields_}
    assert ours == members and list(ours) == list(members)
    assert ctypes.sizeof(mirror) == size


def test_a_struct_keeps_alive_what_was_made_for_it():
    pool = KVPool(torch.zeros(4, 2, 8), torch.zeros(4, 2, 8))
    k = torch.randn(3, 2, 16)[..., ::2]  # copied, as its last dimension is not dense
    call = params.append_kv(k, k, torch.tensor([2, 0, 1]), pool)
    copy = weakref.ref(call.tensors[0])
    gc.collect()
    assert call.k == copy().data_ptr() != k.data_ptr()
    _core.append_kv(call.address, 1)
    assert torch.equal(pool.k[[2, 0, 1]], k)
    del call
    gc.collect()
    assert copy() is None


def test_a_pool_whose_memory_moved_is_looked_at_again():
    pool = KVPool(torch.zeros(4, 1, 2), torch.zeros(4, 1, 2))
    new, slots = torch.ones(1, 1, 2), torch.tensor([3])
    before = params.append_kv(new, new, slots, pool).pool.k
    pool.k.data = torch.zeros(9, 1, 2)
    moved = params.append_kv(new, new, slots, pool).pool
    assert moved.k == pool.k.data_ptr() != before and moved.num_slots == 9
