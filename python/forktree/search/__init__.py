"""Searches: frozen configurations, each an async function over branches plus pure functions on arrays."""

from forktree.search.algorithms.adaptive import AdaptiveVote
from forktree.search.algorithms.beam import BeamSearch
from forktree.search.algorithms.mbr import MinimumBayesRisk
from forktree.search.algorithms.particle import ParticleFilter
from forktree.search.algorithms.particle_entropic import EntropicParticleFilter
from forktree.search.algorithms.particle_gibbs import ParallelTempering, ParticleGibbs
from forktree.search.algorithms.particle_smc import SMCSteering, TwistedSMC
from forktree.search.algorithms.rpc import PerplexityConsistency
from forktree.search.algorithms.sample import BestOfN, Greedy, Sample
from forktree.search.algorithms.steptree import DVTS, ETS, REBASE, PRMBeamSearch, StepBeamSearch
from forktree.search.algorithms.vote import BestOfMajority, MajorityOfTheBests, MajorityVote, WeightedVote
from forktree.search.base import Hypothesis, Search, SearchContext
from forktree.search.drafters import PromptLookup, SuffixDraft, TokenTable
from forktree.search.speculate import Drafter, DraftTree
from forktree.search.trie import TokenTrie

__all__ = [
    "DVTS",
    "ETS",
    "REBASE",
    "AdaptiveVote",
    "BeamSearch",
    "BestOfMajority",
    "BestOfN",
    "DraftTree",
    "Drafter",
    "EntropicParticleFilter",
    "Greedy",
    "Hypothesis",
    "MajorityOfTheBests",
    "MajorityVote",
    "MinimumBayesRisk",
    "PRMBeamSearch",
    "ParallelTempering",
    "ParticleFilter",
    "ParticleGibbs",
    "PerplexityConsistency",
    "PromptLookup",
    "SMCSteering",
    "Sample",
    "Search",
    "SearchContext",
    "StepBeamSearch",
    "SuffixDraft",
    "TokenTable",
    "TokenTrie",
    "TwistedSMC",
    "WeightedVote",
]
