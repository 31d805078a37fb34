"""The planner against the best of all plans of tiny trees, under the cost model written down once more."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from forktree import _core
from forktree.plan.cost_model import CostModel
from forktree.plan.format import Item, Seg
from forktree.plan.layout import TreeLayout
from forktree.plan.plan import plan_attention

DIM = 8


@dataclass
class Model:
    cost_model: CostModel
    heads: int  # KV heads
    group: int
    value_dim: int = DIM
    bytes_per_token: int | None = None  # of all KV heads; None: 2 an element

    def lane_groups(self, rows):
        return -(-rows * self.group // self.cost_model.lanes)

    def segment(self, rows, tokens, again):
        t = self.cost_model
        size = 2 * (DIM + self.value_dim) if self.bytes_per_token is None else -(-self.bytes_per_token // self.heads)
        read = size * ((tokens - again) * t.memory + again * t.cache)
        math = tokens * self.lane_groups(rows) * ((DIM + self.value_dim) * t.mac + t.exp)
        return max(read, math) + -(-tokens // 64) * self.lane_groups(rows) * self.value_dim * t.segment

    def item(self, rows, partial=False):
        start = self.cost_model.item + self.lane_groups(rows) * self.value_dim * self.cost_model.segment
        return start + partial * rows * self.group * (self.value_dim + 2) * 4 * self.cost_model.partial

    def time(self, costs):
        return max(-(-sum(costs) * self.heads // self.cost_model.units), max(costs))


def of_plan(made, items, model):
    """Costs of a plan's items; what an item reads first, it pays."""
    costs, read = [], {}
    for row_begin, row_end, seg_begin, seg_end, partial in items:
        cost = model.item(row_end - row_begin, partial >= 0)
        for seg, tokens in zip(made.seg[seg_begin:seg_end], made.seg_tokens[seg_begin:seg_end], strict=True):
            mine = set(range(seg[Seg.START], seg[Seg.START] + tokens))
            known = read.setdefault(int(seg[Seg.NODE]), set())
            cost += model.segment(int(seg[Seg.ROW_HI] - seg[Seg.ROW_LO]), int(tokens), len(mine & known))
            known |= mine
        costs.append(cost)
    return costs


def ways(tokens):
    """(pieces read within the items of its rows, pieces that are items themselves) of a stretch."""
    yield (tokens,), ()
    for pieces in range(1, 5):
        ends = [round(i * tokens / pieces / 64) * 64 for i in range(pieces)] + [tokens]
        sizes = tuple(np.diff(ends).tolist())
        if min(sizes) > 0:
            yield (), sizes
            if pieces > 1:
                yield sizes[-1:], sizes[:-1]


def best_time(stretches, rows, model):
    """Of all ways to group rows and to treat each stretch (lo, hi, tokens); trees do not share items."""
    between = [x for x in range(1, rows) if any(lo < x < hi for lo, hi, _ in stretches)]
    trees = [x for x in range(1, rows) if x not in between]
    best = float("inf")
    for chosen in itertools.chain.from_iterable(itertools.combinations(between, n) for n in range(len(between) + 1)):
        edges = sorted([0, *trees, *chosen, rows])
        groups = list(itertools.pairwise(edges))
        for choice in itertools.product(*(list(ways(tokens)) for *_, tokens in stretches)):
            items = []  # lo, hi, cost without partials
            within = [[rows, 0, 0] for _ in groups]
            for (lo, hi, _), (inside, own) in zip(stretches, choice, strict=True):
                items += [(lo, hi, model.item(hi - lo) + model.segment(hi - lo, tokens, 0)) for tokens in own]
                for tokens in inside:
                    again = 0
                    for (begin, end), item in zip(groups, within, strict=True):
                        a, b = max(lo, begin), min(hi, end)
                        if a < b:
                            cost = item[2] + model.segment(b - a, tokens, again)
                            item[:] = min(item[0], a), max(item[1], b), cost
                            again = tokens
            items += [(lo, hi, cost + model.item(hi - lo)) for lo, hi, cost in within if lo < hi]
            count = [sum(lo <= r < hi for lo, hi, _ in items) for r in range(rows)]
            costs = [
                cost + (max(count[lo:hi]) > 1) * (model.item(hi - lo, True) - model.item(hi - lo))
                for lo, hi, cost in items
            ]
            best = min(best, model.time(costs))
    return best


def tiny_tree(rng):
    nodes, contexts = int(rng.integers(1, 5)), int(rng.integers(1, 6))
    length = rng.choice([1, 30, 64, 200, 700, 2000, 5000], nodes)
    parent = [int(rng.integers(i)) if i and rng.random() < 0.85 else -1 for i in range(nodes)]
    fork, pos = [], []
    for p in parent:
        whole = p < 0 or rng.random() < 0.7
        fork.append(0 if p < 0 else int(length[p]) if whole else int(rng.integers(length[p] + 1)))
        pos.append(0 if p < 0 else pos[p] + fork[-1])
    return TreeLayout(
        slot_index=np.arange(length.sum()),
        node_begin=np.cumsum(length) - length,
        node_len=length,
        node_parent=parent,
        node_fork=fork,
        node_pos=pos,
        row_indptr=np.arange(contexts + 1),
        path_indptr=np.arange(contexts + 1),
        path_node=rng.integers(nodes, size=contexts),
        path_stop=np.full(contexts, TreeLayout.ALL),
        path_top=np.full(contexts, -1),
        causal=np.zeros(contexts, np.int64),
        row_token=np.arange(contexts),
        row_pos=np.full(contexts, 10_000),
    )


def random_model(rng):
    lanes = int(rng.choice([1, 2, 4]))
    cost_model = CostModel(
        units=int(rng.integers(1, 9)),
        heads_per_item=1,
        lanes=lanes,
        max_lanes=1000,
        memory=int(rng.choice([10, 100])),
        cache=int(rng.choice([3, 10])),
        mac=lanes * int(rng.choice([1, 10])),
        exp=lanes * int(rng.choice([0, 200])),
        partial=int(rng.choice([1, 10, 60])),
        segment=lanes * int(rng.choice([1, 50])),
        item=int(rng.choice([1000, 100_000])),
        grain=0,
    )
    heads, group = (int(rng.integers(1, 3)) for _ in range(2))
    if rng.random() < 0.5:
        return Model(cost_model, heads, group)
    return Model(cost_model, heads, group, int(rng.choice([DIM, 24])), int(rng.choice([9, 40, 300])))


@pytest.mark.slow
def test_plans_of_tiny_trees_are_within_a_tenth_of_the_best():
    rng = np.random.default_rng(0)
    trees = cuts = 0
    while trees < 200:
        layout, model = tiny_tree(rng), random_model(rng)
        options = dict(num_qo_heads=model.heads * model.group, num_kv_heads=model.heads, head_dim=DIM)
        options |= dict(value_dim=model.value_dim, bytes_per_token=model.bytes_per_token)
        whole = plan_attention(layout, **options, cost_model=CostModel(**{**vars(model.cost_model), "grain": 1 << 40}))
        assert (whole.item[:, Item.PARTIAL] < 0).all()
        stretches = [
            (int(s[Seg.ROW_LO]), int(s[Seg.ROW_HI]), int(tokens))
            for s, tokens in zip(whole.seg, whole.seg_tokens, strict=True)
            if tokens
        ]
        choices = np.prod([len(list(ways(tokens))) for *_, tokens in stretches]) * 2 ** (layout.num_rows - 1)
        if len(stretches) > 6 or choices > 3000:
            continue
        trees += 1
        made = plan_attention(layout, **options, cost_model=model.cost_model)
        items = made.item.tolist()
        counts = _core.plan_stats(made.buffer, model.cost_model.values)
        assert sum(of_plan(made, items, model)) * model.heads == counts[6]
        cuts += len(made.item) - len(whole.item)
        best = best_time(stretches, layout.num_rows, model)
        costs = of_plan(made, sorted(items), model)  # who reads first changes little, but a little: row order, as below
        assert model.time(costs) <= 1.1 * best, (trees, stretches, model, best, made.item, made.seg)
    assert cuts > 200
