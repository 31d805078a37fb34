"""Beam search and the host: reading the device once a step tells it all, errors included."""

from typing import Any

import numpy as np
import pytest
import torch

import tiny
from forktree import BeamSearch, Decoder, InvalidInput, NonFinite, Sample, TokenScores
from forktree.kv import Tree
from forktree.search.algorithms import beam
from forktree.search.algorithms.beam import BeamRules, beam_search
from forktree.search.request import NextLogits, ScoreTokens
from forktree.search.trace import SearchTrace
from forktree.search.trie import TokenTrie
from searches import traced_tokens

VOCAB = 7
WAYS: dict[str, Any] = {"whole rows": [lambda rows, scores: scores], "the best alone": []}  # processors
ways = pytest.mark.parametrize("processors", WAYS.values(), ids=WAYS)


def answer(request: Any, logits: torch.Tensor) -> Any:
    """What a beam search awaits, from rows of logits."""
    if isinstance(request, NextLogits):
        return logits
    assert isinstance(request, ScoreTokens)
    best = logits.log_softmax(dim=-1).topk(min(request.request.top_k, VOCAB))
    return TokenScores(lse=logits.logsumexp(dim=-1), top_ids=best.indices, top_log_probs=best.values)


@ways
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_the_host_reads_the_device_once_a_step(
    do_sample: bool, early_stopping: bool | str, traced: bool, processors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without values do for the device: whatever else looked at one would fail."""
    reads = 0

    class Zeros:
        def __init__(self, values: torch.Tensor) -> None:
            self.shape = values.shape

        def read(self) -> np.ndarray:
            nonlocal reads
            reads += 1
            return np.zeros(self.shape)

    monkeypatch.setattr(beam, "Download", Zeros)
    tree = Tree(200)
    roots = [tree.root([1, 2, 3]), tree.root([4, 5, 6])]
    rows = torch.empty(2, 3, dtype=torch.long, device="meta")
    rules = BeamRules(3, 6, 1.0, early_stopping, 5, do_sample)
    stops, trace = lambda rows: rows[:, -1] == 1, SearchTrace() if traced else None
    search = beam_search(roots, rows, rules, fill=0, processors=processors, stops=stops, trace=trace)
    steps = 0
    with pytest.raises(StopIteration):
        request = search.send(None)
        while True:
            assert len(request.branches) == 6
            steps += 1
            assert isinstance(request, NextLogits) == (do_sample or len(processors) > 0)
            request = search.send(answer(request, torch.empty(6, VOCAB, device="meta")))
    assert steps == reads == 5


def chances(tokens: list[int]) -> torch.Tensor:
    """A table of logits: those after any text, the same every time."""
    return 3 * torch.from_numpy(np.random.default_rng(tokens).standard_normal(VOCAB)).float()


@ways
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 2])
def test_rows_that_are_not_finite_are_named_before_anything_is_appended(bad: float, at: int, processors: Any) -> None:
    tree = Tree(200)
    rules = BeamRules(3, 6, 1.0, False, 5)
    stops = lambda rows: torch.zeros(len(rows), dtype=torch.bool)  # noqa: E731
    search = beam_search(
        [tree.root([1, 2, 3])], torch.tensor([[1, 2, 3]]), rules, fill=0, processors=processors, stops=stops
    )
    request = search.send(None)
    for step in range(at + 1):
        logits = torch.stack([chances(b.tokens.tolist()) for b in request.branches])
        if step == at:
            logits[1, 4] = bad
            texts = [b.tokens.tolist() for b in request.branches]
            with pytest.raises(NonFinite, match=f"logits of branch 1 at position {3 + at} "):
                search.send(answer(request, logits))
        else:
            request = search.send(answer(request, logits))
    assert [b.tokens.tolist() for b in request.branches] == texts


@pytest.mark.parametrize("do_sample", [False, True])
def test_nan_of_a_model_ends_a_beam_search_by_name(do_sample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.new_model()
    decoder = Decoder(model, tiny.tokenizer(), num_slots=200)
    model.get_input_embeddings().weight.data[5] = torch.nan  # unseen: the model would be refused
    rules: Any = BeamRules
    if do_sample:
        monkeypatch.setattr("forktree.search.algorithms.beam.BeamRules", lambda **how: rules(**how, do_sample=True))
    result = decoder.search([[2, 5]], BeamSearch(num_beams=3), max_new_tokens=4)[0]
    assert isinstance(result.error, NonFinite) and "logits of branch 0 at position 2 " in str(result.error)
    tiny.assert_all_returned(decoder.worker)


@ways
def test_reassigned_beams_are_those_of_the_table(processors: Any) -> None:
    """The best of three beams over four steps, against every text of the table, wide enough to be exact."""
    tree, steps, k = Tree(4000), 3, VOCAB**2
    rules = BeamRules(k, 2 * k, 0.0, False, steps)
    search = beam_search(
        [tree.root([1, 2])],
        torch.tensor([[1, 2]]),
        rules,
        fill=0,
        processors=processors,
        stops=lambda rows: torch.full((len(rows),), rows.shape[1] >= 2 + steps),
    )
    with pytest.raises(StopIteration) as ended:
        request = search.send(None)
        while True:
            logits = torch.stack([chances(b.tokens.tolist()) for b in request.branches])
            request = search.send(answer(request, logits))
    exact = {(): 0.0}
    for _ in range(steps):
        exact = {
            (*seen, token): total + float(p)
            for seen, total in exact.items()
            for token, p in enumerate(chances([1, 2, *seen]).double().log_softmax(dim=-1))
        }
    best = sorted(exact, key=exact.__getitem__, reverse=True)[:10]
    found = ended.value.value
    assert [tuple(row) for row in found.rows[0, :10, 2:].tolist()] == best
    torch.testing.assert_close(found.scores[0, :10].double(), torch.tensor([exact[b] for b in best]).double())


# ---------------------------------------------------------------- groups


def grouped(rules: BeamRules, prompts: list[list[int]], last: int, eos: int = -1) -> Any:
    """What a beam search over the table finds."""
    tree = Tree(4000)
    stops = lambda rows: (rows[:, -1] == eos) | (rows.shape[1] >= last)  # noqa: E731
    search = beam_search([tree.root(p) for p in prompts], torch.tensor(prompts), rules, fill=0, stops=stops)
    with pytest.raises(StopIteration) as ended:
        request = search.send(None)
        while True:
            assert len(request.branches) == rules.num_beams * len(prompts)
            logits = torch.stack([chances(b.tokens.tolist()) for b in request.branches])
            request = search.send(answer(request, logits))
    return ended.value.value


def diverse(prompt: list[int], groups: int, each: int, penalty: float, steps: int, eos: int) -> list[tuple]:
    """Diverse beam search in plain Python: a list of (text, score) a group, and a table of log-probs.

    It never stops early, and a text's score is its sum: the best finished ones are those of `early_stopping="never"`.
    """
    running = [[((), 0.0)] for _ in range(groups)]
    finished: list[list[tuple]] = [[] for _ in range(groups)]
    for step in range(steps):
        taken = [0] * VOCAB
        for g in range(groups):
            found = [
                ((*text, token), total + float(p) - penalty * taken[token])
                for text, total in running[g]
                for token, p in enumerate(chances([*prompt, *text]).double().log_softmax(dim=-1))
            ]
            found = sorted(found, key=lambda one: -one[1])[: 2 * each]
            over = [one for one in found[:each] if one[0][-1] == eos or step == steps - 1]
            finished[g] = sorted([*finished[g], *over], key=lambda one: -one[1])[:each]
            running[g] = [one for one in found if one[0][-1] != eos][:each]
            for text, _ in running[g] if step < steps - 1 else found[:each]:
                taken[text[-1]] += 1
    return sorted([one for some in finished for one in some], key=lambda one: -one[1])


@pytest.mark.parametrize("penalty", [0.3, 1.7])
@pytest.mark.parametrize(("groups", "each"), [(2, 2), (3, 1), (2, 3), (1, 4)])
@pytest.mark.parametrize("eos", [-1, 2])
def test_groups_are_those_of_diverse_beam_search_in_plain_python(
    groups: int, each: int, penalty: float, eos: int
) -> None:
    """Two prompts at once; sums, texts and their order."""
    steps, prompts, k = 4, [[1, 3], [5, 4]], groups * each
    rules = BeamRules(k, 2 * k, 0.0, "never", steps, num_beam_groups=groups, diversity_penalty=penalty)
    found = grouped(rules, prompts, 2 + steps, eos)
    for i, prompt in enumerate(prompts):
        expected = diverse(prompt, groups, each, penalty, steps, eos)
        lengths = (found.beam_indices[i] >= 0).sum(dim=-1).tolist()
        texts = [tuple(row[2 : 2 + n].tolist()) for row, n in zip(found.rows[i], lengths, strict=True)]
        assert found.done[i].tolist() == [True] * len(expected) + [False] * (k - len(expected))
        assert texts[: len(expected)] == [text for text, _ in expected]
        np.testing.assert_allclose(found.scores[i, : len(expected)], [total for _, total in expected], rtol=1e-5)


def test_one_group_is_a_beam_and_a_high_penalty_makes_all_first_tokens_differ() -> None:
    plain = BeamRules(4, 8, 1.0, False, 5)
    one = BeamRules(4, 8, 1.0, False, 5, num_beam_groups=1, diversity_penalty=0.0)
    a, b = grouped(plain, [[1, 2]], 7), grouped(one, [[1, 2]], 7)
    assert torch.equal(a.rows, b.rows) and torch.equal(a.scores, b.scores)
    apart = BeamRules(4, 8, 1.0, False, 5, num_beam_groups=4, diversity_penalty=1e4)
    rows = grouped(apart, [[1, 2]], 7).rows[0, :, 2:]
    for position in range(5):
        assert len(set(rows[:, position].tolist())) == 4


def test_groups_of_one_search_and_its_record() -> None:
    decoder = tiny.decoder()
    search = BeamSearch(num_beams=6, num_beam_groups=3, diversity_penalty=2.0, num_return_sequences=6)
    (result,) = decoder.search([[2, 5]], search, max_new_tokens=5)
    tiny.assert_all_returned(decoder.worker)
    assert len(result.candidates) == 6
    scores = [c.score for c in result.candidates]
    assert scores == sorted(scores, reverse=True)
    for node, c in zip(result.trace.events[-1]["nodes"], result.candidates, strict=True):
        assert traced_tokens(result.trace, node) == c.token_ids
    plain = decoder.search([[2, 5]], BeamSearch(num_beams=6, num_return_sequences=6), max_new_tokens=5)[0]
    assert len({c.token_ids[0] for c in result.candidates}) >= len({c.token_ids[0] for c in plain.candidates})


@pytest.mark.parametrize(
    ("setting", "value"), [("num_beam_groups", 3), ("num_beam_groups", 0), ("diversity_penalty", 0.5)]
)
def test_groups_must_divide_the_beams_and_have_a_penalty(setting: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=setting):
        BeamSearch(num_beams=4, **{setting: value})
    with pytest.raises(InvalidInput, match=r"diversity_penalty must be .* more than 0 for several groups"):
        BeamSearch(num_beams=4, num_beam_groups=2)
    with pytest.raises(InvalidInput, match="num_beam_groups must be 1 with a trie"):
        BeamSearch(num_beams=4, num_beam_groups=2, diversity_penalty=1.0, trie=TokenTrie([[1, 2]]))


# ---------------------------------------------------------------- processors


def writes(value: float, row: int, columns: Any, at: int) -> Any:
    """A processor that writes `value` into columns of one row (all, if None) of texts of `at` tokens."""

    def process(rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if rows.shape[1] == at:
            scores = scores.clone()
            scores[row, columns] = value
        return scores

    return process


EVERY = slice(None)


@pytest.mark.parametrize("at", [2, 4])
@pytest.mark.parametrize(
    ("value", "row", "columns", "message"),
    [
        (torch.nan, 1, 5, "NaN or \\+inf for branch 1 at position {}"),
        (torch.nan, 2, EVERY, "NaN or \\+inf for branch 2 at position {}"),
        (torch.inf, 1, 5, "NaN or \\+inf for branch 1 at position {}"),
        (-torch.inf, EVERY, EVERY, "leave branch 0 no token at position {}"),
    ],
)
def test_processors_that_give_no_scores_end_the_search(
    value: float, row: Any, columns: Any, message: str, at: int
) -> None:
    """As they do those that sample; the others go on."""
    search = BeamSearch(num_beams=3, num_return_sequences=3, logits_processor=(writes(value, row, columns, at),))
    decoder, prompts = tiny.decoder(), [[2, 5], [3, 7], [4, 4]]
    plain = BeamSearch(num_beams=3)
    found = sorted(decoder.search_iter(prompts, [plain, search, plain], max_new_tokens=5), key=lambda r: r.index)
    assert isinstance(found[1].error, InvalidInput) and found[1].candidates == []
    with pytest.raises(InvalidInput, match=message.format(at)):
        _ = found[1].best
    for i in (0, 2):
        assert found[i].best.token_ids == decoder.search([prompts[i]], plain, max_new_tokens=5)[0].best.token_ids
    tiny.assert_all_returned(decoder.worker)
    sampled = Sample(num_return_sequences=3, logits_processor=(writes(value, 0, columns, at),))
    error = decoder.search([prompts[1]], sampled, max_new_tokens=5)[0].error
    assert isinstance(error, InvalidInput) or columns == 5


def test_bans_are_kept_and_banned_texts_are_not_returned() -> None:
    """A beam without a token dies and the others go on; fewer texts than were asked for, if there are no more."""

    def only(rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Texts of 7s that an 8 or EOS ends; after an 8 there is nothing."""
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        allowed[rows[:, -1] != 8] = torch.isin(torch.arange(scores.shape[1]), torch.tensor([0, 7, 8]))
        return scores.masked_fill(~allowed, -torch.inf)

    search = BeamSearch(num_beams=6, num_return_sequences=6, logits_processor=(only,))
    (result,) = tiny.decoder().search([[2, 5]], search, max_new_tokens=3)
    assert all(np.isfinite(c.score) for c in result.candidates)
    texts = [tuple(c.token_ids) for c in result.candidates if c.score > -1e6]  # the rest went on after their EOS
    assert set(texts) <= {(), (7,), (7, 7), (7, 7, 7), (7, 7, 8)} and len(texts) == len(set(texts)) >= 4
