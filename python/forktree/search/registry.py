"""Searches by name, and their settings by name, type, default and meaning: all that a command line needs to know.

    @register("particle")
    @dataclass(frozen=True, kw_only=True)
    class ParticleFilter(StepSearch): ...

A module of `forktree.search.algorithms` is found without being listed anywhere. Settings are the fields of the
dataclass; what they mean is said in the `Args:` of its docstring, or of that of a base class.
"""

import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import reduce
from operator import or_
from typing import Any, TypeVar

from forktree.errors import InvalidInput
from forktree.imports import import_named
from forktree.rewards.base import Reward
from forktree.search.base import Search
from forktree.search.drafters import DRAFTERS
from forktree.search.speculate import Drafter

S = TypeVar("S", bound=type[Search])
_FUNCTION = typing.get_origin(Callable[..., Any])
_NAMED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:function
_SEARCHES: dict[str, type[Search]] = {}  # filled as modules are imported; see `searches`


def register(name: str) -> Callable[[S], S]:
    """Makes a search known by a name."""

    def registered(search: S) -> S:
        if _SEARCHES.setdefault(name, search).__qualname__ != search.__qualname__:
            raise ValueError(f"the name {name!r} is taken by {_SEARCHES[name].__qualname__}")
        return search

    return registered


def searches() -> dict[str, type[Search]]:
    """Every search of `forktree.search.algorithms` by name, in alphabetical order."""
    package = importlib.import_module("forktree.search.algorithms")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_SEARCHES.items()))


def named(spec: str, *, what: str = "search") -> type[Search]:
    """The search of this name, or the class that `module:Class` names.

    Args:
        spec: the name, or where the class is.
        what: the name of the argument, for messages.

    Raises:
        InvalidInput: there is no such search.
    """
    if spec in searches():
        return searches()[spec]
    if ":" not in spec:
        raise InvalidInput(f"{what} must be one of {', '.join(searches())}, or module:Class, got {spec!r}")
    found = import_named(what, spec)
    if not isinstance(found, type) or not issubclass(found, Search):
        raise InvalidInput(f"{what} {spec!r} must be a class derived from forktree.search.Search, got {found!r:.80}")
    return found


@dataclass(frozen=True)
class Setting:
    """A setting of a search as text can give it.

    Args:
        name: of the field.
        kind: what the text must be, in words.
        default: its value if it is not given; `dataclasses.MISSING` if it must be.
        meaning: its line in the docstring.
        read: text -> value; None if text cannot give it.
        several: it is a sequence, of which each text gives one member.
    """

    name: str
    kind: str
    default: Any
    meaning: str
    read: Callable[[str], Any] | None
    several: bool


def settings_of(search: type[Search]) -> dict[str, Setting]:
    """The settings of a search by name, its own before those of its bases."""
    meanings, types_ = _meanings(search), typing.get_type_hints(search)
    given = {f.name: f.default for f in fields(search)}  # type: ignore[arg-type]  # searches are dataclasses
    order = [name for one in search.__mro__ for name in inspect.get_annotations(one) if name in given]
    return {n: _setting(n, types_[n], given[n], meanings.get(n, "")) for n in dict.fromkeys(order)}


def reward_of(search: type[Search]) -> str | None:
    """The name of the setting that takes a reward, None if the search asks none."""
    return next((n for n, t in typing.get_type_hints(search).items() if t is Reward), None)


def read_settings(search: type[Search], given: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Values of settings that are given as texts.

    Args:
        search: whose settings they are.
        given: name and text of each; one that takes several may come several times.

    Raises:
        InvalidInput: there is no such setting, a text is no such value, or one comes twice.
    """
    known = settings_of(search)
    values: dict[str, Any] = {}
    for name, text in given:
        if name not in known:
            raise InvalidInput(_unknown(search, name))
        setting = known[name]
        if setting.read is None:
            raise InvalidInput(f"{name} cannot be given as a text: it is {setting.kind}, got {text!r:.80}")
        value = setting.read(text)
        if setting.several:
            values[name] = (*values.get(name, ()), value)
        elif name in values:
            raise InvalidInput(f"{name} must be given once, got {values[name]!r} and {value!r}")
        else:
            values[name] = value
    return values


def _unknown(search: type[Search], name: str) -> str:
    """What to say of a setting that a search does not have."""
    of = next((n for n, s in searches().items() if s is search), search.__name__)
    has = list(settings_of(search))
    close = get_close_matches(name, has, 1)
    belongs = [n for n, s in searches().items() if name in settings_of(s)]
    hint = f", it belongs to {' and '.join(belongs)}." if belongs else f", did you mean {close[0]}?" if close else "."
    return f"{of} has no setting {name!r}{hint} Its settings are {', '.join(has)}"


def _meanings(search: type[Search]) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each field, in one line each."""
    found: dict[str, str] = {}
    for one in reversed(search.__mro__):
        _, _, section = inspect.cleandoc(one.__doc__ or "").partition("\nArgs:\n")
        name = ""
        for line in section.splitlines():
            if line[:1].strip():
                break  # the section is over
            field, colon, text = line.strip().partition(": ")
            if colon and line.startswith("    ") and not line.startswith("     ") and field.isidentifier():
                name, found[field] = field, text
            elif name and line.strip():
                found[name] += " " + line.strip()
    return found


def _setting(name: str, hint: Any, default: Any, meaning: str) -> Setting:
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    several = origin is not None and isinstance(origin, type) and issubclass(origin, Sequence)
    kind, read = _reader(name, members[0] if several else hint)
    return Setting(name, f"{kind}, any number of times" if several else kind, default, meaning, read, several)


def _reader(name: str, hint: Any) -> tuple[str, Callable[[str], Any] | None]:
    """What a text must be to give a value of this type, in words, and the function that reads it."""
    if hint is Reward:
        return "a reward", None
    if hint == Drafter | None:
        kind = f"{', '.join(DRAFTERS)} or module:drafter"
        return kind, lambda text: DRAFTERS[text]() if text in DRAFTERS else import_named(name, text, expected=kind)
    if hint is str:
        return "text", str
    if hint is int or hint is float:
        kind = "an integer" if hint is int else "a number"
        return kind, lambda text: _number(name, hint, kind, text)
    if hint is bool:
        return "true or false", lambda text: _bool(name, text)
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and set(typing.get_args(hint)) == {bool, str}:
        return "true, false or text", lambda text: {"true": True, "false": False}.get(text.lower(), text)
    members = [one for one in typing.get_args(hint) if one is not type(None)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) in typing.get_args(hint):
        kind, read = _reader(name, reduce(or_, members))
        if read is not None:
            return f"{kind}, or none", lambda text: None if text.lower() == "none" else read(text)
    if typing.get_origin(hint) is _FUNCTION:
        return "module:function", lambda text: import_named(name, text)
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and {
        typing.get_origin(one) or one for one in typing.get_args(hint)
    } == {str, _FUNCTION}:
        return "text or module:function", lambda text: import_named(name, text) if _NAMED.fullmatch(text) else text
    return f"of type {hint}", None


def _number(name: str, kind: type, words: str, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise InvalidInput(f"{name} must be {words}, got {text!r:.80}") from None


def _bool(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise InvalidInput(f"{name} must be true or false, got {text!r:.80}")
    return text.lower() == "true"
