"""Tree attention in C++: csrc/tree_attention. Tiles of the tree, scores never stored whole, sums in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latro_kernels import _native
from latro_kernels._autograd import refuse_forward_mode
from latro_kernels.tree import PrefixTree

OPERATOR = "latro_kernels::tree_attention"


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
    refuse_forward_mode("tree_attention")
    sinks = None if sinks is None else sinks.float()
    out, _ = torch.ops.latro_kernels.tree_attention(
        q, k, v, tree.tiles.query, tree.positions, sinks, scale, softcap, window
    )
    return out.transpose(0, 1)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, positions: Tensor, sinks: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    H, T, E = q.shape
    return q.new_empty(T, H, E), q.new_empty(2, H, T, dtype=torch.float32)


def _fake_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    tiles: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    H, T, E = q.shape
    of_keys = (T, k.shape[0], E)
    of_sinks = q.new_empty(0 if sinks is None else H, dtype=torch.float32)
    return q.new_empty(T, H, E), q.new_empty(of_keys), q.new_empty(of_keys), of_sinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.options = inputs[:6], inputs[6:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_out: Tensor, grad_stats: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, tiles, positions, sinks, out, stats = ctx.saved_tensors
    *grads, grad_sinks = torch.ops.latro_kernels.tree_attention_backward(
        grad_out.transpose(0, 1), q, k, v, out, stats, tiles, positions, sinks, *ctx.options
    )
    of_operands = (grad.transpose(0, 1) for grad in grads)
    return *of_operands, None, None, None if sinks is None else grad_sinks, None, None, None


if _native.available:
    torch.library.register_fake(OPERATOR, _fake)
    torch.library.register_fake(f"{OPERATOR}_backward", _fake_backward)
    torch.library.register_autograd(OPERATOR, _backward, setup_context=_setup_context)
