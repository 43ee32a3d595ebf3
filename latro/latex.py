r"""Final answers as MATH has them, in LaTeX: what stands in the box, and one form for all that mean the same.

Two answers are equal where their normal forms are. Numbers are compared exactly: `0.5`, `\frac12` and `1/2` are one,
`0.33` and `\frac13` are two. A tuple or an interval is equal in its order, a set or a bare list in any. Units, degrees,
percent and dollar signs do not count, nor does `x =`. Algebra is compared as it is written.
"""

from __future__ import annotations

import re
from fractions import Fraction

SAME = {"dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "leq": "le", "geq": "ge", "neq": "ne"}
IGNORED = re.compile(
    r"\\(?:left|right|big|Big|displaystyle|quad|qquad|degree|circ)(?![a-zA-Z])|(?<!\\)\\[!,;:$% ]|[~$%°]", re.ASCII
)
WORDS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
UNIT = re.compile(r"(?<=[\w})])\s*" + WORDS.pattern + r"\s*(?:\^\s*\{?\d\}?)?\s*\.?$")
ONE_DIGIT_EACH = re.compile(r"\\(frac|sqrt)(?:\s+|(?=\d))(\w)")
SECOND = re.compile(r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\})\s*(\w)")
NAMED = re.compile(r"[a-zA-Z](?:_\w)?(?:=|\\in(?![a-zA-Z]))")
GROUPED = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
DECIMAL = re.compile(r"-?(?:\d+\.?\d*|\.\d+)")
RATIO = re.compile(r"(-?)((?:\\[a-zA-Z]+|\w)+)/(\w+)")
FRACTION = re.compile(r"(-?)(\d*)\\frac\{(-?\d+)\}\{(-?\d+)\}")


def boxed(text: str) -> str | None:
    """What stands in the last box."""
    found = list(re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", text))
    if not found:
        return None
    behind = text[found[-1].end() :]
    if behind.startswith("{"):
        end = _closing(behind)
        return None if end is None else behind[1:end].strip() or None
    return re.split(r"[$\n.]", behind, maxsplit=1)[0].strip() or None


def normal(answer: str) -> str:
    """The form that equal answers share."""
    text = UNIT.sub("", answer.strip())
    text = WORDS.sub(
        lambda found: found[1], text.replace("{,}", "").replace("\\{", "\\lbrace ").replace("\\}", "\\rbrace ")
    )
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "", text)
    text = IGNORED.sub("", text)
    text = re.sub(r"\\([a-zA-Z]+)", lambda found: "\\" + SAME.get(found[1], found[1]), text)
    text = SECOND.sub(r"\1{\2}", ONE_DIGIT_EACH.sub(r"\\\1{\2}", text))
    text = "".join(text.split()).rstrip(".").removeprefix("+")
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)
    text = NAMED.sub("", text, count=1) if NAMED.match(text) else text
    return _value(text.replace(",", "") if GROUPED.fullmatch(text) else text)


def _value(text: str) -> str:
    if text.startswith("\\lbrace") and text.endswith("\\rbrace"):
        return "{" + ",".join(sorted(map(_value, _parts(text[len("\\lbrace") : -len("\\rbrace")])))) + "}"
    if text[:1] in ("(", "[") and _closing(text) == len(text) - 1:
        values = list(map(_value, _parts(text[1:-1])))
        return values[0] if len(values) == 1 and text[0] == "(" else text[0] + ",".join(values) + text[-1]
    parts = _parts(text)
    return ",".join(sorted(map(_value, parts))) if len(parts) > 1 else _number(text)


def _number(text: str) -> str:
    text = text.removeprefix("+")
    if DECIMAL.fullmatch(text):
        return str(Fraction(text))
    text = RATIO.sub(r"\1\\frac{\2}{\3}", text) if RATIO.fullmatch(text) else text
    found = FRACTION.fullmatch(text)
    if found is None or int(found[4]) == 0:
        return text
    value = int(found[2] or 0) + Fraction(int(found[3]), int(found[4]))  # 1\frac12 is one and a half
    return str(-value if found[1] else value)


def _parts(text: str) -> list[str]:
    """What stands between commas that no bracket encloses."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _closing(text: str) -> int | None:
    """Where the bracket that text begins with is closed: of an interval, perhaps by one of another kind."""
    depth = 0
    for at, character in enumerate(text):
        if text[at - 1 : at] != "\\":
            depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return at
    return None
