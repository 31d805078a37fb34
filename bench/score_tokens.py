"""Scores of the next token beside the same by PyTorch, all sides in turns within one run.

    python bench/score_tokens.py                  # bf16, 2 threads, V = 151,936; writes results/score_tokens-cpu.json
    python bench/score_tokens.py --device cuda --out score_tokens.json
    python bench/score_tokens.py --dry-run        # tiny, writes nothing
    python bench/score_tokens.py --traffic        # bytes that the Triton kernel moves on an H200, computed

Ours: `lse` (log-sum-exp alone), `top_k` (the 32 best), `sample` (one token at temperature 0.8), `nucleus` (the same
with top-p 0.95), `all` (the 64 best, a sample, log-sum-exp and entropy) and `select` (two tokens, nothing else). Beside
them: `product` (hidden @ lm_head.T, which all but `select` contain), `torch top_k` (product, float, log_softmax, topk)
and `torch sample` (product, float, softmax, multinomial); on a GPU also FlashInfer's samplers on the product's logits.

About 100 tokens of each row stand out, as in a language model that hesitates. Before each call a buffer larger than
the caches is read. MB: what a call takes beyond its arguments at its peak; the T x V logits in fp32 are 100 %.
GB/s counts lm_head once.
"""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common.measure import Stopwatch, about, summary, write
from forktree import KeyedSampling, Sampling, TokenRequest, _core
from forktree.ops import score_tokens

VOCAB = 151_936
SIZES = {"cpu": (896, 4096), "cuda": (4096,)}
ROWS = {"cpu": (1, 16, 64), "cuda": (1, 4, 16, 64, 128, 256)}
ROUNDS, SECONDS = 25, 4.0  # at most, of a side
TEMPERATURE, TOP_P = 0.8, 0.95
RESULTS = Path(__file__).parent / "results"

Calls = dict[str, Callable[[], Any]]


def problem(rows: int, size: int, vocab: int, device: str) -> tuple[Tensor, Tensor]:
    """hidden [T, H] and lm_head [V, H]: logits of spread 2, and some 100 that stand out by up to 14."""
    torch.manual_seed(0)
    common = torch.randn(size, device=device)
    hidden = (common + 0.3 * torch.randn(rows, size, device=device)).bfloat16()
    lm_head = torch.empty(vocab, size, dtype=torch.bfloat16, device=device).normal_(std=2 / size**0.5)
    first = torch.randperm(vocab, device=device)[: min(100, vocab)]
    height = torch.linspace(14, 4, len(first), device=device)
    lm_head[first] += (height[:, None] * common / common.square().sum()).bfloat16()
    return hidden, lm_head


def ours(hidden: Tensor, lm_head: Tensor) -> Calls:
    """Requests by name."""
    rows = np.arange(len(hidden))
    sample = KeyedSampling(Sampling(TEMPERATURE), rows, rows)
    nucleus = KeyedSampling(Sampling(TEMPERATURE, top_p=TOP_P), rows, rows)
    requests = {
        "lse": TokenRequest(lse=True),
        "top_k": TokenRequest(top_k=32),
        "sample": TokenRequest(sample=sample),
        "nucleus": TokenRequest(sample=nucleus),
        "all": TokenRequest(top_k=64, sample=sample, lse=True, entropy=True),
        "select": TokenRequest(select=torch.tensor([5, 77], device=hidden.device) % len(lm_head)),
    }
    check = hidden.is_cpu  # on a GPU it would wait
    return {name: lambda request=r: score_tokens(hidden, lm_head, request, check=check) for name, r in requests.items()}


def theirs(hidden: Tensor, lm_head: Tensor) -> Calls:
    """The same without forktree; each begins with the product."""

    def logits() -> Tensor:
        return (hidden @ lm_head.T).float()

    calls: Calls = {
        "product": lambda: hidden @ lm_head.T,
        "torch top_k": lambda: logits().log_softmax(-1).topk(min(32, len(lm_head))),
        "torch sample": lambda: (logits() / TEMPERATURE).softmax(-1).multinomial(1),
    }
    if hidden.is_cuda:
        try:
            sampling: Any = importlib.import_module("flashinfer.sampling")
        except ImportError as error:
            print(f"FlashInfer is not there: {error}")
            return calls
        calls["flashinfer sample"] = lambda: sampling.sampling_from_logits(logits() / TEMPERATURE)
        calls["flashinfer nucleus"] = lambda: sampling.top_p_sampling_from_probs(
            sampling.softmax(logits(), temperature=TEMPERATURE), TOP_P
        )
    return calls


def peak(call: Callable[[], Any], device: str) -> float:
    """Bytes that a call takes beyond what was there before, at its peak."""
    call()  # what stays with a thread or a workspace is counted below
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)
    scratch: list[int] = []  # of the core, which keeps it from call to call
    core = _core.score_tokens
    _core.score_tokens = lambda *arguments: scratch.append(core(*arguments))  # type: ignore[assignment, func-returns-value]
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before + sum(scratch)
    finally:
        _core.score_tokens = core


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def measured(rows: int, size: int, vocab: int, device: str, rounds: int, seconds: float) -> dict[str, Any]:
    """The report of one shape."""
    hidden, lm_head = problem(rows, size, vocab, device)
    calls = theirs(hidden, lm_head) | ours(hidden, lm_head)
    times = Stopwatch(device).turns(calls, rounds, seconds)
    sides = {name: summary(us) for name, us in times.items()}
    for name, side in sides.items():
        side["peak_bytes"] = peak(calls[name], device)
    return dict(rows=rows, hidden_size=size, vocab=vocab, weight_bytes=lm_head.nbytes, sides=sides)


def show(cases: list[dict[str, Any]], title: str) -> None:
    """Prints a table: milliseconds, and how they compare with the product and with PyTorch's own."""
    table = Table(title=title, caption="ms: median (p90); x: of the product's median; <: times faster than torch's")
    for column in ("H", "T", "", "ms", "x product", "< torch", "GB/s", "MB beyond", "% of T V 4"):
        table.add_column(column, justify="right")
    for case in cases:
        sides = case["sides"]
        product = sides["product"]["median_us"]
        rival = {"top_k": "torch top_k", "sample": "torch sample", "nucleus": "torch sample"}
        for name, side in sides.items():
            us = side["median_us"]
            torch_us = sides[rival[name]]["median_us"] if name in rival else None
            table.add_row(
                str(case["hidden_size"]),
                str(case["rows"]),
                name,
                f"{us / 1e3:.3g} ({side['p90_us'] / 1e3:.3g})",
                f"{us / product:.3f}",
                f"{torch_us / us:.2f}" if torch_us else "",
                f"{case['weight_bytes'] / us / 1e3:.1f}" if name != "select" else "",
                f"{side['peak_bytes'] / 1e6:.2f}",
                f"{side['peak_bytes'] / (case['rows'] * case['vocab'] * 4):.1%}",
            )
        table.add_section()
    Console(width=150).print(table)


def traffic(rows: int, size: int, vocab: int) -> dict[str, float]:
    """Bytes of a launch for the 64 best, a sample, log-sum-exp and entropy, in bf16 on 132 multiprocessors of sm_90:
    from memory and from the second-level cache; and those of the product, which writes its logits. Computed."""
    kernel: Any = importlib.import_module("forktree.triton_kernels.score_tokens.config")
    chosen = kernel.config(90, 2, rows)
    splits, of_split = kernel.split_vocabulary(rows, vocab, chosen, 2 * 132, kernel.MAX_LIST, False)
    row_tiles = -(-rows // chosen.block_t)
    head, state, lists = vocab * size * 2, rows * splits * kernel.STATE_FIELDS * 4, rows * splits * kernel.MAX_LIST * 8
    tiles = splits * of_split * row_tiles
    return dict(
        programs=splits * row_tiles,
        product=head + rows * (size + vocab) * 2,
        memory=head + rows * size * 2 + 2 * state + 3 * lists,  # written, read; cleared, written, read
        cache=head * row_tiles + tiles * chosen.block_t * size * 2,
    )


def show_traffic() -> None:
    """Prints what `traffic` computes."""
    table = Table(title="computed for an H200, bf16, top-64, sample, log-sum-exp and entropy; GB")
    for column in ("H", "T", "programs", "from memory", "x product's", "from the cache"):
        table.add_column(column, justify="right")
    for size in SIZES["cuda"]:
        for rows in ROWS["cuda"]:
            t = traffic(rows, size, VOCAB)
            numbers = (t["memory"] / 1e9, t["memory"] / t["product"], t["cache"] / 1e9)
            table.add_row(str(size), str(rows), str(t["programs"]), *(f"{x:.3f}" for x in numbers))
    Console(width=120).print(table)


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="report; default on a CPU: results/score_tokens-cpu.json")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--traffic", action="store_true", help="compute, measure nothing")
    args = parser.parse_args()
    if args.traffic:
        return show_traffic()
    torch.set_num_threads(args.threads)
    shapes = [(t, h, VOCAB) for h in SIZES[args.device] for t in ROWS[args.device]]
    if args.dry_run:
        shapes = [(3, 40, 1000)]
    rounds, seconds = (2, 0.1) if args.dry_run else (ROUNDS, SECONDS)
    out = args.out or (None if args.dry_run or args.device == "cuda" else RESULTS / "score_tokens-cpu.json")
    report: dict[str, Any] = dict(about=about(args.device), threads=args.threads, isa=_core.isa(), cases=[])
    for rows, size, vocab in shapes:
        report["cases"].append(measured(rows, size, vocab, args.device, rounds, seconds))
        if out:
            write(Path(out), report)
    show(report["cases"], f"score_tokens, bf16, {args.device}, {report['about']['machine']}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
