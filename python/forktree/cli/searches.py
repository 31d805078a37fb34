"""`--search` and `--set`: a search and its settings, from whatever is registered."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Any

import typer
from rich.padding import Padding
from rich.text import Text

from forktree.cli.inputs import option_text
from forktree.errors import InvalidInput
from forktree.search.base import Search
from forktree.search.registry import named, read_settings, reward_of, searches, settings_of
from forktree.terminal import Terminal

SEARCH_HELP = f"{', '.join(searches())}, or module:Class, a search of your own."


@dataclass(frozen=True)
class ChosenSearch:
    """A search and what was set of it.

    Args:
        kind: its class.
        settings: values by name.
        described: the same as JSON can write them: what was imported stays the text that names it.
        code: texts that name imported code, the search itself included.
    """

    kind: type[Search]
    settings: dict[str, Any]
    described: dict[str, Any]
    code: list[str]

    @property
    def reward(self) -> str | None:
        """The setting that takes the reward."""
        return reward_of(self.kind)


def choose(search: str, given: Sequence[str], reward: str | None, *, escape: bool) -> ChosenSearch:
    """The search that options ask for, after checking all that can be checked without a model.

    Args:
        search: of `--search`.
        given: `NAME=VALUE` of each `--set`.
        reward: of `--reward`.
        escape: whether escapes in texts are read.

    Raises:
        InvalidInput: there is no such search or setting, a value is wrong, or a reward is missing or unwanted.
    """
    kind = named(search, what="--search")
    texts: dict[str, list[str]] = {}
    pairs = []
    for one in given:
        name, equals, text = one.partition("=")
        if not equals:
            raise InvalidInput(f"--set must be NAME=VALUE, got {one!r}")
        text = option_text(f"--set {name}", text, escape=escape)
        texts.setdefault(name, []).append(text)
        pairs.append((name, text))
    settings = read_settings(kind, pairs)
    if (reward_of(kind) is None) != (reward is None):
        need = "takes no" if reward_of(kind) is None else "needs"
        raise InvalidInput(f"--search {search} {need} --reward, got {reward or 'none'}")
    missing = [s.name for s in settings_of(kind).values() if s.read and s.default is MISSING and s.name not in settings]
    if missing:
        raise InvalidInput(f"--search {search} needs --set {missing[0]}=...; see --help-search {search}")
    if reward is None:
        kind(**settings)  # raises now, before the model is loaded, if a value is out of range
    imported = {n: texts[n] for n, value in settings.items() if any(map(callable, _members(value)))}
    described = {n: imported.get(n, value) for n, value in settings.items()}
    code = [search] if ":" in search else []
    return ChosenSearch(kind, settings, described, [*code, *(text for some in imported.values() for text in some)])


def _members(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def show_search(search: str | None) -> None:
    """Prints what a search does and each of its settings, and ends the command."""
    if search is None:
        return
    kind, console = named(search, what="--help-search"), Terminal(markup=False, highlight=False)
    about = (kind.__doc__ or "").partition("Args:")[0]
    console.print("\n\n".join(" ".join(part.split()) for part in about.strip().split("\n\n")))
    for setting in settings_of(kind).values():
        by_option = setting.name == reward_of(kind)
        option = "--reward" if by_option else f"--set {setting.name}=..."
        value = "see generate --help" if by_option else setting.kind
        default = "required" if setting.default is MISSING else f"default {_shown(setting.default)}"
        console.print(Text(f"\n{option}", "bold").append(f"  {value}, {default}", "dim"))
        console.print(Padding(Text(setting.meaning[:1].upper() + setting.meaning[1:]), (0, 0, 0, 4)))
    raise typer.Exit


def _shown(default: Any) -> str:
    """A default as `--set` would take it; texts in quotes, so that white space is seen."""
    if isinstance(default, tuple):
        return ", ".join(map(_shown, default)) or "none"
    return str(default).lower() if isinstance(default, bool) else repr(default)
