"""What a search may await: requests that need a forward pass or a reward. The engine answers them.

    extension = await extend(branches, sampling, max_tokens=64, stop=step_end)
    rewards = await reward_branches(branches, reward)
    scores = await score_tokens(branches, TokenRequest(top_k=8, entropy=True))
    verified = await score_tokens(branches, TokenRequest(targets=drafts), since=lengths)
    logits = await next_logits(branches)

Forks, drops, rewinds and reassignments are plain calls on branches and need no await.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, overload

import numpy as np
from torch import Tensor

from forktree.checks import integer, integers, shown
from forktree.errors import InvalidInput
from forktree.kv import Branch
from forktree.ops.sampling import Sampling
from forktree.ops.token_request import TokenRequest, TokenScores
from forktree.rewards.base import Reward, Rewards
from forktree.search.processors import Processor, check_processors
from forktree.types import MAX_TOKEN_ID, Float64Array, Int64Array

T = TypeVar("T")


class Stop(Protocol):
    """Decides whether a branch stops after its newest token."""

    def __call__(self, token: int, tokens: Sequence[int]) -> bool:
        """Whether to stop.

        Args:
            token: the newest.
            tokens: all that this `extend` has added, `token` included, after those that its `unfinished` names.
        """
        ...


class Request(Generic[T]):
    """Base of everything awaitable here: yields itself to the engine, which sends back the answer."""

    branches: Sequence[Branch]

    def __await__(self) -> Generator["Request[Any]", T, T]:
        return (yield self)


@dataclass(frozen=True)
class Extension:
    """What `extend` did to each branch.

    reason: "eos" (an end-of-sequence token was sampled; it is not part of the branch), "stop" or "length"; "running"
        for a branch that a race has left where it is.
    log_prob: sum of the sampled tokens' log-probs under the model's own distribution, EOS included. `[n]` fp64.
    num_tokens: tokens sampled, EOS included. `[n]` int64.
    """

    reason: list[str]
    log_prob: Float64Array
    num_tokens: Int64Array


@dataclass(frozen=True, eq=False)
class Extend(Request[Extension]):
    """See `extend`."""

    branches: Sequence[Branch]
    sampling: Sampling | Sequence[Sampling]
    max_tokens: Int64Array
    eos_token_ids: frozenset[int]
    stop: Stop | None
    processors: Sequence[Processor]
    pad_token_id: int
    unfinished: Sequence[int] | None
    race: int | None = None

    def __post_init__(self) -> None:
        n = len(self.branches)
        if not isinstance(self.sampling, Sampling):
            each = isinstance(self.sampling, Sequence) and all(isinstance(s, Sampling) for s in self.sampling)
            if not each or len(self.sampling) != n:
                what = f"a Sampling, or one for each of {n} branches"
                raise InvalidInput(f"sampling must be {what}, got {shown(self.sampling)}")
        if self.race is not None:
            integer("race", self.race, 1, n)
        integers("max_tokens", self.max_tokens, 1, MAX_TOKEN_ID, count=len(self.branches))
        integers("eos_token_ids", list(self.eos_token_ids), 0, MAX_TOKEN_ID)
        integer("pad_token_id", self.pad_token_id, -MAX_TOKEN_ID, MAX_TOKEN_ID)
        if self.stop is not None and not callable(self.stop):
            raise InvalidInput(f"stop must be a function of the newest token and all, or None, got {shown(self.stop)}")
        check_processors("processors", self.processors)


@dataclass(frozen=True, eq=False)
class RewardBranches(Request[Rewards]):
    """See `reward_branches`."""

    branches: Sequence[Branch]
    reward: Reward


@dataclass(frozen=True, eq=False)
class ScoreTokens(Request[TokenScores]):
    """See `score_tokens`."""

    branches: Sequence[Branch]
    request: TokenRequest
    checked: bool

    def __post_init__(self) -> None:
        _check_token_request(self.request)


@dataclass(frozen=True, eq=False)
class SuffixScores:
    """Scores of the tokens that follow each token of a suffix of several branches.

    Attributes:
        scores: Rows `[R]`: those of branch 0 in the order of its tokens, then those of branch 1, …
        indptr: int64 `[n + 1]`: branch i has the rows `indptr[i] : indptr[i + 1]`.
    """

    scores: TokenScores
    indptr: Int64Array


@dataclass(frozen=True, eq=False)
class ScoreSuffixes(Request[SuffixScores]):
    """See `score_tokens`, which was given `since`, int64 `[n]`."""

    branches: Sequence[Branch]
    request: TokenRequest
    since: Int64Array
    checked: bool

    def __post_init__(self) -> None:
        _check_token_request(self.request)


@dataclass(frozen=True, eq=False)
class NextLogits(Request[Tensor]):
    """See `next_logits`; since int64 `[n]`, or None."""

    branches: Sequence[Branch]
    checked: bool
    since: Int64Array | None = None


def extend(
    branches: Sequence[Branch],
    sampling: Sampling | Sequence[Sampling],
    *,
    max_tokens: int | Sequence[int] | Int64Array,
    eos_token_ids: frozenset[int] = frozenset(),
    stop: Stop | None = None,
    processors: Sequence[Processor] = (),
    pad_token_id: int = 0,
    unfinished: Sequence[int] | None = None,
    race: int | None = None,
) -> Extend:
    """Samples tokens for every branch until `stop`, an EOS, or `max_tokens`.

    sampling, max_tokens: one for all, or one a branch.

    unfinished: of each branch, how many of its newest tokens, added by earlier calls, `stop` is to see before the new
    ones, so that it finds a text of which `max_tokens` left only the beginning. Default: none.

    processors: change the logits before `sampling` does, see `forktree.search.processors`: the slow way, as they need
    whole rows. They are shown what the branches see, padded by `pad_token_id`. `InvalidInput` is raised if they leave a
    branch no token, and what they or `stop` raise themselves; log-probs are those of the logits as they were.

    race: returns as soon as so many branches have ended, by whatever reason; the others stay where they are, "running".
    All branches get their first token before any gets a second, and so on; within such a step they are taken in their
    order. So exactly `race` branches have ended: of the step that the last of these ends in, branches before it have a
    token, those after it have none. Whatever else runs has no part in it, and a later `extend` goes on as if there had
    been no race.
    """
    some = tuple(branches)
    one = np.ndim(max_tokens) == 0
    limit = [integer("max_tokens", max_tokens, 1, MAX_TOKEN_ID)] * len(some) if one else max_tokens
    each = integers("max_tokens", limit, 1, MAX_TOKEN_ID, count=len(some))
    return Extend(
        some, sampling, each, frozenset(eos_token_ids), stop, tuple(processors), pad_token_id, unfinished, race
    )


def reward_branches(branches: Sequence[Branch], reward: Reward) -> RewardBranches:
    """Asks what every branch is worth as it stands. A failure is a value of its branch, not an exception."""
    return RewardBranches(tuple(branches), reward)


@overload
def score_tokens(
    branches: Sequence[Branch], request: TokenRequest, *, since: None = None, checked: bool = True
) -> ScoreTokens: ...


@overload
def score_tokens(
    branches: Sequence[Branch],
    request: TokenRequest,
    *,
    since: int | Sequence[int] | Int64Array,
    checked: bool = True,
) -> ScoreSuffixes: ...


def score_tokens(
    branches: Sequence[Branch],
    request: TokenRequest,
    *,
    since: int | Sequence[int] | Int64Array | None = None,
    checked: bool = True,
) -> ScoreTokens | ScoreSuffixes:
    """What `request` asks of the token that follows each branch, a row each, without a row of logits.

    With `since`, a branch has a row for each of its tokens from that position on, of the token that follows it: those
    after position `since`, the last of which is yet to come. All rows come from the passes that compute these tokens;
    tokens that are computed already, and whose hidden states are gone, are computed again. To verify 8 tokens that were
    appended to a branch of length n, ask `since=n - 1`: that is 9 rows, and one pass of 8 tokens, as the hidden state
    of the token before them is kept.

    Args:
        branches: Of one model, `[n]`.
        request: Of as many rows as there are: n, or with `since` R, the sum of `branch.length - since`.
        since: Position of the first token that has a row, one for all branches or one a branch, up to
            `branch.length`, which asks for none. Default: the last token's.
        checked: Whether rows are looked at. If not, bad ones are given as they are, and a GPU is not waited for.

    Returns:
        To be awaited: `TokenScores` of n rows, or with `since` `SuffixScores`.

    Raises:
        NonFinite: Logits hold NaN or infinity.
        InvalidInput: A row is left no token to sample.
    """
    some = tuple(branches)
    if since is None:
        return ScoreTokens(some, request, checked)
    return ScoreSuffixes(some, request, _each("since", since, len(some)), checked)


def _each(name: str, values: int | Sequence[int] | Int64Array, n: int) -> Int64Array:
    """Positions, one for all branches or one a branch: `[n]`."""
    return integers(name, [values] * n if np.ndim(values) == 0 else values, 0, MAX_TOKEN_ID, count=n)


def _check_token_request(request: object) -> None:
    if not isinstance(request, TokenRequest):
        raise InvalidInput(f"request must be a TokenRequest, got {shown(request)}")


def next_logits(
    branches: Sequence[Branch], *, since: int | Sequence[int] | Int64Array | None = None, checked: bool = True
) -> NextLogits:
    """Logits of the token after each branch, fp32 `[n, V]`; raises `NonFinite` if they hold NaN or infinity.

    With `since`, the rows are those that `score_tokens` has, branch by branch, `[R, V]`.

    The slow way, for what needs them all, such as logits processors: `score_tokens` does the rest without them.
    checked=False: such rows are given as they are, and a GPU is not waited for; the caller looks at them.
    """
    some = tuple(branches)
    return NextLogits(some, checked, None if since is None else _each("since", since, len(some)))
