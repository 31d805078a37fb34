"""How forktree enters a transformers model: by an attention function, a mask function and an idle cache.

All live tokens of a step run as one packed row `input_ids [1, T]` with explicit positions. What a token may see is
decided by the step, which the attention function finds in a context variable, because many models pass no keyword
arguments on to their layers. Nothing here is global except the name registered with transformers.
"""

from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.utils.generic import ModelOutput

from forktree.model.decoder_layers import find_decoder_layers, watched
from forktree.model.fingerprint import autocast_dtype
from forktree.model.replica import Replica
from forktree.model.step import Step
from forktree.ops import AttentionOptions

IMPLEMENTATION = "forktree"

# Rows of an fp32 matrix product differ bitwise between fewer than 16 rows and more; from 16 on they agree.
# Padding makes a token's result independent of how many others share its step. In bf16 rows differ anyway.
FP32_MIN_ROWS = 16


@dataclass(frozen=True, slots=True)
class Window:
    """What our mask function returns instead of a mask; it arrives at the attention as `attention_mask`.

    Attributes:
        size: how many positions a token sees, itself included; None = all earlier ones.
        mask_function: transformers' own description of the mask, `(batch, head, q_pos, kv_pos) -> bool`. `attach`
            compares the two; afterwards nobody reads it.
    """

    size: int | None
    mask_function: Callable[..., Tensor]

    def __getitem__(self, index: Any) -> "Window":
        """The mask of those tokens whose logits are wanted, of which gemma4 keeps all."""
        parts = index if isinstance(index, tuple) else (index,)
        if not all(part in (slice(None), slice(0, None)) for part in parts):
            raise TypeError(f"the model takes {index} of a mask that forktree keeps whole")
        return self


_current: ContextVar[tuple["PackedModel", Step]] = ContextVar("forktree_step")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """What every layer calls: query [1, Hq, T, Dk], key [1, Hk, T, Dk], value [1, Hk, T, Dv] -> [1, T, Hq, Dv]."""
    packed, step = _current.get()
    q, k, v = (_autocast(x)[0].transpose(0, 1) for x in (query, key, value))
    tokens, padding = step.num_tokens, q.shape[0] - step.num_tokens
    if padding:
        q, k, v = q[:tokens], k[:tokens], v[:tokens]
    layer: int = module.layer_idx  # type: ignore[assignment]  # torch types every attribute as Tensor | Module
    options = packed.options_of(layer, scaling, softcap, s_aux)
    # contiguous: no copy in most models, which rotate in this order
    out = step.attend(layer, q.contiguous(), k, v, attention_mask, options)
    return F.pad(out[None], (0, 0, 0, 0, 0, padding)) if padding else out[None], None


def _autocast(x: Tensor) -> Tensor:
    """What autocast makes of an argument of attention, whose own operations it knows and ours it does not."""
    dtype = autocast_dtype(x.device.type)
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def _mask(*, mask_function: Callable[..., Tensor], local_size: int | None = None, **_: object) -> Window:
    return Window(local_size, mask_function)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)


class _NoLayers(list[Any]):
    def __getitem__(self, index: Any) -> Any:
        raise LookupError("the model asked its cache for a layer's state, as convolutions and recurrences do")


class _PassThrough(Cache):
    """Keeps the model from building a cache of its own. Storing happens in the attention function.

    `update` is the wrong place for it: multi-head latent attention hands over what it expands afterwards, and
    layers that share KV never call it.
    """

    def __init__(self) -> None:
        super().__init__(layers=_NoLayers())

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0

    def get_query_offset(self, *_: Any, **__: Any) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, *_: Any, **__: Any) -> tuple[int, int]:
        return query_length, 0


_answer: ContextVar[Any] = ContextVar("what a decoder that has been replaced returns")


class PackedModel:
    """A transformers model and the way to run it on packed tokens.

    It runs as a replica, so nothing of the model is written, and nobody else sees how it runs.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        model = model._modules.get("_orig_mod", model)  # compiled by torch
        self.model = model
        self._replica = Replica(model, IMPLEMENTATION)
        self.decoder = find_decoder(self._replica.root)
        self.parameters = signature(type(self.decoder).forward).parameters  # an override need not tell
        self._cache_name = "cache" if "cache" in self.parameters else "past_key_values"  # renamed in transformers 5.24
        self.device = next(iter(execution_devices(model)))
        self.dtype: torch.dtype = model.dtype
        self.autocast = autocast_dtype(self.device.type)  # as it is while the model is verified
        # the modules of a model need not share a dtype
        self.min_rows = FP32_MIN_ROWS if any(p.dtype == torch.float32 for p in model.parameters()) else 1
        self._options: dict[int, AttentionOptions] = {}  # by layer

    def read_buffers(self) -> None:
        """Copies what was written into buffers of the model, whose memory has stayed."""
        self._replica.read_buffers()
        vars(self).pop("_head", None)

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The modules that compute one layer each, in order; raises LookupError if they cannot be found."""
        config = self.model.config.get_text_config(decoder=True)
        return find_decoder_layers(self.decoder, config.num_hidden_layers)

    @cached_property
    def _head(self) -> nn.Module:
        """Whatever the model does after its decoder, which is replaced."""
        root = Replica(self.model, IMPLEMENTATION).root
        decoder = find_decoder(root)
        vars(decoder).update(_forward_hooks={}, _forward_pre_hooks={}, forward=lambda *_, **__: _answer.get())
        return root

    def after_decoder(self, output: ModelOutput) -> Tensor:
        """The model's own logits [n, V] of what its decoder returns, with last_hidden_state [1, n, H]."""
        hidden = output.last_hidden_state
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        token = _answer.set(output)
        try:
            logits: Tensor = self._head(input_ids=ids, use_cache=False, return_dict=True).logits[0]
        finally:
            _answer.reset(token)
        return logits

    def options_of(
        self, layer: int, scale: float | None, softcap: float | None, sinks: Tensor | None
    ) -> AttentionOptions:
        """A layer's options; they are made, and the sinks looked at, only where it passes others than last time."""
        options = self._options.get(layer)
        if options is None or options.scale != scale or options.softcap != softcap or options.sinks is not sinks:
            options = self._options[layer] = AttentionOptions(scale, softcap, sinks)
        return options

    def padded(self, values: Tensor) -> Tensor:
        """Appends zeros to values [T], up to the fewest rows that a pass has."""
        return F.pad(values, (0, max(0, self.min_rows - values.shape[0])))

    def forward(self, tokens: Tensor, step: Step) -> Tensor:
        """Runs tokens [T], int64 on the model's device, as `step` says. Returns post-norm hidden states [T, H]."""
        # The clone is an ordinary tensor, which its owner may modify in place.
        return self.compute(tokens, step).clone()

    def compute(self, tokens: Tensor, step: Step) -> Tensor:
        """`forward`, but the result is an inference tensor."""
        rows = tokens.shape[0]
        tokens, positions = self.padded(tokens), self.padded(step.rows.positions)
        before = _current.set((self, step))
        try:
            # inference_mode is a tenth faster than no_grad where T is small
            with torch.inference_mode(), watched(self.layers, step.residual) if step.sees_residual else nullcontext():
                output = self.decoder(
                    input_ids=tokens[None],
                    position_ids=positions[None],
                    use_cache=True,
                    return_dict=True,
                    **{self._cache_name: _PassThrough()},
                )
                hidden: Tensor = output.last_hidden_state[0, :rows]
        finally:
            _current.reset(before)
        return hidden


def execution_devices(model: nn.Module) -> set[torch.device]:
    """Devices that a model computes on: those of its parameters, and those to which accelerate moves other ones."""
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("meta")}
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            device = getattr(one, "execution_device", None)
            if device is not None:
                devices.add(torch.empty(0, device=device).device)  # 0 and "cuda" are cuda:0
    return devices


def find_decoder(model: PreTrainedModel) -> nn.Module:
    """The module that ends with the post-norm hidden state.

    Not always `base_model`: OPT never calls it. Nor always `get_decoder`: ModernBERT's is a layer of its head.
    """
    decoder: nn.Module = model.get_decoder()
    decoder = decoder._modules.get("_orig_mod") or decoder  # compiled by torch
    if decoder is not model and isinstance(decoder, PreTrainedModel):
        return decoder
    return next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)
