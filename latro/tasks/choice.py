"""Multiple choice: options stand in the prompt, and the answer is an option's letter."""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import perm
from typing import Any, ClassVar

from latro.tasks.arithmetic import DIGITS, SIGNS, Chain, written
from latro.tasks.task import MARKER, Problem

LETTERS = "abcdefghij"


@dataclass(frozen=True)
class Choice(Chain):
    """A chain, and among `choices` digits its value: `7*3+5-8?a3b8c1:` → `7*3=1;1+5=6;6-8=8;8=b;#b`."""

    choices: int = 4
    name: ClassVar[str] = "choice"
    alphabet: ClassVar[str] = DIGITS + SIGNS + "=;:?" + LETTERS + MARKER

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("choices", 2, len(LETTERS))

    @property
    def prompts(self) -> int:
        return super().prompts * self.choices * perm(9, self.choices - 1)

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(LETTERS[: self.choices])

    def draw(self, rng: random.Random) -> Problem:
        chain = super().draw(rng)
        value = chain.start
        for operation in chain.operations:
            value = super().apply(value, operation)
        digits = rng.sample([digit for digit in range(10) if digit != value], self.choices - 1)
        digits.insert(rng.randrange(self.choices), value)
        listed = "".join(f"{letter}{digit}" for letter, digit in zip(LETTERS, digits, strict=False))
        # The last operation finds a value among the options; the state is then their letter.
        operations = (*chain.operations, tuple(digits))
        return Problem(f"{chain.start}{written(chain.operations)}?{listed}:", chain.start, operations)

    def apply(self, state: int, operation: tuple[Any, ...]) -> Any:
        if not _is_search(operation):
            return super().apply(state, operation)
        # Behind a mistake the value may be none of them, and one is taken.
        return LETTERS[operation.index(state) if state in operation else state % self.choices]

    def slip(self, state: int, operation: tuple[Any, ...], rng: random.Random) -> Any:
        if not _is_search(operation):
            return super().slip(state, operation, rng)
        return rng.choice([letter for letter in self.options if letter != self.apply(state, operation)])

    def step(self, before: int, operation: tuple[Any, ...], after: Any) -> str:
        return f"{before}={after};" if _is_search(operation) else super().step(before, operation, after)


def _is_search(operation: tuple[Any, ...]) -> bool:
    return isinstance(operation[0], int)
