"""What every way of reranking is, and what it returns."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from forktree.checks import shown
from forktree.engine.counters import Counters
from forktree.errors import InvalidInput, RewardError
from forktree.kv import Branch
from forktree.search.base import Hypothesis, Search
from forktree.search.context import SearchContext
from forktree.search.selection import best_first
from forktree.search.validation import check_texts
from forktree.types import Float64Array

_LABEL_CONTEXT = 40  # characters of a prompt that its labels are tokenised after


@dataclass(frozen=True)
class Ranking:
    """A better order.

    Args:
        items: what was ranked: the documents, or the answers that were found in them.
        order: their places, best first; a permutation.
        scores: of each item, higher is better; NaN where there is none.
        errors: of each item why it has no score, None if it has one.
        counters: what it cost.
    """

    items: Sequence[str]
    order: list[int]
    scores: list[float]
    errors: list[RewardError | None]
    counters: Counters = field(default_factory=Counters)

    @classmethod
    def by_score(
        cls, items: Sequence[str], scores: Float64Array, errors: Sequence[RewardError | None] | None = None
    ) -> "Ranking":
        """Highest score first, NaN last; equal ones keep their order."""
        why = list[RewardError | None](errors or [None] * len(items))
        return cls(items, best_first(scores).tolist(), scores.tolist(), why)


class Reranker(ABC):
    """A way to rerank the documents of a query."""

    @abstractmethod
    async def rank(self, context: SearchContext, query: str, documents: Sequence[str]) -> Ranking:
        """Ranks documents, of which there is at least one."""


@dataclass(frozen=True)
class Reranking(Search):
    """The search that `Decoder.rerank` runs for a query; `found` has its ranking afterwards."""

    how: Reranker
    query: str
    documents: Sequence[str]
    found: list[Ranking] = field(default_factory=list)

    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """Nothing is written."""
        self.found.append(await self.how.rank(context, self.query, self.documents))
        return []


def label_tokens(context: SearchContext, prompt: str, labels: Sequence[str]) -> torch.Tensor:
    """The token of each label after a prompt, int64 `[n]`.

    Raises:
        InvalidInput: A label is not one token there, or two are the same.
    """
    tail = prompt[-_LABEL_CONTEXT:]
    before = context.open(tail)
    text, found = before.tokens.tolist(), list[int]()
    for label in labels:
        branch = context.open(tail + label)
        tokens = branch.tokens.tolist()
        branch.drop()
        if tokens[:-1] != text:
            raise InvalidInput(
                f"label {label!r} must be one token after {tail[-12:]!r}, got tokens {tokens[-4:]} after {text[-3:]}: "
                "change labels or the end of the template"
            )
        if tokens[-1] in found:
            same = labels[found.index(tokens[-1])]
            raise InvalidInput(f"labels must be different tokens, got {same!r} and {label!r}")
        found.append(tokens[-1])
    before.drop()
    return torch.tensor(found, device=context.device)


def decoded(context: SearchContext, branch: Branch, begin: int) -> str:
    """Text of a branch from position `begin` on."""
    if context.decode is None:
        raise InvalidInput("reranking reads texts: expected a Decoder with a tokenizer, got tokenizer=None")
    return context.decode(branch.tokens[begin:]) or ""


def filled(template: str, **fields: str) -> str:
    """A template with its fields filled in, whatever braces these have."""
    return re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1], match[0]), template)


def check_template(name: str, template: object, *fields: str) -> None:
    """Raises InvalidInput unless `template` is a text with all of `{fields}`."""
    missing = [f"{{{f}}}" for f in fields if not isinstance(template, str) or f"{{{f}}}" not in template]
    if missing:
        raise InvalidInput(f"{name} must be a text with {', '.join(missing)}, got {shown(template)}")


def check_labels(labels: object, count: int | None = None) -> None:
    """Raises InvalidInput unless `labels` are different texts, so many of them if `count` is given."""
    check_texts("labels", labels)
    assert isinstance(labels, Sequence)
    if len(set(labels)) != len(labels) or "" in labels or len(labels) != (count or len(labels)):
        raise InvalidInput(f"labels must be {'' if count is None else f'{count} '}different texts, got {shown(labels)}")
