"""Models and tokenizers from local directories of safetensors."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from forktree.errors import InvalidInput

# transformers would make an empty tokenizer where there is none
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_model(directory: str | Path, *, dtype: torch.dtype | None = None, base: bool = False) -> Any:
    """A model in evaluation mode. `base`: without a language-model head (a reward model's trunk).

    Only safetensors are read, no remote code is run, and every weight must be in the checkpoint: a missing one is an
    error, never a random tensor.
    """
    path = Path(directory)
    if not path.is_dir():
        raise InvalidInput(f"model must be a directory, got {str(directory)!r}, which is not one")
    if not (path / "config.json").is_file():
        raise InvalidInput(f"{path}: no config.json in this model directory")
    if not list(path.glob("*.safetensors")):
        held = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        raise InvalidInput(
            f"{path}: expected *.safetensors, got {', '.join(held) or 'no weights'}; "
            "convert the checkpoint with model.save_pretrained(directory)"
        )
    try:
        model, info = (AutoModel if base else AutoModelForCausalLM).from_pretrained(
            path, dtype=dtype or "auto", local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InvalidInput(f"{path}: transformers cannot load this model: {_one_line(error)}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise InvalidInput(f"{path}: {len(missing)} weights are missing from the safetensors, first {missing[0]!r}")
    return model.eval()


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer of a model directory."""
    if not any((Path(directory) / name).is_file() for name in TOKENIZER_FILES):
        raise InvalidInput(f"{directory}: expected a tokenizer, got none of {', '.join(TOKENIZER_FILES)}")
    try:
        return AutoTokenizer.from_pretrained(Path(directory), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{directory}: cannot load a tokenizer from here: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
