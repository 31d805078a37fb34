"""Models of known shapes with random weights, and whole calls of forktree and of transformers on them."""

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

import forktree

SHAPES = {  # what the name says; random weights
    "qwen2-0.5b": (
        Qwen2Config,
        dict(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151936,
        ),
    ),
    "llama-3.2-1b": (
        LlamaConfig,
        dict(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
        ),
    ),
    "tiny": (
        Qwen2Config,
        dict(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=1000,
        ),
    ),
}


class Case(NamedTuple):
    search: str  # "beams" or "samples"
    prompt: int  # tokens
    rounds: int  # the median is reported


def build(shape: str, device: str) -> PreTrainedModel:
    """A random bf16 model without an end-of-sequence token, so that every run makes all its tokens."""
    torch.manual_seed(0)
    config_class, sizes = SHAPES[shape]
    config = config_class(
        **sizes, max_position_embeddings=32768, tie_word_embeddings=True, eos_token_id=None, bos_token_id=None
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def sides(
    case: Case, model: PreTrainedModel, args: argparse.Namespace, proofs: list[float]
) -> dict[str, Callable[[], int]]:
    """Calls by name; each returns the bytes of its KV. `proofs` gets the seconds of the model's proof."""
    n = args.width
    prompt = torch.randint(0, model.config.vocab_size, (1, case.prompt), device=args.device)
    slots = case.prompt + n * args.new
    began = time.perf_counter()
    decoder = forktree.Decoder(model, num_slots=slots, prefix_cache=False)
    proofs.append(time.perf_counter() - began)
    beams = case.search == "beams"
    how = dict(num_beams=n, do_sample=False) if beams else dict(num_return_sequences=n, do_sample=True, top_k=0)
    search = forktree.BeamSearch(num_beams=n) if beams else forktree.Sample(num_return_sequences=n)

    def theirs() -> int:
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=args.new,
            pad_token_id=0,
            return_dict_in_generate=True,
            **how,
        )
        assert all(len(row) == case.prompt + args.new for row in out.sequences.tolist())  # waits for the device
        return sum(t.nbytes for layer in out.past_key_values.layers for t in (layer.keys, layer.values))

    def ours() -> int:
        (result,) = decoder.search(prompt[0].tolist(), search, max_new_tokens=args.new)
        assert all(len(c.token_ids) == args.new for c in result.candidates), result.error
        return slots * decoder.worker.runner.bytes_per_slot

    return {"transformers": theirs, "forktree": ours}
