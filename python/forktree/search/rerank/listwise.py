"""Documents ranked together, by the letters they go by."""

import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from forktree.checks import integer
from forktree.kv import Branch
from forktree.ops.token_request import TokenRequest
from forktree.search.context import SearchContext
from forktree.search.request import score_tokens
from forktree.search.rerank.base import Ranking, Reranker, check_labels, check_template, filled, label_tokens
from forktree.search.selection import best_first


@dataclass(frozen=True, kw_only=True)
class Listwise(Reranker):
    """Many documents at once, by the logits of their letters alone (Gangi Reddy et al. 2024, "FIRST").

    A window of documents, each with a letter, is sorted by the letters' logits as the next token; windows slide from
    the last documents to the first, so that the best `window - stride` of each take part in the next. Nothing is
    generated. Window 20, stride 10 and cuts at 120 words are those of the reference implementation's experiments.

    Args:
        window: documents of a prompt, at most 26.
        stride: by how many documents the next window begins earlier.
        max_words: documents are cut after so many words.
        template: the prompt, with `{query}` and `{documents}`.
        line: a document in it, with `{label}` and `{document}`.
        labels: a letter for each place in the window.
    """

    window: int = 20
    stride: int = 10
    max_words: int = 120
    template: str = (
        "Rank the passages by how well they answer the query. Answer with the identifiers in brackets, best first.\n"
        "Query: {query}\n{documents}\nQuery: {query}\nRanking: ["
    )
    line: str = "[{label}] {document}\n"
    labels: Sequence[str] = tuple(string.ascii_uppercase)

    def __post_init__(self) -> None:
        check_template("template", self.template, "query", "documents")
        check_template("line", self.line, "label", "document")
        check_labels(self.labels)
        integer("window", self.window, 2, len(self.labels))
        integer("stride", self.stride, 1, self.window)
        integer("max_words", self.max_words, 1)

    async def rank(self, context: SearchContext, query: str, documents: Sequence[str]) -> Ranking:
        """The score of a document is `1 / place`; logits of different windows cannot be compared."""
        order = np.arange(len(documents))
        ids: torch.Tensor | None = None
        before: Branch | None = None
        for begin, end in windows(len(documents), self.window, self.stride):
            lines = [
                filled(self.line, label=label, document=" ".join(documents[i].split()[: self.max_words]))
                for label, i in zip(self.labels, order[begin:end], strict=False)
            ]
            prompt = filled(self.template, query=query, documents="".join(lines))
            if ids is None:
                ids = label_tokens(context, prompt, self.labels[: min(self.window, len(documents))])
            branch = context.open(prompt)
            if before is not None:
                before.drop()  # not until the new one has found what they share
            before = branch
            scores = await score_tokens([branch], TokenRequest(select=ids[: end - begin]))
            logits = scores.selected_logits[0].double().cpu().numpy()
            order[begin:end] = order[begin:end][best_first(logits)]
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        return Ranking.by_score(documents, 1 / (1 + place))


def windows(count: int, window: int, stride: int) -> list[tuple[int, int]]:
    """First and last place, excluded, of each window of FIRST's, from the end to the beginning."""
    found = []
    for end in range(count, 0, -stride):
        found.append((max(0, end - window), end))
        if end <= window:
            break
    return found
