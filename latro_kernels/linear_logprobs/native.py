"""Log-probs under a linear head in C++: csrc/linear_logprobs. Logits live a tile at a time, sums are in float32.

Gradients cost two products more when the exponentials of the logits fit the memory budget, three when they are made
again; when weight and bias need no gradient, one, which the forward pass makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latro_kernels import _native
from latro_kernels._autograd import refuse_forward_mode
from latro_kernels.memory import get_memory_budget

OPERATOR = "latro_kernels::linear_logprobs"
STRIP, LANES, BLOCK_ROWS = 192, 64, 12  # as in csrc/linear_logprobs: call.h and plan.h


class Head(NamedTuple):
    """The arguments of the operator, in its order."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    rows: Tensor  # [M]
    targets: Tensor  # [M]
    numbers: Tensor  # [3]
    temperatures: Tensor | None  # [M]

    def part(self, begin: int, end: int) -> Head:
        """Of the scored tokens [begin, end) alone."""
        each = None if self.temperatures is None else self.temperatures[begin:end]
        return self._replace(rows=self.rows[begin:end], targets=self.targets[begin:end], temperatures=each)


def head_of(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
) -> Head:
    each = temperature.double() if isinstance(temperature, Tensor) else None
    numbers = (1.0 if isinstance(temperature, Tensor) else temperature, softcap or 0.0, logit_scale)
    return Head(hidden, weight, bias, rows, targets, _as_tensor(numbers), each)


def _as_tensor(numbers: tuple[float, ...]) -> Tensor:
    if torch.compiler.is_compiling():  # which would make a constant of torch.tensor's argument
        return torch.stack([torch.ones((), dtype=torch.float64, device="cpu") * number for number in numbers])
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


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
    head = head_of(hidden, weight, rows, targets, bias, temperature, softcap, logit_scale)
    for_head = any(tensor is not None and tensor.requires_grad for tensor in (head.weight, head.bias))
    for_hidden_alone = head.hidden.requires_grad and not for_head
    budget = get_memory_budget() if for_head and torch.is_grad_enabled() else 0
    unit_grad = for_hidden_alone and torch.is_grad_enabled()
    logps, found, *_ = torch.ops.latro_kernels.linear_logprobs(*head, budget, unit_grad)
    return logps, found if entropy else None


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
    return floats(M), floats(M), floats(3, M), hidden.new_empty(kept, columns), unit


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logps, entropy, *kept = output
    ctx.mark_non_differentiable(entropy, *kept)
    ctx.save_for_backward(*inputs[: len(Head._fields)], logps, *kept)


def _backward(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: torch.utils.checkpoint refuses a second time
    head = Head(*saved[: len(Head._fields)])
    for_hidden, for_weight, for_bias, *_ = ctx.needs_input_grad
    grads = new_grads(head, for_hidden, for_weight, for_bias, head.weight.dtype)
    add_grads(grad, head, saved[len(Head._fields) :], grads, first=True)
    return *grads.like(head), *(None for _ in range(6))


class Grads(NamedTuple):
    """Of hidden, weight and bias, where they are wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def like(self, head: Head) -> tuple[Tensor | None, ...]:
        """In the dtype of what they are gradients of."""
        return tuple(None if grad is None else grad.to(head.hidden.dtype) for grad in self)


def new_grads(head: Head, for_hidden: bool, for_weight: bool, for_bias: bool, weight_dtype: torch.dtype) -> Grads:
    """Room for gradients; that of weight is not set to zero, the first call writes it."""
    hidden, weight, _ = head[:3]
    return Grads(
        hidden.new_zeros(hidden.shape) if for_hidden else None,
        weight.new_empty(weight.shape, dtype=weight_dtype) if for_weight else None,
        weight.new_zeros(weight.shape[0], dtype=torch.float32) if for_bias else None,
    )


def add_grads(grad: Tensor, head: Head, kept: Sequence[Tensor], grads: Grads, first: bool) -> None:
    """kept: the forward's logps, state, exponentials and unit_grad."""
    torch.ops.latro_kernels.linear_logprobs_backward(grad, *head, *kept, *grads, not first)


if _native.available:
    torch.library.register_fake(OPERATOR, _fake)
    torch.library.register_fake(f"{OPERATOR}_backward", lambda *arguments: None)
    torch.library.register_autograd(OPERATOR, _backward, setup_context=_setup_context)
