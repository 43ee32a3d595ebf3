"""Pairs for DPO: of whole completions, and of what goes on from where a rationale went wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from latro.data import Example, Pair
from latro.explore.exploration import Explored
from latro.explore.rejection import Sorted
from latro.rollout import Sample
from latro.text import Text

PAIRED = "paired"
NO_WRONG = "right, but there is no wrong one left"
NO_RIGHT = "wrong, of a prompt without a right one"
NO_PIT = "no first pit"
USED = "every right continuation is chosen already"
HOLDS = "every other right continuation has the rejected step in it"


@dataclass(frozen=True)
class WholePair:
    """A right completion of a prompt, and a wrong one."""

    example: Example
    chosen: Sample
    rejected: Sample

    def to_example(self, number: int) -> Example:
        return _example(self.example, number, Pair(_whole(self.chosen), _whole(self.rejected)))


def whole_pairs(
    problems: Sequence[Sorted], text: Text, normalised: bool = False
) -> tuple[list[WholePair], Counter[str]]:
    """Each right completion with the wrong one of its prompt that is farthest from it, each wrong one once."""
    pairs, counts = [], Counter(dict.fromkeys((PAIRED, NO_WRONG, NO_RIGHT), 0))
    for problem in problems:
        right, wrong = ([text.decode(one.tokens) for one in ones] for ones in (problem.right, problem.wrong))
        found = farthest(right, wrong, normalised)
        pairs += [WholePair(problem.example, problem.right[one], problem.wrong[other]) for one, other in found]
        counts[PAIRED] += len(found)
        counts[NO_WRONG] += len(right) - len(found)
        counts[NO_RIGHT] += 0 if right else len(wrong)
    return pairs, counts


def farthest(right: Sequence[str], wrong: Sequence[str], normalised: bool = False) -> list[tuple[int, int]]:
    """For each right text, in order, the wrong one at the greatest edit distance of those that are left, of equally
    distant ones the first. normalised: by the length of the longer one."""
    left, pairs = list(range(len(wrong))), []
    for n, text in enumerate(right):
        if not left:
            break
        lengths = [max(len(text), len(wrong[other]), 1) if normalised else 1 for other in left]
        distances = [edit_distance(text, wrong[other]) / length for other, length in zip(left, lengths, strict=True)]
        pairs.append((n, left.pop(distances.index(max(distances)))))
    return pairs


def edit_distance(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Levenshtein's. A column of its table differs by 1, 0 or −1 from row to row, which are the bits of two integers
    (Myers, 1999; Hyyrö, 2003)."""
    if not first:
        return len(second)
    places: dict[Hashable, int] = {}
    for n, item in enumerate(first):
        places[item] = places.get(item, 0) | 1 << n
    every, last = (1 << len(first)) - 1, 1 << (len(first) - 1)
    distance, rises, falls = len(first), every, 0
    for item in second:
        same = places.get(item, 0)
        level = (((same & rises) + rises) ^ rises) | same | falls  # as large as its upper left neighbour
        right_rises, right_falls = falls | (every & ~(level | rises)), rises & level
        distance += bool(right_rises & last) - bool(right_falls & last)
        right_rises = right_rises << 1 | 1
        rises, falls = every & (right_falls << 1 | ~(level | right_rises)), every & right_rises & level
    return distance


def granular_pairs(
    pairs: Sequence[WholePair], explored: Sequence[Explored], text: Text
) -> tuple[list[Example], Counter[str]]:
    """Of each pair the first pit of its wrong completion, which is explored, against a right way to go on from there.

    Chosen is the shortest right continuation, or behind no step the pair's own right completion. What is chosen once is
    not chosen again, nor is what has the rejected step in it. -> examples with pairs, and why others were dropped.
    """
    examples: list[Example] = []
    counts = Counter(dict.fromkeys((PAIRED, NO_PIT, USED, HOLDS), 0))
    used: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = set()
    for pair, found in zip(pairs, explored, strict=True):
        pit = found.pit
        if pit is None:
            counts[NO_PIT] += 1
            continue
        before = found.before(pit)
        fresh = [one for one in _right_ways(pair, found, pit) if (pair.example.id, before, one) not in used]
        rejected = found.steps[pit]
        without = (
            [one for one in fresh if rejected.text.strip() not in text.decode(one)] if rejected.text.strip() else fresh
        )
        counts[PAIRED if without else HOLDS if fresh else USED] += 1
        if without:
            chosen = min(without, key=len)
            used.add((pair.example.id, before, chosen))
            examples.append(_example(pair.example, len(examples), Pair(chosen, rejected.tokens, before)))
    return examples, counts


def _right_ways(pair: WholePair, found: Explored, pit: int) -> list[tuple[int, ...]]:
    if pit == 0:
        return [_whole(pair.chosen)]
    return [_whole(attempt.sample) for attempt in found.attempts[pit] if attempt.right]


def _whole(sample: Sample) -> tuple[int, ...]:
    return (*sample.tokens, *([] if sample.end is None else [sample.end]))


def _example(example: Example, number: int, pair: Pair) -> Example:
    return replace(example, id=f"{example.id}/{number}", pair=pair)
