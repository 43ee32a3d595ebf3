"""The kernels of triton.py. protocol.py says what each does, strips.py has the formulas and calls them.

A logit is in bits, its natural value times log2(e). It is exponentiated from its row's guess, a whole number, or from a
whole number of steps above that, which its tile's highest logit determines: tiles differ by exact powers of two.
The target is left out of every sum. What is known of a scored token is float32 and lies in `state` [STATE_ROWS, M].
M scored tokens, V entries of a strip of the vocabulary, D hidden.
"""

from __future__ import annotations

import triton
import triton.language as tl

from latro_kernels._triton_math import LOG2E, tanh
from latro_kernels.linear_logprobs import protocol

TEMPERATURE = tl.constexpr(protocol.TEMPERATURE)
GUESS = tl.constexpr(protocol.GUESS)
GUESSED = tl.constexpr(protocol.GUESSED)
LOGIT = tl.constexpr(protocol.LOGIT)
SLOPE = tl.constexpr(protocol.SLOPE)
HIGHEST = tl.constexpr(protocol.HIGHEST)
SHIFT = tl.constexpr(protocol.SHIFT)
TOTAL = tl.constexpr(protocol.TOTAL)
ENTRY = tl.constexpr(protocol.ENTRY)

LOG2E_REST = tl.constexpr(1.925963033500e-08)  # what float32 leaves out of it
LN2 = tl.constexpr(0.6931471805599453)

# How far a tile's highest logit may be above the guess. Within it E, the sum of E over 10⁶ entries, and a coefficient
# of 10⁻⁹ over that sum are normal numbers of bfloat16 and float32; what E rounds to zero is below 2^-68 of the maximum.
MOST = tl.constexpr(58.0)

# The steps of a tile without a possible entry: below those of all others, and finite, for 0 times 2^-inf is a NaN.
NOWHERE = tl.constexpr(-(2.0**127))

# Guesses are smaller, so that adding steps to them is exact.
MOST_GUESS = tl.constexpr(2.0**20)


@triton.jit
def _bits(products, temperature, logit_scale, softcap):
    """softcap(logit_scale * products) / temperature, in bits"""
    if softcap is None:
        logits = products * (logit_scale / temperature)
    else:
        logits = tanh(products * (logit_scale / softcap)) * (softcap / temperature)
    return logits * LOG2E + logits * LOG2E_REST


@triton.jit
def _slope(products, logit_scale, softcap):
    """Of the softcap, 1 - tanh², but without its cancellation where the logit is near the cap."""
    decay = tl.exp(-2 * tl.abs(products * (logit_scale / softcap)))
    return 4 * decay / ((1 + decay) * (1 + decay))


@triton.jit
def _steps(highest, guess, guessed):
    """From the guess to what entries are exponentiated from, of which the highest is given; the higher, the more.

    Entries far below the target's logit may vanish; where the guess is no logit, they must not.
    """
    distance = highest - guess
    whole = tl.ceil(distance)
    down = tl.where((guessed == 0) & (distance < -MOST), tl.maximum(whole, NOWHERE), 0.0)
    return tl.where(distance > MOST, whole, down)


@triton.jit
def _power_of_two(exponent):
    """Of a whole number, exactly; 0 where that is not a normal number."""
    bounded = tl.where(exponent > -127, tl.where(exponent < 127, exponent, 127.0), -127.0)
    return ((bounded.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _log1p(x):
    """For x >= 0: what rounding 1 + x loses, the quotient has lost too."""
    rounded = 1 + x
    return tl.where(rounded == 1, x, tl.log(rounded) * (x / (rounded - 1)))


@triton.jit
def _product(
    hidden_ptr, weight_ptr, stride_w, offs_m, M, offs_v, V,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden[offs_m] weight[offs_v]ᵀ. Rows past the end are the last: who asks for them masks what comes of them."""
    offs_k = tl.arange(0, BLOCK_K)
    hidden_ptrs = hidden_ptr + tl.minimum(offs_m, M - 1).to(tl.int64)[:, None] * D + offs_k[None, :]
    weight_ptrs = weight_ptr + tl.minimum(offs_v, V - 1).to(tl.int64)[None, :] * stride_w + offs_k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for k in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            hidden, weight = tl.load(hidden_ptrs), tl.load(weight_ptrs)
        else:
            hidden = tl.load(hidden_ptrs, mask=(offs_k < D - k)[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=(offs_k < D - k)[:, None], other=0.0)
        total = tl.dot(hidden, weight, total, input_precision="ieee")
        hidden_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    return total


@triton.jit
def _finish(
    products, offs_m, mask_m, begin_v, tile,
    state_ptr, targets_ptr, bias_ptr, exponentials_ptr, stride_e, partials_ptr, tiles, first_v, M, V,
    logit_scale, softcap,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What is made of a tile of products: E, and where there are partials, statistics and the target's logit."""
    offs_t = tl.arange(0, BLOCK_V)
    offs_v = begin_v + offs_t
    mask_v = offs_v < V
    if bias_ptr is not None:
        products += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    temperature = tl.load(state_ptr + TEMPERATURE * M + offs_m, mask=mask_m, other=1.0)
    bits = _bits(products, temperature[:, None], logit_scale, softcap)
    target = (tl.load(targets_ptr + offs_m, mask=mask_m, other=-1) - first_v - begin_v).to(tl.int32)
    is_target = target[:, None] == offs_t[None, :]
    others = tl.where(mask_v[None, :] & (is_target == 0), bits, -float("inf"))
    if partials_ptr is None:
        shift = tl.load(state_ptr + SHIFT * M + offs_m, mask=mask_m, other=0.0)
        powers = tl.exp2(others - shift[:, None])
    else:
        guess = tl.load(state_ptr + GUESS * M + offs_m, mask=mask_m, other=0.0)
        guessed = tl.load(state_ptr + GUESSED * M + offs_m, mask=mask_m, other=1.0)
        highest = tl.max(others, 1)
        powers = tl.exp2(others - (guess + _steps(highest, guess, guessed))[:, None])
        moments = tl.where(powers > 0, powers * (others - highest[:, None]), 0.0)  # 0 · -inf is 0 here
        partials_ptrs = partials_ptr + tile.to(tl.int64) * M + offs_m
        step = tiles.to(tl.int64) * M
        tl.store(partials_ptrs, highest, mask=mask_m)
        tl.store(partials_ptrs + step, tl.sum(powers, 1), mask=mask_m)
        tl.store(partials_ptrs + 2 * step, tl.sum(moments, 1), mask=mask_m)
        here = mask_m & (target >= 0) & (target < BLOCK_V)
        if tl.max(here.to(tl.int32), 0) > 0:
            tl.store(state_ptr + LOGIT * M + offs_m, tl.sum(tl.where(is_target, bits, 0.0), 1), mask=here)
            slope = tl.full(here.shape, 1.0, tl.float32)
            if softcap is not None:
                slope = tl.sum(tl.where(is_target, _slope(products, logit_scale, softcap), 0.0), 1)
            tl.store(state_ptr + SLOPE * M + offs_m, slope, mask=here)
    if exponentials_ptr is not None:
        if softcap is not None:
            powers *= _slope(products, logit_scale, softcap)
        pointers = exponentials_ptr + offs_m.to(tl.int64)[:, None] * stride_e + offs_v[None, :]
        tl.store(pointers, powers.to(exponentials_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_v[None, :])


@triton.jit(do_not_specialize=["first_tile", "tiles", "first_v", "M", "V"])
def epilogue(
    products_ptr, stride_p, first_tile,
    state_ptr, targets_ptr, bias_ptr, exponentials_ptr, stride_e, partials_ptr, tiles, first_v, M, V,
    logit_scale, softcap,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Of products that a vendor's kernel has made."""
    begin_v = tl.program_id(1) * BLOCK_V
    offs_v = begin_v + tl.arange(0, BLOCK_V)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # more than a grid's second axis has
    mask_m = offs_m < M
    pointers = products_ptr + offs_m.to(tl.int64)[:, None] * stride_p + offs_v[None, :]
    products = tl.load(pointers, mask=mask_m[:, None] & (offs_v < V)[None, :], other=0.0)
    _finish(
        products, offs_m, mask_m, begin_v, first_tile + tl.program_id(1),
        state_ptr, targets_ptr, bias_ptr, exponentials_ptr, stride_e, partials_ptr, tiles, first_v, M, V,
        logit_scale, softcap, BLOCK_V,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_tile", "tiles", "first_v", "M", "V"])
def product_and_epilogue(
    hidden_ptr, weight_ptr, stride_w, first_tile,
    state_ptr, targets_ptr, bias_ptr, exponentials_ptr, stride_e, partials_ptr, tiles, first_v, M, V,
    logit_scale, softcap,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Products that are never written."""
    # GROUP_M blocks of tokens stay in the L2 cache while the vocabulary streams by.
    blocks_v = tl.cdiv(V, BLOCK_V)
    group = tl.program_id(0) // (GROUP_M * blocks_v)
    rows = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * blocks_v)
    tile = within // rows
    offs_m = (group * GROUP_M + within % rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    products = _product(hidden_ptr, weight_ptr, stride_w, offs_m, M, offs_v, V, D, BLOCK_M, BLOCK_V, BLOCK_K)
    _finish(
        products, offs_m, offs_m < M, tile * BLOCK_V, first_tile + tile,
        state_ptr, targets_ptr, bias_ptr, exponentials_ptr, stride_e, partials_ptr, tiles, first_v, M, V,
        logit_scale, softcap, BLOCK_V,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def guess(
    hidden_ptr, weight_ptr, stride_w, bias_ptr, targets_ptr, state_ptr, M, logit_scale, softcap,
    D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The logit of the target, rounded: likely not far from the maximum."""
    m = tl.program_id(0)
    target = tl.load(targets_ptr + m)
    offs_k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for k in range(0, D, BLOCK_K):
        mask_k = offs_k < D - k
        hidden = tl.load(hidden_ptr + m.to(tl.int64) * D + k + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + target * stride_w + k + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        total += hidden * weight
    product = tl.sum(total, 0)
    if bias_ptr is not None:
        product += tl.load(bias_ptr + target).to(tl.float32)
    bits = _bits(product, tl.load(state_ptr + TEMPERATURE * M + m), logit_scale, softcap)
    guessed = tl.abs(bits) < MOST_GUESS  # neither NaN nor the logit of a forbidden token
    tl.store(state_ptr + GUESS * M + m, tl.where(guessed, tl.floor(bits + 0.5), 0.0))
    tl.store(state_ptr + GUESSED * M + m, guessed.to(tl.float32))


@triton.jit(do_not_specialize=["tiles", "M"])
def combine(
    partials_ptr, tiles, state_ptr, logps_ptr, entropy_ptr, M,
    HEADROOM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Log-prob and entropy from the tiles' statistics, and the shift that E has from now on.

    HEADROOM: E is at most 2 to its power, in a dtype that has not the range for a guess; None in one that has.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    offs_t = tl.arange(0, BLOCK_TILES)
    step = tiles.to(tl.int64) * M
    first_ptrs = partials_ptr + offs_t.to(tl.int64)[:, None] * M + offs_m[None, :]
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    pointers = first_ptrs
    for first in range(0, tiles, BLOCK_TILES):
        mask = (offs_t < tiles - first)[:, None] & mask_m[None, :]
        highest = tl.maximum(highest, tl.max(tl.load(pointers, mask=mask, other=-float("inf")), 0))
        pointers += BLOCK_TILES * M
    guess = tl.load(state_ptr + GUESS * M + offs_m, mask=mask_m, other=0.0)
    guessed = tl.load(state_ptr + GUESSED * M + offs_m, mask=mask_m, other=1.0)
    logit = tl.load(state_ptr + LOGIT * M + offs_m, mask=mask_m, other=0.0)
    steps = _steps(highest, guess, guessed)
    shift = guess + steps
    top = tl.maximum(highest, logit)
    others = tl.zeros((BLOCK_M,), tl.float32)
    moment = tl.zeros((BLOCK_M,), tl.float32)
    pointers = first_ptrs
    for first in range(0, tiles, BLOCK_TILES):
        mask = (offs_t < tiles - first)[:, None] & mask_m[None, :]
        maxima = tl.load(pointers, mask=mask, other=-float("inf"))
        sums = tl.load(pointers + step, mask=mask, other=0.0)
        moments = tl.load(pointers + 2 * step, mask=mask, other=0.0)
        factor = _power_of_two(_steps(maxima, guess[None, :], guessed[None, :]) - steps[None, :])
        lower = maxima - top[None, :]
        lower = tl.where(lower > -1000.0, lower, -1000.0)  # of a sum of 0, with which -inf would make a NaN
        others += tl.sum(factor * sums, 0)
        moment += tl.sum(factor * (moments + lower * sums), 0)
        pointers += BLOCK_TILES * M
    gap = logit - shift
    own = tl.where(logit == float("inf"), float("nan"), tl.exp2(gap))
    total = others + own
    # Where own is too small to divide by, 1 + others / own is others / own.
    logp = tl.where(gap > -60.0, -_log1p(others / own), gap * LN2 - tl.log(total))
    moment += tl.where(own > 0, own * (logit - top), 0.0)
    above = tl.floor(top - shift + 0.5)
    entropy = tl.log(total * _power_of_two(-above)) - (top - shift - above + moment / total) * LN2
    tl.store(logps_ptr + offs_m, logp, mask=mask_m)
    tl.store(entropy_ptr + offs_m, entropy, mask=mask_m)
    entry = -others * tl.load(state_ptr + SLOPE * M + offs_m, mask=mask_m, other=0.0)
    if HEADROOM is not None:
        settled = shift + (tl.log2(total) - HEADROOM)
        factor = tl.exp2(shift - settled)  # of what float32 makes of it
        total *= factor
        entry *= factor
        shift = settled
    tl.store(state_ptr + HIGHEST * M + offs_m, highest, mask=mask_m)
    tl.store(state_ptr + SHIFT * M + offs_m, shift, mask=mask_m)
    tl.store(state_ptr + TOTAL * M + offs_m, total, mask=mask_m)
    tl.store(state_ptr + ENTRY * M + offs_m, entry, mask=mask_m)


@triton.jit(do_not_specialize=["tiles", "M", "V"])
def settle(
    highest_ptr, tiles, state_ptr, exponentials_ptr, stride_e, unit_ptr, M, V,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Whatever was made with fewer steps than the highest logit asks for is brought to those, seldom anything.

    highest: of the others' logits in each tile [tiles, M]; E: their V columns, WIDTH a tile.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    guess = tl.load(state_ptr + GUESS * M + offs_m, mask=mask_m, other=0.0)
    guessed = tl.load(state_ptr + GUESSED * M + offs_m, mask=mask_m, other=1.0)
    before = tl.load(state_ptr + HIGHEST * M + offs_m, mask=mask_m, other=-float("inf"))
    offs_t = tl.arange(0, BLOCK_TILES)
    pointers = highest_ptr + offs_t.to(tl.int64)[:, None] * M + offs_m[None, :]
    highest = before
    lowest = tl.full((BLOCK_M,), float("inf"), tl.float32)
    for first in range(0, tiles, BLOCK_TILES):
        mask = (offs_t < tiles - first)[:, None] & mask_m[None, :]
        maxima = tl.load(pointers, mask=mask, other=-float("inf"))
        highest = tl.maximum(highest, tl.max(maxima, 0))
        lowest = tl.minimum(lowest, tl.min(tl.where(mask, maxima, float("inf")), 0))
        pointers += BLOCK_TILES * M
    tl.store(state_ptr + HIGHEST * M + offs_m, highest, mask=mask_m)
    steps = _steps(highest, guess, guessed)
    far = mask_m & (_steps(lowest, guess, guessed) != steps)
    if tl.max(far.to(tl.int32), 0) > 0:
        tile_ptrs = highest_ptr + offs_m
        for tile in range(tiles):
            of_tile = tl.load(tile_ptrs, mask=far, other=0.0)
            tile_ptrs += M
            change = _steps(of_tile, guess, guessed) - steps
            changed = far & (change != 0)
            if tl.max(changed.to(tl.int32), 0) > 0:
                offs_v = tile * WIDTH + tl.arange(0, WIDTH)
                entries = exponentials_ptr + offs_m.to(tl.int64)[:, None] * stride_e + offs_v[None, :]
                mask = changed[:, None] & (offs_v < V)[None, :]
                scaled = tl.load(entries, mask=mask, other=0.0).to(tl.float32) * _power_of_two(change)[:, None]
                tl.store(entries, scaled.to(exponentials_ptr.dtype.element_ty), mask=mask)
    if unit_ptr is not None:
        change = _steps(before, guess, guessed) - steps
        changed = mask_m & (change != 0)
        if tl.max(changed.to(tl.int32), 0) > 0:
            for k in range(0, D, BLOCK_K):
                offs_d = k + tl.arange(0, BLOCK_K)
                entries = unit_ptr + offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
                mask = changed[:, None] & (offs_d < D)[None, :]
                scaled = tl.load(entries, mask=mask, other=0.0) * _power_of_two(change)[:, None]
                tl.store(entries, scaled, mask=mask)


@triton.jit(do_not_specialize=["M", "V"])
def add_bias_grad(
    exponentials_ptr, stride_e, coefficients_ptr, grad_ptr, M, V, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr
):
    """grad += Eᵀ coefficients."""
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    total = tl.zeros((BLOCK_V,), tl.float32)
    for m in range(0, M, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_v[None, :]
        pointers = exponentials_ptr + offs_m.to(tl.int64)[:, None] * stride_e + offs_v[None, :]
        coefficients = tl.load(coefficients_ptr + offs_m, mask=offs_m < M, other=0.0)
        total += tl.sum(tl.load(pointers, mask=mask, other=0.0).to(tl.float32) * coefficients[:, None], 0)
    tl.store(grad_ptr + offs_v, tl.load(grad_ptr + offs_v, mask=mask_v, other=0.0) + total, mask=mask_v)


@triton.jit
def _fellow(state_ptr, M, offs_m, j, end):
    """Whether token j is one before `end` that has the temperature of token offs_m."""
    own = tl.load(state_ptr + TEMPERATURE * M + offs_m, mask=offs_m < M, other=0.0)
    return tl.load(state_ptr + TEMPERATURE * M + j, mask=j < end, other=-1.0) == own


@triton.jit(do_not_specialize=["first_v", "M", "V"])
def clear_targets(
    begins_ptr, ends_ptr, targets_ptr, state_ptr, first_v, exponentials_ptr, stride_e, M, V, BLOCK_M: tl.constexpr
):  # fmt: skip
    """E = 0 at the targets of the tokens [begin, end) of a token's row that have its temperature."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = tl.load(begins_ptr + offs_m, mask=offs_m < M, other=0)
    end = tl.load(ends_ptr + offs_m, mask=offs_m < M, other=0)
    for k in range(tl.max(end - begin, 0).to(tl.int32)):
        fellow = _fellow(state_ptr, M, offs_m, begin + k, end)
        offs_v = tl.load(targets_ptr + begin + k, mask=fellow, other=-1) - first_v
        zeros = tl.zeros((BLOCK_M,), exponentials_ptr.dtype.element_ty)
        pointers = exponentials_ptr + offs_m.to(tl.int64) * stride_e + offs_v
        tl.store(pointers, zeros, mask=fellow & (offs_v >= 0) & (offs_v < V))


@triton.jit(do_not_specialize=["M"])
def couple_targets(
    coefficients_ptr, begins_ptr, ends_ptr, targets_ptr, state_ptr, out_ptr, M, BLOCK_M: tl.constexpr
):  # fmt: skip
    """What those tokens have at a token's target, where E is 0, over their TOTAL and times their coefficients."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    begin = tl.load(begins_ptr + offs_m, mask=mask_m, other=0)
    end = tl.load(ends_ptr + offs_m, mask=mask_m, other=0)
    target = tl.load(targets_ptr + offs_m, mask=mask_m, other=-1)
    logit = tl.load(state_ptr + LOGIT * M + offs_m, mask=mask_m, other=0.0)
    slope = tl.load(state_ptr + SLOPE * M + offs_m, mask=mask_m, other=0.0)
    # Of sums of its own row: with those of a fellow's it would lose digits.
    share = tl.exp2(logit - tl.load(state_ptr + SHIFT * M + offs_m, mask=mask_m, other=0.0))
    share = share / tl.load(state_ptr + TOTAL * M + offs_m, mask=mask_m, other=1.0) * slope
    total = tl.zeros((BLOCK_M,), tl.float32)
    before = tl.zeros((BLOCK_M,), tl.int32)  # those that share the target, of which the first speaks for all
    for k in range(tl.max(end - begin, 0).to(tl.int32)):
        j = begin + k
        fellow = _fellow(state_ptr, M, offs_m, j, end)
        shares = fellow & (tl.load(targets_ptr + j, mask=fellow, other=-1) == target)
        before += (shares & (j < offs_m)).to(tl.int32)
        entry = tl.load(state_ptr + ENTRY * M + j, mask=fellow, other=0.0)
        entry = tl.where(shares, entry / tl.load(state_ptr + TOTAL * M + j, mask=fellow, other=1.0), share)
        coefficient = tl.load(coefficients_ptr + j, mask=fellow, other=0.0)
        total += tl.where(fellow, coefficient * entry, 0.0)
    tl.store(out_ptr + offs_m, tl.where(before == 0, total, 0.0), mask=mask_m)


@triton.jit
def add_rows(
    values_ptr, coefficients_ptr, order_ptr, rows_ptr, ends_ptr, weight_ptr, stride_w, targets_ptr, of_targets_ptr,
    grad_ptr, D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad[row] += Σ coefficients[m] values[m] over the tokens m of a row, in their order; no atomics.

    order: the tokens sorted by row; rows: their rows; ends: where the run of each row ends. With a weight, and so much
    of the target's row of it.
    """
    i = tl.program_id(0)
    row = tl.load(rows_ptr + i)
    if tl.load(rows_ptr + i - 1, mask=i > 0, other=-1) == row:  # the run is done by its first token's program
        return
    offs_d = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_d = offs_d < D
    total = tl.load(grad_ptr + row * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    for j in range(i, tl.load(ends_ptr + i).to(tl.int32)):
        m = tl.load(order_ptr + j)
        values = tl.load(values_ptr + m * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        total += tl.load(coefficients_ptr + m) * values
        if weight_ptr is not None:
            weight_ptrs = weight_ptr + tl.load(targets_ptr + m) * stride_w + offs_d
            of_target = tl.load(weight_ptrs, mask=mask_d, other=0.0).to(tl.float32)
            total += tl.load(of_targets_ptr + m) * of_target
    tl.store(grad_ptr + row * D + offs_d, total.to(grad_ptr.dtype.element_ty), mask=mask_d)
