"""Decoding beside transformers, in one run, interleaved: beams and samples that share one prompt.

    python bench/decode.py                          # random Qwen2-0.5B-shaped bf16 model, 64 new tokens, 2 threads
    python bench/decode.py --cases samples:256:3    # search, prompt tokens and rounds of each case

Wall time is of the whole call, prefill included (forktree's proof of the model, done once when a Decoder is made, is
printed apart). KV memory is the cache transformers holds at the end, and the whole pool that forktree allocates.
Prints a table and writes bench/results/decode-<device>.json.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from common.decoding import SHAPES, Case, build, sides
from common.measure import about, write

CASES = [Case("beams", 1024, 2), Case("samples", 1024, 2), Case("samples", 4096, 1)]


def case(text: str) -> Case:
    """From the command line."""
    search, prompt, rounds = text.split(":")
    if search not in ("beams", "samples"):
        raise ValueError(f"a case must search by beams or samples, got {text!r}")
    return Case(search, int(prompt), int(rounds))


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b")
    parser.add_argument("--cases", type=case, nargs="+", default=CASES, help="search:prompt tokens:rounds, of each")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--width", type=int, default=16, help="beams, samples")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = build(args.shape, args.device)
    proofs: list[float] = []
    cases = {f"{args.width} {c.search}, prompt {c.prompt:,}": (c, sides(c, model, args, proofs)) for c in args.cases}
    seconds: dict[tuple[str, str], list[float]] = {}
    kv: dict[tuple[str, str], int] = {}
    for turn in range(max(c.rounds for c in args.cases)):
        for name, (c, calls) in cases.items():
            for side, run in calls.items() if turn < c.rounds else ():
                began = time.perf_counter()
                kv[name, side] = run()
                seconds.setdefault((name, side), []).append(time.perf_counter() - began)

    table = Table(title=f"{args.shape} bf16, {args.new} new tokens, {args.threads} threads")
    for column in ("", "transformers s", "forktree s", "faster", "transformers KV MB", "forktree KV MB", "smaller"):
        table.add_column(column, justify="right")
    report = []
    for name, (c, calls) in cases.items():
        slow, fast = (statistics.median(seconds[name, side]) for side in ("transformers", "forktree"))
        big, small = (kv[name, side] / 1e6 for side in ("transformers", "forktree"))
        times = (f"{slow:.1f}", f"{fast:.1f}", f"{slow / fast:.2f}x")
        table.add_row(name, *times, f"{big:.0f}", f"{small:.0f}", f"{big / small:.1f}x")
        taken = {side: seconds[name, side] for side in calls}
        report.append(dict(case=name, prompt=c.prompt, seconds=taken, kv_mb=[big, small]))
    Console(width=120).print(table)
    proof = statistics.median(proofs)
    print(f"proof of the model, once: {proof:.1f} s")
    if args.shape != "tiny":
        path = Path(__file__).parent / "results" / f"decode-{args.device}.json"
        run = about(args.device) | dict(threads=args.threads, arguments=vars(args))
        write(path, run | dict(proof_seconds=proof, cases=report))


if __name__ == "__main__":
    main()
