"""Drawing tokens: the distribution is that of transformers' own warpers, and every draw is keyed."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import tiny
from distributions import by_transformers, chi_square
from forktree import BestOfN, InvalidInput, Sample, Sampling, TextScorer
from forktree.sampling import choose, draw, shaped_logits, uniforms

SETTINGS = [
    Sampling(),
    Sampling(0.5),
    Sampling(2.0),
    Sampling(1.0, top_k=3),
    Sampling(1.0, top_k=1),
    Sampling(1.0, top_k=99),
    Sampling(1.0, top_p=0.7),
    Sampling(1.0, top_p=1e-6),
    Sampling(1.0, min_p=0.2),
    Sampling(0.7, top_k=6, top_p=0.8),
    Sampling(1.5, top_p=0.9, min_p=0.15),
    Sampling(0.8, top_k=7, top_p=0.95, min_p=0.05),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_shaped_distribution_is_that_of_transformers(sampling: Sampling) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(200, 17)
    ours = shaped_logits(logits, sampling).softmax(dim=-1)
    theirs = by_transformers(logits, sampling)
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_draws_follow_the_shaped_distribution(sampling: Sampling) -> None:
    torch.manual_seed(1)
    logits = 2 * torch.randn(1, 12)
    n = 20_000
    uniform = uniforms(np.arange(n, dtype=np.uint64), np.full(n, 7))
    tokens = draw(logits.expand(n, -1), sampling, torch.from_numpy(uniform))
    expected = n * by_transformers(logits, sampling)[0].double().numpy()
    expected *= n / expected.sum()
    assert chi_square(np.bincount(tokens.numpy(), minlength=12).astype(float), expected) > 1e-4


def test_tied_logits_are_kept_or_dropped_together_as_transformers_does() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    for sampling in (Sampling(top_k=2), Sampling(top_k=3), Sampling(min_p=math.exp(-1.0) * 0.999)):
        ours = shaped_logits(logits, sampling).softmax(dim=-1)
        torch.testing.assert_close(ours, by_transformers(logits, sampling))
        assert (ours > 0).sum() == 4


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-37])
def test_low_temperatures_come_to_the_most_likely_token(temperature: float) -> None:
    """Dividing by them would overflow fp32; the first and second logits differ by enough to leave no choice."""
    logits = torch.tensor([[5.0, 90.0, 70.0], [-3e4, -2e4, -4e4]])
    uniform = torch.tensor([0.999999, 1e-9], dtype=torch.float64)
    assert draw(logits, Sampling(temperature), uniform).tolist() == [1, 1]


def test_temperature_zero_is_argmax_whatever_the_uniform() -> None:
    torch.manual_seed(2)
    logits = torch.randn(50, 9)
    for u in (0.0, 0.5, 1 - 2.0**-53):
        uniform = torch.full((50,), u, dtype=torch.float64)
        assert torch.equal(draw(logits, Sampling(0.0), uniform), logits.argmax(dim=-1))


def test_extreme_uniforms_draw_no_excluded_token() -> None:
    """0 and the largest number below 1 fall on the first and the last token that is kept."""
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, 0.0, -torch.inf]])
    assert draw(logits, Sampling(), torch.tensor([0.0], dtype=torch.float64)).item() == 1
    assert draw(logits, Sampling(), torch.tensor([1 - 2.0**-53], dtype=torch.float64)).item() == 3


def test_rows_drawn_in_different_ways_are_those_drawn_one_by_one() -> None:
    torch.manual_seed(3)
    logits = 3 * torch.randn(40, 17)
    uniform = torch.rand(40, dtype=torch.float64)
    kinds = [Sampling(0.0), *SETTINGS]
    sampling = [kinds[i // 2 * 7 % len(kinds)] for i in range(40)]  # neighbours come in pairs
    tokens, log_probs = choose(logits, sampling, uniform)
    for i, kind in enumerate(sampling):
        assert tokens[i] == draw(logits[i : i + 1], kind, uniform[i : i + 1])
    exact = logits.double().log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(log_probs, exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(0.0), *SETTINGS], ids=str)
def test_rows_that_are_not_finite_draw_some_token_and_say_so(bad: float, sampling: Sampling) -> None:
    torch.manual_seed(4)
    logits = torch.randn(3, 11)
    logits[1, 5] = bad
    tokens, log_probs = choose(logits, [sampling] * 3, torch.full((3,), 0.5, dtype=torch.float64))
    assert log_probs.isfinite().tolist() == [True, False, True]
    assert tokens.min() >= 0 and tokens.max() < 11


def test_drawing_reads_nothing_back() -> None:
    """Tensors without values draw as well: the host never looks at them."""
    kinds = [Sampling(0.0), *SETTINGS]
    logits = torch.empty(2 * len(kinds), 31, device="meta")
    uniform = torch.empty(len(logits), dtype=torch.float64, device="meta")
    tokens, log_probs = choose(logits, kinds * 2, uniform)
    assert (tokens.shape, tokens.dtype) == (uniform.shape, torch.long)
    assert (log_probs.shape, log_probs.dtype) == (uniform.shape, torch.float64)


def test_uniforms_are_uniform_and_independent_over_keys_and_positions() -> None:
    keys = np.arange(300, dtype=np.uint64)
    grid = np.array([uniforms(keys, np.full(300, p)) for p in range(300)])  # [position, key]
    assert (grid >= 0).all() and (grid < 1).all()
    counts = np.bincount((grid.ravel() * 64).astype(int), minlength=64)
    assert stats.chisquare(counts).pvalue > 1e-4
    # neighbours in either direction, and along the diagonal: cells of the unit square are equally full
    for first, second in ((grid[:-1], grid[1:]), (grid[:, :-1], grid[:, 1:]), (grid[:-1, 1:], grid[1:, :-1])):
        cells = np.bincount((np.floor(first * 16) * 16 + np.floor(second * 16)).astype(int).ravel(), minlength=256)
        assert stats.chisquare(cells).pvalue > 1e-4
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 4 / math.sqrt(first.size)
    # rows and columns as wholes: the largest of 2 * 44,850 correlations stays within what chance allows
    for table in (grid, grid.T):
        correlations = np.corrcoef(table)[np.triu_indices(300, 1)]
        assert np.abs(correlations).max() < 5.5 / math.sqrt(300)
    assert np.array_equal(grid[5], uniforms(keys, np.full(300, 5)))


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("temperature", -0.1, "at least 0"),
        ("temperature", math.nan, "finite"),
        ("temperature", math.inf, "finite"),
        ("top_k", -1, "at least 0"),
        ("top_p", 0.0, "(0, 1]"),
        ("top_p", 1.01, "(0, 1]"),
        ("top_p", math.nan, "(0, 1]"),
        ("min_p", -0.01, "[0, 1]"),
        ("min_p", 1.01, "[0, 1]"),
    ],
)
def test_bad_settings_name_expectation_and_value(setting: str, value: float, expected: str) -> None:
    for make in (Sampling, Sample, lambda **kw: BestOfN(scorer=TextScorer(lambda p, r: 0.0), **kw)):
        with pytest.raises(InvalidInput) as error:
            make(**{setting: value})
        assert setting in str(error.value) and expected in str(error.value) and str(value) in str(error.value)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), Sampling(1.3, top_k=3), Sampling(1.0, top_p=0.8)])
def test_whole_sequences_follow_the_models_own_probabilities(sampling: Sampling) -> None:
    """Frequencies of three-token texts against exact enumeration with transformers' logits and warpers."""
    model, prompt, n = tiny.model(vocab=5, spread=0.5, eos=None), (1, 3, 2), 6000
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        expected = {
            (*seen, token): p * float(q)
            for seen, p in expected.items()
            for token, q in enumerate(by_transformers(tiny.next_log_probs(model, [*prompt, *seen])[None], sampling)[0])
        }
    from forktree import Decoder

    search = Sample(
        num_return_sequences=n, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
    )
    decoder = Decoder(model, num_slots=32768)
    result = decoder.search([list(prompt)], search, max_new_tokens=3, seed=5)[0]
    cells = {seen: i for i, seen in enumerate(expected)}
    observed = np.zeros(len(cells))
    for candidate in result.candidates:
        observed[cells[tuple(candidate.token_ids)]] += 1
    exact = n * np.array(list(expected.values()))
    assert chi_square(observed, exact * n / exact.sum()) > 1e-4
