"""`Runner`: one model with its KV pools. Packed tokens in, hidden states out."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from forktree.device.cuda_graphs import CudaGraphs, Graphs
from forktree.errors import InvalidInput, OutOfMemory
from forktree.model.attach import ModelSpec
from forktree.model.attached import with_packed
from forktree.model.captured import CapturedSteps
from forktree.model.head import LinearHead, OwnHead
from forktree.model.interface import autocast_dtype
from forktree.model.layer_spec import LayerKind
from forktree.model.positions import NO_LIMIT
from forktree.model.step import Step
from forktree.ops import score_logits
from forktree.ops.token_request import TokenRequest, TokenScores
from forktree.plan.layout import TreeLayout
from forktree.plan.plan import AttentionPlan

FIRST_SLOTS = 512  # of the pools of a new runner,
FIRST_BYTES = 512 << 20  # and where steps are captured, as many as these hold: growing costs the graphs
MOST_SLOTS = 2**31 - 1  # slots are int32

Integers = np.ndarray | Tensor | Sequence[int]
Plans = Mapping[LayerKind, AttentionPlan]


class Runner:
    """A proved model (`attach`) and pools for the keys and values of up to `num_slots` tokens in every layer.

    The pools hold 512 slots at first (on a GPU, those that fit 512 MiB, if more), and at least twice as many whenever a
    step uses one beyond, up to `num_slots`: memory follows the highest slot in use. They grow one layer at a time, so
    that only one is ever held twice. `bytes_per_slot` is what a slot takes in all layers.
    """

    def __init__(self, spec: ModelSpec, *, num_slots: int, graphs: Graphs | None = None) -> None:
        """graphs: what captures steps; default: CUDA for a model on a GPU, nothing elsewhere."""
        if not 1 <= num_slots <= MOST_SLOTS:
            raise InvalidInput(f"num_slots must be at least 1 and at most {MOST_SLOTS}, got {num_slots}")
        self.spec = spec
        self.device, self.dtype = self.spec.packed.device, self.spec.hidden_dtype
        self.hidden_size, self.vocab_size = self.spec.hidden_size, self.spec.vocab_size
        self.max_position = self.spec.max_position
        self._warn_at = self.spec.trained_positions  # once
        self.num_slots = num_slots
        self.bytes_per_slot = spec.bytes_per_slot
        self.kinds = list(dict.fromkeys(spec.layers))
        if graphs is None and self.device.type == "cuda":
            graphs = CudaGraphs(self.device)
        self._graphs = graphs
        first = FIRST_SLOTS if graphs is None else max(FIRST_SLOTS, FIRST_BYTES // self.bytes_per_slot)
        self.pools = [kind.kv_format.pool(min(num_slots, first), self.device) for kind in self.spec.layers]
        self._captured = None if graphs is None else CapturedSteps(spec, self.pools, graphs)

    def renew(self, spec: ModelSpec, *, in_place: bool) -> None:
        """Goes on with what was proved of the model as it is now. What the pools held is of no use any more.

        in_place: whether memory and Python code are as they were: then steps that were captured stay valid.
        """
        if in_place and spec.layers == self.spec.layers:
            self.spec.packed.read_buffers()
            self.spec = with_packed(spec, self.spec.packed)
            self.vocab_size, self.max_position = spec.vocab_size, spec.max_position
        else:
            graphs = self._graphs if spec.packed.device == self.device else None
            vars(self).update(vars(Runner(spec, num_slots=self.num_slots, graphs=graphs)))

    def plans(self, layout: TreeLayout) -> dict[LayerKind, AttentionPlan]:
        """One plan for each kind of layer. They stay valid while nodes only grow."""
        caps = [None] * len(self.kinds) if self._captured is None else self._captured.max_partials
        return {kind: kind.plan(layout, self.device, cap) for kind, cap in zip(self.kinds, caps, strict=True)}

    def forward(self, tokens: Integers, positions: Integers, slots: Integers, plans: Plans) -> Tensor:
        """Computes tokens, stores their keys and values, and returns post-norm hidden states [T, H].

        tokens, positions, slots: [T] integers in the order of the layout's rows (row_token = 0 .. T-1).
        Slot -1: not stored. plans: of a layout whose nodes contain these tokens.

        Raises InvalidInput if lengths differ, also from that of the plans' layout, or if values on the host are
        out of range (those on a device are not looked at: that would wait for it); OutOfMemory if pools cannot grow.
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
        if any(plans[kind].layout.num_tokens != len(ids) for kind in self.kinds):
            raise InvalidInput(
                f"plans must be of a layout of {len(ids)} tokens, got {[p.layout.num_tokens for p in plans.values()]}"
            )
        self._make_room(plans[self.kinds[0]].layout, to)
        if self._captured is not None:
            return self._captured.forward(ids, at, to, [plans[kind] for kind in self.kinds])
        ids, at, to = (torch.as_tensor(x, dtype=torch.long, device=self.device) for x in (ids, at, to))
        return packed.forward(ids, at, Step(to, self.pools, [plans[kind] for kind in self.spec.layers]))

    def _make_room(self, layout: TreeLayout, slots: np.ndarray | Tensor) -> None:
        """Lets the pools hold every slot of a step; those on a device are in the layout as well."""
        last = layout.slot_bounds[1] if isinstance(slots, Tensor) else max(layout.slot_bounds[1], int(slots.max()))
        room = self.pools[-1].num_slots  # it grows last
        if last < room or room == self.num_slots:
            return
        if self._captured is not None:
            self._captured.clear()
        larger = min(max(last + 1, 2 * room), self.num_slots)
        try:
            self._grow(larger)
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU
            raise OutOfMemory(
                f"no memory for the KV of {larger} tokens ({self.bytes_per_slot} bytes each), up from {room}: {error}; "
                f"lower num_slots, which is {self.num_slots}"
            ) from error

    @torch.inference_mode(False)  # whatever mode the caller is in
    @torch.no_grad()
    def _grow(self, num_slots: int) -> None:
        for i, kind in enumerate(self.spec.layers):
            pool = kind.kv_format.pool(num_slots, self.device)
            for new, old in zip(pool.tensors, self.pools[i].tensors, strict=True):
                new[: len(old)] = old
            self.pools[i] = pool

    @torch.no_grad()
    def score(self, hidden: Tensor, request: TokenRequest) -> TokenScores:
        """What `request` asks of the token behind each of hidden [n, H]; rows that are not finite are given as they are
        (`TokenScores.check`). Raises InvalidInput if the model has no language-model head."""
        head = self._head()
        if isinstance(head, LinearHead):
            return head.score(hidden, request)
        return score_logits(self.logits(hidden), request, hidden)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, H] -> [n, V] fp32. Raises InvalidInput if the model has no language-model head."""
        head, rows = self._head(), hidden.shape[0]
        missing = self.spec.packed.min_rows - rows
        return head.logits(F.pad(hidden, (0, 0, 0, missing)) if missing > 0 else hidden)[:rows]

    def _check_autocast(self) -> None:
        """Under another autocast than in its proof the model is another: other dtypes, other numbers."""
        now, proved = autocast_dtype(self.device), self.spec.packed.autocast
        if now != proved:
            raise InvalidInput(
                f"{self.spec.name}: expected autocast to be {proved or 'off'} as when the model was attached, got "
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
