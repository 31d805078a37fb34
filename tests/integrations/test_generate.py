"""The drop-in against transformers' own `generate`: token for token and score for score."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DynamicCache,
    EosTokenCriteria,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    StoppingCriteria,
)

import forktree
import tiny
from forktree.engine.worker import ModelWorker
from forktree.errors import InvalidInput, UnsupportedModel
from forktree.search.algorithms.beam import BeamRules, propose

IDS = torch.tensor([[0, 0, 5, 6, 7], [0, 9, 10, 11, 12], [5, 6, 7, 8, 9]])
MASK = (IDS != 0).long()
SHAPE = dict(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def peaked(model: Any) -> Any:
    """Random weights large enough that beams differ in more than rounding."""
    for parameter in model.parameters():
        parameter.data.mul_(2.5)
    return model.eval()


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, max_position_embeddings=128, eos_token_id=1, pad_token_id=0)
    return peaked(LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def gemma() -> Any:
    torch.manual_seed(1)
    config = Gemma2Config(
        **SHAPE, head_dim=8, sliding_window=4, max_position_embeddings=128, eos_token_id=1, pad_token_id=0
    )
    return peaked(Gemma2ForCausalLM(config))


def assert_same(model: Any, ids: torch.Tensor = IDS, mask: torch.Tensor | None = MASK, **how: Any) -> None:
    settings = dict(do_sample=False, max_new_tokens=8, pad_token_id=0, return_dict_in_generate=True, output_scores=True)
    settings.update(how, attention_mask=mask)
    want = model.generate(ids, **settings)
    got = model.generate(ids, custom_generate=forktree.generate, **settings)
    assert got.sequences.tolist() == want.sequences.tolist()
    # without scores to keep, no row of logits is computed unless a processor wants it
    fused = model.generate(ids, custom_generate=forktree.generate, **{**settings, "output_scores": False})
    assert fused.sequences.tolist() == want.sequences.tolist()
    assert len(got.scores) == len(want.scores)
    beams = settings.get("num_beams", 1) > 1
    eos = torch.tensor(settings.get("eos_token_id", 1) or []).flatten()
    live = torch.ones(len(want.scores[0]), dtype=torch.bool)
    for step, (ours, theirs) in enumerate(zip(got.scores, want.scores, strict=True)):
        torch.testing.assert_close(ours[live], theirs[live], atol=1e-4, rtol=0)
        # without beams, but with an EOS, rows that have ended are not computed: their scores mean nothing
        if not beams and len(eos):
            rows = want.sequences[:, : ids.shape[1] + step + 1]
            live &= ~torch.isin(rows[:, -1], eos)
            for criterion in settings.get("stopping_criteria", []):
                live &= ~criterion(rows, want.scores[: step + 1])
    if beams:
        assert fused.beam_indices.tolist() == want.beam_indices.tolist()
        torch.testing.assert_close(got.sequences_scores, want.sequences_scores, atol=1e-4, rtol=0)
        assert got.beam_indices.tolist() == want.beam_indices.tolist()


BEAMS = [2, 3, 4, 5, 8]
PENALTIES = [0.0, 1.0, -1.0, 2.0]
STOPPING: list[bool | str] = [True, False, "never"]
EOS: list[Any] = [1, [1, 2, 3, 4], None]
ENDS = list(itertools.product(STOPPING, EOS))


@pytest.mark.parametrize(("number", "early_stopping", "eos_token_id"), [(i, *x) for i, x in enumerate(ENDS)])
def test_beams(llama: Any, number: int, early_stopping: bool | str, eos_token_id: Any) -> None:
    """All ways to end with all penalties; each number of beams with each of the others."""
    for i, length_penalty in enumerate(PENALTIES):
        num_beams = BEAMS[(number + i) % len(BEAMS)]
        assert_same(
            llama,
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            eos_token_id=eos_token_id,
            num_return_sequences=1 + (3 * number + i) % num_beams,
        )


PROCESSORS = [
    dict(min_new_tokens=3),
    dict(min_length=9),
    dict(max_length=9, max_new_tokens=None),
    dict(repetition_penalty=1.7),
    dict(no_repeat_ngram_size=2),
    dict(bad_words_ids=[[9], [10, 11]]),
    dict(renormalize_logits=True, temperature=None),
    dict(prefix_allowed_tokens_fn=lambda batch, ids: [batch + 1, batch + 2, 9, 10]),
    dict(prefix_allowed_tokens_fn=lambda batch, ids: [3 + (int(ids[-1]) * 7 + batch) % 20, 1, 30]),
]


@pytest.mark.parametrize("extra", PROCESSORS, ids=[next(iter(p)) for p in PROCESSORS])
@pytest.mark.parametrize("num_beams", [1, 3, 4])
def test_logits_processors_see_the_whole_batch(llama: Any, num_beams: int, extra: dict[str, Any]) -> None:
    assert_same(llama, num_beams=num_beams, eos_token_id=[1, 30], **extra)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_sliding_windows_and_caps(gemma: Any, num_beams: int) -> None:
    assert_same(gemma, num_beams=num_beams, max_new_tokens=12)


def test_without_padding_and_with_more_beams_than_tokens(llama: Any) -> None:
    assert_same(llama, IDS[2:], None, num_beams=4)
    torch.manual_seed(2)
    config = LlamaConfig(**{**SHAPE, "vocab_size": 5}, max_position_embeddings=64, eos_token_id=1, pad_token_id=0)
    assert_same(peaked(LlamaForCausalLM(config)), torch.tensor([[2, 3, 4]]), None, num_beams=8, num_return_sequences=8)


class Stops(StoppingCriteria):
    """A row stops where `rule` says so."""

    def __init__(self, rule: Callable[[torch.Tensor, Any], torch.Tensor]) -> None:
        self.rule = rule

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return self.rule(input_ids, scores)


CRITERIA = {
    "multiples": [Stops(lambda ids, _: (ids[:, -1] % 6 == 0) & (ids.shape[1] > 7))],
    "one row each step": [Stops(lambda ids, _: torch.arange(len(ids)) % 4 == ids.shape[1] - 6)],
    "a row stops and takes it back": [Stops(lambda ids, _: torch.arange(len(ids)) % 3 == ids.shape[1] % 3)],
    "two": [Stops(lambda ids, _: ids[:, -1] > 30), Stops(lambda ids, _: (ids[:, 5:] < 9).sum(dim=1) > 1)],
    "scores": [Stops(lambda ids, scores: torch.full((len(ids),), bool(scores and scores[-1].amax() > 15)))],
    "all": [Stops(lambda ids, _: torch.full((len(ids),), ids.shape[1] == 8))],
}


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("eos_token_id", [None, [1, 2, 3, 30]])
def test_rows_that_a_criterion_ends(llama: Any, name: str, eos_token_id: Any) -> None:
    """With an EOS they are padded; without, they go on, from their own logits, until the last has ended."""
    for num_beams, more in ((1, {}), (1, dict(num_return_sequences=1, no_repeat_ngram_size=2)), (3, {})):
        assert_same(llama, num_beams=num_beams, eos_token_id=eos_token_id, stopping_criteria=CRITERIA[name], **more)


def test_ended_rows_give_their_slots_back(llama: Any, workers: list[ModelWorker]) -> None:
    held: list[int] = []
    watch = Stops(lambda ids, _: held.append(workers[-1].tree.slots.in_use) or ids[:, -1] < 0)
    rows = llama.generate(
        IDS,
        attention_mask=MASK,
        custom_generate=forktree.generate,
        max_new_tokens=30,
        do_sample=False,
        eos_token_id=[5, 20],
        stopping_criteria=[watch],
    )
    ended = (rows[:, 5:] == 0).any(dim=1)
    assert ended.tolist() == [True, True, False] and held[-1] < max(held)


def test_an_eos_criterion_needs_a_pad_token() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, eos_token_id=None)).eval()
    criteria = [EosTokenCriteria(eos_token_id=3)]
    with pytest.raises(InvalidInput, match="need a pad_token_id, got None"):
        model.generate(IDS[2:], custom_generate=forktree.generate, max_new_tokens=3, stopping_criteria=criteria)


def test_plain_tensor_is_returned_unless_asked_otherwise(llama: Any) -> None:
    for how in (dict(num_beams=3), dict(num_beams=1)):
        want = llama.generate(IDS, attention_mask=MASK, do_sample=False, max_new_tokens=5, **how)
        got = llama.generate(
            IDS, attention_mask=MASK, do_sample=False, max_new_tokens=5, custom_generate=forktree.generate, **how
        )
        assert isinstance(got, torch.Tensor) and got.tolist() == want.tolist()


def test_samples_follow_the_shaped_distribution(llama: Any) -> None:
    """Two new tokens, top-k 4: all 16 continuations against their exact probabilities."""
    prompt, settings = IDS[2:], dict(do_sample=True, temperature=1.3, top_k=4, top_p=1.0)

    def warped(ids: torch.Tensor) -> torch.Tensor:
        logits = llama(ids).logits[:, -1] / 1.3
        return logits.masked_fill(logits < logits.topk(4).values[:, -1:], -torch.inf).softmax(-1)

    first = warped(prompt)[0]
    exact = {}
    with torch.no_grad():
        for a in first.nonzero().flatten().tolist():
            second = warped(torch.cat([prompt, torch.tensor([[a]])], dim=1))[0]
            for b in second.nonzero().flatten().tolist():
                exact[a, b] = float(first[a] * second[b])
    n = 4000
    torch.manual_seed(7)
    rows = llama.generate(
        prompt,
        custom_generate=forktree.generate,
        num_return_sequences=n,
        max_new_tokens=2,
        eos_token_id=None,
        **settings,
    )
    sampled = [tuple(row) for row in rows[:, -2:].tolist()]
    keys = list(exact)
    assert set(sampled) <= set(keys)
    observed = [sampled.count(key) for key in keys]
    expected = [exact[key] * n / sum(exact.values()) for key in keys]
    assert min(expected) > 1 and stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_candidates_are_those_of_topk_in_the_same_order(spread: float) -> None:
    """Among logits as coarse as bf16 many are equal; what a step picks of these must be what transformers picks."""
    torch.manual_seed(0)
    for k, vocab in ((1, 500), (4, 512), (4, 511), (5, 3000), (16, 4096)):
        logits = (spread * torch.randn(2, k, vocab)).bfloat16().float()
        logits[0, 0, :3], logits[1, -1, -2:] = -torch.inf, torch.nan
        log_probs = logits.round(decimals=1) if spread == 1 else logits
        scores = torch.randn(2, k).round().sort(descending=True)[0]
        rules = BeamRules(k, 2 * k, 1.0, False, 10)
        best, index = (log_probs + scores[:, :, None]).flatten(1).topk(2 * k)
        found = propose(log_probs, scores, rules)
        torch.testing.assert_close(found.scores, best, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found.beam * vocab + found.token, index)


def test_beam_sampling_is_transformers_own(llama: Any) -> None:
    """Same global generator, same samples: the candidates are sampled by the same call."""
    outputs = []
    for custom in (None, forktree.generate):
        torch.manual_seed(5)
        out = llama.generate(
            IDS, attention_mask=MASK, do_sample=True, num_beams=3, max_new_tokens=6, custom_generate=custom
        )
        outputs.append(out.tolist())
    assert outputs[0] == outputs[1]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[ModelWorker]:
    """Those made from now on."""
    made: list[ModelWorker] = []
    init = ModelWorker.__init__

    def watched(self: ModelWorker, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(ModelWorker, "__init__", watched)
    return made


@pytest.mark.parametrize("num_beams", [1, 4])
def test_memory_follows_the_tokens_there_are(
    workers: list[ModelWorker], monkeypatch: pytest.MonkeyPatch, num_beams: int
) -> None:
    tiny.pools_of_nan(monkeypatch, first=8)
    torch.manual_seed(0)
    eos = list(range(1, 25))
    config = LlamaConfig(**SHAPE, max_position_embeddings=2**18, eos_token_id=eos, pad_token_id=0)
    model = peaked(LlamaForCausalLM(config))
    settings = dict(attention_mask=MASK, do_sample=False, num_beams=num_beams)
    got = model.generate(IDS, max_new_tokens=2**17, custom_generate=forktree.generate, **settings)
    assert got.tolist() == model.generate(IDS, max_new_tokens=200, **settings).tolist()
    assert got.shape[1] < 50
    (worker,) = workers
    assert worker.runner.num_slots > len(IDS) * num_beams * 2**17
    assert (
        max(pool.num_slots for pool in worker.runner.pools) <= 2048 and len(worker.tree.slots.is_free()) <= 8192
    )


def test_the_prompt_is_computed_once(llama: Any, workers: list[ModelWorker]) -> None:
    llama.generate(
        IDS[2:], custom_generate=forktree.generate, num_beams=8, do_sample=False, max_new_tokens=4, eos_token_id=None
    )
    assert workers[0].tokens_computed == 5 + 3 * 8  # the last sampled tokens are never run
    assert workers[0].tree.slots.in_use == 0


REFUSED = [
    (dict(output_attentions=True, return_dict_in_generate=True), "output_attentions"),
    (dict(output_hidden_states=True, return_dict_in_generate=True), "output_hidden_states"),
    (dict(output_logits=True, return_dict_in_generate=True), "output_logits"),
    (dict(prompt_lookup_num_tokens=2), "assisted_generation"),
]


@pytest.mark.parametrize(("how", "named"), REFUSED, ids=[n for _, n in REFUSED])
def test_what_cannot_be_honoured_is_refused(llama: Any, how: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        llama.generate(IDS[2:], custom_generate=forktree.generate, max_new_tokens=3, **how)


def test_usual_positions_are_honoured(llama: Any) -> None:
    cumulative = MASK.cumsum(dim=1) - 1
    for num_beams in (1, 3):
        for positions in (cumulative, cumulative.clamp(min=0), cumulative.masked_fill(MASK == 0, 1)):
            assert_same(llama, num_beams=num_beams, position_ids=positions)
        assert_same(llama, IDS[2:], None, num_beams=num_beams, position_ids=torch.arange(5)[None])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_other_positions_are_refused(llama: Any, num_beams: int) -> None:
    cumulative = MASK.cumsum(dim=1) - 1
    wrong = cumulative.clone()
    wrong[0, -1] += 1
    for positions in (torch.arange(5)[None].repeat(3, 1), cumulative + 1, wrong, cumulative.flip(1)):
        with pytest.raises(InvalidInput, match=r"gives position_ids \[\d, 5\] with \["):
            llama.generate(
                IDS,
                attention_mask=MASK,
                position_ids=positions,
                num_beams=num_beams,
                custom_generate=forktree.generate,
                max_new_tokens=3,
            )


class Prepares(LlamaForCausalLM):
    """Gives the model what `change` makes of the usual inputs."""

    change: Callable[[dict[str, Any]], Any] = staticmethod(lambda inputs: None)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        type(self).change(inputs)
        return inputs


CHANGES = {
    "inputs_embeds": lambda i: i.update(inputs_embeds=torch.zeros(len(i["input_ids"]), 7, 32), input_ids=None),
    "input_ids": lambda i: i.update(input_ids=i["input_ids"].flip(1)),
    "attention_mask": lambda i: i.update(attention_mask=torch.tril(torch.ones(5, 5))),
    "token_type_ids": lambda i: i.update(token_type_ids=torch.ones_like(i["input_ids"])),
    "position_ids": lambda i: i.update(position_ids=i["position_ids"] * 2),
    "langs": lambda i: i.update(langs=[1, 2]),
}


@pytest.mark.parametrize("named", CHANGES)
def test_a_model_that_prepares_other_inputs_is_refused(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    """By its class, or by an attribute of its own as wrappers set it; what it adds is named, what it says is not."""
    model = Prepares(LlamaConfig(**SHAPE, eos_token_id=None)).eval()
    settings = dict(attention_mask=MASK, do_sample=False, max_new_tokens=4, pad_token_id=0)
    monkeypatch.setattr(Prepares, "change", staticmethod(lambda i: i.update(is_first=True, bias=None)))
    got = model.generate(IDS, custom_generate=forktree.generate, **settings)
    monkeypatch.undo()
    assert got.tolist() == model.generate(IDS, **settings).tolist()
    monkeypatch.setattr(Prepares, "change", staticmethod(CHANGES[named]))
    with pytest.raises(InvalidInput, match=f"Prepares.prepare_inputs_for_generation gives .*{named} "):
        model.generate(IDS, custom_generate=forktree.generate, **settings)
    own = model.prepare_inputs_for_generation
    monkeypatch.undo()
    model.prepare_inputs_for_generation = lambda *args, **kwargs: CHANGES[named](i := own(*args, **kwargs)) or i
    with pytest.raises(InvalidInput, match=f"gives .*{named} "):
        model.generate(IDS, custom_generate=forktree.generate, **settings)


def test_models_of_images_read_texts() -> None:
    """Whose positions have three axes, and whose encoded images are none."""
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
    config = Qwen2_5_VLConfig(
        text_config=dict(SHAPE, eos_token_id=1, pad_token_id=0, rope_parameters=rope),
        vision_config=dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=32),
        **dict(image_token_id=36, video_token_id=37, vision_start_token_id=38, vision_end_token_id=39),
    )
    torch.manual_seed(0)
    model = peaked(Qwen2_5_VLForConditionalGeneration(config))
    for num_beams in (1, 3):
        assert_same(model, num_beams=num_beams)
    with pytest.raises(InvalidInput, match=r"text-only models on input_ids, got .* too"):
        model.generate(
            IDS[2:],
            pixel_values=torch.zeros(4, 1176),
            image_grid_thw=torch.tensor([[1, 2, 2]]),
            custom_generate=forktree.generate,
            max_new_tokens=3,
        )


def test_models_without_attention_are_refused_by_name() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2)).eval()
    with pytest.raises(UnsupportedModel, match="mamba: "):
        model.generate(IDS[2:], custom_generate=forktree.generate, max_new_tokens=3)


def test_adapters() -> None:
    """LoRA is weights; prompt tuning, P-tuning and prefix tuning put something before the prompt."""
    peft = pytest.importorskip("peft")
    kind, settings = dict(task_type="CAUSAL_LM"), dict(do_sample=False, max_new_tokens=8, pad_token_id=0)

    def adapted(config: Any) -> Any:
        torch.manual_seed(0)
        model = peaked(LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=128, eos_token_id=1)))
        return peft.get_peft_model(model, config).eval()

    model = adapted(peft.LoraConfig(**kind, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False))
    for num_beams in (1, 3):
        settings["num_beams"] = num_beams
        want = model.generate(input_ids=IDS, attention_mask=MASK, **settings)
        got = model.generate(input_ids=IDS, attention_mask=MASK, custom_generate=forktree.generate, **settings)
        assert got.tolist() == want.tolist()
    for config, named in (
        (peft.PromptTuningConfig(**kind, num_virtual_tokens=4), "inputs_embeds"),
        (peft.PromptEncoderConfig(**kind, num_virtual_tokens=4, encoder_hidden_size=16), "inputs_embeds"),
        (peft.PrefixTuningConfig(**kind, num_virtual_tokens=4), "past_key_values|cache"),
    ):
        model = adapted(config)
        for rows in (slice(None), slice(2, None)):
            with pytest.raises(InvalidInput, match=f"gives .*({named}) "):
                model.generate(
                    input_ids=IDS[rows], attention_mask=MASK[rows], custom_generate=forktree.generate, **settings
                )


@pytest.mark.parametrize("num_beams", [1, 3])
def test_positions_are_looked_at_before_anything_runs(workers: list[ModelWorker], num_beams: int) -> None:
    """5 + 24 tokens, the last of which takes no position."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=28)).eval()
    settings = dict(num_beams=num_beams, eos_token_id=None)
    assert_same(model, max_new_tokens=24, **settings)
    workers.clear()
    with pytest.raises(InvalidInput, match="a prompt of 5 tokens and 25 new ones take 29 positions, the model has 28"):
        model.generate(
            IDS, attention_mask=MASK, custom_generate=forktree.generate, max_new_tokens=25, pad_token_id=0, **settings
        )
    assert not workers


HALVES = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=3.0),
    "cohere": lambda: CohereConfig(**SHAPE, logit_scale=0.3),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=6.0),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", HALVES)
def test_half_precision_chooses_among_rounded_logits(name: str, dtype: torch.dtype) -> None:
    """Many logits are equal once they are rounded; hidden states of single tokens are the model's own, bit for bit."""
    config = HALVES[name]()
    config.update(dict(vocab_size=400, eos_token_id=None, pad_token_id=0, bos_token_id=None))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    ids = torch.arange(400)[:, None]
    single = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=1)
    with torch.no_grad():
        logits = model(ids).logits[:, -1]
    assert int((logits == logits.amax(dim=1, keepdim=True)).sum()) - len(ids) > 30
    for num_beams in (1, 4):
        for more in ({}, dict(num_return_sequences=num_beams, return_dict_in_generate=True, output_scores=True)):
            want, got = (
                model.generate(ids, num_beams=num_beams, custom_generate=custom, **single, **more)
                for custom in (None, forktree.generate)
            )
            if more:
                assert torch.equal(got.scores[0], want.scores[0])
                want, got = want.sequences, got.sequences
            assert got.tolist() == want.tolist()


def test_inputs_that_cannot_be_honoured_are_refused(llama: Any) -> None:
    embeds = llama.get_input_embeddings()(IDS)
    with pytest.raises(InvalidInput, match="inputs_embeds"):
        llama.generate(inputs_embeds=embeds, custom_generate=forktree.generate, max_new_tokens=3)
    right = torch.tensor([[1, 1, 1, 0, 0]])
    with pytest.raises(InvalidInput, match="left padding"):
        llama.generate(IDS[2:], attention_mask=right, custom_generate=forktree.generate, max_new_tokens=3)
    empty = DynamicCache()
    for num_beams in (1, 3):
        out = llama.generate(
            IDS[2:],
            past_key_values=empty,
            custom_generate=forktree.generate,
            num_beams=num_beams,
            max_new_tokens=3,
            return_dict_in_generate=True,
        )
        assert empty.get_seq_length() == 0 and not {"cache", "past_key_values"} & set(out)  # keys with values
    cache = llama(IDS[2:, :3], use_cache=True).past_key_values
    with pytest.raises(InvalidInput, match="3 tokens"):
        llama.generate(IDS[2:], past_key_values=cache, custom_generate=forktree.generate, max_new_tokens=3)


class Writes:
    """A processor that writes a value into some rows of texts of one length."""

    def __init__(self, value: float, rows: Any, length: int) -> None:
        self._value, self._rows, self._length = value, rows, length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == self._length:
            scores = scores.clone()
            scores[self._rows, 3:] = self._value
        return scores


@pytest.mark.parametrize("rows", [[1], [0, 4], slice(1, None)])
@pytest.mark.parametrize("length", [5, 7])
def test_beams_go_on_where_processors_ban_nearly_all(llama: Any, rows: Any, length: int) -> None:
    """And where they leave some beams none at all, as long as another one has some."""
    assert_same(llama, num_beams=3, logits_processor=[Writes(-torch.inf, rows, length)])
    bans_all = Writes(-torch.inf, rows, length)
    assert_same(llama, num_beams=4, logits_processor=[bans_all, lambda ids, scores: scores.clamp(max=0)])


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_beams_refuse_what_processors_make_senseless(llama: Any, value: float, do_sample: bool) -> None:
    with pytest.raises(InvalidInput, match="NaN or \\+inf for branch 4 at position 6"):
        llama.generate(
            IDS,
            attention_mask=MASK,
            num_beams=3,
            do_sample=do_sample,
            max_new_tokens=4,
            logits_processor=[Writes(value, 4, 7)],
            custom_generate=forktree.generate,
        )
