"""The papers of the library: each has a call that runs and tests that prove it, or is said to be missing.

One line a paper in `PAPERS`: its number, its short name, and a call, or MISSING. The call gives a search, which is run,
or does itself what the paper does and returns anything but None. Its proofs carry `@pytest.mark.proves(number, ...)`,
wherever they are.
"""

import ast
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import tiny
from forktree import (
    BestOfMajority,
    BestOfN,
    Calibrated,
    FunctionReward,
    IdReward,
    MinimumBayesRisk,
    PerplexityConsistency,
    Reward,
    Sample,
)
from forktree.search import (
    ETS,
    EntropicParticleFilter,
    ParticleGibbs,
    PRMBeamSearch,
    PromptLookup,
    Search,
    StepBeamSearch,
)
from forktree.search.algorithms.allocate import ComputeOptimal
from forktree.search.judges import CritiqueVotes, GroupCritique, QueryLikelihood
from forktree.search.rerank import Criteria, Evidence, Listwise, Pointwise, Reranker, Rubric
from markov import MarkovLM

TESTS = Path(__file__).parents[1]
MISSING = None

CHAIN = MarkovLM.random("abcdef", spread=0.7)
REWARD = FunctionReward(lambda prompt, response: response.count("a") / (1 + len(response)))


CODES = IdReward(lambda prompt_ids, ids: ids.count(2) / (1 + len(ids)))
DIGITS = MarkovLM.random("abc0123456789", seed=1)
PAIR = "{query}{document}"
LISTWISE = Listwise(window=2, stride=1, labels=("a", "b"), template="{query}{documents}", line="{label}{document}")
STEPS: dict[str, Any] = dict(step_delimiter="", max_step_tokens=2, max_steps=4)
BEAM = PRMBeamSearch(reward=REWARD, num_beams=4, beam_width=2, lookahead=1, **STEPS)


def last(text: str) -> str | None:
    """An answer: the last letter."""
    return text[-1:] or None


def ranked(how: Reranker) -> list[int]:
    """The order of three documents."""
    return DIGITS.decoder.rerank("ab", ["ca", "12", "b"], how).order


def best(reward: Reward) -> BestOfN:
    return BestOfN(num_samples=4, reward=reward)


def four(critique: str) -> list[float]:
    """Ratings of four responses."""
    return [float(len(critique) % (i + 2)) for i in range(4)]


PAPERS: dict[int, tuple[str, Callable[[], Any] | None]] = {
    1: ("Tree search for agents", MISSING),
    2: ("Dr.LLM", MISSING),
    5: ("Archon", MISSING),
    6: ("ETS", lambda: ETS(reward=REWARD, width=4, **STEPS)),
    11: ("Particle filter / Gibbs", lambda: ParticleGibbs(reward=REWARD, **STEPS)),
    14: ("Llasa", lambda: PRMBeamSearch(reward=CODES, scored_steps=3, **STEPS)),
    15: ("Entropic particles, look-ahead", lambda: EntropicParticleFilter(reward=REWARD, **STEPS)),
    18: ("InfAlign", lambda: best(Calibrated(REWARD))),
    19: ("R2-LLMs", MISSING),
    23: ("A*-decoding", MISSING),
    25: ("Prover search + planner", MISSING),
    28: ("MIRAGE", MISSING),
    31: ("First finish", MISSING),
    32: ("Dynamic experts", MISSING),
    36: ("RetrievalAttention", MISSING),
    37: ("CoLa / PoLar", MISSING),
    40: ("Compute-optimal scaling", lambda: ComputeOptimal(reward=REWARD, searches=[best(REWARD), BEAM], edges=[0.3])),
    41: ("Hogwild!", MISSING),
    43: ("Review, refine, repeat", MISSING),
    44: ("ArcMemo", MISSING),
    46: ("Adaptive inference-time compute", MISSING),
    49: ("PlanGEN", MISSING),
    56: ("Tracing the traces", MISSING),
    58: ("AlphaMath", lambda: StepBeamSearch(reward=REWARD, **STEPS)),
    63: ("Retro-Search", MISSING),
    64: ("RL of Thoughts", MISSING),
    65: ("Stop&Exit for completion", MISSING),
    66: ("RPC", lambda: PerplexityConsistency(answer=last)),
    67: ("SpecReason", MISSING),
    76: ("Large language monkeys", lambda: Sample(num_return_sequences=8)),
    77: ("m1", MISSING),
    78: ("LatentSeek", MISSING),
    79: ("Hedged sampling, MBR", lambda: MinimumBayesRisk()),
    84: ("CoAT", MISSING),
    86: ("Kinetics", MISSING),
    90: ("Metacognitive reuse", MISSING),
    91: ("Autonomous tree search", MISSING),
    97: ("REBEL", lambda: ranked(Criteria(criteria={"a": 0.2}, question="{criterion}"))),
    98: ("Solve–Detect–Verify", MISSING),
    100: ("Generalist reward (GRM)", lambda: best(GroupCritique("{responses}a", parse=four, max_new_tokens=3))),
    102: ("Speculation, Scylla", lambda: Sample(num_return_sequences=2, drafter=PromptLookup())),
    104: ("CRITIC, ATLAS (PORAG)", MISSING),
    106: ("DeepSpeed-FastGen", MISSING),
    115: ("Saffron-1", MISSING),
    116: ("Temperature sampling", MISSING),
    120: ("ATTS", MISSING),
    124: ("SCALE", MISSING),
    125: ("3D scaling", MISSING),
    127: ("Solve or verify", lambda: best(CritiqueVotes("{response}a", verdict=len, max_new_tokens=3))),
    130: ("ThreadWeaver", MISSING),
    131: ("APR", MISSING),
    133: ("ParaThinker", MISSING),
    134: ("Best-of-majority", lambda: BestOfMajority(answer=last, reward=REWARD)),
    136: ("DeepPrune", MISSING),
    149: ("RPC, earlier", lambda: PerplexityConsistency(answer=last, prune=False)),
    153: ("Thinking with nothinking", MISSING),
    156: ("Flover", MISSING),
    159: ("Arbitrage", MISSING),
    165: ("FIRST", lambda: ranked(LISTWISE)),
    167: ("Evidence answers", lambda: ranked(Evidence(template=PAIR, channel="{document}{answer}", num_answers=8))),
    173: ("Time reversal", lambda: best(QueryLikelihood("{response}a"))),
    178: ("ProRank", lambda: ranked(Pointwise(template=PAIR))),
    179: ("Retro*", lambda: ranked(Rubric(template=PAIR, before="", after="a", num_samples=8))),
    182: ("FIRST reproduction", lambda: tiny.decoder("qwen3").rerank("a", ["b", "c", "d"], LISTWISE)),
    183: ("RAIN", MISSING),
}
COUNT = 65


@cache
def proofs() -> dict[int, list[str]]:
    """Of each paper the tests that prove it, as `file::function`; read from the marks in the source."""
    found: dict[int, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for mark in function.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.proves":
                    assert function.name.startswith("test_"), f"{function.name} of {path.name} is no test"
                    for row in mark.args:
                        found.setdefault(ast.literal_eval(row), []).append(f"{path.name}::{function.name}")
    return found


def test_every_paper_is_listed_once_in_order() -> None:
    lines = Path(__file__).read_text().partition("PAPERS: ")[2].partition("\n}\n")[0].splitlines()[1:]
    assert len(lines) == len(PAPERS) == COUNT and list(PAPERS) == sorted(PAPERS)
    assert len({name for name, _ in PAPERS.values()}) == COUNT
    assert set(proofs()) <= set(PAPERS), "a proof of no paper"


@pytest.mark.parametrize("row", PAPERS, ids=lambda row: f"{row} {PAPERS[row][0]}")
def test_a_paper_has_a_call_and_a_proof_or_is_missing(row: int) -> None:
    name, call = PAPERS[row]
    if call is MISSING:
        assert not proofs().get(row), f"{name} is proved: give it a call"
        return
    assert proofs().get(row), f"{name} has a call and no test marked proves({row})"
    made = call()
    if isinstance(made, Search):
        decoder = CHAIN.new_decoder()
        (made,) = decoder.search("a", made, max_new_tokens=12)
        assert made.error is None, made.error
        assert made.candidates and made.trace.events[-1]["event"] == "return"
        tiny.assert_all_returned(decoder.worker)
    assert made is not None
