"""README and docs: every Python block runs, and every file that they name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "csrc/README.md"])
PAGES.remove(ROOT / "CHANGELOG.md")  # names files as they were
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)  # what cannot run by itself is ```py
FOLDERS = "bench|csrc|docs|python|tests|triton_kernels"

pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="needs the source tree")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=name)
def test_every_python_block_runs(page: Path) -> None:
    scope: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.finditer(page.read_text()):
        line = page.read_text()[: block.start()].count("\n") + 1
        exec(compile("\n" * line + block[1], str(page), "exec"), scope)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_named_is_there(page: Path) -> None:
    text = page.read_text()
    links = {page.parent / target for target in re.findall(r"\]\(([\w./-]+\.\w+)(?:#[\w-]+)?\)", text)}
    paths = {ROOT / path for path in re.findall(rf"`(?:python )?((?:{FOLDERS})/[\w./-]*\w)(?![\w./<-])", text)}
    assert not [str(path) for path in links | paths if not path.exists()]


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
