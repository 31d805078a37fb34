"""`score_tokens` in Triton: in its interpreter, programs in random order, or on a GPU where there is one."""

import importlib
from unittest.mock import patch

import numpy as np
import pytest
import torch

from forktree import ops
from forktree.errors import InvalidInput, NonFinite
from forktree.ops.assemble import LmHead, VocabPass
from forktree.ops.sampling import Sampling
from forktree.ops.token_request import ADD, REPETITION, KeyedSampling, LogitEdits, TokenRequest

pytest.importorskip("forktree.triton_kernels", reason="needs Triton")
NATIVE = torch.cuda.is_available()
DEVICE = "cuda" if NATIVE else "cpu"
pytestmark = [pytest.mark.gpu] if NATIVE else [pytest.mark.usefixtures("shuffled")]
NEW_EMPTY = torch.Tensor.new_empty
SHAPES = [(1, 67, 24), (3, 257, 33), (19, 300, 64)]  # T, V, H: rows and tokens in several tiles, in several splits
GREEDY = Sampling(temperature=0.0)
# By what the best 64 of 400 tokens say of the threshold.
SETTLED = [
    Sampling(top_k=20),
    Sampling(top_k=64),
    Sampling(temperature=0.3, top_p=0.8),
    Sampling(temperature=0.6, min_p=0.2),
    Sampling(temperature=0.8, top_k=30, top_p=0.7, min_p=0.05),
    Sampling(top_k=1),
    Sampling(top_p=1e-6),
    Sampling(top_k=100, min_p=0.9),
]
OPEN = [
    Sampling(top_k=65),
    Sampling(top_k=333),
    Sampling(temperature=3.0, top_p=0.9),
    Sampling(temperature=3.0, top_p=0.999999),
    Sampling(temperature=5.0, min_p=0.001),
    Sampling(temperature=2.0, top_k=150, top_p=0.8),
    Sampling(temperature=2.0, top_k=150, top_p=0.8, min_p=0.3),
    Sampling(temperature=2.0, top_k=390, top_p=0.99, min_p=1e-4),
]
FREE = [Sampling(), Sampling(temperature=0.5), GREEDY, Sampling(top_k=10**6), Sampling(temperature=40.0)]


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    monkeypatch.setenv("FORKTREE_BACKEND", "triton")


@pytest.fixture(autouse=True)
def sentinels():
    """What is not written shows."""

    def spoilt(like, *shape, **options):
        empty = NEW_EMPTY(like, *shape, **options)
        return empty.fill_(torch.nan if empty.is_floating_point() else -(2**30))

    with patch.object(torch.Tensor, "new_empty", spoilt):
        yield


def model(rows, vocab, size, dtype=torch.float32, seed=0, peak=3.0):
    """Hidden states and a head whose logits spread by `peak`."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, size, generator=g)
    lm_head = torch.randn(vocab, size, generator=g) * (peak / size**0.5)
    return hidden.to(DEVICE, dtype), lm_head.to(DEVICE, dtype)


def model_of(logits):
    """With exactly these logits."""
    logits = torch.as_tensor(logits, dtype=torch.float32)
    return torch.eye(len(logits), device=DEVICE), logits.T.contiguous().to(DEVICE)


def keyed(rows, sampling, seed=0, **options):
    return KeyedSampling(sampling, seed=np.arange(rows) + 1000 * seed, position=np.arange(rows) * 7, **options)


def mask(allowed):
    """bool [T, V] as bits."""
    rows, vocab = allowed.shape
    padded = np.zeros((rows, (vocab + 31) // 32 * 32), bool)
    padded[:, :vocab] = allowed
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))


def specification(hidden, lm_head, request, **head):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FORKTREE_BACKEND", "reference")
        return ops.score_tokens(hidden, lm_head, request, **head, check=False)


def compare(hidden, lm_head, request, *, bias=None, scale=1.0, softcap=None, tolerance=2e-5):
    """With the specification in fp64: same ids, same samples."""
    got = ops.score_tokens(hidden, lm_head, request, bias=bias, scale=scale, softcap=softcap, check=False)
    wide = [None if x is None else x.double() for x in (hidden, lm_head, bias)]
    expected = specification(wide[0], wide[1], request, bias=wide[2], scale=scale, softcap=softcap)
    assert vars(got).keys() == vars(expected).keys()
    for name, value in vars(expected).items():
        ours = getattr(got, name)
        if value.dtype == torch.long:
            assert torch.equal(ours, value), name
        else:
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), value, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_everything_at_once(shape, dtype):
    rows, vocab, _ = shape
    hidden, lm_head = model(*shape, dtype)
    kinds = [*SETTLED, *OPEN, *FREE]
    request = TokenRequest(
        top_k=7,
        sample=keyed(rows, [kinds[i % len(kinds)] for i in range(rows)]),
        targets=torch.arange(rows, device=DEVICE) * 3,
        select=torch.tensor([1, vocab - 1], device=DEVICE),
        lse=True,
        entropy=True,
    )
    bias = torch.linspace(-1, 1, vocab, device=DEVICE)
    compare(hidden, lm_head, request, bias=bias, scale=0.7, softcap=4.0)


@pytest.mark.parametrize("part", [dict(lse=True), dict(entropy=True), dict(top_k=1)], ids=str)
def test_parts_alone(part):
    compare(*model(3, 150, 16), TokenRequest(**part))


@pytest.mark.parametrize("top_k", [2, 16, 17, 64])
def test_best_tokens(top_k):
    compare(*model(3, 500, 16), TokenRequest(top_k=top_k))
    compare(*model(2, 40, 16), TokenRequest(top_k=top_k))


def test_best_tokens_of_equals_and_of_minus_infinity():
    g = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (3, 300), generator=g).float()
    logits[1, ::3], logits[2, 5:] = -0.0, -torch.inf
    hidden, lm_head = model_of(logits.nan_to_num(neginf=-1e30))
    compare(hidden, lm_head, TokenRequest(top_k=64))
    bias = torch.zeros(300, device=DEVICE)
    bias[7:] = -torch.inf
    got = compare(
        hidden[:2], lm_head, TokenRequest(top_k=9, entropy=True, sample=keyed(2, Sampling(top_p=0.9))), bias=bias
    )
    assert got.top_log_probs[:, 7:].eq(-torch.inf).all()


def test_zeros_of_both_signs_are_equals():
    hidden, lm_head = model_of(torch.tensor([[-1e-25, 1e-25]]).repeat(1, 60))
    got = ops.score_tokens(hidden, lm_head, TokenRequest(top_k=9), scale=1e-25)
    assert got.top_ids.tolist() == [list(range(9))]


# ---------------------------------------------------------------------- sampling


@pytest.mark.parametrize("kinds", [SETTLED, OPEN, FREE], ids=["settled", "open", "free"])
def test_samples(kinds):
    rows = 2 * len(kinds)
    hidden, lm_head = model(rows, 400, 32)
    compare(hidden, lm_head, TokenRequest(sample=keyed(rows, kinds * 2)))


@pytest.mark.parametrize("kinds", [SETTLED, OPEN, FREE], ids=["settled", "open", "free"])
def test_samples_among_equals(kinds):
    """Tokens that tie with a threshold stay, be they within the best 64 or beyond."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randint(0, 4, (len(kinds), 400), generator=g).float() * 2
    compare(*model_of(logits), TokenRequest(sample=keyed(len(kinds), kinds)))


@pytest.mark.parametrize("kinds", [SETTLED, OPEN, FREE], ids=["settled", "open", "free"])
def test_samples_of_edited_and_masked_logits(kinds):
    rows, vocab, g = len(kinds), 400, np.random.default_rng(0)
    hidden, lm_head = model(rows, vocab, 32, seed=3)
    texts = [g.integers(0, vocab, n) for n in g.integers(0, 9, rows)]
    texts[0] = np.arange(120, 140)  # many in one tile
    bias = {0: 1.5, 64: -np.inf, 256: 2.0, 399: 1.0}  # first of splits, last of all
    edits = LogitEdits.penalties(texts, repetition=1.3, frequency=0.2, presence=0.5, bias=bias)
    allowed = g.random((rows, vocab)) < 0.7
    compare(hidden, lm_head, TokenRequest(sample=keyed(rows, kinds, edits=edits, allowed=mask(allowed)), top_k=3))
    if kinds is FREE:
        compare(hidden, lm_head, TokenRequest(sample=keyed(rows, kinds, edits=edits)))


def test_edits_of_one_token_are_applied_in_their_order():
    hidden, lm_head = model(2, 100, 8)
    kinds = [ADD, REPETITION, ADD, REPETITION, ADD]
    edits = LogitEdits([0, 4, 5], [9, 9, 9, 70, 9], kinds, [5.0, 2.0, 30.0, 3.0, 40.0])
    got = compare(hidden, lm_head, TokenRequest(sample=keyed(2, Sampling(), edits=edits)))
    assert got.token.tolist() == [9, 9]


def test_one_token_allowed_or_none():
    rows, vocab = 4, 200
    hidden, lm_head = model(rows, vocab, 16)
    allowed = np.zeros((rows, vocab), bool)
    allowed[0, 150] = allowed[3, 199] = allowed[2, 64] = True
    kinds = [Sampling(top_p=0.5), Sampling(top_k=3), Sampling(), GREEDY]
    request = TokenRequest(sample=keyed(rows, kinds, allowed=mask(allowed)))
    got = compare(hidden, lm_head, request)
    assert got.token.tolist() == [150, 0, 64, 199]
    with pytest.raises(InvalidInput, match="row 1: no token is allowed"):
        ops.score_tokens(hidden, lm_head, request)


@pytest.mark.parametrize("sampling", [Sampling(), GREEDY, Sampling(top_k=100)], ids=str)
def test_bad_rows_leave_others_alone(sampling):
    hidden, lm_head = model(6, 300, 16)
    request = TokenRequest(sample=keyed(6, sampling), top_k=4, entropy=True)
    clean = compare(hidden, lm_head, request)
    hidden[2], hidden[4, 3] = torch.nan, torch.inf
    got = ops.score_tokens(hidden, lm_head, request, check=False)
    good = [0, 1, 3, 5]
    for name, value in vars(clean).items():
        if value is not None:
            assert torch.equal(getattr(got, name)[good], value[good]), name
    assert not got.lse[[2, 4]].isfinite().any()
    assert got.token[[2, 4]].tolist() == [0, 0] and got.log_prob[[2, 4]].isnan().all()
    assert got.shaped_log_prob[[2, 4]].isnan().all()
    with pytest.raises(NonFinite, match="logits of row 2"):
        got.check()
    nothing = torch.full((300,), -torch.inf, device=DEVICE)
    assert ops.score_tokens(hidden[:1], lm_head, TokenRequest(lse=True), bias=nothing, check=False).lse[0] == -torch.inf


def test_a_row_does_not_depend_on_its_neighbours():
    kinds = [*SETTLED, *OPEN, *FREE][::2]
    rows = len(kinds)
    hidden, lm_head = model(rows, 400, 32)
    together = ops.score_tokens(hidden, lm_head, TokenRequest(sample=keyed(rows, kinds), entropy=True))
    again = ops.score_tokens(hidden, lm_head, TokenRequest(sample=keyed(rows, kinds), entropy=True))
    for name, value in vars(together).items():
        assert value is None or torch.equal(value, getattr(again, name)), name
    for t in (1, 6):
        alone = KeyedSampling(kinds[t], seed=[t], position=[7 * t])
        assert ops.score_tokens(hidden[t : t + 1], lm_head, TokenRequest(sample=alone)).token[0] == together.token[t]


def test_huge_logits():
    logits = torch.linspace(-1, 1, 200).expand(3, 200) * torch.tensor([1e4, 1e8, 1e30])[:, None]
    request = TokenRequest(sample=keyed(3, Sampling(top_p=0.9)), top_k=5, entropy=True)
    compare(*model_of(logits), request, tolerance=1e-4)


def test_more_rows_than_a_launch_takes(monkeypatch):
    monkeypatch.setattr(importlib.import_module("forktree.triton_kernels.score_tokens.launch"), "MAX_ROWS", 16)
    rows, vocab, g = 19, 200, np.random.default_rng(0)
    hidden, lm_head = model(rows, vocab, 16)
    edits = LogitEdits.penalties([g.integers(0, vocab, 5) for _ in range(rows)], repetition=1.5)
    allowed = mask(g.random((rows, vocab)) < 0.8)
    kinds = [FREE[0], *SETTLED, *FREE, SETTLED[2], GREEDY, FREE[1], OPEN[0], GREEDY]
    sample = keyed(rows, kinds, edits=edits, allowed=allowed)
    compare(hidden, lm_head, TokenRequest(sample=sample, top_k=3, entropy=True))


def test_more_splits_than_a_list_holds(monkeypatch):
    kernels = importlib.import_module("forktree.triton_kernels.score_tokens.launch")
    monkeypatch.setattr(kernels, "INTERPRETED_PROGRAMS", 70)
    hidden, lm_head = model(2, 128 * 70 - 50, 8, peak=1.0)
    compare(hidden, lm_head, TokenRequest(top_k=64, sample=keyed(2, [Sampling(top_k=64), Sampling(top_p=0.001)])))


def test_what_the_kernel_does_not_take_goes_to_the_torch_backend():
    hidden, lm_head = model(2, 150, 16)
    compare(hidden, lm_head, TokenRequest(top_k=65, sample=keyed(2, [Sampling(top_p=0.9), GREEDY])))


def test_hidden_states_of_any_strides():
    hidden, lm_head = model(5, 100, 16)
    apart = torch.stack([hidden, hidden], 2)[..., 0]
    request = TokenRequest(top_k=3)
    assert torch.equal(ops.score_tokens(apart, lm_head, request).top_ids, compare(hidden, lm_head, request).top_ids)


def test_scratch_is_bounded(monkeypatch):
    """Everything at once, of the largest vocabularies: 16 MB at most beside the answer."""
    kernels = importlib.import_module("forktree.triton_kernels.score_tokens.launch")
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


@pytest.mark.skipif(not NATIVE, reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 256, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_vocabularies(rows, dtype):
    vocab, kinds = 50_257, [*SETTLED, *OPEN, *FREE]
    hidden, lm_head = model(rows, vocab, 1024, dtype)
    hidden, lm_head = hidden.double(), lm_head.double()
    request = TokenRequest(sample=keyed(rows, [kinds[t % len(kinds)] for t in range(rows)]), top_k=64, entropy=True)
    expected = specification(hidden, lm_head, request)
    got = ops.score_tokens(hidden.to(dtype), lm_head.to(dtype), request)
    torch.testing.assert_close(got.lse.double(), expected.lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy.double(), expected.entropy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.top_log_probs.double(), expected.top_log_probs, rtol=1e-4, atol=1e-4)
    assert (got.token != expected.token).sum() <= rows // 100 + 1  # scores closer than rounding


@pytest.mark.skipif(not NATIVE, reason="needs a CUDA device")
def test_heads_beyond_31_bits():
    vocab, size = 270_000, 8192
    lm_head = torch.zeros(vocab, size, dtype=torch.bfloat16, device=DEVICE)
    lm_head[-1] = 1
    hidden = torch.full((2, size), 1 / 256, dtype=torch.bfloat16, device=DEVICE)
    got = ops.score_tokens(hidden, lm_head, TokenRequest(top_k=2, sample=keyed(2, GREEDY)))
    assert got.top_ids.tolist() == [[vocab - 1, 0]] * 2 and got.token.tolist() == [vocab - 1] * 2
