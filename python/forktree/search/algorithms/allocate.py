"""Compute-optimal allocation: which search a prompt gets depends on how hard it looks (Snell et al. 2024, section 3.2).

    edges, best = fit_table(difficulty, accuracy)  # of a validation set; one column of accuracy for each search
    search = ComputeOptimal(reward=prm, searches=[candidates[i] for i in best], edges=edges)

The other half of the paper's choice, between revising and sampling side by side, is one of two such searches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forktree.checks import integer, number, shown
from forktree.errors import InvalidInput
from forktree.rewards.base import Reward, check_reward
from forktree.search.base import Hypothesis, SamplingSearch, Search
from forktree.search.context import SearchContext
from forktree.search.selection import best_first
from forktree.search.steps import Walkers, complete, judged
from forktree.types import Float64Array, Int64Array


def difficulty_bin(difficulty: float, edges: Sequence[float]) -> int:
    """The bin from 0, the hardest, to `len(edges)`, the easiest; an edge belongs to the bin above it."""
    return int(np.searchsorted(edges, difficulty, side="right"))


def fit_table(difficulty: Float64Array, accuracy: Float64Array, bins: int = 5) -> tuple[Float64Array, Int64Array]:
    """The edges of equally full bins of difficulty, and the best search for each.

    Args:
        difficulty: of each of P validation prompts its mean reward, or the share of its samples that are right; high is
            easy. `[P]`
        accuracy: how well each of S searches does on each prompt, all at the same number of tokens, `[P, S]`.
        bins: number of bins; 5 in the paper.

    Returns:
        Edges `[bins - 1]`, ascending, and the column of `accuracy` with the best mean in each bin, `[bins]`: the best
        over all prompts where a bin is empty, and the first of equally good ones.
    """
    edges = np.quantile(difficulty, np.arange(1, bins) / bins)
    of = np.searchsorted(edges, difficulty, side="right")
    some = [accuracy[of == b] if (of == b).any() else accuracy for b in range(bins)]
    return edges, np.array([rows.mean(axis=0).argmax() for rows in some])


@dataclass(frozen=True, kw_only=True)
class ComputeOptimal(SamplingSearch):
    """A few samples say how hard a prompt is; a table says which search it gets.

    The difficulty of a prompt is the mean reward of its samples, which stay candidates. Where that is the reward that
    the search ranks by, they are ranked with its texts; otherwise they come after them.

    Args:
        reward: what a whole text is worth.
        searches: one for each bin of difficulty, that of the hardest first.
        edges: mean rewards between the bins, ascending; one less than there are `searches`.
        num_samples: samples by which the difficulty is measured.
    """

    reward: Reward
    searches: Sequence[Search]
    edges: Sequence[float]
    num_samples: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reward(self.reward)
        integer("num_samples", self.num_samples, 1)
        if not self.searches or not all(isinstance(search, Search) for search in self.searches):
            raise InvalidInput(f"searches must be one Search for each bin of difficulty, got {shown(self.searches)}")
        for edge in self.edges:
            number("edges", edge, "finite", lambda x: True)
        if len(self.edges) != len(self.searches) - 1 or (np.diff(self.edges) < 0).any():
            raise InvalidInput(
                f"edges must be {len(self.searches) - 1} ascending numbers, one less than searches, got "
                f"{shown(self.edges)}"
            )

    @property
    def rewards(self) -> Sequence[Reward]:
        """That of the samples, and those of the searches."""
        return (self.reward, *(reward for search in self.searches for reward in search.rewards))

    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """What the chosen search finds, and the samples."""
        samples = Walkers.start(context, self.num_samples)
        await complete(samples, context, self)
        await judged(samples, np.arange(self.num_samples), self.reward, context)
        difficulty = float(np.nanmean(samples.rewards))
        chosen = difficulty_bin(difficulty, self.edges)
        context.trace.record("difficulty", nodes=samples.node, difficulty=difficulty, bin=chosen)
        found = [] if context.budget.spent else await self.searches[chosen].run(context)
        found = [*found, *samples.hypotheses(best_first(samples.rewards), context)]
        if self.reward in self.searches[chosen].rewards:
            order = best_first(np.array([h.score for h in found]))
            return [found[i] for i in order]
        return found
