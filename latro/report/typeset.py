"""Numbers and texts as HTML."""

from __future__ import annotations

import html
import math
import re

HUGE = 1e300  # drawn as not finite: the span of an axis must not overflow

# Neither HTML nor UTF-8 has a place for these.
UNSHOWABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def drawable(value: float) -> bool:
    return abs(value) < HUGE


def number(value: float) -> str:
    """Three digits, with an exponent only far from 1."""
    if not drawable(value):
        return "not finite"
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return minus(f"{float(mantissa):g}e{int(exponent)}")
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    return minus(f"{value:,.{max(0, decimals)}f}")


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}" if drawable(fraction) else "not finite"


def minus(digits: str) -> str:
    return digits.replace("-", "−")


def escape(text: object) -> str:
    """Text that nothing takes for markup; control characters become their pictures."""
    return html.escape(UNSHOWABLE.sub(lambda found: _picture(ord(found[0])), str(text)))


def _picture(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else "\ufffd"
