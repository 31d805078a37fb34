"""Whole models, tiny and random: tree decoding agrees with transformers' eager attention on each path."""

import numpy as np
import pytest
import torch

from forktree.errors import InvalidInput
from forktree.model.attach import attach
from forktree.model.positions import NO_LIMIT
from forktree.model.runner import Runner
from models import CONFIGS, NUM_SLOTS, VOCAB, Forest, compute, tiny


@pytest.fixture(scope="module", params=list(CONFIGS))
def runner(request):
    return Runner(attach(tiny(request.param)), num_slots=NUM_SLOTS)


@pytest.fixture
def forest(runner):
    for x in (x for pool in runner.pools for x in pool.tensors):
        x.fill_(torch.nan)  # a read of a slot that nobody wrote spoils the logits
    return Forest(np.random.default_rng(1))


@torch.no_grad()
def eager(runner: Runner, forest: Forest, pending: dict[int, int]) -> torch.Tensor:
    """The model's own logits of the same tokens, each path alone, all of it computed anew."""
    model = runner.spec.packed.model
    assert model.config._attn_implementation == "eager"
    paths = [(torch.tensor([forest.path(branch)]), n) for branch, n in pending.items()]
    return torch.cat([model(ids, attention_mask=torch.ones_like(ids)).logits[0, -n:] for ids, n in paths])


def check(runner: Runner, forest: Forest, pending: dict[int, int]) -> None:
    expected = eager(runner, forest, pending)
    assert expected.std() > 0.3  # else agreement within 1e-4 would mean little
    torch.testing.assert_close(compute(runner, forest, pending), expected, atol=1e-4, rtol=0)


def test_prefill(runner, forest):
    """Two prompts as two contexts of one forward, then the rest of the first in chunks."""
    first, second = forest.root(), forest.root()
    forest.grow(first, 21)
    forest.grow(second, 5)
    check(runner, forest, {first: 21, second: 5})
    for chunk in (1, 7, 2):
        forest.grow(first, chunk)
        check(runner, forest, {first: chunk})


def test_random_trees(runner, forest):
    """Forks at any offset, rewinds that free slots for others, steps of 1 to 5 tokens a branch."""
    rng = forest.rng
    branches = [forest.root(), forest.root()]
    for branch in branches:
        forest.grow(branch, 12)
    check(runner, forest, dict.fromkeys(branches, 12))
    for _ in range(8):
        for i in range(len(branches)):
            if rng.random() < 0.3:
                branches[i] = forest.rewind(branches[i], int(rng.integers(1, forest.length(branches[i]) + 1)))
        parent = branches[rng.integers(len(branches))]
        branches.append(forest.fork(parent, int(rng.integers(1, forest.length(parent) + 1))))
        branches = [branches[i] for i in sorted(rng.permutation(len(branches))[:5])]
        decode = [b for b in branches if rng.random() < 0.8] or branches[:1]
        pending = {b: int(rng.integers(1, 6)) if rng.random() < 0.4 else 1 for b in decode}
        for branch, count in pending.items():
            forest.grow(branch, count)
        check(runner, forest, pending)


def test_tokens_see_tokens_of_the_same_step(runner, forest):
    """A branch forked in the middle of tokens that are computed in the very step."""
    trunk = forest.root()
    forest.grow(trunk, 9)
    early, late = forest.fork(trunk, 4), forest.fork(trunk, 9)
    forest.grow(early, 3)
    forest.grow(late, 2)
    check(runner, forest, {trunk: 9, early: 3, late: 2})


def test_negative_slots_are_not_stored(runner, forest):
    branch = forest.root()
    forest.grow(branch, 6)
    check(runner, forest, {branch: 6})
    before = [x.clone() for pool in runner.pools for x in pool.tensors]
    forest.grow(branch, 1)
    tokens, positions, _, layout = forest.step({branch: 1})
    runner.forward(tokens, positions, [-1], runner.plans(layout))
    after = [x for pool in runner.pools for x in pool.tensors]
    torch.testing.assert_close(after, before, atol=0, rtol=0, equal_nan=True)


WINDOWS = {
    "mistral": [8, 8, 8],
    "phi3": [8, 8, 8],
    "qwen2": [None, 8, 8],
    "qwen3": [None, 8, 8],
    "qwen2_moe": [8, 8, None],
    "modernbert-decoder": [None, 8, None, 8],
    **dict.fromkeys(("gemma2", "gemma3", "gemma4", "gpt_oss", "cohere2"), [8, None] * 2),
}


def test_windows_are_found(runner):
    name = runner.spec.name.removesuffix("_text")
    assert [layer.window for layer in runner.spec.layers] == WINDOWS.get(name, [None] * 3)


def test_sizes(runner, forest):
    layers = runner.spec.layers
    formats = [layer.format for layer in layers]
    assert runner.bytes_per_slot == sum(4 * x.num_kv_heads * (x.k_dim + x.v_dim) for x in formats)
    assert (runner.vocab_size, runner.max_position) == (VOCAB, 128 if runner.spec.name == "gpt2" else NO_LIMIT)
    assert (runner.device.type, runner.dtype) == ("cpu", torch.float32)
    forest.grow(forest.root(), 1)
    assert runner.plans(forest.step({0: 1})[-1]).keys() == set(layers)  # one plan a spec, not a layer


@pytest.mark.parametrize("runner", ["llama"], indirect=True)
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tokens=[1, VOCAB]), "tokens must be at least 0 and below 99, got 1 to 99"),
        (dict(positions=[-1, 0]), "positions must be at least 0 and below 2147483647, got -1 to 0"),
        (dict(slots=[0, NUM_SLOTS]), "slots must be at least -1 and below 160"),
        (dict(tokens=[1.5, 2.5]), "tokens must be a list of integers, got float64"),
        (dict(tokens=[1]), "one length .* got 1, 2 and 2"),
    ],
)
def test_bad_input_is_named_before_anything_runs(runner, forest, change, message):
    branch = forest.root()
    forest.grow(branch, 2)
    tokens, positions, slots, layout = forest.step({branch: 2})
    arguments = {"tokens": tokens, "positions": positions, "slots": slots, **change}
    with pytest.raises(InvalidInput, match=message):
        runner.forward(**arguments, plans=runner.plans(layout))
    assert all(x.isnan().all() for pool in runner.pools for x in pool.tensors)


@pytest.mark.parametrize("runner", ["llama"], indirect=True)
def test_results_in_fp32_do_not_depend_on_the_company(runner, forest):
    """The same token alone and beside 20 others: the linear layers see at least 16 rows either way."""
    norm, sizes = runner.spec.packed.decoder.norm, []
    hook = norm.register_forward_hook(lambda _module, args, _output: sizes.append(args[0].shape[1]))
    one, many = forest.root(), forest.root()
    forest.grow(one, 1)
    forest.grow(many, 20)
    alone, together = compute(runner, forest, {one: 1}), compute(runner, forest, {one: 1, many: 20})
    hook.remove()
    assert sizes == [16, 21]
    torch.testing.assert_close(alone[0], together[0], atol=1e-6, rtol=0)
