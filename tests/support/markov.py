"""Language models whose next token depends on the last one alone, by a table: all that a search does can be enumerated.

`MarkovLM` is a real Llama with weights made by hand: attention and MLP add nothing, embeddings are one-hot, so that the
logits of the next token are a row of `lm_head`. A few tokens used as states play any finite protocol.

    coin = MarkovLM({":": {"h": 0.3, "t": 0.7}, "h": {EOS: 1}, "t": {EOS: 1}})
    coin.texts(":", 4) == {"h": 0.3, "t": 0.7}
    coin.decoder.search(":", Sample(num_return_sequences=9))
"""

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Self, TypeVar

import numpy as np
import torch
import transformers as hf

from forktree import Decoder
from tiny import EOS, character_tokenizer

T = TypeVar("T")

NEVER = -1e4  # the logit of what has probability 0; finite, since 0 times infinity is NaN


class MarkovLM:
    """A Llama, its tokenizer and a decoder; tokens are single characters, and EOS, whose id is 0.

    Args:
        rows: of a character, the probability of each character after it; `EOS` is one. What is not named has
            probability 0, and EOS follows a character without a row. Rows need not sum to 1: they are normalised.
    """

    def __init__(self, rows: Mapping[str, Mapping[str, float]]) -> None:
        named = [c for key, row in rows.items() for c in (key, *row)]
        self.characters = "".join(dict.fromkeys(c for c in named if c != EOS))
        self.names = [EOS, *self.characters]
        ids = {name: i for i, name in enumerate(self.names)}
        weights = np.zeros((len(ids), len(ids)))
        for key, row in rows.items():
            for character, weight in row.items():
                weights[ids[key], ids[character]] = weight
        weights[weights.sum(axis=1) == 0, 0] = 1
        self.probabilities = weights / weights.sum(axis=1, keepdims=True)
        """Of each token, the probability of each token after it, fp64 `[V, V]`."""

    @classmethod
    def random(cls, characters: str, *, seed: int = 0, spread: float = 1.0, end: float = 0.2) -> Self:
        """Any character may follow any. spread: the lower, the more the rows differ. end: the mean share of EOS."""
        rng, names = np.random.default_rng(seed), [EOS, *characters]
        mean = np.array([end, *[(1 - end) / len(characters)] * len(characters)])
        rows = {c: rng.dirichlet(mean * len(names) * spread) for c in characters}
        return cls({c: dict(zip(names, map(float, row), strict=True)) for c, row in rows.items()})

    @cached_property
    def tokenizer(self) -> hf.PreTrainedTokenizerFast:
        """One token a character, in the order of `characters`; EOS for any other character."""
        return character_tokenizer(self.characters)

    @cached_property
    def model(self) -> hf.LlamaForCausalLM:
        """The Llama: not to be changed."""
        vocab = len(self.names)
        hidden = -(-vocab // 8) * 8
        config = hf.LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=None,
            pad_token_id=None,
            eos_token_id=0,
        )
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        logits = np.full((vocab, vocab), NEVER)
        np.log(self.probabilities, out=logits, where=self.probabilities > 0)
        with torch.no_grad():
            layer = model.model.layers[0]
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            model.model.embed_tokens.weight.copy_(torch.eye(vocab, hidden))
            scale = math.sqrt(1 / hidden + config.rms_norm_eps)  # what the last norm divides a one-hot row by
            model.lm_head.weight.zero_()[:, :vocab] = torch.from_numpy(logits.T * scale).float()
        return model

    @cached_property
    def decoder(self) -> Decoder:
        """A decoder that all tests may share."""
        return self.new_decoder()

    def new_decoder(self, **options: Any) -> Decoder:
        """A decoder of one's own."""
        return Decoder(self.model, self.tokenizer, **{"num_slots": 8192, **options})

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        return [self.names.index(c) for c in text]

    def tempered(self, temperature: float) -> np.ndarray:
        """The table at a sampling temperature, fp64 `[V, V]`; 0 is greedy."""
        if temperature == 0:
            return np.eye(len(self.names))[self.probabilities.argmax(axis=1)]
        weights = self.probabilities ** (1 / temperature)
        return weights / weights.sum(axis=1, keepdims=True)

    def texts(self, prompt: str, max_new_tokens: int, *, temperature: float = 1.0) -> dict[str, float]:
        """Every text after `prompt` with its probability.

        Texts of `max_new_tokens` characters were ended by that limit, all shorter ones by EOS.
        """
        table, found = self.tempered(temperature), {}
        open_ = {"": 1.0}
        for _ in range(max_new_tokens):
            longer: dict[str, float] = {}
            for text, p in open_.items():
                row = table[self.names.index((prompt + text)[-1])]
                if p * row[0] > 0:
                    found[text] = p * row[0]
                longer |= {text + c: p * q for c, q in zip(self.characters, row[1:], strict=True) if q > 0}
            open_ = longer
        return found | open_

    def log_prob(self, prompt: str, text: str, *, ended: bool = True) -> float:
        """Log-prob of a text after `prompt`; ended: and of EOS after it."""
        ids = [*self.ids(prompt)[-1:], *self.ids(text), *[0] * ended]
        with np.errstate(divide="ignore"):
            return float(np.log(self.probabilities)[ids[:-1], ids[1:]].sum())


def expectation(texts: Mapping[str, float], value: Callable[[str], float]) -> float:
    """The mean of a function of the text."""
    return sum(p * value(text) for text, p in texts.items())


def pushed(texts: Mapping[str, float], function: Callable[[str], T]) -> dict[T, float]:
    """The distribution of what a function makes of the text, such as its answer."""
    found: dict[T, float] = {}
    for text, p in texts.items():
        value = function(text)
        found[value] = found.get(value, 0.0) + p
    return found
