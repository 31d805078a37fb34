"""Rewards that a head reads from the model's own hidden state, which costs no forward pass."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from forktree.checks import integer
from forktree.errors import InvalidInput
from forktree.rewards.base import PendingFromHidden, PendingReward, Reward, RewardInput
from forktree.terminal import one_line

if TYPE_CHECKING:
    from forktree.engine.worker import ModelWorker

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


@dataclass(frozen=True, eq=False)
class ValueMlp:
    """A head on hidden states: `activation(W h + b)`, or `activation(W2 relu(W1 h + b1) + b2)`.

    Math is done in fp32 (fp64 for fp64 states).

    Args:
        layers: one or two pairs (weight `[out, in]`, bias `[out]` or None).
        activation: of a head with one output, "sigmoid", "tanh" or "identity".
        choice: with several outputs the value is the softmax of this one; of two it is the second unless said otherwise
            (Qwen2.5-Math-PRM).
    """

    layers: Sequence[tuple[Tensor, Tensor | None]]
    activation: str = "sigmoid"
    choice: int | None = None

    def __post_init__(self) -> None:
        if len(self.layers) not in (1, 2):
            raise InvalidInput(f"a value head has 1 or 2 layers, got {len(self.layers)}")
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS:
            raise InvalidInput(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        for weight, bias in self.layers:
            if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
                got = f"{weight.dtype} {list(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
                raise InvalidInput(f"a weight of a value head must be a floating-point tensor [out, in], got {got}")
            if bias is not None and (not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]):
                got = str(list(bias.shape)) if isinstance(bias, Tensor) else type(bias).__name__
                raise InvalidInput(f"the bias of a value head must be [{weight.shape[0]}], got {got}")
        outputs = self.layers[-1][0].shape[0]
        if self.choice is not None:
            integer("choice, one of the head's outputs,", self.choice, 0, outputs - 1)
        elif outputs not in (1, 2):
            raise InvalidInput(f"a value head has 1 or 2 outputs, got {outputs} and no choice of one")
        if len(self.layers) == 2 and self.layers[0][0].shape[0] != self.layers[1][0].shape[1]:
            raise InvalidInput(
                f"the head's second layer must take {self.layers[0][0].shape[0]} inputs, got "
                f"{self.layers[1][0].shape[1]}"
            )

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.layers[0][0].shape[1]

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden `[T, H]` -> values `[T]`, fp32 (fp64 for fp64)."""
        x = hidden if hidden.dtype == torch.float64 else hidden.float()
        for i, (weight, bias) in enumerate(self.layers):
            x = F.linear(x.relu() if i else x, weight.to(x), None if bias is None else bias.to(x))
        if x.shape[1] > 1:
            return x.softmax(dim=-1)[:, 1 if self.choice is None else self.choice]
        return ACTIVATIONS[self.activation](x[:, 0])


class ValueHead(Reward):
    """A head on the policy's last hidden state: see `ValueMlp`.

    Args:
        weights: one or two pairs (weight `[out, in]`, bias `[out]` or None).
        activation: "sigmoid", "tanh" or "identity".
        choice: which of several outputs.
    """

    def __init__(
        self,
        weights: Sequence[tuple[Tensor, Tensor | None]],
        *,
        activation: str = "sigmoid",
        choice: int | None = None,
    ) -> None:
        head = ValueMlp(weights, activation, choice)
        self._head = replace(head, layers=[(w.float(), None if b is None else b.float()) for w, b in head.layers])

    # names a head goes by in checkpoints: first layer, second layer
    LAYOUTS = (("score.0", "score.2"), ("score", None), ("v_head.summary", None))

    @classmethod
    def load(cls, path: str | Path, *, activation: str = "sigmoid", choice: int | None = None) -> "ValueHead":
        """Reads a head from a safetensors file, or from the safetensors files of a model directory.

        Keys: `score.weight` (+ `score.bias`); `score.0.weight`, `score.2.weight` (+ biases; ReLU between); or
        `v_head.summary.weight`. Missing keys are an error, never a random head. Where a directory holds several heads,
        the model's own `model.safetensors.index.json` decides; without it, that is an error.

        Args:
            path: the file or directory.
            activation: see `ValueHead`.
            choice: see `ValueHead`.

        Raises:
            InvalidInput: there is not exactly one head, or it is not whole.
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
        """See `Reward`."""
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

    def start(self, given: RewardInput) -> PendingReward:
        """See `Reward`."""
        return PendingFromHidden(given.worker, given.branches, self.rewards)


def _read_tensors(path: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Tensors whose names start with one of `prefixes`, from a safetensors file or all of a directory.

    Of a directory whose index lists such tensors, those and no others.
    """
    if not path.is_dir():
        return _tensors_of(path, prefixes)
    if not (files := sorted(path.glob("*.safetensors"))):
        raise InvalidInput(f"{path}: no .safetensors file in this directory")
    index = path / "model.safetensors.index.json"
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
        own = {str(key): path / str(file) for key, file in listed.items() if key.startswith(prefixes)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidInput(f"{index}: not an index of safetensors: {one_line(error)}") from None
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
