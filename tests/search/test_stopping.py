"""Stopping at texts, against decoding everything and searching it."""

from collections.abc import Sequence

import numpy as np
import pytest
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import tiny
from forktree.search.stopping import TextStop


def byte_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Bytes, some pieces of several characters, and one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("e", "n"), ("en", "d"), ("Ċ", "Ċ"), (".", "ĊĊ"), ("Ġ", "a"), ("ĊĊ", "a")]
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *("".join(m) for m in merges)])}
    raw = Tokenizer(models.BPE(vocabulary, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken("<end>", special=True)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False)


def sentence_piece_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Pieces carry their leading space, which decoding drops from the front of a text."""
    vocabulary = {piece: i for i, piece in enumerate(["?", "▁", "▁a", "▁b", "a", "b", ":", "▁:"])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    raw.decoder = decoders.Metaspace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False)


def first_stop(stop: TextStop, tokens: Sequence[int]) -> int | None:
    """Number of tokens at which `stop` first says so."""
    return next((n for n in range(1, len(tokens) + 1) if stop(tokens[n - 1], tokens[:n])), None)


@pytest.mark.parametrize("make", [byte_tokenizer, sentence_piece_tokenizer, tiny.tokenizer], ids=lambda f: f.__name__)
def test_stops_behind_the_first_token_that_completes_a_text(make: object) -> None:
    """Random token sequences after some token; the reference decodes every prefix whole and looks for the texts in
    what it has beyond that token."""
    tokenizer, rng = make(), np.random.default_rng(0)
    texts = {
        "byte_tokenizer": [("\n\n",), ("end", "é"), ("aa", " a"), ("<end>",), ("日",), (".\n\na",)],
        "sentence_piece_tokenizer": [("a b",), (": ",), (" ",), ("ab", "b :")],
        "tokenizer": [("\n\n",), ("12",), ("a=", "+b"), (" ",)],
    }[make.__name__]
    likely = sorted(
        {t for group in texts for text in group for t in tokenizer(text, add_special_tokens=False).input_ids}
    )
    ended = 0
    for group in texts:
        stop = TextStop(tokenizer, group)
        for _ in range(60):
            anything = rng.integers(0, len(tokenizer), 24)
            tokens = np.where(rng.random(24) < 0.8, rng.choice(likely, 24), anything).tolist()
            first = tokenizer("a", add_special_tokens=False).input_ids
            prefixes = (
                tokenizer.decode([*first, *tokens[:n]])[len(tokenizer.decode(first)) :]
                for n in range(1, len(tokens) + 1)
            )
            expected = next((n + 1 for n, seen in enumerate(prefixes) if any(t in seen for t in group)), None)
            assert first_stop(stop, tokens) == expected, (group, tokens)
            ended += expected is not None
    assert ended > 60


def test_a_long_text_without_a_stop_is_not_decoded_again_at_every_token() -> None:
    """Tokens whose piece cannot end a text cost no decoding; others decode a short tail only."""
    tokenizer = tiny.tokenizer()
    decoded: list[int] = []

    class Counting:
        all_special_ids = tokenizer.all_special_ids

        def __len__(self) -> int:
            return len(tokenizer)

        def batch_decode(self, ids: list[list[int]]) -> list[str]:
            return tokenizer.batch_decode(ids)

        def decode(self, ids: list[int]) -> str:
            decoded.append(len(ids))
            return tokenizer.decode(ids)

    stop = TextStop(Counting(), ("\n\n",))
    decoded.clear()
    tokens = tokenizer("12\n" * 200).input_ids
    assert first_stop(stop, tokens) is None
    assert len(decoded) == 200 and max(decoded) < 16
