"""The command line as its user meets it: results, one clear line for every mistake, nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import forktree
import tiny
from command_line import complaint, records
from forktree import cli

PROMPTS = ["12+3=", "a-b", "0.5", "dcba", "7=7", "1 2 3"]
SCORERS = """
import threading

def length(prompt, response):
    return 1 / (1 + len(response))

def fails_on_a(prompt, response):
    if prompt == "a-b":
        raise RuntimeError("no a")
    return 0.5

def nan_on_a(prompt, response):
    return float("nan") if prompt == "a-b" else 0.5

def hangs_on_a(prompt, response):
    if prompt == "a-b":
        threading.Event().wait()
    return 0.5

def slow(prompt, response):
    threading.Event().wait(0.4)
    return 0.5
"""

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, a head, scorers and prompts."""
    root = tmp_path_factory.mktemp("cli")
    tiny.new_model(rope_parameters=tiny.LIMITED).save_pretrained(root / "model")
    tiny.tokenizer().save_pretrained(root / "model")
    torch.manual_seed(3)
    save_file({"score.weight": torch.randn(1, 32)}, root / "head.safetensors")
    (root / "scorers.py").write_text(SCORERS)
    (root / "in.jsonl").write_text("".join(json.dumps({"prompt": p, "note": 1}) + "\n" for p in PROMPTS))
    return root


@pytest.fixture
def run(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `forktree` in this process; returns exit code and standard error. `out.jsonl` is in `tmp_path`."""
    monkeypatch.syspath_prepend(str(files))

    def call(*options: str, model: Path = files / "model", prompts: Path = files / "in.jsonl") -> tuple[int, str]:
        base = ["--model", str(model), "--prompts", str(prompts), "--out", str(tmp_path / "out.jsonl")]
        monkeypatch.setattr(sys, "argv", ["forktree", "generate", *base, "--max-new-tokens", "8", *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), capsys.readouterr().err

    return call


SEARCHES: list[tuple[list[str], Callable[[Path], forktree.search.Search]]] = [
    (["--search", "greedy"], lambda _: forktree.Greedy()),
    (["--search", "sample", "--num-return-sequences", "3"], lambda _: forktree.Sample(num_return_sequences=3)),
    (
        ["--search", "beam", "--num-beams", "3", "--early-stopping", "never"],
        lambda _: forktree.BeamSearch(num_beams=3, early_stopping="never"),
    ),
    (
        ["--search", "best-of-n", "--num-samples", "4", "--scorer", "scorers:length"],
        lambda _: forktree.BestOfN(num_samples=4, scorer=forktree.TextScorer(lambda p, r: 1 / (1 + len(r)))),
    ),
    (
        ["--search", "particle", "--num-particles", "4", "--step-delimiter", "\n", "--max-step-tokens", "3"],
        lambda root: forktree.ParticleFilter(
            num_particles=4,
            step_delimiter="\n",
            max_step_tokens=3,
            scorer=forktree.ValueHead.load(root / "head.safetensors"),
        ),
    ),
]


@pytest.mark.parametrize(("options", "search"), SEARCHES, ids=[o[1] for o, _ in SEARCHES])
def test_results_are_those_of_the_decoder(
    run: Run, files: Path, tmp_path: Path, options: list[str], search: Callable[[Path], Any]
) -> None:
    head = ["--scorer", str(files / "head.safetensors")] if options[1] == "particle" else []
    code, error = run(*options, *head)
    assert code == 0, error
    got = records(tmp_path)
    want = tiny.decoder().search(PROMPTS, search(files), max_new_tokens=8)
    assert [r["prompt"] for r in got] == PROMPTS
    for record, result in zip(got, want, strict=True):
        assert record["text"] == result.text
        assert [c["text"] for c in record["candidates"]] == [c.text for c in result.candidates]
        assert [c["score"] for c in record["candidates"]] == pytest.approx([c.score for c in result.candidates])
        assert [c["num_tokens"] for c in record["candidates"]] == [len(c.token_ids) for c in result.candidates]
        assert record["counters"]["model_tokens"] > 0


def test_an_existing_output_is_not_touched(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("precious\n")
    code, error = run()
    assert code == 2 and "--resume" in complaint(error)
    assert (tmp_path / "out.jsonl").read_text() == "precious\n"
    code, error = run("--resume")
    assert code == 2 and "line 1" in complaint(error)
    assert (tmp_path / "out.jsonl").read_text() == "precious\n"


def test_resume_keeps_what_is_there_and_adds_what_is_missing(run: Run, tmp_path: Path) -> None:
    assert run()[0] == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    before = [record["candidates"] for record in records(tmp_path)]
    kept = b"".join(lines[:4])
    (tmp_path / "out.jsonl").write_bytes(kept + lines[4][:-9])  # killed while it wrote the fourth
    assert run("--resume")[0] == 0
    again = (tmp_path / "out.jsonl").read_bytes()
    assert again.startswith(kept)
    assert [record["candidates"] for record in records(tmp_path)] == before
    assert run("--resume")[0] == 0 and (tmp_path / "out.jsonl").read_bytes() == again
    code, error = run("--resume", "--seed", "1")
    assert code == 2 and "made with another settings.seed: 0 there, 1 now" in complaint(error)


WRONG: list[tuple[list[str], str]] = [
    (["--foo"], "No such option: --foo"),
    (["--seed", "x"], "--seed"),
    (["--search", "magic"], "--search must be one of greedy"),
    (["--num-particles", "4"], "--num-particles belongs to --search particle"),
    (["--search", "particle"], "needs --scorer"),
    (["--scorer", "scorers:length"], "takes no --scorer"),
    (["--search", "sample", "--temperature", "-1"], "temperature must be finite and at least 0, got -1"),
    (["--search", "sample", "--top-p", "0"], "top_p must be a number in (0, 1], got 0"),
    (["--search", "beam", "--num-beams", "0"], "num_beams must be an integer of at least 1, got 0"),
    (["--search", "beam", "--num-return-sequences", "9"], "num_return_sequences must be at most num_beams"),
    (["--search", "best-of-n", "--scorer", "nowhere:length"], "cannot import 'nowhere'"),
    (["--search", "best-of-n", "--scorer", "scorers:nothing"], "has no 'nothing'"),
    (["--search", "best-of-n", "--scorer", "head"], "module:function"),
    (["--search", "best-of-n", "--scorer", "no.safetensors"], "no.safetensors"),
    (["--search", "best-of-n", "--scorer", "scorers:length", "--num-samples", "0"], "num_samples must be"),
    (["--max-new-tokens", "0"], "max_new_tokens must be an integer of at least 1, got 0"),
    (["--max-new-tokens", "255"], "limit of 256 positions"),
    (["--num-slots", "2"], "num_slots"),
    (["--dtype", "int4"], "--dtype must be one of"),
    (["--device", "abacus"], "--device"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[" ".join(o) for o, _ in WRONG])
def test_a_wrong_option_is_one_clear_line(run: Run, tmp_path: Path, options: list[str], message: str) -> None:
    code, error = run(*options)
    assert code == 2 and message in complaint(error)
    assert not (tmp_path / "out.jsonl").exists()


INPUTS = [
    ("", "at least one line"),
    ('{"prompt": ""}\n', "line 1"),
    ('{"prompt": "a"}\n{"text": "b"}\n', "line 2"),
    ("12\n", "line 1"),
    ("{oops\n", "JSON"),
]


@pytest.mark.parametrize(("text", "message"), INPUTS)
def test_bad_prompts_are_named_by_line(run: Run, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    code, error = run(prompts=tmp_path / "bad.jsonl")
    assert code == 2 and message in complaint(error)


def test_files_that_are_not_there(run: Run, tmp_path: Path) -> None:
    code, error = run(prompts=tmp_path / "none.jsonl")
    assert code == 2 and "none.jsonl" in complaint(error)
    code, error = run(model=tmp_path / "none")
    assert code == 2 and "must be a directory" in complaint(error)


def test_bad_model_directories(run: Run, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    code, error = run(model=directory)
    assert code == 2 and "no config.json" in complaint(error)
    model = tiny.new_model()
    model.config.save_pretrained(directory)
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    code, error = run(model=directory)
    assert code == 2 and "expected *.safetensors, got pytorch_model.bin" in complaint(error)
    tensors = {k: v.clone() for k, v in model.state_dict().items() if "layers.1.mlp.up_proj" not in k}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    code, error = run(model=directory)
    assert code == 2 and "missing" in complaint(error) and "layers.1.mlp.up_proj" in complaint(error)
    model.save_pretrained(directory)
    code, error = run(model=directory)
    assert code == 2 and "tokenizer" in complaint(error)
    tiny.new_model(vocab=8).save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    code, error = run(model=directory)
    assert code == 2 and f"the tokenizer has {tiny.VOCAB} tokens, the model embeds 8" in complaint(error)
    (directory / "model.safetensors").write_bytes(b"not tensors")
    code, error = run(model=directory)
    assert code == 2 and "model.safetensors: not a readable safetensors file" in complaint(error)


def test_a_head_of_another_model(run: Run, tmp_path: Path) -> None:
    save_file({"score.weight": torch.zeros(1, 7)}, tmp_path / "head.safetensors")
    code, error = run("--search", "particle", "--scorer", str(tmp_path / "head.safetensors"))
    assert code == 2 and "hidden states of size 7" in complaint(error)
    save_file({"other": torch.zeros(1)}, tmp_path / "head.safetensors")
    code, error = run("--search", "particle", "--scorer", str(tmp_path / "head.safetensors"))
    assert code == 2 and "score.weight" in complaint(error)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("fails_on_a", "raised RuntimeError: no a"),
        ("nan_on_a", "must return a finite number, got nan"),
        ("hangs_on_a", "took longer than its time limit"),
    ],
)
def test_a_failing_scorer_costs_its_prompt_only(run: Run, tmp_path: Path, function: str, message: str) -> None:
    options = ["--search", "best-of-n", "--num-samples", "2", "--scorer", f"scorers:{function}"]
    code, error = run(*options, "--scorer-time-limit", "0.3")
    assert code == 1
    assert message in error and "prompt 1" in error and "Traceback" not in error
    assert [r["prompt"] for r in records(tmp_path)] == [p for p in PROMPTS if p != "a-b"]


def test_too_little_memory_for_one_search(run: Run, tmp_path: Path) -> None:
    code, error = run("--search", "sample", "--num-return-sequences", "8", "--num-slots", "20")
    assert code == 1
    assert "num_slots" in error and "free of 20" in error
    assert not (tmp_path / "out.jsonl").exists() and "--resume" in error


@pytest.mark.parametrize("with_signal", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_an_interrupted_run_loses_nothing(files: Path, tmp_path: Path, with_signal: signal.Signals) -> None:
    out = tmp_path / "out.jsonl"
    command = [
        sys.executable,
        "-c",
        "from forktree.cli import main; main()",
        "generate",
        "--model",
        str(files / "model"),
    ]
    command += [
        "--prompts",
        str(files / "in.jsonl"),
        "--out",
        str(out),
        "--max-new-tokens",
        "8",
        "--search",
        "best-of-n",
    ]
    command += ["--num-samples", "2", "--num-slots", "24", "--scorer"]
    environment = {**os.environ, "PYTHONPATH": str(files), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "scorers:slow"], stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    while not (out.exists() and out.read_bytes().count(b"\n")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(with_signal)
    error = process.communicate(timeout=60)[1]
    finished = out.read_bytes().splitlines(keepends=True)
    finished = [line for line in finished if line.endswith(b"\n")]
    results = len(finished) - 1
    assert 0 < results < len(PROMPTS)
    if with_signal == signal.SIGINT:
        assert process.returncode == 130
        assert f"{results} of {len(PROMPTS)} results" in complaint(error)
    done = subprocess.run([*command, "scorers:slow", "--resume"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"".join(finished))
    assert sorted(r["prompt"] for r in records(tmp_path)) == sorted(PROMPTS)


def test_help_teaches(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["forktree", "generate", "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    text = capsys.readouterr().out
    assert not stop.value.code
    assert "Examples:" in text and "--scorer" in text and "(16)" in text
