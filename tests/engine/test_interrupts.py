"""Ctrl-C at any line: no slot is lost, no search goes on, and the decoder works as ever."""

import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import forktree
import tiny
from forktree import BeamSearch, Cancelled, Decoder, Greedy, ParticleFilter, Sample, Sampling, TokenRequest
from forktree.engine.engine import Engine
from forktree.engine.interrupts import DeferredInterrupts
from forktree.kv import Branch
from forktree.search import Search, SearchContext
from forktree.search.request import extend, reward_branches, score_tokens
from searches import Custom, Scripted, endless, outcome, together, value_head

PACKAGE = str(Path(forktree.__file__).parent)
# what stands outside critical sections, or makes them
THIN = ("decoder.py", "users.py", "critical.py", "interrupts.py")


async def asks(context: SearchContext) -> list[Branch]:
    branches = context.root.fork(2)
    await extend(branches, Sampling(), max_tokens=2)
    await score_tokens(branches, TokenRequest(top_k=2))
    return branches


def searches() -> list[Search]:
    steps = ParticleFilter(reward=value_head(), num_particles=2, step_delimiter="", max_step_tokens=1, max_steps=2)
    return [steps, BeamSearch(num_beams=2), Scripted(asks)]


PROMPTS = ["1+", "13", "124"]


def decoder(ahead: bool, num_slots: int) -> Decoder:
    made = tiny.decoder(num_slots=num_slots)
    made.engine.ahead = ahead
    return made


def whole(made: Decoder) -> list[Any]:
    return made.search(PROMPTS, searches(), max_new_tokens=2)  # type: ignore[arg-type]


def brief(made: Decoder) -> list[Any]:
    return made.search(["12", "13"], Greedy(), max_new_tokens=2, on_step=lambda: None)


@pytest.fixture(autouse=True)
def own_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler, "the handler was not put back"


def traced(call: Callable[[], Any], at: int | None, times: int = 1, kind: str = "line") -> list[tuple[str, int]]:
    """Runs `call`; before event number `at` signals come. Events are lines of the package, or with "thin line" and
    "opcode" lines and instructions of its thin part. Returns file and line of each."""
    events = []

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        if event == kind.removeprefix("thin "):
            events.append((Path(frame.f_code.co_filename).name, frame.f_lineno))
            if len(events) - 1 == at:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
        return local

    def each(frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(PACKAGE) or (kind != "line" and not name.endswith(THIN)):
            return None
        frame.f_trace_opcodes = kind == "opcode"
        return local

    sys.settrace(each)
    try:
        call()
    finally:
        sys.settrace(None)
    return events


def is_free(engine: Engine) -> bool:
    """Whether another thread may use an engine: no run is left, and no call is under way."""
    done: list[bool] = []

    def use() -> None:
        with engine.use():
            engine.step()
            done.append(True)

    other = threading.Thread(target=use, daemon=True)
    other.start()
    other.join(60)
    return bool(done)


WAYS = {"in turn": (False, 400), "ahead": (True, 400), "scarce": (False, 8), "scarce, ahead": (True, 8)}
SIGNALS = [1, 2]  # two at once: the second does not wait


class Trial:
    """Searches of one way that are interrupted at one event after the other."""

    def __init__(self, way: str, signals: int, kind: str, search: Callable[[Decoder], list[Any]] = whole) -> None:
        self._made, self._signals, self._kind, self._search = decoder(*WAYS[way]), signals, kind, search
        self._expected = [outcome(r) for r in search(self._made)]
        self._made.worker.clear()
        self.events = traced(lambda: search(self._made), None, kind=kind)

    def interrupt(self, at: int) -> None:
        made = self._made
        made.worker.clear()  # or arrays that have grown before would need fewer lines
        with pytest.raises(KeyboardInterrupt):
            traced(lambda: self._search(made), at, self._signals, self._kind)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "the handler was not put back"
        assert made.engine.active == [] and is_free(made.engine)
        tiny.assert_all_returned(made.worker)
        assert [outcome(r) for r in self._search(made)] == self._expected
        tiny.assert_all_returned(made.worker)


@pytest.mark.parametrize("signals", SIGNALS)
@pytest.mark.parametrize("way", WAYS)
def test_at_some_lines(way: str, signals: int) -> None:
    """Some of them, other ones for every way; `python tests/test_interrupts.py` tries all."""
    trial = Trial(way, signals, "line")
    shift = 100 * [*WAYS].index(way) + 37 * signals
    for at in range(shift, len(trial.events), len(trial.events) // 5):
        trial.interrupt(at)


def test_at_each_line_of_the_thin_part() -> None:
    """The last time that it is run; where the first signal does not wait, it is the only one."""
    trial = Trial("ahead", 2, "thin line", brief)
    for at in {event: at for at, event in enumerate(trial.events)}.values():
        trial.interrupt(at)


def test_a_scarce_pool_does_preempt() -> None:
    made, preempted = decoder(*WAYS["scarce, ahead"]), []
    on_step = lambda: preempted.append(any(task.preempted for task in made.engine.active))  # noqa: E731
    together(made, PROMPTS, searches(), max_new_tokens=2, on_step=on_step)
    assert any(preempted)


# ---------------------------------------------------------------- the handler


def press(times: int = 1) -> None:
    for _ in range(times):
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_waits_and_reaches_the_handler_that_was_there() -> None:
    received: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    mine = signal.getsignal(signal.SIGINT)
    interrupts = DeferredInterrupts()
    interrupts.begin()
    inner = DeferredInterrupts()
    inner.begin()  # changes nothing
    press()
    inner.end()
    assert received == []
    interrupts.end()
    assert received == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is mine
    interrupts.end()
    press()
    assert len(received) == 2
    again = DeferredInterrupts()
    again.begin()
    press(2)
    assert len(received) == 3, "the second one does not wait"
    again.end()
    assert len(received) == 3 and signal.getsignal(signal.SIGINT) is mine
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ignored = DeferredInterrupts()
    ignored.begin()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ignored.end()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_thread_of_its_own_touches_no_handler() -> None:
    made, seen = tiny.decoder(), set()
    on_step = lambda: seen.add(signal.getsignal(signal.SIGINT))  # noqa: E731
    thread = threading.Thread(target=lambda: made.search(PROMPTS, Greedy(), max_new_tokens=4, on_step=on_step))
    forward = made.worker.forward
    made.worker.forward = lambda chunks: (on_step(), forward(chunks))[1]  # type: ignore[method-assign]
    thread.start()
    thread.join()
    assert seen == {signal.default_int_handler}


def test_a_search_that_hangs_is_ended_by_a_second_interrupt() -> None:
    made, presses = tiny.decoder(), []

    def hang(subject: Any) -> Any:
        while True:  # a user, impatient
            presses.append(0)
            press()

    async def hangs(context: SearchContext) -> list[Branch]:
        await reward_branches(context.root.fork(2), Custom(hang))
        return []

    other = made.search_iter(["1", "12"], [Greedy(), Scripted(endless)], max_new_tokens=1)
    next(other)
    with pytest.raises(KeyboardInterrupt):
        made.search(["1", "2"], [Greedy(), Scripted(hangs)], max_new_tokens=9)  # type: ignore[arg-type]
    assert len(presses) == 2
    tiny.assert_all_returned(made.worker)
    (ended,) = other
    assert isinstance(ended.error, Cancelled) and "was ended by a KeyboardInterrupt" in str(ended.error)
    assert made.search(["1"], Greedy(), max_new_tokens=4)[0].error is None


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), SystemExit(1)])
def test_what_passes_through_ends_all_searches_and_the_engine_begins_anew(error: BaseException) -> None:
    made, branches = tiny.decoder(), []
    forward, calls = made.worker.runner.forward, [0]

    def fails(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise error
        return forward(*arguments)

    async def script(context: SearchContext) -> list[Branch]:
        branches.extend([context.root, *context.root.fork(2)])
        await extend(branches[1:], Sampling(), max_tokens=9)
        return branches[1:]

    expected = [outcome(r) for r in made.search(PROMPTS, Sample(num_return_sequences=2), max_new_tokens=6)]
    made.worker.runner.forward = fails  # type: ignore[method-assign]
    other = made.search_iter(["1", "12"], [Greedy(), Scripted(script)], max_new_tokens=1)
    assert next(other).error is None  # the second goes on, until the first call's model fails
    with pytest.raises(type(error)):
        made.search(PROMPTS, Sample(num_return_sequences=2), max_new_tokens=6)
    (ended,) = other
    kind = RuntimeError if isinstance(error, RuntimeError) else Cancelled
    assert isinstance(ended.error, kind) and ("out of memory" in str(ended.error) or "SystemExit" in str(ended.error))
    assert len(branches) == 3 and not any(branch.alive for branch in branches)
    tiny.assert_all_returned(made.worker)
    assert [outcome(r) for r in made.search(PROMPTS, Sample(num_return_sequences=2), max_new_tokens=6)] == expected


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for way, signals, kind in itertools.product(WAYS, SIGNALS, ("line", "opcode")):
        trial = Trial(way, signals, kind)
        print(f"{way}, {signals} signals, {len(trial.events)} events of kind {kind}", flush=True)
        for at in range(len(trial.events)):
            try:
                trial.interrupt(at)
            except BaseException as error:
                print(f"  at {at}: {type(error).__name__}: {error}", flush=True)
                raise
