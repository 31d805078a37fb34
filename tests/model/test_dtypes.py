"""Models of several dtypes, under autocast, quantised or offloaded: as transformers runs them, or refused by name."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
from forktree import Decoder, Greedy, InvalidInput, UnsupportedModel, generate, sequence_logprobs
from forktree.model.attach import attach
from forktree.model.head import OwnHead
from forktree.model.runner import Runner

FP32, BF16 = torch.float32, torch.bfloat16


class Int8Linear(nn.Module):
    """Weight-only: int8 rows, each with a scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("rows", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.rows.to(x.dtype) * self.scale.to(x.dtype))


class InBf16(nn.Module):
    """A module of a model in fp32 that computes in bf16."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.bfloat16()

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> Any:
        cos, sin = position_embeddings
        out, weights = self.module(
            hidden_states=hidden_states.bfloat16(), position_embeddings=(cos.bfloat16(), sin.bfloat16()), **kwargs
        )
        return out.float(), weights


def in_bf16_embeddings(model: Any) -> None:
    model.model.embed_tokens.bfloat16()


def with_an_fp32_end(model: Any) -> None:
    model.bfloat16()
    model.model.norm.float()
    model.lm_head.float()


def with_a_bf16_layer(model: Any) -> None:
    layer = model.model.layers[1]
    layer.self_attn = InBf16(layer.self_attn)


def with_int8_weights(model: Any) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))


def with_int8_products(model: Any) -> None:
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


def offloaded(model: Any) -> None:
    pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu")


def as_it_is(model: Any) -> None:
    pass


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", BF16)


# How the model is changed, what it runs under, dtypes of each layer's KV and of the hidden states, and how far its
# logits are rounded: a step of bf16 (2^-8) of the largest, 12, over layers; a step of int8 for products in int8.
SETTINGS: dict[str, tuple[Callable[[Any], None], Callable[[], Any], list[torch.dtype], torch.dtype, float]] = {
    "autocast": (as_it_is, autocast, [BF16, BF16], FP32, 0.3),
    "bf16 embeddings": (in_bf16_embeddings, nullcontext, [FP32, FP32], FP32, 1e-4),
    "fp32 norm and head": (with_an_fp32_end, nullcontext, [BF16, BF16], FP32, 0.3),
    "a bf16 layer": (with_a_bf16_layer, nullcontext, [FP32, BF16], FP32, 0.3),
    "int8 weights": (with_int8_weights, nullcontext, [FP32, FP32], FP32, 1e-4),
    "int8 products": (with_int8_products, nullcontext, [FP32, FP32], FP32, 1.5),
    "offloaded": (offloaded, nullcontext, [FP32, FP32], FP32, 1e-4),
}


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("setting", SETTINGS)
def test_each_runs_as_in_transformers(setting: str) -> None:
    """Decoder, log-probs and drop-in: no token is likelier to the model itself than the one chosen, but by rounding."""
    change, mode, kv, hidden, atol = SETTINGS[setting]
    model = tiny.new_model(eos=None)
    change(model)
    prompt, new = [3, 1, 4, 1, 5, 9, 2, 6], 24
    with mode():
        decoder = Decoder(model, num_slots=128)
        spec = decoder.worker.runner.spec
        assert [layer.format.dtype for layer in spec.layers] == kv and spec.hidden_dtype == hidden
        assert [x.dtype for pool in decoder.worker.runner.pools for x in pool.tensors] == [x for x in kv for _ in "kv"]
        assert spec.bytes_per_slot == sum(2 * 2 * 8 * dtype.itemsize for dtype in kv)
        found = decoder.search([prompt], Greedy(), max_new_tokens=new)[0].best.token_ids
        ids = torch.tensor([prompt])
        dropped_in = model.generate(ids, custom_generate=generate, do_sample=False, max_new_tokens=new)[0].tolist()
        texts = [prompt + found, dropped_in]
        log_probs = sequence_logprobs(decoder, texts)
        for text, ours in zip(texts, log_probs, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([text]), use_cache=False).logits[0, :-1].double()
            chosen = logits.gather(1, torch.tensor(text[1:])[:, None])[:, 0]
            short = (logits.amax(1) - chosen)[len(prompt) - 1 :]
            assert len(short) == new and float(short.max()) <= atol
            assert np.abs(ours - (chosen - logits.logsumexp(1)).numpy()).max() <= atol
        if atol < 1e-3:
            plain = model.generate(ids, do_sample=False, max_new_tokens=new)[0].tolist()
            assert texts == [plain, plain]


def test_autocast_is_part_of_the_model_that_was_verified() -> None:
    model = tiny.new_model()
    runner = Runner(attach(model), num_slots=4)
    with autocast():
        cast = Runner(attach(model), num_slots=4)
        for call in (lambda: runner.forward([1], [0], [0], {}), lambda: runner.logits(torch.zeros(1, 32))):
            with pytest.raises(
                InvalidInput, match=r"^llama: expected autocast to be off as when .*, got torch.bfloat16"
            ):
                call()
    with pytest.raises(InvalidInput, match=r"^llama: expected autocast to be torch.bfloat16 as when .*, got off"):
        cast.forward([1], [0], [0], {})


class Uneven(nn.Linear):
    """Rounds where forktree runs the model, not where the model runs itself."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out.bfloat16() if torch.is_inference_mode_enabled() else out


def uneven(model: Any) -> None:
    model.model.layers[1].self_attn.v_proj.__class__ = Uneven


def with_an_fp32_norm(model: Any) -> None:
    model.bfloat16()
    model.model.norm.float()


def on_two_devices(model: Any) -> None:
    model._hf_hook = type("Hook", (), {"execution_device": "meta"})()


def without_weights(model: Any) -> None:
    model.to("meta")


def with_noise(model: Any) -> None:
    """What a row gives depends on the others."""
    model.model.norm.register_forward_hook(lambda _module, _args, out: out + 9 * out.mean(dim=(0, 1)))


def with_nan(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = torch.nan


def empty(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.zero_()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            uneven,
            "queries, keys and values of one dtype, .* torch.float32, torch.float32 and torch.bfloat16 in layer 1",
        ),
        (with_an_fp32_norm, "the model's own eager forward to run, got RuntimeError in lm_head: .*same dtype"),
        (on_two_devices, "computes on one device, got cpu and meta; load it on one"),
        (without_weights, "computes on one device, got weights on meta only"),
        (with_noise, "not to depend on what else is in the batch, got a relative error of"),
        (with_nan, "finite hidden states and logits from the model's own eager forward, got NaN or infinity"),
        (empty, "hidden states that depend on the text, got the same for all; load the weights first"),
    ],
)
def test_what_cannot_run_is_refused_for_its_reason(change: Callable[[Any], None], message: str) -> None:
    model = tiny.new_model()
    change(model)
    with pytest.raises(UnsupportedModel, match=f"^llama: expected .*{message}"):
        attach(model)


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
def test_an_offloaded_model_stays_offloaded(how: str, tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny.new_model(), torch.tensor([[3, 1, 4]])
    expected = copy.deepcopy(model)(ids).logits
    if how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    spec = attach(model)
    assert spec.packed.device.type == "cpu" and isinstance(spec.head, OwnHead)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.equal(model(ids).logits, expected)
