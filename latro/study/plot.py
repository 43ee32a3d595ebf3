"""Panels of lines, points and bars as SVG: one self-contained file, which has its own paper in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from latro.report.chart import value_axis
from latro.report.typeset import escape, minus
from latro.study.labels import CHARACTER, LINE, place

# Room around the plot of a panel: title above, numbers on the left and before them a name, numbers and a name below.
ABOVE, BESIDE, NAME, BELOW, AFTER = 26, 34, 18, 40, 14
PAPER = 12  # around all

# Of lines and points, in light and in dark.
COLOURS = (
    ("#59636e", "#9aa4ae"),
    ("#c2570c", "#f0a35e"),
    ("#2f8fd8", "#7cc4ff"),
    ("#0b3d91", "#6f94f2"),
    ("#b3261e", "#ff8a80"),
    ("#2f8a2a", "#7fd06a"),
    ("#7a3fb5", "#c79bf5"),
    ("#c2307a", "#f57fb5"),
    ("#00796b", "#3fd0bd"),
    ("#8a6d00", "#e0c04a"),
)
BASICS = {
    "paper": ("#ffffff", "#0d1117"),
    "ink": ("#1f2328", "#e6e9ed"),
    "soft": ("#59636e", "#9aa4ae"),
    "rule": ("#c0c8d0", "#3d444d"),
    "grid": ("#e9ecef", "#21262d"),
    "warn": ("#b3261e", "#ff8a80"),
}
SHEET = """
text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; fill: var(--soft); }
.paper { fill: var(--paper); }
.title { font-weight: 600; fill: var(--ink); }
.end { text-anchor: end; } .middle { text-anchor: middle; } .central { dominant-baseline: central; }
.grid { stroke: var(--grid); fill: none; } .frame { stroke: var(--rule); fill: none; }
.mark { stroke: var(--soft); stroke-dasharray: 2 3; fill: none; }
.leader { stroke: var(--rule); fill: none; }
.line { stroke: currentColor; stroke-width: 1.8; fill: none; stroke-linejoin: round; stroke-linecap: round; }
.band { fill: currentColor; opacity: 0.13; } .whisker { stroke: currentColor; stroke-width: 1.2; fill: none; }
.dot { fill: currentColor; stroke: var(--paper); stroke-width: 0.8; } .faint { opacity: 0.6; }
.bar { fill: currentColor; opacity: 0.75; }
.label { fill: currentColor; font-weight: 600; paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
.missing { fill: var(--warn); }
"""


class Style(NamedTuple):
    colour: int = 0
    dashes: str = ""

    def of(self, kind: str) -> str:
        """The class of something of this kind and colour."""
        return f'class="c{self.colour % len(COLOURS)} {kind}"'

    @property
    def dashed(self) -> str:
        return f' stroke-dasharray="{self.dashes}"' if self.dashes else ""


@dataclass(frozen=True)
class Scale:
    """From values to places, `start` for low and `end` for high. A value without a place is at none."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[tuple[float, str], ...]
    logarithmic: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log10(x) if self.logarithmic else x for x in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def within(self, value: float) -> float:
        """At most at an end."""
        return self.at(min(max(value, self.low), self.high))


def linear(values: Iterable[float], start: float, end: float, *, from_zero: bool = False) -> Scale:
    axis = value_axis([value for value in values if math.isfinite(value)], from_zero)
    return Scale(axis.low, axis.high, start, end, tuple((tick, axis.label(tick)) for tick in axis.ticks))


def between(low: float, high: float, step: float, start: float, end: float) -> Scale:
    count = round((high - low) / step)
    ticks = [low + step * n for n in range(count + 1)]
    return Scale(low, high, start, end, tuple((tick, minus(f"{tick:g}")) for tick in ticks))


def logarithmic(values: Iterable[float], start: float, end: float) -> Scale:
    """With some room beyond the values."""
    finite = [value for value in values if math.isfinite(value) and value > 0] or [1.0, 10.0]
    low, high = min(finite) / 1.25, max(finite) * 1.25
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    span = high / low
    factors = (1, 1.5, 2, 3, 4, 5, 7) if span < 10 else (1, 2, 5) if span < 300 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    inside = tuple((tick, f"{tick:,.10g}") for tick in ticks if low <= tick <= high)
    return Scale(low, high, start, end, inside, logarithmic=True)


def categories(names: Sequence[str], start: float, end: float) -> Scale:
    """Name n at the value n."""
    ticks = tuple((float(n), name) for n, name in enumerate(names))
    return Scale(-0.5, len(names) - 0.5, start, end, ticks)


class Point(NamedTuple):
    x: float
    y: float
    low: float = math.nan
    high: float = math.nan


@dataclass
class Panel:
    """A plot with its scales, in which x goes from 0 to width and y from height to 0, and what was drawn there."""

    title: str
    x: Scale
    y: Scale
    width: float
    height: float
    x_name: str = ""
    y_name: str = ""
    beside: float = BESIDE  # room for the numbers or names on the left
    after: float = AFTER
    drawn: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)  # names of what has no finite value

    def line(self, points: Iterable[Point], style: Style, name: str, *, band: bool = False) -> None:
        """Through the points that are finite, a gap at others; their intervals as whiskers or as a band."""
        stretches = _stretches(points)
        if not stretches:
            self.absent.append(name)
        for stretch in stretches:
            if band:
                self._band([point for point in stretch if math.isfinite(point.low + point.high)], style)
            path = "L".join(f"{self.x.at(point.x):.1f} {self.y.within(point.y):.1f}" for point in stretch)
            self.drawn.append(f'<path {style.of("line")}{style.dashed} d="M{path}"/>')
            if not band:
                for point in stretch:
                    self.dot(point, style)

    def _band(self, points: Sequence[Point], style: Style) -> None:
        edges = [(point.x, point.high) for point in points] + [(point.x, point.low) for point in reversed(points)]
        path = "L".join(f"{self.x.at(x):.1f} {self.y.within(y):.1f}" for x, y in edges)
        if len(points) > 1:
            self.drawn.append(f'<path {style.of("band")} d="M{path}Z"/>')

    def dot(self, point: Point, style: Style, *, radius: float = 3.2, faint: bool = False) -> None:
        if not math.isfinite(point.x + point.y):
            return
        x, y = self.x.at(point.x), self.y.within(point.y)
        if math.isfinite(point.low + point.high):
            ends = f"M{x:.1f} {self.y.within(point.low):.1f}V{self.y.within(point.high):.1f}"
            self.drawn.append(f'<path {style.of("whisker")} d="{ends}"/>')
        kind = "dot faint" if faint else "dot"
        self.drawn.append(f'<circle {style.of(kind)} cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>')

    def bar(self, at: float, point: Point, style: Style, *, thick: float) -> None:
        """Lying, from 0 to the point's x; low and high are of x."""
        if not math.isfinite(point.x):
            return
        ends = sorted((self.x.at(0), self.x.within(point.x)))
        y = self.y.at(at)
        self.drawn.append(
            f'<rect {style.of("bar")} x="{ends[0]:.1f}" y="{y - thick / 2:.1f}" '
            f'width="{max(ends[1] - ends[0], 1):.1f}" height="{thick:.1f}"/>'
        )
        if math.isfinite(point.low + point.high):
            path = f"M{self.x.within(point.low):.1f} {y:.1f}H{self.x.within(point.high):.1f}"
            self.drawn.append(f'<path {style.of("whisker")} d="{path}"/>')

    def across(self, y: float, text: str = "") -> None:
        """A dotted line at a value, and its name above it."""
        if math.isfinite(y):
            at = self.y.within(y)
            self.drawn.append(f'<path class="mark" d="M0 {at:.1f}H{self.width}"/>')
            self.words(self.width - 3, at - 7, text, "end central")
        else:
            self.absent.append(text)

    def upright(self, x: float) -> None:
        at = self.x.within(x)
        self.drawn.append(f'<path class="mark" d="M{at:.1f} {self.height}V0"/>')

    def diagonal(self) -> None:
        self.drawn.append(f'<path class="mark" d="M0 {self.height}L{self.width} 0"/>')

    def words(self, x: float, y: float, text: str, kind: str, style: Style | None = None) -> None:
        colour = f"c{style.colour % len(COLOURS)} " if style else ""
        if text and math.isfinite(x + y):
            self.drawn.append(f'<text class="{colour}{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>')

    def nothing(self, text: str = "not run") -> None:
        self.words(self.width / 2, self.height / 2, text, "middle central missing")

    def label(self, points: Sequence[tuple[Point, str, Style]]) -> None:
        """A dot and a name for each, no name over another one or a dot; a line leads to one that is further off."""
        dots = [(self.x.at(point.x), self.y.within(point.y)) for point, _, _ in points]
        boxes = place(dots, [text for _, text, _ in points], self.width, self.height)
        for (x, y), box in zip(dots, boxes, strict=True):
            to = box.nearest(x, y)
            if math.dist((x, y), to) > 9:
                self.drawn.append(f'<path class="leader" d="M{x:.1f} {y:.1f}L{to[0]:.1f} {to[1]:.1f}"/>')
        for (point, text, style), box in zip(points, boxes, strict=True):
            self.dot(point, style, radius=4)
            self.words((box.left + box.right) / 2, (box.top + box.bottom) / 2, text, "label middle central", style)

    @property
    def before(self) -> float:
        return self.beside + (NAME if self.y_name else 0)

    @property
    def above(self) -> float:
        return ABOVE if self.title else LINE

    @property
    def outer(self) -> tuple[float, float]:
        below = BELOW if self.x_name else BELOW - LINE
        return self.before + self.width + self.after, self.above + self.height + below

    def svg(self) -> str:
        lines = "".join(f"M0 {self.y.at(value):.1f}H{self.width}" for value, _ in self.y.ticks)
        marks = "".join(f"M{self.x.at(value):.1f} {self.height}v4" for value, _ in self.x.ticks)
        values = "".join(
            f'<text class="end central" x="-6" y="{self.y.at(value):.1f}">{escape(text)}</text>'
            for value, text in self.y.ticks
        )
        places = "".join(
            f'<text class="middle" x="{self.x.at(value):.1f}" y="{self.height + 16}">{escape(text)}</text>'
            for value, text in _labelled(self.x)
        )
        names = f'<text class="middle" x="{self.width / 2}" y="{self.height + 31}">{escape(self.x_name)}</text>'
        title = f'<text class="title" x="0" y="-11">{escape(self.title)}</text>'
        if self.absent:
            self.words(4, self.height - 9, f"not finite: {', '.join(self.absent)}", "central missing")
        if self.y_name:
            place = f"rotate(-90) translate({-self.height / 2} {-self.before + 8})"
            names += f'<text class="middle" transform="{place}">{escape(self.y_name)}</text>'
        return (
            f'<path class="grid" d="{lines}"/><path class="frame" d="M0 {self.height}H{self.width}{marks}"/>'
            f"{values}{places}{names}{title}{''.join(self.drawn)}"
        )


def _labelled(x: Scale) -> tuple[tuple[float, str], ...]:
    """Every tick, or every second, or third … one, so that labels have room between them; 0 keeps its label."""
    zero = next((n for n, (value, _) in enumerate(x.ticks) if value == 0), 0)
    for every in range(1, len(x.ticks) + 1):
        kept = x.ticks[zero % every :: every]
        ends = [(x.at(value), CHARACTER * len(text) / 2 + 2) for value, text in kept]
        if all(at - half > last + wide for (last, wide), (at, half) in pairwise(ends)):
            return kept
    return ()


def _stretches(points: Iterable[Point]) -> list[list[Point]]:
    stretches: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point.x + point.y):
            stretches[-1].append(point)
        else:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


Legend = Sequence[tuple[str, Style]]


def figure(rows: Sequence[Sequence[Panel]], legend: Legend, words: str, *, dots: bool = False) -> str:
    """Panels in rows, below a legend of lines or dots. words: what is shown, for those who cannot see it."""
    widths = [sum(panel.outer[0] for panel in row) for row in rows] + [_entry(text) for text, _ in legend]
    width = max(widths, default=400.0) + 2 * PAPER
    legend_lines = _legend_lines(legend, width - 2 * PAPER)
    top = PAPER + float(LINE) * len(legend_lines) + (8 if legend else 0)
    drawn = [_legend(line, dots, PAPER + LINE * (n + 0.5)) for n, line in enumerate(legend_lines)]
    for row in rows:
        left = float(PAPER)
        for panel in row:
            corner = f"translate({left + panel.before:.1f} {top + panel.above:.1f})"
            drawn.append(f'<g transform="{corner}">{panel.svg()}</g>')
            left += panel.outer[0]
        top += max(panel.outer[1] for panel in row)
    if not rows:
        drawn.append(f'<text class="missing" x="{PAPER}" y="{top + LINE}">nothing of this was run yet</text>')
        top += 2 * LINE
    height = top + PAPER
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(words)}">\n<style>{_sheet()}</style>\n'
        f'<rect class="paper" width="100%" height="100%" rx="6"/>\n' + "\n".join(drawn) + "\n</svg>\n"
    )


def _sheet() -> str:
    light, dark = (
        "".join(f"--{name}: {pair[n]}; " for name, pair in BASICS.items())
        + "".join(f"--c{number}: {pair[n]}; " for number, pair in enumerate(COLOURS))
        for n in (0, 1)
    )
    classes = " ".join(f".c{number} {{ color: var(--c{number}); }}" for number in range(len(COLOURS)))
    media = f"@media (prefers-color-scheme: dark) {{ svg {{ {dark}}} }}"
    return f"\nsvg {{ {light}}}\n{media}{SHEET}{classes}\n"


SWATCH, APART = 24, 16


def _entry(text: str) -> float:
    return SWATCH + CHARACTER * len(text) + APART


def _legend_lines(legend: Legend, width: float) -> list[list[tuple[str, Style]]]:
    lines: list[list[tuple[str, Style]]] = []
    used = math.inf
    for text, style in legend:
        if used + _entry(text) > width:
            lines.append([])
            used = 0.0
        lines[-1].append((text, style))
        used += _entry(text)
    return lines


def _legend(line: Legend, dots: bool, y: float) -> str:
    x, parts = float(PAPER), []
    for text, style in line:
        if dots:
            parts.append(f'<circle {style.of("dot")} cx="{x + 12:.1f}" cy="{y:.1f}" r="4"/>')
        else:
            parts.append(f'<path {style.of("line")}{style.dashed} d="M{x:.1f} {y:.1f}h18"/>')
        parts.append(f'<text class="central" x="{x + SWATCH:.1f}" y="{y:.1f}">{escape(text)}</text>')
        x += _entry(text)
    return "".join(parts)
