"""Which backend computes an operation, and what is said of one that cannot."""

import pytest
import torch

from attention import tensors
from backends import ON_GPU, each
from forktree import _core, ops
from forktree.ops import KVPool, dispatch
from forktree.ops.dispatch import missing, select_backend
from forktree.plan.plan import plan_attention
from layouts import random_layout

DEVICE = "cuda"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("fast", "there is no such backend"),
        ("triton", "Triton is not installed"),
        ("triton", "there is no GPU"),
        ("cuda", "the core was built without CUDA"),
    ],
)
def test_an_absent_backend_says_why(name, why, monkeypatch):
    monkeypatch.setenv("FORKTREE_BACKEND", name)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_core, "build", {})
    if "installed" in why:
        monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    dispatch.missing.cache_clear()
    with pytest.raises(ValueError, match=f"FORKTREE_BACKEND={name}: {why}.*; available: reference, torch, cpu$"):
        ops.rotate_rows(torch.zeros(1, 1, 4), torch.zeros(1, dtype=torch.int32), torch.ones(2))
    dispatch.missing.cache_clear()


def test_backends_must_be_able_to(monkeypatch):
    monkeypatch.setenv("FORKTREE_BACKEND", "cpu")
    wide = torch.zeros(2, 1, 4, dtype=torch.float64)
    shift, inv_freq = torch.arange(2), torch.ones(2)
    with pytest.raises(ValueError, match=r"FORKTREE_BACKEND=cpu: expected fp32, .* got torch.float64"):
        ops.rotate_rows(wide, shift, inv_freq)
    with pytest.raises(ValueError, match=r"FORKTREE_BACKEND=cpu: expected tensors on the CPU, got meta"):
        ops.rotate_rows(*(x.to("meta") for x in (wide.float(), shift, inv_freq)))
    monkeypatch.delenv("FORKTREE_BACKEND")
    with pytest.raises(ValueError, match=r"q must be fp32, bf16 or fp16 .* got torch.float64"):
        torch.ops.forktree.rotate_rows.default(wide, shift, inv_freq, False, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_are_chosen_by_themselves(monkeypatch):
    monkeypatch.delenv("FORKTREE_BACKEND", raising=False)
    k = torch.zeros(1, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    for rows, cuda_is_better in ((1, True), (4096, False)):
        q = torch.zeros(rows, 4, 64, dtype=torch.bfloat16, device=DEVICE)
        wanted = "cuda" if cuda_is_better and not missing("cuda") else "triton"
        assert select_backend("tree_attention", q, KVPool(k, k)) == wanted
    assert select_backend("tree_attention", q.double(), KVPool(k, k)) == "torch"


@each(*ON_GPU)
def test_what_lies_elsewhere_is_refused(backend):
    case = random_layout(1)
    q, k, v = tensors(case, 4, 2, 64, dtype=torch.bfloat16)
    made = plan_attention(case.layout, num_qo_heads=4, num_kv_heads=2, head_dim=64, device=DEVICE)
    with pytest.raises(ValueError, match=r"device|expected tensors on"):
        ops.tree_attention(q.to(DEVICE), KVPool(k, v), made)
    with pytest.raises(ValueError, match=r"device|expected tensors on"):
        ops.tree_attention(q, KVPool(k.to(DEVICE), v.to(DEVICE)), made)
