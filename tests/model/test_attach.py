"""Verification: which models are refused and why, and that a model is left as it was."""

import copy

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

import models
from forktree import (
    BeamSearch,
    Decoder,
    Greedy,
    KeyedSampling,
    Sample,
    Sampling,
    TokenRequest,
    generate,
    ops,
    sequence_logprobs,
)
from forktree.errors import InvalidInput, UnsupportedModel
from forktree.model.attach import attach
from forktree.model.head import LinearHead, OwnHead
from forktree.model.runner import Runner
from tiny import new_model

MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
EXPERTS = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)


def build(config_class: type[hf.PreTrainedConfig], **options: object) -> hf.PreTrainedModel:
    return models.build(config_class, **{"num_hidden_layers": 4, **options})


REFUSED = {
    "mamba": (hf.MambaConfig, dict(state_size=4)),
    "mamba2": (hf.Mamba2Config, dict(state_size=8, num_heads=8, head_dim=8, n_groups=1)),
    "jamba": (
        hf.JambaConfig,
        dict(
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=4,
            mamba_dt_rank=4,
            num_experts=2,
        ),
    ),
    "qwen3_next": (
        hf.Qwen3NextConfig,
        dict(
            head_dim=16,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            shared_expert_intermediate_size=16,
            **EXPERTS,
        ),
    ),
    "minimax": (hf.MiniMaxConfig, dict(head_dim=8, num_local_experts=2, block_size=8)),
    "lfm2": (hf.Lfm2Config, dict(layer_types=["conv", "full_attention"] * 2)),
    "granitemoehybrid": (
        hf.GraniteMoeHybridConfig,
        dict(
            layer_types=["mamba", "attention"] * 2,
            num_local_experts=2,
            num_experts_per_tok=1,
            shared_intermediate_size=16,
            **MAMBA2,
        ),
    ),
    "falcon_h1": (hf.FalconH1Config, dict(mamba_d_ssm=64, **MAMBA2)),
    "llama4_text": (
        hf.Llama4TextConfig,
        dict(
            head_dim=8,
            attention_chunk_size=8,
            num_local_experts=2,
            intermediate_size_mlp=48,
            moe_layers=[],
        ),
    ),
    "bloom": (hf.BloomConfig, dict(n_layer=2, n_head=4)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    config_class, options = REFUSED[name]
    model = build(config_class, **options)
    with pytest.raises(UnsupportedModel, match=f"^{name}: expected .*got "):
        attach(model)


def test_chunked_attention_is_refused_for_its_mask():
    config_class, options = REFUSED["llama4_text"]
    with pytest.raises(UnsupportedModel, match="as in causal attention with window 8, got the opposite"):
        attach(build(config_class, **options))


def test_encoder_decoder_is_refused():
    config = hf.T5Config(vocab_size=99, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
    with pytest.raises(UnsupportedModel, match=r"^t5: .*encoder-decoder"):
        attach(hf.T5ForConditionalGeneration(config).eval())


def test_bidirectional_attention_is_refused():
    with pytest.raises(UnsupportedModel, match=r"^gemma3_text: expected position 0 not to see position 1,"):
        attach(build(hf.Gemma3TextConfig, head_dim=16, use_bidirectional_attention=True))


def test_training_mode_is_an_error():
    model = build(hf.LlamaConfig)
    runner = Runner(attach(model), num_slots=4)
    model.train()
    with pytest.raises(InvalidInput, match=r"llama: .*model\.eval\(\)"):
        attach(model)
    with pytest.raises(InvalidInput, match=r"llama: .*model\.eval\(\)"):
        runner.forward([1], [0], [0], {runner.spec.layers[0]: None})


# ---- each check alone: models made wrong in one way ----


class Wrong(nn.Module):
    """Replaces `forward` of one attention module."""

    def __init__(self, attention: nn.Module, forward) -> None:
        super().__init__()
        self.attention, self.layer_idx, self.change = attention, attention.layer_idx, forward

    def forward(self, **kwargs):
        return self.change(self.attention, **kwargs)


def skipped(attention, hidden_states, **_):
    return hidden_states, None


def twice(attention, **kwargs):
    attention(**kwargs)
    return attention(**kwargs)


def own_mask(attention, attention_mask, **kwargs):
    return attention(attention_mask=torch.zeros(1, 1, 1, 1), **kwargs)


def row_by_row(attention, hidden_states, **kwargs):
    """Looks at the row before, which is a neighbour only when tokens are not packed."""
    return attention(hidden_states=hidden_states + hidden_states.roll(1, 1), **kwargs)


@pytest.mark.parametrize(
    "change, message",
    [
        (skipped, r"each of the layers 0 to 3 to call attention once, got calls from layers \[0, 1, 3\]"),
        (twice, r"got calls from layers \[0, 1, 2, 2, 3\]"),
        (own_mask, "expected forktree's Window .* got Tensor"),
        (row_by_row, "expected a tree of 24 tokens to give the model's own eager logits within 0.001"),
    ],
)
def test_each_check_alone(change, message):
    model = build(hf.LlamaConfig)
    layer = model.model.layers[2]
    layer.self_attn = Wrong(layer.self_attn, change)
    with pytest.raises(UnsupportedModel, match=f"^llama: .*{message}"):
        attach(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_told_from_a_mismatch(dtype):
    model = build(hf.Qwen2Config, num_hidden_layers=12).to(dtype)
    attach(model)
    for layer in model.model.layers:
        layer.self_attn = Wrong(layer.self_attn, row_by_row)
    with pytest.raises(UnsupportedModel, match="of their spread"):
        attach(model)


# ---- the model stays as it was ----


@pytest.fixture(params=["eager", "sdpa"])
def llama(request):
    model = build(hf.LlamaConfig)
    model.set_attn_implementation(request.param)
    return model


def implementations(model: hf.PreTrainedModel) -> list[str]:
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


@torch.no_grad()
def test_attach_leaves_the_model_unchanged(llama):
    ids = torch.arange(20)[None]
    logits, modes, config = llama(ids).logits, implementations(llama), copy.deepcopy(llama.config)
    state = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in llama.named_modules()}

    Runner(attach(llama), num_slots=4)

    assert implementations(llama) == modes
    assert llama.config.to_dict() == config.to_dict() and not llama.training
    assert {name: set(vars(module)) for name, module in llama.named_modules()} == attributes
    assert all(torch.equal(tensor, state[name]) for name, tensor in llama.state_dict().items())
    assert not any(module._forward_hooks for module in llama.modules())
    assert torch.equal(llama(ids).logits, logits)
    assert llama.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 23)


def test_a_refused_model_is_left_unchanged(llama):
    modes = implementations(llama)
    llama.model.layers[1].self_attn = Wrong(llama.model.layers[1].self_attn, own_mask)
    with pytest.raises(UnsupportedModel):
        attach(llama)
    assert implementations(llama) == modes


# ---- heads ----


@pytest.mark.parametrize(
    "config_class, options, scale, cap",
    [
        (hf.LlamaConfig, {}, 1.0, None),
        (hf.Cohere2Config, dict(logit_scale=0.25), 0.25, None),
        (hf.GraniteConfig, dict(logits_scaling=8.0), 0.125, None),
        (hf.Gemma2Config, dict(head_dim=16, final_logit_softcapping=5.0), 1.0, 5.0),
        # logits far below the cap: it shows only at larger hidden states
        (hf.Gemma2Config, dict(head_dim=16, final_logit_softcapping=5.0, initializer_range=0.01), 1.0, 5.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_linear_heads_are_read_off_and_verified(config_class, options, scale, cap, dtype):
    model = build(config_class, **options).to(dtype)
    runner = Runner(attach(model), num_slots=4)
    head = runner.spec.head
    assert isinstance(head, LinearHead) and (head.scale, head.cap) == (scale, cap)
    assert head.parameters[0].data_ptr() == model.lm_head.weight.data_ptr()
    hidden = torch.randn(20, 32).to(dtype)
    own = OwnHead(runner.spec.packed, hf.modeling_outputs.BaseModelOutputWithPast).logits(hidden)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(runner.logits(hidden), own, rtol=tolerance, atol=tolerance)


class Squared(nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden) ** 2


class Capped(nn.Linear):
    """A cap that no config mentions, far above the logits that a verification usually sees."""

    def forward(self, hidden):
        return 20 * torch.tanh(super().forward(hidden) / 20)


class Padded(nn.Linear):
    """More rows than the model's logits have columns."""

    def forward(self, hidden):
        return super().forward(hidden)[..., :99]


class Narrow(nn.Linear):
    """Takes fewer numbers than a hidden state has."""

    def forward(self, hidden):
        return super().forward(hidden[..., :16])


def narrow():
    model = build(hf.LlamaConfig)
    model.lm_head = Narrow(16, 99, bias=False)
    nn.init.normal_(model.lm_head.weight)
    return model


def padded():
    model = build(hf.LlamaConfig)
    model.lm_head = Padded(32, 128, bias=True)
    nn.init.normal_(model.lm_head.weight)
    nn.init.normal_(model.lm_head.bias)
    return model


def biased(config_class):
    model = build(config_class)
    nn.init.normal_(model.lm_head.bias)
    return model


HEADS = {
    "tied": lambda: build(hf.LlamaConfig, tie_word_embeddings=True),
    "phi, biased": lambda: biased(hf.PhiConfig),
    "padded": padded,
    "narrow": narrow,
    "gemma2, capped": lambda: build(hf.Gemma2Config, head_dim=16, final_logit_softcapping=5.0),
    "granite, scaled": lambda: build(hf.GraniteConfig, logits_scaling=8.0),
    "cohere2, scaled": lambda: build(hf.Cohere2Config, logit_scale=0.25),
    "squared": lambda: with_head(Squared),
    "capped by itself": lambda: with_head(Capped),
}


def with_head(odd):
    model = build(hf.LlamaConfig, initializer_range=0.2)
    model.lm_head.__class__ = odd
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_scores_are_of_the_models_own_logits(head, dtype):
    """Against the same weights in fp64, by the model itself. Logits of fused heads are not rounded to 16 bits."""
    model = HEADS[head]().to(dtype)
    runner = Runner(attach(model), num_slots=4)
    assert isinstance(runner.spec.head, LinearHead) == (head not in ("squared", "capped by itself", "narrow"))
    rows = 5
    hidden = torch.randn(rows, 32).to(dtype)
    reference = copy.deepcopy(model).double()
    output = hf.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=hidden.double()[None])
    reference.get_decoder().forward = lambda *_, **__: output
    exact = reference(torch.zeros(1, rows, dtype=torch.long)).logits[0]
    assert exact.shape == (rows, runner.vocab_size)
    log_probs = exact.log_softmax(dim=-1)

    some, last = torch.tensor([98, 0, 7]), torch.tensor([98, 97, 0, 50, 3])
    nobody = np.zeros(rows, np.int64)
    request = TokenRequest(
        top_k=10,
        sample=KeyedSampling(Sampling(temperature=0), seed=nobody, position=nobody),
        select=some,
        targets=last,
        entropy=True,
    )
    found = runner.score(hidden, request)
    fused = isinstance(runner.spec.head, LinearHead)
    near = dict(rtol=0, atol=(1e-4 if fused or dtype == torch.float32 else 2**-7) * float(exact.abs().max()))
    every = torch.arange(rows)
    torch.testing.assert_close(found.lse.double(), exact.logsumexp(1), **near)
    torch.testing.assert_close(found.selected_logits.double(), exact[:, some], **near)
    torch.testing.assert_close(found.target_log_probs.double(), log_probs[every, last], **near)
    torch.testing.assert_close(found.entropy.double(), torch.special.entr(log_probs.exp()).sum(1), **near)
    torch.testing.assert_close(found.top_log_probs.double(), log_probs.topk(10).values, **near)
    torch.testing.assert_close(found.top_log_probs.double(), log_probs.gather(1, found.top_ids), **near)
    torch.testing.assert_close(log_probs[every, found.token], log_probs.amax(1), **near)
    torch.testing.assert_close(found.log_prob.double(), log_probs[every, found.token], **near)


def test_a_head_that_score_tokens_does_not_reproduce_goes_unfused(monkeypatch):
    launch = ops.score_tokens
    monkeypatch.setattr(ops, "score_tokens", lambda *args, softcap, **how: launch(*args, softcap=None, **how))
    spec = attach(build(hf.Gemma2Config, head_dim=16, final_logit_softcapping=5.0))
    assert isinstance(spec.head, OwnHead) and "score_tokens does not reproduce" in spec.head_note


@pytest.mark.parametrize("rows", [1, 7, 40])
@torch.no_grad()
def test_samples_through_an_odd_head_do_not_depend_on_the_company(rows):
    runner = Runner(attach(with_head(Squared)), num_slots=4)
    hidden, keys = torch.randn(40, 32), np.arange(40)

    def sampled(at):
        sample = KeyedSampling(Sampling(top_p=0.9), seed=keys[at], position=keys[at] + 3)
        return runner.score(hidden[at], TokenRequest(sample=sample))

    all_of_them = sampled(slice(None))
    some = sampled(slice(0, rows))
    assert torch.equal(some.token, all_of_them.token[:rows])
    assert torch.equal(some.log_prob, all_of_them.log_prob[:rows])


@pytest.mark.parametrize("odd", [Squared, Capped])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_an_odd_head_goes_unfused(odd, dtype):
    model = build(hf.LlamaConfig, initializer_range=0.01).to(dtype)
    model.lm_head.__class__ = odd
    runner = Runner(attach(model), num_slots=4)
    assert isinstance(runner.spec.head, OwnHead) and "unfused" in runner.spec.head_note
    hidden = torch.randn(20, 32).to(dtype)
    assert torch.equal(runner.logits(hidden), model.lm_head(hidden).float())
    assert "forward" not in vars(model.model)
    assert torch.isfinite(model(torch.arange(5)[None]).logits).all()


def test_a_model_without_head_gives_hidden_states_only():
    runner = Runner(attach(build(hf.LlamaConfig).model), num_slots=4)
    assert runner.spec.head is None and "no language-model head" in runner.spec.head_note
    with pytest.raises(InvalidInput, match="llama: expected a model with a language-model head"):
        runner.logits(torch.zeros(1, 32))


@pytest.mark.parametrize(("name", "value"), [("FORKTREE_BACKEND", "cuda"), ("FORKTREE_BACKEND", "fast")])
def test_a_setting_is_not_blamed_on_the_model(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInput, match=f"{name}={value}: .*; available: reference, torch, cpu"):
        attach(new_model())


class Banned(nn.Linear):
    """Tokens that cannot come, as in a padded vocabulary."""

    def forward(self, hidden):
        return super().forward(hidden).index_fill(-1, torch.tensor(BANNED), -torch.inf)


BANNED = [3, 7, 8, 20]


def banned_by_the_module():
    model = new_model(eos=None)
    model.lm_head.__class__ = Banned
    return model


def banned_by_a_bias():
    model = new_model(eos=None)
    model.lm_head.bias = nn.Parameter(torch.zeros(21).index_fill(0, torch.tensor(BANNED), -torch.inf))
    return model


@pytest.mark.parametrize(("build", "head"), [(banned_by_the_module, OwnHead), (banned_by_a_bias, LinearHead)])
def test_logits_of_minus_infinity_are_of_tokens_that_never_come(build, head):
    """Also where they are wanted: more beams and candidates than there are other tokens, all alike."""
    model, ids = build(), torch.tensor([[1, 2, 4]])
    decoder = Decoder(model, num_slots=1024)
    assert isinstance(decoder.worker.runner.spec.head, head)
    searches = [
        Greedy(),
        Sample(num_return_sequences=20, temperature=50.0),
        Sample(num_return_sequences=20, temperature=50.0, top_k=20),
        BeamSearch(num_beams=18),
    ]
    for search in searches:
        found = decoder.search([ids[0].tolist()], search, max_new_tokens=6)[0].candidates
        tokens = {token for candidate in found for token in candidate.token_ids}
        assert tokens and not tokens & set(BANNED)
    (log_probs,) = sequence_logprobs(model, [[1, 2, 7, 4]])
    assert np.isfinite(log_probs).tolist() == [True, False, True] and log_probs[1] == -np.inf
    for beams in (1, 18):
        how = dict(do_sample=False, max_new_tokens=8, num_beams=beams)
        assert torch.equal(model.generate(ids, custom_generate=generate, **how), model.generate(ids, **how))


def test_a_ban_that_comes_and_goes_is_no_rounding():
    class Sometimes(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden).index_fill(-1, torch.tensor(BANNED[len(hidden) > 1 :]), -torch.inf)

    model = new_model()
    model.lm_head.__class__ = Sometimes
    with pytest.raises(UnsupportedModel, match=r"^llama: expected .* got a relative error of inf "):
        attach(model)


# ---- the yardstick ----


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "config_class, options",
    [(hf.MistralConfig, {}), (hf.Gemma3TextConfig, dict(head_dim=16)), (hf.Cohere2Config, {})],
)
@torch.no_grad()
def test_small_windows_of_fresh_models(config_class, options, size):
    """The embedding of the pad token is a row of zeros: whoever sees nothing else has logits without any spread."""
    model = build(config_class, **options, sliding_window=size, pad_token_id=0, num_hidden_layers=2)
    assert not model.get_input_embeddings().weight[0].any()
    decoder = Decoder(model, num_slots=256)
    assert decoder.worker.runner.spec.layers[0].window == size
    for length in (1, 9):
        prompt = [0, 0, 5, 17, 33, 0, 0, 0, 4][:length]
        found = decoder.search([prompt], Greedy(), max_new_tokens=12)[0].best.token_ids
        logits = model(torch.tensor([prompt + found])).logits[0, length - 1 : -1]
        assert len(found) == 12
        torch.testing.assert_close(
            logits.amax(1), logits.gather(1, torch.tensor(found)[:, None])[:, 0], atol=1e-4, rtol=0
        )
    rows, mask = torch.tensor([[0, 0, 0, 9, 8, 7], [5, 17, 33, 2, 4, 6]]), torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    # with its cache transformers sees everything where the window is 1
    how = dict(attention_mask=mask, do_sample=False, max_new_tokens=8, use_cache=False)
    model.set_attn_implementation("eager")
    assert torch.equal(model.generate(rows, custom_generate=generate, **how), model.generate(rows, **how))


def test_logits_that_are_all_alike_leave_the_hidden_states_to_be_compared():
    model = build(hf.LlamaConfig)
    nn.init.zeros_(model.lm_head.weight)
    attach(model)
    layer = model.model.layers[2]
    layer.self_attn = Wrong(layer.self_attn, row_by_row)
    with pytest.raises(UnsupportedModel, match=r"the model's own eager hidden states within 0\.001 of their spread"):
        attach(model)
