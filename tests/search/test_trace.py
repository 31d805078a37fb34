"""Traces: every search says what it did, in data that `json` writes, and its texts can be read out of that alone."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import tiny
from forktree import (
    AdaptiveVote,
    BeamSearch,
    BestOfMajority,
    BestOfN,
    Decoder,
    FunctionReward,
    Greedy,
    Hypothesis,
    MajorityOfTheBests,
    MajorityVote,
    MinimumBayesRisk,
    ParticleFilter,
    PerplexityConsistency,
    QueryLikelihood,
    Reward,
    Sample,
    Sampling,
    SearchResult,
    WeightedVote,
)
from forktree.rewards.base import PendingReward, RewardInput
from forktree.search import Search, SearchContext
from forktree.search.request import extend
from forktree.search.selection import log_weights, softmax
from forktree.search.trace import SearchTrace

PROMPT = "12+3="


def value(response: str) -> float:
    """Between 0.05 and 0.95, different for most texts."""
    return 0.05 + 0.9 * (sum((i + 3) * ord(c) for i, c in enumerate(response)) % 17) / 16


class Asked(Reward):
    """Remembers every list of responses that it was asked about, in order; fails for texts with a "7"."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def start(self, given: RewardInput) -> PendingReward:
        self.asked.append(given.responses())
        return FunctionReward(reward).start(given)


def reward(prompt: str, response: str) -> float:
    if "7" in response:
        raise ValueError("a seven")
    return value(response)


def traced(search: Search, *, seed: int = 0, max_new_tokens: int = 12) -> tuple[SearchResult, list[dict[str, Any]]]:
    """A result, and its trace as it is read from a file."""
    result = tiny.decoder().search([PROMPT], search, seed=seed, max_new_tokens=max_new_tokens)[0]
    assert result.error is None
    return result, json.loads(json.dumps(result.trace.events, allow_nan=False))


class Steps:
    """The steps of every text, by node, from events alone."""

    def __init__(self, events: list[dict[str, Any]]) -> None:
        self.parent: dict[int, int] = {}
        self.tokens: dict[int, list[int]] = {}
        self.end: dict[int, str | None] = {}
        self.reward: dict[int, float | None] = {}
        for event in events:
            if event["event"] == "grow":
                assert event["nodes"] == list(range(len(self.parent), len(self.parent) + len(event["nodes"])))
                ends = event.get("ends", [None] * len(event["nodes"]))
                grown = zip(event["nodes"], event["parents"], event["tokens"], ends, strict=True)
                for node, parent, tokens, end in grown:
                    assert parent in self.parent or parent == -1
                    self.parent[node], self.tokens[node], self.end[node] = parent, tokens, end
            if event["event"] == "reward":
                self.reward.update(zip(event["nodes"], event["rewards"], strict=True))

    def path(self, node: int) -> list[int]:
        """Nodes from the first step to this one."""
        path = []
        while node != -1:
            path.append(node)
            node = self.parent[node]
        return path[::-1]

    def text(self, node: int) -> str:
        return tiny.tokenizer().decode([t for n in self.path(node) for t in self.tokens[n]])


def last(text: str) -> str | None:
    return text[-1:] or None


SEARCHES: dict[str, Callable[[], Search]] = {
    "greedy": Greedy,
    "sample": lambda: Sample(num_return_sequences=5),
    "best-of-n": lambda: BestOfN(reward=FunctionReward(reward), num_samples=9),
    "vote": lambda: MajorityVote(answer=last, num_samples=9),
    "adaptive": lambda: AdaptiveVote(answer=last, num_samples=9, round_size=2),
    "weighted": lambda: WeightedVote(answer=last, reward=FunctionReward(reward), num_samples=9),
    "best of majority": lambda: BestOfMajority(
        answer=last, reward=FunctionReward(reward), num_samples=9, num_return_sequences=3
    ),
    "bests": lambda: MajorityOfTheBests(answer=last, reward=FunctionReward(reward), num_samples=9),
    "rpc": lambda: PerplexityConsistency(answer=last, num_samples=9),
    "mbr": lambda: MinimumBayesRisk(num_samples=9),
    "judge": lambda: BestOfN(reward=QueryLikelihood("{response}="), num_samples=9),
    "beam": lambda: BeamSearch(num_beams=4, num_return_sequences=3),
    "particle": lambda: ParticleFilter(
        reward=FunctionReward(reward), num_particles=9, step_delimiter="5", max_step_tokens=3, stop=("b",)
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SEARCHES)
def test_what_is_returned_can_be_read_out_of_the_trace(name: str, seed: int) -> None:
    """Texts, why they ended and what they are ranked by; by the search's own order."""
    result, events = traced(SEARCHES[name](), seed=seed)
    steps = Steps(events)
    assert [e["event"] for e in events].count("return") == 1 and events[-1]["event"] == "return"
    returned = events[-1]
    assert [steps.text(node) for node in returned["nodes"]] == [c.text for c in result.candidates]
    assert [steps.end[node] for node in returned["nodes"]] == [c.hypothesis.finish_reason for c in result.candidates]
    scores = [None if np.isnan(c.score) else c.score for c in result.candidates]
    assert returned["scores"] == scores
    if name in ("best-of-n", "particle"):
        assert [steps.reward[node] for node in returned["nodes"]] == scores


@pytest.mark.parametrize("resampling", ["systematic", "multinomial"])
@pytest.mark.parametrize("seed", range(4))
def test_a_particle_run_can_be_replayed_from_its_trace(seed: int, resampling: str) -> None:
    """Every population, weight, ancestor and reward, against what the reward was asked and the formulas."""
    reward, n = Asked(), 12
    search = ParticleFilter(
        reward=reward,
        num_particles=n,
        step_delimiter="5",
        max_step_tokens=3,
        max_steps=5,
        resampling=resampling,
        weight_temperature=0.5,
        stop=("b",),
    )
    result, events = traced(search, seed=seed, max_new_tokens=14)
    steps, asked = Steps(events), iter(reward.asked)
    population, copied, dropped = [-1] * n, 0, set()
    for event in events[:-1]:
        if event["event"] == "grow":
            live = [i for i, node in enumerate(population) if node == -1 or steps.end[node] is None]
            assert event["parents"] == [population[i] for i in live]
            for i, node in zip(live, event["nodes"], strict=True):
                population[i] = node
        elif event["event"] == "reward":
            texts = [steps.text(node) for node in event["nodes"]]
            assert texts == next(asked)
            assert event["rewards"] == [None if "7" in text else value(text) for text in texts]
            for text, error in zip(texts, event["errors"], strict=True):
                assert (error is not None) == ("7" in text) and (error is None or "a seven" in error)
        else:
            assert (event["event"], event["why"]) == ("select", "resampling") and event["nodes"] == population
            rewards = np.array([steps.reward[node] for node in population], float)
            weights = softmax(log_weights(rewards, 0.5))
            np.testing.assert_allclose(event["weights"], weights, rtol=1e-12)
            assert event["ess"] == pytest.approx(1 / sum(w * w for w in weights))
            assert all(weights[a] > 0 for a in event["ancestors"])
            copied += n - len(set(event["ancestors"]))
            gone = {node for i, node in enumerate(population) if i not in event["ancestors"]}
            population = [population[a] for a in event["ancestors"]]
            assert event["dropped"] == sorted(gone - set(population))
            dropped.update(event["dropped"])
    assert next(asked, None) is None and copied and dropped
    assert sorted(events[-1]["nodes"]) == sorted(population)
    for node, candidate in zip(events[-1]["nodes"], result.candidates, strict=True):
        path = steps.path(node)
        assert not dropped.intersection(path[-1:]), "a text that was dropped does not come back"
        said = [np.nan if steps.reward[n] is None else steps.reward[n] for n in path]
        np.testing.assert_array_equal(candidate.hypothesis.step_rewards, said)
        assert steps.text(node) == candidate.text


def test_votes_and_beams_say_what_they_chose_by() -> None:
    result, events = traced(SEARCHES["vote"]())
    (votes,) = [e for e in events if e["event"] == "vote"]
    steps = Steps(events)
    assert votes["answers"] == [repr(steps.text(n)[-1:]) if steps.text(n) else None for n in votes["nodes"]]
    assert sorted(votes["shares"], reverse=True) == [c.score for c in result.candidates]
    _, events = traced(SEARCHES["beam"]())
    grown = [e for e in events if e["event"] == "grow"]
    selected = [e for e in events if e["event"] == "select"]
    for chosen, before, after in zip(selected[1:], grown, grown[1:], strict=False):
        assert chosen["why"] == "beam" and chosen["nodes"] == before["nodes"]
        assert after["parents"] == [chosen["nodes"][a] for a in chosen["ancestors"]]
        assert set(chosen["dropped"]) == set(before["nodes"]) - set(after["parents"])
        assert after["scores"] == sorted(after["scores"], reverse=True)


def test_a_search_that_fails_leaves_its_trace_and_knows_its_costs() -> None:
    seen: list[tuple[int, int]] = []

    class Watching(Sample):
        async def run(self, context: Any) -> Any:
            seen.append((context.counters.model_tokens, context.counters.reward_calls))
            found = await super().run(context)
            seen.append((context.counters.model_tokens, context.counters.reward_calls))
            raise RuntimeError(f"after {len(found)} texts")

    result = tiny.decoder().search([PROMPT], Watching(num_return_sequences=3), max_new_tokens=4)[0]
    assert "after 3 texts" in str(result.error)
    assert [e["event"] for e in result.trace.events] == ["grow", "return"]
    assert seen[0] == (0, 0) and seen[1] == (result.counters.model_tokens, 0) and seen[1][0] > len(PROMPT)


def test_what_json_does_not_have_becomes_null() -> None:
    trace = SearchTrace()
    numbers = np.array([1.5, np.nan, np.inf])
    trace.record("made up", a=numbers, b=np.int64(3), c=[ValueError("why"), None], d=(True, "x"))
    assert trace.events == [{"event": "made up", "a": [1.5, None, None], "b": 3, "c": ["why", None], "d": [True, "x"]}]
    json.dumps(trace.events, allow_nan=False)


def test_traces_of_searches_side_by_side_are_their_own() -> None:
    decoder: Decoder = tiny.decoder()
    names = list(SEARCHES)
    results = list(decoder.search_iter([PROMPT] * len(names), [SEARCHES[n]() for n in names], max_new_tokens=12))
    for result in results:
        alone, _ = traced(SEARCHES[names[result.index]]())
        assert [e["event"] for e in result.trace.events] == [e["event"] for e in alone.trace.events]
        kinds = [e.get("nodes") for e in result.trace.events]
        assert kinds == [e.get("nodes") for e in alone.trace.events]
        assert [e.get("tokens") for e in result.trace.events] == [e.get("tokens") for e in alone.trace.events]


@pytest.mark.parametrize("name", SEARCHES)
def test_the_tree_says_what_became_of_every_step(name: str) -> None:
    """Texts, rewards and fates, against the events; what was returned is where the candidates say."""
    result, events = traced(SEARCHES[name](), seed=1)
    tree, steps = result.tree(), Steps(events)
    assert len(tree) == len(steps.parent)
    inner = {node.parent for node in tree}
    for i, node in enumerate(tree):
        assert (node.parent, node.tokens, node.end) == (steps.parent[i], steps.tokens[i], steps.end[i])
        assert "".join(tree[n].text or "" for n in steps.path(i)) == steps.text(i)
        assert node.reward == steps.reward.get(i)
        assert (node.error is not None) == (i in steps.reward and node.reward is None)
        assert (node.fate == "grown") == (i in inner) and (node.why is not None) == (node.fate == "dropped")
    returned = sorted((node for node in tree if node.rank is not None), key=lambda node: node.rank or 0)
    assert all(node.fate == "returned" for node in returned)
    at = {node: rank for rank, node in reversed(list(enumerate(events[-1]["nodes"])))}
    assert [node.rank for node in returned] == sorted(at.values())
    visits = [0] * len(tree)
    for event in events:
        if event["event"] == "select":
            for place in event["ancestors"]:
                if event["nodes"][place] >= 0:
                    visits[event["nodes"][place]] += 1
            for node in event["dropped"]:
                assert node < 0 or (tree[node].fate, tree[node].why) == ("dropped", event["why"])
    assert [node.visits for node in tree] == visits


@pytest.mark.parametrize("name", SEARCHES)
def test_the_shared_fraction_is_that_of_the_texts(name: str) -> None:
    """Against every text that was grown, written out; distinct tokens are those of the tree of all texts' steps."""
    result, events = traced(SEARCHES[name](), seed=1)
    steps = Steps(events)
    leaves = [node for node in steps.parent if node not in steps.parent.values()]
    alone = sum(len(PROMPT) + sum(len(steps.tokens[n]) for n in steps.path(leaf)) for leaf in leaves)
    distinct = len(PROMPT) + sum(map(len, steps.tokens.values()))
    assert result.shared_fraction == pytest.approx(1 - distinct / alone)
    assert (result.shared_fraction > 0) == (len(leaves) > 1)


def test_the_bill_adds_up() -> None:
    """Tokens by whose they are, passes, peaks and phases of two searches that run side by side."""

    @dataclass(frozen=True)
    class Judging(Search):
        """Two samples; a judge is asked in a text of its own."""

        async def run(self, context: SearchContext) -> list[Hypothesis]:
            await extend(context.root.fork(2), Sampling(), max_tokens=6)
            judge = context.open("a+b=c")
            await extend([judge], Sampling(), max_tokens=4)
            return []

    made = tiny.decoder()
    judged, other = made.search_iter([PROMPT, "9-1="], [Judging(), Sample()], max_new_tokens=5)
    judged, other = sorted((judged, other), key=lambda result: result.index)
    bill = judged.counters
    assert bill.sampled_tokens == 2 * 6 + 4 and other.counters.sampled_tokens <= 5
    assert bill.opened_tokens == len("a+b=c") + 3, "the last token is not computed"
    assert bill.model_tokens == len(PROMPT) + 2 * 5 + bill.opened_tokens
    assert bill.passes == 6 + 4 and made.worker.forwards <= bill.passes + other.counters.passes
    assert bill.model_tokens + other.counters.model_tokens == made.worker.tokens_computed
    assert bill.peak_tokens == bill.model_tokens <= bill.peak_slots, "nothing was dropped"
    for counters in (bill, other.counters):
        phases = counters.model_seconds, counters.reward_seconds, counters.search_seconds
        assert min(phases[0], phases[2]) > 0 == phases[1] and sum(phases) <= counters.seconds
