"""Random layouts together with what each row must see, tracked as plain lists while the layout is made."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from forktree.plan.layout import TreeLayout

KINDS = ("random", "chain", "star", "deep", "joins", "drafts", "chunks")
GARBAGE = (-7, 2**30)  # what lies in the room after nodes


@dataclass
class Node:
    tokens: list[tuple[int, int]]  # (slot, position)
    parent: Node | None
    fork: int
    number: int
    room: int


@dataclass
class Case:
    layout: TreeLayout
    seen: list[list[tuple[int, int]]]  # of each row: (slot, position), without any window
    num_slots: int
    used: set[int] = field(default_factory=set)

    def tokens(self) -> list[list[int]]:
        """Rows of each output token."""
        rows: list[list[int]] = [[] for _ in range(self.layout.num_tokens)]
        for row, token in enumerate(self.layout.row_token.tolist()):
            rows[token].append(row)
        return rows


def path(node: Node, stop: int, top: Node | None) -> list[tuple[int, int]]:
    """What a path sees, written as the recursion it is."""
    above = [] if node.parent is top or node.parent is None else path(node.parent, node.fork, top)
    return above + node.tokens[:stop]


def ancestors(node: Node) -> list[Node]:
    return [] if node.parent is None else [node.parent, *ancestors(node.parent)]


def random_layout(
    seed: int,
    kind: str = "random",
    *,
    num_nodes: int = 9,
    num_contexts: int = 8,
    max_len: int = 9,
    room: int = 0,
    uneven: bool = True,
) -> Case:
    """room: room after every node; uneven=False: one row a context, as when decoding."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    lengths = rng.integers(0, max_len + 1, num_nodes)
    num_slots = int(lengths.sum()) + num_nodes * room + 17
    free = rng.permutation(num_slots).tolist() if rng.random() < 0.5 else list(range(num_slots))[::-1]

    nodes: list[Node] = []
    for number, length in enumerate(lengths.tolist()):
        parent = None
        if nodes and kind in ("chain", "deep"):
            parent = nodes[-1] if kind == "chain" or rng.random() < 0.8 else nodes[rng.integers(len(nodes))]
        elif nodes and kind == "star":
            parent = nodes[0]
        elif nodes and rng.random() < 0.8:
            parent = nodes[rng.integers(len(nodes))]
        fork = 0
        if parent is not None:
            size = len(parent.tokens)
            fork = size if kind == "chain" or rng.random() < 0.5 else int(rng.integers(size + 1))
        first = parent.tokens[fork - 1][1] + 1 if fork and parent else int(rng.integers(20))
        tokens = [(free.pop(), first + i) for i in range(length)]
        nodes.append(Node(tokens, parent, fork, number, room))

    # Parents need not come first.
    shuffled = [nodes[i] for i in rng.permutation(num_nodes)] if rng.random() < 0.5 else nodes
    for number, node in enumerate(shuffled):
        node.number = number

    row_indptr, path_indptr, mask_indptr, paths, causal, seen, row_pos, words = (
        [0],
        [0],
        [0],
        [],
        [],
        [],
        [],
        [],
    )
    for _ in range(num_contexts):
        tip = nodes[rng.integers(num_nodes)]
        if kind in ("drafts", "chunks") and not tip.tokens:
            tip = max(nodes, key=lambda node: len(node.tokens))
        stop = len(tip.tokens) if rng.random() < 0.7 else int(rng.integers(len(tip.tokens) + 1))
        whole = stop == len(tip.tokens) and rng.random() < 0.7
        join = kind == "joins" or (kind == "random" and rng.random() < 0.2)
        top = None
        if join and ancestors(tip) and rng.random() < 0.7:
            top = ancestors(tip)[rng.integers(len(ancestors(tip)))]
        mine = path(tip, stop, top)
        others: list[tuple[int, int]] = []
        for _ in range(int(rng.integers(1, 4)) if join else 0):
            node = nodes[rng.integers(num_nodes)]
            end = int(rng.integers(len(node.tokens) + 1))
            choices = [None, *ancestors(node)]
            over = choices[rng.integers(len(choices))]
            extra = path(node, end, over)
            if not set(extra) & set(mine + others):
                others += extra
                grows = 0 < end == len(node.tokens) and rng.random() < 0.5
                paths.append((node.number, TreeLayout.ALL if grows else end, -1 if over is None else over.number))
        paths.append((tip.number, TreeLayout.ALL if whole else stop, -1 if top is None else top.number))
        path_indptr.append(len(paths))

        many = uneven and stop > 0 and rng.random() < (0.9 if kind in ("drafts", "chunks") else 0.4)
        n = int(rng.integers(1, stop + 1)) if many else 1
        is_causal = bool(rng.random() < (0.9 if kind == "chunks" else 0.5)) and (n > 1 or stop > 0)
        masked = many and rng.random() < (0.9 if kind == "drafts" else 0.2)
        bits = rng.random((n, n)) < 0.6
        for i in range(n):
            visible = others + mine[: len(mine) - stop]
            for j, token in enumerate(mine[len(mine) - stop :]):
                back = j - (stop - n)  # which of the last n tokens
                if back >= 0 and ((is_causal and n > 1 and back > i) or (masked and not bits[i, back])):
                    continue
                visible = [*visible, token]
            seen.append(visible)
            row_pos.append(int(rng.integers(30)) if join else (mine[-1][1] - (n - 1 - i) if mine else 3))
        if masked:
            padded = np.zeros((n, -(-n // 32) * 32), bool)
            padded[:, :n] = bits
            words += np.packbits(padded, axis=1, bitorder="little").view(np.uint32).ravel().tolist()
        mask_indptr.append(len(words))
        causal.append(int(is_causal))
        row_indptr.append(len(seen))

    row_token = rng.permutation(len(seen))
    if kind in ("random", "joins"):
        row_token = rng.integers(0, max(1, 2 * len(seen) // 3), len(seen))  # also tokens with several rows, or none
    slot_index, node_begin = [], []
    for node in shuffled:
        node_begin.append(len(slot_index))
        slot_index += [slot for slot, _ in node.tokens] + [GARBAGE[i % 2] for i in range(room)]
    path_columns = np.array(paths).T
    layout = TreeLayout(
        slot_index=np.array(slot_index, np.int64),
        node_begin=node_begin,
        node_len=[len(node.tokens) for node in shuffled],
        node_parent=[-1 if node.parent is None else node.parent.number for node in shuffled],
        node_fork=[node.fork for node in shuffled],
        node_pos=[node.tokens[0][1] if node.tokens else 5 for node in shuffled],
        row_indptr=row_indptr,
        path_indptr=path_indptr,
        path_node=path_columns[0],
        path_stop=path_columns[1],
        path_top=path_columns[2],
        causal=causal,
        row_token=row_token,
        row_pos=np.maximum(row_pos, 0),
        mask_indptr=mask_indptr if words else None,
        mask_bits=np.array(words, np.uint32) if words else None,
    )
    return Case(layout, seen, num_slots, {slot for node in nodes for slot, _ in node.tokens})


def shared_prompt(trees: int, branches: int, shared: int, own: int, *, spread: bool = False) -> TreeLayout:
    """`branches` one-row contexts with `own` tokens each over `shared` tokens, `trees` times."""
    number = np.arange(trees * (branches + 1)).reshape(trees, branches + 1)
    tips = number[:, 1:].ravel()
    node_len = np.full(number.size, shared)
    node_len[tips] = own
    parent, fork = np.full(number.size, -1), np.zeros(number.size, np.int64)
    parent[number[:, 1:]] = number[:, :1]
    fork[tips] = shared
    slots = np.arange(node_len.sum())
    return TreeLayout(
        slot_index=slots * 3 + 1 if spread else slots,
        node_begin=np.cumsum(node_len) - node_len,
        node_len=node_len,
        node_parent=parent,
        node_fork=fork,
        node_pos=fork,
        row_indptr=np.arange(tips.size + 1),
        path_indptr=np.arange(tips.size + 1),
        path_node=tips,
        path_stop=np.full(tips.size, TreeLayout.ALL),
        path_top=np.full(tips.size, -1),
        causal=np.zeros(tips.size, np.int64),
        row_token=np.arange(tips.size),
        row_pos=np.full(tips.size, shared + own - 1),
    )


def chunk(tokens: int) -> TreeLayout:
    """One causal context, all of whose tokens are query rows."""
    rows = np.arange(tokens)
    whole = [0, tokens], [0, 1], [0], [TreeLayout.ALL], [-1]
    return TreeLayout(rows, [0], [tokens], [-1], [0], [0], *whole, [1], rows, rows)


def naive_attention(case, q, k_slots, v_slots, *, window=None, scale=None, softcap=None, sinks=None, alibi_slopes=None):
    """fp64 softmax over the tracked lists, a token at a time: out [T, Hq, Dv], lse [T, Hq]."""
    q, k_slots, v_slots = (x.double().numpy() for x in (q, k_slots, v_slots))
    heads, group = q.shape[1], q.shape[1] // k_slots.shape[1]
    kv_head = np.arange(heads) // group
    out = np.zeros((case.layout.num_tokens, heads, v_slots.shape[2]))
    lse = np.full((case.layout.num_tokens, heads), -np.inf)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    for token, rows in enumerate(case.tokens()):
        pairs = [(row, slot, pos - int(case.layout.row_pos[row])) for row in rows for slot, pos in case.seen[row]]
        pairs = [(row, slot, d) for row, slot, d in pairs if window is None or -window < d <= 0]
        row, slot, distance = np.array(pairs, np.int64).reshape(-1, 3).T
        scores = scale * np.einsum("phd,phd->ph", q[row], k_slots[slot][:, kv_head])  # of pairs and heads
        values = v_slots[slot][:, kv_head]
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if alibi_slopes is not None:
            scores = scores + distance[:, None] * alibi_slopes.double().numpy()
        if sinks is not None:
            scores = np.concatenate([scores, sinks.double().numpy()[None]])
            values = np.concatenate([values, np.zeros((1, *values.shape[1:]))])
        top = scores.max(axis=0, initial=-np.inf)
        seen = top > -np.inf  # by these heads
        weights = np.exp(scores[:, seen] - top[seen])
        total = weights.sum(axis=0)
        out[token, seen] = np.einsum("ph,phd->hd", weights, values[:, seen]) / total[:, None]
        lse[token, seen] = top[seen] + np.log(total)
    return out, lse
