"""`forktree generate`: searches an answer for every prompt of a file."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from forktree.cli.inputs import option_text, read_inputs
from forktree.cli.models import Device, Dtype, MaxBatchTokens, ModelDirectory, Output, Resume, TrustRemoteCode, load
from forktree.cli.report import Outcome, json_number, say, write_outcomes
from forktree.cli.results import ResultFile
from forktree.cli.searches import SEARCH_HELP, choose, show_search
from forktree.errors import BudgetSpent, InvalidInput
from forktree.model.model_files import digest, digests
from forktree.terminal import one_line

GENERATE_HELP = """Searches for an answer to every prompt of a JSON Lines file.

Each input line is {"prompt": "..."}; more keys are allowed and ignored. Each output line holds one prompt's \
candidates, best first, with their scores and token counts; it is written and synced as soon as it is known, so a \
run that is stopped continues with --resume. The first output line is a header: options and digests of the files that \
the results were made with. --resume refuses a file that was made with others.

--search names the algorithm, and --set NAME=VALUE each of its settings. --help-search NAME lists the settings of one, \
with their types, defaults and meanings.

A reward is a value head on the model's own hidden state (a .safetensors file with score.weight, or score.0.weight and \
score.2.weight), the directory of a reward model (base model plus such a head), or module:function, a Python function \
of (prompt, response), looked for in the current directory first. What a reward model is fed, and where its reward is \
read, is said by --reward-format, or by --template, --reward-step-delimiter and --separator, which also change a named \
format.

Texts of options are taken as they are: --set stop='\\times' is a backslash and five letters. A line feed is \
--set stop=$'\\n' in most shells, or --set stop='\\n' --escape.

Examples:

forktree generate --model DIR --prompts in.jsonl --out out.jsonl --search beam --set num_beams=8

forktree generate --model DIR --prompts in.jsonl --out out.jsonl --search best-of-n --reward my_module:reward

forktree generate --model DIR --prompts in.jsonl --out out.jsonl --search particle --set num_particles=16 \
--set temperature=0.8 --reward head.safetensors

forktree generate --model DIR --prompts in.jsonl --out out.jsonl --search best-of-n --reward Qwen2.5-Math-PRM-7B \
--reward-format qwen-prm
"""


def generate(
    model: ModelDirectory,
    prompts: Annotated[Path, typer.Option(help='Input, JSON Lines: {"prompt": "..."} a line.')],
    out: Output,
    search: Annotated[str, typer.Option(help=SEARCH_HELP)] = "greedy",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the search; may be repeated."),
    ] = None,
    help_search: Annotated[
        str | None,
        typer.Option(metavar="NAME", callback=show_search, is_eager=True, help="Show the settings of a search."),
    ] = None,
    reward: Annotated[
        str | None, typer.Option(help="A head file, a reward-model directory or module:function.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of new tokens.")] = 256,
    max_model_tokens: Annotated[
        int | None, typer.Option(help="Maximum number of tokens that a prompt's search generates in all (no limit).")
    ] = None,
    max_reward_calls: Annotated[
        int | None, typer.Option(help="Maximum number of texts that a prompt's search has rewarded (no limit).")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed and prompt give the same text.")] = 0,
    escape: Annotated[
        bool, typer.Option("--escape", help=r"Read \n, \t, \\, \u00e9 in texts of options as in JSON.")
    ] = False,
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
    reward_time_limit: Annotated[
        float, typer.Option(help="module:function: maximum number of seconds for a call.")
    ] = 60.0,
    trace: Annotated[
        bool, typer.Option("--trace", help="Add to each result what the search did: who was grown, kept, dropped, why.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    num_slots: Annotated[
        int | None, typer.Option(help="Number of tokens whose KV fits at once (by the free memory).")
    ] = None,
    max_batch_tokens: MaxBatchTokens = 512,
    resume: Resume = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """See `GENERATE_HELP`."""
    fed = {"--template": template, "--reward-step-delimiter": reward_step_delimiter, "--separator": separator}
    fed = {option: text and option_text(option, text, escape=escape) for option, text in fed.items()}
    format = _reward_format(reward_format, fed, reward)
    # what can be checked without loading a model is checked first
    chosen = choose(search, settings or (), reward, escape=escape)
    inputs = read_inputs("--prompts", prompts, [("prompt",)])
    described = {"search": search, **chosen.described, "max_new_tokens": max_new_tokens, "seed": seed, "dtype": dtype}
    limits = {"max_model_tokens": max_model_tokens, "max_reward_calls": max_reward_calls}
    described |= {name: value for name, value in limits.items() if value is not None}
    made_with = {"settings": described, "model": digests(model, code=trust_remote_code)}
    if trace:
        described["trace"] = True
    if chosen.code:
        made_with["code"] = {spec: _source_digest(spec) for spec in chosen.code}
    if reward is not None:
        described["activation"] = activation
        described["reward_format"] = None if format is None else asdict(format)
        made_with["reward"] = _reward_digests(reward, code=trust_remote_code)
    keys = ("text", "candidates", "counters", *(("trace",) if trace else ()))
    with ResultFile("generate", out, prompts, inputs, made_with, keys, resume=resume) as output:
        todo = output.missing()
        if not todo:
            say(f"{out}: all {len(inputs)} results are there")
            return

        from forktree.decoder import Decoder
        from forktree.rewards.load import load_reward

        loaded, tokenizer = load(model, dtype, device, trust_remote_code)
        decoder = Decoder(loaded, tokenizer, num_slots=num_slots, max_batch_tokens=max_batch_tokens)
        given = dict(chosen.settings)
        if chosen.reward is not None and reward is not None:
            given[chosen.reward] = load_reward(
                reward,
                activation=activation,
                time_limit=reward_time_limit,
                device=device,
                format=format,
                trust_remote_code=trust_remote_code,
            )
        texts = [inputs[i]["prompt"] for i in todo]
        results = decoder.search_iter(
            texts,
            chosen.kind(**given),
            max_new_tokens=max_new_tokens,
            max_model_tokens=max_model_tokens,
            max_reward_calls=max_reward_calls,
            seed=seed,
        )
        write_outcomes("prompt", (_outcome(todo[result.index], result, keys) for result in results), output)


def _outcome(index: int, result: Any, keys: tuple[str, ...]) -> Outcome:
    """Of a result of `Decoder.search_iter`."""
    if result.error is not None:
        return Outcome(index, None, f": {one_line(result.error)}")
    record = {
        "text": result.text,
        "candidates": [_candidate(c) for c in result.candidates],
        "counters": vars(result.counters),
        "trace": result.trace.events,
    }
    failed = [(i, c.hypothesis.error) for i, c in enumerate(result.candidates)]
    errors = [f", candidate {i}: {e}" for i, e in failed if e is not None and not isinstance(e, BudgetSpent)]
    return Outcome(index, {key: record[key] for key in keys}, errors[0] if errors else None)


def _candidate(candidate: Any) -> dict[str, Any]:
    h = candidate.hypothesis
    record = {
        "text": candidate.text,
        "score": json_number(h.score),
        "log_prob": h.log_prob,
        "num_tokens": len(h.token_ids),
        "finish_reason": h.finish_reason,
        "token_ids": candidate.token_ids,
    }
    if h.step_rewards:
        record["step_rewards"] = [json_number(s) for s in h.step_rewards]
    if h.weight is not None:
        record["weight"] = h.weight
    if h.error is not None:
        record["error"] = str(h.error)
    return record


def _reward_format(name: str | None, fed: dict[str, str | None], reward: str | None) -> Any:
    """What a reward model is fed, or None if no option says so. fed: the texts of options."""
    from forktree.rewards.step_format import chosen_format

    format = chosen_format(
        name,
        template=fed["--template"],
        step_delimiter=fed["--reward-step-delimiter"],
        separator=fed["--separator"],
    )
    if format is not None and (reward is None or not Path(reward).is_dir()):
        raise InvalidInput(
            "--reward-format, --template, --reward-step-delimiter and --separator belong to a reward-model directory, "
            f"got --reward {reward or 'none'}"
        )
    return format


def _reward_digests(reward: str, *, code: bool) -> dict[str, str]:
    """Of what --reward names: the files of a head or reward model, or the file that a function lies in."""
    path = Path(reward)
    if path.is_dir():
        return digests(path, code=code)
    if path.is_file():
        return {path.name: digest(path)}
    from forktree.rewards.load import import_function

    import_function(reward)
    return {reward: _source_digest(reward)}


def _source_digest(spec: str) -> str:
    """Of the file that `module:name` was imported from."""
    source = sys.modules[spec.partition(":")[0]].__file__
    return digest(Path(source)) if source else "built in"
