"""`CapturedSteps`: the steps of a runner as captured graphs, replayed while the plans in their memory change.

A graph has fixed sizes and addresses. So a step is padded to one of few sizes, its inputs and plans are copied to where
the graphs read them, and there is memory for as many partials as any plan of the runner may have.
"""

import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from forktree.device.cuda_graphs import Graphs
from forktree.device.plan_buffers import PlanBuffers
from forktree.device.staging import Staging
from forktree.errors import InvalidInput
from forktree.model.hooks import LayerHook, Rows
from forktree.model.model_spec import ModelSpec
from forktree.model.step import DevicePlans, HostPlans, Step
from forktree.ops import KVPool
from forktree.ops.checks import check_fits
from forktree.plan.plan import AttentionPlan

# Tokens of captured steps. Up to 16 a matrix product takes as long as for one token; beyond, each is at most half as
# large again as the one before, as from some 180 rows on padding costs arithmetic. The last is what an engine packs.
# All are captured when first needed.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)

# Bytes of partials, one layer at a time. A partial row of every lane of an H200, 132 x 2 x 64, is 9 MB at Dv = 128.
SCRATCH = 32 << 20

Inputs = np.ndarray | Tensor


@dataclass
class _Graphs:
    """Graphs of steps with the same hooks.

    Attributes:
        hooks: that were captured.
        parameters: memory of what the hooks find in `Rows.parameters`, [BUCKETS[-1], ...] each.
        by_bucket: replay and result, by the number of tokens.
    """

    hooks: tuple[LayerHook, ...] = ()
    parameters: dict[str, Tensor] = field(default_factory=dict)
    by_bucket: dict[int, tuple[Callable[[], None], Tensor]] = field(default_factory=dict)

    def serves(self, hooks: Sequence[LayerHook], parameters: Mapping[str, Tensor]) -> bool:
        """Whether the graphs are of these very hooks, and have memory for such parameters."""
        kinds = ({name: (x.shape[1:], x.dtype) for name, x in p.items()} for p in (parameters, self.parameters))
        return [*map(id, hooks)] == [*map(id, self.hooks)] and next(kinds) == next(kinds)


class CapturedSteps:
    """Forward passes of one model on one device. Steps that cannot be captured run eagerly, with one warning.

    Graphs are kept for steps without hooks, and for the hooks of the last step that had some.

    Args:
        spec: the model.
        pools: of each layer. After one of them has moved, `clear` must be called.
        graphs: what captures.
    """

    def __init__(self, spec: ModelSpec, pools: list[KVPool], graphs: Graphs) -> None:
        distinct = list(dict.fromkeys(spec.layers))
        self.max_partials = [layer.max_partials(SCRATCH) for layer in distinct]  # of the plans of each spec
        self._checked = [(layer.num_qo_heads, layer.format.k_dim, spec.layers.index(layer)) for layer in distinct]
        self._spec, self._pools, self._capturer = spec, pools, graphs
        self._plan_of = [distinct.index(layer) for layer in spec.layers]
        self._buckets = [bucket for bucket in BUCKETS if bucket >= spec.packed.min_rows]
        self._plain, self._hooked = _Graphs(), _Graphs()
        device = spec.packed.device
        self._plans = PlanBuffers(device, len(distinct), graphs.record_event)
        self._staging = Staging(device, graphs.record_event)
        self._inputs = torch.zeros(3, BUCKETS[-1], dtype=torch.long, device=device)  # tokens, positions, slots

    def forward(
        self,
        tokens: Inputs,
        positions: Inputs,
        slots: Inputs,
        plans: Sequence[AttentionPlan],
        hooks: Sequence[LayerHook] = (),
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Computes a step.

        Args:
            tokens: [T] ids, an array of the host or a tensor of the device, as the next two.
            positions: [T].
            slots: [T].
            plans: one of each distinct layer spec.
            hooks: see `Runner.forward`.
            parameters: of the hooks, [T, ...] on the device.

        Returns:
            Hidden states [T, H].
        """
        for plan, (heads, dim, layer) in zip(plans, self._checked, strict=True):  # a graph does not look
            check_fits(torch.Size((len(tokens), heads, dim)), self._pools[layer], plan)
        if self._plans.upload(plans):
            self.clear()  # they read the former memory
        count, parameters = len(tokens), parameters or {}
        inputs = self._upload(tokens, positions, slots)
        bucket = self._bucket(count, plans) if all(hook.capturable for hook in hooks) else None
        if bucket is not None:
            graphs = self._graphs_of(hooks, parameters, count) if hooks else self._plain
            if self._is_captured(bucket, graphs):
                replay, hidden = graphs.by_bucket[bucket]
                replay()
                return hidden[:count].clone()  # the next replay writes there
        ids, at, to = inputs[:, :count]
        host_plans = HostPlans([plans[i] for i in self._plan_of])
        return self._spec.packed.forward(ids, Step(Rows(at, to, parameters), self._pools, host_plans, hooks))

    def clear(self) -> None:
        """Forgets all graphs, whose addresses are no longer those of the pools or plans."""
        for graphs in (self._plain, self._hooked):
            graphs.by_bucket.clear()

    def _bucket(self, count: int, plans: Sequence[AttentionPlan]) -> int | None:
        """Tokens to pad to; None where the step is to run eagerly."""
        fits = all(plan.num_partials <= limit for plan, limit in zip(plans, self.max_partials, strict=True))
        i = bisect_left(self._buckets, count)
        return self._buckets[i] if fits and i < len(self._buckets) else None

    @torch.inference_mode()  # as in PlanBuffers.upload
    def _graphs_of(self, hooks: Sequence[LayerHook], parameters: Mapping[str, Tensor], count: int) -> _Graphs:
        """The graphs of such steps; parameters [count, ...] are where these read them."""
        if not self._hooked.serves(hooks, parameters):
            rows = {name: x.new_zeros(BUCKETS[-1], *x.shape[1:]) for name, x in parameters.items()}
            self._hooked = _Graphs(tuple(hooks), rows)
        for name, memory in self._hooked.parameters.items():
            memory[:count] = parameters[name]
            memory[count:] = 0
        return self._hooked

    def _is_captured(self, bucket: int, graphs: _Graphs) -> bool:
        if bucket in graphs.by_bucket:
            return True
        try:
            graphs.by_bucket[bucket] = self._capturer.capture(lambda: self._compute(bucket, graphs))
            return True
        except Exception as error:  # models fail in their own ways
            if graphs.hooks and self._is_captured(bucket, self._plain):  # so it is not the model
                names = ", ".join(type(hook).__name__ for hook in graphs.hooks)
                raise InvalidInput(
                    f"{self._spec.name}: expected hooks that can be captured, as their capturable = True says, got "
                    f"{type(error).__name__} from {names}: {error}; with capturable = False steps run eagerly"
                ) from error
            if self._buckets:
                self._buckets = []
                self.clear()
                warnings.warn(
                    f"{self._spec.name}: its steps run eagerly, as they cannot be captured: "
                    f"{type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=4,
                )
            return False

    def _compute(self, bucket: int, graphs: _Graphs) -> Tensor:
        ids, at, to = self._inputs[:, :bucket]
        sections = self._plans.sections
        plans = DevicePlans([sections[i] for i in self._plan_of], [self.max_partials[i] for i in self._plan_of])
        parameters = {name: memory[:bucket] for name, memory in graphs.parameters.items()}
        return self._spec.packed.compute(ids, Step(Rows(at, to, parameters), self._pools, plans, graphs.hooks))

    @torch.inference_mode()  # as in PlanBuffers.upload
    def _upload(self, *rows: Inputs) -> Tensor:
        """The inputs, padded by tokens that are stored nowhere, in one copy; those on the device follow there."""
        count = len(rows[0])
        inputs = self._inputs if count <= self._inputs.shape[1] else self._inputs.new_empty(3, count)
        host = self._staging.next_host_buffer(2 * inputs.numel()).view(np.int64).reshape(inputs.shape)
        host[:2], host[2] = 0, -1
        for line, row in zip(host, rows, strict=True):
            if not isinstance(row, Tensor):
                line[:count] = row
        self._staging.upload(inputs)
        for line, row in zip(inputs, rows, strict=True):
            if isinstance(row, Tensor):
                line[:count] = row
        return inputs
