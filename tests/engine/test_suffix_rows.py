"""`score_tokens(since=)`: a row for every token of a suffix, from the passes that compute them, equal to one by one."""

from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from forktree import (
    Decoder,
    Greedy,
    InvalidInput,
    KeyedSampling,
    NonFinite,
    RaggedIds,
    Sampling,
    TokenRequest,
    TokenScores,
)
from forktree.kv import Branch
from forktree.search import SearchContext
from forktree.search.request import extend, next_logits, score_tokens
from searches import POISON, Scripted, together

Context = SearchContext
DRAFT = [5, 9, 4, 11, 3, 3, 17, 8]


def passes(decoder: Decoder) -> list[int]:
    """Tokens of each forward pass from now on."""
    sizes: list[int] = []
    forward = decoder.worker.forward
    decoder.worker.forward = lambda chunks: (sizes.append(sum(c.stop - c.begin for c in chunks)), forward(chunks))[1]
    return sizes


def run(script: Callable[[Context], Awaitable[Any]], decoder: Decoder | None = None, prompt: Any = "12+3=") -> Decoder:
    decoder = decoder or tiny.decoder()
    result = decoder.search([prompt], Scripted(script), max_new_tokens=9)[0]
    if result.error is not None:
        raise result.error
    tiny.assert_all_returned(decoder.worker)
    return decoder


def everything(rows: int, seed: int) -> TokenRequest:
    """A request all of whose parts differ from row to row."""
    rng = np.random.default_rng(seed)
    count = rng.integers(0, 4, rows)
    allowed = torch.from_numpy(rng.integers(1, 2**20, (rows, 1)).astype(np.int32))
    return TokenRequest(
        top_k=3,
        sample=KeyedSampling(
            [Sampling(float(t)) for t in rng.uniform(0, 2, rows)],
            seed=rng.integers(0, 2**63, rows),
            position=rng.integers(0, 2**20, rows),
            allowed=allowed,
        ),
        select=RaggedIds(
            torch.from_numpy(np.concatenate([[0], np.cumsum(count)])),
            torch.from_numpy(rng.integers(tiny.VOCAB, size=count.sum())),
        ),
        targets=torch.from_numpy(rng.integers(tiny.VOCAB, size=rows)),
        entropy=True,
    )


def of_row(request: TokenRequest, row: int) -> TokenRequest:
    assert request.sample is not None and isinstance(request.select, RaggedIds) and request.targets is not None
    sample, (begin, stop) = request.sample, request.select.indptr[row : row + 2].tolist()
    return TokenRequest(
        top_k=request.top_k,
        sample=KeyedSampling(
            sample.sampling[row],  # type: ignore[index]
            seed=sample.seed[row : row + 1],  # type: ignore[index]
            position=sample.position[row : row + 1],  # type: ignore[index]
            allowed=sample.allowed[row : row + 1],  # type: ignore[index]
        ),
        select=RaggedIds(torch.tensor([0, stop - begin]), request.select.ids[begin:stop]),
        targets=request.targets[row : row + 1],
        entropy=True,
    )


def joined(scores: list[TokenScores]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([getattr(s, name) for s in scores]) for name in vars(scores[0])}


# ---------------------------------------------------------------- what it costs


def test_a_draft_is_verified_in_one_pass_of_its_tokens() -> None:
    """The token before it is not computed again: its hidden state is kept."""
    found: list[Any] = []

    async def script(context: Context) -> list[Branch]:
        branch = context.root.fork(1)[0]
        await next_logits([branch])
        del sizes[:]
        length = branch.length
        branch.append(DRAFT)
        request = TokenRequest(targets=torch.tensor([*DRAFT, 0]))
        found.append((await score_tokens([branch], request, since=length - 1), branch.tokens.tolist()))
        assert sizes == [len(DRAFT)]
        return [branch]

    decoder = tiny.decoder()
    sizes = passes(decoder)
    run(script, decoder)
    ((rows, tokens),) = found
    assert rows.indptr.tolist() == [0, len(DRAFT) + 1]
    first = len(tokens) - len(DRAFT)
    exact = [float(tiny.next_log_probs(tiny.model(), tokens[: first + i])[t]) for i, t in enumerate([*DRAFT, 0])]
    assert rows.scores.target_log_probs.tolist() == pytest.approx(exact, abs=1e-4)


def test_what_is_computed_is_computed_again_in_one_pass_and_written_nowhere() -> None:
    async def script(context: Context) -> list[Branch]:
        root, (branch,) = context.root, context.root.fork(1)
        await next_logits([root])
        branch.append(DRAFT)
        await next_logits([branch])
        del sizes[:]
        before = await score_tokens([branch], TokenRequest(top_k=1), since=branch.length - 5)
        assert sizes == [4], "the last one was kept"
        again = await score_tokens([branch], TokenRequest(top_k=1), since=branch.length - 5)
        assert sizes == [4, 4], "of the five one is kept"
        assert torch.equal(before.scores.top_log_probs, again.scores.top_log_probs)
        assert not decoder.worker.tree.pending([root]), "nothing else has been touched"
        return [branch]

    decoder = tiny.decoder()
    sizes = passes(decoder)
    run(script, decoder)


def test_what_branches_share_is_computed_once() -> None:
    """Rows of the same tokens of several branches, of several ends of one node, and of two searches."""
    counts: list[int] = []

    async def script(context: Context) -> list[Branch]:
        root = context.root
        trunk = root.fork(1)[0]
        trunk.append(DRAFT)
        ends = trunk.fork(3)
        for end, length in zip(ends[1:], (root.length + 2, root.length + 5), strict=True):
            end.rewind(length)
        ends[0].append([1, 2])
        first = root.length - 1
        found = await score_tokens([*ends, trunk], TokenRequest(top_k=2, lse=True), since=first)
        counts.append(sum(sizes))
        rows = [found.scores.lse[slice(*span)] for span in zip(found.indptr[:-1], found.indptr[1:], strict=True)]
        assert [len(r) for r in rows] == [11, 3, 6, 9]
        for row in rows[1:]:
            assert torch.equal(row, rows[0][: len(row)])
        return [trunk]

    decoder = tiny.decoder()
    sizes = passes(decoder)
    run(script, decoder, "12")
    assert counts == [2 + len(DRAFT) + 2]


def test_a_prompt_kept_from_an_earlier_search_is_not_computed_again() -> None:
    async def script(context: Context) -> list[Branch]:
        branch = context.root.fork(1)[0]
        branch.append(DRAFT)
        await score_tokens([branch], TokenRequest(top_k=1), since=context.root.length)
        return [branch]

    prompt = tiny.prompts(1, shortest=20)[0]
    decoder = tiny.decoder()
    decoder.search([prompt], Greedy(), max_new_tokens=1)
    sizes = passes(decoder)
    result = decoder.search([prompt], Scripted(script), max_new_tokens=9)[0]
    assert result.error is None and sizes == [len(DRAFT)]


# ---------------------------------------------------------------- what requests one by one give


@pytest.mark.parametrize("max_batch_tokens", [512, 5, 1])
@pytest.mark.parametrize("num_slots", [2048, 30])
def test_rows_equal_requests_one_by_one(max_batch_tokens: int, num_slots: int) -> None:
    """Forks of forks with suffixes of their own, whole prompts among them; four searches at once, in any room.

    To the bit where passes have one token each: in larger ones matrix products round by their number of rows.
    """
    preempted: list[bool] = []

    async def script(context: Context) -> list[Branch]:
        rng = np.random.default_rng(context.root.tokens)
        root = context.root
        trunk = root.fork(1)[0]
        trunk.append(rng.integers(1, tiny.VOCAB, 6))
        branches = [trunk, *trunk.fork(2), root.fork(1)[0]]
        branches[1].rewind(int(rng.integers(root.length, trunk.length + 1)))
        branches[2].append(rng.integers(1, tiny.VOCAB, 4))
        branches[3].append(rng.integers(1, tiny.VOCAB, 3))
        since = [int(rng.integers(0, b.length + 1)) for b in branches]
        since[0] = 0
        rows = sum(b.length - first for b, first in zip(branches, since, strict=True))
        request = everything(rows, int(rng.integers(99)))
        found = await score_tokens(branches, request, since=since)
        assert found.indptr[-1] == rows
        if num_slots == 30:
            await extend(root.fork(2), Sampling(), max_tokens=8)
        one_by_one = []
        for branch, first in zip(branches, since, strict=True):
            for length in range(first + 1, branch.length + 1):
                place = branch.fork(1)[0]
                place.rewind(length)
                one_by_one.append(await score_tokens([place], of_row(request, len(one_by_one))))
                place.drop()
        for name, value in joined(one_by_one).items():
            near = dict(rtol=0, atol=0 if max_batch_tokens == 1 else 1e-5, equal_nan=True)
            torch.testing.assert_close(getattr(found.scores, name), value, **near, msg=name)
        return branches

    decoder = tiny.decoder(max_batch_tokens=max_batch_tokens, num_slots=num_slots)
    results = decoder.search(
        tiny.prompts(4, seed=4, longest=12),
        Scripted(script),
        max_new_tokens=9,
        on_step=lambda: preempted.append(any(task.preempted for task in decoder.engine.active)),
    )
    for result in results:
        if result.error is not None:
            raise result.error
    assert any(preempted) == (num_slots == 30 and max_batch_tokens > 1)
    tiny.assert_all_returned(decoder.worker)


def test_no_pass_has_more_rows_than_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of 200 tokens is scored as it is computed, 16 rows at a time."""
    asked: list[int] = []

    async def script(context: Context) -> list[Branch]:
        branch = context.root.fork(1)[0]
        branch.append(np.arange(190) % tiny.VOCAB)
        await score_tokens([branch], TokenRequest(lse=True), since=0)
        return []

    decoder = tiny.decoder(max_batch_tokens=16)
    score = decoder.worker.runner.score
    monkeypatch.setattr(decoder.worker.runner, "score", lambda h, r: (asked.append(len(h)), score(h, r))[1])
    run(script, decoder, tiny.prompts(1, shortest=10, longest=10)[0])
    assert sum(asked) == 200 and max(asked) == 16


def test_no_rows_at_all() -> None:
    async def script(context: Context) -> list[Branch]:
        branches = context.root.fork(2)
        found = await score_tokens(branches, TokenRequest(top_k=2), since=context.root.length)
        assert found.indptr.tolist() == [0, 0, 0] and found.scores.top_ids.shape == (0, 2)
        assert (await score_tokens([], TokenRequest(top_k=2), since=[])).indptr.tolist() == [0]
        return branches

    assert run(script).worker.forwards == 0


# ---------------------------------------------------------------- what goes wrong


WRONG: dict[str, tuple[Any, TokenRequest, str]] = {
    "past its end": ([1, 99], TokenRequest(lse=True), "since of branch 1 must be an integer from 0 to 5, got 99"),
    "too few": ([1], TokenRequest(lse=True), "since must be 2 integers.*got 1"),
    "negative": (-1, TokenRequest(lse=True), "since must be 2 integers from 0"),
    "rows too few": (3, TokenRequest(targets=torch.zeros(3, dtype=torch.long)), r"targets .*\[4\]"),
    "rows too many": (0, TokenRequest(targets=torch.zeros(11, dtype=torch.long)), r"targets .*\[10\]"),
}


@pytest.mark.parametrize("max_batch_tokens", [512, 2])
@pytest.mark.parametrize("name", WRONG)
def test_a_request_that_is_wrong_ends_its_own_search(name: str, max_batch_tokens: int) -> None:
    since, request, message = WRONG[name]

    async def script(context: Context) -> list[Branch]:
        await score_tokens(context.root.fork(2), request, since=since)
        return []

    decoder = tiny.decoder(max_batch_tokens=max_batch_tokens)
    results = together(decoder, ["12+3=", "12=3"], [Scripted(script), Greedy()], max_new_tokens=3)
    with pytest.raises(ValueError, match=message):
        raise results[0].error or AssertionError("there was no error")
    assert isinstance(results[0].error, InvalidInput | ValueError) and results[1].error is None
    tiny.assert_all_returned(decoder.worker)


def test_nan_names_branch_and_position(poisoned: Decoder) -> None:
    async def script(context: Context) -> list[Branch]:
        clean, bad = context.root.fork(2)
        clean.append([1, 2])
        bad.append([3, POISON, 4])
        await score_tokens([clean, bad], TokenRequest(lse=True), since=context.root.length)
        return []

    (result,) = poisoned.search(["12"], Scripted(script), max_new_tokens=1)
    assert isinstance(result.error, NonFinite) and "logits of branch 1 at position 4 " in str(result.error)
