"""The study's tables, as Markdown: means over seeds with their interval, and what is missing, said."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from latro.statistics import PairedDifference, holm, mcnemar, paired_difference
from latro.study.markdown import (
    ABSENT,
    COUNT,
    MEAN,
    NATS,
    PERCENT,
    SHARE,
    THOUSANDS,
    TOKENS,
    cell,
    option_value,
    over_seeds,
    paragraphs,
    probability,
    share,
    signed,
    table,
    unseen,
    written,
)
from latro.study.records import (
    Result,
    Study,
    answers,
    by_method,
    collapsed,
    estimate,
    golden_length,
    grouped,
    in_order,
    label,
    metric,
    origin,
    pairs,
    parameters,
    predicted,
)
from latro.watch import DANGER

LEVEL = 0.05
CLAIMED = ("latro_floor", "gain")  # the methods of which it is claimed that they beat those below
AGAINST = ("base", "sft_answers")
STAGES = {
    "base": "base",
    "sft": "SFT on golden rationales",
    "rft": "RFT",
    "dpo": "DPO on whole pairs",
    "self_explore": "DPO on first wrong steps",
}
ABOVE = ("sft", "rft")  # what a stage is compared with


COLUMNS = {
    "greedy": ("accuracy", PERCENT),
    "maj@8": ("majority@8", PERCENT),
    "best of 8": ("best_of_8", PERCENT),
    "T=1": ("sample_accuracy", PERCENT),
    "ℓy": ("answer_logp", NATS),
    "AUC": ("self_reward_auc", SHARE),
    "length": ("rationale_length", TOKENS),
    "cut off": ("truncated_frac", PERCENT),
}
EXPLAINED = """
greedy, maj@8, T=1: accuracy in % of greedy completions, of majority votes of 8 samples, of single samples. best of 8:
of the sample behind which the right answer is likeliest, which takes knowing it. ℓy: mean ln π(y | x, z) of the right
answer behind greedy rationales. AUC: how often π(y | x, z) is higher for a right than for a wrong sample of the same
question. length: tokens of greedy rationales. cut off: completions that reached the limit.
"""
OF_CHANGES = {name: COLUMNS[name] for name in ("greedy", "T=1", "ℓy", "length")}
VANISHED = "vanished: seeds whose greedy rationales are shorter than a quarter of golden ones."


# The plan


def coverage(study: Study) -> str:
    """How much of the plan was run."""
    rows = [
        [experiment, str(len(cells)), str(len(study.of(experiment))), str(len(study.missing(experiment)))]
        for experiment, cells in study.planned.items()
    ]
    stopped = [f"`{one['key']}` stopped: {one['failed']}" for one in study.results.values() if "failed" in one]
    return paragraphs(
        table(["experiment", "models planned", "run", "missing"], rows),
        "\n\n".join(stopped) or "No run stopped before its end.",
    )


# All methods


def methods(study: Study) -> str:
    """Greedy accuracy by method and task."""
    cells = study.planned.get("methods", ())
    tasks = list(dict.fromkeys(one.task for one in cells))
    planned = {(one.method, one.task) for one in cells}
    found = grouped(study.of("methods"), lambda one: (one["method"], one["task"]))
    rows = [
        [
            label(method),
            *(
                cell(study, found.get((method, task), ()), "accuracy", PERCENT) if (method, task) in planned else ""
                for task in tasks
            ),
        ]
        for method in in_order(one.method for one in cells)
    ]
    named = ", ".join(f"`{task}`" for task in tasks)
    return paragraphs(
        f"Greedy accuracy in %, on test questions of {named}. {over_seeds(study)} Empty: no options.",
        table(["method", *map(study.short, tasks)], rows),
        unseen(study, "methods"),
    )


def costs(study: Study) -> str:
    """What training took, and what an answer takes afterwards."""
    cells = study.planned.get("methods", ())
    tasks = list(dict.fromkeys(one.task for one in cells))
    found = grouped(study.of("methods"), lambda one: (one["method"], one["task"]))
    rows = [
        [label(method), *(_cost(study, found.get((method, task), ())) for task in tasks)]
        for method in in_order(one.method for one in cells)
    ]
    explained = """
Seconds of training, on one core; thousands of tokens that training read and wrote; tokens of a greedy completion.
"""
    return paragraphs(f"{explained.strip()} {over_seeds(study)}", table(["method", *map(study.short, tasks)], rows))


def _cost(study: Study, runs: Sequence[Result]) -> str:
    if not runs:
        return ABSENT
    seconds, trained, sampled, said = (
        cell(study, runs, name, kind)
        for name, kind in (
            ("seconds", COUNT),
            ("trained_tokens", THOUSANDS),
            ("sampled_tokens", THOUSANDS),
            ("completion_tokens", MEAN),
        )
    )
    return f"{seconds} s<br>{trained} + {sampled} k<br>{said}"


def tasks(study: Study) -> str:
    """Everything that was measured of each method, a table for each task."""
    cells = study.planned.get("methods", ())
    parts = [f"{over_seeds(study)} {EXPLAINED.strip()}"]
    for task in dict.fromkeys(one.task for one in cells):
        found = by_method(study.of("methods", task=task))
        rows = [
            [label(method), *(cell(study, found.get(method, ()), name, kind) for name, kind in COLUMNS.values())]
            for method in in_order(one.method for one in cells if one.task == task)
        ]
        parts.append(f"`{task}`, golden rationales of {golden_length(task):.1f} tokens:")
        parts.append(table(["method", *COLUMNS], rows))
    return paragraphs(*parts)


# Comparisons


Tested = tuple[PairedDifference, int]  # and in how many seeds McNemar's test finds the method better


class Comparison(NamedTuple):
    """Of a method with each of AGAINST; None where there is no seed that has both."""

    task: str
    recipe: str
    method: str
    differences: tuple[Tested | None, ...]


def claims(study: Study) -> str:
    return _comparisons(study, compared(study, lambda method: method in CLAIMED))


def comparisons(study: Study) -> str:
    return _comparisons(study, compared(study, lambda method: method not in (*CLAIMED, *AGAINST)))


def compared(study: Study, chosen: Callable[[str], bool]) -> list[Comparison]:
    """From every recipe's bases."""
    found = []
    groups = grouped(study.of("recipes", "methods"), lambda one: (one["task"], one["recipe"]))
    for (task, recipe), results in groups.items():
        runs = by_method(results)
        for method in filter(chosen, runs):
            differences = tuple(_difference(pairs(runs.get(against, ()), runs[method])) for against in AGAINST)
            found.append(Comparison(task, recipe, method, differences))
    return found


def _difference(of_seeds: Sequence[tuple[Result, Result]]) -> Tested | None:
    if not of_seeds:
        return None
    first, second = ([metric(one, "accuracy") for one in column] for column in zip(*of_seeds, strict=True))
    tests = [mcnemar(answers(one), answers(other)) for one, other in of_seeds]
    better = sum(p < LEVEL and b > a for p, a, b in zip(tests, first, second, strict=True))
    return paired_difference(first, second), better


def _comparisons(study: Study, found: Sequence[Comparison]) -> str:
    tested = [difference for one in found for difference in one.differences if difference]
    if not tested:
        return "No pair of runs to compare yet."
    adjusted = iter(holm([difference.p_value for difference, _ in tested]))
    rows = [
        [study.short(one.task), one.recipe, label(one.method)]
        + [text for difference in one.differences for text in _compared(difference, adjusted)]
        for one in found
    ]
    explained = f"""
Difference of greedy accuracy, in points, between runs from the same bases: mean over seeds with its 95 % interval. p:
Student's paired test, corrected by Holm for the {len(tested)} tests of this table; **bold** below {LEVEL}. seeds: those
in which McNemar's test on the seed's own questions finds the method better.
"""
    heads = [head for against in AGAINST for head in (f"less {label(against)}", "p", "seeds")]
    return paragraphs(explained, table(["task", "base's recipe", "method", *heads], rows, words=3))


def _compared(found: Tested | None, adjusted: Iterator[float]) -> list[str]:
    if found is None:
        return [ABSENT] * 3
    (difference, low, high, _, n), better = found
    p, text, seeds = next(adjusted), signed(100 * difference), f"{better} of {n}"
    if n == 1:
        return [text, "one seed", seeds]
    text += f" ({signed(100 * low)} to {signed(100 * high)})"
    return [f"**{text}**" if p < LEVEL else text, probability(p), seeds]


# Bases, and rationales that vanish


def recipes(study: Study) -> str:
    """What the gate says of each base, and what became of it."""
    cells = study.planned.get("recipes", ())
    found = grouped(study.of("recipes"), lambda one: (one["task"], one["recipe"], one["method"]))
    methods = in_order(one.method for one in cells)
    rows = [
        [
            study.short(task),
            recipe,
            _margins(found.get((task, recipe, "base"), ())),
            *(_became(study, found.get((task, recipe, method), ())) for method in methods),
        ]
        for task, recipe in dict.fromkeys((one.task, one.recipe) for one in cells)
    ]
    explained = f"""
margin: mean over the seeds' bases, and range; how many of them the gate, below {signed(DANGER)}, predicts to lose
their rationales. Behind it, of each method: greedy accuracy in %, the length of greedy rationales in tokens, and of
how many seeds they vanished (shorter than a quarter of golden ones).
"""
    return paragraphs(
        f"{over_seeds(study)} {explained.strip()}",
        table(["task", "base's recipe", "margin", *map(label, methods)], rows, words=2),
        unseen(study, "recipes"),
    )


def _margins(bases: Sequence[Result]) -> str:
    margins = [base["margin"] for base in bases if base["margin"] is not None]
    if not margins:
        return ABSENT
    ends = f"{signed(min(margins), 2)} to {signed(max(margins), 2)}"
    text = f"{signed(sum(margins) / len(margins), 2)} ({ends})"
    warned = sum(map(predicted, margins))
    return f"{text}<br>**{warned} of {len(margins)} predicted**" if warned else text


def _became(study: Study, results: Sequence[Result]) -> str:
    if not results:
        return ABSENT
    length = estimate(metric(one, "rationale_length") for one in results)
    text = f"{cell(study, results, 'accuracy', PERCENT)}<br>{length.mean:.1f} tokens"
    # Those that are compared against have none to lose.
    if results[0]["method"] in AGAINST or not any(map(collapsed, results)):
        return text
    return f"{text}<br>**{share(results, collapsed)} vanished**"


def gate(study: Study) -> str:
    """How often rationales vanished where it was predicted, and where it was not."""
    found = study.of("recipes")
    margins = {origin(one): one["margin"] for one in found if one["margin"] is not None}
    rows = []
    for method, runs in by_method(one for one in found if one["method"] not in AGAINST).items():
        warned = grouped((one for one in runs if origin(one) in margins), lambda one: predicted(margins[origin(one)]))
        rows.append([label(method), *(share(warned.get(expected, ()), collapsed) for expected in (True, False))])
    if not rows:
        return "No run from a base whose margin is known yet."
    return table(["rationales vanished", "where the gate predicts it", "elsewhere"], rows)


# Sizes


def sizes(study: Study) -> str:
    """Greedy accuracy by the number of parameters, and what ten times as many bring."""
    cells = study.planned.get("sizes", ())
    of_sizes = sorted({one.size for one in cells}, key=parameters)
    found = grouped(study.of("sizes"), lambda one: (one["task"], one["method"]))
    rows = []
    for task in dict.fromkeys(one.task for one in cells):
        for method in in_order(one.method for one in cells if one.task == task):
            runs = found.get((task, method), [])
            by_size = grouped(runs, lambda one: str(one["size"]))
            figures = [cell(study, by_size.get(size, ()), "accuracy", PERCENT) for size in of_sizes]
            rows.append(
                [study.short(task), label(method), *figures, written(estimate(slopes(runs)), PERCENT, study.seeds)]
            )
    explained = "slope: points that ten times as many parameters bring, by a line through each seed's sizes."
    return paragraphs(
        f"Greedy accuracy in %. {over_seeds(study)} {explained}",
        table(["task", "method", *of_sizes, "slope"], rows, words=2),
        unseen(study, "sizes"),
    )


def slopes(results: Iterable[Result]) -> list[float]:
    """Of each seed that has two sizes or more: accuracy by the decimal logarithm of the parameters, least squares."""
    found = []
    for runs in grouped(results, lambda one: int(one["seed"])).values():
        x, y = [math.log10(parameters(one["size"])) for one in runs], [metric(one, "accuracy") for one in runs]
        middle = sum(x) / len(x)
        spread = sum((at - middle) ** 2 for at in x)
        if spread:
            found.append(sum((at - middle) * value for at, value in zip(x, y, strict=True)) / spread)
    return found


# Options

# What an option is where a method leaves it as it is, if the training's options do not say.
LEFT_ALONE = {"cap": 1.0, "wrong_answers": 0.0, "normalize_advantages": None}

Values = list[tuple[str, list[Result]]]


def stability(study: Study) -> str:
    return _by_option(study, "stability")


def lengths(study: Study) -> str:
    return _by_option(study, "lengths")


def feedback(study: Study) -> str:
    return _by_option(study, "feedback")


def explore(study: Study) -> str:
    """Self-Explore, stage by stage."""
    parts = [over_seeds(study)]
    for task, runs in grouped(study.of("explore"), lambda one: str(one["task"])).items():
        stages: dict[str, list[float]] = {}
        for run in runs:
            for name, stage in run["stages"].items():
                if "accuracy" in stage:
                    stages.setdefault(name, []).append(stage["accuracy"])
        rows = [
            [STAGES.get(name, name), written(estimate(values), PERCENT, study.seeds), *_above(stages, name)]
            for name, values in stages.items()
        ]
        parts.append(f"`{task}`")
        parts.append(table(["stage", "greedy", *(f"above {STAGES[name]}" for name in ABOVE), "p"], rows))
    return paragraphs(*parts, unseen(study, "explore"))


def _above(stages: Mapping[str, Sequence[float]], name: str) -> list[str]:
    """The paired differences from the stages of ABOVE, and the p-value of the first."""
    found = [None if name in (other, "base") else paired_difference(stages[other], stages[name]) for other in ABOVE]
    first = found[0]
    return [*map(_with_interval, found), ABSENT if first is None else probability(first.p_value)]


def _with_interval(found: PairedDifference | None) -> str:
    if found is None:
        return ABSENT
    interval = f" [{signed(100 * found.low)}, {signed(100 * found.high)}]" if math.isfinite(found.low) else ""
    return signed(100 * found.difference) + interval


def _by_option(study: Study, experiment: str) -> str:
    rows = []
    for (task, method), options in changes(study, experiment).items():
        for option, values in options.items():
            for value, runs in values:
                own = "" if any(one["changed"] for one in runs) else ", its own"
                figures = [cell(study, runs, name, kind) for name, kind in OF_CHANGES.values()]
                name = f"`{option}`"
                rows.append([study.short(task), label(method), name, value + own, *figures, share(runs, collapsed)])
    return paragraphs(
        f"{over_seeds(study)} {VANISHED}",
        table(["task", "method", "option", "value", *OF_CHANGES, "vanished"], rows, words=4),
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


TABLES: dict[str, Callable[[Study], str]] = {
    function.__name__: function
    for function in (
        coverage,
        methods,
        tasks,
        costs,
        claims,
        comparisons,
        recipes,
        gate,
        sizes,
        stability,
        lengths,
        feedback,
        explore,
    )
}
