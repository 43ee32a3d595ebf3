"""What all operators share in autograd and autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx


class _FirstOrder(torch.autograd.Function):
    """The identity, with a gradient that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        # Gradients are enabled here where the graph of this pass is kept. A kernel's gradient knows nothing of its
        # inputs by then: as a constant it would silently leave a term out.
        return _Refused.apply(grad.detach().requires_grad_()) if torch.is_grad_enabled() else grad


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        raise RuntimeError(
            "latro_kernels: kernels have no second derivative; got a loss that would differentiate twice"
        )


def first_order(tensor: Tensor | None) -> Any:
    """Refuse double backward at an operator's input: kernels have no second derivative, whatever the backend."""
    if tensor is None or not (tensor.requires_grad and torch.is_grad_enabled()):
        return tensor
    return _FirstOrder.apply(tensor)


def refuse_forward_mode(operator: str, impl: str = "native") -> None:
    """An operator registered without a forward-mode derivative would pass for a constant."""
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        raise RuntimeError(f"{operator}: impl={impl!r} has no forward-mode derivative; use impl='reference'")


def autocast_operands(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Under autocast, operands in its dtype, as torch's own matrix products do; otherwise the tensors as they are."""
    kind = next(tensor.device.type for tensor in tensors if tensor is not None)
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        tensor.to(dtype)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are taken and log-probs are returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32
