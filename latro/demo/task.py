"""The demo's task: `prog` of `latro.tasks`, programs of three steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from latro.data import Example
from latro.tasks.arithmetic import VARIABLES, Program
from latro.tasks.task import ANSWER_TEMPLATE, MARKER, Split, split_of

__all__ = ["ALPHABET", "ANSWER_TEMPLATE", "MARKER", "STEPS", "Problem", "draws", "problems", "split_of", "written"]

STEPS = 3
TASK = Program(STEPS)
NAMES = VARIABLES[: STEPS + 1]
ALPHABET = "0123456789+-:" + NAMES + MARKER  # in the order of the shipped tokenizer


@dataclass(frozen=True)
class Problem:
    """A program: the value of its first variable, and what each step adds to it."""

    first: int
    steps: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return TASK.problem(self.first, self.steps).prompt

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


def draws(seed: int, split: Split = "train") -> Iterator[Problem]:
    """Problems of a split without end, at random and with repetitions."""
    for drawn in TASK.draws(seed, split):
        yield Problem(drawn.start[1], drawn.operations)


def problems(seed: int, n: int, split: Split = "train") -> list[Example]:
    """n different problems of a split. More of them begin with the same ones."""
    return TASK.problems(seed, n, split)
