"""Rewards: their values are those of transformers run from scratch, and their failures cost what they should."""

import contextlib
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import tiny
from forktree import (
    BestOfN,
    Cancelled,
    Decoder,
    FunctionReward,
    Greedy,
    IdReward,
    InvalidInput,
    ParticleFilter,
    Reward,
    RewardError,
    RewardModel,
    Sample,
    StepFormat,
    TokenProbability,
    ValueHead,
    load_reward,
)
from forktree.engine.engine import Engine
from forktree.engine.worker import ModelWorker
from forktree.rewards.base import PendingReward, RewardInput, Rewards
from forktree.search.request import reward_branches

HIDDEN = 32


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 100 * sum(shape)))


def scored(reward: Reward, *, n: int = 6, prompt: str = "12+3=", seed: int = 0, **options: Any) -> dict[str, float]:
    """Reward of every sampled response."""
    decoder = tiny.decoder(**options)
    search = BestOfN(reward=reward, num_samples=n)
    result = decoder.search([prompt], search, max_new_tokens=9, seed=seed)[0]
    assert result.error is None, result.error
    tiny.assert_all_returned(decoder.worker)
    assert len({c.text for c in result.candidates}) > n // 2
    return {c.text: c.score for c in result.candidates}


def ids(text: str) -> list[int]:
    return tiny.tokenizer()(text).input_ids


# ---------------------------------------------------------------- value heads

W1, B1, W2, B2 = tensor(1, HIDDEN), tensor(1), tensor(5, HIDDEN), tensor(5)
W3, B3, W4, B4 = tensor(1, 5), tensor(1, seed=1), tensor(2, 5), tensor(2)
HEADS: dict[str, tuple[ValueHead, Callable[[torch.Tensor], torch.Tensor]]] = {
    "linear": (ValueHead([(W1, B1)]), lambda h: torch.sigmoid(W1 @ h + B1)[0]),
    "without bias": (ValueHead([(W1, None)]), lambda h: torch.sigmoid(W1 @ h)[0]),
    "tanh": (ValueHead([(W1, B1)], activation="tanh"), lambda h: torch.tanh(W1 @ h + B1)[0]),
    "identity": (ValueHead([(W1, B1)], activation="identity"), lambda h: (W1 @ h + B1)[0]),
    "two layers": (
        ValueHead([(W2, B2), (W3, B3)]),
        lambda h: torch.sigmoid(W3 @ F.relu(W2 @ h + B2) + B3)[0],
    ),
    "two outputs": (
        ValueHead([(W2, B2), (W4, B4)]),
        lambda h: F.softmax(W4 @ F.relu(W2 @ h + B2) + B4, dim=-1)[1],
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_value_head_reads_the_hidden_state_that_transformers_gives(name: str) -> None:
    head, reference = HEADS[name]
    found = scored(head, seed=1)
    for text, reward in found.items():
        exact = float(reference(tiny.last_hidden(tiny.model(), ids("12+3=" + text))))
        assert reward == pytest.approx(exact, abs=1e-4)
    assert np.ptp(list(found.values())) > 0.01


@pytest.mark.parametrize(
    ("tensors", "reference"),
    [
        ({"score.weight": W1, "score.bias": B1}, "linear"),
        ({"score.weight": W1}, "without bias"),
        ({"v_head.summary.weight": W1, "v_head.summary.bias": B1}, "linear"),
        ({"score.0.weight": W2, "score.0.bias": B2, "score.2.weight": W3, "score.2.bias": B3}, "two layers"),
        ({"score.0.weight": W2, "score.0.bias": B2, "score.2.weight": W4, "score.2.bias": B4}, "two outputs"),
    ],
    ids=["score", "no bias", "v_head", "mlp", "two outputs"],
)
@pytest.mark.parametrize("where", ["file", "directory"])
def test_a_head_is_read_from_safetensors(tmp_path: Path, tensors: dict, reference: str, where: str) -> None:
    """From one file, or from a model directory whose head is spread over several files beside other weights."""
    if where == "file":
        path = tmp_path / "head.safetensors"
        save_file(tensors, path)
    else:
        path = tmp_path
        for i, (key, value) in enumerate(tensors.items()):
            save_file({key: value, f"model.layers.{i}.weight": torch.zeros(2)}, path / f"model-{i}.safetensors")
    head, hidden = ValueHead.load(path), tensor(7, HIDDEN)
    expected = torch.stack([HEADS[reference][1](h) for h in hidden])
    torch.testing.assert_close(head.rewards(hidden), expected)


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        ({"score.0.weight": W2, "score.0.bias": B2}, ["score.0.weight", "lacks score.2.weight"]),
        ({"score.2.weight": W3}, ["no value head", "score.2.weight"]),
        ({"score.dense.weight": W1, "v_head.other": B1}, ["score.dense.weight", "v_head.other", "expected"]),
        ({"lm_head.weight": W1}, ["no value head", "expected score.weight"]),
        ({"score.weight": tensor(3, HIDDEN)}, ["1 or 2 outputs", "got 3"]),
        ({"score.0.weight": W2, "score.2.weight": tensor(1, 6)}, ["5 inputs", "got 6"]),
    ],
)
def test_a_head_that_is_not_there_is_an_error_never_a_random_head(tmp_path: Path, tensors: dict, parts: list) -> None:
    save_file(tensors, tmp_path / "head.safetensors")
    with pytest.raises(InvalidInput) as error:
        ValueHead.load(tmp_path / "head.safetensors")
    assert all(part in str(error.value) for part in parts), error.value


def test_unreadable_heads_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "head.safetensors"
    broken.write_bytes(b"not safetensors")
    for path, part in (
        (broken, "readable"),
        (tmp_path / "none.safetensors", "none.safetensors"),
        (tmp_path.parent / "x", "x"),
    ):
        with pytest.raises(InvalidInput, match=part):
            ValueHead.load(path)
    broken.unlink()
    with pytest.raises(InvalidInput, match=r"no \.safetensors file"):
        ValueHead.load(tmp_path)


def test_a_head_of_another_model_is_refused_before_anything_runs() -> None:
    decoder = tiny.decoder()
    other = ValueHead([(tensor(1, 48), None)])
    with pytest.raises(InvalidInput, match=r"48.*32"):
        decoder.search(["12"], BestOfN(reward=other), max_new_tokens=3)
    with pytest.raises(InvalidInput, match=r"48.*32"):
        RewardModel(decoder.worker, tiny.tokenizer(), other)
    assert decoder.worker.forwards == 0


# ---------------------------------------------------------------- judges on the model's own logits


@pytest.mark.parametrize("suffix", ["", "=", "? 1.2-".replace("?", "a")])
def test_token_logits_are_those_of_transformers_behind_the_question(suffix: str) -> None:
    yes, others = 5, [9, 14]
    found = scored(TokenProbability([yes, *others], suffix=ids(suffix) if suffix else []))
    for text, reward in found.items():
        p = tiny.next_log_probs(tiny.model(), ids("12+3=" + text + suffix)).exp()
        assert reward == pytest.approx(float(p[yes] / p[[yes, *others]].sum()), abs=1e-5)
    assert np.ptp(list(found.values())) > 0.01


def test_a_question_leaves_neither_text_nor_slots_behind() -> None:
    """Texts are the same with and without it; its slots are free again as soon as it is answered."""
    prompt, seen = "12+3=", []

    async def script(root: Any) -> list[list[int]]:
        branches = root.fork(4)
        for branch, token in zip(branches, (3, 4, 5, 6), strict=True):
            branch.append([token])
        worker = decoder.worker
        await reward_branches(branches, TokenProbability([1, 2]))
        before = worker.tree.slots.in_use
        await reward_branches(branches, TokenProbability([1, 2], suffix=ids("1=2=3=")))
        seen.append((before, worker.tree.slots.in_use, int((worker.tree.branch_node >= 0).sum())))
        return [b.tokens.tolist() for b in branches]

    decoder = tiny.decoder()
    task = decoder.engine.submit(lambda task: script(task.roots[0].branch), [ids(prompt)])
    list(decoder.engine.run())
    assert task.error is None
    assert task.result == [[*ids(prompt), t] for t in (3, 4, 5, 6)]
    before, after, alive = seen[0]
    assert after == before == len(ids(prompt)) + 4 and alive == 5
    assert decoder.worker.tokens_computed == len(ids(prompt)) + 4 + 4 * 6


@pytest.mark.parametrize(
    "make",
    [
        lambda: TokenProbability([3]),
        lambda: TokenProbability([3, 3]),
        lambda: TokenProbability([3, -4]),
        lambda: TokenProbability([3, 4.0]),
        lambda: TokenProbability([3, True]),
        lambda: TokenProbability("34"),
        lambda: TokenProbability([3, 4], suffix=[2.5]),
        lambda: TokenProbability([3, 4], suffix=["5"]),
        lambda: StepFormat(separator="#"),
        lambda: StepFormat(between="#"),
        lambda: StepFormat(apart=True),
        lambda: RewardModel(
            tiny.decoder().worker, tiny.tokenizer(), TokenProbability([1, 2]), format=StepFormat("chat")
        ),
        lambda: RewardModel(tiny.decoder().worker, tiny.tokenizer(), TokenProbability([1, 2], suffix=[3])),
        lambda: StepFormat(template=None),
        lambda: StepFormat(step_delimiter=5),
        lambda: FunctionReward(len, time_limit="1"),
        lambda: ValueHead([]),
        lambda: StepFormat("{prompt}"),
        lambda: ValueHead([(W1, B1)], activation="relu"),
        lambda: StepFormat("{response}{prompt}"),
        lambda: FunctionReward(3),
        lambda: FunctionReward(len, time_limit=0),
        lambda: BestOfN(reward=len),
    ],
)
def test_rewards_that_make_no_sense_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidInput):
        make()


def test_token_ids_out_of_range_are_refused_before_anything_runs() -> None:
    decoder = tiny.decoder()
    for judge in (TokenProbability([1, tiny.VOCAB]), TokenProbability([1, 2], suffix=[2**40])):
        with pytest.raises(InvalidInput, match=rf"\[0, {tiny.VOCAB}\)"):
            decoder.search(["12"], BestOfN(reward=judge), max_new_tokens=3)
    assert decoder.worker.forwards == 0


def test_a_question_that_passes_the_models_last_position_costs_its_branch_only() -> None:
    model = tiny.new_model(rope_parameters=tiny.LIMITED)
    decoder, judge = Decoder(model, tiny.tokenizer(), num_slots=2048), TokenProbability([1, 2], suffix=[3] * 30)
    searches = [BestOfN(reward=judge, num_samples=2), Greedy()]
    results = sorted(decoder.search_iter(["1" * 240, "12"], searches, max_new_tokens=4), key=lambda r: r.index)
    assert isinstance(results[0].error, RewardError) and "256 positions" in str(results[0].error)
    assert results[1].error is None

    async def script(root: Any) -> Rewards:
        branches = root.fork(4)
        for branch, length in zip(branches, (1, 7, 6, 1), strict=True):
            branch.append([5] * length)
        return await reward_branches(branches, judge)

    task = decoder.engine.submit(lambda task: script(task.roots[0].branch), [[3] * 220])
    list(decoder.engine.run())
    assert [e is not None for e in task.result.errors] == [False, True, False, False]
    assert "256 positions, got 257 tokens (branch 1)" in str(task.result.errors[1])
    for i, length in ((0, 1), (2, 6), (3, 1)):
        p = tiny.next_log_probs(model, [3] * 220 + [5] * length + [3] * 30)[[1, 2]].softmax(0)[0]
        assert task.result.values[i] == pytest.approx(float(p), abs=1e-5)
    tiny.assert_all_returned(decoder.worker)


@pytest.mark.parametrize("reward", [ValueHead([(W1, B1)]), TokenProbability([1, 2])], ids=["head", "judge"])
def test_the_longest_text_that_is_let_in_can_be_scored(reward: Reward) -> None:
    decoder = Decoder(tiny.model(eos=None), num_slots=512)
    result = decoder.search([[3] * 246], BestOfN(reward=reward, num_samples=2), max_new_tokens=10)[0]
    assert result.error is None and len(result.best.token_ids) == 10


# ---------------------------------------------------------------- reward models


@pytest.fixture(scope="module")
def trunk() -> Any:
    """The base model of a reward model: another architecture than the policy's."""
    return tiny.new_model("qwen3", seed=5).base_model


def char_rewards(trunk: Any, head: ValueHead, text: str) -> float:
    """From scratch, by transformers."""
    return float(head.rewards(tiny.last_hidden(trunk, ids(text))[None])[0])


FORMATS = {
    "plain": (StepFormat(), lambda p, r: p + r),
    "template": (StepFormat("a{prompt}==\n{response}dd<eos>"), lambda p, r: "a" + p + "==\n" + r + "dd<eos>"),
    "steps": (
        StepFormat("{prompt} {response}+", step_delimiter="5", separator="."),
        lambda p, r: p + " " + r.replace("5", ".") + ("" if r.endswith("5") else "."),
    ),
    "delimiter kept": (
        StepFormat(step_delimiter="5"),
        lambda p, r: p + r + ("" if r.endswith("5") else "5"),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_reward_model_reads_what_transformers_would_read_from_scratch(trunk: Any, name: str) -> None:
    format, render = FORMATS[name]
    head = HEADS["two layers"][0]
    worker = ModelWorker(trunk, num_slots=512)
    found = scored(RewardModel(worker, tiny.tokenizer(), head, format=format), n=8)
    for text, reward in found.items():
        assert reward == pytest.approx(char_rewards(trunk, head, render("12+3=", text)), abs=1e-4)
    tiny.assert_all_returned(worker)


def test_rendering_replaces_delimiters_and_ends_with_the_last_step_where_there_are_steps() -> None:
    qwen = StepFormat("<u>{prompt}</u><a>{response}</a>", step_delimiter="\n\n", separator="<extra_0>")
    assert qwen.render("q", "one\n\ntwo\n\n") == "<u>q</u><a>one<extra_0>two<extra_0>"
    assert qwen.render("q", "one\n\ntwo") == "<u>q</u><a>one<extra_0>two<extra_0>"
    assert qwen.render("q", "") == "<u>q</u><a><extra_0>"
    assert qwen.render("q", "\n\n") == "<u>q</u><a><extra_0>"
    assert qwen.render("{response}", "{prompt}") == "<u>{response}</u><a>{prompt}<extra_0>"
    assert StepFormat().render("q", "one\n\ntwo") == "qone\n\ntwo"
    assert StepFormat("[{prompt}|{response}]").render("{response}", "{prompt}") == "[{response}|{prompt}]"
    lines = StepFormat(step_delimiter="\n", separator=" #", between="\n")
    assert lines.render("q ", "one\ntwo") == "q one #\ntwo #"


@pytest.mark.parametrize("template", [StepFormat(), StepFormat("aa{prompt}=={response}")], ids=["plain", "template"])
def test_over_the_steps_of_a_search_only_new_tokens_are_read(trunk: Any, template: StepFormat) -> None:
    """No more tokens than distinct prefixes among everything that was scored: each is read once."""
    worker = ModelWorker(trunk, num_slots=2048)
    rendered: list[str] = []

    class Recording(RewardModel):
        def start(self, given: RewardInput) -> PendingReward:
            rendered.extend(map(template.render, given.prompts, given.responses()))
            return super().start(given)

    reward = Recording(worker, tiny.tokenizer(), HEADS["linear"][0], format=template)
    search = ParticleFilter(reward=reward, num_particles=8, step_delimiter="", max_step_tokens=3, max_steps=6)
    decoder = Decoder(tiny.model(eos=None), tiny.tokenizer(), num_slots=2048)
    decoder._eos_token_ids = frozenset  # an EOS alone would have a text scored twice
    alive = []
    result = decoder.search(
        ["12+3="], search, max_new_tokens=18, seed=3, on_step=lambda: alive.append((worker.tree.branch_node >= 0).sum())
    )[0]
    assert max(alive) == 8, "what the last score read is let go once the next one has found its prefixes"
    assert result.error is None and all(len(c.hypothesis.step_rewards) == 6 for c in result.candidates)
    prefixes = {text[:i] for text in rendered for i in range(1, len(text) + 1)}
    assert worker.tokens_computed <= len(prefixes)
    assert worker.tokens_computed == result.counters.reward_tokens > 0
    assert sum(map(len, rendered)) > 4 * worker.tokens_computed, "reading all from scratch would cost far more"
    for c in result.candidates:
        expected = char_rewards(trunk, HEADS["linear"][0], template.render("12+3=", c.text))
        assert c.score == pytest.approx(expected, abs=1e-4)
    tiny.assert_all_returned(worker)


@pytest.fixture
def directory(tmp_path: Path, trunk: Any) -> Path:
    """A reward model as it lies on disk: trunk, tokenizer, and a head in a file of its own."""
    trunk.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    save_file({"score.weight": W1, "score.bias": B1}, tmp_path / "head.safetensors")
    return tmp_path


@pytest.mark.parametrize("load", [RewardModel.load, lambda path: load_reward(str(path))], ids=["load", "load_reward"])
def test_a_reward_model_is_loaded_from_a_directory(directory: Path, trunk: Any, load: Callable) -> None:
    for text, reward in scored(load(directory)).items():
        assert reward == pytest.approx(char_rewards(trunk, HEADS["linear"][0], "12+3=" + text), abs=1e-4)


@pytest.mark.parametrize(
    ("break_it", "part"),
    [
        (lambda d: (d / "head.safetensors").unlink(), "no value head"),
        (lambda d: (d / "model.safetensors").unlink(), "weights are missing|cannot load"),
        (lambda d: _forget(d, "layers.1.mlp.up_proj.weight"), r"1 weights are missing.*layers\.1\.mlp\.up_proj"),
        (lambda d: (d / "config.json").unlink(), "config.json"),
    ],
    ids=["head", "all weights", "one weight", "config"],
)
def test_a_reward_model_with_something_missing_is_refused(directory: Path, break_it: Callable, part: str) -> None:
    break_it(directory)
    with pytest.raises(InvalidInput, match=part):
        RewardModel.load(directory)


def _forget(directory: Path, key: str) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors[next(k for k in tensors if k.endswith(key))]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("format", [StepFormat(), StepFormat("{prompt}{response}", "5", "")], ids=["plain", "steps"])
def test_texts_the_reward_model_cannot_read_cost_their_branch_only(format: StepFormat) -> None:
    """Too long for its positions, or of tokens that it does not embed; nothing stays behind in its pool."""
    small = tiny.new_model(
        "qwen3", seed=5, vocab=tiny.VOCAB - 1, max_position_embeddings=32, rope_parameters=tiny.LIMITED
    )
    worker, head = ModelWorker(small, num_slots=512), HEADS["linear"][0]
    reward = RewardModel(worker, tiny.tokenizer(), head, format=format)
    decoder = tiny.decoder()
    results = decoder.search(["12=", "1" * 40, "34="], BestOfN(reward=reward, num_samples=9), max_new_tokens=6, seed=1)
    assert isinstance(results[1].error, RewardError) and "1 to 32 tokens, got" in str(results[1].error)
    unknown = 0
    for result, prompt in ((results[0], "12="), (results[2], "34=")):
        assert result.error is None
        for c in result.candidates:
            if " " in c.text:
                unknown += 1
                message = str(c.hypothesis.error)
                assert f"embeds token ids in [0, {tiny.VOCAB - 1}), got {tiny.VOCAB - 1} (branch" in message
            else:
                expected = char_rewards(small.base_model, head, format.render(prompt, c.text))
                assert c.hypothesis.error is None and c.score == pytest.approx(expected, abs=1e-4)
    assert 0 < unknown < 18
    tiny.assert_all_returned(decoder.worker)
    tiny.assert_all_returned(worker)


# ---------------------------------------------------------------- functions of the text


def test_a_text_reward_gets_prompt_and_response_and_its_value_is_the_score() -> None:
    calls = []

    def reward(prompt: str, response: str) -> float:
        calls.append((prompt, response))
        return np.float32(len(response) / 7)

    for text, value in scored(FunctionReward(reward)).items():
        assert ("12+3=", text) in calls
        assert value == pytest.approx(len(text) / 7, rel=1e-6)
    assert len(calls) == 6


class _Awkward:
    def __float__(self) -> float:
        raise ZeroDivisionError


def failing(what: object) -> FunctionReward:
    """Fails for responses that start with a digit, in the given way; else the length."""

    def my_reward(prompt: str, response: str) -> Any:
        if not response[:1].isdigit():
            return len(response)
        if isinstance(what, threading.Event):
            what.wait(20)
        elif isinstance(what, type) and issubclass(what, BaseException):
            raise what("no good")
        return what

    return FunctionReward(my_reward, time_limit=0.15)


FAILURES = {
    "raises": (ValueError, "raised ValueError: no good"),
    "exits": (SystemExit, "raised SystemExit: no good"),
    "None": (None, "must return a number, got NoneType"),
    "NaN": (math.nan, "must return a finite number, got nan"),
    "infinity": (-math.inf, "must return a finite number, got -inf"),
    "text": ("high", "must return a number, got str"),
    "digits": ("0.5", "must return a number, got str"),
    "list": ([0.5], "must return a number, got list"),
    "too large": (10**400, "must return a number, got int"),
    "awkward": (_Awkward(), "must return a number, got _Awkward"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_call_that_fails_costs_its_branch_only(name: str) -> None:
    what, reason = FAILURES[name]
    decoder = tiny.decoder()
    searches = [BestOfN(reward=failing(what), num_samples=16), Sample(num_return_sequences=3)]
    results = sorted(decoder.search_iter(["1+2=", "34"], searches, max_new_tokens=5), key=lambda r: r.index)
    assert results[0].error is None and results[1].error is None
    bad = [c for c in results[0].candidates if c.text[:1].isdigit()]
    good = [c for c in results[0].candidates if not c.text[:1].isdigit()]
    assert bad and good and results[0].candidates == good + bad
    assert all(c.score == len(c.text) and c.hypothesis.error is None for c in good)
    for c in bad:
        assert isinstance(c.hypothesis.error, RewardError) and math.isnan(c.score)
        assert "my_reward" in str(c.hypothesis.error) and reason in str(c.hypothesis.error)


def test_a_call_that_never_returns_costs_its_branch_and_its_time_limit() -> None:
    """Other branches are scored by another thread, and other searches finish meanwhile."""
    never = threading.Event()
    decoder = tiny.decoder()
    search = BestOfN(reward=failing(never), num_samples=5)
    order = []
    try:
        for result in decoder.search_iter(["1+2=", "34"], [search, Greedy()], max_new_tokens=5, seed=2):
            order.append(result.index)
            if result.index == 0:
                bad = [c for c in result.candidates if c.hypothesis.error is not None]
                assert result.error is None and 0 < len(bad) < 5
                assert {c.text[:1].isdigit() for c in bad} == {True}
                assert all("my_reward" in str(c.hypothesis.error) for c in bad)
                assert all("longer than its time limit of 0.15 s" in str(c.hypothesis.error) for c in bad)
                assert all(c.score == len(c.text) for c in result.candidates if c not in bad)
    finally:
        never.set()
    assert order == [1, 0]
    tiny.assert_all_returned(decoder.worker)


def test_a_search_cancelled_while_its_reward_is_at_work_ends_at_once() -> None:
    asked, go_on = threading.Event(), threading.Event()

    def reward(prompt: str, response: str) -> float:
        calls.append(response)
        asked.set()
        go_on.wait(20)
        return 1.0

    calls: list[str] = []
    decoder = tiny.decoder()
    results = decoder.search_iter(
        ["1+2=", "34"], [BestOfN(reward=FunctionReward(reward), num_samples=4), Greedy()], max_new_tokens=5
    )
    assert next(results).index == 1
    assert asked.wait(10)
    results.close()
    go_on.set()
    tiny.assert_all_returned(decoder.worker)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.daemon:
            thread.join(1)
    assert len(calls) == 1, "nobody wants the other branches rewarded any more"


def test_when_every_call_fails_that_search_fails_and_no_other() -> None:
    def broken(prompt: str, response: str) -> float:
        raise OSError("no service")

    decoder = tiny.decoder()
    searches = [BestOfN(reward=FunctionReward(broken)), ParticleFilter(reward=FunctionReward(broken)), Greedy()]
    results = sorted(decoder.search_iter(["1", "2", "3"], searches, max_new_tokens=4), key=lambda r: r.index)
    for result in results[:2]:
        assert isinstance(result.error, RewardError)
        assert "broken" in str(result.error) and "OSError: no service" in str(result.error)
    assert results[2].error is None
    tiny.assert_all_returned(decoder.worker)


def test_reading_text_needs_a_tokenizer() -> None:
    decoder = Decoder(tiny.model(), num_slots=256)
    result = decoder.search([[1, 2]], BestOfN(reward=FunctionReward(lambda p, r: 1.0)), max_new_tokens=3)[0]
    assert isinstance(result.error, InvalidInput) and "tokenizer" in str(result.error)


# ---------------------------------------------------------------- rewards of one's own


class Custom(Reward):
    """Gives what a function of the number of branches gives."""

    def __init__(self, answer: Callable[[int], Rewards]) -> None:
        self.answer, self.begun, self.closed = answer, 0, 0

    def start(self, given: RewardInput) -> PendingReward:
        reward = self
        self.begun += 1

        class Now(PendingReward):
            def read(self, hidden: torch.Tensor | None) -> Rewards | None:
                return reward.answer(len(given.branches))

            def close(self) -> None:
                reward.closed += 1

        return Now()


def _raise(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (lambda n: _raise(RuntimeError("my own fault")), "my own fault"),
        (lambda n: Rewards(np.ones(n - 1), [None] * (n - 1)), "must give 16 rewards"),
        (lambda n: Rewards(np.full(n, np.nan), [None] * n), "reward of branch 0"),
        (lambda n: Rewards(np.append(np.ones(n - 1), np.inf), [None] * n), "reward of branch 15"),
    ],
    ids=["raises", "too few", "NaN", "infinity"],
)
def test_a_reward_of_ones_own_that_misbehaves_ends_its_search_only(answer: Callable, part: str) -> None:
    decoder, reward = tiny.decoder(), Custom(answer)
    searches = [BestOfN(reward=reward), Greedy()]
    results = sorted(decoder.search_iter(["1+2=", "34"], searches, max_new_tokens=4), key=lambda r: r.index)
    assert part in str(results[0].error) and results[1].error is None
    assert reward.closed == 1
    tiny.assert_all_returned(decoder.worker)


def test_every_reading_is_closed_once_even_if_its_search_will_not_stop() -> None:
    async def script(root: Any) -> None:
        while True:
            with contextlib.suppress(Cancelled):
                await reward_branches(root.fork(2), reward)

    decoder, reward = tiny.decoder(), Custom(lambda n: None)
    task = decoder.engine.submit(lambda task: script(task.roots[0].branch), [[1, 2]])
    decoder.engine.step()
    assert (reward.begun, reward.closed) == (1, 0)
    decoder.engine.cancel(task)
    assert task.done and reward.begun == reward.closed == 2
    tiny.assert_all_returned(decoder.worker)


def test_an_engine_refuses_a_budget_of_nothing() -> None:
    with pytest.raises(ValueError, match="max_batch_tokens"):
        Engine(tiny.decoder().worker, max_batch_tokens=0)


# ---------------------------------------------------------------- functions of token ids


def test_an_id_reward_gets_the_ids_of_prompt_and_response_without_a_tokenizer() -> None:
    calls: list[tuple[list[int], list[int]]] = []

    def reward(prompt_ids: list[int], found: list[int]) -> float:
        calls.append((prompt_ids, found))
        return found.count(4) - found.count(7)

    decoder = Decoder(tiny.model(), num_slots=512)
    result = decoder.search([[3, 5, 2]], BestOfN(reward=IdReward(reward), num_samples=12), max_new_tokens=9)[0]
    assert result.error is None and len(calls) == 12
    assert sorted(calls) == sorted(([3, 5, 2], c.token_ids) for c in result.candidates)
    assert all(type(t) is int for c in calls for ids in c for t in ids)
    for c in result.candidates:
        assert c.score == c.token_ids.count(4) - c.token_ids.count(7)
    tiny.assert_all_returned(decoder.worker)


def test_an_id_reward_that_fails_costs_its_branch_only() -> None:
    def reward(prompt_ids: list[int], found: list[int]) -> float:
        return 1 / (found[0] - 4) if found else 0.0

    result = tiny.decoder().search(["1+2="], BestOfN(reward=IdReward(reward), num_samples=30), max_new_tokens=4)[0]
    failed = [c for c in result.candidates if c.hypothesis.error is not None]
    assert failed and result.candidates[-len(failed) :] == failed
    assert all(c.token_ids[0] == 4 and "raised ZeroDivisionError" in str(c.hypothesis.error) for c in failed)
    for bad in (dict(function=3), dict(function=reward, time_limit=0)):
        with pytest.raises(InvalidInput, match=r"function must be callable|time_limit"):
            IdReward(**bad)
