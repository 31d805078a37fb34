"""What one search may cost. A search whose budget is spent ends with the best that it has."""

from dataclasses import dataclass, field

import numpy as np

from forktree.engine.counters import Counters
from forktree.types import Int64Array


@dataclass(frozen=True)
class Budget:
    """What one search may ask for, and what is left of it.

    It counts tokens that are generated and branches that are rewarded, not what is computed for them: so it is the same
    whatever else runs, whichever prefixes were kept, and whatever had to be computed twice.

    Args:
        counters: what the search has cost so far.
        max_model_tokens: maximum number of tokens generated over all texts of the search; None: no limit.
        max_reward_calls: maximum number of branches rewarded; None: no limit.
    """

    counters: Counters = field(default_factory=Counters)
    max_model_tokens: int | None = None
    max_reward_calls: int | None = None

    @property
    def tokens_left(self) -> float:
        """Tokens that may still be generated; infinity without a limit."""
        return np.inf if self.max_model_tokens is None else max(0, self.max_model_tokens - self.counters.sampled_tokens)

    @property
    def calls_left(self) -> float:
        """Branches that may still be rewarded; infinity without a limit."""
        return np.inf if self.max_reward_calls is None else max(0, self.max_reward_calls - self.counters.reward_calls)

    @property
    def spent(self) -> bool:
        """Whether one of the two is used up."""
        return min(self.tokens_left, self.calls_left) == 0

    def limit_tokens(self, max_tokens: Int64Array) -> Int64Array:
        """Shares what is left among texts that are extended side by side.

        Args:
            max_tokens: how many tokens each could use, int64 `[n]`.

        Returns:
            How many each may use, int64 `[n]`: `max_tokens` if there is enough. Otherwise all that is left, in equal
            shares, of which nobody has more than it could use; the first ones have what does not divide.
        """
        if max_tokens.sum() <= self.tokens_left:
            return max_tokens
        left = int(self.tokens_left)
        low, high = 0, int(max_tokens.max())  # the largest share that all can have
        while low < high:
            share = (low + high + 1) // 2
            low, high = (share, high) if np.minimum(max_tokens, share).sum() <= left else (low, share - 1)
        shares = np.minimum(max_tokens, low)
        shares[np.flatnonzero(max_tokens > low)[: left - int(shares.sum())]] += 1
        return shares
