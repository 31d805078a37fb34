"""The backend that a test is about."""

from collections.abc import Iterator

import pytest

from backends import Backend
from forktree import _core


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Chosen for all operations, with its instruction set; Triton's interpreter takes programs in random order."""
    chosen: Backend = request.param
    if chosen.interpreted:
        request.getfixturevalue("shuffled")
    monkeypatch.setenv("FORKTREE_BACKEND", chosen.name)
    before = _core.isa()
    _core.use_isa(chosen.isa or before)
    yield chosen
    _core.use_isa(before)
