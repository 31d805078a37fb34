"""Rewards of a second model, whose tree mirrors the policy's."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from forktree.errors import InvalidInput, RewardError
from forktree.kv import Branch
from forktree.prompts import encode
from forktree.rewards.base import PendingFromHidden, PendingReward, Reward, RewardInput
from forktree.rewards.step_format import CHAT, REWARD_FORMATS, SEPARATORS, StepFormat, expected_format, named_format
from forktree.rewards.token_probability import TokenProbability
from forktree.rewards.value_head import ValueHead
from forktree.terminal import one_line

if TYPE_CHECKING:
    from forktree.engine.worker import ModelWorker


class RewardModel(Reward):
    """A second model whose tree mirrors the policy's: it reads only tokens that it has not read before.

    A text that cannot be rendered, or is too long for the model, costs its branch only. The mirror needs no
    bookkeeping: the reward model's tree is asked for the longest prefix that it knows, and what was read last stays
    alive until the next call has found its prefixes.

    Args:
        worker: the model's own.
        tokenizer: the model's own.
        head: what reads a reward from the last hidden state: a `ValueHead`, or a `TokenProbability` on the model's own
            logits.
        format: what the model is fed.
        pad_token_id: left out at the end of what is fed, as sequence classifiers of transformers pass over it.
    """

    def __init__(
        self,
        worker: "ModelWorker",
        tokenizer: Any,
        head: "ValueHead | TokenProbability",
        *,
        format: StepFormat | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        head.check(worker)
        if isinstance(head, TokenProbability) and head._suffix:
            raise InvalidInput("a question after a text belongs in the format's template: expected no suffix, got one")
        self._worker, self._tokenizer, self._head = worker, tokenizer, head
        self._format, self._pad_token_id = format or StepFormat(), pad_token_id
        if self._format.template == CHAT and not getattr(tokenizer, "chat_template", None):
            raise InvalidInput("the format's template is 'chat': expected a tokenizer with a chat template, got none")

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        num_slots: int | None = None,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        format: StepFormat | str | None = None,
        activation: str | None = None,
        trust_remote_code: bool = False,
    ) -> "RewardModel":
        """Model, tokenizer and head from one directory of safetensors.

        Warns if the directory's config names a model that is known to be read in another way than `format` says.

        Args:
            directory: where they are.
            num_slots: number of tokens whose KV fits at once; default: by the free memory.
            dtype: of the model; default: that of its weights.
            device: where the model runs.
            format: what is fed and how the reward is read, or its name, one of `REWARD_FORMATS`; default: the prompt,
                the response, and a sigmoid.
            activation: of the head, in place of the format's.
            trust_remote_code: whether Python files of the directory may be run.

        Raises:
            InvalidInput: a file is missing or not what it has to be.
        """
        from forktree.engine.worker import ModelWorker
        from forktree.model.checkpoints import load_model, load_tokenizer

        path = Path(directory)
        expected = expected_format(path)
        chosen = named_format(format) if isinstance(format, str) else format or StepFormat()
        if expected is not None and (format is None or chosen.separator != REWARD_FORMATS[expected[1]].separator):
            warnings.warn(
                f"{path}: {expected[0]} is known to be read by the reward format {expected[1]!r}, got "
                f"{chosen if format is not None else 'no format'}: its rewards may mean nothing",
                stacklevel=2,
            )
        head: ValueHead | TokenProbability
        if not chosen.answers:
            head = ValueHead.load(path, activation=activation or chosen.activation, choice=chosen.choice)
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        if chosen.answers:
            answers = _ids(tokenizer, chosen.answers)
            if len(answers) != 2:
                raise InvalidInput(
                    f"{path}: {chosen.answers!r} must be two tokens, got {len(answers)}: not such a model"
                )
            head = TokenProbability(answers)
        if chosen.separator in SEPARATORS and len(_ids(tokenizer, chosen.separator)) != 1:
            raise InvalidInput(
                f"{path}: the separator {chosen.separator!r} must be one token, its tokenizer makes "
                f"{len(_ids(tokenizer, chosen.separator))} of it: not such a model"
            )
        model = load_model(path, dtype=dtype, base=not chosen.answers, trust_remote_code=trust_remote_code).to(device)
        classifies = expected is not None and expected[0].endswith("ForSequenceClassification")
        pad = model.config.pad_token_id if classifies and not chosen.step_delimiter else None
        return cls(ModelWorker(model, num_slots=num_slots), tokenizer, head, format=chosen, pad_token_id=pad)

    def check(self, worker: "ModelWorker") -> None:
        """See `Reward`."""
        if (found := self._worker.verify()) is not None:
            with self._worker.claim():
                self._worker.renew(*found)
        self._head.check(self._worker)

    def start(self, given: RewardInput) -> PendingReward:
        """See `Reward`."""
        with self._worker.claim():
            return self._begin(given)

    def _begin(self, given: RewardInput) -> PendingReward:
        tree = self._worker.tree
        rewards = self._head.rewards_on(self._worker)
        if not given.branches:
            return PendingFromHidden(self._worker, [], rewards)
        owner = int(given.worker.tree.branch_owner[given.branches[0].id])
        before = tree.owned(owner)
        branches: list[Branch] = []
        errors: list[RewardError | None] = []
        for i, (prompt, response) in enumerate(zip(given.prompts, given.responses(), strict=True)):
            try:
                tokens = self._tokens(prompt, response)
                branches.append(self._worker.open(tokens, owner=owner))
                errors.append(None)
            except Exception as error:  # chat templates and tokenizers may raise anything
                errors.append(RewardError(f"{one_line(error)} (branch {i})"))
        tree.drop(before)
        return PendingFromHidden(self._worker, branches, rewards, errors=errors)

    def _tokens(self, prompt: str, response: str) -> list[int]:
        runner = self._worker.runner
        ids = self._format.tokens(prompt, response, self._tokenizer)
        while ids and ids[-1] == self._pad_token_id:
            ids.pop()
        if not 1 <= len(ids) <= runner.max_position:
            raise InvalidInput(f"the reward model reads 1 to {runner.max_position} tokens, got {len(ids)}")
        bad = next((t for t in ids if not 0 <= t < runner.vocab_size), None)
        if bad is not None:
            raise InvalidInput(f"the reward model embeds token ids in [0, {runner.vocab_size}), got {bad}")
        return ids


def _ids(tokenizer: Any, text: str) -> list[int]:
    (ids,) = encode(tokenizer, [text.strip()], add_special_tokens=False)
    return ids
