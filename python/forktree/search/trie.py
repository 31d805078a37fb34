"""Catalogues as tries: which tokens may follow, so that every text is one of a list."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forktree.checks import integers
from forktree.errors import InvalidInput
from forktree.types import MAX_TOKEN_ID, BoolArray, Int32Array, Int64Array

ROOT = 0


class TokenTrie:
    """A catalogue of token sequences as a trie, stored as CSR.

    Nodes are numbered level by level from `ROOT`; the children of a node are consecutive, in ascending order of their
    tokens. Entries may be of different lengths. Equal entries are one.

    Args:
        entries: token ids of each entry: sequences, or an integer array `[n, length]`.

    Attributes:
        indptr: the children of node i are nodes `1 + indptr[i] : 1 + indptr[i + 1]`. int64 `[N + 1]`.
        token: that leads to each node but the root. int32 `[N - 1]`.
        num_entries: different ones.
        depth: tokens of the longest.

    Raises:
        InvalidInput: there are no entries, one is empty, one is the beginning of another, or an id is no integer of at
            least 0.
    """

    def __init__(self, entries: Sequence[Any] | np.ndarray) -> None:
        rows, lengths = _padded(entries)
        order = np.lexsort(rows.T[::-1])
        rows, lengths = rows[order], lengths[order]
        fresh = np.ones(rows.shape, bool)  # whether the tokens up to this one are other than those of the row before
        np.logical_or.accumulate(rows[1:] != rows[:-1], axis=1, out=fresh[1:])
        different = fresh[:, -1]
        rows, lengths, order, fresh = rows[different], lengths[different], order[different], fresh[different]
        _check_ends(rows, lengths, order, fresh)
        self.num_entries, self.depth = rows.shape
        parent, nodes = np.zeros(len(rows), np.int64), 1
        above, tokens = [], []
        for level in range(self.depth):
            new = fresh[:, level] & (lengths > level)
            above.append(parent[new])
            tokens.append(rows[new, level])
            parent, nodes = nodes + np.cumsum(new) - 1, nodes + int(new.sum())
        children = np.bincount(np.concatenate(above), minlength=nodes)
        self.indptr: Int64Array = np.concatenate([[0], np.cumsum(children)])
        self.token: Int32Array = np.concatenate(tokens).astype(np.int32)

    def __repr__(self) -> str:
        return f"TokenTrie({self.num_entries} entries of up to {self.depth} tokens, {len(self.token) + 1} nodes)"

    @cached_property
    def leaf(self) -> BoolArray:
        """Whether an entry ends in each node, `[N]`."""
        return np.diff(self.indptr) == 0

    def check(self, vocab_size: int) -> None:
        """Raises InvalidInput if a token is not in a vocabulary of this size."""
        if (largest := int(self.token.max())) >= vocab_size:
            raise InvalidInput(f"token ids of a trie must lie in [0, {vocab_size}), got {largest}")

    def on(self, device: torch.device) -> "DeviceTrie":
        """The trie on a device; it is copied once."""
        if device not in self._copies:
            self._copies[device] = DeviceTrie(self, device)
        return self._copies[device]

    @cached_property
    def _copies(self) -> "dict[torch.device, DeviceTrie]":
        return {}


class DeviceTrie:
    """A trie on a device: gathers children without waiting for it.

    Attributes:
        indptr: as of the trie, int64 `[N + 1]`.
        token: likewise, int32 `[N - 1]`.
        leaf: bool `[N]`.
    """

    def __init__(self, trie: TokenTrie, device: torch.device) -> None:
        self.indptr = torch.from_numpy(trie.indptr).to(device)
        self.token = torch.from_numpy(trie.token).to(device)
        self.leaf = torch.from_numpy(trie.leaf).to(device)

    def children(self, nodes: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
        """All children of some nodes, node by node.

        Args:
            nodes: int64 `[n]`.
            total: how many children they have together, E.

        Returns:
            Where those of each node begin, int64 `[n + 1]`; of each child the place of its parent in `nodes`, and the
            child, int64 `[E]`.
        """
        first = self.indptr[nodes]
        count = self.indptr[nodes + 1] - first
        indptr = torch.zeros(len(nodes) + 1, dtype=torch.long, device=nodes.device)
        torch.cumsum(count, 0, out=indptr[1:])
        place = torch.arange(len(nodes), device=nodes.device)
        row = place.repeat_interleave(count, output_size=total)
        child = torch.arange(1, total + 1, device=nodes.device) + (first - indptr[:-1])[row]
        return indptr, row, child


def _padded(entries: Sequence[Any] | np.ndarray) -> tuple[Int64Array, Int64Array]:
    """Entries as rows, -1 after their ends, and their lengths."""
    if isinstance(entries, np.ndarray) and entries.ndim == 2 and entries.size:
        flat = integers("token ids of a trie", entries.reshape(-1), 0, MAX_TOKEN_ID)
        return flat.reshape(entries.shape), np.full(len(entries), entries.shape[1])
    if not len(entries):
        raise InvalidInput("a trie needs at least one entry, got none")
    rows = [integers(f"entry {i} of a trie", entry, 0, MAX_TOKEN_ID) for i, entry in enumerate(entries)]
    lengths = np.array([len(row) for row in rows])
    if not lengths.all():
        raise InvalidInput(f"entry {int(np.argmin(lengths))} of a trie is empty: expected at least one token")
    padded = np.full((len(rows), lengths.max()), -1, np.int64)
    padded[np.arange(lengths.max()) < lengths[:, None]] = np.concatenate(rows)
    return padded, lengths


def _check_ends(rows: Int64Array, lengths: Int64Array, order: Int64Array, fresh: BoolArray) -> None:
    """Raises if a row is the beginning of another, which then comes next."""
    goes_on = ~fresh[np.arange(1, len(rows)), lengths[:-1] - 1]
    if goes_on.any():
        i = int(np.argmax(goes_on))
        raise InvalidInput(
            f"entry {order[i]} of a trie, {rows[i, : lengths[i]].tolist()}, is the beginning of entry {order[i + 1]}: "
            "end entries with a token that tells where they end, such as an EOS"
        )
