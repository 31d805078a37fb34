"""Some rows of a `TokenRequest`, and the scores of all rows from those of some."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from forktree.checks import integers
from forktree.device.transfer import upload
from forktree.ops.sampling import Sampling
from forktree.ops.token_request import KeyedSampling, LogitEdits, RaggedIds, TokenRequest, TokenScores
from forktree.plan.layout import ranges
from forktree.types import Int64Array


def rows_of(request: TokenRequest, rows: Int64Array) -> TokenRequest:
    """What `request` asks of some of its rows, `[n]`. Waits for a GPU that has ragged ids."""
    targets, select, sample = request.targets, request.select, request.sample
    if targets is not None:
        targets = targets[upload(rows, targets.device)]
    if isinstance(select, RaggedIds):
        at, count = _ragged(select, rows)
        indptr = np.concatenate([[0], np.cumsum(count)])
        select = RaggedIds(upload(indptr, select.ids.device), select.ids[upload(at, select.ids.device)])
    if sample is not None:
        sample = _rows_of_sample(sample, rows)
    return replace(request, targets=targets, select=select, sample=sample)


def _rows_of_sample(sample: KeyedSampling, rows: Int64Array) -> KeyedSampling:
    sampling, edits, allowed = sample.sampling, sample.edits, sample.allowed
    seed, position = (
        integers(name, values, -(2**63), 2**64 - 1, kind=np.uint64)[rows]
        for name, values in (("seed", sample.seed), ("position", sample.position))
    )
    if not isinstance(sampling, Sampling):
        sampling = [sampling[row] for row in rows]
    if edits is not None:
        count = np.diff(edits.indptr)[rows]
        at = ranges(edits.indptr[rows], count)
        edits = LogitEdits(np.concatenate([[0], np.cumsum(count)]), edits.ids[at], edits.ops[at], edits.values[at])
    if allowed is not None:
        allowed = allowed[upload(rows, allowed.device)]
    return KeyedSampling(sampling, seed, position, edits, allowed)


def _ragged(select: RaggedIds, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Where the ids of some rows are among all, row by row, and how many each of these rows has, `[n]`."""
    indptr = select.indptr.cpu().numpy().astype(np.int64)
    count = np.diff(indptr)[rows]
    return ranges(indptr[rows], count), count


def joined(parts: Sequence[tuple[Int64Array, TokenScores]], request: TokenRequest) -> TokenScores:
    """The scores of all rows of `request`. parts: which rows, in any order, and their scores; at least one."""
    if len(parts) == 1 and (np.diff(parts[0][0]) > 0).all():
        return parts[0][1]
    rows = np.concatenate([rows for rows, _ in parts])
    order, ragged = np.argsort(rows), np.zeros(0, np.int64)
    if isinstance(request.select, RaggedIds):
        _, count = _ragged(request.select, rows)
        ragged = ranges((np.cumsum(count) - count)[order], count[order])
    found: dict[str, Tensor] = {}
    for name in vars(parts[0][1]):
        values = [vars(scores)[name] for _, scores in parts]
        at = ragged if isinstance(request.select, RaggedIds) and name.startswith("selected") else order
        found[name] = torch.cat(values)[upload(at, values[0].device)]
    return TokenScores(**found)


def in_order(parts: Sequence[tuple[Int64Array, Tensor]]) -> Tensor:
    """All rows of a tensor from some at a time, in any order; at least one part."""
    if len(parts) == 1 and (np.diff(parts[0][0]) > 0).all():
        return parts[0][1]
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    values = torch.cat([values for _, values in parts])
    return values[upload(order, values.device)]
