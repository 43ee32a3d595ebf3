"""The page: headline figures, charts, rationales of an early and of a late step, options and versions."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from string import Template
from typing import Any

from latro.report.chart import draw_all
from latro.report.records import (
    METRICS,
    RATIONALES,
    About,
    Metrics,
    Prompt,
    Rationale,
    read_about,
    read_metrics,
    read_rationales,
)
from latro.report.typeset import drawable, escape, number, percent

TEMPLATE = Path(__file__).with_name("page.html")
PROMPTS = 6  # that are shown of a step: the first that it recorded, not the telling ones

ENDED = {"stop": " to a stop string", "end": " to an end token", "length": ", cut off"}
RESULTS = {"before": "Accuracy before", "after": "Accuracy after", "sft_answers": "Accuracy, answer SFT"}
LAST = {
    "reward": "Last reward",
    "answer_logp": "Last answer log-prob",
    "rationale_length": "Last rationale length",
}


def report(run: Path, to: Path | None = None) -> Path:
    """Writes the page of a run's folder to the file `to`, by default report.html in the folder."""
    run = Path(run)
    to = run / "report.html" if to is None else Path(to)
    to.write_text(_page(run), encoding="utf-8")
    return to


def _page(run: Path) -> str:
    metrics, prompts, about = read_metrics(run), read_rationales(run), read_about(run)
    charts, more = draw_all(metrics)
    template = TEMPLATE.read_text(encoding="utf-8")
    heading = " on ".join(escape(name) for name in (about.model, about.dataset) if name) or "A LaTRO run"
    return Template(template).substitute(
        script_hash=_script_hash(template),
        heading=heading,
        subtitle=_subtitle(run, metrics),
        figures="\n".join([*_accuracies(metrics, about), *_lasts(metrics)]),
        charts="\n".join(charts),
        more=_folded("Everything else that was logged", "charts", more),
        rationales=_rationales(prompts),
        facts=_folded("Options and versions", "tables", [*_tables(about)]),
    )


def _script_hash(template: str) -> str:
    """By which a browser knows the one script that it may run in the page."""
    script = template.partition("<script>")[2].partition("</script>")[0]
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _subtitle(run: Path, metrics: Metrics) -> str:
    logged = datetime.fromtimestamp((run / METRICS).stat().st_mtime)
    parts = [f"{logged:%Y-%m-%d}", f"step {max(max(values) for values in metrics.values()):,}"]
    if "epoch" in metrics:
        parts.append(f"epoch {number(metrics['epoch'][max(metrics['epoch'])])}")
    return " · ".join([*parts, escape(run.resolve().name)])


# Figures


def _accuracies(metrics: Metrics, about: About) -> Iterator[str]:
    """What run.json has, or else the first and the last evaluation."""
    known = [name for name in RESULTS if name in about.results]
    for name in [*known, *(other for other in about.results if other not in RESULTS)]:
        label = RESULTS.get(name, f"Accuracy, {name}")
        yield from _accuracy(label, **about.results[name])
    if not about.results:
        values, lows, highs, counts = (
            metrics.get(key, {}) for key in ("eval_accuracy", "eval_accuracy_low", "eval_accuracy_high", "eval_n")
        )
        for step in sorted({*list(values)[:1], *list(values)[-1:]}):
            interval = (lows.get(step, math.nan), highs.get(step, math.nan))
            yield from _accuracy(f"Accuracy, step {step:,}", values[step], interval, counts.get(step, math.nan))


def _accuracy(label: str, accuracy: float, interval: tuple[float, float], n: float) -> Iterator[str]:
    notes = []
    low, high = interval
    if drawable(low) and drawable(high):
        notes.append(f"{percent(low)} to {percent(high)} %")
    if drawable(n):
        notes.append(f"n = {n:,.0f}")
    if drawable(accuracy):
        yield _figure(label, f"{percent(accuracy)} %", ", ".join(notes))


def _lasts(metrics: Metrics) -> Iterator[str]:
    for key, label in LAST.items():
        values = list(metrics.get(key, {}).items())
        if values:
            (first, began), (last, value) = values[0], values[-1]
            note = f"{number(began)} at step {first:,}" if first < last else ""
            yield _figure(label, number(value), note)


def _figure(label: str, value: str, note: str) -> str:
    return f"<div><dt>{escape(label)}</dt><dd>{value}</dd><dd>{note}</dd></div>"


# Rationales


def _rationales(ends: Sequence[Mapping[str, Prompt]]) -> str:
    """ends: the prompts of the first and last step, or of the only one."""
    if not ends:
        return f'<p class="note">None were recorded: training writes them to {RATIONALES}.</p>'
    early, late = (ends[0] if len(ends) > 1 else {}), ends[-1]
    both = [[early[id], late[id]] for id in late if id in early]
    only_late = [[late[id]] for id in late if id not in early]
    only_early = [[early[id]] for id in early if id not in late]
    note = (
        "From the first and the last recorded step: for the first prompts of each, the rationales of highest and of "
        "lowest reward. The answer that was scored is underlined."
    )
    parts = [
        _folded_prompt(prompts, unfolded=n == 0)
        for kind in (both, only_late, only_early)
        for n, prompts in enumerate(kind[:PROMPTS])
    ]
    return f'<p class="note">{note}</p>\n' + "\n".join(parts)


def _folded_prompt(prompts: Sequence[Prompt], unfolded: bool) -> str:
    """One prompt, as it went at one step or at two."""
    prompt = prompts[-1]
    asked = " ".join(prompt.prompt.split())[:400]
    when = ("step " if len(prompts) == 1 else "steps ") + " and ".join(f"{at.step:,}" for at in prompts)
    return (
        f'<details class="prompt"{" open" if unfolded else ""}>'
        f'<summary><span class="asked">{escape(asked)}</span> <span class="when">{when}</span></summary>'
        f'<dl class="question"><dt>Prompt</dt><dd class="text">{escape(prompt.prompt)}</dd>'
        f'<dt>Answer</dt><dd class="text">{escape(prompt.answer)}</dd><dt>Id</dt><dd>{escape(prompt.id)}</dd></dl>'
        f"{''.join(map(_best_and_worst, prompts))}</details>"
    )


def _best_and_worst(prompt: Prompt) -> str:
    ordered = sorted(prompt.rationales, key=_by_reward, reverse=True)
    rewards = ", ".join(number(rationale.reward) for rationale in ordered)
    shown = [(f"Best of {len(ordered)}", ordered[0]), ("Worst", ordered[-1])][: len(ordered)]
    return (
        f'<h3 class="step"><b>Step {prompt.step:,}</b> rewards {rewards}</h3>'
        f'<div class="pair">{"".join(_rationale(title, rationale) for title, rationale in shown)}</div>'
    )


def _by_reward(rationale: Rationale) -> float:
    return -math.inf if math.isnan(rationale.reward) else rationale.reward


def _rationale(title: str, rationale: Rationale) -> str:
    facts = [
        f"advantage {number(rationale.advantage)}",
        f"log p(answer) {number(rationale.answer_logp)}",
        *([f"KL {number(rationale.kl)}"] if drawable(rationale.kl) else []),
        f"{rationale.length:,} tokens{ENDED[rationale.ended_by]}",
    ]
    text = escape(rationale.text) or "<i>(empty)</i>"
    return (
        f'<div class="rationale"><h4>{title}, reward {number(rationale.reward)}</h4>'
        f"<p>{', '.join(f'<span>{fact}</span>' for fact in facts)}</p>"
        f'<div class="text">{text}<u>{escape(rationale.answer_text)}</u></div></div>'
    )


# Options and versions


def _tables(about: About) -> Iterator[str]:
    for title, values in (("Options", about.options), ("Versions", about.versions)):
        if values:
            yield f"<table><caption>{title}</caption>{''.join(_row(*item) for item in values.items())}</table>"


def _row(name: str, value: Any) -> str:
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f'<tr><th scope="row">{escape(name)}</th><td>{escape(shown)}</td></tr>'


def _folded(title: str, kind: str, parts: Sequence[str]) -> str:
    if not parts:
        return ""
    return f'<details class="more"><summary>{title}</summary><div class="{kind}">{"".join(parts)}</div></details>'
