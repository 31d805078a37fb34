"""What a search may await: requests that need a forward pass or a reward. The engine answers them.

    extension = await extend(branches, sampling, max_tokens=64, stop=step_end)
    rewards = await reward_branches(branches, reward)
    scores = await score_tokens(branches, TokenRequest(top_k=8, entropy=True))
    logits = await next_logits(branches)

Forks, drops, rewinds and reassignments are plain calls on branches and need no await.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from forktree.checks import integer, integers, shown
from forktree.errors import InvalidInput
from forktree.kv import Branch
from forktree.ops.sampling import Sampling
from forktree.ops.token_request import TokenRequest, TokenScores
from forktree.rewards.base import Reward, Rewards
from forktree.search.processors import Processor, check_processors
from forktree.types import MAX_TOKEN_ID

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

    reason: "eos" (an end-of-sequence token was drawn; it is not part of the branch), "stop" or "length".
    log_prob: sum of the drawn tokens' log-probs under the model's own distribution, EOS included. `[n]` fp64.
    num_tokens: tokens drawn, EOS included. `[n]` int64.
    """

    reason: list[str]
    log_prob: NDArray[np.float64]
    num_tokens: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Extend(Request[Extension]):
    """See `extend`."""

    branches: Sequence[Branch]
    sampling: Sampling
    max_tokens: NDArray[np.int64]
    eos_token_ids: frozenset[int]
    stop: Stop | None
    processors: Sequence[Processor]
    pad_token_id: int
    unfinished: Sequence[int] | None

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, Sampling):
            raise InvalidInput(f"sampling must be a Sampling, got {shown(self.sampling)}")
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
        if not isinstance(self.request, TokenRequest):
            raise InvalidInput(f"request must be a TokenRequest, got {shown(self.request)}")


@dataclass(frozen=True, eq=False)
class NextLogits(Request[Tensor]):
    """See `next_logits`."""

    branches: Sequence[Branch]
    checked: bool


def extend(
    branches: Sequence[Branch],
    sampling: Sampling,
    *,
    max_tokens: int | Sequence[int] | NDArray[np.int64],
    eos_token_ids: frozenset[int] = frozenset(),
    stop: Stop | None = None,
    processors: Sequence[Processor] = (),
    pad_token_id: int = 0,
    unfinished: Sequence[int] | None = None,
) -> Extend:
    """Draws tokens for every branch until `stop`, an EOS, or `max_tokens` (one for all, or one a branch).

    unfinished: of each branch, how many of its newest tokens, added by earlier calls, `stop` is to see before the new
    ones, so that it finds a text of which `max_tokens` left only the beginning. Default: none.

    processors: change the logits before `sampling` does, see `forktree.search.processors`: the slow way, as they need
    whole rows. They are shown what the branches see, padded by `pad_token_id`. `InvalidInput` is raised if they leave a
    branch no token, and what they or `stop` raise themselves; log-probs are those of the logits as they were.
    """
    some = tuple(branches)
    one = np.ndim(max_tokens) == 0
    limit = [integer("max_tokens", max_tokens, 1, MAX_TOKEN_ID)] * len(some) if one else max_tokens
    each = integers("max_tokens", limit, 1, MAX_TOKEN_ID, count=len(some))
    return Extend(some, sampling, each, frozenset(eos_token_ids), stop, tuple(processors), pad_token_id, unfinished)


def reward_branches(branches: Sequence[Branch], reward: Reward) -> RewardBranches:
    """Asks what every branch is worth as it stands. A failure is a value of its branch, not an exception."""
    return RewardBranches(tuple(branches), reward)


def score_tokens(branches: Sequence[Branch], request: TokenRequest, *, checked: bool = True) -> ScoreTokens:
    """What `request` asks of the token behind each branch, a row each, without a row of logits.

    Raises `NonFinite` if logits hold NaN or infinity, `InvalidInput` if a branch is left no token to draw.
    checked=False: such rows are given as they are, and a GPU is not waited for; the caller looks at them.
    """
    return ScoreTokens(tuple(branches), request, checked)


def next_logits(branches: Sequence[Branch], *, checked: bool = True) -> NextLogits:
    """Logits of the token behind each branch, fp32 `[n, V]`; raises `NonFinite` if they hold NaN or infinity.

    The slow way, for what needs them all, such as logits processors: `score_tokens` does the rest without them.
    checked=False: such rows are given as they are, and a GPU is not waited for; the caller looks at them.
    """
    return NextLogits(tuple(branches), checked)
