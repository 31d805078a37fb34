"""Documents ranked one by one, by yes against no."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forktree.ops.token_request import TokenRequest
from forktree.search.context import SearchContext
from forktree.search.request import score_tokens
from forktree.search.rerank.base import Ranking, Reranker, check_labels, check_template, filled, label_tokens
from forktree.search.validation import check_choice


@dataclass(frozen=True, kw_only=True)
class Pointwise(Reranker):
    """One document at a time, by a label for yes against one for no (ProRank, Li et al. 2025).

    Args:
        template: the prompt, with `{query}` and `{document}`.
        labels: for yes and for no, such as "1" and "0".
        score: "margin", the difference of their logits, or "probability", of yes among both.
    """

    template: str = (
        "Does the document answer the query? Answer 1 for yes and 0 for no.\nQuery: {query}\nDocument: {document}\n"
        "Answer: "
    )
    labels: Sequence[str] = ("1", "0")
    score: str = "margin"

    def __post_init__(self) -> None:
        check_template("template", self.template, "query", "document")
        check_labels(self.labels, 2)
        check_choice("score", self.score, ("margin", "probability"))

    async def rank(self, context: SearchContext, query: str, documents: Sequence[str]) -> Ranking:
        """See `Reranker`."""
        prompts = [filled(self.template, query=query, document=document) for document in documents]
        ids = label_tokens(context, prompts[0], self.labels)
        found = await score_tokens([context.open(prompt) for prompt in prompts], TokenRequest(select=ids))
        yes, no = found.selected_logits.double().cpu().numpy().T
        margin = yes - no
        return Ranking.by_score(documents, margin if self.score == "margin" else 1 / (1 + np.exp(-margin)))
