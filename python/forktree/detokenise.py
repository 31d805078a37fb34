"""From tokens to text: what a response says."""

from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import Any


def response_text(tokenizer: Any, prompt: Sequence[int]) -> Callable[[Iterable[int]], str]:
    """A function that gives the text of tokens after `prompt`.

    It is the text of prompt and tokens, less that of the prompt, both without special tokens. Decoded alone, tokens
    would lose a leading space with a tokenizer that drops it.

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
    return lambda tokens: added_text(before, decode([*window, *map(int, tokens)]))


def added_text(before: str, whole: str) -> str:
    """What `whole` has beyond `before`, with which it begins but for what decoding more has changed at its end."""
    if whole.startswith(before):
        return whole[len(before) :]
    same = takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
    return whole[len(list(same)) :]
