"""Which token completes a text, without decoding everything again."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from forktree.detokenise import added_text


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
        added = [added_text(self._before_text, piece) for piece in pieces]
        # U+FFFD: a piece of a character split over tokens, which may complete anything
        self._may_end = np.array([bool(ends & set(p)) or "\ufffd" in p for p in added])
        self._reach = max(len(text.encode()) for text in texts) + 8  # tokens that can hold a text, byte by byte

    def __call__(self, token: int, tokens: Sequence[int]) -> bool:
        """See `forktree.search.request.Stop`."""
        if token < len(self._may_end) and not self._may_end[token]:
            return False
        tail = added_text(self._before_text, self._tokenizer.decode([*self._before, *tokens[-self._reach :]]))
        return any(text in tail for text in self._texts)


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isalnum()
