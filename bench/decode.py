"""Decoding beside transformers, in one run, interleaved: beams and samples that share one prompt.

    python bench/decode.py                          # random Qwen2-0.5B-shaped bf16 model, 64 new tokens, 2 threads
    python bench/decode.py --cases samples:256:3    # search, prompt tokens and rounds of each case

Wall time is of the whole call, prefill included (forktree's proof of the model, done once when a Decoder is made, is
printed apart). KV memory is the cache transformers holds at the end, and the whole pool that forktree allocates.
Prints a table and writes bench/results/decode-<device>.json.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

import forktree

SHAPES = {  # what the name says; random weights
    "qwen2-0.5b": (
        Qwen2Config,
        dict(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151936,
        ),
    ),
    "llama-3.2-1b": (
        LlamaConfig,
        dict(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
        ),
    ),
    "tiny": (
        Qwen2Config,
        dict(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=1000,
        ),
    ),
}


class Case(NamedTuple):
    search: str  # "beams" or "samples"
    prompt: int  # tokens
    rounds: int  # the median is reported


CASES = [Case("beams", 1024, 2), Case("samples", 1024, 2), Case("samples", 4096, 1)]


def case(text: str) -> Case:
    """From the command line."""
    search, prompt, rounds = text.split(":")
    if search not in ("beams", "samples"):
        raise ValueError(f"a case must search by beams or samples, got {text!r}")
    return Case(search, int(prompt), int(rounds))


def build(shape: str, device: str) -> PreTrainedModel:
    """A random bf16 model without an end-of-sequence token, so that every run makes all its tokens."""
    torch.manual_seed(0)
    config_class, sizes = SHAPES[shape]
    config = config_class(
        **sizes, max_position_embeddings=32768, tie_word_embeddings=True, eos_token_id=None, bos_token_id=None
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def sides(
    case: Case, model: PreTrainedModel, args: argparse.Namespace, proofs: list[float]
) -> dict[str, Callable[[], int]]:
    """Calls by name; each returns the bytes of its KV. `proofs` gets the seconds of the model's proof."""
    n = args.width
    prompt = torch.randint(0, model.config.vocab_size, (1, case.prompt), device=args.device)
    slots = case.prompt + n * args.new
    began = time.perf_counter()
    decoder = forktree.Decoder(model, num_slots=slots, prefix_cache=False)
    proofs.append(time.perf_counter() - began)
    beams = case.search == "beams"
    how = dict(num_beams=n, do_sample=False) if beams else dict(num_return_sequences=n, do_sample=True, top_k=0)
    search = forktree.BeamSearch(num_beams=n) if beams else forktree.Sample(num_return_sequences=n)

    def theirs() -> int:
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=args.new,
            pad_token_id=0,
            return_dict_in_generate=True,
            **how,
        )
        assert all(len(row) == case.prompt + args.new for row in out.sequences.tolist())  # waits for the device
        return sum(t.nbytes for layer in out.past_key_values.layers for t in (layer.keys, layer.values))

    def ours() -> int:
        (result,) = decoder.search(prompt[0].tolist(), search, max_new_tokens=args.new)
        assert all(len(c.token_ids) == args.new for c in result.candidates), result.error
        return slots * decoder.worker.runner.bytes_per_slot

    return {"transformers": theirs, "forktree": ours}


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What a report says of its run."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return dict(
        commit=commit,
        machine=torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        threads=args.threads,
        torch=torch.__version__,
        transformers=transformers.__version__,
        arguments=vars(args),
    )


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
        path.write_text(json.dumps(dict(**about(args), proof_seconds=proof, cases=report), indent=1) + "\n")


if __name__ == "__main__":
    main()
