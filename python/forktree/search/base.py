"""What a search is and what it returns."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from forktree.errors import InvalidInput, ScorerError
from forktree.ops.sampling import Sampling
from forktree.search.context import SearchContext
from forktree.search.processors import Processor, check_processors
from forktree.types import Int32Array


@dataclass(frozen=True)
class Hypothesis:
    """One finished text.

    token_ids: tokens behind the prompt, EOS not included. int32.
    score: what the search ranks by (higher is better).
    log_prob: sum of token log-probs under the model, EOS included.
    finish_reason: "eos", "stop" or "length".
    step_scores: the scorer's reward after each step, if the search has steps.
    weight: normalised weight among its siblings, if the search weights them.
    error: why the scorer could not judge it.
    """

    token_ids: Int32Array
    score: float
    log_prob: float
    finish_reason: str
    step_scores: list[float] = field(default_factory=list)
    weight: float | None = None
    error: ScorerError | None = None


class Search(ABC):
    """A search algorithm with its settings: subclasses are frozen dataclasses."""

    @abstractmethod
    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """Searches one prompt; hypotheses come best first."""

    @property
    def scorers(self) -> Sequence[Any]:
        """Scorers it asks; checked against the model before a run begins."""
        return ()


@dataclass(frozen=True, kw_only=True)
class SamplingSearch(Search):
    """A search that draws tokens.

    temperature, top_k, top_p, min_p: see `Sampling`. stop: texts that end a hypothesis (they stay part of
    it); a search with steps looks for them within a step. logits_processor: see `forktree.search.processors`.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    logits_processor: Sequence[Processor] = ()

    def __post_init__(self) -> None:
        Sampling(self.temperature, self.top_k, self.top_p, self.min_p)  # raises if one is out of range
        several_texts("stop", self.stop)
        check_processors("logits_processor", self.logits_processor)

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p)


def first_failure(errors: Sequence[ScorerError | None]) -> ScorerError:
    """What to raise when no branch has a score left."""
    return ScorerError(f"no branch has a score left; the first failure: {next(filter(None, errors))}")


def several_texts(name: str, value: object) -> None:
    """Raises unless `value` is a sequence of texts; a single text would be taken for its characters."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        raise InvalidInput(f"{name} must be a tuple of texts, got {value!r}")


def needs_scorer(scorer: object) -> None:
    """Raises unless `scorer` is a `forktree.Scorer`."""
    from forktree.rewards.scoring import Scorer

    if not isinstance(scorer, Scorer):
        raise InvalidInput(
            "scorer must be a ValueHead, TokenLogits, RewardModel or TextScorer "
            f"(wrap a function in TextScorer), got {type(scorer).__name__}"
        )
