"""Drop-in for transformers: `model.generate(..., custom_generate=forktree.generate)`.

Greedy decoding and beams give transformers' own output, token for token and score for score (the scores of a greedy
row after its EOS mean nothing); sampling follows the same distribution with torch's global generator. The prompt
is computed once, whatever `num_beams` or `num_return_sequences`, and beams share what they have in common.

In bf16 and fp16, tokens are chosen by logits that the model's own head has rounded, as in transformers. The hidden
states before the head may still differ in their last bits, since the rounding of a matrix product depends on the shape
of its batch: where two tokens are that close, the texts diverge.

transformers drops `streamer`, `tokenizer`, `synced_gpus` and `assistant_model` before a custom function is called:
they cannot be seen here and have no effect (a consumer waiting on a streamer would wait forever; `stop_strings` needs
the tokenizer and is refused by transformers itself). Every argument that can be seen and cannot be honoured is refused
with `InvalidInput`, before anything runs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.generation.configuration_utils import GenerationMode

from forktree.device.transfer import upload
from forktree.engine.engine import Engine
from forktree.engine.worker import ModelWorker
from forktree.errors import InvalidInput
from forktree.kv import Branch, append
from forktree.model.attached import attached
from forktree.model.runner import MAX_SLOTS
from forktree.ops.sampling import Sampling
from forktree.ops.token_request import KeyedSampling, TokenRequest
from forktree.search.algorithms.beam import BeamRules, Finished, beam_search
from forktree.search.processors import process
from forktree.search.request import next_logits, score_tokens

_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
_CACHES = {"cache", "past_key_values", "cache_params"}  # all but the first up to transformers 5.23
_HARMLESS = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache_position"} | _CACHES


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Tensor | GenerateBeamDecoderOnlyOutput | GenerateDecoderOnlyOutput:
    """Decodes a batch; `model.generate` calls this with the arguments that it has prepared.

    Keys and values stay in forktree's own pools: a `past_key_values` that is passed must be empty and stays empty, and
    the output has none.

    Args:
        model: The model to run.
        input_ids: int64 `[B * max(num_beams, num_return_sequences), L]`, every prompt repeated, left-padded.
        logits_processor: Called on the scores of all rows in every step.
        stopping_criteria: Called on all rows after every step.
        generation_config: Greedy decoding, sampling, or either with beams.
        **model_kwargs: What `generate` would pass to the model; anything but a mask, positions and an empty cache is
            refused.

    Returns:
        int64 `[B * num_return_sequences, L + N]`, or transformers' output class with `return_dict_in_generate`.

    Raises:
        InvalidInput: An argument cannot be honoured.
    """
    config = generation_config
    _refuse(config, input_ids, stopping_criteria, model_kwargs)
    copies = max(config.num_beams, config.num_return_sequences)
    prompts = _without_padding(input_ids[::copies], model_kwargs.get("attention_mask"), copies)
    max_new_tokens = stopping_criteria.max_length - input_ids.shape[1]
    spec = attached(model)
    _check_fed(model, input_ids, model_kwargs)
    longest = max(map(len, prompts))
    positions = longest + max_new_tokens - 1  # the last token is never computed
    if positions > spec.max_position:
        raise InvalidInput(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones take {positions} positions, the model has "
            f"{spec.max_position} ({spec.max_position_note}); shorten the prompt or lower max_new_tokens"
        )
    slots = min(sum(map(len, prompts)) + len(input_ids) * max_new_tokens, MAX_SLOTS)
    worker = ModelWorker(model, num_slots=slots, prefix_cache=False, spec=spec)
    engine = Engine(worker)
    beams = config.num_beams > 1
    rounded = torch.finfo(worker.runner.dtype).bits < 32
    run = _Run(
        input_ids, copies, logits_processor, stopping_criteria, config, max_new_tokens, by_rounded_logits=rounded
    )
    search = run.beams if beams else run.samples
    with engine.use() as user:
        task = engine.submit(lambda task: search(*(root.branch for root in task.roots)), prompts, run=user)
        for _ in engine.run():
            pass
    if task.error is not None:
        raise task.error
    return run.beam_output(task.result) if beams else run.sample_output(task.result)


class _Run:
    """One call of `generate`. All its rows step together, as processors and criteria see the whole batch."""

    def __init__(
        self,
        rows: Tensor,
        copies: int,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        max_new_tokens: int,
        *,
        by_rounded_logits: bool,
    ) -> None:
        """by_rounded_logits: tokens are chosen by rows of logits, as the model's own head rounds these."""
        self._rows, self._copies, self._max_new_tokens = rows, copies, max_new_tokens
        self._processors, self._criteria, self._config = processors, criteria, config
        self._by_rounded_logits = by_rounded_logits
        self._eos: Tensor | None = config._eos_token_tensor
        self._pad: Tensor | None = config._pad_token_tensor
        self._scores: list[Tensor] | None = [] if config.return_dict_in_generate and config.output_scores else None

    def _score_history(self) -> Any:
        """The scores so far, as transformers passes them to stopping criteria."""
        return None if self._scores is None else tuple(self._scores)

    # ---------------------------------------------------------------- beams

    async def beams(self, *roots: Branch) -> Finished:
        """Runs beam search over all prompts."""
        config, eos, pad = self._config, self._eos, self._pad
        num_eos = 0 if eos is None else len(eos)
        rules = BeamRules(
            num_beams=config.num_beams,
            num_candidates=max(2, 1 + num_eos) * config.num_beams,
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
            max_new_tokens=self._max_new_tokens,
            do_sample=bool(config.do_sample),
            best_first=Version(transformers.__version__) >= Version("5.24"),
        )
        # as in transformers, where a pad id of 0 counts as none
        fill = -1 if eos is None else int(pad) if pad is not None and int(pad) else int(eos[0])
        return await beam_search(
            roots,
            self._rows[:: self._copies],
            rules,
            fill=fill,
            processors=self._processors,
            stops=lambda rows: self._criteria(rows, self._score_history()),
            on_step=None if self._scores is None else self._scores.append,
            whole_rows=self._by_rounded_logits,
        )

    def beam_output(self, found: Finished) -> Tensor | GenerateBeamDecoderOnlyOutput:
        """Returns the best `num_return_sequences` of each prompt, cut after the longest."""
        keep = self._config.num_return_sequences
        indices = found.beam_indices[:, :keep].flatten(0, 1)
        longest = int((indices >= 0).sum(dim=1).max())
        sequences = found.rows[:, :keep].flatten(0, 1)[:, : self._rows.shape[1] + longest]
        if not self._config.return_dict_in_generate:
            return sequences
        return GenerateBeamDecoderOnlyOutput(
            sequences=sequences,
            sequences_scores=found.scores[:, :keep].flatten() if self._scores is not None else None,
            scores=self._score_history(),
            beam_indices=indices[:, :longest],
        )

    # ---------------------------------------------------------------- greedy decoding and sampling

    async def samples(self, *roots: Branch) -> Tensor:
        """Continues every row, greedily or by sampling.

        With an EOS, rows that have finished get the pad token and leave the batch; without, they go on until the last
        has finished.
        """
        rows = self._rows
        branches = [branch for root in roots for branch in root.fork(self._copies)]
        open_rows = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        live = np.arange(len(rows))
        pad = self._pad if _pads(self._criteria) else None
        keeps_scores = self._scores is not None
        whole = self._by_rounded_logits or self._config.do_sample or keeps_scores or len(self._processors) > 0
        state: Tensor | None = None  # logits, or tokens, of all rows; finished rows keep their last
        while True:
            asked = [branches[i] for i in live]
            fresh = await next_logits(asked) if whole else await self._most_likely(asked)
            state = fresh.clone() if state is None else state.index_copy(0, upload(live, rows.device), fresh)
            tokens = self._choose(branches, rows, state) if whole else state
            if pad is not None:
                tokens = torch.where(open_rows, tokens, pad.to(tokens))
            rows = torch.cat([rows, tokens[:, None]], dim=1)
            stopped = self._criteria(rows, self._score_history())
            open_rows = open_rows & ~stopped
            sampled, goes_on = torch.stack([tokens, open_rows]).cpu().numpy()
            if not goes_on.any():
                return rows
            if pad is not None:
                if not self._processors:  # these may look at the branch of any row
                    for i in live[goes_on[live] == 0]:
                        branches[i].drop()
                live = live[goes_on[live] == 1]
            append([branches[i] for i in live], sampled[live])

    async def _most_likely(self, branches: Sequence[Branch]) -> Tensor:
        """Returns the most likely next token of each branch, `[n]`."""
        nothing = np.zeros(len(branches), np.int64)
        greedy = KeyedSampling(Sampling(temperature=0), seed=nothing, position=nothing)
        tokens = (await score_tokens(branches, TokenRequest(sample=greedy))).token
        assert tokens is not None
        return tokens

    def _choose(self, branches: Sequence[Branch], rows: Tensor, logits: Tensor) -> Tensor:
        """Chooses a token for every row, `[n]`."""
        scores = process(self._processors, branches, rows, logits)
        if self._scores is not None:
            self._scores.append(scores)
        if self._config.do_sample:
            return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        return scores.argmax(dim=-1)

    def sample_output(self, rows: Tensor) -> Tensor | GenerateDecoderOnlyOutput:
        """Returns all rows, in the form that was asked for."""
        if not self._config.return_dict_in_generate:
            return rows
        return GenerateDecoderOnlyOutput(sequences=rows, scores=self._score_history())


def _pads(criteria: StoppingCriteriaList) -> bool:
    """Whether finished rows are padded, by transformers' own rule; otherwise they go on like all others."""
    return any(hasattr(criterion, "eos_token_id") for criterion in criteria)


def _refuse(
    config: GenerationConfig, input_ids: Tensor, criteria: StoppingCriteriaList, model_kwargs: dict[str, Any]
) -> None:
    """Raises `InvalidInput` for what this function cannot honour."""
    mode = config.get_generation_mode()
    if mode not in _MODES:
        known = ", ".join(m.value for m in _MODES)
        raise InvalidInput(f"forktree.generate does {known}; got {mode.value}")
    if input_ids.shape[1] == 0 or "inputs_embeds" in model_kwargs:
        raise InvalidInput("forktree.generate needs input_ids with at least one token, got inputs_embeds or no ids")
    if _pads(criteria) and config._pad_token_tensor is None:
        raise InvalidInput("rows that an EOS has ended need a pad_token_id, got None")
    for name in ("output_attentions", "output_hidden_states", "output_logits"):
        if getattr(config, name, None) and config.return_dict_in_generate:
            raise InvalidInput(f"forktree.generate does not keep what {name}=True asks for; leave it off")
    unknown = sorted(k for k, v in model_kwargs.items() if k not in _HARMLESS and not _is_absent(v))
    if unknown:
        raise InvalidInput(f"forktree.generate runs text-only models on input_ids, got {', '.join(unknown)} too")


def _check_fed(model: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any]) -> None:
    """Raises `InvalidInput` unless transformers would feed the model what forktree does.

    That is the tokens of each prompt at positions 0, 1, …, and nothing else; prompt tuning, for example, changes it in
    `prepare_inputs_for_generation`.
    """
    for name in _CACHES:
        cache = model_kwargs.get(name)
        if cache is not None and cache.get_seq_length() > 0:
            raise InvalidInput(
                f"forktree.generate keeps its own KV cache, got {name} with {cache.get_seq_length()} tokens"
            )
    kwargs = {name: value for name, value in model_kwargs.items() if name not in _CACHES}
    fed = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    usual = {"input_ids": input_ids, "attention_mask": mask, "position_ids": mask.long().cumsum(dim=1) - 1}
    wrong = []
    for name, value in fed.items():
        if _is_absent(value) or (isinstance(value, bool | int) and name not in usual):
            fine = name != "input_ids"
        elif name in usual:
            fine = _agree(value, usual[name], torch.ones_like(mask) if name == "attention_mask" else mask)
        elif name in _CACHES:
            fine = isinstance(value, Cache) and value.get_seq_length() == 0
        else:
            fine = name in _HARMLESS
        if not fine:
            wrong.append(f"{name} {_in_short(value)}")
    if wrong:
        raise InvalidInput(
            "forktree.generate feeds the model input_ids, each prompt's at positions 0, 1, …, and nothing else; "
            f"{type(model).__name__}.prepare_inputs_for_generation gives {' and '.join(wrong)}"
        )


def _is_absent(value: Any) -> bool:
    """Whether there is nothing in an argument, such as the encoded images of a text without any."""
    return value is None or (isinstance(value, dict) and not value)


def _agree(given: Any, expected: Tensor, mask: Tensor) -> bool:
    """Whether they are equal where `mask [B, L]` is not 0. `given` may be `[L]`, `[1 or B, L]`, or several of these."""
    if not isinstance(given, Tensor) or given.shape[-1:] != mask.shape[1:]:
        return False
    if given.shape[-2:-1] not in ((), (1,), mask.shape[:1]):
        return False
    return bool(((given.to(expected.device) == expected) | (mask == 0)).all())


def _in_short(value: Any) -> str:
    """Describes a tensor by its shape and last integers, anything else by its representation."""
    if not isinstance(value, Tensor):
        return f"{value!r:.80}"
    numbers = "" if value.is_floating_point() else f" with {value.flatten()[-8:].tolist()} at its end"
    return f"{list(value.shape)}{numbers}"


def _without_padding(rows: Tensor, mask: Tensor | None, copies: int) -> list[Sequence[int]]:
    """Returns the token ids of each prompt after its left padding."""
    if mask is None:
        return rows.tolist()
    mask = mask[::copies].bool()
    if not bool((mask.int().diff(dim=1) >= 0).all()) or not bool(mask[:, -1].all()):
        raise InvalidInput("attention_mask must be ones after left padding (padding_side='left'), got another pattern")
    return [row[keep].tolist() for row, keep in zip(rows, mask, strict=True)]
