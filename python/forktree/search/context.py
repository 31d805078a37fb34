"""What every search is given: its prompt, and what the decoder knows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from forktree.engine.counters import Counters
from forktree.errors import InvalidInput
from forktree.kv import Branch
from forktree.search.budget import Budget
from forktree.search.payoff import Payoff
from forktree.search.request import Stop
from forktree.search.trace import SearchTrace
from forktree.types import Int32Array


@dataclass(frozen=True)
class SearchContext:
    """One prompt to search.

    Args:
        root: branch that sees the prompt. It stays alive until the search ends.
        max_new_tokens: maximum number of tokens of a hypothesis, EOS included.
        eos_token_ids: any of them ends a hypothesis.
        pad_token_id: fills rows that logits processors look at.
        vocab_size: V.
        device: where logits are.
        stops: builds a `Stop` from texts; None when the decoder has no tokenizer.
        decode: text of tokens after the prompt; None when the decoder has no tokenizer.
        rng: randomness of the search's own choices (resampling); tokens are sampled by keys of branch and position.
        opens: gives a branch for a prompt and a model's name, see `open`.
        prompt: the prompt's text as rewards see it; empty when there is none.
        encode: token ids of a text that goes on after others; None when the decoder has no tokenizer.
        counters: what the search has cost so far.
        trace: what it has done so far; the search appends to it.
        budget: what it may still cost; `grow`, `complete` and `judged` keep to it.
        payoff: what it knows of costs and gains of drafts, if it has a drafter.
    """

    root: Branch
    max_new_tokens: int
    eos_token_ids: frozenset[int]
    pad_token_id: int
    vocab_size: int
    device: torch.device
    stops: Callable[[Sequence[str]], Stop] | None
    decode: Callable[[Int32Array], str | None] | None
    rng: np.random.Generator
    opens: Callable[[Any, str], Branch]
    prompt: str = ""
    encode: Callable[[str], list[int]] | None = None
    counters: Counters = field(default_factory=Counters)
    trace: SearchTrace = field(default_factory=SearchTrace)
    budget: Budget = field(default_factory=Budget)
    payoff: Payoff = field(default_factory=Payoff)

    def open(self, prompt: Any, model: str = "main") -> Branch:
        """A further text of this search, on whatever prefix of it the model's tree has.

        Branches of one model and of another are never mixed in a request; what is awaited for a branch is answered by
        its own model.

        Args:
            prompt: A text, tokenised as prompts are, or token ids.
            model: "main", the decoder's own, or one of its `models`.

        Returns:
            A branch that is dropped when the search ends, with all its forks.

        Raises:
            InvalidInput: No such model, or a prompt that does not fit it.
        """
        return self.opens(prompt, model)

    def stop_at(self, *texts: str) -> Stop | None:
        """Stops after the first token that completes one of `texts`; empty texts are ignored. None if all are empty."""
        wanted = [text for text in texts if text]
        if not wanted:
            return None
        if self.stops is None:
            raise InvalidInput(f"stopping at {wanted!r} needs a Decoder with a tokenizer, got tokenizer=None")
        return self.stops(wanted)
