"""Reward models as they lie on disk: rewards are those that transformers' own classes give on the text that the model's
authors feed."""

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn

import tiny
from forktree import InvalidInput, Reward, RewardError, RewardModel, StepFormat, ValueHead, cli, load_reward
from forktree.rewards.base import Rewards
from forktree.rewards.step_format import REWARD_FORMATS
from forktree.search.request import reward_branches

QUESTION = "12+3="
RESPONSES = ["1+2.\n\n3-4.\n\n", "1+2.\n\n3", "ab.\n- 5\n\n\nc", "a", "", "5.\n"]
SMALL = {**tiny.SIZES, "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(path: Path, *special: str, single: str | None = None, **options: Any) -> hf.PreTrainedTokenizerFast:
    """A tokenizer of bytes, but ".\n" and "\n\n" are one token; saved to `path`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(".", "Ċ"), ("Ċ", "Ċ")]
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *("".join(m) for m in merges)])}
    raw = Tokenizer(models.BPE(vocabulary, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(t, special=True) for t in special])
    if single is not None:
        known = [(t, raw.token_to_id(t)) for t in special]
        raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=known)
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False, **options)
    tokenizer.save_pretrained(path)
    return tokenizer


def rewards(reward: Reward, responses: Sequence[str] = RESPONSES, prompt: str = QUESTION) -> Rewards:
    """What a reward says of these responses to the prompt."""
    decoder, characters = tiny.decoder(), tiny.tokenizer()

    async def script(root: Any) -> Rewards:
        branches = root.fork(len(responses))
        for branch, response in zip(branches, responses, strict=True):
            branch.append(characters(response).input_ids)
        return await reward_branches(branches, reward)

    task = decoder.engine.submit(lambda task: script(task.roots[0].branch), [characters(prompt).input_ids], text=prompt)
    list(decoder.engine.run())
    if task.error is not None:
        raise task.error
    tiny.assert_all_returned(decoder.worker)
    return task.result


def assert_rewards(found: Rewards, expected: Sequence[float]) -> None:
    assert found.errors == [None] * len(expected)
    assert found.values.tolist() == pytest.approx(expected, abs=1e-5)
    assert np.ptp(expected) > 1e-3


def save(model: hf.PreTrainedModel, path: Path, head: nn.Module | None = None, *, name: str, **config: Any) -> None:
    """As the checkpoint of a class of that name, whose head lies beside the model's weights."""
    model.save_pretrained(path)
    if head is not None:
        tensors = load_file(path / "model.safetensors")
        tensors |= {key: value.detach().clone() for key, value in head.state_dict().items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**settings, "architectures": [name], **config}))


def split(response: str, delimiter: str) -> list[str]:
    """Steps, an empty one after the last delimiter left out."""
    steps = response.split(delimiter)
    return steps[:-1] if len(steps) > 1 and not steps[-1] else steps


class Scores(nn.Module):
    def __init__(self, outputs: int, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.score = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, outputs))


@pytest.fixture
def generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs `forktree generate` on one prompt; returns exit code and standard error in one line."""
    model = tmp_path / "policy"
    tiny.new_model().save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": QUESTION}) + "\n")

    def call(*options: str) -> tuple[int, str]:
        base = ["--model", str(model), "--prompts", str(tmp_path / "in.jsonl"), "--max-new-tokens", "6"]
        monkeypatch.setattr(sys, "argv", ["forktree", "generate", *base, *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), " ".join(capsys.readouterr().err.split())

    return call


# ---------------------------------------------------------------- the formats by name


@pytest.fixture
def qwen(tmp_path: Path) -> tuple[Path, hf.PreTrainedModel, Scores, Any]:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<extra_0>")
    tokenizer = byte_level(tmp_path, *special, chat_template=CHAT, eos_token="<|im_end|>")
    torch.manual_seed(0)
    model = hf.Qwen2Model(hf.Qwen2Config(vocab_size=len(tokenizer), **SMALL)).eval()
    head = Scores(2)
    save(model, tmp_path, head, name="Qwen2ForProcessRewardModel")
    return tmp_path, model, head, tokenizer


@torch.no_grad()
def qwen_rewards(model: Any, head: Scores, tokenizer: Any) -> list[float]:
    """The last of the step rewards: softmax of the second class at each <extra_0> of the rendered conversation."""
    found = []
    for response in RESPONSES:
        system = "Please reason step by step, and put your final answer within \\boxed{}."
        content = "<extra_0>".join(split(response, "\n\n")) + "<extra_0>"
        messages = [("system", system), ("user", QUESTION), ("assistant", content)]
        text = tokenizer.apply_chat_template([dict(role=r, content=c) for r, c in messages], tokenize=False)
        ids = tokenizer(text, return_tensors="pt").input_ids
        probabilities = head.score(model(input_ids=ids).last_hidden_state).softmax(dim=-1)[0, :, 1]
        found.append(float(probabilities[ids[0] == tokenizer.convert_tokens_to_ids("<extra_0>")][-1]))
    return found


def test_qwen_prm(qwen: Any) -> None:
    path, *model = qwen
    assert_rewards(rewards(load_reward(str(path), format="qwen-prm")), qwen_rewards(*model))


@pytest.mark.parametrize("single", ["$A <|endoftext|>", "$A <extra_0>"])
def test_a_tokenizer_that_appends_a_token_does_not_move_the_reward(qwen: Any, single: str) -> None:
    path, model, head, tokenizer = qwen
    expected = qwen_rewards(model, head, tokenizer)
    byte_level(path, "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<extra_0>", single=single)
    assert_rewards(rewards(RewardModel.load(path, format="qwen-prm")), expected)


@torch.no_grad()
def test_a_format_of_ones_own_with_the_chat_template_of_the_tokenizer(qwen: Any) -> None:
    """What follows the last separator in the rendered text is not fed."""
    path, model, head, tokenizer = qwen
    chat = StepFormat("chat", "\n\n", "<extra_0>", choice=0)
    expected = []
    for response in RESPONSES:
        content = "<extra_0>".join(split(response, "\n\n")) + "<extra_0>"
        text = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{content}"
        hidden = model(input_ids=tokenizer(text, return_tensors="pt").input_ids).last_hidden_state[0, -1]
        expected.append(float(head.score(hidden).softmax(dim=-1)[0]))
    assert_rewards(rewards(RewardModel.load(path, format=chat)), expected)


@torch.no_grad()
def test_math_shepherd(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *tiny.CHARACTERS[1:-1], "к", "и"]
    merges = [("▁", "+"), ("▁", "-"), ("к", "и"), ("▁", "ки")]
    vocabulary = {p: i for i, p in enumerate([*pieces, *("".join(m) for m in merges)])}
    raw = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    raw.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>")])
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = hf.MistralForCausalLM(hf.MistralConfig(vocab_size=len(tokenizer), sliding_window=None, **SMALL)).eval()
    model.save_pretrained(tmp_path)
    candidates = tokenizer.encode("+ -")[1:]
    tag = tokenizer.encode("ки")[-1]
    assert len(candidates) == 2
    expected = []
    for response in RESPONSES:
        output = "\n".join(f"{step} ки" for step in split(response, "\n"))
        ids = torch.tensor([tokenizer.encode(f"{QUESTION} {output}")])
        scores = model(input_ids=ids).logits[:, :, candidates].softmax(dim=-1)[:, :, 0]
        expected.append(float(scores[ids == tag][-1]))
    assert_rewards(rewards(RewardModel.load(tmp_path, format="math-shepherd")), expected)


@torch.no_grad()
def test_skywork_prm(tmp_path: Path) -> None:
    """Steps are tokenised by themselves, so that the line break after a full stop is a token of its own."""
    tokenizer = byte_level(tmp_path, "<|endoftext|>", bos_token="<|endoftext|>")
    torch.manual_seed(0)
    model = hf.Qwen2ForCausalLM(hf.Qwen2Config(vocab_size=len(tokenizer), **SMALL)).eval()
    head = nn.Module()
    head.v_head = nn.Module()
    head.v_head.summary = nn.Linear(32, 1)
    save(model, tmp_path, head, name="Qwen2ForPrmModel")
    (newline,) = tokenizer.encode("\n")
    assert tokenizer.encode(".\n")[-1] != newline
    expected = []
    for response in RESPONSES:
        ids = tokenizer.encode(tokenizer.bos_token + QUESTION + "\n")
        for step in split(response, "\n"):
            ids += [*(tokenizer.encode(step) if step else []), newline]
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        expected.append(float(head.v_head.summary(hidden).sigmoid()))
    assert_rewards(rewards(RewardModel.load(tmp_path, format="skywork-prm")), expected)


LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize("pad", [None, "\n"])
@torch.no_grad()
def test_outcome(tmp_path: Path, pad: str | None) -> None:
    """A sequence classifier on a rendered chat: trimmed, with one BOS, read at its last token that is no padding."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = byte_level(
        tmp_path, *special, single="<|endoftext|> $A", bos_token="<|endoftext|>", chat_template=LLAMA_CHAT
    )
    torch.manual_seed(0)
    pad_id = None if pad is None else tokenizer.encode(pad, add_special_tokens=False)[0]
    sizes = {**SMALL, "vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": pad_id}
    model = hf.LlamaForSequenceClassification(hf.LlamaConfig(**sizes)).eval()
    model.save_pretrained(tmp_path)
    expected = []
    for response in RESPONSES:
        messages = [dict(role="user", content=QUESTION), dict(role="assistant", content=response)]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
        expected.append(float(model(input_ids=ids).logits[0, 0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward = load_reward(str(tmp_path), format="outcome")
    assert_rewards(rewards(reward), expected)
    squashed = RewardModel.load(tmp_path, format="outcome", activation="sigmoid")
    assert_rewards(rewards(squashed), torch.tensor(expected).sigmoid().tolist())


@torch.no_grad()
def test_one_of_several_classes_is_part_of_the_format(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    torch.manual_seed(0)
    sizes = {**SMALL, "vocab_size": len(tokenizer), "num_labels": 3}
    model = hf.Qwen2ForSequenceClassification(hf.Qwen2Config(**sizes)).eval()
    model.save_pretrained(tmp_path)
    with (
        pytest.warns(UserWarning, match="Qwen2ForSequenceClassification"),
        pytest.raises(InvalidInput, match="got 3 and no"),
    ):
        RewardModel.load(tmp_path)
    for choice in range(3):
        expected = []
        for response in RESPONSES:
            ids = tokenizer(f"Q: {QUESTION}\n{response} #", return_tensors="pt").input_ids
            expected.append(float(model(input_ids=ids).logits[0].softmax(dim=-1)[choice]))
        format = StepFormat("Q: {prompt}\n{response} #", choice=choice)
        assert_rewards(rewards(RewardModel.load(tmp_path, format=format)), expected)
    with pytest.raises(InvalidInput, match=r"choice.*from 0 to 2, got 3"):
        RewardModel.load(tmp_path, format=StepFormat(choice=3))


def test_formats_on_the_command_line(qwen: Any, tmp_path: Path, generate: Callable[..., tuple[int, str]]) -> None:
    """A name, its parts changed, or the parts alone; a run under another format is not gone on with."""
    path, *_ = qwen
    asked = ["--search", "best-of-n", "--set", "num_samples=6", "--reward", str(path)]
    asked += ["--out", str(tmp_path / "out.jsonl")]
    parts = ["--reward-step-delimiter", r"\n", "--escape", "--separator", "<extra_0>", "--template", "chat"]
    cases: list[tuple[list[str], StepFormat]] = [
        (["--reward-format", "qwen-prm"], REWARD_FORMATS["qwen-prm"]),
        (
            ["--reward-format", "qwen-prm", "--reward-step-delimiter", "5"],
            replace(REWARD_FORMATS["qwen-prm"], step_delimiter="5"),
        ),
        (parts, StepFormat("chat", "\n", "<extra_0>")),
    ]
    before: list[str] = []
    for options, format in cases:
        if before:
            assert generate(*asked, *options, "--resume")[0] == 2
            (tmp_path / "out.jsonl").unlink()
        code, error = generate(*asked, *options)
        assert code == 0, error
        _header, record = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
        expected = rewards(RewardModel.load(path, format=format), [c["text"] for c in record["candidates"]], "12+3=")
        assert [c["score"] for c in record["candidates"]] == pytest.approx(expected.values.tolist(), abs=1e-4)
        before = options
    (tmp_path / "out.jsonl").unlink()
    for options, message in [
        (["--reward-format", "prm"], "reward format must be one of qwen-prm, "),
        (["--separator", "<extra_0>"], "separator needs a step_delimiter"),
        (["--template", "{prompt}"], "template must contain {response} exactly once"),
        (["--template", "chat", "--reward", "math:sqrt"], "belong to a reward-model directory, got --reward math:sqrt"),
    ]:
        code, error = generate(*asked, *options)
        assert code == 2 and message in error and not (tmp_path / "out.jsonl").exists()


# ---------------------------------------------------------------- what does not fit


def test_a_known_model_read_in_another_way_is_warned_of(qwen: Any) -> None:
    path, *_ = qwen
    for format in (None, "outcome", StepFormat(step_delimiter="\n\n")):
        with pytest.warns(UserWarning, match="Qwen2ForProcessRewardModel is known to be read by .*'qwen-prm', got"):
            RewardModel.load(path, format=format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RewardModel.load(path, format=StepFormat("{prompt}{response}", "\n", "<extra_0>"))
    for architectures in (["MyOwnModel"], None, [], "Qwen2ForProcessRewardModel"[:1]):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            RewardModel.load(path)


def test_a_directory_that_is_no_such_model_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    torch.manual_seed(0)
    model = hf.Qwen2ForCausalLM(hf.Qwen2Config(vocab_size=len(tokenizer), **SMALL)).eval()
    save(model, tmp_path, Scores(2), name="Qwen2ForCausalLM")
    for format, message in [
        ("qwen-prm", r"separator '<extra_0>' must be one token, its tokenizer makes 9"),
        ("math-shepherd", r"'\+ -' must be two tokens, got 3"),
        ("prm", "reward format must be one of qwen-prm, math-shepherd, skywork-prm, outcome, got 'prm'"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            RewardModel.load(tmp_path, format=format)
    save_file({"score.weight": torch.zeros(1, 32)}, tmp_path / "head.st")
    for spec in ("math:sqrt", str(tmp_path / "head.safetensors")):
        with pytest.raises(InvalidInput, match="reward format belongs to a reward-model directory"):
            load_reward(spec, format="outcome")


@torch.no_grad()
def test_a_text_that_cannot_be_rendered_costs_its_branch_only(qwen: Any) -> None:
    path, model, head, tokenizer = qwen
    tokenizer.chat_template = "{% if 'a' in messages[1].content %}{{ raise_exception('no a') }}{% endif %}" + CHAT
    tokenizer.save_pretrained(path)
    with pytest.warns(UserWarning, match="qwen-prm"):
        found = rewards(RewardModel.load(path, format=StepFormat("chat")))
    for response, value, error in zip(RESPONSES, found.values, found.errors, strict=True):
        if "a" in response:
            assert isinstance(error, RewardError) and "no a" in str(error) and np.isnan(value)
        else:
            text = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>\n"
            hidden = model(input_ids=tokenizer(text, return_tensors="pt").input_ids).last_hidden_state[0, -1]
            assert error is None and value == pytest.approx(float(head.score(hidden).softmax(dim=-1)[1]), abs=1e-5)


# ---------------------------------------------------------------- which head

ONE, TWO = torch.full((1, 8), 0.5), torch.full((1, 8), -0.25)
Files = dict[str, dict[str, torch.Tensor]]


@pytest.mark.parametrize(
    ("files", "index", "expected"),
    [
        (
            {"a": {"score.weight": ONE}, "b": {"score.weight": TWO}},
            None,
            "score.weight in a.safetensors and b.safetensors",
        ),
        ({"a": {"score.weight": ONE}, "b": {"score.weight": TWO}}, {"score.weight": "a"}, ONE),
        ({"a": {"score.weight": ONE}, "b": {"score.weight": TWO}}, {"score.weight": "b"}, TWO),
        (
            {"a": {"score.weight": ONE}, "b": {"score.weight": TWO}},
            {"lm_head.weight": "b"},
            "score.weight in a.safetensors",
        ),
        (
            {"a": {"score.weight": ONE}, "b": {"v_head.summary.weight": TWO}},
            None,
            "score.weight and v_head.summary.weight",
        ),
        ({"a": {"score.weight": ONE}, "b": {"v_head.summary.weight": TWO}}, {"v_head.summary.weight": "b"}, TWO),
        ({"a": {"score.weight": ONE, "v_head.summary.weight": TWO}}, None, "score.weight and v_head.summary.weight"),
        ({"a": {"score.weight": ONE}}, {"score.weight": "gone"}, "gone.safetensors: not a readable"),
        ({"a": {"score.weight": ONE}}, {"score.weight": 5}, "5"),
    ],
)
def test_the_models_own_index_decides_between_heads(tmp_path: Path, files: Files, index: Any, expected: Any) -> None:
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    if index is not None:
        weight_map = {key: f"{name}.safetensors" for key, name in index.items()}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if isinstance(expected, str):
        with pytest.raises(InvalidInput, match=expected):
            ValueHead.load(tmp_path)
    else:
        found = ValueHead.load(tmp_path, activation="identity").rewards(torch.eye(8))
        assert torch.equal(found, expected[0])


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}", "[" * 100_000])
def test_a_malformed_index_is_named(tmp_path: Path, text: str) -> None:
    save_file({"score.weight": ONE}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"model\.safetensors\.index\.json: not an index"):
        ValueHead.load(tmp_path)
