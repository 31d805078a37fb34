"""What attention reads: `KVPool`, the keys and values of one layer, and `AttentionOptions`, what is done with scores.

A new format or option is one field here, one member in `csrc/params.h` and its mirror `forktree.ops.params`, and one
line in `forktree.ops.reference`; then the kernels that know it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
READABLE = (Tensor, nn.Parameter)  # subclasses may have no values, such as those of a tracer


@dataclass(frozen=True)
class KVFormat:
    """How the keys and values of a token are stored in one layer.

    Attributes:
        dtype: of both.
        num_kv_heads: Hk.
        k_dim: Dk, elements of a head's key.
        v_dim: Dv, elements of a head's value.
    """

    dtype: torch.dtype
    num_kv_heads: int
    k_dim: int
    v_dim: int

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in one layer."""
        return self.num_kv_heads * (self.k_dim + self.v_dim) * self.dtype.itemsize

    def pool(self, num_slots: int, device: torch.device) -> KVPool:
        """A pool of this format. Uninitialised: a slot is written before anyone reads it."""
        k, v = (
            torch.empty(num_slots, self.num_kv_heads, dim, dtype=self.dtype, device=device)
            for dim in (self.k_dim, self.v_dim)
        )
        return KVPool(k, v)


@dataclass(frozen=True, eq=False)
class KVPool:
    """Keys and values of one layer: slot s has room for those of one token, `k[s]` and `v[s]`.

    Attributes:
        k: [num_slots, Hk, Dk], dense in the last dimension.
        v: [num_slots, Hk, Dv], likewise, of k's dtype and device.
        format: how tokens are stored.

    Raises:
        ValueError: k and v do not fit each other.
    """

    k: Tensor
    v: Tensor
    format: KVFormat = field(init=False)
    cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)  # what backends prepare once a pool

    def __post_init__(self) -> None:
        k, v = self.k, self.v
        k_shape, v_shape = k.shape, v.shape
        if len(k_shape) != 3 or len(v_shape) != 3 or k_shape[:2] != v_shape[:2]:
            raise ValueError(
                f"k and v of a pool must be [slots, Hk, Dk] and [slots, Hk, Dv], got {list(k_shape)} and "
                f"{list(v_shape)}"
            )
        if v.dtype != k.dtype or v.device != k.device:
            raise ValueError(f"v of a pool must be {k.dtype} on {k.device} as k is, got {v.dtype} on {v.device}")
        if (k.stride(2) != 1 and k_shape[2] > 1) or (v.stride(2) != 1 and v_shape[2] > 1):
            raise ValueError(
                f"k and v of a pool must be dense in their last dimension, got strides {k.stride()} and {v.stride()}"
            )
        object.__setattr__(self, "format", KVFormat(k.dtype, k_shape[1], k_shape[2], v_shape[2]))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that a slot takes room in, by slot."""
        return self.k, self.v

    @property
    def num_slots(self) -> int:
        """Tokens there is room for."""
        return self.k.shape[0]


@dataclass(frozen=True, eq=False)
class AttentionOptions:
    """What becomes of the products of a query with keys before and in the softmax.

    Attributes:
        scale: factor on q·k, finite; default Dk ** -0.5.
        softcap: finite c > 0 makes scores c * tanh(s / c), after scale and before ALiBi and masks.
        sinks: [Hq], one more logit a head in each token's softmax, without a value; in the log-sum-exp too. -inf: none.
        alibi_slopes: [Hq], finite; adds slope * (key position - row_pos).
        per_head: the tensors [Hq] there are, by name.

    Raises:
        ValueError: a value is out of its range. Those of tensors are looked at on the CPU only: elsewhere that would
            wait for the device.
    """

    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    per_head: dict[str, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        scale, softcap, sinks, slopes = self.scale, self.softcap, self.sinks, self.alibi_slopes
        per_head = {"sinks": sinks, "alibi_slopes": slopes}
        object.__setattr__(self, "per_head", {name: x for name, x in per_head.items() if x is not None})
        if scale is not None and not abs(scale) <= LARGEST:
            raise ValueError(f"scale must be a finite fp32 number, or None, got {scale}")
        if softcap is not None and not SMALLEST <= softcap <= LARGEST:
            raise ValueError(f"softcap must be a finite fp32 number above 0, or None, got {softcap}")
        if torch.compiler.is_compiling():
            return
        if sinks is not None and type(sinks) in READABLE and sinks.is_cpu and not bool((sinks < torch.inf).all()):
            raise ValueError(f"sinks must be numbers or -inf, got {sinks.tolist()}")
        if slopes is not None and type(slopes) in READABLE and slopes.is_cpu and not bool(slopes.isfinite().all()):
            raise ValueError(f"alibi_slopes must be finite, got {slopes.tolist()}")

    @property
    def values(self) -> tuple[Any, ...]:
        """The options in order, `OPTIONS` their names."""
        return tuple(getattr(self, name) for name in OPTIONS)

    def scale_of(self, k_dim: int) -> float:
        """The factor on q·k."""
        return 1 / math.sqrt(k_dim) if self.scale is None else self.scale


OPTIONS = tuple(option.name for option in fields(AttentionOptions) if option.init)
