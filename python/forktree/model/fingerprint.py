"""What the verification of a model rested on: how the model is built, and the values of its weights.

It is read in one walk over the modules that looks at no weight, as torch counts the writes to every tensor. Plain
values and identities are compared. No object is kept alive; while one is, nothing else can have its identity.
"""

import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.configuration_utils import PreTrainedConfig

PLAIN = {int, float, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size}  # compared by value
_AUTOCAST_DEVICES = ("cpu", "cuda")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_READ_APART = frozenset(vars(nn.Module())) - {"training"}  # torch's own entries


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast computes in on such a device at the moment; None where it is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


class Fingerprint:
    """A model as it is now: modules, parameters, buffers, hooks, overrides of `forward`, attributes, configs, autocast.

    It does not see writes that torch does not count (through `.data`, by kernels that take an address, to inference
    tensors, to weights that wait elsewhere between forward passes), nor what is kept outside modules, as in closures.
    """

    def __init__(self, model: nn.Module) -> None:
        self._structure: list[Any] = [autocast_dtype(device) for device in _AUTOCAST_DEVICES]
        self._structure += [*torch_module._global_forward_pre_hooks, *torch_module._global_forward_hooks]
        self._writes: list[int] = []  # to each tensor so far
        self._refs: list[weakref.ref[Any]] = []
        seen, modules = {id(model)}, [model]
        for module in modules:  # goes on over those that are appended
            self._read_module(module, seen)
            for child in module._modules.values():
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    modules.append(child)

    def __eq__(self, other: object) -> bool:
        """Whether nothing has changed between the two."""
        return isinstance(other, Fingerprint) and self._writes == other._writes and self.built_like(other)

    __hash__ = object.__hash__

    def built_like(self, other: "Fingerprint") -> bool:
        """Whether nothing but values has changed, and these in place: memory and Python code are the same."""
        return self._structure == other._structure and not any(ref() is None for ref in other._refs)

    def _read_module(self, module: nn.Module, seen: set[int]) -> None:
        entries, structure = vars(module), self._structure
        self._refs.append(weakref.ref(module))
        structure += (id(module), id(type(module)))
        for name in entries.keys() - _READ_APART:  # a set of its own: other threads may add some
            value = entries.get(name)
            structure.append(name)
            if type(value) in PLAIN:
                structure.append(value)
            else:
                self._read(value, seen)
        for name in _HOOKS:
            if hooks := entries[name]:
                structure += (name, *hooks)  # their numbers: torch gives none twice
        if children := entries["_modules"]:
            structure += (*children, *map(id, children.values()))
        for tensors in (entries["_parameters"], entries["_buffers"]):
            for name, tensor in tensors.items():
                structure.append(name)
                if tensor is not None:
                    self._read_tensor(tensor)

    def _read(self, value: Any, seen: set[int]) -> None:
        structure = self._structure
        if type(value) in PLAIN:
            structure.append(value)
        elif isinstance(value, Tensor):
            self._read_tensor(value)
        elif isinstance(value, PreTrainedConfig | dict | list | tuple | set | frozenset):
            if id(value) not in seen:
                seen.add(id(value))
                items: Collection[Any] = vars(value) if isinstance(value, PreTrainedConfig) else value
                structure.append(len(items))
                for item in [*items, *items.values()] if isinstance(items, dict) else items:
                    self._read(item, seen)
        else:
            structure.append(id(value))
            if type(value).__weakrefoffset__:
                self._refs.append(weakref.ref(value))

    def _read_tensor(self, tensor: Tensor) -> None:
        kind = (tensor.dtype, tensor.device, tensor.shape)
        if tensor.is_meta:  # offloaded: another one after every forward pass
            self._structure.append(kind)
            return
        self._refs.append(weakref.ref(tensor))
        try:
            self._structure += (id(tensor), kind, tensor.stride(), tensor.data_ptr())
        except RuntimeError:  # made of other tensors
            self._structure += (id(tensor), kind)
        if not tensor.is_inference():
            self._writes.append(tensor._version)
