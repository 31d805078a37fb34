"""Files of the command line: what is not ours is never touched, what is ours never lost; inputs as people have them."""

import json
import os
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import forktree
from forktree.cli.inputs import option_text, read_inputs
from forktree.cli.results import ResultFile
from forktree.errors import ForktreeError, InvalidInput
from forktree.rewards.load import import_function

INPUTS = [{"prompt": "a"}, {"prompt": "b\u2028\x85c"}, {"prompt": "d\n\x0c"}]
MADE_WITH = {"settings": {"seed": 0, "stop": ["\n"]}, "model": {"config.json": "1234"}}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in INPUTS))
    return path


def opened(source: Path, out: Path, *, command: str = "generate", resume: bool = True, **made_with: Any) -> ResultFile:
    return ResultFile(command, out, source, INPUTS, {**MADE_WITH, **made_with}, ("text", "more"), resume=resume)


def write_all(output: ResultFile) -> None:
    with output:
        for i in output.missing():
            output.write(i, {"text": f"\u2029\ud800 {i}", "more": [1, {"a": "\\"}]})


def test_a_run_cut_short_at_any_byte_goes_on(source: Path, tmp_path: Path) -> None:
    write_all(opened(source, out := tmp_path / "out.jsonl", resume=False))
    whole = out.read_bytes()
    assert [json.loads(line)["index"] for line in whole.split(b"\n")[1:-1]] == [0, 1, 2]
    assert json.loads(whole.split(b"\n")[1])["text"] == "\u2029\ud800 0"
    for end in range(len(whole) + 1):
        out.write_bytes(whole[:end])
        with opened(source, out) as output:
            assert len(output.missing()) == 3 - max(0, whole[:end].count(b"\n") - 1)
            assert out.read_bytes() == whole[:end]  # looking changes nothing
        write_all(opened(source, out))
        assert out.read_bytes() == whole


HEADER, *LINES = [
    json.dumps(record, ensure_ascii=False)
    for record in (
        {"header": {"command": "generate", "forktree": forktree.__version__, **MADE_WITH}},
        {"index": 0, **INPUTS[0], "text": "", "more": 1},
        {"index": 1, **INPUTS[0], "text": "", "more": 1},
        {"index": 0, **INPUTS[0], "text": ""},
    )
]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("precious", "not the beginning of a result"),
        ("precious\n", "line 1: not a result"),
        ('{"prompt": "a"}\n', "line 1: not the header"),
        ('{"prompt": "a"}', "not the beginning of a result"),
        ('{"header": 1}\n', "line 1: not the header"),
        (LINES[0] + "\n", "line 1: not the header"),
        (HEADER.replace("generate", "score", 1) + "\n", "line 1: not the header"),
        (HEADER + "\n" + LINES[1] + "\n", "line 2: what it was made of"),
        (HEADER + "\n" + LINES[2] + "\n", "line 2: not a result"),
        (HEADER + "\n" + (LINES[0] + "\n") * 2, "line 3: not a result"),
        (HEADER + "\n\n", "line 2: not a result"),
        (HEADER + "\n" + "[" * 100_000 + "\n", "line 2: not a result"),
        (HEADER + "\n" + LINES[0] + "\n" + LINES[0][:20], "not the beginning of a result"),
        (HEADER + "\n" + LINES[0] + "\n" + '{"index": 1, "note": ', "not the beginning of a result"),
    ],
)
def test_what_is_not_ours_is_refused_and_stays(source: Path, tmp_path: Path, content: str, says: str) -> None:
    (out := tmp_path / "out.jsonl").write_text(content)
    with pytest.raises(InvalidInput, match=says):
        opened(source, out)
    assert out.read_text() == content


def test_a_run_with_other_settings_is_refused_with_the_difference(source: Path, tmp_path: Path) -> None:
    write_all(opened(source, out := tmp_path / "out.jsonl"))
    with pytest.raises(InvalidInput, match=r'another model\.config\.json: "1234" there, "5678" now'):
        opened(source, out, model={"config.json": "5678"})
    with pytest.raises(InvalidInput, match=r'another reward\.head: nothing there, "1" now'):
        opened(source, out, reward={"head": "1"})


def test_one_run_at_a_time(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with opened(source, out) as first:
        for _ in range(2):  # before and after something was written
            for resume in (False, True):
                with pytest.raises(InvalidInput, match="another run, or"):
                    opened(source, out, resume=resume)
            first.write(first.missing()[0], {"text": "", "more": 1})
    with opened(source, out) as again:
        assert again.missing() == [2]


def test_a_run_without_results_leaves_no_file_and_an_empty_file_is_as_good_as_none(
    source: Path, tmp_path: Path
) -> None:
    with opened(source, out := tmp_path / "out.jsonl", resume=False):
        assert out.exists()
    assert not out.exists()
    out.touch()
    write_all(opened(source, out, resume=False))
    with pytest.raises(InvalidInput, match="exists: name another file"):
        opened(source, out, resume=False)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("kind", ["directory", "pipe", "device", "link", "hard link", "nowhere", "no directory"])
def test_what_cannot_be_a_result_file_is_refused_at_once(source: Path, tmp_path: Path, kind: str, resume: bool) -> None:
    out = tmp_path / "out.jsonl"
    match kind:
        case "directory":
            out.mkdir()
        case "pipe":
            os.mkfifo(out)
        case "device":
            out = Path("/dev/full")
        case "link":
            out.symlink_to(source)
        case "hard link":
            out.hardlink_to(source)
        case "nowhere":
            out = tmp_path / "none" / "out.jsonl"
        case "no directory":
            out = source / "out.jsonl"
    before = source.read_bytes()
    with pytest.raises(InvalidInput, match=f"--out {out}"):
        opened(source, out, resume=resume)
    assert source.read_bytes() == before


@contextmanager
def small_disk() -> Iterator[None]:
    """No file can grow beyond 330 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (330, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_what_was_written(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with small_disk(), pytest.raises(ForktreeError, match=r"cannot be written: File too large; 2 of 3 results"):
        write_all(opened(source, out))
    assert out.read_bytes().count(b"\n") == 3 and out.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lines_end_with_line_feeds_only(tmp_path: Path, ending: str) -> None:
    texts = ["a\u2028b", "c\u2029\x85d", "\ufeffe\x0c\x0b\x1c", "\U0001f600"]
    lines = ["", *(json.dumps({"prompt": text, "n": 7}, ensure_ascii=False) for text in texts), " "]
    (tmp_path / "in.jsonl").write_bytes(("\ufeff" + ending.join(lines)).encode())
    assert [one["prompt"] for one in read_inputs("--prompts", tmp_path / "in.jsonl", [("prompt",)])] == texts


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": "\xff"}',
        '{"prompt": "a"}'.encode("utf-16"),
        b'{"prompt": "a"} {"prompt": "b"}',
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "a"}\n' + line + b"\n")
    with pytest.raises(InvalidInput, match=r"in\.jsonl, line 2") as error:
        read_inputs("--prompts", tmp_path / "in.jsonl", [("prompt",)])
    assert str(error.value).isprintable() and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("given", "escape", "means"),
    [
        (r"\times", False, r"\times"),
        ("\n", False, "\n"),
        (r"\n\n", True, "\n\n"),
        (r"\\times", True, r"\times"),
        (r'"\"\u00e9\ud83d\ude00', True, '""\xe9\U0001f600'),
        ("\t\x00", True, "\t\x00"),
    ],
)
def test_option_texts(given: str, escape: bool, means: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert option_text("--stop", given, escape=escape) == means


def test_option_texts_that_are_probably_or_surely_wrong() -> None:
    with pytest.warns(UserWarning, match="--escape makes it a line feed"):
        assert option_text("--stop", r"\n", escape=False) == r"\n"
    for text, escape in ((r"\d", True), ("\\", True), (r"\u12", True), (r"\ud800", True), ("\udcff", False)):
        with pytest.raises(InvalidInput, match="--stop"):
            option_text("--stop", text, escape=escape)


def test_rewards_of_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside_it.py").write_text("WEIGHT = 2.0\n")
    (tmp_path / "sound_reward.py").write_text("import beside_it\ndef reward(p, r):\n    return beside_it.WEIGHT\n")
    before = list(sys.path)
    assert import_function("sound_reward:reward")("", "") == 2.0
    for name, text, says in (
        ("broken_syntax", "\n\ndef reward(:\n", r"broken_syntax\.py, line 3: SyntaxError"),
        ("broken_import", "\nimport not_there_at_all\n", r"broken_import\.py, line 2: ModuleNotFoundError"),
        ("broken_otherwise", "import sys\nsys.exit('bye')\n", r"broken_otherwise\.py, line 2: SystemExit: bye"),
        ("broken_attribute", "import math\nmath.nothing\n", r"broken_attribute\.py, line 2: AttributeError"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
        with pytest.raises(InvalidInput, match=f"cannot import '{name}': .*{says}"):
            import_function(f"{name}:reward")
    with pytest.raises(InvalidInput, match="has no 'other'"):
        import_function("sound_reward:other")
    assert before == sys.path
