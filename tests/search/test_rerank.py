"""Reranking, against enumeration and transformers' own logits."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import tiny
from forktree import Decoder, InvalidInput, RewardError, TokenProbability
from forktree.search.request import reward_branches
from forktree.search.rerank import Criteria, Evidence, Listwise, Pointwise, Ranking, Reranker, Rubric
from forktree.search.rerank.evidence import EVIDENCE_SCORES, evidence_scores
from forktree.search.rerank.listwise import windows
from forktree.search.rerank.rubric import integrated, read_score
from markov import MarkovLM
from searches import Scripted

DOCUMENTS = ["1+1=2", "abab", "9-3", "c.d", "12", "a b c d", "0-0"]
LETTERS = Listwise(
    window=4, stride=2, labels=list("abcd"), template="{query}\n{documents}{query}=", line="{label}.{document}\n"
)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny.decoder()


def next_logs(text: str, labels: Sequence[str], kind: str = "llama") -> np.ndarray:
    """Log-probs of single tokens after a text, by transformers alone."""
    ids = tiny.tokenizer()(text)["input_ids"]
    return tiny.next_log_probs(tiny.model(kind), ids)[tiny.tokenizer().convert_tokens_to_ids(list(labels))].numpy()


def is_permutation(ranking: Ranking) -> bool:
    return sorted(ranking.order) == list(range(len(ranking.items)))


# ---------------------------------------------------------------- listwise


def listed(query: str, documents: Sequence[str]) -> str:
    lines = "".join(f"{label}.{document}\n" for label, document in zip("abcd", documents, strict=False))
    return f"{query}\n{lines}{query}="


@pytest.mark.proves(165)
@pytest.mark.parametrize("count", [1, 3, 4, 5, 7])
def test_windows_are_sorted_by_the_letters_logits(decoder: Decoder, count: int) -> None:
    documents = DOCUMENTS[:count]
    order = list(range(count))
    for end in range(count, 0, -2):  # by hand, from the last documents to the first
        begin = max(0, end - 4)
        logs = next_logs(listed("3", [documents[i] for i in order[begin:end]]), "abcd")
        order[begin:end] = [order[begin + i] for i in sorted(range(end - begin), key=lambda i: -logs[i])]
        if begin == 0:
            break
    ranking = decoder.rerank("3", documents, LETTERS)
    assert ranking.order == order and is_permutation(ranking)
    assert [ranking.scores[i] for i in order] == [1 / (1 + place) for place in range(count)]
    decoder.worker.tree.reclaim()  # room for a kept prompt to grow
    tiny.assert_all_returned(decoder.worker)


@pytest.mark.proves(182)
def test_another_architecture_ranks_by_its_letters() -> None:
    documents = DOCUMENTS[:4]
    logs = next_logs(listed("3", documents), "abcd", "qwen3")
    ranking = tiny.decoder("qwen3").rerank("3", documents, LETTERS)
    assert ranking.order == sorted(range(4), key=lambda i: -logs[i])


@pytest.mark.proves(165)
@pytest.mark.parametrize("window", [2, 4, 5])
@pytest.mark.parametrize("count", [1, 4, 9, 23])
def test_the_best_reach_the_front_from_anywhere(window: int, count: int) -> None:
    for stride, seed in itertools.product(range(1, window), range(5)):
        worth = np.random.default_rng(seed).permutation(count)
        order = np.arange(count)
        for begin, end in windows(count, window, stride):
            assert 0 <= begin < end <= count and end - begin <= window
            order[begin:end] = order[begin:end][np.argsort(-worth[order[begin:end]])]
        best = np.argsort(-worth)[: window - stride]
        assert order[: len(best)].tolist() == best.tolist()
    assert windows(count, count + 1, 3) == [(0, count)]


@pytest.mark.proves(182)
def test_one_pass_ranks_a_window_and_instructions_are_computed_once(decoder: Decoder) -> None:
    decoder.worker.prefixes.clear()
    before = decoder.worker.forwards
    ranking = decoder.rerank("12+3=", DOCUMENTS, LETTERS)
    assert decoder.worker.forwards - before == 3
    longest = max(map(len, DOCUMENTS))
    assert ranking.counters.model_tokens <= 6 + 3 * (4 * (longest + 3) + 6)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(labels=list("abca")), "labels must be different texts"),
        (dict(labels=["a", "bb"]), "label 'bb' must be one token after"),
        (dict(labels=["a", "X", "Y"], window=3), "labels must be different tokens, got 'X' and 'Y'"),
        (dict(window=27), "window must be an integer from 2 to 26, got 27"),
        (dict(window=4, stride=5), "stride must be an integer from 1 to 4, got 5"),
        (dict(template="{documents}"), "template must be a text with {query}"),
    ],
)
def test_bad_labels_are_refused_by_name(decoder: Decoder, how: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        decoder.rerank("1", ["2", "3", "4"], Listwise(**dict(window=2, stride=1) | how))


# ---------------------------------------------------------------- pointwise

JUDGE = MarkovLM(
    {"x": {"1": 0.9, "0": 0.1}, "y": {"1": 0.02, "0": 0.18, "z": 0.8}, "z": {"1": 0.3, "0": 0.3, "x": 0.4}}
)


@pytest.mark.proves(178)
@pytest.mark.parametrize("score", ["margin", "probability"])
def test_pointwise_scores_are_those_of_the_table(score: str) -> None:
    documents = ["zx", "xy", "yz", "xx"]
    how = Pointwise(template="{query}{document}", score=score)
    ranking = JUDGE.decoder.rerank("zz", documents, how)
    ratio = [9.0, 1 / 9, 1.0, 9.0]
    exact = [math.log(r) if score == "margin" else r / (1 + r) for r in ratio]
    np.testing.assert_allclose(ranking.scores, exact, atol=1e-5)
    assert ranking.order == [0, 3, 2, 1]  # equal ones keep their order
    turned = JUDGE.decoder.rerank("zz", documents[::-1], how)
    np.testing.assert_allclose(turned.scores, ranking.scores[::-1], atol=1e-6)


@pytest.mark.proves(178)
def test_what_prompts_share_is_computed_once() -> None:
    documents = [a + b for a in "xyz" for b in "xyz"]
    ranking = JUDGE.new_decoder().rerank("xyzxyzxyz" * 5, documents, Pointwise(template="{query}{document}"))
    assert ranking.counters.model_tokens == 45 + 3 + 9


# ---------------------------------------------------------------- digits


def test_the_expectation_of_values() -> None:
    """A reward over digits is their expectation given that it is a digit."""
    model = MarkovLM({":": {"1": 0.1, "2": 0.2, "5": 0.3, "x": 0.4}})
    found: list[Any] = []

    async def script(context: Any) -> None:
        for values in (None, [1, 2, 5], [-1.5, 0, 2]):
            reward = TokenProbability(model.ids("125"), values=values)
            found.append((await reward_branches([context.root], reward)).values[0])

    model.decoder.search(":", Scripted(script))
    np.testing.assert_allclose(found, [1 / 6, (0.1 + 0.4 + 1.5) / 0.6, (-0.15 + 0.6) / 0.6], atol=1e-5)
    for values in ([1, 2], [1, 2, math.nan], [1, 2, "x"]):
        with pytest.raises(InvalidInput, match="values must be"):
            TokenProbability([1, 2, 3], values=values)


@pytest.mark.proves(97)
@pytest.mark.parametrize("criteria", [{}, {"a": 0.5, "c": 0.25}])
@pytest.mark.parametrize("min_relevance", [0.0, 4.5, 9.5])
def test_criteria_are_digits_behind_the_document(
    decoder: Decoder, criteria: dict[str, float], min_relevance: float
) -> None:
    """The final order is that of a hand computation; without criteria it is that of relevance."""
    how = Criteria(criteria=criteria, min_relevance=min_relevance, question="{criterion}=")
    ranking = decoder.rerank("12", DOCUMENTS, how)

    def rated(document: str, criterion: str) -> float:
        p = np.exp(next_logs(f"Query: 12\nDocument: {document}\n{criterion}=", "0123456789"))
        return float(p @ np.arange(10) / p.sum())

    relevance = [rated(d, "relevance to the query") for d in DOCUMENTS]
    final = [r + sum(w * rated(d, c) for c, w in criteria.items()) for d, r in zip(DOCUMENTS, relevance, strict=True)]
    np.testing.assert_allclose(ranking.scores, final, atol=1e-4)
    keep = sorted(range(7), key=lambda i: (relevance[i] < min_relevance, -final[i]))
    assert ranking.order == keep


def test_weights_are_bounded() -> None:
    for criteria, message in (({"depth": 0.7, "age": 0.4}, "at most 1, got 1.1"), ({"depth": -0.1}, "at least 0")):
        with pytest.raises(InvalidInput, match=message):
            Criteria(criteria=criteria)


# ---------------------------------------------------------------- rubric

WRITER = MarkovLM(
    {
        "x": {"1": 0.25, "3": 0.75},
        "y": {"2": 0.5, "n": 0.5},
        "z": {"n": 1},
        **{digit: {">": 1} for digit in "123"},
        ">": {"n": 1},
    }
)


@pytest.mark.proves(179)
@pytest.mark.parametrize("weighted", [False, True])
def test_integrated_scores_are_expectations(weighted: bool) -> None:
    """Texts without a score drop out, a document without any has an error and comes last."""
    samples = 1500
    form = dict(template="{query}{document}", before="", after=">", highest=9.0)
    how = Rubric(num_samples=samples, temperature=1.0, weighted=weighted, **form)
    ranking = WRITER.decoder.rerank("n", ["z", "y", "x"], how)
    likely = [math.sqrt(0.25), math.sqrt(0.75)] if weighted else [1.0, 1.0]
    expected = (0.25 * likely[0] * 1 + 0.75 * likely[1] * 3) / (0.25 * likely[0] + 0.75 * likely[1])
    assert ranking.scores[2] == pytest.approx(expected, abs=5 * math.sqrt(0.75 / samples))
    assert ranking.scores[1] == pytest.approx(2) and math.isnan(ranking.scores[0])
    assert ranking.order == [2, 1, 0] and is_permutation(ranking)
    assert isinstance(ranking.errors[0], RewardError) and ranking.errors[1:] == [None, None]


def test_scores_are_read_from_texts() -> None:
    for text, value in (
        ("so <score>70</score>", 70),
        ("<score> 7.5 </score> no, <score>80</score>", 80),
        ("<score>101</score>", math.nan),
        ("<score>-1</score>", math.nan),
        ("score 70", math.nan),
        ("<score>7", math.nan),
    ):
        np.testing.assert_equal(read_score(text, "<score>", "</score>", 100.0), float(value))
    values = np.array([[1, np.nan, 4], [np.nan] * 3])
    np.testing.assert_equal(integrated(values, np.array([[1.0, 9, 2], [1, 1, 1]])), [3, np.nan])


# ---------------------------------------------------------------- evidence

PASSAGES = ["px", "py", "pz"]
READER = MarkovLM(
    {
        "x": {"a": 0.6, "b": 0.4},
        "y": {"a": 0.1, "b": 0.2, "c": 0.7},
        "z": {"b": 0.5, "d": 0.5},
        "a": {"c": 0.5, "q": 0.2, "\n": 0.3},
        "b": {"q": 0.6, "\n": 0.4},
        "c": {"q": 0.1, "\n": 0.9},
        "d": {"q": 0.3, "\n": 0.7},
        "q": {"p": 0.7, "x": 0.3},
    }
)


@pytest.mark.proves(167)
@pytest.mark.parametrize("score", EVIDENCE_SCORES)
def test_evidence_scores_are_enumerated(score: str) -> None:
    retrieval = [0.0, 1.0, -0.5]
    how = Evidence(
        template="{query}{document}",
        channel="{document}{answer}",
        num_answers=60,
        temperature=1.0,
        score=score,
        retrieval=retrieval,
        weights=(1.0, 0.5, 2.0),
    )
    ranking = READER.decoder.rerank("q", PASSAGES, how)
    assert {"a", "b", "c", "d"} <= set(ranking.items) and len(set(ranking.items)) == len(ranking.items)
    prior = np.log(np.exp(retrieval) / np.exp(retrieval).sum())

    def of(passage: int, answer: str) -> float:
        direct = READER.log_prob(PASSAGES[passage], answer, ended=False) / len(answer)
        channel = READER.log_prob(answer, "q", ended=False)
        product = direct + 0.5 * channel + 2 * prior[passage]
        return {"direct": direct, "channel": channel, "retrieval": prior[passage], "product": product}[score]

    for answer, found in zip(ranking.items, ranking.scores, strict=True):
        if score == "marginal":
            each = [prior[p] + READER.log_prob(PASSAGES[p], answer, ended=False) for p in range(3)]
            exact = math.log(sum(map(math.exp, each)))
        else:
            exact = max(of(p, answer) for p in range(3))
        assert found == pytest.approx(max(exact, -9e3), rel=1e-4) or (exact < -9e3 and found < -1e3)
    assert [ranking.scores[i] for i in ranking.order] == sorted(ranking.scores, reverse=True)
    assert is_permutation(ranking)


def test_evidence_scores_of_arrays() -> None:
    rng = np.random.default_rng(0)
    log_prob, tokens, channel = -rng.random((3, 4)) * 5, rng.integers(1, 5, (3, 4)).astype(float), -rng.random((3, 4))
    prior = np.log([0.5, 0.25, 0.25])
    found = evidence_scores("marginal", log_prob, tokens, channel, retrieval=prior, weights=(1, 1, 1))
    np.testing.assert_allclose(np.exp(found), (np.exp(prior)[:, None] * np.exp(log_prob)).sum(axis=0))


def test_bad_input_is_refused(decoder: Decoder) -> None:
    for query, documents, how, message in (
        ("1", [], LETTERS, "at least one text, got none"),
        ("1", "abc", LETTERS, "documents must be a tuple of texts"),
        ("1", ["2"], "listwise", "how must be a way of reranking"),
        ("1", ["2", "3"], Evidence(retrieval=[0.5]), "a score for each of 2 documents, got 1"),
    ):
        with pytest.raises(InvalidInput, match=message):
            decoder.rerank(query, documents, how)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="score must be one of"):
        Evidence(score="best")
    assert issubclass(Listwise, Reranker)
