"""Prompts in every form, what tokenizers do to them, and the text of what comes after them."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import tiny
from forktree import BestOfN, Decoder, FunctionReward, Greedy, InvalidInput, MajorityVote, ParticleFilter, Sample
from forktree.detokenise import response_text
from forktree.prompts import read_prompts, tokenise

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)
MESSAGES = [{"role": "user", "content": "1+2="}]
IDS = [3, 5, 7]


@cache
def llama_tokenizer() -> hf.PreTrainedTokenizerFast:
    """As Llama 2's: a piece for a space, which decoding drops from the front of a text, bytes for unknown characters,
    and BOS in front. One token a character, or a byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *tiny.CHARACTERS[1:-1]]
    raw = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    raw.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>")])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def characters(*, single: str | None = None, extra: int = 0, **options: Any) -> hf.PreTrainedTokenizerFast:
    """`tiny.tokenizer`, of one's own. single: what it makes of a text. extra: tokens that no model here embeds."""
    names = [tiny.EOS, *tiny.CHARACTERS, *(f"[PAD{i}]" for i in range(extra))]
    raw = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=tiny.EOS))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens([AddedToken(name, special=True) for name in (tiny.EOS, *names[len(names) - extra :])])
    if single is not None:
        raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(tiny.EOS, 0)])
    options = {"eos_token": tiny.EOS, "clean_up_tokenization_spaces": False, **options}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=raw, **options)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


# ---------------------------------------------------------------- forms

FORMS: dict[str, Callable[[], Any]] = {
    "list": lambda: IDS,
    "tuple": lambda: tuple(IDS),
    "range": lambda: range(3, 8, 2),
    "generator": lambda: iter(IDS),
    "numpy integers": lambda: [np.int32(t) for t in IDS],
    "tensors of one": lambda: [torch.tensor(t) for t in IDS],
    "array [n]": lambda: np.array(IDS, np.uint16),
    "array [1, n]": lambda: np.array([IDS]),
    "tensor [n]": lambda: torch.tensor(IDS, dtype=torch.int32),
    "tensor [1, n]": lambda: torch.tensor([IDS]),
    "in a list": lambda: [IDS],
    "array in a list": lambda: [np.array(IDS)],
    "tensor [1, n] in a list": lambda: [torch.tensor([IDS])],
    "generator of lists": lambda: (ids for ids in [IDS]),
    "mapping": lambda: {"input_ids": IDS},
    "mapping of tensors": lambda: {"input_ids": torch.tensor([IDS]), "attention_mask": torch.ones(1, 3)},
    "mapping in a list": lambda: [{"input_ids": [IDS], "attention_mask": [[1, 1, 1]]}],
    "padded on the left": lambda: {"input_ids": [0, 0, *IDS], "attention_mask": [0, 0, 1, 1, 1]},
    "padded on the right": lambda: {"input_ids": np.array([[*IDS, 9]]), "attention_mask": np.array([[1, 1, 1, 0]])},
    "bool mask": lambda: {"input_ids": [1, *IDS], "attention_mask": torch.tensor([False, True, True, True])},
    "with token types": lambda: {"input_ids": [IDS], "token_type_ids": [[0, 0, 0]], "attention_mask": None},
}


@pytest.mark.parametrize("name", FORMS)
def test_token_ids_come_in_many_forms(name: str) -> None:
    assert read_prompts(FORMS[name]()) == [IDS]


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": [[0, 3, 5], [7, 8, 9]], "attention_mask": [[0, 1, 1], [1, 1, 1]]},
        {"input_ids": torch.tensor([[3, 5, 0], [7, 8, 9]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])},
        {"input_ids": [[3, 5], [7, 8, 9]]},
        [[3, 5], (7, 8, 9)],
        [{"input_ids": [3, 5]}, torch.tensor([7, 8, 9])],
    ],
)
def test_batches_are_several_prompts(batch: Any) -> None:
    assert read_prompts(batch) == [[3, 5], [7, 8, 9]]
    assert (
        read_prompts(np.arange(6).reshape(2, 3))
        == read_prompts(torch.arange(6).reshape(2, 3))
        == [[0, 1, 2], [3, 4, 5]]
    )
    assert read_prompts(np.array(["a", "b"])) == read_prompts(t for t in "ab") == ["a", "b"]
    assert read_prompts([]) == read_prompts(torch.zeros(0, 3, dtype=torch.long)) == []


WRONG: dict[str, tuple[Any, list[str]]] = {
    "messages": (MESSAGES, ["prompts", "apply_chat_template"]),
    "one message": (MESSAGES[0], ["prompts", "apply_chat_template"]),
    "several conversations": ([MESSAGES, MESSAGES], ["prompt 0", "apply_chat_template"]),
    "bytes": (b"12", ["prompts", "bytes", "decode it"]),
    "bytes in a list": ([b"12"], ["prompt 0", "bytes", "decode it"]),
    "bytearray": (bytearray(b"12"), ["prompts", "bytearray"]),
    "a bool": (True, ["prompts", "bool"]),
    "bools": ([True, False], ["prompt 0", "bool"]),
    "bools among ids": ([[3, True]], ["prompt 0", "True"]),
    "a set": ({3, 5}, ["prompts", "set"]),
    "sets": ([{3, 5}], ["prompt 0", "set"]),
    "a float": (2.5, ["prompts", "float", "2.5"]),
    "floats": ([[3.0, 5.0]], ["prompt 0", "3.0"]),
    "float array": (np.array([3.0]), ["prompts", "float64", "[1]"]),
    "float tensor": (torch.ones(1, 3), ["prompts", "torch.float32", "[3]"]),
    "bool tensor": ([torch.ones(3, dtype=torch.bool)], ["prompt 0", "torch.bool"]),
    "cube": (np.zeros((1, 1, 3), int), ["prompts", "int64", "[1, 1, 3]"]),
    "a number of an array": (np.array(3), ["prompts", "int64", "[]"]),
    "None": (None, ["prompts", "None"]),
    "None in a list": ([None], ["prompt 0", "None"]),
    "nested": ([[[3, 5]]], ["prompt 0", "[[3, 5]]"]),
    "ids among texts": (["a", 3], ["prompt 1", "int 3"]),
    "texts in a list": ([["a", "b"]], ["prompt 0", "['a', 'b']"]),
    "mapping without ids": ({"text": "12"}, ["prompts", "dict", "'text'", "input_ids"]),
    "ids of a mapping": ({"input_ids": ["a"]}, ["input_ids of prompts", "str"]),
    "embeddings": ({"input_ids": [3], "inputs_embeds": 0}, ["prompts", "inputs_embeds"]),
    "mask with a hole": (
        {"input_ids": [3, 4, 5], "attention_mask": [1, 0, 1]},
        ["attention_mask", "[1, 0, 1]", "row 0"],
    ),
    "mask of numbers": ({"input_ids": [3, 4], "attention_mask": [1, 2]}, ["attention_mask", "[1, 2]"]),
    "mask of nothing": ({"input_ids": [3, 4], "attention_mask": 1}, ["attention_mask", "zeros and ones, got 1"]),
    "square mask": (
        {"input_ids": [[3, 4]], "attention_mask": np.ones((1, 2, 2))},
        ["attention_mask", "rows of [2]", "[4]"],
    ),
    "short mask": ({"input_ids": [[3, 4]], "attention_mask": [[1]]}, ["attention_mask", "rows of [2]", "[1]"]),
    "batch in a list": ([IDS, torch.ones(2, 3, dtype=torch.long)], ["prompt 1", "2 rows", "by itself"]),
    "everything": (object(), ["prompts", "object"]),
    "an endless id": ([3, 10**5000], ["prompt 0", "a value of type int"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_prompt_is_refused_by_name(name: str) -> None:
    given, parts = WRONG[name]
    decoder = tiny.decoder()
    with pytest.raises(InvalidInput) as error:
        decoder.search(given, Greedy())
    assert all(part in str(error.value) for part in parts), error.value
    assert decoder.worker.forwards == 0


def test_what_a_chat_template_gives_is_searched_in_all_its_forms() -> None:
    tokenizer = characters(pad_token=tiny.EOS)
    decoder = Decoder(tiny.model(), tokenizer, num_slots=2048)
    other = [{"role": "user", "content": "12"}]
    render = tokenizer.apply_chat_template
    ids = tokenizer("u: 1+2=\na: ").input_ids
    given = [
        render(MESSAGES, add_generation_prompt=True),
        render(MESSAGES, add_generation_prompt=True, return_tensors="pt"),
        render(MESSAGES, add_generation_prompt=True, return_tensors="np"),
        render(MESSAGES, add_generation_prompt=True, return_dict=False),
        render(MESSAGES, add_generation_prompt=True, tokenize=False),
    ]
    assert isinstance(given[0], hf.BatchEncoding)
    search = Sample(num_return_sequences=2)
    expected = tiny.texts(decoder.search([ids], search, max_new_tokens=6, seed=4))
    for prompt in given:
        assert tiny.texts(decoder.search(prompt, search, max_new_tokens=6, seed=4)) == expected
    for side in ("left", "right"):
        tokenizer.padding_side = side
        both = render([MESSAGES, other], add_generation_prompt=True, padding=True, return_tensors="pt")
        results = decoder.search(both, search, max_new_tokens=6, seed=4)
        assert [r.prompt for r in results] == [ids, tokenizer("u: 12\na: ").input_ids]
        assert tiny.texts(results)[:1] == expected
    with pytest.raises(InvalidInput, match="prompt 0 is empty"):
        decoder.search(tokenizer(""), search, max_new_tokens=6)
    with pytest.raises(InvalidInput, match="prompt 1 is empty"):
        decoder.search({"input_ids": [[3], [4]], "attention_mask": [[1], [0]]}, search, max_new_tokens=6)


@pytest.mark.parametrize("seed", [-1, 2**127, 1.0, True, "1", None, np.float64(1)])
def test_a_seed_is_an_integer_that_fits(seed: Any) -> None:
    decoder = tiny.decoder()
    with pytest.raises(InvalidInput, match=f"seed must be an integer from 0 to {2**127 - 1}, got"):
        decoder.search("12", Greedy(), seed=seed)
    with pytest.raises(InvalidInput, match="got a value of type int"):
        decoder.search("12", Greedy(), seed=10**5000)
    results = [decoder.search("12", Sample(), seed=s, max_new_tokens=5)[0].text for s in (7, np.int64(7), np.uint8(7))]
    assert len(set(results)) == 1 and decoder.search("12", Sample(), seed=2**127 - 1, max_new_tokens=5)[0].text


# ---------------------------------------------------------------- tokens of a text


@pytest.mark.parametrize(
    ("single", "text", "expected"),
    [
        (None, "12", ["1", "2"]),
        (None, "12<eos>", ["1", "2", tiny.EOS]),
        (None, "<eos>", [tiny.EOS]),
        ("$A <eos>", "12", ["1", "2"]),
        ("$A <eos>", "12<eos>", ["1", "2", tiny.EOS]),
        ("$A <eos> <eos>", "12<eos>3<eos><eos>", ["1", "2", tiny.EOS, "3", tiny.EOS, tiny.EOS]),
        ("<eos> $A", "12<eos>", [tiny.EOS, "1", "2", tiny.EOS]),
        ("<eos> $A <eos>", "12<eos>", [tiny.EOS, "1", "2", tiny.EOS]),
        ("<eos> $A", "<eos>", [tiny.EOS, tiny.EOS]),
    ],
)
def test_only_what_the_tokenizer_itself_appends_is_dropped(single: str | None, text: str, expected: list[str]) -> None:
    tokenizer = characters(single=single)
    assert tokenizer.convert_ids_to_tokens(tokenise(tokenizer, ["1", text])[1]) == expected
    decoder = Decoder(tiny.model(), tokenizer, num_slots=256)
    as_text = decoder.search([text], Sample(num_return_sequences=4), max_new_tokens=5)
    as_ids = decoder.search(
        [tokenizer.convert_tokens_to_ids(expected)], Sample(num_return_sequences=4), max_new_tokens=5
    )
    assert [c.token_ids for c in as_text[0].candidates] == [c.token_ids for c in as_ids[0].candidates]


def test_a_bos_of_the_text_and_one_of_the_tokenizer_are_warned_of_once() -> None:
    tokenizer = llama_tokenizer()
    decoder = Decoder(tiny.model(vocab=len(tokenizer)), tokenizer, num_slots=256)
    with pytest.warns(UserWarning, match="two BOS tokens.*text begins with '<s>'.*the tokenizer puts another") as seen:
        decoder.search(["12", "<s>34", "<s>5"], Greedy(), max_new_tokens=2)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder.search(["12", "1<s>", tokenizer("<s>34").input_ids], Greedy(), max_new_tokens=2)
        Decoder(tiny.model(), tiny.tokenizer(), num_slots=64).search(["<eos>1"], Greedy(), max_new_tokens=2)


def test_a_tokenizer_may_know_more_tokens_than_the_model_embeds() -> None:
    """Judged are the ids that occur: in prompts, and what a stop or a reward reads."""
    model, tokenizer = tiny.model(), characters(extra=5, pad_token="[PAD0]")
    assert len(tokenizer) == tiny.VOCAB + 5
    decoder, plain = Decoder(model, tokenizer, num_slots=1024), tiny.decoder()
    searches = [
        Sample(num_return_sequences=4, stop=("5", "[PAD1]")),
        ParticleFilter(reward=FunctionReward(lambda p, r: 0.5), num_particles=3, step_delimiter="5", max_step_tokens=3),
    ]
    for search in searches:
        found = [d.search(["12+3="], search, max_new_tokens=9)[0] for d in (decoder, plain)]
        assert [c.text for c in found[0].candidates] == [c.text for c in found[1].candidates]
    for prompt in ("12[PAD3]", [3, tiny.VOCAB + 3]):
        with pytest.raises(
            InvalidInput, match=rf"prompt 0 has token id {tiny.VOCAB + 3}: expected ids in \[0, {tiny.VOCAB}"
        ):
            decoder.search([prompt], Greedy())


# ---------------------------------------------------------------- text of a response


def by_decoding_all(tokenizer: Any, prompt: list[int], tokens: list[int]) -> str | None:
    """The text of `tokens` after `prompt`; None if they change what the prompt is decoded to."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else None


def test_the_text_of_a_response_is_what_it_adds_to_the_prompt() -> None:
    """Random continuations, of characters and of bytes, after prompts of all lengths."""
    tokenizer, rng = llama_tokenizer(), np.random.default_rng(0)
    alphabet, spaces = list("12ab+ é日"), 0
    for length in [1, 2, 3, 15, 16, 17, 31, 40, 64, 200]:
        for _ in range(30):
            prompt = tokenizer("".join(rng.choice(alphabet, length))).input_ids
            text_of = response_text(tokenizer, prompt)
            said = "".join(rng.choice(alphabet, 6))
            tokens = tokenizer(said, add_special_tokens=False).input_ids[1:]
            assert text_of([*tokens, tokenizer.eos_token_id]) == text_of(np.array(tokens)) == said
            spaces += said[0] == " "
            anything = rng.integers(0, len(tokenizer), 8).tolist()
            exact = by_decoding_all(tokenizer, prompt, anything)
            assert text_of(anything) == exact if exact is not None else "\ufffd" in text_of(anything)
    assert spaces > 20


def test_a_character_cut_by_the_end_of_the_prompt_counts_to_the_response() -> None:
    tokenizer = llama_tokenizer()
    ids = tokenizer("a日1").input_ids
    text_of = response_text(tokenizer, ids[:4])  # two of three bytes are missing
    assert text_of(ids[4:]) == "日1"
    assert text_of(ids[4:5]) and text_of([]) == ""
    many = tokenizer("日" * 50 + "本").input_ids
    for cut in range(10, len(many)):
        assert by_decoding_all(tokenizer, many[: cut + 1], many[cut + 1 :]) in (
            None,
            response_text(tokenizer, many[: cut + 1])(many[cut + 1 :]),
        )
        assert response_text(tokenizer, many[:cut])(many[cut:]).endswith("本")


def test_rewards_votes_and_candidates_see_one_text_of_prompt_and_response() -> None:
    """With its spaces and, for a prompt given as ids, with its special tokens."""
    tokenizer = llama_tokenizer()
    decoder = Decoder(tiny.model(vocab=len(tokenizer)), tokenizer, num_slots=4096)
    likely = torch.full([len(tokenizer)], -torch.inf)
    likely[tokenizer.convert_tokens_to_ids(["▁", "1", "+", "a"])] = torch.tensor([2.0, 0, 0, 0])
    options = dict(num_samples=24, logits_processor=(lambda ids, scores: likely.expand_as(scores),))
    calls: list[tuple[str, str]] = []
    answers: list[str] = []
    reward = FunctionReward(lambda p, r: calls.append((p, r)) or 0.5)
    vote = MajorityVote(answer=lambda text: answers.append(text) or text, **options)
    for prompt, seen in [("12 + 3", "12 + 3"), (tokenizer("12</s>").input_ids, "<s> 12</s>")]:
        ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        calls.clear()
        best = decoder.search([prompt], BestOfN(reward=reward, **options), max_new_tokens=6)[0]
        expected = [by_decoding_all(tokenizer, ids, c.token_ids) for c in best.candidates]
        assert [c.text for c in best.candidates] == expected and any(t.startswith(" ") for t in expected)
        assert {p for p, _ in calls} == {seen} and sorted(r for _, r in calls) == sorted(expected)
        answers.clear()
        found = decoder.search([prompt], vote, max_new_tokens=6)[0]
        assert sorted(answers) == sorted(c.text for c in found.candidates) == sorted(expected)


def test_a_stop_sees_the_space_that_begins_a_response() -> None:
    tokenizer = llama_tokenizer()
    decoder = Decoder(tiny.new_model(vocab=len(tokenizer)), tokenizer, num_slots=1024)
    stop = decoder._stop([" 1"])
    space, one = tokenizer.convert_tokens_to_ids(["▁", "1"])
    assert not stop(space, [space]) and stop(one, [space, one]) and not stop(one, [one])


def test_texts_that_a_tokenizer_cannot_read_are_shown() -> None:
    """One without an unknown token raises a bare Exception, without saying of which text."""
    raw = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    narrow = hf.PreTrainedTokenizerFast(tokenizer_object=raw)
    decoder = Decoder(tiny.model(), narrow, num_slots=64)
    assert decoder.search("ab", Greedy(), max_new_tokens=1)[0].error is None
    with pytest.raises(InvalidInput, match=r"a text that the tokenizer can read, got 'a\?b': .*UNK"):
        decoder.search(["ab", "a?b"], Greedy(), max_new_tokens=1)
