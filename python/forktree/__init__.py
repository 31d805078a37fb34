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
    from forktree.rewards.calibrated import Calibrated
    from forktree.rewards.function import FunctionReward
    from forktree.rewards.ids import IdReward
    from forktree.rewards.load import load_reward
    from forktree.rewards.reward_model import RewardModel
    from forktree.rewards.step_format import StepFormat
    from forktree.rewards.token_probability import TokenProbability
    from forktree.rewards.value_head import ValueHead
    from forktree.search import (
        DVTS,
        ETS,
        REBASE,
        AdaptiveVote,
        BeamSearch,
        BestOfMajority,
        BestOfN,
        EntropicParticleFilter,
        Greedy,
        Hypothesis,
        MajorityOfTheBests,
        MajorityVote,
        MinimumBayesRisk,
        ParallelTempering,
        ParticleFilter,
        ParticleGibbs,
        PerplexityConsistency,
        PRMBeamSearch,
        Sample,
        SMCSteering,
        StepBeamSearch,
        TwistedSMC,
        WeightedVote,
    )
    from forktree.search.judges import Checklist, CritiqueVotes, GroupCritique, QueryLikelihood
    from forktree.sequences import sequence_logprobs

__version__ = "0.6.0"

__all__ = [
    "DVTS",
    "ETS",
    "REBASE",
    "AdaptiveVote",
    "AttentionPlan",
    "BeamSearch",
    "BestOfMajority",
    "BestOfN",
    "Calibrated",
    "Cancelled",
    "Candidate",
    "Checklist",
    "CritiqueVotes",
    "Decoder",
    "EntropicParticleFilter",
    "ForktreeError",
    "FunctionReward",
    "Greedy",
    "GroupCritique",
    "Hypothesis",
    "IdReward",
    "InvalidInput",
    "KeyedSampling",
    "LogitEdits",
    "MajorityOfTheBests",
    "MajorityVote",
    "MinimumBayesRisk",
    "NonFinite",
    "OutOfMemory",
    "PRMBeamSearch",
    "ParallelTempering",
    "ParticleFilter",
    "ParticleGibbs",
    "PerplexityConsistency",
    "QueryLikelihood",
    "RaggedIds",
    "Reward",
    "RewardError",
    "RewardModel",
    "SMCSteering",
    "Sample",
    "Sampling",
    "SearchResult",
    "StepBeamSearch",
    "StepFormat",
    "TokenProbability",
    "TokenRequest",
    "TokenScores",
    "TreeLayout",
    "TwistedSMC",
    "UnsupportedModel",
    "ValueHead",
    "WeightedVote",
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
    "AdaptiveVote": "search",
    "BeamSearch": "search",
    "BestOfMajority": "search",
    "BestOfN": "search",
    "Calibrated": "rewards.calibrated",
    "Candidate": "decoder",
    "Checklist": "search.judges",
    "CritiqueVotes": "search.judges",
    "DVTS": "search",
    "Decoder": "decoder",
    "ETS": "search",
    "EntropicParticleFilter": "search",
    "FunctionReward": "rewards.function",
    "Greedy": "search",
    "GroupCritique": "search.judges",
    "Hypothesis": "search",
    "IdReward": "rewards.ids",
    "MajorityOfTheBests": "search",
    "MajorityVote": "search",
    "MinimumBayesRisk": "search",
    "PRMBeamSearch": "search",
    "ParallelTempering": "search",
    "ParticleFilter": "search",
    "ParticleGibbs": "search",
    "PerplexityConsistency": "search",
    "QueryLikelihood": "search.judges",
    "REBASE": "search",
    "Reward": "rewards.base",
    "RewardModel": "rewards.reward_model",
    "SMCSteering": "search",
    "Sample": "search",
    "SearchResult": "decoder",
    "StepBeamSearch": "search",
    "StepFormat": "rewards.step_format",
    "TokenProbability": "rewards.token_probability",
    "TwistedSMC": "search",
    "ValueHead": "rewards.value_head",
    "WeightedVote": "search",
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
