"""Hooks: what a forward pass lets a caller see and change, layer by layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from forktree.device.transfer import upload
from forktree.errors import InvalidInput, UnsupportedModel

RowParameters = Mapping[str, np.ndarray | Tensor]
NO_PARAMETERS: RowParameters = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known of each token of a step, in packed order.

    In a captured step the tokens are followed by padding: position 0, slot -1, parameters 0.

    Attributes:
        positions: [T] int64.
        slots: [T] int64, where the token's keys and values are stored; -1 = nowhere.
        parameters: by name, [T, ...], what the caller of `Runner.forward` gives for each token.
    """

    positions: Tensor
    slots: Tensor
    parameters: Mapping[str, Tensor]


class LayerHook:
    """Sees, and may replace, what every layer computes in a forward pass. Override the methods that you need.

    Each method returns a replacement of the same shape and dtype, or None to leave things as they are. Tensors that a
    method is given belong to the model: clone those that you keep, and write into none. Methods run in inference mode.

    Attributes:
        capturable: True if steps may be captured with the hook as CUDA graphs. Its Python code then runs only while a
            graph is captured; afterwards its kernels run again on the same tensors. So it must not read tensors on the
            host, and whatever is to differ between steps must come from `rows` or be written into the same memory.
            Steps with a hook that is not capturable run eagerly.
    """

    capturable: bool = False

    def before_attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Called before keys and values are stored, which is what later steps will see.

        Args:
            layer: index of the layer, from 0.
            query: [T, Hq, Dk], rotated.
            key: [T, Hk, Dk], rotated.
            value: [T, Hk, Dv].
            rows: what is known of the tokens.
        """
        return None

    def after_attend(self, layer: int, out: Tensor, rows: Rows) -> Tensor | None:
        """Called with what the heads found, out [T, Hq, Dv], before the output projection."""
        return None

    def residual(self, layer: int, hidden: Tensor, rows: Rows) -> Tensor | None:
        """Called with the hidden state after a decoder layer, hidden [T, H]: what the next layer reads."""
        return None


def overrides(hook: LayerHook, method: str) -> bool:
    """Whether a hook has its own version of one of the methods."""
    return getattr(type(hook), method) is not getattr(LayerHook, method)


def check_hooks(hooks: Sequence[LayerHook], parameters: RowParameters, name: str, residual_note: str | None) -> None:
    """Raises if hooks cannot run on the model of this name; see `ModelSpec.residual_note`."""
    if parameters and not hooks:
        raise InvalidInput(f"row_parameters are read by hooks, of which there are none: got {[*parameters]}")
    for hook in hooks:
        if not isinstance(hook, LayerHook):
            raise InvalidInput(f"hooks must be LayerHook objects, got {type(hook).__name__}")
        if residual_note is not None and overrides(hook, "residual"):
            raise UnsupportedModel(
                f"{name}: {type(hook).__name__}.residual needs the hidden states between layers: {residual_note}; use "
                "before_attend or after_attend"
            )


def to_device(parameters: RowParameters, num_tokens: int, device: torch.device) -> dict[str, Tensor]:
    """Parameters of rows, [num_tokens, ...] each, on the device."""
    for name, values in parameters.items():
        if not isinstance(values, np.ndarray | Tensor) or values.shape[:1] != (num_tokens,):
            shape = list(values.shape) if isinstance(values, np.ndarray | Tensor) else type(values).__name__
            raise InvalidInput(f"row_parameters[{name!r}] must be [{num_tokens}, ...], one value a token, got {shape}")
    return {
        name: values.to(device) if isinstance(values, Tensor) else upload(values, device)
        for name, values in parameters.items()
    }
