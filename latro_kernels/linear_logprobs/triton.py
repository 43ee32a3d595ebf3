"""The steps of protocol.py in Triton: what is launched, and the backend. triton_kernels.py says how they work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latro_kernels._autograd import refuse_forward_mode
from latro_kernels._gpu import tile_sizes
from latro_kernels.linear_logprobs import triton_kernels as kernels
from latro_kernels.linear_logprobs.head import head_of, score
from latro_kernels.linear_logprobs.protocol import Scored
from latro_kernels.linear_logprobs.strips import register

OPERATOR = "latro_kernels::linear_logprobs_triton"

# Where the log-sum-exp is known before E is made, E is about 2^14 p: far from float16's smallest number.
FLOAT16_HEADROOM = 14

TOKENS = 128  # of a program that does little for each


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
    refuse_forward_mode("linear_logprobs", "triton")
    logps, found = score(KERNELS, head_of(hidden, weight, rows, targets, bias, temperature, softcap, logit_scale))
    return logps, found if entropy else None


class _Triton:
    def width(self, scored: Scored) -> tuple[bool, int]:
        product, tiles = _product(scored)
        return product == "fused", tiles["BLOCK_V"] if product == "fused" else _tiles("epilogue", scored)["BLOCK_V"]

    def guess(self, scored: Scored) -> None:
        M, D = scored.hidden.shape
        kernels.guess[(M,)](
            scored.hidden,
            scored.weight,
            scored.weight.stride(0),
            scored.bias,
            scored.targets,
            scored.state,
            M,
            scored.logit_scale,
            scored.softcap,
            D=D,
            **_tiles("guess", scored),
        )

    def epilogue(
        self,
        scored: Scored,
        begin: int,
        products: Tensor,
        exponentials: Tensor | None,
        partials: Tensor | None,
        first_tile: int,
    ) -> None:
        M, V = products.shape
        tiles = _tiles("epilogue", scored)
        kernels.epilogue[(_blocks(M, tiles["BLOCK_M"]), _blocks(V, tiles["BLOCK_V"]))](
            products,
            products.stride(0),
            first_tile,
            *_finish_arguments(scored, begin, begin + V, exponentials, partials),
            **tiles,
        )

    def product_and_epilogue(
        self,
        scored: Scored,
        begin: int,
        end: int,
        exponentials: Tensor | None,
        partials: Tensor | None,
        first_tile: int,
    ) -> None:
        M, D = scored.hidden.shape
        _, tiles = _product(scored)
        kernels.product_and_epilogue[(_blocks(end - begin, tiles["BLOCK_V"]) * _blocks(M, tiles["BLOCK_M"]),)](
            scored.hidden,
            scored.weight[begin:end],
            scored.weight.stride(0),
            first_tile,
            *_finish_arguments(scored, begin, end, exponentials, partials),
            D=D,
            **tiles,
        )

    def combine(self, scored: Scored, partials: Tensor, logps: Tensor, entropy: Tensor) -> None:
        M, tiles = len(logps), _tiles("combine", scored)
        kernels.combine[(_blocks(M, tiles["BLOCK_M"]),)](
            partials,
            partials.shape[1],
            scored.state,
            logps,
            entropy,
            M,
            HEADROOM=FLOAT16_HEADROOM if scored.hidden.dtype == torch.float16 else None,
            **tiles,
        )

    def settle(
        self,
        scored: Scored,
        partials: Tensor,
        first_tile: int,
        tiles: int,
        exponentials: Tensor,
        unit: Tensor | None,
    ) -> None:
        M, V = exponentials.shape
        _, width = self.width(scored)
        constants = _tiles("settle", scored)
        kernels.settle[(_blocks(M, constants["BLOCK_M"]),)](
            partials[0, first_tile:],
            tiles,
            scored.state,
            exponentials,
            exponentials.stride(0),
            unit,
            M,
            V,
            D=scored.hidden.shape[1],
            WIDTH=width,
            **constants,
        )

    def clear_targets(self, scored: Scored, begin: int, exponentials: Tensor) -> None:
        M, V = exponentials.shape
        kernels.clear_targets[(_blocks(M, TOKENS),)](
            scored.begins,
            scored.ends,
            scored.targets,
            scored.state,
            begin,
            exponentials,
            exponentials.stride(0),
            M,
            V,
            BLOCK_M=TOKENS,
        )

    def couple_targets(self, scored: Scored, coefficients: Tensor, out: Tensor) -> None:
        M = len(out)
        kernels.couple_targets[(_blocks(M, TOKENS),)](
            coefficients, scored.begins, scored.ends, scored.targets, scored.state, out, M, BLOCK_M=TOKENS
        )

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
        M, D = values.shape
        tiles = _tiles("add_rows", scored)
        kernels.add_rows[(M, _blocks(D, tiles["BLOCK_K"]))](
            values,
            coefficients,
            order,
            rows,
            ends,
            None if of_targets is None else scored.weight,
            scored.weight.stride(0),
            scored.targets,
            of_targets,
            out,
            D=D,
            **tiles,
        )

    def add_bias_grad(self, exponentials: Tensor, coefficients: Tensor, out: Tensor) -> None:
        (M, V), tiles = exponentials.shape, tile_sizes("linear_logprobs.add_bias_grad", 1, exponentials)
        kernels.add_bias_grad[(_blocks(V, tiles["BLOCK_V"]),)](
            exponentials, exponentials.stride(0), coefficients, out, M, V, **tiles
        )


def _tiles(kernel: str, scored: Scored) -> dict[str, Any]:
    return tile_sizes(f"linear_logprobs.{kernel}", scored.hidden.shape[1], scored.hidden)


def _product(scored: Scored) -> tuple[str, dict[str, Any]]:
    """Who makes the products, "vendor" or "fused", and the tiles of our kernel for them."""
    tiles = _tiles("logits", scored)
    return tiles.pop("product"), tiles


def _finish_arguments(
    scored: Scored, begin: int, end: int, exponentials: Tensor | None, partials: Tensor | None
) -> tuple[Any, ...]:
    return (
        scored.state,
        scored.targets,
        None if scored.bias is None else scored.bias[begin:end],
        exponentials,
        0 if exponentials is None else exponentials.stride(0),
        partials,
        0 if partials is None else partials.shape[1],
        begin,
        len(scored.hidden),
        end - begin,
        scored.logit_scale,
        scored.softcap,
    )


def _blocks(size: int, block: int) -> int:
    return (size + block - 1) // block


KERNELS = register(OPERATOR, _Triton())
