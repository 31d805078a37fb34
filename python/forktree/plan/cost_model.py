"""What work costs on a machine: the constants of the planner's model (`csrc/plan/cost_model.hpp`)."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from functools import cached_property, lru_cache

import torch

from forktree.device import properties


@dataclass(frozen=True)
class CostModel:
    """What work costs, in picoseconds.

    A segment of r rows and t tokens costs, for each KV head,

        max(bytes of K and V, multiply-adds and exponentials) + rescaled sums, once every 64 tokens,

    bytes as `plan_attention` was told the pool has them, arithmetic for r rows x heads of the group rounded up to full
    lanes.

    Attributes:
        units: units of work that keep all workers busy; a constant, so that bits do not depend on threads.
        heads_per_item: KV heads of an item that are one unit of work.
        lanes: packed rows (query row x head of its group) that are processed together.
        max_lanes: packed rows an item may have.
        memory: a byte of K or V that is read for the first time.
        cache: a byte that another item reads again.
        mac: a multiply-add of all lanes, per (token, element).
        exp: an exponential of all lanes, per token.
        partial: a byte of a partial, written and merged.
        segment: an element of the sums of all lanes.
        item: starting on an item.
        grain: work that costs less is not cut.

    Raises:
        ValueError: a field is out of range.
    """

    units: int
    heads_per_item: int
    lanes: int
    max_lanes: int
    memory: int
    cache: int
    mac: int
    exp: int
    partial: int
    segment: int
    item: int
    grain: int

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            low, high = (1, 1 << 16) if f.name in COUNTS else (0, 1 << 40 if f.name in TIMES else 1 << 20)
            if not low <= value <= high:
                raise ValueError(f"{f.name} must be in [{low}, {high}], got {value}")

    @cached_property
    def values(self) -> tuple[int, ...]:
        """All fields in their order, as `_core` takes them."""
        return astuple(self)


COUNTS = ("units", "heads_per_item", "lanes", "max_lanes")
TIMES = ("item", "grain")
CPU = CostModel(
    units=16,
    heads_per_item=1,
    lanes=16,
    max_lanes=1024,
    memory=100,
    cache=30,
    mac=160,
    exp=3200,
    partial=60,
    segment=800,
    item=500_000,
    grain=100_000_000,
)

# GPUs are priced by the H200's published and commonly measured rates; nothing was fitted. A worker is a block; memory
# moves 4.3 TB/s, the L2 cache about 7 TB/s besides. An item begins with four loads that depend on one another.
SMS = 132  # streaming multiprocessors, where there is no device to ask


def memory_bound_gpu(sms: int = SMS) -> CostModel:
    """For steps bound by memory, on `mma.sync`.

    Two blocks of 64 packed rows a multiprocessor, all together about 350 TFLOP/s.
    """
    return CostModel(
        units=2 * sms,
        heads_per_item=1,
        lanes=16,
        max_lanes=64,
        memory=61,
        cache=30,
        mac=16,
        exp=2000,
        partial=90,
        segment=140,
        item=2_500_000,
        grain=4_000_000,
    )


def compute_bound_gpu(sms: int = SMS) -> CostModel:
    """For steps bound by arithmetic, on `wgmma`.

    One block of 128 packed rows a multiprocessor, all together about 450 TFLOP/s.
    """
    return CostModel(
        units=sms,
        heads_per_item=1,
        lanes=16,
        max_lanes=128,
        memory=31,
        cache=15,
        mac=7,
        exp=600,
        partial=45,
        segment=70,
        item=2_500_000,
        grain=4_000_000,
    )


# Packed rows (query rows x heads of a group) of a step up to which reading K and V takes longer than arithmetic. A
# packed row does 4 FLOP for an element of K and one of V, 4 bytes: an H200 with 790 TFLOP/s in bf16 and 4.3 TB/s needs
# 790 / 4.3 = 180 of them to be busy.
ROOFLINE_ROWS = 180


def cost_model_for(device: torch.device, packed_rows: int) -> CostModel:
    """The cost model of a device, for a step of that many packed rows (query rows x heads of a group)."""
    if device.type == "cpu":
        return CPU
    return (memory_bound_gpu if packed_rows <= ROOFLINE_ROWS else compute_bound_gpu)(multiprocessors(device))


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a device, or of an H200 where there is none."""
    return properties.multiprocessors(device) or SMS
