"""Words of letters: rotated through the alphabet, and sorted."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import ClassVar

from latro.tasks.task import MARKER, Problem, Task

LETTERS = string.ascii_lowercase


@dataclass(frozen=True)
class Rotation(Task):
    """Every letter is moved on through the alphabet's first `letters`, from the last to the first again:
    `jab+2:` → `j>b;a>c;b>d;#bcd`.
    chained: as far as the number says only the first; every other as far as the letter before it has come, counted from
    a. Then the last is the answer: `jab+2:` → `j>b;a>b;b>c;#c`."""

    length: int = 4
    letters: int = 10
    chained: bool = False
    name: ClassVar[str] = "rotation"
    alphabet: ClassVar[str] = "0123456789+>;:" + LETTERS + MARKER

    def __post_init__(self) -> None:
        self._check("length", 1, 30)
        self._check("letters", 3, len(LETTERS))

    @property
    def prompts(self) -> int:
        return (self.letters - 1) * self.letters**self.length

    def draw(self, rng: random.Random) -> Problem:
        word = _word(rng, self.length, self.letters)
        by = rng.randrange(1, self.letters)
        return Problem(f"{word}+{by}:", "", tuple((letter, by) for letter in word))

    def apply(self, state: str, operation: tuple[str, int]) -> str:
        letter, by = operation
        if self.chained and state:
            by = LETTERS.index(state[-1])
        return state + self._moved(letter, by)

    def slip(self, state: str, operation: tuple[str, int], rng: random.Random) -> str:
        right = self.apply(state, operation)[-1]
        return state + self._moved(right, rng.randrange(1, self.letters))

    def _moved(self, letter: str, by: int) -> str:
        return LETTERS[(LETTERS.index(letter) + by) % self.letters]

    def step(self, before: str, operation: tuple[str, int], after: str) -> str:
        return f"{operation[0]}>{after[-1]};"

    def answer(self, problem: Problem, state: str) -> str:
        return state[-1] if self.chained else state


@dataclass(frozen=True)
class Sort(Task):
    """The first letter, by the alphabet, is taken out again and again: `dbca:` → `a|dbc;b|dc;c|d;d|;#abcd`."""

    length: int = 5
    letters: int = 10
    name: ClassVar[str] = "sort"
    alphabet: ClassVar[str] = "|;:" + LETTERS + MARKER

    def __post_init__(self) -> None:
        self._check("length", 2, 20)
        self._check("letters", 2, len(LETTERS))

    @property
    def prompts(self) -> int:
        return self.letters**self.length

    def draw(self, rng: random.Random) -> Problem:
        word = _word(rng, self.length, self.letters)
        # A state is what was taken out, and what is left.
        return Problem(f"{word}:", ("", word), (None,) * self.length)

    def apply(self, state: tuple[str, str], operation: None) -> tuple[str, str]:
        taken, left = state
        return taken + min(left), left.replace(min(left), "", 1)

    def slip(self, state: tuple[str, str], operation: None, rng: random.Random) -> tuple[str, str]:
        """The right letter, but what is left has another letter for one of its own, or one too many."""
        taken, left = self.apply(state, operation)
        at = rng.randrange(len(left)) if left else 0
        wrong = rng.choice([letter for letter in LETTERS[: self.letters] if letter != left[at : at + 1]])
        return taken, left[:at] + wrong + left[at + 1 :]

    def step(self, before: tuple[str, str], operation: None, after: tuple[str, str]) -> str:
        return f"{after[0][-1]}|{after[1]};"

    def answer(self, problem: Problem, state: tuple[str, str]) -> str:
        return state[0]


def _word(rng: random.Random, length: int, letters: int) -> str:
    return "".join(rng.choices(LETTERS[:letters], k=length))
