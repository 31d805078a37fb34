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
    RewardError,
    UnsupportedModel,
)
from forktree.ops.sampling import Sampling
from forktree.ops.token_request import KeyedSampling, LogitEdits, RaggedIds, TokenRequest, TokenScores
from forktree.plan.check import check_plan
from forktree.plan.layout import TreeLayout
from forktree.plan.plan import AttentionPlan, plan_attention

if TYPE_CHECKING:
    from forktree import rewards, search
    from forktree.decoder import Candidate, Decoder, SearchResult
    from forktree.integrations.generate import generate
    from forktree.rewards.base import Reward
    from forktree.rewards.function import FunctionReward
    from forktree.rewards.load import load_reward
    from forktree.rewards.reward_model import RewardModel
    from forktree.rewards.step_format import StepFormat
    from forktree.rewards.token_probability import TokenProbability
    from forktree.rewards.value_head import ValueHead
    from forktree.search import BeamSearch, BestOfN, Greedy, Hypothesis, MajorityVote, ParticleFilter, Sample
    from forktree.sequences import sequence_logprobs

__version__ = "0.6.0"

__all__ = [
    "AttentionPlan",
    "BeamSearch",
    "BestOfN",
    "Cancelled",
    "Candidate",
    "Decoder",
    "ForktreeError",
    "FunctionReward",
    "Greedy",
    "Hypothesis",
    "InvalidInput",
    "KeyedSampling",
    "LogitEdits",
    "MajorityVote",
    "NonFinite",
    "OutOfMemory",
    "ParticleFilter",
    "RaggedIds",
    "Reward",
    "RewardError",
    "RewardModel",
    "Sample",
    "Sampling",
    "SearchResult",
    "StepFormat",
    "TokenProbability",
    "TokenRequest",
    "TokenScores",
    "TreeLayout",
    "UnsupportedModel",
    "ValueHead",
    "check_plan",
    "generate",
    "load_reward",
    "ops",
    "plan_attention",
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
    "FunctionReward": "rewards.function",
    "Greedy": "search",
    "Hypothesis": "search",
    "MajorityVote": "search",
    "ParticleFilter": "search",
    "Reward": "rewards.base",
    "RewardModel": "rewards.reward_model",
    "Sample": "search",
    "SearchResult": "decoder",
    "StepFormat": "rewards.step_format",
    "TokenProbability": "rewards.token_probability",
    "ValueHead": "rewards.value_head",
    "generate": "integrations.generate",
    "load_reward": "rewards.load",
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
