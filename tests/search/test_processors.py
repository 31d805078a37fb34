"""Logits processors in every search: a grammar whose state follows forks equals one that reads every row again."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

import forktree
import tiny
from distributions import chi_square
from forktree import (
    BeamSearch,
    BestOfN,
    FunctionReward,
    Greedy,
    InvalidInput,
    NonFinite,
    ParticleFilter,
    Sample,
    Sampling,
    SearchResult,
)
from forktree.kv import Branch
from forktree.search import Search, SearchContext
from forktree.search.request import extend
from searches import Scripted, digits, outcome

EOS, OPEN, CLOSE = 0, *tiny.tokenizer()("ab").input_ids  # "a" opens a bracket, "b" closes it
DEEPEST = 3


def after(depth: int, token: int) -> int:
    return depth + (token == OPEN) - (token == CLOSE)


def constrained(scores: torch.Tensor, depths: Sequence[int]) -> torch.Tensor:
    """No bracket is closed that is not open, at most 3 are, and none at the end."""
    scores = scores.clone()
    for row, depth in zip(scores, depths, strict=True):
        row[[token for token in (OPEN, CLOSE) if not 0 <= after(depth, token) <= DEEPEST]] = -torch.inf
        row[OPEN] += 3  # else there would be few
        if depth:
            row[EOS] = -torch.inf
    return scores


class Reading:
    """Reads every row from its beginning; padding is no bracket."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        texts = [[t for t in row if t in (OPEN, CLOSE)] for row in input_ids.tolist()]
        return constrained(scores, [sum(after(0, t) for t in text) for text in texts])


class Following:
    """Keeps the depth of every row, and its text to compare with what it is shown."""

    def __init__(self) -> None:
        self.states: list[tuple[int, list[int]]] = []
        self.anew = self.calls = self.most = 0

    def fork(self, parents: torch.Tensor, added: torch.Tensor) -> None:
        assert parents.dtype == added.dtype == torch.int64 and len(parents) >= len(added)
        self.anew += int((parents < 0).sum())
        self.states = [(0, []) if p < 0 else self.states[p] for p in parents.tolist()]
        self.added = added.tolist()
        self.most = max(self.most, len(self.states))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert len(input_ids) == len(scores) == len(self.added) and scores.dtype == torch.float32
        self.calls += 1
        for i, (row, n) in enumerate(zip(input_ids.tolist(), self.added, strict=True)):
            depth, text = self.states[i]
            text = text + row[len(row) - n :]
            for token in row[len(row) - n :]:
                depth = after(depth, token)
            assert row[len(row) - len(text) :] == text, "the state of another text"
            self.states[i] = depth, text
        return constrained(scores, [depth for depth, _ in self.states[: len(scores)]])


def bracketed(text: str) -> bool:
    depths = np.cumsum([(c == "a") - (c == "b") for c in text])
    return bool(((depths >= 0) & (depths <= DEEPEST)).all())


SEARCHES: dict[str, Any] = {
    "greedy": Greedy(),
    "sample": Sample(num_return_sequences=4),
    "best of n": BestOfN(reward=FunctionReward(digits), num_samples=3, top_k=8, top_p=0.95),
    "particles": ParticleFilter(
        reward=FunctionReward(digits), num_particles=6, step_delimiter="5", max_step_tokens=5, max_steps=4
    ),
    "beams": BeamSearch(num_beams=4, num_return_sequences=4),
}


@pytest.mark.slow
@pytest.mark.parametrize(("num_slots", "ahead"), [(2048, False), (90, True)])
@pytest.mark.parametrize("name", SEARCHES)
def test_a_state_that_follows_forks_equals_reading_again(name: str, num_slots: int, ahead: bool) -> None:
    """Seven prompts at once, by one object, with room for about one or for all."""
    prompts = ["+".join("cd12") + text for text in tiny.prompts(7, seed=3, longest=8)]
    prompts = [text.replace("a", "c").replace("b", "d") for text in prompts]
    found: list[list[SearchResult]] = []
    for grammar in (Reading(), following := Following()):
        decoder = tiny.decoder(num_slots=num_slots)
        decoder.engine.ahead = ahead
        search = replace(SEARCHES[name], logits_processor=(grammar,))
        found.append(decoder.search(prompts, search, max_new_tokens=16, seed=2))
        tiny.assert_all_returned(decoder.worker)
    assert all(result.error is None for results in found for result in results)
    assert [outcome(r) for r in found[0]] == [outcome(r) for r in found[1]]
    texts = [c.text or "" for r in found[1] for c in r.candidates]
    assert all(map(bracketed, texts)) and any("a" in text and "b" in text for text in texts)
    widest = max(len(r.candidates) for r in found[1])
    assert following.anew == 7 * widest, "rows start anew at their first call alone"
    assert following.most <= 7 * widest, "states of rows that are gone are let go"


def test_states_of_branches_that_wait_are_there_when_they_go_on() -> None:
    """Branches take turns, fork while they wait, take forced tokens, are rewound and grow without the grammar."""
    grammar = Following()
    starts: list[int] = []

    async def script(context: SearchContext) -> list[Branch]:
        async def grow(branches: list[Branch], n: int, by: Any = (grammar,)) -> None:
            await extend(branches, Sampling(), max_tokens=n, processors=by)
            starts.append(grammar.anew)

        first, second = context.root.fork(2)
        await grow([first], 3)  # 1 row anew
        await grow([second], 2)  # 1
        others = second.fork(2)
        await grow([first, *others], 2)
        await grow([second], 2)
        await grow([second], 2, by=())
        second.append([3, OPEN, CLOSE, 4])
        await grow([second, others[1]], 2)
        first.rewind(context.root.length + 3)
        await grow([first], 1)  # after its newest mark: 1
        first.rewind(first.length - 1)
        await grow([first], 2)
        return [first, second, *others]

    result = tiny.decoder().search(["12+3="], Scripted(script), max_new_tokens=30)[0]
    assert result.error is None
    assert starts == [1, 2, 2, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("do_sample", [False, True])
def test_the_drop_in_tells_forks_too(num_beams: int, do_sample: bool) -> None:
    """Against transformers itself with the grammar that reads rows again; sampling makes the same calls."""
    model = tiny.model()
    ids = torch.tensor([[0, 0, 5, 6, 7], [0, 9, 10, 11, 12], [5, 6, 7, 8, 9]])
    outputs = []
    following = Following()
    for grammar, custom in (
        (Reading(), None),
        (Reading(), forktree.generate),
        (following, forktree.generate),
    ):
        torch.manual_seed(3)
        outputs.append(
            model.generate(
                ids,
                attention_mask=(ids != 0).long(),
                logits_processor=LogitsProcessorList([grammar]),
                custom_generate=custom,
                num_beams=num_beams,
                do_sample=do_sample,
                max_new_tokens=9,
                pad_token_id=0,
            ).tolist()
        )
    if num_beams == 1 and do_sample:
        outputs.pop(0)
    assert outputs[-1] == outputs[0] == outputs[-2]
    assert following.calls > 1 and following.anew == len(ids) * num_beams


def test_beam_search_with_a_processor_is_transformers_own() -> None:
    model, prompts = tiny.model(), [[5, 6, 7], [9, 10, 11, 12], [3]]
    penalty = RepetitionPenaltyLogitsProcessor(1.7)
    results = tiny.decoder().search(
        prompts, BeamSearch(num_beams=4, logits_processor=(penalty, Following())), max_new_tokens=8
    )
    for prompt, result in zip(prompts, results, strict=True):
        want = model.generate(
            torch.tensor([prompt]),
            num_beams=4,
            max_new_tokens=8,
            logits_processor=LogitsProcessorList([penalty, Reading()]),
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        tokens = want.sequences[0, len(prompt) :].tolist()
        assert result.best.token_ids == tokens[: tokens.index(0) if 0 in tokens else None]
        assert result.best.score == pytest.approx(float(want.sequences_scores[0]), abs=1e-4)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, top_k=3)], ids=str)
def test_texts_follow_the_processed_distribution(sampling: Sampling) -> None:
    """Frequencies of two-token texts against exact enumeration; log-probs are the model's own."""
    model, prompt, n = tiny.model(vocab=5, spread=0.5, eos=None), [1, 3, 2], 5000
    penalty = RepetitionPenaltyLogitsProcessor(3.0)

    def shaped(text: Sequence[int]) -> np.ndarray:
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[:, -1]
        scores = penalty(torch.tensor([text]), logits)[0].double() / sampling.temperature
        if sampling.top_k:
            scores[scores < scores.topk(sampling.top_k).values[-1]] = -torch.inf
        return scores.softmax(dim=-1).numpy()

    first = shaped(prompt)
    exact = np.array([first[a] * shaped([*prompt, a]) for a in range(5)])
    search = Sample(
        num_return_sequences=n, temperature=sampling.temperature, top_k=sampling.top_k, logits_processor=(penalty,)
    )
    result = forktree.Decoder(model, num_slots=32768).search([prompt], search, max_new_tokens=2, seed=5)[0]
    observed = np.zeros((5, 5))
    for candidate in result.candidates:
        observed[tuple(candidate.token_ids)] += 1
    assert chi_square(observed.ravel(), n * exact.ravel()) > 1e-4
    for candidate in result.candidates[:20]:
        a, b = candidate.token_ids
        own = tiny.next_log_probs(model, prompt)[a] + tiny.next_log_probs(model, [*prompt, a])[b]
        assert candidate.hypothesis.log_prob == pytest.approx(float(own), abs=1e-5)


def fails(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("the grammar is broken")


def forbids_all(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Everything to the second row, once it has a token more than the prompt of five."""
    if input_ids.shape[1] > 5:
        scores[1] = -torch.inf
    return scores


BROKEN: dict[str, tuple[Any, type[Exception], str]] = {
    "raises": (fails, RuntimeError, "the grammar is broken"),
    "leaves nothing": (forbids_all, InvalidInput, "leave branch 1 no token at position 6"),
    "drops a column": (lambda ids, scores: scores[:, 1:], InvalidInput, r"must return scores \[3, 21\]"),
}


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_processor_ends_its_own_search(name: str, ahead: bool) -> None:
    processor, error, message = BROKEN[name]
    decoder = tiny.decoder()
    decoder.engine.ahead = ahead
    plain = Sample(num_return_sequences=3)
    searches: list[Search] = [plain, replace(plain, logits_processor=(processor,)), plain]
    prompts = ["12+3=", "1+1=2", "4-4=0"]
    results = sorted(decoder.search_iter(prompts, searches, max_new_tokens=8), key=lambda r: r.index)
    assert isinstance(results[1].error, error)
    with pytest.raises(error, match=message):
        raise results[1].error
    for i in (0, 2):
        assert outcome(results[i]) == outcome(tiny.decoder().search([prompts[i]], plain, max_new_tokens=8)[0])
    tiny.assert_all_returned(decoder.worker)


def test_nan_of_the_model_is_not_blamed_on_processors() -> None:
    model = tiny.new_model()
    decoder = forktree.Decoder(model, tiny.tokenizer(), num_slots=200)
    model.get_input_embeddings().weight.data[5] = torch.nan  # unseen: the model would be refused
    result = decoder.search([[2, 5]], Sample(logits_processor=(Reading(),)), max_new_tokens=4)[0]
    assert isinstance(result.error, NonFinite) and "logits of branch 0 at position 2 " in str(result.error)


@pytest.mark.parametrize("make", [Greedy, Sample, BeamSearch])
@pytest.mark.parametrize("value", [Reading(), (1,), "x"])
def test_what_is_no_tuple_of_processors_is_refused(make: Any, value: object) -> None:
    with pytest.raises(InvalidInput, match="logits_processor must be a tuple of functions"):
        make(logits_processor=value)
