"""The steps that searches share: texts that grow side by side, and what is done to them again and again.

    walkers = Walkers.start(context, 16)
    await grow(walkers, live, context, search)             # to the end of a step, or of the text
    await judged(walkers, live, search.reward)             # a reward for each
    walkers = walkers.taken(ancestors, why="resampling")   # some are forked, others dropped
    return walkers.hypotheses(order, context)

All of it is recorded in the search's trace.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Self

import numpy as np

from forktree.checks import integer
from forktree.errors import BudgetSpent, InvalidInput, RewardError
from forktree.kv import Branch, reassign
from forktree.ops.sampling import Sampling
from forktree.rewards.base import Reward, check_reward
from forktree.search.base import ExtendingSearch, Hypothesis, SamplingSearch
from forktree.search.budget import Budget
from forktree.search.context import SearchContext
from forktree.search.judges import Judge, decoded
from forktree.search.request import Extension, Stop, extend, reward_branches
from forktree.search.speculate import speculative_extend
from forktree.search.trace import PROMPT, SearchTrace
from forktree.types import BoolArray, Float64Array, Int64Array

AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "last": lambda rewards: rewards[-1],
    "min": lambda rewards: float(np.min(rewards)),
    "prod": lambda rewards: float(np.prod(rewards)),
    "mean": lambda rewards: float(np.mean(rewards)),
}
"""From the rewards of a text's steps to one for the whole text."""


@dataclass(frozen=True, kw_only=True)
class StepSearch(SamplingSearch):
    """A search whose texts grow step by step, each step with a reward.

    Args:
        reward: what a text so far is worth (a process-reward model).
        step_delimiter: text that ends a step; it stays part of the step. `stop` is looked for within a step.
        max_step_tokens: maximum number of tokens of a step; a delimiter that they cut in half ends the next step when
            its rest comes.
        max_steps: maximum number of steps of a text.
    """

    reward: Reward
    step_delimiter: str = "\n\n"
    max_step_tokens: int = 1024
    max_steps: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_step_tokens", "max_steps"):
            integer(name, getattr(self, name), 1)
        check_reward(self.reward)
        if not isinstance(self.step_delimiter, str):
            raise InvalidInput(f"step_delimiter must be a text, got {self.step_delimiter!r}")

    @property
    def rewards(self) -> Sequence[Reward]:
        """The process reward."""
        return (self.reward,)


@dataclass
class Walkers:
    """Texts that grow side by side: a struct of arrays and lists, `[N]` each. A subclass may have more of them.

    Args:
        trace: where everything that is done to them is recorded.
        budget: what the search may still cost.
        branches: their branches.
        node: the newest step of each in the trace. int64.
        begin: position of the first token of that step. int64.
        alive: False once the text has ended. bool.
        reason: why the newest step ended: "eos", "stop", "length", or "budget" where the search's budget was spent.
        steps: steps grown so far. int64.
        num_tokens: tokens generated so far, EOS included. int64.
        log_prob: sum of their log-probs under the model. fp64.
        unfinished: newest tokens since the last text that ended a step. int64.
        rewards: the newest reward; NaN if there is none or it failed. fp64.
        history: the rewards after each step.
        errors: why the newest reward failed, None if it did not.
    """

    trace: SearchTrace
    budget: Budget
    branches: list[Branch]
    node: Int64Array
    begin: Int64Array
    alive: BoolArray
    reason: list[str]
    steps: Int64Array
    num_tokens: Int64Array
    log_prob: Float64Array
    unfinished: Int64Array
    rewards: Float64Array
    history: list[list[float]]
    errors: list[RewardError | None]

    @classmethod
    def start(cls, context: SearchContext, n: int) -> Self:
        """`n` forks of the prompt."""
        return cls(
            trace=context.trace,
            budget=context.budget,
            branches=context.root.fork(n),
            node=np.full(n, PROMPT, np.int64),
            begin=np.full(n, context.root.length, np.int64),
            alive=np.ones(n, bool),
            reason=["length"] * n,
            steps=np.zeros(n, np.int64),
            num_tokens=np.zeros(n, np.int64),
            log_prob=np.zeros(n),
            unfinished=np.zeros(n, np.int64),
            rewards=np.full(n, np.nan),
            history=[[]] * n,
            errors=[None] * n,
        )

    def __len__(self) -> int:
        return len(self.branches)

    def taken(self, ancestors: Int64Array, *, why: str, **facts: Any) -> Self:
        """Walkers of which number i continues `ancestors[i]` of these; those that none continues are dropped.

        Args:
            ancestors: indices `[n]`; n may be any number of at least 1.
            why: what decided so, such as "resampling".
            facts: what it was decided by, for the trace.
        """
        branches = reassign(self.branches, ancestors)
        self.trace.select(self.node, ancestors, why=why, **facts)
        return self._at(ancestors, branches)

    def split(self, counts: Int64Array, *, why: str, **facts: Any) -> Self:
        """Walkers that continue number i of these `counts[i]` times; 0 drops it. See `taken`."""
        return self.taken(np.repeat(np.arange(len(self)), counts), why=why, **facts)

    def end(self, *, why: str) -> None:
        """Ends the texts of all that are alive, where they stand, for a reason such as "budget"."""
        alive = np.flatnonzero(self.alive)
        self.trace.record("end", why=why, nodes=self.node[alive])
        for i in alive:
            self.alive[i], self.reason[i] = False, why

    def forks(self, which: Int64Array) -> Self:
        """Copies of some walkers that go on by themselves: a fork of each."""
        return self._at(which, [self.branches[i].fork(1)[0] for i in which])

    @classmethod
    def concatenated(cls, parts: Sequence[Self]) -> Self:
        """The walkers of several in one, in their order; the parts are not to be used any more."""

        def joined(values: list[Any]) -> Any:
            if isinstance(values[0], np.ndarray):
                return np.concatenate(values)
            return [v for some in values for v in some] if isinstance(values[0], list) else values[0]

        return replace(parts[0], **{f.name: joined([getattr(p, f.name) for p in parts]) for f in fields(parts[0])})

    def drop(self) -> None:
        """Drops all of their branches."""
        for branch in self.branches:
            branch.drop()

    def _at(self, which: Int64Array, branches: list[Branch]) -> Self:
        """Walkers that stand where `which` of these do, on branches of their own."""
        moved = {f.name: _at(getattr(self, f.name), which) for f in fields(self) if f.name != "branches"}
        return replace(self, branches=branches, **moved)

    def hypotheses(
        self,
        order: Int64Array,
        context: SearchContext,
        *,
        scores: Float64Array | None = None,
        weights: Float64Array | None = None,
    ) -> list[Hypothesis]:
        """What the search returns.

        Args:
            order: walkers to return, best first.
            context: that of the search.
            scores: what they are ranked by, `[N]`; default: their newest rewards.
            weights: normalised weights, `[N]`, if there are any.
        """
        scores = self.rewards if scores is None else scores
        self.trace.record("return", nodes=self.node[order], scores=scores[order])
        return [
            Hypothesis(
                token_ids=self.branches[i].tokens[context.root.length :],
                score=float(scores[i]),
                log_prob=float(self.log_prob[i]),
                finish_reason=self.reason[i],
                step_rewards=self.history[i] if self.steps[i] else [],
                weight=None if weights is None else float(weights[i]),
                error=self.errors[i],
            )
            for i in order.tolist()
        ]


async def grow(walkers: Walkers, which: Int64Array, context: SearchContext, search: StepSearch) -> None:
    """Extends walkers by one step each, all in one request.

    A step ends with the search's delimiter, or as a text does: with EOS, one of the search's stop texts, or because no
    more tokens or steps are allowed. Walkers whose text has ended are not alive afterwards. When the budget of tokens
    is spent, no walker is.

    Args:
        walkers: changed in place.
        which: indices of those to extend, int64 `[m]`.
        context: that of the search.
        search: says where a step ends, and how tokens are sampled.
    """
    limit = np.minimum(search.max_step_tokens, context.max_new_tokens - walkers.num_tokens[which])
    walkers.steps[which] += 1
    last = walkers.steps[which] >= search.max_steps
    await _extend(walkers, which, context, search, limit, context.stop_at(search.step_delimiter, *search.stop), last)


async def complete(
    walkers: Walkers,
    context: SearchContext,
    search: ExtendingSearch,
    which: Int64Array | None = None,
    *,
    sampling: Sequence[Sampling] | None = None,
) -> None:
    """Extends walkers to the end of their texts; that is not counted as a step.

    Args:
        walkers: changed in place.
        context: that of the search.
        search: says what ends a text, and how tokens are sampled.
        which: indices of those to extend, int64 `[m]`. Default: all.
        sampling: how tokens are sampled of each, `[m]`. Default: as the search says.
    """
    which = np.arange(len(walkers)) if which is None else which
    limit, last = context.max_new_tokens - walkers.num_tokens[which], np.ones(len(which), bool)
    await _extend(walkers, which, context, search, limit, context.stop_at(*search.stop), last, sampling)


async def _extend(
    walkers: Walkers,
    which: Int64Array,
    context: SearchContext,
    search: ExtendingSearch,
    max_tokens: Int64Array,
    stop: Stop | None,
    last: BoolArray,
    sampling: Sequence[Sampling] | None = None,
) -> None:
    """Extends `which`, at `last` of them to the end of their text, within the budget: see `grow`.

    Where tokens are short, each has an equal share at first, and then of what others have left.
    """
    walkers.begin[which] = [walkers.branches[i].length for i in which]
    while len(which):
        share = context.budget.limit_tokens(max_tokens)
        some = np.flatnonzero(share)
        cut = share < max_tokens
        if len(some):
            how = None if sampling is None else [sampling[i] for i in some.tolist()]
            done = await _extend_once(
                walkers, which[some], context, search, share[some], stop, last[some], cut[some], how
            )
            max_tokens[some] -= done.num_tokens
            cut[some] &= np.array(done.reason) == "length"
        if context.budget.tokens_left == 0:
            walkers.end(why="budget")
            break
        which, max_tokens, last = which[cut], max_tokens[cut], last[cut]
        sampling = None if sampling is None else [one for one, more in zip(sampling, cut, strict=True) if more]


async def _extend_once(
    walkers: Walkers,
    which: Int64Array,
    context: SearchContext,
    search: ExtendingSearch,
    max_tokens: Int64Array,
    stop: Stop | None,
    last: BoolArray,
    cut: BoolArray,
    sampling: Sequence[Sampling] | None,
) -> Extension:
    """One `extend`, and all that is known of the walkers afterwards. cut: whose `max_tokens` do not end a text."""
    branches = [walkers.branches[i] for i in which]
    before = [branch.length for branch in branches]
    unfinished = walkers.unfinished[which]
    extending: Callable[..., Awaitable[Extension]] = extend
    if search.drafter is not None:
        extending = partial(
            speculative_extend, drafter=search.drafter, payoff=context.payoff, counters=context.counters
        )
    done = await extending(
        branches,
        search.sampling if sampling is None else sampling,
        max_tokens=max_tokens,
        eos_token_ids=context.eos_token_ids,
        stop=stop,
        processors=search.logits_processor,
        pad_token_id=context.pad_token_id,
        unfinished=unfinished.tolist() if unfinished.any() else None,
    )
    walkers.log_prob[which] += done.log_prob
    walkers.num_tokens[which] += done.num_tokens
    walkers.unfinished[which] += done.num_tokens
    full = last | (walkers.num_tokens[which] >= context.max_new_tokens)
    text_end = context.stop_at(*search.stop)
    steps, ends = [], []
    for i, branch, begin, reason, ended, more in zip(which, branches, before, done.reason, full, cut, strict=True):
        tokens = branch.tokens
        steps.append(tokens[begin:])
        if reason == "stop":
            new = tokens[len(tokens) - walkers.unfinished[i] :]
            walkers.unfinished[i] = 0
            if text_end is not None and text_end(int(new[-1]), new.tolist()):
                ended = True
            elif ended:
                reason = "length"
        elif reason == "length" and more:
            ended = False
        over = bool(ended) or reason == "eos"
        walkers.alive[i], walkers.reason[i] = not over, reason
        ends.append(reason if over else None)
    walkers.node[which] = walkers.trace.grow(walkers.node[which], steps, log_probs=done.log_prob, ends=ends)
    return done


async def judged(
    walkers: Walkers,
    which: Int64Array,
    reward: Reward,
    context: SearchContext | None = None,
    *,
    valid: Callable[[Float64Array], Float64Array] | None = None,
    at: Sequence[Branch] | None = None,
) -> None:
    """Asks for the rewards of walkers. A failure is a value of its walker: reward NaN, and an error.

    Where the budget of rewards is short, the first of them are judged; the others keep the reward that they had, or
    have none. Once it is spent, no walker is alive.

    Args:
        walkers: changed in place.
        which: indices of those to judge, int64 `[m]`.
        reward: what gives them.
        context: that of the search, without which a `Judge` is refused.
        valid: rewards `[m]` -> those to keep, such as clipped ones; raises if the search cannot use one.
        at: branches whose rewards stand for theirs, such as rollouts, `[m]`. Default: their own.

    Raises:
        RewardError: no walker has a reward left.
    """
    if not len(which):
        return
    left = walkers.budget.calls_left
    asked, rest = (which, which[:0]) if len(which) <= left else np.split(which, [int(left)])
    for i in rest:
        if np.isnan(walkers.rewards[i]):
            walkers.errors[i] = BudgetSpent(f"the budget of {walkers.budget.max_reward_calls} rewards is spent")
    if len(asked):
        branches = [walkers.branches[i] for i in asked] if at is None else at[: len(asked)]
        if isinstance(reward, Judge) and context is not None:
            texts = [decoded(branch.tokens[context.root.length :].tolist(), context) for branch in branches]
            context.counters.reward_calls += len(texts)
            found = await reward.judge(texts, context)
        else:
            found = await reward_branches(branches, reward)
        rewards = np.where([error is None for error in found.errors], found.values, np.nan)
        rewards = rewards if valid is None else valid(rewards)
        walkers.rewards[asked] = rewards
        for i, value, error in zip(asked, rewards.tolist(), found.errors, strict=True):
            walkers.history[i], walkers.errors[i] = [*walkers.history[i], value], error
        walkers.trace.record("reward", nodes=walkers.node[asked], rewards=rewards, errors=found.errors)
    if walkers.budget.calls_left == 0:
        walkers.end(why="budget")
    check_any(walkers.errors, walkers.rewards)


def check_any(errors: Sequence[RewardError | None], rewards: Float64Array) -> None:
    """Raises RewardError, with the first of `errors`, if all `rewards` are NaN."""
    if np.isnan(rewards).all():
        raise RewardError(f"no branch has a reward left; the first failure: {next(filter(None, errors))}")


def _at(values: Any, indices: Int64Array) -> Any:
    """Entries of an array or list; anything else is shared by all walkers."""
    if isinstance(values, np.ndarray):
        return values[indices]
    return [values[i] for i in indices] if isinstance(values, list) else values
