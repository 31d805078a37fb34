"""Rewards that a Python function of token ids gives."""

from collections.abc import Callable, Sequence
from typing import Any

from forktree.rewards.base import RewardInput
from forktree.rewards.function import CallingReward


class IdReward(CallingReward):
    """Any Python function of token ids, for what is not text, such as audio codes; the decoder needs no tokenizer.

    It is called as `FunctionReward` calls a function of the text, and fails in the same way: for its branch only.

    Args:
        function: `(prompt_ids, ids) -> float` of two lists of integers, EOS not included: of the prompt, and of what
            comes after it.
        time_limit: maximum number of seconds for a call.
    """

    def __init__(self, function: Callable[[Sequence[int], Sequence[int]], float], *, time_limit: float = 60.0) -> None:
        super().__init__(function, time_limit=time_limit)

    def arguments(self, given: RewardInput) -> list[tuple[Any, ...]]:
        """Ids of the prompt, and of what comes after it."""
        each = zip((b.tokens.tolist() for b in given.branches), given.prompt_lengths, strict=True)
        return [(ids[:length], ids[length:]) for ids, length in each]
