"""What kernels for a GPU share: the device, and the table of what suits it."""

from __future__ import annotations

import functools
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("tiles.json")


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def tile_sizes(kernel: str, size: int, tensor: Tensor) -> dict[str, Any]:
    """The constants of `kernel` for a head or row of `size`, in the tensor's dtype, on its device."""
    return dict(_tile_sizes(kernel, size, tensor.element_size(), capability(tensor.device)))


@functools.cache
def _tile_sizes(kernel: str, size: int, element_size: int, arch: int) -> dict[str, Any]:
    rows = [
        row for row in json.loads(TABLE.read_text())[kernel] if row["arch"] <= arch and row["bytes"] == element_size
    ]
    newest = max(row["arch"] for row in rows)
    best = min((row for row in rows if row["arch"] == newest and row["size"] >= size), key=lambda row: row["size"])
    return {name: value for name, value in best.items() if name not in ("arch", "bytes", "size", "why")}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def capability(device: torch.device) -> int:
    """90 for 9.0; where there is no GPU, what interpreter and emulator stand for: the latest there are kernels for."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
