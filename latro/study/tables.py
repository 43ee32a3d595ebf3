"""The study's tables, as Markdown: means over seeds with their interval, and what is missing, said."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from latro.statistics import PairedDifference, paired_difference
from latro.study.comparisons import AGAINST, claims, comparisons
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
    over_seeds,
    paragraphs,
    probability,
    share,
    signed,
    table,
    unseen,
    written,
)
from latro.study.options import feedback, lengths, stability
from latro.study.records import (
    Result,
    Study,
    by_method,
    collapsed,
    estimate,
    golden_length,
    grouped,
    in_order,
    label,
    metric,
    origin,
    parameters,
    predicted,
)
from latro.watch import DANGER, SHRUNK

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


def vanishing(study: Study) -> str:
    """When rationales vanished, and what the reward did meanwhile."""
    rows = []
    for method, runs in by_method(one for one in study.of("recipes") if one["method"] not in AGAINST).items():
        lost = [one for one in runs if collapsed(one) and one["log"]]
        if lost:
            first, last = (estimate(one["log"][at]["reward"] for one in lost) for at in (0, -1))
            rose = share(lost, lambda one: one["log"][-1]["reward"] > one["log"][0]["reward"])
            when = str(max(map(_vanished_by, lost)))
            rows.append([label(method), str(len(lost)), when, written(first, NATS, 0), written(last, NATS, 0), rose])
    if not rows:
        return "No rationales vanished."
    explained = """
Of the runs in which rationales vanished: by which update the sampled ones of all were shorter than a quarter of golden
ones, and the mean reward of the first and of the last updates logged, ± half of the 95 % interval over runs.
"""
    heads = ["method", "runs", "vanished by update", "reward, first", "reward, last", "reward rose"]
    return paragraphs(explained, table(heads, rows))


def _vanished_by(run: Result) -> int:
    """The update, of those logged, from which on sampled rationales are short."""
    least = SHRUNK * golden_length(run["task"])
    longer = [line["step"] for line in run["log"] if line["rationale_length"] >= least]
    return next((line["step"] for line in run["log"] if line["step"] > max(longer, default=0)), run["log"][-1]["step"])


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
        vanishing,
        sizes,
        stability,
        lengths,
        feedback,
        explore,
    )
}
