"""docs/study.md: prose by hand, tables and figures from the results.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; figures are files in the folder figures beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from latro.study.cases import CASES
from latro.study.figures import FIGURES
from latro.study.records import Study
from latro.study.tables import TABLES

PLACES: dict[str, Callable[[Study], str]] = {**TABLES, **CASES}
PLACE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
FIGURE = re.compile(r"\]\(figures/(\w+)\.svg\)")


class DocumentError(ValueError):
    """A document in which something has no place, or a place has nothing."""


def write(document: Path, study: Study) -> list[Path]:
    """Fill the document's tables and draw its figures -> the files that changed."""
    return [path for path, text in rendered(document, study).items() if _put(path, text)]


def stale(document: Path, study: Study) -> list[Path]:
    """The files that are not what the results give."""
    return [path for path, text in rendered(document, study).items() if _read(path) != text]


def rendered(document: Path, study: Study) -> dict[Path, str]:
    figures = document.parent / "figures"
    text = filled(document.read_text(encoding="utf-8"), study)
    return {document: text} | {figures / f"{name}.svg": draw(study) for name, draw in FIGURES.items()}


def filled(text: str, study: Study) -> str:
    """The document with its tables as the results give them."""
    _check("table", [found[2] for found in PLACE.finditer(text)], list(PLACES))
    _check("figure", FIGURE.findall(text), list(FIGURES))
    for mark in ("<!-- table:", "<!-- end -->"):
        if text.count(mark) != len(PLACES):
            raise DocumentError(f"the document must have {len(PLACES)} times {mark}, got {text.count(mark)}")
    return PLACE.sub(lambda found: f"{found[1]}{PLACES[found[2]](study)}\n{found[4]}", text)


def _check(kind: str, found: list[str], known: list[str]) -> None:
    for name in found:
        if name not in known:
            raise DocumentError(f"the document's {kind}s must be some of {known}, got {name!r}")
    for name in known:
        if found.count(name) != 1:
            raise DocumentError(f"the document must have the {kind} {name} once, got {found.count(name)} times")


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _put(path: Path, text: str) -> bool:
    if _read(path) == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return True
