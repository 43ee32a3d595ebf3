"""What is measured of an update, and where a run's figures are written.

A run's folder has `metrics.jsonl`, a line for each logged update, and `rationales.jsonl`, rationales with their
rewards. Lines are only ever added: of two with the same step, as a resumed run has them, the later one counts.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

METRICS, RATIONALES, RUN = "metrics.jsonl", "rationales.jsonl", "run.json"


class Meter:
    """Weighted means, and largest values, over micro-batches and over processes; nothing is read back before they are
    asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        self._largest: dict[str, list[Tensor]] = defaultdict(list)
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """values: each of any size; its elements count alike."""
        for name, value in values.items():
            value = value.detach().double()
            self._sums[name].append(torch.stack([value.sum(), value.new_tensor(value.numel())]))

    def add_largest(self, values: Mapping[str, Tensor]) -> None:
        """values: each of any size, of which the largest element counts."""
        for name, value in values.items():
            none = value.new_full((1,), -torch.inf)
            self._largest[name].append(torch.cat([value.detach().flatten(), none]).max().double())

    def count(self, values: Mapping[str, int]) -> None:
        """What is added up over the whole run, and over processes."""
        for name, value in values.items():
            self._counts[name] += value

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Of what was added since the last time. Every process must have added the same names."""
        if not self._sums:
            return {}
        largest = {name: torch.stack(values).max().to(accelerator.device) for name, values in self._largest.items()}
        self._largest.clear()
        of_all = {name: float(accelerator.gather(value[None]).max()) for name, value in largest.items()}
        names = list(self._sums)
        totals = torch.stack([torch.stack(self._sums[name]).sum(0).to(accelerator.device) for name in names])
        self._sums.clear()
        totals = accelerator.reduce(totals, "sum")
        means = {name: total / count for name, (total, count) in zip(names, totals.tolist(), strict=True) if count}
        counts = torch.tensor(list(self._counts.values()), device=accelerator.device)
        means |= {name: value for name, value in of_all.items() if value > -torch.inf}
        return means | dict(zip(self._counts, accelerator.reduce(counts, "sum").tolist(), strict=True))

    def copy(self) -> Meter:
        """What was added so far, and nothing of what is added later."""
        other = Meter()
        other._sums.update({name: list(pairs) for name, pairs in self._sums.items()})
        other._largest.update({name: list(values) for name, values in self._largest.items()})
        other._counts.update(self._counts)
        return other

    def state(self) -> dict[str, Any]:
        """What a resumed run has to find again, as JSON has it."""
        sums = {name: [pair.tolist() for pair in pairs] for name, pairs in self._sums.items()}
        largest = {name: [value.item() for value in values] for name, values in self._largest.items()}
        return {"sums": sums, "largest": largest, "counts": dict(self._counts)}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        self._sums.clear()
        for name, pairs in state["sums"].items():
            self._sums[name] = [torch.tensor(pair, dtype=torch.float64, device=device) for pair in pairs]
        self._largest.clear()
        for name, values in state["largest"].items():
            self._largest[name] = [torch.tensor(value, dtype=torch.float64, device=device) for value in values]
        self._counts.clear()
        self.count(state["counts"])


def group_deviation(values: Tensor, prompt: Tensor) -> Tensor:
    """values [R] -> the standard deviation [N] within each prompt; 0 where there is one value."""
    groups = int(prompt.max()) + 1

    def per_prompt(x: Tensor) -> Tensor:
        return x.new_zeros(groups).index_add(0, prompt, x)

    count = per_prompt(torch.ones_like(values))
    centred = values - (per_prompt(values) / count)[prompt]
    return (per_prompt(centred.square()) / (count - 1).clamp(min=1)).sqrt()


class RunLog:
    """The files of a run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._whole: set[str] = set()

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        self._append(METRICS, {"step": step, **values})

    def rationales(self, step: int, record: Mapping[str, Any]) -> None:
        self._append(RATIONALES, {"step": step, **record})

    def describe(self, **parts: Any) -> None:
        """Add parts to what `run.json` says of the run."""
        path = self.folder / RUN
        known = json.loads(path.read_text()) if path.is_file() else {}
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(_plain({**known, **parts}), indent=2, ensure_ascii=False) + "\n")
        unfinished.replace(path)  # whole at any moment, should the process be killed

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        path = self.folder / name
        if name not in self._whole:
            self.folder.mkdir(parents=True, exist_ok=True)
            _cut_half_line(path)
            self._whole.add(name)
        with path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(_plain(record), ensure_ascii=False) + "\n")


def _cut_half_line(path: Path) -> None:
    """A process that was killed may have left one at the end."""
    if path.is_file():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _plain(value: Any) -> Any:
    """As JSON has it: no NaN, no infinity, no tensors."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)
