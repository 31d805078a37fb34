"""Drop-in for transformers: `model.generate(..., custom_generate=forktree.generate)`.

Greedy decoding and beams give transformers' own output, token for token and score for score (the scores of a greedy
row behind its end mean nothing); sampling draws from the same distribution with torch's global generator. The prompt
is computed once, whatever `num_beams` or `num_return_sequences`, and beams share what they have in common.

transformers drops `streamer`, `tokenizer`, `synced_gpus` and `assistant_model` before a custom function is called:
they cannot be seen here and have no effect (a consumer waiting on a streamer would wait for ever; `stop_strings`
needs the tokenizer and is refused by transformers itself). Everything that can be seen and cannot be honoured is
refused with `InvalidInput`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.generation.configuration_utils import GenerationMode

from forktree.engine import Engine
from forktree.errors import InvalidInput
from forktree.kv import Branch, append
from forktree.lane import Lane
from forktree.model import attach
from forktree.model.interface import autocast_dtype, execution_devices
from forktree.sampling import Sampling
from forktree.search.beam import BeamRules, Finished, beam_search
from forktree.search.processors import process
from forktree.search.request import next_logits, score_tokens
from forktree.token_scores import Draw, TokenRequest
from forktree.transfer import upload

_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
_CACHES = ("cache", "past_key_values")  # the second up to transformers 5.23
_HARMLESS = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache_position", *_CACHES}


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Tensor | GenerateBeamDecoderOnlyOutput | GenerateDecoderOnlyOutput:
    """Called by `model.generate`, with what it has prepared.

    input_ids: int64 `[B * max(num_beams, num_return_sequences), L]`, every prompt repeated, left-padded.
    Returns int64 `[B * num_return_sequences, L + N]`, or transformers' output class with `return_dict_in_generate`.
    """
    config = generation_config
    _refuse(config, input_ids, model_kwargs)
    copies = max(config.num_beams, config.num_return_sequences)
    prompts = _without_padding(input_ids[::copies], model_kwargs.get("attention_mask"), copies)
    room = stopping_criteria.max_length - input_ids.shape[1]
    spec = model.__dict__.get("_forktree_spec")
    if (
        spec is None
        or (execution_devices(model), model.dtype) != ({spec.packed.device}, spec.packed.dtype)
        or spec.packed.autocast != autocast_dtype(spec.packed.device)
    ):
        spec = model.__dict__["_forktree_spec"] = attach(model)
    slots = sum(map(len, prompts)) + len(input_ids) * room
    engine = Engine(Lane(model, num_slots=slots, prefix_cache=False, spec=spec))
    beams = config.num_beams > 1
    run = _Run(input_ids, copies, logits_processor, stopping_criteria, config, room)
    task = engine.submit(run.beams if beams else run.samples, prompts)
    try:
        for _ in engine.run():
            pass
    finally:
        engine.cancel_all()
    if task.error is not None:
        raise task.error
    return run.beam_output(task.result) if beams else run.sample_output(task.result)


class _Run:
    """One call of `generate`: all its rows step together, as processors and criteria are bound to the whole batch."""

    def __init__(
        self,
        rows: Tensor,
        copies: int,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        room: int,
    ) -> None:
        self._rows, self._copies, self._room = rows, copies, room
        self._processors, self._criteria, self._config = processors, criteria, config
        self._eos: Tensor | None = config._eos_token_tensor
        self._pad: Tensor | None = config._pad_token_tensor
        self._scores: list[Tensor] | None = [] if config.return_dict_in_generate and config.output_scores else None

    def _told(self) -> Any:
        """The scores so far, as transformers shows them to stopping criteria."""
        return None if self._scores is None else tuple(self._scores)

    # ---------------------------------------------------------------- beams

    async def beams(self, *roots: Branch) -> Finished:
        """Beam search over all prompts."""
        config, eos, pad = self._config, self._eos, self._pad
        num_eos = 0 if eos is None else len(eos)
        rules = BeamRules(
            num_beams=config.num_beams,
            num_candidates=max(2, 1 + num_eos) * config.num_beams,
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
            max_new_tokens=self._room,
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
            stops=lambda rows: self._criteria(rows, self._told()),
            on_step=None if self._scores is None else self._scores.append,
        )

    def beam_output(self, found: Finished) -> Tensor | GenerateBeamDecoderOnlyOutput:
        """The best `num_return_sequences` of each prompt, cut behind the longest."""
        keep = self._config.num_return_sequences
        indices = found.beam_indices[:, :keep].flatten(0, 1)
        longest = int((indices >= 0).sum(dim=1).max())
        sequences = found.rows[:, :keep].flatten(0, 1)[:, : self._rows.shape[1] + longest]
        if not self._config.return_dict_in_generate:
            return sequences
        return GenerateBeamDecoderOnlyOutput(
            sequences=sequences,
            sequences_scores=found.scores[:, :keep].flatten() if self._scores is not None else None,
            scores=self._told(),
            beam_indices=indices[:, :longest],
        )

    # ---------------------------------------------------------------- one token after the other

    async def samples(self, *roots: Branch) -> Tensor:
        """Greedy or sampled continuation of every row; finished rows get the pad token and leave the batch."""
        rows = self._rows
        branches = [branch for root in roots for branch in root.fork(self._copies)]
        open_rows = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        live = np.arange(len(rows))
        whole = self._config.do_sample or self._scores is not None or len(self._processors) > 0  # rows of logits
        state: Tensor | None = None  # logits, or tokens, of all rows; those of finished ones stay
        while True:
            asked = [branches[i] for i in live]
            fresh = await next_logits(asked) if whole else await self._most_likely(asked)
            state = fresh.clone() if state is None else state.index_copy(0, upload(live, rows.device), fresh)
            tokens = self._choose(branches, rows, state) if whole else state
            if self._eos is not None and self._pad is not None:
                tokens = torch.where(open_rows, tokens, self._pad.to(tokens))
            rows = torch.cat([rows, tokens[:, None]], dim=1)
            stopped = self._criteria(rows, self._told())
            open_rows = open_rows & ~stopped
            drawn, goes_on = torch.stack([tokens, open_rows]).cpu().numpy()
            live = live[goes_on[live] == 1]
            if not len(live):
                return rows
            append([branches[i] for i in live], drawn[live])

    async def _most_likely(self, branches: Sequence[Branch]) -> Tensor:
        """Next token of each branch, `[n]`."""
        nothing = np.zeros(len(branches), np.int64)
        greedy = Draw(Sampling(temperature=0), seed=nothing, position=nothing)
        tokens = (await score_tokens(branches, TokenRequest(draw=greedy))).token
        assert tokens is not None
        return tokens

    def _choose(self, branches: Sequence[Branch], rows: Tensor, logits: Tensor) -> Tensor:
        """A token for each of all rows, `[n]`."""
        scores = process(self._processors, branches, rows, logits)
        if self._scores is not None:
            self._scores.append(scores)
        if self._config.do_sample:
            return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        return scores.argmax(dim=-1)

    def sample_output(self, rows: Tensor) -> Tensor | GenerateDecoderOnlyOutput:
        """All rows."""
        if not self._config.return_dict_in_generate:
            return rows
        return GenerateDecoderOnlyOutput(sequences=rows, scores=self._told())


def _refuse(config: GenerationConfig, input_ids: Tensor, model_kwargs: dict[str, Any]) -> None:
    """Raises `InvalidInput` for what this function cannot honour."""
    mode = config.get_generation_mode()
    if mode not in _MODES:
        known = ", ".join(m.value for m in _MODES)
        raise InvalidInput(f"forktree.generate does {known}; got {mode.value}")
    if input_ids.shape[1] == 0 or "inputs_embeds" in model_kwargs:
        raise InvalidInput("forktree.generate needs input_ids with at least one token, got inputs_embeds or no ids")
    for name in ("output_attentions", "output_hidden_states", "output_logits"):
        if getattr(config, name, None) and config.return_dict_in_generate:
            raise InvalidInput(f"forktree.generate does not keep what {name}=True asks for; leave it off")
    for name in _CACHES:
        cache = model_kwargs.get(name)
        if cache is not None and cache.get_seq_length() > 0:
            raise InvalidInput(
                f"forktree.generate keeps its own KV cache, got {name} with {cache.get_seq_length()} tokens"
            )
    unknown = sorted(k for k, v in model_kwargs.items() if k not in _HARMLESS and v is not None)
    if unknown:
        raise InvalidInput(f"forktree.generate runs text-only models on input_ids, got {', '.join(unknown)} too")


def _without_padding(rows: Tensor, mask: Tensor | None, copies: int) -> list[Sequence[int]]:
    """Token ids of each prompt behind its left padding."""
    if mask is None:
        return rows.tolist()
    mask = mask[::copies].bool()
    if not bool((mask.int().diff(dim=1) >= 0).all()) or not bool(mask[:, -1].all()):
        raise InvalidInput("attention_mask must be ones behind left padding (padding_side='left'), got another pattern")
    return [row[keep].tolist() for row, keep in zip(rows, mask, strict=True)]
