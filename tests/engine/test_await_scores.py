"""`score_tokens` in a search: what transformers' logits say, whatever is scarce, whatever else runs, whatever fails."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from distributions import by_transformers
from forktree import (
    Decoder,
    FunctionReward,
    Greedy,
    InvalidInput,
    KeyedSampling,
    NonFinite,
    RaggedIds,
    Sample,
    Sampling,
    TokenRequest,
    TokenScores,
)
from forktree.kv import Branch
from forktree.search import Search, SearchContext
from forktree.search.request import extend, next_logits, reward_branches, score_tokens
from searches import POISON, Scripted, digits, outcome, together


def greedy(n: int, **options: Any) -> KeyedSampling:
    return KeyedSampling(Sampling(temperature=0), seed=np.zeros(n, int), position=np.zeros(n, int), **options)


def everything(texts: Sequence[Sequence[int]], seed: int) -> TokenRequest:
    rng, n = np.random.default_rng(seed), len(texts)
    return TokenRequest(
        top_k=4,
        sample=greedy(n),
        select=RaggedIds(torch.arange(0, 2 * n + 1, 2), torch.from_numpy(rng.integers(tiny.VOCAB, size=2 * n))),
        targets=torch.from_numpy(rng.integers(tiny.VOCAB, size=n)),
        entropy=True,
    )


def assert_exact(found: TokenScores, request: TokenRequest, texts: Sequence[Sequence[int]]) -> None:
    """Against fp64 log-probs of transformers' logits."""
    exact = torch.stack([tiny.next_log_probs(tiny.model(), text) for text in texts])
    every, near = torch.arange(len(texts)), dict(rtol=0, atol=1e-4)
    assert isinstance(request.select, RaggedIds) and request.targets is not None and found.lse is not None
    best = exact.topk(4)
    wanted = {
        "top_log_probs": best.values,
        "log_prob": best.values[:, 0],
        "entropy": torch.special.entr(exact.exp()).sum(dim=1),
        "target_log_probs": exact[every, request.targets],
        "selected_log_probs": exact[every.repeat_interleave(2), request.select.ids],
    }
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(found, name).double(), value, **near, msg=name)
    torch.testing.assert_close(exact.gather(1, found.top_ids), best.values, **near)
    torch.testing.assert_close(exact[every, found.token], best.values[:, 0], **near)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("num_slots", [2048, 70])
def test_scores_after_forks_rewinds_and_forced_tokens(num_slots: int, ahead: bool) -> None:
    """Six searches at once, with room for all or for about one, so that they are preempted while they wait."""

    async def script(context: SearchContext) -> list[Branch]:
        rng = np.random.default_rng(context.root.tokens)
        branches = context.root.fork(2)
        branches[0].append([5, 9, 4])
        branches += branches[0].fork(1)
        branches[-1].append([7])
        for turn in range(12):
            branch = branches[rng.integers(len(branches))]
            action = rng.integers(5)
            if action == 0:
                branch.rewind(int(rng.integers(max(1, branch.length - 4), branch.length + 1)))
            elif action == 1 and len(branches) < 6:
                branches += branch.fork(1)
            elif action == 2:
                branch.append(rng.integers(1, tiny.VOCAB, 3))
            else:
                await extend([branch], Sampling(), max_tokens=int(rng.integers(1, 4)))
            texts = [b.tokens.tolist() for b in branches]
            request = everything(texts, turn)
            found = await score_tokens(branches, request)
            asked.append((found, request, texts))
        return branches

    asked: list[tuple[TokenScores, TokenRequest, list[list[int]]]] = []
    decoder = tiny.decoder(num_slots=num_slots)
    decoder.engine.ahead = ahead
    preempted = []
    results = decoder.search(
        tiny.prompts(6, seed=4, longest=12),
        Scripted(script),
        max_new_tokens=9,
        on_step=lambda: preempted.append(any(task.preempted for task in decoder.engine.active)),
    )
    assert [r.error for r in results] == [None] * 6 and len(asked) == 6 * 12
    assert any(preempted) == (num_slots == 70)
    for found in asked:
        assert_exact(*found)
    tiny.assert_all_returned(decoder.worker)


def test_samples_of_ones_own_equal_those_of_extend() -> None:
    """Keyed by the branch's key and length, as `extend` keys them."""
    sampled: list[tuple[int, int]] = []

    async def script(context: SearchContext) -> list[Branch]:
        branches, sampling = context.root.fork(8), Sampling(1.5, top_k=15, top_p=0.95)
        for _ in range(4):
            sample = KeyedSampling(sampling, seed=[b.key for b in branches], position=[b.length for b in branches])
            found = await score_tokens(branches, TokenRequest(sample=sample))
            await extend(branches, sampling, max_tokens=1)
            sampled.extend(zip(found.token.tolist(), (int(b.tokens[-1]) for b in branches), strict=True))
        return branches

    assert tiny.decoder().search(["12+3="], Scripted(script), max_new_tokens=9)[0].error is None
    assert len(sampled) == 32 and all(a == b for a, b in sampled) and len(set(sampled)) > 5


def test_a_draft_is_verified_by_its_targets() -> None:
    """Speculative checks: each draft token's log-prob after the ones before it; the longest run accepted is kept."""
    model, prompt, draft = tiny.model(), [2, 13, 4], [5, 9, 4, 11, 3]
    drafts: dict[str, Any] = {}

    async def script(context: SearchContext) -> list[Branch]:
        branch = context.root.fork(1)[0]
        branch.append(draft)
        places = branch.fork(len(draft))
        for i, place in enumerate(places):
            place.rewind(len(prompt) + i)
        found = await score_tokens(places, TokenRequest(targets=torch.tensor(draft), sample=greedy(len(draft))))
        drafts["targets"] = found.target_log_probs
        accepted = int((found.target_log_probs > -3.0).int().cumprod(dim=0).sum())
        drafts["accepted"] = accepted
        branch.rewind(len(prompt) + accepted)
        branch.append([int(found.token[accepted])])
        return [branch]

    decoder = tiny.decoder()
    result = decoder.search([prompt], Scripted(script), max_new_tokens=9)[0]
    assert result.error is None
    exact = [float(tiny.next_log_probs(model, prompt + draft[:i])[token]) for i, token in enumerate(draft)]
    assert drafts["targets"].tolist() == pytest.approx(exact, abs=1e-4)
    accepted = next(i for i, log_prob in enumerate(exact) if log_prob <= -3.0)
    assert drafts["accepted"] == accepted
    most_likely = int(tiny.next_log_probs(model, prompt + draft[:accepted]).argmax())
    assert result.best.token_ids == [*draft[:accepted], most_likely]


MIXED: list[Sampling] = [
    Sampling(),
    Sampling(0),
    Sampling(1.5, top_p=0.9),
    Sampling(0.5),
    Sampling(1.0, top_k=3),
    Sampling(1.0, min_p=0.2),
    Sampling(0.7, top_k=6, top_p=0.8, min_p=0.01),
]


def test_rows_of_a_step_sampled_in_different_ways_are_sampled_as_if_alone() -> None:
    prompts = tiny.prompts(len(MIXED), seed=8)
    searches: list[Search] = [
        Sample(num_return_sequences=3, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p)
        for s in MIXED
    ]
    decoder = tiny.decoder()
    results = together(decoder, prompts, searches, max_new_tokens=12)
    for prompt, search, sampling, result in zip(prompts, searches, MIXED, results, strict=True):
        assert outcome(result) == outcome(tiny.decoder().search([prompt], search, max_new_tokens=12)[0])
        text = decoder.tokenizer(prompt).input_ids
        for token in [c.token_ids[0] for c in result.candidates if c.token_ids]:
            logits = tiny.next_log_probs(tiny.model(), text)[None]
            if sampling.temperature:
                assert by_transformers(logits, sampling)[0, token] > 0, "excluded, and sampled"
            else:
                assert token == logits.argmax()


# ---------------------------------------------------------------- what goes wrong


REQUESTS = {"sample": lambda n: TokenRequest(sample=greedy(n)), "top": lambda n: TokenRequest(top_k=3)}


@pytest.mark.parametrize("request_of", REQUESTS.values(), ids=REQUESTS)
def test_nan_names_branch_and_position(poisoned: Decoder, request_of: Any) -> None:
    lse = []

    async def asks(context: SearchContext) -> list[Branch]:
        clean, bad = context.root.fork(2)
        bad.append([POISON])
        found = await score_tokens([clean, bad], request_of(2), checked=False)
        lse.extend(found.lse.isfinite().tolist())
        await score_tokens([clean, bad], request_of(2))
        return [clean]

    results = together(poisoned, ["12", "12=3"], [Scripted(asks), Greedy()], max_new_tokens=1)
    assert lse == [True, False]
    assert isinstance(results[0].error, NonFinite)
    assert "logits of branch 1 at position 3 " in str(results[0].error)
    assert results[1].error is None
    tiny.assert_all_returned(poisoned.worker)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "no token allowed": (
        TokenRequest(sample=greedy(2, allowed=torch.tensor([[-1], [0]], dtype=torch.int32))),
        InvalidInput,
        "row 1: no token is allowed",
    ),
    "a row too many": (TokenRequest(sample=greedy(3)), ValueError, "3"),
    "no such token": (TokenRequest(targets=torch.tensor([0, tiny.VOCAB])), ValueError, str(tiny.VOCAB)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_request_that_cannot_be_answered_ends_its_own_search(name: str) -> None:
    request, error, message = WRONG[name]

    async def asks(context: SearchContext) -> list[Branch]:
        await score_tokens(context.root.fork(2), request)
        return []

    decoder = tiny.decoder()
    results = together(decoder, ["12", "12=3"], [Scripted(asks), Greedy()], max_new_tokens=3)
    with pytest.raises(error, match=message):
        raise results[0].error or AssertionError("there was no error")
    assert results[1].error is None
    tiny.assert_all_returned(decoder.worker)


def test_a_search_catches_what_a_request_raises_and_goes_on() -> None:
    async def asks(context: SearchContext) -> list[Branch]:
        branches = context.root.fork(2)
        with pytest.raises(InvalidInput, match="row 1"):
            await score_tokens(branches, WRONG["no token allowed"][0])
        await extend(branches, Sampling(), max_tokens=2)
        await reward_branches(branches, FunctionReward(digits))
        assert (await next_logits(branches)).shape == (2, tiny.VOCAB)
        return branches

    result = tiny.decoder().search(["12"], Scripted(asks), max_new_tokens=3)[0]
    assert result.error is None and [len(c.token_ids) for c in result.candidates] == [2, 2]
