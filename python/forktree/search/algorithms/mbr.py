"""Minimum Bayes risk: the sample that is most like the others."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forktree.checks import shown
from forktree.errors import InvalidInput, RewardError
from forktree.ops.sampling import Sampling
from forktree.search.algorithms.sample import SelectingSearch
from forktree.search.algorithms.vote import texts_of
from forktree.search.base import Hypothesis
from forktree.search.context import SearchContext
from forktree.search.registry import register
from forktree.search.selection import best_first
from forktree.search.steps import Walkers, check_any, complete
from forktree.types import Float64Array

Similarity = Callable[[str, str], float]


def chrf(candidate: str, reference: str, *, order: int = 6, beta: float = 2.0) -> float:
    """Character n-gram F-score (Popović 2015), in [0, 1]; spaces are left out, recall counts `beta` times as much.

    Precision and recall are means over the orders for which both texts are long enough. Equal texts have 1.
    """
    texts = ["".join(text.split()) for text in (candidate, reference)]
    if texts[0] == texts[1]:
        return 1.0
    shares = []
    for n in range(1, min(order, *map(len, texts)) + 1):
        mine, theirs = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in texts)
        common = (mine & theirs).total()
        shares.append((common / mine.total(), common / theirs.total()))
    precision, recall = np.mean(shares, axis=0) if shares else (0.0, 0.0)
    return float((1 + beta**2) * precision * recall / (beta**2 * precision + recall)) if precision + recall else 0.0


def token_f1(candidate: str, reference: str) -> float:
    """F1 of two bags of words, in [0, 1]. Texts without words have 1 if both are."""
    mine, theirs = Counter(candidate.split()), Counter(reference.split())
    both = mine.total() + theirs.total()
    return 2 * (mine & theirs).total() / both if both else 1.0


SIMILARITIES: dict[str, Similarity] = {"chrf": chrf, "token-f1": token_f1}


def expected_similarity(
    texts: Sequence[str], similarity: Similarity
) -> tuple[Float64Array, list[RewardError | None]]:
    """How similar each text is on average to all, itself included: what minimum Bayes risk takes the highest of.

    Args:
        texts: candidates, which are the references too, `[n]`.
        similarity: (candidate, reference) -> a finite number. A call that raises, or gives something else, is left out.

    Returns:
        The means, fp64 `[n]`, NaN where no call gave a number, and of each text why there is none.
    """
    known: dict[tuple[str, str], float] = {}
    errors: dict[str, RewardError] = {}
    name = getattr(similarity, "__qualname__", type(similarity).__name__)
    for a in dict.fromkeys(texts):
        for b in dict.fromkeys(texts):
            try:
                known[a, b] = float(similarity(a, b))
                if not np.isfinite(known[a, b]):
                    raise ValueError(f"it gave {known[a, b]}")
            except Exception as error:  # the function is the user's own
                known[a, b] = np.nan
                errors.setdefault(a, RewardError(f"similarity {name} raised {type(error).__name__}: {error}"))
    table = np.array([[known[a, b] for b in texts] for a in texts])
    has = ~np.isnan(table)
    with np.errstate(invalid="ignore"):
        means = np.where(has, table, 0).sum(axis=1) / has.sum(axis=1)
    return means, [errors[a] if np.isnan(mean) else None for a, mean in zip(texts, means, strict=True)]


@register("mbr")
@dataclass(frozen=True, kw_only=True)
class MinimumBayesRisk(SelectingSearch):
    """Hedged sampling and minimum Bayes risk (Khairi et al. 2025; Eikema & Aziz 2020).

    The pool is one greedy text, which hedges against bad samples, and samples at a high temperature with min-p. The
    text that is most similar to the pool on average wins, the greedy one if several are. Needs a Decoder with a
    tokenizer.

    Reconstructed: the temperature within the paper's .7 to .9, and min-p.

    Args:
        similarity: "chrf" (character n-grams), "token-f1" (words), or a function of two texts, candidate and reference;
            with one that gives 1 for equal texts and 0 for others, the most frequent text wins. It is called for all
            pairs of different texts, and for each with itself. A call that fails is left out.
        hedged: whether the first text is greedy.
    """

    num_samples: int = 5
    similarity: str | Similarity = "chrf"
    hedged: bool = True
    temperature: float = 0.8
    min_p: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.similarity) and self.similarity not in SIMILARITIES:
            expected = f"{', '.join(SIMILARITIES)} or a function of two texts"
            raise InvalidInput(f"similarity must be {expected}, got {shown(self.similarity)}")

    async def sample(self, context: SearchContext) -> Walkers:
        """The pool."""
        samples = Walkers.start(context, self.num_samples)
        first = Sampling(temperature=0) if self.hedged else self.sampling
        await complete(samples, context, self, sampling=[first, *[self.sampling] * (self.num_samples - 1)])
        return samples

    async def select(self, samples: Walkers, context: SearchContext) -> list[Hypothesis]:
        """Most similar to all first; the score is the mean similarity."""
        chosen: Any = SIMILARITIES[self.similarity] if isinstance(self.similarity, str) else self.similarity
        samples.rewards, samples.errors = expected_similarity(texts_of(samples, context), chosen)
        facts = dict(nodes=samples.node, similarities=samples.rewards, errors=samples.errors)
        context.trace.record("similarity", **facts)
        check_any(samples.errors, samples.rewards)
        return samples.hypotheses(best_first(samples.rewards), context)
