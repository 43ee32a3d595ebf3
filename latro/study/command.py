"""`latro study`: runs what is asked for, or a small part of it of which the signs are checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from latro.study import bases, tables
from latro.study import document as documents
from latro.study.bases import RECIPES
from latro.study.methods import Budget
from latro.study.plan import EXPERIMENTS, QUICK_TASK, SEEDS, SIZES, cells_of, first_recipe, last_recipe, quick_cells
from latro.study.records import Study, collapsed, predicted
from latro.study.run import Scale, read, study

QUICK_SEEDS = 2
QUICK = Scale(Budget(updates=40, looks=2), test_questions=256, watched_questions=48)


def run(
    folder: Path,
    experiments: Sequence[str] | None,
    tasks: Sequence[str] | None,
    seeds: int | None,
    sizes: Sequence[str] | None,
    processes: int,
    report: bool = False,
) -> Study:
    """Of what is None, all. report: run nothing, what is missing is said."""
    experiments, tasks, sizes = experiments or list(EXPERIMENTS), tasks or list(RECIPES), sizes or SIZES
    for name, given, known in (
        ("experiments", experiments, EXPERIMENTS),
        ("tasks", tasks, RECIPES),
        ("sizes", sizes, bases.SIZES),
    ):
        unknown = [one for one in given if one not in known]
        if unknown:
            raise ValueError(f"study: {name} must be some of {list(known)}, got {unknown[0]!r}")
    seeds = SEEDS if seeds is None else seeds
    if not report:
        study(folder, cells_of(experiments, tasks, seeds, sizes), Scale(), processes)
    return found_in(folder, tasks, seeds, sizes)


def found_in(
    folder: Path, tasks: Sequence[str] = tuple(RECIPES), seeds: int = SEEDS, sizes: Sequence[str] = SIZES
) -> Study:
    """The results that are there, beside all that is planned."""
    return Study(read(folder), {name: cells_of([name], tasks, seeds, sizes) for name in EXPERIMENTS})


def shown(found: Study) -> str:
    return tables.methods(found)


def write(document: Path, found: Study) -> list[Path]:
    """-> the files that changed."""
    return documents.write(document, found)


def quick(folder: Path, *, seeds: int, processes: int) -> list[str]:
    """-> the signs that are not as they should be."""
    cells = quick_cells(seeds)
    found = {(one["recipe"], one["method"], one["seed"]): one for one in study(folder, cells, QUICK, processes)}
    first, last = first_recipe(QUICK_TASK), last_recipe(QUICK_TASK)
    wrong = []
    for seed in range(seeds):
        healthy = {method: one for (recipe, method, n), one in found.items() if (recipe, n) == (first, seed)}
        accuracy = {method: one["metrics"]["accuracy"] for method, one in healthy.items()}
        sloppy, shrunk = found[last, "base", seed], found[last, "latro", seed]
        signs = {
            "LaTRO is above its base": accuracy["latro_no_answer"] > accuracy["base"],
            "LaTRO is above fine-tuning on answers": accuracy["latro_no_answer"] > accuracy["sft_answers"],
            "fine-tuning on golden rationales is above its base": accuracy["sft_golden"] > accuracy["base"],
            f"the gate lets {first} pass": not predicted(healthy["base"]["margin"]),
            f"the gate stops {last}": predicted(sloppy["margin"]),
            f"LaTRO keeps the rationales of {first}": not collapsed(healthy["latro_no_answer"]),
            f"LaTRO as published removes the rationales of {last}": collapsed(shrunk),
        }
        wrong += [f"seed {seed}: {sign}" for sign, holds in signs.items() if not holds]
    return wrong
