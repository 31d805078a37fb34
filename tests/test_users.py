"""One Decoder and several who use it: in turns by one thread, else a refusal that leaves the first undisturbed."""

import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from forktree import (
    Decoder,
    FunctionReward,
    Greedy,
    MajorityVote,
    ParticleFilter,
    RewardModel,
    Sample,
    Sampling,
    ValueHead,
    sequence_logprobs,
)
from forktree.engine.worker import ModelWorker
from forktree.errors import DecoderInUse
from forktree.kv import Branch
from forktree.search import SearchContext
from forktree.search.request import extend, reward_branches
from forktree.sequences import scored_sequences
from searches import Custom, Rewarding, Scripted, alone, endless, mixed, outcome, together

PROMPTS = tiny.prompts(3, seed=21)
SEARCHES = [
    Sample(num_return_sequences=3),
    ParticleFilter(reward=FunctionReward(lambda p, r: 0.5), max_step_tokens=3),
    Greedy(),
]
OPTIONS: dict[str, Any] = dict(max_new_tokens=8, seed=2)
EXPECTED: list[Any] = []


def assert_undisturbed(results: list[Any]) -> None:
    if not EXPECTED:
        EXPECTED.extend(alone(PROMPTS, SEARCHES, **OPTIONS))
    assert [outcome(r) for r in sorted(results, key=lambda r: r.index)] == EXPECTED


def elsewhere(call: Callable[[], Any]) -> Any:
    """What a call gives, or raises, in another thread."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return found[0]


def test_a_second_thread_is_refused_at_every_moment_of_the_first() -> None:
    decoder = tiny.decoder()
    tried: list[Any] = []
    forward = decoder.worker.forward

    def intrude() -> None:
        tried.append(elsewhere(lambda: decoder.search(["1="], Greedy(), max_new_tokens=2)))

    decoder.worker.forward = lambda chunks: (intrude(), forward(chunks))[1]  # type: ignore[method-assign]
    results = []
    for result in decoder.search_iter(PROMPTS, SEARCHES, **OPTIONS, on_step=intrude):
        results.append(result)
        if len(results) < len(PROMPTS):
            intrude()
    assert len(tried) > 15 and all(isinstance(t, DecoderInUse) and "another thread" in str(t) for t in tried), tried
    assert_undisturbed(results)
    decoder.worker.forward = forward  # type: ignore[method-assign]
    assert outcome(elsewhere(lambda: decoder.search(PROMPTS[:1], SEARCHES[0], **OPTIONS))[0]) == EXPECTED[0]
    tiny.assert_all_returned(decoder.worker)


def test_log_probs_are_computed_in_turns_with_searches_and_refused_elsewhere() -> None:
    decoder = tiny.decoder()
    texts = [tiny.tokenizer()(prompt).input_ids for prompt in tiny.prompts(9, seed=5)]
    expected = sequence_logprobs(tiny.model(), texts)
    searching = decoder.search_iter(PROMPTS, SEARCHES, **OPTIONS)
    results = [next(searching)]
    assert isinstance(elsewhere(lambda: sequence_logprobs(decoder, texts)), DecoderInUse)
    scoring = scored_sequences(decoder, texts, max_batch_tokens=20)
    found = dict([next(scoring)])
    assert isinstance(elsewhere(lambda: decoder.search(["1="], Greedy(), max_new_tokens=2)), DecoderInUse)
    results += searching
    assert_undisturbed(results)
    assert isinstance(elsewhere(lambda: decoder.search(["1="], Greedy(), max_new_tokens=2)), DecoderInUse)
    found |= dict(scoring)
    for i, log_probs in enumerate(expected):
        np.testing.assert_allclose(found[i], log_probs, atol=1e-4)
    half = scored_sequences(decoder, texts, max_batch_tokens=20)
    next(half)
    elsewhere(half.close)
    tiny.assert_all_returned(decoder.worker)


def test_threads_that_race_give_right_results_or_are_refused() -> None:
    decoder, found = tiny.decoder(), []
    start = threading.Barrier(3)

    def work() -> None:
        start.wait()
        for _ in range(3):
            try:
                found.append(together(decoder, PROMPTS, SEARCHES, **OPTIONS))
            except DecoderInUse as error:
                found.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    right = [f for f in found if not isinstance(f, DecoderInUse)]
    assert len(found) == 9 and right
    for results in right:
        assert_undisturbed(results)
    tiny.assert_all_returned(decoder.worker)


def callers(decoder: Decoder, tried: list[Any]) -> dict[str, Any]:
    """Searches whose own code uses the decoder that runs it."""

    def again(*_: Any) -> None:
        tried.append(decoder)
        for call in (
            lambda: decoder.search(["1="], Greedy(), max_new_tokens=2),
            lambda: decoder.engine.submit(lambda task: extend([task.roots[0].branch], Sampling(), max_tokens=1), [[1]]),
            decoder.engine.step,
            decoder.engine.renew,
            lambda: decoder.submit("1=", Greedy()),
        ):
            with pytest.raises(DecoderInUse, match="in use by the very search"):
                call()

    async def in_run(context: SearchContext) -> list[Branch]:
        again()
        return context.root.fork(1)

    async def in_request(context: SearchContext, **options: Any) -> list[Branch]:
        branches = context.root.fork(2)
        await extend(branches, Sampling(), max_tokens=3, **options)
        return branches

    async def in_reward(context: SearchContext) -> list[Branch]:
        branches = context.root.fork(2)
        await reward_branches(branches, Custom(lambda s: (again(), Rewarding(2, close=again))[1]))
        return branches

    def answer(text: str) -> str:
        again()
        return text

    return {
        "run": Scripted(in_run),
        "stop": Scripted(lambda context: in_request(context, stop=lambda token, tokens: again())),
        "processor": Scripted(
            lambda context: in_request(context, processors=[lambda ids, scores: (again(), scores)[1]])
        ),
        "reward": Scripted(in_reward),
        "answer": MajorityVote(answer=answer, num_samples=2),
    }


@pytest.mark.parametrize("where", ["run", "stop", "processor", "reward", "answer"])
def test_code_that_a_search_calls_is_refused_and_all_goes_on(where: str) -> None:
    decoder, tried = tiny.decoder(), []
    caller = callers(decoder, tried)[where]
    *results, own = together(decoder, [*PROMPTS, "1+"], [*SEARCHES, caller], **OPTIONS)
    assert tried and own.error is None
    assert_undisturbed(results)
    tiny.assert_all_returned(decoder.worker)


def test_a_function_that_scores_in_its_thread_is_refused() -> None:
    decoder = tiny.decoder()
    reward = FunctionReward(lambda prompt, response: decoder.search(["1="], Greedy(), max_new_tokens=2)[0].best.score)
    search = ParticleFilter(reward=reward, num_particles=2, max_step_tokens=3)
    *results, own = together(decoder, [*PROMPTS, "1+"], [*SEARCHES, search], **OPTIONS)
    assert "in use in another thread" in str(own.error)
    assert_undisturbed(results)


def test_on_step_is_refused() -> None:
    decoder, tried = tiny.decoder(), []

    def again() -> None:
        with pytest.raises(DecoderInUse, match="on_step"):
            tried.append(decoder.search(["1="], Greedy(), max_new_tokens=2))
        tried.append(None)

    assert_undisturbed(together(decoder, PROMPTS, SEARCHES, **OPTIONS, on_step=again))
    assert len(tried) > 3 and not any(tried)
    tiny.assert_all_returned(decoder.worker)


def test_results_of_two_calls_are_read_in_turns_by_one_thread() -> None:
    decoder, found = tiny.decoder(), ([], [])
    calls = [decoder.search_iter(PROMPTS, SEARCHES, **OPTIONS) for _ in found]
    for _ in PROMPTS:
        for call, results in zip(calls, found, strict=True):
            results.append(next(call))
    for call, results in zip(calls, found, strict=True):
        assert list(call) == []
        assert_undisturbed(results)
    tiny.assert_all_returned(decoder.worker)


def test_results_may_be_read_by_one_thread_after_the_other() -> None:
    """As web servers do, which ask for each from whatever thread is free."""
    decoder = tiny.decoder()
    results = decoder.search_iter(PROMPTS, SEARCHES, **OPTIONS)
    assert_undisturbed([elsewhere(lambda: next(results)) for _ in PROMPTS])
    assert elsewhere(lambda: list(results)) == []
    tiny.assert_all_returned(decoder.worker)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["closed", "collected", "collected within a step"])
def test_results_closed_or_collected_elsewhere_corrupt_nothing(how: str) -> None:
    """Between the steps of another call, or within one, by that thread or another."""
    decoder = tiny.decoder()
    forward = decoder.worker.forward
    abandoned = decoder.search_iter(
        ["12", *PROMPTS], [Greedy(), *mixed()[:1], *[Scripted(endless)] * 2], max_new_tokens=3
    )
    next(abandoned)
    held: list[Any] = [abandoned]
    del abandoned

    def let_go(*chunks: Any) -> Any:
        if held:
            assert len(decoder.engine.active) > len(PROMPTS)
            gone = held.pop()
            if how == "closed":
                elsewhere(gone.close)
            del gone
            gc.collect()
        return forward(*chunks) if chunks else None

    results = []
    if how == "collected within a step":
        decoder.worker.forward = let_go  # type: ignore[method-assign]
    for result in decoder.search_iter(PROMPTS, SEARCHES, **OPTIONS, on_step=let_go if "step" not in how else None):
        results.append(result)
        assert not held and len(decoder.engine.active) < len(PROMPTS)
    assert_undisturbed(results)
    tiny.assert_all_returned(decoder.worker)


def test_a_reward_model_serves_one_thread_at_a_time() -> None:
    """Two Decoders of two threads that share it: one is refused, or both are right."""
    worker = ModelWorker(tiny.new_model("qwen3", seed=5), num_slots=2048)
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.normal(size=(1, worker.runner.hidden_size)).astype(np.float32))
    reward = RewardModel(worker, tiny.tokenizer(), ValueHead([(weight, None)]))
    search = ParticleFilter(reward=reward, num_particles=4, max_step_tokens=2)
    decoders = [tiny.decoder(), tiny.decoder()]
    expected = [[outcome(r) for r in d.search(PROMPTS, search, **OPTIONS)] for d in decoders]
    refused = 0
    for _ in range(4):
        found: list[Any] = [None, None]

        def run(i: int, found: list[Any] = found) -> None:
            found[i] = decoders[i].search(PROMPTS, search, **OPTIONS)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for results, right in zip(found, expected, strict=True):
            for result, one in zip(results, right, strict=True):
                if result.error is None:
                    assert outcome(result) == one
                else:
                    refused += 1
                    assert isinstance(result.error, DecoderInUse) and "another thread" in str(result.error)
        tiny.assert_all_returned(worker)
        for decoder in decoders:
            tiny.assert_all_returned(decoder.worker)
    assert refused
