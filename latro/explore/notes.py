"""What the stages of a pipeline leave in its folder, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from latro.data import Example, Pair
from latro.explore.rejection import Sorted
from latro.rollout import Sample


class Notes:
    """To be found again by a run with the same settings."""

    def __init__(self, folder: Path, resume: bool) -> None:
        self.folder = folder
        self.resume = resume

    def begin(self, settings: Mapping[str, Any], stages: Iterable[str]) -> None:
        """Forget what an earlier run left of the stages, or check that it may be gone on from."""
        plain = json.loads(json.dumps(settings))
        known = self.recall("settings") if self.resume else None
        if known is not None and known != plain:
            different = [name for name in plain if known.get(name) != plain[name]]
            raise ValueError(
                f"self_explore: {self.folder} is of a run with other {', '.join(different)}; use another folder"
            )
        if not self.resume:
            for name in stages:
                self._path(name).unlink(missing_ok=True)
        self.keep("settings", plain)

    def recall(self, name: str) -> Any:
        path = self._path(name)
        return json.loads(path.read_text()) if path.is_file() else None

    def keep(self, name: str, value: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._path(name).with_suffix(".unfinished")
        unfinished.write_text(json.dumps(value))
        unfinished.replace(self._path(name))  # whole at any moment, should the process be killed

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def sorted_to_json(problem: Sorted) -> dict[str, Any]:
    """Without log-probs, which no stage needs."""
    right, wrong = ([asdict(replace(one, logps=[])) for one in ones] for ones in (problem.right, problem.wrong))
    return {"id": problem.example.id, "right": right, "wrong": wrong}


def sorted_of_json(example: Example, kept: Mapping[str, Any]) -> Sorted:
    right, wrong = (tuple(Sample(**sample) for sample in kept[name]) for name in ("right", "wrong"))
    return Sorted(example, right, wrong)


def pair_to_json(example: Example) -> dict[str, Any]:
    assert example.pair is not None
    return {"id": example.id, **asdict(example.pair)}


def pair_of_json(examples: Mapping[str, Example], kept: Mapping[str, Any]) -> Example:
    pair = Pair(*(tuple(kept[name]) for name in ("chosen", "rejected", "before")))
    return replace(examples[kept["id"].rpartition("/")[0]], id=kept["id"], pair=pair)
