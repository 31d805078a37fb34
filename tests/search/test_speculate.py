"""Speculative decoding writes what plain decoding writes, whatever is drafted."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from drafting import Always, Knowing, RandomTrees
from forktree import Decoder, FunctionReward, Greedy, InvalidInput, OutOfMemory, Sample, Sampling
from forktree.engine.counters import Counters
from forktree.search import DraftTree, PromptLookup, SearchContext, SuffixDraft, TokenTable
from forktree.search.payoff import Payoff
from forktree.search.registry import searches, settings_of
from forktree.search.request import Extension, extend
from forktree.search.speculate import Drafter, speculative_extend
from searches import Scripted, digits

PROMPTS = ["12+3=", "abcabcab", "7"]
NEW = 24
OPTIONS = dict(max_tokens=[NEW, 7, 1, NEW, 12, NEW], eos_token_ids=frozenset([0]))
SAMPLINGS = {
    "greedy": Sampling(temperature=0),
    "sampled": Sampling(),
    "cold": Sampling(temperature=0.3),
    "truncated": Sampling(temperature=0.9, top_p=0.7, min_p=0.1, top_k=8),
}


class Grammar:
    """A stateful processor: the sum of a text's tokens decides what may follow. It never sees a text of two 5s."""

    def __init__(self) -> None:
        self.states: list[int] = []
        self.added: list[int] = []

    def fork(self, parents: torch.Tensor, added: torch.Tensor) -> None:
        self.states = [0 if p < 0 else self.states[p] for p in parents.tolist()]
        self.added = added.tolist()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for i, n in enumerate(self.added):
            new = input_ids[i, len(input_ids[i]) - n :].tolist()
            self.states[i] += sum(new)
        banned = torch.tensor([[(s + v) % 3 == 0 for v in range(scores.shape[1])] for s in self.states[: len(scores)]])
        return scores.masked_fill(banned, -torch.inf)


PROCESSORS: dict[str, Callable[[], list[Any]]] = {
    "none": list,
    "no bigram twice": lambda: [hf.NoRepeatNGramLogitsProcessor(2)],
    "grammar": lambda: [Grammar(), hf.TemperatureLogitsWarper(0.7)],
}
DRAFTERS: dict[str, Callable[[Sequence[Sequence[int]]], Drafter]] = {
    "lookup": lambda texts: PromptLookup(),
    "suffix": lambda texts: SuffixDraft(min_probability=0.05, factor=4.0),
    "table": lambda texts: TokenTable(top_k=4, num_nodes=12),
    "random": lambda texts: RandomTrees(tiny.VOCAB),
    "random, observing": lambda texts: RandomTrees(tiny.VOCAB, top_k=3, seed=5),
    "right": lambda texts: Knowing(texts, tiny.VOCAB),
    "right among wrong ones": lambda texts: Knowing(texts, tiny.VOCAB, ahead=3, wrong=2),
}


def written(
    decoder: Decoder, how: Callable[[list[Any]], Any], *, forks: int = 2, seed: int = 3
) -> tuple[list[list[int]], Extension]:
    """Texts of forks of every prompt after `how` was awaited, and what it returned."""
    found: list[Any] = []

    async def script(context: SearchContext) -> None:
        roots = [context.root, *(context.open(p) for p in PROMPTS[1:])]
        branches = [fork for root in roots for fork in root.fork(forks)]
        done = await how(branches)
        texts = [b.tokens.tolist() for b in branches]
        again = [b.fork(1)[0].key for b in branches] + [b.key for b in branches]
        found.append((texts, done, again))

    (result,) = decoder.search([PROMPTS[0]], Scripted(script), seed=seed)
    if result.error is not None:
        raise result.error
    tiny.assert_all_returned(decoder.worker)
    return found[0]


def same(one: Any, other: Any) -> None:
    """Texts, ends and counts are equal, the keys of later random numbers too, and log-probs up to rounding."""
    assert one[0] == other[0] and one[2] == other[2]
    assert one[1].reason == other[1].reason
    np.testing.assert_array_equal(one[1].num_tokens, other[1].num_tokens)
    np.testing.assert_allclose(one[1].log_prob, other[1].log_prob, atol=2e-4)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny.decoder()


@cache
def plainly(decoder: Decoder, sampling: str, processors: str) -> Any:
    """What plain decoding writes."""
    some = PROCESSORS[processors]()
    return written(decoder, lambda branches: extend(branches, SAMPLINGS[sampling], processors=some, **OPTIONS))


CASES = [(d, s, "none") for d in DRAFTERS for s in SAMPLINGS]
CASES += [(d, s, "grammar") for d in ("lookup", "right among wrong ones", "random, observing") for s in SAMPLINGS]
CASES += [(d, "sampled", "no bigram twice") for d in DRAFTERS]


@pytest.mark.proves(102)
@pytest.mark.parametrize(("drafter", "sampling", "processors"), CASES)
def test_texts_are_those_of_plain_decoding(decoder: Decoder, drafter: str, sampling: str, processors: str) -> None:
    expected = plainly(decoder, sampling, processors)
    known = dict(drafter=DRAFTERS[drafter](expected[0]), payoff=Always(), counters=Counters())
    how = dict(sampling=SAMPLINGS[sampling], processors=PROCESSORS[processors](), **known, **OPTIONS)
    same(written(decoder, lambda branches: speculative_extend(branches, **how)), expected)
    counters = known["counters"]
    assert counters.drafted_tokens >= counters.accepted_tokens
    if drafter.startswith("right"):
        assert counters.accepted_tokens >= counters.drafts  # or the test would show nothing


ANYTHING = given(
    seed=st.integers(0, 10**6),
    sampling=st.sampled_from(sorted(SAMPLINGS)),
    processors=st.sampled_from(sorted(PROCESSORS)),
    largest=st.integers(1, 16),
    limit=st.lists(st.integers(1, 12), min_size=3, max_size=3),
    eos=st.sets(st.integers(0, tiny.VOCAB - 1), max_size=2),
    stop=st.integers(2, 7),
)


@pytest.mark.proves(102)
@settings(max_examples=8, deadline=None)
@ANYTHING
def test_random_trees(decoder: Decoder, **case: Any) -> None:
    check_random_trees(decoder, **case)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@ANYTHING
def test_many_random_trees(decoder: Decoder, **case: Any) -> None:
    check_random_trees(decoder, **case)


def check_random_trees(
    decoder: Decoder,
    seed: int,
    sampling: str,
    processors: str,
    largest: int,
    limit: list[int],
    eos: set[int],
    stop: int,
) -> None:
    """Stops and ends fall anywhere within what was accepted."""
    options = dict(
        max_tokens=limit,
        eos_token_ids=frozenset(eos),
        stop=lambda token, tokens: sum(tokens) % stop == 0,
        unfinished=[1, 0, 1],
    )
    some = dict(sampling=SAMPLINGS[sampling], **options)
    plain = written(decoder, lambda b: extend(b, processors=PROCESSORS[processors](), **some), forks=1, seed=seed)
    for drafter in (RandomTrees(tiny.VOCAB, seed=seed, largest=largest), Knowing(plain[0], tiny.VOCAB, wrong=seed % 3)):
        known = dict(drafter=drafter, payoff=Always(), processors=PROCESSORS[processors]())
        same(written(decoder, lambda b: speculative_extend(b, **known, **some), forks=1, seed=seed), plain)  # noqa: B023


def test_a_processor_that_looks_at_padding(decoder: Decoder) -> None:
    """One branch is never padded, and a penalty sees the same rows."""

    options = dict(processors=[hf.RepetitionPenaltyLogitsProcessor(1.4)], max_tokens=NEW)

    def some(how: Any, **known: Any) -> Any:
        return lambda b: how(b[:1], Sampling(), **options, **known)

    expected = written(decoder, some(extend))
    same(written(decoder, some(speculative_extend, drafter=RandomTrees(tiny.VOCAB), payoff=Always())), expected)


def test_what_is_rejected_takes_no_slots(decoder: Decoder) -> None:
    """After every pass the tree holds the text, and nothing is computed twice."""
    expected = plainly(decoder, "sampled", "none")[0]

    class Watching(Knowing):
        def propose(self, tokens: np.ndarray) -> DraftTree:
            worker = decoder.worker
            alive = [b for b in worker.tree._handles if b is not None]
            assert len(alive) <= 8 + 3  # six texts, two roots, kept prompts
            texts = {tuple(b.tokens[: i + 1].tolist()) for b in alive for i in range(b.length)}
            held = worker.tree.num_slots - np.maximum(worker.tree.num_slots - worker.tree.length, 0)
            assert int(held.sum()) <= len(texts)
            worker.tree.check()
            return super().propose(tokens)

    drafter = Watching(expected, tiny.VOCAB, ahead=3, wrong=1)
    how = dict(drafter=drafter, payoff=Always(), **OPTIONS)
    before = decoder.worker.tokens_computed
    found = written(decoder, lambda branches: speculative_extend(branches, SAMPLINGS["sampled"], **how))
    assert found[0] == expected
    assert decoder.worker.tokens_computed > before


def test_one_pass_verifies_a_chain(decoder: Decoder) -> None:
    """A draft of k right tokens costs one pass and gives k + 1 tokens; each is computed once."""
    expected = written(decoder, lambda b: extend(b[:1], Sampling(), max_tokens=NEW))
    counters = Counters()
    how = dict(drafter=Knowing(expected[0], tiny.VOCAB, ahead=7), payoff=Always(), counters=counters)
    before = decoder.worker.forwards, decoder.worker.tokens_computed
    found = written(decoder, lambda b: speculative_extend(b[:1], Sampling(), max_tokens=NEW, **how))
    assert found[0] == expected[0]
    assert decoder.worker.forwards - before[0] <= 4  # the prompt with the first draft, then 8 tokens each
    assert counters.drafts == 3 and counters.drafted_tokens == counters.accepted_tokens == 21


def test_without_room_for_drafts_it_decodes_plainly() -> None:
    """What `extend` can do in a small pool, it can do too."""
    small = tiny.decoder(num_slots=60, prefix_cache=False)
    options = dict(max_tokens=20)

    def alone(how: Any, **known: Any) -> Any:
        return written(small, lambda b: how(b[:2], Sampling(), **options, **known), forks=1)

    expected = alone(extend)
    same(alone(speculative_extend, drafter=RandomTrees(tiny.VOCAB, largest=80), payoff=Always()), expected)
    with pytest.raises(OutOfMemory):
        written(
            small, lambda b: speculative_extend(b, Sampling(), max_tokens=60, drafter=PromptLookup(), payoff=Always())
        )


def test_failures_are_those_of_plain_decoding(decoder: Decoder) -> None:
    """A processor that leaves nothing, and a stop that raises, fail at the same token."""

    def bans(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores if input_ids.shape[1] < 12 else torch.full_like(scores, -torch.inf)

    def stop(token: int, tokens: Sequence[int]) -> bool:
        raise ArithmeticError(f"after {len(tokens)}")

    for options, error in ((dict(processors=[bans]), "no token at position 12"), (dict(stop=stop), "after 1")):
        for how in (extend, partial(speculative_extend, drafter=RandomTrees(tiny.VOCAB), payoff=Always())):
            with pytest.raises((InvalidInput, ArithmeticError), match=error):
                written(decoder, lambda b: how(b[:1], Sampling(), max_tokens=NEW, **options))  # noqa: B023
            tiny.assert_all_returned(decoder.worker)


def test_drafts_are_checked() -> None:
    for tokens, parents, message in (([1, 2], [-1], "2 and 1"), ([1, 2], [-1, 1], "token 1"), ([1], [-2], "-2")):
        with pytest.raises(InvalidInput, match=message):
            DraftTree(tokens, parents)
    draft = DraftTree([5, 6, 7, 8], [-1, 0, 0, 2])
    assert draft.depths() == [1, 2, 2, 3]
    assert draft.chosen([True, True, False, True]) == DraftTree([5, 6], [-1, 0])
    assert DraftTree.chain([4, 5]) == DraftTree([4, 5], [-1, 0])


# ---------------------------------------------------------------- every search

PLAIN = "12+3=45+12+3=45+1"


def settings_for(name: str) -> dict[str, Any]:
    """What a registered search needs beside its defaults."""
    given = {
        "reward": FunctionReward(digits),
        "answer": lambda text: text[:2] or None,
        "step_delimiter": "5",
        "max_step_tokens": 6,
        "max_steps": 4,
        "num_samples": 5,
        "num_particles": 5,
    }
    return {n: given[n] for n in settings_of(searches()[name]) if n in given}


DRAFTING = [name for name, search in searches().items() if "drafter" in settings_of(search)]


@pytest.mark.parametrize("name", DRAFTING)
@pytest.mark.parametrize("always", [True, False])
def test_a_drafter_changes_no_search(
    decoder: Decoder, name: str, always: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates, scores and the whole trace are those of the search without it."""
    if always:
        monkeypatch.setattr(Payoff, "tries", Always.tries)
        monkeypatch.setattr(Payoff, "choose", Always.choose)
    search, outcomes = searches()[name](**settings_for(name)), []
    for one in (search, replace(search, drafter=PromptLookup()), replace(search, drafter=RandomTrees(tiny.VOCAB))):
        (result,) = decoder.search([PLAIN], one, max_new_tokens=NEW, seed=5)
        tiny.assert_all_returned(decoder.worker)
        assert result.candidates
        outcomes.append((result, [c.token_ids for c in result.candidates], ids_of(result.trace.events)))
        if one is not search and always:
            assert result.counters.drafts > 0
    for result, ids, events in outcomes[1:]:
        assert ids == outcomes[0][1] and events == outcomes[0][2]
        scores = [[c.score for c in r.candidates] for r in (result, outcomes[0][0])]
        np.testing.assert_allclose(*scores, rtol=1e-4)


def ids_of(events: list[dict[str, Any]]) -> list[Any]:
    """What of a trace does not depend on rounding."""
    return [[e.get(k) for k in ("event", "nodes", "parents", "tokens", "ends", "ancestors")] for e in events]


@pytest.mark.parametrize("budget", [5, 40])
def test_budgets_are_kept(decoder: Decoder, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that drafts gave count like any others."""
    monkeypatch.setattr(Payoff, "tries", Always.tries)
    monkeypatch.setattr(Payoff, "choose", Always.choose)
    found = []
    for drafter in (None, PromptLookup(), RandomTrees(tiny.VOCAB)):
        search = Sample(num_return_sequences=3, drafter=drafter)
        (result,) = decoder.search([PLAIN], search, max_new_tokens=NEW, seed=5, max_model_tokens=budget)
        found.append(([c.token_ids for c in result.candidates], result.counters.sampled_tokens))
    assert found[1:] == found[:1] * 2 and found[0][1] <= budget


def test_greedy_and_samplers_take_drafters() -> None:
    assert {"greedy", "sample", "best-of-n", "majority-vote", "particle"} <= set(DRAFTING)
    with pytest.raises(InvalidInput, match="drafter must be a Drafter"):
        Greedy(drafter="prompt lookup")
