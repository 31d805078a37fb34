"""Drafters that need no second model: what a text has said before, it may say again."""

import heapq
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from forktree.checks import integer, number
from forktree.errors import InvalidInput
from forktree.search.speculate import NO_DRAFT, TEXT, Drafter, DraftTree
from forktree.types import Int32Array, Int64Array


@dataclass(frozen=True, kw_only=True)
class PromptLookup(Drafter):
    """Copies what followed the last tokens where they occurred before (Saxena 2023, "Prompt lookup decoding").

    The longest suffix of the text that occurs earlier in it is looked for. What followed it the last few times is
    merged into a tree, the latest first; transformers' `prompt_lookup_num_tokens` takes the first time alone.

    Args:
        max_ngram: tokens of the longest suffix that is looked for.
        min_ngram: tokens of the shortest.
        num_tokens: maximum number of tokens copied from one place.
        num_places: maximum number of places.
    """

    max_ngram: int = 3
    min_ngram: int = 1
    num_tokens: int = 10
    num_places: int = 4

    def __post_init__(self) -> None:
        integer("min_ngram", self.min_ngram, 1)
        integer("max_ngram", self.max_ngram, self.min_ngram)
        integer("num_tokens", self.num_tokens, 1)
        integer("num_places", self.num_places, 1)

    def propose(self, tokens: Int32Array) -> DraftTree:
        """See `Drafter`."""
        matches = _matches(tokens, tokens, self.max_ngram)
        if not matches or matches[-1][1] < self.min_ngram:
            return NO_DRAFT
        ends, _ = matches[-1]
        places = ends[::-1][: self.num_places].tolist()
        return _merged([tokens[end : end + self.num_tokens].tolist() for end in places])


@dataclass(frozen=True, kw_only=True)
class SuffixDraft(Drafter):
    """Continues a text as texts with its suffix went on, most frequent first (Oliaro et al. 2024, "SuffixDecoding").

    For every length of suffix that occurs earlier, in this text or in texts that were finished before, the
    continuations make a tree whose nodes have a probability: how often the node follows its parent, times the parent's.
    The tree takes the most probable nodes first, at most `factor` times as many as the suffix has tokens; of all
    lengths and both sources the tree with the highest sum of probabilities is proposed. Occurrences are counted in the
    texts themselves instead of in the paper's suffix trees, which hold the same counts up to their depth.

    Args:
        max_suffix: maximum number of tokens of a suffix.
        factor: tokens drafted per token of the suffix.
        min_probability: less probable nodes are not drafted.
        max_remembered: maximum number of tokens of finished texts that are remembered; the oldest are forgotten.
    """

    max_suffix: int = 64
    factor: float = 1.0
    min_probability: float = 0.1
    max_remembered: int = 65536
    _finished: "_Remembered" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        integer("max_suffix", self.max_suffix, 1)
        integer("max_remembered", self.max_remembered, 0)
        number("factor", self.factor, "finite and more than 0", lambda x: x > 0)
        number("min_probability", self.min_probability, "a number in (0, 1]", lambda p: 0 < p <= 1)
        object.__setattr__(self, "_finished", _Remembered(self.max_remembered))

    def propose(self, tokens: Int32Array) -> DraftTree:
        """See `Drafter`."""
        best, score = NO_DRAFT, 0.0
        for source in (tokens, self._finished.tokens):
            for ends, length in _matches(source, tokens, self.max_suffix):
                draft, sum_ = self._tree(source, ends, length)
                if sum_ > score:
                    best, score = draft, sum_
        return best

    def finish(self, tokens: Int32Array, begin: int) -> None:
        """See `Drafter`."""
        self._finished.add(tokens[begin:])

    def _tree(self, source: Int32Array, ends: Int64Array, length: int) -> tuple[DraftTree, float]:
        """What follows `ends` in `source`, and the sum of probabilities."""
        room = max(1, int(self.factor * length))
        tokens: list[int] = []
        parents: list[int] = []
        heap: list[tuple[float, int, int, int, Int64Array]] = []  # -probability, order, parent, token, where it ended
        total, order = 0.0, 0

        def add(parent: int, probability: float, ends: Int64Array) -> None:
            nonlocal order
            at = ends[(ends < len(source)) & (source[np.minimum(ends, len(source) - 1)] >= 0)]
            follows, count = np.unique(source[at], return_counts=True)
            for token, times in zip(follows.tolist(), count.tolist(), strict=True):
                p = probability * times / len(at)
                if p >= self.min_probability:
                    heapq.heappush(heap, (-p, order, parent, token, at[source[at] == token] + 1))
                    order += 1

        add(TEXT, 1.0, ends)
        while heap and len(tokens) < room:
            p, _, parent, token, after = heapq.heappop(heap)
            tokens.append(token)
            parents.append(parent)
            total -= p
            add(len(tokens) - 1, -p, after)
        return DraftTree(tokens, parents), total


class TokenTable(Drafter):
    """Remembers for every token what the model last found likely after it (Luo et al. 2024, "Token Recycling").

    The draft is a tree of fixed shape: the child of rank r of a token is the r-th of those it remembers after it. The
    paper's tree was fitted to a validation set; this one takes the nodes whose product of `rank_rates` is highest.
    Tokens that were not seen yet have no children.

    Args:
        top_k: tokens remembered after each.
        num_nodes: maximum number of tokens drafted.
        rank_rates: how often the token of each rank is taken to be accepted, at least `top_k` of them, falling.
    """

    def __init__(
        self,
        *,
        top_k: int = 8,
        num_nodes: int = 80,
        rank_rates: Sequence[float] = (0.6, 0.15, 0.08, 0.05, 0.03, 0.02, 0.015, 0.01),
    ) -> None:
        self.top_k = integer("top_k", top_k, 1)
        integer("num_nodes", num_nodes, 1)
        rates = [number("rank_rates", rate, "numbers in (0, 1)", lambda r: 0 < r < 1) for rate in rank_rates]
        if len(rates) < top_k or sorted(rates, reverse=True) != rates:
            raise InvalidInput(f"rank_rates must be {top_k} numbers or more, each at most the one before, got {rates}")
        self._shape = _static_tree(rates[:top_k], num_nodes)
        self._after = np.full((0, top_k), -1, np.int32)

    def propose(self, tokens: Int32Array) -> DraftTree:
        """See `Drafter`."""
        after = self._after
        place, found = {TEXT: TEXT}, list[int]()
        parents: list[int] = []
        at = {TEXT: int(tokens[-1])}
        for node, (parent, rank) in enumerate(self._shape):
            if parent in place and at[parent] < len(after) and (token := int(after[at[parent], rank])) >= 0:
                place[node], at[node] = len(found), token
                found.append(token)
                parents.append(place[parent])
        return DraftTree(found, parents)

    def observe(self, tokens: Int64Array, top_ids: Int64Array) -> None:
        """See `Drafter`."""
        if (short := int(tokens.max(initial=-1)) + 1 - len(self._after)) > 0:
            self._after = np.pad(self._after, ((0, max(short, len(self._after))), (0, 0)), constant_values=-1)
        self._after[tokens, : top_ids.shape[1]] = top_ids


class _Remembered:
    """The newest tokens of finished texts, -1 before each text."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self.tokens = np.zeros(0, np.int32)

    def add(self, tokens: Int32Array) -> None:
        with self._lock:
            new = np.concatenate([self.tokens, np.full(1, -1, np.int32), tokens.astype(np.int32)])
            self.tokens = new[max(0, len(new) - self._limit) :]


def _matches(source: Int32Array, text: Int32Array, longest: int) -> list[tuple[Int64Array, int]]:
    """Where in `source` suffixes of `text`, of at most `longest` tokens, end before something follows.

    Returns:
        Places after a suffix in ascending order, `[n]`, and its length: of suffixes that end in the same places the
        longest one, of all of them in ascending order. Empty if not even the last token occurs.
    """
    found: list[tuple[Int64Array, int]] = []
    ends = np.arange(1, len(source))
    for length in range(min(longest, len(text))):
        inside = ends[ends > length]
        more = inside[source[inside - 1 - length] == text[len(text) - 1 - length]]
        if not len(more):
            break
        if found and len(more) == len(ends):
            found.pop()
        found.append((more, length + 1))
        ends = more
    return found


def _merged(chains: Sequence[Sequence[int]]) -> DraftTree:
    """A tree of several continuations: the first whole, of each other what differs from those before."""
    place: dict[tuple[int, int], int] = {}
    tokens: list[int] = []
    parents: list[int] = []
    for chain in chains:
        parent = TEXT
        for token in chain:
            if (parent, token) not in place:
                place[parent, token] = len(tokens)
                tokens.append(token)
                parents.append(parent)
            parent = place[parent, token]
    return DraftTree(tokens, parents)


def _static_tree(rates: Sequence[float], count: int) -> list[tuple[int, int]]:
    """Parent and rank of the `count` nodes with the highest products of rates, parents first."""
    nodes: list[tuple[int, int]] = []
    heap: list[tuple[float, int, int]] = [(-rates[0], TEXT, 0)]
    while len(nodes) < count:
        p, parent, rank = heapq.heappop(heap)
        nodes.append((parent, rank))
        if rank + 1 < len(rates):
            heapq.heappush(heap, (p * rates[rank + 1] / rates[rank], parent, rank + 1))
        heapq.heappush(heap, (p * rates[0], len(nodes) - 1, 0))
    return nodes


DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "prompt-lookup": PromptLookup,
    "suffix": SuffixDraft,
    "token-table": TokenTable,
}
"""Drafters by name, with their defaults."""
