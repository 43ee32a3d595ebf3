"""Line charts as SVG: values by step, with a gap where one is not finite.

`data-points`, `data-x`, `data-y` and `data-plot` are for the page's script, which reads values under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from latro.report.records import Metrics
from latro.report.typeset import HUGE, drawable, escape, minus, number

# The viewBox, and the plot in there: on either side is room for numbers.
WIDTH, HEIGHT = 288, 158
LEFT, RIGHT, TOP, BOTTOM = 42, 238, 8, 136

DOTTED = 40  # as many points can be told apart
CROWDED = 2 * (RIGHT - LEFT)  # more points make a band of which only the edges can be seen
LINE_OF_TEXT = 13


class Chart(NamedTuple):
    title: str
    key: str
    unit: str = ""
    from_zero: bool = False


CHARTS = (
    Chart("Reward", "reward"),
    Chart("KL to the reference", "kl", "nats"),
    Chart("Answer log-prob", "answer_logp", "nats"),
    Chart("Rationale length", "rationale_length", "tokens", from_zero=True),
    Chart("Accuracy", "eval_accuracy", "%"),
    Chart("Truncated rationales", "truncated_frac", "%", from_zero=True),
    Chart("Gradient norm", "grad_norm", from_zero=True),
)


class Point(NamedTuple):
    step: int
    value: float


class Curve(NamedTuple):
    name: str  # training or evaluation
    style: str
    points: list[Point]
    bounds: dict[int, tuple[float, float]]  # an interval around the values of some steps

    @property
    def finite(self) -> list[float]:
        return [point.value for point in self.points if drawable(point.value)]


class Axis(NamedTuple):
    low: float
    high: float
    start: float  # where low is drawn
    end: float
    ticks: list[float]
    decimals: int

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def label(self, tick: float) -> str:
        if self.decimals > 4 or max(abs(self.low), abs(self.high)) >= 1e5:
            return number(tick)
        return minus(f"{tick:,.{self.decimals}f}")


def draw_all(metrics: Metrics) -> tuple[list[str], list[str]]:
    """The charts above, as far as they were logged, and one for each key that they do not show."""
    steps = [step for values in metrics.values() for step in values]
    x = step_axis(min(steps), max(steps))
    shown = {"epoch"} | {name for chart in CHARTS for name in (chart.key, f"eval_{chart.key}")}
    shown |= {name for key in metrics for name in (f"eval_{key}", f"{key}_low", f"{key}_high")}
    others = [Chart(key, key) for key in metrics if key not in shown]
    main, more = (
        [draw(chart, found, x) for chart in charts if (found := curves(metrics, chart))] for charts in (CHARTS, others)
    )
    return main, more


def curves(metrics: Metrics, chart: Chart) -> list[Curve]:
    """What training logged under the chart's key, and evaluation under the same with eval_ in front."""
    scale = 100 if chart.unit == "%" else 1
    found: list[Curve] = []
    for key in (chart.key, f"eval_{chart.key}"):
        lows, highs = metrics.get(f"{key}_low", {}), metrics.get(f"{key}_high", {})
        points = [Point(step, scale * value) for step, value in metrics.get(key, {}).items()]
        intervals = {step: (scale * lows[step], scale * highs[step]) for step in lows.keys() & highs.keys()}
        bounds = {step: ends for step, ends in intervals.items() if all(map(drawable, ends))}
        if points:
            name = "evaluation" if key.startswith("eval_") else "training"
            found.append(Curve(name, f"s{len(found)}", points, bounds))
    return found


def thin(points: Iterable[Point], column: Callable[[int], int]) -> list[list[Point]]:
    """Stretches of points between those that are not finite, with all that can be seen of them: of points that share
    a column of pixels the first, the least, the greatest and the last (M4; Jugel et al., 2014)."""
    stretches: list[list[Point]] = [[]]
    for _, shared in groupby(points, key=lambda point: column(point.step)):
        together = list(shared)
        finite = [point for point in together if drawable(point.value)]
        by_value = sorted(finite, key=lambda point: point.value)
        kept = {*finite[:1], *finite[-1:], *by_value[:1], *by_value[-1:]}
        for point in together:
            if point in kept:
                stretches[-1].append(point)
            elif not drawable(point.value) and stretches[-1]:
                stretches.append([])
    return [stretch for stretch in stretches if stretch]


def means(points: Iterable[Point], column: Callable[[int], int]) -> list[list[Point]]:
    """Stretches of points, each the mean of what is finite in a column of pixels."""
    stretches: list[list[Point]] = [[]]
    for _, shared in groupby(points, key=lambda point: column(point.step)):
        finite = [point for point in shared if drawable(point.value)]
        if finite:
            mean = math.fsum(point.value / len(finite) for point in finite)
            stretches[-1].append(Point(finite[len(finite) // 2].step, mean))
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def step_axis(first: int, last: int) -> Axis:
    """From the first step to the last, with ticks at round steps."""
    low, high = (first, last) if first < last else (first - 1, first + 1)
    step = max(1.0, round_step((high - low) / 4))
    ticks = [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return Axis(low, high, LEFT, RIGHT, ticks, 0)


def value_axis(values: Sequence[float], from_zero: bool = False) -> Axis:
    """From a round number below the values to one above."""
    if from_zero or not values:
        values = [*values, 0.0]
    low, high = min(values), max(values)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1 / HUGE):
        room = abs(low) / 10 or 1.0
        low, high = (low if from_zero else low - room), high + room
    step = round_step((high - low) / 4)
    # Slack, so that a value on a tick asks for no further one.
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    ticks = [n * step for n in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], BOTTOM, TOP, ticks, max(0, -math.floor(math.log10(step) + 1e-9)))


def round_step(about: float) -> float:
    """1, 2 or 5 times a power of ten, whichever is nearest."""
    power = 10.0 ** math.floor(math.log10(about))
    return min((power * factor for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / about)))


def draw(chart: Chart, curves: Sequence[Curve], x: Axis) -> str:
    finite = [value for curve in curves for value in curve.finite]
    bounds = [bound for curve in curves for ends in curve.bounds.values() for bound in ends]
    y = value_axis(finite + bounds, chart.from_zero)
    lost = [point.step for curve in curves for point in curve.points if not drawable(point.value)]
    drawn = [_curve(*labelled, x, y) for labelled in _labelled(curves, y)]
    return (
        f'<figure class="chart" data-key="{escape(chart.key)}">{_caption(chart, curves, len(lost))}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_in_words(chart, finite))}"'
        f' data-plot="{LEFT} {RIGHT} {BOTTOM} {TOP}" data-x="{x.low} {x.high}" data-y="{y.low!r} {y.high!r}">'
        f"{_frame(x, y)}{_lost(lost, x)}{''.join(drawn)}"
        f'<line class="cursor" y1="{TOP}" y2="{BOTTOM}"/></svg></figure>'
    )


def _caption(chart: Chart, curves: Sequence[Curve], lost: int) -> str:
    notes = [f"<span>{chart.unit}</span>"] if chart.unit else []
    if len(curves) > 1:
        dashes = {"s0": "—", "s1": "- -"}
        notes += [f'<span class="{curve.style}">{dashes[curve.style]} {curve.name}</span>' for curve in curves]
    if any(curve.bounds for curve in curves):
        notes.append("<span>with 95 % interval</span>")
    if lost:
        notes.append(f'<span class="lost">{lost:,} not finite</span>')
    return (
        f'<figcaption><b>{escape(chart.title)}</b><span class="notes">{" ".join(notes)}</span><output></output>'
        "</figcaption>"
    )


def _in_words(chart: Chart, finite: Sequence[float]) -> str:
    if not finite:
        return f"{chart.title} by step: never finite"
    return f"{chart.title} by step: from {number(finite[0])}, between {number(min(finite))} and {number(max(finite))}"


def _frame(x: Axis, y: Axis) -> str:
    lines = "".join(f"M{LEFT} {y.at(tick):.1f}H{RIGHT}" for tick in y.ticks)
    marks = "".join(f"M{x.at(tick):.1f} {BOTTOM}v4" for tick in x.ticks)
    heights = "".join(f'<text class="y" x="{LEFT - 6}" y="{y.at(t):.1f}">{y.label(t)}</text>' for t in y.ticks)
    steps = "".join(f'<text class="x" x="{x.at(t):.1f}" y="{BOTTOM + 16}">{x.label(t)}</text>' for t in x.ticks)
    unit = f'<text class="unit" x="{WIDTH}" y="{BOTTOM + 16}">step</text>'
    frame = f'<path class="grid" d="{lines}"/><path class="frame" d="M{LEFT} {BOTTOM}H{RIGHT}{marks}"/>'
    return frame + heights + steps + unit


def _lost(steps: Iterable[int], x: Axis) -> str:
    """A mark on the axis at each step that has no finite value."""
    marks = sorted({round(x.at(step)) for step in steps})
    return f'<path class="lost" d="{"".join(f"M{at} {BOTTOM - 3}v6" for at in marks)}"/>' if marks else ""


def _labelled(curves: Sequence[Curve], y: Axis) -> list[tuple[Curve, float]]:
    """Each curve with the height at which its last value is written; two of them are kept apart."""
    drawn = [curve for curve in curves if curve.finite]
    heights = [y.at(curve.finite[-1]) for curve in drawn]
    if len(heights) == 2 and abs(heights[0] - heights[1]) < LINE_OF_TEXT:
        middle = min(max(sum(heights) / 2, TOP + LINE_OF_TEXT / 2), BOTTOM - LINE_OF_TEXT / 2)
        apart = math.copysign(LINE_OF_TEXT / 2, heights[0] - heights[1])
        heights = [middle + apart, middle - apart]
    return list(zip(drawn, heights, strict=True))


def _curve(curve: Curve, label_height: float, x: Axis, y: Axis) -> str:
    def column(step: int) -> int:
        return min(math.floor(x.at(step)), RIGHT - 1)  # the last step has none of its own

    stretches, crowded = thin(curve.points, column), len(curve.points) > CROWDED
    kept = [point for stretch in stretches for point in stretch]
    paths = {"line": "".join(_line(stretch, x, y) for stretch in stretches)}
    if crowded:
        paths["mean"] = "".join(_line(stretch, x, y) for stretch in means(curve.points, column))
    if len(kept) <= DOTTED:
        paths["dots"] = "".join(_line([point], x, y) for point in kept)
    if curve.bounds:
        paths["whiskers"] = _whiskers(kept, curve.bounds, x, y)
    points = " ".join(f"{point.step} {point.value:.4g}" for point in kept)
    drawn = "".join(f'<path class="{name}" d="{path}"/>' for name, path in paths.items())
    last = f'<text class="last" x="{RIGHT + 6}" y="{label_height:.1f}">{number(kept[-1].value)}</text>'
    style = f"curve {curve.style}{' crowded' if crowded else ''}"
    return f'<g class="{style}" data-points="{points}">{drawn}{last}<circle r="3"/></g>'


def _line(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """A single point is a line of no length, which round caps make a dot."""
    at = [f"{x.at(point.step):.1f} {y.at(point.value):.1f}" for point in points]
    return f"M{'L'.join(at)}{'h0' if len(at) == 1 else ''}"


def _whiskers(points: Iterable[Point], bounds: Mapping[int, tuple[float, float]], x: Axis, y: Axis) -> str:
    ends = [(x.at(step), *map(y.at, bounds[step])) for step, _ in points if step in bounds]
    return "".join(f"M{at - 2:.1f} {low:.1f}h4m-2 0V{high:.1f}m-2 0h4" for at, low, high in ends)
