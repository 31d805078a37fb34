"""Trees of steps: every allocation replayed from the trace, and the limits in which one search is another."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import tiny
from forktree import BestOfN, FunctionReward, InvalidInput, RewardError, SearchResult
from forktree.demo import run as demo
from forktree.demo import task
from forktree.search import DVTS, ETS, REBASE, PRMBeamSearch, Search, StepBeamSearch
from forktree.search.algorithms.steptree import StepTree
from markov import MarkovLM
from searches import by_text, digits

PROMPT = "12+3="
STEPS: dict[str, Any] = dict(step_delimiter="5", max_step_tokens=3, max_steps=6)
LM = MarkovLM.random("ab", seed=4, spread=2.0, end=0.2)
ONE_TOKEN: dict[str, Any] = dict(step_delimiter="", max_step_tokens=1)
SEEDS = pytest.mark.parametrize("seed", range(4))


def value(text: str) -> float:
    return digits("", text)


def run(search: Search, *, seed: int = 0, max_new_tokens: int = 16) -> SearchResult:
    decoder = tiny.decoder()
    (result,) = decoder.search([PROMPT], search, max_new_tokens=max_new_tokens, seed=seed)
    tiny.assert_all_returned(decoder.worker)
    assert result.error is None, result.error
    return result


@dataclass
class Round:
    """One allocation: of every leaf its node, parent, reward, why its text is over, and how often it was continued."""

    nodes: list[int]
    parents: list[int]
    rewards: list[float]
    ends: list[str | None]
    counts: list[int]
    grown: list[int]

    @property
    def live(self) -> list[int]:
        return [i for i, end in enumerate(self.ends) if end is None]


def rounds(result: SearchResult) -> Iterator[Round]:
    parent: dict[int, int] = {}
    reward: dict[int, float] = {}
    end: dict[int, str | None] = {}
    new: set[int] = set()
    for event in result.trace.events:
        if event["event"] == "grow":
            parent |= dict(zip(event["nodes"], event["parents"], strict=True))
            end |= dict(zip(event["nodes"], event["ends"], strict=True))
        elif event["event"] == "reward":
            values = [math.nan if r is None else r for r in event["rewards"]]
            reward |= dict(zip(event["nodes"], values, strict=True))
            new = set(event["nodes"])
        elif event["event"] == "select":
            nodes, copies = event["nodes"], Counter(event["ancestors"])
            yield Round(
                nodes,
                [parent[n] for n in nodes],
                [reward[n] for n in nodes],
                [end[n] for n in nodes],
                [copies[i] for i in range(len(nodes))],
                [i for i, n in enumerate(nodes) if n in new],
            )


def best(leaves: list[int], one: Round) -> list[int]:
    return sorted(leaves, key=lambda i: (math.isnan(one.rewards[i]), -np.nan_to_num(one.rewards[i]), i))


# ---------------------------------------------------------------- PRM beam search


@pytest.mark.proves(40)
@SEEDS
def test_prm_beam_keeps_the_best_and_continues_them_in_turns(seed: int) -> None:
    result = run(PRMBeamSearch(reward=by_text(value), num_beams=12, beam_width=3, **STEPS), seed=seed)
    seen = list(rounds(result))
    for one in seen:
        kept = sorted(best(one.live, one)[: 12 // 3])
        copies = [leaf for leaf, _ in zip(itertools.cycle(kept), range(12), strict=False)]
        expected = [1 if one.ends[i] else copies.count(i) for i in range(len(one.nodes))]
        assert one.counts == expected
    assert len(seen) >= 3 and len(result.candidates) == 12
    scores = [c.score for c in result.candidates]
    assert scores == sorted(scores, reverse=True) == [value(c.text) for c in result.candidates]
    ended = [i for one in seen[-1:] for i in one.nodes]
    assert len(ended) >= 12


@pytest.mark.parametrize("aggregate", ["last", "min", "prod", "mean"])
def test_scores_are_aggregated_over_the_steps(aggregate: str) -> None:
    search = PRMBeamSearch(reward=by_text(value), num_beams=8, beam_width=2, aggregate=aggregate, **STEPS)
    function = {"last": lambda r: r[-1], "min": min, "prod": math.prod, "mean": lambda r: sum(r) / len(r)}[aggregate]
    for c in run(search).candidates:
        assert c.score == pytest.approx(function(c.hypothesis.step_rewards))
        assert len(c.hypothesis.step_rewards) >= 1


def test_duplicates_are_dropped_if_wanted() -> None:
    lm = MarkovLM({"a": {"a": 0.9, "b": 0.1}, "b": {"a": 0.9, "b": 0.1}})
    asked: list[str] = []
    reward = by_text(lambda text: asked.append(text) or 0.5)
    for filtered in (False, True):
        search = PRMBeamSearch(
            reward=reward, num_beams=8, beam_width=2, filter_duplicates=filtered, max_steps=3, **ONE_TOKEN
        )
        (result,) = lm.decoder.search("a", search, max_new_tokens=9)
        kept = [[one.nodes[i] for i in one.live if one.counts[i]] for one in rounds(result)][:-1]
        token = {n: t for e in result.trace.events if e["event"] == "grow"
                 for n, t in zip(e["nodes"], e["tokens"], strict=True)}  # fmt: skip
        first = [tuple(token[n]) for n in kept[0]]
        assert (len(set(first)) == len(first)) == filtered
    assert any("b" in text for text in asked)


@pytest.mark.proves(40)
@pytest.mark.parametrize("kind", [PRMBeamSearch, DVTS])
@pytest.mark.parametrize("ahead", [1, 3])
def test_a_leaf_is_rewarded_at_the_end_of_a_greedy_rollout_that_leaves_no_trace_in_it(kind: Any, ahead: int) -> None:
    asked: list[list[str]] = []

    class Table:
        def __call__(self, text: str) -> float:
            asked[-1].append(text)
            return value(text)

    greedy = LM.tempered(0)

    def rollout(text: str, steps: int) -> str:
        for _ in range(steps):
            token = int(greedy[LM.names.index(text[-1])].argmax())
            if token == 0 or len(text) >= 7:
                break
            text += LM.names[token]
        return text

    found = []
    for lookahead in (0, ahead):
        asked.append([])
        search = kind(
            reward=by_text(Table()), num_beams=8, beam_width=2, lookahead=lookahead, max_steps=7, **ONE_TOKEN
        )
        decoder = LM.new_decoder()
        (result,) = decoder.search("ab", search, max_new_tokens=9)
        tiny.assert_all_returned(decoder.worker)
        grown = [e for e in result.trace.events if e["event"] == "grow"]
        found.append([LM.names[t[0]] if t else "" for t in grown[0]["tokens"]])
        firsts = asked[-1][:8]
        ends = grown[0]["ends"]
        wanted = [t if e else rollout(t, lookahead) for t, e in zip(found[-1], ends, strict=True)]
        assert firsts == wanted
    assert found[0] == found[1], "the first steps are sampled before anything is looked ahead"
    assert asked[0] != asked[1]


# ---------------------------------------------------------------- partial rewards


@pytest.mark.proves(14)
def test_no_scored_step_is_best_of_n_and_all_are_the_beam() -> None:
    common: Any = dict(reward=by_text(value), **STEPS)
    plain = run(BestOfN(reward=by_text(value), num_samples=8), seed=3)
    none = run(PRMBeamSearch(**common, num_beams=8, beam_width=2, scored_steps=0), seed=3)
    assert [(c.token_ids, c.score) for c in none.candidates] == [(c.token_ids, c.score) for c in plain.candidates]
    beam = run(PRMBeamSearch(**common, num_beams=8, beam_width=2), seed=3)
    every = run(PRMBeamSearch(**common, num_beams=8, beam_width=2, scored_steps=6), seed=3)
    assert [(c.token_ids, c.score) for c in every.candidates] == [(c.token_ids, c.score) for c in beam.candidates]


@pytest.mark.proves(14)
@pytest.mark.parametrize("scored", [1, 2])
def test_after_the_scored_steps_texts_are_sampled_to_their_ends(scored: int) -> None:
    search = PRMBeamSearch(
        reward=by_text(value), num_beams=8, beam_width=2, scored_steps=scored, step_delimiter="", max_step_tokens=2
    )
    result = run(search, max_new_tokens=12)
    assert [e["event"] for e in result.trace.events].count("reward") == scored + 1
    for c in result.candidates:
        assert len(c.hypothesis.step_rewards) <= scored + 1 and c.score == value(c.text)
        assert c.hypothesis.finish_reason == "eos" or len(c.token_ids) == 12


# ---------------------------------------------------------------- DVTS


@pytest.mark.proves(40)
@SEEDS
def test_dvts_grows_subtrees_that_know_nothing_of_another(seed: int) -> None:
    result = run(DVTS(reward=by_text(value), num_beams=12, beam_width=3, **STEPS), seed=seed)
    tree_of = {}
    seen = list(rounds(result))
    for k, one in enumerate(seen):
        for i in one.grown:
            tree_of[one.nodes[i]] = i // 3 if k == 0 else tree_of[one.parents[i]]
        for tree in range(4):
            leaves = [i for i in one.grown if tree_of[one.nodes[i]] == tree]
            if leaves:
                assert len(leaves) == 3 and len({one.parents[i] for i in leaves}) == 1
                top = best(leaves, one)[0]
                expected = [int(one.ends[i] is not None) if one.ends[top] else 3 * (i == top) for i in leaves]
                assert [one.counts[i] for i in leaves] == expected
        for i in set(range(len(one.nodes))) - set(one.grown):
            assert one.counts[i] == 1 and one.ends[i]
    returned = result.trace.events[-1]["nodes"]
    assert {tree_of[n] for n in returned} == {0, 1, 2, 3}
    assert all(c.hypothesis.finish_reason in ("eos", "length") for c in result.candidates)


def test_one_subtree_is_a_beam_of_one() -> None:
    """With `beam_width` of all beams, both keep the best text alone; a beam also goes on when it has ended."""
    common: Any = dict(reward=by_text(lambda t: 1 / (1 + len(t))), num_beams=5, beam_width=5, max_steps=3, **ONE_TOKEN)
    lm = MarkovLM({"a": {"a": 0.5, "b": 0.5}, "b": {"a": 0.5, "b": 0.5}})
    one = lm.decoder.search("a", DVTS(**common), max_new_tokens=9, seed=1)[0]
    other = lm.decoder.search("a", PRMBeamSearch(**common), max_new_tokens=9, seed=1)[0]
    assert [c.token_ids for c in one.candidates] == [c.token_ids for c in other.candidates]


# ---------------------------------------------------------------- REBASE and ETS


def balanced(rewards: list[float], width: int, temperature: float) -> list[int]:
    """The paper's loop, in floating point."""
    weights = [0 if math.isnan(r) else math.exp(r / temperature) for r in rewards]
    counts, total = [0] * len(rewards), sum(weights)
    for i in sorted(range(len(rewards)), key=lambda i: (-weights[i], i)):
        if width > 0 and weights[i]:
            counts[i] = math.ceil(width * weights[i] / total - 1e-9)
            width, total = width - counts[i], total - weights[i]
    return counts


@SEEDS
@pytest.mark.parametrize("temperature", [0.05, 0.2, 2.0])
def test_rebase_spends_what_ended_texts_leave(seed: int, temperature: float) -> None:
    width = 10
    result = run(REBASE(reward=by_text(value), width=width, balance_temperature=temperature, **STEPS), seed=seed)
    seen = list(rounds(result))
    for one in seen:
        left = width - (len(one.nodes) - len(one.live))
        shares = balanced([one.rewards[i] for i in one.live], left, temperature)
        expected = [1 if end else shares[one.live.index(i)] for i, end in enumerate(one.ends)]
        assert one.counts == expected
        assert sum(one.counts) == width or not one.live
    assert len(seen) >= 3 and len(result.candidates) == width


def test_rebase_has_the_papers_settings() -> None:
    search = REBASE(reward=by_text(value))
    assert (search.balance_temperature, search.temperature, search.max_step_tokens, search.max_steps) == (
        0.2, 1.0, 256, 25
    )  # fmt: skip
    thrifty = ETS(reward=by_text(value))
    assert (thrifty.lambda_b, thrifty.lambda_d, thrifty.cluster_distance) == (1.0, 1.5, 0.05)


@pytest.mark.proves(6)
@SEEDS
def test_ets_without_prices_is_rebase_text_for_text(seed: int) -> None:
    plain = run(REBASE(reward=by_text(value), width=10, **STEPS), seed=seed)
    thrifty = run(ETS(reward=by_text(value), width=10, lambda_b=0.0, lambda_d=0.0, **STEPS), seed=seed)
    assert [(c.token_ids, c.score) for c in thrifty.candidates] == [(c.token_ids, c.score) for c in plain.candidates]


@SEEDS
def test_ets_at_a_high_price_of_memory_keeps_one_path(seed: int) -> None:
    plain = run(REBASE(reward=by_text(value), width=10, balance_temperature=2.0, **STEPS), seed=seed)
    search = ETS(reward=by_text(value), width=10, balance_temperature=2.0, lambda_b=1e3, lambda_d=0.0, **STEPS)
    result = run(search, seed=seed)
    for one in rounds(result):
        live = one.live
        kept = [k for k, i in enumerate(live) if one.counts[i]]
        share = balanced([one.rewards[i] for i in live], 10 - len(one.nodes) + len(live), 2.0)
        assert len(kept) == min(1, len(live)) and all(share[k] == max(share) for k in kept)
    assert result.counters.peak_slots < plain.counters.peak_slots


@pytest.mark.proves(6)
@SEEDS
def test_ets_keeps_the_best_set_of_leaves_at_every_step(seed: int) -> None:
    """Equation 4 over all sets, the paths and clusters read out of the trace; then REBASE among those kept."""
    width, b, d = 7, 4.0, 0.5
    search = ETS(
        reward=by_text(value),
        width=width,
        lambda_b=b,
        lambda_d=d,
        embed=lambda steps: np.eye(3)[[sum(map(ord, step)) % 3 for step in steps]],
        **STEPS,
    )
    result = run(search, seed=seed)
    parent, step = {}, {}
    for event in result.trace.events:
        if event["event"] == "grow":
            parent |= dict(zip(event["nodes"], event["parents"], strict=True))
            step |= dict(zip(event["nodes"], event["tokens"], strict=True))
    thinned = 0
    for one in rounds(result):
        live = one.live
        if not live:
            continue
        left = width - (len(one.nodes) - len(live))
        share = [c / left for c in balanced([one.rewards[i] for i in live], left, 0.2)] if left else [0.0] * len(live)
        above = []
        for i in live:
            node, path = one.parents[i], {-1}
            while node != -1:
                path.add(node)
                node = parent[node]
            above.append(path)
        meaning = [sum(map(ord, tiny.tokenizer().decode(step[one.nodes[i]]))) % 3 for i in live]

        def worth(kept: tuple[int, ...], above: Any = above, share: Any = share, meaning: Any = meaning) -> float:
            nodes = len(set().union(*above)) + len(above)
            price = b * (len(set().union(*(above[i] for i in kept))) + len(kept)) / nodes
            return sum(share[i] for i in kept) - price + d * len({meaning[i] for i in kept}) / len(set(meaning))

        sets = [s for r in range(1, len(live) + 1) for s in itertools.combinations(range(len(live)), r)]
        most = max(map(worth, sets))
        wanted = [
            balanced([one.rewards[live[i]] if i in s else math.nan for i in range(len(live))], left, 0.2)
            for s in sets
            if worth(s) > most - 1e-9
        ]
        assert [one.counts[i] for i in live] in wanted
        thinned += sum(1 for i in live if one.counts[i]) < sum(1 for s in share if s)
    assert thinned


@pytest.mark.proves(6)
def test_ets_holds_less_than_rebase_on_the_shipped_model() -> None:
    """The same problems at the same width: fewer slots at the peak, summed over the problems."""
    decoder, reward = demo.load()
    prompts = [next(task.problems("held_out", seed=seed)) for seed in range(3)]
    how: Any = dict(reward=reward, width=16, step_delimiter="\n", balance_temperature=1.0)
    peaks = []
    for search in (REBASE(**how), ETS(**how)):
        results = decoder.search(prompts, search, max_new_tokens=40, seed=1)
        assert all(r.error is None for r in results)
        peaks.append(sum(r.counters.peak_slots for r in results))
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize("embed", [lambda steps: np.ones(3), lambda steps: np.full((len(steps), 2), np.nan)])
def test_embeddings_that_are_none_end_the_search(embed: Any) -> None:
    (result,) = tiny.decoder().search([PROMPT], ETS(reward=by_text(value), embed=embed, **STEPS), max_new_tokens=9)
    assert isinstance(result.error, InvalidInput) and "embed must return finite vectors [" in str(result.error)


# ---------------------------------------------------------------- step beams


@pytest.mark.proves(58)
@SEEDS
def test_a_step_beam_narrows_as_texts_end(seed: int) -> None:
    result = run(StepBeamSearch(reward=by_text(value), **{**STEPS, "step_delimiter": "5"}), seed=seed)
    gone = 0
    seen = list(rounds(result))
    for one in seen:
        kept = best(one.grown, one)[: 3 - gone]
        expected = [
            (1 if one.ends[i] else 5) if i in kept else int(i not in one.grown) for i in range(len(one.nodes))
        ]
        assert one.counts == expected
        gone += sum(1 for i in kept if one.ends[i])
    assert gone == 3 == len(result.candidates) and len(seen[0].nodes) == 15
    cut = [c.hypothesis.finish_reason == "length" for c in result.candidates]
    assert cut == sorted(cut)
    for limit in (False, True):
        scores = [c.score for c, long in zip(result.candidates, cut, strict=True) if long == limit]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.proves(58)
def test_a_step_whose_value_failed_is_the_last_to_be_kept() -> None:
    """AlphaMath counts a missing value as -100."""
    lm = MarkovLM({"a": {"a": 0.5, "b": 0.5}, "b": {"a": 0.5, "b": 0.5}})
    search = StepBeamSearch(
        reward=by_text(lambda t: math.nan if t.endswith("b") else -50.0), max_steps=4, step_delimiter="",
        max_step_tokens=1,
    )  # fmt: skip
    (result,) = lm.decoder.search("a", search, max_new_tokens=9)
    for c in result.candidates:
        assert c.text == "aaaa" and c.score == -50.0


# ---------------------------------------------------------------- votes


VOTING: dict[str, Any] = {
    "prm-beam": lambda **how: PRMBeamSearch(num_beams=12, beam_width=3, **how),
    "dvts": lambda **how: DVTS(num_beams=12, beam_width=3, **how),
    "rebase": lambda **how: REBASE(width=12, **how),
    "ets": lambda **how: ETS(width=12, **how),
}


@pytest.mark.parametrize("name", VOTING)
@pytest.mark.parametrize("seed", range(2))
def test_texts_vote_with_their_scores_if_wanted(name: str, seed: int) -> None:
    """The same texts as without a vote; of the answer with the largest sum of scores first, then by score."""

    def answer(text: str) -> str | None:
        if text.endswith("7"):
            raise KeyError("a seven")
        return text[-1:] if text[-1:].isdigit() else None

    how: Any = dict(reward=by_text(value), **STEPS)
    plain = run(VOTING[name](**how), seed=seed).candidates
    voted = run(VOTING[name](**how, answer=answer), seed=seed).candidates
    total: dict[str, float] = {}
    for c in plain:
        if c.text[-1:].isdigit() and not c.text.endswith("7"):
            total[c.text[-1]] = total.get(c.text[-1], 0.0) + c.score
    whole = sum(c.score for c in plain if not c.text.endswith("7"))  # those without an answer have votes, too

    def share(text: str) -> float:
        return math.nan if text.endswith("7") else total.get(text[-1:], 0.0) / whole

    assert sorted(c.text for c in voted) == sorted(c.text for c in plain) and len(total) > 1
    for c in voted:
        assert c.score == pytest.approx(share(c.text), nan_ok=True)
        assert (c.hypothesis.error is not None) == c.text.endswith("7")
    shares = [-1.0 if math.isnan(c.score) else c.score for c in voted]
    assert shares == sorted(shares, reverse=True)
    for a, b in itertools.pairwise(voted):
        if a.text[-1:] == b.text[-1:] and a.text[-1:] in total:
            assert value(a.text) >= value(b.text)


def test_what_cannot_vote_is_refused_at_once() -> None:
    calls: list[str] = []
    search = REBASE(reward=by_text(lambda t: calls.append(t) or 2.0), width=4, answer=len, **STEPS)
    (result,) = tiny.decoder().search([PROMPT], search, max_new_tokens=9)
    assert isinstance(result.error, InvalidInput) and "[0, 1], got 2" in str(result.error) and len(calls) == 4
    with pytest.raises(InvalidInput, match="answer must be a function"):
        DVTS(reward=by_text(len), answer="box")


# ---------------------------------------------------------------- all of them


ALL: dict[str, Any] = {
    "prm-beam": lambda **how: PRMBeamSearch(num_beams=6, beam_width=2, **how),
    "dvts": lambda **how: DVTS(num_beams=6, beam_width=3, **how),
    "rebase": lambda **how: REBASE(width=6, **how),
    "ets": lambda **how: ETS(width=6, **how),
    "step-beam": lambda **how: StepBeamSearch(step_beam_width=2, num_samples=3, **how),
}


@pytest.mark.parametrize("name", ALL)
def test_failed_rewards_prune_their_leaves_until_none_is_left(name: str) -> None:
    def reward(prompt: str, response: str) -> float:
        if "5" in response:
            raise ValueError("a five")
        return value(response)

    found = run(ALL[name](reward=FunctionReward(reward), step_delimiter="", max_step_tokens=2, max_steps=4))
    good = [c for c in found.candidates if c.hypothesis.error is None]
    assert good and found.candidates[: len(good)] == good
    assert all("5" not in c.text[:-2] for c in found.candidates)

    def always(prompt: str, response: str) -> float:
        raise KeyError("gone")

    (result,) = tiny.decoder().search([PROMPT], ALL[name](reward=FunctionReward(always), **STEPS), max_new_tokens=9)
    assert isinstance(result.error, RewardError) and "gone" in str(result.error)


@pytest.mark.parametrize("name", ALL)
def test_a_table_that_knows_the_answer_leads_to_it(name: str) -> None:
    """The reward is the length of the right beginning: every rule finds a text that plain sampling finds rarely."""
    target = "abbaab"
    lm = MarkovLM({"a": {"a": 0.5, "b": 0.5}, "b": {"a": 0.5, "b": 0.5}})

    def reward(text: str) -> float:
        return next((i for i, (x, y) in enumerate(zip(text, target, strict=False)) if x != y), len(text)) / 6

    search: StepTree = ALL[name](reward=by_text(reward), max_steps=6, **ONE_TOKEN)
    results = lm.decoder.search([p + "a" for p in ("a", "b", "ab", "ba", "aab")], search, max_new_tokens=6)
    assert sum(r.text == target for r in results) >= 3


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        (PRMBeamSearch, "num_beams", 0),
        (PRMBeamSearch, "num_beams", 6),
        (PRMBeamSearch, "beam_width", 0),
        (PRMBeamSearch, "lookahead", -1),
        (PRMBeamSearch, "aggregate", "median"),
        (PRMBeamSearch, "scored_steps", -1),
        (DVTS, "num_beams", 15),
        (REBASE, "width", 0),
        (REBASE, "balance_temperature", 0.0),
        (ETS, "lambda_b", -1.0),
        (ETS, "lambda_d", math.nan),
        (ETS, "cluster_distance", "near"),
        (ETS, "embed", 3),
        (StepBeamSearch, "step_beam_width", 0),
        (StepBeamSearch, "num_samples", 0),
    ],
)
def test_bad_settings_are_named(kind: Any, setting: str, value: object) -> None:
    with pytest.raises(InvalidInput, match=setting):
        kind(**{"reward": by_text(len), setting: value})
