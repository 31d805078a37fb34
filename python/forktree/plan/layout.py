"""`TreeLayout`: what every query row of a step may see, as int32 arrays on the host.

Letters: `M` slot-index entries, `N` nodes, `C` contexts, `E` root paths, `R` query rows, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from forktree.types import AnyArray, BoolArray, IntArray


@dataclass(frozen=True, eq=False)
class TreeLayout:
    """All contexts of a step.

    A context is a group of consecutive query rows and the root paths these rows see. A path starts with the first
    `path_stop` tokens of `path_node`; going up, it sees `node_fork[child]` tokens of each parent; it ends before
    `path_top`. The tokens of a node lie in `slot_index[node_begin : node_begin + node_len]`; entries past them are
    reserved for growth and never read. The *tip* of a context is its last path's node.

    Every field takes what converts to an integer array (list, array, tensor). int32 arrays are not copied: do not write
    to them afterwards.

    Attributes:
        slot_index: [M] slots of every node's tokens, node by node.
        node_begin: [N] where the node's run of slot_index begins.
        node_len: [N] tokens it has now.
        node_parent: [N] parent of the node, -1 = root.
        node_fork: [N] how many of the parent's tokens this node's path sees; unused at roots.
        node_pos: [N] position of the node's first token.
        row_indptr: [C+1] query rows of context c.
        path_indptr: [C+1] root paths of context c, the last one with the context's own tokens.
        path_node: [E] node that the path starts at.
        path_stop: [E] tokens seen of path_node, or `ALL`.
        path_top: [E] ancestor before which the path ends, -1 = it reaches the root.
        causal: [C] 1: row i of n sees n-1-i fewer tokens of the tip; 0: all rows see the same.
        row_token: [R] output token of the row; rows of one token merge into one output.
        row_pos: [R] position the row looks from.
        mask_indptr: [C+1] words of context c in mask_bits; None = no context has a mask.
        mask_bits: uint32, [rows, ceil(rows/32)] words of a context, over the tip's last `rows` tokens.

    Raises:
        ValueError: an array has another size, or a value is out of range; the message names the array and the index.
    """

    ALL: ClassVar[int] = 2**31 - 1  # path_stop: all tokens the node has, now and after growing

    slot_index: IntArray
    node_begin: IntArray
    node_len: IntArray
    node_parent: IntArray
    node_fork: IntArray
    node_pos: IntArray
    row_indptr: IntArray
    path_indptr: IntArray
    path_node: IntArray
    path_stop: IntArray
    path_top: IntArray
    causal: IntArray
    row_token: IntArray
    row_pos: IntArray
    mask_indptr: IntArray | None = None
    mask_bits: npt.NDArray[np.uint32] | None = None

    # ------------------------------------------------------------------ sizes

    @property
    def num_rows(self) -> int:
        """R, query rows."""
        return self.row_token.size

    @property
    def num_contexts(self) -> int:
        """C, contexts."""
        return self.causal.size

    @property
    def num_nodes(self) -> int:
        """N, nodes."""
        return self.node_len.size

    @cached_property
    def num_tokens(self) -> int:
        """T, output tokens."""
        return int(self.row_token.max(initial=-1)) + 1

    @cached_property
    def context_rows(self) -> IntArray:
        """[C] rows of each context."""
        return np.diff(self.row_indptr)

    @cached_property
    def tip(self) -> IntArray:
        """[C] node of each context's last path."""
        return self.path_node[self.path_indptr[1:] - 1]

    @cached_property
    def tip_len(self) -> IntArray:
        """[C] tokens a context sees of its tip."""
        return np.minimum(self.path_stop[self.path_indptr[1:] - 1], self.node_len[self.tip])

    @cached_property
    def masked(self) -> BoolArray:
        """[C] whether the context has mask words."""
        if self.mask_indptr is None:
            return np.zeros(self.num_contexts, bool)
        masked: BoolArray = np.diff(self.mask_indptr) > 0
        return masked

    @cached_property
    def partially_visible(self) -> BoolArray:
        """[C] whether rows of the context see different parts of the tip: those of chunks and drafts."""
        chunks: BoolArray = (self.causal == 1) & (self.context_rows > 1)
        return chunks | self.masked

    @cached_property
    def slot_bounds(self) -> tuple[int, int]:
        """Smallest and largest slot in use; (0, -1) if there is none."""
        used = self.node_len > 0
        if not used.any():
            return 0, -1
        begin = self.node_begin[used]
        runs = np.stack([begin, begin + self.node_len[used]], 1).ravel()
        slots = np.append(self.slot_index, self.slot_index[-1])  # reduceat wants every end to be an index
        low, high = np.minimum.reduceat(slots, runs)[::2], np.maximum.reduceat(slots, runs)[::2]
        return int(low.min()), int(high.max())

    @cached_property
    def node_depth(self) -> IntArray:
        """[N+1] edges to the root; the last entry is -1, so that index -1 stands for the place above all roots."""
        depth = np.ones(self.num_nodes + 1, np.int32)
        depth[-1] = 0
        up = np.append(self.node_parent, -1)
        while (up >= 0).any():  # pointer doubling
            depth += depth[up]
            up = np.where(up >= 0, up[up], -1)
        return depth - 1

    # ------------------------------------------------------------------ meaning

    def walk(self, context: int) -> Iterator[tuple[int, int, bool]]:
        """Yields (node, tokens seen of it, is the tip), path by path, each from its top down."""
        paths = range(self.path_indptr[context], self.path_indptr[context + 1])
        for path in paths:
            node = int(self.path_node[path])
            stop = int(min(self.path_stop[path], self.node_len[node]))
            steps = [(node, stop, path == paths[-1])]
            while (parent := int(self.node_parent[node])) != self.path_top[path]:
                steps.append((parent, int(self.node_fork[node]), False))
                node = parent
            yield from reversed(steps)

    def visible(self, row: int, window: int | None = None) -> tuple[AnyArray, AnyArray]:
        """What a row sees. This is the meaning of a layout: all else is measured by it.

        Args:
            row: of the layout.
            window: w > 0 shows only keys at positions (row_pos - w, row_pos].

        Returns:
            Indices into slot_index and positions, [L] each, in path order.
        """
        context = int(np.searchsorted(self.row_indptr, row, side="right")) - 1
        n = int(self.context_rows[context])
        i = row - int(self.row_indptr[context])
        index, position = [], []
        for node, stop, is_tip in self.walk(context):
            offset = np.arange(stop)
            own = offset - (stop - n)  # which of the tip's last n tokens; negative: before them
            if is_tip and self.causal[context]:
                offset, own = offset[own <= i], own[own <= i]
            if is_tip and self.masked[context]:
                assert self.mask_indptr is not None and self.mask_bits is not None
                words = self.mask_bits[self.mask_indptr[context] + i * -(-n // 32) :]
                bit = np.maximum(own, 0)
                offset = offset[(own < 0) | (words[bit // 32] >> bit % 32 & 1 == 1)]
            at = self.node_pos[node] + offset
            if window is not None:
                near = (at > self.row_pos[row] - window) & (at <= self.row_pos[row])
                offset, at = offset[near], at[near]
            index.append(self.node_begin[node] + offset)
            position.append(at)
        return np.concatenate(index), np.concatenate(position)

    # ------------------------------------------------------------------ construction

    @classmethod
    def from_pages(
        cls,
        block_tables: Any,
        lengths: Any,
        page_size: int,
        *,
        query_lens: Any = None,
    ) -> TreeLayout:
        """A layout for a paged cache: token t of sequence b is `block_tables[b, t // S] * S + t % S`.

        Equal leading pages are shared, as far as they lie wholly before the query tokens.

        Args:
            block_tables: [B, max_pages] page ids; B may be 0.
            lengths: [B] tokens, query tokens included.
            page_size: S, tokens of a page.
            query_lens: [B] query rows of each sequence, its last tokens; default 1 each; more are causal.

        Returns:
            A layout with one node and one context a sequence.

        Raises:
            ValueError: an argument is out of range, or slots do not fit int32.
        """
        tables = _ints("block_tables", block_tables, ndim=2).astype(np.int64)  # as are all products with page_size
        lens = _ints("lengths", lengths).astype(np.int64)
        queries = np.ones_like(lens) if query_lens is None else _ints("query_lens", query_lens)
        batch, max_pages = tables.shape
        if isinstance(page_size, bool) or not isinstance(page_size, int | np.integer) or not 1 <= page_size < 2**31:
            raise ValueError(f"page_size must be an integer of at least 1 that fits int32, got {page_size!r}")
        page_size = int(page_size)
        _expect_size("lengths", lens, batch, "sequences in block_tables")
        _expect_size("query_lens", queries, batch, "sequences in block_tables")
        _expect(
            "lengths",
            (lens >= 1) & (lens <= max_pages * page_size),
            lens,
            f"in [1, {max_pages * page_size}] ({max_pages} pages of {page_size})",
        )
        _expect("query_lens", (queries >= 1) & (queries <= lens), queries, "in [1, lengths]")
        used = np.arange(max_pages) < -(-lens // page_size)[:, None]
        known = (tables >= 0) | ~used
        _expect("block_tables", known.ravel(), tables.ravel(), "a page id >= 0 where in use")

        shareable = (lens - queries) // page_size
        keyed = np.where(np.arange(max_pages) < shareable[:, None], tables, -1)
        order = np.lexsort(keyed.T[::-1]) if max_pages else np.arange(batch)
        common = (keyed[order[1:]] == keyed[order[:-1]]) & (keyed[order[1:]] >= 0)
        shared = np.zeros(batch, np.int64)  # pages in common with the previous sequence, in order
        shared[1:] = np.cumprod(common, 1).sum(1)

        # Every sequence is one node: in sorted order it forks from the path of the one before it, where the
        # pages they have in common end. The stack holds that path as (node, pages before it).
        parent = np.full(batch, -1, np.int32)
        above = np.zeros(batch, np.int64)  # pages before the node
        fork = np.zeros(batch, np.int64)
        path: list[tuple[int, int]] = []
        for node, pages in zip(order.tolist(), shared.tolist(), strict=True):
            while path and path[-1][1] >= pages:
                path.pop()
            if path:
                parent[node] = path[-1][0]
                fork[node] = (pages - path[-1][1]) * page_size
            above[node] = pages
            path.append((node, pages))

        node_pos = above * page_size
        node_len = lens - node_pos
        node_end = np.cumsum(node_len)
        token = ranges(node_pos, node_len)
        sequence = np.repeat(np.arange(batch), node_len)
        page = tables[sequence, token // page_size]
        slot = page * page_size + token % page_size
        if slot.size and slot.max() >= 2**31:
            i = int(slot.argmax())
            raise ValueError(
                f"block_tables must name slots that fit int32, got page {page[i]} of page_size {page_size} in sequence "
                f"{sequence[i]}: slot {slot[i]}"
            )
        row_indptr = np.append(0, np.cumsum(queries))
        return cls(
            slot_index=slot,
            node_begin=node_end - node_len,
            node_len=node_len,
            node_parent=parent,
            node_fork=fork,
            node_pos=node_pos,
            row_indptr=row_indptr,
            path_indptr=np.arange(batch + 1),
            path_node=np.arange(batch, dtype=np.int32),
            path_stop=np.full(batch, cls.ALL),
            path_top=np.full(batch, -1),
            causal=(queries > 1).astype(np.int32),
            row_token=np.arange(row_indptr[-1]),
            row_pos=ranges(lens - queries, queries),
        )

    def grown(self, node_len: Any, row_pos: Any, slot_index: Any = None) -> TreeLayout:
        """The same layout after nodes grew into the entries reserved for them and rows moved forward.

        Args:
            node_len: [N] at least what it was.
            row_pos: [R] at least what it was.
            slot_index: only if it is another array by now.

        Raises:
            ValueError: one of them shrank, or a node does not fit.
        """
        slots = self.slot_index if slot_index is None else _ints("slot_index", slot_index)
        lens, rows = _ints("node_len", node_len), _ints("row_pos", row_pos)
        _expect_size("node_len", lens, self.num_nodes, "nodes")
        _expect_size("row_pos", rows, self.num_rows, "rows")
        _expect("node_len", lens >= self.node_len, lens, "at least what it was")
        _expect("row_pos", rows >= self.row_pos, rows, "at least what it was")
        fits = lens <= slots.size - self.node_begin
        _expect("node_len", fits, lens, f"within slot_index ({slots.size} entries)")
        self._check_positions(lens, slots.size)
        layout = object.__new__(TreeLayout)  # all else was validated before
        layout.__dict__.update({f.name: getattr(self, f.name) for f in fields(self)})
        layout.__dict__.update(slot_index=slots, node_len=lens, row_pos=rows, _highest_pos=self._highest_pos)
        return layout

    # ------------------------------------------------------------------ validation

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            if name not in ("mask_indptr", "mask_bits"):
                object.__setattr__(self, name, _ints(name, getattr(self, name)))
        self._check_nodes()
        self._check_contexts()
        self._check_paths()
        self._check_masks()
        self._check_partially_visible()

    def _check_nodes(self) -> None:
        n = self.num_nodes
        for name in ("node_begin", "node_parent", "node_fork", "node_pos"):
            _expect_size(name, getattr(self, name), n, "nodes in node_len")
        _expect("node_len", self.node_len >= 0, self.node_len, ">= 0")
        _expect("node_begin", self.node_begin >= 0, self.node_begin, ">= 0")
        _expect(
            "node_begin",
            self.node_begin <= self.slot_index.size - self.node_len,
            self.node_begin,
            f"such that its node_len tokens lie within slot_index ({self.slot_index.size} entries)",
        )
        _expect("node_pos", self.node_pos >= 0, self.node_pos, ">= 0")
        self._check_positions(self.node_len, self.slot_index.size)
        parent = self.node_parent
        _expect("node_parent", (parent >= -1) & (parent < n), parent, f"-1 or a node, in [-1, {n})")
        if not (parent < np.arange(n)).all():  # otherwise parents come first and there is no cycle
            up = np.append(parent, -1)
            for _ in range(n.bit_length()):
                up = np.where(up >= 0, up[up], -1)
            _expect("node_parent", up[:-1] < 0, parent, "without cycles")
        if n:
            seen, room = self.node_fork, self.node_len[parent]
            _expect(
                "node_fork",
                (parent < 0) | ((seen >= 0) & (seen <= room)),
                seen,
                "between 0 and node_len of the parent",
            )

    @cached_property
    def _highest_pos(self) -> int:
        return int(self.node_pos.max(initial=0))

    def _check_positions(self, node_len: IntArray, num_slots: int) -> None:
        if self._highest_pos > self.ALL - num_slots:  # no node is longer than slot_index
            fits = node_len <= self.ALL - self.node_pos
            _expect("node_len", fits, node_len, "such that positions are below 2**31")

    def _check_contexts(self) -> None:
        c = self.num_contexts
        _expect_indptr("row_indptr", self.row_indptr, c, self.num_rows, "rows")
        _expect_indptr("path_indptr", self.path_indptr, c, self.path_node.size, "paths")
        _expect_size("row_pos", self.row_pos, self.num_rows, "rows in row_token")
        _expect("row_token", self.row_token >= 0, self.row_token, ">= 0")
        _expect("row_pos", self.row_pos >= 0, self.row_pos, ">= 0")
        _expect("causal", (self.causal == 0) | (self.causal == 1), self.causal, "0 or 1")
        paths = np.diff(self.path_indptr)
        _expect("path_indptr", paths >= 1, paths, "rising: every context has at least one path")

    def _check_paths(self) -> None:
        node, stop, top, n = self.path_node, self.path_stop, self.path_top, self.num_nodes
        for name in ("path_stop", "path_top"):
            _expect_size(name, getattr(self, name), node.size, "paths in path_node")
        _expect("path_node", (node >= 0) & (node < n), node, f"a node, in [0, {n})")
        _expect(
            "path_stop",
            (stop == self.ALL) | ((stop >= 0) & (stop <= self.node_len[node])),
            stop,
            f"between 0 and node_len of path_node, or {self.ALL} (all)",
        )
        _expect("path_top", (top >= -1) & (top < n), top, f"-1 or a node, in [-1, {n})")
        if (top >= 0).any():
            at, depth = self.node_parent[node], self.node_depth
            while (below := depth[at] > depth[top]).any():
                at = np.where(below, self.node_parent[at], at)
            _expect("path_top", at == top, top, "an ancestor of path_node, or -1")

    def _check_masks(self) -> None:
        if (self.mask_indptr is None) != (self.mask_bits is None):
            raise ValueError("mask_indptr and mask_bits must be given together, got only one of them")
        if self.mask_indptr is None:
            return
        words = np.asarray(self.mask_bits)
        if words.ndim != 1 or (words.size and words.dtype.kind not in "iu"):
            raise ValueError(f"mask_bits must be uint32 [words], got {words.dtype} {words.shape}")
        object.__setattr__(self, "mask_bits", words.astype(np.uint32, copy=False))
        object.__setattr__(self, "mask_indptr", _ints("mask_indptr", self.mask_indptr))
        _expect_indptr("mask_indptr", self.mask_indptr, self.num_contexts, words.size, "words in mask_bits")
        count, rows = np.diff(self.mask_indptr), self.context_rows
        _expect(
            "mask_indptr",
            (count == 0) | (count == rows * -(-rows // 32)),
            count,
            "no words or rows * ceil(rows / 32) words a context",
        )

    def _check_partially_visible(self) -> None:
        if self.partially_visible.any():
            _expect(
                "row_indptr",
                ~self.partially_visible | (self.context_rows <= self.tip_len),
                self.context_rows,
                "no more rows than the context sees tokens of its tip, as it is causal or masked",
            )


def ranges(begin: AnyArray, length: AnyArray) -> AnyArray:
    """Concatenation of begin[0], begin[0] + 1, … (length[0] of them), begin[1], …."""
    end = np.cumsum(length)
    indices: AnyArray = np.arange(end[-1] if end.size else 0) + np.repeat(begin - (end - length), length)
    return indices


def _ints(name: str, value: Any, ndim: int = 1) -> IntArray:
    """Anything convertible (list, array, tensor) as an int32 array."""
    if type(value) is np.ndarray and value.dtype == np.int32 and value.ndim == ndim:
        return value
    try:
        array = np.asarray(value.cpu() if hasattr(value, "cpu") else value)
    except ValueError:
        raise ValueError(
            f"{name} must be an integer array with {ndim} dimension(s), got lists of different lengths"
        ) from None
    if not array.size and array.ndim < ndim:
        array = array.reshape((0,) * ndim)  # [] may be an empty list of lists
    if array.ndim != ndim or (array.size and array.dtype.kind not in "iub"):
        raise ValueError(f"{name} must be an integer array with {ndim} dimension(s), got {array.dtype} {array.shape}")
    if array.size and (array.min() < -(2**31) or array.max() >= 2**31):
        raise ValueError(f"{name} must fit int32, got values from {array.min()} to {array.max()}")
    return array.astype(np.int32)


def _expect(name: str, ok: AnyArray, values: AnyArray, expectation: str) -> None:
    if not ok.all():
        i = int(np.argmin(ok))
        raise ValueError(f"{name}[{i}] must be {expectation}, got {values[i]}")


def _expect_size(name: str, array: AnyArray, size: int, what: str) -> None:
    if array.size != size:
        raise ValueError(f"{name} must have {size} entries ({what}), got {array.size}")


def _expect_indptr(name: str, indptr: AnyArray, count: int, total: int, what: str) -> None:
    _expect_size(name, indptr, count + 1, "contexts in causal, plus 1")
    if indptr[0] != 0 or indptr[-1] != total or (indptr[1:] < indptr[:-1]).any():
        raise ValueError(f"{name} must rise from 0 to {total} ({what}), got {indptr}")
