"""Answers ranked by many passages of evidence."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from forktree.checks import integer, shown
from forktree.errors import InvalidInput, RewardError
from forktree.ops.sampling import Sampling
from forktree.ops.token_request import TokenRequest
from forktree.search.context import SearchContext
from forktree.search.request import extend, score_tokens
from forktree.search.rerank.base import Ranking, Reranker, check_template, decoded, filled
from forktree.search.validation import check_choice
from forktree.types import Float64Array

EVIDENCE_SCORES = ("direct", "channel", "retrieval", "product", "marginal")


@dataclass(frozen=True, kw_only=True)
class Evidence(Reranker):
    """Answers from many passages, the best one first (Lazaridou et al. 2022, "Internet-augmented language models").

    Documents are passages of evidence. Answers are sampled after each; every different answer is then scored with every
    passage. With the log-probs of a token on average, and r the softmax of `retrieval`:

        direct      log P(answer | passage, query)
        channel     log P(query | passage, answer)
        retrieval   log r(passage | query)
        product     the sum of these three, weighted by `weights` (product of experts)
        marginal    log of the sum over passages of r(passage | query) P(answer | passage, query), whole texts

    The first four are of a passage and an answer; an answer counts by its best passage. Weights and means per token are
    a reconstruction, as the paper fits its weights to held-out questions.

    Args:
        num_answers: answers sampled after each passage.
        temperature: of these.
        max_answer_tokens: maximum number of tokens of an answer, which ends with its line.
        score: one of those above.
        weights: of direct, channel and retrieval.
        retrieval: score of each passage, such as a retriever's log-probs; None: all are alike.
        template: the prompt, with `{query}` and `{document}`; the answer follows.
        channel: the same for the query, with `{document}` and `{answer}`; the query follows.
    """

    num_answers: int = 4
    temperature: float = 0.5
    max_answer_tokens: int = 32
    score: str = "product"
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    retrieval: Sequence[float] | None = None
    template: str = "Evidence: {document}\nQuestion: {query}\nAnswer:"
    channel: str = "Evidence: {document}\nAnswer:{answer}\nQuestion:"

    def __post_init__(self) -> None:
        integer("num_answers", self.num_answers, 1)
        integer("max_answer_tokens", self.max_answer_tokens, 1)
        check_choice("score", self.score, EVIDENCE_SCORES)
        check_template("template", self.template, "query", "document")
        check_template("channel", self.channel, "document", "answer")
        if len(self.weights) != 3:
            raise InvalidInput(f"weights must be three, of direct, channel and retrieval, got {shown(self.weights)}")
        _ = Sampling(self.temperature)

    async def rank(self, context: SearchContext, query: str, documents: Sequence[str]) -> Ranking:
        """The items are the different answers, the most frequent first."""
        given = [0.0] * len(documents) if self.retrieval is None else list(self.retrieval)
        if len(given) != len(documents):
            raise InvalidInput(f"retrieval must be a score for each of {len(documents)} documents, got {len(given)}")
        retrieval = np.array(given, np.float64)
        retrieval -= retrieval.max() + np.log(np.exp(retrieval - retrieval.max()).sum())
        prompts = [filled(self.template, query=query, document=document) for document in documents]
        answers = await self._answers(context, prompts)
        if not answers:
            raise RewardError(f"none of {len(documents)} passages led to an answer")
        shape = (len(documents), len(answers))
        pairs = [(prompt, answer) for prompt in prompts for answer in answers]
        log_prob, tokens = await _text_log_probs(context, pairs)
        channel = np.zeros(len(tokens))
        if self.score in ("channel", "product"):
            asked = [filled(self.channel, document=d, answer=answer) for d in documents for answer in answers]
            whole, length = await _text_log_probs(context, [(prompt, query) for prompt in asked])
            channel = whole / length
        found = (values.reshape(shape) for values in (log_prob, tokens, channel))
        scores = evidence_scores(self.score, *found, retrieval=retrieval, weights=self.weights)
        return Ranking.by_score(answers, scores)

    async def _answers(self, context: SearchContext, prompts: Sequence[str]) -> list[str]:
        """The different answers that are sampled, the most frequent first."""
        roots = [context.open(prompt) for prompt in prompts]
        forks = [fork for root in roots for fork in root.fork(self.num_answers)]
        begins = [root.length for root in roots for _ in range(self.num_answers)]
        await extend(
            forks,
            Sampling(self.temperature),
            max_tokens=self.max_answer_tokens,
            eos_token_ids=context.eos_token_ids,
            stop=context.stop_at("\n"),
            pad_token_id=context.pad_token_id,
        )
        lines = [decoded(context, fork, begin).split("\n")[0] for fork, begin in zip(forks, begins, strict=True)]
        for fork in forks:
            fork.drop()
        return [text for text, _ in Counter(line for line in lines if line.strip()).most_common()]


def evidence_scores(
    score: str,
    log_prob: Float64Array,
    tokens: Float64Array,
    channel: Float64Array,
    *,
    retrieval: Float64Array,
    weights: Sequence[float],
) -> Float64Array:
    """Scores of answers, `[A]`.

    Args:
        score: one of `EVIDENCE_SCORES`.
        log_prob: of each answer after each passage, `[P, A]`.
        tokens: of each answer, `[P, A]`.
        channel: log-prob per token of the query after each, `[P, A]`.
        retrieval: log r of each passage, `[P]`.
        weights: of direct, channel and retrieval.
    """
    direct, prior = log_prob / tokens, retrieval[:, None] + np.zeros_like(log_prob)
    if score == "marginal":
        return np.asarray(np.logaddexp.reduce(prior + log_prob, axis=0))
    product = weights[0] * direct + weights[1] * channel + weights[2] * prior
    return {"direct": direct, "channel": channel, "retrieval": prior, "product": product}[score].max(axis=0)


async def _text_log_probs(
    context: SearchContext, pairs: Sequence[tuple[str, str]]
) -> tuple[Float64Array, Float64Array]:
    """Of each pair the log-prob of the second text after the first, and its number of tokens. `[n]` both."""
    branches, since, targets = [], [], []
    for prompt, text in pairs:
        before, whole = context.open(prompt), context.open(prompt + text)
        tokens, same = whole.tokens, min(before.length, whole.length - 1)
        differs = np.flatnonzero(before.tokens[:same] != tokens[:same])
        first = max(1, int(differs[0]) if len(differs) else same)  # the first token that is not the prompt's
        before.drop()
        whole.rewind(whole.length - 1)  # nothing is asked of what follows the text
        branches.append(whole)
        since.append(first - 1)
        targets.append(tokens[first:])
    request = TokenRequest(targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(context.device))
    found = await score_tokens(branches, request, since=since)
    log_probs = found.scores.target_log_probs.double().cpu().numpy()
    for branch in branches:
        branch.drop()
    return np.add.reduceat(log_probs, found.indptr[:-1]), np.diff(found.indptr).astype(np.float64)
