"""The study's comparisons: paired by seed, and tested."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from latro.statistics import PairedDifference, holm, mcnemar, paired_difference
from latro.study.markdown import ABSENT, paragraphs, probability, signed, table
from latro.study.records import Result, Study, answers, by_method, grouped, label, metric, pairs

LEVEL = 0.05
CLAIMED = ("latro_floor", "gain")  # the methods of which it is claimed that they beat those below
AGAINST = ("base", "sft_answers")

Tested = tuple[PairedDifference, int]  # and in how many seeds McNemar's test finds the method better


class Comparison(NamedTuple):
    """Of a method with each of AGAINST; None where there is no seed that has both."""

    task: str
    recipe: str
    method: str
    differences: tuple[Tested | None, ...]


def claims(study: Study) -> str:
    return _comparisons(study, compared(study, lambda method: method in CLAIMED))


def comparisons(study: Study) -> str:
    return _comparisons(study, compared(study, lambda method: method not in (*CLAIMED, *AGAINST)))


def compared(study: Study, chosen: Callable[[str], bool]) -> list[Comparison]:
    """From every recipe's bases."""
    found = []
    groups = grouped(study.of("recipes", "methods"), lambda one: (one["task"], one["recipe"]))
    for (task, recipe), results in groups.items():
        runs = by_method(results)
        for method in filter(chosen, runs):
            differences = tuple(_difference(pairs(runs.get(against, ()), runs[method])) for against in AGAINST)
            found.append(Comparison(task, recipe, method, differences))
    return found


def _difference(of_seeds: Sequence[tuple[Result, Result]]) -> Tested | None:
    if not of_seeds:
        return None
    first, second = ([metric(one, "accuracy") for one in column] for column in zip(*of_seeds, strict=True))
    tests = [mcnemar(answers(one), answers(other)) for one, other in of_seeds]
    better = sum(p < LEVEL and b > a for p, a, b in zip(tests, first, second, strict=True))
    return paired_difference(first, second), better


def _comparisons(study: Study, found: Sequence[Comparison]) -> str:
    tested = [difference for one in found for difference in one.differences if difference]
    if not tested:
        return "No pair of runs to compare yet."
    adjusted = iter(holm([difference.p_value for difference, _ in tested]))
    rows = [
        [study.short(one.task), one.recipe, label(one.method)]
        + [text for difference in one.differences for text in _compared(difference, adjusted)]
        for one in found
    ]
    explained = f"""
Difference of greedy accuracy, in points, between runs from the same bases: mean over seeds with its 95 % interval. p:
Student's paired test, corrected by Holm for the {len(tested)} tests of this table; **bold** below {LEVEL}. seeds: those
in which McNemar's test on the seed's own questions finds the method better.
"""
    heads = [head for against in AGAINST for head in (f"less {label(against)}", "p", "seeds")]
    return paragraphs(explained, table(["task", "base's recipe", "method", *heads], rows, words=3))


def _compared(found: Tested | None, adjusted: Iterator[float]) -> list[str]:
    if found is None:
        return [ABSENT] * 3
    (difference, low, high, _, n), better = found
    p, text, seeds = next(adjusted), signed(100 * difference), f"{better} of {n}"
    if n == 1:
        return [text, "one seed", seeds]
    text += f" ({signed(100 * low)} to {signed(100 * high)})"
    return [f"**{text}**" if p < LEVEL else text, probability(p), seeds]
