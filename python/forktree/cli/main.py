"""The commands, and `main`, which runs one of them."""

import json
import sys
import traceback
import warnings
from typing import Annotated

import typer

from forktree.cli.generate import GENERATE_HELP, generate
from forktree.cli.report import complain, say
from forktree.cli.score import SCORE_HELP, score
from forktree.errors import ForktreeError
from forktree.terminal import Terminal, one_line

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Search-time decoding of Hugging Face language models: shared tokens are stored once and computed once.",
)
app.command(help=GENERATE_HELP)(generate)
app.command(help=SCORE_HELP)(score)


@app.command()
def demo(
    problems: Annotated[int, typer.Option(help="Number of held-out problems.", min=1)] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the problems and of all sampling.")] = 0,
) -> None:
    """Solve held-out problems with the shipped model: greedy, sampling, best-of-N, majority, beam, particles."""
    from forktree.demo.run import run

    run(problems, seed)


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False) -> None:
    """Show versions, how the compiled core was built, and which instruction sets and backends run here, and why."""
    from forktree.cli.env import describe, show

    environment = describe()
    if as_json:
        print(json.dumps(environment, indent=2))
    else:
        show(environment, Terminal(markup=False))


def main() -> None:
    """Entry point: whatever is wrong becomes one line on standard error and exit code 2."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {one_line(str(message))}")
        sys.exit(_main())


def _main() -> int:
    """Returns the exit code."""
    try:
        return app(standalone_mode=False) or 0
    except ForktreeError as error:
        complain(one_line(error))
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the command line says so by having one
            if message := one_line(error.format_message()):  # none: help was printed for want of arguments
                complain(f"{message} See forktree --help and forktree COMMAND --help.")
        else:
            complain(f"this should not happen, please report it:\n{traceback.format_exc()}")
    return 2
