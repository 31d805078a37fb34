"""Stopping at texts: which token completes one, found without decoding every token of every branch."""

from collections.abc import Sequence
from typing import Any

import numpy as np


class TextStop:
    """Stops behind the first token with which the decoded text contains one of `texts`.

    A token can only complete a text if its own piece contains the text's last character; only then are the last
    tokens decoded and searched.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self._tokenizer, self._texts = tokenizer, tuple(texts)
        ends = {text[-1] for text in texts}
        pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        # U+FFFD: a piece of a character split over tokens, which may complete anything. A space may be the one that
        # SentencePiece drops from the front of what it decodes.
        self._may_end = np.array([" " in ends or bool(ends & set(p)) or "\ufffd" in p for p in pieces])
        self._reach = max(len(text.encode()) for text in texts) + 8  # tokens that can hold a text, byte by byte

    def __call__(self, token: int, tokens: Sequence[int]) -> bool:
        """See `forktree.search.request.Stop`."""
        if token < len(self._may_end) and not self._may_end[token]:
            return False
        tail = self._tokenizer.decode(tokens[-self._reach :])
        return any(text in tail for text in self._texts)
