"""Equations in a rationale's text, such as `48/2 = 24`, and whether they hold."""

from __future__ import annotations

import ast
import operator
import re
from fractions import Fraction

NUMBER = r"\$?\d+(?:,\d{3})*(?:\.\d+)?%?"
TERM = rf"(?:\(\s?)*-?{NUMBER}(?:\s?\))*"
SIDE = rf"{TERM}(?:\s?[-+*/×÷x]\s?{TERM})*"
EQUATION = re.compile(rf"(?<![\w.]){SIDE}(?:\s?=\s?{SIDE})+(?![\w%])")

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def equations(text: str) -> tuple[str, ...]:
    """Without their spaces."""
    return tuple("".join(found[0].split()) for found in EQUATION.finditer(text))


def has_false_equation(text: str) -> bool:
    """Whether an equation of numbers does not hold; decimals may be rounded. What cannot be read is not false."""
    for equation in equations(text):
        sides = equation.split("=")
        values = [_value(side) for side in sides]
        for n in range(1, len(sides)):
            left, right = values[n - 1], values[n]
            if left is not None and right is not None and abs(left - right) > _rounding(sides[n - 1], sides[n]):
                return True
    return False


def _rounding(*sides: str) -> Fraction:
    """Half a unit of the last decimal of the coarser number."""
    decimals = [len(found[1]) for side in sides for found in re.finditer(r"\.(\d+)", side)]
    return Fraction(1, 2 * 10 ** min(decimals)) if decimals else Fraction(0)


def _value(side: str) -> Fraction | None:
    plain = side.replace("$", "").replace(",", "").replace("×", "*").replace("x", "*").replace("÷", "/")
    plain = re.sub(r"(\d+(?:\.\d+)?)%", r"(\1/100)", plain)
    plain = re.sub(r"(?<![\d.])0+(?=\d)", "", plain)  # Python reads no number with zeros before it
    try:
        return _compute(ast.parse(plain, mode="eval").body)
    except (SyntaxError, ZeroDivisionError):
        return None


def _compute(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp):
        value: Fraction = OPERATIONS[type(node.op)](_compute(node.left), _compute(node.right))
        return value
    if isinstance(node, ast.UnaryOp):
        return -_compute(node.operand)
    assert isinstance(node, ast.Constant), "EQUATION has numbers and four operations alone"
    return Fraction(str(node.value))
