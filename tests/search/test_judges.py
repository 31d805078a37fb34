"""Judges on chains whose replies can be enumerated: the last character of a prompt decides what is said to it."""

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from forktree import BestOfN, Decoder, FunctionReward, InvalidInput, ParticleFilter, RewardError, Sample, SearchResult
from forktree.search.judges import (
    Checklist,
    CritiqueVotes,
    GroupCritique,
    QueryLikelihood,
    filled,
    numbered,
    ratings,
    yes_no,
)
from markov import EOS, MarkovLM
from tiny import assert_all_returned


def texts_of(result: SearchResult) -> list[str]:
    assert result.error is None, result.error
    return [c.text for c in result.candidates]


def events(result: SearchResult, kind: str) -> list[dict[str, Any]]:
    return [e for e in result.trace.events if e["event"] == kind]


# ---------------------------------------------------------------- votes of critiques


# the policy says x1, x2 or x3; judges are shown a, b and c instead, and what follows these is the verdict
VERDICTS = MarkovLM(
    {
        ":": {"x": 1},
        "x": {"1": 0.4, "2": 0.3, "3": 0.3},
        **{x: {".": 1} for x in "123"},
        ".": {EOS: 1},
        "a": {"Y": 0.9, "N": 0.1},
        "b": {"Y": 0.4, "N": 0.5, "u": 0.1},
        "c": {"u": 1},
        **{x: {EOS: 1} for x in "YNu"},
    }
)
NAMES = {"x1.": "a", "x2.": "b", "x3.": "c"}


def verdict(reply: str) -> float | None:
    return {"Y": 1.0, "N": 0.0}.get(reply)


class Spelled(CritiqueVotes):
    """Shows the judge a letter for each text, so that its table has a row for it."""

    async def judge(self, texts: Any, context: Any) -> Any:
        return await super().judge([NAMES[t] for t in texts], context)


@pytest.mark.proves(127)
def test_the_reward_is_the_mean_of_verdicts_and_tends_to_the_probability_of_yes() -> None:
    decoder = VERDICTS.new_decoder()
    judge = Spelled("{prompt}{response}", num_votes=400, max_new_tokens=2, temperature=1.0, verdict=verdict)
    (result,) = decoder.search(":", BestOfN(reward=judge, num_samples=8, temperature=1.0), max_new_tokens=6)
    (event,) = events(result, "judge")
    for c in result.candidates:
        name = NAMES[c.text]
        if name == "c":
            assert math.isnan(c.score) and isinstance(c.hypothesis.error, RewardError)
            assert "no verdict among 400 verifications, the first says 'u'" in str(c.hypothesis.error)
        else:
            p = {"a": 0.9, "b": 0.4 / 0.9}[name]  # what says nothing has no vote
            assert c.score == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 350))
    assert {NAMES[t] for t in texts_of(result)} == {"a", "b", "c"} and NAMES[result.text] == "a"
    for said, reward in zip(event["replies"], event["rewards"], strict=True):
        counts = Counter(said)
        votes = counts["Y"] + counts["N"]
        assert reward == (pytest.approx(counts["Y"] / votes) if votes else None)
    assert_all_returned(decoder.worker)


def test_verdicts_that_raise_have_no_vote_and_a_prompt_that_does_not_fit_costs_its_text() -> None:
    def picky(reply: str) -> float:
        if reply == "Y":
            raise ValueError("no")
        return math.inf if reply == "u" else 0.0

    judge = Spelled("{response}", num_votes=60, max_new_tokens=2, temperature=1.0, verdict=picky)
    (result,) = VERDICTS.decoder.search(":", BestOfN(reward=judge, num_samples=12), max_new_tokens=6)
    assert {NAMES[c.text]: c.score for c in result.candidates if not math.isnan(c.score)} == {"a": 0.0, "b": 0.0}

    class Long(Spelled):
        async def judge(self, texts: Any, context: Any) -> Any:
            return await CritiqueVotes.judge(self, [NAMES[t] * (9000 if t == "x1." else 1) for t in texts], context)

    judge = Long("{response}", num_votes=3, max_new_tokens=2, temperature=1.0, verdict=verdict)
    (result,) = VERDICTS.decoder.search(":", BestOfN(reward=judge, num_samples=12), max_new_tokens=6)
    assert NAMES[result.text] == "b"
    long = [c for c in result.candidates if c.text == "x1."]
    assert long and all("the judge's prompt" in str(c.hypothesis.error) for c in long)


# ---------------------------------------------------------------- critiques of all at once


def scripted(votes: int, **options: Any) -> tuple[SearchResult, list[list[str]]]:
    """A judge whose critique is one letter, from which a script makes the ratings of what it was shown."""
    shown: list[list[str]] = []

    class Shown(GroupCritique):
        async def judge(self, texts: Any, context: Any) -> Any:
            opens = context.opens

            def recorded(prompt: str, model: str) -> Any:
                shown.append([line for line in prompt.split("\n") if line in ("x1.", "x2.", "x3.")])
                return opens(prompt, model)

            object.__setattr__(context, "opens", recorded)
            return await super().judge(texts, context)

    judge = Shown("{prompt}\n{responses}\nb", num_votes=votes, max_new_tokens=2, temperature=1.0, **options)
    (result,) = VERDICTS.decoder.search(":", BestOfN(reward=judge, num_samples=5, temperature=1.0), max_new_tokens=6)
    return result, shown


@pytest.mark.proves(100)
def test_ratings_follow_their_texts_through_every_shuffle() -> None:
    """Critique number v rates what it shows at place i with 10 i + v: the sums are those of the places."""
    count = itertools.count()

    def parse(reply: str) -> list[float]:
        v = next(count)
        return [10 * i + v for i in range(5)]

    result, shown = scripted(6, parse=parse)
    assert len(shown) == 6 and len({tuple(s) for s in shown}) > 1, "they are shuffled"
    sums: Counter[str] = Counter()
    for v, order in enumerate(shown):
        for i, text in enumerate(order):
            sums[text] += 10 * i + v
    found: Counter[str] = Counter()
    for c in result.candidates:
        found[c.text] += c.score
    assert found == pytest.approx(sums)
    assert [c.score for c in result.candidates] == sorted((c.score for c in result.candidates), reverse=True)


@pytest.mark.proves(100)
def test_sums_tend_to_the_expected_rating_and_nonsense_is_left_out() -> None:
    """A reply Y rates all 9, N rates all 4, and u nothing: P is .4, .5 and .1."""
    votes = 300
    result, _ = scripted(votes, parse=lambda reply: {"Y": [9.0] * 5, "N": [4.0] * 5}.get(reply))
    (event,) = events(result, "judge")
    said = Counter(reply for replies in event["replies"] for reply in replies)
    assert [c.score for c in result.candidates] == [9 * said["Y"] + 4 * said["N"]] * 5
    assert result.best.score / votes == pytest.approx(0.4 * 9 + 0.5 * 4, abs=0.6) and said["u"]
    broken, _ = scripted(3, parse=lambda reply: [1.0, 2.0])
    assert isinstance(broken.error, RewardError) and "none of 3 critiques rates 5 texts" in str(broken.error)


@pytest.mark.proves(100)
def test_a_meta_reward_keeps_the_better_half() -> None:
    meta = FunctionReward(lambda prompt, critique: {"Y": 1.0, "N": 0.5, "u": 0.0}[critique])
    result, _ = scripted(10, parse=lambda reply: {"Y": [9.0] * 5, "N": [4.0] * 5}.get(reply), meta=meta)
    (event,) = events(result, "judge")
    said = Counter(reply for replies in event["replies"] for reply in replies)
    best = [9.0] * said["Y"] + [4.0] * said["N"]
    assert result.best.score == sum(best[:5])


# ---------------------------------------------------------------- a checklist, then a letter


LETTERS = MarkovLM(
    {
        ":": {"x": 1},
        "x": {"1": 0.4, "2": 0.6},
        **{x: {EOS: 1} for x in "12"},
        "!": {"l": 1},
        "l": {"l": 0.5, EOS: 0.5},
        ">": {"A": 0.1, "B": 0.4, "C": 0.3, "D": 0.2},
        **{x: {EOS: 1} for x in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"},
    }
)


@pytest.mark.proves(79)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_checklist_judge_asks_once_and_reads_the_letters(n: int) -> None:
    decoder = LETTERS.new_decoder()
    judge = Checklist("{prompt}{responses}!", question=">", max_new_tokens=6)
    plain = [c.text for c in decoder.search(":", Sample(num_return_sequences=n), max_new_tokens=4)[0].candidates]
    (result,) = decoder.search(":", BestOfN(reward=judge, num_samples=n, temperature=1.0), max_new_tokens=4)
    p = np.array([0.1, 0.4, 0.3, 0.2][:n])
    p = p / p.sum()
    order = np.argsort(-p, kind="stable")
    assert texts_of(result) == [plain[i] for i in order]
    np.testing.assert_allclose([c.score for c in result.candidates], p[order], rtol=1e-5)
    (event,) = events(result, "judge")
    assert len(event["replies"]) == len(event["replies"][0]) == 1 and set(event["replies"][0][0]) <= {"l"}
    assert_all_returned(decoder.worker)


def test_letters_that_are_no_tokens_of_their_own_are_refused() -> None:
    judge = Checklist("{responses}!", question=">")
    search = BestOfN(reward=judge, num_samples=2)
    (result,) = VERDICTS.decoder.search(":", search, max_new_tokens=4)  # it has no capitals but Y and N
    assert isinstance(result.error, InvalidInput) and "labels must have tokens of their own" in str(result.error)
    (result,) = LETTERS.decoder.search(":", BestOfN(reward=judge, num_samples=27), max_new_tokens=4)
    assert isinstance(result.error, InvalidInput) and "at most 26, got 27" in str(result.error)


# ---------------------------------------------------------------- time reversal


QUERIES = MarkovLM.random("pqrs", seed=5, spread=0.6)


@pytest.mark.proves(173)
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_query_likelihood_is_that_of_the_table(length_penalty: float) -> None:
    """log P(query | text): the texts' last letters decide the query's first letter."""
    decoder = QUERIES.new_decoder()
    judge = QueryLikelihood("{response}", length_penalty=length_penalty)
    (result,) = decoder.search("pqr", BestOfN(reward=judge, num_samples=12, temperature=1.0), max_new_tokens=5, seed=2)
    texts = texts_of(result)
    assert len(set(texts)) > 5
    scores = [QUERIES.log_prob(t, "pqr", ended=False) / 3**length_penalty if t else math.nan for t in texts]
    np.testing.assert_allclose([c.score for c in result.candidates], scores, atol=1e-5)
    for c in result.candidates:
        assert (c.hypothesis.error is not None) == (c.text == "")  # nothing to ask about
    assert_all_returned(decoder.worker)


@pytest.mark.proves(173)
def test_ranking_by_query_likelihood_and_prior_is_bayes() -> None:
    """By enumeration of the joint of a query and texts of one letter."""
    judge = QueryLikelihood("{response}", query="s", length_penalty=0.0)
    (result,) = QUERIES.decoder.search("p", BestOfN(reward=judge, num_samples=300, temperature=1.0), max_new_tokens=1)
    prior = {t: p for t, p in QUERIES.texts("p", 1).items() if t}
    joint = {t: p * math.exp(QUERIES.log_prob(t, "s", ended=False)) for t, p in prior.items()}
    posterior = {t: j / sum(joint.values()) for t, j in joint.items()}
    found = {c.text: prior[c.text] * math.exp(c.score) for c in result.candidates if c.text}
    assert set(found) == set(prior)
    total = sum(found.values())
    assert {t: v / total for t, v in found.items()} == pytest.approx(posterior, rel=1e-4)


@pytest.mark.proves(173)
def test_a_stationary_chain_reversed_gives_a_text_the_same_probability_but_for_its_ends() -> None:
    """The reversed table is Bayes of the chain; log-probs of a text differ by those of its first and last letters."""
    chain = MarkovLM.random("pqrs", seed=7, end=0.0)
    table = chain.probabilities[1:, 1:]
    values, vectors = np.linalg.eig(table.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    stationary = stationary / stationary.sum()
    names = chain.names[1:]
    rows = {
        b: {a: stationary[i] * table[i, j] / stationary[j] for i, a in enumerate(names)} for j, b in enumerate(names)
    }
    backwards = MarkovLM({"p": {}, "q": {}, "r": {}, "s": {}} | rows)

    def scores(model: MarkovLM, query: str, text: str) -> float:
        judge = QueryLikelihood("{response}", query=query, length_penalty=0.0)

        class Fixed(QueryLikelihood):
            async def judge(self, texts: Any, context: Any) -> Any:
                return await judge.judge([text], context)

        search = BestOfN(reward=Fixed("{response}"), num_samples=1)
        return model.decoder.search("p", search, max_new_tokens=1)[0].best.score

    log_pi = {name: math.log(p) for name, p in zip(names, stationary, strict=True)}
    for text in ("pqrs", "ssrp", "qqpr", "rspqrs"):
        forwards = scores(chain, text[1:], text[0]) + log_pi[text[0]]
        reversed_ = scores(backwards, text[::-1][1:], text[-1]) + log_pi[text[-1]]
        assert forwards == pytest.approx(reversed_, abs=1e-4)


# ---------------------------------------------------------------- all of them


def test_parsers() -> None:
    assert yes_no("Yes, no, YES.") == 1.0 and yes_no("yes... No!") == 0.0 and yes_no("nothing yesterday") is None
    assert ratings("1 2\n\\boxed{7, 8.5}\nend 3") == [7.0, 8.5]
    assert ratings("scores:\n7 and 9\n\nthat is all") == [7.0, 9.0] and ratings("none") is None


def test_templates_are_filled_in_one_pass() -> None:
    assert filled("{prompt}|{response}|{x}", prompt="{response}", response="{prompt}") == "{response}|{prompt}|{x}"
    assert numbered(["p", "q"]) == "[Response 1]\np\n\n[Response 2]\nq" and "[Response B]" in numbered(["p", "q"], "AB")


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: CritiqueVotes("{prompt}"), "template must be a text with {response}"),
        (lambda: GroupCritique("{response}"), "template must be a text with {responses}"),
        (lambda: CritiqueVotes("{response}", num_votes=0), "num_votes"),
        (lambda: GroupCritique("{responses}", meta=len), "reward must be"),
        (lambda: Checklist(3), "template must be a text with {responses}, got 3"),
        (lambda: QueryLikelihood(length_penalty=-1.0), "length_penalty must be not negative"),
    ],
)
def test_bad_settings_are_named(make: Any, part: str) -> None:
    with pytest.raises(InvalidInput, match=part):
        make()


JUDGES = {
    "votes": CritiqueVotes("{response}", num_votes=2, max_new_tokens=3),
    "group": GroupCritique("{responses}", num_votes=2, max_new_tokens=3),
    "checklist": Checklist("{responses}", max_new_tokens=3),
    "query": QueryLikelihood("{response}"),
}


@pytest.mark.parametrize("name", JUDGES)
def test_judges_need_text_and_a_search_that_asks_them(name: str) -> None:
    bare = Decoder(VERDICTS.model, num_slots=256)
    (result,) = bare.search([VERDICTS.ids(":")], BestOfN(reward=JUDGES[name], num_samples=2), max_new_tokens=4)
    assert isinstance(result.error, InvalidInput) and "Decoder with a tokenizer" in str(result.error)
    steps = ParticleFilter(reward=JUDGES[name], num_particles=2)
    (result,) = VERDICTS.decoder.search(":", steps, max_new_tokens=4)
    assert isinstance(result.error, InvalidInput) and "expected a search of finished texts" in str(result.error)
