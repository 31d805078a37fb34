"""Tiny random fp32 models and a tokenizer of single characters, shared by the tests of searches and the engine."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from forktree import Decoder
from forktree.engine import worker
from forktree.engine.worker import ModelWorker
from forktree.model import runner
from forktree.model.attached import attached
from forktree.ops import KVFormat, KVPool

EOS = "<eos>"
CHARACTERS = "\n0123456789abcd+-=. "
_POOL = KVFormat.pool
VOCAB = 1 + len(CHARACTERS)
SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    pad_token_id=None,
    bos_token_id=None,
)
# RoPE that ends at max_position_embeddings
LIMITED = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)


def character_tokenizer(characters: str) -> hf.PreTrainedTokenizerFast:
    """One token a character: 0 is EOS, and any other character; then `characters` in order."""
    ids = {EOS: 0, **{c: 1 + i for i, c in enumerate(characters)}}
    raw = Tokenizer(models.WordLevel(ids, unk_token=EOS))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    raw.decoder = decoders.Fuse()
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS, clean_up_tokenization_spaces=False)


@cache
def tokenizer() -> hf.PreTrainedTokenizerFast:
    """Of `CHARACTERS`."""
    return character_tokenizer(CHARACTERS)


def new_model(
    kind: str = "llama", *, vocab: int = VOCAB, seed: int = 0, spread: float = 0.3, eos: int | None = 0, **options: Any
) -> hf.PreTrainedModel:
    """A model of one's own, to be changed at will. spread: size of its weights; the larger, the surer its logits."""
    torch.manual_seed(seed)
    config_class = {"llama": hf.LlamaConfig, "qwen3": hf.Qwen3Config}[kind]
    if kind == "qwen3":
        options = {"head_dim": 8, **options}
    config = config_class(vocab_size=vocab, initializer_range=spread, eos_token_id=eos, **{**SIZES, **options})
    return hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@cache
def model(kind: str = "llama", *, vocab: int = VOCAB, spread: float = 0.3, eos: int | None = 0) -> hf.PreTrainedModel:
    """A model shared by many tests: not to be changed."""
    return new_model(kind, vocab=vocab, spread=spread, eos=eos)


def decoder(kind: str = "llama", **options: Any) -> Decoder:
    """A new decoder on the shared model and tokenizer. What was verified before is not verified again."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(worker, "attach", attached)
        return Decoder(model(kind), tokenizer(), **{"num_slots": 2048, **options})


def prompts(count: int, *, seed: int = 0, shortest: int = 2, longest: int = 24) -> list[str]:
    """Different texts of different lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, count)
    return ["".join(rng.choice(list(CHARACTERS[1:]), size)) for size in lengths]


def pools_of_nan(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """New pools have room for `first` slots; reading one that nobody wrote spoils everything."""
    monkeypatch.setattr(runner, "FIRST_SLOTS", first)
    monkeypatch.setattr(runner, "FIRST_BYTES", 0)

    def spoilt(*arguments: Any) -> KVPool:
        pool = _POOL(*arguments)
        for x in pool.tensors:
            x.fill_(torch.nan)
        return pool

    monkeypatch.setattr(KVFormat, "pool", spoilt)


@torch.no_grad()
def next_log_probs(model: hf.PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """Log-probs of the token after `tokens`, fp64 `[V]`, by transformers alone."""
    logits = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0, -1]
    return logits.double().log_softmax(dim=-1)


@torch.no_grad()
def last_hidden(model: hf.PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """Post-norm hidden state of the last of `tokens`, `[H]`, by transformers alone."""
    return model.base_model(input_ids=torch.tensor([list(tokens)]), use_cache=False).last_hidden_state[0, -1]


@cache
def sequence_probabilities(
    model: hf.PreTrainedModel, prompt: tuple[int, ...], steps: int
) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of exactly `steps` tokens, by exact enumeration."""
    found = {(): 1.0}
    for _ in range(steps):
        found = {
            (*seen, token): p * float(q)
            for seen, p in found.items()
            for token, q in enumerate(next_log_probs(model, [*prompt, *seen]).exp())
        }
    return found


def texts(results: Sequence[Any]) -> list[list[str | None]]:
    """Texts of all candidates of every result; raises the error of one that failed."""
    return [[c.text for c in r.candidates] for r in results if r.best]


def assert_all_returned(worker: ModelWorker) -> None:
    """Nobody holds a slot but the kept prefixes, and the books balance."""
    worker.tree.check()
    kept = worker.prefixes.branches()
    prefixes = {tuple(b.tokens[: i + 1].tolist()) for b in kept for i in range(b.length)}
    alive = int((worker.tree.branch_node >= 0).sum())
    assert alive == len(kept), f"{alive} branches are alive, {len(kept)} prefixes are kept"
    assert worker.tree.slots.in_use <= len(prefixes)
    worker.prefixes.clear()
    worker.tree.check()
    assert worker.tree.slots.in_use == 0
