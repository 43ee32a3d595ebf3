"""What changes step by step has to be kept in mind: things under cups that are swapped, and boolean registers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from latro.tasks.task import MARKER, Problem, Task

THINGS = "abcdefghi"
REGISTERS = "abcdef"
FUNCTIONS = "^&|"


@dataclass(frozen=True)
class Cups(Task):
    """Cups 1, 2, … hide a, b, …; two change places at each step, and it is asked what one hides at last:
    `12,34,13?1:` → `bacd;badc;dabc;#d` (of four cups)."""

    cups: int = 4
    steps: int = 4
    name: ClassVar[str] = "cups"
    alphabet: ClassVar[str] = "123456789,?;:" + THINGS + MARKER

    def __post_init__(self) -> None:
        self._check("cups", 2, len(THINGS))
        self._check("steps", 1, 30)

    @property
    def prompts(self) -> int:
        return self.cups * (self.cups * (self.cups - 1)) ** self.steps

    def draw(self, rng: random.Random) -> Problem:
        swaps = tuple(self._swap(rng) for _ in range(self.steps))
        asked = rng.randrange(self.cups)
        prompt = ",".join(f"{one + 1}{other + 1}" for one, other in swaps) + f"?{asked + 1}:"
        return Problem(prompt, THINGS[: self.cups], swaps, asked)

    def _swap(self, rng: random.Random) -> tuple[int, int]:
        one, other = rng.sample(range(self.cups), 2)
        return one, other

    def apply(self, state: str, operation: tuple[int, int]) -> str:
        hidden = list(state)
        one, other = operation
        hidden[one], hidden[other] = hidden[other], hidden[one]
        return "".join(hidden)

    def slip(self, state: str, operation: tuple[int, int], rng: random.Random) -> str:
        """Two more change places."""
        return self.apply(self.apply(state, operation), self._swap(rng))

    def step(self, before: str, operation: tuple[int, int], after: str) -> str:
        return f"{after};"

    def answer(self, problem: Problem, state: str) -> str:
        return state[problem.asked]


@dataclass(frozen=True)
class Registers(Task):
    """Registers a, b, … hold bits, and one is set to a function of two of them at each step; all their bits are asked
    for: `101:b=a^c,a=b|c:` → `101;101;#101` (of three)."""

    registers: int = 4
    steps: int = 3
    functions: str = FUNCTIONS
    name: ClassVar[str] = "registers"
    alphabet: ClassVar[str] = "01:=,;" + FUNCTIONS + REGISTERS + MARKER

    def __post_init__(self) -> None:
        self._check("registers", 2, len(REGISTERS))
        self._check("steps", 1, 30)
        if not self.functions or not set(self.functions) <= set(FUNCTIONS):
            raise ValueError(f"{self.name}: functions must be some of {FUNCTIONS!r}, got {self.functions!r}")

    @property
    def prompts(self) -> int:
        N = self.registers
        return 2**N * (N * N * (N - 1) * len(set(self.functions))) ** self.steps

    def draw(self, rng: random.Random) -> Problem:
        start = "".join(rng.choices("01", k=self.registers))
        operations = tuple(self._instruction(rng) for _ in range(self.steps))
        written = ",".join(f"{target}={one}{function}{other}" for target, one, function, other in operations)
        return Problem(f"{start}:{written}:", start, operations)

    def _instruction(self, rng: random.Random) -> tuple[str, str, str, str]:
        names = REGISTERS[: self.registers]
        one, other = rng.sample(names, 2)
        return rng.choice(names), one, rng.choice(self.functions), other

    def apply(self, state: str, operation: tuple[str, str, str, str]) -> str:
        target, one, function, other = operation
        p, q = (int(state[REGISTERS.index(name)]) for name in (one, other))
        bit = p ^ q if function == "^" else p & q if function == "&" else p | q
        return _with(state, REGISTERS.index(target), str(bit))

    def slip(self, state: str, operation: tuple[str, str, str, str], rng: random.Random) -> str:
        """A bit is wrong."""
        after = self.apply(state, operation)
        at = rng.randrange(self.registers)
        return _with(after, at, "10"[int(after[at])])

    def step(self, before: str, operation: tuple[str, str, str, str], after: str) -> str:
        return f"{after};"


def _with(bits: str, at: int, bit: str) -> str:
    return bits[:at] + bit + bits[at + 1 :]
