"""What `forktree env` tells: versions, how the compiled core was built, and what runs on this machine, with reasons."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import forktree
from forktree import _core
from forktree.device.properties import gpu_names
from forktree.errors import InvalidInput
from forktree.ops.dispatch import BACKENDS, available, missing


def describe() -> dict[str, Any]:
    """All of it, ready for JSON. Raises InvalidInput if FORKTREE_ISA or FORKTREE_BACKEND names what is not there."""
    return {
        "versions": {
            "forktree": forktree.__version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in ("torch", "transformers", "triton")},
        },
        "core": dict(_core.build),
        "isas": _isas(),
        "threads": torch.get_num_threads(),
        "backends": _backends(),
        "gpus": gpu_names(),
    }


def show(environment: dict[str, Any], console: Console) -> None:
    """Prints what `describe` found."""
    core, gpus = environment["core"], environment["gpus"]
    facts = Table.grid(padding=(0, 2))
    for package, number in environment["versions"].items():
        facts.add_row(package, number or "not installed")
    facts.add_row("core", f"{core['compiler']}, {'OpenMP' if core['openmp'] else 'std::thread'}")
    facts.add_row("flags", core["flags"])
    facts.add_row("threads", str(environment["threads"]))
    facts.add_row("GPU", ", ".join(gpus) or "none that this torch can use")
    console.print(facts, highlight=False)

    isas = Table("instruction set", "built", "runs here", "chosen", "why")
    for isa in environment["isas"]:
        isas.add_row(isa["name"], *("yes" if isa[key] else "no" for key in ("built", "runs", "chosen")), isa["why"])
    console.print(isas, highlight=False)
    backends = Table("backend", "available", "why")
    for backend in environment["backends"]:
        backends.add_row(backend["name"], "yes" if backend["available"] else "no", backend["why"])
    console.print(backends, highlight=False)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _isas() -> list[dict[str, Any]]:
    try:
        chosen = _core.isa()
    except ValueError as error:
        raise InvalidInput(str(error)) from None
    forced = os.environ.get("FORKTREE_ISA")
    rows = []
    for name, why_not in _core.isas():
        why = why_not
        if name == chosen:
            why = "FORKTREE_ISA names it" if forced else "the best of those that run here"
        built = name in _core.build["isas"].split()
        rows.append({"name": name, "built": built, "runs": not why_not, "chosen": name == chosen, "why": why})
    return rows


def _backends() -> list[dict[str, Any]]:
    forced = os.environ.get("FORKTREE_BACKEND")
    if forced and (why := missing(forced)):
        raise InvalidInput(f"FORKTREE_BACKEND must be one of {', '.join(available())}, got {forced!r}: {why}")
    return [
        {
            "name": name,
            "available": not missing(name),
            "why": missing(name) or ("FORKTREE_BACKEND names it" if name == forced else ""),
        }
        for name in BACKENDS
    ]
