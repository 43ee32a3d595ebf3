"""What the study trains: experiments, each of many cells, all written down before any of them is run.

A cell is one model: a base, which its task, size, recipe and seed make, and what a method made of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from latro.study.bases import RECIPES, UNFINISHED
from latro.study.methods import METHODS
from latro.tasks import named

SMALL = "0.15M"
SIZES = (SMALL, "1M", "5M")
# Families of tasks:
SIZED = ("cups", "choice")  # those that are not learned whole at the smallest size
VARIED_ON = ("chain", "choice")  # one that is, and the one that is farthest from it
SEEDS = 5

# LaTRO as published, without the answer's own likelihood, and what may keep its rationales from vanishing.
AGAINST_COLLAPSE = (
    "base",
    "sft_answers",
    "latro",
    "latro_masked_stop",
    "latro_no_answer",
    "latro_floor",
    "gain",
    "verifree",
    "jepo_multi",
)
BY_SIZE = ("base", "sft_answers", "latro_no_answer", "gain", "sft_golden")
# What is varied, one option at a time, of LaTRO without the answer's own likelihood.
VARIED: dict[str, tuple[Any, ...]] = {
    "beta": (0.0, 0.3, 1.0),
    "num_generations": (2, 4, 16),
    "answer_weight": (0.1, 1.0),
    "normalize_advantages": ("group", "batch"),
    "learning_rate": (3e-4, 3e-3),
}
CAPS = (0.25, 0.5, 0.75)  # of the tokens that a rationale may have
WRONG = (0.1, 0.3)  # of the answers that are trained on


@dataclass(frozen=True)
class Cell:
    task: str
    recipe: str
    method: str
    seed: int
    size: str = SMALL
    changed: tuple[tuple[str, Any], ...] = ()  # options other than the method's own

    @property
    def bases(self) -> tuple[str, str, int]:
        return self.task, self.size, self.seed

    @property
    def key(self) -> str:
        changed = ",".join(f"{name}={json.dumps(value)}" for name, value in self.changed)
        return "/".join((self.task, self.size, self.recipe, self.method, changed, str(self.seed)))


def cells_of(experiments: Sequence[str], tasks: Sequence[str], seeds: int, sizes: Sequence[str]) -> list[Cell]:
    """In the order of seeds, so that what is done after a while is balanced."""
    return [
        cell
        for seed in range(seeds)
        for experiment in experiments
        for cell in EXPERIMENTS[experiment](tasks, seed, sizes)
    ]


def _methods(tasks: Sequence[str], seed: int, sizes: Sequence[str]) -> Iterator[Cell]:
    """Every method, from the first recipe's bases."""
    for task, (name, method) in product(tasks, METHODS.items()):
        if not method.for_options or named(task).options:
            yield Cell(task, first_recipe(task), name, seed)


def _recipes(tasks: Sequence[str], seed: int, sizes: Sequence[str]) -> Iterator[Cell]:
    for task in tasks:
        yield from (Cell(task, recipe, name, seed) for recipe, name in product(RECIPES[task], AGAINST_COLLAPSE))


def _sizes(tasks: Sequence[str], seed: int, sizes: Sequence[str]) -> Iterator[Cell]:
    sized = [task for task in tasks if named(task).name in SIZED]
    for task, size, name in product(sized, sizes, BY_SIZE):
        yield Cell(task, first_recipe(task), name, seed, size)


def _stability(tasks: Sequence[str], seed: int, sizes: Sequence[str]) -> Iterator[Cell]:
    changes = [((name, value),) for name, values in VARIED.items() for value in values]
    yield from _changed(tasks, "latro_no_answer", seed, [(), *changes])


def _lengths(tasks: Sequence[str], seed: int, sizes: Sequence[str]) -> Iterator[Cell]:
    yield from _changed(tasks, "latro_no_answer", seed, [(), *((("cap", cap),) for cap in CAPS)])


def _feedback(tasks: Sequence[str], seed: int, sizes: Sequence[str]) -> Iterator[Cell]:
    """Of answers some of which are wrong."""
    for name in ("latro_no_answer", "rloo"):
        yield from _changed(tasks, name, seed, [(), *((("wrong_answers", share),) for share in WRONG)])


def _explore(tasks: Sequence[str], seed: int, sizes: Sequence[str]) -> Iterator[Cell]:
    """Self-Explore from bases whose skill is not finished, stage by stage."""
    for task, recipes in UNFINISHED.items():
        yield from (Cell(task, name, "self_explore", seed, SMALL, (("updates", 150),)) for name in recipes)


def _changed(
    tasks: Sequence[str], method: str, seed: int, changes: Sequence[tuple[tuple[str, Any], ...]]
) -> Iterator[Cell]:
    varied = [task for task in tasks if named(task).name in VARIED_ON]
    for task, changed in product(varied, changes):
        yield Cell(task, first_recipe(task), method, seed, SMALL, changed)


def first_recipe(task: str) -> str:
    return next(iter(RECIPES[task]))


def last_recipe(task: str) -> str:
    """Whose bases are predicted to collapse."""
    return list(RECIPES[task])[-1]


EXPERIMENTS = {
    "methods": _methods,
    "recipes": _recipes,
    "stability": _stability,
    "lengths": _lengths,
    "feedback": _feedback,
    "explore": _explore,
    "sizes": _sizes,
}


# A small study, of which only the signs are looked at

QUICK_TASK = next(iter(RECIPES))
QUICK = ("base", "sft_answers", "latro_no_answer", "sft_golden")


def quick_cells(seeds: int) -> list[Cell]:
    """Some methods from the first recipe's bases, and LaTRO as published from bases that are predicted to collapse."""
    first, last = first_recipe(QUICK_TASK), last_recipe(QUICK_TASK)
    wanted = [(first, name) for name in QUICK] + [(last, "base"), (last, "latro")]
    return [Cell(QUICK_TASK, recipe, name, seed) for seed in range(seeds) for recipe, name in wanted]
