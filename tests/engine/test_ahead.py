"""`extend` one step ahead of the host: the same results, and the host does read after the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
from forktree import BestOfN, Cancelled, Decoder, Greedy, NonFinite, OutOfMemory, Sample, Sampling, SearchResult
from forktree.device.transfer import Download
from forktree.engine.engine import Engine
from forktree.kv import Branch
from forktree.kv.tree import PENDING_TOKEN
from forktree.search import Search, SearchContext
from forktree.search.request import Extension, extend, next_logits
from searches import (
    MIXED_PROMPTS,
    POISON,
    Scripted,
    finished,
    mixed,
    need,
    outcome,
    random_mix,
    together,
    value_head,
    with_plenty,
)


def decoder(ahead: bool, **options: Any) -> Decoder:
    made = tiny.decoder(**options)
    assert not made.engine.ahead, "on a CPU there is nothing to run ahead of"
    made.engine.ahead = ahead
    return made


def assert_same(got: SearchResult, want: SearchResult) -> None:
    """Texts, reasons and step counts equal; numbers up to rounding, as passes hold other rows."""
    if want.error is not None:
        assert (type(got.error), str(got.error)) == (type(want.error), str(want.error))
        return
    assert got.error is None, got.error
    assert outcome(got) == outcome(want)
    for ours, theirs in zip(got.candidates, want.candidates, strict=True):
        a, b = ours.hypothesis, theirs.hypothesis
        assert a.log_prob == pytest.approx(b.log_prob, abs=1e-3)
        assert a.score == pytest.approx(b.score, abs=1e-3) and a.step_rewards == pytest.approx(b.step_rewards, abs=1e-3)
    assert got.counters.reward_calls == want.counters.reward_calls


def both(prompts: list[str], searches: list[Search], *, seed: int = 0, **options: Any) -> None:
    """Every search, with and without running ahead."""
    results = []
    for ahead in (True, False):
        made = decoder(ahead, **options)
        check = made.worker.tree.check
        results.append(together(made, prompts, searches, max_new_tokens=14, seed=seed, on_step=check))
        tiny.assert_all_returned(made.worker)
    for got, want in zip(*results, strict=True):
        assert_same(got, want)


# ---------------------------------------------------------------- it does run ahead


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What happens in order: ("pass", tokens in it that the host does not know), ("read", sampled tokens read)."""
    seen: list[tuple[str, int]] = []
    read = Download.read
    monkeypatch.setattr(Download, "read", lambda self: (seen.append(("read", self._host.shape[1])), read(self))[1])
    return seen


def watched(made: Decoder, events: list[tuple[str, int]]) -> Decoder:
    forward, tree = made.worker.forward, made.worker.tree

    def watch(chunks: Any) -> None:
        events.append(("pass", int((tree.tokens_of(chunks)[0] == PENDING_TOKEN).sum())))
        forward(chunks)

    made.worker.forward = watch
    return made


@pytest.mark.parametrize("ahead", [True, False])
def test_a_step_is_launched_before_the_tokens_it_computes_are_read(ahead: bool, events: list[tuple[str, int]]) -> None:
    made = watched(Decoder(tiny.model(eos=None), num_slots=200), events)
    made.engine.ahead = ahead
    made.search([[3, 4, 5]], Sample(num_return_sequences=3), max_new_tokens=5)
    if ahead:
        step = [("pass", 3), ("read", 3)]
        assert events == [("pass", 0), *step * 4, ("read", 3)]
    else:
        step = [("pass", 0), ("read", 3)]
        assert events == step * 5


def test_two_searches_run_ahead_together_and_end_apart(events: list[tuple[str, int]]) -> None:
    async def ragged(context: SearchContext) -> list[Branch]:
        branches = context.root.fork(3)
        await extend(branches, Sampling(), max_tokens=[1, 2, 4])
        return branches

    made = watched(Decoder(tiny.model(eos=None), num_slots=200), events)
    made.engine.ahead = True
    results = together(made, [[3, 4, 5], [6, 7]], [Scripted(ragged), Sample(num_return_sequences=2)], max_new_tokens=6)
    assert [[len(c.token_ids) for c in r.candidates] for r in results] == [[1, 2, 4], [6, 6]]
    assert made.worker.tokens_computed == 3 + (0 + 1 + 3) + 2 + 2 * 5, (
        "whoever has all tokens asked for overshoots none"
    )
    assert sum(unknown for kind, unknown in events if kind == "pass") == 4 + 10, "all but the prompts is run ahead"


def test_overshoot_is_counted_and_states_it_replaced_are_put_back() -> None:
    """A score after an EOS costs nothing more; each branch that ends before its last token costs one more."""
    search, prompts = BestOfN(reward=value_head(), num_samples=12), tiny.prompts(6, seed=5)
    computed, results = [], []
    for ahead in (True, False):
        made = decoder(ahead, prefix_cache=False)
        results.append(made.search(prompts, search, max_new_tokens=9))
        computed.append(made.worker.tokens_computed)
        assert sum(r.counters.model_tokens for r in results[-1]) == made.worker.tokens_computed
    ended = [c.hypothesis for r in results[1] for c in r.candidates if c.hypothesis.finish_reason == "eos"]
    early = sum(len(h.token_ids) < 8 for h in ended)
    assert early > 5 and computed[0] == computed[1] + early
    for got, want in zip(*results, strict=True):
        assert_same(got, want)


# ---------------------------------------------------------------- the same results


@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 2}, {"max_batch_tokens": 5}, {"num_slots": 120}], ids=str)
def test_all_searches_at_once(options: dict[str, Any]) -> None:
    searches = mixed() * (1 if "max_batch_tokens" in options else 2)
    both(tiny.prompts(len(searches), seed=1), searches, **options)


@pytest.mark.parametrize("seed", range(24))
def test_stress_random_searches_in_random_room(seed: int) -> None:
    """Any mix, pool and budget; where the pool is too small for a search alone, either may fail."""
    picks, options = random_mix(seed)
    made, catalogue = decoder(True, **options), mixed()
    prompts, searches = [MIXED_PROMPTS[t] for _, t in picks], [catalogue[s] for s, _ in picks]
    results = together(made, prompts, searches, max_new_tokens=9, seed=1, on_step=made.worker.tree.check)
    for (s, t), result in zip(picks, results, strict=True):
        if isinstance(result.error, OutOfMemory):
            assert need(MIXED_PROMPTS[t], catalogue[s], 9) > options["num_slots"], "it would have fitted alone"
        else:
            assert_same(result, with_plenty(s, t))
    tiny.assert_all_returned(made.worker)


def test_a_pool_that_fits_exactly_fits_when_running_ahead_too() -> None:
    """The slot of an overshot token is never what a search fails, or is preempted, for."""
    search, prompt = Sample(num_return_sequences=6), tiny.prompts(1, seed=2)[0]
    slots = len(prompt) + 1
    while (want := decoder(False, num_slots=slots).search([prompt], search, max_new_tokens=9)[0]).error is not None:
        slots += 1
    assert {c.hypothesis.finish_reason for c in want.candidates} == {"eos", "length"}
    assert_same(decoder(True, num_slots=slots).search([prompt], search, max_new_tokens=9)[0], want)


def test_a_branch_goes_on_as_it_would_have_after_eos_and_stops() -> None:
    """Keys, texts, rows of logits and further tokens of branches that ended while their next token was computed."""

    def ends(token: int, tokens: Any) -> bool:
        return token % 3 == 0

    def script(found: list[Any]) -> Callable[[SearchContext], Any]:
        async def run(context: SearchContext) -> list[Branch]:
            branches = context.root.fork(12)
            for turn in range(4):
                done = await extend(branches, Sampling(), max_tokens=4, eos_token_ids=frozenset([0, 5, 9]), stop=ends)
                rows = await next_logits(branches)
                found.append((done.reason, done.num_tokens.tolist(), [(b.key, b.tokens.tolist()) for b in branches]))
                found.append(rows.log_softmax(dim=-1))
                branches = [*branches[turn:], *branches[0].fork(turn)]
            return branches

        return run

    found: list[list[Any]] = [[], []]
    for ahead in (True, False):
        made = decoder(ahead)
        result = made.search(tiny.prompts(1), Scripted(script(found[ahead])), max_new_tokens=20)[0]
        assert result.error is None, result.error
        tiny.assert_all_returned(made.worker)
    assert {reason for reasons, *_ in found[0][::2] for reason in reasons} == {"eos", "stop", "length"}
    assert found[0][::2] == found[1][::2]
    for a, b in zip(found[0][1::2], found[1][1::2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_prompts_that_come_while_tokens_are_unknown() -> None:
    """A prompt that is the beginning of what another search is about to sample."""
    first = decoder(False).search(tiny.prompts(1), Greedy(), max_new_tokens=12)[0]
    text = tiny.prompts(1)[0] + str(first.text)
    prompts = [text[:n] for n in range(len(text) - 11, len(text))]
    want = [decoder(False).search([p], Greedy(), max_new_tokens=12)[0] for p in prompts]
    made = decoder(True)
    tasks = []
    for prompt in prompts:
        tasks.append(made.submit(prompt, Greedy(), max_new_tokens=12))
        made.engine.step()
        made.worker.tree.check()
    for _ in made.engine.run():
        pass
    for i, task in enumerate(tasks):
        assert_same(finished(task), want[i])
    tiny.assert_all_returned(made.worker)


# ---------------------------------------------------------------- failures


def test_nan_names_the_same_branch_and_leaves_the_same_texts(poisoned: Decoder) -> None:
    found: list[Any] = []

    async def script(context: SearchContext) -> list[Branch]:
        branches = context.root.fork(40)
        try:
            await extend(branches, Sampling(), max_tokens=9, eos_token_ids=frozenset([0]))
        except NonFinite as error:
            found.append((str(error), [(b.key, b.tokens.tolist()) for b in branches]))
            branches = [b for b in branches if POISON not in b.tokens]
            done = await extend(branches, Sampling(top_k=3), max_tokens=2, eos_token_ids=frozenset([0, POISON]))
            found.append((done.reason, done.log_prob.round(3).tolist(), [b.tokens.tolist() for b in branches]))
        return branches

    character = tiny.CHARACTERS[POISON - 1]
    prompts = ["12=", tiny.prompts(1)[0].replace(character, "")]
    for ahead in (True, False):
        poisoned.engine.ahead = ahead
        results = together(
            poisoned,
            prompts,
            [Scripted(script), Sample(num_return_sequences=2, top_k=2)],
            max_new_tokens=9,
            on_step=poisoned.worker.tree.check,
        )
        assert results[0].error is None, results[0].error
        tiny.assert_all_returned(poisoned.worker)
    assert len(found) == 4 and found[:2] == found[2:]
    assert "logits of branch" in found[0][0]


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_a_search_that_is_cancelled_knows_all_its_tokens(steps: int) -> None:
    seen: list[Any] = []

    async def looks(context: SearchContext) -> list[Branch]:
        branches = context.root.fork(3)
        try:
            await extend(branches, Sampling(), max_tokens=100)
        except Cancelled:
            seen.append([b.tokens.tolist() for b in branches])
            raise
        return branches

    made, sample = decoder(True), Sample(num_return_sequences=3)
    prompts = tiny.prompts(2)
    want = decoder(False).search(prompts[:1], sample, max_new_tokens=9)[0]
    tasks = []
    for prompt, search in zip(prompts, (sample, Scripted(looks)), strict=True):
        tasks.append(made.submit(prompt, search, max_new_tokens=9))
    for _ in range(steps):
        made.engine.step()
    made.engine.cancel(tasks[1])
    made.worker.tree.check()
    assert isinstance(tasks[1].error, Cancelled) and not made.worker.tree.owned(tasks[1].index)
    assert all(PENDING_TOKEN not in tokens for tokens in seen[0]) and len(seen[0][0]) == len(prompts[1]) + steps
    assert list(made.engine.run()) == [tasks[0]]
    assert_same(finished(tasks[0]), want)
    tiny.assert_all_returned(made.worker)


@pytest.mark.parametrize("at", [2, 3, 5])
@pytest.mark.parametrize("where", ["forward", "read"])
def test_an_interrupt_while_tokens_are_unknown(at: int, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = decoder(True), []
    owner, name = (made.worker.runner, "forward") if where == "forward" else (Download, "read")
    inner = getattr(owner, name)

    def interrupted(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == at:
            raise KeyboardInterrupt
        return inner(*args)

    monkeypatch.setattr(owner, name, interrupted)
    prompts, searches = tiny.prompts(3), [Sample(num_return_sequences=3), Greedy(), Sample(num_return_sequences=2)]
    tasks = []
    for prompt, search in zip(prompts, searches, strict=True):
        tasks.append(made.submit(prompt, search, max_new_tokens=14))
    with pytest.raises(KeyboardInterrupt):
        while made.engine.active:
            made.engine.step()
    assert made.engine.active == [] and all(task.done for task in tasks)
    ended = [task for task in tasks if task.error is not None]
    assert ended and all(isinstance(task.error, Cancelled) and "KeyboardInterrupt" in str(task.error) for task in ended)
    assert not any(root.branch.alive for task in tasks for root in task.roots)
    tiny.assert_all_returned(made.worker)
    want = decoder(False).search(prompts, searches[0], max_new_tokens=14)
    for got, wanted in zip(made.search(prompts, searches[0], max_new_tokens=14), want, strict=True):
        assert_same(got, wanted)


def test_a_stop_that_raises_leaks_nothing() -> None:
    def breaks(token: int, tokens: Any) -> bool:
        if len(tokens) == 3:
            raise LookupError("no such stop")
        return False

    async def script(context: SearchContext) -> Extension:
        return await extend(context.root.fork(3), Sampling(), max_tokens=9, stop=breaks)

    made, sample = decoder(True), Sample(num_return_sequences=3)
    results = together(made, tiny.prompts(2), [Scripted(script), sample], max_new_tokens=9)
    assert isinstance(results[0].error, LookupError) and made.engine.active == []
    assert_same(results[1], decoder(False).search(tiny.prompts(2)[1:], sample, max_new_tokens=9)[0])
    tiny.assert_all_returned(made.worker)


def test_running_ahead_is_for_a_gpu_unless_asked() -> None:
    worker = tiny.decoder().worker
    assert not Engine(worker).ahead and Engine(worker, ahead=True).ahead
