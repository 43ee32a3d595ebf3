"""Log-probs under a linear head in C++ and CUDA: csrc/linear_logprobs. Sums are in float32.

On a GPU the plan is that of strips.py. On a CPU logits live a tile at a time; gradients cost two products more when the
exponentials of the logits fit the memory budget, three when they are made again; when weight and bias need no gradient,
one, which the forward pass makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latro_kernels import _native
from latro_kernels._autograd import refuse_forward_mode
from latro_kernels.linear_logprobs import cuda
from latro_kernels.linear_logprobs.head import Grads, Head, Kernels, OfShard, head_of, register_autograd, score

OPERATOR = "latro_kernels::linear_logprobs"
STRIP, LANES, BLOCK_ROWS, STATE_ROWS = 192, 64, 12, 4  # as in csrc/linear_logprobs: call.h, plan.h and cpu.cpp


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    refuse_forward_mode("linear_logprobs")
    logps, found = score(KERNELS, head_of(hidden, weight, rows, targets, bias, temperature, softcap, logit_scale))
    return logps, found if entropy else None


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    if arguments[0].is_cuda:
        return cuda.KERNELS.forward(*arguments)
    return torch.ops.latro_kernels.linear_logprobs(*arguments)


def add_grads(grad: Tensor, head: Head, kept: Sequence[Tensor], grads: Grads, first: bool) -> None:
    if grad.is_cuda:
        cuda.KERNELS.add_grads(grad, head, kept, grads, first)
    else:
        _add_grads(grad, head, kept, grads, first)


def _add_grads(grad: Tensor, head: Head, kept: Sequence[Tensor], grads: Grads, first: bool) -> None:
    """kept: the forward's state, exponentials and unit_grad."""
    torch.ops.latro_kernels.linear_logprobs_backward(grad, *head, *kept, *grads, not first)


def of_shard(here: Tensor, logps: Tensor, kept: Sequence[Tensor]) -> OfShard:
    if here.is_cuda:
        return cuda.KERNELS.of_shard(here, logps, kept)
    state, *more = kept
    shift, one_over_sum, slope, exact_logps = state
    taken = torch.where(here, exact_logps, exact_logps.exp().log1p())  # its expm1, which is p − 1 at a target, is p
    kept = [torch.stack([shift, one_over_sum, slope, taken]), *more]
    return OfShard(shift - one_over_sum.log(), exact_logps, slope, kept)


KERNELS = Kernels(forward, add_grads, of_shard)


def _up(size: Any, to: int) -> Any:
    return (size + to - 1) // to * to


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    *_, budget, unit_grad = options
    M, (V, D) = rows.shape[0], weight.shape
    columns = _up(M, LANES)
    kept = torch.sym_min(V, budget // (torch.sym_max(columns, LANES) * hidden.element_size()))
    kept = 0 if unit_grad else V if kept == V else kept // STRIP * STRIP

    def floats(*size: Any) -> Tensor:
        return hidden.new_empty(size, dtype=torch.float32)

    unit = floats(columns + BLOCK_ROWS if unit_grad else 0, _up(D, LANES))
    state = hidden.new_empty((STATE_ROWS, M), dtype=torch.float64)
    return floats(M), floats(M), state, hidden.new_empty(kept, columns), unit


if _native.available:
    torch.library.register_fake(OPERATOR, _fake)
    torch.library.register_fake(f"{OPERATOR}_backward", lambda *arguments: None)
    register_autograd(OPERATOR, _add_grads)
