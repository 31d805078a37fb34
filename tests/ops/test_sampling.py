"""Sampling tokens: whole texts follow transformers' own logits and warpers, and every token has its key.

How one token is sampled is tested in `test_score_tokens.py`.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import tiny
from distributions import by_transformers, chi_square
from forktree import BestOfN, Decoder, FunctionReward, InvalidInput, KeyedSampling, Sample, Sampling, TokenRequest, ops
from forktree.ops.sampling import noise


@pytest.mark.parametrize("number", [0, 1], ids=["exponential", "uniform"])
def test_noise_is_uniform_and_independent_over_seeds_positions_and_tiles(number: int) -> None:
    seeds = np.arange(300)
    keyed = (KeyedSampling(Sampling(), seed=seeds, position=np.full(300, p)) for p in seeds)
    keys = [torch.from_numpy(each.keys.view("int64")) for each in keyed]
    by_position = torch.stack([noise(k, 8)[number][:, 7] for k in keys])
    by_tile = noise(keys[5], 300)[number].T
    for sampled in (by_position, by_tile):  # [position or tile, seed]
        grid = (-torch.expm1(-sampled) if number == 0 else sampled).numpy()
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


def test_the_two_numbers_of_a_tile_are_independent() -> None:
    keys = KeyedSampling(Sampling(), seed=np.arange(1000), position=np.zeros(1000, int)).keys.view("int64")
    exponential, u = noise(torch.from_numpy(keys), 90)
    v = -torch.expm1(-exponential)
    cells = np.bincount((torch.floor(v * 16) * 16 + torch.floor(u * 16)).long().flatten().numpy(), minlength=256)
    assert stats.chisquare(cells).pvalue > 1e-4


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
        ("temperature", "0.5", "finite"),
        ("temperature", True, "finite"),
        ("temperature", None, "finite"),
        ("top_k", 2.5, "an integer of at least 0"),
        ("top_k", 2.0, "an integer of at least 0"),
        ("top_k", True, "an integer of at least 0"),
        ("top_k", np.bool_(True), "an integer of at least 0"),
        ("top_k", "5", "an integer of at least 0"),
        ("top_p", "0.5", "(0, 1]"),
        ("top_p", True, "(0, 1]"),
        ("min_p", [0.1], "[0, 1]"),
    ],
)
def test_bad_settings_name_expectation_and_value(setting: str, value: Any, expected: str) -> None:
    for make in (Sampling, Sample, lambda **kw: BestOfN(reward=FunctionReward(lambda p, r: 0.0), **kw)):
        with pytest.raises(InvalidInput) as error:
            make(**{setting: value})
        assert setting in str(error.value) and expected in str(error.value) and str(value) in str(error.value)


def test_numbers_of_numpy_are_numbers() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(4, 50)))
    plain, own = (
        Sampling(0.5, 3, 0.75, 0.25),
        Sampling(np.float32(0.5), np.int64(3), np.float64(0.75), np.float16(0.25)),
    )
    given = [
        TokenRequest(sample=KeyedSampling(s, seed, [0, 1, 2, 3]))
        for s, seed in ((plain, [1, 2, 3, 4]), (own, np.arange(1, 5)))
    ]
    found = [ops.score_tokens(logits, torch.eye(50).double(), request).token for request in given]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(seed=[1.0, 2]), "seed must be 1-D integers from .* got 1.0 at index 0"),
        (dict(seed=np.array([0.5, 1])), "seed must be 1-D integers .* got 0.5 at index 0"),
        (dict(seed=[True, False]), "seed must be 1-D integers .* got True at index 0"),
        (
            dict(seed=[2**64, 0]),
            "seed must be 1-D integers from -9223372036854775808 to 18446744073709551615, got 18446744073709551616",
        ),
        (dict(seed=["1", "2"]), "seed must be 1-D integers .* got '1'"),
        (dict(position=[0, 1.5]), "position must be 1-D integers .* got 1.5 at index 1"),
        (dict(position=[[0], [1, 2]]), "position must be 1-D integers"),
        (dict(sampling=None), "sampling must be a Sampling, or a sequence of one a row, got None"),
        (dict(sampling=[Sampling(), 0.5]), "sampling must be a Sampling"),
        (dict(edits=[1]), "edits must be LogitEdits, got list"),
        (dict(allowed=np.ones((2, 1), np.int32)), "allowed must be an int32 tensor, got ndarray"),
    ],
)
def test_bad_keyed_sampling_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        _ = KeyedSampling(**{"sampling": Sampling(), "seed": [1, 2], "position": [0, 0], **wrong}).keys


def test_seeds_of_all_64_bits_sample_as_their_bits_do() -> None:
    bits = np.array([2**64 - 1, 2**63, 5], np.uint64)
    for seeds in (bits, bits.tolist(), bits.view(np.int64), torch.from_numpy(bits.view(np.int64))):
        found, expected = (KeyedSampling(Sampling(), seed, [1, 2, 3]).keys for seed in (seeds, bits))
        assert np.array_equal(found, expected)


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
