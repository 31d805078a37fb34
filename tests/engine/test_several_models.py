"""Further models of a decoder: a request goes to the model of its branches, whatever else runs."""

from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from forktree import (
    Decoder,
    FunctionReward,
    Greedy,
    InvalidInput,
    RewardModel,
    Sample,
    Sampling,
    TokenProbability,
    TokenRequest,
    ValueHead,
)
from forktree.engine.worker import ModelWorker
from forktree.kv import Branch
from forktree.search import SearchContext
from forktree.search.request import extend, next_logits, reward_branches, score_tokens
from searches import Scripted, outcome, together

DRAFT_MODEL = tiny.new_model("qwen3", seed=5)
Script = Callable[[SearchContext], Awaitable[Any]]


def decoder(ahead: bool = False, **options: Any) -> Decoder:
    made = tiny.decoder(models={"draft": DRAFT_MODEL}, **options)
    made.engine.ahead = ahead
    return made


def draft_of(made: Decoder) -> ModelWorker:
    return made.engine.workers.named["draft"]


def run(script: Script, made: Decoder | None = None, prompt: str = "12+3=") -> Any:
    made = made or decoder()
    (result,) = made.search([prompt], Scripted(script), max_new_tokens=9)
    if result.error is not None:
        raise result.error
    for worker in made.engine.workers:
        tiny.assert_all_returned(worker)
    return result


@pytest.mark.parametrize("ahead", [False, True])
def test_each_branch_is_answered_by_its_own_model(ahead: bool) -> None:
    found: list[Any] = []

    async def script(context: SearchContext) -> list[Branch]:
        own, other = context.root.fork(1)[0], context.open("12+3=", model="draft")
        assert own.tokens.tolist() == other.tokens.tolist()
        for model, branch in ((tiny.model(), own), (DRAFT_MODEL, other)):
            exact = tiny.next_log_probs(model, branch.tokens.tolist())
            logits = (await next_logits([branch]))[0].double().log_softmax(dim=-1)
            torch.testing.assert_close(logits, exact, atol=1e-4, rtol=0)
            top = await score_tokens([branch], TokenRequest(top_k=1))
            assert int(top.top_ids[0, 0]) == int(exact.argmax())
            rows = await score_tokens([branch], TokenRequest(lse=True, top_k=1), since=0)
            assert len(rows.scores.lse) == branch.length
            rewards = await reward_branches([branch], TokenProbability([4, 7], suffix=[3]))
            asked = tiny.next_log_probs(model, [*branch.tokens.tolist(), 3])[[4, 7]].softmax(dim=0)
            assert rewards.values[0] == pytest.approx(float(asked[0]), abs=1e-5)
            await extend([branch], Sampling(0), max_tokens=5)
            tokens = branch.tokens.tolist()
            for i in range(len(tokens) - 5, len(tokens)):
                assert tokens[i] == int(tiny.next_log_probs(model, tokens[:i]).argmax())
            found.append(tokens)
        return [own]

    run(script, decoder(ahead))
    assert found[0] != found[1], "two models"


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("num_slots", [2048, 60])
def test_searches_on_both_models_at_once(ahead: bool, num_slots: int) -> None:
    """What each samples on either model is what it samples alone, though both run ahead and slots are short."""

    async def alternates(context: SearchContext) -> list[Branch]:
        drafts = context.open(context.root.tokens, model="draft").fork(3)
        texts = context.root.fork(3)
        for _ in range(2):
            await extend(drafts, Sampling(), max_tokens=3, eos_token_ids=frozenset([0, 4]))
            await extend(texts, Sampling(), max_tokens=2)
            for text, draft in zip(texts, drafts, strict=True):
                text.append(draft.tokens[-1:])
        return texts

    prompts = tiny.prompts(5, seed=3, longest=12)
    searches = [Scripted(alternates), Sample(num_return_sequences=3), *[Scripted(alternates)] * 3]
    alone = [outcome(decoder().search([p], s, max_new_tokens=9)[0]) for p, s in zip(prompts, searches, strict=True)]
    made = decoder(ahead, num_slots=num_slots)

    def check() -> None:
        for worker in made.engine.workers:
            worker.tree.check()

    results = together(made, prompts, searches, max_new_tokens=9, on_step=check)
    assert [r.error for r in results] == [None] * 5
    assert [outcome(r) for r in results] == alone
    for worker in made.engine.workers:
        tiny.assert_all_returned(worker)


def test_tokens_are_counted_by_model() -> None:
    async def script(context: SearchContext) -> list[Branch]:
        other = context.open([3, 4, 5, 6], model="draft")
        await extend([other], Sampling(), max_tokens=3)
        await next_logits([context.root])
        return []

    made = decoder()
    result = run(script, made)
    assert result.counters.tokens_by_model == {"draft": 4 + 2} == {"draft": draft_of(made).tokens_computed}
    assert result.counters.model_tokens == made.worker.tokens_computed == len("12+3=")
    assert result.counters.reward_tokens == 0


def test_roots_opened_share_prefixes_and_are_kept_for_later_searches() -> None:
    template = list(range(1, 16))

    async def script(context: SearchContext) -> list[Branch]:
        opened = [context.open([*template, i]) for i in (1, 2, 3)]
        await next_logits(opened)
        return []

    made = decoder()
    (result,) = made.search(["12"], Scripted(script), max_new_tokens=9)
    assert result.error is None and made.worker.tokens_computed == len(template) + 3
    before = made.worker.tokens_computed
    (result,) = made.search(["12"], Scripted(script), max_new_tokens=9)
    assert result.error is None and made.worker.tokens_computed == before


def test_the_same_prompt_opened_twice_samples_differently() -> None:
    async def script(context: SearchContext) -> list[Branch]:
        opened = [context.open("12+3=") for _ in range(4)]
        await extend(opened, Sampling(1.5), max_tokens=8)
        assert len({tuple(b.tokens.tolist()) for b in opened}) == 4
        return []

    run(script)


def test_rewards_read_the_prompt_of_the_root_that_a_branch_has() -> None:
    seen: list[tuple[str, str]] = []
    judge = RewardModel(
        ModelWorker(tiny.new_model("qwen3", seed=3), num_slots=256),
        tiny.tokenizer(),
        ValueHead([(torch.ones(1, 32), None)]),
    )

    async def script(context: SearchContext) -> list[Branch]:
        for prompts in (("7-7=", "7-7="), ("12+3=", "4")):
            opened = [context.open(prompt).fork(1)[0] for prompt in prompts]
            await extend(opened, Sampling(), max_tokens=4)
            await reward_branches(opened, FunctionReward(lambda *texts: seen.append(texts) or 0.5))
            rewards = await reward_branches(opened, judge)
            assert np.isfinite(rewards.values).all()
        return []

    run(script)
    assert [prompt for prompt, _ in seen] == ["7-7=", "7-7=", "12+3=", "4"]
    tiny.assert_all_returned(judge._worker)


# ---------------------------------------------------------------- what goes wrong


def mixed_extend(context: SearchContext) -> Any:
    return extend([context.root.fork(1)[0], context.open("12", model="draft")], Sampling(), max_tokens=1)


WRONG: dict[str, tuple[Callable[[SearchContext], Any], str]] = {
    "extend of both": (
        mixed_extend,
        r"branch 1 of 2 belongs to tree \d+ of qwen3, expected one of tree \d+ of llama",
    ),
    "score_tokens of both": (
        lambda c: score_tokens([c.open([1], model="draft"), c.root], TokenRequest(lse=True)),
        r"branch 1 of 2 belongs to tree \d+ of llama, expected one of tree \d+ of qwen3",
    ),
    "logits of both": (lambda c: next_logits([c.root, c.open([1], model="draft")]), "belongs to tree"),
    "rewards of both": (
        lambda c: reward_branches([c.root, c.open([1], model="draft")], TokenProbability([1, 2])),
        "belongs to tree",
    ),
    "no such model": (lambda c: c.open("12", model="judge"), "model must be one of 'main', 'draft', got 'judge'"),
    "no tokens": (lambda c: c.open(""), "empty"),
    "a token too high": (lambda c: c.open([1, tiny.VOCAB]), rf"\[0, {tiny.VOCAB}\)"),
    "too long": (lambda c: c.open([1] * 5000), "positions|num_slots"),
    "two prompts": (lambda c: c.open([[1, 2], [3]]), "one prompt.*got 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_ends_its_own_search(name: str) -> None:
    call, message = WRONG[name]

    async def script(context: SearchContext) -> list[Branch]:
        asked = call(context)
        await asked
        return []

    made = decoder()
    results = together(made, ["12+3=", "12=3"], [Scripted(script), Greedy()], max_new_tokens=3)
    with pytest.raises(InvalidInput, match=message):
        raise results[0].error or AssertionError("there was no error")
    assert results[1].error is None
    for worker in made.engine.workers:
        tiny.assert_all_returned(worker)


@pytest.mark.parametrize("models", [{"main": None}, ["draft"], {3: None}])
def test_names_of_models(models: Any) -> None:
    with pytest.raises(InvalidInput, match="models must"):
        tiny.decoder(models=models)


def test_a_model_whose_weights_change_is_looked_at_as_well() -> None:
    model = tiny.new_model("qwen3", seed=6)
    made, found = tiny.decoder(models={"draft": model}), []

    async def script(context: SearchContext) -> list[Branch]:
        other = context.open("12+3=", model="draft")
        logits = (await next_logits([other]))[0].double().log_softmax(dim=-1)
        found.append(float((logits - tiny.next_log_probs(model, other.tokens.tolist())).abs().max()))
        return []

    run(script, made)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    run(script, made)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(0.5)
    made.weights_changed()
    run(script, made)
    assert max(found) < 1e-4
