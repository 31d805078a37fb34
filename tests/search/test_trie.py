"""Beams over a catalogue: the trie against a list, the search against exhaustive search."""

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from forktree import BeamSearch, Decoder, InvalidInput, NonFinite
from forktree.search import TokenTrie
from forktree.search.algorithms.beam_trie import segment_log_softmax

PROMPT = "12+3="


def unfolded(trie: TokenTrie) -> list[tuple[int, ...]]:
    """The entries, by walking every path."""
    found, stack = [], [(0, ())]
    while stack:
        node, path = stack.pop()
        children = range(1 + int(trie.indptr[node]), 1 + int(trie.indptr[node + 1]))
        assert trie.leaf[node] == (not children)
        tokens = trie.token[[c - 1 for c in children]].tolist()
        assert tokens == sorted(set(tokens))
        stack += [(c, (*path, t)) for c, t in zip(children, tokens, strict=True)]
        if not children:
            found.append(path)
    return sorted(found)


def free_of_prefixes(entries: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    some = set(entries)
    return [e for e in entries if not any(o != e and o[: len(e)] == e for o in some)]


ENTRIES = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5).map(tuple), min_size=1, max_size=30)


@settings(max_examples=100, deadline=None)
@given(ENTRIES)
def test_a_trie_holds_its_entries(entries: list[tuple[int, ...]]) -> None:
    entries = free_of_prefixes(entries)
    trie = TokenTrie(entries)
    assert unfolded(trie) == sorted(set(entries))
    assert trie.num_entries == len(set(entries)) and trie.depth == max(map(len, entries))
    nodes = torch.randint(0, len(trie.leaf), (6,))
    total = int((trie.indptr[nodes + 1] - trie.indptr[nodes]).sum())
    indptr, row, child = trie.on(torch.device("cpu")).children(nodes, total)
    for i, node in enumerate(nodes.tolist()):
        part = slice(int(indptr[i]), int(indptr[i + 1]))
        assert child[part].tolist() == list(range(1 + int(trie.indptr[node]), 1 + int(trie.indptr[node + 1])))
        assert (row[part] == i).all()


def test_a_rectangular_array_is_a_catalogue_too() -> None:
    rows = np.random.default_rng(0).integers(0, 50, (500, 3))
    assert unfolded(TokenTrie(rows)) == sorted({tuple(r) for r in rows.tolist()})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "at least one entry, got none"),
        ([[1, 2], []], "entry 1 of a trie is empty"),
        ([[1, 2, 3], [4], [1, 2]], r"entry 2 of a trie, \[1, 2\], is the beginning of entry 0"),
        ([[1, -2]], "entry 0 of a trie must be 1-D integers from 0"),
        ([["a"]], "entry 0 of a trie must be 1-D integers"),
        (np.zeros((0, 3), np.int64), "at least one entry"),
    ],
)
def test_bad_catalogues_are_refused(entries: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        TokenTrie(entries)


def test_bad_settings_are_refused_before_running() -> None:
    decoder = tiny.decoder()
    for trie, message in (
        (TokenTrie([[1, tiny.VOCAB]]), rf"must lie in \[0, {tiny.VOCAB}\), got {tiny.VOCAB}"),
        (TokenTrie([[1] * 9]), "max_new_tokens must be at least 9, got 8"),
    ):
        (result,) = decoder.search(PROMPT, BeamSearch(trie=trie), max_new_tokens=8)
        assert isinstance(result.error, InvalidInput) and decoder.worker.forwards == 0
        with pytest.raises(InvalidInput, match=message):
            _ = result.best
    with pytest.raises(InvalidInput, match="trie must be a TokenTrie"):
        BeamSearch(trie=[[1, 2]])
    with pytest.raises(InvalidInput, match="num_beam_groups must be 1 with a trie, got 2"):
        BeamSearch(trie=TokenTrie([[1]]), num_beam_groups=2, diversity_penalty=1.0)
    with pytest.raises(InvalidInput, match="trie_scores must be one of legal, model"):
        BeamSearch(trie_scores="after")


@pytest.mark.parametrize("seed", range(10))
def test_log_softmax_of_segments(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = rng.integers(1, 6, 8)
    indptr, row = torch.tensor(np.append(0, np.cumsum(count))), torch.tensor(np.repeat(np.arange(8), count))
    logits = torch.tensor(rng.normal(0, 30, count.sum()).astype(np.float32))
    logits[: count[0]] = -torch.inf
    found = segment_log_softmax(logits, indptr, row)
    parts = [logits[a:b].double().log_softmax(0) for a, b in itertools.pairwise(indptr.tolist())]
    parts[0].fill_(-torch.inf)
    torch.testing.assert_close(found.double(), torch.cat(parts), atol=1e-5, rtol=1e-5)


@cache
def after(tokens: tuple[int, ...]) -> torch.Tensor:
    return tiny.next_log_probs(tiny.model(), tokens)


def scored(entries: list[tuple[int, ...]], legal: bool, banned: set[int] = frozenset()) -> dict[tuple[int, ...], float]:
    """The log-prob of every entry, by transformers alone."""
    prompt = tiny.tokenizer()(PROMPT)["input_ids"]
    found = {}
    for entry in set(entries):
        total = 0.0
        for i, token in enumerate(entry):
            log_probs = after((*prompt, *entry[:i])).clone()
            log_probs[list(banned)] = -torch.inf
            if legal:
                children = sorted({e[i] for e in entries if e[:i] == entry[:i]})
                log_probs[children] = log_probs[children].log_softmax(dim=0)
            total += float(log_probs[token])
        found[entry] = total
    return found


def catalogue(seed: int, n: int = 25, longest: int = 4) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    entries = [tuple(rng.integers(0, 6, rng.integers(1, longest + 1)).tolist()) for _ in range(n)]
    return sorted(set(free_of_prefixes(entries)))


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny.decoder()


@pytest.mark.parametrize("trie_scores", ["legal", "model"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("seed", range(3))
def test_wide_beams_are_exhaustive(decoder: Decoder, seed: int, length_penalty: float, trie_scores: str) -> None:
    """All entries of the catalogue, those of different lengths too, in their order; EOS (0) ends some of them."""
    entries = catalogue(seed)
    exact = scored(entries, trie_scores == "legal")
    k = len(entries) + 7  # more beams than entries: there are only as many
    how = dict(num_beams=k, num_return_sequences=k, length_penalty=length_penalty, trie_scores=trie_scores)
    search = BeamSearch(trie=TokenTrie(entries), **how)
    (result,) = decoder.search(PROMPT, search, max_new_tokens=6)
    found = [c.hypothesis for c in result.candidates]
    whole = [(*h.token_ids.tolist(), *([0] if h.finish_reason == "eos" else [])) for h in found]
    assert sorted(whole) == entries
    np.testing.assert_allclose([h.log_prob for h in found], [exact[e] for e in whole], atol=1e-4)
    np.testing.assert_allclose(
        [h.score for h in found], [exact[e] / len(e) ** length_penalty for e in whole], atol=1e-4
    )
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    tiny.assert_all_returned(decoder.worker)


def by_hand(entries: list[tuple[int, ...]], k: int, legal: bool) -> list[tuple[int, ...]]:
    """Beams over prefixes, all of one length, by enumeration."""
    exact: dict[tuple[int, ...], float] = {}
    for n in range(1, len(entries[0]) + 1):
        prefixes = sorted({e[:n] for e in entries})
        exact |= scored(prefixes, legal)
    beams: list[tuple[int, ...]] = [()]
    for n in range(1, len(entries[0]) + 1):
        children = {e[:n] for e in entries if e[: n - 1] in beams}
        beams = sorted(children, key=lambda e: -exact[e])[:k]
    return beams


@pytest.mark.parametrize("trie_scores", ["legal", "model"])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_narrow_beams_keep_the_best_prefixes(decoder: Decoder, k: int, trie_scores: str) -> None:
    rng = np.random.default_rng(k)
    entries = sorted({tuple(e) for e in rng.integers(1, 6, (30, 3)).tolist()})
    search = BeamSearch(trie=TokenTrie(entries), num_beams=k, num_return_sequences=k, trie_scores=trie_scores)
    (result,) = decoder.search(PROMPT, search, max_new_tokens=3)
    assert [tuple(c.token_ids) for c in result.candidates] == by_hand(entries, k, trie_scores == "legal")
    steps = [e for e in result.trace.events if e["event"] == "grow"]
    assert all(len(e["nodes"]) <= k for e in steps)
    legal = {e[:n] for e in entries for n in range(4)}
    texts: dict[int, tuple[int, ...]] = {-1: ()}
    for event in steps:
        for node, parent, tokens in zip(event["nodes"], event["parents"], event["tokens"], strict=True):
            texts[node] = (*texts[parent], *tokens)
    assert set(texts.values()) <= legal  # no beam was ever illegal


def test_greedy_stops_early(decoder: Decoder) -> None:
    """early_stopping=True ends with k entries, however many more may come."""
    entries = [(1,), (2, 3, 4, 5, 6, 7), (3, 1)]
    search = BeamSearch(trie=TokenTrie(entries), num_beams=1, early_stopping=True)
    (result,) = decoder.search(PROMPT, search, max_new_tokens=8)
    assert result.best.token_ids == [1] and result.best.hypothesis.finish_reason == "stop"


def test_processors_go_before_the_trie(decoder: Decoder) -> None:
    entries, k = catalogue(5, longest=3), 40

    def banned(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.tensor([2, 4]), -torch.inf)

    for trie_scores in ("legal", "model"):
        options = dict(num_beams=k, num_return_sequences=k, length_penalty=0.0, trie_scores=trie_scores)
        search = BeamSearch(trie=TokenTrie(entries), logits_processor=[banned], **options)
        (result,) = decoder.search(PROMPT, search, max_new_tokens=6)
        exact = scored(entries, trie_scores == "legal", {2, 4})
        exact = {e: s for e, s in exact.items() if not {2, 4} & set(e)}
        assert len(result.candidates) == len(exact) > 3
        scores = [c.score for c in result.candidates]
        np.testing.assert_allclose(scores, sorted(exact.values(), reverse=True), atol=1e-4)
    everything = hf.SuppressTokensLogitsProcessor(list(range(tiny.VOCAB)))
    (result,) = decoder.search(PROMPT, BeamSearch(trie=TokenTrie(entries), logits_processor=[everything]))
    assert isinstance(result.error, InvalidInput) and "leave no entry" in str(result.error)


def test_a_budget_leaves_fewer_beams(decoder: Decoder) -> None:
    """Every text is an entry all the same."""
    entries = list(itertools.product(range(1, 6), repeat=3))
    search = BeamSearch(trie=TokenTrie(entries), num_beams=5, num_return_sequences=5)
    (result,) = decoder.search(PROMPT, search, max_new_tokens=3, max_model_tokens=7)
    assert result.counters.sampled_tokens <= 7 and {tuple(c.token_ids) for c in result.candidates} <= set(entries)
    (result,) = decoder.search(PROMPT, search, max_new_tokens=3, max_model_tokens=1)
    assert len(result.candidates) in (0, 5) and result.counters.sampled_tokens <= 1


def test_a_model_of_nan_is_named() -> None:
    model = tiny.new_model()
    broken = Decoder(model, num_slots=128)
    model.get_input_embeddings().weight.data[4] = torch.nan  # in a way that the decoder does not see
    for trie_scores in ("legal", "model"):
        search = BeamSearch(trie=TokenTrie([[5, 6], [4, 4]]), trie_scores=trie_scores)
        (result,) = broken.search([3, 4], search, max_new_tokens=4)
        assert isinstance(result.error, NonFinite) and "logits of branch 0 at position 2" in str(result.error)


def test_512_beams(decoder: Decoder) -> None:
    """Every one of a full catalogue of 12³ codes that is kept is legal and different."""
    entries = [e for e in itertools.product(range(1, 13), repeat=3) if sum(e) % 3]
    search = BeamSearch(trie=TokenTrie(np.array(entries)), num_beams=512, num_return_sequences=512)
    (result,) = decoder.search(PROMPT, search, max_new_tokens=3)
    found = [tuple(c.token_ids) for c in result.candidates]
    assert len(found) == len(set(found)) == 512 and set(found) <= set(entries)
    tiny.assert_all_returned(decoder.worker)
