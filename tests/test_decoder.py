"""The decoder: greedy decoding is transformers' own, and bad input is refused before anything runs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from forktree import (
    BestOfN,
    Decoder,
    FunctionReward,
    Greedy,
    InvalidInput,
    MajorityVote,
    OutOfMemory,
    RewardError,
    Sample,
    SearchResult,
)
from forktree.ops import KVFormat

PROMPTS = ["12+3=", "a", "\n\n-- 7.", "0123456789abcd+-=. " * 4]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("max_new_tokens", [1, 40])
def test_greedy_is_the_greedy_decoding_of_transformers(kind: str, max_new_tokens: int) -> None:
    model = tiny.model(kind)
    prompts = [*PROMPTS, *tiny.prompts(12)]
    reasons = set()
    for prompt, result in zip(
        prompts, tiny.decoder(kind).search(prompts, Greedy(), max_new_tokens=max_new_tokens), strict=True
    ):
        ids = torch.tensor([tiny.tokenizer()(prompt).input_ids])
        expected = model.generate(ids, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0)
        expected = expected[0, ids.shape[1] :].tolist()
        ended = expected[-1] == 0
        reasons.add(result.best.hypothesis.finish_reason)
        assert result.best.hypothesis.finish_reason == ("eos" if ended else "length")
        assert result.best.token_ids == (expected[:-1] if ended else expected)
        assert result.text == tiny.tokenizer().decode(expected, skip_special_tokens=True)
        whole = torch.cat([ids[0], torch.tensor(expected)])
        with torch.no_grad():
            log_probs = model(input_ids=whole[None]).logits[0].double().log_softmax(dim=-1)
        exact = float(log_probs[len(ids[0]) - 1 : -1].gather(1, torch.tensor(expected)[:, None]).sum())
        assert result.best.score == result.best.hypothesis.log_prob == pytest.approx(exact, abs=1e-3)
    assert "length" in reasons and (max_new_tokens == 1 or reasons == {"length", "eos"})


def test_the_model_still_works_by_itself() -> None:
    """Between searches and after them, plain transformers calls give what they gave before."""
    model, ids = tiny.new_model(), torch.tensor([[3, 5, 7, 2]])
    before = model(input_ids=ids).logits
    decoder = Decoder(model, tiny.tokenizer(), num_slots=256)
    results = decoder.search_iter(["12", "34=", "5"], Sample(num_return_sequences=2), max_new_tokens=8)
    next(results)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert len(list(results)) == 2
    assert torch.equal(model(input_ids=ids).logits, before)


def test_stop_texts_end_a_hypothesis_and_stay_part_of_it() -> None:
    decoder, stops = tiny.decoder(), ("5", "-c", "\n")
    free = decoder.search(tiny.prompts(6), Sample(num_return_sequences=8), max_new_tokens=20)
    cut = decoder.search(tiny.prompts(6), Sample(num_return_sequences=8, stop=stops), max_new_tokens=20)
    reasons = set()
    for long, short in zip(
        (c for r in free for c in r.candidates), (c for r in cut for c in r.candidates), strict=True
    ):
        ends = [n for n in range(len(long.text) + 1) if any(s in long.text[:n] for s in stops)]
        assert short.text == (long.text[: ends[0]] if ends else long.text)
        assert short.hypothesis.finish_reason == ("stop" if ends else long.hypothesis.finish_reason)
        reasons.add(short.hypothesis.finish_reason)
    assert "stop" in reasons and len(reasons) > 1


def test_prompts_come_as_texts_or_token_ids_alone_or_in_lists() -> None:
    decoder = tiny.decoder()
    ids = tiny.tokenizer()("12+3=").input_ids
    ways: list[Any] = [
        "12+3=",
        ["12+3="],
        ids,
        [ids],
        tuple(ids),
        np.array(ids),
        [np.array(ids, np.int32)],
        [torch.tensor(ids)],
        (i for i in ids),
    ]
    found = [decoder.search(way, Sample(num_return_sequences=2), max_new_tokens=6, seed=4) for way in ways]
    assert all(len(results) == 1 for results in found)
    assert len({str(tiny.texts(results)) for results in found}) == 1
    assert decoder.search([], Greedy()) == []


def test_results_come_in_the_order_of_the_prompts_with_what_they_cost() -> None:
    decoder = tiny.decoder()
    prompts = tiny.prompts(9)
    results = decoder.search(prompts, Sample(num_return_sequences=3), max_new_tokens=6)
    assert [r.index for r in results] == list(range(9)) and [r.prompt for r in results] == prompts
    assert sum(r.counters.model_tokens for r in results) == decoder.worker.tokens_computed
    assert all(r.counters.seconds > 0 and r.counters.peak_slots > 0 for r in results)


def test_a_majority_vote_is_counted_by_hand() -> None:
    def answer(text: str) -> str | None:
        return next((c for c in text if c.isdigit()), None)

    decoder = tiny.decoder()
    result = decoder.search(["1="], MajorityVote(answer=answer, num_samples=30, temperature=1.0), max_new_tokens=5)[0]
    answers = [answer(c.text) for c in result.candidates]
    counts = {a: answers.count(a) for a in set(answers) - {None}}
    assert counts[answers[0]] == max(counts.values()) and len(counts) > 2 and None in answers
    for c, a in zip(result.candidates, answers, strict=True):
        assert c.score == pytest.approx(counts.get(a, 0) / 30)
    assert [c.score for c in result.candidates] == sorted((c.score for c in result.candidates), reverse=True)


def test_an_answer_that_cannot_be_had_costs_its_branch_only() -> None:
    few = set("01234")

    def answer(text: str) -> Any:
        if text[:1] in few:
            raise LookupError("no answer here")
        return ["a", "list"] if few & set(text) else len(text) % 2

    decoder = tiny.decoder()
    search = MajorityVote(answer=answer, num_samples=40, temperature=1.0)
    result = decoder.search(["1="], search, max_new_tokens=4)[0]
    fails = [bool(few & set(c.text)) for c in result.candidates]
    good, bad = ([c for c, failed in zip(result.candidates, fails, strict=True) if failed == f] for f in (False, True))
    assert result.error is None and fails == sorted(fails)
    assert {(c.text[:1] in few) for c in bad} == {True, False}
    for c in bad:
        reason = "LookupError: no answer here" if (c.text[:1] in few) else "TypeError: "
        assert isinstance(c.hypothesis.error, RewardError) and np.isnan(c.score)
        assert "answer" in str(c.hypothesis.error) and f"raised {reason}" in str(c.hypothesis.error)
    answers = [answer(c.text) for c in good]
    assert [c.score for c in good] == [answers.count(a) / 40 for a in answers] and len(set(answers)) == 2
    failed = decoder.search(["1="], MajorityVote(answer=lambda text: [text], num_samples=3), max_new_tokens=4)[0]
    assert isinstance(failed.error, RewardError) and "no branch has a reward left" in str(failed.error)


def bare(**options: Any) -> Decoder:
    """A decoder without a tokenizer."""
    return Decoder(tiny.model(), **{"num_slots": 64, **options})


BAD: dict[str, tuple[Callable[[], list[SearchResult]], list[str]]] = {
    "empty prompt": (lambda: tiny.decoder().search(["1", ""], Greedy(), max_new_tokens=9), ["prompt 1", "empty"]),
    "no tokens": (
        lambda: bare().search([[1], []], Greedy(), max_new_tokens=9),
        ["prompt 1", "empty", "at least one token"],
    ),
    "id too large": (
        lambda: bare().search([[1, tiny.VOCAB]], Greedy()),
        ["prompt 0", f"id {tiny.VOCAB}", f"[0, {tiny.VOCAB})"],
    ),
    "negative id": (lambda: bare().search([[1, -2]], Greedy()), ["prompt 0", "id -2", "[0, "]),
    "fraction": (lambda: bare().search([[1, 2.5]], Greedy()), ["prompt 0", "token ids", "2.5"]),
    "nothing": (lambda: bare().search([None], Greedy()), ["prompt 0", "None"]),
    "not a list": (lambda: bare().search(7, Greedy()), ["prompts", "int"]),
    "texts without tokenizer": (lambda: bare().search(["12"], Greedy()), ["prompt 0", "tokenizer=None"]),
    "past the last position": (
        lambda: Decoder(tiny.new_model(rope_parameters=tiny.LIMITED), tiny.tokenizer(), num_slots=256).search(
            ["1", "1" * 200], Greedy(), max_new_tokens=57
        ),
        ["prompt 1", "200 tokens", "max_new_tokens = 57", "256"],
    ),
    "longer than the pool": (
        lambda: bare().search([[1] * 65], Greedy(), max_new_tokens=5),
        ["prompt 0", "65 tokens", "64", "num_slots"],
    ),
    "not a search": (lambda: tiny.decoder().search(["1"], "greedy"), ["search", "one, or one for each"]),
    "class, not search": (lambda: tiny.decoder().search(["1"], Greedy), ["Search", "got ABCMeta"]),
    "a function": (lambda: tiny.decoder().search(["1"], len), ["Search", "got builtin_function"]),
    "too few searches": (
        lambda: list(tiny.decoder().search_iter(["1", "2", "3"], [Greedy(), Greedy()])),
        ["each of 3 prompts", "got 2"],
    ),
    "no new tokens": (lambda: tiny.decoder().search(["1"], Greedy(), max_new_tokens=0), ["max_new_tokens", "got 0"]),
    "half a token": (lambda: tiny.decoder().search(["1"], Greedy(), max_new_tokens=1.5), ["max_new_tokens", "1.5"]),
    "negative seed": (lambda: tiny.decoder().search(["1"], Greedy(), seed=-1), ["seed", "-1"]),
    "seed of text": (lambda: tiny.decoder().search(["1"], Greedy(), seed="x"), ["seed", "'x'"]),
    "no slots": (lambda: bare(num_slots=0), ["num_slots", "got 0"]),
    "no budget": (lambda: bare(max_batch_tokens=0), ["max_batch_tokens", "got 0"]),
    "one stop text": (lambda: tiny.decoder().search(["1"], Greedy(stop="END")), ["stop", "tuple of texts", "'END'"]),
    "a scoring function": (lambda: tiny.decoder().search(["1"], BestOfN(reward=len)), ["reward", "FunctionReward"]),
    "no samples": (
        lambda: tiny.decoder().search(["1"], BestOfN(reward=FunctionReward(len), num_samples=0)),
        ["num_samples"],
    ),
    "no sequences": (lambda: tiny.decoder().search(["1"], Sample(num_return_sequences=0)), ["num_return_sequences"]),
    "no answer": (lambda: tiny.decoder().search(["1"], MajorityVote(answer="x")), ["answer", "got 'x'"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With name, expectation and what was given."""
    ran = []
    monkeypatch.setattr("forktree.engine.engine.Engine.submit", lambda *a, **k: ran.append(a))
    call, parts = BAD[name]
    with pytest.raises(InvalidInput) as error:
        call()
    assert all(part in str(error.value) for part in parts), error.value
    assert not ran


def test_the_longest_prompt_that_fits_is_let_in() -> None:
    decoder = Decoder(tiny.model(eos=None), num_slots=512)
    result = decoder.search([[3] * 200], Greedy(), max_new_tokens=56)[0]
    assert len(result.best.token_ids) == 56
    expected = tiny.model(eos=None).generate(torch.tensor([[3] * 200]), do_sample=False, max_new_tokens=56)
    assert result.best.token_ids == expected[0, 200:].tolist()


def test_text_of_a_decoder_without_tokenizer_and_of_a_failed_search() -> None:
    result = bare().search([[1, 2]], Greedy(), max_new_tokens=3)[0]
    assert result.best.text is None
    with pytest.raises(InvalidInput, match="without a tokenizer"):
        _ = result.text
    failed = bare().search([[1, 2]], MajorityVote(answer=str), max_new_tokens=3)[0]
    assert failed.candidates == []
    with pytest.raises(InvalidInput, match="tokenizer=None"):
        _ = failed.best


def test_pools_follow_what_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same bits whether pools grow, full of NaN, or not; what may exist costs nothing, what existed stays."""
    prompts, search = tiny.prompts(8), Sample(num_return_sequences=4)
    found = []
    for first in (4096, 1):
        tiny.pools_of_nan(monkeypatch, first)
        decoder = tiny.decoder(num_slots=10**9)
        sizes = [{len(x) for pool in decoder.worker.runner.pools for x in pool.tensors}]
        for _ in range(2):
            results = decoder.search(prompts, search, max_new_tokens=20)
            found.append([[(c.token_ids, c.score) for c in result.candidates] for result in results])
            sizes.append({len(x) for pool in decoder.worker.runner.pools for x in pool.tensors})
        assert sizes[0] == {first} and sizes[1] == sizes[2] and max(sizes[2]) <= 4096
        tiny.assert_all_returned(decoder.worker)
    assert found[0] == found[2] and found[1] == found[3]


def test_no_memory_for_larger_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what was wanted; a later search finds everything as it was."""
    prompts, search = tiny.prompts(8), Sample(num_return_sequences=4)
    tiny.pools_of_nan(monkeypatch, first=64)
    decoder = tiny.decoder()
    (want,) = decoder.search(["12+3="], Greedy(), max_new_tokens=20)
    pool, calls = KVFormat.pool, []

    def scarce(*args: Any) -> Any:
        calls.append(args)
        if len(calls) % 2 == 0:  # the second layer's
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pool(*args)

    monkeypatch.setattr(KVFormat, "pool", scarce)
    for _ in range(2):
        with pytest.raises(
            OutOfMemory, match=r"no memory for the KV of \d+ tokens \(\d+ bytes each\), up from 64: CUDA"
        ):
            decoder.search(prompts, search, max_new_tokens=20)
    monkeypatch.setattr(KVFormat, "pool", pool)
    (got,) = decoder.search(["12+3="], Greedy(), max_new_tokens=20)
    assert (got.best.token_ids, got.best.score) == (want.best.token_ids, pytest.approx(want.best.score, abs=1e-4))
    assert all(result.error is None for result in decoder.search(prompts, search, max_new_tokens=20))
    tiny.assert_all_returned(decoder.worker)


def test_more_slots_than_there_are_numbers_for() -> None:
    with pytest.raises(InvalidInput, match="num_slots must be at least 1 and at most 2147483647, got 2147483648"):
        tiny.decoder(num_slots=2**31)
