"""The small tree that `attach` decodes: 24 tokens in three forward passes."""

from typing import NamedTuple

import numpy as np

from forktree.plan.layout import TreeLayout


class _Node(NamedTuple):
    parent: int
    fork: int  # tokens of the parent that the path sees
    length: int
    step: int  # the forward pass that computes it


# A prompt; then four branches in one pass, one of them forked in the middle of the prompt and one in the
# middle of tokens of that very pass; then a single token, as some models treat one-token inputs differently.
_NODES = (
    _Node(-1, 0, 8, 0),
    _Node(0, 8, 5, 1),
    _Node(0, 5, 4, 1),
    _Node(1, 2, 4, 1),
    _Node(0, 8, 2, 1),
    _Node(3, 4, 1, 2),
)


class VerificationStep(NamedTuple):
    """Tokens of one forward pass."""

    tokens: np.ndarray  # [T]
    positions: np.ndarray  # [T]
    slots: np.ndarray  # [T]
    node: np.ndarray  # [T] on whose path the token is
    layout: TreeLayout


class VerificationTree:
    """The tree with random tokens below vocab_size, in slots in random order."""

    num_tokens = sum(node.length for node in _NODES)
    num_steps = 1 + max(node.step for node in _NODES)

    def __init__(self, vocab_size: int) -> None:
        rng = np.random.default_rng(0)
        self._tokens = rng.integers(vocab_size, size=self.num_tokens)
        self._slots = rng.permutation(self.num_tokens).astype(np.int32)
        # node n owns tokens begin[n] to begin[n + 1]
        self._begin = np.cumsum([0] + [node.length for node in _NODES]).astype(np.int32)
        self._pos: list[int] = []  # position of each node's first token
        self.paths: list[np.ndarray] = []  # of each node, the tokens from the root to its end
        for n, node in enumerate(_NODES):
            self._pos.append(self._pos[node.parent] + node.fork if n else 0)
            before = self.paths[node.parent][: self._pos[n]] if n else self._tokens[:0]
            self.paths.append(np.concatenate([before, self._tokens[self._begin[n] : self._begin[n + 1]]]))

    def step(self, step: int) -> VerificationStep:
        """The tokens of forward pass number `step`, and what they see."""
        nodes = [n for n, node in enumerate(_NODES) if node.step == step]
        known = nodes[-1] + 1  # nodes are listed in the order of their steps
        own = slice(self._begin[nodes[0]], self._begin[known])
        lengths = [_NODES[n].length for n in nodes]
        positions = _ints([p for n in nodes for p in range(self._pos[n], len(self.paths[n]))])
        layout = TreeLayout(
            slot_index=self._slots[: own.stop],
            node_begin=self._begin[:known],
            node_len=np.diff(self._begin[: known + 1]),
            node_parent=_ints([node.parent for node in _NODES[:known]]),
            node_fork=_ints([node.fork for node in _NODES[:known]]),
            node_pos=_ints(self._pos[:known]),
            row_indptr=_ints([0, *np.cumsum(lengths)]),
            path_indptr=_ints(range(len(nodes) + 1)),
            path_node=_ints(nodes),
            path_stop=_ints([TreeLayout.ALL] * len(nodes)),
            path_top=_ints([-1] * len(nodes)),
            causal=_ints([1] * len(nodes)),
            row_token=_ints(range(len(positions))),
            row_pos=positions,
        )
        return VerificationStep(self._tokens[own], positions, self._slots[own], np.repeat(nodes, lengths), layout)


def _ints(values: list[int] | range) -> np.ndarray:
    return np.array(values, np.int32)
