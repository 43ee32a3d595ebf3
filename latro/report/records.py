"""What a run's folder holds: metrics by step, the rationales of its first and last step, and what run.json says."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
RATIONALES = "rationales.jsonl"
ABOUT = "run.json"

TEXTS = ("text", "answer_text", "ended_by")
NUMBERS = ("reward", "advantage", "answer_logp", "kl")
ENDS = ("stop", "end", "length")

Metrics = dict[str, dict[int, float]]


class ReportError(ValueError):
    """A run's folder that cannot be shown: where, and why."""


@dataclass(frozen=True)
class Rationale:
    """A sampled rationale, the answer behind it, and what the two were worth."""

    text: str
    answer_text: str
    ended_by: str
    reward: float
    advantage: float
    answer_logp: float
    kl: float  # NaN without a reference
    length: int


@dataclass(frozen=True)
class Prompt:
    step: int
    id: str
    prompt: str
    answer: str
    rationales: tuple[Rationale, ...]


@dataclass(frozen=True)
class About:
    """run.json; a part that is missing there is empty."""

    model: str
    dataset: str
    options: dict[str, Any]
    versions: dict[str, Any]
    results: dict[str, dict[str, Any]]  # accuracy, interval and n, by what was measured


def read_metrics(run: Path) -> Metrics:
    """The values of each key by step. A resumed run logs some steps again: the later values stand."""
    metrics: Metrics = {}
    for where, record in _lines(run / METRICS):
        for key, value in record.items():
            if key != "step":
                metrics.setdefault(key, {})[record["step"]] = _number(where, key, value)
    if not metrics:
        raise ReportError(
            f"{run}: there is nothing to report yet: a run's folder must hold {METRICS}, where training writes a line "
            'such as {"step": 1, "epoch": 0.01, "reward": -2.3} for each step that it logs'
        )
    return {key: dict(sorted(values.items())) for key, values in metrics.items()}


def read_rationales(run: Path) -> list[dict[str, Prompt]]:
    """The prompts, by id, of the first and of the last step that have any."""
    ends: dict[int, dict[str, Prompt]] = {}
    for where, record in _lines(run / RATIONALES):
        prompt = _prompt(where, record)
        ends.setdefault(prompt.step, {})[prompt.id] = prompt
        if len(ends) > 2:
            del ends[sorted(ends)[1]]
    return [ends[step] for step in sorted(ends)]


def read_about(run: Path) -> About:
    path = run / ABOUT
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else None
    except ValueError as error:
        raise ReportError(f"{path}: not JSON: {error}") from None
    about = _object(path, "the file", content)
    options, versions, results = (_object(path, name, about.get(name)) for name in ("options", "versions", "results"))
    return About(
        model=str(about.get("model") or ""),
        dataset=str(about.get("dataset") or ""),
        options=options,
        versions=versions,
        results={name: _result(path, f"results.{name}", result) for name, result in results.items()},
    )


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, the record) for each line; a last line that was not written to its end is left out."""
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                content = json.loads(line.decode())
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise ReportError(f"{where}: not JSON: {error}") from None
            record = _object(where, "the line", content)
            _whole(where, "step", record.get("step"))
            yield where, record


def _prompt(where: str, record: Mapping[str, Any]) -> Prompt:
    rationales = record.get("rationales")
    if not isinstance(rationales, list) or not rationales:
        raise ReportError(f"{where}: rationales must be a list that is not empty, got {rationales!r:.60}")
    texts = {name: _text(where, name, record.get(name)) for name in ("id", "prompt", "answer")}
    return Prompt(record["step"], **texts, rationales=tuple(_rationale(where, item) for item in rationales))


def _rationale(where: str, value: Any) -> Rationale:
    record = _object(where, "a rationale", value)
    missing = [name for name in (*TEXTS, *NUMBERS, "length") if name not in record]
    if missing:
        raise ReportError(f"{where}: a rationale must have {', '.join(missing)}, got {sorted(record)}")
    if record["ended_by"] not in ENDS:
        raise ReportError(f"{where}: ended_by must be one of {', '.join(ENDS)}, got {record['ended_by']!r:.60}")
    values: dict[str, Any] = {name: _text(where, name, record[name]) for name in TEXTS}
    values |= {name: _number(where, name, record[name]) for name in NUMBERS}
    return Rationale(**values, length=_whole(where, "length", record["length"]))


def _result(path: Path, name: str, value: Any) -> dict[str, Any]:
    result = _object(path, name, value)
    interval = result.get("interval") or [None, None]
    if not isinstance(interval, list) or len(interval) != 2:
        raise ReportError(f"{path}: {name}.interval must be two numbers, got {interval!r:.60}")
    low, high = (_number(path, f"{name}.interval", bound) for bound in interval)
    accuracy, n = (_number(path, f"{name}.{part}", result.get(part)) for part in ("accuracy", "n"))
    return {"accuracy": accuracy, "interval": (low, high), "n": n}


def _number(where: object, name: str, value: Any) -> float:
    """null stands for what is not finite, or not known."""
    if value is None:
        return math.nan
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ReportError(f"{where}: {name} must be a number, got {value!r:.60}")
    return float(value)


def _whole(where: object, name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ReportError(f"{where}: {name} must be a whole number, got {value!r:.60}")
    return value


def _text(where: object, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ReportError(f"{where}: {name} must be a text, got {value!r:.60}")
    return value


def _object(where: object, name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ReportError(f"{where}: {name} must be an object with named parts, got {value!r:.60}")
    return value
