"""Measuring: calls in turns with cold caches, what the machine does at best, and what a report says of its run."""

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

Call = Callable[[], Any]
PACKAGES = ("torch", "triton", "transformers", "numpy", "flashinfer-python", "xformers")  # versions in a report


def summary(us: list[float]) -> dict[str, float]:
    """Median, 90th percentile and number of some times."""
    return dict(median_us=float(np.median(us)), p90_us=float(np.percentile(us, 90)), calls=len(us))


def host_us(call: Call, repeat: int = 5) -> float:
    """Median of a call's time on the host; on a GPU, that of handing its work over."""
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return float(np.median(times)) * 1e6


class Stopwatch:
    """Times calls on a device, each with caches that hold nothing of it."""

    def __init__(self, device: str) -> None:
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 16 << 20
        self._cold = torch.zeros(4 * cache // 4, device=device)  # read, not written: dirty lines would be written back
        self._busy: dict[str, float] = {}  # us that the device must be kept busy while the host hands a call over

    def us(self, name: str, call: Call) -> float:
        """Of one call. A GPU is kept busy until the whole call is in its queue: launching is not timed."""
        self._cold.sum()
        if self.device == "cpu":
            began = time.perf_counter()
            call()
            return (time.perf_counter() - began) * 1e6
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(self._busy.get(name, 1000.0) * 2000))  # cycles, at some 2 GHz
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def turns(self, calls: dict[str, Call], rounds: int, seconds: float) -> dict[str, list[float]]:
        """Microseconds of each side's calls, in turns; after `seconds` of a side it has at least 5 and gets no more."""
        for name, call in calls.items():
            call()
            self.synchronize()
            self._busy[name] = 2 * host_us(call) + 50
            self.synchronize()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                if len(times[name]) < 5 or sum(times[name]) < seconds * 1e6:
                    times[name].append(self.us(name, call))
        return times

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def ceilings(device: str) -> dict[str, float]:
    """What the machine does at best: bytes/s of a copy (read and written), FLOP/s of bf16 products, exponentials/s."""
    on_gpu = device == "cuda"
    watch = Stopwatch(device)
    source = torch.randn((1 << 30) if on_gpu else (1 << 22), device=device)
    target = torch.empty_like(source)
    size = 8192 if on_gpu else 256
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    exponentials, count = _exponentials(device)
    calls: dict[str, tuple[Call, float]] = {
        "bytes_per_s": (lambda: target.copy_(source), 2 * source.nbytes),
        "flop_per_s": (lambda: a @ b, 2 * size**3),
        "exp_per_s": (exponentials, count),
    }
    times = watch.turns({name: call for name, (call, _) in calls.items()}, 20, 1.0)
    return {name: work / min(times[name]) * 1e6 for name, (_, work) in calls.items()}


def _exponentials(device: str) -> tuple[Call, int]:
    """A call that does nothing but exponentials, and how many."""
    if device == "cpu":
        x = torch.rand(1 << 20)
        return x.exp2, x.numel()
    from common.exponentials import exponentials, exponentials_of

    programs = 64 * torch.cuda.get_device_properties(device).multi_processor_count
    return lambda: exponentials(programs, device), exponentials_of(programs)


# ---------------------------------------------------------------------- reports


def about(device: str) -> dict[str, Any]:
    """Commit, machine and versions. COMMIT names the commit where there is no git."""
    return dict(
        commit=os.environ.get("COMMIT") or _said("git", "describe", "--always", "--dirty", "--abbrev=12"),
        machine=torch.cuda.get_device_name() if device == "cuda" else processor(),
        gpu=gpu(),
        cuda=torch.version.cuda,
        python=platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    )


def processor() -> str:
    """Its name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(path: Path, report: dict[str, Any]) -> None:
    """All of a report or, if the process is killed, the one before."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(report, indent=1) + "\n")
    new.replace(path)


def gpu() -> dict[str, str]:
    """The first card's driver, clocks, power and temperature now; nothing where there is no card."""
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"
    said = _said("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    lines = said.splitlines()
    return dict(zip(fields.split(","), (x.strip() for x in lines[0].split(",")), strict=False)) if lines else {}


def _said(*command: str) -> str:
    if not shutil.which(command[0]):
        return ""
    return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
