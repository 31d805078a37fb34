"""`Replica`: a model with the same weights and another attention, while nothing of the model itself is written.

Layers read the name of their attention from the config they were built with. So every config is copied, and with it
every module that carries one, and the modules above those. All other modules (linear layers, norms, embeddings,
adapters) are the model's own, as are the parameters and hooks of copied ones: both see what is done to them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from forktree.model.fingerprint import PLAIN

# A copy shares torch's own entries with its original, hooks and parameters among them, but for these.
_SHARED = frozenset(vars(nn.Module())) - {"_modules", "_buffers"}


class Replica:
    """Copies of the modules of a model that carry a config.

    Args:
        model: the original.
        implementation: the attention that the copies use.

    Attributes:
        root: the copy of the model.
    """

    def __init__(self, model: nn.Module, implementation: str) -> None:
        self._implementation = implementation
        self._copies: dict[int, Any] = {}  # of modules and configs, by the id of the original
        self._originals = list(_carriers(model))
        for module in self._originals:
            self._copies[id(module)] = object.__new__(type(module))
        for module in self._originals:
            copy = self._copies[id(module)]
            for name, value in list(vars(module).items()):  # at once: other threads may add some
                vars(copy)[name] = value if name in _SHARED else self._rebound(value)
            vars(copy).update(
                _modules={name: self._copies.get(id(child), child) for name, child in module._modules.items()},
                # some RoPE writes its frequencies in every forward
                _buffers={name: None if b is None else b.clone() for name, b in module._buffers.items()},
                _compiled_call_impl=None,  # it would run the original
            )
        self.root: Any = self._copies[id(model)]

    def read_buffers(self) -> None:
        """Copies what was written into buffers of the originals."""
        for module in self._originals:
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    self._copies[id(module)]._buffers[name].copy_(buffer)

    def _rebound(self, value: Any) -> Any:
        """The same, with copies in the place of their originals; `value` itself where it holds none of them.

        Looks into what overrides of `forward` are made of: bound methods, partial functions, closures.
        """
        kind = type(value)
        if kind in PLAIN:
            return value
        if (copy := self._copies.get(id(value))) is not None:
            return copy
        if isinstance(value, PreTrainedConfig):
            twin = self._copies[id(value)] = object.__new__(type(value))
            vars(twin).update({name: self._rebound(x) for name, x in list(vars(value).items())})
            vars(twin)["_attn_implementation_internal"] = self._implementation
            return twin
        if kind is FunctionType and "_torchdynamo_orig_callable" in vars(value):
            return self._rebound(value._torchdynamo_orig_callable)  # compiled, for the original alone
        make: Callable[[list[Any]], Any]
        if kind in (list, tuple):
            parts, make = list(value), kind
        elif kind is dict:
            parts, make = list(value.values()), lambda new: dict(zip(value, new, strict=True))
        elif kind is MethodType:
            parts, make = [value.__func__, value.__self__], lambda new: MethodType(*new)
        elif kind is partial:
            parts = [value.func, value.args, value.keywords]
            make = lambda new: _dressed(partial(new[0], *new[1], **new[2]), value)  # noqa: E731
        elif kind is FunctionType and (value.__closure__ or value.__defaults__ or value.__kwdefaults__):
            cells = value.__closure__ or ()
            parts = [value.__defaults__, value.__kwdefaults__, *map(_content, cells)]

            def make(new: list[Any]) -> Any:
                closure = tuple(c if x is y else CellType(y) for c, x, y in zip(cells, parts[2:], new[2:], strict=True))
                function = FunctionType(value.__code__, value.__globals__, value.__name__, new[0], closure)
                function.__kwdefaults__ = new[1]
                return _dressed(function, value)
        else:
            return value
        self._copies[id(value)] = value  # a function may hold itself
        new = [self._rebound(part) for part in parts]
        del self._copies[id(value)]
        return value if all(x is y for x, y in zip(parts, new, strict=True)) else make(new)


def _carriers(module: nn.Module) -> Iterator[nn.Module]:
    """Modules that carry a config, and those above them; the model itself in any case."""
    carries: dict[nn.Module, bool] = {}

    def visit(module: nn.Module) -> bool:
        if module not in carries:
            carries[module] = False  # while it is visited
            below = [visit(child) for child in module._modules.values() if child is not None]
            carries[module] = any(below) or any(isinstance(x, PreTrainedConfig) for x in list(vars(module).values()))
        return carries[module]

    visit(module)
    carries[module] = True
    return (module for module, does in carries.items() if does)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _dressed(new: Any, old: Any) -> Any:
    vars(new).update(vars(old))
    return new
