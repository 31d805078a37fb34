"""How many positions a model has: where it really ends, whatever its config says."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NO_LIMIT = 2**31 - 1  # positions are int32


class PositionTables(TorchDispatchMode):
    """Within, sees which tables a forward pass looks up by position.

    Args:
        positions: [T] of the pass. Their values must tell them from other indices: neither ascending nor token ids.

    Attributes:
        limit: positions that the smallest of the tables has.
    """

    def __init__(self, positions: Tensor) -> None:
        super().__init__()
        self.limit = NO_LIMIT
        self._positions = positions

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        lookup = _lookup(operation, args)
        if lookup is not None:
            rows, index = lookup
            if index.numel() and index.numel() % len(self._positions) == 0 and not index.dtype.is_floating_point:
                shift = index.reshape(len(self._positions), -1) - self._positions[:, None]
                if bool((shift == shift[0, 0]).all()):
                    self.limit = min(self.limit, rows - int(shift[0, 0]))
        return operation(*args, **(kwargs or {}))


def _lookup(operation: Any, args: Any) -> tuple[int, Tensor] | None:
    """Rows of the table that an operation looks up, and the indices."""
    aten = torch.ops.aten
    if operation is aten.embedding.default:
        return args[0].shape[0], args[1]
    if operation in (aten.index_select.default, aten.gather.default):
        return args[0].shape[args[1]], args[2]
    if operation is aten.index.Tensor and args[1][0] is not None and all(x is None for x in args[1][1:]):
        return args[0].shape[0], args[1][0]
    return None


def find_max_position(config: Any, tables: PositionTables) -> tuple[int, str]:
    """How many positions a model with this text config has, and why.

    RoPE computes every position; `max_position_embeddings` is then what the model was trained for. The types `dynamic`
    and `longrope` choose their frequencies by the largest position of the whole packed row: beyond the original length,
    one long sequence would change all others.
    """
    limit, note = tables.limit, f"the model looks positions up in a table of {tables.limit}"
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *rope.values()]:  # one dict, or one for each type of layer
        if isinstance(parameters, dict) and parameters.get("rope_type") in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings") or trained_positions(config)
            if original <= limit:
                limit = original
                note = (
                    f"{parameters['rope_type']} RoPE changes for the whole batch beyond "
                    f"original_max_position_embeddings, which is {original}"
                )
    return (limit, note) if limit < NO_LIMIT else (limit, "the model has no limit but int32")


def trained_positions(config: Any) -> int:
    """What the config names as the longest text of the model's training."""
    return getattr(config, "max_position_embeddings", None) or NO_LIMIT
