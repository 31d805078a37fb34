"""What `module:name` names."""

import contextlib
import importlib
import os
import sys
import traceback
from typing import Any

from forktree.errors import InvalidInput


def import_named(what: str, spec: str, *, expected: str = "module:name") -> Any:
    """Imports what `module:name` names; modules of the current directory come first, as with `python -m`.

    Args:
        what: the name of the argument, for messages.
        spec: the module and the name in it.
        expected: what it may be, for messages.

    Raises:
        InvalidInput: it is not of that form, the module cannot be imported, or has no such name.
    """
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        raise InvalidInput(f"{what} must be {expected}, got {spec!r}")
    directory = os.getcwd()
    sys.path.insert(0, directory)  # only during the import: no file here is to hide a module that others import later
    try:
        imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise InvalidInput(f"{what} {spec!r}: cannot import {module!r}: {_where(error)}") from None
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(directory)
    if not hasattr(imported, name):
        raise InvalidInput(f"{what} {spec!r}: module {module!r} has no {name!r}")
    return getattr(imported, name)


def _where(error: BaseException) -> str:
    """An error that an import raised, with the file and line of the imported code that it comes from."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: SyntaxError: {error.msg}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename][1:]
    return "".join(f"{f.filename}, line {f.lineno}: " for f in frames[-1:]) + f"{type(error).__name__}: {error}"
