"""What rewards are: what a search asks of a text, and how the engine gets the answer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from forktree.detokenise import response_text
from forktree.errors import InvalidInput, RewardError
from forktree.kv import Branch
from forktree.types import Float64Array

if TYPE_CHECKING:
    from forktree.engine.worker import ModelWorker


@dataclass(frozen=True)
class Rewards:
    """Rewards of branches.

    Args:
        values: fp64 `[n]`, NaN where `errors[i]` tells why there is none.
        errors: of each branch why it has no reward, None if it has one. `[n]`
    """

    values: Float64Array
    errors: list[RewardError | None]


@dataclass(frozen=True)
class RewardInput:
    """What is being judged: branches of the policy, and how to turn them into text.

    Args:
        worker: the policy.
        branches: what is judged, `[n]`.
        prompts: the text of each branch's prompt.
        prompt_lengths: the number of tokens of each branch's prompt.
        tokenizer: of the policy; None when the decoder has none.
    """

    worker: "ModelWorker"
    branches: Sequence[Branch]
    prompts: Sequence[str]
    prompt_lengths: Sequence[int]
    tokenizer: Any

    def responses(self) -> list[str]:
        """Text of each branch after its prompt: see `forktree.detokenise.response_text`."""
        if self.tokenizer is None:
            raise InvalidInput("this reward reads text: expected a Decoder with a tokenizer, got tokenizer=None")
        text_of: dict[bytes, Callable[[Sequence[int]], str]] = {}
        responses = []
        for branch, length in zip(self.branches, self.prompt_lengths, strict=True):
            tokens = branch.tokens
            prompt = tokens[:length]
            if (key := prompt.tobytes()) not in text_of:
                text_of[key] = response_text(self.tokenizer, prompt.tolist())
            responses.append(text_of[key](tokens[length:].tolist()))
        return responses


class PendingReward(ABC):
    """One answer that is on its way.

    Attributes:
        worker: the model whose hidden states are read; None if none are.
        branches: of that worker. The engine computes their hidden states and calls `read`.
    """

    worker: "ModelWorker | None" = None
    branches: Sequence[Branch] = ()

    @abstractmethod
    def read(self, hidden: Tensor | None) -> Rewards | None:
        """The rewards, or None if they are not ready yet.

        Args:
            hidden: the last hidden state of each of `branches`, `[n, H]`; None if there is no worker.
        """

    def close(self) -> None:
        """Releases what is held. Called exactly once, on success, error or cancellation."""
        return None


class Reward(ABC):
    """Anything that gives branches a reward."""

    @abstractmethod
    def start(self, given: RewardInput) -> PendingReward:
        """Begins to judge. Errors raised here end the search that asked."""

    def check(self, worker: "ModelWorker") -> None:
        """Raises `InvalidInput` if this reward cannot work on the model of `worker`; called before a run begins."""
        return None


def check_reward(reward: object) -> None:
    """Raises InvalidInput unless `reward` is a `forktree.Reward`."""
    if not isinstance(reward, Reward):
        raise InvalidInput(
            "reward must be a ValueHead, TokenProbability, RewardModel, FunctionReward or IdReward "
            f"(wrap a function in FunctionReward), got {type(reward).__name__}"
        )


class PendingFromHidden(PendingReward):
    """An answer that is read from hidden states.

    Args:
        worker: the model.
        branches: whose last hidden states are read.
        rewards: hidden `[n, H]` -> rewards `[n]`.
        errors: of every branch that was to be judged why it is not among `branches`, None if it is. Default: all are.
        temporary: whether `branches` are dropped when this is closed.
    """

    def __init__(
        self,
        worker: "ModelWorker",
        branches: Sequence[Branch],
        rewards: Callable[[Tensor], Tensor],
        *,
        errors: Sequence[RewardError | None] | None = None,
        temporary: bool = False,
    ) -> None:
        self.worker, self.branches = worker, branches
        self._errors = [None] * len(branches) if errors is None else errors
        self._rewards, self._temporary = rewards, temporary

    def read(self, hidden: Tensor | None) -> Rewards:
        """See `PendingReward`."""
        assert hidden is not None
        found = np.full(len(self._errors), np.nan)
        values = self._rewards(hidden).detach().to("cpu", torch.float64).numpy()
        found[[i for i, error in enumerate(self._errors) if error is None]] = values
        return Rewards(found, list(self._errors))

    def close(self) -> None:
        """See `PendingReward`."""
        if self._temporary and self.worker is not None:
            self.worker.tree.drop(self.branches)
