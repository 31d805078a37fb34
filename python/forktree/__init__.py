"""forktree: search-time decoding of language models over a prefix-shared KV cache."""

import importlib
from typing import TYPE_CHECKING, Any

# First, and before forktree._core: both then use one OpenMP runtime, the one torch brings.
import torch  # noqa: F401

from forktree import ops
from forktree.errors import (
    Cancelled,
    ForktreeError,
    InvalidInput,
    NonFinite,
    OutOfMemory,
    ScorerError,
    UnsupportedModel,
)
from forktree.ops.sampling import Sampling
from forktree.ops.token_request import Draw, Edits, Head, Ragged, TokenRequest, TokenScores
from forktree.plan.layout import TreeLayout
from forktree.plan.plan import AttentionPlan, check_plan, plan

if TYPE_CHECKING:
    from forktree import rewards, search
    from forktree.decoder import Candidate, Decoder, SearchResult
    from forktree.integrations.generate import generate
    from forktree.rewards.scoring import RewardModel, Scorer, TextScorer, TokenLogits, ValueHead, load_scorer
    from forktree.rewards.step_format import StepFormat
    from forktree.search import BeamSearch, BestOfN, Greedy, Hypothesis, MajorityVote, ParticleFilter, Sample
    from forktree.sequences import sequence_logprobs

__version__ = "0.5.0"

__all__ = [
    "AttentionPlan",
    "BeamSearch",
    "BestOfN",
    "Cancelled",
    "Candidate",
    "Decoder",
    "Draw",
    "Edits",
    "ForktreeError",
    "Greedy",
    "Head",
    "Hypothesis",
    "InvalidInput",
    "MajorityVote",
    "NonFinite",
    "OutOfMemory",
    "ParticleFilter",
    "Ragged",
    "RewardModel",
    "Sample",
    "Sampling",
    "Scorer",
    "ScorerError",
    "SearchResult",
    "StepFormat",
    "TextScorer",
    "TokenLogits",
    "TokenRequest",
    "TokenScores",
    "TreeLayout",
    "UnsupportedModel",
    "ValueHead",
    "check_plan",
    "generate",
    "load_scorer",
    "ops",
    "plan",
    "rewards",
    "search",
    "sequence_logprobs",
]

# Loaded when first asked for: who calls the operations alone needs no search, and transformers takes seconds to import.
_LAZY = {
    "BeamSearch": "search",
    "BestOfN": "search",
    "Candidate": "decoder",
    "Decoder": "decoder",
    "Greedy": "search",
    "Hypothesis": "search",
    "MajorityVote": "search",
    "ParticleFilter": "search",
    "RewardModel": "rewards.scoring",
    "Sample": "search",
    "Scorer": "rewards.scoring",
    "SearchResult": "decoder",
    "StepFormat": "rewards.step_format",
    "TextScorer": "rewards.scoring",
    "TokenLogits": "rewards.scoring",
    "ValueHead": "rewards.scoring",
    "generate": "integrations.generate",
    "load_scorer": "rewards.scoring",
    "sequence_logprobs": "sequences",
}
_LAZY_PACKAGES = ("rewards", "search")

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _LAZY_PACKAGES:
            return importlib.import_module(f"forktree.{name}")
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"forktree.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
