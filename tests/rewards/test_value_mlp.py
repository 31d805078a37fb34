"""`ValueMlp`: one or two layers on hidden states, against `torch.nn`; heads that are none are refused."""

from typing import Any

import pytest
import torch

from forktree import InvalidInput
from forktree.rewards.value_head import ValueMlp

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "identity", "two outputs"])
def test_value_heads(dtype: torch.dtype, activation: str) -> None:
    hidden = torch.randn(5, 12).to(dtype)
    outputs = 2 if activation == "two outputs" else 1
    first, second = torch.nn.Linear(12, 7), torch.nn.Linear(7, outputs)
    linear = torch.nn.Linear(12, outputs, bias=False)
    end = {
        "sigmoid": torch.nn.Sigmoid(),
        "tanh": torch.nn.Tanh(),
        "identity": torch.nn.Identity(),
        "two outputs": torch.nn.Softmax(dim=1),
    }[activation]
    named = "identity" if outputs == 2 else activation
    for modules in ([linear, end], [first, torch.nn.ReLU(), second, end]):
        layers = [
            (m.weight.detach(), m.bias if m.bias is None else m.bias.detach()) for m in modules if hasattr(m, "weight")
        ]
        with torch.no_grad():
            expected = torch.nn.Sequential(*modules).double()(hidden.double())[:, -1]
        found = ValueMlp(layers, named)(hidden)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
        for module in modules:
            module.float()


@pytest.mark.parametrize(
    ("layers", "activation", "message"),
    [
        ([], "sigmoid", "1 or 2 layers, got 0"),
        ([(torch.zeros(1, 4), None)], "relu", "activation must be one of sigmoid, tanh, identity, got 'relu'"),
        ([(torch.zeros(3, 4), None)], "tanh", "1 or 2 outputs, got 3"),
        ([(torch.zeros(3, 4), None), (torch.zeros(1, 5), None)], "tanh", "second layer must take 3 inputs, got 5"),
        ([(torch.zeros(4), None)], "tanh", r"floating-point tensor \[out, in\], got torch.float32 \[4\]"),
        ([(torch.zeros(1, 4, dtype=torch.int64), None)], "tanh", "floating-point tensor .* got torch.int64"),
        ([([[1.0]], None)], "tanh", "floating-point tensor .* got list"),
        ([(torch.zeros(1, 4), torch.zeros(2))], "tanh", r"bias of a value head must be \[1\], got \[2\]"),
        ([(torch.zeros(1, 4), 0.5)], "tanh", r"bias of a value head must be \[1\], got float"),
    ],
)
def test_bad_heads_are_refused(layers: list[Any], activation: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ValueMlp(layers, activation)
