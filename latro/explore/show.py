"""Explored rationales for people: step by step, with the share of right continuations after each step.

In a terminal as lines with bars; in a page, which loads nothing, has no script, and takes what a model wrote as text.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from latro.explore.exploration import Explored
from latro.report.page import TEMPLATE
from latro.report.typeset import escape, percent
from latro.text import Text

BAR = 10  # characters of a bar in a terminal
PIT = "first pit"

STYLE = """
.steps {
  display: grid; grid-template-columns: 6rem 3.5rem minmax(0, 1fr); gap: 0.25rem 1rem; align-items: baseline;
  margin: 0.75rem 0 1.5rem; font-size: 0.8125rem;
}
.steps svg { height: 0.625rem; align-self: center; }
.steps .all { fill: var(--grid); }
.steps .right { fill: var(--first); }
.steps .text { max-height: none; }
.steps .count { color: var(--soft); text-align: right; }
.steps .pit { color: var(--warn); }
header { margin-bottom: 1.5rem; }
.explored h3 { margin: 1.25rem 0 0; font-size: 0.875rem; font-weight: 600; }
"""


class Line(NamedTuple):
    """A step, and what became of what is behind it."""

    text: str  # of the step, or in brackets that there is none
    rate: float
    behind: str  # of how many continuations how many are right; of an answer, whether it is
    is_pit: bool = False


def lines_of(explored: Explored) -> list[Line]:
    """From before the first step to the answer."""
    counts = [f"{sum(one.right for one in attempts)}/{len(attempts)}" for attempts in explored.attempts]
    lines = [Line("(before the first step)", explored.rates[0], counts[0])]
    for n, step in enumerate(explored.steps):
        behind = ("right" if explored.right else "wrong") if step.is_answer else counts[n + 1]
        text = step.text if step.text.strip() else "(nothing more)"
        lines.append(Line(text, explored.rates[n + 1], behind, n == explored.pit))
    return lines


def in_words(explored: Explored, width: int = 100) -> str:
    """A line for each step, and more where it is long."""
    margin = 4 + BAR + 2 + 6
    shown = []
    for n, line in enumerate(lines_of(explored)):
        bar = ("█" * round(BAR * line.rate)).ljust(BAR, "·")
        said = f"{line.text.strip()}   <- {PIT}" if line.is_pit else line.text.strip()
        text = textwrap.wrap(said, max(20, width - margin))
        shown.append(f"{n or '':>3} {bar}  {line.behind:>5} {text[0]}")
        shown += [" " * margin + more for more in text[1:]]
    return "\n".join(shown)


def write_page(to: Path, title: str, note: str, explored: Sequence[Explored], text: Text) -> Path:
    """The page of rationales, those of a prompt together."""
    style = TEMPLATE.read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    of_prompts: dict[str, list[Explored]] = {}
    for one in explored:
        of_prompts.setdefault(one.example.id, []).append(one)
    body = "\n".join(_prompt(ones, text, unfolded=n == 0) for n, ones in enumerate(of_prompts.values()))
    to.write_text(PAGE.format(title=escape(title), note=escape(note), style=style + STYLE, body=body), encoding="utf-8")
    return to


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>{note}</p>
</header>
<main>
{body}
</main>
</body>
</html>
"""


def _prompt(explored: Sequence[Explored], text: Text, unfolded: bool) -> str:
    example = explored[0].example
    prompt = text.decode(text.prompt(example.prompt))
    right = sum(one.right for one in explored)
    return (
        f'<details class="prompt explored"{" open" if unfolded else ""}>'
        f'<summary><span class="asked">{escape(" ".join(prompt.split())[:400])}</span>'
        f' <span class="when">{right} of {len(explored)} right</span></summary>'
        f'<dl class="question"><dt>Prompt</dt><dd class="text">{escape(prompt)}</dd>'
        f'<dt>Answer</dt><dd class="text">{escape(example.answer)}</dd><dt>Id</dt><dd>{escape(example.id)}</dd></dl>'
        f"{''.join(map(_rationale, explored))}</details>"
    )


def _rationale(explored: Explored) -> str:
    pit = "" if explored.pit is None else f": {PIT} at step {explored.pit + 1} of {len(explored.steps)}"
    title = ("Right" if explored.right else "Wrong") + pit
    return f'<h3>{title}</h3><div class="steps">{"".join(map(_row, lines_of(explored)))}</div>'


def _row(line: Line) -> str:
    mark = f" <b>{PIT}</b>" if line.is_pit else ""
    return (
        f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{percent(line.rate)} %">'
        f'<rect class="all" width="100" height="10"/>'
        f'<rect class="right" width="{100 * line.rate:.1f}" height="10"/></svg>'
        f'<span class="count">{line.behind}</span>'
        f'<div class="text{" pit" if line.is_pit else ""}">{escape(line.text)}{mark}</div>'
    )
