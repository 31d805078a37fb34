"""What searches cost, and who is charged for a forward pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from forktree.kv import Chunk, Tree


@dataclass
class Counters:
    """What one search cost. A prefix shared by several searches counts for the one that wrote it.

    Attributes:
        model_tokens: Tokens run through the policy.
        reward_tokens: Tokens run through a reward model.
        reward_calls: Branches rewarded.
        peak_slots: Maximum of KV slots of the policy that the tokens it wrote took at once.
        seconds: Wall time.
        tokens_by_model: Tokens run through further models of the decoder, by their names.
        drafts: Drafts that were verified; each gave one token more than was accepted of it.
        drafted_tokens: Tokens of these.
        accepted_tokens: Those of them that the model sampled too.
    """

    model_tokens: int = 0
    reward_tokens: int = 0
    reward_calls: int = 0
    peak_slots: int = 0
    seconds: float = 0.0
    tokens_by_model: dict[str, int] = field(default_factory=dict)
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def count_tokens(self, model: str | None, tokens: int) -> None:
        """Tokens run through the policy, "main", a further model, or None, a reward model."""
        if model == "main":
            self.model_tokens += tokens
        elif model is None:
            self.reward_tokens += tokens
        else:
            self.tokens_by_model[model] = self.tokens_by_model.get(model, 0) + tokens


def charge(
    tree: Tree, chunks: Sequence[Chunk], by_owner: Mapping[int, Counters], count: Callable[[Counters, int], None]
) -> None:
    """Charges each node's tokens to the search that wrote it, or to the first of `by_owner` if that one is gone."""
    first = next(iter(by_owner.values()))
    for node, begin, stop in chunks:
        count(by_owner.get(int(tree.owner[node]), first), stop - begin)


def update_peaks(tree: Tree, by_owner: Mapping[int, Counters]) -> None:
    """Raises `peak_slots` to what the nodes of each search hold now."""
    least = min(by_owner)
    node = np.flatnonzero((tree.num_slots > 0) & (tree.owner >= least))
    held = np.bincount(tree.owner[node] - least, weights=tree.num_slots[node], minlength=1)
    now: dict[int, int] = {}
    for owner, counters in by_owner.items():
        if owner - least < len(held):
            now[id(counters)] = now.get(id(counters), 0) + int(held[owner - least])
            counters.peak_slots = max(counters.peak_slots, now[id(counters)])
