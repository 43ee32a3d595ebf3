"""What a completion is made of: the steps of its rationale, which end between tokens, and its answer as the last."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import accumulate

from latro.data import Example
from latro.explore.equations import equations, has_false_equation
from latro.rollout import Sample
from latro.text import Text

MOST_STEPS = 20  # of a rationale that are explored

LINE = re.compile(r"[^\n]*\n+|[^\n]+")
# A sentence goes on over a formula between dollars, and over a full stop within a number.
SENTENCE = re.compile(r"(?:\$[^$]*\$|[^$.!?\n]|[.!?](?!\s))*(?:[.!?\n]\s*|\$)?", re.DOTALL)


@dataclass(frozen=True)
class Step:
    """A part of a completion. The last one of a whole completion states the answer, and holds the end token."""

    text: str
    tokens: tuple[int, ...]
    is_answer: bool = False


@dataclass(frozen=True)
class Reading:
    """How the rationales of a data set are read."""

    steps_of: Callable[[str], list[str]]  # the parts of a rationale, which together are its text
    is_sound: Callable[[Example, str], bool] = lambda example, rationale: True  # whether a checker finds no mistake
    essence: Callable[[str], Hashable] = lambda rationale: rationale  # equal for rationales that are as good as equal
    normalised: bool = False  # whether edit distances are shares of the longer text


def reading_for(dataset: str) -> Reading:
    """Of a data set as `latro.data.load` names it: the steps of a small task are its own, those of MATH are sentences,
    and those of others are lines."""
    from latro.tasks import is_task, named

    if is_task(dataset):
        task = named(dataset)
        return Reading(task.steps_of, lambda example, rationale: task.first_wrong_step(example, rationale) is None)
    steps_of = sentences if dataset == "math" else lines
    return Reading(
        steps_of, lambda _, rationale: not has_false_equation(rationale), _equations_or_words, dataset == "math"
    )


def lines(rationale: str) -> list[str]:
    return LINE.findall(rationale)


def sentences(rationale: str) -> list[str]:
    """Of which neighbours are merged where there are more than MOST_STEPS."""
    found = [part for part in SENTENCE.findall(rationale) if part]
    together = -(-len(found) // MOST_STEPS)
    return ["".join(found[first : first + together]) for first in range(0, len(found), max(1, together))]


def _equations_or_words(rationale: str) -> Hashable:
    return equations(rationale) or tuple(rationale.split())


def steps_in(text: Text, sample: Sample, steps_of: Callable[[str], list[str]], most: int = MOST_STEPS) -> list[Step]:
    """The first steps of a completion, and the answer if they are all of its rationale.

    They are made of the tokens that were sampled: one that reaches over the end of a step belongs to the next.
    """
    rationale = text.rationale(sample.tokens)
    parts = steps_of(rationale.text)
    if "".join(parts) != rationale.text:
        raise ValueError(
            f"steps_of: the steps must together be the rationale {rationale.text!r:.80}, got {parts!r:.200}"
        )
    ends = _boundaries(text, rationale.tokens, rationale.text, list(accumulate(map(len, parts[:most]))))
    steps, begin = [], 0
    for end in ends:
        if end > begin:
            steps.append(Step(_between(text, sample.tokens, begin, end), tuple(sample.tokens[begin:end])))
            begin = end
    answer = (*sample.tokens[len(rationale.tokens) :], *([] if sample.end is None else [sample.end]))
    if len(parts) <= most and answer:
        said = _between(text, sample.tokens, len(rationale.tokens), len(sample.tokens))
        steps.append(Step(said, answer, is_answer=True))
    return steps


def _boundaries(text: Text, tokens: list[int], decoded: str, places: list[int]) -> list[int]:
    """How many tokens end at each of these characters, or before it. The tokens of one character may by themselves be
    shown as others, so that a text may grow shorter by a token more: every beginning is looked at."""
    whole = [0]  # the lengths of beginnings that are some of the text, and how many tokens each has
    counts = [0]
    for count in range(1, len(tokens) + 1):
        before = text.decode(tokens[:count])
        if decoded.startswith(before):
            whole.append(len(before))
            counts.append(count)
    return [counts[bisect_right(whole, place) - 1] for place in places]


def _between(text: Text, tokens: list[int], begin: int, end: int) -> str:
    """As it stands in the whole text: tokens by themselves may lose a space."""
    return text.decode(tokens[:end])[len(text.decode(tokens[:begin])) :]
