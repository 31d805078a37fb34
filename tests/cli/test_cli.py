"""The command line as its user meets it: results, one clear line for every mistake, nothing lost."""

import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import forktree
import tiny
from command_line import called, complaint, interrupted, records, saved_model
from forktree.search.registry import searches, settings_of

PROMPTS = ["12+3=", "a-b", "0.5", "dcba", "7=7", "1 2 3"]
REWARDS = """
import threading
from dataclasses import dataclass

from forktree import Sample

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

def last(text):
    return text[-1:] or None

@dataclass(frozen=True, kw_only=True)
class Longest(Sample):
    \"\"\"The longest of some samples comes first.

    Args:
        at_least: texts below this length
            are left out.
    \"\"\"

    at_least: int = 0
    loud: bool = False

    async def run(self, context):
        found = [h for h in await super().run(context) if len(h.token_ids) >= self.at_least]
        return sorted(found, key=lambda h: len(h.token_ids), reverse=True)
"""

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, a head, rewards and prompts."""
    root = tmp_path_factory.mktemp("cli")
    saved_model(root / "model")
    torch.manual_seed(3)
    save_file({"score.weight": torch.randn(1, 32)}, root / "head.safetensors")
    (root / "own_rewards.py").write_text(REWARDS)
    (root / "in.jsonl").write_text("".join(json.dumps({"prompt": p, "note": 1}) + "\n" for p in PROMPTS))
    return root


@pytest.fixture
def run(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `forktree` in this process; returns exit code and standard error. `out.jsonl` is in `tmp_path`."""
    monkeypatch.syspath_prepend(str(files))

    def call(*options: str, model: Path = files / "model", prompts: Path = files / "in.jsonl") -> tuple[int, str]:
        base = ["--model", str(model), "--prompts", str(prompts), "--out", str(tmp_path / "out.jsonl")]
        code = called(monkeypatch, "generate", *base, "--max-new-tokens", "8", *options)
        return code, capsys.readouterr().err

    return call


SEARCHES: list[tuple[list[str], Callable[[Path], forktree.search.Search]]] = [
    (["--search", "greedy"], lambda _: forktree.Greedy()),
    (["--search", "sample", "--set", "num_return_sequences=3"], lambda _: forktree.Sample(num_return_sequences=3)),
    (
        ["--search", "majority-vote", "--set", "answer=own_rewards:last", "--set", "stop=5", "--set", "stop=b"],
        lambda _: forktree.MajorityVote(answer=lambda text: text[-1:] or None, stop=("5", "b")),
    ),
    (
        ["--search", "beam", "--set", "num_beams=3", "--set", "early_stopping=never"],
        lambda _: forktree.BeamSearch(num_beams=3, early_stopping="never"),
    ),
    (
        [
            *("--search", "adaptive-vote", "--set", "answer=regex:[0-9]"),
            *("--set", "stopping=window", "--set", "round_size=3"),
        ],
        lambda _: forktree.AdaptiveVote(answer="regex:[0-9]", stopping="window", round_size=3),
    ),
    (
        ["--search", "mbr", "--set", "similarity=token-f1", "--set", "hedged=false"],
        lambda _: forktree.MinimumBayesRisk(similarity="token-f1", hedged=False),
    ),
    (
        ["--search", "weighted-vote", "--set", "answer=last-number", "--reward", "own_rewards:length"],
        lambda _: forktree.WeightedVote(
            answer="last-number", reward=forktree.FunctionReward(lambda p, r: 1 / (1 + len(r)))
        ),
    ),
    (
        ["--search", "best-of-n", "--set", "num_samples=4", "--reward", "own_rewards:length"],
        lambda _: forktree.BestOfN(num_samples=4, reward=forktree.FunctionReward(lambda p, r: 1 / (1 + len(r)))),
    ),
    (
        [
            *("--search", "particle", "--set", "num_particles=4"),
            *("--set", "step_delimiter=\n", "--set", "max_step_tokens=3"),
        ],
        lambda root: forktree.ParticleFilter(
            num_particles=4,
            step_delimiter="\n",
            max_step_tokens=3,
            reward=forktree.ValueHead.load(root / "head.safetensors"),
        ),
    ),
]


@pytest.mark.parametrize(("options", "search"), SEARCHES, ids=[o[1] for o, _ in SEARCHES])
def test_results_are_those_of_the_decoder(
    run: Run, files: Path, tmp_path: Path, options: list[str], search: Callable[[Path], Any]
) -> None:
    head = ["--reward", str(files / "head.safetensors")] if options[1] == "particle" else []
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


def test_a_budget_ends_every_search(run: Run, tmp_path: Path) -> None:
    options = ["--search", "best-of-n", "--set", "num_samples=4", "--reward", "own_rewards:length"]
    code, error = run(*options, "--max-model-tokens", "13", "--max-reward-calls", "3")
    assert code == 0, error
    for record in records(tmp_path):
        assert record["counters"]["sampled_tokens"] <= 13 and record["counters"]["reward_calls"] == 3
        assert [c["score"] is None for c in record["candidates"]] == [False, False, False, True]
        assert record["candidates"][3]["error"] == "the budget of 3 rewards is spent"


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
    (["--search", "magic"], f"--search must be one of {', '.join(searches())}, or module:Class"),
    (["--set", "num_particles=4"], "greedy has no setting 'num_particles', it belongs to entropic-particle and"),
    (["--search", "beam", "--set", "num_beam=4"], "did you mean num_beams? Its settings are num_beams, "),
    (["--search", "beam", "--set", "num_beams=four"], "num_beams must be an integer, got 'four'"),
    (["--search", "beam", "--set", "num_beams=4", "--set", "num_beams=5"], "num_beams must be given once"),
    (["--search", "beam", "--set", "num_beams"], "--set must be NAME=VALUE, got 'num_beams'"),
    (["--search", "sample", "--set", "temperature=hot"], "temperature must be a number, got 'hot'"),
    (["--search", "beam", "--set", "early_stopping=maybe"], "early_stopping must be True, False or 'never', got"),
    (["--search", "majority-vote"], "needs --set answer=...; see --help-search majority-vote"),
    (["--search", "majority-vote", "--set", "answer=own_rewards:nothing"], "module 'own_rewards' has no 'nothing'"),
    (["--search", "majority-vote", "--set", "answer=box"], "answer must be a function of the text, boxed, last"),
    (["--search", "rpc", "--set", "answer=regex:("], "answer must be regex: and a regular expression, got '('"),
    (["--search", "particle", "--set", "reward=own_rewards:length"], "reward cannot be given as a text"),
    (["--search", "own_rewards:nothing"], "--search 'own_rewards:nothing': module 'own_rewards' has no 'nothing'"),
    (["--search", "own_rewards:length"], "must be a class derived from forktree.search.Search"),
    (["--help-search", "beem"], "--help-search must be one of adaptive-vote, beam, best-of"),
    (["--search", "particle"], "needs --reward"),
    (["--reward", "own_rewards:length"], "takes no --reward"),
    (["--search", "sample", "--set", "temperature=-1"], "temperature must be finite and at least 0, got -1"),
    (["--search", "sample", "--set", "top_p=0"], "top_p must be a number in (0, 1], got 0"),
    (["--search", "beam", "--set", "num_beams=0"], "num_beams must be an integer of at least 1, got 0"),
    (["--search", "beam", "--set", "num_return_sequences=9"], "num_return_sequences must be at most num_beams"),
    (["--search", "best-of-n", "--reward", "nowhere:length"], "cannot import 'nowhere'"),
    (["--search", "best-of-n", "--reward", "own_rewards:nothing"], "has no 'nothing'"),
    (["--search", "best-of-n", "--reward", "head"], "module:function"),
    (["--search", "best-of-n", "--reward", "no.safetensors"], "no.safetensors"),
    (["--search", "best-of-n", "--reward", "own_rewards:length", "--set", "num_samples=0"], "num_samples must be"),
    (["--max-new-tokens", "0"], "max_new_tokens must be an integer of at least 1, got 0"),
    (["--max-model-tokens", "0"], "max_model_tokens must be an integer of at least 1, got 0"),
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
    code, error = run("--search", "particle", "--reward", str(tmp_path / "head.safetensors"))
    assert code == 2 and "hidden states of size 7" in complaint(error)
    save_file({"other": torch.zeros(1)}, tmp_path / "head.safetensors")
    code, error = run("--search", "particle", "--reward", str(tmp_path / "head.safetensors"))
    assert code == 2 and "score.weight" in complaint(error)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("fails_on_a", "raised RuntimeError: no a"),
        ("nan_on_a", "must return a finite number, got nan"),
        ("hangs_on_a", "took longer than its time limit"),
    ],
)
def test_a_failing_reward_costs_its_prompt_only(run: Run, tmp_path: Path, function: str, message: str) -> None:
    options = ["--search", "best-of-n", "--set", "num_samples=2", "--reward", f"own_rewards:{function}"]
    code, error = run(*options, "--reward-time-limit", "0.3")
    assert code == 1
    assert message in error and "prompt 1" in error and "Traceback" not in error
    assert [r["prompt"] for r in records(tmp_path)] == [p for p in PROMPTS if p != "a-b"]


def test_too_little_memory_for_one_search(run: Run, tmp_path: Path) -> None:
    code, error = run("--search", "sample", "--set", "num_return_sequences=8", "--num-slots", "20")
    assert code == 1
    assert "num_slots" in error and "free of 20" in error
    assert not (tmp_path / "out.jsonl").exists() and "--resume" in error


@pytest.mark.parametrize("with_signal", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_an_interrupted_run_loses_nothing(run: Run, files: Path, tmp_path: Path, with_signal: signal.Signals) -> None:
    out = tmp_path / "out.jsonl"
    words = ["generate", "--model", str(files / "model"), "--prompts", str(files / "in.jsonl"), "--out", str(out)]
    options = ["--search", "best-of-n", "--set", "num_samples=2", "--num-slots", "24", "--reward", "own_rewards:slow"]
    words += ["--max-new-tokens", "8", *options]
    code, error, lines = interrupted(words, out, with_signal, PYTHONPATH=str(files))
    results = len(lines) - 1
    assert 0 < results < len(PROMPTS)
    if with_signal == signal.SIGINT:
        assert code == 130
        assert f"{results} of {len(PROMPTS)} results" in complaint(error)
    assert run(*options, "--resume")[0] == 0
    assert out.read_bytes().startswith(b"".join(lines))
    assert sorted(r["prompt"] for r in records(tmp_path)) == sorted(PROMPTS)


def test_help_teaches(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert called(monkeypatch, "generate", "--help") == 0
    text = capsys.readouterr().out
    assert "Examples:" in text and "--reward" in text and "--set" in text and "--help-search" in text
    assert all(name in text for name in searches())


@pytest.mark.parametrize("name", searches())
def test_help_on_a_search_names_every_setting_with_its_default_and_meaning(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a model or a file: it is all that somebody new has."""
    assert called(monkeypatch, "generate", "--help-search", name) == 0
    said = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(searches()[name]):
        assert f"--set {field.name}=..." in said or (field.name == "reward" and "--reward see" in said)
    for setting in settings_of(searches()[name]).values():
        assert len(setting.meaning) > 10 and setting.meaning[1:] in said, f"no docstring tells of {setting.name}"
        if isinstance(setting.default, int | float):
            shown = str(setting.default).lower() if isinstance(setting.default, bool) else repr(setting.default)
            assert f"default {shown}" in said


def test_a_search_of_ones_own(
    run: Run, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--search", "own_rewards:Longest", "--set", "num_return_sequences=6", "--set", "at_least=2"]
    options += ["--set", "loud=TRUE"]
    code, error = run(*options)
    assert code == 0, error
    want = tiny.decoder().search(PROMPTS, forktree.Sample(num_return_sequences=6), max_new_tokens=8)
    for record, result in zip(records(tmp_path), want, strict=True):
        texts = sorted((c.text for c in result.candidates if len(c.token_ids) >= 2), key=len, reverse=True)
        assert [len(c["text"]) for c in record["candidates"]] == [len(text) for text in texts]
    header = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["header"]
    assert header["settings"]["at_least"] == 2 and header["settings"]["loud"] is True
    assert set(header["code"]) == {"own_rewards:Longest"}
    with (files / "own_rewards.py").open("a") as source:
        source.write("# changed\n")
    code, error = run(*options, "--resume")
    assert code == 2 and "another code.own_rewards:Longest" in complaint(error)
    code, error = run("--search", "own_rewards:Longest", "--set", "loud=no")
    assert code == 2 and "loud must be true or false, got 'no'" in complaint(error)
    assert called(monkeypatch, "generate", "--help-search", "own_rewards:Longest") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Texts below this length are left out." in said and "--set loud=... true or false, default false" in said


def test_a_trace_is_part_of_the_result_that_asks_for_it(run: Run, tmp_path: Path) -> None:
    options = ["--search", "sample", "--set", "num_return_sequences=3"]
    assert run(*options)[0] == 0
    assert all("trace" not in record for record in records(tmp_path))
    code, error = run(*options, "--trace", "--resume")
    assert code == 2 and "another settings.trace" in complaint(error)
    (tmp_path / "out.jsonl").unlink()
    assert run(*options, "--trace")[0] == 0
    for record in records(tmp_path):
        grown, returned = record["trace"]
        assert grown["event"] == "grow" and returned["event"] == "return"
        assert grown["tokens"] == [c["token_ids"] for c in record["candidates"]]
    assert run(*options, "--trace", "--resume")[0] == 0
