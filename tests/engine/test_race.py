"""`extend` as a race, and with a sampling of its own for each branch."""

from functools import cache
from typing import Any

import numpy as np
import pytest

import tiny
from forktree import Decoder, InvalidInput, Sampling
from forktree.kv import Branch
from forktree.search import SearchContext
from forktree.search.request import Extension, extend, next_logits
from searches import Scripted, mixed, together

ENDS = frozenset([0, 5, 9])
COUNT = 12


def decoder(ahead: bool, **options: Any) -> Decoder:
    made = tiny.decoder(**options)
    made.engine.ahead = ahead
    return made


def stops(token: int, tokens: Any) -> bool:
    return token % 7 == 3


def forks(context: SearchContext) -> list[Branch]:
    """Ends of one node at different places, and one that is longer: first hidden states come at different times."""
    root = context.root
    trunk = root.fork(1)[0]
    trunk.append([5, 9, 4, 11, 3, 8])
    branches = trunk.fork(COUNT)
    for i, branch in enumerate(branches[: COUNT // 2]):
        branch.rewind(root.length + i)
    branches[-1].append(np.arange(1, 15))
    return branches


LIMITS = [30, 4, 30, 30, 7, 30, 30, 30, 2, 30, 30, 30]


PROMPT = tiny.prompts(1, seed=2)


@cache
def without_race() -> tuple[list[list[int]], Extension, list[int]]:
    """Texts of the branches in the end, how each ended, and their lengths before."""
    found: list[Any] = []

    async def alone(context: SearchContext) -> list[Branch]:
        branches = forks(context)
        begin = [b.length for b in branches]
        done = await extend(branches, Sampling(), max_tokens=LIMITS, eos_token_ids=ENDS, stop=stops)
        found.extend([[b.tokens.tolist() for b in branches], done, begin])
        return []

    decoder(False).search(PROMPT, Scripted(alone), max_new_tokens=9)
    return tuple(found)


def expected(texts: list[list[int]], done: Extension, begin: list[int], race: int) -> list[tuple[list[int], str, int]]:
    """By what each branch does alone: the race ends with the m-th in order of (tokens, branch)."""
    ends = sorted((int(n), i) for i, n in enumerate(done.num_tokens))
    last = ends[race - 1]
    found = []
    for i, (text, first) in enumerate(zip(texts, begin, strict=True)):
        n = int(done.num_tokens[i])
        if (n, i) <= last:
            found.append((text, done.reason[i], n))
        else:
            taken = last[0] if i < last[1] else last[0] - 1
            found.append((text[: first + taken], "running", taken))
    return found


@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 5}, {"num_slots": 150}], ids=str)
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("race", [1, 3, 6, COUNT - 1, COUNT])
def test_a_race_ends_with_the_mth_branch_that_ends(race: int, ahead: bool, options: dict[str, Any]) -> None:
    whole, ends, begin = without_race()
    seen: list[Any] = []

    async def races(context: SearchContext) -> list[Branch]:
        branches = forks(context)
        done = await extend(
            branches, Sampling(), max_tokens=LIMITS, eos_token_ids=ENDS, stop=stops, race=race
        )
        texts = [b.tokens.tolist() for b in branches]
        seen.append([*zip(texts, done.reason, done.num_tokens.tolist(), strict=True)])
        assert sum(reason != "running" for reason in done.reason) == race
        if left := [i for i, reason in enumerate(done.reason) if reason == "running"]:
            rest = [LIMITS[i] - int(done.num_tokens[i]) for i in left]
            logits = await next_logits([branches[i] for i in left])
            for row, i in zip(logits, left, strict=True):
                exact = tiny.next_log_probs(tiny.model(), texts[i])
                assert float((row.double().log_softmax(dim=-1) - exact).abs().max()) < 1e-4
            goes_on = [branches[i] for i in left]
            await extend(goes_on, Sampling(), max_tokens=rest, eos_token_ids=ENDS, stop=stops)
        seen.append([b.tokens.tolist() for b in branches])
        return []

    made = decoder(ahead, **options)
    others = mixed()[:3]
    prompts = [*tiny.prompts(2, seed=5), *PROMPT, *tiny.prompts(1, seed=6)]
    results = together(
        made, prompts, [*others[:2], Scripted(races), others[2]], max_new_tokens=9, on_step=made.worker.tree.check
    )
    for result in results:
        if result.error is not None:
            raise result.error
    assert seen[0] == expected(whole, ends, begin, race)
    assert seen[1] == whole, "who goes on goes on as if there had been no race"
    tiny.assert_all_returned(made.worker)


@pytest.mark.parametrize("ahead", [False, True])
def test_log_probs_are_of_the_tokens_that_were_taken(ahead: bool) -> None:
    async def script(context: SearchContext) -> list[Branch]:
        branches = context.root.fork(5)
        begin = context.root.length
        done = await extend(branches, Sampling(), max_tokens=[9, 9, 4, 9, 9], race=1)
        assert done.reason == ["running", "running", "length", "running", "running"]
        assert done.num_tokens.tolist() == [4, 4, 4, 3, 3]
        for branch, log_prob in zip(branches, done.log_prob, strict=True):
            text = branch.tokens.tolist()
            exact = sum(float(tiny.next_log_probs(tiny.model(), text[:i])[text[i]]) for i in range(begin, len(text)))
            assert log_prob == pytest.approx(exact, abs=1e-4)
        return branches

    (result,) = decoder(ahead).search(["12+3="], Scripted(script), max_new_tokens=9)
    assert result.error is None, result.error


@pytest.mark.parametrize("race", [0, 4, 1.5, True])
def test_a_race_of_no_such_number(race: Any) -> None:
    async def script(context: SearchContext) -> list[Branch]:
        await extend(context.root.fork(3), Sampling(), max_tokens=2, race=race)
        return []

    (result,) = tiny.decoder().search(["12"], Scripted(script), max_new_tokens=9)
    assert isinstance(result.error, InvalidInput) and "race must be an integer from 1 to 3" in str(result.error)


def test_each_branch_samples_in_its_own_way() -> None:
    samplings = [Sampling(0), Sampling(1.5), Sampling(1.0, top_k=2), Sampling(0.7, top_p=0.5), Sampling(0)]

    def script(sampling: Any, found: list[Any], only: int | None = None) -> Any:
        async def run(context: SearchContext) -> list[Branch]:
            branches = context.root.fork(5)
            chosen = branches if only is None else [branches[only]]
            await extend(chosen, sampling, max_tokens=8)
            found.extend(b.tokens.tolist() for b in chosen)
            return []

        return Scripted(run)

    together_, one_by_one = [], []
    tiny.decoder().search(["12+3="], script(samplings, together_), max_new_tokens=9)
    for i, sampling in enumerate(samplings):
        tiny.decoder().search(["12+3="], script(sampling, one_by_one, i), max_new_tokens=9)
    assert together_ == one_by_one and len(together_) == 5 and together_[0] == together_[4]


@pytest.mark.parametrize("sampling", [[Sampling()], [Sampling(), None], None, "hot"])
def test_samplings_that_are_none(sampling: Any) -> None:
    async def script(context: SearchContext) -> list[Branch]:
        await extend(context.root.fork(2), sampling, max_tokens=2)
        return []

    (result,) = tiny.decoder().search(["12"], Scripted(script), max_new_tokens=9)
    assert isinstance(result.error, InvalidInput) and "sampling must be a Sampling, or one for" in str(result.error)
