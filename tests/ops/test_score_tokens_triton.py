"""`score_tokens` in Triton: in its interpreter, programs in random order, or on a GPU where there is one."""

import importlib
from unittest.mock import patch

import numpy as np
import pytest
import torch

from backends import INTERPRETED, ON_GPU, each, each_of, on
from forktree import LogitEdits, Sampling, TokenRequest, ops
from forktree.ops.assemble import LmHead, VocabPass
from scores import FREE, GREEDY, OPEN, SETTLED, by_specification, compare, keyed, problem, words

pytest.importorskip("forktree.triton_kernels", reason="needs Triton")
kernels = importlib.import_module("forktree.triton_kernels.score_tokens.launch")
NATIVE = [b for b in ON_GPU if b.name == "triton"]
NEW_EMPTY = torch.Tensor.new_empty


@each(*INTERPRETED, *NATIVE)
def test_more_rows_than_a_launch_takes(backend, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_ROWS", 16)
    rows, vocab, g = 19, 200, np.random.default_rng(0)
    hidden, lm_head = problem(rows, vocab, 16, spread=3.0)
    edits = LogitEdits.penalties([g.integers(0, vocab, 5) for _ in range(rows)], repetition=1.5)
    allowed = words(torch.from_numpy(g.random((rows, vocab)) < 0.8))
    kinds = [FREE[0], *SETTLED, *FREE, SETTLED[2], GREEDY, FREE[1], OPEN[0], GREEDY]
    sample = keyed(rows, kinds, edits=edits, allowed=allowed)
    compare(backend, hidden, lm_head, TokenRequest(sample=sample, top_k=3, entropy=True))


@each(*INTERPRETED, *NATIVE)
def test_more_splits_than_a_list_holds(backend, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED_PROGRAMS", 70)
    hidden, lm_head = problem(2, 128 * 70 - 50, 8, spread=1.0)
    sample = keyed(2, [Sampling(top_k=64), Sampling(top_p=0.001)])
    compare(backend, hidden, lm_head, TokenRequest(top_k=64, sample=sample))


@each(*INTERPRETED, *NATIVE)
def test_what_the_kernel_does_not_take_goes_to_the_torch_backend(backend):
    hidden, lm_head = problem(2, 150, 16, spread=3.0)
    compare(backend, hidden, lm_head, TokenRequest(top_k=65, sample=keyed(2, [Sampling(top_p=0.9), GREEDY])))


def test_scratch_is_bounded(monkeypatch):
    """Everything at once, of the largest vocabularies: 16 MB at most beside the answer."""
    for name in ("_score_tokens", "_reduce_scores", "_search_again"):
        monkeypatch.setattr(kernels, name, {(n,): lambda *_, **__: None for n in range(100_000)})
    monkeypatch.setattr(kernels, "architecture", lambda device: 90)
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 132)

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    vocab = 151_936
    for rows in (1, 16, 64, 200, 256, 1024):
        taken = []
        of_rows = meta(rows, dtype=torch.int64), meta(4, rows, dtype=torch.float64), True
        edits = *(meta(n, dtype=torch.int32) for n in (rows + 1, 9, 9)), meta(9, dtype=torch.float32)
        wanted = VocabPass(64, True, *of_rows, *edits, meta(rows, vocab // 32, dtype=torch.int32))

        def counted(like, *shape, taken=taken, **options):
            empty = NEW_EMPTY(like, *shape, **options)
            taken.append(empty.nbytes)
            return empty

        with patch.object(torch.Tensor, "new_empty", counted):
            found = kernels.launch(meta(rows, 4096), LmHead(meta(vocab, 4096)), wanted)
        launches = -(-rows // kernels.MAX_ROWS)
        assert sum(taken) - sum(x.nbytes for x in found) <= 16 * 2**20 * launches
        assert sum(taken) < 16 * 2**20 or rows > 1


# ---------------------------------------------------------------------- on a GPU alone


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 256, 300])
@each_of(("dtype",), ((b, dtype) for b in NATIVE for dtype in (torch.bfloat16, torch.float32)))
def test_large_vocabularies(backend, dtype, rows):
    vocab, kinds = 50_257, [*SETTLED, *OPEN, *FREE]
    hidden, lm_head = on(backend.device, *problem(rows, vocab, 1024, dtype, spread=3.0))
    sample = keyed(rows, [kinds[t % len(kinds)] for t in range(rows)])
    request = TokenRequest(sample=sample, top_k=64, entropy=True)
    expected = by_specification(hidden.double(), lm_head.double(), request)
    got = ops.score_tokens(hidden, lm_head, request)
    torch.testing.assert_close(got.lse.double(), expected.lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy.double(), expected.entropy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.top_log_probs.double(), expected.top_log_probs, rtol=1e-4, atol=1e-4)
    assert (got.token != expected.token).sum() <= rows // 100 + 1  # scores closer than rounding


@each(*NATIVE)
def test_heads_beyond_31_bits(backend):
    vocab, size = 270_000, 8192
    lm_head = torch.zeros(vocab, size, dtype=torch.bfloat16, device=backend.device)
    lm_head[-1] = 1
    hidden = torch.full((2, size), 1 / 256, dtype=torch.bfloat16, device=backend.device)
    got = ops.score_tokens(hidden, lm_head, TokenRequest(top_k=2, sample=keyed(2, GREEDY)))
    assert got.top_ids.tolist() == [[vocab - 1, 0]] * 2 and got.token.tolist() == [vocab - 1] * 2
