"""Beam search with exactly the semantics of transformers' `generate(num_beams=k)`.

The selection rules are pure functions on tensors; letters: `B` prompts, `k` beams, `M` candidates, `V` vocabulary,
`L` columns of the padded rows. Rows are left-padded, so that all prompts of a batch have the same length and logits
processors written for `generate` can be called on them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from forktree.checks import integer, number, shown
from forktree.device.transfer import Download
from forktree.errors import InvalidInput, NonFinite
from forktree.kv import Branch, append, reassign
from forktree.ops.token_request import TokenRequest
from forktree.search.algorithms.beam_trie import TrieRules, trie_beam_search
from forktree.search.base import Hypothesis, Search
from forktree.search.context import SearchContext
from forktree.search.processors import Processor, check_processors, process
from forktree.search.registry import register
from forktree.search.request import next_logits, score_tokens
from forktree.search.trace import PROMPT, SearchTrace
from forktree.search.trie import TokenTrie
from forktree.search.validation import check_choice
from forktree.types import Int32Array

NEVER = -1.0e9  # the score of what must not be chosen; finite, as in transformers, so that sums stay ordered

_MODEL, _PROCESSORS, _NOTHING_LEFT = 1, 2, 3  # what is wrong with a row, and whose fault it is; 0: nothing

Criterion = Callable[[Tensor], Tensor]  # rows [n, L] -> stopped, bool [n]


@dataclass(frozen=True)
class BeamRules:
    """How beams are kept; the meaning of each setting is that of transformers' `GenerationConfig`.

    Args:
        num_beams: k.
        num_candidates: M, the number of continuations considered at a step: `max(2, 1 + number of EOS ids) * k`.
        length_penalty: the exponent on the length by which a score is divided.
        early_stopping: True, False or "never".
        max_new_tokens: used by the bound of `early_stopping="never"`.
        do_sample: sample the candidates without replacement, by torch's global generator, instead of taking the best.
        best_first: sort sampled candidates, as transformers does from 5.24 on; before, they stood as sampled.
        num_beam_groups: G, the groups that the beams of a prompt are divided into.
        diversity_penalty: what a token's log-prob loses for every beam of an earlier group that takes it at this step.
    """

    num_beams: int
    num_candidates: int
    length_penalty: float
    early_stopping: bool | str
    max_new_tokens: int
    do_sample: bool = False
    best_first: bool = True
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0

    @property
    def of_a_group(self) -> "BeamRules":
        """The rules by which the beams of one group are kept."""
        groups = self.num_beam_groups
        return replace(self, num_beams=self.num_beams // groups, num_candidates=self.num_candidates // groups)


@dataclass(frozen=True)
class Candidates:
    """The M continuations of a step, `[B, M]` each: sum of log-probs, beam it continues, token."""

    scores: Tensor
    beam: Tensor
    token: Tensor


@dataclass(frozen=True)
class Finished:
    """The k best finished rows of every prompt; N tokens have been generated so far.

    Args:
        rows: int64 `[B, k, L + N]`.
        scores: with length penalty, `[B, k]`.
        done: whether there is such a row, bool `[B, k]`.
        beam_indices: the beam that each token continues, int32 `[B, k, N]`; -1 after the end.
        open: whether a running beam may still do better, bool `[B]`.
    """

    rows: Tensor
    scores: Tensor
    done: Tensor
    beam_indices: Tensor
    open: Tensor

    @property
    def found(self) -> Tensor:
        """Done, and by no token that was banned: bool [B, k]."""
        return self.done & (self.scores > -torch.inf)


def propose(log_probs: Tensor, scores: Tensor, rules: BeamRules) -> Candidates:
    """M continuations of `scores [B, k]` by `log_probs [B, k, V]`."""
    batch, _, vocab = log_probs.shape
    total = (log_probs + scores[:, :, None]).reshape(batch, -1)
    if rules.do_sample:
        index = torch.multinomial(total.softmax(dim=-1), num_samples=rules.num_candidates)
        best = total.gather(1, index)
        if rules.best_first:
            best, order = best.sort(dim=1, descending=True)
            index = index.gather(1, order)
    else:
        best, index = total.topk(rules.num_candidates)
    return Candidates(best, index // vocab, index % vocab)


def propose_among(log_probs: Tensor, tokens: Tensor, scores: Tensor, rules: BeamRules) -> Candidates:
    """Like `propose`, given the m most likely tokens of every beam, `[B, k, m]` both; m is M or V, which is enough."""
    batch, _, each = log_probs.shape
    best, index = (log_probs + scores[:, :, None]).reshape(batch, -1).topk(rules.num_candidates)
    return Candidates(best, index // each, tokens.reshape(batch, -1).gather(1, index))


def propose_diverse(
    log_probs: Tensor, scores: Tensor, rules: BeamRules, stopped: Callable[[Candidates, slice], Tensor]
) -> Candidates:
    """Like `propose` for all groups, which are rows `g, g + G, …` of the batch, in their order.

    A group sees the log-probs less `diversity_penalty` for each beam of an earlier group of its prompt that goes on
    with the token (Vijayakumar et al. 2016, Hamming diversity); where all candidates stop, the best count as going on.
    The penalty stays part of the sum.

    Args:
        log_probs: `[B * G, k, V]`, prompt by prompt.
        scores: of the beams, `[B * G, k]`.
        rules: those of a group.
        stopped: candidates, and the rows they are of -> which of them stop.
    """
    groups, found = rules.num_beam_groups, []
    taken = torch.zeros_like(log_probs[::groups, 0])
    for group in range(groups):
        own = slice(group, None, groups)
        candidates = propose(log_probs[own] - rules.diversity_penalty * taken[:, None], scores[own], rules)
        over = stopped(candidates, own)
        chosen, _ = select_running(candidates, over & ~over.all(dim=1, keepdim=True), rules.num_beams)
        taken.scatter_add_(1, candidates.token.gather(1, chosen), torch.ones_like(chosen, dtype=taken.dtype))
        found.append((candidates.scores, candidates.beam, candidates.token))
    return Candidates(*(torch.stack(parts, dim=1).flatten(0, 1) for parts in zip(*found, strict=True)))


def merge_groups(finished: Finished, groups: int) -> Finished:
    """The finished rows of all groups of each prompt, best first: `[B * G, k]` -> `[B, G * k]`."""
    if groups == 1:
        return finished
    scores, order = finished.scores.reshape(-1, groups * finished.scores.shape[1]).sort(descending=True, stable=True)

    def together(values: Tensor) -> Tensor:
        return _along(values.reshape(len(order), -1, *values.shape[2:]), order)

    return Finished(
        rows=together(finished.rows),
        scores=scores,
        done=together(finished.done),
        beam_indices=together(finished.beam_indices),
        open=finished.open.reshape(-1, groups).any(dim=1),
    )


def select_running(candidates: Candidates, stopped: Tensor, num_beams: int) -> tuple[Tensor, Tensor]:
    """Columns `[B, k]` of the candidates that run on, and their scores: the best that did not stop."""
    scores = candidates.scores + stopped.float() * NEVER
    chosen = scores.topk(num_beams)[1]
    return chosen, scores.gather(1, chosen)


def update_finished(
    finished: Finished,
    rows: Tensor,
    beam_indices: Tensor,
    candidates: Candidates,
    stopped: Tensor,
    length: int,
    rules: BeamRules,
) -> Finished:
    """Merges candidates that stopped, `rows [B, M, L + N]`, into the finished ones.

    Only a candidate among the first k columns counts; its score is `sum / length ** length_penalty`, where `length`
    are its generated tokens, EOS included. Nothing is added to a prompt that is full (early_stopping=True) or closed.
    """
    first = torch.arange(rules.num_candidates, device=stopped.device) < rules.num_beams
    counts = stopped & first
    full = finished.done.all(dim=1, keepdim=True) & (rules.early_stopping is True)
    scores = candidates.scores / length**rules.length_penalty
    for barred in (full, ~finished.open[:, None], ~counts):
        scores = scores + barred.float() * NEVER
    merged = torch.cat([finished.scores, scores], dim=1)
    best = merged.topk(rules.num_beams)[1]
    return Finished(
        rows=_along(torch.cat([finished.rows, rows], dim=1), best),
        scores=merged.gather(1, best),
        done=torch.cat([finished.done, counts], dim=1).gather(1, best),
        beam_indices=_along(torch.cat([finished.beam_indices, beam_indices], dim=1), best),
        open=finished.open,
    )


def still_open(finished: Finished, running: Tensor, length: int, rules: BeamRules) -> Tensor:
    """bool [B]: whether the best running score `running [B, k]` may still beat the worst finished one. Latched."""
    reach = rules.max_new_tokens if rules.early_stopping == "never" and rules.length_penalty > 0 else length
    best = running[:, :1] / reach**rules.length_penalty
    worst = torch.where(finished.done, finished.scores.min(dim=1, keepdim=True)[0], NEVER)
    return finished.open & (best > worst).any(dim=1)


async def beam_search(
    roots: Sequence[Branch],
    rows: Tensor,
    rules: BeamRules,
    *,
    fill: int,
    processors: Sequence[Processor] = (),
    stops: Criterion,
    on_step: Callable[[Tensor], None] | None = None,
    whole_rows: bool = False,
    trace: SearchTrace | None = None,
) -> Finished:
    """Searches the prompts of `roots` side by side; `rows [B, L]` are their tokens, left-padded.

    With processors, on_step, do_sample or whole_rows, rows of logits are computed, rounded as the model rounds them;
    without, only their best are. A beam that processors leave no token goes on at a score of -inf, as in transformers:
    below all others.

    Args:
        roots: a branch for each prompt, `[B]`.
        rows: the tokens of each, left-padded, int64 `[B, L]`.
        rules: how beams are kept.
        fill: token after the end of a finished row.
        processors: applied to the log-probs of all `[B * k]` rows.
        stops: candidate rows `[n, L]` -> which of them stop, bool `[n]`.
        on_step: sees the processed log-probs of every step, `[B * k, V]`.
        whole_rows: whether to compute rows of logits in any case.
        trace: where the beams of every step are recorded, if anywhere.

    Raises:
        NonFinite: the model gives NaN or infinity.
        InvalidInput: processors give NaN or +inf, or leave no token to any beam of a prompt that has nothing finished.
    """
    groups, rules = rules.num_beam_groups, rules.of_a_group
    roots, rows = [root for root in roots for _ in range(groups)], rows.repeat_interleave(groups, dim=0)
    batch, prompt = rows.shape  # of groups, from here on
    k, device = rules.num_beams, rows.device
    nodes = np.full(batch * k, PROMPT, np.int64)
    beams = [branch for root in roots for branch in root.fork(k)]
    running = rows[:, None].repeat(1, k, 1)
    scores = torch.zeros(batch, k, device=device)
    scores[:, 1:] = NEVER
    indices = torch.zeros(batch, k, 0, dtype=torch.int32, device=device)
    finished = Finished(
        rows=running,
        scores=torch.full((batch, k), NEVER, device=device),
        done=torch.zeros(batch, k, dtype=torch.bool, device=device),
        beam_indices=indices,
        open=torch.ones(batch, dtype=torch.bool, device=device),
    )
    offset = torch.arange(batch, device=device)[:, None] * k
    for step in range(rules.max_new_tokens):
        if not (whole_rows or processors or on_step or rules.do_sample or groups > 1):
            found = await score_tokens(beams, TokenRequest(top_k=rules.num_candidates), checked=False)
            wrong = (~found.lse.isfinite()).long() * _MODEL
            best, tokens = (x.reshape(batch, k, -1) for x in (found.top_log_probs, found.top_ids))
            candidates = propose_among(best, tokens, scores, rules)
        else:
            logits = await next_logits(beams, checked=rules.do_sample)  # multinomial dies of NaN; all else passes it on
            wrong = (~logits.amax(dim=-1).isfinite()).long() * _MODEL
            log_probs = logits.log_softmax(dim=-1)
            log_probs = process(processors, beams, running.reshape(batch * k, prompt + step), log_probs)
            if processors:
                highest = log_probs.amax(dim=-1)
                senseless = ~(highest < torch.inf)  # NaN is its row's highest
                wrong = torch.where(senseless & (wrong == 0), _PROCESSORS, wrong)
                if rules.do_sample:  # multinomial dies of them
                    log_probs = log_probs.masked_fill(senseless[:, None], 0)
            if on_step is not None:
                on_step(log_probs)
            by_beam = log_probs.reshape(batch, k, -1)
            if groups == 1:
                candidates = propose(by_beam, scores, rules)
            else:
                candidates = propose_diverse(by_beam, scores, rules, partial(_stopped, running, stops))
        candidate_rows = _wider(_along(running, candidates.beam), candidates.token)
        candidate_indices = _wider(_along(indices, candidates.beam), (candidates.beam + offset).int())
        stopped = stops(candidate_rows.flatten(0, 1)).reshape(batch, -1)
        finished = replace(
            finished,
            rows=F.pad(finished.rows, (0, 1), value=fill),
            beam_indices=F.pad(finished.beam_indices, (0, 1), value=-1),
        )
        chosen, scores = select_running(candidates, stopped, k)
        finished = update_finished(finished, candidate_rows, candidate_indices, candidates, stopped, step + 1, rules)
        running, indices = _along(candidate_rows, chosen), _along(candidate_indices, chosen)
        finished = replace(finished, open=still_open(finished, scores, step + 1, rules))
        nothing = (candidates.scores.amax(dim=1) == -torch.inf) & ~finished.found.any(dim=1)
        wrong = torch.where(nothing.repeat_interleave(k) & (wrong == 0), _NOTHING_LEFT, wrong)
        over = ~finished.open.any() | stopped.all()
        if rules.early_stopping is True:
            over = over | finished.done.all()
        parents = candidates.beam.gather(1, chosen) + offset
        for_host = torch.stack([parents.flatten(), running[:, :, -1].flatten(), wrong, over.expand(batch * k)])
        if trace is not None:
            # fp64 holds all of these integers
            for_host = torch.cat([for_host.double(), scores.double().flatten()[None]])
        on_host = Download(for_host).read()  # all that the host needs to know, at once
        origin, token, bad, ends = on_host[:4].astype(np.int64)
        if bad.any():
            first = int(np.argmax(bad > 0))
            position = beams[first].length
            if bad[first] == _MODEL:
                raise NonFinite.of("logits", first, position)
            if bad[first] == _PROCESSORS:
                raise InvalidInput(
                    "logits processors must give finite scores, or -inf for what is banned; got NaN or +inf for "
                    f"branch {first} at position {position}"
                )
            raise InvalidInput(f"logits processors leave branch {first} no token at position {position}, nor others")
        if ends.all():
            break
        beams = reassign(beams, origin)
        append(beams, token)
        if trace is not None:
            trace.select(nodes, origin, why="beam")
            nodes = trace.grow(nodes[origin], token[:, None], scores=on_host[4])
    return merge_groups(finished, groups)


@register("beam")
@dataclass(frozen=True, kw_only=True)
class BeamSearch(Search):
    """Beam search; every setting means what it means in transformers.

    Args:
        num_beams: number of texts kept at every token.
        length_penalty: a text's score is the sum of its log-probs over its length to this power.
        early_stopping: True ends the search with `num_beams` finished texts; False, when no running text is expected to
            do better; "never", when none can.
        num_return_sequences: number of texts to return, at most `num_beams`.
        num_beam_groups: groups of beams that are to differ (diverse beam search, Vijayakumar et al. 2016); it divides
            `num_beams`.
        diversity_penalty: what a token's log-prob loses for every beam of an earlier group that takes it at the same
            step; more than 0 if there are several groups. It stays part of the score.
        logits_processor: functions that change the log-probs, see `forktree.search.processors`.
        trie: a catalogue of which every text is an entry, see `forktree.search.trie`; "never" is then False.
        trie_scores: the log-probs that texts of a trie are ranked by: "legal", given that each token is legal, or
            "model", the model's own, for which the whole vocabulary is read.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    logits_processor: Sequence[Processor] = ()
    trie: TokenTrie | None = None
    trie_scores: str = "legal"

    def __post_init__(self) -> None:
        check_processors("logits_processor", self.logits_processor)
        check_choice("trie_scores", self.trie_scores, ("legal", "model"))
        if self.trie is not None and not isinstance(self.trie, TokenTrie):
            raise InvalidInput(f"trie must be a TokenTrie, got {shown(self.trie)}")
        if self.trie is not None and self.num_beam_groups != 1:
            raise InvalidInput(f"num_beam_groups must be 1 with a trie, got {shown(self.num_beam_groups)}")
        integer("num_beams", self.num_beams, 1)
        integer("num_return_sequences", self.num_return_sequences, 1)
        if self.num_return_sequences > self.num_beams:
            raise InvalidInput(
                f"num_return_sequences must be at most num_beams = {self.num_beams}, got {self.num_return_sequences}"
            )
        number("length_penalty", self.length_penalty, "finite", lambda x: True)
        integer("num_beam_groups", self.num_beam_groups, 1)
        if self.num_beams % self.num_beam_groups:
            raise InvalidInput(
                f"num_beam_groups must divide num_beams = {self.num_beams}, got {self.num_beam_groups}"
            )
        if self.trie is not None and self.num_beam_groups > 1:
            raise InvalidInput(f"num_beam_groups must be 1 with a trie, got {self.num_beam_groups}")
        some, what = self.num_beam_groups > 1, "more than 0 for several groups, 0 for one"
        number("diversity_penalty", self.diversity_penalty, f"finite and {what}", lambda x: x > 0 if some else x == 0)
        if self.early_stopping not in (True, False, "never"):
            raise InvalidInput(f"early_stopping must be True, False or 'never', got {self.early_stopping!r}")

    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """The best finished beams; the score is the sum of log-probs over `length ** length_penalty`.

        There are fewer than `num_return_sequences` if logits processors, or the trie, leave no more.
        """
        if self.trie is not None:
            how = TrieRules(
                self.num_beams, self.length_penalty, self.early_stopping is True, self.trie_scores == "legal"
            )
            found_entries = await trie_beam_search(context, self.trie, how, self.logits_processor)
            return found_entries[: self.num_return_sequences]
        limit = int(min(context.max_new_tokens, context.budget.tokens_left // self.num_beams))
        if limit == 0:
            given = context.budget.max_model_tokens
            raise InvalidInput(f"max_model_tokens must be at least num_beams = {self.num_beams}, got {given}")
        rules = BeamRules(
            num_beams=self.num_beams,
            num_candidates=max(2, 1 + len(context.eos_token_ids)) * self.num_beams,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            max_new_tokens=limit,
            num_beam_groups=self.num_beam_groups,
            diversity_penalty=self.diversity_penalty,
        )
        rules = replace(rules, num_candidates=min(rules.num_candidates, context.vocab_size * self.num_beams))
        prompt = torch.from_numpy(context.root.tokens).long()[None].to(context.device)
        ends = torch.tensor(sorted(context.eos_token_ids), dtype=torch.long, device=context.device)
        last = prompt.shape[1] + limit

        def stops(rows: Tensor) -> Tensor:
            return torch.isin(rows[:, -1], ends) | (rows.shape[1] >= last)

        first = context.trace.num_nodes
        found = await beam_search(
            [context.root],
            prompt,
            rules,
            fill=context.pad_token_id,
            processors=self.logits_processor,
            stops=stops,
            trace=context.trace,
        )
        context.counters.sampled_tokens += (found.rows.shape[2] - prompt.shape[1]) * self.num_beams
        wanted = found.found[0, : self.num_return_sequences].nonzero().flatten().tolist()
        hypotheses = [self._hypothesis(found, i, prompt.shape[1], context) for i in wanted]
        self._record(hypotheses, found.beam_indices[0, wanted].cpu().numpy(), first, context)
        return hypotheses

    def _hypothesis(self, found: Finished, i: int, prompt: int, context: SearchContext) -> Hypothesis:
        length = int((found.beam_indices[0, i] >= 0).sum())
        tokens = found.rows[0, i, prompt : prompt + length].int().cpu().numpy()
        ended = length > 0 and int(tokens[-1]) in context.eos_token_ids
        score = float(found.scores[0, i])
        return Hypothesis(
            token_ids=tokens[:-1] if ended else tokens,
            score=score,
            log_prob=score * length**self.length_penalty,
            finish_reason="eos" if ended else "length",
        )

    def _record(self, hypotheses: Sequence[Hypothesis], beams: Int32Array, first: int, context: SearchContext) -> None:
        """Records the last token of each hypothesis, which is no running beam's, and what is returned.

        Args:
            hypotheses: `[n]`.
            beams: the beam that each of its tokens continues, -1 after the end, `[n, N]`.
            first: node of the first beam after the first token; every token has `num_beams` nodes.
            context: of the search.
        """
        length = (beams >= 0).sum(axis=1)
        origin = beams[np.arange(len(beams)), length - 1]
        parents = np.where(length > 1, first + (length - 2) * self.num_beams + origin, PROMPT)
        ends = [h.finish_reason for h in hypotheses]
        tokens = [h.token_ids[-1:] if h.finish_reason == "length" else h.token_ids[:0] for h in hypotheses]
        nodes = context.trace.grow(parents, tokens, scores=[h.log_prob for h in hypotheses], ends=ends)
        context.trace.record("return", nodes=nodes, scores=[h.score for h in hypotheses])


def _stopped(running: Tensor, stops: Criterion, candidates: Candidates, own: slice) -> Tensor:
    """Which candidates of the rows `own` of `running [B, k, L]` stop, `[b, M]`."""
    rows = _wider(_along(running[own], candidates.beam), candidates.token)
    return stops(rows.flatten(0, 1)).reshape(candidates.token.shape)


def _wider(values: Tensor, column: Tensor) -> Tensor:
    """`values [B, n, m]` and one more column, `[B, n]` -> `[B, n, m + 1]`."""
    return torch.cat([values, column[:, :, None]], dim=2)


def _along(values: Tensor, columns: Tensor) -> Tensor:
    """`values [B, n, …]` at `columns [B, m]` -> `[B, m, …]`."""
    shape = columns.shape + (1,) * (values.dim() - 2)
    return values.take_along_dim(columns.reshape(shape), dim=1)
