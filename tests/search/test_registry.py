"""The registry: a search that lies in the package is known by name, and its settings are its fields."""

import sys
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path

import pytest

import forktree
from forktree import InvalidInput, Sample
from forktree.search import PromptLookup, Search, TokenTable, algorithms, registry

NEW = '''
from collections.abc import Callable
from dataclasses import dataclass

from forktree.search.algorithms.sample import BestOfN
from forktree.search.registry import register


@register("made-up")
@dataclass(frozen=True, kw_only=True)
class MadeUp(BestOfN):
    """A search that nobody has listed.

    Args:
        depth: how deep it goes,
            in steps.
        rate: how fast.
    """

    rate: float
    depth: int = 3
    names: tuple[str, ...] = ("a",)
    rule: Callable[[int], int] = abs
    exact: bool = False
    table: dict[str, int] | None = None
    limit: int | None = None
'''


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Search]]:
    """A search in a new file of the package."""
    (tmp_path / "made_up.py").write_text(NEW)
    monkeypatch.setattr(algorithms, "__path__", [*algorithms.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "_SEARCHES", dict(registry._SEARCHES))
    yield registry.named("made-up")
    del sys.modules["forktree.search.algorithms.made_up"]


def test_a_new_file_is_a_new_search(made_up: type[Search]) -> None:
    assert list(registry.searches()) == [
        "adaptive-vote", "beam", "best-of-majority", "best-of-n", "dvts", "entropic-particle", "ets", "greedy",
        "made-up", "majority-of-the-bests", "majority-vote", "mbr", "parallel-tempering", "particle", "particle-gibbs",
        "prm-beam", "rebase", "rpc", "sample", "smc-steering", "step-beam", "twisted-smc", "weighted-vote",
    ]  # fmt: skip
    assert registry.reward_of(made_up) == "reward"
    settings = registry.settings_of(made_up)
    assert list(settings)[:9] == ["rate", "depth", "names", "rule", "exact", "table", "limit", "reward", "num_samples"]
    assert list(settings)[-3:] == ["stop", "logits_processor", "drafter"]
    assert settings["depth"].meaning == "how deep it goes, in steps." and settings["depth"].default == 3
    assert settings["rate"].default is MISSING and settings["num_samples"].meaning == "number of samples."
    assert settings["table"].read is None and settings["reward"].read is None


def test_settings_are_read_by_their_types(made_up: type[Search]) -> None:
    given = [("rate", "0.5"), ("depth", "7"), ("names", "x"), ("names", ""), ("rule", "math:floor"), ("exact", "True")]
    values = registry.read_settings(made_up, [*given, ("temperature", "1e-1"), ("stop", "a=b")])
    assert values.pop("rule")(2.5) == 2
    assert values == {"rate": 0.5, "depth": 7, "names": ("x", ""), "exact": True, "temperature": 0.1, "stop": ("a=b",)}
    assert registry.settings_of(made_up)["limit"].kind == "an integer, or none"
    for text, value in (("3", 3), ("None", None)):
        assert registry.read_settings(made_up, [("limit", text)]) == {"limit": value}
    head = forktree.TokenProbability([1, 2])
    assert made_up(**values, reward=head).names == ("x", "")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("depth", "2.5", "depth must be an integer, got '2.5'"),
        ("limit", "2.5", "limit must be an integer, got '2.5'"),
        ("rate", "fast", "rate must be a number, got 'fast'"),
        ("exact", "yes", "exact must be true or false, got 'yes'"),
        ("rule", "floor", "rule must be module:name, got 'floor'"),
        ("rule", "math:flor", "module 'math' has no 'flor'"),
        ("table", "{}", "table cannot be given as a text"),
        ("dept", "1", r"made-up has no setting 'dept', did you mean depth\? Its settings are rate, depth, "),
        ("num_beams", "1", "made-up has no setting 'num_beams', it belongs to beam"),
        ("balance_temperature", "1", "no setting 'balance_temperature', it belongs to ets and rebase"),
    ],
)
def test_what_is_no_setting_is_said(made_up: type[Search], name: str, text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        registry.read_settings(made_up, [(name, text)])


def test_a_name_belongs_to_one_search() -> None:
    with pytest.raises(ValueError, match="the name 'sample' is taken by Sample"):
        registry.register("sample")(forktree.BestOfN)
    assert registry.register("sample")(Sample) is Sample and registry.named("sample") is Sample


@pytest.mark.parametrize("spec", ["math:floor", "forktree:Decoder", "forktree:search"])
def test_what_is_no_search_is_refused(spec: str) -> None:
    with pytest.raises(InvalidInput, match=r"must be a class derived from forktree\.search\.Search, got"):
        registry.named(spec)


def test_every_exported_search_is_registered() -> None:
    exported = {v for v in vars(forktree.search).values() if isinstance(v, type) and issubclass(v, Search)}
    assert exported - {Search} == set(registry.searches().values())


def test_a_search_may_be_named_from_anywhere() -> None:
    assert registry.named("forktree:BestOfN") is forktree.BestOfN


def test_types_that_only_python_can_give_say_so() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Odd(Sample):
        when: bytes | frozenset[int] = b""

    with pytest.raises(InvalidInput, match="when cannot be given as a text: it is of type"):
        registry.read_settings(Odd, [("when", "x")])


def test_a_setting_may_be_a_name_or_a_function_and_a_number_or_none() -> None:
    settings = registry.settings_of(forktree.BestOfMajority)
    assert settings["answer"].kind == "text or module:function" and settings["alpha"].kind == "a number, or none"
    assert settings["alpha"].default is None
    assert settings["alpha"].read("0.25") == 0.25 and settings["alpha"].read("none") is None
    tree = registry.settings_of(forktree.DVTS)["answer"]
    assert tree.kind == "text or module:function, or none" and tree.default is None
    assert tree.read("boxed") == "boxed" and tree.read("none") is None and tree.read("math:floor")(2.5) == 2
    read = settings["answer"].read
    assert [read(t) for t in ("boxed", "regex:=(.*)", "a: b")] == ["boxed", "regex:=(.*)", "a: b"]
    assert read("math:floor")(2.5) == 2
    with pytest.raises(InvalidInput, match="module 'math' has no 'flor'"):
        read("math:flor")


def test_drafters_are_given_by_name() -> None:
    read = registry.settings_of(Sample)["drafter"].read
    assert read is not None and isinstance(read("prompt-lookup"), PromptLookup)
    assert isinstance(read("token-table"), TokenTable)
    with pytest.raises(InvalidInput, match="drafter must be prompt-lookup, suffix, token-table or module:drafter"):
        read("lookup")
