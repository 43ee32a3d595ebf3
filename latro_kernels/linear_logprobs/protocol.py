"""What the plan of strips.py asks of a backend's kernels: its steps, and what is known of a scored token between them.

strips.py has the formulas, and says when a step is called.

Memory traffic in bytes, b of a number of hidden's dtype, tiles of N columns; the products' own is the vendor's:
    guess                  reads 2 M D b
    epilogue               reads 4 M V, writes b M V of E and 12 M V / N of partials
    product_and_epilogue   reads M D b, and V D b for each group of rows that stays in the cache, writes as epilogue
    combine                reads 16 M V / N
    settle                 reads 4 M V / N
    add_rows               reads M D (4 + b) for hidden, M D b for weight; reads and writes each row that gets a sum
    add_bias_grad          reads b M V
    clear_targets and couple_targets touch a few numbers of each token

Sizes: D hidden, V vocabulary, M scored tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# Strips begin, and rows of matrices end, at multiples of this many numbers: the fast kernels ask for it.
ALIGNMENT = 64

# Rows of state, what is known of a scored token, in float32. Logits are in bits.
TEMPERATURE = 0
GUESS = 1  # the target's logit, rounded to a whole number
GUESSED = 2  # 1, or 0 where no such number was found: then GUESS is 0
LOGIT = 3  # of the target, from the product that holds it
SLOPE = 4  # of the softcap there
HIGHEST = 5  # of the others' logits so far
SHIFT = 6  # that E has from now on
TOTAL = 7  # of 2^(logit - SHIFT), the target's included
ENTRY = 8  # what E would hold at the target, to float32's precision
STATE_ROWS = 9


class Scored(NamedTuple):
    """The scored tokens, sorted by their row of hidden, and the head, as the kernels take them."""

    rows: Tensor  # [M]
    begins: Tensor  # [M]: [begins[m], ends[m]) are the tokens of token m's row
    ends: Tensor
    hidden: Tensor  # [M, D], contiguous
    weight: Tensor  # [V, D], contiguous rows
    bias: Tensor | None  # [V]
    targets: Tensor  # [M]
    logit_scale: float
    softcap: float | None
    state: Tensor  # [STATE_ROWS, M]

    def room(self, columns: int, dtype: torch.dtype) -> Tensor:
        return self.hidden.new_empty(len(self.hidden), aligned(columns), dtype=dtype)[:, :columns]


class Steps(Protocol):
    """What a backend's kernels do, on the current device. Matrices have rows of a multiple of ALIGNMENT numbers.

    products [M, columns]: float32, hidden times the columns [begin, begin + columns) of weight, transposed.
    exponentials: E of the same columns, to be written, or None.
    partials [3, tiles, M]: float32; of the others' logits in tile first_tile and those after it, to be written with the
    rows LOGIT and SLOPE of state: maximum h, sum of 2^(l − shift), and sum of 2^(l − shift) (l − h), with a shift that
    GUESS, GUESSED and h determine, and that E has for now. None: E has the SHIFT of state.
    """

    def width(self, scored: Scored) -> tuple[bool, int]:
        """Whether products are fused with what is made of them, and the columns of a tile."""

    def guess(self, scored: Scored) -> None:
        """GUESS and GUESSED."""

    def epilogue(
        self,
        scored: Scored,
        begin: int,
        products: Tensor,
        exponentials: Tensor | None,
        partials: Tensor | None,
        first_tile: int,
    ) -> None:
        """Of a strip's products."""

    def product_and_epilogue(
        self,
        scored: Scored,
        begin: int,
        end: int,
        exponentials: Tensor | None,
        partials: Tensor | None,
        first_tile: int,
    ) -> None:
        """Of the columns [begin, end), with products that are never written."""

    def combine(self, scored: Scored, partials: Tensor, logps: Tensor, entropy: Tensor) -> None:
        """Both results, and HIGHEST, SHIFT, TOTAL and ENTRY, from the partials of all tiles."""

    def settle(
        self,
        scored: Scored,
        partials: Tensor,
        first_tile: int,
        tiles: int,
        exponentials: Tensor,
        unit: Tensor | None,
    ) -> None:
        """HIGHEST with those tiles, and the shift of that for E of those tiles and for unit [M, D], made with
        the HIGHEST before. The first column of exponentials is that of first_tile."""

    def clear_targets(self, scored: Scored, begin: int, exponentials: Tensor) -> None:
        """E of the columns from `begin` on is 0 also at the targets of the other tokens of a token's row that have its
        temperature."""

    def couple_targets(self, scored: Scored, coefficients: Tensor, out: Tensor) -> None:
        """out[m]: what E of those tokens and of m would hold at m's target, over their TOTAL, times their coefficients.

        ENTRY for those that have the same target, of which the first has it for all: the others' sum is 0.
        """

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
        """out[row] += Σ coefficients[m] values[m] over the tokens m of a row, in their order.

        order: the tokens sorted by row; rows: their rows; ends: where the run of each row ends. of_targets [M]: so much
        of the target's row of weight is added too.
        """

    def add_bias_grad(self, exponentials: Tensor, coefficients: Tensor, out: Tensor) -> None:
        """out += Eᵀ coefficients, in float32."""


def aligned(size: Any) -> Any:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
