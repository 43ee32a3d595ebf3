"""Questions that the seed chose, and what was said to them before training and after it, side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

from latro.report.typeset import minus
from latro.study.comparisons import CLAIMED
from latro.study.markdown import table
from latro.study.records import Study, label

SHOWN = 10


def cases(study: Study) -> str:
    """The first questions of each task in turn, from the first recipe's bases."""
    method, chosen = CLAIMED[0], _bases(study, "methods")
    of_tasks = [list(_beside(study, "methods", task=task, recipe=recipe, method=method)) for task, recipe in chosen]
    rows = [row for in_turn in zip_longest(*of_tasks) for row in in_turn if row][:SHOWN]
    if not rows:
        return "No run of the first seed yet."
    return table(["task", "question", "golden", "base", label(method)], rows, words=5)


def failures(study: Study) -> str:
    """Of all such questions those that a trained model still answers wrongly, from all recipes' bases."""
    rows: list[list[str]] = []
    asked = 0
    for task, recipe in _bases(study, "recipes"):
        for method in CLAIMED:
            for row in _beside(study, "recipes", task=task, recipe=recipe, method=method):
                asked += 1
                if row[-1].startswith(WRONG):
                    rows.append([row[0], recipe, label(method), *row[1:]])
    if not asked:
        return "No run of the first seed yet."
    counted = f"{len(rows)} of {asked} such questions were answered wrongly after training"
    if not rows:
        return f"{counted}."
    shown = f", of which the first {SHOWN} are shown" if len(rows) > SHOWN else ""
    heads = ["task", "base's recipe", "method", "question", "golden", "base", "trained"]
    return f"{counted}{shown}:\n\n{table(heads, rows[:SHOWN], words=7)}"


RIGHT, WRONG = "✓", "✗"


def _bases(study: Study, experiment: str) -> list[tuple[str, str]]:
    return list(dict.fromkeys((one["task"], one["recipe"]) for one in study.of(experiment)))


def _beside(study: Study, experiment: str, *, task: str, recipe: str, method: str) -> Iterator[list[str]]:
    """Task, question, golden rationale and answer, and greedy completions of base and trained model."""
    before, after = (
        {
            case["prompt"]: case
            for one in study.of(experiment, task=task, recipe=recipe, method=name)
            for case in one["cases"]
        }
        for name in ("base", method)
    )
    for case in before.values():
        if case["prompt"] in after:
            said = [_said(one["greedy"]) for one in (case, after[case["prompt"]])]
            question = f"{_code(case['prompt'])}<br>{_code(case['answer'])}"
            yield [study.short(task), question, _code(case["golden"]), *said]


def _said(completion: Mapping[str, Any]) -> str:
    mark = RIGHT if completion["right"] else WRONG
    at = completion["first_wrong_step"]
    slip = "" if at is None else f", step {at + 1} is wrong"
    logp = minus(f"{completion['answer_logp']:.2f}")
    return f"{mark} {_code(completion['text'])}<br>ℓy {logp}{slip}"


def _code(text: str) -> str:
    """Whatever a model wrote, as it is: nothing in it is markup."""
    shown = re.sub(r"[^A-Za-z0-9 +=;.,?!()/-]", lambda found: f"&#{ord(found[0])};", text)
    return f"<code>{shown}</code>" if text else "(nothing)"


CASES: dict[str, Callable[[Study], str]] = {"cases": cases, "failures": failures}
