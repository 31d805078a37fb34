"""Reads prompts in the forms that people have them in, and encodes them as token ids."""

import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from forktree.checks import is_integer, shown
from forktree.errors import InvalidInput

Prompt = str | list[int]


def read_prompts(given: Any) -> list[Prompt]:
    """Returns each prompt of `given`: its text, or its token ids.

    Args:
        given: A text, token ids, or an iterable of these. Token ids may be any sequence of integers, an array or tensor
            `[n]`, or what a tokenizer returns: a mapping with `input_ids` and perhaps an `attention_mask`, whose
            padding is left out. By itself such a mapping, array or tensor may also be `[B, n]`: B prompts.

    Raises:
        InvalidInput: Something else was given, such as chat messages; names the prompt and what to do.
    """
    if isinstance(given, str):
        return [str(given)]
    if isinstance(given, np.ndarray) and given.dtype.kind in "UO":
        given = given.tolist()
    if isinstance(given, Mapping | np.ndarray | torch.Tensor):
        return [*_rows("prompts", given)]
    items = _items("prompts", given)
    if items and all(map(is_integer, items)):
        return [list(map(operator.index, items))]
    if _are_messages(items):
        raise _wrong("prompts", items)
    return [_read_prompt(f"prompt {i}", item) for i, item in enumerate(items)]


def _read_prompt(name: str, given: Any) -> Prompt:
    """Reads one of several prompts."""
    if isinstance(given, str):
        return str(given)
    if not isinstance(given, Mapping | np.ndarray | torch.Tensor):
        return _ids(name, given)
    rows = _rows(name, given)
    if len(rows) != 1:
        raise InvalidInput(f"{name} must be one prompt, got {len(rows)} rows: pass such a batch by itself")
    return rows[0]


def _rows(name: str, given: Any) -> list[list[int]]:
    """Token ids `[n]`, one row, or `[B, n]`, ragged or not; of a mapping, without padding."""
    if isinstance(given, Mapping):
        return unpadded(name, given)
    if isinstance(given, np.ndarray | torch.Tensor):
        return [_ids(name, row) for row in given] if given.ndim == 2 else [_ids(name, given)]
    items = _items(name, given)
    if all(map(is_integer, items)):
        return [list(map(operator.index, items))]
    return [_ids(f"row {i} of {name}", row) for i, row in enumerate(items)]


def _ids(name: str, given: Any) -> list[int]:
    """Token ids `[n]`."""
    if isinstance(given, np.ndarray | torch.Tensor):
        if given.ndim != 1 or (len(given) and not is_integer(given[:1].reshape(()))):
            raise InvalidInput(
                f"{name} must be token ids [n], or [B, n] by itself, got {given.dtype} {list(given.shape)}"
            )
        ids: list[int] = given.tolist()
        return ids
    items = _items(name, given)
    if not all(map(is_integer, items)):
        raise _wrong(name, given)
    return list(map(operator.index, items))


def unpadded(name: str, given: Mapping[str, Any]) -> list[list[int]]:
    """Returns the rows of `input_ids`, each without the padding that `attention_mask` marks at its ends.

    Args:
        name: What `given` is called in error messages.
        given: What a tokenizer returns.

    Raises:
        InvalidInput: It lacks `input_ids`, has inputs that would be ignored, or its mask has another shape or pattern.
    """
    if "input_ids" not in given:
        raise _wrong(name, given)
    if unread := [key for key in given if key in UNREAD]:
        raise InvalidInput(f"{name} must be input_ids and attention_mask, got {', '.join(unread)} as well")
    rows, mask = _rows(f"input_ids of {name}", given["input_ids"]), given.get("attention_mask")
    if mask is None or not rows:
        return rows
    try:
        several = [mask] if not len(mask) or np.ndim(mask[0]) == 0 else mask
        masks = [np.asarray(row.tolist() if hasattr(row, "tolist") else row) for row in several]
    except (TypeError, ValueError, KeyError):
        raise InvalidInput(f"attention_mask of {name} must be zeros and ones, got {shown(mask)}") from None
    if [m.shape for m in masks] != [(len(r),) for r in rows]:
        raise InvalidInput(
            f"attention_mask of {name} must have the shape of input_ids, rows of {[len(r) for r in rows]}, got rows of "
            f"{[m.size for m in masks]}"
        )
    found = []
    for i, (row, seen) in enumerate(zip(rows, masks, strict=True)):
        at = np.flatnonzero(seen)
        if not np.isin(seen, (0, 1)).all() or (len(at) and at[-1] - at[0] >= len(at)):
            raise InvalidInput(
                f"attention_mask of {name} must be ones with zeros before or after them, got {seen.tolist()!r:.60} in "
                f"row {i}"
            )
        found.append(row[at[0] : at[-1] + 1] if len(at) else [])
    return found


def _items(name: str, given: Any) -> list[Any]:
    if isinstance(given, str | bytes | bytearray | memoryview | Mapping | set | frozenset) or not isinstance(
        given, Iterable
    ):
        raise _wrong(name, given)
    return list(given)


def _are_messages(items: Sequence[Any]) -> bool:
    return bool(items) and all(isinstance(item, Mapping) and "role" in item for item in items)


def _wrong(name: str, given: Any) -> InvalidInput:
    what = f"got {type(given).__name__} {shown(given)}"
    if _are_messages([given] if isinstance(given, Mapping) else given if isinstance(given, list | tuple) else []):
        what += ": render chat messages by tokenizer.apply_chat_template(messages, add_generation_prompt=True)"
    elif isinstance(given, Mapping):
        what += ": a mapping needs input_ids"
    elif isinstance(given, bytes | bytearray):
        what += ": decode it to a text"
    return InvalidInput(f"{name} must be a text or token ids, {what}")


def encode(tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
    """Returns the token ids of each text.

    Raises:
        InvalidInput: The tokenizer fails on a text, as tokenizers without an unknown token do; shows the text.
    """

    def ids_of(some: Sequence[str]) -> list[list[int]]:
        return [list(ids) for ids in tokenizer(list(some), add_special_tokens=add_special_tokens).input_ids]

    try:
        return ids_of(texts)
    except Exception:  # of any type, and without naming the text
        for text in texts:
            try:
                ids_of([text])
            except Exception as error:
                raise InvalidInput(f"expected a text that the tokenizer can read, got {shown(text)}: {error}") from None
        raise


def tokenise(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of each text, without the special tokens that the tokenizer adds at its end.

    An EOS there would end a prompt before its answer begins. Tokens that the tokenizer adds in front, such as BOS,
    stay; so do those that the text spells out, EOS included. Warns once if a text begins with the BOS that the
    tokenizer then adds in front of it again.
    """
    if not texts:
        return []
    found, twice = [], False
    bos = tokenizer.bos_token_id
    with_special = without = encode(tokenizer, texts)
    if tokenizer.num_special_tokens_to_add():
        without = encode(tokenizer, texts, add_special_tokens=False)
    for whole, own in zip(with_special, without, strict=True):
        starts = range(len(whole) - len(own), -1, -1)
        before = next((k for k in starts if whole[k : k + len(own)] == own), len(whole) - len(own))
        found.append(list(whole[: before + len(own)]))
        twice |= bos is not None and whole[before - 1 : before] == [bos] == own[:1]
    if twice:
        warnings.warn(
            f"two BOS tokens in a row: the text begins with {tokenizer.bos_token!r}, as rendered chat templates do, "
            "and the tokenizer puts another before it; pass the text without, or its ids by add_special_tokens=False",
            stacklevel=2,
        )
    return found


# inputs of a model that prompts cannot carry
UNREAD = ("inputs_embeds", "position_ids", "pixel_values", "input_features", "past_key_values")
