"""forktree: search-time decoding of language models over a prefix-shared KV cache."""

from forktree.decoder import Candidate, Decoder, SearchResult
from forktree.errors import (
    Cancelled,
    ForktreeError,
    InvalidInput,
    NonFinite,
    OutOfMemory,
    ScorerError,
    UnsupportedModel,
)
from forktree.generate import generate
from forktree.layout import TreeLayout
from forktree.plan import AttentionPlan, check_plan, plan
from forktree.sampling import Sampling
from forktree.scoring import RewardModel, Scorer, StepFormat, TextScorer, TokenLogits, ValueHead, load_scorer
from forktree.search import BeamSearch, BestOfN, Greedy, Hypothesis, MajorityVote, ParticleFilter, Sample

__version__ = "0.1.0"

__all__ = [
    "AttentionPlan",
    "BeamSearch",
    "BestOfN",
    "Cancelled",
    "Candidate",
    "Decoder",
    "ForktreeError",
    "Greedy",
    "Hypothesis",
    "InvalidInput",
    "MajorityVote",
    "NonFinite",
    "OutOfMemory",
    "ParticleFilter",
    "RewardModel",
    "Sample",
    "Sampling",
    "Scorer",
    "ScorerError",
    "SearchResult",
    "StepFormat",
    "TextScorer",
    "TokenLogits",
    "TreeLayout",
    "UnsupportedModel",
    "ValueHead",
    "check_plan",
    "generate",
    "load_scorer",
    "plan",
]
