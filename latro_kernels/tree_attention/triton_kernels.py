"""Tree attention in Triton, driven by the work lists of `TreeTiles`.

    s[h, i, j] = softcap(scale q[h, i] · k[h // G, j])       j visible to i: j <= i < reach[j], inside the window
    p = exp(s - m) / l,  out = p v                           m, l: maximum and sum of a row, with sinks[h] as one more s
    dp = do vᵀ,  δ[h, i] = do[h, i] · out[h, i],  ds = p (dp - δ) (1 - tanh²),  dq = scale ds k
    dv = pᵀ do,  dk = scale dsᵀ q                            summed over the G query heads of a key head

Forward and dq take a tile of queries, at most 64 tokens of one path, with all G heads of a key head as the rows of
blocks (r = G token + head), so that a short branch fills the tensor cores, and walk the list of key tiles that it sees:

            prompt     z_1      z_2                 # every query sees every key: no mask
    z_2   [ #  #  # ][       ][ #  \\ ]              \\ mixed: j <= i < reach[j] is looked at
                      skipped: not in the list

dk and dv take a tile of keys and walk the rows that see it. Those are its descendants, contiguous in the row whatever
the tree, so branches follow each other without padding; that they end is only looked at past the last query that sees
the whole tile. A tile that many see is shared by programs that each write a float32 part; parts are summed in order.
No atomics: the same bits every time.

Memory traffic, in rows of E numbers; n(i) key tiles are seen by query tile i, m(j) tokens see key tile j:
    forward      per query tile and key head: 64 G of q once; 128 n(i) of k and v for each of its 64 G / BLOCK_M blocks,
                 from the L2 cache; writes 64 G of out, and a number or two for each row
    dq           the same with do and out beside q; in 32 bits k and v twice; writes dq, and δ for each row
    dk, dv       per key tile and key head: 128 of k and v once; 2 G m(j) of q and do, with m and δ, from the L2 cache;
                 writes 128 of dk and dv, or of float32 parts where programs share the tile, which are read again once
Scores are never stored, keys never repeated. dq and dk, dv both make p and dp: seven products where five would do with
atomics or with dq's parts in memory. δ is taken from out as it was rounded, as FlashAttention does: where all v have
much in common, 16 bits feel it. In 32 bits it is summed over p dp, for two products more.

Sizes: T tokens, H query heads over Hkv key heads of size E, G = H / Hkv, Q query tiles, W parts of key tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from latro_kernels._triton_math import LOG2E, exp, tanh


@triton.constexpr_function
def _is_wide(ptr):
    """Whether operands have 32 bits, so that the last of them count."""
    return ptr.dtype.element_ty.primitive_bitwidth == 32


@triton.jit
def _scores(dots, scale, softcap, HAS_SOFTCAP: tl.constexpr, WIDE: tl.constexpr):
    """Scores, in 16 bits in units of log 2 as exp2 takes them, and what the softcap leaves of their derivative."""
    UNIT: tl.constexpr = 1.0 if WIDE else LOG2E
    if HAS_SOFTCAP:
        capped = tanh(dots * (scale / softcap))
        return capped * softcap * UNIT, 1 - capped * capped
    else:  # noqa: RET505 - of an `if` on a constant, Triton leaves out what has an else
        return dots * (scale * UNIT), 1.0


@triton.jit
def _power(score, WIDE: tl.constexpr):
    return exp(score) if WIDE else tl.exp2(score)


@triton.jit
def _mask(mask_rows, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Of rows alone where that is enough: columns in the mask would cost 16-byte accesses."""
    return mask_rows[:, None] if E == BLOCK_E else mask_rows[:, None] & (tl.arange(0, BLOCK_E) < E)[None, :]


@triton.jit
def _load(rows_ptr, rows, mask_rows, E: tl.constexpr, BLOCK_E: tl.constexpr, MASKED: tl.constexpr):
    """Rows of E numbers at offsets `rows`, zeros past E and where they are masked."""
    offs_e = tl.arange(0, BLOCK_E)
    pointers = rows_ptr + rows[:, None] + offs_e[None, :]
    if MASKED:
        return tl.load(pointers, mask=_mask(mask_rows, E, BLOCK_E), other=0.0)
    if E < BLOCK_E:
        return tl.load(pointers, mask=(offs_e < E)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _store(rows_ptr, rows, values, mask_rows, E: tl.constexpr, BLOCK_E: tl.constexpr):
    pointers = rows_ptr + rows[:, None] + tl.arange(0, BLOCK_E)[None, :]
    tl.store(pointers, values.to(rows_ptr.dtype.element_ty), mask=_mask(mask_rows, E, BLOCK_E))


@triton.jit
def _visible(token, position, key, reach, key_position, window, MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The pairs of token and key that attend, broadcast against each other; `reach` is 0 where there is no key."""
    if HAS_WINDOW:
        near = position - key_position < window
        return near & (key <= token) & (token < reach) if MASKED else near
    return (key <= token) & (token < reach)


@triton.jit
def _load_stats(stats_ptr, rows, valid, T, heads, WIDE: tl.constexpr):
    """What p = power(s - m) * rescale takes. In 16 bits m has it all: the rounding of one number is nothing there."""
    m = tl.load(stats_ptr + rows, mask=valid, other=0.0)
    return m, tl.load(_row(stats_ptr, T, heads) + rows, mask=valid, other=0.0) if WIDE else 1.0


@triton.jit
def _query_rows(begin, end, first, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of rows r = G token + head from `first` on: the first token, tokens from there on, heads, and which there are."""
    start = begin + first // G
    row = first % G + tl.arange(0, BLOCK_M)
    token = row // G
    return start, token, row % G, start + token < end


@triton.jit
def _row(ptr, row, stride):
    """Moves the pointer by what 32 bits may not hold, so that offsets within a block stay short."""
    return ptr + row.to(tl.int64) * stride


@triton.jit
def _query_block(tiles_ptr, tiles, key_heads, G: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr):
    """Which tile, key head and rows a program has. The last tiles see the most keys and come first."""
    BLOCKS: tl.constexpr = (TILE * G + BLOCK_M - 1) // BLOCK_M
    key_head = tl.program_id(0) % key_heads
    block = tl.program_id(0) // key_heads
    tile = tiles - 1 - block // BLOCKS
    begin = tl.load(tiles_ptr + 2 * tile)
    end = tl.load(tiles_ptr + 2 * tile + 1)
    return tile, key_head, begin, end, block % BLOCKS * BLOCK_M


@triton.jit
def _skip_far_keys(key_ptr, positions_ptr, low, high, position, window):
    """The first of key[low:high], in the order of their path, of which the query at `position` sees the last key."""
    while low < high:
        middle = (low + high) // 2
        last = tl.load(key_ptr + 2 * middle + 1) - 1
        far = position - tl.load(positions_ptr + last).to(tl.int32) >= window
        low = tl.where(far, middle + 1, low)
        high = tl.where(far, high, middle)
    return low


@triton.jit
def _attend(
    acc, m, l, q, token, position, k_ptr, v_ptr, stride_kt,
    key_ptr, low, high, reach_ptr, positions_ptr, scale, softcap, window,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Online softmax of a block of queries over key[low:high]."""
    WIDE: tl.constexpr = _is_wide(k_ptr)
    offs_n = tl.arange(0, BLOCK_N)
    for n in range(low, high):
        begin = tl.load(key_ptr + 2 * n)
        there = begin + offs_n < tl.load(key_ptr + 2 * n + 1) if MASKED else None
        k = _load(_row(k_ptr, begin, stride_kt), offs_n * stride_kt, there, E, BLOCK_E, MASKED)
        s, _ = _scores(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, HAS_SOFTCAP, WIDE)
        if MASKED or HAS_WINDOW:
            reach = tl.load(reach_ptr + begin + offs_n, mask=there, other=0).to(tl.int32)[None, :] if MASKED else 0
            key_position = (tl.load(positions_ptr + begin).to(tl.int32) + offs_n)[None, :] if HAS_WINDOW else 0
            key = (begin + offs_n)[None, :]
            seen = _visible(token[:, None], position[:, None], key, reach, key_position, window, MASKED, HAS_WINDOW)
            s = tl.where(seen, s, -float("inf"))
        m_next = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(m_next == -float("inf"), 0.0, m_next) if MASKED or HAS_WINDOW else m_next
        p = _power(s - shift[:, None], WIDE)
        decay = _power(m - shift, WIDE)
        l = l * decay + tl.sum(p, 1)
        v = _load(_row(v_ptr, begin, stride_kt), offs_n * stride_kt, there, E, BLOCK_E, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        m = m_next
    return acc, m, l


@triton.jit(do_not_specialize=["T", "tiles", "window"])
def forward(
    q_ptr, k_ptr, v_ptr, out_ptr, stats_ptr,
    stride_qh, stride_qt, stride_kh, stride_kt,
    tiles_ptr, offset_ptr, full_ptr, key_ptr, reach_ptr, positions_ptr, sinks_ptr,
    T, tiles, key_heads, scale, softcap, window,
    G: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    tile, key_head, begin, end, first = _query_block(tiles_ptr, tiles, key_heads, G, BLOCK_M, TILE)
    if first >= (end - begin) * G:
        return
    begin, step, head, valid = _query_rows(begin, end, first, G, BLOCK_M)
    token = begin + step
    q_ptr = _row(_row(q_ptr, key_head * G, stride_qh), begin, stride_qt)
    q = _load(q_ptr, step * stride_qt + head * stride_qh, valid, E, BLOCK_E, True)
    k_ptr = _row(k_ptr, key_head, stride_kh)
    v_ptr = _row(v_ptr, key_head, stride_kh)
    low = tl.load(offset_ptr + tile)
    middle = tl.load(full_ptr + tile)
    high = tl.load(offset_ptr + tile + 1)
    position = token
    if HAS_WINDOW:
        position = tl.load(positions_ptr + token, mask=valid, other=0).to(tl.int32)
        nearest = tl.load(positions_ptr + begin).to(tl.int32)
        low = _skip_far_keys(key_ptr, positions_ptr, low, middle, nearest, window)

    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        m = tl.load(sinks_ptr + key_head * G + head, mask=valid, other=0.0) * (1.0 if _is_wide(q_ptr) else LOG2E)
        l += 1
    acc, m, l = _attend(
        acc, m, l, q, token, position, k_ptr, v_ptr, stride_kt,
        key_ptr, low, middle, reach_ptr, positions_ptr, scale, softcap, window,
        E, BLOCK_E, TILE, False, HAS_SOFTCAP, HAS_WINDOW,
    )  # fmt: skip
    acc, m, l = _attend(
        acc, m, l, q, token, position, k_ptr, v_ptr, stride_kt,
        key_ptr, middle, high, reach_ptr, positions_ptr, scale, softcap, window,
        E, BLOCK_E, TILE, True, HAS_SOFTCAP, HAS_WINDOW,
    )  # fmt: skip

    l = tl.where(valid, l, 1.0)
    heads = key_heads * G
    row = step * heads + head
    _store(_row(out_ptr, begin * heads + key_head * G, E), row * E, acc / l[:, None], valid, E, BLOCK_E)
    stats_ptr = _row(stats_ptr, begin, heads) + key_head * G
    if _is_wide(q_ptr):
        tl.store(stats_ptr + row, m, mask=valid)
        tl.store(_row(stats_ptr, T, heads) + row, 1 / l, mask=valid)
    else:
        tl.store(stats_ptr + row, m + tl.log2(l), mask=valid)


@triton.jit
def _pairs(
    n, q, do, m, rescale, token, position, k_ptr, v_ptr, stride_kt,
    key_ptr, reach_ptr, positions_ptr, scale, softcap, window,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """p and dp of a block of queries and key[n], what the softcap leaves of their product, and k."""
    WIDE: tl.constexpr = _is_wide(k_ptr)
    offs_n = tl.arange(0, BLOCK_N)
    begin = tl.load(key_ptr + 2 * n)
    there = begin + offs_n < tl.load(key_ptr + 2 * n + 1) if MASKED else None
    k = _load(_row(k_ptr, begin, stride_kt), offs_n * stride_kt, there, E, BLOCK_E, MASKED)
    v = _load(_row(v_ptr, begin, stride_kt), offs_n * stride_kt, there, E, BLOCK_E, MASKED)
    s, slope = _scores(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, HAS_SOFTCAP, WIDE)
    p = _power(s - m[:, None], WIDE)
    if WIDE:
        p *= rescale[:, None]
    if MASKED or HAS_WINDOW:
        reach = tl.load(reach_ptr + begin + offs_n, mask=there, other=0).to(tl.int32)[None, :] if MASKED else 0
        key_position = (tl.load(positions_ptr + begin).to(tl.int32) + offs_n)[None, :] if HAS_WINDOW else 0
        key = (begin + offs_n)[None, :]
        seen = _visible(token[:, None], position[:, None], key, reach, key_position, window, MASKED, HAS_WINDOW)
        p = tl.where(seen, p, 0.0)
    return p, tl.dot(do, tl.trans(v), input_precision="ieee"), slope, k


@triton.jit
def _add_delta(
    delta, q, do, m, rescale, token, position, k_ptr, v_ptr, stride_kt,
    key_ptr, low, high, reach_ptr, positions_ptr, scale, softcap, window,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """delta += sum of p dp over key[low:high]."""
    for n in range(low, high):
        p, dp, _, _ = _pairs(
            n, q, do, m, rescale, token, position, k_ptr, v_ptr, stride_kt,
            key_ptr, reach_ptr, positions_ptr, scale, softcap, window,
            E, BLOCK_E, BLOCK_N, MASKED, HAS_SOFTCAP, HAS_WINDOW,
        )  # fmt: skip
        delta += tl.sum(p * dp, 1)
    return delta


@triton.jit
def _add_grad_queries(
    dq, q, do, m, rescale, delta, token, position, k_ptr, v_ptr, stride_kt,
    key_ptr, low, high, reach_ptr, positions_ptr, scale, softcap, window,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """dq += ds k over key[low:high]."""
    for n in range(low, high):
        p, dp, slope, k = _pairs(
            n, q, do, m, rescale, token, position, k_ptr, v_ptr, stride_kt,
            key_ptr, reach_ptr, positions_ptr, scale, softcap, window,
            E, BLOCK_E, BLOCK_N, MASKED, HAS_SOFTCAP, HAS_WINDOW,
        )  # fmt: skip
        ds = p * (dp - delta[:, None])
        if HAS_SOFTCAP:
            ds *= slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["T", "tiles", "window"])
def grad_queries(
    q_ptr, k_ptr, v_ptr, out_ptr, stats_ptr, do_ptr, dq_ptr, delta_ptr,
    stride_qh, stride_qt, stride_kh, stride_kt,
    tiles_ptr, offset_ptr, full_ptr, key_ptr, reach_ptr, positions_ptr,
    T, tiles, key_heads, scale, softcap, window,
    G: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    tile, key_head, begin, end, first = _query_block(tiles_ptr, tiles, key_heads, G, BLOCK_M, TILE)
    if first >= (end - begin) * G:
        return
    begin, step, head, valid = _query_rows(begin, end, first, G, BLOCK_M)
    token = begin + step
    heads = key_heads * G
    row = step * heads + head
    first_row = begin * heads + key_head * G
    q_ptr = _row(_row(q_ptr, key_head * G, stride_qh), begin, stride_qt)
    q = _load(q_ptr, step * stride_qt + head * stride_qh, valid, E, BLOCK_E, True)
    do_ptr = _row(_row(do_ptr, key_head * G, stride_qh), begin, stride_qt)
    do = _load(do_ptr, step * stride_qt + head * stride_qh, valid, E, BLOCK_E, True)
    m, rescale = _load_stats(stats_ptr + first_row, row, valid, T, heads, _is_wide(q_ptr))

    k_ptr = _row(k_ptr, key_head, stride_kh)
    v_ptr = _row(v_ptr, key_head, stride_kh)
    low = tl.load(offset_ptr + tile)
    middle = tl.load(full_ptr + tile)
    high = tl.load(offset_ptr + tile + 1)
    position = token
    if HAS_WINDOW:
        position = tl.load(positions_ptr + token, mask=valid, other=0).to(tl.int32)
        nearest = tl.load(positions_ptr + begin).to(tl.int32)
        low = _skip_far_keys(key_ptr, positions_ptr, low, middle, nearest, window)

    # In 32 bits, from the same p and dp as ds: where p is almost 1 the rest cancels.
    if _is_wide(q_ptr):
        delta = tl.zeros([BLOCK_M], tl.float32)
        delta = _add_delta(
            delta, q, do, m, rescale, token, position, k_ptr, v_ptr, stride_kt,
            key_ptr, low, middle, reach_ptr, positions_ptr, scale, softcap, window,
            E, BLOCK_E, TILE, False, HAS_SOFTCAP, HAS_WINDOW,
        )  # fmt: skip
        delta = _add_delta(
            delta, q, do, m, rescale, token, position, k_ptr, v_ptr, stride_kt,
            key_ptr, middle, high, reach_ptr, positions_ptr, scale, softcap, window,
            E, BLOCK_E, TILE, True, HAS_SOFTCAP, HAS_WINDOW,
        )  # fmt: skip
    else:
        out = _load(_row(out_ptr, first_row, E), row * E, valid, E, BLOCK_E, True)
        delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + first_row + row, delta, mask=valid)

    dq = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    dq = _add_grad_queries(
        dq, q, do, m, rescale, delta, token, position, k_ptr, v_ptr, stride_kt,
        key_ptr, low, middle, reach_ptr, positions_ptr, scale, softcap, window,
        E, BLOCK_E, TILE, False, HAS_SOFTCAP, HAS_WINDOW,
    )  # fmt: skip
    dq = _add_grad_queries(
        dq, q, do, m, rescale, delta, token, position, k_ptr, v_ptr, stride_kt,
        key_ptr, middle, high, reach_ptr, positions_ptr, scale, softcap, window,
        E, BLOCK_E, TILE, True, HAS_SOFTCAP, HAS_WINDOW,
    )  # fmt: skip
    _store(_row(dq_ptr, first_row, E), row * E, dq * scale, valid, E, BLOCK_E)


@triton.jit
def _add_grad_keys(
    dk, dv, k, v, key, reach, key_position, q_ptr, do_ptr, stats_ptr, delta_ptr,
    stride_qh, stride_qt, positions_ptr, T, key_heads,
    low, middle, resume, high, scale, softcap, window,
    G: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """dk += dsᵀ q and dv += pᵀ do over the queries [low, middle) and [resume, high)."""
    WIDE: tl.constexpr = _is_wide(q_ptr)
    before = tl.cdiv(tl.maximum(middle - low, 0) * G, BLOCK_M)
    steps = before + tl.cdiv(tl.maximum(high - resume, 0) * G, BLOCK_M)
    heads = key_heads * G
    for n in range(steps):
        first = tl.where(n < before, n, n - before) * BLOCK_M
        end = tl.where(n < before, middle, high)
        begin, step, head, valid = _query_rows(tl.where(n < before, low, resume), end, first, G, BLOCK_M)
        token = begin + step
        position = token
        near = True
        if HAS_WINDOW:
            position = tl.load(positions_ptr + token, mask=valid, other=2147483647).to(tl.int32)
            near = tl.min(position) - tl.max(key_position) < window
        if near:
            rows = step * stride_qt + head * stride_qh
            q = _load(_row(q_ptr, begin, stride_qt), rows, valid, E, BLOCK_E, True)
            stats = step * heads + head
            m, rescale = _load_stats(_row(stats_ptr, begin, heads), stats, valid, T, heads, WIDE)
            # In 32 bits the same sums as the forward's: a row of peaked scores would feel their last bit.
            dots = tl.trans(tl.dot(q, tl.trans(k), input_precision="ieee")) if WIDE else tl.dot(k, tl.trans(q))
            s, slope = _scores(dots, scale, softcap, HAS_SOFTCAP, WIDE)
            p = _power(s - m[None, :], WIDE)
            if WIDE:
                p *= rescale[None, :]
            if MASKED or HAS_WINDOW:
                seen = _visible(
                    token[None, :], position[None, :], key[:, None], reach[:, None], key_position[:, None], window,
                    MASKED, HAS_WINDOW,
                )  # fmt: skip
                p = tl.where(seen, p, 0.0)
            do = _load(_row(do_ptr, begin, stride_qt), rows, valid, E, BLOCK_E, True)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            delta = tl.load(_row(delta_ptr, begin, heads) + stats, mask=valid, other=0.0)
            ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
            if HAS_SOFTCAP:
                ds *= slope
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["T", "parts", "window"])
def grad_keys(
    q_ptr, k_ptr, v_ptr, stats_ptr, do_ptr, delta_ptr, dk_ptr, dv_ptr, parts_ptr,
    stride_qh, stride_qt, stride_kh, stride_kt,
    seen_ptr, reach_ptr, positions_ptr,
    T, parts, key_heads, scale, softcap, window,
    G: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    key_head = tl.program_id(0) % key_heads
    part = tl.program_id(0) // key_heads
    begin = tl.load(seen_ptr + 5 * part)
    end = tl.load(seen_ptr + 5 * part + 1)
    full = tl.load(seen_ptr + 5 * part + 2)
    low = tl.load(seen_ptr + 5 * part + 3)
    high = tl.load(seen_ptr + 5 * part + 4)

    offs_n = tl.arange(0, TILE)
    key = begin + offs_n
    there = key < end
    k = _load(_row(_row(k_ptr, key_head, stride_kh), begin, stride_kt), offs_n * stride_kt, there, E, BLOCK_E, True)
    v = _load(_row(_row(v_ptr, key_head, stride_kh), begin, stride_kt), offs_n * stride_kt, there, E, BLOCK_E, True)
    reach = tl.load(reach_ptr + key, mask=there, other=0).to(tl.int32)
    key_position = key
    if HAS_WINDOW:
        key_position = tl.load(positions_ptr + begin).to(tl.int32) + offs_n

    q_ptr = _row(q_ptr, key_head * G, stride_qh)
    do_ptr = _row(do_ptr, key_head * G, stride_qh)
    stats_ptr += key_head * G
    delta_ptr += key_head * G
    dk = tl.zeros([TILE, BLOCK_E], tl.float32)
    dv = tl.zeros([TILE, BLOCK_E], tl.float32)
    first_full = tl.maximum(low, end)
    last_full = tl.minimum(high, full)
    dk, dv = _add_grad_keys(
        dk, dv, k, v, key, reach, key_position, q_ptr, do_ptr, stats_ptr, delta_ptr,
        stride_qh, stride_qt, positions_ptr, T, key_heads,
        first_full, last_full, high, high, scale, softcap, window,
        G, E, BLOCK_E, BLOCK_M, False, HAS_SOFTCAP, HAS_WINDOW,
    )  # fmt: skip
    dk, dv = _add_grad_keys(
        dk, dv, k, v, key, reach, key_position, q_ptr, do_ptr, stats_ptr, delta_ptr,
        stride_qh, stride_qt, positions_ptr, T, key_heads,
        low, tl.minimum(high, end), tl.maximum(low, full), high, scale, softcap, window,
        G, E, BLOCK_E, BLOCK_M, True, HAS_SOFTCAP, HAS_WINDOW,
    )  # fmt: skip

    dk *= scale
    if part < parts:
        parts_ptr = _row(parts_ptr, part * key_heads + key_head, TILE * E)
        _store(parts_ptr, offs_n * E, dk, there, E, BLOCK_E)
        _store(_row(parts_ptr, parts * key_heads, TILE * E), offs_n * E, dv, there, E, BLOCK_E)
    else:
        rows = offs_n * key_heads * E
        _store(_row(dk_ptr, begin * key_heads + key_head, E), rows, dk, there, E, BLOCK_E)
        _store(_row(dv_ptr, begin * key_heads + key_head, E), rows, dv, there, E, BLOCK_E)


@triton.jit(do_not_specialize=["parts"])
def sum_parts(
    parts_ptr, dk_ptr, dv_ptr, of_parts_ptr, seen_ptr, parts, key_heads,
    E: tl.constexpr, BLOCK_E: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The first part of each tile sums all of them, in order."""
    part = tl.program_id(0)
    first = tl.load(of_parts_ptr + 2 * part)
    if first != part:
        return
    last = tl.load(of_parts_ptr + 2 * part + 1)
    begin = tl.load(seen_ptr + 5 * part)
    end = tl.load(seen_ptr + 5 * part + 1)
    key_head = tl.program_id(1) // (TILE // BLOCK_N)
    offs_n = tl.program_id(1) % (TILE // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = begin + offs_n < end
    dk = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for n in range(first, last):
        part_ptr = _row(parts_ptr, n * key_heads + key_head, TILE * E)
        dk += _load(part_ptr, offs_n * E, there, E, BLOCK_E, True)
        dv += _load(_row(part_ptr, parts * key_heads, TILE * E), offs_n * E, there, E, BLOCK_E, True)
    rows = offs_n * key_heads * E
    _store(_row(dk_ptr, begin * key_heads + key_head, E), rows, dk, there, E, BLOCK_E)
    _store(_row(dv_ptr, begin * key_heads + key_head, E), rows, dv, there, E, BLOCK_E)
