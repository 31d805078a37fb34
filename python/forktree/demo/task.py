r"""The demo's task: combine four numbers by sums and differences, two at a time, to reach a target.

A problem names the numbers and the target::

    3 15 7 12=13\\n

A solution takes two of the numbers a line, larger first, puts their sum or difference after those that are left, and
goes on until the target is the only one::

    15+7=22:3 12 22\\n12-3=9:22 9\\n22-9=13\\n

Every character is a token. Each line, ended by a newline, is one *step*. A step is right if it and all before it are
valid and the target can still be reached: whether it can is known exactly, by trying everything.
"""

import random
import re
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Literal

Split = Literal["train", "held_out"]
Numbers = tuple[int, ...]

COUNT = 4  # numbers in a problem
LARGEST_NUMBER = 20
LARGEST = 99  # no result leaves 1..LARGEST
MISSES = 0.2  # how often the teacher's attempt ends somewhere else than at the target
ALPHABET = "0123456789 +-=:\n"


def split_of(problem: str) -> Split:
    """The split that owns a problem, by the CRC-32 of its sorted numbers and its target: one in 16 is held out.

    A problem, in whatever order its numbers stand, belongs to exactly one split, so the two can never overlap.
    """
    numbers, target = parse(problem)
    return "held_out" if zlib.crc32(f"{sorted(numbers)}={target}".encode()) % 16 == 0 else "train"


def problems(split: Split, seed: int) -> Iterator[str]:
    """An endless, seeded stream of the split's problems; every one has a solution."""
    return (problem for problem, _ in demonstrations(split, seed, [COUNT]))


def demonstrations(split: Split, seed: int, counts: Sequence[int]) -> Iterator[tuple[str, str]]:
    """An endless, seeded stream of problems, of one of `counts` numbers each, with a teacher's attempt.

    The teacher's steps are always valid, but one attempt in five misses the target.
    """
    rng = random.Random(seed)
    while True:
        numbers = tuple(rng.randint(1, LARGEST_NUMBER) for _ in range(rng.choice(counts)))
        attempt, reached = _walk(numbers, rng)
        target = _walk(numbers, rng)[1] if rng.random() < MISSES else reached
        problem = f"{_joined(numbers)}={target}\n"
        if reached and target and split_of(problem) == split:
            yield problem, attempt


def parse(problem: str) -> tuple[Numbers, int]:
    """The numbers of a problem, in their order, and its target."""
    numbers, target = problem.strip().split("=")
    return tuple(map(int, numbers.split())), int(target)


def label_steps(problem: str, text: str) -> list[bool]:
    """Label each complete line of an attempt: valid, as all before it, and the target still within reach."""
    numbers, target = parse(problem)
    left: Numbers | None = numbers
    labels = []
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            left = _after(left, line) if left is not None else None
            labels.append(left is not None and reachable(tuple(sorted(left)), target))
    return labels


def is_correct(problem: str, text: str) -> bool:
    """Whether the attempt is valid from the first line to the last and ends at the target."""
    labels = label_steps(problem, text)
    return len(labels) == COUNT - 1 and all(labels)


def answer(text: str) -> str | None:
    """The number that an attempt ends with, or None if it does not end."""
    match = re.search(r"=(\d+)\n$", text)
    return match[1] if match else None


@cache
def reachable(numbers: Numbers, target: int) -> bool:
    """Whether valid steps lead from `numbers` (sorted) to `target` alone."""
    if len(numbers) == 1:
        return numbers[0] == target
    for i in range(len(numbers)):
        for j in range(i):
            rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
            for result in _results(numbers[i], numbers[j]).values():
                if reachable(tuple(sorted([*rest, result])), target):
                    return True
    return False


def _results(large: int, small: int) -> dict[str, int]:
    """Valid results of two numbers by operation; `large >= small`."""
    results = {"+": large + small, "-": large - small}
    return {operation: result for operation, result in results.items() if 1 <= result <= LARGEST}


def _walk(numbers: Numbers, rng: random.Random) -> tuple[str, int]:
    """Random valid steps until one number is left: their lines, and that number (0 if there was no way on)."""
    text = ""
    while len(numbers) > 1:
        first, second = rng.sample(range(len(numbers)), 2)
        large, small = sorted((numbers[first], numbers[second]), reverse=True)
        results = _results(large, small)
        if not results:
            return text, 0
        operation = rng.choice(list(results))
        left = [n for i, n in enumerate(numbers) if i not in (first, second)]
        numbers = (*left, results[operation])
        text += f"{large}{operation}{small}={results[operation]}" + (f":{_joined(numbers)}\n" if left else "\n")
    return text, numbers[0]


def _after(numbers: Numbers, line: str) -> Numbers | None:
    """The numbers left after a line, or None if it is not a valid step."""
    match = re.fullmatch(r"(\d+)([-+])(\d+)=(\d+)(?::([\d ]+))?\n", line)
    if match is None or len(numbers) < 2:
        return None
    large, small, result = int(match[1]), int(match[3]), int(match[4])
    left = list(numbers)
    for number in (large, small):
        if number not in left:
            return None
        left.remove(number)
    if large < small or _results(large, small).get(match[2]) != result:
        return None
    after = (*left, result)
    return after if (match[5] or "") == (_joined(after) if left else "") else None


def _joined(numbers: Numbers) -> str:
    return " ".join(map(str, numbers))
