"""How reward models want to read a response, and where their reward stands."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forktree.errors import InvalidInput
from forktree.prompts import encode, tokenise

CHAT = "chat"


@dataclass(frozen=True)
class StepFormat:
    """What a reward model is fed; its reward is read at the last token of it.

    What the tokenizer itself puts at the end of a text, such as EOS, is never fed: where a model wants it, the template
    spells it out.

    Args:
        template: text with `{prompt}`, then `{response}`, and perhaps `{bos}` before them, which is the tokenizer's
            BOS; or "chat": the tokenizer's chat template, the prompt as the user's message, the response as the
            assistant's.
        step_delimiter: what ends a step in the policy's text. Empty: the response is fed as it is, and what follows it
            in the template too. Otherwise what is fed ends with the last step, and the reward belongs to that.
        separator: fed in place of the delimiter after every step, the last one included even if it is unfinished or
            empty. Empty: the delimiter itself.
        between: fed after a separator that another step follows.
        apart: whether steps and separators are tokenised one by one; otherwise the whole text is tokenised at once.
        activation: of the value head in the directory, see `ValueHead`.
        choice: which output of that head, see `ValueHead`.
        answers: a text of two tokens; the reward is then the model's probability of the first against the second.
    """

    template: str = "{prompt}{response}"
    step_delimiter: str = ""
    separator: str = ""
    between: str = ""
    apart: bool = False
    activation: str = "sigmoid"
    choice: int | None = None
    answers: str = ""

    def __post_init__(self) -> None:
        for name in ("template", "step_delimiter", "separator", "between", "activation", "answers"):
            if not isinstance(value := getattr(self, name), str):
                raise InvalidInput(f"{name} must be a text, got {value!r:.80}")
        if self.template != CHAT:
            for name in ("{prompt}", "{response}"):
                if self.template.count(name) != 1:
                    raise InvalidInput(
                        f"template must contain {name} exactly once, or be {CHAT!r}, got {self.template!r}"
                    )
            if self.template.index("{prompt}") > self.template.index("{response}"):
                raise InvalidInput("template must name {prompt} before {response}")
        for name in ("separator", "between", "apart"):
            if getattr(self, name) and not self.step_delimiter:
                got = getattr(self, name)
                raise InvalidInput(f"{name} needs a step_delimiter, which tells the steps apart: got {got!r} and none")

    def render(self, prompt: str, response: str, tokenizer: Any = None) -> str:
        """The text to feed. tokenizer: needed for `{bos}` and chat templates."""
        return "".join(self._pieces(prompt, response, tokenizer))

    def tokens(self, prompt: str, response: str, tokenizer: Any) -> list[int]:
        """Token ids to feed."""
        pieces = self._pieces(prompt, response, tokenizer)
        if self.template == CHAT:
            (ids,) = encode(tokenizer, ["".join(pieces)], add_special_tokens=False)
            return ids
        if not self.apart:
            return tokenise(tokenizer, ["".join(pieces)])[0]
        first, *others = pieces
        each = encode(tokenizer, [piece for piece in others if piece], add_special_tokens=False)
        return [*tokenise(tokenizer, [first])[0], *(token for ids in each for token in ids)]

    def _pieces(self, prompt: str, response: str, tokenizer: Any) -> list[str]:
        """What stands before the response; then the response and what follows it, or steps and separators in turn."""
        steps = self._steps(response)
        if self.template == CHAT:
            said = "".join(steps)
            messages = [dict(role="user", content=prompt), dict(role="assistant", content=said)]
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
            if not self.step_delimiter:
                return [text]
            if said not in text:
                raise InvalidInput(f"the chat template must hold the response as it is, got {text!r:.80}")
            return [text[: text.rindex(said)], *steps]
        before, _, rest = self.template.partition("{prompt}")
        middle, _, after = rest.partition("{response}")
        before = before.replace("{bos}", getattr(tokenizer, "bos_token", None) or "")
        return [before + prompt + middle, *steps, *([] if self.step_delimiter else [after])]

    def _steps(self, response: str) -> list[str]:
        if not self.step_delimiter:
            return [response]
        steps = response.split(self.step_delimiter)
        if len(steps) > 1 and not steps[-1]:
            steps.pop()
        end = self.separator or self.step_delimiter
        return [piece for step in steps[:-1] for piece in (step, end + self.between)] + [steps[-1], end]


REWARD_FORMATS = {
    # Qwen2.5-Math-PRM: the probability of the second of two classes at <extra_0>, which follows every step
    "qwen-prm": StepFormat(
        template=(
            "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
            "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>\n"
        ),
        step_delimiter="\n\n",
        separator="<extra_0>",
        choice=1,
    ),
    # Math-Shepherd: its language-model head says + or - at the tag that ends every line
    "math-shepherd": StepFormat(
        template="{prompt} {response}", step_delimiter="\n", separator=" ки", between="\n", answers="+ -"
    ),
    # Skywork-o1-Open-PRM: the sigmoid of a value at the line break that ends every step, tokenised by itself
    "skywork-prm": StepFormat(template="{bos}{prompt}\n{response}", step_delimiter="\n", apart=True),
    # Skywork-Reward and other sequence classifiers of one label: the bare value at the end of the whole conversation
    "outcome": StepFormat(template=CHAT, activation="identity"),
}
"""Formats by name. Prompts are meant to be bare questions: the templates bring their own chat markup. What the first
three say is reconstructed from how the models' authors call them; "outcome" is what transformers computes itself."""

SEPARATORS = {known.separator for known in REWARD_FORMATS.values()} - {""}  # tokens of their own

ARCHITECTURES = {
    "Qwen2ForProcessRewardModel": "qwen-prm",
    "Qwen2ForPrmModel": "skywork-prm",
    "Qwen2ForRewardModel": "outcome",
}


def named_format(name: str) -> StepFormat:
    """The format of this name."""
    if name not in REWARD_FORMATS:
        raise InvalidInput(f"reward format must be one of {', '.join(REWARD_FORMATS)}, got {name!r}")
    return REWARD_FORMATS[name]


def chosen_format(name: str | None, **changes: str | None) -> StepFormat | None:
    """The format of this name, or the default, with fields changed where that is not None; None if nothing is given."""
    given = {field: value for field, value in changes.items() if value is not None}
    if name is None and not given:
        return None
    return replace(StepFormat() if name is None else named_format(name), **given)  # type: ignore[arg-type]


def expected_format(directory: Path) -> tuple[str, str] | None:
    """The architecture that the config of a model directory names, and the format such models are known to need.

    Returns:
        Architecture and name of the format; None if the directory names no known architecture.
    """
    try:
        names: Sequence[str] = json.loads((directory / "config.json").read_text(encoding="utf-8"))["architectures"]
        architecture = str(names[0])
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        RecursionError,
    ):  # loading the model says what is wrong with it
        return None
    known = "outcome" if architecture.endswith("ForSequenceClassification") else ARCHITECTURES.get(architecture)
    return None if known is None else (architecture, known)
