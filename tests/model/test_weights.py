"""Models that change between calls: what is found afterwards is transformers' own output of the model as it then is."""

import copy
import gc
import pickle
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import forktree
import tiny
from decoding import decoded, drop_in, plain
from forktree import Decoder, UnsupportedModel, ValueHead, search, sequence_logprobs
from forktree.model.attach import attach
from forktree.model.captured import CapturedSteps
from forktree.model.fingerprint import Fingerprint
from forktree.model.head import LinearHead
from forktree.model.runner import Runner
from forktree.rewards.reward_model import RewardModel
from graph_fake import FakeGraphs
from models import tiny as tiny_of

PROMPT = [3, 7, 2, 9, 4, 4, 1, 8, 3, 5, 6, 2]


class LoRA(nn.Module):
    """A layer and what is learned beside it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base, self.on = base, True
        self.a = nn.Parameter(torch.randn(rank, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + (x @ self.a.T @ self.b.T if self.on else 0)


class LinearLoRA(nn.Linear):
    """The same as a kind of linear layer, at first without effect."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight
        self.a, self.b = (
            nn.Parameter(torch.randn(rank, base.in_features)),
            nn.Parameter(torch.zeros(base.out_features, rank)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.a.T @ self.b.T


def rand_like(x: torch.Tensor) -> torch.Tensor:
    return torch.randn_like(x) * 0.3


def with_bias(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(5 * torch.randn(model.lm_head.out_features))


def new_linear(model: Any) -> None:
    model.lm_head = nn.Linear(32, model.lm_head.out_features, bias=False)


def hook(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda _module, _args, output: -output)


def loaded(model: Any) -> None:
    state = {name: rand_like(x) for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def trained(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()
    model(torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def own_data(model: Any) -> None:
    model.lm_head.weight.data = rand_like(model.lm_head.weight.data)


def own_parameter(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(rand_like(model.lm_head.weight))


def lora(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        base = model.get_submodule(name)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoRA(base))

    return change


def layer_replaced(model: Any) -> None:
    other = tiny.new_model(seed=5, eos=None)
    model.model.layers[1] = other.model.layers[1]


def layer_copied(model: Any) -> None:
    layer = copy.deepcopy(model.model.layers[0])
    layer.self_attn.layer_idx = 1
    model.model.layers[1] = layer


def layer_added(model: Any) -> None:
    layer = copy.deepcopy(model.model.layers[0])
    layer.self_attn.layer_idx = 2
    model.model.layers.append(layer)
    model.config.num_hidden_layers = 3


@torch.no_grad()
def scaled(model: Any) -> None:
    for p in model.parameters():
        p.mul_(1.5)


@torch.no_grad()
def one_weight(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.weight[0].add_(3)


def cast(model: Any) -> None:
    model.to(torch.bfloat16)


def set_config(name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.config, name, value)


def negated(model: Any) -> None:
    model.model.layers[0].register_forward_hook(
        lambda _module, _args, output: -output if isinstance(output, torch.Tensor) else (-output[0], *output[1:])
    )


def patched(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    own = attention.forward
    attention.forward = lambda *args, **kwargs: (-own(*args, **kwargs)[0], None)


def base() -> Any:
    return tiny.new_model(eos=None)


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "resize_token_embeddings": (base, lambda model: model.resize_token_embeddings(40, mean_resizing=False)),
    "load_state_dict(assign=True)": (base, loaded),
    ".data =": (base, own_data),
    "a new Parameter": (base, own_parameter),
    "a new Linear": (base, new_linear),
    "an added bias": (base, with_bias),
    "a hook on the head": (base, hook),
    "LoRA on the head": (base, lora("lm_head")),
    "LoRA in a layer": (base, lora("model.layers.0.self_attn.q_proj")),
    ".to(bfloat16)": (base, cast),
    "p.mul_(1.5)": (base, scaled),
    "one row of one weight": (base, one_weight),
    "an optimizer's step": (base, trained),
    "a layer replaced": (base, layer_replaced),
    "a layer copied": (base, layer_copied),
    "a layer added": (base, layer_added),
    "a hook on a layer": (base, negated),
    "forward overridden": (base, patched),
    "sliding_window": (lambda: tiny_of("mistral"), set_config("sliding_window", 3)),
    "final_logit_softcapping": (
        lambda: tiny_of("gemma2"),
        set_config("final_logit_softcapping", 8.0),
    ),
    "scaling": (base, lambda model: setattr(model.model.layers[0].self_attn, "scaling", 1.7)),
}


NEW = 5


@torch.no_grad()
def log_probs(model: Any, tokens: list[int]) -> np.ndarray:
    """Of each token but the first, by transformers alone."""
    rows = model(torch.tensor([tokens]), use_cache=False).logits[0, :-1].double().log_softmax(-1)
    return rows[torch.arange(len(tokens) - 1), tokens[1:]].numpy()


def generated(model: Any, **how: Any) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the scores of all tokens in their places."""
    how |= dict(do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_scores=True)
    found = model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, **how)
    return found.sequences[0, len(PROMPT) :].tolist(), torch.cat(found.scores).float()


def assert_as_transformers(model: Any, decoder: Decoder, tolerance: float = 1e-4) -> tuple[list[int], np.ndarray]:
    """Drop-in, a Decoder that may be older than the model is, and log-probs by both."""
    want, scores = generated(model)
    assert want == plain(model, PROMPT, NEW) == drop_in(model, PROMPT, NEW)
    got, got_scores = generated(model, custom_generate=forktree.generate)
    assert got == want
    torch.testing.assert_close(got_scores, scores, atol=tolerance, rtol=tolerance)
    exact = log_probs(model, [*PROMPT, *want])
    near = dict(atol=tolerance * 10, rtol=tolerance)
    for reward in (decoder, model):
        (found,) = sequence_logprobs(reward, [[*PROMPT, *want]])
        np.testing.assert_allclose(found, exact, **near)
    (result,) = decoder.search(PROMPT, search.Greedy(), max_new_tokens=NEW)
    assert result.best.token_ids == want
    np.testing.assert_allclose(result.best.hypothesis.log_prob, exact[-NEW:].sum(), **near)
    return want, exact


def assert_changed(before: tuple[list[int], np.ndarray], after: tuple[list[int], np.ndarray]) -> None:
    assert before[0] != after[0] or not np.allclose(before[1], after[1], atol=0.05), "else the test shows nothing"


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen(name: str) -> None:
    make, change = CHANGES[name]
    model = make()
    decoder = Decoder(model, num_slots=128)
    before = assert_as_transformers(model, decoder)
    torch.manual_seed(1)
    change(model)
    tolerance = 0.05 if model.dtype == torch.bfloat16 else 1e-4
    after = assert_as_transformers(model, decoder, tolerance)
    if name != ".to(bfloat16)":
        assert_changed(before, after)


def test_adapters_switched_on_and_off_and_trained() -> None:
    model = base()
    lora("lm_head")(model), lora("model.layers.0.mlp.up_proj")(model)
    decoder = Decoder(model, num_slots=128)
    adapters = [m for m in model.modules() if isinstance(m, LoRA)]
    found = [assert_as_transformers(model, decoder)]
    for on in (False, True):
        for adapter in adapters:
            adapter.on = on
        found.append(assert_as_transformers(model, decoder))
        assert_changed(*found[-2:])
    trained(model)
    assert_changed(found[-1], assert_as_transformers(model, decoder))


def test_an_adapter_that_has_no_effect_until_it_is_trained() -> None:
    """The head is taken for a linear one at first."""
    model = base()
    model.lm_head = LinearLoRA(model.lm_head)
    decoder = Decoder(model, num_slots=128)
    assert isinstance(decoder.worker.runner.spec.head, LinearHead)
    before = assert_as_transformers(model, decoder)
    trained(model)
    assert_changed(before, assert_as_transformers(model, decoder))


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj", "lm_head"], init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(base(), config).eval()
    decoder = Decoder(model, num_slots=128)
    before = assert_as_transformers(model, decoder)
    model.add_adapter("other", config)
    model.set_adapter("other")
    other = assert_as_transformers(model, decoder)
    assert_changed(before, other)
    with model.disable_adapter():
        assert_changed(other, assert_as_transformers(model, decoder))
    trained(model)
    trained_one = assert_as_transformers(model, decoder)
    assert_changed(other, trained_one)
    model.merge_adapter()
    np.testing.assert_allclose(assert_as_transformers(model, decoder)[1], trained_one[1], atol=1e-3)


@torch.no_grad()
def test_what_cannot_be_seen_is_told() -> None:
    model = base()
    decoder = Decoder(model, num_slots=128)
    before = assert_as_transformers(model, decoder)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    decoder.weights_changed()
    assert_changed(before, assert_as_transformers(model, decoder))


def test_an_unchanged_model_is_verified_once_and_keeps_its_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = base()
    decoder = Decoder(model, num_slots=128)
    decoded(decoder, PROMPT), drop_in(model)
    verified: list[Any] = []
    for module in ("forktree.engine.worker", "forktree.model.attached"):
        monkeypatch.setattr(sys.modules[module], "attach", lambda model: verified.append(model) or attach(model))
    before = decoder.worker.tokens_computed
    decoded(decoder, PROMPT), drop_in(model), sequence_logprobs(model, [PROMPT])
    assert decoder.worker.tokens_computed == before + NEW and not verified
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    decoded(decoder, PROMPT), drop_in(model)
    assert len(verified) == 2


def test_a_model_that_no_longer_holds_is_refused_until_it_does() -> None:
    model = base()
    decoder = Decoder(model, num_slots=128)
    want = decoded(decoder, PROMPT)
    hook = model.model.layers[0].register_forward_pre_hook(lambda _module, args: (args[0] + args[0].roll(1, 1),))
    for use in (lambda: decoded(decoder, PROMPT), lambda: drop_in(model), lambda: sequence_logprobs(decoder, [PROMPT])):
        with pytest.raises(UnsupportedModel, match="expected a tree of"):
            use()
    hook.remove()
    assert decoded(decoder, PROMPT) == want == plain(model, PROMPT)
    assert_as_transformers(model, decoder)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_search_under_way_goes_on_with_the_new_weights(ahead: bool) -> None:
    """It keeps its tokens, and computes them again."""
    model = base()
    decoder = Decoder(model, num_slots=256)
    engine, first = decoder.engine, plain(model, PROMPT, 9)
    engine.ahead = ahead
    task = decoder.submit(PROMPT, search.Greedy(), max_new_tokens=9)
    for _ in range(4):
        engine.step()
    scaled(model)
    engine.renew()
    before = max(branch.length for branch in decoder.worker.tree.owned(task.index)) - len(PROMPT)
    assert list(engine.run()) == [task] and 3 <= before <= 5
    want = first[:before] + plain(model, PROMPT + first[:before], 9 - before)
    assert task.result[0].token_ids == want != first
    decoder.worker.tree.check()


@pytest.mark.parametrize("ahead", [False, True])
def test_captured_steps(ahead: bool) -> None:
    """They go on after changes in place, and are captured anew where memory or Python code is another."""
    model, graphs = base(), FakeGraphs()
    decoder = Decoder(model, num_slots=128)
    decoder.worker.runner = Runner(decoder.worker.runner.spec, num_slots=128, graphs=graphs)
    decoder.engine.ahead = ahead
    assert decoded(decoder) == plain(model)
    runner = decoder.worker.runner
    captured, captures = runner._captured, graphs.captures
    assert isinstance(captured, CapturedSteps) and captures
    for change in (scaled, trained, own_data, own_parameter, negated, layer_copied, set_config("rms_norm_eps", 0.5)):
        change(model)
        assert decoded(decoder) == plain(model)
        in_place = change in (scaled, trained)
        assert (runner._captured is captured) == in_place == (graphs.captures == captures)
        captured, captures = runner._captured, graphs.captures


def test_buffers_of_captured_steps() -> None:
    """RoPE's frequencies are copies of ours, as some models write them."""
    model, graphs = base(), FakeGraphs()
    decoder = Decoder(model, num_slots=128)
    decoder.worker.runner = Runner(decoder.worker.runner.spec, num_slots=128, graphs=graphs)
    before = assert_as_transformers(model, decoder)
    captures = graphs.captures
    model.model.rotary_emb.inv_freq.mul_(0.3)
    assert_changed(before, assert_as_transformers(model, decoder))
    assert graphs.captures == captures


def test_a_reward_model_that_changes() -> None:
    policy, model = tiny.new_model(), tiny.new_model("qwen3", seed=3).model
    head = ValueHead([(torch.randn(1, 32), None)], activation="sigmoid")
    from forktree.engine.worker import ModelWorker

    judge = RewardModel(ModelWorker(model, num_slots=512), tiny.tokenizer(), head)
    decoder = Decoder(policy, tiny.tokenizer(), num_slots=512)
    particles = search.ParticleFilter(num_particles=4, max_step_tokens=3, reward=judge)
    for change in (lambda: None, lambda: scaled(model)):
        change()
        (result,) = decoder.search("12+3=", particles, max_new_tokens=6)
        for candidate in result.candidates:
            ids = tiny.tokenizer()("12+3=" + candidate.text).input_ids
            want = head.rewards(tiny.last_hidden(_Headless(model), ids)[None]).item()
            assert candidate.score == pytest.approx(want, abs=1e-4)


class _Headless:
    def __init__(self, model: Any) -> None:
        self.base_model = model


# ---- nothing stays with the model, and the model stays with nothing ----


def test_a_deep_copy_is_another_model() -> None:
    model = base()
    drop_in(model)
    twin = copy.deepcopy(model)
    trained(twin)
    assert drop_in(twin, PROMPT) == plain(twin, PROMPT) != plain(model, PROMPT) == drop_in(model, PROMPT)
    layer = copy.deepcopy(model.model.layers[0])
    ids = torch.arange(5)[None]
    hidden = model.model.embed_tokens(ids)
    rope = model.model.rotary_emb(hidden, ids)
    with torch.no_grad():
        own, other = (x(hidden, position_embeddings=rope, attention_mask=None) for x in (model.model.layers[0], layer))
    assert torch.equal(own, other)


def test_a_pickled_model_needs_no_forktree() -> None:
    model = base()
    drop_in(model), Decoder(model, num_slots=64)
    pickled = pickle.dumps(model)
    assert b"forktree" not in pickled
    assert plain(pickle.loads(pickled), PROMPT) == plain(model, PROMPT)


@pytest.mark.parametrize("hooked", [False, True])
def test_nothing_is_kept_alive(hooked: bool) -> None:
    """Not the model, nor what it was made of before."""
    model = tiny_of("gemma2")
    if hooked:  # a hook that holds the model, and a head of its own
        model.lm_head.register_forward_hook(lambda _module, _args, output: output * model.config.head_dim)  # noqa: F821
        lora("model.layers.0.mlp.up_proj")(model)
    drop_in(model), sequence_logprobs(model, [PROMPT])
    old = [model.lm_head, model.model.layers[1], model.model.layers[0].self_attn.q_proj.weight]
    refs = [weakref.ref(x) for x in old]
    model.lm_head = nn.Linear(32, 99, bias=False)
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(torch.randn_like(old[2]))
    model.model.embed_tokens.weight = nn.Parameter(torch.randn(99, 32))  # they were tied
    del old
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3
    drop_in(model)
    ref = weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None


# ---- fingerprints ----


def test_an_unchanged_model_has_one_fingerprint() -> None:
    model = tiny_of("gemma3")
    first = Fingerprint(model)
    plain(model), model.state_dict(), repr(model)
    assert Fingerprint(model) == first and first.built_like(Fingerprint(model))


def test_identities_are_not_taken_over() -> None:
    """A parameter may come to lie where a dead one lay, with as many writes to it."""
    linear = nn.Linear(4, 4)
    for _ in range(100):
        first = Fingerprint(linear)
        del linear.weight
        linear.weight = nn.Parameter(torch.zeros(4, 4))
        assert Fingerprint(linear) != first


def test_autocast_belongs_to_it() -> None:
    linear = nn.Linear(4, 4)
    first = Fingerprint(linear)
    with torch.autocast("cpu", torch.bfloat16):
        assert Fingerprint(linear) != first
    assert Fingerprint(linear) == first


def test_inference_tensors_have_no_count_of_writes() -> None:
    with torch.inference_mode():
        linear = nn.Linear(4, 4)
    assert Fingerprint(linear) == Fingerprint(linear)
    first = Fingerprint(linear)
    linear.weight = nn.Parameter(torch.zeros(4, 4))
    assert Fingerprint(linear) != first
