"""The kernels of triton.py, which says what they compute and who calls them.

What is known of a scored token is float32 and lies in `state` [7, M]; see the rows below. A target's logit is taken
from the tile that its maximum is taken from, so that no log-prob exceeds 0.
M scored tokens, V entries of a strip of the vocabulary, D hidden.
"""

from __future__ import annotations

import triton
import triton.language as tl

from latro_kernels._triton_math import tanh

# Rows of state.
TEMPERATURE = tl.constexpr(0)
SHIFT = tl.constexpr(1)
SUM = tl.constexpr(2)  # of exp(logit - shift)
LOGIT = tl.constexpr(3)  # of the target
SLOPE = tl.constexpr(4)  # of the softcap there
ENTRY = tl.constexpr(5)  # what E would hold there, to float32's precision
FAR = tl.constexpr(6)  # 1 where the shift that E was made with was too far from the maximum
STATE_ROWS = 7

# How far a shift may be from the maximum. Within it E, the sum of E over 10⁶ entries, and a coefficient of 10⁻⁹ over
# that sum are normal numbers of bfloat16 and float32; what E rounds to zero is below e^-47 of the maximum.
MOST = tl.constexpr(40.0)

# Where the log-sum-exp is known before E is made, E = 2^14 p: far from float16's smallest number, and exact at p = 1.
HEADROOM = tl.constexpr(9.704060527839234)


@triton.jit
def _logits(products, temperature, logit_scale, softcap):
    """softcap(logit_scale * products) / temperature"""
    if softcap is None:
        logits = products * (logit_scale / temperature)
    else:
        logits = tanh(products * (logit_scale / softcap)) * (softcap / temperature)
    return logits


@triton.jit
def _with_slope(exponentials, products, logit_scale, softcap):
    """Times the slope of the softcap, 1 - tanh², but without its cancellation where the logit is near the cap."""
    if softcap is not None:
        decay = tl.exp(-2 * tl.abs(products * (logit_scale / softcap)))
        exponentials *= 4 * decay / ((1 + decay) * (1 + decay))
    return exponentials


@triton.jit
def _expm1(x):
    """For x <= 0: a polynomial where exp(x) - 1 would cancel."""
    series = 1 + x / 7
    series = 1 + x / 6 * series
    series = 1 + x / 5 * series
    series = 1 + x / 4 * series
    series = 1 + x / 3 * series
    series = 1 + x / 2 * series
    return tl.where(x > -0.25, x * series, tl.exp(x) - 1)


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
    products, offs_m, mask_m, offs_v, tile,
    state_ptr, targets_ptr, bias_ptr, exponentials_ptr, stride_e, partials_ptr, tiles, first_v, M, V,
    logit_scale, softcap,
):  # fmt: skip
    """What is made of a tile of products: E, and where there are partials, statistics and the target's logit."""
    mask_v = offs_v < V
    if bias_ptr is not None:
        products += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    temperature = tl.load(state_ptr + TEMPERATURE * M + offs_m, mask=mask_m, other=1.0)
    logits = _logits(products, temperature[:, None], logit_scale, softcap)
    target = (tl.load(targets_ptr + offs_m, mask=mask_m, other=-1) - first_v).to(tl.int32)
    is_target = target[:, None] == offs_v[None, :]
    shift = tl.load(state_ptr + SHIFT * M + offs_m, mask=mask_m, other=0.0)
    if partials_ptr is not None:
        counted = tl.where(mask_v[None, :], logits, -float("inf"))
        highest = tl.max(counted, 1)
        centred = counted - tl.where(highest == -float("inf"), 0.0, highest)[:, None]
        exponentials = tl.exp(centred)
        moments = tl.where(exponentials > 0, exponentials * centred, 0.0)  # an impossible entry has none, not 0 · -inf
        partials_ptrs = partials_ptr + tile.to(tl.int64) * M + offs_m
        step = tiles.to(tl.int64) * M
        tl.store(partials_ptrs, highest, mask=mask_m)
        tl.store(partials_ptrs + step, tl.sum(exponentials, 1), mask=mask_m)
        tl.store(partials_ptrs + 2 * step, tl.sum(moments, 1), mask=mask_m)
        here = mask_m & (tl.max(is_target.to(tl.int32), 1) > 0)
        tl.store(state_ptr + LOGIT * M + offs_m, tl.sum(tl.where(is_target, logits, 0.0), 1), mask=here)
        slope = tl.sum(_with_slope(tl.where(is_target, 1.0, 0.0), products, logit_scale, softcap), 1)
        tl.store(state_ptr + SLOPE * M + offs_m, slope, mask=here)
    if exponentials_ptr is not None:
        exponentials = _with_slope(tl.exp(logits - shift[:, None]), products, logit_scale, softcap)
        exponentials = tl.where(is_target, 0.0, exponentials).to(exponentials_ptr.dtype.element_ty)
        pointers = exponentials_ptr + offs_m.to(tl.int64)[:, None] * stride_e + offs_v[None, :]
        tl.store(pointers, exponentials, mask=mask_m[:, None] & mask_v[None, :])


@triton.jit(do_not_specialize=["first_tile", "tiles", "first_v", "M", "V"])
def epilogue(
    products_ptr, stride_p, first_tile,
    state_ptr, targets_ptr, bias_ptr, exponentials_ptr, stride_e, partials_ptr, tiles, first_v, M, V,
    logit_scale, softcap,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Of products that a vendor's kernel has made."""
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    pointers = products_ptr + offs_m.to(tl.int64)[:, None] * stride_p + offs_v[None, :]
    products = tl.load(pointers, mask=mask_m[:, None] & (offs_v < V)[None, :], other=0.0)
    _finish(
        products, offs_m, mask_m, offs_v, first_tile + tl.program_id(0),
        state_ptr, targets_ptr, bias_ptr, exponentials_ptr, stride_e, partials_ptr, tiles, first_v, M, V,
        logit_scale, softcap,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_tile", "tiles", "first_v", "M", "V"])
def product_and_epilogue(
    hidden_ptr, weight_ptr, stride_w, first_tile,
    state_ptr, targets_ptr, bias_ptr, exponentials_ptr, stride_e, partials_ptr, tiles, first_v, M, V,
    logit_scale, softcap,
    D: tl.constexpr, ONLY_FAR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Products that are never written. ONLY_FAR: of the tokens whose shift was too far off, seldom any."""
    # GROUP_M blocks of tokens stay in the L2 cache while the vocabulary streams by.
    blocks_v = tl.cdiv(V, BLOCK_V)
    group = tl.program_id(0) // (GROUP_M * blocks_v)
    rows = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * blocks_v)
    tile = within // rows
    offs_m = (group * GROUP_M + within % rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_m = offs_m < M
    if ONLY_FAR:
        mask_m = tl.load(state_ptr + FAR * M + offs_m, mask=mask_m, other=0.0) > 0
        if tl.max(mask_m.to(tl.int32), 0) == 0:
            return
    products = _product(hidden_ptr, weight_ptr, stride_w, offs_m, M, offs_v, V, D, BLOCK_M, BLOCK_V, BLOCK_K)
    _finish(
        products, offs_m, mask_m, offs_v, first_tile + tile,
        state_ptr, targets_ptr, bias_ptr, exponentials_ptr, stride_e, partials_ptr, tiles, first_v, M, V,
        logit_scale, softcap,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def guess_shift(
    hidden_ptr, weight_ptr, stride_w, bias_ptr, targets_ptr, state_ptr, M, logit_scale, softcap,
    D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The logit of the target: likely not far from the maximum."""
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
    logit = _logits(product, tl.load(state_ptr + TEMPERATURE * M + m), logit_scale, softcap)
    finite = tl.abs(logit) < float("inf")
    tl.store(state_ptr + SHIFT * M + m, tl.where(finite, logit, 0.0))


@triton.jit(do_not_specialize=["tiles", "M"])
def combine(
    partials_ptr, tiles, state_ptr, logps_ptr, entropy_ptr, M,
    GUESSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Log-prob and entropy from the tiles' statistics, and the shift that E has from now on.

    GUESSED: E was made with a guess for a shift, which stands where it is near enough.
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
    total = tl.zeros((BLOCK_M,), tl.float32)
    moment = tl.zeros((BLOCK_M,), tl.float32)
    pointers = first_ptrs
    for first in range(0, tiles, BLOCK_TILES):
        mask = (offs_t < tiles - first)[:, None] & mask_m[None, :]
        maxima = tl.load(pointers, mask=mask, other=-float("inf"))
        sums = tl.load(pointers + step, mask=mask, other=0.0)
        moments = tl.load(pointers + 2 * step, mask=mask, other=0.0)
        # Bounded, so that it is no infinity that a weight of 0 would make a NaN of.
        lower = tl.where(maxima > -float("inf"), tl.maximum(maxima - highest[None, :], -200.0), 0.0)
        weight = tl.exp(lower)
        total += tl.sum(weight * sums, 0)
        moment += tl.sum(weight * (moments + lower * sums), 0)
        pointers += BLOCK_TILES * M
    logit = tl.load(state_ptr + LOGIT * M + offs_m, mask=mask_m, other=0.0)
    log_total = tl.log(total)
    logp = (logit - highest) - log_total
    tl.store(logps_ptr + offs_m, logp, mask=mask_m)
    tl.store(entropy_ptr + offs_m, log_total - moment / total, mask=mask_m)
    if GUESSED:
        guess = tl.load(state_ptr + SHIFT * M + offs_m, mask=mask_m, other=0.0)
        far = tl.abs(highest - guess) > MOST
        shift = tl.where(far, highest, guess)
        tl.store(state_ptr + FAR * M + offs_m, far.to(tl.float32), mask=mask_m)
    else:
        shift = highest + log_total - HEADROOM
    total *= tl.exp(highest - shift)
    entry = total * _expm1(logp) * tl.load(state_ptr + SLOPE * M + offs_m, mask=mask_m, other=0.0)
    tl.store(state_ptr + SHIFT * M + offs_m, shift, mask=mask_m)
    tl.store(state_ptr + SUM * M + offs_m, total, mask=mask_m)
    tl.store(state_ptr + ENTRY * M + offs_m, entry, mask=mask_m)


@triton.jit(do_not_specialize=["M", "V"])
def unit_grad_of_far(
    hidden_ptr, weight_ptr, stride_w, bias_ptr, targets_ptr, state_ptr, M, logit_scale, softcap, unit_ptr, V,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_K columns of E W again, of the tokens whose shift was too far off, seldom any."""
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = tl.load(state_ptr + FAR * M + offs_m, mask=offs_m < M, other=0.0) > 0
    if tl.max(mask_m.to(tl.int32), 0) == 0:
        return
    temperature = tl.load(state_ptr + TEMPERATURE * M + offs_m, mask=mask_m, other=1.0)
    shift = tl.load(state_ptr + SHIFT * M + offs_m, mask=mask_m, other=0.0)
    target = tl.load(targets_ptr + offs_m, mask=mask_m, other=-1).to(tl.int32)
    offs_d = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for v in range(0, V, BLOCK_V):
        offs_v = v + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        products = _product(hidden_ptr, weight_ptr, stride_w, offs_m, M, offs_v, V, D, BLOCK_M, BLOCK_V, BLOCK_K)
        if bias_ptr is not None:
            products += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)[None, :]
        logits = _logits(products, temperature[:, None], logit_scale, softcap)
        others = mask_v[None, :] & (target[:, None] != offs_v[None, :])
        exponentials = _with_slope(tl.exp(logits - shift[:, None]), products, logit_scale, softcap)
        exponentials = tl.where(others, exponentials, 0.0)
        pointers = weight_ptr + offs_v.to(tl.int64)[:, None] * stride_w + offs_d[None, :]
        weight = tl.load(pointers, mask=mask_v[:, None] & (offs_d < D)[None, :], other=0.0)
        total = tl.dot(exponentials.to(weight.dtype), weight, total, input_precision="ieee")
    pointers = unit_ptr + offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
    tl.store(pointers, total, mask=mask_m[:, None] & (offs_d < D)[None, :])


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


@triton.jit(do_not_specialize=["M"])
def add_rows(
    values_ptr, coefficients_ptr, order_ptr, rows_ptr, ends_ptr, weight_ptr, stride_w, targets_ptr, state_ptr,
    grad_ptr, M, D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad[row] += Σ coefficients[m] values[m] over the tokens m of a row, in their order; no atomics.

    order: the tokens sorted by row; rows: their rows; ends: where the run of each row ends. With a weight, the target's
    term of E W is added to the values.
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
        if weight_ptr is not None:
            weight_ptrs = weight_ptr + tl.load(targets_ptr + m) * stride_w + offs_d
            values += tl.load(state_ptr + ENTRY * M + m) * tl.load(weight_ptrs, mask=mask_d, other=0.0).to(tl.float32)
        total += tl.load(coefficients_ptr + m) * values
    tl.store(grad_ptr + row * D + offs_d, total.to(grad_ptr.dtype.element_ty), mask=mask_d)
