"""The engine: many searches at once give what each gives alone, whatever is scarce and whatever fails."""

from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from forktree import (
    BestOfN,
    Cancelled,
    Decoder,
    FunctionReward,
    Greedy,
    InvalidInput,
    NonFinite,
    OutOfMemory,
    ParticleFilter,
    RewardModel,
    Sample,
    Sampling,
    TokenProbability,
    ValueHead,
)
from forktree.engine.worker import ModelWorker
from forktree.kv import Branch
from forktree.search import Search, SearchContext
from forktree.search.request import extend, next_logits, reward_branches
from searches import (
    MIXED_PROMPTS,
    POISON,
    Scripted,
    alone,
    digits,
    endless,
    finished,
    mixed,
    need,
    outcome,
    random_mix,
    together,
    value_head,
    with_plenty,
)

# ---------------------------------------------------------------- same text, whatever else runs


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "search",
    [
        Sample(num_return_sequences=4),
        ParticleFilter(
            reward=FunctionReward(digits), num_particles=6, step_delimiter="5", max_step_tokens=5, max_steps=4
        ),
    ],
    ids=["sample", "particles"],
)
def test_same_text_alone_or_among_32_prompts(kind: str, search: Search) -> None:
    prompts = tiny.prompts(32)
    batch = tiny.decoder(kind).search(prompts, search, max_new_tokens=14, seed=7)
    for prompt, result in list(zip(prompts, batch, strict=True))[::8]:
        single = tiny.decoder(kind).search([prompt], search, max_new_tokens=14, seed=7)[0]
        assert outcome(single) == outcome(result)
    assert len({str(outcome(result)) for result in batch}) == 32
    again = tiny.decoder(kind).search(prompts, search, max_new_tokens=14, seed=7)
    assert [outcome(r) for r in again] == [outcome(r) for r in batch]
    other = tiny.decoder(kind).search(prompts, search, max_new_tokens=14, seed=8)
    assert all(outcome(a) != outcome(b) for a, b in zip(batch, other, strict=True))


def test_forks_of_one_branch_sample_differently_and_a_rewound_branch_samples_anew() -> None:
    sampled: list[tuple[int, ...]] = []

    async def script(context: SearchContext) -> list[Branch]:
        first = context.root.fork(6)
        await extend(first, Sampling(), max_tokens=8)
        second = context.root.fork(6)
        await extend(second, Sampling(), max_tokens=8)
        sampled.extend(tuple(b.tokens[-8:].tolist()) for b in (*first, *second))
        for _ in range(3):
            for branch in first:
                branch.rewind(context.root.length)
            await extend(first, Sampling(), max_tokens=8)
            sampled.extend(tuple(b.tokens[-8:].tolist()) for b in first)
        return first

    result = tiny.decoder().search(tiny.prompts(1), Scripted(script), max_new_tokens=9)[0]
    assert result.error is None
    assert len(sampled) == 30 and len(set(sampled)) == 30


def test_different_searches_at_once_give_what_each_gives_alone() -> None:
    searches = mixed() * 3
    prompts = tiny.prompts(len(searches), seed=1)
    expected = alone(prompts, searches, max_new_tokens=14, seed=3)
    decoder = tiny.decoder()
    results = together(decoder, prompts, searches, max_new_tokens=14, seed=3)
    assert [outcome(r) for r in results] == expected
    assert decoder.worker.forwards < 60, "all of them together need about as many steps as the longest"
    tiny.assert_all_returned(decoder.worker)


@pytest.mark.parametrize("max_batch_tokens", [2, 5, 16])
def test_split_prefills_mixed_with_decoding_give_the_same_text(max_batch_tokens: int) -> None:
    searches = [*mixed(), Sample(num_return_sequences=3)]
    prompts = [*tiny.prompts(len(mixed()), seed=2), tiny.prompts(1, seed=5, shortest=60, longest=60)[0]]
    expected = alone(prompts, searches, max_new_tokens=10)
    sizes: list[int] = []
    decoder = tiny.decoder(max_batch_tokens=max_batch_tokens)
    forward = decoder.worker.forward
    decoder.worker.forward = lambda chunks: (sizes.append(sum(c.stop - c.begin for c in chunks)), forward(chunks))
    results = together(decoder, prompts, searches, max_new_tokens=10)
    assert [outcome(r) for r in results] == expected
    assert max(sizes) == max_batch_tokens
    tiny.assert_all_returned(decoder.worker)


@pytest.mark.parametrize("max_batch_tokens", [3, 512])
def test_logits_after_forks_rewinds_and_forced_tokens_are_those_of_transformers(max_batch_tokens: int) -> None:
    """Random edits of several branches; every row of logits against a plain forward over the branch's tokens.

    Includes forced tokens after a prompt that is itself not computed yet, and more of both than one pass takes.
    """
    rng, worst = np.random.default_rng(0), [0.0]
    model = tiny.model()

    async def script(context: SearchContext) -> list[Branch]:
        branches = context.root.fork(2)
        branches[0].append([5, 9, 4])
        branches += branches[0].fork(1)
        branches[-1].append([7])
        branches[0].append([6, 6])
        for turn in range(30):
            branch = branches[rng.integers(len(branches))]
            action = rng.integers(6)
            if action == 0:
                branch.rewind(int(rng.integers(max(1, branch.length - 4), branch.length + 1)))
            elif action == 1 and len(branches) < 7:
                branches += branch.fork(1)
            elif action == 2 and len(branches) > 2:
                branches.remove(branch)
                branch.drop()
            elif action == 3:
                branch.append(rng.integers(1, tiny.VOCAB, 3))
            else:
                await extend([branch], Sampling(), max_tokens=int(rng.integers(1, 4)))
            asked = branches if turn % 3 == 0 else [branches[rng.integers(len(branches))]]
            rows = await next_logits(asked)
            for row, one in zip(rows, asked, strict=True):
                exact = tiny.next_log_probs(model, one.tokens.tolist())
                worst[0] = max(worst[0], float((row.double().log_softmax(dim=-1) - exact).abs().max()))
        return branches

    decoder = tiny.decoder(max_batch_tokens=max_batch_tokens)
    for prompt in tiny.prompts(5):
        result = decoder.search([prompt], Scripted(script), max_new_tokens=9)[0]
        assert result.error is None, result.error
    assert worst[0] < 1e-4
    tiny.assert_all_returned(decoder.worker)


def test_a_branch_rewound_and_grown_again_token_by_token_sees_its_newest_token() -> None:
    """Recomputing one token and then growing the same node reuses no plan that ends at the old length."""
    model, seen = tiny.model(), []

    async def script(context: SearchContext) -> list[Branch]:
        branch = context.root.fork(1)[0]
        await extend([branch], Sampling(), max_tokens=6)
        branch.rewind(branch.length - 3)
        for token in (5, 9, 12, 3):
            seen.append((branch.tokens.tolist(), (await next_logits([branch]))[0]))
            branch.append([token])
        return [branch]

    assert tiny.decoder().search(tiny.prompts(1), Scripted(script), max_new_tokens=9)[0].error is None
    for tokens, row in seen:
        torch.testing.assert_close(
            row.double().log_softmax(dim=-1), tiny.next_log_probs(model, tokens), atol=1e-4, rtol=0
        )


# ---------------------------------------------------------------- nothing is computed twice


@pytest.mark.parametrize("count", [1, 5, 40])
def test_a_prompt_is_computed_once_whatever_the_number_of_branches(count: int) -> None:
    """Its last token included: prompt + what was sampled, less each branch's last token, after which nobody looks."""
    decoder = Decoder(tiny.model(eos=None), tiny.tokenizer(), num_slots=2048)
    decoder.tokenizer = None  # without one there is no EOS
    prompt = tiny.tokenizer()(tiny.prompts(1)[0]).input_ids
    result = decoder.search([prompt], Sample(num_return_sequences=count), max_new_tokens=9)[0]
    assert all(len(c.token_ids) == 9 for c in result.candidates)
    assert decoder.worker.tokens_computed == len(prompt) + count * 8 == result.counters.model_tokens
    assert result.counters.peak_slots <= len(prompt) + count * 16


def test_scores_on_the_models_own_state_cost_the_last_token_only() -> None:
    decoder = tiny.decoder()
    prompt = tiny.prompts(1)[0]
    result = decoder.search([prompt], BestOfN(reward=value_head(), num_samples=6), max_new_tokens=9)[0]
    sampled = sum(len(c.token_ids) for c in result.candidates)
    assert decoder.worker.tokens_computed == len(prompt) + sampled
    assert result.counters.reward_calls == 6 and result.counters.reward_tokens == 0


def test_kept_prefixes_are_reused_and_give_way_under_pressure() -> None:
    head, tails = tiny.prompts(1, shortest=60, longest=60)[0], tiny.prompts(3, seed=4, shortest=4, longest=4)
    search, options = Sample(num_return_sequences=3), {"max_new_tokens": 10}
    expected = alone([head + tail for tail in tails], [search] * 3, **options)
    decoder = tiny.decoder(num_slots=150)
    cold = tiny.decoder(num_slots=150, prefix_cache=False)
    for i, tail in enumerate(tails):
        before, cold_before = decoder.worker.tokens_computed, cold.worker.tokens_computed
        assert outcome(decoder.search([head + tail], search, **options)[0]) == expected[i]
        assert outcome(cold.search([head + tail], search, **options)[0]) == expected[i]
        saved = cold.worker.tokens_computed - cold_before - (decoder.worker.tokens_computed - before)
        common = 0 if i == 0 else max(len(head), *(_common(head + tail, head + t) for t in tails[:i]))
        assert saved == common
    before = decoder.worker.tokens_computed
    assert outcome(decoder.search([head + tails[0]], search, **options)[0]) == expected[0]
    sampled = [len(text) + (reason == "eos") for text, reason, _ in expected[0]]
    assert decoder.worker.tokens_computed - before == sum(sampled) - 3, "nothing of the prompt is computed again"
    kept = len(decoder.worker.prefixes)
    assert kept == 3
    big = tiny.prompts(1, seed=9, shortest=130, longest=130)[0]
    assert outcome(decoder.search([big], Greedy(), **options)[0]) == alone([big], [Greedy()], **options)[0]
    assert len(decoder.worker.prefixes) < kept + 1
    tiny.assert_all_returned(decoder.worker)


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---------------------------------------------------------------- out of slots


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_with_room_for_about_one_search_all_finish_with_the_same_text(prefix_cache: bool) -> None:
    searches = mixed() * 2
    prompts = tiny.prompts(len(searches), seed=6)
    expected = alone(prompts, searches, max_new_tokens=12)
    slots = max(need(p, s, 12) for p, s in zip(prompts, searches, strict=True))
    decoder = tiny.decoder(num_slots=slots, prefix_cache=prefix_cache)
    tasks, check = [], decoder.worker.tree.check
    results = together(decoder, prompts, searches, max_new_tokens=12, on_step=check)
    assert [outcome(r) for r in results] == expected
    # all submitted at once, so that they do get in each other's way
    for prompt, search in zip(prompts, searches, strict=True):
        tasks.append(decoder.submit(prompt, search, max_new_tokens=12))
    preempted = 0
    while decoder.engine.active:
        decoder.engine.step()
        preempted += any(t.preempted for t in tasks)
        check()
    assert preempted > 0, "this test is about searches that get in each other's way"
    for task, wanted in zip(tasks, expected, strict=True):
        assert task.error is None
        assert outcome(finished(task)) == wanted
    tiny.assert_all_returned(decoder.worker)


def test_a_search_that_cannot_fit_alone_fails_by_name_and_the_others_finish() -> None:
    small, large = Sample(num_return_sequences=3), Sample(num_return_sequences=64)
    prompts = tiny.prompts(5, seed=3)
    searches: list[Search] = [small, large, small, large, small]
    expected = alone(prompts, searches, max_new_tokens=12)
    decoder = tiny.decoder(num_slots=96)
    results = together(decoder, prompts, searches, max_new_tokens=12)
    for i in (0, 2, 4):
        assert outcome(results[i]) == expected[i]
    for i in (1, 3):
        error = results[i].error
        assert isinstance(error, OutOfMemory) and results[i].candidates == []
        for part in ("needs", "free", "of 96", "num_slots", "bytes"):
            assert part in str(error)
        with pytest.raises(OutOfMemory):
            _ = results[i].text
    tiny.assert_all_returned(decoder.worker)


def test_a_search_may_catch_out_of_memory_and_go_on_narrower() -> None:
    async def script(context: SearchContext) -> list[Branch]:
        wide = context.root.fork(60)
        try:
            await extend(wide, Sampling(), max_tokens=6)
        except OutOfMemory:
            for branch in wide[4:]:
                branch.drop()
            for branch in wide[:4]:
                branch.rewind(context.root.length)
            await extend(wide[:4], Sampling(), max_tokens=6)
            return wide[:4]
        raise AssertionError("60 branches cannot fit")

    decoder = tiny.decoder(num_slots=80)
    result = decoder.search(tiny.prompts(1), Scripted(script), max_new_tokens=9)[0]
    assert result.error is None and [len(c.token_ids) for c in result.candidates] == [6] * 4
    tiny.assert_all_returned(decoder.worker)


@pytest.mark.parametrize("seed", range(40))
def test_stress_random_searches_in_random_room(seed: int) -> None:
    """Any mix, any pool, any budget: the same text as with plenty, or OutOfMemory where that can be."""
    picks, options = random_mix(seed)
    decoder, catalogue = tiny.decoder(**options), mixed()
    prompts, searches = [MIXED_PROMPTS[t] for _, t in picks], [catalogue[s] for s, _ in picks]
    results = together(decoder, prompts, searches, max_new_tokens=9, seed=1, on_step=decoder.worker.tree.check)
    for (s, t), result in zip(picks, results, strict=True):
        if result.error is None:
            assert outcome(result) == outcome(with_plenty(s, t)) != []
        else:
            assert isinstance(result.error, OutOfMemory)
            assert need(MIXED_PROMPTS[t], catalogue[s], 9) > options["num_slots"], "it would have fitted alone"
    tiny.assert_all_returned(decoder.worker)


def test_a_reward_models_pool_may_be_scarce_too() -> None:
    """Several searches on one reward model whose own pool holds about one of them."""

    def search(slots: int) -> tuple[ParticleFilter, ModelWorker]:
        worker = ModelWorker(tiny.new_model("qwen3", seed=3), num_slots=slots)
        reward = RewardModel(worker, tiny.tokenizer(), value_head(2))
        return ParticleFilter(reward=reward, num_particles=6, step_delimiter="", max_step_tokens=3, max_steps=4), worker

    prompts = tiny.prompts(6, seed=11)
    plenty, _ = search(2048)
    expected = [outcome(tiny.decoder().search([p], plenty, max_new_tokens=12)[0]) for p in prompts]
    scarce, worker = search(24 + 6 * 12)
    decoder = tiny.decoder()
    results = decoder.search(prompts, scarce, max_new_tokens=12, on_step=worker.tree.check)
    assert [outcome(r) for r in results] == expected
    tiny.assert_all_returned(decoder.worker)
    tiny.assert_all_returned(worker)


# ---------------------------------------------------------------- failures, cancelling, interruption


async def fails_at_once(context: SearchContext) -> list[Branch]:
    raise RuntimeError("broken at once")


async def fails_late(context: SearchContext) -> list[Branch]:
    branches = context.root.fork(3)
    await extend(branches, Sampling(), max_tokens=4)
    await reward_branches(branches, value_head())
    raise RuntimeError("broken late")


async def awaits_something_else(context: SearchContext) -> list[Branch]:
    class Other:
        def __await__(self) -> Any:
            return (yield "not a request")

    await Other()


async def uses_a_dropped_branch(context: SearchContext) -> list[Branch]:
    branch = context.root.fork(1)[0]
    branch.drop()
    await extend([branch], Sampling(), max_tokens=1)


async def names_a_branch_twice(context: SearchContext) -> list[Branch]:
    branch = context.root.fork(1)[0]
    await extend([branch, branch], Sampling(), max_tokens=2)


async def swallows_cancelled(context: SearchContext) -> list[Branch]:
    while True:
        try:
            await extend(context.root.fork(3), Sampling(), max_tokens=200)
        except Cancelled:
            continue


async def awaits_while_being_closed(context: SearchContext) -> list[Branch]:
    try:
        await endless(context)
    finally:
        await extend(context.root.fork(2), Sampling(), max_tokens=5)


async def raises_while_being_closed(context: SearchContext) -> list[Branch]:
    try:
        await swallows_cancelled(context)
    finally:
        raise OSError("while closing")


async def returns_when_cancelled(context: SearchContext) -> list[Branch]:
    branches = context.root.fork(2)
    try:
        await extend(branches, Sampling(), max_tokens=200)
    except Cancelled:
        return branches


@pytest.mark.parametrize(
    "script", [fails_at_once, fails_late, awaits_something_else, uses_a_dropped_branch, names_a_branch_twice]
)
def test_an_exception_in_a_search_is_its_own_result(script: Callable[[SearchContext], Awaitable[Any]]) -> None:
    prompts, sample = tiny.prompts(3), Sample(num_return_sequences=3)
    expected = alone(prompts, [sample] * 3, max_new_tokens=9)
    decoder = tiny.decoder()
    results = together(decoder, prompts, [sample, Scripted(script), sample], max_new_tokens=9)
    assert [outcome(results[i]) for i in (0, 2)] == [expected[0], expected[2]]
    error = results[1].error
    assert type(error) in (RuntimeError, TypeError, InvalidInput) and results[1].candidates == []
    if "fails" in script.__name__:
        assert "broken" in str(error)
    tiny.assert_all_returned(decoder.worker)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "script",
    [endless, swallows_cancelled, awaits_while_being_closed, raises_while_being_closed, returns_when_cancelled],
)
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_cancelling_returns_every_slot_and_leaves_the_others_alone(
    script: Callable[[SearchContext], Awaitable[Any]], steps: int
) -> None:
    prompts, sample = tiny.prompts(2), Sample(num_return_sequences=3)
    expected = alone(prompts[:1], [sample], max_new_tokens=9)[0]
    decoder = tiny.decoder()
    tasks = []
    for prompt, search in zip(prompts, (sample, Scripted(script)), strict=True):
        tasks.append(decoder.submit(prompt, search, max_new_tokens=9))
    for _ in range(steps):
        decoder.engine.step()
    decoder.engine.cancel(tasks[1])
    assert tasks[1].done and decoder.engine.active == [tasks[0]]
    assert not decoder.worker.tree.owned(tasks[1].index)
    decoder.worker.tree.check()
    if script is returns_when_cancelled:
        assert tasks[1].error is None
    else:
        assert isinstance(tasks[1].error, Cancelled | OSError)
    decoder.engine.cancel(tasks[1])  # once more is harmless
    assert list(decoder.engine.run()) == [tasks[0]]
    assert outcome(finished(tasks[0])) == expected
    tiny.assert_all_returned(decoder.worker)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_closing_the_results_early_cancels_what_still_runs() -> None:
    decoder = tiny.decoder()
    searches = [Greedy(), Scripted(endless), Scripted(swallows_cancelled), Scripted(awaits_while_being_closed)]
    results = decoder.search_iter(tiny.prompts(4), searches, max_new_tokens=6)
    assert next(results).index == 0
    assert len(decoder.engine.active) == 3
    results.close()
    assert decoder.engine.active == []
    tiny.assert_all_returned(decoder.worker)
    assert decoder.search(tiny.prompts(1), Greedy(), max_new_tokens=6)[0].error is None


def test_results_that_nobody_asks_for_run_nothing() -> None:
    decoder = tiny.decoder()
    decoder.search_iter(tiny.prompts(4), Greedy(), max_new_tokens=6)
    assert decoder.engine.active == [] and decoder.worker.forwards == 0


@pytest.mark.parametrize("at", [1, 2, 5, 9])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_an_interrupt_between_steps_returns_every_slot(at: int, kind: type[BaseException]) -> None:
    decoder, steps = tiny.decoder(num_slots=200), []

    def on_step() -> None:
        steps.append(decoder.worker.forwards)
        if len(steps) == at:
            raise kind

    searches = [*mixed(), Scripted(endless)]
    with pytest.raises(kind):
        together(decoder, tiny.prompts(len(searches)), searches, max_new_tokens=14, on_step=on_step)
    assert len(steps) == at and decoder.engine.active == []
    tiny.assert_all_returned(decoder.worker)
    prompt, options = tiny.prompts(1), {"max_new_tokens": 9}
    assert [outcome(r) for r in decoder.search(prompt, Greedy(), **options)] == alone(prompt, [Greedy()], **options)


def test_a_keyboard_interrupt_inside_a_search_returns_every_slot() -> None:
    async def script(context: SearchContext) -> list[Branch]:
        await extend(context.root.fork(2), Sampling(), max_tokens=3)
        raise KeyboardInterrupt

    decoder = tiny.decoder()
    with pytest.raises(KeyboardInterrupt):
        together(decoder, tiny.prompts(3), [Scripted(endless), Scripted(script), Greedy()], max_new_tokens=14)
    assert decoder.engine.active == []
    tiny.assert_all_returned(decoder.worker)


def test_a_search_that_is_no_coroutine_leaks_nothing() -> None:
    class Plain(Search):
        def run(self, context: SearchContext) -> Any:
            raise LookupError("not written yet")

    decoder = tiny.decoder()
    results = sorted(decoder.search_iter(tiny.prompts(2), [Plain(), Greedy()], max_new_tokens=3), key=lambda r: r.index)
    assert isinstance(results[0].error, LookupError) and str(results[0].error) == "not written yet"
    assert results[1].error is None
    tiny.assert_all_returned(decoder.worker)


# ---------------------------------------------------------------- NaN


def test_nan_ends_only_the_searches_that_meet_it(poisoned: Decoder) -> None:
    """The others give the same text as ever, in slots that NaN was written to before as well."""
    character = tiny.CHARACTERS[POISON - 1]
    prompts = [p.replace(character, "=") for p in tiny.prompts(9, seed=12)]
    prompts[2] = prompts[2] + character
    prompts[5] = character + prompts[5]
    # logits of POISON itself are finite; make sure that nobody samples it
    searches: list[Search] = [Sample(num_return_sequences=4, top_k=3) if i % 2 else Greedy() for i in range(9)]
    for _ in range(3):
        results = together(poisoned, prompts, searches, max_new_tokens=8, on_step=poisoned.worker.tree.check)
        for i, (prompt, search, result) in enumerate(zip(prompts, searches, results, strict=True)):
            clean = tiny.decoder(prefix_cache=False).search([prompt], search, max_new_tokens=8)[0]
            if i in (2, 5):
                assert isinstance(result.error, NonFinite)
                assert "branch 0" in str(result.error) and f"position {len(prompt)}" in str(result.error)
            elif any(character in c.text for c in clean.candidates):
                assert isinstance(result.error, NonFinite) or outcome(result) == outcome(clean)
            else:
                assert result.error is None, (i, result.error)
                assert outcome(result) == outcome(clean)
        assert sum(r.error is None for r in results) >= 5
        poisoned.worker.prefixes.clear()
    tiny.assert_all_returned(poisoned.worker)


def test_slots_that_held_nan_do_not_leak_into_others(poisoned: Decoder) -> None:
    """The whole pool is filled with NaN and freed; what comes next computes in it as in a fresh one."""
    character = tiny.CHARACTERS[POISON - 1]
    bad = poisoned.search([character * 200], Greedy(), max_new_tokens=2)[0]
    assert isinstance(bad.error, NonFinite)
    for tensor in (t for pool in poisoned.worker.runner.pools for t in pool.tensors):
        assert tensor.isnan().any(), "the pool should hold NaN by now"
    prompts, search = ["1+2=", "ab\n34.", "7" * 30], Sample(num_return_sequences=4, top_k=3)
    for prompt, result in zip(prompts, poisoned.search(prompts, search, max_new_tokens=12), strict=True):
        clean = tiny.decoder().search([prompt], search, max_new_tokens=12)[0]
        if not any(character in c.text for c in clean.candidates):
            assert outcome(result) == outcome(clean)
        else:
            assert isinstance(result.error, NonFinite) or outcome(result) == outcome(clean)


@pytest.mark.parametrize("reward", [value_head(), TokenProbability([1, 2], suffix=[POISON])], ids=["head", "judge"])
def test_nan_rewards_and_logits_name_branch_and_position(poisoned: Decoder, reward: Any) -> None:
    async def asks_logits(context: SearchContext) -> list[Branch]:
        clean, bad = context.root.fork(2)
        bad.append([POISON])
        await next_logits([clean, bad])

    async def asks_score(context: SearchContext) -> list[Branch]:
        clean, bad = context.root.fork(2)
        if isinstance(reward, ValueHead):
            bad.append([POISON])
        await reward_branches([clean, bad], reward)

    results = together(
        poisoned, ["12", "12=", "12=3"], [Scripted(asks_logits), Scripted(asks_score), Greedy()], max_new_tokens=1
    )
    assert isinstance(results[0].error, NonFinite) and isinstance(results[1].error, NonFinite)
    assert "logits of branch 1 at position 3" in str(results[0].error)
    assert f"reward of branch {int(isinstance(reward, ValueHead))} at position 4" in str(results[1].error)
    assert results[2].error is None
    tiny.assert_all_returned(poisoned.worker)
