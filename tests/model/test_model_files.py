"""Model directories from outside: they run no code, hang nothing, drive no terminal; what is wrong is one line."""

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_file

import tiny
from forktree import RewardModel, cli
from forktree.errors import InvalidInput
from forktree.model import model_files
from forktree.model.checkpoints import load_model, load_tokenizer
from forktree.model.model_files import digests
from forktree.terminal import Terminal, one_line, visible

EVIL = """
import pathlib
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
pathlib.Path(__file__).with_name("ran").touch()
pathlib.Path({marker!r}).touch()

class Config(PreTrainedConfig):
    model_type = "evil"

class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model directory of one's own, to be damaged at will."""
    tiny.new_model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.fixture
def evil(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes the directory need `evil.py`, by one of its files, and answers every question with yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 100))
    for module in (hf.dynamic_module_utils, hf.utils.hub):
        monkeypatch.setattr(module, "HF_MODULES_CACHE", str(directory.parent / "modules"), raising=False)

    def make(file: str) -> Path:
        (directory / "evil.py").write_text(EVIL.format(marker=str(directory / "ran")))
        if file == "config.json":
            change(directory / file, model_type="evil", auto_map={"AutoConfig": "evil.Config"})
        else:
            change(directory / file, tokenizer_class="Evil", auto_map={"AutoTokenizer": [None, "evil.Tokenizer"]})
            change(directory / "config.json", model_type="gpt_neox_japanese_of_old")
        return directory / "ran"

    return make


@pytest.mark.parametrize("load", [load_model, load_tokenizer, RewardModel.load], ids=lambda f: f.__qualname__)
def test_code_in_a_model_directory_runs_only_when_asked_for(
    directory: Path, evil: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    file = "tokenizer_config.json" if load is load_tokenizer else "config.json"
    ran = evil(file)
    if load == RewardModel.load:
        save_file({"score.weight": torch.ones(1, 32)}, directory / "head.safetensors")
    with pytest.raises(InvalidInput, match=rf"{file}: names Python code .*--trust-remote-code") as error:
        load(directory)
    assert "\n" not in str(error.value) and not ran.exists()
    try:  # the test can fail: this is what would have run
        load(directory, trust_remote_code=True)
    except InvalidInput as error:
        assert file == "config.json" and "evil" in str(error)  # it brings no model
    assert ran.exists()


@pytest.mark.parametrize("what", ["model", "reward"])
def test_the_command_line_runs_no_code_and_asks_nothing(
    directory: Path,
    evil: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    sound = directory.rename(directory.with_name("sound"))
    directory.mkdir()
    for file in sound.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    ran = evil("config.json")
    save_file({"score.weight": torch.ones(1, 32)}, directory / "head.safetensors")
    (directory / "in.jsonl").write_text('{"prompt": "1+2="}\n')
    options = ["--model", str(directory)]
    if what == "reward":
        options = ["--model", str(sound), "--search", "best-of-n", "--reward", str(directory)]
    paths = ["--prompts", str(directory / "in.jsonl"), "--out", str(directory / "out.jsonl")]
    monkeypatch.setattr(sys, "argv", ["forktree", "generate", *options, *paths])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and said.err.count("\n") == 1 and "--trust-remote-code" in said.err
    assert not ran.exists() and not (directory / "out.jsonl").exists()


DAMAGE: list[tuple[str, bytes | dict[str, Any]]] = [
    ("config.json", b""),
    ("config.json", b"[" * 100_000),
    ("config.json", b'{"model_type": "llama", "vocab_size": ' + b"9" * 5000 + b"}"),
    ("config.json", b"\x00\xff"),
    ("config.json", b"[]"),
    ("config.json", {"model_type": "\x1b[31mred"}),
    ("config.json", {"model_type": []}),
    ("config.json", {"num_hidden_layers": 10**9}),
    ("config.json", {"num_hidden_layers": 10**400}),
    ("config.json", {"num_hidden_layers": 0}),
    ("config.json", {"text_config": {"n_routed_experts": 10**12}}),
    ("config.json", {"hidden_size": 10**15}),
    ("config.json", {"vocab_size": 2**64}),
    ("config.json", {"num_key_value_heads": 0}),
    ("config.json", {"hidden_act": None}),
    ("config.json", {"dtype": "\x9b31m"}),
    ("config.json", {"auto_map": 3}),
    ("config.json", {"eos_token_id": [True]}),
    ("generation_config.json", b"null"),
    ("generation_config.json", {"eos_token_id": {"a": 1}}),
    ("model.safetensors", b"\xff" * 100),
    ("model.safetensors.index.json", b"{"),
    ("tokenizer_config.json", b"12"),
    ("tokenizer_config.json", {"auto_map": 1}),
    ("tokenizer_config.json", {"model_max_length": "\x1b"}),
    ("tokenizer.json", b'{"a": 1}'),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": 3}}),
    ("special_tokens_map.json", b"\x80"),
]


@pytest.mark.parametrize(("file", "damage"), DAMAGE, ids=lambda x: str(x)[:40])
def test_a_damaged_file_is_one_line_that_names_it(directory: Path, file: str, damage: bytes | dict[str, Any]) -> None:
    if isinstance(damage, dict):
        change(directory / file, **damage)
    else:
        (directory / file).write_bytes(damage)
    with pytest.raises(InvalidInput, match=file) as error:
        load_model(directory)
        load_tokenizer(directory)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


def test_weights_without_a_place_are_told(directory: Path) -> None:
    change(directory / "config.json", num_hidden_layers=1)
    with pytest.warns(UserWarning, match=r"no place for 9 of the weights .* 'model\.layers\.1\."):
        load_model(directory)


def test_digests_are_those_of_what_decides(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "code.py").write_text("")
    (directory / "notes.md").write_text("")
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    whole = digests(directory)
    assert set(whole) == names and set(digests(directory, code=True)) == names | {"code.py"}
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    (directory.parent / "moved").symlink_to(directory)
    assert digests(directory.parent / "moved") == whole
    monkeypatch.setattr(model_files, "BLOCK", 64)
    monkeypatch.setattr(model_files, "BLOCKS", 16)
    found = {digests(directory)["model.safetensors"], whole["model.safetensors"]}
    last = len(content) - 64
    for at in (0, 63, last // 15, 8 * last // 15 + 63, last, len(content) - 1):  # in blocks that are read
        weights.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        found.add(digests(directory)["model.safetensors"])
    weights.write_bytes(content + b"\0")
    found.add(digests(directory)["model.safetensors"])
    assert len(found) == 9


HOSTILE = "\x1b]0;x\x07\x1b[31m \x9b2J \u202eabc \ud800 \x7f\r\x00\u2028\u200b"


def test_nothing_from_outside_drives_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible("é 漢字\n\U0001f600") == "é 漢字\n\U0001f600"
    assert visible(HOSTILE).isprintable() and visible(visible(HOSTILE)) == visible(HOSTILE)
    assert r"\x1b[31m" in visible(HOSTILE) and r"\u202e" in visible(HOSTILE) and r"\ud800" in visible(HOSTILE)
    assert one_line(ValueError("a\n\tb " * 200)) == ("a b " * 200)[:500]
    shown = io.StringIO()
    table = Table("a", title=Text(HOSTILE))
    table.add_row(Text(HOSTILE, style="red"))
    console = Terminal(file=shown, force_terminal=True, color_system="standard", width=200)
    console.print(table)
    console.print(HOSTILE, markup=False)
    styled_by_rich = re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue())
    assert styled_by_rich.replace("\n", "").isprintable()
    assert "\x1b[31m" in shown.getvalue() and r"\x1b[31m" in styled_by_rich
