"""Searches that vote: on a chain whose answers can be enumerated, and by hand from the samples themselves."""

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from forktree import (
    BestOfMajority,
    BestOfN,
    Decoder,
    FunctionReward,
    InvalidInput,
    MajorityOfTheBests,
    MajorityVote,
    RewardError,
    Sample,
    SearchResult,
    WeightedVote,
)
from forktree.search.votes import majority_of_the_bests
from markov import EOS, MarkovLM
from searches import over_seeds
from tiny import assert_all_returned

# the answer is the last letter; each has several texts before it
CHAIN = MarkovLM(
    {
        ":": {"x": 0.5, "y": 0.5},
        "x": {"x": 0.3, "a": 0.3, "b": 0.4},
        "y": {"y": 0.2, "a": 0.5, "b": 0.1, "c": 0.1, "n": 0.1},
        **{end: {EOS: 1} for end in "abcn"},
    }
)
REWARDS = {"a": 0.3, "b": 0.9, "c": 0.6}


def answer(text: str) -> str | None:
    return None if text.endswith("n") else text[-1]


def worth(prompt: str, response: str) -> float:
    """By its answer, a little less for longer texts; fails for texts that begin with yy."""
    if response.startswith("yy"):
        raise ValueError("no good")
    return REWARDS.get(response[-1], 0.5) * 0.95 ** len(response)


def run(search: Any, *, seed: int = 0) -> SearchResult:
    (result,) = CHAIN.decoder.search(":", search, max_new_tokens=12, seed=seed)
    assert result.error is None, result.error
    return result


def samples(n: int, *, seed: int = 0) -> list[str]:
    """The texts that every search here selects among."""
    return [c.text for c in run(Sample(num_return_sequences=n, temperature=1.0), seed=seed).candidates]


OPTIONS = dict(answer=answer, num_samples=24, temperature=1.0)


@pytest.mark.parametrize("seed", range(5))
def test_a_weighted_vote_sums_the_rewards_of_each_answer(seed: int) -> None:
    candidates = run(WeightedVote(reward=FunctionReward(worth), **OPTIONS), seed=seed).candidates
    texts = samples(24, seed=seed)
    assert sorted(c.text for c in candidates) == sorted(texts)
    weight = {t: 0.0 if t.startswith("yy") else worth(":", t) for t in texts}
    total = sum(weight[t] for t in texts)
    sums = {a: sum(weight[t] for t in texts if answer(t) == a) / total for a in set(map(answer, texts))}
    for c in candidates:
        assert c.score == pytest.approx(0.0 if answer(c.text) is None else sums[answer(c.text)])
        assert (c.hypothesis.error is not None) == c.text.startswith("yy")
    assert [c.score for c in candidates] == sorted((c.score for c in candidates), reverse=True)
    first = [c.text for c in candidates if answer(c.text) == answer(candidates[0].text)]
    assert weight[first[0]] == max(weight[t] for t in first), "the best text speaks for its answer"


def test_a_weighted_vote_refuses_rewards_that_are_not_weights() -> None:
    search = WeightedVote(reward=FunctionReward(lambda p, r: -2.0), **OPTIONS)
    (result,) = CHAIN.decoder.search(":", search, max_new_tokens=12)
    assert isinstance(result.error, InvalidInput) and "[0, 1]" in str(result.error)


def test_a_majority_wins_as_often_as_enumeration_says() -> None:
    """Of three votes; the answer that comes first wins where all differ."""
    exact: Counter[str | None] = Counter()
    shares: Counter[str | None] = Counter()
    for text, p in CHAIN.texts(":", 12).items():
        shares[answer(text)] += p
    for votes in itertools.product(shares, repeat=3):
        counts = Counter(v for v in votes if v is not None)
        winner = max(counts, key=lambda v: (counts[v], -votes.index(v)), default=None)
        exact[winner] += math.prod(shares[v] for v in votes)
    seeds = 400
    search = MajorityVote(answer=answer, num_samples=3, temperature=1.0)
    found = Counter(answer(r.text) for r in over_seeds(CHAIN.decoder, ":", search, seeds, max_new_tokens=12))
    for winner, p in exact.items():
        assert found[winner] / seeds == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / seeds) + 1e-6), winner


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.proves(134)
def test_best_of_majority_rewards_only_what_is_frequent(seed: int) -> None:
    asked: list[str] = []
    reward = FunctionReward(lambda p, r: (asked.append(r), worth(p, r))[1])
    candidates = run(BestOfMajority(reward=reward, alpha=0.2, num_return_sequences=2, **OPTIONS), seed=seed).candidates
    texts = samples(24, seed=seed)
    counts = Counter(map(answer, texts))
    often = {a for a in counts if a is not None and counts[a] / 24 >= 0.2}
    assert len(often) >= 2, "or all are asked"
    assert sorted(asked) == sorted(t for t in texts if answer(t) in often)
    worths = {a: np.mean([worth("", t) for t in texts if answer(t) == a and not t.startswith("yy")]) for a in often}
    best = sorted(often, key=lambda a: -worths[a])[:2]
    assert [answer(c.text) for c in candidates] == best
    assert [c.score for c in candidates] == pytest.approx([worths[a] for a in best])


@pytest.mark.proves(134)
def test_best_of_majority_with_k_1_is_best_of_n_or_majority_at_its_limits() -> None:
    exact = FunctionReward(lambda p, r: REWARDS.get(r[-1], 0.0))
    for seed in range(8):
        options = {**OPTIONS, "num_samples": 9}
        bon = run(BestOfN(reward=exact, num_samples=9, temperature=1.0), seed=seed).best
        assert answer(run(BestOfMajority(reward=exact, alpha=0, **options), seed=seed).text) == answer(bon.text)
        voted = run(MajorityVote(**options), seed=seed)
        only = BestOfMajority(reward=exact, alpha=voted.best.score, **options)
        rivals = {answer(c.text) for c in voted.candidates if c.score == voted.best.score}
        assert answer(run(only, seed=seed).text) == max(rivals, key=lambda a: REWARDS[a])


def test_majority_of_the_bests_ranks_by_its_distribution() -> None:
    search = MajorityOfTheBests(reward=FunctionReward(worth), **OPTIONS)
    candidates = run(search).candidates
    texts = samples(24)
    said = [answer(t) for t in texts]
    order = [a for a in dict.fromkeys(said) if a is not None]
    groups = np.array([-1 if a is None else order.index(a) for a in said])
    rewards = np.array([math.nan if t.startswith("yy") else worth("", t) for t in texts])
    shares = dict(zip(said, majority_of_the_bests(groups, rewards, 5), strict=True))
    assert [c.score for c in candidates] == pytest.approx([shares[answer(c.text)] for c in candidates])
    assert [c.score for c in candidates] == sorted((c.score for c in candidates), reverse=True)


SEARCHES = {
    "majority": lambda answer: MajorityVote(answer=answer, num_samples=12),
    "weighted": lambda answer: WeightedVote(answer=answer, num_samples=12, reward=FunctionReward(worth)),
    "best of majority": lambda answer: BestOfMajority(answer=answer, num_samples=12, reward=FunctionReward(worth)),
    "bests": lambda answer: MajorityOfTheBests(answer=answer, num_samples=12, reward=FunctionReward(worth)),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_an_answer_that_fails_costs_its_sample_never_the_search(name: str) -> None:
    def broken(text: str) -> Any:
        if text.startswith("x"):
            return [text]
        return math.nan if text.endswith("b") else answer(text)

    decoder = CHAIN.new_decoder()
    (result,) = decoder.search(":", SEARCHES[name](broken), max_new_tokens=12, seed=1)
    assert result.error is None
    assert result.text.startswith("y") and result.text[-1] in "ac"
    for c in result.candidates:
        bad = c.text.startswith("x") or c.text.endswith("b")
        assert math.isnan(c.score) == bad
        assert not bad or isinstance(c.hypothesis.error, RewardError)
    assert_all_returned(decoder.worker)
    (result,) = decoder.search(":", SEARCHES[name](lambda text: [text]), max_new_tokens=12)
    assert isinstance(result.error, RewardError) and "no branch has a reward left" in str(result.error)
    assert_all_returned(decoder.worker)


@pytest.mark.parametrize("name", SEARCHES)
def test_samples_without_an_answer_win_only_if_all_are_such(name: str) -> None:
    for seed in range(4):
        none = run(SEARCHES[name](lambda text: None), seed=seed)
        assert none.text and none.best.score == 0
        some = run(SEARCHES[name](lambda text: text if text == "xa" else None), seed=seed)
        assert some.text == "xa" or all(c.text != "xa" for c in some.candidates)


def test_answers_are_read_by_name_and_merged_by_equal() -> None:
    named = run(MajorityVote(answer="regex:[abc]", num_samples=24, temperature=1.0))
    assert [c.text for c in named.candidates] == [c.text for c in run(MajorityVote(**OPTIONS)).candidates]
    merged = run(MajorityVote(equal=lambda a, b: {a, b} == {"a", "c"}, **OPTIONS))
    counts = Counter(map(answer, samples(24)))
    assert {round(c.score * 24) for c in merged.candidates if c.text[-1] in "ac"} == {counts["a"] + counts["c"]}


@pytest.mark.parametrize("name", SEARCHES)
def test_votes_need_text(name: str) -> None:
    decoder = Decoder(CHAIN.model, num_slots=256)
    (result,) = decoder.search([CHAIN.ids(":")], SEARCHES[name](answer), max_new_tokens=12)
    assert isinstance(result.error, InvalidInput) and "Decoder with a tokenizer" in str(result.error)


@pytest.mark.parametrize(
    ("search", "options", "part"),
    [
        (MajorityVote, dict(answer="boxd"), "answer must be a function of the text, boxed"),
        (MajorityVote, dict(answer=answer, equal="same"), "equal must be"),
        (MajorityVote, dict(answer=answer, num_samples=0), "num_samples"),
        (WeightedVote, dict(answer=answer, reward=len), "reward must be"),
        (BestOfMajority, dict(alpha=1.5), "alpha must be a share"),
        (BestOfMajority, dict(num_samples=4, num_return_sequences=5), "num_return_sequences must be"),
        (MajorityOfTheBests, dict(subset_size=0), "subset_size"),
    ],
)
def test_bad_settings_are_named(search: Any, options: dict[str, Any], part: str) -> None:
    rest = {} if search is MajorityVote else dict(reward=FunctionReward(worth))
    with pytest.raises(InvalidInput, match=part):
        search(**{"answer": answer, **rest, **options})
