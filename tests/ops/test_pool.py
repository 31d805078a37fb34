"""`KVPool`, `KVFormat` and `AttentionOptions`: what they hold, and what they refuse when they are made."""

import math

import pytest
import torch

from forktree.ops import AttentionOptions, KVFormat, KVPool


def test_a_pool_of_a_format_is_of_that_format():
    made = KVFormat(torch.bfloat16, num_kv_heads=3, k_dim=8, v_dim=5)
    pool = made.pool(7, torch.device("cpu"))
    assert pool.format == made and pool.num_slots == 7
    assert pool.k.shape == (7, 3, 8) and pool.v.shape == (7, 3, 5) and pool.k.dtype == torch.bfloat16
    assert made.bytes_per_token * 7 == pool.k.nbytes + pool.v.nbytes


@pytest.mark.parametrize(
    ("k", "v", "message"),
    [
        (torch.zeros(7, 2, 3), torch.zeros(8, 2, 3), r"k and v of a pool must be .* got \[7, 2, 3\] and \[8, 2, 3\]"),
        (torch.zeros(7, 2, 3), torch.zeros(7, 1, 3), r"k and v of a pool must be .* got \[7, 2, 3\] and \[7, 1, 3\]"),
        (torch.zeros(7, 3), torch.zeros(7, 3), r"k and v of a pool must be \[slots, Hk, Dk\] and \[slots, Hk, Dv\]"),
        (torch.zeros(7, 2, 3), torch.zeros(7, 2, 3).half(), "v of a pool must be .* as k is, got torch.float16 on cpu"),
        (torch.zeros(7, 2, 3), torch.zeros(7, 2, 3, device="meta"), "v of a pool must be .* as k is, got .* on meta"),
        (
            torch.zeros(7, 2, 3),
            torch.zeros(7, 3, 2).transpose(1, 2),
            r"dense in their last dimension, got strides \(6, 3, 1\) and \(6, 1, 2\)",
        ),
    ],
)
def test_tensors_that_make_no_pool_are_refused(k, v, message):
    with pytest.raises(ValueError, match=message):
        KVPool(k, v)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"softcap": x}, f"softcap must be a finite fp32 number above 0, or None, got {x}")
            for x in (0.0, -1.0, math.inf, math.nan, 1e-60)
        ),
        *(({"scale": x}, "scale must be a finite fp32 number, or None, got ") for x in (math.inf, math.nan, 1e60)),
        *(({"sinks": torch.tensor([0.0, x])}, "sinks must be numbers or -inf, got ") for x in (math.inf, math.nan)),
        *(
            ({"alibi_slopes": torch.tensor([0.0, x])}, "alibi_slopes must be finite, got ")
            for x in (-math.inf, math.inf, math.nan)
        ),
    ],
)
def test_bad_options_are_refused_when_they_are_made(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionOptions(**options)


def test_options_on_a_device_are_not_looked_at():
    sinks = torch.full((2,), torch.nan, device="meta")
    assert AttentionOptions(sinks=sinks).per_head == {"sinks": sinks}
    with torch._subclasses.FakeTensorMode() as mode:
        AttentionOptions(alibi_slopes=mode.from_tensor(torch.zeros(2)))
