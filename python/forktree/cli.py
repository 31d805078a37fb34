"""The command line: `forktree generate`, `forktree demo` and `forktree env`."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from forktree.errors import ForktreeError, InvalidInput

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Search-time decoding of Hugging Face language models: shared tokens are stored once and computed once.",
)
console = Console(stderr=True)

GENERATE_HELP = """Search an answer for every prompt of a JSON Lines file.

Each input line is {"prompt": "..."}; more keys are allowed and ignored. Each output line holds one prompt's \
candidates, best first, with their scores and token counts; it is written and synced as soon as it is known, so a \
run that is stopped goes on with --resume.

A scorer is a value head on the model's own hidden state (a .safetensors file with score.weight, or score.0.weight and \
score.2.weight), the directory of a reward model (base model plus such a head), or module:function, a Python function \
of (prompt, response).

Examples:

forktree generate --model DIR --prompts in.jsonl --out out.jsonl --search beam --num-beams 8

forktree generate --model DIR --prompts in.jsonl --out out.jsonl --search best-of-n --scorer my_module:reward

forktree generate --model DIR --prompts in.jsonl --out out.jsonl --search particle --num-particles 16 \
--scorer head.safetensors
"""


@app.command(help=GENERATE_HELP)
def generate(
    model: Annotated[Path, typer.Option(help="Directory of the model: config.json, *.safetensors, tokenizer.")],
    prompts: Annotated[Path, typer.Option(help='Input, JSON Lines: {"prompt": "..."} a line.')],
    out: Annotated[Path, typer.Option(help="Output, JSON Lines. Must not exist, unless --resume.")],
    search: Annotated[str, typer.Option(help="greedy, sample, best-of-n, beam or particle.")] = "greedy",
    scorer: Annotated[
        str | None,
        typer.Option(help="best-of-n, particle: a head file, a reward-model directory or module:function."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens behind a prompt.")] = 256,
    seed: Annotated[int, typer.Option(help="Same seed and prompt, same text.")] = 0,
    num_particles: Annotated[int | None, typer.Option(help="particle: how many (16).")] = None,
    num_samples: Annotated[int | None, typer.Option(help="best-of-n: how many (16).")] = None,
    num_beams: Annotated[int | None, typer.Option(help="beam: how many (4).")] = None,
    num_return_sequences: Annotated[int | None, typer.Option(help="sample, beam: candidates a prompt (1).")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="beam: exponent on the length (1.0).")] = None,
    early_stopping: Annotated[str | None, typer.Option(help="beam: true, false or never (false).")] = None,
    temperature: Annotated[float | None, typer.Option(help="Divides the logits (1.0; 0.8 with a scorer).")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most likely tokens (0 = all).")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the most likely tokens up to mass p (1.0).")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep tokens this likely beside the best (0).")] = None,
    stop: Annotated[list[str] | None, typer.Option(help=r"Text that ends an answer; may be repeated (\n, \t).")] = None,
    step_delimiter: Annotated[str | None, typer.Option(help=r"particle: text that ends a step (\n\n).")] = None,
    max_step_tokens: Annotated[int | None, typer.Option(help="particle: most tokens of a step (1024).")] = None,
    max_steps: Annotated[int | None, typer.Option(help="particle: most steps (40).")] = None,
    weight_temperature: Annotated[float | None, typer.Option(help="particle: divides the rewards' logits (1).")] = None,
    resampling: Annotated[str | None, typer.Option(help="particle: systematic or multinomial (systematic).")] = None,
    activation: Annotated[str, typer.Option(help="Of a head's output: sigmoid, tanh or identity.")] = "sigmoid",
    scorer_time_limit: Annotated[float, typer.Option(help="module:function: seconds a call may take.")] = 60.0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    num_slots: Annotated[int | None, typer.Option(help="Tokens whose KV fits at once (from free memory).")] = None,
    max_batch_tokens: Annotated[int, typer.Option(help="Most tokens of one forward pass.")] = 512,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an output file: keep what it has.")] = False,
) -> None:
    """See `GENERATE_HELP`."""
    given = dict(
        num_particles=num_particles,
        num_samples=num_samples,
        num_beams=num_beams,
        num_return_sequences=num_return_sequences,
        length_penalty=length_penalty,
        early_stopping=_early_stopping(early_stopping),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop=tuple(map(_unescape, stop)) if stop else None,
        step_delimiter=_unescape(step_delimiter) if step_delimiter is not None else None,
        max_step_tokens=max_step_tokens,
        max_steps=max_steps,
        weight_temperature=weight_temperature,
        resampling=resampling,
    )
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    described = {"search": search, **settings, "max_new_tokens": max_new_tokens, "seed": seed}
    if scorer is not None:
        described["scorer"] = scorer
    # what can be checked without loading a model is checked first
    kind = _search_class(search, settings, scorer)
    texts = read_prompts(prompts)
    output = ResultFile(out, texts, described, resume=resume)
    todo = output.missing()
    if not todo:
        console.print(f"{out}: all {len(texts)} results are there")
        return

    decoder = _decoder(model, dtype, device, num_slots, max_batch_tokens)
    from forktree.scoring import load_scorer

    if scorer is not None:
        settings["scorer"] = load_scorer(scorer, activation=activation, time_limit=scorer_time_limit, device=device)
    one = kind(**settings)
    # everything that can be wrong is said here, before the output file is made
    results = decoder.search_iter([texts[i] for i in todo], one, max_new_tokens=max_new_tokens, seed=seed)
    with output:
        failures = _run(results, todo, output, len(texts))
    if failures:
        raise typer.Exit(1)


@app.command()
def demo(
    problems: Annotated[int, typer.Option(help="How many held-out problems.", min=1)] = 200,
    seed: Annotated[int, typer.Option(help="Of the problems and of all draws.")] = 0,
) -> None:
    """Solve held-out problems with the shipped model: greedy, sampling, best-of-N, majority, beam, particles."""
    from forktree.demo.run import run

    run(problems, seed)


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False) -> None:
    """Show versions, how the compiled core was built, and which instruction sets and backends run here, and why."""
    from forktree.env import describe, show

    environment = describe()
    if as_json:
        print(json.dumps(environment, indent=2))
    else:
        show(environment, Console(markup=False))


def _run(results: Iterator[Any], todo: list[int], output: "ResultFile", total: int) -> int:
    """Writes results as they come; returns how many prompts failed. Ctrl-C keeps what is finished."""
    failures = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("prompts", total=total, completed=total - len(todo))
            for result in results:
                index = todo[result.index]
                if result.error is not None:
                    failures += 1
                    _complain(progress.console, f"prompt {index}: {_one_line(result.error)}")
                else:
                    output.write(index, result)
                    for i, candidate in enumerate(result.candidates):
                        if candidate.hypothesis.error is not None:
                            _complain(progress.console, f"prompt {index}, candidate {i}: {candidate.hypothesis.error}")
                            failures += 1
                            break
                progress.advance(bar)
    except KeyboardInterrupt:
        done = total - len(output.missing())
        _complain(console, f"interrupted: {done} of {total} results are in {output.path}; go on with --resume")
        raise typer.Exit(130) from None
    if failures:
        left = len(output.missing())
        _complain(console, f"{failures} of {total} prompts had errors; --resume tries {left} missing ones again")
    return failures


def _search_class(name: str, settings: dict[str, Any], scorer: str | None) -> Any:
    """The search's class, after checking that every given option is one of its fields."""
    from forktree.search import BeamSearch, BestOfN, Greedy, ParticleFilter, Sample

    classes: dict[str, Any] = {
        "greedy": Greedy,
        "sample": Sample,
        "best-of-n": BestOfN,
        "beam": BeamSearch,
        "particle": ParticleFilter,
    }
    if name not in classes:
        raise InvalidInput(f"--search must be one of {', '.join(classes)}, got {name!r}")
    known = {f.name for f in fields(classes[name])}
    for setting in settings:
        if setting not in known:
            flag = "--" + setting.replace("_", "-")
            belongs = [n for n, c in classes.items() if setting in {f.name for f in fields(c)}]
            raise InvalidInput(f"{flag} belongs to --search {' or '.join(belongs)}, got --search {name}")
    if ("scorer" in known) != (scorer is not None):
        need = "needs" if "scorer" in known else "takes no"
        raise InvalidInput(f"--search {name} {need} --scorer, got {scorer or 'none'}")
    if scorer is None:
        classes[name](**settings)  # raises now, before the model is loaded, if a value is out of range
    return classes[name]


def _decoder(model: Path, dtype: str, device: str, num_slots: int | None, max_batch_tokens: int) -> Any:
    import torch
    import transformers

    from forktree.decoder import Decoder
    from forktree.loading import load_model, load_tokenizer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    names = ("auto", "float32", "bfloat16", "float16")
    if dtype not in names:
        raise InvalidInput(f"--dtype must be one of {', '.join(names)}, got {dtype!r}")
    loaded = load_model(model, dtype=None if dtype == "auto" else getattr(torch, dtype))
    try:
        loaded = loaded.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"--device must name a device of this machine, got {device!r}: {_one_line(error)}") from None
    return Decoder(loaded, load_tokenizer(model), num_slots=num_slots, max_batch_tokens=max_batch_tokens)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a JSON Lines file; every line is checked."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"--prompts {path}: cannot be read: {error}") from None
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InvalidInput(f"{path}, line {number}: expected a JSON object, got {line[:40]!r}: {error}") from None
        text = record.get("prompt") if isinstance(record, dict) else None
        if not isinstance(text, str) or not text:
            raise InvalidInput(f'{path}, line {number}: expected {{"prompt": "some text"}}, got {line[:60]!r}')
        texts.append(text)
    if not texts:
        raise InvalidInput(f'{path}: expected at least one line {{"prompt": "..."}}, got none')
    return texts


class ResultFile:
    """JSON Lines of results, each synced to disk when written. A line cut short by a kill is dropped on resume."""

    def __init__(self, path: Path, prompts: list[str], settings: dict[str, Any], *, resume: bool) -> None:
        self.path, self._prompts, self._settings = path, prompts, json.loads(json.dumps(settings))
        self._done: set[int] = set()
        self._whole = 0  # bytes of complete lines
        if path.exists() and not resume:
            raise InvalidInput(f"--out {path} exists: name another file, or go on with it by --resume")
        if not path.parent.is_dir():
            raise InvalidInput(f"--out {path}: directory {path.parent} does not exist")
        if path.exists():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        self._whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[: self._whole].splitlines(), 1):
            try:
                record = json.loads(line)
                index, prompt, settings = record["index"], record["prompt"], record["settings"]
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
                raise InvalidInput(f"{self.path}, line {number}: not a result of forktree generate") from None
            if not (isinstance(index, int) and 0 <= index < len(self._prompts) and self._prompts[index] == prompt):
                raise InvalidInput(f"{self.path}, line {number}: its prompt is not number {index} of --prompts")
            if settings != self._settings:
                raise InvalidInput(
                    f"{self.path}, line {number}: made with {json.dumps(settings)}, expected "
                    f"{json.dumps(self._settings)}: use the same options, or another --out"
                )
            self._done.add(index)

    def missing(self) -> list[int]:
        """Numbers of the prompts that have no result yet."""
        return [i for i in range(len(self._prompts)) if i not in self._done]

    def __enter__(self) -> "ResultFile":
        self._file = open(self.path, "ab")
        self._file.truncate(self._whole)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, index: int, result: Any) -> None:
        """Appends one result and waits until it is on disk."""
        record = {
            "index": index,
            "prompt": self._prompts[index],
            "text": result.text,
            "candidates": [_candidate(c) for c in result.candidates],
            "counters": vars(result.counters),
            "settings": self._settings,
        }
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self._done.add(index)  # an interrupt while the disk is waited for finds it counted
        os.fsync(self._file.fileno())


def _candidate(candidate: Any) -> dict[str, Any]:
    h = candidate.hypothesis
    record = {
        "text": candidate.text,
        "score": None if h.score != h.score else h.score,  # JSON has no NaN
        "log_prob": h.log_prob,
        "num_tokens": len(h.token_ids),
        "finish_reason": h.finish_reason,
        "token_ids": candidate.token_ids,
    }
    if h.step_scores:
        record["step_scores"] = [None if s != s else s for s in h.step_scores]
    if h.weight is not None:
        record["weight"] = h.weight
    if h.error is not None:
        record["error"] = str(h.error)
    return record


def _early_stopping(value: str | None) -> bool | str | None:
    if value is None:
        return None
    return {"true": True, "false": False}.get(value.lower(), value)


def _unescape(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _complain(to: Console, message: str) -> None:
    """One line on standard error, whatever it holds."""
    to.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)


def _one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split())[:500]


def main() -> None:
    """Entry point: whatever is wrong becomes one line on standard error and exit code 2."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except ForktreeError as error:
        _complain(console, _one_line(error))
    except KeyboardInterrupt:
        _complain(console, "interrupted")
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # a usage error of the command line says so by having one
            raise
        if message := _one_line(error.format_message()):  # none: help was printed for want of arguments
            _complain(console, f"{message} See forktree --help and forktree generate --help.")
    sys.exit(2)
