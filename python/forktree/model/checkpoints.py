"""Models and tokenizers from local directories of safetensors."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from forktree.errors import InvalidInput
from forktree.model.model_files import VOCABULARIES, check_files, read_object
from forktree.terminal import one_line

# transformers would make an empty tokenizer where there is none
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
HEADS = ("lm_head.", "score.", "v_head.")  # weights that a trunk, or a model that is no reward model, has no use for


def load_model(
    directory: str | Path, *, dtype: torch.dtype | None = None, base: bool = False, trust_remote_code: bool = False
) -> Any:
    """A model in evaluation mode. `base`: without a language-model head (a reward model's trunk).

    Only safetensors are read, and every weight must be in the checkpoint: a missing one is an error, never a random
    tensor. trust_remote_code: whether Python files of the directory may be run. A directory that needs them is
    refused without it.
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
    check_files(path)
    config = path / "config.json"
    _load(AutoConfig.from_pretrained, config, trust_remote_code=trust_remote_code)
    if (path / "generation_config.json").exists():
        _load(GenerationConfig.from_pretrained, path / "generation_config.json")
    model, info = _load(
        (AutoModel if base else AutoModelForCausalLM).from_pretrained,
        config,
        trust_remote_code=trust_remote_code,
        dtype=dtype or "auto",
        use_safetensors=True,
        output_loading_info=True,
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise InvalidInput(f"{path}: {len(missing)} weights are missing from the safetensors, first {missing[0]!r}")
    unused = sorted(key for key in info["unexpected_keys"] if not key.startswith(HEADS))
    if unused:
        warnings.warn(
            f"{config}: the model that it describes has no place for {len(unused)} of the weights in the safetensors, "
            f"first {unused[0]!r}: they are left out",
            stacklevel=2,
        )
    return model.eval()


def load_tokenizer(directory: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory. trust_remote_code: see `load_model`."""
    path = Path(directory)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise InvalidInput(f"{directory}: expected a tokenizer, got none of {', '.join(TOKENIZER_FILES)}")
    check_files(path)

    def load(*directory: Path, **options: Any) -> Any:
        try:
            tokenizer = AutoTokenizer.from_pretrained(*directory, **options)
            tokenizer("")  # some damage shows only now
            return tokenizer
        except Exception:
            for name in VOCABULARIES:
                if (path / name).exists():
                    read_object(path / name)  # raises, and names the file, if that is the reason
            raise

    named = f"{path}: tokenizer_config.json or tokenizer.json"
    return _load(load, path / "tokenizer_config.json", named, trust_remote_code=trust_remote_code)


def _load(load: Callable[..., Any], file: Path, named: str = "", **options: Any) -> Any:
    """`load`s from the directory of `file`. named: what it reads, if that is more than `file`.

    What damaged files make transformers raise may be anything: it becomes one line.
    """
    try:
        return load(file.parent, local_files_only=True, **options)
    except InvalidInput:
        raise
    except Exception as error:
        message = one_line(error)
        if options.get("trust_remote_code") is False and "trust_remote_code" in str(error):
            raise InvalidInput(
                f"{file}: names Python code in the model directory, which is not run; read it, and allow it by "
                "trust_remote_code=True (--trust-remote-code)"
            ) from None
        if "ignore_mismatched_sizes" in message:
            message = "it gives weights other sizes than they have in the safetensors"
        raise InvalidInput(
            f"{named or file}: transformers cannot load this: {type(error).__name__}: {message}"
        ) from None
