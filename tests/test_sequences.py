"""`sequence_logprobs` against log_softmax of transformers' own full forward in fp64, and what it costs."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import forktree
import models
import tiny
from forktree import InvalidInput, NonFinite, OutOfMemory, sequence_logprobs
from forktree.model.runner import Runner
from forktree.sequences import scored_sequences
from graph_fake import FakeGraphs
from log_probs import assert_close, family, reference

VOCAB = models.VOCAB


def trie_size(texts: Sequence[Sequence[int]]) -> int:
    """Distinct prefixes that have a token after them."""
    return len({tuple(text[: i + 1]) for text in texts for i in range(len(text) - 1)})


@pytest.mark.parametrize("name", models.CONFIGS)
def test_every_architecture_gives_what_transformers_gives(name: str) -> None:
    model = models.tiny(name)
    texts = family(1, VOCAB)
    assert_close(sequence_logprobs(model, texts, max_batch_tokens=37), reference(model, texts), atol=5e-4)


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 64, 512])
def test_passes_may_be_cut_anywhere(max_batch_tokens: int) -> None:
    texts = family(2, tiny.VOCAB)
    found = sequence_logprobs(tiny.model(), texts, max_batch_tokens=max_batch_tokens)
    assert_close(found, reference(tiny.model(), texts))


@pytest.mark.parametrize("seed", range(6))
def test_shared_beginnings_are_computed_once_however_few_slots(seed: int) -> None:
    """One slot for each token of the longest text but its last is enough, and nothing is computed twice."""
    texts = family(10 + seed, tiny.VOCAB)
    longest = max(map(len, texts)) - 1
    expected = reference(tiny.model(), texts)
    for num_slots in (longest, longest + 3, 4 * longest):
        decoder = tiny.decoder(num_slots=num_slots)
        assert_close(sequence_logprobs(decoder, texts, max_batch_tokens=16), expected)
        assert decoder.worker.tokens_computed == trie_size(texts)
        tiny.assert_all_returned(decoder.worker)


def test_many_answers_cost_their_question_once() -> None:
    question, rng = list(range(1, 20)) * 3, np.random.default_rng(0)
    texts = [question + rng.integers(tiny.VOCAB, size=4).tolist() for _ in range(30)]
    texts += [[*question, token] for token in range(tiny.VOCAB)]
    decoder = tiny.decoder()
    found = sequence_logprobs(decoder, texts, prompt_lengths=[len(question)] * len(texts))
    assert decoder.worker.tokens_computed == trie_size(texts) <= len(question) + 3 * 30
    assert_close(found, [log_probs[len(question) - 1 :] for log_probs in reference(tiny.model(), texts)])
    assert sum(np.exp(p[0]) for p in found[30:]) == pytest.approx(1)  # all there is after the question


def test_what_a_tokenizer_returns_is_scored_without_its_padding() -> None:
    texts, tokenizer = ["12+3=", "a", "0.5"], copy.deepcopy(tiny.tokenizer())
    tokenizer.pad_token = tiny.EOS
    expected = reference(tiny.model(), [tokenizer(text).input_ids for text in texts])
    for options in (dict(), dict(padding=True, return_tensors="pt"), dict(padding=True, padding_side="left")):
        assert_close(sequence_logprobs(tiny.model(), tokenizer(texts, **options)), expected)
    with pytest.raises(InvalidInput, match=r"sequences.*a mapping needs input_ids"):
        sequence_logprobs(tiny.model(), {"ids": [[1, 2]]})


def test_prompt_lengths_choose_what_is_scored() -> None:
    texts = family(3, tiny.VOCAB)
    lengths = [1 + i % len(text) for i, text in enumerate(texts)]
    decoder = tiny.decoder()
    found = sequence_logprobs(decoder, texts, prompt_lengths=lengths)
    whole = reference(tiny.model(), texts)
    assert_close(found, [w[n - 1 :] for w, n in zip(whole, lengths, strict=True)])
    assert any(len(f) == 0 for f in found)
    # a text of which nothing is wanted costs nothing
    assert decoder.worker.tokens_computed == trie_size(
        [text for text, n in zip(texts, lengths, strict=True) if n < len(text)]
    )


def test_texts_may_be_arrays_and_tensors_and_none_at_all() -> None:
    texts = [[3, 4, 5], np.array([3, 4], np.int32), torch.tensor([3, 1, 1, 2])]
    expected = reference(tiny.model(), [list(map(int, text)) for text in texts])
    assert_close(sequence_logprobs(tiny.model(), texts, prompt_lengths=np.ones(3, np.int64)), expected)
    assert sequence_logprobs(tiny.model(), []) == []
    assert [x.shape for x in sequence_logprobs(tiny.model(), [[3], [4]])] == [(0,), (0,)]


def test_bf16_is_as_good_as_its_model() -> None:
    """Errors against fp64 are those of transformers' own logits in bf16, which are rounded once more."""
    model = tiny.new_model(spread=0.1).bfloat16()
    texts = family(4, tiny.VOCAB)
    exact = np.concatenate(reference(model, texts))
    found = np.concatenate(sequence_logprobs(model, texts))
    with torch.no_grad():
        own = []
        for text in texts:
            ids = torch.tensor([text])
            log_probs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(dim=-1)
            own.append(log_probs[:-1].gather(1, ids[0, 1:, None]).squeeze(1).numpy())
    assert np.abs(found - exact).mean() <= 1.2 * np.abs(np.concatenate(own) - exact).mean()


def test_the_longest_text_there_may_be() -> None:
    """Every position of the model is used; the last token comes after them."""
    rng = np.random.default_rng(5)
    model = tiny.new_model(rope_parameters=tiny.LIMITED)
    text = rng.integers(tiny.VOCAB, size=model.config.max_position_embeddings + 1).tolist()
    (found,) = sequence_logprobs(model, [text])
    last = float(tiny.next_log_probs(model, text[:-1])[text[-1]])
    assert_close([found], [np.append(reference(model, [text[:-1]])[0], last)], atol=3e-4)
    with pytest.raises(InvalidInput, match=r"sequence 1 has 258 tokens.*256 positions"):
        sequence_logprobs(model, [text, [*text, 1]])


class Largest(TorchDispatchMode):
    """The most rows of any floating-point tensor with `columns` columns."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim and x.shape[-1] == self.columns:
                self.rows = max(self.rows, x.numel() // self.columns)
        return out


def test_logits_are_never_held() -> None:
    model = tiny.new_model(vocab=1234)
    decoder = forktree.Decoder(model)
    texts = family(6, 1234)
    with Largest(1234) as largest:
        found = sequence_logprobs(decoder, texts)
    assert largest.rows == 0
    assert_close(found, reference(model, texts))


def test_results_come_as_they_are_known() -> None:
    """Each as soon as its last token has been computed and one more pass launched: few are held back."""
    texts = [[i, *range(15)] for i in range(20)]
    decoder = tiny.decoder()
    computed = []
    for i, log_probs in scored_sequences(decoder, texts, max_batch_tokens=15):
        assert isinstance(log_probs, np.ndarray)
        computed.append((i, decoder.worker.tokens_computed))
    assert computed == [(i, 15 * min(i + 2, 20)) for i in range(20)]


def test_an_iteration_that_is_left_returns_its_slots() -> None:
    decoder = tiny.decoder()
    for _ in scored_sequences(decoder, family(7, tiny.VOCAB), max_batch_tokens=8):
        break
    tiny.assert_all_returned(decoder.worker)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_decoder_scores_between_the_steps_of_its_searches(ahead: bool) -> None:
    """Its searches give up slots where these are short, and find what they would have found."""
    search = forktree.Sample(num_return_sequences=4)
    prompts = tiny.prompts(8, longest=12)
    expected = {r.index: r.text for r in tiny.decoder().search(prompts, search, max_new_tokens=12)}
    decoder = tiny.decoder(num_slots=120)
    decoder.engine.ahead = ahead
    texts = family(8, tiny.VOCAB, longest=100)
    want = reference(tiny.model(), texts)
    found = {}
    for result in decoder.search_iter(prompts, search, max_new_tokens=12):
        assert result.error is None
        found[result.index] = result.text
        if len(found) in (1, 4):
            assert_close(sequence_logprobs(decoder, texts), want)
            decoder.worker.tree.check()
    assert found == expected
    tiny.assert_all_returned(decoder.worker)


def test_a_result_that_is_no_number_names_sequence_and_token() -> None:
    """The others, which share a beginning and the passes with it, are there all the same."""
    model = tiny.new_model()
    decoder = forktree.Decoder(model)
    texts = [[1, 2, 3], [1, 2, 7, 4, 5], [1, 2, 3, 4]]
    expected = reference(model, texts)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    with pytest.raises(NonFinite, match="token 3 of sequence 1"):
        sequence_logprobs(decoder, texts)
    found = dict(scored_sequences(decoder, texts))
    assert isinstance(found[1], NonFinite)
    assert_close([found[0], found[2]], [expected[0], expected[2]])
    tiny.assert_all_returned(decoder.worker)


WRONG: list[tuple[dict[str, Any], str]] = [
    (dict(sequences=[[1], []]), "sequence 1 is empty"),
    (dict(sequences=[[1, 2], [3, tiny.VOCAB]]), rf"sequence 1 has token id {tiny.VOCAB}.*\[0, {tiny.VOCAB}\)"),
    (dict(sequences=[[1, -1]]), "sequence 0 has token id -1"),
    (dict(sequences=[1, 2, 3]), "sequence 0 must be 1-D token ids.*got 1"),
    (dict(sequences=[[[1, 2]]]), "sequence 0 must be 1-D token ids"),
    (dict(sequences=[[1, [2]]]), "sequence 0 must be 1-D token ids"),
    (dict(sequences=[[1.0, 2.0]]), "sequence 0 must be 1-D token ids"),
    (dict(sequences=["12"]), "sequence 0 must be 1-D token ids.*'12'"),
    (dict(sequences=[[1, 2]], prompt_lengths=[]), "one for each of 1 sequences, got 0"),
    (dict(sequences=[[1, 2]], prompt_lengths=[0]), "prompt length of sequence 0 must be an integer from 1 to 2.*got 0"),
    (dict(sequences=[[1, 2]], prompt_lengths=[3]), "from 1 to 2.*got 3"),
    (dict(sequences=[[1, 2]], prompt_lengths=[1.5]), "got 1.5"),
    (dict(sequences=[[1, 2]], prompt_lengths=[True]), "got True"),
    (dict(sequences=[[1, 2]], prompt_lengths=[-1]), "from 1 to 2, got -1"),
    (dict(sequences=[[1, 2]], prompt_lengths=["1"]), "from 1 to 2, got '1'"),
    (dict(sequences=[[1, 2]], prompt_lengths=np.array([True])), "from 1 to 2, got .*True"),
    (dict(sequences=[[1, 2]], max_batch_tokens=0), "max_batch_tokens must be"),
    (dict(sequences=[[1, 2]], num_slots=0), "num_slots must be"),
    (dict(sequences=[[1, 2]], num_slots=9), "num_slots belongs to the Decoder, which has 2048"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_bad_input_is_named_before_anything_runs(arguments: dict[str, Any], message: str) -> None:
    decoder = tiny.decoder()
    with pytest.raises(InvalidInput, match=message):
        scored_sequences(decoder, **arguments)
    assert decoder.worker.forwards == 0


def test_a_text_that_does_not_fit_alone() -> None:
    with pytest.raises(
        OutOfMemory, match=r"sequence 1 needs 11 KV slots.*10 are free of 10; raise num_slots \(\d+ bytes"
    ):
        sequence_logprobs(tiny.model(), [[1, 2], list(range(12))], num_slots=10)


def test_captured_steps_give_the_same() -> None:
    texts = family(9, tiny.VOCAB)
    decoder = tiny.decoder(num_slots=100)
    decoder.worker.runner = Runner(decoder.worker.runner.spec, num_slots=100, graphs=FakeGraphs())
    assert_close(sequence_logprobs(decoder, texts, max_batch_tokens=24), reference(tiny.model(), texts))


def test_a_model_without_a_head() -> None:
    with pytest.raises(InvalidInput, match="language-model head, got none"):
        sequence_logprobs(tiny.new_model().base_model, [[1, 2]])


def test_a_model_in_fp64_is_scored_in_fp64() -> None:
    model = tiny.new_model().double()
    texts = family(9, tiny.VOCAB)
    assert_close(sequence_logprobs(model, texts, max_batch_tokens=32), reference(model, texts), atol=1e-9)


class Squared(torch.nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) ** 2


def test_a_head_that_cannot_be_fused() -> None:
    model = tiny.new_model(spread=0.1)
    model.lm_head.__class__ = Squared
    texts = family(11, tiny.VOCAB)
    assert_close(sequence_logprobs(model, texts, max_batch_tokens=32), reference(model, texts))
