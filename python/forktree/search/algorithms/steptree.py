"""Trees of steps with a process-reward model: after every step a rule says how often each leaf is continued.

The rules are pure functions, see `forktree.search.allocation`. A leaf whose text has ended stays as it is, unless a
rule says otherwise, and is ranked with the others in the end.
"""

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from forktree.checks import integer, number, shown
from forktree.errors import InvalidInput
from forktree.search.algorithms.vote import texts_of
from forktree.search.allocation import (
    balanced_counts,
    beam_counts,
    clusters,
    ngram_counts,
    step_beam_counts,
    subtree_counts,
    thrifty_leaves,
)
from forktree.search.answers import Answers, answer_function, equality
from forktree.search.base import Hypothesis
from forktree.search.context import SearchContext
from forktree.search.registry import register
from forktree.search.selection import best_first, unit_interval
from forktree.search.steps import AGGREGATES, StepSearch, Walkers, complete, grow, judged
from forktree.search.trace import PROMPT
from forktree.search.validation import check_choice
from forktree.search.votes import ranked, vote
from forktree.types import Float64Array, Int64Array


@dataclass(frozen=True, kw_only=True)
class StepTree(StepSearch):
    """The loop that all of these searches share."""

    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """Every text that was not pruned, best score first."""
        tree = self._start(context)
        while tree.alive.any():
            grown = np.flatnonzero(tree.alive)
            await self._step(tree, grown, context)
            counts = np.ones(len(tree), np.int64)
            counts[grown] = self._counts(tree, grown, context)
            tree = tree.split(counts, why="allocation", scores=self._scores(tree))
        return self._returned(tree, context)

    def _start(self, context: SearchContext) -> Walkers:
        """The first leaves: forks of the prompt."""
        return Walkers.start(context, self._width)

    async def _step(self, tree: Walkers, grown: Int64Array, context: SearchContext) -> None:
        """Grows leaves by a step, and rewards them."""
        await grow(tree, grown, context, self)
        await judged(tree, grown, self.reward, valid=self._valid)

    def _returned(self, tree: Walkers, context: SearchContext) -> list[Hypothesis]:
        return tree.hypotheses(self._order(tree), context, scores=self._scores(tree))

    def _scores(self, tree: Walkers) -> Float64Array:
        """What leaves are ranked by, `[N]`."""
        return tree.rewards

    def _order(self, tree: Walkers) -> Int64Array:
        """The leaves that are returned, best first."""
        return best_first(self._scores(tree))

    @property
    def _valid(self) -> Callable[[Float64Array], Float64Array] | None:
        """What checks rewards, see `judged`."""
        return None

    @property
    @abstractmethod
    def _width(self) -> int:
        """How many first steps are sampled."""

    @abstractmethod
    def _counts(self, tree: Walkers, grown: Int64Array, context: SearchContext) -> Int64Array:
        """How often each leaf of `grown [m]` is continued, `[m]`; 1 for one that has ended keeps it."""


@dataclass(frozen=True, kw_only=True)
class VotingTree(StepTree):
    """A tree whose texts may vote in the end, each with its score, which must then lie in [0, 1].

    Args:
        answer: how an answer is read, see `WeightedVote`: the texts of the answer with the largest sum of scores come
            first. None: texts are ranked by their own scores.
        equal: when two answers are the same, see `WeightedVote`.
    """

    answer: str | Callable[[str], Hashable] | None = None
    equal: str | Callable[[Any, Any], bool] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answer is not None:
            answer_function(self.answer)
        equality(self.equal)

    @property
    def _valid(self) -> Callable[[Float64Array], Float64Array] | None:
        return None if self.answer is None else unit_interval

    def _returned(self, tree: Walkers, context: SearchContext) -> list[Hypothesis]:
        if self.answer is None:
            return super()._returned(tree, context)
        tree = tree.taken(self._order(tree), why="vote")
        answers = Answers.read(texts_of(tree, context), answer_function(self.answer), equality(self.equal))
        scores = self._scores(tree)
        weights = np.where(answers.failed, 0, np.nan_to_num(scores))
        shares = np.where(answers.failed, np.nan, vote(answers.group, weights))
        tree.errors = [unread or error for unread, error in zip(answers.errors, tree.errors, strict=True)]
        shown = dict(answers=answers.said, shares=shares, errors=tree.errors, weights=weights)
        context.trace.record("vote", nodes=tree.node, **shown)
        order = ranked(answers.group, shares, weights=weights, worth=scores)
        return tree.hypotheses(order, context, scores=shares)


@dataclass(frozen=True, kw_only=True)
class BeamTree(VotingTree):
    """What PRM beam search and DVTS share.

    Args:
        num_beams: texts that grow side by side, a multiple of `beam_width`; search-and-learn's `n`.
        beam_width: continuations of every leaf that is kept.
        lookahead: steps of a greedy rollout after each leaf, at the end of which its reward is read; the rollout is
            then discarded.
        aggregate: how the rewards of a text's steps give its score: "last", "min", "prod" or "mean".
    """

    num_beams: int = 16
    beam_width: int = 4
    lookahead: int = 0
    aggregate: str = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("num_beams", self.num_beams, 1)
        integer("beam_width", self.beam_width, 1)
        integer("lookahead", self.lookahead, 0)
        check_choice("aggregate", self.aggregate, AGGREGATES)
        if self.num_beams % self.beam_width:
            raise InvalidInput(f"num_beams must be a multiple of beam_width = {self.beam_width}, got {self.num_beams}")

    @property
    def _width(self) -> int:
        return self.num_beams

    async def _step(self, tree: Walkers, grown: Int64Array, context: SearchContext) -> None:
        if not self.lookahead:
            return await super()._step(tree, grown, context)
        await grow(tree, grown, context, self)
        rollouts, greedy = tree.forks(grown), replace(self, temperature=0.0)
        for _ in range(self.lookahead):
            await grow(rollouts, np.flatnonzero(rollouts.alive), context, greedy)
        await judged(tree, grown, self.reward, valid=self._valid, at=rollouts.branches)
        rollouts.drop()
        if context.budget.spent:
            tree.end(why="budget")

    def _scores(self, tree: Walkers) -> Float64Array:
        return np.array([AGGREGATES[self.aggregate](history) if history else np.nan for history in tree.history])


@register("prm-beam")
@dataclass(frozen=True, kw_only=True)
class PRMBeamSearch(BeamTree):
    """Beam search over steps with a process-reward model (Snell et al. 2024, section 5.2; search-and-learn).

    After every step the best `num_beams / beam_width` of the texts that go on are kept, and continued in turns until
    there are `num_beams` again. Texts that have ended take no part in this. With `lookahead` the reward of a step is
    that at the end of a rollout, as in the paper; search-and-learn writes rollouts here and does not read them.

    With `scored_steps` rewards choose only among beginnings, which leaves the end of a text to chance where searching
    on would exploit the reward's faults (Ye et al. 2025, "Llasa", partial process rewards): 0 is best-of-N.

    Args:
        filter_duplicates: whether of leaves with the same text only the first is kept.
        scored_steps: after so many steps all texts are sampled to their ends, and rewarded once more; none: never.
    """

    filter_duplicates: bool = False
    scored_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scored_steps is not None:
            integer("scored_steps", self.scored_steps, 0)

    async def _step(self, tree: Walkers, grown: Int64Array, context: SearchContext) -> None:
        if self.scored_steps is None or tree.steps[grown[0]] < self.scored_steps:
            await super()._step(tree, grown, context)
        else:
            await complete(tree, context, self, grown)
            await judged(tree, grown, self.reward, valid=self._valid)

    def _counts(self, tree: Walkers, grown: Int64Array, context: SearchContext) -> Int64Array:
        scores, live = self._scores(tree)[grown], tree.alive[grown]
        if self.filter_duplicates:
            texts = [tree.branches[i].tokens.tobytes() for i in grown]
            live &= np.array([texts.index(text) == i for i, text in enumerate(texts)])
        counts = (~tree.alive[grown]).astype(np.int64)
        counts[live] = beam_counts(scores[live], self.num_beams, self.num_beams // self.beam_width)
        return counts

    def _order(self, tree: Walkers) -> Int64Array:
        return super()._order(tree)[: self.num_beams]


@dataclass
class Subtrees(Walkers):
    """Leaves of several trees.

    Args:
        subtree: the number of each one's tree. int64 `[N]`.
    """

    subtree: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))


@register("dvts")
@dataclass(frozen=True, kw_only=True)
class DVTS(BeamTree):
    """Diverse verifier tree search (Beeching et al. 2024): `num_beams / beam_width` trees that know nothing of another.

    Each samples `beam_width` steps and goes on from the best. It ends when the best has ended; what else has ended at
    that step is returned with it. search-and-learn also returns the texts that have not; here they are dropped.
    """

    def _start(self, context: SearchContext) -> Walkers:
        trees = Subtrees.start(context, self.num_beams)
        trees.subtree = np.arange(self.num_beams) // self.beam_width
        return trees

    def _counts(self, tree: Walkers, grown: Int64Array, context: SearchContext) -> Int64Array:
        assert isinstance(tree, Subtrees)
        return subtree_counts(self._scores(tree)[grown], ~tree.alive[grown], tree.subtree[grown], self.beam_width)


@register("rebase")
@dataclass(frozen=True, kw_only=True)
class REBASE(VotingTree):
    """Reward balanced search (Wu et al. 2024): a node is continued in proportion to `exp(r / balance_temperature)`.

    Every text that ends takes one from the continuations that are left, and so does one that reaches a limit. The
    paper's final answer is a vote weighted by the rewards, which `answer` asks for.

    Args:
        width: continuations of all nodes of one depth.
        balance_temperature: of the softmax over the rewards; lower gives more to the best.
    """

    width: int = 16
    balance_temperature: float = 0.2
    temperature: float = 1.0
    max_step_tokens: int = 256
    max_steps: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("width", self.width, 1)
        number("balance_temperature", self.balance_temperature, "finite and more than 0", lambda t: t > 0)

    @property
    def _width(self) -> int:
        return self.width

    def _counts(self, tree: Walkers, grown: Int64Array, context: SearchContext) -> Int64Array:
        live = grown[tree.alive[grown]]
        counts = (~tree.alive).astype(np.int64)
        left = self.width - int(counts.sum())
        if len(live):
            counts[live] = balanced_counts(self._eligible(tree, live, left, context), left, self.balance_temperature)
        return counts[grown]

    def _eligible(self, tree: Walkers, live: Int64Array, left: int, context: SearchContext) -> Float64Array:
        """Rewards of the leaves `live [m]`, NaN for those that are not to be continued; there are `left` to share."""
        return tree.rewards[live]


@register("ets")
@dataclass(frozen=True, kw_only=True)
class ETS(REBASE):
    """Efficient tree search (Hooper et al. 2025): REBASE among the leaves that are worth the memory of their paths.

    After every step the leaves to keep are those of equation 4: see `forktree.search.allocation.thrifty_leaves`. They
    are exact up to 20 leaves. A cluster is a set of leaves whose newest steps mean the same. The paper compares
    embeddings of sentences; without `embed`, what is compared is a reconstruction, the counts of the step's tokens and
    of its pairs of tokens.

    Args:
        lambda_b: the weight of the nodes that a set of leaves keeps, as a share of all.
        lambda_d: the weight of the clusters that it covers, as a share of all; 1.5, 1.4 and 1.45 in the paper at
            widths of 16, 64 and 256.
        embed: texts `[n]` -> vectors `[n, d]` that are near in angle if texts mean the same.
        cluster_distance: the mean cosine distance at which clusters are no longer joined.
    """

    lambda_b: float = 1.0
    lambda_d: float = 1.5
    embed: Callable[[Sequence[str]], ArrayLike] | None = None
    cluster_distance: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lambda_b", "lambda_d", "cluster_distance"):
            number(name, getattr(self, name), "finite and at least 0", lambda weight: weight >= 0)
        if self.embed is not None and not callable(self.embed):
            raise InvalidInput(f"embed must be a function of texts, or None, got {type(self.embed).__name__}")

    def _eligible(self, tree: Walkers, live: Int64Array, left: int, context: SearchContext) -> Float64Array:
        rewards = tree.rewards[live]
        paths = [context.trace.path(node) for node in tree.node[live].tolist()]
        kept = thrifty_leaves(
            balanced_counts(rewards, left, self.balance_temperature) / max(1, left),
            [[PROMPT, *path[:-1]] for path in paths],
            clusters(self._vectors(tree, live, context), self.cluster_distance),
            self.lambda_b,
            self.lambda_d,
        )
        return np.where(kept, rewards, np.nan)

    def _vectors(self, tree: Walkers, live: Int64Array, context: SearchContext) -> Float64Array:
        """What says how near the newest steps of leaves are in meaning, `[m, d]`."""
        steps = [tree.branches[i].tokens[tree.begin[i] :] for i in live]
        if self.embed is None:
            return ngram_counts(steps)
        if context.decode is None:
            raise InvalidInput("embed reads texts: expected a Decoder with a tokenizer, got tokenizer=None")
        vectors = np.asarray(self.embed([context.decode(step) or "" for step in steps]), np.float64)
        if vectors.ndim != 2 or len(vectors) != len(live) or not np.isfinite(vectors).all():
            expected = f"finite vectors [{len(live)}, d]"
            raise InvalidInput(f"embed must return {expected}, got an array {list(vectors.shape)}: {shown(vectors)}")
        return vectors


@register("step-beam")
@dataclass(frozen=True, kw_only=True)
class StepBeamSearch(StepTree):
    """Step-level beam search (Chen et al. 2024, "AlphaMath", algorithm 2), for a value head such as `ValueHead`.

    Of the steps that all beams sample, the `step_beam_width` best stay. One whose text has ended leaves the beam, which
    is narrower by one from then on; so does one that has reached a limit, and it is ranked after all that have not.

    Args:
        step_beam_width: beams, the paper's B1.
        num_samples: steps that each of them samples, the paper's B2.
    """

    step_beam_width: int = 3
    num_samples: int = 5
    step_delimiter: str = "\n"
    max_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("step_beam_width", self.step_beam_width, 1)
        integer("num_samples", self.num_samples, 1)

    @property
    def _width(self) -> int:
        return self.step_beam_width * self.num_samples

    def _counts(self, tree: Walkers, grown: Int64Array, context: SearchContext) -> Int64Array:
        width = self.step_beam_width - (len(tree) - len(grown))
        return step_beam_counts(tree.rewards[grown], ~tree.alive[grown], width, self.num_samples)

    def _order(self, tree: Walkers) -> Int64Array:
        order = super()._order(tree)
        cut = np.array(tree.reason)[order] == "length"
        return np.concatenate([order[~cut], order[cut]])
