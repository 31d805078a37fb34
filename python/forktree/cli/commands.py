"""The commands, and `main`, which runs one of them."""

import json
import math
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import chain, takewhile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from forktree.cli.inputs import option_text, read_inputs
from forktree.cli.results import ResultFile
from forktree.errors import ForktreeError, InvalidInput
from forktree.model.model_files import digest, digests
from forktree.terminal import Terminal, one_line, visible

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Search-time decoding of Hugging Face language models: shared tokens are stored once and computed once.",
)
console = Terminal(stderr=True)

GENERATE_HELP = """Search an answer for every prompt of a JSON Lines file.

Each input line is {"prompt": "..."}; more keys are allowed and ignored. Each output line holds one prompt's \
candidates, best first, with their scores and token counts; it is written and synced as soon as it is known, so a \
run that is stopped goes on with --resume. The first output line is a header: options and digests of the files that \
the results were made with. --resume refuses a file that was made with others.

A scorer is a value head on the model's own hidden state (a .safetensors file with score.weight, or score.0.weight and \
score.2.weight), the directory of a reward model (base model plus such a head), or module:function, a Python function \
of (prompt, response), looked for in the current directory first. What a reward model is fed, and where its reward is \
read, is said by --reward-format, or by --template, --reward-step-delimiter and --separator, which also change a named \
format.

Texts of options are taken as they are: --stop '\\times' is a backslash and five letters. A line feed is \
--stop $'\\n' in most shells, or --stop '\\n' --escape.

Examples:

forktree generate --model DIR --prompts in.jsonl --out out.jsonl --search beam --num-beams 8

forktree generate --model DIR --prompts in.jsonl --out out.jsonl --search best-of-n --scorer my_module:reward

forktree generate --model DIR --prompts in.jsonl --out out.jsonl --search particle --num-particles 16 \
--scorer head.safetensors

forktree generate --model DIR --prompts in.jsonl --out out.jsonl --search best-of-n --scorer Qwen2.5-Math-PRM-7B \
--reward-format qwen-prm
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
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.")] = None,
    step_delimiter: Annotated[str | None, typer.Option(help=r"particle: text that ends a step (\n\n).")] = None,
    escape: Annotated[
        bool, typer.Option("--escape", help=r"Read \n, \t, \\, \u00e9 in texts of options as in JSON.")
    ] = False,
    max_step_tokens: Annotated[int | None, typer.Option(help="particle: most tokens of a step (1024).")] = None,
    max_steps: Annotated[int | None, typer.Option(help="particle: most steps (40).")] = None,
    weight_temperature: Annotated[float | None, typer.Option(help="particle: divides the rewards' logits (1).")] = None,
    resampling: Annotated[str | None, typer.Option(help="particle: systematic or multinomial (systematic).")] = None,
    activation: Annotated[
        str | None, typer.Option(help="Of a head's output: sigmoid, tanh or identity (the format's, or sigmoid).")
    ] = None,
    reward_format: Annotated[
        str | None, typer.Option(help="Reward-model directory: qwen-prm, math-shepherd, skywork-prm or outcome.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Reward model: text with {prompt} and {response}, or chat ({prompt}{response}).")
    ] = None,
    reward_step_delimiter: Annotated[
        str | None, typer.Option(help="Reward model: text that ends a step of the response, if it reads steps.")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="Reward model: what it is fed in the delimiter's place; it is read there.")
    ] = None,
    scorer_time_limit: Annotated[float, typer.Option(help="module:function: seconds a call may take.")] = 60.0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    num_slots: Annotated[int | None, typer.Option(help="Tokens whose KV fits at once (from free memory).")] = None,
    max_batch_tokens: Annotated[int, typer.Option(help="Most tokens of one forward pass.")] = 512,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an output file: keep what it has.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python files of the model directories. Read them first.")
    ] = False,
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
        stop=tuple(option_text("--stop", text, escape=escape) for text in stop) if stop else None,
        step_delimiter=(
            option_text("--step-delimiter", step_delimiter, escape=escape) if step_delimiter is not None else None
        ),
        max_step_tokens=max_step_tokens,
        max_steps=max_steps,
        weight_temperature=weight_temperature,
        resampling=resampling,
    )
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    fed = {"--template": template, "--reward-step-delimiter": reward_step_delimiter, "--separator": separator}
    fed = {option: text and option_text(option, text, escape=escape) for option, text in fed.items()}
    format = _reward_format(reward_format, fed, scorer)
    # what can be checked without loading a model is checked first
    kind = _search_class(search, settings, scorer)
    inputs = read_inputs("--prompts", prompts, [("prompt",)])
    described = {"search": search, **settings, "max_new_tokens": max_new_tokens, "seed": seed, "dtype": dtype}
    made_with = {"settings": described, "model": digests(model, code=trust_remote_code)}
    if scorer is not None:
        described["activation"] = activation
        described["reward_format"] = None if format is None else asdict(format)
        made_with["scorer"] = _scorer_digests(scorer, code=trust_remote_code)
    with ResultFile("generate", out, prompts, inputs, made_with, GENERATE_KEYS, resume=resume) as output:
        todo = output.missing()
        if not todo:
            _say(f"{out}: all {len(inputs)} results are there")
            return

        decoder = _decoder(model, dtype, device, num_slots, max_batch_tokens, trust_remote_code)
        from forktree.rewards.load import load_scorer

        if scorer is not None:
            settings["scorer"] = load_scorer(
                scorer,
                activation=activation,
                time_limit=scorer_time_limit,
                device=device,
                format=format,
                trust_remote_code=trust_remote_code,
            )
        one = kind(**settings)
        texts = [inputs[i]["prompt"] for i in todo]
        results = decoder.search_iter(texts, one, max_new_tokens=max_new_tokens, seed=seed)
        _run("prompt", (_searched(todo[result.index], result) for result in results), output)


SCORE_HELP = """Log-probs of the texts of a JSON Lines file under a model: perplexity, reranking, p(response | prompt).

Each input line is {"text": "..."}, or {"prompt": "...", "response": "..."}, where the response is scored, given the \
prompt. Each output line holds the sum of the log-probs, the number of tokens, the perplexity exp(-mean), and ids and \
log-probs of all tokens scored; it is written and synced as soon as it is known, so a run that is stopped goes on with \
--resume, unless options or files of the model are others than those in the header, its first line. Beginnings that \
texts share, such as a prompt with many responses, are computed once.

A text is what the tokenizer makes of it, special tokens included. What stands first (BOS, where the tokenizer adds \
one) is given, and not scored. What the tokenizer puts at the end (EOS) counts to the text, but never to a prompt that \
a response follows. Prompt and response are tokenised together, as a model reads them: a token that holds \
the end of the prompt and the beginning of the response counts to the response.

Examples:

forktree score --model DIR --texts in.jsonl --out out.jsonl

forktree score --model DIR --texts answers.jsonl --out out.jsonl --dtype bfloat16 --device cuda
"""


@app.command(help=SCORE_HELP)
def score(
    model: Annotated[Path, typer.Option(help="Directory of the model: config.json, *.safetensors, tokenizer.")],
    texts: Annotated[Path, typer.Option(help="Input, JSON Lines: a text, or prompt and response, a line.")],
    out: Annotated[Path, typer.Option(help="Output, JSON Lines. Must not exist, unless --resume.")],
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    num_slots: Annotated[
        int | None, typer.Option(help="Tokens whose KV fits at once (the longest text and one pass).")
    ] = None,
    max_batch_tokens: Annotated[int, typer.Option(help="Most tokens of one forward pass.")] = 512,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an output file: keep what it has.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python files of the model directories. Read them first.")
    ] = False,
) -> None:
    """See `SCORE_HELP`."""
    inputs = read_inputs("--texts", texts, [("text",), ("prompt", "response")])
    made_with = {"settings": {"dtype": dtype}, "model": digests(model, code=trust_remote_code)}
    with ResultFile("score", out, texts, inputs, made_with, SCORE_KEYS, resume=resume) as output:
        todo = output.missing()
        if not todo:
            _say(f"{out}: all {len(inputs)} results are there")
            return

        loaded, tokenizer = _load(model, dtype, device, trust_remote_code)
        from forktree.sequences import scored_sequences

        tokens, given, wrong = [list(column) for column in zip(*_tokenised(tokenizer, inputs), strict=True)]
        refused = [Outcome(i, None, f": {wrong[i]}") for i in todo if wrong[i] is not None]
        passed_over = set(range(len(inputs))).difference(todo).union(outcome.index for outcome in refused)
        for i in passed_over:  # nothing is wanted of them, which costs nothing, and numbers stay those of the inputs
            given[i] = len(tokens[i])
        results = scored_sequences(
            loaded, tokens, prompt_lengths=given, num_slots=num_slots, max_batch_tokens=max_batch_tokens
        )
        scored = (_scored(i, tokens[i][given[i] :], found) for i, found in results if i not in passed_over)
        _run("sequence", chain(refused, scored), output)


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
    from forktree.cli.env import describe, show

    environment = describe()
    if as_json:
        print(json.dumps(environment, indent=2))
    else:
        show(environment, Terminal(markup=False))


@dataclass(frozen=True)
class Outcome:
    """What became of one input: something to write, a complaint, or both."""

    index: int
    record: dict[str, Any] | None
    error: str | None


def _run(what: str, outcomes: Iterator[Outcome], output: ResultFile) -> None:
    """Writes results as they come, and exits with 1 if any of the inputs had an error. Ctrl-C keeps what is finished.

    what: an input is called in messages.
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
                    _complain(f"{what} {outcome.index}{outcome.error}")
                progress.advance(bar)
    except KeyboardInterrupt:
        done = total - len(output.missing())
        _complain(f"interrupted: {done} of {total} results are in {output.path}; go on with --resume")
        raise typer.Exit(130) from None
    if failures:
        left = len(output.missing())
        _complain(f"{failures} of {total} {what}s had errors; --resume tries {left} missing ones again")
        raise typer.Exit(1)


GENERATE_KEYS = ("text", "candidates", "counters")
SCORE_KEYS = ("log_prob", "num_tokens", "perplexity", "log_probs", "token_ids")


def _searched(index: int, result: Any) -> Outcome:
    """Of `Decoder.search_iter`."""
    if result.error is not None:
        return Outcome(index, None, f": {one_line(result.error)}")
    record = {
        "text": result.text,
        "candidates": [_candidate(c) for c in result.candidates],
        "counters": vars(result.counters),
    }
    errors = [f", candidate {i}: {e}" for i, c in enumerate(result.candidates) if (e := c.hypothesis.error) is not None]
    return Outcome(index, record, errors[0] if errors else None)


def _scored(index: int, token_ids: list[int], found: Any) -> Outcome:
    """Of `scored_sequences`; token_ids: those that were scored."""
    if isinstance(found, Exception):
        return Outcome(index, None, f": {one_line(found)}")
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(-found.mean())) if len(found) else math.nan
    record = {
        "log_prob": _number(float(found.sum())),
        "num_tokens": len(found),
        "perplexity": _number(perplexity),
        "log_probs": [_number(x) for x in found.tolist()],
        "token_ids": token_ids,
    }
    return Outcome(index, record, None)


def _tokenised(tokenizer: Any, inputs: list[dict[str, str]]) -> Iterator[tuple[list[int], int, str | None]]:
    """Token ids of each input, how many of them are given, and why it cannot be scored, if so: it then is one token."""
    from forktree.prompts import encode, tokenise

    prompts = tokenise(tokenizer, [one.get("text") or one["prompt"] for one in inputs])
    wholes = encode(tokenizer, [one.get("text") or one["prompt"] + one["response"] for one in inputs])
    for one, prompt, ids in zip(inputs, prompts, wholes, strict=True):
        if one.get("response") == "":
            yield [0], 1, "expected a response of at least one token, got an empty one"
            continue
        same = (
            1
            if "text" in one
            else len(list(takewhile(lambda pair: pair[0] == pair[1], zip(prompt, ids, strict=False))))
        )
        if not ids:
            yield [0], 1, f"expected at least one token, got none of {one}"
        elif not same:
            yield (
                [0],
                1,
                (
                    "expected a prompt with a token before the one that the response begins in, got "
                    f"{one['prompt']!r:.60}"
                ),
            )
        else:
            yield ids, same, None


def _reward_format(name: str | None, fed: dict[str, str | None], scorer: str | None) -> Any:
    """What a reward model is fed, or None if no option says so. fed: the texts of options."""
    from forktree.rewards.step_format import chosen_format

    format = chosen_format(
        name,
        template=fed["--template"],
        step_delimiter=fed["--reward-step-delimiter"],
        separator=fed["--separator"],
    )
    if format is not None and (scorer is None or not Path(scorer).is_dir()):
        raise InvalidInput(
            "--reward-format, --template, --reward-step-delimiter and --separator belong to a reward-model directory, "
            f"got --scorer {scorer or 'none'}"
        )
    return format


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


def _scorer_digests(scorer: str, *, code: bool) -> dict[str, str]:
    """Of what --scorer names: the files of a head or reward model, or the file that a function lies in."""
    path = Path(scorer)
    if path.is_dir():
        return digests(path, code=code)
    if path.is_file():
        return {path.name: digest(path)}
    from forktree.rewards.load import import_function

    import_function(scorer)
    source = sys.modules[scorer.partition(":")[0]].__file__
    return {scorer: digest(Path(source)) if source else "built in"}


def _decoder(
    model: Path, dtype: str, device: str, num_slots: int | None, max_batch_tokens: int, trust_remote_code: bool
) -> Any:
    loaded, tokenizer = _load(model, dtype, device, trust_remote_code)
    from forktree.decoder import Decoder

    return Decoder(loaded, tokenizer, num_slots=num_slots, max_batch_tokens=max_batch_tokens)


def _load(model: Path, dtype: str, device: str, trust_remote_code: bool) -> tuple[Any, Any]:
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


def _candidate(candidate: Any) -> dict[str, Any]:
    h = candidate.hypothesis
    record = {
        "text": candidate.text,
        "score": _number(h.score),
        "log_prob": h.log_prob,
        "num_tokens": len(h.token_ids),
        "finish_reason": h.finish_reason,
        "token_ids": candidate.token_ids,
    }
    if h.step_scores:
        record["step_scores"] = [_number(s) for s in h.step_scores]
    if h.weight is not None:
        record["weight"] = h.weight
    if h.error is not None:
        record["error"] = str(h.error)
    return record


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _early_stopping(value: str | None) -> bool | str | None:
    if value is None:
        return None
    return {"true": True, "false": False}.get(value.lower(), value)


def _say(message: str, style: str = "") -> None:
    """One line on standard error, whatever it holds."""
    console.print(visible(message), style=style, markup=False, highlight=False, soft_wrap=True)


def _complain(message: str) -> None:
    _say(f"error: {message}", "red")


def main() -> None:
    """Entry point: whatever is wrong becomes one line on standard error and exit code 2."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say(f"warning: {one_line(str(message))}")
        sys.exit(_main())


def _main() -> int:
    """Returns the exit code."""
    try:
        return app(standalone_mode=False) or 0
    except ForktreeError as error:
        _complain(one_line(error))
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the command line says so by having one
            if message := one_line(error.format_message()):  # none: help was printed for want of arguments
                _complain(f"{message} See forktree --help and forktree COMMAND --help.")
        else:
            _complain(f"this should not happen, please report it:\n{traceback.format_exc()}")
    return 2
