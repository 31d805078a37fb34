"""The reward that a text names: a head file, a reward-model directory, or a function."""

from collections.abc import Callable
from pathlib import Path

from forktree.errors import InvalidInput
from forktree.imports import import_named
from forktree.rewards.base import Reward
from forktree.rewards.function import FunctionReward
from forktree.rewards.reward_model import RewardModel
from forktree.rewards.step_format import StepFormat
from forktree.rewards.value_head import ValueHead


def load_reward(
    spec: str,
    *,
    activation: str | None = None,
    time_limit: float = 60.0,
    device: str = "cpu",
    format: StepFormat | str | None = None,
    trust_remote_code: bool = False,
) -> Reward:
    """What `--reward` names.

    Args:
        spec: a head file (.safetensors), a reward-model directory, or `module:function`.
        activation: of a head; default: that of the format, or sigmoid.
        time_limit: maximum number of seconds for a call of a function.
        device: where a reward model runs.
        format: what a reward model is fed, see `RewardModel.load`.
        trust_remote_code: whether Python files of a reward-model directory may be run.

    Raises:
        InvalidInput: there is no such thing, or it cannot be used.
    """
    path = Path(spec)
    try:
        if path.is_dir():
            return RewardModel.load(
                path, activation=activation, device=device, format=format, trust_remote_code=trust_remote_code
            )
        if format is not None:
            raise InvalidInput(f"a reward format belongs to a reward-model directory, got the reward {spec!r}")
        if path.is_file() or spec.endswith(".safetensors"):
            return ValueHead.load(path, activation=activation or "sigmoid")
    except InvalidInput as error:
        raise error if spec in str(error) else InvalidInput(f"reward {spec}: {error}") from None
    return FunctionReward(import_function(spec), time_limit=time_limit)


def import_function(spec: str) -> Callable[[str, str], float]:
    """The function that `module:function` names; modules of the current directory come first, as with `python -m`."""
    expected = "a .safetensors head file, a reward-model directory or module:function"
    function: Callable[[str, str], float] = import_named("reward", spec, expected=expected)
    return function
