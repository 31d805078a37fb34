"""Judges: rewards for which the model, or another one, is asked a question of its own about finished texts.

A reward is answered by the engine in one pass. A judge opens prompts and has them answered, as a search does:

    BestOfN(reward=CritiqueVotes(template="...{prompt}...{response}...Correct? ", num_votes=8))

What fails for one text, such as a prompt that is too long or answers that say nothing, is an error of that text.
"""

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

import numpy as np
import torch

from forktree.checks import integer, number
from forktree.errors import InvalidInput, RewardError
from forktree.kv import Branch
from forktree.ops.sampling import Sampling
from forktree.ops.token_request import TokenRequest
from forktree.rewards.base import PendingReward, Reward, RewardInput, Rewards, check_reward
from forktree.search.context import SearchContext
from forktree.search.request import extend, reward_branches, score_tokens
from forktree.types import Float64Array

GREEDY = Sampling(temperature=0)


class Judge(Reward):
    """A reward that asks a model questions: for searches of finished texts, such as best-of-n and votes."""

    @abstractmethod
    async def judge(self, texts: Sequence[str], context: SearchContext) -> Rewards:
        """Rewards of responses to the search's prompt, `[n]`."""

    def start(self, given: RewardInput) -> PendingReward:
        """Raises InvalidInput: the engine cannot answer a judge."""
        name = type(self).__name__
        raise InvalidInput(f"{name} writes text to judge one: expected a search of finished texts, such as BestOfN")


# ---------------------------------------------------------------- asking


@dataclass(frozen=True)
class Replies:
    """What a model says to several prompts.

    Args:
        branches: of each prompt its replies, `[n][num_samples]`; none where there is an error.
        texts: likewise.
        errors: of each prompt why it has no reply, None if it has. `[n]`.
    """

    branches: list[list[Branch]]
    texts: list[list[str]]
    errors: list[RewardError | None]


async def ask(
    context: SearchContext,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    stop: Sequence[str] = (),
    model: str = "main",
) -> Replies:
    """Has several prompts answered side by side; what they share is computed once.

    Replies keep to the search's budget: where tokens are short, each has an equal share.

    Args:
        context: that of the search.
        prompts: texts, `[n]`.
        sampling: how replies are sampled.
        max_new_tokens: maximum number of tokens of a reply.
        num_samples: replies to each prompt.
        stop: texts that end a reply.
        model: "main", or one of the decoder's `models`.
    """
    roots, errors = opened(context, prompts, model)
    branches = [root.fork(num_samples) if root is not None else [] for root in roots]
    asked = [branch for some in branches for branch in some]
    limits = context.budget.limit_tokens(np.full(len(asked), max_new_tokens))
    some = [branch for branch, limit in zip(asked, limits, strict=True) if limit]
    if some:
        await extend(
            some,
            sampling,
            max_tokens=limits[limits > 0],
            eos_token_ids=context.eos_token_ids,
            stop=context.stop_at(*stop),
            pad_token_id=context.pad_token_id,
        )
    texts = []
    for root, some in zip(roots, branches, strict=True):
        said = [decoded(branch.tokens[root.length :].tolist(), context) for branch in some if root is not None]
        texts.append(said)
        if root is not None:
            root.drop()
    return Replies(branches, texts, errors)


def opened(
    context: SearchContext, prompts: Sequence[str], model: str
) -> tuple[list[Branch | None], list[RewardError | None]]:
    """A branch for each of `prompts`, or why there is none."""
    roots: list[Branch | None] = []
    errors: list[RewardError | None] = []
    for i, prompt in enumerate(prompts):
        try:
            root, error = context.open(prompt, model), None
        except InvalidInput as wrong:
            root, error = None, RewardError(f"the judge's prompt {i} cannot be asked: {wrong}")
        roots.append(root)
        errors.append(error)
    return roots, errors


def decoded(tokens: Sequence[int], context: SearchContext) -> str:
    """The text of a reply.

    Raises:
        InvalidInput: the decoder has no tokenizer.
    """
    if context.decode is None:
        raise InvalidInput("a judge reads text: expected a Decoder with a tokenizer, got tokenizer=None")
    return context.decode(np.asarray(tokens, np.int32)) or ""


# ---------------------------------------------------------------- parsing


def yes_no(reply: str) -> float | None:
    """1 or 0 by the last word Yes or No of a reply, in any case; None if there is neither."""
    found = re.findall(r"\b(yes|no)\b", reply, re.IGNORECASE)
    return float(found[-1].lower() == "yes") if found else None


def ratings(reply: str) -> list[float] | None:
    r"""The numbers in the last `\boxed{...}` of a reply, or else in its last line that has any; None if none has."""
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", reply)
    for line in (boxes[-1:] or reply.splitlines())[::-1]:
        found = re.findall(r"\d+(?:\.\d+)?", line)
        if found:
            return [float(x) for x in found]
    return None


# ---------------------------------------------------------------- judges


class CritiqueVotes(Judge):
    """Verification by votes (GenRM; Singhi et al. 2025, "When To Solve, When To Verify"): the mean of several verdicts.

    Every text is verified `num_votes` times, each verification a sample of its own; what is read from each is averaged.
    With a budget B for S solutions and V verifications of λ solutions' length each, S (1 + λ V) is at most B.

    Args:
        template: text with `{prompt}` and `{response}`; prompt and template before the response are computed once.
        num_votes: V, verifications of a text; the paper has up to 32.
        max_new_tokens: maximum number of tokens of a verification.
        temperature: at which verifications are sampled.
        stop: texts that end a verification.
        verdict: its text -> a number, None if it says nothing; by default 1 or 0 by the last "Yes" or "No". What says
            nothing, or makes this raise, has no vote.
        model: "main", or one of the decoder's `models`.
    """

    def __init__(
        self,
        template: str,
        *,
        num_votes: int = 32,
        max_new_tokens: int = 1024,
        temperature: float = 0.7,
        stop: Sequence[str] = (),
        verdict: Callable[[str], float | None] = yes_no,
        model: str = "main",
    ) -> None:
        self._template = check_template(template, "response")
        self._votes = integer("num_votes", num_votes, 1)
        self._tokens = integer("max_new_tokens", max_new_tokens, 1)
        self._sampling, self._stop, self._verdict, self._model = Sampling(temperature), tuple(stop), verdict, model

    async def judge(self, texts: Sequence[str], context: SearchContext) -> Rewards:
        """See `Judge`."""
        prompts = [filled(self._template, prompt=context.prompt, response=text) for text in texts]
        replies = await ask(
            context,
            prompts,
            self._sampling,
            max_new_tokens=self._tokens,
            num_samples=self._votes,
            stop=self._stop,
            model=self._model,
        )
        values, errors = np.full(len(texts), np.nan), list(replies.errors)
        for i, said in enumerate(replies.texts):
            votes = [vote for reply in said if (vote := _read(self._verdict, reply)) is not None]
            if votes:
                values[i] = np.mean(votes)
            elif errors[i] is None:
                errors[i] = RewardError(f"no verdict among {len(said)} verifications, the first says {said[0][:80]!r}")
        context.trace.record("judge", replies=replies.texts, rewards=values, errors=errors)
        drop(replies)
        return Rewards(values, errors)


class GroupCritique(Judge):
    r"""A generalist reward model (Liu et al. 2025, DeepSeek-GRM): several critiques, each of all texts at once, summed.

    A prompt holds the question and all responses, in another order for every critique; the critique ends with a rating
    of each. A text's reward is the sum of its ratings over critiques. Critiques that do not rate all texts are left
    out. With a meta reward model only the best of the rest are kept, half of `num_votes`. Reconstructed: that responses
    are shuffled, and how they are shown: as `[Response 1]` and so on, each on lines of its own.

    Args:
        template: text with `{prompt}` and `{responses}`.
        num_votes: V, critiques.
        max_new_tokens: maximum number of tokens of a critique.
        temperature: at which critiques are sampled.
        stop: texts that end a critique.
        parse: text of a critique -> a number for each response in the order shown, None if it has none; by default the
            numbers in its last \boxed{...}, or else of its last line with numbers.
        meta: rewards critiques, which it sees as responses to the judge's prompt.
        model: "main", or one of the decoder's `models`.
    """

    def __init__(
        self,
        template: str,
        *,
        num_votes: int = 8,
        max_new_tokens: int = 1024,
        temperature: float = 0.7,
        stop: Sequence[str] = (),
        parse: Callable[[str], Sequence[float] | None] = ratings,
        meta: Reward | None = None,
        model: str = "main",
    ) -> None:
        self._template = check_template(template, "responses")
        self._votes = integer("num_votes", num_votes, 1)
        self._tokens = integer("max_new_tokens", max_new_tokens, 1)
        self._sampling, self._stop, self._parse, self._model = Sampling(temperature), tuple(stop), parse, model
        if meta is not None:
            check_reward(meta)
        self._meta = meta

    async def judge(self, texts: Sequence[str], context: SearchContext) -> Rewards:
        """See `Judge`."""
        n = len(texts)
        orders = [context.rng.permutation(n) for _ in range(self._votes)]
        prompts = [
            filled(self._template, prompt=context.prompt, responses=numbered([texts[i] for i in order]))
            for order in orders
        ]
        tokens, stop = self._tokens, self._stop
        replies = await ask(context, prompts, self._sampling, max_new_tokens=tokens, stop=stop, model=self._model)
        rated: list[tuple[Branch, Float64Array]] = []
        for order, branches, said in zip(orders, replies.branches, replies.texts, strict=True):
            found = _read_all(self._parse, said[0], n) if said else None
            if found is not None:
                scores = np.empty(n)
                scores[order] = found
                rated.append((branches[0], scores))
        kept = rated
        if self._meta is not None and rated:
            worth = (await reward_branches([branch for branch, _ in rated], self._meta)).values
            best = np.argsort(-np.where(np.isnan(worth), -np.inf, worth), kind="stable")
            kept = [rated[i] for i in best[: max(1, self._votes // 2)]]
        values = np.sum([scores for _, scores in kept], axis=0) if kept else np.full(n, np.nan)
        nothing = RewardError(f"none of {self._votes} critiques rates {n} texts")
        why = next(filter(None, replies.errors), nothing)
        errors = [None if kept else why] * n
        context.trace.record("judge", replies=replies.texts, rewards=values, errors=errors)
        drop(replies)
        return Rewards(values, errors)


class Checklist(Judge):
    """CHOPS (Khairi et al. 2025): one call writes a checklist for the task and then names the best of all texts.

    The model sees the question and all texts, lettered; it writes a checklist, and after `question` the probabilities
    of the letters are read, which are the rewards. One call, for however many texts.

    Args:
        template: text with `{prompt}` and `{responses}`, which asks for the checklist.
        question: goes on after the checklist; a letter follows it, as one token.
        max_new_tokens: maximum number of tokens of the checklist.
        stop: texts that end the checklist.
        model: "main", or one of the decoder's `models`.
    """

    def __init__(
        self,
        template: str,
        *,
        question: str = "\nThe best response is: ",
        max_new_tokens: int = 512,
        stop: Sequence[str] = (),
        model: str = "main",
    ) -> None:
        self._template = check_template(template, "responses")
        self._tokens = integer("max_new_tokens", max_new_tokens, 1)
        self._question, self._stop, self._model = question, tuple(stop), model

    async def judge(self, texts: Sequence[str], context: SearchContext) -> Rewards:
        """See `Judge`."""
        n = len(texts)
        if n > len(ascii_uppercase):
            raise InvalidInput(f"a checklist judge letters its texts A to Z: expected at most 26, got {n}")
        letters = label_tokens(context, self._question, ascii_uppercase[:n])
        shown = numbered(texts, ascii_uppercase)
        prompt = filled(self._template, prompt=context.prompt, responses=shown)
        tokens, stop = self._tokens, self._stop
        replies = await ask(context, [prompt], GREEDY, max_new_tokens=tokens, stop=stop, model=self._model)
        if replies.errors[0] is not None:
            return Rewards(np.full(n, np.nan), [replies.errors[0]] * n)
        (branch,) = replies.branches[0]
        branch.append(encoded(context, self._question))
        select = torch.tensor(letters, device=context.device)
        found = await score_tokens([branch], TokenRequest(select=select))
        values = found.selected_logits[0].double().softmax(dim=-1).cpu().numpy()
        context.trace.record("judge", replies=replies.texts, rewards=values, errors=[None] * n)
        drop(replies)
        return Rewards(values, [None] * n)


class QueryLikelihood(Judge):
    """Time reversal (Varun et al. 2024, TRLM): how likely the query is, given the response.

    `sum_t log P(q_t | template(response), q_<t) / |q|^length_penalty`, by the model itself or another one that is asked
    "which question has this answer?". The query is what differs least: its tokens are scored in one pass.

    Args:
        template: text with `{response}`, before which the query's text follows.
        query: the query's text; by default the search's prompt.
        length_penalty: the exponent on the query's length; 1 is per token.
        model: "main", or one of the decoder's `models`.
    """

    def __init__(
        self,
        template: str = "{response}\nThe question was:\n",
        *,
        query: str | None = None,
        length_penalty: float = 1.0,
        model: str = "main",
    ) -> None:
        self._template = check_template(template, "response")
        self._penalty = number("length_penalty", length_penalty, "not negative", lambda value: value >= 0)
        self._query, self._model = query, model

    async def judge(self, texts: Sequence[str], context: SearchContext) -> Rewards:
        """See `Judge`."""
        query = encoded(context, context.prompt if self._query is None else self._query)
        if not query:
            raise InvalidInput("query must have a token at least, got an empty text: give QueryLikelihood a query")
        prompts = [filled(self._template, prompt=context.prompt, response=text) for text in texts]
        roots, errors = opened(context, prompts, self._model)
        asked = [root for root in roots if root is not None]
        values = np.full(len(texts), np.nan)
        if asked:
            since = [root.length - 1 for root in asked]
            for root in asked:
                root.append(query[:-1])
            targets = torch.tensor(query * len(asked), device=context.device)
            found = await score_tokens(asked, TokenRequest(targets=targets), since=since)
            log_probs = found.scores.target_log_probs.double().cpu().numpy().reshape(len(asked), len(query))
            values[[root is not None for root in roots]] = log_probs.sum(axis=1) / len(query) ** self._penalty
            for root in asked:
                root.drop()
        context.trace.record("judge", replies=[], rewards=values, errors=errors)
        return Rewards(values, errors)


# ---------------------------------------------------------------- templates


def check_template(template: str, *fields: str) -> str:
    """Returns `template`; raises InvalidInput unless it is a text with all of these fields."""
    if not isinstance(template, str) or not all(f"{{{field}}}" in template for field in fields):
        names = " and ".join(f"{{{field}}}" for field in fields)
        raise InvalidInput(f"template must be a text with {names}, got {template!r:.80}")
    return template


def filled(template: str, **fields: str) -> str:
    """`template` with its fields, in one pass: braces in what is put in mean nothing."""
    return re.sub("|".join(rf"\{{{name}\}}" for name in fields), lambda found: fields[found[0][1:-1]], template)


def numbered(texts: Sequence[str], names: Sequence[str] = ()) -> str:
    """Responses one after the other, each under a line with its number or name."""
    return "\n\n".join(f"[Response {names[i] if names else i + 1}]\n{text}" for i, text in enumerate(texts))


def encoded(context: SearchContext, text: str) -> list[int]:
    """Token ids of a text that goes on after others.

    Raises:
        InvalidInput: the decoder has no tokenizer.
    """
    if context.encode is None:
        raise InvalidInput("a judge asks in text: expected a Decoder with a tokenizer, got tokenizer=None")
    return context.encode(text)


def label_tokens(context: SearchContext, before: str, labels: Sequence[str]) -> list[int]:
    """The token of each label after a text.

    Raises:
        InvalidInput: a label is not one token there, or two have the same.
    """
    start, found = encoded(context, before), dict[int, str]()
    for label in labels:
        ids = encoded(context, before + label)
        if ids[:-1] != start:
            raise InvalidInput(f"label {label!r} must be one token after {before!r}, got tokens {ids[len(start):]}")
        if ids[-1] in found:
            raise InvalidInput(f"labels must have tokens of their own, got {ids[-1]} for {found[ids[-1]]} and {label}")
        found[ids[-1]] = label
    return list(found)


def drop(replies: Replies) -> None:
    """Ends the branches of replies that are no longer needed."""
    for some in replies.branches:
        for branch in some:
            branch.drop()


def _read(read: Callable[[str], float | None], reply: str) -> float | None:
    """What a function of the user's own reads from a reply; None if it raises or gives no finite number."""
    try:
        value = read(reply)
        return float(value) if value is not None and np.isfinite(float(value)) else None
    except Exception:
        return None


def _read_all(read: Callable[[str], Sequence[float] | None], reply: str, n: int) -> Float64Array | None:
    """Likewise n numbers."""
    try:
        values = np.asarray(read(reply), np.float64)
    except Exception:
        return None
    return values if values.shape == (n,) and np.isfinite(values).all() else None
