"""What imports what: beside the contracts in pyproject.toml, what they cannot say."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import forktree

PACKAGE = Path(forktree.__file__).parent
SPEAKS_TO_GPUS = ("device", "ops")


def loaded(statement: str) -> set[str]:
    """Modules that a fresh process has after a statement."""
    program = f"{statement}; import sys; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", program]
    return set(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split())


def test_the_operations_load_no_search() -> None:
    modules = loaded("import forktree.ops")
    rooms = {"cli", "decoder", "engine", "integrations", "kv", "model", "rewards", "search", "sequences"}
    assert "forktree.ops.dispatch" in modules
    assert not {f"forktree.{room}" for room in rooms} & modules
    assert "transformers" not in modules


def test_searches_load_no_transformers() -> None:
    modules = loaded("from forktree import ParticleFilter")
    assert "forktree.search" in modules and "transformers" not in modules


def test_digests_of_model_files_load_no_transformers() -> None:
    modules = loaded("import forktree.model.model_files")
    assert "forktree.model.model_files" in modules and "transformers" not in modules


@pytest.mark.parametrize("name", [*forktree.__all__, *forktree._LAZY])
def test_every_public_name_is_there(name: str) -> None:
    assert name in forktree.__all__ and name in dir(forktree)
    assert getattr(forktree, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'forktree' has no attribute 'nothing'"):
        _ = forktree.nothing


def cuda_calls(path: Path) -> Iterator[int]:
    """Lines that take anything from torch.cuda."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) == ("torch", "cuda"):
                yield node.lineno
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if any(name.startswith("torch.cuda") for name in names):
                yield node.lineno


def test_only_devices_and_operations_speak_to_cuda() -> None:
    files = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    found = {name for name, path in files.items() if any(cuda_calls(path))}
    assert found & {name for name in files if name.startswith(SPEAKS_TO_GPUS)}  # else the test sees nothing
    assert all(name.startswith(SPEAKS_TO_GPUS) for name in found), found
