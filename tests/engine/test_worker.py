"""A worker against the model run from scratch: any history of branches gives the hidden states of plain texts."""

import numpy as np
import pytest
import torch

import tiny
from forktree.engine.worker import ModelWorker
from forktree.kv import Branch, reassign
from forktree.model.runner import Runner
from graph_fake import FakeGraphs


def compute(worker: ModelWorker, branches: list[Branch]) -> torch.Tensor:
    """Last hidden states `[n, H]`, by as many forward passes as it takes."""
    rows: dict[int, torch.Tensor] = {}
    while left := [i for i in range(len(branches)) if i not in rows]:
        chunks = worker.tree.pending([branches[i] for i in left])
        if chunks:
            worker.tree.reserve(chunks)
            worker.forward(chunks)
        ready = worker.is_ready([branches[i] for i in left])
        assert ready.any()
        for i, hidden in zip(left, worker.hidden([branches[i] for i in left]), strict=True):
            if ready[left.index(i)]:
                rows[i] = hidden
    return torch.stack([rows[i] for i in range(len(branches))])


def assert_right(worker: ModelWorker, branches: list[Branch]) -> None:
    got = compute(worker, branches)
    want = torch.stack([tiny.last_hidden(tiny.model(), b.tokens.tolist()) for b in branches])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    worker.tree.check()


@pytest.fixture(params=["eager", "captured"])
def worker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModelWorker:
    """Its pools grow from 8 slots, and all they ever get is full of NaN."""
    tiny.pools_of_nan(monkeypatch, first=8)
    worker = ModelWorker(tiny.model(), num_slots=400)
    if request.param == "captured":
        worker.runner = Runner(worker.runner.spec, num_slots=400, graphs=FakeGraphs())
    return worker


def test_decoding_one_token_at_a_time(worker: ModelWorker) -> None:
    branch = worker.open([3, 4, 5])
    for token in range(1, 40):
        assert_right(worker, [branch])
        branch.append([token % 20])
    assert worker.tokens_computed == 3 + 38


def test_a_rewound_branch_goes_on(worker: ModelWorker) -> None:
    """The token before the rewind point has its KV, but no hidden state any more; then the tip grows again."""
    branch = worker.open(range(1, 12))
    assert_right(worker, [branch])
    branch.rewind(6)
    for token in range(8):
        assert_right(worker, [branch])
        branch.append([token])
    assert worker.tokens_computed == 11 + 1 + 7


def test_branches_that_end_at_different_places_of_one_node(worker: ModelWorker) -> None:
    branch = worker.open(range(1, 16))
    forks = branch.fork(3)
    for fork, length in zip(forks, (4, 9, 15), strict=True):
        fork.rewind(length)
    assert_right(worker, [branch, *forks])


def test_a_whole_prompt_that_is_reused(worker: ModelWorker) -> None:
    first = worker.open([1, 2, 3, 4, 5])
    assert_right(worker, [first])
    worker.keep(first)
    first.append([6])
    assert_right(worker, [first])
    before = worker.tokens_computed
    again, longer = worker.open([1, 2, 3, 4, 5]), worker.open([1, 2, 3, 4, 5, 7, 8])
    assert_right(worker, [again, longer])
    assert worker.tokens_computed == before + 2
    first.drop()
    for token in range(3):
        again.append([token])
        assert_right(worker, [again, longer])


@pytest.mark.parametrize("worker", ["captured"], indirect=True)
def test_decoding_sends_what_has_changed(worker: ModelWorker) -> None:
    """Three numbers for each node's length, each row's position and each new slot; now and then a new plan."""
    root = worker.open(range(1, 20))
    assert_right(worker, [root])
    branches = root.fork(4)
    worker.tree.append(branches, [1, 2, 3, 4])
    assert_right(worker, branches)
    staging, sent = worker.runner._captured._plans._staging, []
    write = staging.next_host_buffer
    staging.next_host_buffer = lambda size: sent.append(size) or write(size)
    for _ in range(16):
        worker.tree.append(branches, [1, 2, 3, 4])
        assert_right(worker, branches)
    assert len(sent) == 16 and sent.count(3 * 3 * 4) >= 10


@pytest.mark.parametrize("seed", range(12))
def test_random_histories(worker: ModelWorker, seed: int) -> None:
    """Fork, append, rewind, drop, reassign, evict and join nothing in particular, then ask for everything."""
    rng = np.random.default_rng(seed)
    branches = [worker.open(rng.integers(0, 20, rng.integers(1, 9)))]
    for _ in range(25):
        branch = branches[rng.integers(len(branches))]
        action = rng.integers(7)
        if action == 0 and len(branches) < 8:
            branches += branch.fork(int(rng.integers(1, 4)))
        elif action in (1, 2):
            branch.append(rng.integers(0, 20, rng.integers(1, 6)))
        elif action == 3:
            branch.rewind(int(rng.integers(1, branch.length + 1)))
        elif action == 4:
            branches = reassign(branches, rng.integers(0, len(branches), rng.integers(1, 9)))
        elif action == 5:
            worker.tree.evict(worker.tree.view([branch]), int(rng.integers(1, 20)))
        elif branch.length < 80:
            worker.tree.append(branches, rng.integers(0, 20, len(branches)))
        some = [b for b in branches if rng.random() < 0.6]
        if some and rng.random() < 0.7:
            assert_right(worker, some)
    assert_right(worker, branches)


def test_a_join_sees_all_its_branches_once(worker: ModelWorker) -> None:
    """Joined texts that share a prompt: every shared token counts once, as in a mask made by hand."""
    root = worker.open([1, 2, 3, 4])
    left, right = root.fork(2)
    left.append([5, 6, 7])
    right.append([8, 9])
    joined = worker.tree.join([left, right], [10, 11])
    got = compute(worker, [joined])[0]
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    positions = [0, 1, 2, 3, 4, 5, 6, 4, 5, 7, 8]
    sees = torch.tril(torch.ones(11, 11, dtype=torch.bool))
    sees[7:9, 4:7] = False  # the right branch does not see the left one
    mask = torch.zeros(1, 1, 11, 11).masked_fill(~sees, torch.finfo(torch.float32).min)
    with torch.no_grad():
        out = tiny.model().base_model(
            input_ids=torch.tensor([tokens]),
            position_ids=torch.tensor([positions]),
            attention_mask=mask,
            use_cache=False,
        )
    torch.testing.assert_close(got, out.last_hidden_state[0, -1], atol=1e-4, rtol=0)
