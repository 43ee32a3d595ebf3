"""What the study found of options: one at a time is changed, and the others are left as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latro.study.markdown import NATS, PERCENT, TOKENS, cell, option_value, over_seeds, paragraphs, share, table, unseen
from latro.study.records import Result, Study, collapsed, grouped, label

SHOWN = {
    "greedy": ("accuracy", PERCENT),
    "T=1": ("sample_accuracy", PERCENT),
    "ℓy": ("answer_logp", NATS),
    "length": ("rationale_length", TOKENS),
}
VANISHED = "vanished: seeds whose greedy rationales are shorter than a quarter of golden ones."
# What an option is where a method leaves it as it is, if the training's options do not say.
LEFT_ALONE = {"cap": 1.0, "wrong_answers": 0.0, "normalize_advantages": None}

Values = list[tuple[str, list[Result]]]


def stability(study: Study) -> str:
    return _by_option(study, "stability")


def lengths(study: Study) -> str:
    return _by_option(study, "lengths")


def feedback(study: Study) -> str:
    return _by_option(study, "feedback")


def _by_option(study: Study, experiment: str) -> str:
    rows = []
    for (task, method), options in changes(study, experiment).items():
        for option, values in options.items():
            for value, runs in values:
                own = "" if any(one["changed"] for one in runs) else ", its own"
                figures = [cell(study, runs, name, kind) for name, kind in SHOWN.values()]
                name = f"`{option}`"
                rows.append([study.short(task), label(method), name, value + own, *figures, share(runs, collapsed)])
    return paragraphs(
        f"{over_seeds(study)} {VANISHED}",
        table(["task", "method", "option", "value", *SHOWN, "vanished"], rows, words=4),
        unseen(study, experiment),
    )


def changes(study: Study, experiment: str) -> dict[tuple[str, str], dict[str, Values]]:
    """By task and method, of each option that was changed: its values in order, the method's own among them, and the
    runs of each."""
    found = {}
    for key, runs in grouped(study.of(experiment), lambda one: (str(one["task"]), str(one["method"]))).items():
        options = dict.fromkeys(option for one in runs for option in one["changed"])
        found[key] = {option: _values(runs, option) for option in options}
    return found


def _values(runs: Sequence[Result], option: str) -> Values:
    own = [one for one in runs if not one["changed"]]
    found = grouped((one for one in runs if option in one["changed"]), lambda one: one["changed"][option])
    if own:
        left_alone = own[0]["options"].get(option, LEFT_ALONE.get(option, "as it is"))
        found[left_alone] = [*own, *found.get(left_alone, ())]
    return [(option_value(value), found[value]) for value in sorted(found, key=_place)]


def _place(value: Any) -> tuple[int, float, str]:
    """Nothing first, then numbers in order, then words."""
    if value is None:
        return 0, 0.0, ""
    return (1, float(value), "") if isinstance(value, int | float) else (2, 0.0, str(value))
