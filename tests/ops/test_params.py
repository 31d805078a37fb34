"""The structs that cross the binding: the mirror in Python is the one in C++, and members are packed in its order."""

import ctypes

import pytest
import torch

from forktree import _core
from forktree.ops import AttentionOptions, KVPool, params
from forktree.ops.assemble import LmHead, VocabPass
from forktree.ops.plan_tensors import PlanTensors


def test_every_struct_is_mirrored():
    mirrors = {name for name, x in vars(params).items() if isinstance(x, type) and issubclass(x, ctypes.Structure)}
    assert mirrors - {"Structure"} == set(_core.params)


@pytest.mark.parametrize("name", _core.params)
def test_sizes_and_offsets_are_those_of_the_core(name):
    mirror = getattr(params, name)
    size, members = _core.params[name]
    ours = {member: (getattr(mirror, member).offset, getattr(mirror, member).size) for member, _ in mirror._fields_}
    assert ours == members and list(ours) == list(members)
    assert ctypes.sizeof(mirror) == params.packer(mirror).size == size


def test_the_core_refuses_structs_of_another_size():
    with pytest.raises(ValueError, match=r"the struct must have 144 bytes, got 143"):
        _core.append_kv(bytes(ctypes.sizeof(params.AppendKvParams) - 1), 1)


class Core:
    """Takes a struct to pieces instead of computing anything."""

    def __init__(self, mirror):
        self.mirror = mirror

    def __call__(self, packed, how):
        self.got, self.how = self.mirror.from_buffer_copy(packed), how

    def check(self, **expected):
        """Members by name; those of structs within it as dicts."""
        assert members(self.got) == expected


def members(structure):
    """0 for null, which ctypes calls None."""
    values = {name: getattr(structure, name) for name, _ in structure._fields_}
    return {name: members(x) if isinstance(x, ctypes.Structure) else x or 0 for name, x in values.items()}


def pool_members(pool):
    return dict(
        k=pool.k.data_ptr(),
        k_slot_stride=pool.k.stride(0),
        k_head_stride=pool.k.stride(1),
        v=pool.v.data_ptr(),
        v_slot_stride=pool.v.stride(0),
        v_head_stride=pool.v.stride(1),
        num_slots=7,
        num_kv_heads=2,
        k_dim=8,
        v_dim=6,
        dtype=1,
    )


@pytest.fixture
def pool():
    """Its strides are all different."""
    k, v = torch.zeros(7, 3, 10).bfloat16(), torch.zeros(7, 4, 11).bfloat16()
    return KVPool(k[:, :2, :8], v[:, :2, :6])


def test_members_of_tree_attention(pool):
    core, q = Core(params.TreeAttentionParams), torch.zeros(5, 6, 9).bfloat16()[:, :4, :8]
    plan = PlanTensors(torch.zeros(30, dtype=torch.int32), torch.zeros(20, dtype=torch.int32), 11, 12)
    sinks, slopes = torch.zeros(4), torch.ones(4)
    partials, counters = torch.zeros(13), torch.zeros(14, dtype=torch.int32)
    options = AttentionOptions(0.5, 30.0, sinks, slopes)
    out, lse = params.tree_attention(core, 3, q, pool, plan, options, partials, counters)
    assert core.how == 3 and out.shape == (11, 4, 6) and lse.shape == (11, 4)
    core.check(
        pool=pool_members(pool),
        q=q.data_ptr(),
        q_row_stride=54,
        q_head_stride=9,
        rows=5,
        num_tokens=11,
        max_partials=12,
        plan_buffer=plan.buffer.data_ptr(),
        plan_size=30,
        slot_index=plan.slot_index.data_ptr(),
        slot_index_size=20,
        num_qo_heads=4,
        dtype=1,
        scale=0.5,
        softcap=30.0,
        sinks=sinks.data_ptr(),
        alibi_slopes=slopes.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        partials=partials.data_ptr(),
        counters=counters.data_ptr(),
        device=0,
        plan_trusted=0,
    )


def test_members_of_append_kv(pool):
    core = Core(params.AppendKvParams)
    k, v = torch.zeros(5, 3, 9).bfloat16()[:, :2, :8], torch.zeros(5, 4, 7).bfloat16()[:, :2, :6]
    slots = torch.arange(5, dtype=torch.int32)
    params.append_kv(core, 0, k, v, slots, pool)
    core.check(
        pool=pool_members(pool),
        k=k.data_ptr(),
        k_row_stride=27,
        k_head_stride=9,
        v=v.data_ptr(),
        v_row_stride=28,
        v_head_stride=7,
        slots=dict(data=slots.data_ptr(), wide=0, size=5),
    )


def test_members_of_rotate_rows():
    core, q = Core(params.RotateRowsParams), torch.zeros(5, 3, 9).half()[:, :2, :8]
    shift, inv_freq = torch.arange(5), torch.zeros(3, dtype=torch.double)
    out = params.rotate_rows(core, 0, q, shift, inv_freq, True, 6)
    core.check(
        q=q.data_ptr(),
        row_stride=27,
        head_stride=9,
        heads=2,
        dim=8,
        shift=dict(data=shift.data_ptr(), wide=1, size=5),
        inv_freq=inv_freq.data_ptr(),
        pairs=3,
        out=out.data_ptr(),
        dtype=2,
        interleaved=1,
    )


def test_members_of_merge_states():
    core, o, lse = Core(params.MergeStatesParams), torch.zeros(5, 3, 8), torch.zeros(5, 3)
    indptr, index = torch.zeros(3), torch.zeros(7, dtype=torch.int32)
    indptr = indptr.long()
    out, total = params.merge_states(core, 0, o, lse, indptr, index)
    core.check(
        o=o.data_ptr(),
        lse=lse.data_ptr(),
        states=5,
        heads=3,
        dim=8,
        indptr=dict(data=indptr.data_ptr(), wide=1, size=3),
        index=dict(data=index.data_ptr(), wide=0, size=7),
        out=out.data_ptr(),
        total=total.data_ptr(),
        dtype=0,
    )


def test_members_of_score_tokens():
    core, hidden = Core(params.ScoreTokensParams), torch.zeros(5, 9).bfloat16()[:, :8]
    head = LmHead(torch.zeros(40, 8).bfloat16(), torch.zeros(40), 2.0, 30.0)
    edits = [torch.zeros(6, dtype=torch.int32), *torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3)]
    sample = torch.zeros(5, dtype=torch.long), torch.zeros(4, 5, dtype=torch.double), True, *edits
    wanted = VocabPass(7, True, *sample, torch.zeros(5, 2, dtype=torch.int32))
    found = params.score_tokens(core, 0, hidden, head, wanted)
    tensors = {name: x.data_ptr() for name, x in wanted._asdict().items() if isinstance(x, torch.Tensor)}
    core.check(
        hidden=hidden.data_ptr(),
        row_stride=9,
        rows=5,
        hidden_size=8,
        lm_head=head.weight.data_ptr(),
        vocab=40,
        bias=head.bias.data_ptr(),
        scale=2.0,
        softcap=30.0,
        top_k=7,
        dtype=1,
        **tensors,
        **{name: x.data_ptr() for name, x in found._asdict().items()},
    )
    params.score_tokens(core, 0, hidden, LmHead(head.weight), VocabPass(0))
    absent = {"bias", *tensors, *found._fields} - {"lse"}
    assert all(not members(core.got)[name] for name in absent)


def test_a_pool_whose_memory_moved_is_looked_at_again():
    core, pool = Core(params.AppendKvParams), KVPool(torch.zeros(4, 1, 2), torch.zeros(4, 1, 2))
    arguments = torch.ones(1, 1, 2), torch.ones(1, 1, 2), torch.tensor([3]), pool
    params.append_kv(core, 0, *arguments)
    before = core.got.pool.k
    pool.k.data = torch.zeros(9, 1, 2)
    params.append_kv(core, 0, *arguments)
    assert core.got.pool.k == pool.k.data_ptr() != before and core.got.pool.num_slots == 9
