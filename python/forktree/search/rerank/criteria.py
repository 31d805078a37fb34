"""Documents ranked by relevance and further criteria, a digit each."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from forktree.checks import number, shown
from forktree.errors import InvalidInput
from forktree.rewards.token_probability import TokenProbability
from forktree.search.context import SearchContext
from forktree.search.request import reward_branches
from forktree.search.rerank.base import Ranking, Reranker, check_template, filled, label_tokens
from forktree.search.selection import best_first
from forktree.search.validation import check_texts


@dataclass(frozen=True, kw_only=True)
class Criteria(Reranker):
    """Relevance and further criteria, a digit each (REBEL, Tran et al. 2025).

    Each criterion is asked after the document as one digit from 0 to 9, and its score is the expectation of the digit
    under the model: a token each, where the paper's model writes scores that are then parsed. A document's score is its
    relevance plus the weighted sum of its criteria. The paper's one-turn prompt has these five; it gives no weights.

    Args:
        criteria: weight of each; weights are not negative and sum to at most 1.
        min_relevance: documents below come last, in the order of their scores.
        template: what comes before each question, with `{query}` and `{document}`.
        question: what is asked, with `{criterion}`; "relevance to the query" is asked first.
    """

    criteria: Mapping[str, float] = field(
        default_factory=lambda: dict.fromkeys(("depth", "diversity", "clarity", "authority", "recency"), 0.1)
    )
    min_relevance: float = 3.0
    template: str = "Query: {query}\nDocument: {document}\n"
    question: str = "Rate the document's {criterion} from 0 to 9.\nRating: "

    def __post_init__(self) -> None:
        check_template("template", self.template, "query", "document")
        check_template("question", self.question, "criterion")
        number("min_relevance", self.min_relevance, "finite", lambda x: True)
        if not isinstance(self.criteria, Mapping):
            raise InvalidInput(f"criteria must map criteria to weights, got {shown(self.criteria)}")
        check_texts("criteria", tuple(self.criteria))
        weights = [number(f"weight of {c}", w, "at least 0", lambda x: x >= 0) for c, w in self.criteria.items()]
        if sum(weights) > 1 + 1e-9:
            raise InvalidInput(f"weights of criteria must sum to at most 1, got {sum(weights)}")

    async def rank(self, context: SearchContext, query: str, documents: Sequence[str]) -> Ranking:
        """See `Reranker`."""
        asked = ["relevance to the query", *self.criteria]
        before = [filled(self.template, query=query, document=document) for document in documents]
        prompts = [text + filled(self.question, criterion=criterion) for text in before for criterion in asked]
        digits = label_tokens(context, prompts[0], string.digits).tolist()
        reward = TokenProbability(digits, values=range(10))
        found = await reward_branches([context.open(prompt) for prompt in prompts], reward)
        ratings = found.values.reshape(len(documents), len(asked))
        total = ratings @ np.array([1.0, *self.criteria.values()])
        begins = range(0, len(prompts), len(asked))
        errors = [next(filter(None, found.errors[i : i + len(asked)]), None) for i in begins]
        first = best_first(total)
        enough = ratings[first, 0] >= self.min_relevance
        return Ranking(documents, [*first[enough].tolist(), *first[~enough].tolist()], total.tolist(), errors)
