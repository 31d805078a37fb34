"""The attention of one forward pass: where its tokens go, and who reads what."""

from typing import Any

from torch import Tensor

from forktree.model.layer_spec import append_and_attend, append_and_attend_captured
from forktree.ops.pool import KVPool
from forktree.plan.plan import AttentionPlan


class Step:
    """With plans. By layer: pools, plans."""

    def __init__(self, slots: Tensor, pools: list[KVPool], plans: list[AttentionPlan]) -> None:
        self.num_tokens = len(slots)
        self.slots = slots
        self.pools = pools
        self.plans = plans

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, window: Any, **options: Any) -> Tensor:
        # window: proved by `attach` to be the one of this layer's plan
        return append_and_attend(query, key, value, self.slots, self.pools[layer_idx], self.plans[layer_idx], **options)


class CapturedStep:
    """With the memory that plans will be in. By layer: pools, plan and slot_index, how many partials there may be."""

    def __init__(
        self, slots: Tensor, pools: list[KVPool], plans: list[tuple[Tensor, Tensor]], max_partials: list[int]
    ) -> None:
        self.num_tokens = len(slots)
        self.slots = slots
        self.pools = pools
        self.plans = plans
        self.max_partials = max_partials

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, window: Any, **options: Any) -> Tensor:
        return append_and_attend_captured(
            query,
            key,
            value,
            self.slots,
            self.pools[layer_idx],
            self.plans[layer_idx],
            max_partials=self.max_partials[layer_idx],
            **options,
        )
