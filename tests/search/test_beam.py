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
