"""Beam search and the host: one copy from the device a step tells it all, errors included."""

from typing import Any

import numpy as np
import pytest
import torch

import tiny
from forktree import BeamSearch, Decoder, NonFinite, TokenScores
from forktree.kv import Tree
from forktree.search.beam import BeamRules, beam_search
from forktree.search.request import NextLogits, ScoreTokens

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
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_one_copy_a_step_is_all_that_leaves_the_device(
    do_sample: bool, early_stopping: bool | str, processors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without values do for the device: whatever else looked at one would fail."""
    copies: list[torch.Size] = []

    def cpu(values: torch.Tensor) -> torch.Tensor:
        copies.append(values.shape)
        return torch.zeros(values.shape, dtype=values.dtype)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    tree = Tree(200)
    roots = [tree.root([1, 2, 3]), tree.root([4, 5, 6])]
    rows = torch.empty(2, 3, dtype=torch.long, device="meta")
    rules = BeamRules(3, 6, 1.0, early_stopping, 5, do_sample)
    search = beam_search(roots, rows, rules, fill=0, processors=processors, stops=lambda rows: rows[:, -1] == 1)
    steps = 0
    with pytest.raises(StopIteration):
        request = search.send(None)
        while True:
            assert len(request.branches) == 6
            steps += 1
            assert isinstance(request, NextLogits) == (do_sample or len(processors) > 0)
            request = search.send(answer(request, torch.empty(6, VOCAB, device="meta")))
    assert steps == 5 and copies == [torch.Size([4, 6])] * 5


def chances(tokens: list[int]) -> torch.Tensor:
    """A table of logits: those behind any text, the same every time."""
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
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = torch.nan
    rules: Any = BeamRules
    if do_sample:
        monkeypatch.setattr("forktree.search.beam.BeamRules", lambda **how: rules(**how, do_sample=True))
    result = decoder.search([[2, 5]], BeamSearch(num_beams=3), max_new_tokens=4)[0]
    assert isinstance(result.error, NonFinite) and "logits of branch 0 at position 2 " in str(result.error)
    tiny.assert_all_returned(decoder.lane)


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
