"""Small tasks of reasoning, made and not downloaded: every answer and every step of a rationale can be checked.

    task = named("chain(steps=5)")
    examples = task.problems(seed=0, n=1000, split="train")
    task.first_wrong_step(examples[0], "7*3=1;1+5=7;")

Their texts are of few characters, so that a tokenizer with a token for each (`alphabet`) and a tiny model will do.
"""

from __future__ import annotations

import ast
import inspect
from typing import Any

from latro.tasks.arithmetic import Chain, Program
from latro.tasks.choice import Choice
from latro.tasks.letters import Rotation, Sort
from latro.tasks.states import Cups, Registers
from latro.tasks.task import ANSWER_TEMPLATE, MARKER, Problem, Split, Task, split_of

TASKS: dict[str, type[Task]] = {task.name: task for task in (Program, Chain, Rotation, Sort, Cups, Registers, Choice)}

__all__ = ["ANSWER_TEMPLATE", "MARKER", "TASKS", "Problem", "Split", "Task", "is_task", "named", "split_of"]


def is_task(name: str) -> bool:
    return name.partition("(")[0] in TASKS


def named(name: str) -> Task:
    """A task by its name, with other parameters than its own where they are given: `chain(steps=5, signs="+-")`."""
    family = name.partition("(")[0]
    if family not in TASKS:
        raise ValueError(f"task must be one of {sorted(TASKS)}, got {family!r}")
    parameters = _parameters(name)
    known = inspect.signature(TASKS[family]).parameters
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(f"{family}: parameters are {', '.join(known)}, got {parameter!r}")
    return TASKS[family](**parameters)


def _parameters(name: str) -> dict[str, Any]:
    try:
        call = ast.parse(name, mode="eval").body
        if isinstance(call, ast.Name):
            return {}
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(f"task must be a name, or like chain(steps=5), got {name!r}") from None
