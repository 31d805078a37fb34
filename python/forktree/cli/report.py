"""What commands tell their user while they run, and the results that they write."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from forktree.cli.results import ResultFile
from forktree.terminal import Terminal, visible

console = Terminal(stderr=True)


@dataclass(frozen=True)
class Outcome:
    """What became of one input: something to write, a complaint, or both."""

    index: int
    record: dict[str, Any] | None
    error: str | None


def write_outcomes(what: str, outcomes: Iterator[Outcome], output: ResultFile) -> None:
    """Writes results as they come, and exits with 1 if any of the inputs had an error. Ctrl-C keeps what is finished.

    Args:
        what: what an input is called in messages.
        outcomes: of the inputs that have no result yet.
        output: where results are written to.
    """
    failures, total = 0, output.total
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task(f"{what}s", total=total, completed=total - len(output.missing()))
            for outcome in outcomes:
                if outcome.record is not None:
                    output.write(outcome.index, outcome.record)
                if outcome.error is not None:
                    failures += 1
                    complain(f"{what} {outcome.index}{outcome.error}")
                progress.advance(bar)
    except KeyboardInterrupt:
        done = total - len(output.missing())
        complain(f"interrupted: {done} of {total} results are in {output.path}; go on with --resume")
        raise typer.Exit(130) from None
    if failures:
        left = len(output.missing())
        complain(f"{failures} of {total} {what}s had errors; --resume tries {left} missing ones again")
        raise typer.Exit(1)


def json_number(value: float) -> float | None:
    """A number as JSON has it: no NaN and no infinity."""
    return value if math.isfinite(value) else None


def say(message: str, style: str = "") -> None:
    """Prints one message on standard error, whatever it holds."""
    console.print(visible(message), style=style, markup=False, highlight=False, soft_wrap=True)


def complain(message: str) -> None:
    """Prints what is wrong on standard error."""
    say(f"error: {message}", "red")
