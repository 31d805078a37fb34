"""`forktree score`: log-probs of the texts of a file under a model."""

import math
from collections.abc import Iterator
from itertools import chain, takewhile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from forktree.cli.inputs import read_inputs
from forktree.cli.models import Device, Dtype, MaxBatchTokens, ModelDirectory, Output, Resume, TrustRemoteCode, load
from forktree.cli.report import Outcome, json_number, say, write_outcomes
from forktree.cli.results import ResultFile
from forktree.model.model_files import digests
from forktree.terminal import one_line

SCORE_HELP = """Log-probs of the texts of a JSON Lines file under a model: perplexity, reranking, p(response | prompt).

Each input line is {"text": "..."}, or {"prompt": "...", "response": "..."}, where the response is scored, given the \
prompt. Each output line holds the sum of the log-probs, the number of tokens, the perplexity exp(-mean), and ids and \
log-probs of all tokens scored; it is written and synced as soon as it is known, so a run that is stopped continues \
with --resume, unless options or files of the model are others than those in the header, its first line. Beginnings \
that texts share, such as a prompt with many responses, are computed once.

A text is what the tokenizer makes of it, special tokens included. What stands first (BOS, where the tokenizer adds \
one) is given, and not scored. What the tokenizer puts at the end (EOS) counts to the text, but never to a prompt that \
a response follows. Prompt and response are tokenised together, as a model reads them: a token that holds \
the end of the prompt and the beginning of the response counts to the response.

Examples:

forktree score --model DIR --texts in.jsonl --out out.jsonl

forktree score --model DIR --texts answers.jsonl --out out.jsonl --dtype bfloat16 --device cuda
"""


def score(
    model: ModelDirectory,
    texts: Annotated[Path, typer.Option(help="Input, JSON Lines: a text, or prompt and response, a line.")],
    out: Output,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    num_slots: Annotated[
        int | None, typer.Option(help="Number of tokens whose KV fits at once (the longest text and one pass).")
    ] = None,
    max_batch_tokens: MaxBatchTokens = 512,
    resume: Resume = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """See `SCORE_HELP`."""
    inputs = read_inputs("--texts", texts, [("text",), ("prompt", "response")])
    made_with = {"settings": {"dtype": dtype}, "model": digests(model, code=trust_remote_code)}
    with ResultFile("score", out, texts, inputs, made_with, SCORE_KEYS, resume=resume) as output:
        todo = output.missing()
        if not todo:
            say(f"{out}: all {len(inputs)} results are there")
            return

        loaded, tokenizer = load(model, dtype, device, trust_remote_code)
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
        write_outcomes("sequence", chain(refused, scored), output)


SCORE_KEYS = ("log_prob", "num_tokens", "perplexity", "log_probs", "token_ids")


def _scored(index: int, token_ids: list[int], found: Any) -> Outcome:
    """Of `scored_sequences`; token_ids: those that were scored."""
    if isinstance(found, Exception):
        return Outcome(index, None, f": {one_line(found)}")
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(-found.mean())) if len(found) else math.nan
    record = {
        "log_prob": json_number(float(found.sum())),
        "num_tokens": len(found),
        "perplexity": json_number(perplexity),
        "log_probs": [json_number(x) for x in found.tolist()],
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
