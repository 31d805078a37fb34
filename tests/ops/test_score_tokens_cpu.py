"""`ops.score_tokens` by the compiled kernel: every instruction set, threads, rows in company, scratch, addresses."""

import numpy as np
import pytest
import torch

from backends import ISAS, each_dtype, off_alignment
from forktree import KeyedSampling, LogitEdits, Sampling, TokenRequest, _core, ops
from scores import by_specification, problem

KINDS = [
    Sampling(),
    Sampling(0.0),
    Sampling(0.6),
    Sampling(0.9, top_k=20),
    Sampling(1.1, top_p=0.8),
    Sampling(0.9, top_k=50, top_p=0.9, min_p=0.01),
    Sampling(2.0, top_k=500),  # more than a pass keeps
    Sampling(3.0, top_p=0.97),
    Sampling(3.0, top_k=700, top_p=0.9),
]


def request(rows: int, vocab: int, *, top_k: int = 7, reordered: bool = False) -> TokenRequest:
    """Everything at once, every kind of sampling in turn."""
    rng = np.random.default_rng(rows + vocab)
    edits = allowed = None
    if reordered:
        texts = [rng.integers(0, vocab, 5) for _ in range(rows)]
        edits = LogitEdits.penalties(texts, repetition=1.4, frequency=0.3, presence=0.2, bias={0: 1.0, vocab - 1: -2.0})
        words = rng.integers(-(2**31), 2**31, (rows, (vocab + 31) // 32)).astype(np.int32)
        words[:, 0] |= 1
        allowed = torch.from_numpy(words)
    kinds = [KINDS[i % len(KINDS)] for i in range(rows)]
    sample = KeyedSampling(kinds, rng.integers(0, 2**62, rows), np.arange(rows), edits, allowed)
    return TokenRequest(top_k=top_k, sample=sample, entropy=True)


@pytest.mark.parametrize(
    ("rows", "vocab", "size", "reordered", "head"),
    [
        (1, 1100, 64, False, {}),
        (18, 1100, 33, True, dict(scale=1.5)),
        (70, 777, 130, False, dict(softcap=10.0, bias=torch.linspace(-1, 1, 777))),
    ],
)
@each_dtype(*ISAS)
def test_every_instruction_set_agrees_with_fp64(backend, dtype, rows, vocab, size, reordered, head):
    hidden, lm_head = problem(rows, vocab, size, dtype)
    asked = request(rows, vocab, reordered=reordered)
    found = ops.score_tokens(hidden, lm_head, asked, **head)
    expected = by_specification(hidden.double(), lm_head.double(), asked, **head)
    for name in ("lse", "entropy", "top_log_probs"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), atol=3e-5, rtol=0)
    # The samples are those of exact arithmetic unless a number lies within rounding of where they change.
    same = found.token == expected.token
    assert same.double().mean() > 0.95
    for name in ("log_prob", "shaped_log_prob"):
        torch.testing.assert_close(
            getattr(found, name)[same].double(), getattr(expected, name)[same], atol=5e-5, rtol=0
        )


@each_dtype(*ISAS)
def test_a_row_is_the_same_to_the_bit_alone_and_among_others(backend, dtype):
    rows, vocab = 150, 900
    hidden, lm_head = problem(rows, vocab, 48, dtype)
    asked = request(rows, vocab, reordered=True)
    among = ops.score_tokens(hidden, lm_head, asked)
    sample, edits = asked.sample, asked.sample.edits
    for row in (0, 1, 6, 7, 8, 63, 64, 149):
        at = slice(row, row + 1)
        own = slice(edits.indptr[row], edits.indptr[row + 1])
        alone_edits = LogitEdits([0, own.stop - own.start], edits.ids[own], edits.ops[own], edits.values[own])
        of_row = (x[at] for x in (sample.sampling, sample.seed, sample.position))
        alone_sample = KeyedSampling(*of_row, alone_edits, sample.allowed[at])
        alone = ops.score_tokens(hidden[at], lm_head, TokenRequest(top_k=7, sample=alone_sample, entropy=True))
        for name in ("lse", "entropy", "top_ids", "top_log_probs", "token", "log_prob", "shaped_log_prob"):
            assert torch.equal(getattr(alone, name), getattr(among, name)[at]), (row, name)


def test_rows_at_any_stride_and_address():
    hidden, lm_head = problem(20, 300, 33, torch.bfloat16)
    asked = request(20, 300)
    expected = ops.score_tokens(hidden, lm_head, asked)
    wide = torch.randn(20, 50).bfloat16()
    wide[:, 7:40] = hidden
    for other, head in (
        (wide[:, 7:40], lm_head),
        (off_alignment(hidden), off_alignment(lm_head)),
        (hidden.T.contiguous().T, lm_head),
    ):
        found = ops.score_tokens(other, head, asked)
        assert torch.equal(found.lse, expected.lse) and torch.equal(found.token, expected.token)


class Scratch:
    """Bytes of scratch that the core took in each call."""

    def __init__(self, monkeypatch) -> None:
        self.taken: list[int] = []
        core = _core.score_tokens
        monkeypatch.setattr(_core, "score_tokens", lambda *arguments: self.taken.append(core(*arguments)))


@pytest.mark.parametrize("top_k", [0, 64, 1024])
@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("number", [1, 64])
def test_scratch_stays_below_16_mb(top_k, reordered, number, monkeypatch, threads):
    scratch = Scratch(monkeypatch)
    torch.set_num_threads(number)
    for rows, vocab in ((1, 200_000), (300, 2000), (1024, 1100)):
        hidden, lm_head = problem(rows, vocab, 16)
        ops.score_tokens(hidden, lm_head, request(rows, vocab, top_k=top_k, reordered=reordered))
    assert len(scratch.taken) == 3 and max(scratch.taken) < 16e6


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("kind", [Sampling(0.8), Sampling(0.8, top_p=0.95)])
def test_scratch_is_a_twentieth_of_the_logits(rows, kind, monkeypatch, threads):
    """Of a vocabulary of 151,936 tokens, on two threads; hidden states of 4,096 add 4 bytes a number and row."""
    scratch = Scratch(monkeypatch)
    torch.set_num_threads(2)
    vocab, size = 151_936, 8
    hidden, lm_head = problem(rows, vocab, size)
    sample = KeyedSampling(kind, np.arange(rows), np.arange(rows))
    ops.score_tokens(hidden, lm_head, TokenRequest(top_k=64, sample=sample, entropy=True))
    packed = rows * 4096 * 2  # bf16
    assert scratch.taken[0] + packed < 0.05 * rows * vocab * 4


def test_the_registered_operation_checks_its_arguments():
    hidden, lm_head = problem(2, 10, 4)
    nothing = (None,) * 4
    keys, settings = torch.zeros(2, dtype=torch.long), torch.ones(4, 2, dtype=torch.double)

    def call(top_k=0, keys=keys, settings=settings, edits=nothing, allowed=None):
        wanted = top_k, False, keys, settings, True, *edits, allowed
        torch.ops.forktree.score_tokens.default(hidden, lm_head, None, 1.0, None, *wanted)

    call()
    for message, arguments in {
        r"top_k must be in \[0, 10\] \(V\), got 11": dict(top_k=11),
        r"keys must be torch.int64 \[2\] on cpu, got torch.int64 \[1\]": dict(keys=keys[:1]),
        r"settings must be torch.float64 \[4, 2\] on cpu, got torch.float64 \[3, 2\]": dict(settings=settings[:3]),
        "keys and settings must both be there": dict(settings=None),
        r"allowed must be torch.int32 \[2, 1\]": dict(allowed=torch.zeros(2, 2, dtype=torch.int32)),
        r"edit_ids must be torch.int32": dict(edits=(torch.zeros(3, dtype=torch.int32), keys, keys, keys)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call(**arguments)
