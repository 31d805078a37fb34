"""Particle filtering: resampling schemes, the exact posterior of a model small enough to enumerate, and its limits."""

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats

import tiny
from forktree import (
    BestOfN,
    Candidate,
    Decoder,
    FunctionReward,
    InvalidInput,
    ParticleFilter,
    Reward,
    RewardError,
    Sample,
    SearchResult,
    TokenProbability,
    TokenRequest,
    TokenScores,
)
from forktree.model.runner import Runner
from forktree.rewards.base import PendingReward, RewardInput, Rewards
from forktree.search.selection import CLIP, RESAMPLERS, log_weights, softmax

VOCAB, PROMPT = 4, (1, 3, 2)


class Table(Reward):
    """The reward of a response's token ids is whatever a function says; it remembers what it was asked."""

    def __init__(self, reward: Callable[[tuple[int, ...]], float]) -> None:
        self.reward, self.asked = reward, []

    def start(self, given: RewardInput) -> PendingReward:
        asked = zip(given.branches, given.prompt_lengths, strict=True)
        responses = [tuple(branch.tokens[length:].tolist()) for branch, length in asked]
        self.asked.append(responses)
        table = self

        class Ready(PendingReward):
            def read(self, hidden: torch.Tensor | None) -> Rewards:
                return Rewards(np.array([table.reward(r) for r in responses]), [None] * len(responses))

        return Ready()


def toy_reward(response: Sequence[int]) -> float:
    """Between 0.1 and 0.9, different for every text."""
    return 0.1 + 0.8 * ((7 * sum((i + 2) * (t + 1) ** 2 for i, t in enumerate(response)) + 3) % 23) / 22


@cache
def toy() -> Decoder:
    """A decoder on a model of four tokens that never ends by itself."""
    return Decoder(tiny.model(vocab=VOCAB, spread=0.5, eos=None), num_slots=8192)


def one_token_steps(reward: Reward, **options: object) -> ParticleFilter:
    return ParticleFilter(
        **{"reward": reward, "step_delimiter": "", "max_step_tokens": 1, "temperature": 1.0, **options}
    )


# ---------------------------------------------------------------- resampling


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_systematic_resampling_copies_floor_or_ceil_times(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(300):
        weights = rng.dirichlet(np.full(n, 0.3)) * (rng.random(n) < 0.7)
        weights[rng.integers(n)] += 0.05
        weights /= weights.sum()
        copies = np.bincount(RESAMPLERS["systematic"](weights, n, rng), minlength=n)
        assert copies.sum() == n
        assert (copies >= np.floor(n * weights - 1e-9)).all() and (copies <= np.ceil(n * weights + 1e-9)).all()
        assert not copies[weights == 0].any()


@pytest.mark.parametrize("name", RESAMPLERS)
def test_resampling_is_unbiased(name: str) -> None:
    """The mean number of copies is N w, within five standard errors; weight 0 is never copied."""
    rng, weights, rounds = np.random.default_rng(0), np.array([0.32, 0.0, 0.05, 0.4, 0.01, 0.22, 0.0]), 20_000
    n = len(weights)
    copies = np.array([np.bincount(RESAMPLERS[name](weights, n, rng), minlength=n) for _ in range(rounds)])
    error = copies.std(axis=0) / math.sqrt(rounds)
    assert (np.abs(copies.mean(axis=0) - n * weights) <= 5 * error).all()
    assert not copies[:, weights == 0].any()


def test_multinomial_draws_are_independent_draws_from_the_weights() -> None:
    """Chi-square of the ancestors, and of the variance of the copies, which is n w (1 - w) for independent draws."""
    rng, weights, rounds, n = np.random.default_rng(1), np.array([0.1, 0.25, 0.05, 0.6]), 4000, 10
    drawn = np.array([RESAMPLERS["multinomial"](weights, n, rng) for _ in range(rounds)])
    counts = np.bincount(drawn.ravel(), minlength=4)
    assert stats.chisquare(counts, rounds * n * weights).pvalue > 1e-4
    copies = np.array([np.bincount(row, minlength=4) for row in drawn])
    np.testing.assert_allclose(copies.var(axis=0), n * weights * (1 - weights), rtol=0.1)


def test_resampling_survives_weights_whose_rounded_sum_is_not_one() -> None:
    class Last:
        """Draws the largest number below 1."""

        def random(self, size: int | None = None) -> object:
            return 1 - 2.0**-53 if size is None else np.full(size, 1 - 2.0**-53)

    for weights in (np.array([1 / 3, 1 / 3, 1 / 3, 0.0]), np.full(10, 0.1) * (1 - 1e-15), np.array([0.0, 1.0, 0.0])):
        for name, resample in RESAMPLERS.items():
            ancestors = resample(weights, len(weights), Last())
            assert (weights[ancestors] > 0).all(), name


def test_log_weights_are_clipped_logits_and_minus_infinity_for_failures() -> None:
    rewards = np.array([0.5, 0.8, 0.0, 1.0, np.nan, CLIP / 10])
    edge = math.log((1 - CLIP) / CLIP)
    for temperature in (1.0, 0.25, 3.0):
        expected = np.array([0.0, math.log(4), -edge, edge, -np.inf, -edge]) / temperature
        np.testing.assert_allclose(log_weights(rewards, temperature), expected, rtol=1e-9, atol=1e-12)


def test_softmax() -> None:
    weights = softmax(np.array([1000.0, 1000.0 + math.log(3), -np.inf]))
    np.testing.assert_allclose(weights, [0.25, 0.75, 0.0])


# ---------------------------------------------------------------- the posterior


def posterior(steps: int, reward: Callable[[Sequence[int]], float], weight_temperature: float) -> dict:
    """p(x) prod_t odds(r(x_1:t))^(1 / weight_temperature), normalised, of all texts of `steps` tokens."""
    prior = tiny.sequence_probabilities(tiny.model(vocab=VOCAB, spread=0.5, eos=None), PROMPT, steps)
    gamma = {}
    for text, p in prior.items():
        rewards = [reward(text[: t + 1]) for t in range(steps)]
        gamma[text] = p * math.prod((r / (1 - r)) ** (1 / weight_temperature) for r in rewards)
    total = sum(gamma.values())
    return {text: g / total for text, g in gamma.items()}


def assert_estimates(search: ParticleFilter, exact: dict, runs: int) -> None:
    """The weighted particles, averaged over seeds, are `exact` within a few standard errors, text by text."""
    cells = {text: i for i, text in enumerate(exact)}
    measure = np.zeros((runs, len(cells)))
    for seed in range(runs):
        for candidate in toy().search([list(PROMPT)], search, max_new_tokens=16, seed=seed)[0].candidates:
            measure[seed, cells[tuple(candidate.token_ids)]] += candidate.hypothesis.weight
    truth = np.array(list(exact.values()))
    error = measure.std(axis=0, ddof=1) / math.sqrt(runs)
    # a tenth of a percent for the filter's own bias of order 1 / N, and for texts too rare to show up
    z = (measure.mean(axis=0) - truth) / (error + 1e-3)
    assert np.abs(z).max() < 4, (np.abs(z).max(), list(exact)[int(np.abs(z).argmax())])
    assert np.abs(measure.mean(axis=0) - truth).sum() / 2 < 0.03  # total variation


@pytest.mark.proves(11)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("resampling", "weight_temperature", "steps", "ess_threshold"),
    [
        ("systematic", 1.0, 3, 1.0),
        ("multinomial", 1.0, 3, 1.0),
        ("systematic", 2.0, 2, 1.0),
        ("multinomial", 0.7, 2, 1.0),
        ("systematic", 1.0, 3, 0.75),
    ],
)
def test_weights_estimate_the_exact_posterior(
    resampling: str, weight_temperature: float, steps: int, ess_threshold: float
) -> None:
    search = one_token_steps(
        Table(toy_reward),
        num_particles=256,
        max_steps=steps,
        resampling=resampling,
        weight_temperature=weight_temperature,
        ess_threshold=ess_threshold,
    )
    exact = posterior(steps, toy_reward, weight_temperature)
    prior = posterior(steps, lambda text: 0.5, 1.0)
    distance = sum(abs(exact[text] - prior[text]) for text in exact) / 2
    assert distance > 0.15, "the reward must matter for this test to mean anything"
    assert_estimates(search, exact, runs=90)


@pytest.mark.slow
def test_a_judge_on_the_models_own_logits_estimates_its_posterior() -> None:
    """The same with TokenProbability: the reward is the model's probability of token 1 against token 2."""
    model = tiny.model(vocab=VOCAB, spread=0.5, eos=None)

    @cache
    def reward(text: tuple[int, ...]) -> float:
        p = tiny.next_log_probs(model, [*PROMPT, *text]).exp()
        return float(p[1] / (p[1] + p[2]))

    search = one_token_steps(TokenProbability([1, 2]), num_particles=256, max_steps=2)
    assert_estimates(search, posterior(2, reward, 1.0), runs=40)


def test_no_random_number_is_used_twice_in_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of different lengths: a particle put back to a shorter text must not sample what it sampled before."""
    used: list[int] = []
    score = Runner.score

    def recording(runner: Runner, hidden: torch.Tensor, request: TokenRequest) -> TokenScores:
        if request.sample is not None:
            used.extend(request.sample.keys.tolist())
        return score(runner, hidden, request)

    monkeypatch.setattr(Runner, "score", recording)
    search = ParticleFilter(
        reward=FunctionReward(lambda p, r: (len(r) * 7 % 10) / 10), num_particles=16, step_delimiter="5", max_steps=6
    )
    tiny.decoder().search(tiny.prompts(1), search, max_new_tokens=40)
    assert len(used) > 100
    assert len(set(used)) == len(used)


# ---------------------------------------------------------------- the algorithm's limits


def test_a_constant_reward_is_plain_sampling() -> None:
    """Systematic resampling with equal weights keeps every particle: texts and log-probs are those of Sample."""
    decoder = toy()
    for seed in range(5):
        search = one_token_steps(Table(lambda r: 0.3), num_particles=33, max_steps=6)
        filtered = decoder.search([list(PROMPT)], search, seed=seed, max_new_tokens=6)[0].candidates
        plain = Sample(num_return_sequences=33, temperature=1.0)
        sampled = decoder.search([list(PROMPT)], plain, seed=seed, max_new_tokens=6)[0].candidates
        assert [c.token_ids for c in filtered] == [c.token_ids for c in sampled]
        for a, b in zip(filtered, sampled, strict=True):
            assert a.hypothesis.log_prob == pytest.approx(b.hypothesis.log_prob, abs=1e-5)
            assert a.hypothesis.weight == pytest.approx(1 / 33)


def test_particles_are_resampled_only_while_their_weights_are_uneven() -> None:
    """A weight is the product of the odds since the last time; at a threshold of 0 that is importance sampling."""
    decisions = set()
    for threshold in (0.0, 0.7, 1.0):
        table = Table(toy_reward)
        search = one_token_steps(table, num_particles=20, max_steps=5, ess_threshold=threshold)
        (result,) = toy().search([list(PROMPT)], search, max_new_tokens=9, seed=3)
        events = result.trace.events
        reward: dict[int, float] = {}
        gained = np.zeros(20)
        nodes: list[int] = []
        for event, after in zip(events, [*events[1:], {"event": None}], strict=True):
            if event["event"] == "grow":
                nodes = event["nodes"]
            if event["event"] == "reward":
                reward |= dict(zip(event["nodes"], event["rewards"], strict=True))
                gained += [math.log(reward[n] / (1 - reward[n])) for n in nodes]
                weights = np.exp(gained) / np.exp(gained).sum()
                ess = 1 / (weights**2).sum()
                resampled = after["event"] == "select"
                if after["event"] != "return":
                    assert resampled == (ess < threshold * 20 or threshold == 1)
                    decisions.add((threshold, resampled))
                if resampled:
                    np.testing.assert_allclose(after["weights"], weights, rtol=1e-9)
                    gained[:] = 0
        odds = sorted((c.hypothesis.weight for c in result.candidates), reverse=True)
        np.testing.assert_allclose(odds, sorted(weights, reverse=True), rtol=1e-9)
        if threshold == 0:
            plain = Sample(num_return_sequences=20, temperature=1.0)
            sampled = toy().search([list(PROMPT)], plain, seed=3, max_new_tokens=5)[0].candidates
            assert sorted(c.token_ids for c in result.candidates) == sorted(c.token_ids for c in sampled)
    assert decisions == {(0.0, False), (0.7, False), (0.7, True), (1.0, True)}


def run(search: ParticleFilter, *, seed: int = 0, max_new_tokens: int = 24) -> SearchResult:
    decoder = tiny.decoder()
    result = decoder.search(tiny.prompts(1), search, max_new_tokens=max_new_tokens, seed=seed)[0]
    tiny.assert_all_returned(decoder.worker)
    return result


@pytest.mark.parametrize("favoured", [True, False])
def test_stopped_particles_keep_their_last_reward_and_compete_on(favoured: bool) -> None:
    """Texts that stop at a "5" get nearly all the weight, or nearly none: they take over, or die out.

    Nothing that has stopped is scored again.
    """
    asked: list[str] = []

    def reward(prompt: str, response: str) -> float:
        asked.append(response)
        return 0.9999 if ("5" in response) == favoured else 0.0001

    search = ParticleFilter(
        reward=FunctionReward(reward), num_particles=48, step_delimiter="", max_step_tokens=1, max_steps=8, stop=("5",)
    )
    candidates = run(search).candidates
    assert len(candidates) == 48
    # at the last step, which is not resampled any more, about one in four live ones has sampled a "5"
    assert np.mean([("5" in c.text[:7]) == favoured for c in candidates]) > 0.95
    for c in candidates:
        assert c.score == c.hypothesis.step_rewards[-1]
        assert (c.hypothesis.finish_reason == "stop") == (c.text.endswith("5") and len(c.text) <= 8)
        assert c.text.count("5") <= 1
        if c.hypothesis.finish_reason != "eos":
            assert len(c.hypothesis.step_rewards) == len(c.text)
    if favoured:
        assert len(asked) < 8 * 48
        assert max(len(text) for text in asked) < 8, "all had stopped before the last step"


def count_steps(candidate: Candidate, step_tokens: int) -> int:
    """Steps of a text: each ends with a "5" or after so many tokens; one more if EOS is all that it sampled."""
    steps, in_step = 0, 0
    for character in candidate.text:
        in_step += 1
        if character == "5" or in_step == step_tokens:
            steps, in_step = steps + 1, 0
    return steps + (in_step > 0 or candidate.hypothesis.finish_reason == "eos")


def test_never_more_steps_or_tokens_than_allowed() -> None:
    reasons = set()
    for seed, (steps, step_tokens, tokens) in enumerate([(3, 4, 99), (9, 3, 7), (40, 1, 5), (2, 99, 12), (1, 1, 1)]):
        search = ParticleFilter(
            reward=FunctionReward(lambda p, r: 0.2 + 0.1 * (len(r) % 5)),
            num_particles=24,
            step_delimiter="5",
            max_steps=steps,
            max_step_tokens=step_tokens,
        )
        for c in run(search, seed=seed, max_new_tokens=tokens).candidates:
            hypothesis = c.hypothesis
            sampled = len(c.token_ids) + (hypothesis.finish_reason == "eos")
            assert 1 <= sampled <= tokens
            assert len(hypothesis.step_rewards) == count_steps(c, step_tokens) <= steps
            if hypothesis.finish_reason == "length":
                assert sampled == tokens or len(hypothesis.step_rewards) == steps
            assert tiny.EOS not in tiny.tokenizer().decode(c.token_ids)
            reasons.add(hypothesis.finish_reason)
    assert reasons == {"length", "eos"}


def test_log_prob_is_the_models_own_whatever_was_resampled() -> None:
    """The sum of transformers' log-probs of the tokens, EOS included, at a sampling temperature other than 1."""
    search = ParticleFilter(
        reward=FunctionReward(lambda p, r: 0.1 + 0.2 * (len(set(r)) % 4)),
        num_particles=12,
        step_delimiter="5",
        max_steps=4,
        max_step_tokens=5,
        temperature=0.7,
    )
    result = run(search, seed=3)
    prompt = tiny.tokenizer()(tiny.prompts(1)[0]).input_ids
    for c in result.candidates:
        tokens = c.token_ids + [0] * (c.hypothesis.finish_reason == "eos")
        expected = sum(
            float(tiny.next_log_probs(tiny.model(), [*prompt, *tokens[:i]])[t]) for i, t in enumerate(tokens)
        )
        assert c.hypothesis.log_prob == pytest.approx(expected, abs=1e-3)


def test_hypotheses_come_best_reward_first_with_normalised_weights() -> None:
    table = Table(toy_reward)
    search = one_token_steps(table, num_particles=20, max_steps=3)
    candidates = toy().search([list(PROMPT)], search, max_new_tokens=9)[0].candidates
    rewards = [toy_reward(c.token_ids) for c in candidates]
    assert len(set(rewards)) > 2 and rewards == sorted(rewards, reverse=True)
    assert [c.score for c in candidates] == rewards
    odds = np.array([r / (1 - r) for r in rewards])
    np.testing.assert_allclose([c.hypothesis.weight for c in candidates], odds / odds.sum(), rtol=1e-9)
    for c in candidates:
        assert c.hypothesis.step_rewards == [toy_reward(c.token_ids[: t + 1]) for t in range(3)]
    assert [len(step) for step in table.asked] == [20, 20, 20]


def test_selection_by_sample_draws_the_first_by_weight() -> None:
    """Over seeds, each first token comes first as often as the weight its particles hold."""
    search = one_token_steps(Table(toy_reward), num_particles=6, max_steps=1, selection="sample")
    first, held = np.zeros(VOCAB), np.zeros(VOCAB)
    first_is_best = 0
    for seed in range(250):
        candidates = toy().search([list(PROMPT)], search, seed=seed, max_new_tokens=9)[0].candidates
        for c in candidates:
            held[c.token_ids[0]] += c.hypothesis.weight
        first[candidates[0].token_ids[0]] += 1
        rest = [c.score for c in candidates[1:]]
        assert len(candidates) == 6 and rest == sorted(rest, reverse=True)
        first_is_best += candidates[0].score == max(c.score for c in candidates)
    assert (np.abs(first - held) < 4 * np.sqrt(held)).all()  # a sum of independent draws: variance at most held
    assert 0 < first_is_best < 250


def test_a_particle_whose_reward_failed_is_resampled_away_or_comes_last_with_its_error() -> None:
    def reward(prompt: str, response: str) -> float:
        if "5" in response:
            raise RuntimeError("no fives")
        return 0.5

    search = ParticleFilter(
        reward=FunctionReward(reward), num_particles=32, step_delimiter="", max_step_tokens=1, max_steps=3
    )
    candidates = run(search).candidates
    failed = [c for c in candidates if c.hypothesis.error is not None]
    assert failed and candidates[-len(failed) :] == failed
    for c in failed:
        assert "reward" in str(c.hypothesis.error) and "RuntimeError: no fives" in str(c.hypothesis.error)
        assert c.text.endswith("5") and c.text.count("5") == 1, "it failed at the last step only"
        assert c.hypothesis.weight == 0 and math.isnan(c.score)
    assert all("5" not in c.text for c in candidates[: -len(failed)])


def test_no_score_at_all_is_the_searchs_error() -> None:
    def reward(prompt: str, response: str) -> float:
        raise KeyError("gone")

    result = run(ParticleFilter(reward=FunctionReward(reward), num_particles=4))
    assert isinstance(result.error, RewardError) and "gone" in str(result.error) and result.candidates == []


@pytest.mark.parametrize("value", [1.5, -0.01])
def test_rewards_outside_the_unit_interval_are_refused(value: float) -> None:
    result = run(ParticleFilter(reward=FunctionReward(lambda p, r: value), num_particles=4))
    assert isinstance(result.error, InvalidInput)
    assert "[0, 1]" in str(result.error) and f"{value:g}" in str(result.error)


@pytest.mark.parametrize(("value", "counts_as"), [(1.0000001, 1), (-1e-9, 0), (np.nextafter(np.float32(1), 2), 1)])
def test_rewards_that_rounding_took_out_of_the_unit_interval_are_its_ends(value: float, counts_as: float) -> None:
    search = ParticleFilter(reward=FunctionReward(lambda p, r: value), num_particles=4)
    best = run(search).best
    assert best.score == counts_as and set(best.hypothesis.step_rewards) == {counts_as}
    assert best.hypothesis.weight == pytest.approx(0.25)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7])
def test_a_delimiter_cut_in_half_by_max_step_tokens_is_found_with_its_rest(tokens: int) -> None:
    """The steps of a given text are those of a loop over its characters; a text that ends it is found likewise."""
    said, stop = "12\n\n3\n\n\n4567\n\n\n\n8a=b", "a=b"
    steps, begin, full, count = [], 0, 0, 0
    for end in range(1, len(said) + 1):  # begin: of what may hold a delimiter; full: of the step
        count += 1
        found = any(text in said[begin:end] for text in ("\n\n", stop))
        if found or count == tokens:
            steps.append(said[:end])
            full, count = end, 0
            begin = end if found else begin
    assert full == len(said)
    ids = [0, *tiny.tokenizer()(said + "5").input_ids]

    def spell(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = ids[input_ids.shape[1] - 2]
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([wanted]), 0.0)

    asked: list[str] = []
    search = ParticleFilter(
        reward=FunctionReward(lambda p, r: asked.append(r) or 0.5),
        num_particles=1,
        max_step_tokens=tokens,
        stop=(stop,),
        logits_processor=(spell,),
    )
    result = tiny.decoder().search(["123"], search, max_new_tokens=60)[0]
    assert result.text == said and result.best.hypothesis.finish_reason == "stop"
    assert asked == steps


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_particles", 0),
        ("num_particles", 2.5),
        ("max_steps", 0),
        ("max_step_tokens", True),
        ("weight_temperature", 0.0),
        ("weight_temperature", math.inf),
        ("weight_temperature", "1"),
        ("weight_temperature", True),
        ("ess_threshold", 1.1),
        ("resampling", "residual"),
        ("selection", "best"),
        ("reward", len),
        ("stop", "END"),
        ("stop", (1,)),
    ],
)
def test_bad_settings_are_named(setting: str, value: object) -> None:
    options = {"reward": FunctionReward(lambda p, r: 0.5), setting: value}
    with pytest.raises(InvalidInput) as error:
        ParticleFilter(**options)
    assert setting in str(error.value)


def test_best_of_n_puts_failures_last_and_the_best_first() -> None:
    def length(prompt: str, response: str) -> float:
        if "5" in response:
            raise ValueError("five")
        return float(len(response))

    decoder = tiny.decoder()
    search = BestOfN(reward=FunctionReward(length), num_samples=40, temperature=1.0)
    candidates = decoder.search(tiny.prompts(1), search, max_new_tokens=8)[0].candidates
    good = [c for c in candidates if c.hypothesis.error is None]
    assert 0 < len(good) < 40 and candidates[: len(good)] == good
    assert [c.score for c in good] == sorted((float(len(c.text)) for c in good), reverse=True)
    assert all("5" in c.text and "ValueError: five" in str(c.hypothesis.error) for c in candidates[len(good) :])
