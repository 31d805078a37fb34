"""The modules of a decoder's layers: how they are found, and how their outputs are seen within one forward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


def find_decoder_layers(decoder: nn.Module, num_layers: int) -> list[nn.Module]:
    """The modules that compute one layer each, in order: entries of a list, each around the attention of its layer.

    Args:
        decoder: a transformers decoder, whose attention modules carry a `layer_idx`.
        num_layers: how many layers it has.

    Raises:
        LookupError: if there is no such list, or more than one.
    """
    found = {
        name: list(module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList)
        and [_layer_indices(entry) for entry in module] == [{i} for i in range(num_layers)]
    }
    if len(found) != 1:
        raise LookupError(
            f"expected one list of {num_layers} modules, each around the attention of its layer, got "
            f"{' and '.join(found) or 'none'}"
        )
    return next(iter(found.values()))


def _layer_indices(module: nn.Module) -> set[int]:
    return {index for part in module.modules() if isinstance(index := getattr(part, "layer_idx", None), int)}


@contextmanager
def watched(modules: Sequence[nn.Module], see: Callable[[int, Any], Any]) -> Iterator[None]:
    """Within, `see(i, output)` is called with what the i-th module returns; what it returns takes its place, but None.

    It comes after the modules' own forward hooks. Those of a replica are shared with the model's: they are not touched.
    """
    before = [module._forward_hooks for module in modules]
    try:
        for i, module in enumerate(modules):
            vars(module)["_forward_hooks"] = module._forward_hooks.copy()
            module.register_forward_hook(lambda _module, _args, output, i=i: see(i, output))
        yield
    finally:
        for module, hooks in zip(modules, before, strict=True):
            vars(module)["_forward_hooks"] = hooks


def hidden_of(output: Any) -> Any:
    """The hidden state [1, rows, H] in what a decoder layer returns: a tensor, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output
