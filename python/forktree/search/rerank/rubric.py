"""Documents ranked by scores that the model writes."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forktree.checks import integer, number
from forktree.errors import RewardError
from forktree.ops.sampling import Sampling
from forktree.search.context import SearchContext
from forktree.search.request import extend
from forktree.search.rerank.base import Ranking, Reranker, check_template, decoded, filled
from forktree.search.validation import check_texts
from forktree.types import Float64Array


@dataclass(frozen=True, kw_only=True)
class Rubric(Reranker):
    """The model reasons by a rubric and writes a score; several samples are averaged (Retro*, Lan et al. 2025).

    The score of a document is the mean of those that can be read, equally weighted (mean-score@k) or by
    `exp(mean log-prob)` of their texts. There is no vote, as scores hardly ever agree. A document without any has an
    error and comes last.

    Args:
        num_samples: texts written for each document.
        temperature: of these.
        top_p: likewise.
        max_new_tokens: maximum number of tokens of each.
        weighted: whether a text's score counts by how likely the text is.
        template: the prompt, with `{query}` and `{document}`; the rubric and the query come first, to be shared.
        before, after: what stands around the score, which is a number from 0 to `highest`.
        highest: the best score.
    """

    num_samples: int = 16
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 512
    weighted: bool = False
    template: str = (
        "Rate how useful the document is for the query: 80 to 100 it answers the query, 60 to 79 it helps a lot, 40 to "
        "59 it helps, 20 to 39 it is loosely related, 0 to 19 it is not related. Analyse the query, then the document, "
        "and end with <score>a number from 0 to 100</score>.\nQuery: {query}\nDocument: {document}\nAnalysis:"
    )
    before: str = "<score>"
    after: str = "</score>"
    highest: float = 100.0

    def __post_init__(self) -> None:
        check_template("template", self.template, "query", "document")
        check_texts("before and after", (self.before, self.after))
        integer("num_samples", self.num_samples, 1)
        integer("max_new_tokens", self.max_new_tokens, 1)
        number("highest", self.highest, "finite and more than 0", lambda x: x > 0)
        _ = self.sampling

    @property
    def sampling(self) -> Sampling:
        """How tokens are sampled."""
        return Sampling(self.temperature, top_p=self.top_p)

    async def rank(self, context: SearchContext, query: str, documents: Sequence[str]) -> Ranking:
        """See `Reranker`."""
        roots = [context.open(filled(self.template, query=query, document=document)) for document in documents]
        forks = [fork for root in roots for fork in root.fork(self.num_samples)]
        begins = np.repeat([root.length for root in roots], self.num_samples)
        done = await extend(
            forks,
            self.sampling,
            max_tokens=self.max_new_tokens,
            eos_token_ids=context.eos_token_ids,
            stop=context.stop_at(self.after),
            pad_token_id=context.pad_token_id,
        )
        texts = [decoded(context, fork, begin) for fork, begin in zip(forks, begins.tolist(), strict=True)]
        values = np.array([read_score(text, self.before, self.after, self.highest) for text in texts])
        weights = np.exp(done.log_prob / done.num_tokens) if self.weighted else np.ones(len(values))
        shape = (len(documents), self.num_samples)
        scores = integrated(values.reshape(shape), weights.reshape(shape))
        errors = [
            RewardError(f"none of {self.num_samples} texts gives a score for document {i}") if math.isnan(s) else None
            for i, s in enumerate(scores.tolist())
        ]
        return Ranking.by_score(documents, scores, errors)


def read_score(text: str, before: str, after: str, highest: float) -> float:
    """The last number between `before` and `after`; NaN if there is none from 0 to `highest`."""
    found = re.findall(re.escape(before) + r"\s*(-?\d+(?:\.\d+)?)\s*" + re.escape(after), text)
    value = float(found[-1]) if found else math.nan
    return value if 0 <= value <= highest else math.nan


def integrated(values: Float64Array, weights: Float64Array) -> Float64Array:
    """Weighted mean of each row of `values [n, k]`, without those that are NaN; NaN if all are. `[n]`."""
    there = ~np.isnan(values)
    mass = np.where(there, weights, 0).sum(axis=1)
    total = np.where(there, weights * np.where(there, values, 0), 0).sum(axis=1)
    return np.divide(total, mass, out=np.full(len(values), np.nan), where=mass > 0)
