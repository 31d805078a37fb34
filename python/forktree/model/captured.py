"""The steps of a runner as captured graphs: as many as there are paddings, replayed while plans change underneath.

A graph has fixed sizes and addresses. So a step is padded to one of few sizes, its inputs and plans are copied to where
the graphs read them, and partials have room for as many as any plan of the runner has.
"""

import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from forktree.device.cuda_graphs import Graphs
from forktree.device.plan_buffers import PlanBuffers
from forktree.device.staging import Staging
from forktree.model.attach import ModelSpec
from forktree.model.step import CapturedStep, Step
from forktree.ops.checks import check_fits
from forktree.ops.pool import KVPool
from forktree.plan.plan import AttentionPlan

# Tokens of captured steps. Up to 16 a matrix product takes as long as for one token; beyond, each is at most half as
# large again as the one before, as from some 180 rows on padding costs arithmetic. The last is what an engine packs.
# All are captured when first needed.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)

# Bytes of partials, one layer at a time. A partial row of every lane of an H200, 132 x 2 x 64, is 9 MB at Dv = 128.
SCRATCH = 32 << 20

Inputs = np.ndarray | Tensor


class CapturedSteps:
    """Forward passes of one model on one device. What cannot be captured runs eagerly, with one warning."""

    def __init__(self, spec: ModelSpec, pools: list[KVPool], graphs: Graphs) -> None:
        kinds = list(dict.fromkeys(spec.layers))
        self.max_partials = [kind.max_partials(SCRATCH) for kind in kinds]  # of each kind's plans
        self._checked = [(kind.num_qo_heads, kind.head_dim, spec.layers.index(kind)) for kind in kinds]
        self._spec, self._pools, self._graphs = spec, pools, graphs
        self._kind = [kinds.index(kind) for kind in spec.layers]
        self._buckets = [bucket for bucket in BUCKETS if bucket >= spec.packed.min_rows]
        self._steps: dict[int, tuple[Callable[[], None], Tensor]] = {}  # replay and result, by bucket
        device = spec.packed.device
        self._plans = PlanBuffers(device, len(kinds), graphs.mark)
        self._staging = Staging(device, graphs.mark)
        self._inputs = torch.zeros(3, BUCKETS[-1], dtype=torch.long, device=device)  # tokens, positions, slots

    def forward(self, tokens: Inputs, positions: Inputs, slots: Inputs, plans: Sequence[AttentionPlan]) -> Tensor:
        """tokens, positions, slots [T], arrays of the host or tensors of the device; plans of each kind -> [T, H]."""
        for plan, (heads, dim, layer) in zip(plans, self._checked, strict=True):  # a graph does not look
            check_fits(torch.Size((len(tokens), heads, dim)), self._pools[layer], plan)
        if self._plans.hold(plans):
            self.clear()  # they read the former memory
        count = len(tokens)
        inputs = self._upload(tokens, positions, slots)
        bucket = self._bucket(count, plans)
        if bucket is not None and self._is_captured(bucket):
            replay, hidden = self._steps[bucket]
            replay()
            return hidden[:count].clone()  # the next replay writes there
        ids, at, to = inputs[:, :count]
        return self._spec.packed.forward(ids, at, Step(to, self._pools, [plans[i] for i in self._kind]))

    def clear(self) -> None:
        """Forgets all graphs, whose addresses are no longer those of the pools or plans."""
        self._steps.clear()

    def _bucket(self, count: int, plans: Sequence[AttentionPlan]) -> int | None:
        """Tokens to pad to; None where the step is to run eagerly."""
        fits = all(plan.num_partials <= most for plan, most in zip(plans, self.max_partials, strict=True))
        i = bisect_left(self._buckets, count)
        return self._buckets[i] if fits and i < len(self._buckets) else None

    def _is_captured(self, bucket: int) -> bool:
        if bucket not in self._steps:
            try:
                self._steps[bucket] = self._graphs.capture(lambda: self._compute(bucket))
            except Exception as error:  # models fail in their own ways
                self._buckets, self._steps = [], {}
                warnings.warn(
                    f"{self._spec.name}: its steps run eagerly, as they cannot be captured: "
                    f"{type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=4,
                )
        return bucket in self._steps

    def _compute(self, bucket: int) -> Tensor:
        ids, at, to = self._inputs[:, :bucket]
        sections = self._plans.sections
        plans, caps = [sections[i] for i in self._kind], [self.max_partials[i] for i in self._kind]
        return self._spec.packed.compute(ids, at, CapturedStep(to, self._pools, plans, caps))

    @torch.inference_mode()  # as in PlanBuffers.hold
    def _upload(self, *rows: Inputs) -> Tensor:
        """The inputs, padded by tokens that are stored nowhere, in one copy; those on the device follow there."""
        count = len(rows[0])
        inputs = self._inputs if count <= self._inputs.shape[1] else self._inputs.new_empty(3, count)
        host = self._staging.write(2 * inputs.numel()).view(np.int64).reshape(inputs.shape)
        host[:2], host[2] = 0, -1
        for line, row in zip(host, rows, strict=True):
            if not isinstance(row, Tensor):
                line[:count] = row
        self._staging.send(inputs)
        for line, row in zip(inputs, rows, strict=True):
            if isinstance(row, Tensor):
                line[:count] = row
        return inputs
