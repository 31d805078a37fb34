"""On a GPU: whole models and searches give what they give on the CPU. Collected everywhere, run where there is one."""

import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import compiled_layer
import forktree
import log_probs
import models
import tiny
from forktree.engine import sampler
from forktree.engine.request_state import TokensState
from forktree.model.attach import attach
from forktree.model.runner import Runner
from forktree.ops.dispatch import missing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
EXPERTS = ("gpt_oss", "qwen2_moe", "qwen3_moe")  # where their routing waits for the device, steps run eagerly
REWARD = forktree.TokenProbability([1, 2])
SEARCHES: list[forktree.search.Search] = [
    forktree.Greedy(),
    forktree.Sample(num_return_sequences=4),
    forktree.BestOfN(num_samples=4, reward=REWARD),
    forktree.MajorityVote(num_samples=4, answer=lambda text: text[:1]),
    forktree.BeamSearch(num_beams=4, num_return_sequences=2),
    forktree.ParticleFilter(num_particles=4, max_step_tokens=3, reward=REWARD),
]


@pytest.fixture(params=["", "triton", "cuda", "torch"])
def backend(request: Any, monkeypatch: Any) -> str:
    """The choice left to forktree, then each backend for everything it takes."""
    if request.param and (why := missing(request.param)):
        pytest.skip(why)
    monkeypatch.setenv("FORKTREE_BACKEND", request.param)
    return str(request.param)


@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: type(s).__name__)
def test_a_search_on_the_gpu_equals_one_on_the_cpu(search: forktree.search.Search) -> None:
    def decoder(device: str) -> Any:
        return forktree.Decoder(tiny.new_model().to(device), tiny.tokenizer(), num_slots=2048)

    prompts = tiny.prompts(6)
    cpu, gpu = (decoder(d).search(prompts, search, max_new_tokens=12) for d in ("cpu", DEVICE))
    assert tiny.texts(gpu) == tiny.texts(cpu)
    for one, other in zip(gpu, cpu, strict=True):
        scores = [[c.score for c in result.candidates] for result in (one, other)]
        np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-4)
        assert [c.token_ids for c in one.candidates] == [c.token_ids for c in other.candidates]


@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: type(s).__name__)
def test_running_ahead_on_the_gpu_changes_nothing(search: forktree.search.Search) -> None:
    prompts, results = tiny.prompts(6), []
    for ahead in (True, False):
        decoder = forktree.Decoder(tiny.new_model().to("cuda"), tiny.tokenizer(), num_slots=2048)
        assert decoder.engine.ahead, "on a GPU unless asked otherwise"
        decoder.engine.ahead = ahead
        results.append(decoder.search(prompts, search, max_new_tokens=12))
        tiny.assert_all_returned(decoder.worker)
    assert tiny.texts(results[0]) == tiny.texts(results[1])


def test_sampling_on_the_gpu_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hidden states to the sampled tokens' place in the next pass, no call waits for the device."""
    decoder = forktree.Decoder(tiny.new_model().to("cuda"), tiny.tokenizer(), num_slots=2048)
    calls = []

    def strict(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def wrapped(*args: Any) -> Any:
            calls.append(name)
            torch.cuda.set_sync_debug_mode("error")
            try:
                return inner(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(owner, name, wrapped)

    strict(sampler, "_sample")
    strict(decoder.worker, "append_sampled")
    searches = [
        forktree.Sample(num_return_sequences=4, top_k=5, top_p=0.9, min_p=0.01),
        forktree.Greedy(),
        forktree.Sample(num_return_sequences=3, temperature=1.3),
    ]
    results = list(decoder.search_iter(tiny.prompts(3), searches, max_new_tokens=12))
    assert all(r.error is None for r in results)
    assert {"_sample", "append_sampled"} == set(calls)


def test_given_texts_have_the_log_probs_they_have_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no pass waits for the one before."""
    texts = log_probs.family(1, tiny.VOCAB)
    expected = forktree.sequence_logprobs(tiny.model(), texts)
    inner, calls = TokensState._ask, []

    def strict(*args: Any) -> Any:
        calls.append(len(args))
        torch.cuda.set_sync_debug_mode("error")
        try:
            return inner(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(TokensState, "_ask", strict)
    found = forktree.sequence_logprobs(tiny.new_model().to(DEVICE), texts, max_batch_tokens=32)
    log_probs.assert_close(found, expected)
    assert len(calls) > 3


def test_searches_side_by_side_equal_those_alone() -> None:
    """Steps of every size, from one row to many: graphs of several buckets, plans that change under them."""
    decoder = forktree.Decoder(tiny.new_model().to(DEVICE), tiny.tokenizer(), num_slots=4096)
    prompts = tiny.prompts(len(SEARCHES))
    both = sorted(decoder.search_iter(prompts, SEARCHES, max_new_tokens=20), key=lambda result: result.index)
    alone = [decoder.search([p], s, max_new_tokens=20)[0] for p, s in zip(prompts, SEARCHES, strict=True)]
    assert tiny.texts(both) == tiny.texts(alone)


@pytest.mark.parametrize("name", models.CONFIGS)
@torch.no_grad()
def test_a_model_on_the_gpu_equals_itself_on_the_cpu(name: str) -> None:
    """Random trees through prefill, forks and steps of several tokens, in fp32; by captured graphs where possible."""
    model = models.tiny(name)
    cpu = Runner(attach(model), num_slots=models.NUM_SLOTS)
    gpu = Runner(attach(models.tiny(name).to(DEVICE)), num_slots=models.NUM_SLOTS)
    for x in (x for runner in (cpu, gpu) for pool in runner.pools for x in pool.tensors):
        x.fill_(torch.nan)
    rng = np.random.default_rng(2)
    forest = models.Forest(rng)
    branches = [forest.root(), forest.root()]
    pending = dict.fromkeys(branches, 12)
    for _ in range(10):
        for branch, count in pending.items():
            forest.grow(branch, count)
        with warnings.catch_warnings():
            if name not in EXPERTS:
                warnings.filterwarnings("error", message=".*run eagerly")
            expected, got = (models.compute(runner, forest, pending) for runner in (cpu, gpu))
        torch.testing.assert_close(got.cpu(), expected, atol=2e-3, rtol=1e-3)
        parent = branches[rng.integers(len(branches))]
        branches.append(forest.fork(parent, int(rng.integers(1, forest.length(parent) + 1))))
        branches = [branches[i] for i in sorted(rng.permutation(len(branches))[:5])]
        pending = {branch: int(rng.integers(1, 4)) if rng.random() < 0.3 else 1 for branch in branches}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_narrow_dtypes_are_as_near_to_fp32_as_eager_attention(dtype: torch.dtype, backend: str) -> None:
    if backend == "cuda":
        pytest.skip("the tiny model's head dim is not one of its own")
    exact = models.tiny("llama").to(DEVICE)
    model = models.tiny("llama").to(DEVICE, dtype)
    runner = Runner(attach(model), num_slots=models.NUM_SLOTS)
    forest = models.Forest(np.random.default_rng(0))
    root = forest.root()
    forest.grow(root, 30)
    got = models.compute(runner, forest, {root: 30}).float()
    ids = torch.tensor([forest.path(root)], device=DEVICE)
    theirs, expected = (m(ids).logits[0].float() for m in (model, exact))
    ours, allowed = ((x - expected).square().mean().sqrt() for x in (got, theirs))
    assert ours <= 1.3 * allowed


@torch.no_grad()
def test_a_compiled_layer_writes_its_pools_in_place() -> None:
    torch.manual_seed(0)
    layer = compiled_layer.Layer().to(DEVICE)
    arguments = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in compiled_layer.inputs()]
    expected = layer(*arguments)
    pools = [layer.k_slots.clone(), layer.v_slots.clone()]
    layer.k_slots.zero_()
    layer.v_slots.zero_()
    addresses = layer.k_slots.data_ptr(), layer.v_slots.data_ptr()
    got = torch.compile(layer, fullgraph=True)(*arguments)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close([layer.k_slots, layer.v_slots], pools)
    assert (layer.k_slots.data_ptr(), layer.v_slots.data_ptr()) == addresses


def test_importing_does_not_touch_the_gpu() -> None:
    code = "import forktree, forktree.triton_kernels, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
