"""`Decoder`: a model, its tokenizer and an engine; searches over prompts."""

from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from forktree.checks import integer, integers, shown
from forktree.detokenise import response_text
from forktree.engine.counters import Counters
from forktree.engine.engine import Engine
from forktree.engine.task import Task
from forktree.engine.users import Run
from forktree.engine.worker import ModelWorker
from forktree.engine.workers import MAIN
from forktree.errors import InvalidInput
from forktree.kv import Branch
from forktree.prompts import Prompt, encode, read_prompts, tokenise
from forktree.search import Hypothesis, Search, SearchContext
from forktree.search.budget import Budget
from forktree.search.rerank.base import Ranking, Reranker, Reranking
from forktree.search.stopping import TextStop
from forktree.search.trace import PROMPT, SearchTrace, TraceNode
from forktree.search.validation import check_texts

LARGEST_SEED = 2**127 - 1


@dataclass(frozen=True)
class Candidate:
    """A hypothesis with its text: see `forktree.detokenise.response_text`. None when the decoder has no tokenizer."""

    text: str | None
    hypothesis: Hypothesis

    @property
    def score(self) -> float:
        """What the search ranks by; higher is better."""
        return self.hypothesis.score

    @property
    def token_ids(self) -> list[int]:
        """Tokens after the prompt, EOS not included."""
        return [int(t) for t in self.hypothesis.token_ids]


@dataclass(frozen=True)
class SearchResult:
    """What a search found for one prompt, or why it failed.

    Attributes:
        index: the prompt's place in the list given.
        prompt: its text, or its token ids.
        candidates: best first; empty if `error` is set.
        counters: what the search cost.
        trace: what the search did.
        error: why the search failed.
        num_prompt_tokens: tokens of the prompt.
        decode: text of tokens after the prompt; None when the decoder has no tokenizer.
    """

    index: int
    prompt: Prompt
    candidates: list[Candidate]
    counters: Counters
    trace: SearchTrace
    error: Exception | None = None
    num_prompt_tokens: int = 0
    decode: Callable[[Sequence[int]], str] | None = field(default=None, repr=False, compare=False)

    @property
    def best(self) -> Candidate:
        """The best candidate. Raises the search's error if it failed."""
        if self.error is not None:
            raise self.error
        return self.candidates[0]

    @property
    def text(self) -> str:
        """Text of the best candidate. Raises the search's error if it failed."""
        text = self.best.text
        if text is None:
            raise InvalidInput("there is no text: this Decoder was made without a tokenizer")
        return text


    def tree(self) -> list[TraceNode]:
        """Every step of every text that the search has grown, with its text, and what became of it."""
        return self.trace.nodes(self.decode)

    @property
    def shared_fraction(self) -> float:
        """The fraction of all tokens of all texts, prompt included, that other texts had computed or generated.

        Texts are those that were grown, also where they were dropped: 1 - (distinct tokens) / (tokens if no text shared
        any with another). 0 for a single text.
        """
        nodes = self.trace.nodes()
        length: list[int] = []
        for node in nodes:
            length.append(len(node.tokens) + (length[node.parent] if node.parent != PROMPT else self.num_prompt_tokens))
        inner = {node.parent for node in nodes}
        alone = sum(length[i] for i in range(len(nodes)) if i not in inner)
        distinct = self.num_prompt_tokens + sum(len(node.tokens) for node in nodes)
        return 1 - distinct / alone if alone else 0.0


@dataclass(frozen=True)
class _Limits:
    """Those of every search of a call, see `Decoder.search_iter`."""

    max_new_tokens: int
    max_model_tokens: int | None = None
    max_reward_calls: int | None = None

    def check(self) -> None:
        integer("max_new_tokens", self.max_new_tokens, 1)
        for name in ("max_model_tokens", "max_reward_calls"):
            if (given := getattr(self, name)) is not None:
                integer(name, given, 1)


class Decoder:
    """Runs searches on a Hugging Face causal language model. Shared tokens are stored and computed once.

    The model is run as it is, and stays as it is for others that use it at the same time. Every call looks whether it
    has changed. If it has, the call verifies it anew (`UnsupportedModel` if that fails) and drops all KV, hidden states
    and kept prompts. A change is seen in parameters, buffers and modules that were replaced, written in place, moved or
    cast; in hooks, overrides of `forward`, adapters and other attributes of modules; in values of configs; in autocast.
    A change is not seen where PyTorch does not count it (writes through `.data`, to inference tensors, by other
    libraries' kernels, to weights that are offloaded) or where hooks look up something outside modules: call
    `weights_changed` after those. A search under way looks when it has given a result: it keeps its tokens, and
    computes them again with the new weights.

    Args:
        model: any causal LM whose every layer is softmax attention, in evaluation mode, fp32, bf16 or fp16, also mixed,
            under autocast, quantised or offloaded. It is verified at once: `UnsupportedModel` names what fails.
        tokenizer: the model's tokenizer. Without one, prompts are token ids, and texts cannot stop or be judged. It may
            know more tokens than the model embeds: the ids that occur must be the model's.
        num_slots: maximum number of tokens whose KV exists at once (None: at most 65,536, within a quarter of the free
            memory). Memory is taken as tokens come: for 512 at first (on a GPU, 512 MiB if that is more), and at least
            twice as much each time that it is short.
        max_batch_tokens: maximum number of tokens of one forward pass; longer prefills are split and mixed with
            decoding.
        prefix_cache: whether finished prompts are kept for later prompts that begin alike, until their slots are
            needed.
        models: further models by name, for searches that ask them (`SearchContext.open`), such as a draft model. Each
            has a tree and `num_slots` slots of its own, and shares the tokenizer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        num_slots: int | None = None,
        max_batch_tokens: int = 512,
        prefix_cache: bool = True,
        models: Mapping[str, Any] | None = None,
    ) -> None:
        integer("max_batch_tokens", max_batch_tokens, 1)
        if num_slots is not None:
            integer("num_slots", num_slots, 1)
        self.model, self.tokenizer = model, tokenizer
        self.worker = ModelWorker(model, num_slots=num_slots, prefix_cache=prefix_cache)
        further = {
            name: ModelWorker(other, num_slots=num_slots, prefix_cache=prefix_cache)
            for name, other in _named(models or {}).items()
        }
        self.engine = Engine(self.worker, models=further, tokenizer=tokenizer, max_batch_tokens=max_batch_tokens)
        self._stops: dict[tuple[str, ...], TextStop] = {}

    def search(
        self,
        prompts: Any,
        search: Search,
        *,
        max_new_tokens: int = 256,
        max_model_tokens: int | None = None,
        max_reward_calls: int | None = None,
        seed: int = 0,
        on_step: Callable[[], None] | None = None,
    ) -> list[SearchResult]:
        """One result a prompt, in their order. See `search_iter` for arguments and errors."""
        results = self.search_iter(
            prompts,
            search,
            max_new_tokens=max_new_tokens,
            max_model_tokens=max_model_tokens,
            max_reward_calls=max_reward_calls,
            seed=seed,
            on_step=on_step,
        )
        try:
            return sorted(results, key=lambda result: result.index)
        finally:
            results.close()

    def search_iter(
        self,
        prompts: Any,
        search: Search | Sequence[Search],
        *,
        max_new_tokens: int = 256,
        max_model_tokens: int | None = None,
        max_reward_calls: int | None = None,
        seed: int = 0,
        on_step: Callable[[], None] | None = None,
    ) -> Generator[SearchResult, None, None]:
        """Results as they finish, in any order; `result.index` says whose.

        A search that fails while it runs is a result with `error` set; the others go on. Closing the iterator, from any
        thread, cancels what still runs. Ctrl-C ends this call's searches after the step under way; pressed twice, it
        ends all searches at once. Results of several calls may be read in turns, by one thread.

        Args:
            prompts: texts or token ids, or a single one; ids as a sequence of integers, an array or tensor `[n]`, or
                what a tokenizer returns (`apply_chat_template` too), its padding left out. Such a batch by itself is
                several prompts. Of a text, what the tokenizer puts at its end is dropped; an EOS that it spells out
                stays. Rewards see a text as it is, and ids decoded with their special tokens.
            search: one for all prompts, or one for each.
            max_new_tokens: maximum number of tokens after the prompt, EOS included.
            max_model_tokens: maximum number of tokens that each search generates over all its texts, EOS included. A
                search that has spent them ends with the best that it has; its texts that were cut have the
                `finish_reason` "budget". Default: no limit.
            max_reward_calls: maximum number of texts that each search has rewarded, in the same way.
            seed: same seed and prompt, same text, whatever else is in the batch (fp32; otherwise up to rounding). From
                0 to 2^127 - 1.
            on_step: called after every forward pass.

        Raises:
            InvalidInput: before anything runs, if a prompt or setting is bad.
            DecoderInUse: at the first result, if those of another thread are not all read yet, or inside a call of this
                Decoder to a reward, processor, stop, `on_step` or search.
        """
        self.engine.renew()
        texts = read_prompts(prompts)
        searches = list(search) if isinstance(search, Sequence) else [search] * len(texts)
        if len(searches) != len(texts):
            raise InvalidInput(f"search must be one, or one for each of {len(texts)} prompts, got {len(searches)}")
        limits = _Limits(max_new_tokens, max_model_tokens, max_reward_calls)
        tokens = self._checked(texts, searches, limits, seed)
        return self._run(texts, tokens, searches, limits, int(seed), on_step)

    def rerank(self, query: str, documents: Sequence[str], how: Reranker, *, seed: int = 0) -> Ranking:
        """Puts the documents of a query in a better order.

        Args:
            query: What is asked.
            documents: What is ranked, at least one.
            how: A way of reranking, see `forktree.search.rerank`.
            seed: Of what it samples.

        Raises:
            InvalidInput: Something given is bad, or a label is not one token of the tokenizer.
        """
        check_texts("documents", documents)
        check_texts("query", (query,))
        if not documents:
            raise InvalidInput("documents must be at least one text, got none")
        if not isinstance(how, Reranker):
            raise InvalidInput(f"how must be a way of reranking such as Listwise(), got {shown(how)}")
        if self.tokenizer is None:
            raise InvalidInput("reranking reads texts: expected a Decoder with a tokenizer, got tokenizer=None")
        reranking = Reranking(how, query, tuple(documents))
        (result,) = self.search(query, reranking, max_new_tokens=1, seed=seed)
        if result.error is not None:
            raise result.error
        return replace(reranking.found[0], counters=result.counters)

    def submit(self, prompt: Any, search: Search, *, max_new_tokens: int = 256, seed: int = 0) -> Task:
        """Starts one search and runs none of it: for those who call `engine.step` themselves.

        Args:
            prompt: a single prompt; for all arguments and errors see `search_iter`.
            search: what is done with it.
            max_new_tokens: maximum number of tokens of a hypothesis.
            seed: of its samples.

        Returns:
            The search under way. Once it is `done`, `result` has its candidates, or `error` says why there are none.
        """
        self.engine.renew()
        texts = self._one(prompt)
        limits = _Limits(max_new_tokens)
        (tokens,) = self._checked(texts, [search], limits, seed)
        return self._submit(texts[0], tokens, search, limits, int(seed), SearchTrace())

    def _checked(self, prompts: list[Prompt], searches: list[Search], limits: _Limits, seed: int) -> list[list[int]]:
        """Token ids of each prompt. Raises unless all can be searched."""
        for one in {id(s): s for s in searches}.values():
            if not isinstance(one, Search):
                raise InvalidInput(f"search must be a Search such as ParticleFilter(...), got {type(one).__name__}")
            for reward in one.rewards:
                reward.check(self.worker)
        limits.check()
        integer("seed", seed, 0, LARGEST_SEED)
        tokens = self._tokens(prompts)
        for i, ids in enumerate(tokens):
            self._check(f"prompt {i}", ids, limits.max_new_tokens, self.worker)
        return tokens

    def weights_changed(self) -> None:
        """Says that models have changed where it cannot be seen: the next call verifies them anew and keeps nothing."""
        for worker in self.engine.workers.named.values():
            worker.weights_changed()

    def _run(
        self,
        prompts: list[Prompt],
        tokens: list[list[int]],
        searches: list[Search],
        limits: _Limits,
        seed: int,
        on_step: Callable[[], None] | None,
    ) -> Generator[SearchResult, None, None]:
        running: dict[Task, tuple[int, SearchTrace]] = {}
        waiting = list(reversed(range(len(prompts))))
        with self.engine.use() as run:
            self.engine.renew(run)  # the iterator may be begun later than it was made
            while waiting or running:
                while waiting and (not running or self.engine.has_room(len(tokens[waiting[-1]]))):
                    i = waiting.pop()
                    trace = SearchTrace()
                    task = self._submit(prompts[i], tokens[i], searches[i], limits, seed, trace, run)
                    running[task] = i, trace
                self.engine.step()
                if on_step is not None:
                    run.calls_back = True
                    on_step()
                    run.calls_back = False
                done = [t for t in running if t.done]
                for task in done:
                    i, trace = running.pop(task)
                    found, ids = task.result or [], tokens[i]
                    decode = None if self.tokenizer is None else response_text(self.tokenizer, ids)
                    yield SearchResult(i, prompts[i], found, task.counters, trace, task.error, len(ids), decode)
                if done:  # the caller has had its turn
                    self.engine.renew(run)

    def _submit(
        self,
        prompt: Prompt,
        tokens: list[int],
        search: Search,
        limits: _Limits,
        seed: int,
        trace: SearchTrace,
        run: Run | None = None,
    ) -> Task:
        start = partial(self._start, search, limits, trace)
        return self.engine.submit(start, [tokens], text=self._text(prompt), seed=seed, run=run)

    async def _start(self, search: Search, limits: _Limits, trace: SearchTrace, task: Task) -> list[Candidate]:
        root = task.roots[0].branch
        text_of = None if self.tokenizer is None else response_text(self.tokenizer, root.tokens.tolist())
        context = SearchContext(
            root=root,
            max_new_tokens=limits.max_new_tokens,
            eos_token_ids=self._eos_token_ids(),
            pad_token_id=self._pad_token_id(),
            vocab_size=self.worker.runner.vocab_size,
            device=self.worker.runner.device,
            stops=self._stop if self.tokenizer is not None else None,
            decode=text_of,
            rng=np.random.default_rng(root.key),
            opens=partial(self._open, task),
            prompt=task.roots[0].prompt,
            encode=None if self.tokenizer is None else self._encode,
            counters=task.counters,
            trace=trace,
            budget=Budget(task.counters, limits.max_model_tokens, limits.max_reward_calls),
        )
        name, running = f"{type(search).__name__}.run", search.run(context)
        if not isinstance(running, Awaitable):
            raise InvalidInput(f"{name} must be an async function, got one that returns {type(running).__name__}")
        found = await running
        if not isinstance(found, list | tuple) or not all(isinstance(h, Hypothesis) for h in found):
            raise InvalidInput(f"{name} must return a list of Hypothesis, got {shown(found)}")
        for h in found:
            integers(f"token_ids of a hypothesis of {name}", h.token_ids, 0, context.vocab_size - 1)
        return [Candidate(None if text_of is None else text_of(h.token_ids), h) for h in found]

    def _open(self, task: Task, prompt: Any, model: str) -> Branch:
        """See `SearchContext.open`."""
        (text,) = self._one(prompt)
        (tokens,) = self._tokens([text])
        branch = self.engine.open(task, tokens, text=self._text(text), model=model)
        self._check("the prompt that is opened", tokens, 0, task.roots[-1].worker)
        return branch

    def _encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens before or after it."""
        return encode(self.tokenizer, [text], add_special_tokens=False)[0]

    def _one(self, prompt: Any) -> list[Prompt]:
        read = read_prompts(prompt)
        if len(read) != 1:
            raise InvalidInput(f"expected one prompt, a text or token ids, got {len(read)}")
        return read

    def _tokens(self, prompts: list[Prompt]) -> list[list[int]]:
        """Token ids of each prompt."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if texts and self.tokenizer is None:
            i = next(i for i, prompt in enumerate(prompts) if isinstance(prompt, str))
            raise InvalidInput(f"prompt {i} is text: expected a Decoder with a tokenizer, got tokenizer=None")
        if "" in texts:
            raise InvalidInput(f"prompt {prompts.index('')} is empty: expected at least one token")
        of_texts = iter(tokenise(self.tokenizer, texts))
        return [next(of_texts) if isinstance(prompt, str) else prompt for prompt in prompts]

    def _check(self, name: str, ids: list[int], max_new_tokens: int, worker: ModelWorker) -> None:
        """Raises unless a prompt fits the model and its pool."""
        runner = worker.runner
        if not ids:
            raise InvalidInput(f"{name} is empty: expected at least one token")
        bad = next((t for t in ids if not 0 <= t < runner.vocab_size), None)
        if bad is not None:
            known = 0 if self.tokenizer is None else len(self.tokenizer)
            more = f"; the tokenizer has {known} tokens, the model embeds {runner.vocab_size}"
            raise InvalidInput(
                f"{name} has token id {shown(bad)}: expected ids in [0, {runner.vocab_size})"
                f"{more if known > runner.vocab_size else ''}"
            )
        if len(ids) + max_new_tokens > runner.max_position:
            raise InvalidInput(
                f"{name} has {len(ids)} tokens: with max_new_tokens = {max_new_tokens} the model's limit of "
                f"{runner.max_position} positions is passed ({runner.spec.max_position_note}); shorten the prompt or "
                "lower max_new_tokens"
            )
        if len(ids) > runner.num_slots:
            raise InvalidInput(f"{name} has {len(ids)} tokens, the KV pool holds {runner.num_slots}: raise num_slots")

    def _text(self, prompt: Prompt) -> str:
        """A prompt as rewards see it: of token ids their text, with special tokens, if there is a tokenizer."""
        if isinstance(prompt, str):
            return prompt
        return "" if self.tokenizer is None else str(self.tokenizer.decode(prompt))

    def _stop(self, texts: Sequence[str]) -> TextStop:
        key = tuple(texts)
        if key not in self._stops:
            self._stops[key] = TextStop(self.tokenizer, key)
        return self._stops[key]

    def _eos_token_ids(self) -> frozenset[int]:
        config = getattr(self.model, "generation_config", None) or self.model.config
        ids = config.eos_token_id
        if ids is None and self.tokenizer is not None:
            ids = self.tokenizer.eos_token_id
        return frozenset([] if ids is None else [ids] if isinstance(ids, int) else ids)

    def _pad_token_id(self) -> int:
        """The model's, if it embeds that; else an EOS."""
        config = getattr(self.model, "generation_config", None) or self.model.config
        known = range(self.worker.runner.vocab_size)
        return next((int(i) for i in (config.pad_token_id or -1, *sorted(self._eos_token_ids())) if i in known), 0)


def _named(models: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(models, Mapping) or not all(isinstance(name, str) for name in models):
        raise InvalidInput(f"models must be a mapping from names to models, got {shown(models)}")
    if MAIN in models:
        raise InvalidInput(f"models must have names other than {MAIN!r}, which is the decoder's own model")
    return models
