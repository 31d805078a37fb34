"""What tree attention is measured beside: PyTorch's attention, FlexAttention, FlashInfer, xFormers.

    PYTHONPATH=bench python bench/common/baselines.py --report warm.json

compiles each of them once, so that measuring does not wait.

A side is made for a problem: `plan` does what is done once a tree, `run` what is done every layer. What cannot run says
why (`Absent`). None of them is charged for gathering keys and values into the form it wants, nor for the memory.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from common.measure import write
from common.workloads import Tree, slots, star

WORKSPACE = 768 << 20  # bytes, for FlashInfer
ROOM = 0.8  # of the free memory that a baseline's copies may take


class Absent(Exception):
    """A baseline that cannot run, and why."""


@dataclass(frozen=True)
class Problem:
    """A decode step of one layer. q [R, Hq, D]; pools [slots, Hk, D]; `slot_of` [tokens], node by node."""

    tree: Tree
    slot_of: np.ndarray
    q: Tensor
    k_slots: Tensor
    v_slots: Tensor

    @property
    def device(self) -> str:
        return self.q.device.type

    @property
    def node_slots(self) -> list[np.ndarray]:
        """Slots of each node."""
        return np.split(self.slot_of, np.cumsum(self.tree.length)[:-1])

    @cached_property
    def row_slots(self) -> list[np.ndarray]:
        """Slots that each row sees."""
        node = self.node_slots
        return [np.concatenate([node[n] for n in path]) for path in self.tree.path]

    @cached_property
    def visibility(self) -> tuple[Tensor, Tensor]:
        """[R, nodes] whether a row sees a node; [tokens] the node of each."""
        sees = np.zeros((len(self.tree.rows), len(self.tree.length)), bool)
        for row, path in enumerate(self.tree.path):
            sees[row, path] = True
        node_of = np.repeat(np.arange(len(self.tree.length)), self.tree.length)
        return torch.from_numpy(sees).to(self.device), torch.from_numpy(node_of).to(self.device)


@dataclass(frozen=True)
class Side:
    run: Callable[[], Tensor]  # out, [R, Hq, D] or a shape of as many elements in that order
    plan: Callable[[], Any] | None = None  # made once already


def problem(
    tree: Tree,
    slot_of: np.ndarray,
    heads: int,
    kv_heads: int,
    dim: int,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
) -> Problem:
    """Random queries, keys and values."""
    torch.manual_seed(0)
    where: Any = dict(dtype=dtype, device=device)
    k_slots, v_slots = (torch.randn(slot_of.size, kv_heads, dim, **where) for _ in range(2))
    return Problem(tree, slot_of, torch.randn(len(tree.rows), heads, dim, **where), k_slots, v_slots)


# ---------------------------------------------------------------------- PyTorch


@dataclass(frozen=True)
class Expanded:
    """Every row's own copy of what it sees, to be shared by the sides that want one."""

    k: Tensor  # [R, Hk, L, D]
    v: Tensor
    mask: Tensor | None  # [R, 1, 1, L]; none if all rows see L tokens


def expanded(p: Problem) -> Expanded:
    """Raises Absent where the memory does not suffice."""
    rows = p.row_slots
    longest = max(map(len, rows))
    # K, V and the copy that is being transposed
    needed = 3 * len(rows) * longest * p.k_slots[0].nbytes
    free = torch.cuda.mem_get_info()[0] if p.device == "cuda" else 8 << 30
    if needed > ROOM * free:
        raise Absent(f"the expanded batch takes {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
    index = np.zeros((len(rows), longest), np.int64)
    seen = np.zeros((len(rows), longest), bool)
    for i, some in enumerate(rows):
        index[i, : len(some)], seen[i, : len(some)] = some, True
    where = torch.from_numpy(index).to(p.device)
    k, v = (pool[where].transpose(1, 2).contiguous() for pool in (p.k_slots, p.v_slots))
    return Expanded(k, v, None if seen.all() else torch.from_numpy(seen).to(p.device)[:, None, None])


def sdpa_batch(p: Problem, e: Expanded) -> Side:
    """As users write it: a query a sequence."""
    return Side(lambda: sdpa(p.q[:, :, None], e.k, e.v, e.mask, enable_gqa=True))


def sdpa_grouped(p: Problem, e: Expanded) -> Side:
    """A KV head's queries as rows of one matrix."""
    q = p.q.view(len(p.q), e.k.shape[1], -1, p.q.shape[2])
    return Side(lambda: sdpa(q, e.k, e.v, e.mask))


@cache
def _flex(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # one for each tree; beyond, it would run without being compiled
    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def flex(p: Problem) -> Side:
    """One sequence of all tokens, in the order of the nodes, under a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    device = p.device
    where = torch.from_numpy(p.slot_of).to(device)
    k, v = (pool[where].transpose(0, 1)[None].contiguous() for pool in (p.k_slots, p.v_slots))
    q = p.q.transpose(0, 1)[None].contiguous()
    sees, node_of = p.visibility

    def visible(batch: Tensor, head: Tensor, row: Tensor, token: Tensor) -> Tensor:
        return sees[row, node_of[token]]

    def plan() -> Any:
        return create_block_mask(visible, None, None, len(p.q), p.slot_of.size, device=device)

    mask, attend = plan(), _flex(device == "cuda")
    return Side(lambda: attend(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1), plan)


# ---------------------------------------------------------------------- FlashInfer


@dataclass(frozen=True)
class Level:
    """One level of a cascade: consecutive rows share a run of slots. CSR."""

    rows: np.ndarray  # [groups + 1]
    runs: np.ndarray  # [groups + 1]
    slots: np.ndarray


def cascade_levels(p: Problem, depth: int) -> list[Level]:
    """The tree in `depth` levels: a level a node of the path, what is left in the last one, a run a group of rows that
    share all of it. Raises Absent for trees whose rows do not all have something at every level."""
    if min(map(len, p.tree.path)) < depth:
        raise Absent(f"a cascade of {depth} levels needs as many nodes above every row")
    node, found = p.node_slots, []
    for level in range(depth):
        last = level == depth - 1
        above = [tuple(path[level:]) if last else (path[level],) for path in p.tree.path]
        starts = [row for row in range(len(above)) if row == 0 or above[row] != above[row - 1]]
        runs = [np.concatenate([node[n] for n in above[row]]) for row in starts]
        ends = np.cumsum([0, *map(len, runs)])
        found.append(Level(np.array([*starts, len(above)]), ends, np.concatenate(runs)))
    return found


def trunk(tree: Tree) -> int:
    """Levels of the deepest cascade a tree can have, 2 at most if it is not regular."""
    return tree.depth if tree.is_regular else min(2, *map(len, tree.path))


def flashinfer_cascade(p: Problem, depth: int) -> Side:
    """MultiLevelCascadeAttentionWrapper over pages of one token."""
    flashinfer = _imported("flashinfer", p)
    chosen = cascade_levels(p, depth)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(depth, _workspace(p.device), "NHD")
    rows, runs, pages = (
        [torch.from_numpy(x.astype(np.int32)).to(p.device) for x in part]
        for part in zip(*((level.rows, level.runs, level.slots) for level in chosen), strict=True)
    )
    last = [torch.ones(len(level.rows) - 1, dtype=torch.int32, device=p.device) for level in chosen]
    kv = p.k_slots[:, None], p.v_slots[:, None]
    dtype = p.q.dtype

    def plan() -> None:
        shape = (p.q.shape[1], p.k_slots.shape[1], p.q.shape[2], 1)
        wrapper.plan(rows, runs, pages, last, *shape, q_data_type=dtype, kv_data_type=dtype)

    plan()
    return Side(lambda: wrapper.run(p.q, kv), plan)


def flashinfer_decode(p: Problem) -> Side:
    """BatchDecodeWithPagedKVCacheWrapper on tensor cores, over pages of one token: every row reads all it sees."""
    flashinfer = _imported("flashinfer", p)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(p.device), "NHD", use_tensor_cores=True)
    rows = p.row_slots
    indptr = torch.from_numpy(np.cumsum([0, *map(len, rows)]).astype(np.int32)).to(p.device)
    pages = torch.from_numpy(np.concatenate(rows).astype(np.int32)).to(p.device)
    last = torch.ones(len(rows), dtype=torch.int32, device=p.device)
    kv = p.k_slots[:, None], p.v_slots[:, None]
    dtype = p.q.dtype

    def plan() -> None:
        shape = (p.q.shape[1], p.k_slots.shape[1], p.q.shape[2], 1)
        wrapper.plan(indptr, pages, last, *shape, q_data_type=dtype, kv_data_type=dtype)

    plan()
    return Side(lambda: wrapper.run(p.q, kv), plan)


@cache
def _workspace(device: str) -> Tensor:
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)


# ---------------------------------------------------------------------- xFormers


def xformers_tree(p: Problem) -> Side:
    """Its tree_attention: the first node as prefix, all others as one block under a dense bias."""
    _imported("xformers.ops", p)
    from xformers.ops.fmha import triton_splitk
    from xformers.ops.fmha.attn_bias import BlockDiagonalPaddedKeysMask
    from xformers.ops.tree_attention import tree_attention

    tree = p.tree
    if tree.parent.count(-1) != 1 or len(tree.length) == 1:
        raise Absent("needs one prompt with branches")
    heads, kv_heads, dim = p.q.shape[1], p.k_slots.shape[1], p.q.shape[2]
    group, prompt, device = heads // kv_heads, tree.length[0], p.device
    where = torch.from_numpy(p.slot_of).to(device)
    # [1, tokens, Hk, G, D]: a KV head's group of query heads reads the same K and V
    k, v = (pool[where][None, :, :, None].expand(-1, -1, -1, group, -1) for pool in (p.k_slots, p.v_slots))
    q = p.q.view(1, len(p.q), kv_heads, group, dim)
    rest = p.slot_of.size - prompt
    sees, node_of = p.visibility
    bias = torch.empty(len(p.q), -(-rest // 8) * 8, dtype=p.q.dtype, device=device)[:, :rest]  # rows of 16 bytes

    def plan() -> Any:
        bias.fill_(-torch.inf).masked_fill_(sees[:, node_of[prompt:]], 0)
        return BlockDiagonalPaddedKeysMask.from_seqlens([len(p.q)], prompt, [prompt], device=torch.device(device))

    prefix = plan()
    parts = k[:, prompt:], v[:, prompt:], k[:, :prompt], v[:, :prompt]
    return Side(lambda: tree_attention(q, *parts, bias, prefix, prefix_op=triton_splitk.FwOp)[0], plan)


def _imported(module: str, p: Problem) -> Any:
    """Raises Absent where it is not installed, or there is no GPU for it."""
    import importlib

    try:
        found = importlib.import_module(module)
    except Exception as error:  # also what a package raises that does not fit this machine
        raise Absent(f"{type(error).__name__}: {error}") from None
    if p.device != "cuda":
        raise Absent(f"{module} needs a CUDA device, got {p.device}")
    return found


# ---------------------------------------------------------------------- all of them

ALONE: dict[str, Callable[[Problem], Side]] = {
    "flex": flex,
    "flashinfer decode": flashinfer_decode,
    "flashinfer cascade": lambda p: flashinfer_cascade(p, trunk(p.tree)),
    "xformers tree": xformers_tree,
}


def sides(p: Problem, leave_out: dict[str, str]) -> tuple[dict[str, Side], dict[str, str]]:
    """The baselines that can run, and why the others cannot. leave_out: names not to try, and why."""
    makers = dict(ALONE)
    if trunk(p.tree) > 2:
        makers["flashinfer cascade, 2 levels"] = lambda p: flashinfer_cascade(p, 2)
    try:
        e = expanded(p)
        makers |= {"sdpa": lambda p: sdpa_batch(p, e), "sdpa grouped": lambda p: sdpa_grouped(p, e)}
        absent = {}
    except Absent as why:
        absent = dict.fromkeys(("sdpa", "sdpa grouped"), str(why))
    made: dict[str, Side] = {}
    for name, make in makers.items():
        reasons = [why for other, why in leave_out.items() if name.startswith(other)]
        try:
            if reasons:
                raise Absent(reasons[0])
            made[name] = make(p)
        except Exception as error:  # others' code, on machines it may not be made for
            absent[name] = str(error) if isinstance(error, Absent) else f"{type(error).__name__}: {error}"[:400]
    return made, absent


def main() -> None:
    """Runs each baseline once on a small tree of each kind; reports what fails, as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True, help="JSON: seconds of those that run, why others do not")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    args = parser.parse_args()
    tree = star(16, 256, 32)
    p = problem(tree, slots(tree, 16), 32, 8, 128, args.device)
    report: dict[str, Any] = {}
    for name, make in ALONE.items():
        began = time.perf_counter()
        try:
            make(p).run()
            if args.device == "cuda":
                torch.cuda.synchronize()
            report[name] = time.perf_counter() - began
        except Exception as error:
            report[name] = str(error) if isinstance(error, Absent) else f"{type(error).__name__}: {error}"[:400]
        write(args.report, report)
        print(f"{name}: {report[name]}", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
