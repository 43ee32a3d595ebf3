"""Straight-line programs modulo ten: `a4b+8c-3d+8:`, where each variable is the one before it plus or minus a digit.

The rationale `b2c9d7` has the value of every variable but the first, and the answer is the last of them. A text goes on
behind its prompt with rationale, `#`, answer and the tokenizer's end token: `b2c9d7#7`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

from latro.data import Example

Split = Literal["train", "validation", "test"]

MARKER = "#"  # ends a rationale; the answer follows
ANSWER_TEMPLATE = MARKER + "{answer}"
STEPS = 3
NAMES = "abcd"  # the variables: one more than steps
PROMPTS = 10 * 18**STEPS  # a first digit, and steps of two signs and nine digits
ALPHABET = "0123456789+-:" + NAMES + MARKER


@dataclass(frozen=True)
class Problem:
    """A program: the value of its first variable, and what each step adds to it."""

    first: int
    steps: tuple[int, ...]

    @property
    def prompt(self) -> str:
        steps = (f"{name}{step:+d}" for name, step in zip(NAMES[1:], self.steps, strict=True))
        return f"{NAMES[0]}{self.first}{''.join(steps)}:"

    @property
    def values(self) -> tuple[int, ...]:
        """Of every variable but the first."""
        return tuple(accumulate(self.steps, lambda value, step: (value + step) % 10, initial=self.first))[1:]

    @property
    def rationale(self) -> str:
        return written(self.values)

    @property
    def answer(self) -> str:
        return str(self.values[-1])


def written(values: tuple[int, ...]) -> str:
    """A rationale with these values of b, c, …."""
    return "".join(f"{name}{value}" for name, value in zip(NAMES[1:], values, strict=False))


def split_of(prompt: str) -> Split:
    """The one split that a prompt belongs to, by its text: four in five are for training."""
    part = hashlib.blake2b(prompt.encode(), digest_size=8).digest()[0] % 10
    return "validation" if part == 0 else "test" if part == 1 else "train"


def draws(seed: int, split: Split = "train") -> Iterator[Problem]:
    """Problems of a split without end, at random and with repetitions."""
    rng = random.Random(f"{seed} {split}")
    while True:
        steps = tuple(rng.choice((1, -1)) * rng.randint(1, 9) for _ in range(STEPS))
        problem = Problem(rng.randint(0, 9), steps)
        if split_of(problem.prompt) == split:
            yield problem


def problems(seed: int, n: int, split: Split = "train") -> list[Example]:
    """n different problems of a split. More of them begin with the same ones."""
    if split not in get_args(Split):
        raise ValueError(f"problems: split must be one of {list(get_args(Split))}, got {split!r}")
    if not 0 <= n <= PROMPTS // 20:
        raise ValueError(f"problems: n must be from 0 to {PROMPTS // 20}, about half of the test split, got {n}")
    found: dict[Problem, None] = {}  # in the order drawn
    stream = draws(seed, split)
    while len(found) < n:
        found[next(stream)] = None
    return [
        Example(f"prog-{split}-{problem.prompt}", problem.prompt, problem.answer, rationale=problem.rationale)
        for problem in found
    ]
