"""`ops.score_tokens` on every backend, against fp64 and transformers' own processors."""

import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import RepetitionPenaltyLogitsProcessor

from backends import FLOATS, HOST, ON_GPU, REFERENCE, TORCH, Backend, each, each_dtype, each_of, off_alignment
from distributions import chi_square, shaped, spread
from forktree import (
    InvalidInput,
    KeyedSampling,
    LogitEdits,
    NonFinite,
    RaggedIds,
    Sampling,
    TokenRequest,
    TokenScores,
    ops,
)
from forktree.ops.assemble import VocabPass
from forktree.ops.token_request import ADD, REPETITION
from scores import (
    FREE,
    GREEDY,
    KINDS,
    OPEN,
    SETTLED,
    agree,
    close,
    compare,
    exact_logits,
    given_logits,
    keyed,
    problem,
    same_logits,
    samples_agree,
    scored,
    words,
)

FAST = [REFERENCE, TORCH, Backend("cpu")]  # enough for thousands of rows
WITH_FP64 = [(b, d) for b in FAST for d in (*FLOATS, *[torch.float64] * (b.name != "cpu"))]
ALL = [b for b in (*HOST, *ON_GPU) if b.name != "cuda"]  # which has none of its own


SHAPES = [(1, 67, 24), (3, 257, 33), (19, 300, 64)]  # T, V, H: rows and tokens in several tiles, in several splits


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_dtype(*ALL)
def test_everything_at_once(backend, dtype, shape):
    rows, vocab, _ = shape
    hidden, lm_head = problem(*shape, dtype, spread=3.0)
    kinds = [*SETTLED, *OPEN, *FREE]
    request = TokenRequest(
        top_k=7,
        sample=keyed(rows, [kinds[i % len(kinds)] for i in range(rows)]),
        targets=torch.arange(rows) * 3,
        select=torch.tensor([1, vocab - 1]),
        lse=True,
        entropy=True,
    )
    bias = torch.linspace(-1, 1, vocab)
    compare(backend, hidden, lm_head, request, bias=bias, scale=0.7, softcap=4.0)


@pytest.mark.parametrize("part", [dict(lse=True), dict(entropy=True), dict(top_k=1)], ids=str)
@each(*ALL)
def test_parts_alone(backend, part):
    compare(backend, *problem(3, 150, 16, spread=3.0), TokenRequest(**part))


@pytest.mark.parametrize("top_k", [2, 16, 17, 64])
@each(*ALL)
def test_best_tokens(backend, top_k):
    compare(backend, *problem(3, 500, 16, spread=3.0), TokenRequest(top_k=top_k))
    compare(backend, *problem(2, 40, 16, spread=3.0), TokenRequest(top_k=top_k))


@each(*ALL)
def test_best_tokens_of_equals_and_of_minus_infinity(backend):
    g = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (3, 300), generator=g).float()
    logits[1, ::3], logits[2, 5:] = -0.0, -torch.inf
    hidden, lm_head = given_logits(logits.nan_to_num(neginf=-1e30))
    compare(backend, hidden, lm_head, TokenRequest(top_k=64))
    bias = torch.zeros(300)
    bias[7:] = -torch.inf
    request = TokenRequest(top_k=9, entropy=True, sample=keyed(2, Sampling(top_p=0.9)))
    got = compare(backend, hidden[:2], lm_head, request, bias=bias)
    assert got.top_log_probs[:, 7:].eq(-torch.inf).all()


@each(*ALL)
def test_zeros_of_both_signs_are_equals(backend):
    hidden, lm_head = given_logits(torch.tensor([[-1e-25, 1e-25]]).repeat(1, 60))
    got = scored(backend, hidden, lm_head, TokenRequest(top_k=9), scale=1e-25)
    assert got.top_ids.tolist() == [list(range(9))]


@pytest.mark.parametrize("kinds", [SETTLED, OPEN, FREE], ids=["settled", "open", "free"])
@each(*ALL)
def test_samples(backend, kinds):
    rows = 2 * len(kinds)
    hidden, lm_head = problem(rows, 400, 32, spread=3.0)
    compare(backend, hidden, lm_head, TokenRequest(sample=keyed(rows, kinds * 2)))


@pytest.mark.parametrize("kinds", [SETTLED, OPEN, FREE], ids=["settled", "open", "free"])
@each(*ALL)
def test_samples_among_equals(backend, kinds):
    """Tokens that tie with a threshold stay, be they within the best 64 or beyond."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randint(0, 4, (len(kinds), 400), generator=g).float() * 2
    compare(backend, *given_logits(logits), TokenRequest(sample=keyed(len(kinds), kinds)))


@pytest.mark.parametrize("kinds", [SETTLED, OPEN, FREE], ids=["settled", "open", "free"])
@each(*ALL)
def test_samples_of_edited_and_masked_logits(backend, kinds):
    rows, vocab, g = len(kinds), 400, np.random.default_rng(0)
    hidden, lm_head = problem(rows, vocab, 32, seed=3, spread=3.0)
    texts = [g.integers(0, vocab, n) for n in g.integers(0, 9, rows)]
    texts[0] = np.arange(120, 140)  # many in one tile
    bias = {0: 1.5, 64: -np.inf, 256: 2.0, 399: 1.0}  # first of splits, last of all
    edits = LogitEdits.penalties(texts, repetition=1.3, frequency=0.2, presence=0.5, bias=bias)
    allowed = words(torch.from_numpy(g.random((rows, vocab)) < 0.7))
    compare(backend, hidden, lm_head, TokenRequest(sample=keyed(rows, kinds, edits=edits, allowed=allowed), top_k=3))
    if kinds is FREE:
        compare(backend, hidden, lm_head, TokenRequest(sample=keyed(rows, kinds, edits=edits)))


@each(*ALL)
def test_edits_of_one_token_are_applied_in_their_order(backend):
    hidden, lm_head = problem(2, 100, 8, spread=3.0)
    kinds = [ADD, REPETITION, ADD, REPETITION, ADD]
    edits = LogitEdits([0, 4, 5], [9, 9, 9, 70, 9], kinds, [5.0, 2.0, 30.0, 3.0, 40.0])
    got = compare(backend, hidden, lm_head, TokenRequest(sample=keyed(2, Sampling(), edits=edits)))
    assert got.token.tolist() == [9, 9]


@each(*ALL)
def test_one_token_allowed_or_none(backend):
    rows, vocab = 4, 200
    hidden, lm_head = problem(rows, vocab, 16, spread=3.0)
    allowed = torch.zeros(rows, vocab, dtype=torch.bool)
    allowed[0, 150] = allowed[3, 199] = allowed[2, 64] = True
    kinds = [Sampling(top_p=0.5), Sampling(top_k=3), Sampling(), GREEDY]
    request = TokenRequest(sample=keyed(rows, kinds, allowed=words(allowed)))
    got = compare(backend, hidden, lm_head, request)
    assert got.token.tolist() == [150, 0, 64, 199]
    with pytest.raises(InvalidInput, match="row 1: no token is allowed"):
        scored(backend, hidden, lm_head, request, check=True)


@pytest.mark.parametrize("sampling", [Sampling(), GREEDY, Sampling(top_k=100)], ids=str)
@each(*ALL)
def test_bad_rows_leave_others_alone(backend, sampling):
    hidden, lm_head = problem(6, 150, 16, spread=3.0)
    request = TokenRequest(sample=keyed(6, sampling), top_k=4, entropy=True)
    clean = compare(backend, hidden, lm_head, request)
    hidden[2], hidden[4, 3] = torch.nan, torch.inf
    got = scored(backend, hidden, lm_head, request)
    good = [0, 1, 3, 5]
    for name, value in vars(clean).items():
        if value is not None:
            assert torch.equal(getattr(got, name)[good], value[good]), name
    assert not got.lse[[2, 4]].isfinite().any()
    assert got.token[[2, 4]].tolist() == [0, 0] and got.log_prob[[2, 4]].isnan().all()
    assert got.shaped_log_prob[[2, 4]].isnan().all()
    with pytest.raises(NonFinite, match="logits of row 2"):
        got.check()
    nothing = torch.full((150,), -torch.inf)
    assert scored(backend, hidden[:1], lm_head, TokenRequest(lse=True), bias=nothing).lse[0] == -torch.inf


@each(*ALL)
def test_a_row_does_not_depend_on_its_neighbours(backend):
    kinds = [*SETTLED, *OPEN, *FREE][:: 4 if backend.interpreted else 2]
    rows = len(kinds)
    hidden, lm_head = problem(rows, 400, 32, spread=3.0)
    together = scored(backend, hidden, lm_head, TokenRequest(sample=keyed(rows, kinds), entropy=True))
    again = scored(backend, hidden, lm_head, TokenRequest(sample=keyed(rows, kinds), entropy=True))
    for name, value in vars(together).items():
        assert value is None or torch.equal(value, getattr(again, name)), name
    for t in (1, rows - 2):
        alone = KeyedSampling(kinds[t], seed=[t], position=[7 * t])
        found = scored(backend, hidden[t : t + 1], lm_head, TokenRequest(sample=alone))
        assert found.token[0] == together.token[t]


@each(*ALL)
def test_huge_logits(backend):
    logits = torch.linspace(-1, 1, 200).expand(3, 200) * torch.tensor([1e4, 1e8, 1e30])[:, None]
    request = TokenRequest(sample=keyed(3, Sampling(top_p=0.9)), top_k=5, entropy=True)
    compare(backend, *given_logits(logits), request, tolerance=1e-4)


@each(*ALL)
def test_hidden_states_of_any_strides(backend):
    hidden, lm_head = problem(5, 100, 16, spread=3.0)
    apart = torch.stack([hidden, hidden], 2)[..., 0]
    request = TokenRequest(top_k=3)
    expected = compare(backend, hidden, lm_head, request).top_ids
    assert torch.equal(scored(backend, apart, lm_head, request).top_ids, expected)


# ---------------------------------------------------------------------- values


HEADS: list[dict[str, Any]] = [
    {},
    dict(scale=0.3),
    dict(scale=1.7, softcap=8.0),
    dict(scale=-0.7, softcap=3.0, bias=torch.linspace(-2, 2, 777)),
]


@pytest.mark.parametrize("head", HEADS, ids=",".join)
@each_of(("dtype",), WITH_FP64)
def test_equals_fp64(backend: Backend, dtype: torch.dtype, head: dict[str, Any]) -> None:
    rows, vocab, size = 9, 777, 130
    hidden, lm_head = problem(rows, vocab, size, dtype)
    z, off = exact_logits(hidden, lm_head, **head)
    counts = torch.tensor([0, 3, 0, 1, 700, 2, 0, 5, 0])
    ragged = RaggedIds(F.pad(counts.cumsum(0), (1, 0)).int(), torch.randint(vocab, (711,)).int())
    for top_k, select in zip(
        (1, 5, 64, 65, 300, 777, 10_000), [torch.randint(vocab, (5,)), ragged] * 3 + [None], strict=True
    ):
        targets = torch.randint(vocab, (rows,))
        request = TokenRequest(top_k=top_k, select=select, targets=targets, entropy=True)
        found = ops.score_tokens(hidden, lm_head, request, **head)
        agree(found, request, z, off)
        real = torch.float64 if dtype == torch.float64 else torch.float32
        assert found.lse.dtype == real


@each(*FAST)
def test_nothing_is_answered_that_was_not_asked_for(backend: Backend) -> None:
    hidden, lm_head = problem(3, 100, 8)
    z, off = exact_logits(hidden, lm_head)
    sample = KeyedSampling(Sampling(), [0, 1, 2], [0, 0, 0])
    cases: list[tuple[TokenRequest, set[str]]] = [
        (TokenRequest(), set()),
        (TokenRequest(lse=True), {"lse"}),
        (TokenRequest(entropy=True), {"lse", "entropy"}),
        (TokenRequest(top_k=3), {"lse", "top_ids", "top_log_probs"}),
        (TokenRequest(sample=sample), {"lse", "token", "log_prob", "shaped_log_prob"}),
        (TokenRequest(targets=torch.tensor([1, 2, 3])), {"lse", "target_log_probs"}),
        (TokenRequest(select=torch.tensor([7, 3])), {"selected_logits"}),
    ]
    for request, names in cases:
        found = ops.score_tokens(hidden, lm_head, request)
        for name in TokenScores.__annotations__:
            assert (name in found) == (name in names)
            if name not in names:
                with pytest.raises(AttributeError, match=f"{name} was not requested of these scores, only "):
                    getattr(found, name)
        if request.needs_vocabulary:
            agree(found, request, z, off)


@each(*FAST)
def test_select_alone_reads_no_other_row(backend: Backend) -> None:
    hidden, lm_head = problem(4, 100, 16)
    z, off = exact_logits(hidden, lm_head)
    some, ragged = torch.tensor([3, 90, 3]), RaggedIds(torch.tensor([0, 2, 2, 3, 5]), torch.tensor([90, 3, 17, 3, 90]))
    unread = torch.ones(100, dtype=torch.bool)
    unread[[3, 17, 90]] = False
    if backend.name != "reference":
        lm_head[unread] = torch.nan
    close(ops.score_tokens(hidden, lm_head, TokenRequest(select=some)).selected_logits, z[:, some], 2 * off)
    rows = torch.tensor([0, 0, 2, 3, 3])
    close(ops.score_tokens(hidden, lm_head, TokenRequest(select=ragged)).selected_logits, z[rows, ragged.ids], 2 * off)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each(*FAST)
def test_rewards_are_gathered_at_what_was_found(backend: Backend, dtype: torch.dtype) -> None:
    hidden, lm_head = problem(6, 300, 20, dtype)
    rewards = torch.randn(300, 20).to(dtype)
    sample = KeyedSampling(Sampling(), np.arange(6), np.zeros(6, int))
    found = ops.score_tokens(hidden, lm_head, TokenRequest(top_k=70, sample=sample, rewards=rewards))
    exact = hidden.double() @ rewards.double().T
    close(found.top_rewards, exact.gather(1, found.top_ids), 1e-4)
    close(found.token_reward, exact.gather(1, found.token[:, None])[:, 0], 1e-4)


@each(*FAST)
def test_rows_of_any_stride_and_address(backend: Backend) -> None:
    hidden, lm_head = problem(20, 333, 37)
    z, off = exact_logits(hidden, lm_head)
    sample = KeyedSampling([KINDS[i % len(KINDS)] for i in range(20)], np.arange(20), np.arange(20))
    request = TokenRequest(top_k=7, sample=sample, entropy=True)
    wide = torch.full((20, 50), torch.nan)
    wide[:, 3:40] = hidden
    for states, head in (
        (wide[:, 3:40], lm_head),
        (hidden.T.contiguous().T, lm_head),
        (off_alignment(hidden), off_alignment(lm_head)),
    ):
        found = ops.score_tokens(states, head, request)
        agree(found, request, z, off)
        assert samples_agree(found, sample, z, off).sum() > 15


@each(*FAST)
def test_no_rows(backend: Backend) -> None:
    hidden, lm_head = problem(0, 70, 8)
    request = TokenRequest(top_k=3, sample=KeyedSampling(Sampling(), [], []), entropy=True, select=torch.tensor([1]))
    found = ops.score_tokens(hidden, lm_head, request)
    assert found.top_ids.shape == (0, 3)
    assert found.token.shape == (0,)
    assert found.selected_log_probs.shape == (0, 1)


# ---------------------------------------------------------------------- any shape


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    vocab = draw(st.sampled_from([1, 2, 63, 64, 65, 1000, 1337]) | st.integers(1, 700))
    most = 120_000 // vocab
    rows = min(draw(st.sampled_from([1, 2, 3, 8, 17, 64, 65, 130, 1024])), max(1, most))
    return dict(
        rows=rows,
        vocab=vocab,
        size=draw(st.sampled_from([1, 2, 7, 33, 64, 129])),
        dtype=draw(st.sampled_from(FLOATS)),
        top_k=draw(st.sampled_from([0, 1, 2, 5, 64, 65, vocab - 1, vocab, vocab + 1])),
        seed=draw(st.integers(0, 10**6)),
        head=draw(st.sampled_from([{}, {"scale": 2.5}, {"softcap": 4.0}])),
        biased=draw(st.booleans()),
        edited=draw(st.booleans()),
        masked=draw(st.booleans()),
        misaligned=draw(st.booleans()),
    )


@each(*FAST)
@given(case=cases())
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(backend: Backend, case: dict[str, Any]) -> None:
    rows, vocab, rng = case["rows"], case["vocab"], np.random.default_rng(case["seed"])
    hidden, lm_head = problem(rows, vocab, case["size"], case["dtype"], case["seed"])
    if case["misaligned"]:
        lm_head = off_alignment(lm_head)
        hidden = torch.cat([hidden, torch.full_like(hidden, torch.nan)], dim=1)[:, : case["size"]]
    head = dict(case["head"])
    if case["biased"]:
        head["bias"] = torch.randn(vocab)
        head["bias"][torch.from_numpy(rng.integers(0, vocab, vocab // 3))] = -torch.inf
        head["bias"][int(rng.integers(vocab))] = 1.0
    edits = allowed = None
    if case["edited"]:
        texts = [rng.integers(0, vocab, rng.integers(0, 6)) for _ in range(rows)]
        edits = LogitEdits.penalties(
            texts, repetition=1.3, frequency=0.2, presence=0.1, bias={int(rng.integers(vocab)): 2.0}
        )
    if case["masked"]:
        bits = torch.from_numpy(rng.random((rows, vocab)) < 0.5)
        bits[::3] = False  # one token
        if "bias" in head:
            bits[:, int(head["bias"].argmax())] = True
        else:
            bits[torch.arange(rows), torch.from_numpy(rng.integers(0, vocab, rows))] = True
        allowed = words(bits)
    kinds = [KINDS[i] for i in rng.integers(0, len(KINDS), rows)]
    sample = KeyedSampling(kinds, rng.integers(0, 2**63, rows), rng.integers(0, 10**6, rows), edits, allowed)
    request = TokenRequest(
        top_k=max(case["top_k"], 0),
        sample=sample,
        targets=torch.from_numpy(rng.integers(0, vocab, rows)),
        entropy=True,
    )
    found = ops.score_tokens(hidden, lm_head, request, **head)
    z, off = exact_logits(hidden, lm_head, **head)
    agree(found, request, z, off)
    sure = samples_agree(found, sample, z, off)
    assert (~sure).sum() <= 1 + 0.05 * rows


# ---------------------------------------------------------------------- rows that cannot be answered


@each(*FAST)
def test_rows_that_are_not_finite_are_named(backend: Backend) -> None:
    """NaN, and an overflow to infinity; the other rows are not touched."""
    rows = 12
    hidden, lm_head = problem(rows, 200, 16)
    sample = KeyedSampling([KINDS[i % len(KINDS)] for i in range(rows)], np.arange(rows), np.arange(rows))
    request = TokenRequest(top_k=70, sample=sample, entropy=True)
    before = ops.score_tokens(hidden, lm_head, request)
    for bad in (torch.nan, torch.inf):
        for row in (0, 4, 10):
            broken = hidden.clone()
            broken[row, 3] = bad
            with pytest.raises(NonFinite, match=rf"logits of row {row} must be finite.* log-sum-exp of (nan|inf)"):
                ops.score_tokens(broken, lm_head, request)
            found = ops.score_tokens(broken, lm_head, request, check=False)
            others = torch.arange(rows) != row
            for name, value in vars(found).items():
                if value is not None:
                    close(value[others], getattr(before, name)[others].double(), 1e-5)
            assert not found.lse[row].isfinite()
            assert found.token[row] == 0
            assert found.log_prob[row].isnan()
    none = torch.full((200,), -torch.inf)
    with pytest.raises(NonFinite, match=r"logits of row 0 must be finite, or -inf but not all of them.*-inf"):
        ops.score_tokens(hidden, lm_head, request, bias=none)
    select = TokenRequest(select=torch.tensor([5, 7]))
    hidden[2] = torch.nan
    with pytest.raises(NonFinite, match=r"selected logits must be numbers, got NaN at \[2, 0\]"):
        ops.score_tokens(hidden, lm_head, select)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@each(*FAST)
def test_a_row_without_a_token_is_named(backend: Backend, kind: Sampling) -> None:
    rows, vocab = 5, 130
    hidden, lm_head = problem(rows, vocab, 16)
    seed, position = np.arange(rows), np.zeros(rows, int)
    bits = torch.ones(rows, vocab, dtype=torch.bool)
    bits[3] = False
    banned = LogitEdits([0, 0, 0, 0, vocab, vocab], np.arange(vocab), np.zeros(vocab, int), np.full(vocab, -np.inf))
    free = ops.score_tokens(hidden, lm_head, TokenRequest(sample=KeyedSampling(kind, seed, position))).token
    for changes in ({"allowed": words(bits)}, {"edits": banned}):
        sample = KeyedSampling(kind, seed, position, **changes)
        with pytest.raises(InvalidInput, match="row 3: no token is allowed, mask and edits leave none"):
            ops.score_tokens(hidden, lm_head, TokenRequest(sample=sample))
        found = ops.score_tokens(hidden, lm_head, TokenRequest(sample=sample), check=False)
        assert found.lse is not None and free is not None
        assert found.lse.isfinite().all() and found.token[3] == 0
        others = torch.arange(rows) != 3
        assert torch.equal(found.token[others], free[others])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@each(*FAST)
def test_one_token_allowed_is_the_one_sampled(backend: Backend, kind: Sampling) -> None:
    vocab = 200
    hidden, lm_head = problem(vocab, vocab, 8)
    allowed = words(torch.eye(vocab, dtype=torch.bool))
    sample = KeyedSampling(kind, np.arange(vocab), np.zeros(vocab, int), allowed=allowed)
    found = ops.score_tokens(hidden, lm_head, TokenRequest(sample=sample))
    assert torch.equal(found.token, torch.arange(vocab))
    assert torch.equal(found.shaped_log_prob, torch.zeros(vocab))
    z, off = exact_logits(hidden, lm_head)
    close(found.log_prob, z.log_softmax(dim=1).diagonal(), off)


@each(*FAST)
def test_huge_and_infinite_logits(backend: Backend) -> None:
    z = torch.randn(3, 150, generator=torch.Generator().manual_seed(0))
    z[0, 17], z[0, 70] = 1e30, 0.999e30
    z[1] *= 1e30
    z[2, 3:] = -3e38
    bias = torch.zeros(150)
    bias[[0, 5, 64, 149]] = -torch.inf
    hidden, lm_head = given_logits(z)
    for kind in (Sampling(), Sampling(0.5, top_k=3), Sampling(1.0, top_p=0.9), Sampling(2.0, min_p=0.5), Sampling(0.0)):
        sample = KeyedSampling(kind, [1, 2, 3], [0, 0, 0])
        request = TokenRequest(top_k=150, sample=sample, entropy=True)
        found = ops.score_tokens(hidden, lm_head, request, bias=bias)
        exact = z.double() + bias
        assert found.top_ids[0, 0] == 17 and found.top_ids[1, 0] == exact[1].argmax()
        assert set(found.top_ids[:, -4:].flatten().tolist()) == {0, 5, 64, 149}
        assert (found.top_log_probs[:, -4:] == -torch.inf).all() and (found.top_log_probs[:, :-4] > -torch.inf).all()
        assert found.token[:2].tolist() == found.top_ids[:2, 0].tolist() and found.token[2] in (1, 2)
        close(found.lse, exact.logsumexp(dim=1).float().double(), 1e-6)
        close(found.entropy, torch.special.entr(exact.softmax(dim=1)).sum(dim=1), 1e-6)


# ---------------------------------------------------------------------- sampling


def flat(vocab: int, temperature: float = 1.0) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) / temperature


@pytest.mark.parametrize("kind", [k for k in KINDS if k.temperature], ids=str)
@pytest.mark.parametrize("changes", [False, True], ids=["as they are", "edited and masked"])
@each(*FAST)
def test_samples_follow_the_distribution_of_transformers(backend: Backend, kind: Sampling, changes: bool) -> None:
    rows, vocab = 1500, 70
    z = 2 * flat(vocab)
    edits = allowed = None
    if changes:
        texts = [[3, 3, 50, 69, 0]] * rows
        edits = LogitEdits.penalties(texts, repetition=1.5, presence=0.5, frequency=0.3, bias={7: 3.0})
        allowed = words((torch.arange(vocab) % 3 > 0).expand(rows, -1))
    sample = KeyedSampling(kind, np.arange(rows), np.full(rows, 5), edits, allowed)
    found = ops.score_tokens(*same_logits(z, rows), TokenRequest(sample=sample))
    alone = KeyedSampling(
        kind,
        [0],
        [0],
        None if edits is None else LogitEdits([0, edits.indptr[1]], *(x[: edits.indptr[1]] for x in columns(edits))),
        None if allowed is None else allowed[:1],
    )
    expected = rows * shaped(z.double()[None], alone)[0].numpy()
    assert chi_square(np.bincount(found.token.numpy(), minlength=vocab).astype(float), expected) > 1e-4


def columns(edits: LogitEdits) -> tuple[np.ndarray, ...]:
    return edits.ids, edits.ops, edits.values


@pytest.mark.parametrize(
    "kind",
    [
        Sampling(),
        Sampling(1.0, top_p=0.9),
        Sampling(1.0, top_k=200),
        Sampling(1.0, top_k=2500, top_p=0.7),
        Sampling(1.0, min_p=0.01),
    ],
    ids=str,
)
@each(*FAST)
def test_samples_from_flat_distributions(backend: Backend, kind: Sampling) -> None:
    """Hundreds of tokens are left: more than any list of candidates holds."""
    rows, vocab = 1500, 3000
    z = flat(vocab)
    sample = KeyedSampling(kind, np.full(rows, 11), np.arange(rows))
    found = ops.score_tokens(*same_logits(z, rows), TokenRequest(sample=sample))
    p = shaped(z.double()[None], KeyedSampling(kind, [0], [0]))[0]
    close(found.shaped_log_prob, p.log()[found.token], 1e-5)
    assert spread(np.bincount(found.token.numpy(), minlength=vocab).astype(float), rows * p.numpy()) > 1e-4


@each(*FAST)
def test_rows_sampled_in_all_ways_at_once(backend: Backend) -> None:
    """Each row as an independent computation in fp64 samples it; so all backends sample the same."""
    for vocab, seed in ((50, 0), (777, 1), (2500, 2)):
        rows = 4 * len(KINDS)
        hidden, lm_head = problem(rows, vocab, 24, seed=seed)
        rng = np.random.default_rng(seed)
        edits = LogitEdits.penalties(
            [rng.integers(0, vocab, 9) for _ in range(rows)],
            prompt_lengths=[3] * rows,
            repetition=1.2,
            frequency=0.4,
            bias={0: 1.0, vocab - 1: -1.0},
        )
        allowed = words(torch.from_numpy(rng.random((rows, vocab)) < 0.9))
        kinds = [KINDS[i % len(KINDS)] for i in range(rows)]
        z, off = exact_logits(hidden, lm_head)
        for changes in ((None, None), (edits, None), (None, allowed), (edits, allowed)):
            sample = KeyedSampling(kinds, rng.integers(0, 2**63, rows), rng.integers(0, 100, rows), *changes)
            found = ops.score_tokens(hidden, lm_head, TokenRequest(sample=sample))
            sure = samples_agree(found, sample, z, off)
            assert sure.double().mean() > 0.9


@each(*FAST)
def test_a_row_samples_the_same_alone_and_among_256_others(backend: Backend) -> None:
    rows, vocab = 257, 500
    hidden, lm_head = problem(rows, vocab, 16)
    kinds = [KINDS[i % len(KINDS)] for i in range(rows)]
    seed, position = np.arange(rows) * 7, np.arange(rows) % 13
    among = ops.score_tokens(hidden, lm_head, TokenRequest(sample=KeyedSampling(kinds, seed, position)))
    z, off = exact_logits(hidden, lm_head)
    clear = samples_agree(among, KeyedSampling(kinds, seed, position), z, off)
    checked = [*range(0, rows, 16), *range(len(KINDS))]
    for row in checked:
        at = slice(row, row + 1)
        sample = KeyedSampling(kinds[row], seed[at], position[at])
        alone = ops.score_tokens(hidden[at], lm_head, TokenRequest(sample=sample))
        assert among.token is not None and alone.token is not None
        assert alone.token[0] == among.token[row] or not clear[row]
    assert clear[checked].double().mean() > 0.9


@each(*FAST)
def test_samples_are_independent_over_seeds_and_positions(backend: Backend) -> None:
    """Two tokens of two tiles, equally likely; and two of one tile."""
    n = 100
    seeds, positions = (x.reshape(-1) for x in np.meshgrid(np.arange(n), np.arange(n), indexing="ij"))
    for pair in ((0, 64), (3, 40)):
        z = torch.full((65,), -1e30)
        z[list(pair)] = 0
        request = TokenRequest(sample=KeyedSampling(Sampling(), seeds, positions))
        found = ops.score_tokens(*same_logits(z, n * n), request)
        assert set(found.token.tolist()) == set(pair)
        first = (found.token.numpy() == pair[0]).reshape(n, n)
        assert stats.binomtest(int(first.sum()), n * n).pvalue > 1e-4
        for a, b in ((first[:-1], first[1:]), (first[:, :-1], first[:, 1:]), (first[:-1, 1:], first[1:, :-1])):
            assert stats.chisquare(np.bincount((2 * a + b).reshape(-1), minlength=4)).pvalue > 1e-4
        for table in (first, first.T):  # whole rows: the largest of 4,950 correlations
            assert np.abs(np.corrcoef(table)[np.triu_indices(n, 1)]).max() < 6 / math.sqrt(n)
        again = ops.score_tokens(*same_logits(z, n * n), request)
        assert torch.equal(found.token, again.token)


@each(*FAST)
def test_ties_with_a_threshold_stay(backend: Backend) -> None:
    """Also those that no list of candidates holds: 100 equal tokens."""
    z = torch.cat([torch.tensor([2.0]), torch.ones(100), torch.zeros(20)])
    rows = 1000
    for kind in (Sampling(1.0, top_k=2), Sampling(1.0, top_k=80), Sampling(1.0, min_p=0.36), Sampling(1.0, top_p=0.5)):
        found = ops.score_tokens(
            *same_logits(z, rows), TokenRequest(sample=KeyedSampling(kind, np.arange(rows), np.zeros(rows, int)))
        )
        expected = z[:101].double().softmax(dim=0)
        close(found.shaped_log_prob, expected.log()[found.token], 1e-5)
        observed = np.bincount(found.token.numpy(), minlength=101).astype(float)
        assert len(observed) == 101 and chi_square(observed, rows * expected.numpy()) > 1e-4


@each(*FAST)
def test_equal_logits_come_in_the_order_of_their_ids(backend: Backend) -> None:
    z = torch.zeros(2, 300)
    z[0, [5, 70, 299]] = 1.0
    z[1, 200:] = -0.0
    found = ops.score_tokens(*given_logits(z), TokenRequest(top_k=100))
    assert found.top_ids[0].tolist() == [5, 70, 299, *[i for i in range(100) if i not in (5, 70)][:97]]
    assert found.top_ids[1].tolist() == list(range(100))


@pytest.mark.parametrize("temperature", [1e-3, 1e-4, 1e-6, 1e-20, 0.0])
@each(*FAST)
def test_low_temperatures_come_to_the_most_likely_token(backend: Backend, temperature: float) -> None:
    z = torch.tensor([[5.0, 90.0, 70.0, 0.0], [-3e4, -2e4, -4e4, -3e38]])
    for kind in (Sampling(temperature), Sampling(temperature, top_p=0.9), Sampling(temperature, top_k=2)):
        for seed in range(20):
            sample = KeyedSampling(kind, [seed, seed], [0, 1])
            found = ops.score_tokens(*given_logits(z), TokenRequest(sample=sample))
            assert found.token.tolist() == [1, 1]
            close(found.shaped_log_prob, torch.zeros(2).double(), 0)


@each(*FAST)
def test_temperature_zero_is_the_first_of_the_most_likely_after_edits_and_mask(backend: Backend) -> None:
    z = torch.zeros(3, 200)
    z[0, [190, 100]] = 3.0
    z[1, [150, 20]] = 5.0
    edits = LogitEdits([0, 0, 2, 3], [20, 20, 7], [0, 0, 0], [-1.0, -1.0, 0.5])
    bits = torch.ones(3, 200, dtype=torch.bool)
    bits[0, 100] = False
    greedy, mixed = Sampling(0.0, top_k=3, top_p=0.5, min_p=0.3), [Sampling(0.0), Sampling(0.0), Sampling(1.0, top_k=1)]
    for kind in (greedy, mixed):
        sample = KeyedSampling(kind, [1, 2, 3], [0, 0, 0], edits, words(bits))
        found = ops.score_tokens(*given_logits(z), TokenRequest(sample=sample))
        assert found.token.tolist() == [190, 150, 7]
        close(found.log_prob, z.double().log_softmax(dim=1)[[0, 1, 2], found.token], 1e-5)
        close(found.shaped_log_prob, torch.zeros(3).double(), 0)


# ---------------------------------------------------------------------- edits


@pytest.mark.parametrize("repetition", [1.0, 1.3, 0.7])
@pytest.mark.parametrize("frequency", [0.0, 0.4])
@pytest.mark.parametrize("presence", [0.0, -0.6])
@pytest.mark.parametrize("biased", [False, True])
@each(*FAST)
def test_penalties_change_the_logits_of_every_token_as_a_loop_does(
    backend: Backend, repetition: float, frequency: float, presence: float, biased: bool
) -> None:
    rng = np.random.default_rng(3)
    rows, vocab = 6, 90
    z = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1))
    texts = [rng.integers(0, 20, n).tolist() for n in (0, 1, 5, 40, 12, 7)]
    prompts = [0, 1, 2, 15, 0, 7]
    bias = {4: 2.0, 11: -1.0, 89: -np.inf} if biased else None
    edits = LogitEdits.penalties(
        texts, prompt_lengths=prompts, repetition=repetition, frequency=frequency, presence=presence, bias=bias
    )
    expected = z.double()
    for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        if text:
            penalty = RepetitionPenaltyLogitsProcessor(penalty=repetition)
            expected[row] = penalty(torch.tensor([text]), expected[row : row + 1])[0]
        for token in text[prompt:]:
            expected[row, token] -= frequency
        for token in set(text[prompt:]):
            expected[row, token] -= presence
        for token, value in (bias or {}).items():
            expected[row, token] += value
    # every token in turn is the only one allowed but for one that is not edited: their odds tell its logit
    anchor, other = 60, torch.arange(20).repeat(rows)
    row = torch.arange(rows).repeat_interleave(20)
    spans = [slice(edits.indptr[r], edits.indptr[r + 1]) for r in row]
    repeated = LogitEdits(
        np.cumsum([0, *(s.stop - s.start for s in spans)]),
        *(np.concatenate([x[s] for s in spans]) for x in columns(edits)),
    )
    bits = torch.zeros(len(row), vocab, dtype=torch.bool)
    bits[torch.arange(len(row)), other] = True
    bits[:, anchor] = True
    sample = KeyedSampling(Sampling(), np.arange(len(row)), np.zeros(len(row), int), repeated, words(bits))
    found = ops.score_tokens(*given_logits(z[row]), TokenRequest(sample=sample))
    pair = torch.stack([expected[row, other], expected[row, anchor]], dim=1).log_softmax(dim=1)
    close(found.shaped_log_prob, pair[torch.arange(len(row)), (found.token == anchor).long()], 1e-5)
    greedy = KeyedSampling(Sampling(0.0), np.arange(rows), np.zeros(rows, int), edits)
    best = ops.score_tokens(*given_logits(z), TokenRequest(sample=greedy)).token
    assert best is not None and torch.equal(best, expected.argmax(dim=1))


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (([0, 2], [3, 1], [0, 0], [1, 1]), "ids of edits must ascend within a row, those of row 0 do not"),
        (([0, 1], [3], [2], [1]), r"ops of edits must be 0 \(add\) or 1 \(repetition\), got .*2"),
        (([0, 1], [3], [0], [math.nan]), "values of edits must be numbers below infinity"),
        (([0, 1], [3], [0], [math.inf]), "values of edits must be numbers below infinity"),
        (([0, 1], [3], [1], [0]), "those of repetitions above 0"),
        (([0, 1], [3, 4], [0], [1]), "one length, got 2, 1 and 1"),
        (([0, 2], [3], [0], [1]), r"indptr of edits must rise from 0 to 1, got \[0, 2\]"),
        (([1, 1], [3], [0], [1]), r"indptr of edits must rise from 0 to 1, got \[1, 1\]"),
        (([0, 1, 0, 1], [3], [0], [1]), r"indptr of edits must rise from 0 to 1, got \[0, 1, 0, 1\]"),
        (([0, 1], [2**32 + 3], [0], [1]), "ids of edits must be 1-D integers from 0 to 2147483647, got 4294967299"),
        (([0, 1], [-1], [0], [1]), "ids of edits must be 1-D integers from 0"),
        (([0, 1], [3.7], [0], [1]), "ids of edits must be 1-D integers from 0 to 2147483647, got 3.7"),
        (([0, 1], np.array([3.0]), [0], [1]), "ids of edits must be 1-D integers"),
        (([0, 1], [True], [0], [1]), "ids of edits must be 1-D integers"),
        (([0, 2], [True, 3], [0, 0], [1, 1]), "ids of edits must be 1-D integers .* got True at index 0"),
        (([0, 1], [10**5000], [0], [1]), "ids of edits must be 1-D integers .* got a value of type int"),
        (([0, 2], [[1], [2, 3]], [0, 0], [1, 1]), "ids of edits must be 1-D integers"),
        (([0, 2], [1, 3], [0, 0], [[1], [2, 3]]), "values of edits must be numbers, got"),
        (([0, 2**32 + 1], [3], [0], [1]), "indptr of edits must be 1-D integers from 0"),
        (([0, 1], [3], [0.0], [1]), "ops of edits must be 1-D integers"),
        (([0, 1], [3], [0], ["1"]), "values of edits must be numbers, got"),
        (([0, 1], [3], [0], [True]), "values of edits must be numbers, got"),
    ],
)
def test_bad_edits_are_refused(edits: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        LogitEdits(*edits)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(prompt_lengths=[0, -1]), "prompt length of text 1 must be an integer from 0 to 2, got -1"),
        (dict(prompt_lengths=[4, 0]), "prompt length of text 0 must be an integer from 0 to 3, got 4"),
        (dict(prompt_lengths=[1.0, 0]), "prompt length of text 0 must be an integer"),
        (dict(prompt_lengths=[1]), "one for each of 2 texts, got 1"),
        (dict(texts=[[1, 2.5], [3]]), "text 0 must be 1-D integers from 0 to 2147483647, got 2.5 at index 1"),
        (dict(texts=[[1, 2], [2**31]]), "text 1 must be 1-D integers from 0 to 2147483647, got 2147483648"),
        (dict(repetition=0.0), "repetition must be finite and above 0, got 0.0"),
        (dict(frequency="1"), "frequency must be finite, got '1'"),
        (dict(presence=math.nan), "presence must be finite, got nan"),
        (dict(bias={2.5: 1.0}), "tokens of bias must be 1-D integers"),
        (dict(bias={"a": 1.0}), "tokens of bias must be 1-D integers"),
        (dict(bias={1: "0.5"}), "values of bias must be numbers"),
        (dict(bias={1: None}), "values of bias must be numbers"),
    ],
)
def test_bad_penalties_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        LogitEdits.penalties(**{"texts": [[1, 2, 3], [4, 5]], "frequency": 0.5, **wrong})


# ---------------------------------------------------------------------- arguments


def asked(**parts: Any) -> dict[str, Any]:
    return {"request": TokenRequest(**parts)}


def sampling(**parts: Any) -> dict[str, Any]:
    return asked(sample=KeyedSampling(**{"sampling": Sampling(), "seed": [1, 2], "position": [0, 0], **parts}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4)}, r"hidden must be floating-point \[T, H\] .* got torch.float32 \[4\]"),
        ({"hidden": torch.zeros(2, 4, dtype=torch.int32)}, r"hidden must be floating-point .* got torch.int32"),
        ({"hidden": torch.zeros(2, 0)}, r"H at least 1, got torch.float32 \[2, 0\]"),
        ({"lm_head": torch.zeros(0, 4)}, r"lm_head must be \[V, 4\] with V at least 1, got \[0, 4\]"),
        ({"lm_head": torch.zeros(40, 5)}, r"lm_head must be .*\[40, 4\].* got .*\[40, 5\]"),
        ({"lm_head": torch.zeros(40, 4).half()}, r"lm_head must be torch.float32 .* got torch.float16"),
        ({"lm_head": torch.zeros(4, 40).T}, r"lm_head must be contiguous, got strides \(1, 40\)"),
        ({"bias": torch.zeros(41)}, r"bias must be .*\[40\].* got .*\[41\]"),
        ({"scale": 0.0}, "scale must be finite and not 0, got 0.0"),
        ({"scale": math.nan}, "scale must be finite and not 0, got nan"),
        ({"softcap": 0.0}, "softcap must be finite and above 0, got 0.0"),
        ({"softcap": math.inf}, "softcap must be finite and above 0, got inf"),
        (asked(top_k=-1), "top_k must be an integer of at least 0, got -1"),
        (asked(top_k=2.0), "top_k must be an integer of at least 0, got 2.0"),
        (asked(targets=torch.zeros(3).long()), r"targets must be .*\[2\].* got .*\[3\]"),
        (asked(targets=torch.zeros(2)), r"targets must be int32 or int64 .* got torch.float32"),
        (asked(targets=torch.tensor([0, 40])), r"targets must be in \[0, 40\), got 0 to 40"),
        (asked(select=torch.tensor([-1, 3])), r"select must be in \[0, 40\), got -1 to 3"),
        (asked(select=torch.zeros(2, 2).long()), r"select must be .*\[4\].* got .*\[2, 2\]"),
        (
            asked(select=RaggedIds(torch.tensor([0, 1]), torch.tensor([3]))),
            r"indptr of select must be .*\[3\].* got .*\[2\]",
        ),
        (
            asked(select=RaggedIds(torch.tensor([0, 2, 1]), torch.tensor([3]))),
            r"indptr of select must rise from 0 to 1, got \[0, 2, 1\]",
        ),
        (
            asked(select=RaggedIds(torch.tensor([0, 0, 1]), torch.tensor([40]))),
            r"ids of select must be in \[0, 40\), got 40 to 40",
        ),
        (asked(top_k=1, rewards=torch.zeros(40, 5)), r"rewards must be .*\[40, 4\].* got .*\[40, 5\]"),
        (asked(rewards=torch.zeros(40, 4)), "rewards are gathered at tokens: expected top_k or sample with them"),
        (sampling(seed=[1, 2, 3], position=[0, 0, 0]), "seed and position must be one a row, 2, got 3"),
        (sampling(sampling=[Sampling()]), "sampling must be one, or one for each of 2 rows, got 1"),
        (sampling(edits=LogitEdits([0, 0], [], [], [])), r"indptr of edits must be \[3\], got \[2\]"),
        (sampling(edits=LogitEdits([0, 1, 1], [40], [0], [1])), r"ids of edits must be in \[0, 40\), got 40 to 40"),
        (
            sampling(allowed=torch.zeros(2, 1, dtype=torch.int32)),
            r"allowed must be int32 \[2, 2\], got torch.int32 \[2, 1\]",
        ),
        (sampling(allowed=torch.zeros(2, 2).long()), r"allowed must be int32 \[2, 2\], got torch.int64 \[2, 2\]"),
    ],
)
def test_bad_arguments_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    arguments = {
        "hidden": torch.zeros(2, 4),
        "lm_head": torch.zeros(40, 4),
        "request": TokenRequest(lse=True),
        "bias": None,
        "scale": 1.0,
        "softcap": None,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        ops.score_tokens(**arguments)


# ---------------------------------------------------------------------- as torch sees it


def registered(hidden: Tensor, lm_head: Tensor, request: TokenRequest) -> tuple[Any, ...]:
    """Arguments of the registered operation."""
    return hidden, lm_head, None, 1.0, None, *VocabPass.of(request, hidden, lm_head.shape[0])


def requests(rows: int, vocab: int) -> list[TokenRequest]:
    edits = LogitEdits.penalties([[1, 2]] * rows, repetition=1.2, presence=0.1)
    allowed = words(torch.ones(rows, vocab, dtype=torch.bool))
    every = KeyedSampling(Sampling(1.0, top_k=5), np.arange(rows), np.zeros(rows, int), edits, allowed)
    return [
        TokenRequest(lse=True),
        TokenRequest(top_k=5, entropy=True),
        TokenRequest(top_k=5, sample=KeyedSampling(Sampling(), np.arange(rows), np.zeros(rows, int))),
        TokenRequest(top_k=0, sample=every, entropy=True),
    ]


@each(*FAST[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration_is_sound(backend: Backend, dtype: torch.dtype) -> None:
    hidden, lm_head = problem(3, 50, 8, dtype)
    for request in requests(3, 50):
        opcheck(torch.ops.forktree.score_tokens.default, registered(hidden, lm_head, request))


def test_shapes_are_known_without_values() -> None:
    for request in requests(3, 50):
        hidden, lm_head = problem(3, 50, 8)
        expected = torch.ops.forktree.score_tokens.default(*registered(hidden, lm_head, request))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            hidden, lm_head = mode.from_tensor(hidden), mode.from_tensor(lm_head)
            found = torch.ops.forktree.score_tokens.default(*registered(hidden, lm_head, request))
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]


@each(*FAST[1:])
def test_compiles_into_one_graph(backend: Backend) -> None:
    hidden, lm_head = problem(4, 300, 16)
    sample = KeyedSampling(Sampling(1.0, top_p=0.9), np.arange(4), np.zeros(4, int))
    request = TokenRequest(top_k=5, sample=sample, entropy=True)
    wanted = VocabPass.of(request, hidden, 300)

    def step(states: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        found = torch.ops.forktree.score_tokens.default(states * 2, weight, None, 1.0, None, *wanted)
        return found[0] + 1, *found[1:]

    for found, expected in zip(
        torch.compile(step, fullgraph=True)(hidden, lm_head), step(hidden, lm_head), strict=True
    ):
        torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------------- the torch backend alone


class Live(TorchDispatchMode):
    """The most bytes of tensors made within that were there at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = func(*args, **kwargs)
        for x in tree_leaves(made):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in given | self.known:
                storage = x.untyped_storage()
                self.known.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, id(storage), storage.nbytes())
        self.most = max(self.most, self.now)
        return made

    def gone(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size


@pytest.mark.parametrize(
    ("rows", "dtype", "kind"),
    [
        (16, torch.bfloat16, Sampling(1.0, top_p=0.95)),
        (16, torch.float32, Sampling(0.8)),
        (64, torch.bfloat16, Sampling(0.8, top_k=40)),
    ],
    ids=str,
)
def test_scratch_is_a_twentieth_of_the_logits(
    rows: int, dtype: torch.dtype, kind: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORKTREE_BACKEND", "torch")
    vocab = 151_936
    hidden, lm_head = problem(rows, vocab, 4, dtype)
    request = TokenRequest(top_k=64, sample=KeyedSampling(kind, np.arange(rows), np.arange(rows)), entropy=True)
    with Live() as live:
        ops.score_tokens(hidden, lm_head, request)
    assert live.most < 0.05 * rows * vocab * 4


@pytest.mark.parametrize(
    ("rows", "vocab", "size", "top_k", "dtype"),
    [
        (1, 300_000, 4, 64, torch.float32),
        (1024, 1500, 64, 64, torch.float64),
        (1024, 1100, 4, 1024, torch.bfloat16),
        (3, 120_000, 2, 120_000, torch.float32),
        (2, 200, 9000, 5, torch.bfloat16),
    ],
)
def test_scratch_stays_below_16_mb(
    rows: int, vocab: int, size: int, top_k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the answer itself."""
    monkeypatch.setenv("FORKTREE_BACKEND", "torch")
    hidden, lm_head = problem(rows, vocab, size, dtype)
    kinds = [Sampling(3.0, top_p=0.9), Sampling(1.0, top_k=30), Sampling()]
    sample = KeyedSampling([kinds[i % 3] for i in range(rows)], np.arange(rows), np.arange(rows))
    with Live() as live:
        found = ops.score_tokens(hidden, lm_head, TokenRequest(top_k=top_k, sample=sample))
    answer = found.top_ids.nbytes + 2 * found.top_log_probs.nbytes  # the logits before the log-probs
    assert live.most - answer < 16e6


def test_nothing_is_read_back() -> None:
    """Tensors without values are answered as well: the host never looks at them."""
    hidden, lm_head = torch.empty(5, 8, device="meta"), torch.empty(300, 8, device="meta")
    allowed = torch.empty(5, 10, dtype=torch.int32, device="meta")
    sample = KeyedSampling([Sampling(0.0), *[Sampling(0.7)] * 4], np.arange(5), np.arange(5), allowed=allowed)
    request = TokenRequest(top_k=70, sample=sample, entropy=True, targets=torch.empty(5, device="meta").long())
    found = ops.score_tokens(hidden, lm_head, request, check=False)
    assert (found.token.shape, found.token.dtype) == ((5,), torch.long)
    assert found.top_ids.shape == (5, 70)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_logits_that_are_there_already(dtype: torch.dtype) -> None:
    rows, vocab = 30, 700
    hidden, lm_head = problem(rows, vocab, 16, dtype)
    own = F.linear(hidden, lm_head)
    rewards = torch.randn(vocab, 16).to(dtype)
    sample = KeyedSampling([KINDS[i % len(KINDS)] for i in range(rows)], np.arange(rows), np.arange(rows))
    ragged = RaggedIds(torch.arange(rows + 1), torch.arange(rows) * 3)
    before = own.clone()
    for select in (torch.tensor([5, 1, 600]), ragged):
        request = TokenRequest(
            top_k=70,
            sample=sample,
            select=select,
            targets=torch.arange(rows),
            entropy=True,
            rewards=rewards,
        )
        found = ops.score_logits(own, request, hidden)
        off = 1e-13 if dtype == torch.float64 else 1e-5
        agree(found, request, own.double(), off)
        samples_agree(found, sample, own.double(), off)
        every = hidden.double() @ rewards.double().T
        close(found.token_reward, every.gather(1, found.token[:, None])[:, 0], 1e-4)
    assert torch.equal(own, before)
    with pytest.raises(ValueError, match=r"logits must be floating-point \[30, V\] .* got .*\[29, 700\]"):
        ops.score_logits(own[1:], request, hidden)
    with pytest.raises(ValueError, match=r"targets must be in \[0, 20\), got 0 to 29"):
        ops.score_logits(own[:, :20], TokenRequest(targets=torch.arange(rows)), hidden)
