"""Drafters and payoffs for tests."""

from collections.abc import Sequence

import numpy as np

from forktree.search import Drafter, DraftTree
from forktree.search.payoff import Payoff

_CHOOSE = Payoff.choose


class Always(Payoff):
    """Verifies every draft whole."""

    def tries(self) -> bool:
        return True

    def choose(self, drafts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        _CHOOSE(self, drafts)
        self._kept = [np.arange(len(parents)) for parents in drafts]
        return [np.ones(len(parents), bool) for parents in drafts]


class RandomTrees(Drafter):
    """Trees of any shape, with siblings that are equal now and then, or nothing at all."""

    def __init__(self, vocab: int, *, seed: int = 0, largest: int = 12, top_k: int = 0) -> None:
        self.rng, self.vocab, self.largest, self.top_k = np.random.default_rng(seed), vocab, largest, top_k

    def propose(self, tokens: np.ndarray) -> DraftTree:
        n = int(self.rng.integers(0, self.largest + 1))
        parents = [int(self.rng.integers(-1, i)) for i in range(n)]
        return DraftTree(self.rng.integers(0, self.vocab, n).tolist(), parents)


class Knowing(Drafter):
    """Knows the texts that will be written, and hides the right token among wrong siblings.

    ahead: tokens of the right path. wrong: siblings of each of its tokens, each with a child of its own.
    """

    def __init__(self, texts: Sequence[Sequence[int]], vocab: int, *, ahead: int = 6, wrong: int = 0) -> None:
        self.texts, self.vocab, self.ahead, self.wrong = [list(t) for t in texts], vocab, ahead, wrong

    def propose(self, tokens: np.ndarray) -> DraftTree:
        have = tokens.tolist()
        text = next((t for t in self.texts if t[: len(have)] == have), [])
        found: list[int] = []
        parents: list[int] = []
        right = -1
        for i, token in enumerate(text[len(have) : len(have) + self.ahead]):
            for k in range(self.wrong):
                found += [(token + 1 + k) % self.vocab, (token + i) % self.vocab]
                parents += [right, len(found) - 2]
            found.append(token)
            parents.append(right)
            right = len(found) - 1
        return DraftTree(found, parents)
