"""Hooks on layers: what they see is what transformers has there, and what they change is what a dense forward gives."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import models
import tiny as support
from forktree.errors import InvalidInput, UnsupportedModel
from forktree.model.attach import attach
from forktree.model.hooks import LayerHook, Rows
from forktree.model.model_spec import ModelSpec
from forktree.model.runner import Runner
from graph_fake import FakeGraphs
from models import CONFIGS, NUM_SLOTS, Forest, tiny

HIDDEN = 32
# layers of one kind and of two; hidden states by tuple arguments, experts, parallel blocks, keys shared by layers
NAMES = ["llama", "gemma2", "gpt_oss", "gpt2", "cohere2", *(["gemma4"] if "gemma4" in CONFIGS else [])]


class Nothing(LayerHook):
    """Changes nothing, by None or by what it was given, or by copies."""

    def __init__(self, how: Callable[[Any], Any], capturable: bool) -> None:
        self.how, self.capturable = how, capturable

    def before_attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> Any:
        return self.how((query, key, value))

    def after_attend(self, layer: int, out: Tensor, rows: Rows) -> Any:
        return self.how(out)

    def residual(self, layer: int, hidden: Tensor, rows: Rows) -> Any:
        return self.how(hidden)


def copied(x: Any) -> Any:
    return tuple(map(copied, x)) if isinstance(x, tuple) else x.clone()


NOTHING = {"None": lambda x: None, "the same": lambda x: x, "copies": copied}


class Steps:
    """A runner and a random tree of tokens, the same for all that are made alike."""

    def __init__(self, spec: ModelSpec, captured: bool = False) -> None:
        self.graphs = FakeGraphs() if captured else None
        self.runner = Runner(spec, num_slots=NUM_SLOTS, graphs=self.graphs)
        for tensor in (x for pool in self.runner.pools for x in pool.tensors):
            tensor.fill_(torch.nan)
        self.forest = Forest(np.random.default_rng(1))

    def step(self, pending: dict[int, int], **options: Any) -> Tensor:
        """Hidden states of `pending[branch]` new tokens of each branch."""
        for branch, count in pending.items():
            self.forest.grow(branch, count)
        tokens, positions, slots, layout = self.forest.step(pending)
        return self.runner.forward(tokens, positions, slots, self.runner.plans(layout), **options)

    def random_steps(self, **options: Any) -> list[Tensor]:
        """A prompt and a second one, then forks of both, steps of one token and of several."""
        forest, rng = self.forest, self.forest.rng
        branches = [forest.root(), forest.root()]
        out = [self.step({branches[0]: 9, branches[1]: 14}, **options)]
        for _ in range(4):
            branches.append(forest.fork(branches[0], int(rng.integers(1, forest.length(branches[0]) + 1))))
            out.append(self.step({b: int(rng.choice([1, 1, 3])) for b in branches}, **options))
        return out


@pytest.mark.parametrize(
    ("name", "dtype"),
    # in bf16 a tiny gpt_oss chooses other experts for rounding alone
    [(n, d) for d in (torch.float32, torch.bfloat16) for n in NAMES if (n, d) != ("gpt_oss", torch.bfloat16)],
)
@pytest.mark.parametrize("captured", [False, True])
def test_hooks_that_change_nothing(name: str, captured: bool, dtype: torch.dtype) -> None:
    """Bit for bit, hidden states and pools."""
    spec = models.spec(name, dtype)
    plain = Steps(spec, captured)
    want = plain.random_steps()
    for how in NOTHING.values():
        hooked = Steps(spec, captured)
        hooks = [Nothing(how, capturable=True), Nothing(how, capturable=True)]
        got = hooked.random_steps(hooks=hooks)
        for ours, theirs in zip(got, want, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        pools = ([pool.tensors for pool in steps.runner.pools] for steps in (hooked, plain))
        torch.testing.assert_close(*pools, atol=0, rtol=0, equal_nan=True)
        if hooked.graphs is not None:
            assert hooked.graphs.replays == len(want) > hooked.graphs.captures


class Tap(LayerHook):
    """Keeps every layer's hidden states."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor]] = []
        self.rows: Rows | None = None

    def residual(self, layer: int, hidden: Tensor, rows: Rows) -> None:
        self.seen.append((layer, hidden.clone()))
        self.rows = rows


def layers_of(model: hf.PreTrainedModel) -> nn.ModuleList:
    lists = [x for x in model.modules() if isinstance(x, nn.ModuleList)]
    (layers,) = (x for x in lists if len(x) == model.config.num_hidden_layers)
    return layers


@torch.no_grad()
def layer_outputs(model: hf.PreTrainedModel, path: list[int]) -> list[Tensor]:
    """transformers' hidden states [len(path), H] after every layer, the last of them before the final norm."""
    ids, last = torch.tensor([path]), []
    layers = layers_of(model)
    hook = layers[-1].register_forward_hook(
        lambda _module, _args, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    states = model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False).hidden_states
    hook.remove()
    assert len(states) == model.config.num_hidden_layers + 1
    return [*(x[0] for x in states[1:-1]), last[0][0]]


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_are_those_of_transformers(name: str) -> None:
    """Of all layers: `output_hidden_states`, but for the last of them, which transformers gives after the norm."""
    spec, tap = models.spec(name), Tap()
    model, steps = spec.packed.model, Steps(spec)
    forest = steps.forest
    trunk = forest.root()
    steps.step({trunk: 9})
    branches = [forest.fork(trunk, 9), forest.fork(trunk, 4)]
    pending = {branches[0]: 3, branches[1]: 5}
    steps.step(pending, hooks=[tap])
    assert [layer for layer, _ in tap.seen] == list(range(model.config.num_hidden_layers))
    assert tap.rows.positions.tolist() == [9, 10, 11, 4, 5, 6, 7, 8]
    assert tap.rows.slots.tolist() == [s for b in branches for s in forest.nodes[b].slots]
    for (layer, seen), *paths in zip(tap.seen, *(layer_outputs(model, forest.path(b)) for b in branches), strict=True):
        want = torch.cat([x[-n:] for x, n in zip(paths, pending.values(), strict=True)])
        assert seen.shape == want.shape and want.std() > 0.1, layer
        torch.testing.assert_close(seen, want, atol=1e-4, rtol=1e-4)


class Steer(LayerHook):
    """Adds a vector to the hidden state after one layer, as much as each row says."""

    capturable = True

    def __init__(self, layer: int, vector: Tensor) -> None:
        self.layer, self.vector = layer, vector

    def residual(self, layer: int, hidden: Tensor, rows: Rows) -> Tensor | None:
        if layer != self.layer:
            return None
        return hidden + (rows.parameters["strength"][:, None] * self.vector).to(hidden.dtype)


@torch.no_grad()
def steered(model: hf.PreTrainedModel, path: list[int], layer: int, vector: Tensor, since: int) -> Tensor:
    """Post-norm hidden states of a text, dense, with the vector added from position `since` on by a forward hook."""
    layers = layers_of(model)

    def add(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, since:] += vector
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hook = layers[layer].register_forward_hook(add)
    ids, found = torch.tensor([path]), []
    end = model.get_decoder() if isinstance(model.get_decoder(), hf.PreTrainedModel) else model.base_model
    seen = end.register_forward_hook(lambda _module, _args, out: found.append(out.last_hidden_state[0]))
    model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    hook.remove()
    seen.remove()
    return found[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("captured", [False, True])
def test_a_vector_for_one_branch(name: str, captured: bool) -> None:
    """Its rows, now and in later steps, are those of a dense forward with a forward hook; all others are as without."""
    spec = models.spec(name)
    model = spec.packed.model
    assert model.config._attn_implementation == "eager"
    vector = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0))
    plain, hooked = Steps(spec), Steps(spec, captured)
    steer = Steer(1, vector)
    trunk = hooked.forest.root()
    prefill = dict(hooks=[steer], row_parameters={"strength": np.zeros(9, np.float32)})
    before = hooked.step({trunk: 9}, **prefill), plain.step({plain.forest.root(): 9})
    torch.testing.assert_close(*before, atol=1e-5, rtol=1e-5)
    one, other = hooked.forest.fork(trunk, 9), hooked.forest.fork(trunk, 6)
    assert (one, other) == (plain.forest.fork(trunk, 9), plain.forest.fork(trunk, 6))
    for count in (4, 1, 1, 2):
        strength = torch.tensor([1.0] * count + [0.0])
        got = hooked.step({one: count, other: 1}, hooks=[steer], row_parameters={"strength": strength})
        want = plain.step({one: count, other: 1})
        dense = steered(model, hooked.forest.path(one), 1, vector, since=9)[-count:]
        assert (dense - want[:-1]).abs().max() > 0.1  # it does something
        torch.testing.assert_close(got[:-1], dense, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got[-1], want[-1], atol=1e-5, rtol=1e-5)
    if captured:
        assert hooked.graphs.captures == 1 and hooked.graphs.replays == 5


class Scale(LayerHook):
    """Multiplies what heads find, and values before they are stored."""

    capturable = True

    def before_attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> Any:
        return query, key, 2 * value if layer == 1 else value

    def after_attend(self, layer: int, out: Tensor, rows: Rows) -> Tensor | None:
        return 0.25 * out if layer == 2 else None


@pytest.mark.parametrize("captured", [False, True])
def test_what_attention_reads_and_gives(captured: bool) -> None:
    """As a model whose weights say the same."""
    other = tiny("llama")
    with torch.no_grad():
        other.model.layers[1].self_attn.v_proj.weight *= 2
        other.model.layers[2].self_attn.o_proj.weight *= 0.25
    want = Steps(attach(other)).random_steps()
    got = Steps(models.spec("llama"), captured).random_steps(hooks=[Scale()])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_hooks_come_one_after_the_other() -> None:
    class Add(LayerHook):
        def residual(self, layer: int, hidden: Tensor, rows: Rows) -> Tensor | None:
            return hidden + 1 if layer == 1 else None

    class Double(LayerHook):
        def residual(self, layer: int, hidden: Tensor, rows: Rows) -> Tensor | None:
            return hidden * 2 if layer == 1 else None

    taps = [Tap() for _ in range(3)]
    Steps(models.spec("llama")).random_steps(hooks=[taps[0], Add(), taps[1], Double(), taps[2]])
    for (layer, x), (_, y), (_, z) in zip(*(tap.seen for tap in taps), strict=True):
        assert torch.equal(y, x + 1 if layer == 1 else x) and torch.equal(z, y * 2 if layer == 1 else y)


def test_nothing_stays_with_the_model() -> None:
    """Neither afterwards, nor if a hook raises; hooks of its own run before ours, in every pass."""
    model, tap, calls = tiny("llama"), Tap(), []

    class Fails(LayerHook):
        def residual(self, layer: int, hidden: Tensor, rows: Rows) -> None:
            raise ZeroDivisionError(f"layer {layer}")

    own = model.model.layers[1].register_forward_hook(lambda _module, _args, out: calls.append(1) or out + 1)
    steps = Steps(attach(model))
    calls.clear()
    before = [dict(m._forward_hooks) for m in model.modules()]
    copies = [dict(m._forward_hooks) for m in steps.runner.spec.packed.decoder.modules()]
    trunk = steps.forest.root()
    first = steps.step({trunk: 3}, hooks=[tap])
    with pytest.raises(ZeroDivisionError, match="layer 0"):
        steps.step({trunk: 1}, hooks=[Fails()])
    assert [dict(m._forward_hooks) for m in model.modules()] == before
    assert [dict(m._forward_hooks) for m in steps.runner.spec.packed.decoder.modules()] == copies
    assert len(calls) == 1 and len(tap.seen) == 3
    ids = torch.tensor([steps.forest.path(trunk)[:3]])
    with torch.no_grad():
        torch.testing.assert_close(first, model.model(ids).last_hidden_state[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tap.seen[1][1], layer_outputs(model, ids[0].tolist())[1], atol=1e-5, rtol=1e-5)
    own.remove()
    steps.step({trunk: 1})
    assert len(calls) == 3  # both of the above


class Max(LayerHook):
    """Reads on the host."""

    def __init__(self, capturable: bool) -> None:
        self.capturable, self.largest = capturable, 0.0

    def residual(self, layer: int, hidden: Tensor, rows: Rows) -> None:
        self.largest = max(self.largest, hidden.abs().max().item())


def test_steps_with_a_hook_that_cannot_be_captured_run_eagerly() -> None:
    steps = Steps(models.spec("llama"), captured=True)
    trunk, reader = steps.forest.root(), Max(capturable=False)
    steps.step({trunk: 3})
    assert (steps.graphs.captures, steps.graphs.replays) == (1, 1)
    steps.step({trunk: 3}, hooks=[Scale(), reader])
    assert (steps.graphs.captures, steps.graphs.replays) == (1, 1) and reader.largest > 0
    steps.step({trunk: 3})
    assert (steps.graphs.captures, steps.graphs.replays) == (1, 2)


def test_a_hook_that_only_claims_to_be_capturable_is_refused_by_name() -> None:
    """The model's other steps are captured as before."""
    steps = Steps(models.spec("llama"), captured=True)
    trunk = steps.forest.root()
    message = r"^llama: expected hooks that can be captured, .* got RuntimeError from Scale, Max: aten._local_scalar"
    with pytest.raises(InvalidInput, match=message):
        steps.step({trunk: 3}, hooks=[Scale(), Max(capturable=True)])
    steps.step({trunk: 3})
    assert steps.graphs.replays == 1


def test_graphs_are_those_of_the_hooks_of_a_step() -> None:
    """Other hooks, other kinds of parameters and larger steps are captured anew, and plain ones are kept."""
    vectors = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(0))
    first, second = (Steer(1, vector) for vector in vectors)
    plain, hooked = Steps(models.spec("llama")), Steps(models.spec("llama"), captured=True)
    assert plain.forest.root() == hooked.forest.root() == 0
    dtypes = {first: torch.float32, second: torch.float64}
    for hooks, count, captures in (
        ([], 3, 1),
        ([first], 3, 2),
        ([], 2, 2),
        ([first], 1, 2),
        ([second], 1, 3),
        ([second], 20, 4),
        ([first, second], 1, 5),
        ([], 1, 5),
    ):
        strength = {"strength": torch.rand(count, dtype=dtypes[hooks[0]])} if hooks else {}
        got = hooked.step({0: count}, hooks=hooks, row_parameters=strength)
        torch.testing.assert_close(got, plain.step({0: count}, hooks=hooks, row_parameters=strength))
        assert hooked.graphs.captures == captures


def test_pools_that_grow_and_plans_that_move_take_hooks_along(monkeypatch: pytest.MonkeyPatch) -> None:
    support.pools_of_nan(monkeypatch, first=4)
    spec, hooks = models.spec("gemma2"), [Scale()]
    want, got = Steps(spec).random_steps(hooks=hooks), Steps(spec, captured=True).random_steps(hooks=hooks)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


class Narrow(LayerHook):
    def residual(self, layer: int, hidden: Tensor, rows: Rows) -> Tensor:
        return hidden[:, :-1]


class Half(LayerHook):
    def after_attend(self, layer: int, out: Tensor, rows: Rows) -> Tensor:
        return out.half()


class Forgetful(LayerHook):
    def before_attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> Any:
        return query, key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(hooks=[Narrow()]),
            r"^Narrow.residual must return torch.float32 \[2, 32\] on cpu, or None, for layer 0, got .* \[2, 31\]",
        ),
        (dict(hooks=[Half()]), r"^Half.after_attend must return torch.float32 \[2, 4, 8\] .* got torch.float16 \[2, 4"),
        (dict(hooks=[Forgetful()]), r"^Forgetful.before_attend must return .* and .* and .*, or None, for layer 0"),
        (dict(hooks=[print]), "^hooks must be LayerHook objects, got builtin_function_or_method"),
        (dict(row_parameters={"strength": torch.ones(2)}), r"^row_parameters are read by hooks, .* got \['strength'\]"),
        (
            dict(hooks=[Scale()], row_parameters={"strength": torch.ones(3)}),
            r"^row_parameters\['strength'\] must be \[2, ...\], one value a token, got \[3\]",
        ),
        (dict(hooks=[Scale()], row_parameters={"strength": 1.0}), r"must be \[2, ...\], one value a token, got float"),
    ],
)
def test_what_hooks_may_not(options: dict[str, Any], message: str) -> None:
    steps = Steps(models.spec("llama"))
    with pytest.raises(InvalidInput, match=message):
        steps.step({steps.forest.root(): 2}, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_by_cuda() -> None:
    want = Steps(models.spec("llama")).random_steps(hooks=[Scale()])
    steps = Steps(attach(tiny("llama").to("cuda")))
    got = [x.cpu() for x in steps.random_steps(hooks=[Scale()])]
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
    assert steps.runner._captured is not None and steps.runner._captured._hooked.by_bucket


# ---- models whose layers cannot be seen ----


class Stacked(nn.Module):
    """A layer that hands on more than one hidden state, as AltUp does."""

    def __init__(self, layer: nn.Module, first: bool, last: bool) -> None:
        super().__init__()
        self.layer, self.first, self.last = layer, first, last
        self.attention_type = getattr(layer, "attention_type", None)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden = self.layer(hidden_states if self.first else hidden_states[0], **kwargs)
        return hidden if self.last else torch.stack([hidden, hidden])


def stacked(model: Any) -> None:
    layers = model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = Stacked(layer, i == 0, i == len(layers) - 1)


class Several(nn.Module):
    """Layers as one."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        for i, layer in enumerate(layers):
            self.add_module(f"layer{i}", layer)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        for layer in self.children():
            hidden_states = layer(hidden_states, **kwargs)
        return hidden_states


def in_one(model: Any) -> None:
    model.model.layers = nn.ModuleList([Several(list(model.model.layers))])


def listed_twice(model: Any) -> None:
    model.model.others = nn.ModuleList(list(model.model.layers))


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (stacked, r"expected decoder layer 0 to return hidden states \[1, T, H\], got \[2, 1, \d+, 32\]"),
        (in_one, "expected one list of 3 modules, each around the attention of its layer, got none"),
        (listed_twice, "expected one list of 3 modules, .* got layers and others"),
    ],
)
def test_layers_that_cannot_be_seen_are_refused_by_name(change: Callable[[Any], None], note: str) -> None:
    """The model is attached, and its attention can be hooked."""
    model = tiny("llama")
    change(model)
    steps = Steps(attach(model))
    with pytest.raises(UnsupportedModel, match=f"^llama: Tap.residual needs .*: {note}.*; use before_attend or after_"):
        steps.step({steps.forest.root(): 2}, hooks=[Tap()])
    assert math.isfinite(steps.step({steps.forest.root(): 2}, hooks=[Scale()]).sum())
