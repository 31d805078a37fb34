"""From tokens to text: what a response says, and which token completes a text, without decoding everything again."""

from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import Any

import numpy as np


def response_text(tokenizer: Any, prompt: Sequence[int]) -> Callable[[Iterable[int]], str]:
    """A function that gives the text of tokens after `prompt`: that of prompt and tokens, less that of the prompt, both
    without special tokens. Alone, tokens would lose a leading space, where the tokenizer drops it from what it decodes.

    Where a character of the prompt is completed by the tokens, it counts to them.

    Of the prompt only its last tokens are decoded, as many as give whole characters (at least one of them): decoding
    then is the same before and after that place, since it only ever joins the bytes of one character, or drops the
    space at the very front. A prompt that never does is decoded whole.
    """
    ids = [int(t) for t in prompt]

    def decode(tokens: list[int]) -> str:
        text: str = tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    count = 16
    while count < len(ids) and ("\ufffd" in (text := decode(ids[-count:])) or not text):
        count *= 2
    window = ids[-count:]
    before = decode(window)
    return lambda tokens: _added(before, decode([*window, *map(int, tokens)]))


class TextStop:
    """Stops after the first token with which the decoded text contains one of `texts`.

    A token can only complete a text if its own piece contains the text's last character; only then are the last
    tokens decoded and searched.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self._tokenizer, self._texts = tokenizer, tuple(texts)
        ends = {text[-1] for text in texts}
        # something stands before every response: a token decoded after it keeps its leading space
        special = set(tokenizer.all_special_ids)
        ordinary = (i for i in range(len(tokenizer)) if i not in special)
        self._before = [next((i for i in ordinary if _is_plain(tokenizer.decode([i]))), 0)]
        self._before_text = tokenizer.decode(self._before)
        pieces = tokenizer.batch_decode([[*self._before, i] for i in range(len(tokenizer))])
        added = [_added(self._before_text, piece) for piece in pieces]
        # U+FFFD: a piece of a character split over tokens, which may complete anything
        self._may_end = np.array([bool(ends & set(p)) or "\ufffd" in p for p in added])
        self._reach = max(len(text.encode()) for text in texts) + 8  # tokens that can hold a text, byte by byte

    def __call__(self, token: int, tokens: Sequence[int]) -> bool:
        """See `forktree.search.request.Stop`."""
        if token < len(self._may_end) and not self._may_end[token]:
            return False
        tail = _added(self._before_text, self._tokenizer.decode([*self._before, *tokens[-self._reach :]]))
        return any(text in tail for text in self._texts)


def _added(before: str, whole: str) -> str:
    """What `whole` has beyond `before`, with which it begins but for what decoding more has changed at its end."""
    if whole.startswith(before):
        return whole[len(before) :]
    same = takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
    return whole[len(list(same)) :]


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isalnum()
