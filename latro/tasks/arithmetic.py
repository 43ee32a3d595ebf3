"""Arithmetic modulo ten: programs, and chains of sums and products."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import ClassVar

from latro.tasks.task import MARKER, Problem, Task

DIGITS = "0123456789"
SIGNS = "+-*"
VARIABLES = "abcdefghi"


def another_digit(digit: int, rng: random.Random) -> int:
    return (digit + rng.randrange(1, 10)) % 10


@dataclass(frozen=True)
class Program(Task):
    """Straight-line programs: `a4b+8c-3d+8:` → `b2c9d7#7`, where each variable is the one before it plus or minus a
    digit up to `largest`."""

    steps: int = 3
    largest: int = 9
    name: ClassVar[str] = "prog"
    alphabet: ClassVar[str] = DIGITS + "+-:" + VARIABLES + MARKER
    step_pattern: ClassVar[re.Pattern[str]] = re.compile(r"[a-z][^a-z]*|[^a-z]+")

    def __post_init__(self) -> None:
        self._check("steps", 1, len(VARIABLES) - 1)
        self._check("largest", 1, 9)

    @property
    def prompts(self) -> int:
        return 10 * (2 * self.largest) ** self.steps

    def draw(self, rng: random.Random) -> Problem:
        steps = tuple(rng.choice((1, -1)) * rng.randint(1, self.largest) for _ in range(self.steps))
        return self.problem(rng.randint(0, 9), steps)

    def problem(self, first: int, steps: tuple[int, ...]) -> Problem:
        """first: the value of a. steps: what each further variable adds."""
        terms = "".join(f"{name}{step:+d}" for name, step in zip(VARIABLES[1:], steps, strict=False))
        # A state is the last variable that has a value, and its value.
        return Problem(f"{VARIABLES[0]}{first}{terms}:", (0, first), steps)

    def apply(self, state: tuple[int, int], operation: int) -> tuple[int, int]:
        return state[0] + 1, (state[1] + operation) % 10

    def slip(self, state: tuple[int, int], operation: int, rng: random.Random) -> tuple[int, int]:
        variable, value = self.apply(state, operation)
        return variable, another_digit(value, rng)

    def step(self, before: tuple[int, int], operation: int, after: tuple[int, int]) -> str:
        return f"{VARIABLES[after[0]]}{after[1]}"

    def answer(self, problem: Problem, state: tuple[int, int]) -> str:
        return str(state[1])


@dataclass(frozen=True)
class Chain(Task):
    """Sums and products from left to right: `7*3+5-8:` → `7*3=1;1+5=6;6-8=8;#8`. signs: which there are."""

    steps: int = 3
    signs: str = SIGNS
    name: ClassVar[str] = "chain"
    alphabet: ClassVar[str] = DIGITS + SIGNS + "=;:" + MARKER

    def __post_init__(self) -> None:
        self._check("steps", 1, 30)
        if not self.signs or not set(self.signs) <= set(SIGNS):
            raise ValueError(f"{self.name}: signs must be some of {SIGNS!r}, got {self.signs!r}")

    @property
    def prompts(self) -> int:
        return 10 * (9 * len(set(self.signs))) ** self.steps

    def draw(self, rng: random.Random) -> Problem:
        first = rng.randrange(10)
        operations = tuple((rng.choice(self.signs), rng.randint(1, 9)) for _ in range(self.steps))
        return Problem(f"{first}{written(operations)}:", first, operations)

    def apply(self, state: int, operation: tuple[str, int]) -> int:
        sign, digit = operation
        return (state * digit if sign == "*" else state + digit if sign == "+" else state - digit) % 10

    def slip(self, state: int, operation: tuple[str, int], rng: random.Random) -> int:
        return another_digit(self.apply(state, operation), rng)

    def step(self, before: int, operation: tuple[str, int], after: int) -> str:
        return f"{before}{operation[0]}{operation[1]}={after};"


def written(operations: tuple[tuple[str, int], ...]) -> str:
    return "".join(f"{sign}{digit}" for sign, digit in operations)
