"""Searches: frozen configurations, each an async function over branches plus pure functions on arrays."""

from forktree.search.algorithms.beam import BeamSearch
from forktree.search.algorithms.particle import ParticleFilter
from forktree.search.algorithms.sample import BestOfN, Greedy, MajorityVote, Sample
from forktree.search.base import Hypothesis, Search, SearchContext
from forktree.search.drafters import PromptLookup, SuffixDraft, TokenTable
from forktree.search.speculate import Drafter, DraftTree
from forktree.search.trie import TokenTrie

__all__ = [
    "BeamSearch",
    "BestOfN",
    "DraftTree",
    "Drafter",
    "Greedy",
    "Hypothesis",
    "MajorityVote",
    "ParticleFilter",
    "PromptLookup",
    "Sample",
    "Search",
    "SearchContext",
    "SuffixDraft",
    "TokenTable",
    "TokenTrie",
]
