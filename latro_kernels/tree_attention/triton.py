"""Tree attention in Triton: what is allocated and launched, and its autograd. triton_kernels.py says how it works."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import triton
from torch import Tensor

from latro_kernels._autograd import refuse_forward_mode
from latro_kernels._gpu import on_device_of, tile_sizes
from latro_kernels._triton_math import LOG2E
from latro_kernels.tree import TILE, PrefixTree, TreeTiles
from latro_kernels.tree_attention import triton_kernels as kernels

OPERATOR = "latro_kernels::tree_attention_triton"
SUM_ROWS = 16  # rows of a part that one program sums


def _shape(q: Tensor, k: Tensor) -> dict[str, int]:
    """The constants that follow from the operands."""
    H, _, E = q.shape
    return {"G": H // len(k), "E": E, "BLOCK_E": max(16, triton.next_power_of_2(E)), "TILE": TILE}


def _blocks_of_rows(kernel: str, q: Tensor, G: int) -> tuple[dict[str, Any], int]:
    """The constants of a kernel that takes tiles of queries, and how many blocks a tile has."""
    blocks = tile_sizes(f"tree_attention.{kernel}", q.shape[2], q)
    if blocks["BLOCK_M"] > TILE * G:  # a tile would leave half of the rows empty
        blocks |= {"BLOCK_M": blocks["BLOCK_M"] // 2, "num_warps": max(4, blocks.get("num_warps", 4) // 2)}
    return blocks, triton.cdiv(TILE * G, blocks["BLOCK_M"])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: TreeTiles,
    reach: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """out [T, H, E], and stats [2, T, H] with p = power(s - stats[0]) * stats[1]; see `_scores` for the units."""
    window = _if_it_matters(window, reach)
    (q,), (k, v) = _laid_out(q), _laid_out(k, v)
    H, T, E = q.shape
    out = q.new_empty(T, H, E)
    stats = q.new_ones(2, T, H, dtype=torch.float32)
    shape = _shape(q, k)
    blocks, of_tile = _blocks_of_rows("forward", q, shape["G"])
    with on_device_of(q):
        kernels.forward[(len(tiles.query) * of_tile * len(k),)](
            *(q, k, v, out, stats),
            *(q.stride(0), q.stride(1), k.stride(0), k.stride(1)),
            *(tiles.query, tiles.offset, tiles.full, tiles.key, reach, positions, sinks),
            *(T, len(tiles.query), len(k), scale, softcap or 0.0, window or 0),
            **shape,
            HAS_SOFTCAP=softcap is not None,
            HAS_WINDOW=window is not None,
            HAS_SINKS=sinks is not None,
            **blocks,
        )
    return out, stats


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    tiles: TreeTiles,
    reach: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq [T, H, E], dk and dv [T, Hkv, E], and dsinks [H], empty without sinks."""
    window = _if_it_matters(window, reach)
    (q, do), (k, v) = _laid_out(q, do), _laid_out(k, v)
    H, T, E = q.shape
    dq, delta = q.new_empty(T, H, E), q.new_empty(T, H, dtype=torch.float32)
    dk, dv = (x.new_empty(T, len(k), E) for x in (k, v))
    parts = q.new_empty(2, len(tiles.parts), len(k), TILE, E, dtype=torch.float32)
    shape = _shape(q, k)
    options = {"HAS_SOFTCAP": softcap is not None, "HAS_WINDOW": window is not None}
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1))
    numbers = (len(k), scale, softcap or 0.0, window or 0)
    with on_device_of(q):
        blocks, of_tile = _blocks_of_rows("grad_queries", q, shape["G"])
        kernels.grad_queries[(len(tiles.query) * of_tile * len(k),)](
            *(q, k, v, out, stats, do, dq, delta),
            *strides,
            *(tiles.query, tiles.offset, tiles.full, tiles.key, reach, positions),
            *(T, len(tiles.query), *numbers),
            **shape,
            **options,
            **blocks,
        )
        kernels.grad_keys[(len(tiles.seen) * len(k),)](
            *(q, k, v, stats, do, delta, dk, dv, parts),
            *strides,
            *(tiles.seen, reach, positions),
            *(T, len(tiles.parts), *numbers),
            **shape,
            **options,
            **tile_sizes("tree_attention.grad_keys", E, q),
        )
        if len(tiles.parts):
            grid = len(tiles.parts), len(k) * TILE // SUM_ROWS
            kernels.sum_parts[grid](
                *(parts, dk, dv, tiles.parts, tiles.seen, len(tiles.parts), len(k)),
                **{name: shape[name] for name in ("E", "BLOCK_E", "TILE")},
                BLOCK_N=SUM_ROWS,
            )
    return dq, dk, dv, _grad_sinks(sinks, stats, delta, q.element_size() == 4)


def _if_it_matters(window: int | None, reach: Tensor) -> int | None:
    """A window that no path can be longer than would be looked at in vain."""
    return None if window is None or window >= len(reach) else window


def _laid_out(*tensors: Tensor) -> tuple[Tensor, ...]:
    """With one set of strides for all, so that one set of offsets serves them; copied where they differ.

    A model lays out k like v, and the gradient of out like q. Offsets between the heads of a block have 32 bits.
    """
    first = tensors[0]
    reach = len(first) * abs(first.stride(0))
    if all(x.stride() == first.stride() for x in tensors) and first.stride(2) == 1 and reach < 2**31:
        return tensors
    return tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors)


def _grad_sinks(sinks: Tensor | None, stats: Tensor, delta: Tensor, wide: bool) -> Tensor:
    """A sink's probability in each row times what the row's other scores lose to it."""
    if sinks is None:
        return delta.new_empty(0)
    m, rescale = stats
    p = (torch.exp(sinks - m) if wide else torch.exp2(sinks * LOG2E.value - m)) * rescale
    return -(p * delta).sum(0)


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: PrefixTree,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    refuse_forward_mode("tree_attention", "triton")
    sinks = None if sinks is None else sinks.float().contiguous()
    tiles = (getattr(tree.tiles, field.name) for field in fields(TreeTiles))
    out, _ = torch.ops.latro_kernels.tree_attention_triton(
        q, k, v, *tiles, tree.reach, tree.positions, sinks, scale, softcap, window
    )
    return out.transpose(0, 1)


OF_TREE = (
    "Tensor query, Tensor offset, Tensor key, Tensor full, Tensor seen, Tensor parts, Tensor reach, Tensor positions"
)
OPTIONS = "Tensor? sinks, float scale, float? softcap, int? window"
torch.library.define(OPERATOR, f"(Tensor q, Tensor k, Tensor v, {OF_TREE}, {OPTIONS}) -> (Tensor out, Tensor stats)")
torch.library.define(
    f"{OPERATOR}_backward",
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, {OF_TREE}, {OPTIONS}) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_sinks)",
)


@torch.library.impl(OPERATOR, ("CPU", "CUDA"))
def _run(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, TreeTiles(*rest[:6]), *rest[6:])


@torch.library.impl(f"{OPERATOR}_backward", ("CPU", "CUDA"))
def _run_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backward(do, q, k, v, out, stats, TreeTiles(*rest[:6]), *rest[6:])


@torch.library.register_fake(OPERATOR)
def _fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    H, T, E = q.shape
    return q.new_empty(T, H, E), q.new_empty(2, T, H, dtype=torch.float32)


@torch.library.register_fake(f"{OPERATOR}_backward")
def _fake_backward(do: Tensor, q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (H, T, E), sinks = q.shape, rest[-4]
    of_keys = (T, k.shape[0], E)
    of_sinks = q.new_empty(0 if sinks is None else H, dtype=torch.float32)
    return q.new_empty(T, H, E), q.new_empty(of_keys), q.new_empty(of_keys), of_sinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.options = inputs[:12], inputs[12:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _autograd_backward(ctx: Any, grad_out: Tensor, grad_stats: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, *of_tree, sinks, out, stats = ctx.saved_tensors
    *grads, grad_sinks = torch.ops.latro_kernels.tree_attention_triton_backward(
        grad_out.transpose(0, 1), q, k, v, out, stats, *of_tree, sinks, *ctx.options
    )
    of_operands = (grad.transpose(0, 1) for grad in grads)
    return *of_operands, *(None for _ in of_tree), None if sinks is None else grad_sinks, None, None, None


torch.library.register_autograd(OPERATOR, _autograd_backward, setup_context=_setup_context)
