"""What a search may ask of the next token, and the answer: see `forktree.ops.score_tokens`.

Letters: `T` rows of hidden states, `V` vocabulary, `H` hidden size. Logits are the model's own, after its scale, cap
and bias; log-probs are natural logs. Logits "as they are" have seen no penalty and no temperature.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from forktree.checks import integer, integers, number, shown
from forktree.errors import InvalidInput, NonFinite
from forktree.ops.sampling import Sampling
from forktree.ops.splitmix import splitmix64
from forktree.types import MAX_TOKEN_ID, Float64Array, Int32Array, UInt64Array

ADD, REPETITION = 0, 1  # operations of `LogitEdits`


@dataclass(frozen=True, eq=False)
class LogitEdits:
    """Changes to single logits, as CSR: those of row t are `indptr[t] : indptr[t + 1]`, in ascending order of token.

    indptr: int `[T + 1]`. ids: int `[E]`, tokens. ops: int `[E]`, `ADD` (logit + value: a bias, a frequency or presence
    penalty; -inf bans) or `REPETITION` (logit / value where positive, else logit * value; Keskar et al. 2019).
    values: float `[E]`. Several for one token are applied in their order. All on the host.
    """

    indptr: Int32Array
    ids: Int32Array
    ops: Int32Array
    values: NDArray[np.float32]

    def __init__(self, indptr: ArrayLike, ids: ArrayLike, ops: ArrayLike, values: ArrayLike) -> None:
        for name, given in (("indptr", indptr), ("ids", ids), ("ops", ops)):
            object.__setattr__(self, name, integers(f"{name} of edits", given, 0, MAX_TOKEN_ID, kind=np.int32))
        object.__setattr__(self, "values", _numbers("values of edits", values).astype(np.float32))
        if not len(self.ids) == len(self.ops) == len(self.values):
            raise InvalidInput(
                f"ids, ops and values of edits must have one length, got {len(self.ids)}, {len(self.ops)} and "
                f"{len(self.values)}"
            )
        if (
            not len(self.indptr)
            or self.indptr[0]
            or self.indptr[-1] != len(self.ids)
            or (np.diff(self.indptr) < 0).any()
        ):
            raise InvalidInput(f"indptr of edits must rise from 0 to {len(self.ids)}, got {self.indptr.tolist()}")
        row = np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))
        falls = (np.diff(self.ids) < 0) & (np.diff(row) == 0)
        if falls.any():
            raise InvalidInput(f"ids of edits must ascend within a row, those of row {row[:-1][falls][0]} do not")
        if not np.isin(self.ops, (ADD, REPETITION)).all():
            raise InvalidInput(f"ops of edits must be {ADD} (add) or {REPETITION} (repetition), got {set(self.ops)}")
        repeats = self.values[self.ops == REPETITION]
        if np.isnan(self.values).any() or (self.values == np.inf).any() or not (repeats > 0).all():
            raise InvalidInput("values of edits must be numbers below infinity, those of repetitions above 0")

    @classmethod
    def penalties(
        cls,
        texts: Sequence[ArrayLike],
        *,
        prompt_lengths: Sequence[int] | None = None,
        repetition: float = 1.0,
        frequency: float = 0.0,
        presence: float = 0.0,
        bias: Mapping[int, float] | None = None,
    ) -> "LogitEdits":
        """Penalties on the tokens of each row's text, and a bias on tokens of every row.

        texts: token ids of each row so far. prompt_lengths: how many of them are prompt (default: none); repetition
        counts the prompt, frequency (times how often) and presence (once) do not, as in vLLM. Repetition comes first.
        """
        number("repetition", repetition, "finite and above 0", lambda x: x > 0)
        number("frequency", frequency, "finite", lambda x: True)
        number("presence", presence, "finite", lambda x: True)
        given = [0] * len(texts) if prompt_lengths is None else prompt_lengths
        if len(given) != len(texts):
            raise InvalidInput(f"prompt_lengths must be one for each of {len(texts)} texts, got {len(given)}")
        biased = integers("tokens of bias", list(bias or {}), 0, MAX_TOKEN_ID, kind=np.int64)
        order = np.argsort(biased)
        bias_of = _numbers("values of bias", list((bias or {}).values()))[order]
        biased = biased[order]
        ids, ops, values, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)], [0]
        for i, (text, length) in enumerate(zip(texts, given, strict=True)):
            tokens = integers(f"text {i}", text, 0, MAX_TOKEN_ID, kind=np.int64)
            skip = integer(f"prompt length of text {i}", length, 0, len(tokens))
            parts = []  # (tokens, operation, value)
            if repetition != 1:
                seen = np.unique(tokens)
                parts.append((seen, REPETITION, np.full(len(seen), repetition)))
            if frequency or presence:
                seen, count = np.unique(tokens[skip:], return_counts=True)
                parts.append((seen, ADD, -(frequency * count + presence)))
            if len(biased):
                parts.append((biased, ADD, bias_of))
            token = np.concatenate([np.zeros(0, np.int64), *(p[0] for p in parts)])
            order = np.argsort(token, kind="stable")
            ids.append(token[order])
            ops.append(np.concatenate([np.zeros(0, np.int64), *(np.full(len(p[0]), p[1]) for p in parts)])[order])
            values.append(np.concatenate([np.zeros(0), *(p[2] for p in parts)])[order])
            ends.append(ends[-1] + len(order))
        return cls(ends, *(np.concatenate(column) for column in (ids, ops, values)))


@dataclass(frozen=True, eq=False)
class KeyedSampling:
    """One token for every row, sampled with a key of its own.

    The distribution of a row is softmax(s) over the tokens that are left, where s are the logits, edited, then divided
    by the temperature. Left are those that `allowed` names and that reach the highest of the thresholds of top-k, top-p
    (of what top-k leaves) and min-p, in transformers' order; tokens that tie with a threshold stay.

    sampling: one for all rows, or one a row. Temperature 0 (and below 1e-5) takes the most likely token, the lowest id
        among equals; nothing else then counts.
    seed, position: int `[T]`, the row's key: same logits, seed and position, same token, whatever else is sampled.
    edits: changes to single logits, first of all.
    allowed: int32 `[T, ceil(V / 32)]`, bit v % 32 of word v // 32 set where token v is allowed.

    The token is found exactly, with two numbers for each tile of 64 tokens (`sampling.noise`): the tile with the
    highest log-mass plus Gumbel noise wins, as in the Gumbel-max trick; in it the inverse CDF finds the token.
    """

    sampling: Sampling | Sequence[Sampling]
    seed: ArrayLike
    position: ArrayLike
    edits: LogitEdits | None = None
    allowed: Tensor | None = None

    def __post_init__(self) -> None:
        several = [self.sampling] if isinstance(self.sampling, Sampling) else self.sampling
        if not isinstance(several, Sequence) or not all(isinstance(s, Sampling) for s in several):
            raise InvalidInput(f"sampling must be a Sampling, or a sequence of one a row, got {shown(self.sampling)}")
        if self.edits is not None and not isinstance(self.edits, LogitEdits):
            raise InvalidInput(f"edits must be LogitEdits, got {type(self.edits).__name__}")
        if self.allowed is not None and not isinstance(self.allowed, Tensor):
            raise InvalidInput(f"allowed must be an int32 tensor, got {type(self.allowed).__name__}")

    @cached_property
    def keys(self) -> UInt64Array:
        """What keys the noise of a row: `splitmix64(splitmix64(seed) ^ position)`, `[T]`."""
        seed = integers("seed", self.seed, -(2**63), 2**64 - 1, kind=np.uint64)
        return splitmix64(splitmix64(seed) ^ integers("position", self.position, -(2**63), 2**64 - 1, kind=np.uint64))

    @cached_property
    def settings(self) -> Float64Array:
        """Temperature (0 where greedy), top_k, top_p and min_p of each row, fp64 `[4, T]`; top_k 0 keeps all."""
        rows = len(self.keys)
        each = [self.sampling] * rows if isinstance(self.sampling, Sampling) else self.sampling
        kinds = {id(s): (s.temperature, s.top_k, s.top_p, s.min_p) for s in each}
        table = np.array([kinds[id(s)] for s in each], dtype=np.float64).reshape(-1, 4).T.copy()
        table[0, table[0] < MIN_TEMPERATURE] = 0
        return table

    @property
    def has_truncation(self) -> bool:
        """Whether a row may lose tokens to top-k, top-p or min-p."""
        temperature, top_k, top_p, min_p = self.settings
        return bool(((temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0))).any())


def _numbers(name: str, values: ArrayLike) -> Float64Array:
    """`[n]`. Raises `InvalidInput` unless all are numbers, infinite or NaN perhaps."""
    try:
        given = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):  # ragged, or on a device
        given = np.asarray(None)
    if given.dtype.kind not in "iuf":
        raise InvalidInput(f"{name} must be numbers, got {shown(values)}")
    return given.astype(np.float64).reshape(-1)


MIN_TEMPERATURE = 1e-5  # temperatures below count as 0


@dataclass(frozen=True, eq=False)
class RaggedIds:
    """Token ids of each row, as CSR: those of row t are `ids[indptr[t] : indptr[t + 1]]`. int32 or int64."""

    indptr: Tensor  # [T + 1]
    ids: Tensor  # [S]


@dataclass(frozen=True, eq=False)
class TokenRequest:
    """What to find out; what is not asked for costs nothing.

    top_k: this many most likely tokens; lower ids first among equals.
    sample: one token a row.
    select: token ids `[n]`, the same for all rows, or `RaggedIds`: their logits, for which no other row of lm_head is
        read. Their log-probs too if something else takes the whole vocabulary (such as `lse`).
    targets: int `[T]`: the log-prob of one token a row.
    lse, entropy: log-sum-exp of the logits, and entropy in nats.
    rewards: `[V, H]`, a reward for every token (multifurcation): gathered at the top_k tokens and at the sampled one.
    """

    top_k: int = 0
    sample: KeyedSampling | None = None
    select: Tensor | RaggedIds | None = None
    targets: Tensor | None = None
    lse: bool = False
    entropy: bool = False
    rewards: Tensor | None = None

    @property
    def needs_vocabulary(self) -> bool:
        """Whether all of lm_head is read."""
        whole = self.top_k or self.sample or self.targets is not None or self.lse or self.entropy
        return bool(whole)


@dataclass(frozen=True, eq=False, init=False, repr=False)
class TokenScores:
    """The answer to a `TokenRequest`. fp32 (fp64 for fp64 hidden states), ids int64.

    `"entropy" in scores` tells whether it was asked for; to read what was not raises AttributeError.

    A row whose logits hold NaN or +inf, or are all -inf, has a log-sum-exp that is not finite; a row that mask and
    edits leave no token gets token 0 with log-prob NaN. `check` raises for both. A logit of -inf is probability 0.

    Attributes:
        lse: `[T]`, there whenever the whole vocabulary was read.
        entropy: `[T]`.
        top_ids: `[T, min(k, V)]`, best first.
        top_log_probs: likewise.
        token: `[T]`, the sampled one.
        log_prob: `[T]`, of that token under the logits as they are.
        shaped_log_prob: `[T]`, under the distribution it is sampled from.
        selected_logits: `[T, n]`, or `[S]` if ragged.
        selected_log_probs: likewise.
        target_log_probs: `[T]`.
        top_rewards: `[T, k]`.
        token_reward: `[T]`.
    """

    lse: Tensor
    entropy: Tensor
    top_ids: Tensor
    top_log_probs: Tensor
    token: Tensor
    log_prob: Tensor
    shaped_log_prob: Tensor
    selected_logits: Tensor
    selected_log_probs: Tensor
    target_log_probs: Tensor
    top_rewards: Tensor
    token_reward: Tensor

    def __init__(self, **found: Tensor) -> None:
        if unknown := found.keys() - TokenScores.__annotations__.keys():
            raise TypeError(f"scores must be of {', '.join(TokenScores.__annotations__)}, got {', '.join(unknown)}")
        vars(self).update(found)

    def __contains__(self, name: str) -> bool:
        return name in vars(self)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor:
            """Called for what is not there."""
            if name in TokenScores.__annotations__:
                raise AttributeError(f"{name} was not requested of these scores, only {', '.join(vars(self))}")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def check(self) -> None:
        """Looks at every row. On a GPU it waits for the numbers.

        Raises:
            NonFinite: names the first row whose log-sum-exp is not finite.
            InvalidInput: names the first row that is left no token.
        """
        if "lse" in self and not (fine := self.lse.isfinite()).all():
            row = int(fine.int().argmin())
            raise NonFinite(
                f"logits of row {row} must be finite, or -inf but not all of them; got a log-sum-exp of {self.lse[row]}"
            )
        if "selected_logits" in self and bool((wrong := self.selected_logits.isnan()).any()):
            raise NonFinite(f"selected logits must be numbers, got NaN at {wrong.nonzero()[0].tolist()}")
        if "shaped_log_prob" in self and bool((masked := self.shaped_log_prob.isnan()).any()):
            raise InvalidInput(f"row {int(masked.int().argmax())}: no token is allowed, mask and edits leave none")
