"""The study's figures. Each is a function of the study; what was not run is said in its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from latro.report.typeset import minus
from latro.study.options import Values, changes
from latro.study.plot import Panel, Point, Scale, Style, between, categories, figure, linear, logarithmic
from latro.study.records import (
    Result,
    Study,
    by_method,
    by_task,
    estimate,
    every,
    golden_length,
    grouped,
    in_order,
    kept,
    label,
    metric,
    origin,
    pairs,
    parameters,
)
from latro.study.tables import slopes
from latro.watch import DANGER, SHRUNK

WIDTH, HEIGHT = 190.0, 145.0  # of a plot, of which four stand side by side
COLUMNS = 4

# A method looks the same in all figures.
STYLES = {
    "base": Style(0),
    "sft_answers": Style(1),
    "sft_golden": Style(9),
    "latro": Style(2, "5 4"),
    "latro_masked_stop": Style(2, "2 3"),
    "latro_no_answer": Style(2),
    "latro_floor": Style(3),
    "gain": Style(5),
    "verifree": Style(6),
    "jepo": Style(7, "5 4"),
    "jepo_multi": Style(7),
    "rlpr": Style(8),
    "rloo": Style(4),
    "rft": Style(4, "5 4"),
    "self_explore": Style(8, "5 4"),
}
OTHERS = Style(0, "2 3")
APART = (1, 2, 5, 7, 9, 6)  # colours of what is no method

CURVES = ("sft_answers", "latro", "latro_no_answer", "latro_floor", "gain", "rloo", "sft_golden")
CALIBRATED = ("base", "sft_answers", "latro_no_answer", "latro_floor", "sft_golden")
STEPPED = ("base", "latro_no_answer", "latro_floor", "sft_golden")
GATED = ("latro", "latro_masked_stop", "latro_no_answer", "gain")

ACCURACY, LENGTH = "greedy accuracy, %", "length, % of golden"


def style(method: str) -> Style:
    return STYLES.get(method, OTHERS)


def legend(results: Iterable[Result]) -> list[tuple[str, Style]]:
    return [(label(method), style(method)) for method in by_method(results)]


def points(values: Iterable[tuple[float, Iterable[float]]]) -> list[Point]:
    """Means and intervals over seeds, place by place."""
    found = ((place, estimate(of_place)) for place, of_place in values)
    return [Point(place, one.mean, one.low, one.high) for place, one in found]


def percents(height: float, low: float = 0, high: float = 100) -> Scale:
    """Ticks from 0 to 100 %; low and high leave room beyond."""
    return Scale(low, high, height, 0, between(0, 100, 25, height, 0).ticks)


def accuracies(results: Iterable[Result]) -> list[float]:
    return [100 * metric(result, "accuracy") for result in results]


def lengths_kept(results: Iterable[Result]) -> list[float]:
    return [100 * kept(result) for result in results]


def rows_of(panels: Sequence[Panel], columns: int = COLUMNS) -> list[Sequence[Panel]]:
    """The first of each row says what its values are."""
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    for _, *others in rows:
        for panel in others:
            panel.y_name = ""
    return rows


# During training


def learning(study: Study) -> str:
    """Accuracy and length of greedy rationales on validation questions."""
    found = _curved(study)
    accuracy = [
        _curve(study.short(task), runs, "accuracy", percents(HEIGHT), ACCURACY, 100) for task, runs in by_task(found)
    ]
    length = []
    for task, runs in by_task(found):
        most = max(look["rationale_length"] for one in runs for look in one["curve"])
        scale = linear([0, most, golden_length(task)], HEIGHT, 0)
        length.append(_curve(study.short(task), runs, "rationale_length", scale, "rationale length, tokens"))
        length[-1].across(golden_length(task), "golden")
    words = "Accuracy and rationale length during training"
    return figure([*rows_of(accuracy), *rows_of(length)], legend(found), words)


def ranking(study: Study) -> str:
    """How well the self-reward ranks samples."""
    found = _curved(study)
    panels = []
    for task, runs in by_task(found):
        scale = between(0, 1, 0.25, HEIGHT, 0)
        panels.append(_curve(study.short(task), runs, "self_reward_auc", scale, "AUC of the self-reward"))
        panels[-1].across(0.5, "chance")
    return figure(rows_of(panels), legend(found), "AUC of the self-reward during training")


def _curved(study: Study) -> list[Result]:
    return [one for one in study.of("methods") if one["method"] in CURVES and one["curve"]]


def _curve(title: str, runs: Sequence[Result], name: str, y: Scale, y_name: str, factor: float = 1) -> Panel:
    last = max(look["step"] for one in runs for look in one["curve"])
    panel = Panel(title, linear([0, last], 0, WIDTH), y, WIDTH, HEIGHT, "update", y_name)
    for method, of_method in by_method(runs).items():
        looks = [look for one in of_method for look in one["curve"] if look.get(name) is not None]
        steps = grouped(looks, lambda look: look["step"])
        line = points((step, [factor * look[name] for look in steps[step]]) for step in sorted(steps))
        panel.line(line, style(method), label(method), band=True)
    return panel


# After training


def calibration(study: Study) -> str:
    """How often samples are right that give the right answer some probability."""
    found = [one for one in study.of("methods") if one["method"] in CALIBRATED]
    panels = []
    for task, runs in by_task(found):
        x = between(0, 1, 0.25, 0, WIDTH)
        panel = Panel(study.short(task), x, percents(HEIGHT), WIDTH, HEIGHT, "π(y | x, z)", "samples that are right, %")
        panel.diagonal()
        for method, of_method in by_method(runs).items():
            bins = _pooled(of_method)
            most = max((samples for _, samples in bins), default=1)
            panel.line([point for point, _ in bins], style(method), label(method), band=True)
            for point, samples in bins:
                panel.dot(point, style(method), radius=1.5 + 4 * math.sqrt(samples / most))
        panels.append(panel)
    return figure(rows_of(panels), legend(found), "Calibration of π(y | x, z)")


def _pooled(results: Iterable[Result]) -> list[tuple[Point, float]]:
    """Bins of all seeds together: the mean probability and the share that is right, and the samples."""
    bins: dict[float, list[Sequence[float]]] = {}
    for one in results:
        for low, *rest in one["calibration"]:
            bins.setdefault(low, []).append(rest)
    found = []
    for _, same in sorted(bins.items()):
        samples = sum(one[1] for one in same)
        mean, share = (sum(one[1] * one[n] for one in same) / samples for n in (2, 3))
        found.append((Point(mean, 100 * share), samples))
    return found


def gate(study: Study) -> str:
    """What the margin of a base says of the runs that begin there."""
    found = study.of("recipes")
    margins = {origin(one): one["margin"] for one in found if one["margin"] is not None}
    colours = {task: Style(APART[n % len(APART)]) for n, task in enumerate(every(found, "task"))}
    x = linear([*margins.values(), DANGER, 0], 0, WIDTH)
    rows: list[Sequence[Panel]] = []
    for y_name, measured in ((LENGTH, lengths_kept), (ACCURACY, accuracies)):
        panels = []
        for method in GATED:
            panel = Panel(label(method), x, percents(HEIGHT, 0, 125), WIDTH, HEIGHT, "margin of the base, nats", y_name)
            panel.upright(DANGER)
            if y_name == LENGTH:
                panel.across(100 * SHRUNK)
            runs = [one for one in found if one["method"] == method and origin(one) in margins]
            for one, value in zip(runs, measured(runs), strict=True):
                panel.dot(Point(margins[origin(one)], value), colours[one["task"]], faint=True)
            lost = sum(not math.isfinite(value) for value in measured(runs))
            panel.absent += [f"{lost} runs"] if lost else []
            if not runs:
                panel.nothing()
            panels.append(panel)
        rows += rows_of(panels)
    words = "What became of rationales, by the base's margin"
    return figure(
        rows if found else [], [(study.short(task), colour) for task, colour in colours.items()], words, dots=True
    )


def cost(study: Study) -> str:
    """Accuracy against seconds of training."""
    wide, high = 415.0, 300.0
    panels = []
    for task, runs in by_task(study.of("methods")):
        of_methods = by_method(runs)
        seconds = {name: estimate(metric(one, "seconds") for one in ones).mean for name, ones in of_methods.items()}
        accuracy = {name: estimate(accuracies(ones)).mean for name, ones in of_methods.items()}
        trained = [name for name in of_methods if seconds[name] > 0 and math.isfinite(accuracy[name])]
        lost = [label(name) for name in of_methods if not math.isfinite(accuracy[name]) and name != "base"]
        x = logarithmic([seconds[name] for name in trained], 0, wide)
        # Room for names above and below.
        y = percents(high, -12, 112)
        panel = Panel(study.short(task), x, y, wide, high, "seconds of training, one core", ACCURACY, absent=lost)
        if "base" in accuracy:
            panel.across(accuracy["base"], "base")
        panel.label([(Point(seconds[name], accuracy[name]), label(name), style(name)) for name in trained])
        panels.append(panel)
    return figure(rows_of(panels, 2), [], "Greedy accuracy against seconds of training, by method")


def golden(study: Study) -> str:
    """How far each method is from training on golden rationales."""
    cells = study.planned.get("methods", ())
    planned = {(cell.task, cell.method) for cell in cells}
    methods = [method for method in in_order(cell.method for cell in cells) if method != "sft_golden"]
    wide, high = 170.0, 17.0 * len(methods)
    panels: list[Panel] = []
    for task, runs in by_task(study.of("methods")):
        names = [""] * len(methods) if panels else list(map(label, methods))
        y = categories(names, 0, high)
        panel = Panel(study.short(task), between(-100, 25, 25, 0, wide), y, wide, high, "points below golden")
        panel.beside = 14 if panels else 150
        panel.upright(0)
        of_methods = by_method(runs)
        for n, method in enumerate(methods):
            of_seeds = pairs(of_methods.get("sft_golden", ()), of_methods.get(method, ()))
            gap = estimate(b - a for first, second in of_seeds for a, b in [accuracies([first, second])])
            panel.bar(n, Point(gap.mean, n, gap.low, gap.high), style(method), thick=10)
            if (task, method) in planned and not gap.n:
                panel.words(panel.x.at(0) - 6, y.at(n), "not finite" if gap.lost else "not run", "end central missing")
        panels.append(panel)
    return figure(rows_of(panels), [], "Greedy accuracy less that after training on golden rationales")


def sizes(study: Study) -> str:
    """Accuracy by the number of parameters."""
    wide, high = 300.0, 200.0
    panels = []
    for task, runs in by_task(study.of("sizes")):
        counts = sorted({parameters(one["size"]) for one in runs})
        ticks = tuple((count, f"{count / 1e6:g}M") for count in counts)
        x = Scale(counts[0] / 2, counts[-1] * 2, 0, wide, ticks, logarithmic=True)
        panel = Panel(study.short(task), x, percents(high), wide, high, "parameters", ACCURACY, after=150)
        ends = []
        for method, of_method in by_method(runs).items():
            by_count = grouped(of_method, lambda one: parameters(one["size"]))
            line = points((count, accuracies(by_count[count])) for count in sorted(by_count))
            panel.line(line, style(method), label(method))
            slope = estimate(slopes(of_method)).mean
            text = f"{label(method)}, {minus(f'{100 * slope:+.1f}')}" if math.isfinite(slope) else label(method)
            ends.append((panel.y.at(line[-1].y), text, style(method)))
        for height, (_, text, colour) in zip(_spread([at for at, _, _ in ends], 13), ends, strict=True):
            panel.words(panel.width + 8, height, text, "label central", colour)
        panels.append(panel)
    return figure(rows_of(panels, 2), [], "Greedy accuracy by parameters; slope in points for ten times as many")


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, of which the lower ones are moved down until all are so far apart. What is nowhere stays there."""
    moved = list(heights)
    last = -math.inf
    for n in sorted((n for n in range(len(heights)) if math.isfinite(heights[n])), key=lambda n: heights[n]):
        moved[n] = last = max(heights[n], last + gap)
    return moved


# With other options

OPTIONS = {
    "beta": "β",
    "num_generations": "K",
    "answer_weight": "λ",
    "normalize_advantages": "scaled by deviation of",
    "learning_rate": "learning rate",
    "wrong_answers": "wrong answers, share",
    "cap": "tokens allowed, share",
}


def stability(study: Study) -> str:
    return _by_option(study, "stability", "Accuracy and length by one option at a time")


def feedback(study: Study) -> str:
    return _by_option(study, "feedback", "Accuracy and length by the share of wrong answers that are trained on")


def _by_option(study: Study, experiment: str, words: str) -> str:
    found = changes(study, experiment)
    one_task = len({task for task, _ in found}) < 2
    styles = {key: style(key[1]) if one_task else Style(APART[n % len(APART)]) for n, key in enumerate(found)}
    options = list(dict.fromkeys(option for of_method in found.values() for option in of_method))
    rows: list[Sequence[Panel]] = []
    for y_name, measured in ((ACCURACY, accuracies), (LENGTH, lengths_kept)):
        panels = []
        for option in options:
            lines = [
                (label(key[1]), styles[key], of_method[option])
                for key, of_method in found.items()
                if option in of_method
            ]
            panels.append(_option_panel(option, lines, measured, y_name))
        rows += rows_of(panels, 5)
    if len(options) == 1:
        rows = [[panel for row in rows for panel in row]]
    names = [(f"{label(method)}, {study.short(task)}", styles[task, method]) for task, method in found]
    return figure(rows, names, words)


def _option_panel(
    option: str,
    lines: Sequence[tuple[str, Style, Values]],
    measured: Callable[[Iterable[Result]], list[float]],
    y_name: str,
    wide: float = 148.0,
) -> Panel:
    """lines: of each its name and the option's values with their runs."""
    values = list(dict.fromkeys(value for _, _, line in lines for value, _ in line))
    name, x = OPTIONS.get(option, option), categories(values, 0, wide)
    panel = Panel("", x, percents(HEIGHT, 0, 125), wide, HEIGHT, name, y_name)
    for of_line, colour, line in lines:
        panel.line(points((values.index(value), measured(runs)) for value, runs in line), colour, of_line)
    return panel


def lengths(study: Study) -> str:
    """What each step of a rationale adds to the answer's likelihood, and what fewer tokens cost."""
    found = [one for one in study.of("methods") if one["method"] in STEPPED and one["by_step"]]
    panels = []
    for task, runs in by_task(found):
        values = [value for one in runs for value in one["by_step"]]
        last = max(len(one["by_step"]) for one in runs) - 1
        x = Scale(-0.2, last + 0.2, 0, WIDTH, tuple((float(n), str(n)) for n in range(last + 1)))
        panel = Panel(
            study.short(task), x, linear([*values, 0], HEIGHT, 0), WIDTH, HEIGHT, "first steps of z", "ln π(y | x, z)"
        )
        for method, of_method in by_method(runs).items():
            # Questions of another seed may have fewer steps.
            columns = [[one["by_step"][n] for one in of_method if n < len(one["by_step"])] for n in range(last + 1)]
            panel.line(points(enumerate(columns)), style(method), label(method))
        panels.append(panel)
    rows = rows_of(panels)
    for (task, method), options in changes(study, "lengths").items():
        capped = [
            _option_panel(option, [(label(method), style(method), values)], measured, y_name, WIDTH)
            for option, values in options.items()
            for y_name, measured in ((ACCURACY, accuracies), (LENGTH, lengths_kept))
        ]
        for panel in capped:
            panel.title = study.short(task)
        rows += [capped] if capped else []
    return figure(rows, legend(found), "What longer rationales buy")


FIGURES: dict[str, Callable[[Study], str]] = {
    function.__name__: function
    for function in (learning, ranking, calibration, gate, stability, lengths, cost, golden, feedback, sizes)
}
