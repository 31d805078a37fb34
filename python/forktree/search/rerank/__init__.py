"""Reranking: texts in a better order, by what a model finds likely or writes about them.

    ranking = decoder.rerank("who wrote Emma?", passages, Listwise())
    [passages[i] for i in ranking.order]

A way of reranking is a frozen configuration with an async `rank`. All prompts of a query are texts of one search: what
they share is computed once, so instructions and queries come before documents. Templates name `{query}` and
`{document}`; a label is what the model may answer with, one token after the prompt.
"""

from forktree.search.rerank.base import Ranking, Reranker
from forktree.search.rerank.criteria import Criteria
from forktree.search.rerank.evidence import Evidence
from forktree.search.rerank.listwise import Listwise
from forktree.search.rerank.pointwise import Pointwise
from forktree.search.rerank.rubric import Rubric

__all__ = ["Criteria", "Evidence", "Listwise", "Pointwise", "Ranking", "Reranker", "Rubric"]
