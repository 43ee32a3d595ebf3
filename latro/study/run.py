"""Runs the study's cells, several at a time, and writes a line of results.jsonl for each.

What is there already is not run again: a study that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import platform
import random
import re
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from latro.data import Example
from latro.launch import versions
from latro.study import measure
from latro.study.bases import SIZES, SMALL, UNFINISHED, device, recipe_of, tokenizer_of, train_bases
from latro.study.methods import METHODS, Budget, Run, tokens_needed
from latro.study.plan import Cell
from latro.tasks import Task, named

RESULTS, BASES, ABOUT = "results.jsonl", "bases", "about.json"


@dataclass(frozen=True)
class Scale:
    """How much is asked and trained."""

    budget: Budget = Budget()
    test_questions: int = 256
    watched_questions: int = 64


@dataclass(frozen=True)
class Bases:
    """Of one task, size and seed, which one process makes, for their clean phase is the same."""

    task: str
    size: str
    seed: int
    recipes: tuple[str, ...]


def study(folder: Path, cells: Sequence[Cell], scale: Scale, processes: int) -> list[dict[str, Any]]:
    """-> the results of these cells, those of former runs among them."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ABOUT).exists():
        (folder / ABOUT).write_text(json.dumps(about(), indent=1) + "\n")
    cells = list(dict.fromkeys(cells))
    found = read(folder)
    for result in found.values():
        if result["scale"] != asdict(scale):
            raise ValueError(f"study: {folder} must hold results of the same scale, got {result['scale']}; use another")
    waiting = [cell for cell in cells if cell.key not in found]
    # A process begins anew, without what this one has of threads.
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(processes, mp_context=context, initializer=_one_thread) as pool,
        tqdm(total=len(cells), initial=len(cells) - len(waiting), desc="study", unit="model") as bar,
        (folder / RESULTS).open("a") as file,
    ):
        jobs: dict[Future[Any], Cell | Bases] = {}
        while waiting or jobs:
            while len(jobs) < processes and (job := _next(folder, waiting, jobs.values())) is not None:
                if isinstance(job, Cell):
                    waiting.remove(job)
                jobs[pool.submit(_work, folder, job, scale)] = job
            done, _ = wait(jobs, return_when=FIRST_COMPLETED)
            for future in done:
                job, result = jobs.pop(future), future.result()
                if isinstance(job, Cell):
                    found[job.key] = result
                    file.write(json.dumps(result) + "\n")
                    file.flush()
                    bar.update()
                    bar.set_postfix_str(f"{job.key}: {result['metrics']['accuracy']:.3f}")
    return [found[cell.key] for cell in cells]


def about() -> dict[str, Any]:
    """Where and with what a study was begun."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "date": date.today().isoformat(),
        "versions": versions(),
        "python": platform.python_version(),
        "device": device,
        "cores": os.cpu_count(),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", path.read_text()) if path.is_file() else []
    return names[0] if names else platform.processor()


def _next(folder: Path, waiting: Sequence[Cell], running: Iterable[Cell | Bases]) -> Cell | Bases | None:
    """The first cell whose base is there, or the first bases to be made."""
    for cell in waiting:
        if _base_of(folder, cell).is_dir():
            return cell
        bases = _bases_of(cell, waiting)
        if not any(isinstance(job, Bases) and (job.task, job.size, job.seed) == cell.bases for job in running):
            return bases
    return None


def _bases_of(cell: Cell, waiting: Iterable[Cell]) -> Bases:
    recipes = [other.recipe for other in waiting if other.bases == cell.bases]
    return Bases(*cell.bases, tuple(dict.fromkeys(recipes)))


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The results that are there, by their cells' keys. A line that was broken off is taken out of the file."""
    path = folder / RESULTS
    whole, newline, broken = path.read_text().rpartition("\n") if path.is_file() else ("", "", "")
    if broken:
        path.write_text(whole + newline)
    results = [json.loads(line) for line in whole.splitlines()]
    return {result["key"]: result for result in results}


# In the processes


def _one_thread() -> None:
    """As many threads whatever the machine, so that the seed alone decides."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def _work(folder: Path, job: Cell | Bases, scale: Scale) -> dict[str, Any] | None:
    if isinstance(job, Cell):
        return run_cell(folder, job, scale)
    make_bases(folder, job)
    return None


def make_bases(folder: Path, bases: Bases) -> None:
    """With tokenizer, each in a folder that is there only when it is whole."""
    tokenizer = tokenizer_of(named(bases.task))
    recipes = {name: recipe_of(bases.task, name) for name in bases.recipes}
    for recipe, model in train_bases(named(bases.task), bases.seed, recipes, bases.size).items():
        to = _base_of(folder, Cell(bases.task, recipe, "base", bases.seed, bases.size))
        unfinished = to.with_name(to.name + ".unfinished")
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(to)


def _base_of(folder: Path, cell: Cell) -> Path:
    return folder / BASES / f"{cell.task}-{cell.size}-{cell.recipe}-{cell.seed}"


def run_cell(folder: Path, cell: Cell, scale: Scale) -> dict[str, Any]:
    base = _base_of(folder, cell)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    model.to(device())  # type: ignore[arg-type]
    return measured(cell, scale, model, tokenizer)


def measured(cell: Cell, scale: Scale, model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """Train the base as the cell says, and measure what came of it."""
    task, changed = named(cell.task), dict(cell.changed)
    max_tokens = tokens_needed(task, tokenizer)
    # As its base's was: a wider model's is lower in proportion.
    learning_rate = scale.budget.learning_rate * SIZES[SMALL].width / SIZES[cell.size].width
    budget = replace(scale.budget, updates=changed.pop("updates", scale.budget.updates), learning_rate=learning_rate)
    examples = with_wrong_answers(task, cell.seed, budget.examples, changed.pop("wrong_answers", 0.0))
    tested = questions(task, cell.seed, scale.test_questions, "test")
    if "cap" in changed:
        changed["max_completion_length"] = round(changed.pop("cap") * max_tokens)
    run = Run(model, tokenizer, cell.task, examples, cell.seed, budget, max_tokens)
    watched = questions(task, cell.seed, scale.watched_questions, "validation")
    curve: list[dict[str, float]] = []

    def ask(asked: Sequence[Example]) -> Any:
        return measure.ask(run.model, run.text, run.grader, asked, max_tokens)

    run.look = lambda update: curve.append(measure.look(ask(watched), update))
    run.look(0)
    if cell.recipe in UNFINISHED.get(cell.task, {}):
        run.tested = tested
    failed = None
    try:
        METHODS[cell.method].train(run, changed)
    except FloatingPointError as error:
        failed = str(error)
    evaluation = ask(tested)
    return {
        "key": cell.key,
        "scale": asdict(scale),
        **{name: getattr(cell, name) for name in ("task", "size", "recipe", "method", "seed")},
        "changed": dict(cell.changed),
        "options": run.options,
        "metrics": measure.metrics_of(evaluation, run.text),
        "right": measure.right(evaluation),
        "by_step": measure.by_step(run.model, run.text, task, evaluation, tested),
        "calibration": measure.calibration(evaluation),
        "margin": measure.margin(model, run.text, watched, max_tokens) if cell.method == "base" else None,
        "curve": curve,
        "log": run.log,
        "cost": vars(run.cost),
        "stages": run.stages,
        "cases": measure.cases(evaluation, tested, task, cell.seed) if cell.seed == 0 else [],
        **({} if failed is None else {"failed": failed}),
    }


def questions(task: Task, seed: int, n: int, split: Any) -> list[Example]:
    return task.problems(seed, min(n, task.most(split)), split)


def with_wrong_answers(task: Task, seed: int, n: int, share: float) -> list[Example]:
    """Training examples, of which so many have another example's answer."""
    examples, rng = questions(task, seed, n, "train"), random.Random(f"wrong answers {seed}")
    return [
        replace(example, answer=rng.choice(examples).answer) if rng.random() < share else example
        for example in examples
    ]
