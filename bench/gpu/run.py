"""Runs the steps of `run.sh`, each under its own time limit, and writes one report of all of them.

A step that fails is recorded and stops none of the others. Ends with the table of steps; the exit status is 0 only if
every step that was not skipped succeeded.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common.measure import about, write

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "gpu"
LIMIT = 550  # seconds for everything
TAIL = 5000  # characters of a failed step's log that a report holds
UNSUPPORTED = ("Device not supported", "no CUDA-capable device")  # what compute-sanitizer says where it cannot work


@dataclass
class Step:
    name: str
    command: list[str]
    seconds: float  # at most
    env: dict[str, str] = field(default_factory=dict)
    skip: str = ""  # why it is not run
    log: str = ""  # a file of several steps; default: one of its own


@dataclass
class Running:
    step: Step
    process: subprocess.Popen[bytes]
    began: float
    ends: float


class Runner:
    """Starts steps and keeps what came of them."""

    def __init__(self, folder: Path, env: dict[str, str], after: Callable[["Runner"], None]) -> None:
        """after: called after every step."""
        self.folder, self.env, self._after = folder, env, after
        self.began = time.monotonic()
        self.ends = self.began + LIMIT
        self.results: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, step: Step) -> Running | None:
        """None if the step is skipped, or no time is left for it."""
        left = self.ends - time.monotonic()
        if why := step.skip or ("no time was left" if left < 10 else ""):
            self._record(step, dict(skipped=why))
            return None
        print(f"== {step.name}", flush=True)
        with self._log(step).open("ab") as log:
            process = subprocess.Popen(
                step.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=self.env | step.env,
                start_new_session=True,  # so that compilers it started end with it
            )
        now = time.monotonic()
        return Running(step, process, now, now + min(step.seconds, left))

    def finish(self, running: Running | None) -> None:
        """Waits for a step, ends it when its time is up, and records what came of it."""
        if running is None:
            return
        step, process = running.step, running.process
        timed_out = False
        try:
            process.wait(max(0.0, running.ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            timed_out = True
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        tail = self._log(step).read_text(errors="replace")[-TAIL:]
        result: dict[str, Any] = dict(rc=process.returncode, seconds=round(time.monotonic() - running.began, 1))
        if timed_out:
            result["timed_out"] = True
        if process.returncode:
            result["tail"] = tail
            unsupported = [line for line in tail.splitlines() if any(what in line for what in UNSUPPORTED)]
            if "compute-sanitizer" in step.command[0] and unsupported:
                result = dict(skipped=unsupported[0].strip("= "))
        else:
            result["last_line"] = next((line for line in reversed(tail.splitlines()) if line.strip()), "")
        self._record(step, result)

    def run(self, step: Step) -> None:
        self.finish(self.start(step))

    @property
    def failed(self) -> list[str]:
        """Names of the steps that did not succeed."""
        return [name for name, result in self.results.items() if result.get("rc", 0) != 0]

    def _record(self, step: Step, result: dict[str, Any]) -> None:
        self.results[step.name] = result
        print(f"   {step.name}: {result.get('skipped') or result}"[:1500], flush=True)
        self._after(self)

    def _log(self, step: Step) -> Path:
        return self.folder / f"{step.log or step.name}.log"


def gpu_steps(folder: Path, runner: Runner) -> None:
    """All of them on a GPU, most important first. Baselines are compiled while the tests run."""
    python = [sys.executable]

    def script(name: str, *arguments: str) -> list[str]:
        return [sys.executable, f"bench/{name}", *arguments]

    out = {name: str(folder / f"{name}.json") for name in ("warm", "attention", "scores", "decode")}
    build = ["setup.py", "-q", "build", "--build-base", str(BUILD), "--build-lib", str(BUILD / "lib")]
    runner.run(Step("build", python + build, 150))
    warm = runner.start(Step("warm", script("common/baselines.py", "--report", out["warm"]), 200))
    options = ["-q", "-rfE", "-m", "gpu", "--durations=8"]
    options += ["-n", "8"] if find_spec("xdist") else []  # Triton compiles many instances
    options += ["--timeout", "100"] if find_spec("pytest_timeout") else []
    runner.run(Step("tests", [*python, "-P", "-m", "pytest", *options, "tests"], 210))
    runner.finish(warm)
    runner.run(Step("attention", script("gpu/attention.py", "--out", out["attention"], "--warm", out["warm"]), 170))
    runner.run(Step("scores", script("score_tokens.py", "--device", "cuda", "--out", out["scores"]), 60))
    runner.run(Step("decode", script("gpu/decode.py", "--out", out["decode"]), 110))
    for step in sanitizers(script("gpu/small_case.py")):
        runner.run(step)


def sanitizers(command: list[str]) -> list[Step]:
    """compute-sanitizer's memory and race checkers on one small case of each backend."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    steps = []
    for backend in ("cuda", "triton"):
        for check in ("memcheck", "racecheck"):
            options = ["--tool", check, "--error-exitcode", "3"]
            steps.append(
                Step(
                    f"{check}-{backend}",
                    [tool or "compute-sanitizer", *options, *command],
                    45,
                    dict(FORKTREE_BACKEND=backend, PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
                    "" if tool else "compute-sanitizer is not installed",
                    "sanitizers",
                )
            )
    return steps


def dry_steps(folder: Path, runner: Runner) -> None:
    """The same scripts on the CPU, on tiny sizes, with the core that is there; the tests are only collected."""
    python, out = sys.executable, str(folder)
    tests = [str(ROOT / "tests" / name) for name in ("ops", "test_gpu.py")]
    collect = ["-P", "-m", "pytest", "-q", "-m", "gpu", "--collect-only", *tests]
    warm = ["bench/common/baselines.py", "--device", "cpu", "--report", f"{out}/warm.json"]
    runner.run(Step("warm", [python, *warm], 60))
    runner.run(Step("tests", [python, *collect], 60))
    attention = ["bench/gpu/attention.py", "--dry-run", "--out", f"{out}/attention.json", "--warm", f"{out}/warm.json"]
    runner.run(Step("attention", [python, *attention], 60))
    runner.run(Step("scores", [python, "bench/score_tokens.py", "--dry-run", "--out", f"{out}/scores.json"], 60))
    runner.run(Step("decode", [python, "bench/gpu/decode.py", "--dry-run", "--out", f"{out}/decode.json"], 90))
    runner.run(Step("small-case", [python, "bench/gpu/small_case.py", "--device", "cpu"], 60))


def deliver(runner: Runner, about: dict[str, Any], target: Path, out: str | None) -> None:
    """Writes the report: what ran, and what each benchmark wrote. A copy, and the logs, go to `out`."""
    report: dict[str, Any] = dict(about=about, seconds=round(time.monotonic() - runner.began, 1), steps=runner.results)
    for name in ("warm", "attention", "scores", "decode"):
        path = runner.folder / f"{name}.json"
        if path.exists():
            report[name] = json.loads(path.read_text())
    write(target, report)
    if out:
        for path in (target, *sorted(runner.folder.glob("*.log"))[:7]):
            shutil.copy(path, out)


def show(runner: Runner) -> None:
    """Prints the steps, and the tables at the ends of the benchmarks' logs."""
    for name in ("attention", "scores", "decode"):
        log = runner.folder / f"{name}.log"
        if log.exists():
            print(log.read_text(errors="replace")[-6000:])
    table = Table(title="steps")
    for column in ("", "result", "seconds", "last line"):
        table.add_column(column)
    for name, result in runner.results.items():
        word = "skipped" if "skipped" in result else "ok" if result["rc"] == 0 else f"FAILED ({result['rc']})"
        last = result.get("skipped") or result.get("last_line") or "see its log"
        table.add_row(name, word, str(result.get("seconds", "")), last[:90])
    Console(width=140).print(table)


def main() -> None:
    """Runs all steps, or all dry ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="everything on the CPU, tiny; writes no result file")
    dry = parser.parse_args().dry_run
    if not dry and not torch.cuda.is_available():
        raise SystemExit("there is no GPU that this torch can use; --dry-run needs none")
    folder = BUILD / ("dry" if dry else "run")
    shutil.rmtree(folder, ignore_errors=True)
    package = "python" if dry else str(BUILD / "lib")
    paths = [package, str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])]
    this = about("cpu" if dry else "cuda")
    name = this["machine"].lower().replace(" ", "-")
    target = folder / "report.json" if dry else ROOT / "bench" / "results" / f"{name}.json"

    def after(runner: Runner) -> None:
        deliver(runner, this, target, os.environ.get("OUT"))

    runner = Runner(folder, dict(os.environ, PYTHONPATH=os.pathsep.join(paths)), after)
    steps: Callable[[Path, Runner], None] = dry_steps if dry else gpu_steps
    steps(folder, runner)
    show(runner)
    if runner.failed:
        raise SystemExit(f"failed: {', '.join(runner.failed)}")


if __name__ == "__main__":
    main()
