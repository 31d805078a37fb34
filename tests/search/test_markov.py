"""The fixture that other tests enumerate: it is exactly the chain that its table says, by transformers and by us."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import tiny
from forktree import Greedy, Sample, sequence_logprobs
from markov import EOS, MarkovLM, expectation, pushed

COIN = MarkovLM({":": {"h": 0.3, "t": 0.7}, "h": {"h": 0.2, EOS: 0.8}, "t": {EOS: 1}})
CHAIN = MarkovLM.random("abcdefg", spread=0.5)


@pytest.mark.parametrize("chain", [COIN, CHAIN], ids=["coin", "random"])
def test_logits_are_the_row_of_the_last_token(chain: MarkovLM) -> None:
    rng, vocab = np.random.default_rng(0), len(chain.names)
    ids = rng.integers(vocab, size=(4, 60))
    with torch.no_grad():
        found = chain.model(input_ids=torch.from_numpy(ids), use_cache=False).logits.double().softmax(dim=-1)
    np.testing.assert_allclose(found.numpy(), chain.probabilities[ids], atol=3e-7, rtol=3e-6)


def test_our_log_probs_are_the_tables() -> None:
    texts = ["ab", "ggfa", "cccccdcccb"]
    found = sequence_logprobs(CHAIN.decoder, [CHAIN.ids("d" + text) for text in texts])
    expected = [CHAIN.log_prob("d", text, ended=False) for text in texts]
    np.testing.assert_allclose([x.sum() for x in found], expected, rtol=1e-6)


def test_enumerated_texts_are_all_there_is() -> None:
    assert COIN.texts(":", 2) == pytest.approx({"h": 0.24, "hh": 0.06, "t": 0.7})
    texts = CHAIN.texts("a", 4)
    assert sum(texts.values()) == pytest.approx(1) and len(texts) == 1 + 7 + 49 + 343 + 7**4
    for text in ("", "b", "bcf", "bcfa"):
        assert math.log(texts[text]) == pytest.approx(CHAIN.log_prob("a", text, ended=len(text) < 4))
    lengths = pushed(texts, len)
    assert expectation(texts, len) == pytest.approx(sum(n * p for n, p in lengths.items()))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_come_as_often_as_enumeration_says(temperature: float) -> None:
    exact, n = CHAIN.texts("a", 3, temperature=temperature), 4000
    (result,) = CHAIN.decoder.search(
        "a", Sample(num_return_sequences=n, temperature=temperature), max_new_tokens=3, seed=1
    )
    firsts = pushed(exact, lambda text: text[:2])
    counts = [sum(c.text[:2] == text for c in result.candidates) for text in firsts]
    assert stats.chisquare(counts, n * np.array([*firsts.values()])).pvalue > 1e-3
    for c in result.candidates[:50]:
        ended = c.hypothesis.finish_reason == "eos"
        assert ended == (len(c.text) < 3)
        assert c.hypothesis.log_prob == pytest.approx(CHAIN.log_prob("a", c.text, ended=ended), abs=1e-5)


def test_greedy_is_the_most_likely_token_each_time() -> None:
    (text,) = CHAIN.texts("a", 12, temperature=0)
    assert CHAIN.decoder.search("a", Greedy(), max_new_tokens=12)[0].text == text


def test_characters_without_a_token_are_read_as_eos() -> None:
    assert COIN.tokenizer("hxt").input_ids == [*COIN.ids("h"), 0, *COIN.ids("t")]
    assert tiny.character_tokenizer("ab").decode([1, 2, 2]) == "abb"
