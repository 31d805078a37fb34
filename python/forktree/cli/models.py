"""Options that name a model and how it is run, and loading it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from forktree.errors import InvalidInput
from forktree.terminal import one_line

ModelDirectory = Annotated[Path, typer.Option(help="Directory of the model: config.json, *.safetensors, tokenizer.")]
Output = Annotated[Path, typer.Option(help="Output, JSON Lines. Must not exist, unless --resume is given.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
MaxBatchTokens = Annotated[int, typer.Option(help="Maximum number of tokens in one forward pass.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an output file: keep the results it has.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python files of the model directories. Read them first.")
]


def load(model: Path, dtype: str, device: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """Model and tokenizer."""
    import torch
    import transformers

    from forktree.model.checkpoints import load_model, load_tokenizer

    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)  # what matters is raised
    transformers.utils.logging.disable_progress_bar()
    names = ("auto", "float32", "bfloat16", "float16")
    if dtype not in names:
        raise InvalidInput(f"--dtype must be one of {', '.join(names)}, got {dtype!r}")
    loaded = load_model(
        model, dtype=None if dtype == "auto" else getattr(torch, dtype), trust_remote_code=trust_remote_code
    )
    try:
        loaded = loaded.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"--device must name a device of this machine, got {device!r}: {one_line(error)}") from None
    return loaded, load_tokenizer(model, trust_remote_code=trust_remote_code)
