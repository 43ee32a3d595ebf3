"""What the small tasks share: problems, their golden rationales, what is right, and splits that cannot overlap.

A problem is a state, and operations that change it one after another. Its rationale has a step for each operation, and
its answer is read off the last state. A text goes on behind its prompt with rationale, `#`, answer, and the tokenizer's
end token.
"""

from __future__ import annotations

import hashlib
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from latro.data import Example

Split = Literal["train", "validation", "test"]

MARKER = "#"  # ends a rationale; the answer follows
ANSWER_TEMPLATE = MARKER + "{answer}"
SHARES: dict[Split, float] = {"train": 0.8, "validation": 0.1, "test": 0.1}


def split_of(prompt: str) -> Split:
    """The one split that a prompt belongs to, by its text: four in five are for training."""
    part = hashlib.blake2b(prompt.encode(), digest_size=8).digest()[0] % 10
    return "validation" if part == 0 else "test" if part == 1 else "train"


@dataclass(frozen=True)
class Problem:
    """A prompt, what it starts from, and what changes that step by step."""

    prompt: str
    start: Any
    operations: tuple[Any, ...]
    asked: Any = None  # which part of the last state is the answer, where it is not all of it


@dataclass(frozen=True)
class Task(ABC):
    """A family of problems. Its parameters say how long and how hard they are."""

    name: ClassVar[str]
    alphabet: ClassVar[str]  # every character of its texts, whatever the parameters
    step_pattern: ClassVar[re.Pattern[str]] = re.compile(r"[^;]*;|[^;]+")
    answer_template: ClassVar[str] = ANSWER_TEMPLATE
    stop_string: ClassVar[str] = MARKER
    separator: ClassVar[str] = ""

    # What a family is

    @property
    @abstractmethod
    def prompts(self) -> int:
        """How many different prompts there are."""

    @abstractmethod
    def draw(self, rng: random.Random) -> Problem: ...

    @abstractmethod
    def apply(self, state: Any, operation: Any) -> Any:
        """The state after an operation."""

    @abstractmethod
    def slip(self, state: Any, operation: Any, rng: random.Random) -> Any:
        """What a mistake leaves in place of the state after an operation: another one."""

    @abstractmethod
    def step(self, before: Any, operation: Any, after: Any) -> str:
        """An operation, as a rationale has it."""

    def answer(self, problem: Problem, state: Any) -> str:
        """What the last state says."""
        return str(state)

    @property
    def options(self) -> tuple[str, ...]:
        """Of which the answer is one, in multiple choice."""
        return ()

    # What follows from it

    def work(self, problem: Problem) -> tuple[str, str]:
        """The golden rationale, and the answer."""
        return self._work(problem, None, random.Random(0))

    def with_mistake(self, problem: Problem, rng: random.Random) -> tuple[str, str]:
        """A rationale that takes one step wrongly and goes on from there, and its answer, which may be right."""
        return self._work(problem, rng.randrange(len(problem.operations)), rng)

    def _work(self, problem: Problem, mistaken: int | None, rng: random.Random) -> tuple[str, str]:
        state, steps = problem.start, []
        for n, operation in enumerate(problem.operations):
            after = self.slip(state, operation, rng) if n == mistaken else self.apply(state, operation)
            steps.append(self.step(state, operation, after))
            state = after
        return "".join(steps), self.answer(problem, state)

    def draws(self, seed: int, split: Split = "train") -> Iterator[Problem]:
        """Problems of a split without end, at random and with repetitions."""
        rng = random.Random(f"{seed} {split}")
        while True:
            problem = self.draw(rng)
            if split_of(problem.prompt) == split:
                yield problem

    def most(self, split: Split) -> int:
        """How many different problems of a split may be asked for: about half of those there are."""
        if split not in get_args(Split):
            raise ValueError(f"problems: split must be one of {list(get_args(Split))}, got {split!r}")
        return int(self.prompts * SHARES[split] / 2)

    def problems(self, seed: int, n: int, split: Split = "train") -> list[Example]:
        """n different problems of a split. More of them begin with the same ones."""
        most = self.most(split)
        if not 0 <= n <= most:
            raise ValueError(f"problems: n must be from 0 to {most}, about half of the {split} split, got {n}")
        found: dict[str, Problem] = {}  # in the order drawn
        stream = self.draws(seed, split)
        while len(found) < n:
            problem = next(stream)
            found.setdefault(problem.prompt, problem)
        return [self.example(problem) for problem in found.values()]

    def example(self, problem: Problem) -> Example:
        rationale, answer = self.work(problem)
        id = f"{self.name}-{split_of(problem.prompt)}-{problem.prompt}"
        return Example(id, problem.prompt, answer, self.options, rationale)

    def correct(self, example: Example, answer: str) -> bool:
        """Whether what was said behind the marker is the answer."""
        return answer.strip() == example.answer

    def steps_of(self, rationale: str) -> list[str]:
        """A rationale's steps, which together are its text: prefixes of a rationale end between them."""
        return self.step_pattern.findall(rationale)

    def first_wrong_step(self, example: Example, rationale: str) -> int | None:
        """The place, counted from 0, of the first step that does not follow from the prompt and the steps before it.

        Each step is determined by those before it: one that is left out is missed where it was due, and one too many is
        wrong. None where there is no wrong step: the rationale is golden, or the beginning of a golden one.
        """
        if example.rationale is None:
            raise ValueError(f"first_wrong_step: example {example.id} must have a golden rationale, got none")
        golden, said = self.steps_of(example.rationale), self.steps_of(rationale)
        for n, step in enumerate(said):
            # The marker, too, ends a step.
            if n >= len(golden) or step.rstrip(";") != golden[n].rstrip(";"):
                return n
        return None

    def _check(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{self.name}: {name} must be from {low} to {high}, got {value!r}")
