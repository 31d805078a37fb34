"""What searches cost, and who is charged for a forward pass."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from forktree.kv import Chunk, Tree

Phase = Literal["model", "reward", "search"]


@dataclass
class Counters:
    """What one search cost. A prefix shared by several searches counts for the one that wrote it.

    A pass that several searches share is in the wall time of each, as each waits for it. On a GPU, what the host does
    not wait for is in no phase.

    Attributes:
        sampled_tokens: Tokens generated for its texts, EOS included, and those that beams chose.
        model_tokens: Tokens run through the policy.
        opened_tokens: Those of `model_tokens` that belong to further texts the search opened, such as a judge's.
        tokens_by_model: Tokens run through further models of the decoder, by their names.
        reward_tokens: Tokens run through a reward model.
        reward_calls: Branches rewarded.
        passes: Forward passes of the policy that computed tokens of the search.
        peak_slots: Maximum of KV slots of the policy that the tokens it wrote took at once.
        peak_tokens: Maximum number of distinct tokens that were in those slots at once.
        seconds: Wall time.
        drafts: Drafts that were verified; each gave one token more than was accepted of it.
        drafted_tokens: Tokens of these.
        accepted_tokens: Those of them that the model sampled too.
        model_seconds: Wall time of passes of the policy and of further models, and of sampling.
        reward_seconds: Wall time of rewards.
        search_seconds: Wall time of the search's own decisions.
    """

    sampled_tokens: int = 0
    model_tokens: int = 0
    opened_tokens: int = 0
    tokens_by_model: dict[str, int] = field(default_factory=dict)
    reward_tokens: int = 0
    reward_calls: int = 0
    passes: int = 0
    peak_slots: int = 0
    peak_tokens: int = 0
    seconds: float = 0.0
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    model_seconds: float = 0.0
    reward_seconds: float = 0.0
    search_seconds: float = 0.0

    def count_tokens(self, model: str | None, tokens: int, *, opened: bool) -> None:
        """Tokens run through the policy, "main", a further model, or None, a reward model."""
        if model == "main":
            self.model_tokens += tokens
            self.opened_tokens += tokens if opened else 0
        elif model is None:
            self.reward_tokens += tokens
        else:
            self.tokens_by_model[model] = self.tokens_by_model.get(model, 0) + tokens


@contextmanager
def timed(phase: Phase, counters: Iterable[Counters]) -> Iterator[None]:
    """Adds the time spent within to a phase of some searches."""
    began = time.perf_counter()
    try:
        yield
    finally:
        for one in counters:
            setattr(one, f"{phase}_seconds", getattr(one, f"{phase}_seconds") + time.perf_counter() - began)


def charge(
    tree: Tree, chunks: Sequence[Chunk], by_owner: Mapping[int, Counters], count: Callable[[Counters, int, int], None]
) -> list[Counters]:
    """Charges each node's tokens to the search that wrote it, or to the first of `by_owner` if that one is gone.

    Args:
        tree: The tree whose tokens are computed.
        chunks: The tokens of a pass.
        by_owner: Counters of the searches by the owners of their branches.
        count: Is given the counters, the owner and the number of tokens.

    Returns:
        Those who were charged.
    """
    first = next(iter(by_owner))
    charged: dict[int, Counters] = {}
    for node, begin, stop in chunks:
        owner = int(tree.owner[node])
        owner = owner if owner in by_owner else first
        counters = by_owner[owner]
        charged[id(counters)] = counters
        count(counters, owner, stop - begin)
    return list(charged.values())


def update_peaks(tree: Tree, chunks: Sequence[Chunk], by_owner: Mapping[int, Counters]) -> None:
    """Raises `peak_slots` and `peak_tokens` to what the nodes of each search hold once `chunks` are computed."""
    least = min(by_owner)
    node = np.flatnonzero((tree.num_slots > 0) & (tree.owner >= least))
    owner = tree.owner[node] - least
    slots = np.bincount(owner, weights=tree.num_slots[node], minlength=1)
    nodes, _, stops = np.array(chunks, np.int64).reshape(-1, 3).T
    computed = tree.num_computed.copy()
    computed[nodes] = np.maximum(computed[nodes], stops)
    tokens = np.bincount(owner, weights=computed[node], minlength=1)
    now: dict[int, Any] = {}
    for of, counters in by_owner.items():
        if of - least < len(slots):
            held = now[id(counters)] = now.get(id(counters), 0) + np.array([slots[of - least], tokens[of - least]])
            counters.peak_slots = max(counters.peak_slots, int(held[0]))
            counters.peak_tokens = max(counters.peak_tokens, int(held[1]))
