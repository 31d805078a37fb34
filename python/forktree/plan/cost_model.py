"""What work costs on a machine: the constants of the planner's model (`csrc/plan/cost_model.hpp`)."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from functools import cached_property, lru_cache

import torch


@dataclass(frozen=True)
class CostModel:
    """What work costs, in picoseconds. A segment of r rows and t tokens costs, for each KV head,

        max(bytes of K and V, multiply-adds and exponentials) + rescaled sums, once every 64 tokens,

    bytes at 2 an element, arithmetic for r rows x heads of the group rounded up to full lanes.
    """

    units: int  # pieces of work that keep all workers busy; a constant, so bits do not depend on threads
    heads_per_item: int  # KV heads of an item that are one piece of work
    lanes: int  # packed rows (query row x head of its group) processed together
    max_lanes: int  # packed rows an item may have
    memory: int  # a byte of K or V read first
    cache: int  # a byte read again by another item
    mac: int  # a multiply-add of all lanes, per (token, element)
    exp: int  # an exponential of all lanes, per token
    partial: int  # a byte of a partial, written and merged
    segment: int  # an element of the sums of all lanes
    item: int  # starting on an item
    grain: int  # what costs less is not cut

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            least, most = (1, 1 << 16) if f.name in COUNTS else (0, 1 << 40 if f.name in TIMES else 1 << 20)
            if not least <= value <= most:
                raise ValueError(f"{f.name} must be in [{least}, {most}], got {value}")

    @cached_property
    def values(self) -> tuple[int, ...]:
        """All fields, as `_core` wants them."""
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

# GPUs are priced by the H200's published and commonly measured rates, nothing was fitted. A worker is a block; memory
# moves 4.3 TB/s, the L2 cache about 7 TB/s beside it. An item begins with four loads that wait for one another.
SMS = 132  # streaming multiprocessors, where there is no device to ask


def memory_bound_gpu(sms: int = SMS) -> CostModel:
    """For steps bound by memory, on `mma.sync`: two blocks of 64 packed rows a multiprocessor, all together about
    350 TFLOP/s."""
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
    """For steps bound by arithmetic, on `wgmma`: one block of 128 packed rows a multiprocessor, all together about
    450 TFLOP/s."""
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
    """The cost model of a device for a step of that many query rows x heads of a group."""
    if device.type == "cpu":
        return CPU
    return (memory_bound_gpu if packed_rows <= ROOFLINE_ROWS else compute_bound_gpu)(multiprocessors(device))


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of the device, or of an H200 where there is none."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return SMS
