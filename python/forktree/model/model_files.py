"""The files of a model directory: checks that they can be read by transformers, and digests of their contents."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from forktree.errors import InvalidInput
from forktree.terminal import one_line

OBJECTS = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
VOCABULARIES = ("tokenizer.json", "vocab.json")  # megabytes of JSON, parsed only to find out what is wrong
TEXTS = ("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja")
BLOCK, BLOCKS = 1 << 16, 1 << 10  # bytes of a block; how many of a file are read
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
MODULE_COUNT = re.compile(r"(num|n)_(\w+_)?(layers?|experts)")  # transformers makes so many modules, one by one


def check_files(directory: Path) -> None:
    """Raises `InvalidInput`, which names the file, where transformers would fail with a traceback or hang."""
    contents = {name: read_object(directory / name) for name in OBJECTS if (directory / name).exists()}
    for name in ("config.json", "generation_config.json"):
        for key, value in contents.get(name, {}).items():
            if key.endswith("_token_id") and not all(type(i) is int for i in _listed(value)):
                raise InvalidInput(f"{directory / name}: {key} must be an integer or a list of them, got {value!r:.60}")
    limit = max(1000, sum(1 for _ in _tensor_names(directory)))
    for key, value in _integers(contents.get("config.json", {})):
        least = 1 if key in LAYERS else 0
        if MODULE_COUNT.fullmatch(key) and not least <= value <= limit:
            raise InvalidInput(
                f"{directory / 'config.json'}: {key} must lie between {least} and {limit}, got {str(value)[:30]}"
            )


def digests(directory: Path, *, code: bool = False) -> dict[str, str]:
    """A digest of each file of a model directory that decides what the model says.

    Args:
        directory: the model directory.
        code: whether its Python files are among them.

    Returns:
        Digests by file name.
    """
    files = [directory / name for name in (*OBJECTS, *VOCABULARIES, *TEXTS)]
    for pattern in ("*.safetensors", *(["*.py"] if code else [])):
        files += sorted(directory.glob(pattern))
    return {file.name: digest(file) for file in files if file.exists()}


def digest(file: Path) -> str:
    """A digest of a file's size and content.

    A file of up to 64 MiB is read as a whole; of a larger one 1,024 evenly spaced blocks of 64 KiB are read. That tells
    models, trainings, merges and formats apart, but does not see the edit of a single row.
    """
    try:
        size = file.stat().st_size
        found = hashlib.blake2b(str(size).encode(), digest_size=16)
        with file.open("rb") as content:
            for i in range(BLOCKS):
                content.seek(i * BLOCK if size <= BLOCK * BLOCKS else i * (size - BLOCK) // (BLOCKS - 1))
                found.update(content.read(BLOCK))
    except OSError as error:
        raise InvalidInput(f"{file}: cannot be read: {error.strerror}") from None
    return found.hexdigest()


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; raises `InvalidInput` if there is none."""
    try:
        content = json.loads(file.read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{file}: cannot be read as JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise InvalidInput(f"{file}: expected a JSON object, got {content!r:.40}")
    return content


def _tensor_names(directory: Path) -> Iterator[str]:
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                yield from tensors.keys()
        except (OSError, SafetensorError) as error:
            raise InvalidInput(f"{file}: not a readable safetensors file: {one_line(error)}") from None


def _integers(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _integers(value)
        elif type(value) is int:
            yield key, value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
