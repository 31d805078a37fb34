"""The demo's task: work out a chain of arithmetic, one operation a line.

A problem is a chain that is read strictly from left to right (no operator precedence)::

    37+485*3-192*2\\n

Its one right solution has a line for every operation and a last line with the answer::

    37+485=522\\n522*3=1566\\n1566-192=1374\\n1374*2=2748\\n#2748\\n

Every character is a token. Each solution line, ended by a newline, is one *step*.
"""

import random
import re
import zlib
from collections.abc import Iterator
from typing import Literal

Split = Literal["train", "held_out"]

OPERATIONS = 4
LARGEST = 9999  # no intermediate result leaves 0..LARGEST
ALPHABET = "0123456789+-*=#\n"


def split_of(problem: str) -> Split:
    """The split that owns a problem, read off the CRC-32 of its text: one in 16 is held out.

    A problem belongs to exactly one split whatever the seed, so the two can never overlap.
    """
    return "held_out" if zlib.crc32(problem.encode()) % 16 == 0 else "train"


def problems(split: Split, seed: int) -> Iterator[str]:
    """Yield an endless, seeded stream of the split's problems."""
    rng = random.Random(seed)
    while True:
        problem = _draw(rng)
        if split_of(problem) == split:
            yield problem


def solution(problem: str) -> str:
    """The one right solution of a problem: a line for every operation, then `#answer`."""
    first, *rest = re.findall(r"\d+|[-+*]", problem)
    value, lines = int(first), ""
    for operator, operand in zip(rest[::2], rest[1::2], strict=True):
        result = _apply(value, operator, int(operand))
        lines += f"{value}{operator}{operand}={result}\n"
        value = result
    return f"{lines}#{value}\n"


def label_steps(problem: str, text: str) -> list[bool]:
    """Label each complete line of a solution attempt: right if it and all lines before it are."""
    reference = solution(problem)
    ends = [i for i, character in enumerate(text, start=1) if character == "\n"]
    return [reference.startswith(text[:end]) for end in ends]


def answer(text: str) -> str | None:
    """The number on the attempt's first complete `#` line, or None if there is no such line."""
    match = re.search(r"^#(\d+)\n", text, re.MULTILINE)
    return match[1] if match else None


def is_correct(problem: str, text: str) -> bool:
    """Whether the attempt's final answer is the problem's."""
    return answer(text) == answer(solution(problem))


def _draw(rng: random.Random) -> str:
    value = rng.randint(10, 99)
    problem = str(value)
    for _ in range(OPERATIONS):
        while True:
            operator = rng.choice("+-*")
            operand = rng.randint(2, 99) if operator == "*" else rng.randint(10, 999)
            result = _apply(value, operator, operand)
            if 0 <= result <= LARGEST:
                break
        problem += f"{operator}{operand}"
        value = result
    return problem + "\n"


def _apply(value: int, operator: str, operand: int) -> int:
    if operator == "+":
        return value + operand
    if operator == "-":
        return value - operand
    return value * operand
