"""Staging: what the device still reads is never written."""

import numpy as np
import pytest
import torch

from forktree.device.staging import Staging


class Device:
    """Passes its events in order, some time later."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.waits = rng, 0
        self.flying: list[Event] = []

    def record_event(self) -> "Event":
        self.flying.append(Event(self))
        return self.flying[-1]

    def work(self) -> None:
        self.flying = self.flying[int(self.rng.integers(len(self.flying) + 1)) :]


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def synchronize(self) -> None:
        if self in self.device.flying:
            self.device.waits += 1
            self.device.flying = self.device.flying[self.device.flying.index(self) + 1 :]


@pytest.mark.parametrize("seed", range(3))
def test_a_buffer_in_flight_is_not_written(seed):
    rng = np.random.default_rng(seed)
    device = Device(rng)
    staging = Staging(torch.device("cpu"), device.record_event)
    reads = []  # address, event
    for _ in range(200):
        host = staging.next_host_buffer(int(rng.integers(1, 9)) * int(rng.choice([1, 1, 1, 50])))
        assert not any(address == host.ctypes.data and event in device.flying for address, event in reads)
        host[:] = rng.integers(-9, 9, host.size)
        to = torch.full((host.size,), 77, dtype=torch.int32)
        staging.upload(to)
        reads.append((host.ctypes.data, device.flying[-1]))
        assert np.array_equal(to.numpy(), host)
        if rng.random() < 0.5:
            device.work()
    assert 0 < device.waits < 150


def test_it_waits_only_if_both_are_in_flight():
    device = Device(np.random.default_rng(0))
    staging = Staging(torch.device("cpu"), device.record_event)
    for _ in range(2):
        staging.next_host_buffer(4)
        staging.upload(torch.empty(2, dtype=torch.int64))
    assert device.waits == 0 and len(device.flying) == 2
    staging.next_host_buffer(4)
    assert device.waits == 1 and len(device.flying) == 1  # for the older one
