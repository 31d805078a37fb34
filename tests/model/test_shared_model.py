"""One model, several users at once: forward passes of ours change nothing that others could see."""

import copy
import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

import tiny
from decoding import decoded, drop_in, plain
from forktree import Decoder, FunctionReward, search
from forktree.errors import UnsupportedModel
from forktree.model.head import OwnHead
from models import tiny as tiny_of


def squared(model: Any) -> Any:
    """Its head is not linear: logits come from the model itself."""
    model.lm_head.register_forward_hook(lambda _module, _args, output: output**2)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny.new_model(eos=None),
    "odd head": lambda: squared(tiny.new_model(eos=None)),
    "gemma3": lambda: tiny_of("gemma3"),
    "gpt_oss": lambda: tiny_of("gpt_oss"),
    "gpt2": lambda: tiny_of("gpt2"),
}


def everything(model: nn.Module) -> list[Any]:
    """What the modules and their configs hold, as it is now."""
    own = [(id(m), {k: id(v) for k, v in vars(m).items()}) for m in model.modules()]
    tables = [{k: id(v) for k, v in getattr(m, t).items()} for m in model.modules() for t in TABLES]
    configs = [copy.deepcopy(vars(m.config)) for m in model.modules() if "config" in vars(m)]
    return [own, tables, configs, [(b.data_ptr(), b._version) for b in model.buffers()]]


TABLES = ("_parameters", "_modules", "_buffers", "_forward_hooks", "_forward_pre_hooks")


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_the_model_is_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither afterwards nor at any moment, looked at from within every one of its linear layers."""
    model, looks = MODELS[name](), []
    before = everything(model)
    linear = nn.Linear.forward

    def watch(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        looks.append(everything(model) == before)
        return linear(self, x)

    want = plain(model)
    assert everything(model) == before
    monkeypatch.setattr(nn.Linear, "forward", watch)
    assert drop_in(model, new=3) == want[:3]
    decoder = Decoder(model, num_slots=64)
    assert decoded(decoder, new=3) == want[:3]
    assert all(looks) and len(looks) > 5
    assert isinstance(decoder.worker.runner.spec.head, OwnHead) == (name == "odd head")


def longrope() -> Any:
    """Writes its frequencies into a buffer at every forward."""
    rope = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4)
    sizes = dict(tiny.SIZES, vocab_size=tiny.VOCAB, original_max_position_embeddings=32, rope_parameters=rope)
    torch.manual_seed(0)
    return hf.Phi3ForCausalLM(hf.Phi3Config(**sizes, initializer_range=0.3, eos_token_id=None)).eval()


def test_frequencies_that_others_write_are_not_ours() -> None:
    model = longrope()
    decoder = Decoder(model, num_slots=64)
    want = plain(model)
    long = torch.randint(0, tiny.VOCAB, (1, 40), generator=torch.manual_seed(0))
    with torch.no_grad():
        far = model(long).logits
    assert decoded(decoder) == want and drop_in(model) == want
    with torch.no_grad():
        assert torch.equal(model(long).logits, far)


# ---- forward overrides ----


def by_method(module: nn.Module) -> None:
    own = type(module).forward
    module.forward = types.MethodType(lambda self, *args, **kwargs: own(self, *args, **kwargs), module)


def by_partial(module: nn.Module) -> None:
    """As accelerate does it."""
    module._old_forward = module.forward

    def new_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module._old_forward(*args, **kwargs)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), module.forward)


def by_closure(module: nn.Module) -> None:
    own, calls = module.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    module.forward, module.calls = forward, calls


def by_default(module: nn.Module) -> None:
    module.forward = lambda *args, own=module.forward, **kwargs: own(*args, **kwargs)


@pytest.mark.parametrize("override", [by_method, by_partial, by_closure, by_default])
@pytest.mark.parametrize("where", ["", "model", "model.layers.1", "model.layers.1.self_attn", "lm_head"])
def test_forward_overrides_run(override: Callable[[nn.Module], None], where: str) -> None:
    model = squared(tiny.new_model(eos=None))
    module = model.get_submodule(where)
    override(module)
    before, want = vars(module)["forward"], plain(model)
    assert drop_in(model) == want and decoded(Decoder(model, num_slots=64)) == want
    assert vars(module)["forward"] is before
    if override is by_closure and where:
        count = len(module.calls)
        drop_in(model)
        assert len(module.calls) > count, "its own list"


class Hidden:
    """Holds a module where nobody looks."""

    def __init__(self, module: nn.Module) -> None:
        self._forward = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


def test_a_module_that_hides_another_is_refused() -> None:
    model = tiny.new_model()
    attention = model.model.layers[1].self_attn
    attention.forward = Hidden(attention)
    with pytest.raises(UnsupportedModel, match=r"^llama: "):
        Decoder(model, num_slots=64)


@pytest.mark.parametrize("what", ["the model", "its decoder", "its forward", "a layer"])
def test_compiled_models_are_seen_through(what: str) -> None:
    """Nothing is compiled for ours, and what was compiled for others is not run."""
    model = squared(tiny.new_model(eos=None))
    want, used = plain(model), model
    if what == "the model":
        used = torch.compile(model, backend="eager")
    elif what == "its decoder":
        model.model = torch.compile(model.model, backend="eager")
    elif what == "its forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        model.model.layers[0].compile(backend="eager")
    assert decoded(Decoder(used, num_slots=64)) == want and drop_in(model) == want


# ---- threads ----


@pytest.mark.parametrize("name", ["llama", "odd head"])
def test_two_threads(name: str) -> None:
    """200 calls together, of all kinds in random order, each with prompts of its own: transformers' own results."""
    model, new = MODELS[name](), 2
    prompts = [[i + 1, 5, i + 2] for i in range(4)]
    want = [plain(model, prompt, new) for prompt in prompts]
    own, failures = model.config._attn_implementation, []

    def work(seed: int) -> None:
        rng, decoder = np.random.default_rng(seed), Decoder(model, num_slots=64)
        for _ in range(100):
            i = rng.integers(len(prompts))
            kind = rng.choice(["plain", "drop-in", "decoder"])
            user = {"plain": model, "drop-in": model, "decoder": decoder}[kind]
            try:
                got = {"plain": plain, "drop-in": drop_in, "decoder": decoded}[kind](user, prompts[i], new)
            except BaseException as error:
                failures.append((kind, error))
            else:
                if got != want[i] or model.config._attn_implementation != own:
                    failures.append((kind, i, got))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_reward_that_runs_the_same_model() -> None:
    model, tokenizer = tiny.new_model(), tiny.tokenizer()

    def reward(prompt: str, response: str) -> float:
        ids = tokenizer(prompt + response).input_ids
        return plain(model, ids, 1)[0] / tiny.VOCAB

    decoder = Decoder(model, tokenizer, num_slots=512)
    particles = search.ParticleFilter(num_particles=4, max_step_tokens=2, reward=FunctionReward(reward))
    for result in decoder.search(tiny.prompts(6), particles, max_new_tokens=8):
        assert result.error is None
        for candidate in result.candidates:
            assert candidate.hypothesis.score == pytest.approx(reward(result.prompt, candidate.text))
