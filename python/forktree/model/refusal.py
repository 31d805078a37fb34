"""`Refusal`: why `attach` does not take a model."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Refusal(Exception):
    """What was expected, what was found, and what to do; `attach` puts the model type in front."""


@contextmanager
def refusing(model: nn.Module, expected: str, otherwise: str, calls: list[int] | None = None) -> Iterator[None]:
    """Turns whatever is raised within into a refusal, which names the innermost of the model's modules that raised it.

    Models that are not what they are taken for fail in ways of their own.

    Args:
        model: whose modules are named.
        expected: what should have happened.
        otherwise: what to do instead.
        calls: layers that have called attention so far, if any should have.
    """
    try:
        yield
    except (Refusal, torch.OutOfMemoryError):  # the latter says nothing about the model
        raise
    except Exception as error:
        what = next(iter(str(error).splitlines()), "")
        owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        names = {id(module): name for name, module in model.named_modules() if name}
        where = next((f" in {names[id(owner)]}" for owner in reversed(owners) if id(owner) in names), "")
        if calls == []:
            where += " before any layer called transformers' attention function"
        raise Refusal(f"expected {expected}, got {type(error).__name__}{where}: {what}; {otherwise}") from error
