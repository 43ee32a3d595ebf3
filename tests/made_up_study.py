"""Results of a study that nobody ran: of every kind that its tables and figures know."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

from latro.study.plan import Cell
from latro.study.records import LABELS, Study, golden_length

TASKS = ("chain(steps=3)", "sort", "cups", "choice")
SHORT = ("chain", "sort", "cups", "choice")
RECIPES = ("careful", "mixed", "sloppy")
# What becomes of greedy accuracy, and of the share that rationales have of the golden ones' length.
OUTCOMES = {
    "base": (0.25, 0.3),
    "sft_answers": (0.3, 0.0),
    "latro": (0.9, 0.8),
    "latro_masked_stop": (0.94, 0.95),
    "latro_no_answer": (0.95, 0.95),
    "latro_floor": (0.97, 1.0),
    "gain": (0.96, 1.0),
    "jepo": (0.8, 0.9),
    "jepo_multi": (0.93, 0.9),
    "verifree": (0.9, 0.9),
    "avg_logprob": (0.88, 0.8),
    "rlpr": (0.85, 0.7),
    "multiple_choice": (0.9, 0.9),
    "rloo": (0.98, 1.0),
    "star": (0.94, 1.0),
    "rft": (0.92, 1.0),
    "trice": (0.7, 0.8),
    "dpo": (0.75, 1.1),
    "ranked_dpo": (0.6, 1.2),
    "spin": (0.97, 1.0),
    "self_explore": (0.6, 1.0),
    "sft_golden": (0.99, 1.0),
}
STAGES = {"base": -0.4, "sft": -0.13, "rft": 0.01, "dpo": -0.02, "self_explore": 0.0}  # less than the last one has


def plan(tasks=TASKS, seeds=3):
    """Cells by experiment."""
    numbers = range(seeds)
    options = [("beta", 0.0), ("beta", 0.3), ("normalize_advantages", "group")]
    options += [("num_generations", 2), ("num_generations", 16)]
    of_first = [Cell(tasks[0], "careful", "latro_no_answer", seed) for seed in numbers]
    return {
        "methods": [
            Cell(task, "careful", method, seed)
            for task, method, seed in product(tasks, OUTCOMES, numbers)
            if method != "multiple_choice" or task == "choice"
        ],
        "recipes": [
            Cell(*rest)
            for rest in product(
                tasks,
                RECIPES,
                ("base", "sft_answers", "latro", "latro_masked_stop", "latro_no_answer", "latro_floor", "gain"),
                numbers,
            )
        ],
        "sizes": [
            Cell(task, "careful", method, seed, size)
            for task, method, seed, size in product(
                tasks[:2], ("base", "latro_floor", "sft_golden"), numbers, ("0.15M", "1M", "5M")
            )
        ],
        "stability": of_first + [replace(cell, changed=(option,)) for cell in of_first for option in options],
        "lengths": of_first + [replace(cell, changed=(("cap", cap),)) for cell in of_first for cap in (0.25, 0.5)],
        "explore": [Cell("prog", "careful", "self_explore", seed) for seed in numbers],
        "feedback": of_first + [replace(cell, changed=(("wrong_answers", 0.3),)) for cell in of_first],
    }


def result(cell):
    """Of a run that never was."""
    rng = random.Random(cell.key)
    accuracy, share = OUTCOMES[cell.method]
    gone = cell.recipe == "sloppy" and cell.method in ("latro", "latro_no_answer")
    if gone:
        accuracy, share = 0.2, 0.01
    grown = {"0.15M": 0.0, "1M": 0.3, "5M": 0.5}[cell.size]
    accuracy = min(1.0, max(0.02, accuracy + grown * (1 - accuracy) + rng.gauss(0, 0.02)))
    n, steps = 128, 4
    right = [rng.random() < accuracy for _ in range(n)]
    accuracy, length = sum(right) / n, share * golden_length(cell.task)
    digits = f"{int(''.join('1' if one else '0' for one in right), 2):x}"
    trained = cell.method != "base"
    curve = [
        {
            "step": step,
            "accuracy": 0.25 + (accuracy - 0.25) * step / 120,
            "rationale_length": length * step / 120,
            "answer_logp": -2.0 + step / 100,
            "sample_accuracy": accuracy / 2,
            "self_reward_auc": 0.7 + step / 600 + rng.gauss(0, 0.02),
        }
        for step in range(0, 121 if trained else 1, 20)
    ]
    said = {"text": "7*3=1;#1", "answer_logp": -0.1, "right": True, "first_wrong_step": None}
    wrong = {"text": "7*3=2;<i>_|#2", "answer_logp": -3.2, "right": False, "first_wrong_step": 0}
    return {
        "key": cell.key,
        "task": cell.task,
        "size": cell.size,
        "recipe": cell.recipe,
        "method": cell.method,
        "seed": cell.seed,
        "changed": dict(cell.changed),
        "options": {"beta": 0.05, "num_generations": 8, **dict(cell.changed)} if trained else {},
        "metrics": {
            "n": n,
            "accuracy": accuracy,
            "majority@8": min(1.0, accuracy + 0.02),
            "sample_accuracy": accuracy * 0.9,
            "best_of_8": min(1.0, accuracy + 0.1),
            "answer_logp": -2 * (1 - accuracy),
            "marginal_answer_logp": -1.5 * (1 - accuracy),
            "sample_answer_logp": -3 * (1 - accuracy),
            "self_reward_auc": 0.9,
            "rationale_length": length,
            "truncated_frac": 0.0,
            "completion_tokens": length + 2,
        },
        "right": {"accuracy": digits, "majority@8": digits},
        "by_step": [-2.3 * (1 - accuracy * step / steps) for step in range(steps + 1)],
        "calibration": [[low / 10, low / 10 + 0.1, 20 + low, low / 10 + 0.05, low / 10] for low in range(0, 10, 2)],
        "margin": None
        if trained
        else {"careful": 0.2, "mixed": -0.1, "sloppy": -0.8}[cell.recipe] + rng.gauss(0, 0.05),
        "curve": curve,
        "log": [{"step": step, "rationale_length": length, "reward": -2 + step / 100} for step in (40, 80, 120)]
        if trained
        else [],
        "cost": {
            "seconds": 0.0 if not trained else 8 + 4 * len(LABELS[cell.method]) * rng.uniform(0.95, 1.05),
            "updates": 120 if trained else 0,
            "trained_tokens": 500_000 if trained else 0,
            "sampled_tokens": 100_000 if trained else 0,
        },
        "stages": {name: {"accuracy": accuracy + less} for name, less in STAGES.items()} | {"counts": {}}
        if cell.method == "self_explore"
        else {},
        "cases": [
            {"prompt": f"7*3+{n}:", "answer": "1", "golden": "7*3=1;", "greedy": said, "samples": [said, wrong]}
            for n in range(10)
        ]
        if cell.seed == 0
        else [],
    }


def study_of(planned, missing=lambda cell: False, change=lambda result: None):
    """change: what is done to each result."""
    results = {}
    for cell in {cell.key: cell for cells in planned.values() for cell in cells}.values():
        if not missing(cell):
            results[cell.key] = result(cell)
            change(results[cell.key])
    return Study(results, planned)
