"""The argument checks that every backend shares.

Shapes, dtypes and devices are always checked. Values are checked where reading them is free, on the CPU outside a
compiled graph, and on a GPU when LATRO_CHECK=1, which synchronises.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

if os.environ.get("LATRO_CHECK", "0") not in ("0", "1"):
    raise ValueError(f"latro_kernels: LATRO_CHECK must be 0 or 1, got {os.environ['LATRO_CHECK']!r}")
CHECK_VALUES = os.environ.get("LATRO_CHECK") == "1"


def check_tensors(operator: str, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{operator}: {name} must be a tensor, got {type(value).__name__}")


def check_shape(operator: str, name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """A letter in `expected` stands for any size."""
    check_tensors(operator, **{name: tensor})
    sizes = tensor.shape
    fits = len(sizes) == len(expected) and all(
        isinstance(e, str) or s == e for s, e in zip(sizes, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, expected))
        raise ValueError(f"{operator}: {name} must have shape [{wanted}], got {list(sizes)}")


def check_floating(operator: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{operator}: {name} must have a floating dtype, got {tensor.dtype}")


def check_index(operator: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int64:
        raise TypeError(f"{operator}: {name} must have dtype torch.int64, got {tensor.dtype}")


def check_like(operator: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Same dtype and device."""
    check_device(operator, name, tensor, like_name, like)
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"{operator}: {name} must have the dtype of {like_name}, {like.dtype}, got {tensor.dtype}; "
            "cast one of them or run under torch.autocast"
        )


def check_device(operator: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{operator}: {name} must be on {like.device} with {like_name}, got {tensor.device}")


def check_positive(operator: str, name: str, value: object) -> None:
    check_number(operator, name, value)
    if not value > 0:  # type: ignore[operator]
        raise ValueError(f"{operator}: {name} must be > 0, got {value}")


def check_number(operator: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{operator}: {name} must be a number, got {value!r:.80}")
    # Not while compiling: dynamo turns a float that changes into one that it cannot ask.
    if isinstance(value, float) and not torch.compiler.is_compiling() and not math.isfinite(value):
        raise ValueError(f"{operator}: {name} must be finite, got {value}")


def check_range(operator: str, name: str, index: Tensor, bound: int, bound_name: str) -> None:
    """0 <= index < bound."""
    if _reads_values(index) and index.numel():
        low, high = (int(value) for value in index.aminmax())
        if low < 0 or high >= bound:
            raise ValueError(
                f"{operator}: {name} must be in [0, {bound_name}) = [0, {bound}), got {low if low < 0 else high}"
            )


def check_all_positive(operator: str, name: str, tensor: Tensor) -> None:
    if _reads_values(tensor) and tensor.numel() and not bool((tensor > 0).all()):
        raise ValueError(f"{operator}: {name} must be > 0, got {float(tensor.min())}")


def check_finite(operator: str, name: str, tensor: Tensor) -> None:
    """Only under LATRO_CHECK=1: otherwise a NaN goes through and comes out as a NaN loss."""
    if CHECK_VALUES and not torch.compiler.is_compiling() and not bool(tensor.isfinite().all()):
        raise ValueError(
            f"{operator}: {name} must be finite, got {int((~tensor.isfinite()).sum())} values that are not"
        )


def _reads_values(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling() or tensor.is_meta or type(tensor) is not Tensor:
        return False
    return CHECK_VALUES or tensor.device.type == "cpu"
