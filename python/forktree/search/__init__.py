"""Searches: frozen configurations, each an async function over branches plus pure functions on arrays."""

from forktree.search.algorithms.adaptive import AdaptiveVote
from forktree.search.algorithms.beam import BeamSearch
from forktree.search.algorithms.mbr import MinimumBayesRisk
from forktree.search.algorithms.particle import ParticleFilter
from forktree.search.algorithms.rpc import PerplexityConsistency
from forktree.search.algorithms.sample import BestOfN, Greedy, Sample
from forktree.search.algorithms.vote import BestOfMajority, MajorityOfTheBests, MajorityVote, WeightedVote
from forktree.search.base import Hypothesis, Search, SearchContext

__all__ = [
    "AdaptiveVote",
    "BeamSearch",
    "BestOfMajority",
    "BestOfN",
    "Greedy",
    "Hypothesis",
    "MajorityOfTheBests",
    "MajorityVote",
    "MinimumBayesRisk",
    "ParticleFilter",
    "PerplexityConsistency",
    "Sample",
    "Search",
    "SearchContext",
    "WeightedVote",
]
