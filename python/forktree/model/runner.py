"""`Runner`: one model with its KV pools. Packed tokens in, hidden states out."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from forktree.device.cuda_graphs import CudaGraphs, Graphs
from forktree.errors import InvalidInput, OutOfMemory
from forktree.model.captured import CapturedSteps
from forktree.model.fingerprint import autocast_dtype
from forktree.model.head import LinearHead, OwnHead
from forktree.model.hooks import NO_PARAMETERS, LayerHook, RowParameters, Rows, check_hooks, to_device
from forktree.model.layer_spec import LayerSpec
from forktree.model.model_spec import ModelSpec
from forktree.model.positions import NO_LIMIT
from forktree.model.step import HostPlans, Step
from forktree.ops import score_logits
from forktree.ops.token_request import TokenRequest, TokenScores
from forktree.plan.layout import TreeLayout
from forktree.plan.plan import AttentionPlan

FIRST_SLOTS = 512  # of the pools of a new runner,
FIRST_BYTES = 512 << 20  # and where steps are captured, as many as these hold: growing costs the graphs
MAX_SLOTS = 2**31 - 1  # slots are int32

Integers = np.ndarray | Tensor | Sequence[int]
Plans = Mapping[LayerSpec, AttentionPlan]


class Runner:
    """A verified model and pools for the keys and values of up to `num_slots` tokens in every layer.

    The pools hold 512 slots at first (on a GPU, those that fit 512 MiB, if more), and at least twice as many whenever a
    step uses one beyond, up to `num_slots`: memory follows the highest slot in use. They grow one layer at a time, so
    that only one is ever held twice.

    Args:
        spec: what `attach` returned.
        num_slots: how many tokens the pools may hold.
        graphs: what captures steps; by default CUDA for a model on a GPU, nothing elsewhere.

    Attributes:
        spec: the model as it was verified last.
        device, dtype, hidden_size: of hidden states.
        vocab_size: token ids are below it.
        max_position: positions are below it.
        num_slots: as given.
        bytes_per_slot: keys and values of one token in all layers.
        layer_specs: the distinct specs of layers, for each of which a step has one plan.
        pools: keys and values, by layer.
    """

    def __init__(self, spec: ModelSpec, *, num_slots: int, graphs: Graphs | None = None) -> None:
        if not 1 <= num_slots <= MAX_SLOTS:
            raise InvalidInput(f"num_slots must be at least 1 and at most {MAX_SLOTS}, got {num_slots}")
        self.num_slots = num_slots
        self._start(spec, graphs)

    def renew(self, spec: ModelSpec, *, in_place: bool) -> None:
        """Goes on with the model as it is now. What the pools held is of no use any more.

        Args:
            spec: what `attach` returned of it.
            in_place: whether memory and Python code are as they were: then captured steps stay valid.
        """
        if in_place and spec.layers == self.spec.layers:
            self.spec.packed.read_buffers()
            self._describe(spec.with_packed(self.spec.packed))
        else:
            self._start(spec, self._graphs if spec.packed.device == self.device else None)

    def _start(self, spec: ModelSpec, graphs: Graphs | None) -> None:
        device = spec.packed.device
        if graphs is None and device.type == "cuda":
            graphs = CudaGraphs(device)
        first = FIRST_SLOTS if graphs is None else max(FIRST_SLOTS, FIRST_BYTES // spec.bytes_per_slot)
        pools = [layer.format.pool(min(self.num_slots, first), device) for layer in spec.layers]
        self._captured = None if graphs is None else CapturedSteps(spec, pools, graphs)
        self._graphs, self.pools = graphs, pools
        self._warn_at = spec.trained_positions  # once
        self._describe(spec)

    def _describe(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.device, self.dtype, self.hidden_size = spec.packed.device, spec.hidden_dtype, spec.hidden_size
        self.vocab_size, self.max_position = spec.vocab_size, spec.max_position
        self.bytes_per_slot = spec.bytes_per_slot
        self.layer_specs = list(dict.fromkeys(spec.layers))

    def plans(self, layout: TreeLayout) -> dict[LayerSpec, AttentionPlan]:
        """One plan for each distinct layer spec. They stay valid while nodes only grow."""
        limits = [None] * len(self.layer_specs) if self._captured is None else self._captured.max_partials
        return {
            layer: layer.plan(layout, self.device, limit) for layer, limit in zip(self.layer_specs, limits, strict=True)
        }

    def forward(
        self,
        tokens: Integers,
        positions: Integers,
        slots: Integers,
        plans: Plans,
        *,
        hooks: Sequence[LayerHook] = (),
        row_parameters: RowParameters = NO_PARAMETERS,
    ) -> Tensor:
        """Computes tokens and stores their keys and values.

        Args:
            tokens: [T] ids, in the order of the layout's rows (row_token = 0 .. T-1).
            positions: [T] of each token.
            slots: [T] where each token's keys and values go; -1: nowhere.
            plans: of a layout whose nodes contain these tokens, one for each layer spec.
            hooks: see and may change what layers compute, in this order. A step with a hook that is not `capturable`
                runs eagerly.
            row_parameters: by name, [T, ...], what hooks find in `Rows.parameters`: a value for each token, such as the
                strength of a steering vector, which is 0 for those of other branches.

        Returns:
            Post-norm hidden states [T, H].

        Raises:
            InvalidInput: if lengths differ, also from that of the plans' layout; if values on the host are out of range
                (those on a device are not looked at: that would wait for it); or if a hook returns something of another
                shape, or claims to be capturable and is not.
            UnsupportedModel: if a hook needs hidden states between layers that the model does not have.
            OutOfMemory: if the pools cannot grow.
        """
        packed = self.spec.packed
        if packed.model.training:
            raise InvalidInput(f"{self.spec.name}: expected evaluation mode, got training mode; call model.eval()")
        self._check_autocast()
        to = self._indices("slots", slots, -1, self.num_slots)
        ids = self._indices("tokens", tokens, 0, self.vocab_size)
        at = self._indices("positions", positions, 0, self.max_position, self.spec.max_position_note)
        if not isinstance(at, Tensor) and at.max(initial=0) >= self._warn_at:
            self._warn_at = NO_LIMIT
            warnings.warn(
                f"{self.spec.name}: a text has passed max_position_embeddings, which is "
                f"{self.spec.trained_positions}; the model goes on, and may get worse",
                RuntimeWarning,
                stacklevel=2,
            )
        if not len(ids) == len(at) == len(to) > 0:
            raise InvalidInput(
                "tokens, positions and slots must have one length of at least 1, got "
                f"{len(ids)}, {len(at)} and {len(to)}"
            )
        if any(plans[layer].layout.num_tokens != len(ids) for layer in self.layer_specs):
            raise InvalidInput(
                f"plans must be of a layout of {len(ids)} tokens, got {[p.layout.num_tokens for p in plans.values()]}"
            )
        parameters: dict[str, Tensor] = {}
        if hooks or row_parameters:
            check_hooks(hooks, row_parameters, self.spec.name, self.spec.residual_note)
            parameters = to_device(row_parameters, len(ids), self.device)
        self._ensure_capacity(plans[self.layer_specs[0]].layout, to)
        if self._captured is not None:
            return self._captured.forward(ids, at, to, [plans[x] for x in self.layer_specs], hooks, parameters)
        ids, at, to = (torch.as_tensor(x, dtype=torch.long, device=self.device) for x in (ids, at, to))
        host_plans = HostPlans([plans[layer] for layer in self.spec.layers])
        return packed.forward(ids, Step(Rows(at, to, parameters), self.pools, host_plans, hooks))

    def _ensure_capacity(self, layout: TreeLayout, slots: np.ndarray | Tensor) -> None:
        """Lets the pools hold every slot of a step; those on a device are in the layout as well."""
        last = layout.slot_bounds[1] if isinstance(slots, Tensor) else max(layout.slot_bounds[1], int(slots.max()))
        capacity = self.pools[-1].num_slots  # it grows last
        if last < capacity or capacity == self.num_slots:
            return
        if self._captured is not None:
            self._captured.clear()
        larger = min(max(last + 1, 2 * capacity), self.num_slots)
        try:
            self._grow(larger)
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU
            raise OutOfMemory(
                f"no memory for the KV of {larger} tokens ({self.bytes_per_slot} bytes each), up from {capacity}: "
                f"{error}; lower num_slots, which is {self.num_slots}"
            ) from error

    @torch.inference_mode(False)  # whatever mode the caller is in
    @torch.no_grad()
    def _grow(self, num_slots: int) -> None:
        for i, layer in enumerate(self.spec.layers):
            pool = layer.format.pool(num_slots, self.device)
            for new, old in zip(pool.tensors, self.pools[i].tensors, strict=True):
                new[: len(old)] = old
            self.pools[i] = pool

    @torch.no_grad()
    def score(self, hidden: Tensor, request: TokenRequest) -> TokenScores:
        """Scores the token after each of hidden [n, H] as `request` says.

        Rows that are not finite are returned as they are (see `TokenScores.check`).

        Raises:
            InvalidInput: if the model has no language-model head.
        """
        head = self._head()
        if isinstance(head, LinearHead):
            return head.score(hidden, request)
        return score_logits(self.logits(hidden), request, hidden)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V], fp32, of the token after each of hidden [n, H].

        Raises:
            InvalidInput: if the model has no language-model head.
        """
        head, rows = self._head(), hidden.shape[0]
        missing = self.spec.packed.min_rows - rows
        return head.logits(F.pad(hidden, (0, 0, 0, missing)) if missing > 0 else hidden)[:rows]

    def _check_autocast(self) -> None:
        """Under another autocast than when it was verified the model is another: other dtypes, other numbers."""
        now, then = autocast_dtype(self.device.type), self.spec.packed.autocast
        if now != then:
            raise InvalidInput(
                f"{self.spec.name}: expected autocast to be {then or 'off'} as when the model was attached, got "
                f"{now or 'off'}; make the Decoder under the autocast that it is to run under"
            )

    def _head(self) -> LinearHead | OwnHead:
        self._check_autocast()
        if self.spec.head is None:
            raise InvalidInput(f"{self.spec.name}: expected a model with a language-model head, got none")
        return self.spec.head

    def _indices(self, name: str, values: Integers, low: int, stop: int, why: str = "") -> np.ndarray | Tensor:
        if not (isinstance(values, Tensor) and values.device.type != "cpu"):
            values = np.asarray(values)
            if values.ndim != 1 or values.dtype.kind not in "iu":
                raise InvalidInput(f"{name} must be a list of integers, got {values.dtype} {values.shape}")
            if values.size and (values.min() < low or values.max() >= stop):
                raise InvalidInput(
                    f"{name} must be at least {low} and below {stop}, got {values.min()} to {values.max()}"
                    + (f"; {why}" if why else "")
                )
        return values
