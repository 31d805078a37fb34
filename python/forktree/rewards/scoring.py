"""Scorers: what a search may ask of a text. All answer with one reward a branch.

ValueHead     a linear or two-layer head on the model's own hidden state (costs no forward)
TokenLogits   the probability of one chosen token against others, asked behind an optional question
RewardModel   a second model: base model plus a head read from safetensors, with its own mirrored tree
TextScorer    any Python function of (prompt, response)
"""

import contextlib
import importlib
import json
import math
import os
import queue
import sys
import threading
import time
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from forktree.checks import integer, number
from forktree.device.transfer import upload
from forktree.errors import InvalidInput, ScorerError
from forktree.kv import Branch
from forktree.ops.token_request import Head, TokenRequest
from forktree.prompts import encode
from forktree.rewards.step_format import CHAT, REWARD_FORMATS, SEPARATORS, StepFormat, expected_format, named_format
from forktree.search.request import Rewards
from forktree.search.stopping import response_text

if TYPE_CHECKING:
    from forktree.engine.worker import ModelWorker


@dataclass(frozen=True)
class Subject:
    """What is being scored: branches of the policy, and how to turn them into text."""

    worker: "ModelWorker"
    branches: Sequence[Branch]
    prompt: str
    prompt_length: int  # tokens
    tokenizer: Any  # None when the decoder has none

    def responses(self) -> list[str]:
        """Text of each branch after the prompt: see `forktree.search.stopping.response_text`."""
        if self.tokenizer is None:
            raise InvalidInput("this scorer reads text: expected a Decoder with a tokenizer, got tokenizer=None")
        if not self.branches:
            return []
        text_of = response_text(self.tokenizer, self.branches[0].tokens[: self.prompt_length].tolist())
        return [text_of(branch.tokens[self.prompt_length :].tolist()) for branch in self.branches]


class Reading(ABC):
    """One answer under way. Hidden readings name branches of a worker; the engine computes them and calls `read`."""

    worker: "ModelWorker | None" = None
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

    def check(self, worker: "ModelWorker") -> None:
        """Raises `InvalidInput` if this scorer cannot work on the model of `worker`; called before a run begins."""
        return None


def rewards_of(values: Tensor, errors: Sequence[ScorerError | None]) -> Rewards:
    """Rewards `[n]` from those of the branches without an error, in their order."""
    found = np.full(len(errors), np.nan)
    found[[i for i, error in enumerate(errors) if error is None]] = values.detach().to("cpu", torch.float64).numpy()
    return Rewards(found, list(errors))


class _HiddenReading(Reading):
    """errors: why a branch that was to be scored is not read, in its place; None for each of `branches`."""

    def __init__(
        self,
        worker: "ModelWorker",
        branches: Sequence[Branch],
        rewards: Callable[[Tensor], Tensor],
        *,
        errors: Sequence[ScorerError | None] | None = None,
        temporary: bool = False,
    ) -> None:
        self.worker, self.branches = worker, branches
        self._errors = [None] * len(branches) if errors is None else errors
        self._rewards, self._temporary = rewards, temporary

    def read(self, hidden: Tensor | None) -> Rewards:
        assert hidden is not None
        return rewards_of(self._rewards(hidden), self._errors)

    def close(self) -> None:
        if self._temporary and self.worker is not None:
            self.worker.tree.drop(self.branches)


class ValueHead(Scorer):
    """A head on the last hidden state: see `Head`.

    weights: one or two pairs (weight `[out, in]`, bias `[out]` or None). activation: "sigmoid", "tanh" or "identity".
    choice: which of several outputs.
    """

    def __init__(
        self,
        weights: Sequence[tuple[Tensor, Tensor | None]],
        *,
        activation: str = "sigmoid",
        choice: int | None = None,
    ) -> None:
        head = Head(weights, activation, choice)
        self._head = replace(head, layers=[(w.float(), None if b is None else b.float()) for w, b in head.layers])

    # names a head goes by in checkpoints: first layer, second layer
    LAYOUTS = (("score.0", "score.2"), ("score", None), ("v_head.summary", None))

    @classmethod
    def load(cls, path: str | Path, *, activation: str = "sigmoid", choice: int | None = None) -> "ValueHead":
        """Reads a head from a safetensors file, or from the safetensors files of a model directory.

        Keys: `score.weight` (+ `score.bias`); `score.0.weight`, `score.2.weight` (+ biases; ReLU between); or
        `v_head.summary.weight`. Missing keys are an error, never a random head. Where a directory holds several heads,
        the model's own `model.safetensors.index.json` decides; without, that is an error.
        """
        found = _read_tensors(Path(path), ("score.", "v_head."))
        layouts = [names for names in cls.LAYOUTS if f"{names[0]}.weight" in found]
        if len(layouts) > 1:
            raise InvalidInput(
                f"{path}: expected one value head, got {' and '.join(f'{n[0]}.weight' for n in layouts)}"
            )
        for first, second in layouts:
            names = [first] if second is None else [first, second]
            missing = [f"{n}.weight" for n in names if f"{n}.weight" not in found]
            if missing:
                raise InvalidInput(f"{path}: the head has {first}.weight but lacks {', '.join(missing)}")
            weights = [(found[f"{n}.weight"], found.get(f"{n}.bias")) for n in names]
            return cls(weights, activation=activation, choice=choice)
        expected = "score.weight, score.0.weight + score.2.weight, or v_head.summary.weight"
        got = sorted(found) or "none of these"
        raise InvalidInput(f"{path}: no value head found: expected {expected}, got keys {got}")

    def check(self, worker: "ModelWorker") -> None:
        if worker.runner.hidden_size != self._head.hidden_size:
            raise InvalidInput(
                f"the value head takes hidden states of size {self._head.hidden_size}, "
                f"the model gives {worker.runner.hidden_size}: this head belongs to another model"
            )

    def rewards(self, hidden: Tensor) -> Tensor:
        """hidden `[n, H]` -> rewards fp32 `[n]`."""
        return self._head(hidden)

    def rewards_on(self, worker: "ModelWorker") -> Callable[[Tensor], Tensor]:
        """The same, whatever the worker."""
        return self.rewards

    def begin(self, subject: Subject) -> Reading:
        return _HiddenReading(subject.worker, subject.branches, self.rewards)


class TokenLogits(Scorer):
    """`softmax(logits[tokens])[0]` of the next token: a judge's Yes against No, a 1 against a 0.

    tokens: ids of at least two tokens; the reward is the probability of the first among them.
    suffix: token ids of a question asked behind each branch, on a fork that is dropped afterwards.
    """

    def __init__(self, tokens: Sequence[int], *, suffix: Sequence[int] = ()) -> None:
        self._tokens = [integer(f"token {i} of tokens", t, 0) for i, t in enumerate(tokens)]
        self._suffix = [integer(f"token {i} of suffix", t, 0) for i, t in enumerate(suffix)]
        if len(self._tokens) < 2 or len(set(self._tokens)) != len(self._tokens):
            raise InvalidInput(f"tokens must be at least two different ids, got {self._tokens}")

    def check(self, worker: "ModelWorker") -> None:
        bad = [t for t in (*self._tokens, *self._suffix) if t >= worker.runner.vocab_size]
        if bad:
            raise InvalidInput(f"token ids must lie in [0, {worker.runner.vocab_size}), got {bad}")

    def rewards_on(self, worker: "ModelWorker") -> Callable[[Tensor], Tensor]:
        """hidden `[n, H]` of the worker's model, after the suffix -> rewards fp32 `[n]`."""

        def rewards(hidden: Tensor) -> Tensor:
            select = upload(np.array(self._tokens), hidden.device)
            logits = worker.runner.score(hidden, TokenRequest(select=select)).selected_logits
            assert logits is not None
            return logits.softmax(dim=-1)[:, 0]

        return rewards

    def begin(self, subject: Subject) -> Reading:
        worker, branches = subject.worker, list(subject.branches)
        if not self._suffix:
            return _HiddenReading(worker, branches, self.rewards_on(worker))
        most, added = worker.runner.max_position, len(self._suffix)
        errors = [
            ScorerError(
                f"text and suffix must fit the model's {most} positions, got {b.length + added} tokens (branch {i})"
            )
            if b.length + added > most
            else None
            for i, b in enumerate(branches)
        ]
        asked = [worker.tree.fork(b, 1)[0] for b, error in zip(branches, errors, strict=True) if error is None]
        for branch in asked:
            branch.append(self._suffix)
        return _HiddenReading(worker, asked, self.rewards_on(worker), errors=errors, temporary=True)


class RewardModel(Scorer):
    """A second model whose tree mirrors the policy's: a score reads only tokens it has not read before.

    worker: the model's own. head: what reads a reward from the last hidden state: a `ValueHead`,
    or a `TokenLogits` on the model's own logits. format: what is fed. A text that cannot be rendered, or is too long
    for the model, costs its branch only. pad_token_id: left out at the end of what is fed, as sequence classifiers of
    transformers pass over it. The mirror needs no bookkeeping: the reward model's tree is asked for the longest prefix
    it knows, and what the last score read stays alive until the next one has found its prefixes.
    """

    def __init__(
        self,
        worker: "ModelWorker",
        tokenizer: Any,
        head: "ValueHead | TokenLogits",
        *,
        format: StepFormat | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        head.check(worker)
        if isinstance(head, TokenLogits) and head._suffix:
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

        format: what is fed and how the reward is read, or its name, one of `REWARD_FORMATS`; default: the prompt, the
        response, and a sigmoid. Warns if the directory's config names a model that is known to be read in another way.
        activation: instead of the format's. trust_remote_code: whether Python files of the directory may be run.
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
        head: ValueHead | TokenLogits
        if not chosen.answers:
            head = ValueHead.load(path, activation=activation or chosen.activation, choice=chosen.choice)
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        if chosen.answers:
            answers = _ids(tokenizer, chosen.answers)
            if len(answers) != 2:
                raise InvalidInput(
                    f"{path}: {chosen.answers!r} must be two tokens, got {len(answers)}: not such a model"
                )
            head = TokenLogits(answers)
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
        if (proof := self._worker.prove()) is not None:
            with self._worker.claim():
                self._worker.renew(*proof)
        self._head.check(self._worker)

    def begin(self, subject: Subject) -> Reading:
        with self._worker.claim():
            return self._begin(subject)

    def _begin(self, subject: Subject) -> Reading:
        tree = self._worker.tree
        rewards = self._head.rewards_on(self._worker)
        if not subject.branches:
            return _HiddenReading(self._worker, [], rewards)
        owner = int(subject.worker.tree.branch_owner[subject.branches[0].id])
        before = tree.owned(owner)
        branches: list[Branch] = []
        errors: list[ScorerError | None] = []
        for i, response in enumerate(subject.responses()):
            try:
                tokens = self._tokens(subject.prompt, response)
                branches.append(self._worker.open(tokens, owner=owner))
                errors.append(None)
            except Exception as error:  # chat templates and tokenizers may raise anything
                errors.append(ScorerError(f"{_one_line(error)} (branch {i})"))
        tree.drop(before)
        return _HiddenReading(self._worker, branches, rewards, errors=errors)

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


class TextScorer(Scorer):
    """Any Python function `(prompt, response) -> float`. It runs beside the decoding, in a thread.

    A call that raises, returns something other than a finite number, or takes longer than `time_limit` seconds
    costs its branch only. A call that never returns keeps its thread: Python cannot end it.
    """

    def __init__(self, function: Callable[[str, str], float], *, time_limit: float = 60.0) -> None:
        if not callable(function):
            raise InvalidInput(f"function must be callable, got {type(function).__name__}")
        if time_limit != math.inf:
            number("time_limit", time_limit, "more than 0 seconds", lambda t: t > 0)
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


def load_scorer(
    spec: str,
    *,
    activation: str | None = None,
    time_limit: float = 60.0,
    device: str = "cpu",
    format: StepFormat | str | None = None,
    trust_remote_code: bool = False,
) -> Scorer:
    """What `--scorer` names: a head file (.safetensors), a reward-model directory, or `module:function`.

    activation: of a head; default: that of the format, or sigmoid. format: of a reward-model directory."""
    path = Path(spec)
    try:
        if path.is_dir():
            return RewardModel.load(
                path, activation=activation, device=device, format=format, trust_remote_code=trust_remote_code
            )
        if format is not None:
            raise InvalidInput(f"a reward format belongs to a reward-model directory, got the scorer {spec!r}")
        if path.is_file() or spec.endswith(".safetensors"):
            return ValueHead.load(path, activation=activation or "sigmoid")
    except InvalidInput as error:
        raise error if spec in str(error) else InvalidInput(f"scorer {spec}: {error}") from None
    return TextScorer(import_function(spec), time_limit=time_limit)


def import_function(spec: str) -> Callable[[str, str], float]:
    """The function that `module:function` names; modules of the current directory come first, as with `python -m`."""
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        raise InvalidInput(
            f"scorer must be a .safetensors head file, a reward-model directory or module:function, got {spec!r}"
        )
    directory = os.getcwd()
    sys.path.insert(0, directory)  # only during the import: no file here is to hide a module that others import later
    try:
        imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise InvalidInput(f"scorer {spec!r}: cannot import {module!r}: {_where(error)}") from None
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(directory)
    if not hasattr(imported, name):
        raise InvalidInput(f"scorer {spec!r}: module {module!r} has no {name!r}")
    function: Callable[[str, str], float] = getattr(imported, name)
    return function


def _where(error: BaseException) -> str:
    """An error that an import raised, with the file and line of the imported code that it comes from."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: SyntaxError: {error.msg}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename][1:]
    return "".join(f"{f.filename}, line {f.lineno}: " for f in frames[-1:]) + f"{type(error).__name__}: {error}"


def _read_tensors(path: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Tensors whose names start with one of `prefixes`, from a safetensors file or all of a directory. Of a directory
    whose index lists such tensors, those and no others."""
    if not path.is_dir():
        return _tensors_of(path, prefixes)
    if not (files := sorted(path.glob("*.safetensors"))):
        raise InvalidInput(f"{path}: no .safetensors file in this directory")
    index = path / "model.safetensors.index.json"
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
        own = {str(key): path / str(file) for key, file in listed.items() if key.startswith(prefixes)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidInput(f"{index}: not an index of safetensors: {_one_line(error)}") from None
    found: dict[str, Tensor] = {}
    source: dict[str, Path] = {}
    for file in sorted(set(own.values())) if own else files:
        for key, tensor in _tensors_of(file, prefixes).items():
            if own and own.get(key) != file:
                continue
            if key in source:
                raise InvalidInput(f"{path}: expected one value head, got {key} in {source[key].name} and {file.name}")
            found[key], source[key] = tensor, file
    return found


def _tensors_of(file: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            names = [key for key in tensors.keys() if key.startswith(prefixes)]  # noqa: SIM118  not a dict
            return {key: tensors.get_tensor(key) for key in names}
    except (OSError, SafetensorError) as error:
        raise InvalidInput(f"{file}: not a readable safetensors file: {error}") from None


def _ids(tokenizer: Any, text: str) -> list[int]:
    (ids,) = encode(tokenizer, [text.strip()], add_special_tokens=False)
    return ids


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
