"""The drop-in against transformers' own `generate`: token for token and score for score."""

import itertools
from typing import Any

import pytest
import torch
from scipy import stats
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, StoppingCriteria

import forktree
from forktree.errors import InvalidInput
from forktree.search.beam import BeamRules, propose

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
    eos = torch.tensor(settings.get("eos_token_id", 1) or [])
    for step, (ours, theirs) in enumerate(zip(got.scores, want.scores, strict=True)):
        # without beams, rows behind their end are not computed: their scores mean nothing
        drawn = want.sequences[:, ids.shape[1] : ids.shape[1] + step]
        live = torch.ones(len(ours), dtype=torch.bool) if beams else ~torch.isin(drawn, eos).any(dim=1)
        torch.testing.assert_close(ours[live], theirs[live], atol=1e-4, rtol=0)
    if beams:
        assert fused.beam_indices.tolist() == want.beam_indices.tolist()
        torch.testing.assert_close(got.sequences_scores, want.sequences_scores, atol=1e-4, rtol=0)
        assert got.beam_indices.tolist() == want.beam_indices.tolist()


BEAMS = [2, 3, 4, 5, 8]
PENALTIES = [0.0, 1.0, -1.0, 2.0]
STOPPING: list[bool | str] = [True, False, "never"]
EOS: list[Any] = [1, [1, 2, 3, 4], None]


@pytest.mark.parametrize(("early_stopping", "eos_token_id"), itertools.product(STOPPING, EOS))
def test_beams(llama: Any, early_stopping: bool | str, eos_token_id: Any) -> None:
    for i, (num_beams, length_penalty) in enumerate(itertools.product(BEAMS, PENALTIES)):
        assert_same(
            llama,
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            eos_token_id=eos_token_id,
            num_return_sequences=1 + i % num_beams,
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


def test_custom_stopping_criterion(llama: Any) -> None:
    class EndsWithEven(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return (input_ids[:, -1] % 6 == 0) & (input_ids.shape[1] > 7)

    for num_beams in (1, 3):
        assert_same(llama, num_beams=num_beams, stopping_criteria=[EndsWithEven()])


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
    drawn = [tuple(row) for row in rows[:, -2:].tolist()]
    keys = list(exact)
    assert set(drawn) <= set(keys)
    observed = [drawn.count(key) for key in keys]
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
    """Same global generator, same draws: the candidates are drawn by the same call."""
    outputs = []
    for custom in (None, forktree.generate):
        torch.manual_seed(5)
        out = llama.generate(
            IDS, attention_mask=MASK, do_sample=True, num_beams=3, max_new_tokens=6, custom_generate=custom
        )
        outputs.append(out.tolist())
    assert outputs[0] == outputs[1]


def test_the_prompt_is_computed_once(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = []
    from forktree.lane import Lane

    init = Lane.__init__

    def watched(self: Lane, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        lanes.append(self)

    monkeypatch.setattr(Lane, "__init__", watched)
    llama.generate(
        IDS[2:], custom_generate=forktree.generate, num_beams=8, do_sample=False, max_new_tokens=4, eos_token_id=None
    )
    assert lanes[0].tokens_computed == 5 + 3 * 8  # the last drawn tokens are never run
    assert lanes[0].tree.slots.in_use == 0


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


def test_inputs_that_cannot_be_honoured_are_refused(llama: Any) -> None:
    embeds = llama.get_input_embeddings()(IDS)
    with pytest.raises(InvalidInput, match="inputs_embeds"):
        llama.generate(inputs_embeds=embeds, custom_generate=forktree.generate, max_new_tokens=3)
    right = torch.tensor([[1, 1, 1, 0, 0]])
    with pytest.raises(InvalidInput, match="left padding"):
        llama.generate(IDS[2:], attention_mask=right, custom_generate=forktree.generate, max_new_tokens=3)
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
