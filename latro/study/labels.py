"""Where names go in a scatter plot, so that none is on another or on a dot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

CHARACTER = 6.4  # the width of most of them, at most, at a size of 11
LINE = 14


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The point of the box that is nearest."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


def place(dots: Sequence[tuple[float, float]], texts: Sequence[str], width: float, height: float) -> list[Box]:
    """Boxes for texts, each as near to its dot as all dots, and texts placed before with their lines, leave room."""
    taken = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    found: dict[int, Box] = {}
    # Those in the corners first: they have the fewest places to go to.
    middle = width / 2, height / 2
    for n in sorted(range(len(dots)), key=lambda n: -math.dist(dots[n], middle)):
        wide = CHARACTER * len(texts[n]) + 4
        near = sorted(_candidates(*dots[n], wide, width, height), key=lambda box: _apart(dots[n], box))
        found[n] = _first_free(dots[n], near, taken, found.values())
        taken += [found[n], *_leader(dots[n], found[n])]
    return [found[n] for n in range(len(dots))]


def _first_free(dot: tuple[float, float], boxes: Sequence[Box], taken: Iterable[Box], names: Iterable[Box]) -> Box:
    """The first that overlaps nothing and whose line to the dot crosses no name, or else overlaps nothing, or else."""
    first_free = None
    for box in boxes:
        if any(box.overlaps(other) for other in taken):
            continue
        if not any(piece.overlaps(name) for piece in _leader(dot, box) for name in names):
            return box
        first_free = first_free or box
    return first_free or boxes[0]


def _leader(dot: tuple[float, float], box: Box) -> list[Box]:
    """What the line from a dot to its name takes up beyond the dot."""
    to = box.nearest(*dot)
    pieces = int(math.dist(dot, to) / 4)
    places = [[a + (b - a) * n / pieces for a, b in zip(dot, to, strict=True)] for n in range(2, pieces)]
    return [Box(x - 1, y - 1, x + 1, y + 1) for x, y in places]


def _candidates(x: float, y: float, wide: float, width: float, height: float) -> list[Box]:
    """Boxes within the plot, beside, above and below the dot and further off."""
    lefts = [x + 7, x - 7 - wide, x - wide / 2, *(step * 12 for step in range(int((width - wide) / 12) + 1))]
    tops = [y - LINE / 2, y - LINE - 6, y + 6, *(step * 5 for step in range(int((height - LINE) / 5) + 1))]
    return [
        Box(left, top, left + wide, top + LINE)
        for left in lefts
        for top in tops
        if 0 <= left <= width - wide and -4 <= top <= height - LINE
    ]


def _apart(dot: tuple[float, float], box: Box) -> float:
    """From the dot to the box; of boxes as near the one whose middle is nearest."""
    middle = (box.left + box.right) / 2, (box.top + box.bottom) / 2
    return math.dist(dot, box.nearest(*dot)) + 0.05 * math.dist(dot, middle)
