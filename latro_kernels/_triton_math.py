"""Device functions that Triton does not have, or not in its interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """Of x <= 0, to float32's precision: in tl.exp, x * log2(e) loses as many bits as x has before its point."""
    lowest = -87.0  # below it, 0
    inside = tl.where(x < lowest, lowest, x)
    n = tl.floor(inside * LOG2E + 0.5)
    r = inside - n * 0.693359375  # log 2 in two parts, of which the first times n is exact
    r = r - n * -2.12194440e-4
    series = 1.9875691500e-4 * r + 1.3981999507e-3
    series = series * r + 8.3334519073e-3
    series = series * r + 4.1665795894e-2
    series = series * r + 1.6666665459e-1
    series = series * r + 5.0000001201e-1
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < lowest, 0.0, (series * r * r + r + 1) * power)


@triton.jit
def tanh(x):
    """To float32's precision: a polynomial where 1 - 2 / (exp(2x) + 1) would cancel."""
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    small = x + x * (square * series)
    large = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))
