"""A decode step of a Llama-3.2-1B-shaped model (random bf16 weights) on a GPU: 64 branches over one prompt.

    export PYTHONPATH=bench
    python bench/gpu/decode.py --out decode.json
    python bench/gpu/decode.py --dry-run --out /tmp/decode.json     # a tiny model on the CPU: proves the script only

`step`: one forward pass of all branches and their logits, from the start of one step to the start of the next, launched
one after the other with tokens the host already knows: planning, growing and packing count where they hold the GPU up.
Its floor: all weights read once at copy bandwidth, plus the floor of attention in every layer; aimed at within 20 %.
`search`: whole calls of `Decoder.search` and of transformers' `generate`, prompt included, in turns (`decode.py`).
"""

import argparse
import statistics
import time
import warnings
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from common.decoding import Case, build
from common.decoding import sides as search_sides
from common.measure import about, ceilings, gpu, summary, write
from common.roofline import floor
from common.workloads import star
from forktree.engine.worker import ModelWorker

WITHIN = 1.2  # of the floor
PROMPTS = [1024, 4096]
STEPS, WARM_UP = 48, 8
CHUNK = 512  # prompt tokens of a forward pass


class Steps:
    """Branches over one prompt, a known token appended to each every step."""

    def __init__(self, model: PreTrainedModel, prompt: int, branches: int, steps: int, *, graphs: bool) -> None:
        self.worker = ModelWorker(model, num_slots=prompt + branches * (steps + 16), prefix_cache=False)
        if not graphs:
            self.worker.runner._captured = None  # what captures steps
        self._rng = np.random.default_rng(0)
        self._vocab = model.config.vocab_size
        root = self.worker.open(self._rng.integers(0, self._vocab, prompt))
        (whole,) = self.worker.tree.pending([root])
        for begin in range(0, prompt, CHUNK):
            self._compute([whole._replace(begin=begin, stop=min(begin + CHUNK, prompt))])
        self.branches = root.fork(branches)
        root.drop()

    def step(self) -> None:
        """One token for every branch, and the logits after it."""
        worker = self.worker
        worker.tree.append(self.branches, self._rng.integers(0, self._vocab, len(self.branches)))
        self._compute(worker.tree.pending(self.branches))
        worker.runner.logits(worker.hidden(self.branches))

    def _compute(self, chunks: Any) -> None:
        self.worker.tree.reserve(chunks)
        self.worker.forward(chunks)


def step_us(steps: Steps, count: int, device: str) -> list[float]:
    """Microseconds from the start of each step to the start of the next."""
    marks: list[Any] = []
    for _ in range(WARM_UP + count + 1):
        if device == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())
        steps.step()
    if device == "cuda":
        torch.cuda.synchronize()
        us = [a.elapsed_time(b) * 1e3 for a, b in pairwise(marks)]
    else:
        us = [(b - a) * 1e6 for a, b in pairwise(marks)]
    return us[WARM_UP:]


def floor_us(model: PreTrainedModel, prompt: int, branches: int, own: int, rates: dict[str, float]) -> dict[str, float]:
    """Of a step: reading the weights, and attention in all layers."""
    config = model.config
    dim = config.hidden_size // config.num_attention_heads
    weights = sum(p.nbytes for p in model.parameters())  # the head's are the embedding's: read once as the head
    layer = floor(star(branches, prompt, own), config.num_attention_heads, config.num_key_value_heads, dim, 2)
    attention = max(layer.us(rates).values()) * config.num_hidden_layers
    return dict(weights=weights / rates["bytes_per_s"] * 1e6, attention=attention)


def measured_steps(model: PreTrainedModel, prompt: int, args: Namespace, rates: dict[str, float]) -> dict[str, Any]:
    """Steps by graphs and without them."""
    least = floor_us(model, prompt, args.width, WARM_UP + args.steps // 2, rates)
    total = sum(least.values())
    found: dict[str, Any] = dict(floor_us=least)
    for name, graphs in (("graphs", True), ("eager", False)):
        with warnings.catch_warnings(record=True) as said:  # as when steps cannot be captured
            warnings.simplefilter("always")
            steps = Steps(model, prompt, args.width, WARM_UP + args.steps + 1, graphs=graphs)
            found[name] = summary(step_us(steps, args.steps, args.device))
        limit = total * WITHIN
        found[name] |= dict(
            limit_us=limit, met=found[name]["median_us"] <= limit, warnings=[str(w.message) for w in said]
        )
    return found


def measured_search(model: PreTrainedModel, prompt: int, args: Namespace) -> dict[str, Any]:
    """Tokens a second of forktree and of transformers, medians of calls in turns."""
    calls = search_sides(Case("samples", prompt, args.rounds), model, args, [])
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(args.rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    return {
        name: dict(seconds=s, tokens_per_s=args.width * args.new / statistics.median(s)) for name, s in seconds.items()
    }


def show(report: dict[str, Any]) -> None:
    """Prints a table."""
    table = Table(title="decode step, us; whole searches, tokens/s")
    columns = ("prompt", "floor", "graphs", "eager", "within 20 %", "forktree tok/s", "transformers tok/s")
    for column in columns:
        table.add_column(column, justify="right")
    for prompt, case in report["prompts"].items():
        step, search = case["step"], case.get("search", {})
        table.add_row(
            prompt,
            f"{sum(step['floor_us'].values()):.0f}",
            *(f"{step[name]['median_us']:.0f}" for name in ("graphs", "eager")),
            "yes" if step["graphs"]["met"] else "no",
            *(f"{search[n]['tokens_per_s']:.0f}" if n in search else "-" for n in ("forktree", "transformers")),
        )
    Console(width=120).print(table)


def main() -> None:
    """Measures and reports; the file grows with every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    args = parser.parse_args()
    dry = args.dry_run
    args.device, args.width, args.new, args.rounds = ("cpu", 4, 4, 1) if dry else ("cuda", 64, 64, 2)
    args.steps = 4 if dry else STEPS
    shape, prompts = ("tiny", [32]) if dry else ("llama-3.2-1b", PROMPTS)

    rates = ceilings(args.device)
    model = build(shape, args.device)
    report: dict[str, Any] = dict(about=about(args.device), shape=shape, branches=args.width, prompts={})

    def keep() -> None:
        report["gpu_after"] = gpu()
        write(args.out, report)

    for prompt in prompts:
        report["prompts"][str(prompt)] = dict(step=measured_steps(model, prompt, args, rates))
        keep()
    for prompt in prompts:
        report["prompts"][str(prompt)]["search"] = measured_search(model, prompt, args)
        keep()
    show(report)


if __name__ == "__main__":
    with torch.no_grad():
        main()
