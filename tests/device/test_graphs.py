"""Steps as captured graphs, on the CPU by `graph_fake`: what eager forward passes give, while plans change."""

import gc
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import models
import tiny as support
from forktree import TokenProbability, search
from forktree.device import plan_buffers
from forktree.device.cuda_graphs import CudaGraphs, NoHostReads
from forktree.engine import worker
from forktree.errors import InvalidInput
from forktree.model import captured
from forktree.model.attach import attach
from forktree.model.runner import Runner
from forktree.plan.cost_model import CPU
from forktree.plan.plan import plan_attention
from graph_fake import FakeGraphs
from models import CONFIGS, NUM_SLOTS, Forest, tiny


class Pair:
    """A model eagerly and captured, each with pools of its own, full of NaN; both compute every step."""

    def __init__(self, name="llama", device="cpu", tolerance=1e-4, spec=None):
        self.spec = spec or (models.spec(name) if device == "cpu" else attach(tiny(name).to(device)))
        self.graphs = FakeGraphs() if device == "cpu" else CudaGraphs(torch.device(device))
        self.eager = Runner(self.spec, num_slots=NUM_SLOTS, graphs=None if device == "cpu" else NoGraphs())
        self.captured = Runner(self.spec, num_slots=NUM_SLOTS, graphs=self.graphs)
        for runner in (self.eager, self.captured):
            for x in (x for pool in runner.pools for x in pool.tensors):
                x.fill_(torch.nan)
        self.forest = Forest(np.random.default_rng(1))
        self.tolerance = tolerance

    def step(self, pending):
        for branch, count in pending.items():
            self.forest.grow(branch, count)
        tokens, positions, slots, layout = self.forest.step(pending)
        want, got = (r.forward(tokens, positions, slots, r.plans(layout)) for r in (self.eager, self.captured))
        near = dict(atol=self.tolerance, rtol=self.tolerance)
        torch.testing.assert_close(got, want, **near)
        got_pools, want_pools = ([p.tensors for p in r.pools] for r in (self.captured, self.eager))
        torch.testing.assert_close(got_pools, want_pools, equal_nan=True, **near)
        return got

    def random_steps(self, count):
        """Prefill, decoding, chunks, forks in the middle of nodes, rewinds that free slots for others."""
        forest, rng = self.forest, self.forest.rng
        branches = [forest.root(), forest.root()]
        self.step(dict.fromkeys(branches, 9))
        for _ in range(count):
            i = int(rng.integers(len(branches)))
            branches[i] = forest.rewind(branches[i], int(rng.integers(1, forest.length(branches[i]) + 1)))
            branches.append(forest.fork(branches[0], int(rng.integers(1, forest.length(branches[0]) + 1))))
            branches = [branches[i] for i in rng.permutation(len(branches))[:6]]
            self.step({b: int(rng.choice([1, 1, 1, 5])) for b in branches if rng.random() < 0.8} or {branches[0]: 1})


class NoGraphs(FakeGraphs):
    def capture(self, function):
        raise NotImplementedError


@pytest.mark.parametrize("name", CONFIGS)
def test_random_steps(name):
    pair = Pair(name)
    pair.random_steps(10)
    assert pair.graphs.captures <= 3 and pair.graphs.replays == 11


def test_a_graph_casts_for_autocast_itself():
    """Autocast keeps casts of weights, but none in inference mode: a graph follows weights that change."""
    with torch.autocast("cpu", torch.bfloat16):
        pair = Pair(tolerance=0.05, spec=attach(tiny("llama")))
        branch = pair.forest.root()
        before = pair.step({branch: 1})
    with torch.no_grad():
        for layer in pair.spec.packed.decoder.layers:
            layer.mlp.down_proj.weight.neg_()
    with torch.autocast("cpu", torch.bfloat16):
        after = pair.step({branch: 1})
    assert pair.graphs.captures == 1 and (after - before).abs().max() > 0.5


def test_python_runs_only_to_capture():
    pair, calls = Pair(), []
    hook = pair.spec.packed.decoder.register_forward_hook(lambda *_: calls.append(1))
    branch = pair.forest.root()
    for _ in range(9):
        pair.step({branch: 1})
    hook.remove()
    assert (pair.graphs.captures, pair.graphs.replays) == (1, 9)
    assert len(calls) == 2 + 9  # a trial, the capture; the other runner's


def test_buckets(monkeypatch):
    """The least that fits; more than the largest runs eagerly. Smaller ones than fp32 wants are not used."""
    monkeypatch.setattr(captured, "BUCKETS", (1, 16, 20, 32))
    pair = Pair()
    for count, captures, replays in ((1, 1, 1), (16, 1, 2), (17, 2, 3), (32, 3, 4), (33, 3, 4), (20, 3, 5), (2, 3, 6)):
        pair.step({pair.forest.root(): count})
        assert (pair.graphs.captures, pair.graphs.replays) == (captures, replays)


def test_what_is_returned_is_the_callers():
    pair = Pair()
    branch = pair.forest.root()
    first = pair.step({branch: 3})
    before = first.clone()
    pair.step({branch: 2})
    torch.testing.assert_close(first, before, atol=0, rtol=0)
    first.add_(1)  # not an inference tensor


def test_plans_that_outgrow_their_memory(monkeypatch):
    monkeypatch.setattr(plan_buffers, "PLAN_CAPACITY", 32)
    monkeypatch.setattr(plan_buffers, "SLOT_CAPACITY", 4)
    pair = Pair("qwen2")
    pair.random_steps(12)
    assert 4 <= pair.graphs.captures < 12


def test_pools_that_grow(monkeypatch):
    """Graphs read and write the pools they were captured with."""
    support.pools_of_nan(monkeypatch, first=4)
    pair = Pair("gemma2")
    pair.random_steps(12)
    pools = [*pair.eager.pools, *pair.captured.pools]
    assert {len(x) for pool in pools for x in pool.tensors} == {NUM_SLOTS}
    assert pair.graphs.captures >= 3


def test_more_partials_than_there_is_room_for(monkeypatch):
    """The runner's own plans keep to it; with others it runs eagerly."""
    monkeypatch.setattr(captured, "SCRATCH", 4 * 4 * (8 + 2) * 3)
    pair = Pair()
    (layer,) = pair.captured.layer_specs
    assert pair.captured._captured.max_partials == [3]
    forest = pair.forest
    trunk = forest.root()
    pair.step({trunk: 60})
    branches = [forest.fork(trunk, 60) for _ in range(4)]
    for branch in branches:
        forest.grow(branch, 1)
    tokens, positions, slots, layout = forest.step(dict.fromkeys(branches, 1))
    keen = replace(CPU, grain=0, item=0, partial=0, segment=0)  # to cut
    heads = dict(num_qo_heads=layer.num_qo_heads, num_kv_heads=layer.format.num_kv_heads, head_dim=layer.format.k_dim)
    cut = plan_attention(layout, **heads, cost_model=keen)
    assert cut.num_partials > 3
    replays = pair.graphs.replays
    want, got = (r.forward(tokens, positions, slots, {layer: cut}) for r in (pair.eager, pair.captured))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert pair.graphs.replays == replays
    got = pair.captured.forward(tokens, positions, slots, pair.captured.plans(layout))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert pair.graphs.replays == replays + 1


@contextmanager
def one_warning(match):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    (only,) = [str(w.message) for w in seen if "eagerly" in str(w.message)]
    assert match in only


def test_a_model_that_reads_on_the_host_runs_eagerly():
    pair = Pair(spec=attach(tiny("llama")))
    pair.spec.packed.decoder.layers[1].register_forward_pre_hook(lambda _, args: args[0].max().item() and None)
    with one_warning("llama: its steps run eagerly, as they cannot be captured: RuntimeError: aten._local_scalar"):
        pair.random_steps(4)
    assert (pair.graphs.captures, pair.graphs.replays) == (0, 0)


def test_backends_that_follow_plans_on_the_host_run_eagerly(monkeypatch):
    pair = Pair()
    monkeypatch.setenv("FORKTREE_BACKEND", "torch")
    with one_warning("RuntimeError: the torch backend follows plans on the host"):
        pair.random_steps(2)


def test_plans_of_another_step_are_refused():
    """A graph would read what is not there."""
    pair = Pair()
    branch = pair.forest.root()
    pair.step({branch: 3})  # captured
    tokens, positions, slots, layout = pair.forest.step({branch: 3})
    plans = pair.captured.plans(layout)
    with pytest.raises(InvalidInput, match=r"plans must be of a layout of 2 tokens, got \[3\]"):
        pair.captured.forward(tokens[:2], positions[:2], slots[:2], plans)
    (layer,) = plans
    wide = plan_attention(layout, num_qo_heads=8, num_kv_heads=2, head_dim=8)
    with pytest.raises(ValueError, match=r"q must be \[3, 8, 8\]"):
        pair.captured.forward(tokens, positions, slots, {layer: wide})
    beyond = pair.captured.plans(layout.grown(layout.node_len, layout.row_pos, [*slots[:2], NUM_SLOTS]))
    with pytest.raises(ValueError, match=f"slot_index must be in .0, {NUM_SLOTS}., the pool"):
        pair.captured.forward(tokens, positions, slots, beyond)


@pytest.mark.parametrize(
    "search",
    [
        search.Greedy(),
        search.BeamSearch(num_beams=4),
        search.ParticleFilter(num_particles=4, max_step_tokens=3, reward=TokenProbability([1, 2])),
    ],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.parametrize("ahead", [False, True])
def test_searches(monkeypatch, search, ahead):
    prompts = support.prompts(5)
    want = support.decoder().search(prompts, search, max_new_tokens=12)
    graphs = FakeGraphs()
    monkeypatch.setattr(worker, "Runner", partial(Runner, graphs=graphs))
    decoder = support.decoder()
    decoder.engine.ahead = ahead
    got = decoder.search(prompts, search, max_new_tokens=12)
    assert support.texts(got) == support.texts(want)
    assert graphs.replays >= 12 > graphs.captures > 0


# ---- what a capture forbids ----

X = torch.arange(4.0)
READS = {
    "item": lambda: X.max().item(),
    "branch": lambda: 1 if X.max() + 1 > 3 else 2,
    "nonzero": lambda: X.nonzero(),
    "mask": lambda: X[X > 1],
    "masked write": lambda: X.clone().index_put_((X > 1,), X.new_tensor(1.0)),
    "equal": lambda: torch.equal(X, X),
    "unique": lambda: torch.unique(X),
    "one_hot": lambda: torch.nn.functional.one_hot(X.long()),
    "repeats": lambda: torch.repeat_interleave(X.long()),
    "copy": lambda: X.to("meta"),
    "copy into": lambda: torch.empty(4, device="meta").copy_(X),
}
FINE = {
    "arithmetic": lambda: (X * 2 + X.max()).softmax(0),
    "linear": lambda: torch.nn.functional.linear(X, X[None]),
    "gather": lambda: X[X.long()],
    "one_hot": lambda: torch.nn.functional.one_hot(X.long(), 4),
    "topk": lambda: X.topk(2),
    "convert": lambda: X.to(torch.bfloat16),
}


@pytest.mark.parametrize("name", READS)
@torch.inference_mode()
def test_reads_on_the_host_are_refused(name):
    with NoHostReads(), pytest.raises(RuntimeError, match=r"needs values on the host|copies between"):
        READS[name]()


@pytest.mark.parametrize("name", FINE)
@torch.inference_mode()
def test_other_operations_are_not(name):
    with NoHostReads():
        got = FINE[name]()
    torch.testing.assert_close(got, FINE[name]())


def test_the_fake_freezes_what_python_computed():
    number, x = [2.0], torch.ones(3)
    replay, out = FakeGraphs().capture(lambda: (x * number[0]).relu() + 1)
    x.fill_(5)
    number[0] = 100
    assert out.tolist() == [3, 3, 3]
    replay()
    assert out.tolist() == [11, 11, 11]


@pytest.mark.parametrize(
    "function",
    [lambda: X + torch.tensor([1.0, 2, 3, 4]), lambda: X + torch.from_numpy(np.ones(4)), lambda: X + X.tolist()[0]],
)
def test_the_fake_forbids_the_host(function):
    with pytest.raises(RuntimeError, match="during the capture"):
        FakeGraphs().capture(function)


# ---- the order of calls to CUDA ----


class Cuda:
    """torch.cuda, as far as `CudaGraphs` calls it, writing down what is asked for."""

    def __init__(self, monkeypatch, fail_at=0):
        self.log, self.runs, self.fail_at = [], 0, fail_at
        self.graphs = weakref.WeakSet()
        for name in ("Stream", "CUDAGraph", "graph_pool_handle", "stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Stream(self, device):
        return _Stream(self, "side")

    def current_stream(self, device):
        return _Stream(self, "main")

    def graph_pool_handle(self):
        return "pool"

    @contextmanager
    def stream(self, stream):
        self.log.append(f"enter {stream.name}")
        try:
            yield
        finally:
            self.log.append(f"leave {stream.name}")

    def CUDAGraph(self):
        return _Graph(self)

    def function(self):
        self.runs += 1
        self.log.append("run")
        if self.runs == self.fail_at:
            raise ValueError("the model's own")
        return X + 0


class _Graph:
    def __init__(self, cuda):
        self.cuda = cuda

    def capture_begin(self, pool, capture_error_mode):
        # as torch asserts it
        assert len(self.cuda.graphs) > 0 or not any(entry.startswith("begin") for entry in self.cuda.log), (
            "pool is gone"
        )
        self.cuda.graphs.add(self)
        self.cuda.log.append(f"begin {pool} {capture_error_mode}")

    def capture_end(self):
        self.cuda.log.append("end")
        if self.cuda.fail_at:
            raise RuntimeError("capture was invalidated")

    def replay(self):
        self.cuda.log.append("replay")


class _Stream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other):
        self.cuda.log.append(f"{self.name} waits for {other.name}")


def test_calls_to_cuda(monkeypatch):
    cuda = Cuda(monkeypatch)
    replay, _ = CudaGraphs(torch.device("cuda")).capture(cuda.function)
    replay()
    inside = ["run", "run", "begin pool thread_local", "run", "end"]
    assert cuda.log == ["side waits for main", "enter side", *inside, "leave side", "main waits for side", "replay"]


def test_the_pool_outlives_graphs_that_are_dropped(monkeypatch):
    cuda = Cuda(monkeypatch)
    graphs = CudaGraphs(torch.device("cuda"))
    for _ in range(3):
        graphs.capture(cuda.function)
        gc.collect()
    assert cuda.log.count("begin pool thread_local") == 3


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_a_capture_that_fails_ends_and_says_why(monkeypatch, fail_at):
    cuda = Cuda(monkeypatch, fail_at)
    with pytest.raises(ValueError, match="the model's own"):
        CudaGraphs(torch.device("cuda")).capture(cuda.function)
    assert cuda.log[-2:] == ["leave side", "main waits for side"]
    assert ("end" in cuda.log) == any("begin" in entry for entry in cuda.log)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_captured_by_cuda(name):
    pair = Pair(name, device="cuda", tolerance=1e-3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?!.*NotImplementedError).*cannot be captured")
        pair.random_steps(30)
    assert pair.captured._captured._steps
