"""Searches: frozen configurations, each an async function over branches plus pure functions on arrays."""

from forktree.search.base import Hypothesis, Job, Search
from forktree.search.beam import BeamSearch
from forktree.search.particle import ParticleFilter
from forktree.search.sample import BestOfN, Greedy, MajorityVote, Sample

__all__ = [
    "BeamSearch",
    "BestOfN",
    "Greedy",
    "Hypothesis",
    "Job",
    "MajorityVote",
    "ParticleFilter",
    "Sample",
    "Search",
]
