"""What drafters propose, against brute force; and when drafting is left alone."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from drafting import Always
from forktree import InvalidInput
from forktree.search import DraftTree, PromptLookup, SuffixDraft, TokenTable
from forktree.search.payoff import MAX_STRETCH, Payoff


def text(seed: int, n: int, vocab: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, n).astype(np.int32)


def paths(draft: DraftTree) -> list[tuple[int, ...]]:
    """The tokens that lead to each node."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), int(token)))
    return found


def places(source: Sequence[int], suffix: Sequence[int]) -> list[int]:
    """Where something follows an occurrence of `suffix`."""
    n = len(suffix)
    return [e for e in range(n, len(source)) if list(source[e - n : e]) == list(suffix)]


@pytest.mark.parametrize("seed", range(20))
def test_prompt_lookup_merges_what_followed_the_longest_suffix(seed: int) -> None:
    tokens = text(seed, 30 + seed, 2 + seed % 4).tolist()
    drafter = PromptLookup(max_ngram=4, num_tokens=5, num_places=3)
    expected: list[tuple[int, ...]] = []
    for n in (4, 3, 2, 1):
        if found := places(tokens, tokens[-n:]):
            for end in sorted(found, reverse=True)[:3]:
                chain = tokens[end : end + 5]
                expected += [tuple(chain[:i]) for i in range(1, len(chain) + 1)]
            break
    assert paths(drafter.propose(np.array(tokens, np.int32))) == list(dict.fromkeys(expected))


def test_prompt_lookup_finds_nothing_new() -> None:
    for tokens in ([5], [1, 2, 3]):
        assert len(PromptLookup().propose(np.array(tokens, np.int32))) == 0
    assert len(PromptLookup(min_ngram=2).propose(np.array([7, 1, 7], np.int32))) == 0
    with pytest.raises(InvalidInput, match="max_ngram must be an integer of at least 3, got 2"):
        PromptLookup(min_ngram=3, max_ngram=2)


def best_suffix_trees(sources: Sequence[list[int]], tokens: list[int], drafter: SuffixDraft) -> list[dict]:
    """Of each source and suffix length the probabilities of the tree that would be proposed, by counting."""
    trees = []
    for source in sources:
        for m in range(1, min(drafter.max_suffix, len(tokens)) + 1):
            ends = places(source, tokens[-m:])
            counts: Counter[tuple[int, ...]] = Counter()
            for end in ends:
                for d in range(1, int(drafter.factor * m) + 1):
                    if end + d <= len(source):
                        counts[tuple(source[end : end + d])] += 1
            probability: dict[tuple[int, ...], float] = {(): 1.0}
            for path in sorted(counts, key=len):
                siblings = sum(c for p, c in counts.items() if p[:-1] == path[:-1] and len(p) == len(path))
                probability[path] = probability[path[:-1]] * counts[path] / siblings
            del probability[()]
            likely = {p: x for p, x in probability.items() if x >= drafter.min_probability}
            room = max(1, int(drafter.factor * m))
            trees.append((sum(sorted(likely.values(), reverse=True)[:room]), likely))
    return trees


@pytest.mark.parametrize("seed", range(12))
def test_suffix_drafts_are_the_best_of_all_lengths(seed: int) -> None:
    drafter = SuffixDraft(max_suffix=7, factor=1 + seed % 3, min_probability=0.15)
    finished, tokens = text(seed + 100, 25).tolist(), text(seed, 20).tolist()
    if seed % 2:
        drafter.finish(np.array([9, 9, *finished], np.int32), 2)
    sources = [tokens, finished] if seed % 2 else [tokens]
    trees = best_suffix_trees(sources, tokens, drafter)
    score = max(s for s, _ in trees)
    found = paths(drafter.propose(np.array(tokens, np.int32)))
    sums = [sum(likely[p] for p in found) for _, likely in trees if set(found) <= set(likely)]
    assert len(set(found)) == len(found) and any(s == pytest.approx(score) for s in sums)


def test_suffix_drafts_remember_the_newest_texts_alone() -> None:
    drafter = SuffixDraft(max_remembered=6, min_probability=0.5)
    for k in range(5):
        drafter.finish(np.array([10 * k, 10 * k + 1, 10 * k + 2], np.int32), 0)
    assert len(drafter.propose(np.array([0], np.int32))) == 0
    assert drafter.propose(np.array([40], np.int32)).tokens == [41]
    assert len(drafter.propose(np.array([32], np.int32))) == 0  # texts do not run into one another


def test_a_token_table_recalls_what_the_model_found_likely() -> None:
    drafter = TokenTable(top_k=2, num_nodes=7, rank_rates=(0.5, 0.4))
    tokens = np.array([3], np.int32)
    assert len(drafter.propose(tokens)) == 0
    drafter.observe(np.array([3, 5]), np.array([[5, 7], [3, 1]]))
    # the nodes of the highest products: 0, 1, 00, 01, 10, 11, 000; nothing is known after 7
    assert paths(drafter.propose(tokens)) == [(5,), (7,), (5, 3), (5, 1), (5, 3, 5)]
    drafter.observe(np.array([3]), np.array([[1, 5]]))
    assert paths(drafter.propose(tokens))[:2] == [(1,), (5,)]
    with pytest.raises(InvalidInput, match="rank_rates must be 3 numbers or more"):
        TokenTable(top_k=3, rank_rates=(0.1, 0.2, 0.05))


# ---------------------------------------------------------------- what pays


class Machine:
    """Time that passes by rows alone, and a text of which a share of drafts is right.

    row: seconds of another row, of those of a pass. right: of a token the probability that its draft is accepted.
    """

    def __init__(self, row: float, right: float, *, finding: float = 0.01) -> None:
        self.now, self.row, self.right, self.finding = 0.0, row, right, finding
        self.rng = np.random.default_rng(0)

    def run(self, payoff: Payoff, tokens: int, rows: int = 1) -> float:
        """Seconds for so many tokens of each row, on average, of those that plain decoding takes."""
        begin, done = self.now, 0.0
        drafts = [list(range(-1, 9))] * rows
        while done < tokens:
            payoff.begin(rows)
            kept = []
            if payoff.tries():
                self.now += self.finding
                kept = payoff.choose(drafts)
            if any(k.any() for k in kept):
                self.now += 1 + self.row * sum(int(k.sum()) for k in kept)
                accepted = [
                    list(range(min(int(k.sum()), int(self.rng.geometric(1 - self.right)) - 1))) for k in kept
                ]
                payoff.verified(accepted, measured=True)
                done += 1 + sum(map(len, accepted)) / rows
            else:
                count = min(payoff.stretch, math.ceil(tokens - done))
                self.now += count
                payoff.plain(count, measured=True)
                done += count
        return (self.now - begin) / done


@pytest.mark.parametrize(
    ("row", "right", "low", "high"),
    [
        (0.03, 0.9, 0, 0.35),  # copies pay
        (0.03, 0.0, 1.0, 1.05),  # nothing is ever right
        (1.0, 0.9, 0.9, 1.05),  # rows are as dear as passes
        (0.3, 0.3, 0.9, 1.05),
        (0.02, 0.5, 0.4, 0.8),
    ],
)
def test_drafting_is_never_much_slower(row: float, right: float, low: float, high: float) -> None:
    payoff = Payoff()
    machine = Machine(row, right)
    payoff._clock = lambda: machine.now
    assert low <= machine.run(payoff, 400) <= high


def test_it_notices_when_a_text_begins_to_repeat_itself_and_when_it_ends() -> None:
    payoff, machine = Payoff(), Machine(0.05, 0.0)
    payoff._clock = lambda: machine.now
    assert machine.run(payoff, 200) <= 1.06 and payoff.stretch == MAX_STRETCH
    machine.right = 0.95
    assert machine.run(payoff, 200) < 0.6
    machine.right = 0.0
    assert machine.run(payoff, 200) <= 1.1


def test_a_full_batch_drafts_nothing() -> None:
    payoff, machine = Payoff(), Machine(0.0, 0.999)
    payoff._clock = lambda: machine.now
    assert machine.run(payoff, 50, rows=32) == pytest.approx(1)
    assert machine.run(payoff, 50, rows=31) < 1


def test_always_keeps_everything() -> None:
    payoff = Always()
    payoff.begin(2)
    assert [k.tolist() for k in payoff.choose([[-1, 0], [], [-1]])] == [[True, True], [], [True]]
