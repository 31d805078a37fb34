"""`Step`: the attention of one forward pass, called once by every layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from forktree.errors import InvalidInput
from forktree.model.decoder_layers import hidden_of
from forktree.model.hooks import LayerHook, Rows, overrides
from forktree.model.layer_spec import append_and_attend, append_and_attend_captured
from forktree.ops import AttentionOptions, KVPool
from forktree.plan.plan import AttentionPlan

Inspect = Callable[[int, Tensor, Tensor, Tensor, Any], None]


class PlanSource(Protocol):
    """Where a step finds the plan of each layer."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slots: Tensor,
        pool: KVPool,
        options: AttentionOptions,
    ) -> Tensor:
        """Stores key [T, Hk, Dk] and value [T, Hk, Dv], then attends from query [T, Hq, Dk].

        Storing comes first, at slots [T] of the pool, so that the tokens of a step see each other.

        Returns:
            What the heads find, [T, Hq, Dv].
        """
        ...


@dataclass(frozen=True)
class HostPlans:
    """Plans as they were made, by layer: those of an eager step."""

    by_layer: Sequence[AttentionPlan] | Mapping[int, AttentionPlan]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slots: Tensor,
        pool: KVPool,
        options: AttentionOptions,
    ) -> Tensor:
        """See `PlanSource.attend`."""
        return append_and_attend(query, key, value, slots, pool, self.by_layer[layer], options)


@dataclass(frozen=True)
class DevicePlans:
    """Device memory that is filled with plans before each replay: that of a captured step.

    Attributes:
        by_layer: plan and slot_index, int32, of each layer.
        max_partials: of each layer, how many partials its plans may have.
    """

    by_layer: Sequence[tuple[Tensor, Tensor]]
    max_partials: Sequence[int]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slots: Tensor,
        pool: KVPool,
        options: AttentionOptions,
    ) -> Tensor:
        """See `PlanSource.attend`."""
        plan, limit = self.by_layer[layer], self.max_partials[layer]
        return append_and_attend_captured(query, key, value, slots, pool, plan, options, max_partials=limit)


class Step:
    """Eager, captured and verification passes differ in where plans come from, and in who looks on.

    Args:
        rows: positions, slots and parameters of the tokens.
        pools: of each layer.
        plans: where the plan of each layer is found.
        hooks: asked in turn, each with what the one before it left.
        inspect: called first, with what a layer passes: its index, query, key, value, and its `Window` or what a model
            that makes its own masks passes instead. `attach` verifies there what later steps rely on.
    """

    def __init__(
        self,
        rows: Rows,
        pools: Sequence[KVPool] | Mapping[int, KVPool],
        plans: PlanSource,
        hooks: Sequence[LayerHook] = (),
        inspect: Inspect | None = None,
    ) -> None:
        self.rows = rows
        self.num_tokens = len(rows.slots)
        self.sees_residual = any(overrides(hook, "residual") for hook in hooks)
        self._pools = pools
        self._plans = plans
        self._hooks = hooks
        self._inspect = inspect

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: Any,
        options: AttentionOptions,
    ) -> Tensor:
        """Takes query [T, Hq, Dk], key [T, Hk, Dk] and value [T, Hk, Dv], rotated already; returns [T, Hq, Dv]."""
        if self._inspect is not None:
            self._inspect(layer, query, key, value, window)
        for hook in self._hooks:
            changed = hook.before_attend(layer, query, key, value, self.rows)
            if changed is not None:
                query, key, value = _replaced(hook, "before_attend", layer, (query, key, value), tuple(changed))
        out = self._plans.attend(layer, query, key, value, self.rows.slots, self._pools[layer], options)
        for hook in self._hooks:
            found = hook.after_attend(layer, out, self.rows)
            if found is not None:
                (out,) = _replaced(hook, "after_attend", layer, (out,), (found,))
        return out

    def residual(self, layer: int, output: Any) -> Any:
        """Shows hooks the hidden state in what a decoder layer returns.

        Returns:
            The output with their hidden state in its place; None if none of them gave one.
        """
        padded = hidden_of(output)
        hidden = before = padded[0, : self.num_tokens]
        for hook in self._hooks:
            found = hook.residual(layer, hidden, self.rows)
            if found is not None:
                (hidden,) = _replaced(hook, "residual", layer, (hidden,), (found,))
        if hidden is before:
            return None
        padded = torch.cat([hidden, padded[0, self.num_tokens :]])[None]
        return (padded, *output[1:]) if isinstance(output, tuple) else padded


def _replaced(
    hook: LayerHook, method: str, layer: int, old: tuple[Tensor, ...], new: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """new, if it can take the place of old."""
    expected, got = ([_kind(x) for x in tensors] for tensors in (old, new))
    if got != expected:
        raise InvalidInput(
            f"{type(hook).__name__}.{method} must return {' and '.join(expected)}, or None, for layer {layer}, got "
            f"{' and '.join(got)}"
        )
    return new


def _kind(x: Any) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
