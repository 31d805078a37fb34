"""`forktree env`; what it tells of the environment that a process starts in, from processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import forktree
from command_line import called
from forktree import _core
from forktree.ops.dispatch import available


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("FORKTREE_ISA", "FORKTREE_BACKEND")}
    return subprocess.run(
        [sys.executable, "-c", "from forktree.cli import main; main()", *arguments],
        env=inherited | {"PYTHONPATH": str(Path(forktree.__file__).parents[1])} | variables,
        capture_output=True,
        text=True,
    )


def test_json_holds_versions_build_and_choices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FORKTREE_BACKEND", raising=False)
    assert called(monkeypatch, "env", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["versions"]["torch"] == torch.__version__
    assert told["core"] == _core.build
    assert told["threads"] == torch.get_num_threads()
    assert [(isa["name"], isa["runs"]) for isa in told["isas"]] == [(name, not why) for name, why in _core.isas()]
    best = [isa["name"] for isa in told["isas"] if isa["runs"]][-1]
    assert [isa["name"] for isa in told["isas"] if isa["chosen"]] == [best]
    assert all(isa["built"] for isa in told["isas"] if isa["runs"])
    assert all(isa["why"] for isa in told["isas"] if not isa["runs"])
    assert {b["name"] for b in told["backends"] if b["available"]} == set(available())


def test_tables_show_what_was_named() -> None:
    result = run("env", FORKTREE_ISA="portable", FORKTREE_BACKEND="reference", COLUMNS="200")
    assert result.returncode == 0, result.stderr
    assert _core.build["compiler"] in result.stdout and _core.build["flags"] in result.stdout
    row = next(line for line in result.stdout.splitlines() if "portable" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["portable", "yes", "yes", "yes", "FORKTREE_ISA names it"]
    row = next(line for line in result.stdout.splitlines() if "reference" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["reference", "yes", "FORKTREE_BACKEND names it"]


def test_a_bad_instruction_set_is_one_line() -> None:
    result = run("env", FORKTREE_ISA="mmx")
    assert result.returncode == 2 and result.stdout == ""
    says = "FORKTREE_ISA must be portable, avx2, avx512, avx512bf16 or amx, got 'mmx'"
    assert says in result.stderr and result.stderr.count("\n") == 1


def test_a_bad_backend_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORKTREE_BACKEND", "abacus")
    assert called(monkeypatch, "env") == 2
    out, error = capsys.readouterr()
    assert out == "" and "got 'abacus': there is no such backend" in error and error.count("\n") == 1


def test_help_needs_no_transformers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program = "import sys, forktree.cli; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    assert called(monkeypatch, "--help") == 0 and "env" in capsys.readouterr().out


def test_all_that_is_exported_is_there() -> None:
    assert all(getattr(forktree, name) is not None for name in forktree.__all__)
    assert callable(forktree.plan_attention) and callable(forktree.generate)
    assert set(forktree.__all__) <= set(dir(forktree))
    with pytest.raises(AttributeError, match="no attribute 'beam'"):
        _ = forktree.beam
