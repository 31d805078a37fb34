"""`forktree score` as its user meets it: log-probs as transformers gives them, one clear line for every mistake."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

import tiny
from command_line import called, complaint, interrupted, records, saved_model
from forktree.model.verification_tree import VerificationTree
from log_probs import reference

TEXTS = ["12+3=15", "a-b", "0.5", "12+3=16\n", "7"]
PAIRS = [("12+3=", "15"), ("12+3=", "4"), ("a", "dcba"), ("12+", "3=15")]
LINES = [{"text": t, "note": 1} for t in TEXTS] + [{"prompt": p, "response": r} for p, r in PAIRS]

Run = Callable[..., tuple[int, str]]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and texts."""
    root = tmp_path_factory.mktemp("score")
    saved_model(root / "model")
    write(root / "in.jsonl", LINES)
    return root


@pytest.fixture
def run(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `forktree score` in this process; returns exit code and standard error. `out.jsonl` is in `tmp_path`."""

    def call(*options: str, model: Path = files / "model", texts: Path = files / "in.jsonl") -> tuple[int, str]:
        base = ["--model", str(model), "--texts", str(texts), "--out", str(tmp_path / "out.jsonl")]
        return called(monkeypatch, "score", *base, *options), capsys.readouterr().err

    return call


def assert_record(record: dict[str, Any], token_ids: list[int], log_probs: np.ndarray) -> None:
    assert record["token_ids"] == token_ids
    assert record["num_tokens"] == len(token_ids)
    assert record["log_probs"] == pytest.approx(log_probs.tolist(), abs=1e-4)
    assert record["log_prob"] == pytest.approx(log_probs.sum(), abs=1e-3)
    if len(token_ids):
        assert record["perplexity"] == pytest.approx(np.exp(-log_probs.mean()), rel=1e-3)
    else:
        assert record["perplexity"] is None


def test_results_are_those_of_transformers(run: Run, tmp_path: Path) -> None:
    code, error = run()
    assert code == 0, error
    found = records(tmp_path)
    assert [r["index"] for r in found] == list(range(len(LINES)))
    ids = [tiny.tokenizer()(t).input_ids for t in [*TEXTS, *(p + r for p, r in PAIRS)]]
    given = [1] * len(TEXTS) + [len(p) for p, _ in PAIRS]  # a token is a character
    for record, line, tokens, n, log_probs in zip(found, LINES, ids, given, reference(tiny.model(), ids), strict=True):
        assert {key: record.get(key) for key in line if key != "note"} == {k: v for k, v in line.items() if k != "note"}
        assert "note" not in record
        assert_record(record, tokens[n:], log_probs[n - 1 :])


def merging_tokenizer(path: Path, *, bos: bool) -> hf.PreTrainedTokenizerFast:
    """Characters as in `tiny`, but "=1" and "+3" are one token. bos: every text begins with id 0 and ends with it."""
    tokens = [tiny.EOS, *tiny.CHARACTERS, "=1", "+3"]
    raw = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [("=", "1"), ("+", "3")]))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]+"), behavior="isolated")
    raw.decoder = decoders.Fuse()
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{tiny.EOS} $A {tiny.EOS}", special_tokens=[(tiny.EOS, 0)]
        )
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=tiny.EOS, clean_up_tokenization_spaces=False)
    tokenizer.save_pretrained(path)
    return tokenizer


def test_a_token_that_holds_the_end_of_the_prompt_counts_to_the_response(run: Run, tmp_path: Path) -> None:
    model = tiny.new_model(vocab=tiny.VOCAB + 2)
    model.save_pretrained(tmp_path / "model")
    tokenizer = merging_tokenizer(tmp_path / "model", bos=False)
    lines = [{"prompt": "2+3=", "response": "15"}, {"prompt": "2+3=", "response": "5"}]
    assert run(model=tmp_path / "model", texts=write(tmp_path / "in.jsonl", lines))[0] == 0
    ids = [tokenizer(line["prompt"] + line["response"]).input_ids for line in lines]
    assert list(map(len, ids)) == [4, 4]  # 2 +3 =1 5, and 2 +3 = 5
    for record, tokens, n, log_probs in zip(records(tmp_path), ids, [2, 3], reference(model, ids), strict=True):
        assert_record(record, tokens[n:], log_probs[n - 1 :])
    refused = [{"prompt": "=", "response": "15"}, {"prompt": "2+3=", "response": ""}]
    write(tmp_path / "in.jsonl", [lines[0], *refused, lines[1]])
    (tmp_path / "out.jsonl").unlink()
    code, error = run(model=tmp_path / "model", texts=tmp_path / "in.jsonl")
    assert code == 1 and "error: sequence 1: expected a prompt with a token before" in error
    assert "error: sequence 2: expected a response of at least one token, got an empty one" in error
    assert "2 of 4 sequences had errors; --resume tries 2 missing ones again" in error
    for record, tokens, n, log_probs in zip(records(tmp_path), ids, [2, 3], reference(model, ids), strict=True):
        assert_record(record, tokens[n:], log_probs[n - 1 :])


def test_special_tokens_are_those_of_the_tokenizer(run: Run, tmp_path: Path) -> None:
    """After a BOS the first token is scored; an EOS that the tokenizer adds is, too, but never between the two, nor is
    it taken for one that the response begins with. One that a text spells out stays."""
    model = tiny.new_model(vocab=tiny.VOCAB + 2)
    model.save_pretrained(tmp_path / "model")
    tokenizer = merging_tokenizer(tmp_path / "model", bos=True)
    lines = [{"text": "12"}, {"prompt": "a", "response": "bc"}, {"prompt": "a", "response": "<eos>bc"}]
    lines += [{"prompt": "a<eos>", "response": "bc"}, {"text": "1<eos>2<eos>"}]
    assert run(model=tmp_path / "model", texts=write(tmp_path / "in.jsonl", lines))[0] == 0
    ids = [tokenizer(text).input_ids for text in ("12", "abc", "a<eos>bc", "a<eos>bc", "1<eos>2<eos>")]
    assert {i[0] for i in ids} == {i[-1] for i in ids} == {0}
    for record, tokens, n, log_probs in zip(
        records(tmp_path), ids, [1, 2, 2, 3, 1], reference(model, ids), strict=True
    ):
        assert_record(record, tokens[n:], log_probs[n - 1 :])


def test_an_existing_output_is_not_touched(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("precious\n")
    code, error = run()
    assert code == 2 and "--resume" in complaint(error)
    code, error = run("--resume")
    assert code == 2 and "line 1: not a result of forktree score" in complaint(error)
    assert (tmp_path / "out.jsonl").read_text() == "precious\n"


def test_resume_keeps_what_is_there_and_adds_what_is_missing(run: Run, files: Path, tmp_path: Path) -> None:
    assert run()[0] == 0
    whole = records(tmp_path)
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    kept = b"".join(lines[:4])
    (tmp_path / "out.jsonl").write_bytes(kept + lines[4][:20])  # killed while it wrote the fourth
    assert run("--resume")[0] == 0
    again = (tmp_path / "out.jsonl").read_bytes()
    assert again.startswith(kept)
    for record, before in zip(records(tmp_path), whole, strict=True):
        assert record.pop("log_probs") == pytest.approx(before.pop("log_probs"), abs=1e-5)
        assert {**record, "log_prob": 0, "perplexity": 0} == {**before, "log_prob": 0, "perplexity": 0}
    assert run("--resume")[0] == 0 and (tmp_path / "out.jsonl").read_bytes() == again
    code, error = run("--resume", "--dtype", "bfloat16")
    assert code == 2 and 'made with another settings.dtype: "auto" there, "bfloat16" now' in complaint(error)
    for other in ([{"text": "1"}], [{"prompt": "12+3=", "response": "15"}] * len(LINES)):
        code, error = run("--resume", texts=write(tmp_path / "other.jsonl", other))
        assert code == 2 and "line 2: what it was made of is not number" in complaint(error)
    assert (tmp_path / "out.jsonl").read_bytes() == again


WRONG: list[tuple[list[str], str]] = [
    (["--foo"], "No such option: --foo"),
    (["--seed", "1"], "No such option: --seed"),
    (["--num-slots", "0"], "num_slots must be an integer of at least 1, got 0"),
    (["--num-slots", "2"], "needs 7 KV slots, even alone: 2 are free of 2; raise num_slots"),
    (["--max-batch-tokens", "0"], "max_batch_tokens must be an integer of at least 1, got 0"),
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
    ('{"text": ""}\n', "line 1"),
    ('{"text": 1}\n', "line 1"),
    ('{"text": "a"}\n{"prompt": "b"}\n', 'line 2: expected {"text": "some text"} or {"prompt": "some text", "resp'),
    ('{"text": "a"}\n\n{"prompt": "b", "text": "c"}\n', "line 3"),  # of forktree generate: which of the two is meant?
    ('{"prompt": "", "response": "b"}\n', "line 1"),
    ("12\n", "line 1"),
    ("{oops\n", "JSON"),
    (json.dumps({"text": "1" * 300}), "sequence 0 has 300 tokens: all but the last must fit the model's 256 positions"),
]


@pytest.mark.parametrize(("text", "message"), INPUTS)
def test_bad_inputs_are_named(run: Run, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    code, error = run(texts=tmp_path / "bad.jsonl")
    assert code == 2 and message in complaint(error)
    assert not (tmp_path / "out.jsonl").exists()


def test_files_that_are_not_there(run: Run, tmp_path: Path) -> None:
    code, error = run(texts=tmp_path / "none.jsonl")
    assert code == 2 and "--texts" in complaint(error) and "none.jsonl" in complaint(error)
    code, error = run(model=tmp_path / "none")
    assert code == 2 and "must be a directory" in complaint(error)


def test_a_result_that_is_no_number_costs_its_text_only(run: Run, tmp_path: Path) -> None:
    """A damaged embedding that `attach` does not happen to try."""
    model = tiny.new_model(vocab=64)
    tried = set(VerificationTree(64)._tokens.tolist())
    damaged = next(c for c in tiny.CHARACTERS if tiny.tokenizer()(c).input_ids[0] not in tried)
    with torch.no_grad():
        model.get_input_embeddings().weight[tiny.tokenizer()(damaged).input_ids[0]] = torch.nan
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    others = [c for c in tiny.CHARACTERS if c != damaged][:5]
    texts = ["".join(others), others[0] + damaged + others[1], "".join(others[::-1]), others[0] + damaged]
    code, error = run(model=tmp_path / "model", texts=write(tmp_path / "in.jsonl", [{"text": t} for t in texts]))
    assert code == 1 and "Traceback" not in error
    assert "sequence 1: logits of token 2 of sequence 1 must be finite" in error
    assert "1 of 4 sequences had errors; --resume tries 1 missing ones again" in error
    assert [r["text"] for r in records(tmp_path)] == [texts[0], texts[2], texts[3]]


def test_an_interrupted_run_loses_nothing(run: Run, files: Path, tmp_path: Path) -> None:
    texts = [f"{i}+{i}=" * 8 for i in range(300)]
    write(tmp_path / "in.jsonl", [{"text": t} for t in texts])
    out = tmp_path / "out.jsonl"
    words = ["score", "--model", str(files / "model"), "--texts", str(tmp_path / "in.jsonl"), "--out", str(out)]
    code, error, lines = interrupted([*words, "--max-batch-tokens", "1"], out, signal.SIGINT)
    results = len(lines) - 1
    assert 0 < results < len(texts)
    assert code == 130
    assert f"{results} of {len(texts)} results" in complaint(error)
    assert run("--resume", texts=tmp_path / "in.jsonl")[0] == 0
    assert out.read_bytes().startswith(b"".join(lines))
    assert [r["text"] for r in records(tmp_path)] == texts


def test_help_teaches(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert called(monkeypatch, "score", "--help") == 0
    text = capsys.readouterr().out
    assert "Examples:" in text and "--texts" in text and "perplexity" in text and "counts to the response" in text
