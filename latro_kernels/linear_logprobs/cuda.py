"""The steps of protocol.py in CUDA C++: csrc/linear_logprobs/cuda.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latro_kernels import _native
from latro_kernels._gpu import capability, tile_sizes
from latro_kernels.linear_logprobs.protocol import Scored
from latro_kernels.linear_logprobs.strips import register

OPS: Any = torch.ops.latro_kernels

# Columns of a tile of partials, as in csrc/linear_logprobs: head_kernels.h and product_sm90.h.
EPILOGUE_WIDTH, PRODUCT_WIDTH = 1024, 256
BYTES_AT_ONCE = 16  # which the copies of the fused product begin at multiples of


class _Cuda:
    def width(self, scored: Scored) -> tuple[bool, int]:
        fused = self.is_fused(scored)
        return fused, PRODUCT_WIDTH if fused else EPILOGUE_WIDTH

    def is_fused(self, scored: Scored) -> bool:
        hidden, weight = scored.hidden, scored.weight
        has_code = "sm_90a" in _native.cuda_arches or not hidden.is_cuda  # in the emulator it has
        fits = (
            hidden.element_size() == 2
            and capability(hidden.device) == 90
            and has_code
            and hidden.shape[1] * 2 % BYTES_AT_ONCE == 0
            and weight.stride(0) * 2 % BYTES_AT_ONCE == 0
            and weight.data_ptr() % BYTES_AT_ONCE == 0
        )
        return fits and tile_sizes("linear_logprobs.cuda", hidden.shape[1], hidden)["product"] == "fused"

    def guess(self, scored: Scored) -> None:
        OPS.head_guess(scored.hidden, scored.weight, *_head(scored))

    def epilogue(
        self,
        scored: Scored,
        begin: int,
        products: Tensor,
        exponentials: Tensor | None,
        partials: Tensor | None,
        first_tile: int,
    ) -> None:
        columns = products.shape[1]
        OPS.head_epilogue(products, scored.hidden, *_finish(scored, begin, columns, exponentials, partials, first_tile))

    def product_and_epilogue(
        self,
        scored: Scored,
        begin: int,
        end: int,
        exponentials: Tensor | None,
        partials: Tensor | None,
        first_tile: int,
    ) -> None:
        OPS.head_product_and_epilogue(
            scored.hidden,
            scored.weight[begin:end],
            *_finish(scored, begin, end - begin, exponentials, partials, first_tile),
        )

    def combine(self, scored: Scored, partials: Tensor, logps: Tensor, entropy: Tensor) -> None:
        OPS.head_combine(partials, scored.state, logps, entropy, scored.hidden.dtype == torch.float16)

    def settle(
        self,
        scored: Scored,
        partials: Tensor,
        first_tile: int,
        tiles: int,
        exponentials: Tensor,
        unit: Tensor | None,
    ) -> None:
        _, width = self.width(scored)
        OPS.head_settle(partials, first_tile, tiles, width, scored.state, exponentials, unit)

    def clear_targets(self, scored: Scored, begin: int, exponentials: Tensor) -> None:
        OPS.head_clear_targets(scored.begins, scored.ends, scored.targets, scored.state, begin, exponentials)

    def couple_targets(self, scored: Scored, coefficients: Tensor, out: Tensor) -> None:
        OPS.head_couple_targets(coefficients, scored.begins, scored.ends, scored.targets, scored.state, out)

    def add_rows(
        self,
        scored: Scored,
        values: Tensor,
        coefficients: Tensor,
        order: Tensor,
        rows: Tensor,
        ends: Tensor,
        out: Tensor,
        of_targets: Tensor | None,
    ) -> None:
        weight = None if of_targets is None else scored.weight
        OPS.head_add_rows(values, coefficients, order, rows, ends, weight, scored.targets, of_targets, out)

    def add_bias_grad(self, exponentials: Tensor, coefficients: Tensor, out: Tensor) -> None:
        OPS.head_add_bias_grad(exponentials, coefficients, out)


def _head(scored: Scored) -> tuple[Any, ...]:
    return scored.bias, scored.targets, scored.state, scored.logit_scale, scored.softcap or 0.0


def _finish(
    scored: Scored,
    begin: int,
    columns: int,
    exponentials: Tensor | None,
    partials: Tensor | None,
    first_tile: int,
) -> tuple[Any, ...]:
    return (
        None if scored.bias is None else scored.bias[begin : begin + columns],
        scored.targets,
        scored.state,
        exponentials,
        partials,
        first_tile,
        begin,
        scored.logit_scale,
        scored.softcap or 0.0,
    )


KERNELS = register("latro_kernels::linear_logprobs_cuda", _Cuda())
