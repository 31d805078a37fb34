"""Scorers: what a search may ask of a text. All answer with one reward a branch.

ValueHead     a linear or two-layer head on the model's own hidden state (costs no forward)
TokenLogits   the probability of one chosen token against others, asked behind an optional question
RewardModel   a second model: base model plus a head read from safetensors, with its own mirrored tree
TextScorer    any Python function of (prompt, response)
"""

import importlib
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from forktree.errors import InvalidInput, ScorerError
from forktree.kv import Branch
from forktree.search.request import Rewards
from forktree.token_scores import Head, TokenRequest
from forktree.transfer import upload

if TYPE_CHECKING:
    from forktree.lane import Lane


@dataclass(frozen=True)
class Subject:
    """What is being scored: branches of the policy, and how to turn them into text."""

    lane: "Lane"
    branches: Sequence[Branch]
    prompt: str
    prompt_length: int  # tokens
    tokenizer: Any  # None when the decoder has none

    def responses(self) -> list[str]:
        """Text of each branch behind the prompt."""
        if self.tokenizer is None:
            raise InvalidInput("this scorer reads text: expected a Decoder with a tokenizer, got tokenizer=None")
        tails = [branch.tokens[self.prompt_length :].tolist() for branch in self.branches]
        return [self.tokenizer.decode(tail, skip_special_tokens=True) for tail in tails]


class Reading(ABC):
    """One answer under way. Hidden readings name branches of a lane; the engine computes them and calls `read`."""

    lane: "Lane | None" = None
    branches: Sequence[Branch] = ()

    @abstractmethod
    def read(self, hidden: Tensor | None) -> Rewards | None:
        """The rewards, or None if they are not ready. hidden `[n, H]`: last hidden state of `branches`."""

    def close(self) -> None:
        """Lets go of what the reading held; called exactly once, however it ends."""
        return None


class Scorer(ABC):
    """Anything that gives branches a reward."""

    @abstractmethod
    def begin(self, subject: Subject) -> Reading:
        """Starts to score. Errors raised here end the search that asked."""

    def check(self, lane: "Lane") -> None:
        """Raises `InvalidInput` if this scorer cannot work on the model of `lane`; called before a run begins."""
        return None


def rewards_of(values: Tensor) -> Rewards:
    """Rewards `[n]` from a tensor; a value that is not finite becomes that branch's error."""
    numbers = values.detach().to("cpu", torch.float64).numpy()
    errors = [
        None if np.isfinite(v) else ScorerError(f"reward of branch {i} must be a finite number, got {v}")
        for i, v in enumerate(numbers)
    ]
    return Rewards(np.where(np.isfinite(numbers), numbers, np.nan), errors)


class _HiddenReading(Reading):
    def __init__(
        self, lane: "Lane", branches: Sequence[Branch], rewards: Callable[[Tensor], Tensor], *, temporary: bool = False
    ) -> None:
        self.lane, self.branches = lane, branches
        self._rewards, self._temporary = rewards, temporary

    def read(self, hidden: Tensor | None) -> Rewards:
        assert hidden is not None
        return rewards_of(self._rewards(hidden))

    def close(self) -> None:
        if self._temporary and self.lane is not None:
            self.lane.tree.drop(self.branches)


class ValueHead(Scorer):
    """A head on the last hidden state: see `Head`.

    weights: one or two pairs (weight `[out, in]`, bias `[out]` or None). activation: "sigmoid", "tanh" or "identity".
    """

    def __init__(self, weights: Sequence[tuple[Tensor, Tensor | None]], *, activation: str = "sigmoid") -> None:
        self._head = Head([(w.float(), None if b is None else b.float()) for w, b in weights], activation)

    # names a head goes by in checkpoints: first layer, second layer
    LAYOUTS = (("score.0", "score.2"), ("score", None), ("v_head.summary", None))

    @classmethod
    def load(cls, path: str | Path, *, activation: str = "sigmoid") -> "ValueHead":
        """Reads a head from a safetensors file, or from the safetensors files of a model directory.

        Keys: `score.weight` (+ `score.bias`); `score.0.weight`, `score.2.weight` (+ biases; ReLU between); or
        `v_head.summary.weight`. Missing keys are an error, never a random head.
        """
        found = _read_tensors(Path(path), ("score.", "v_head."))
        for first, second in cls.LAYOUTS:
            if f"{first}.weight" in found:
                names = [first] if second is None else [first, second]
                missing = [f"{n}.weight" for n in names if f"{n}.weight" not in found]
                if missing:
                    raise InvalidInput(f"{path}: the head has {first}.weight but lacks {', '.join(missing)}")
                return cls([(found[f"{n}.weight"], found.get(f"{n}.bias")) for n in names], activation=activation)
        expected = "score.weight, score.0.weight + score.2.weight, or v_head.summary.weight"
        got = sorted(found) or "none of these"
        raise InvalidInput(f"{path}: no value head found: expected {expected}, got keys {got}")

    def check(self, lane: "Lane") -> None:
        if lane.runner.hidden_size != self._head.hidden_size:
            raise InvalidInput(
                f"the value head takes hidden states of size {self._head.hidden_size}, "
                f"the model gives {lane.runner.hidden_size}: this head belongs to another model"
            )

    def rewards(self, hidden: Tensor) -> Tensor:
        """hidden `[n, H]` -> rewards fp32 `[n]`."""
        return self._head(hidden)

    def begin(self, subject: Subject) -> Reading:
        return _HiddenReading(subject.lane, subject.branches, self.rewards)


class TokenLogits(Scorer):
    """`softmax(logits[tokens])[0]` of the next token: a judge's Yes against No, a 1 against a 0.

    tokens: ids of at least two tokens; the reward is the probability of the first among them.
    suffix: token ids of a question asked behind each branch, on a fork that is dropped afterwards.
    """

    def __init__(self, tokens: Sequence[int], *, suffix: Sequence[int] = ()) -> None:
        if len(tokens) < 2 or len(set(tokens)) != len(tokens):
            raise InvalidInput(f"tokens must be at least two different ids, got {list(tokens)}")
        self._tokens, self._suffix = list(tokens), list(suffix)

    def check(self, lane: "Lane") -> None:
        bad = [t for t in (*self._tokens, *self._suffix) if not 0 <= t < lane.runner.vocab_size]
        if bad:
            raise InvalidInput(f"token ids must lie in [0, {lane.runner.vocab_size}), got {bad}")

    def begin(self, subject: Subject) -> Reading:
        lane, branches = subject.lane, subject.branches
        if self._suffix:
            longest = max((b.length for b in branches), default=0) + len(self._suffix)
            if longest > lane.runner.max_position:
                raise InvalidInput(
                    f"text and suffix must fit the model's {lane.runner.max_position} positions, got {longest} tokens"
                )
            branches = [lane.tree.fork(b, 1)[0] for b in branches]
            for branch in branches:
                branch.append(self._suffix)

        def rewards(hidden: Tensor) -> Tensor:
            select = upload(np.array(self._tokens), hidden.device)
            logits = lane.runner.score(hidden, TokenRequest(select=select)).selected_logits
            assert logits is not None
            return logits.softmax(dim=-1)[:, 0]

        return _HiddenReading(lane, branches, rewards, temporary=bool(self._suffix))


@dataclass(frozen=True)
class StepFormat:
    """How a reward model wants to read a response.

    template: text with `{prompt}` and `{response}`; what follows `{response}` is never fed.
    step_delimiter: what ends a step in the policy's text. Empty: the response is fed as it is.
    separator: fed in the delimiter's place behind every closed step (Qwen2.5-Math-PRM: "<extra_0>"); the reward
        is read at the last token fed.
    """

    template: str = "{prompt}{response}"
    step_delimiter: str = ""
    separator: str = ""

    def __post_init__(self) -> None:
        for name in ("{prompt}", "{response}"):
            if self.template.count(name) != 1:
                raise InvalidInput(f"template must contain {name} exactly once, got {self.template!r}")
        if self.template.index("{prompt}") > self.template.index("{response}"):
            raise InvalidInput("template must name {prompt} before {response}")

    def render(self, prompt: str, response: str) -> str:
        """The text to feed, up to the last closed step."""
        if self.step_delimiter:
            steps = response.split(self.step_delimiter)
            closed = steps[:-1] if steps[-1] == "" else steps
            response = "".join(step + (self.separator or self.step_delimiter) for step in closed)
        head, tail = self.template.split("{prompt}")
        return head + prompt + tail.split("{response}")[0] + response


class RewardModel(Scorer):
    """A second model whose tree mirrors the policy's: a score reads only tokens it has not read before.

    lane: the model's own tree and pools (`Lane`). head: see `ValueHead`. The mirror needs no bookkeeping: the
    reward model's tree is asked for the longest prefix it knows, and what the last score read stays alive until
    the next one has found its prefixes.
    """

    def __init__(self, lane: "Lane", tokenizer: Any, head: ValueHead, *, format: StepFormat | None = None) -> None:
        head.check(lane)
        if len(tokenizer) > lane.runner.vocab_size:
            raise InvalidInput(
                f"the tokenizer does not match the reward model: it has {len(tokenizer)} tokens, "
                f"the model embeds {lane.runner.vocab_size}"
            )
        self._lane, self._tokenizer, self._head = lane, tokenizer, head
        self._format = format or StepFormat()

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        num_slots: int | None = None,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        format: StepFormat | None = None,
        activation: str = "sigmoid",
    ) -> "RewardModel":
        """Base model, tokenizer and head from one directory of safetensors."""
        from forktree.lane import Lane
        from forktree.loading import load_model, load_tokenizer

        head = ValueHead.load(directory, activation=activation)
        model = load_model(directory, dtype=dtype, base=True).to(device)
        return cls(Lane(model, num_slots=num_slots), load_tokenizer(directory), head, format=format)

    def check(self, lane: "Lane") -> None:
        if (proof := self._lane.prove()) is not None:
            self._lane.renew(*proof)
        self._head.check(self._lane)

    def begin(self, subject: Subject) -> Reading:
        tree = self._lane.tree
        if not subject.branches:
            return _HiddenReading(self._lane, [], self._head.rewards)
        owner = int(subject.lane.tree.branch_owner[subject.branches[0].id])
        before = tree.owned(owner)
        rendered = [self._format.render(subject.prompt, response) for response in subject.responses()]
        tokens = [self._tokenizer(text).input_ids for text in rendered]
        for text, ids in zip(rendered, tokens, strict=True):
            if not 1 <= len(ids) <= self._lane.runner.max_position:
                raise InvalidInput(
                    f"the reward model reads 1 to {self._lane.runner.max_position} tokens, got {len(ids)} "
                    f"for the text {text[:40]!r}"
                )
        branches = [self._lane.open(ids, owner=owner) for ids in tokens]
        tree.drop(before)
        return _HiddenReading(self._lane, branches, self._head.rewards)


class TextScorer(Scorer):
    """Any Python function `(prompt, response) -> float`. It runs beside the decoding, in a thread.

    A call that raises, returns something other than a finite number, or takes longer than `time_limit` seconds
    costs its branch only. A call that never returns keeps its thread: Python cannot end it.
    """

    def __init__(self, function: Callable[[str, str], float], *, time_limit: float = 60.0) -> None:
        if not callable(function):
            raise InvalidInput(f"function must be callable, got {type(function).__name__}")
        if not time_limit > 0:
            raise InvalidInput(f"time_limit must be more than 0 seconds, got {time_limit}")
        self.function, self.time_limit = function, time_limit

    def begin(self, subject: Subject) -> Reading:
        return _TextReading(self, [(subject.prompt, response) for response in subject.responses()])


class _TextReading(Reading):
    def __init__(self, scorer: TextScorer, calls: list[tuple[str, str]]) -> None:
        self._scorer, self._calls = scorer, calls
        self._values = np.full(len(calls), np.nan)
        self._errors: list[ScorerError | None] = [None] * len(calls)
        self._next = 0
        self._start()

    def _start(self) -> None:
        """A thread works through the calls that are left; it stops by itself when another one replaces it."""
        self._answers: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        self._since = time.monotonic()
        threading.Thread(target=self._work, args=(self._next, self._answers), daemon=True).start()

    def _work(self, first: int, answers: "queue.SimpleQueue[tuple[int, Any, BaseException | None]]") -> None:
        for i in range(first, len(self._calls)):
            if answers is not self._answers:
                return
            try:
                answers.put((i, self._scorer.function(*self._calls[i]), None))
            except BaseException as error:  # a scorer may raise anything, SystemExit included
                answers.put((i, None, error))

    def read(self, hidden: Tensor | None) -> Rewards | None:
        while not self._answers.empty():
            i, value, error = self._answers.get()
            self._record(i, value, error)
            self._since = time.monotonic()
        if self._next < len(self._calls) and time.monotonic() - self._since > self._scorer.time_limit:
            self._fail(self._next, f"took longer than its time limit of {self._scorer.time_limit:g} s")
            if self._next < len(self._calls):
                self._start()
        return Rewards(self._values, self._errors) if self._next == len(self._calls) else None

    def _record(self, i: int, value: Any, error: BaseException | None) -> None:
        if error is not None:
            return self._fail(i, f"raised {type(error).__name__}: {error}")
        try:
            if isinstance(value, str | bytes):  # float() would read its digits
                raise TypeError
            number = float(value)
        except Exception:  # a value's own __float__ may raise anything
            return self._fail(i, f"must return a number, got {type(value).__name__}")
        if not np.isfinite(number):
            return self._fail(i, f"must return a finite number, got {number}")
        self._values[i] = number
        self._next = i + 1

    def _fail(self, i: int, what: str) -> None:
        name = getattr(self._scorer.function, "__qualname__", type(self._scorer.function).__name__)
        self._errors[i] = ScorerError(f"scorer {name} {what} (branch {i})")
        self._next = i + 1

    def close(self) -> None:
        self._answers = queue.SimpleQueue()  # the thread sees that it is no longer wanted


def load_scorer(spec: str, *, activation: str = "sigmoid", time_limit: float = 60.0, device: str = "cpu") -> Scorer:
    """What `--scorer` names: a head file (.safetensors), a reward-model directory, or `module:function`."""
    path = Path(spec)
    if path.is_dir():
        return RewardModel.load(path, activation=activation, device=device)
    if path.is_file() or spec.endswith(".safetensors"):
        return ValueHead.load(path, activation=activation)
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        raise InvalidInput(
            f"scorer must be a .safetensors head file, a reward-model directory or module:function, got {spec!r}"
        )
    try:
        function = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise InvalidInput(f"scorer {spec!r}: cannot import {module!r}: {error}") from None
    except AttributeError:
        raise InvalidInput(f"scorer {spec!r}: module {module!r} has no {name!r}") from None
    return TextScorer(function, time_limit=time_limit)


def _read_tensors(path: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Tensors whose names start with one of `prefixes`, from a safetensors file or all of a directory."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise InvalidInput(f"{path}: no .safetensors file in this directory")
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names = [key for key in tensors.keys() if key.startswith(prefixes)]  # noqa: SIM118  not a dict
                found.update({key: tensors.get_tensor(key) for key in names})
        except (OSError, SafetensorError) as error:
            raise InvalidInput(f"{file}: not a readable safetensors file: {error}") from None
    return found
