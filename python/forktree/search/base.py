"""What every search is, and what it returns."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from forktree.errors import RewardError
from forktree.ops.sampling import Sampling
from forktree.rewards.base import Reward
from forktree.search.context import SearchContext
from forktree.search.processors import Processor, check_processors
from forktree.search.speculate import Drafter, check_drafter
from forktree.search.validation import check_texts
from forktree.types import Int32Array


@dataclass(frozen=True)
class Hypothesis:
    """One finished text.

    Args:
        token_ids: tokens after the prompt, EOS not included. int32.
        score: what the search ranks by (higher is better).
        log_prob: sum of token log-probs under the model, EOS included.
        finish_reason: "eos", "stop" or "length".
        step_rewards: the reward after each step, if the search has steps.
        weight: normalised weight among its siblings, if the search weights them.
        error: why there is no reward.
    """

    token_ids: Int32Array
    score: float
    log_prob: float
    finish_reason: str
    step_rewards: list[float] = field(default_factory=list)
    weight: float | None = None
    error: RewardError | None = None


class Search(ABC):
    """A search algorithm with its settings: subclasses are frozen dataclasses."""

    @abstractmethod
    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """Searches one prompt; hypotheses come best first."""

    @property
    def rewards(self) -> Sequence[Reward]:
        """The rewards that it asks for; they are checked against the model before a run begins."""
        return ()


@dataclass(frozen=True, kw_only=True)
class ExtendingSearch(Search):
    """A search that extends branches token by token, each at the probabilities of `sampling`.

    Args:
        stop: texts that end a hypothesis; they stay part of it.
        logits_processor: functions that change the logits before a token is sampled, see
            `forktree.search.processors`.
        drafter: guesses tokens that are then verified together, see `forktree.search.speculate`; texts stay the same.
    """

    stop: tuple[str, ...] = ()
    logits_processor: Sequence[Processor] = ()
    drafter: Drafter | None = None

    def __post_init__(self) -> None:
        check_texts("stop", self.stop)
        check_processors("logits_processor", self.logits_processor)
        check_drafter(self.drafter)

    @property
    @abstractmethod
    def sampling(self) -> Sampling:
        """How tokens are sampled."""


@dataclass(frozen=True, kw_only=True)
class SamplingSearch(ExtendingSearch):
    """A search that samples tokens.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_k: keeps the k most likely tokens; 0 keeps all.
        top_p: keeps the most likely tokens up to this mass of probability.
        min_p: keeps tokens at least this likely, relative to the most likely one.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        _ = self.sampling  # raises if one is out of range
        super().__post_init__()

    @property
    def sampling(self) -> Sampling:
        """How tokens are sampled."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p)
