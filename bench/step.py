"""Where the time of a decode step goes: in the model's own modules, or in what forktree does around them.

    python bench/step.py      # random Qwen2-0.5B-shaped bf16 model, 16 samples and 16 beams, prompt 256, 2 threads

One clock runs all the time and is handed from part to part as functions are entered and left, so the parts add up to
the step and nothing is run twice or left out. Model: the decoder without its attention function. Head: from hidden
states to tokens, or to the best ones, the head's product included. Attention: forktree's attention function, which
appends and attends, called by every layer. Planning: layout and plans, or growing those of the step before. Packing:
the rest of a forward pass. Tree: which tokens are pending, and their slots. Search: the search's own decisions. Means
of the steps in which every branch computes one token; prefill and the first two of them are left out. Beside them, what
a call pays to look whether weights have changed since the last. Prints a table
and writes bench/results/step-<device>.json.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from timeit import repeat
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AttentionInterface

import forktree
from common.decoding import SHAPES, build
from common.measure import about, write
from forktree.model import interface

PARTS = ("model", "head", "attention", "planning", "packing", "tree", "search", "engine")


class Clock:
    """Seconds of each part; one part at a time has it."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = "engine", time.perf_counter()

    def hand(self, part: str) -> str:
        """Gives the clock to a part; returns who had it."""
        now, before = time.perf_counter(), self._part
        self.seconds[before] += now - self._since
        self._part, self._since = part, now
        return before

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which has the clock while it runs."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            before = self.hand(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.hand(before)

        return timed


def watch(decoder: forktree.Decoder, clock: Clock) -> None:
    """Puts the clock around the parts."""
    loop, worker, model = decoder.engine.loop, decoder.worker, decoder.worker.runner.spec.packed.decoder
    model.forward = clock.around("model", model.forward)
    worker.runner.score = clock.around("head", worker.runner.score)
    AttentionInterface.register(interface.IMPLEMENTATION, clock.around("attention", interface._attention))
    worker._plans_for = clock.around("planning", worker._plans_for)
    worker.forward = clock.around("packing", worker.forward)
    loop._schedule = clock.around("tree", loop._schedule)
    loop._answer_extends = clock.around("search", loop._answer_extends)
    loop._answer_rest = clock.around("search", loop._answer_rest)


def measure(decoder: forktree.Decoder, clock: Clock, search: forktree.search.Search, args: Any) -> dict[str, float]:
    """Milliseconds a step of each part."""
    worker, steps = decoder.worker, []
    clock.hand("engine")
    last = dict(clock.seconds), worker.tokens_computed

    def on_step() -> None:
        nonlocal last
        clock.hand("engine")
        now = dict(clock.seconds), worker.tokens_computed
        if now[1] - last[1] == args.width:
            steps.append({part: (now[0][part] - last[0][part]) * 1e3 for part in PARTS})
        last = now

    prompt = torch.randint(0, decoder.model.config.vocab_size, (args.prompt,)).tolist()
    (result,) = decoder.search(prompt, search, max_new_tokens=args.new, on_step=on_step)
    if result.error is not None:
        raise result.error
    steady = steps[2:]
    return {part: sum(step[part] for step in steady) / len(steady) for part in PARTS}


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b")
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--width", type=int, default=16, help="beams, samples")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = build(args.shape, args.device)
    decoder = forktree.Decoder(model, num_slots=args.prompt + 2 * args.width * args.new, prefix_cache=False)
    clock = Clock()
    watch(decoder, clock)
    n = args.width
    searches = {
        f"{n} samples": forktree.Sample(num_return_sequences=n),
        f"{n} beams": forktree.BeamSearch(num_beams=n),
    }
    report = {name: measure(decoder, clock, search, args) for name, search in searches.items()}
    look = median(repeat(decoder.worker.verify, number=1, repeat=25)) * 1e3
    table = Table(title=f"ms a step, {args.shape} bf16, prompt {args.prompt}, {args.threads} threads")
    for column in ("", "step", *PARTS, "outside model and head"):
        table.add_column(column, justify="right")
    for name, ms in report.items():
        step = sum(ms.values())
        rest = 1 - (ms["model"] + ms["head"]) / step
        table.add_row(name, f"{step:.1f}", *(f"{ms[p]:.2f}" for p in PARTS), f"{rest:.1%}")
    Console(width=120).print(table)
    step = min(sum(ms.values()) for ms in report.values())
    print(f"looking whether weights have changed: {look:.2f} ms a call, {look / step:.1%} of a step")
    if args.shape != "tiny":
        path = Path(__file__).parent / "results" / f"step-{args.device}.json"
        run = about(args.device) | dict(threads=args.threads, arguments=vars(args))
        write(path, run | dict(ms_per_step=report, ms_per_look=look))


if __name__ == "__main__":
    main()
