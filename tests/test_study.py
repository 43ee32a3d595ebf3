"""The study's plan, its cells, and that it goes on where it was stopped."""

from __future__ import annotations

import copy
import json
from concurrent.futures import Executor, Future
from math import exp

import pytest
import torch

from latro.demo.run import load_base
from latro.objectives import OBJECTIVES
from latro.study import bases, command, measure, plan, run
from latro.study.methods import METHODS, Budget, Run, tokens_needed
from latro.study.plan import Cell, cells_of
from latro.study.run import RESULTS, Scale, measured, study, with_wrong_answers
from latro.tasks import named

TINY = Scale(Budget(updates=2, prompts=2, rationales=3, looks=1), test_questions=6, watched_questions=4)
TASK = "prog"


@pytest.fixture(scope="module")
def base():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_base(None)
    torch.set_num_threads(threads)


class AtOnce(Executor):
    """In this process, and in the order asked for."""

    def __init__(self, *_, **__):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def shortened(monkeypatch):
    """A study of cells that do nothing, and what of it was made in which order."""
    made = []

    def run_cell(folder, cell, scale):
        made.append(cell.key)
        return {"key": cell.key, "scale": json.loads(json.dumps(run.asdict(scale))), "metrics": {"accuracy": 0.5}}

    def train_bases(task, seed, recipes, size):
        made.append((task.name, size, seed, tuple(recipes)))
        return {name: Nothing() for name in recipes}

    monkeypatch.setattr(run, "ProcessPoolExecutor", AtOnce)
    monkeypatch.setattr(run, "run_cell", run_cell)
    monkeypatch.setattr(run, "train_bases", train_bases)
    return made


class Nothing:
    def save_pretrained(self, folder):
        folder.mkdir(parents=True)


# The plan


def test_every_objective_is_studied():
    tasks = list(bases.RECIPES)
    found = {cell.method for cell in cells_of(["methods"], tasks, 1, [plan.SMALL])}
    named_so = {"latro_masked_stop", "latro_no_answer", "latro_floor", "base", "self_explore"}
    assert set(OBJECTIVES) <= found
    assert found == set(METHODS) == set(OBJECTIVES) | named_so


def test_cells_have_keys_of_their_own_and_seeds_come_in_order():
    cells = list(dict.fromkeys(cells_of(list(plan.EXPERIMENTS), list(bases.RECIPES), 3, plan.SIZES)))
    assert len({cell.key for cell in cells}) == len(cells)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    for task, recipes in bases.RECIPES.items():
        methods = {cell.recipe for cell in cells if cell.task == task and cell.method == "latro"}
        assert methods == set(recipes)


def test_what_is_unknown_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^study: tasks must be some of .*, got 'chess'$"):
        command.run(tmp_path, None, ["chess"], 1, None, 1)
    with pytest.raises(ValueError, match=r"^study: experiments must be some of .*, got 'luck'$"):
        command.run(tmp_path, ["luck"], None, 1, None, 1)


# Going on


def test_a_study_goes_on_where_it_was_stopped(tmp_path, shortened):
    cells = plan.quick_cells(2)
    study(tmp_path, cells[:3], TINY, 1)
    first = list(shortened)
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"key": "broken off')
    found = study(tmp_path, cells, TINY, 1)
    assert [one["key"] for one in found] == [cell.key for cell in cells]
    assert [key for key in shortened if isinstance(key, str)] == [cell.key for cell in cells]
    assert first == [(named(plan.QUICK_TASK).name, plan.SMALL, 0, (cells[0].recipe,)), *(c.key for c in cells[:3])]
    assert len((tmp_path / RESULTS).read_text().splitlines()) == len(cells)


def test_bases_of_a_seed_are_made_together(tmp_path, shortened):
    study(tmp_path, plan.quick_cells(1), TINY, 1)
    made = [one for one in shortened if not isinstance(one, str)]
    assert made == [
        (
            named(plan.QUICK_TASK).name,
            plan.SMALL,
            0,
            (plan.first_recipe(plan.QUICK_TASK), plan.last_recipe(plan.QUICK_TASK)),
        )
    ]


def test_results_of_another_scale_are_refused(tmp_path, shortened):
    study(tmp_path, plan.quick_cells(1)[:1], TINY, 1)
    with pytest.raises(ValueError, match="must hold results of the same scale"):
        study(tmp_path, plan.quick_cells(1)[:1], Scale(), 1)


# Cells


@pytest.mark.parametrize(
    "method", ["base", "sft_answers", "latro", "latro_masked_stop", "rft", "gain", "spin", "self_explore"]
)
def test_a_method_is_measured(base, method):
    model, tokenizer = base
    result = measured(Cell(TASK, "-", method, 0), TINY, copy.deepcopy(model), tokenizer)
    json.dumps(result)
    metrics, cost = result["metrics"], result["cost"]
    assert metrics["n"] == 6
    assert all(0 <= metrics[name] <= 1 for name in ("accuracy", "majority@8", "best_of_8", "sample_accuracy"))
    assert len(result["by_step"]) == 4
    assert result["curve"][0]["step"] == 0
    trained = method != "base"
    assert (cost["trained_tokens"] > 0) == trained == (cost["updates"] > 0)
    assert (cost["sampled_tokens"] > 0) == (
        method in ("latro", "latro_masked_stop", "rft", "gain", "spin", "self_explore")
    )
    assert (result["margin"] is None) == trained
    assert len(result["cases"]) == 6


def test_bits_say_which_questions_were_right(base):
    model, tokenizer = base
    task = named(TASK)
    run = Run(model, tokenizer, TASK, [], 0, Budget(), tokens_needed(task, tokenizer))
    questions = task.problems(0, 40, "test")
    evaluation = measure.ask(model, run.text, run.grader, questions, run.max_tokens)
    bits = int(measure.right(evaluation)["accuracy"], 16)
    assert [bool(bits >> (39 - n) & 1) for n in range(40)] == [r.greedy.right["exact"] for r in evaluation.records]
    assert 0 < bits < 2**40 - 1


def test_calibration_counts_every_sample(base):
    model, tokenizer = base
    run = Run(model, tokenizer, TASK, [], 0, Budget(), 12)
    evaluation = measure.ask(model, run.text, run.grader, named(TASK).problems(0, 20, "test"), 12)
    bins = measure.calibration(evaluation)
    assert sum(one[2] for one in bins) == 20 * measure.VOTES
    for low, high, _, mean, share in bins:
        assert low <= mean <= high
        assert 0 <= share <= 1


def test_by_step_ends_where_the_whole_rationale_does(base):
    model, tokenizer = base
    task = named(TASK)
    run = Run(model, tokenizer, TASK, [], 0, Budget(), 12)
    questions = task.problems(0, 20, "test")
    evaluation = measure.ask(model, run.text, run.grader, questions, 12)
    found = measure.by_step(model, run.text, task, evaluation, questions)
    whole = sum(record.greedy.answer_logp for record in evaluation.records) / 20
    assert found[-1] == pytest.approx(whole, abs=1e-3)
    assert found[0] != pytest.approx(whole, abs=1e-2)


def test_some_answers_are_wrong():
    clean = with_wrong_answers(named(TASK), 0, 200, 0.0)
    noisy = with_wrong_answers(named(TASK), 0, 200, 0.5)
    differ = sum(a.answer != b.answer for a, b in zip(clean, noisy, strict=True))
    assert 60 < differ < 120
    assert [a.id for a in clean] == [b.id for b in noisy]


def test_the_margin_is_of_full_rationales_less_none(base):
    model, tokenizer = base
    run = Run(model, tokenizer, TASK, [], 0, Budget(), 12)
    found = measure.margin(model, run.text, named(TASK).problems(0, 32, "validation"), 12)
    assert found > 0  # the demo's base says full rationales where it is sure
    assert exp(found) < 1e6


# Signs


def results_of(seeds=1):
    """As a study that went well has them: by recipe and method, accuracy, length and margin."""
    first, last = plan.first_recipe(plan.QUICK_TASK), plan.last_recipe(plan.QUICK_TASK)
    found = {
        (first, "base"): (0.2, 1.0, 1.9),
        (first, "sft_answers"): (0.1, 0.0, None),
        (first, "latro_no_answer"): (1.0, 18.0, None),
        (first, "sft_golden"): (1.0, 18.0, None),
        (last, "base"): (0.2, 2.0, -1.8),
        (last, "latro"): (0.1, 0.0, None),
    }
    return [result_of(cell, *found[cell.recipe, cell.method]) for cell in plan.quick_cells(seeds)]


def result_of(cell, accuracy, length, margin):
    named_so = {name: getattr(cell, name) for name in ("task", "recipe", "method", "seed")}
    return {**named_so, "metrics": {"accuracy": accuracy, "rationale_length": length}, "cost": {}, "margin": margin}


@pytest.mark.parametrize(
    ("place", "change", "sign"),
    [
        (2, {"accuracy": 0.15}, "LaTRO is above its base"),
        (1, {"accuracy": 1.0}, "LaTRO is above fine-tuning on answers"),
        (3, {"accuracy": 0.2}, "fine-tuning on golden rationales is above its base"),
        (0, {"margin": -0.6}, "the gate lets guessing pass"),
        (4, {"margin": 0.0}, "the gate stops sloppy"),
        (2, {"rationale_length": 1.0}, "LaTRO keeps the rationales of guessing"),
        (5, {"rationale_length": 17.0}, "LaTRO as published removes the rationales of sloppy"),
    ],
)
def test_a_wrong_sign_is_told(tmp_path, monkeypatch, place, change, sign):
    results = results_of(2)
    monkeypatch.setattr(command, "study", lambda *_: results)
    assert command.quick(tmp_path, seeds=2, processes=1) == []
    wrong = results[6 + place]
    for name, value in change.items():
        (wrong if name == "margin" else wrong["metrics"])[name] = value
    assert sign in " ".join(command.quick(tmp_path, seeds=2, processes=1))
    assert all(one.startswith("seed 1: ") for one in command.quick(tmp_path, seeds=2, processes=1))
