"""The study's results as its document asks for them: by experiment, what is missing, means over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from latro.statistics import mean_interval
from latro.tasks import named
from latro.watch import DANGER, SHRUNK

if TYPE_CHECKING:
    from latro.study.plan import Cell

Result = Mapping[str, Any]  # a line of results.jsonl
Item = TypeVar("Item")
Key = TypeVar("Key")

# In the order of tables.
LABELS = {
    "base": "base",
    "sft_answers": "SFT, answers",
    "latro": "LaTRO, λ=1",
    "latro_masked_stop": "LaTRO, λ=1, stop masked",
    "latro_no_answer": "LaTRO, λ=0",
    "latro_floor": "LaTRO, λ=0, floor",
    "gain": "gain",
    "jepo": "JEPO, 1 sample",
    "jepo_multi": "JEPO, K samples",
    "verifree": "VeriFree",
    "avg_logprob": "AvgLogprob",
    "rlpr": "RLPR",
    "multiple_choice": "log-odds",
    "rloo": "RLOO, correctness",
    "star": "STaR",
    "rft": "RFT",
    "trice": "TRICE",
    "dpo": "DPO",
    "ranked_dpo": "DPO, ranked by ℓy",
    "self_explore": "Self-Explore",
    "spin": "SPIN",
    "sft_golden": "SFT, golden",
}


class Estimate(NamedTuple):
    """A mean over runs; `lost` of them have a value that is not finite, which is in no mean."""

    mean: float
    low: float
    high: float
    n: int
    lost: int

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Study:
    results: Mapping[str, Result]  # by the key of their cell
    planned: Mapping[str, Sequence[Cell]]  # by experiment

    def of(self, *experiments: str, **where: Any) -> list[Result]:
        """Results of experiments with these values, in the order of the plan; one that belongs to several once."""
        keys = dict.fromkeys(cell.key for experiment in experiments for cell in self.planned.get(experiment, ()))
        found = (self.results[key] for key in keys if key in self.results)
        return [result for result in found if all(result[name] == value for name, value in where.items())]

    def missing(self, experiment: str) -> list[Cell]:
        return [cell for cell in self.planned.get(experiment, ()) if cell.key not in self.results]

    def short(self, task: str) -> str:
        """A task's family, unless there are several of it."""
        family = task.partition("(")[0]
        tasks = {cell.task for cells in self.planned.values() for cell in cells}
        return family if sum(one.partition("(")[0] == family for one in tasks) < 2 else task

    @property
    def seeds(self) -> int:
        return len({cell.seed for cells in self.planned.values() for cell in cells})


def label(method: str) -> str:
    return LABELS.get(method, method)


def in_order(methods: Iterable[str]) -> list[str]:
    """Those of LABELS in its order, and then the others."""
    place = {method: n for n, method in enumerate(LABELS)}
    return sorted(dict.fromkeys(methods), key=lambda method: place.get(method, len(place)))


def every(results: Iterable[Result], name: str) -> list[Any]:
    """The values that a field takes, in order of appearance."""
    return list(dict.fromkeys(result[name] for result in results))


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def by_task(results: Iterable[Result]) -> Iterable[tuple[str, list[Result]]]:
    return grouped(results, lambda result: str(result["task"])).items()


def by_method(results: Iterable[Result]) -> dict[str, list[Result]]:
    """In the order of tables."""
    found = grouped(results, lambda result: str(result["method"]))
    return {method: found[method] for method in in_order(found)}


def origin(result: Result) -> tuple[str, str, str, int]:
    """What tells the base from which a run began."""
    return result["task"], result["size"], result["recipe"], result["seed"]


def metric(result: Result, name: str) -> float:
    """NaN where it was not measured."""
    value = (result["cost"] if name in result["cost"] else result["metrics"]).get(name)
    return math.nan if value is None else float(value)


def estimate(values: Iterable[float]) -> Estimate:
    column = list(values)
    finite = [value for value in column if math.isfinite(value)]
    lost = len(column) - len(finite)
    return Estimate(*mean_interval(finite), lost) if finite else Estimate(math.nan, -math.inf, math.inf, 0, lost)


def pairs(first: Iterable[Result], second: Iterable[Result]) -> list[tuple[Result, Result]]:
    """Runs of the same seed and thus, within a task, recipe and size, of the same base."""
    by_seed = {result["seed"]: result for result in first}
    return [(by_seed[result["seed"]], result) for result in second if result["seed"] in by_seed]


def answers(result: Result, name: str = "accuracy") -> list[bool]:
    """Question by question, whether the answer was right."""
    n = int(result["metrics"]["n"])
    return [digit == "1" for digit in f"{int(result['right'][name], 16):0{n}b}"]


def parameters(size: str) -> float:
    """0.15M -> 150,000"""
    return float(size.removesuffix("M")) * 1e6


# Rationales that vanish


@cache
def golden_length(task: str) -> float:
    """In tokens, each of which is a character."""
    family = named(task)
    examples = family.problems(0, min(256, family.most("test")), "test")
    return sum(len(example.rationale or "") for example in examples) / len(examples)


def kept(result: Result) -> float:
    """The length of greedy rationales, as a share of the golden ones'."""
    return metric(result, "rationale_length") / golden_length(result["task"])


def collapsed(result: Result) -> bool:
    return kept(result) < SHRUNK


def predicted(margin: float) -> bool:
    """Whether the gate says of a base that LaTRO will remove its rationales."""
    return margin < DANGER
