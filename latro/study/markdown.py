"""How the study's figures are written, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from latro.report.typeset import minus
from latro.study.records import Estimate, Result, Study, estimate, grouped, metric

if TYPE_CHECKING:
    from latro.study.plan import Cell

ABSENT = "—"


class Kind(NamedTuple):
    """How a figure is written."""

    factor: float
    decimals: int
    interval: bool = True


PERCENT, NATS, SHARE, TOKENS, COUNT = Kind(100, 1), Kind(1, 2), Kind(1, 2), Kind(1, 1), Kind(1, 0)
THOUSANDS, MEAN = Kind(1e-3, 0, interval=False), Kind(1, 1, interval=False)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """words: columns that are no figures."""
    rule = ["---"] * words + ["---:"] * (len(heads) - words)
    whole = ([_unbroken(text) for text in row] for row in rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *whole))


def _unbroken(text: str) -> str:
    """What is short stays on one line."""
    return "<br>".join(line.replace(" ", "\u00a0") if len(line) < 24 else line for line in text.split("<br>"))


def paragraphs(*parts: str) -> str:
    return "\n\n".join(part.strip() for part in parts if part)


def signed(value: float, decimals: int = 1) -> str:
    return minus(f"{value:+.{decimals}f}")


def written(found: Estimate, kind: Kind, planned: int) -> str:
    """planned: the seeds there should be; of fewer the number is given."""
    runs = found.n + found.lost
    if not runs:
        return ABSENT
    notes = [f"{runs} of {planned} seeds"] if runs < planned else []
    notes += [f"{found.lost} not finite"] if found.lost else []
    text = f" ({', '.join(notes)})" if notes else ""
    if not found.n:
        return text.strip()
    # Adding 0 leaves no minus before what is rounded to 0.
    value = minus(f"{round(kind.factor * found.mean, kind.decimals) + 0:,.{kind.decimals}f}")
    if kind.interval and found.n > 1:
        value += f" ± {kind.factor * found.half:,.{kind.decimals}f}"
    return value + text


def cell(study: Study, results: Sequence[Result], name: str, kind: Kind) -> str:
    text = written(estimate(metric(result, name) for result in results), kind, study.seeds)
    stopped = sum("failed" in result for result in results)
    return f"{text} ({stopped} stopped)" if stopped else text


def share(results: Sequence[Result], holds: Callable[[Result], bool]) -> str:
    return f"{sum(map(holds, results))} of {len(results)}" if results else ABSENT


def probability(p: float) -> str:
    if p < 0.001:
        return "< 0.001"
    return f"{p:.3f}" if round(p, 3) != 0.05 else f"{p:.4f}"  # on which side of it


def over_seeds(study: Study) -> str:
    if study.seeds == 1:
        return "One seed: there is no interval."
    return f"Means over {study.seeds} seeds ± half of their 95 % interval (Student's t)."


def unseen(study: Study, experiment: str) -> str:
    """What of the plan was not run, in words; nothing where all was."""
    cells = study.missing(experiment)
    if not cells:
        return ""
    bases = grouped(cells, lambda one: (one.task, one.recipe, one.size))
    listed = "\n".join(f"- {', '.join(base)}: {_listed(of_base)}" for base, of_base in bases.items())
    return f"<details><summary>Not run: {len(cells)} of this table's models</summary>\n\n{listed}\n\n</details>"


def _listed(cells: Iterable[Cell]) -> str:
    seeds = {what: sorted(one.seed for one in same) for what, same in grouped(cells, _what).items()}
    together = grouped(seeds, lambda what: ", ".join(map(str, seeds[what])))
    return "; ".join(f"{', '.join(whats)} (seed {numbers})" for numbers, whats in together.items())


def _what(one: Cell) -> str:
    return one.method + "".join(f" {name}={option_value(value)}" for name, value in one.changed)


def option_value(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, int | float) else str(value)
