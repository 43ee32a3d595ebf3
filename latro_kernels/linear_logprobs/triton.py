"""Log-probs under a linear head in Triton, with the vendor's matrix products.

    z = logit_scale (x·W_v + bias_v),  l = softcap(z) / τ,  logp = (l_target − max l) − log Σ_v exp(l_v − max l)
    E[m, v] = exp(l_v − shift_m) σ_v, and 0 at the target;  s_m = Σ_v exp(l_v − shift_m)     σ: slope of softcap, or 1
    a_m = −(∂loss/∂logp_m) logit_scale / (τ_m s_m),  e_m = σ s_m (exp(logp_m) − 1), what E would hold at the target
    dX_m = a_m ((E W)_m + e_m W_target)                            X: the scored rows of hidden, [M, D]
    dW = Eᵀ (diag(a) X) + Σ_m a_m e_m x_m at row target_m,         dbias likewise with 1 for x_m

The coefficients are folded into the small operands, so E serves whatever the gradient of the log-probs turns out to be.
The targets' terms are the large ones: they are added in float32 and never rounded with E, nor is p − 1 ever taken.

                   V: a strip     a strip                      W: V x D
            ┌────┬────┬────┬────┬────┬────┐        x·Wᵀ in float32, of a strip at a time into a workspace ("vendor"), or
            │tile│    │    │    │    │    │        of a tile in registers ("fused")
          M ├────┼────┼────┼────┼────┼────┤          -> maximum, sum, moment of each tile and row: partials
            │    │    │    │    │    │    │          -> E of the tile, in hidden's dtype
            └────┴────┴────┴────┴────┴────┘        partials -> logp, entropy, s, a better shift: combine
             E is kept: `kept`   is not

E is written before its row's maximum is known. Its shift is a guess, the target's logit, and any guess within e^±40 is
as good as the maximum. Rows whose guess was worse have their E made again, by a launch that returns at once where there
are none, so that the host need not know.

    trainable head   E is kept for as many columns as the budget holds, and made again for the others:   (6 + 2f) M D V
    frozen head      E of a strip times W is added up at once, U [M, D] kept, no E:                       4 M D V
    evaluation       statistics alone, nothing kept:                                                      2 M D V
    float16          has not the range for a guess: E is made again in the backward pass from the log-sum-exp

Memory traffic in bytes, b of a number of hidden's dtype; the products' own is the vendor's:
    guess_shift            reads 2 M D b
    epilogue               reads 4 M V, writes b M V of E and 12 M V / BLOCK_V of partials
    product_and_epilogue   reads M D b + V D b for each group of GROUP_M blocks of tokens, writes as epilogue
    combine                reads 16 M V / BLOCK_V
    add_rows               reads M D (4 + b) for hidden, M D b for weight; reads and writes each row that gets a sum
    add_bias_grad          reads b M V

Logits are never stored whole, probabilities and gradients of logits never at all.
Sizes: T tokens, D hidden, V vocabulary, M scored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latro_kernels._autograd import refuse_forward_mode
from latro_kernels._triton import on_device_of, tile_sizes
from latro_kernels.linear_logprobs import triton_kernels as kernels
from latro_kernels.linear_logprobs.head import Grads, Head, Kernels, head_of, register_autograd, score

OPERATOR = "latro_kernels::linear_logprobs_triton"

# Bytes of a strip's float32 products: enough for the vendor's kernels to run at full rate. At M = 3520 the strip is a
# seventh of a vocabulary of 128k.
WORKSPACE = 256 << 20

# Strips begin, and rows of matrices end, at multiples of this many numbers: the fast kernels ask for it.
ALIGNMENT = 64


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


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    return torch.ops.latro_kernels.linear_logprobs_triton(*arguments)


def add_grads(grad: Tensor, head: Head, kept: Sequence[Tensor], grads: Grads, first: bool) -> None:
    """kept: the forward's logps, state, exponentials and unit_grad."""
    _, state, exponentials, unit_grad = kept
    torch.ops.latro_kernels.linear_logprobs_triton_backward(
        grad, *head, state, exponentials, unit_grad, *grads, not first
    )


KERNELS = Kernels(forward, add_grads)


class _Scored(NamedTuple):
    """The scored tokens and the head, as the kernels take them."""

    hidden: Tensor  # [M, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    targets: Tensor  # [M]
    logit_scale: float
    softcap: float | None
    state: Tensor  # [STATE_ROWS, M], as in triton_kernels.py

    def tiles(self, kernel: str) -> dict[str, Any]:
        return tile_sizes(f"linear_logprobs.{kernel}", self.hidden.shape[1], self.hidden)

    def product(self) -> tuple[str, dict[str, Any]]:
        """Who makes the logits, "vendor" or "fused", and the tiles of the kernel that goes on with them."""
        tiles = self.tiles("logits")
        product = tiles.pop("product")
        return product, tiles if product == "fused" else self.tiles("epilogue")

    def strips(self, begin: int, end: int, in_memory: bool) -> list[tuple[int, int]]:
        """Of the vocabulary. in_memory: products or E of a strip have to be in the workspace."""
        if not in_memory:
            return [(begin, end)] if begin < end else []
        width = max(1, WORKSPACE // (4 * len(self.hidden) * ALIGNMENT)) * ALIGNMENT
        return [(first, min(first + width, end)) for first in range(begin, end, width)]

    def room(self, columns: int, dtype: torch.dtype) -> Tensor:
        return self.hidden.new_empty(len(self.hidden), _up(columns, ALIGNMENT), dtype=dtype)[:, :columns]


def _scored(head: Head, state: Tensor) -> _Scored:
    _, softcap, logit_scale = head.numbers.tolist()
    return _Scored(
        head.hidden.index_select(0, head.rows),
        head.weight if head.weight.stride(1) == 1 else head.weight.contiguous(),
        None if head.bias is None else head.bias.contiguous(),
        head.targets.contiguous(),
        logit_scale,
        softcap or None,
        state,
    )


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    head = Head(*arguments[:-2])
    if not head.hidden.shape[1]:
        raise RuntimeError(f"linear_logprobs: hidden must have at least one column, got {list(head.hidden.shape)}")
    logps, entropy, state, exponentials, unit = outputs = _outputs(*arguments)
    if len(logps):
        state.zero_()
        state[kernels.TEMPERATURE.value] = head.numbers[0].item() if head.temperatures is None else head.temperatures
        with on_device_of(state):
            _score(_scored(head, state), logps, entropy, exponentials, unit if len(unit) else None)
    return outputs


def _outputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    """logps, entropy, state, exponentials and unit_grad, not yet filled in."""
    *_, budget, unit_grad = options
    M, (V, D) = rows.shape[0], weight.shape
    can_guess = hidden.dtype != torch.float16
    kept = torch.sym_min(V, budget // (torch.sym_max(M, 1) * hidden.element_size()))
    kept = 0 if unit_grad or not can_guess else V if kept == V else kept // ALIGNMENT * ALIGNMENT

    def floats(*size: Any) -> Tensor:
        return hidden.new_empty(size, dtype=torch.float32)

    exponentials = hidden.new_empty(M, _up(kept, ALIGNMENT))
    unit = floats(M if unit_grad and can_guess else 0, D)
    return floats(M), floats(M), floats(kernels.STATE_ROWS, M), exponentials, unit


def _score(scored: _Scored, logps: Tensor, entropy: Tensor, exponentials: Tensor, unit: Tensor | None) -> None:
    M, V = len(scored.hidden), len(scored.weight)
    kept = min(exponentials.shape[1], V)
    guessed = kept > 0 or unit is not None
    if guessed:
        _guess_shift(scored)
    product, tiles = scored.product()
    in_memory = product == "vendor" or unit is not None
    strips = scored.strips(0, kept, in_memory) + scored.strips(kept, V, in_memory)
    partials = scored.state.new_empty(3, sum(_blocks(end - begin, tiles["BLOCK_V"]) for begin, end in strips), M)
    first = 0
    for begin, end in strips:
        if unit is None:
            _make(scored, begin, end, exponentials[:, begin:end] if begin < kept else None, partials, first)
        else:
            own = scored.room(end - begin, scored.hidden.dtype)
            _make(scored, begin, end, own, partials, first)
            _multiply(own, scored.weight[begin:end], unit, add=begin > 0)
        first += _blocks(end - begin, tiles["BLOCK_V"])
    _combine(scored, partials, logps, entropy, guessed)
    if kept:
        _make_fused(scored, 0, kept, exponentials, only_far=True)
    if unit is not None:
        _mend_unit_grad(scored, unit)


def _backward(
    grad: Tensor,  # [M]
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    numbers: Tensor,
    temperatures: Tensor | None,
    state: Tensor,
    exponentials: Tensor,
    unit: Tensor,
    hidden_grad: Tensor | None,
    weight_grad: Tensor | None,
    bias_grad: Tensor | None,
    accumulate: bool,
) -> None:
    # Parts of float16 have a power of two each, and are always added up.
    if weight_grad is not None and not accumulate and (not len(rows) or hidden.dtype == torch.float16):
        weight_grad.zero_()
    if not len(rows):
        return
    head = Head(hidden, weight, bias, rows, targets, numbers, temperatures)
    with on_device_of(hidden):
        scored = _scored(head, state)
        coefficients = grad * (-scored.logit_scale) / (state[kernels.TEMPERATURE.value] * state[kernels.SUM.value])
        if not len(unit):
            unit = _add_head_grads(
                scored, coefficients, exponentials, Grads(hidden_grad, weight_grad, bias_grad), accumulate
            )
        elif weight_grad is not None or bias_grad is not None:
            raise RuntimeError("linear_logprobs: unit_grad gives the gradient of hidden alone")
        if hidden_grad is not None:
            _add_rows(scored, unit, coefficients, rows, hidden_grad, and_targets=True)


def _add_head_grads(
    scored: _Scored, coefficients: Tensor, exponentials: Tensor, grads: Grads, accumulate: bool
) -> Tensor:
    """Those of weight and bias. Returns E W [M, D], where the gradient of hidden is wanted."""
    M, D = scored.hidden.shape
    V = len(scored.weight)
    kept = min(exponentials.shape[1], V)
    folded = None if grads.weight is None else _fold(scored, coefficients)
    unit = scored.state.new_empty(M if grads.hidden is not None else 0, D)
    for begin, end in scored.strips(0, kept, in_memory=False) + scored.strips(kept, V, in_memory=True):
        own = exponentials[:, begin:end]
        if begin >= kept:
            own = scored.room(end - begin, scored.hidden.dtype)
            _make(scored, begin, end, own)
        if grads.hidden is not None:
            _multiply(own, scored.weight[begin:end], unit, add=begin > 0)
        if grads.weight is not None and folded is not None:
            _add_weight_grad(own, folded, grads.weight[begin:end], accumulate)
        if grads.bias is not None:
            _add_bias_grad(scored, own, coefficients, grads.bias[begin:end])
    of_targets = coefficients * scored.state[kernels.ENTRY.value]
    if grads.weight is not None:
        _add_rows(scored, scored.hidden, of_targets, scored.targets, grads.weight)
    if grads.bias is not None:
        _add_rows(scored, torch.ones_like(of_targets)[:, None], of_targets, scored.targets, grads.bias[:, None])
    return unit


class _Folded(NamedTuple):
    """diag(coefficients) hidden [M, D], in float16 times a power of two that keeps it in range."""

    hidden: Tensor
    unfold: Tensor | None  # one over that power


def _fold(scored: _Scored, coefficients: Tensor) -> _Folded:
    folded = torch.empty_like(scored.hidden)
    if folded.dtype != torch.float16:
        return _Folded(torch.mul(scored.hidden, coefficients[:, None], out=folded), None)
    largest = (scored.hidden.abs().amax(1).float() * coefficients.abs()).amax()
    # E is at most 2^14 and this 2^12: sums of their products are far from float32's largest number too.
    exponent = (12 - torch.frexp(largest).exponent).clamp(max=100)
    one = torch.ones_like(largest)
    torch.mul(scored.hidden, (coefficients * torch.ldexp(one, exponent))[:, None], out=folded)
    return _Folded(folded, torch.ldexp(one, -exponent))


def _add_weight_grad(exponentials: Tensor, folded: _Folded, out: Tensor, accumulate: bool) -> None:
    if folded.unfold is None:
        _multiply(exponentials.T, folded.hidden, out, add=accumulate)
    else:
        products = torch.empty_like(out)
        _multiply(exponentials.T, folded.hidden, products)
        out.addcmul_(products, folded.unfold)


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b, with sums in float32. Autocast leaves products with an `out` alone."""
    if a.dtype != out.dtype and a.is_cuda:
        if add:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
        else:
            torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
        return
    a, b = a.to(out.dtype), b.to(out.dtype)  # a CPU has no products into float32
    if add:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def _make(
    scored: _Scored,
    begin: int,
    end: int,
    exponentials: Tensor | None,
    partials: Tensor | None = None,
    first_tile: int = 0,
) -> None:
    """E of the strip, or statistics of its tiles, or both."""
    product, tiles = scored.product()
    if product == "fused":
        _make_fused(scored, begin, end, exponentials, partials, first_tile)
        return
    M, V = len(scored.hidden), end - begin
    products = scored.room(V, torch.float32)
    _multiply(scored.hidden, scored.weight[begin:end].T, products)
    kernels.epilogue[(_blocks(V, tiles["BLOCK_V"]), _blocks(M, tiles["BLOCK_M"]))](
        products,
        products.stride(0),
        first_tile,
        *_finish_arguments(scored, begin, end, exponentials, partials),
        **tiles,
    )


def _make_fused(
    scored: _Scored,
    begin: int,
    end: int,
    exponentials: Tensor | None,
    partials: Tensor | None = None,
    first_tile: int = 0,
    only_far: bool = False,
) -> None:
    tiles = scored.tiles("logits")
    del tiles["product"]
    kernels.product_and_epilogue[
        (_blocks(end - begin, tiles["BLOCK_V"]) * _blocks(len(scored.hidden), tiles["BLOCK_M"]),)
    ](
        scored.hidden,
        scored.weight[begin:end],
        scored.weight.stride(0),
        first_tile,
        *_finish_arguments(scored, begin, end, exponentials, partials),
        D=scored.hidden.shape[1],
        ONLY_FAR=only_far,
        **tiles,
    )


def _finish_arguments(
    scored: _Scored, begin: int, end: int, exponentials: Tensor | None, partials: Tensor | None
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


def _guess_shift(scored: _Scored) -> None:
    M, D = scored.hidden.shape
    kernels.guess_shift[(M,)](*_head_arguments(scored), D=D, **scored.tiles("guess_shift"))


def _combine(scored: _Scored, partials: Tensor, logps: Tensor, entropy: Tensor, guessed: bool) -> None:
    tiles = scored.tiles("combine")
    M = len(logps)
    kernels.combine[(_blocks(M, tiles["BLOCK_M"]),)](
        partials,
        partials.shape[1],
        scored.state,
        logps,
        entropy,
        M,
        GUESSED=guessed,
        **tiles,
    )


def _mend_unit_grad(scored: _Scored, unit: Tensor) -> None:
    (M, D), tiles = unit.shape, scored.tiles("unit_grad_of_far")
    grid = _blocks(D, tiles["BLOCK_K"]), _blocks(M, tiles["BLOCK_M"])
    V = len(scored.weight)
    kernels.unit_grad_of_far[grid](*_head_arguments(scored), unit, V, D=D, **tiles)


def _head_arguments(scored: _Scored) -> tuple[Any, ...]:
    return (
        scored.hidden,
        scored.weight,
        scored.weight.stride(0),
        scored.bias,
        scored.targets,
        scored.state,
        len(scored.hidden),
        scored.logit_scale,
        scored.softcap,
    )


def _add_bias_grad(scored: _Scored, exponentials: Tensor, coefficients: Tensor, out: Tensor) -> None:
    (M, V), tiles = exponentials.shape, scored.tiles("add_bias_grad")
    grid = (_blocks(V, tiles["BLOCK_V"]),)
    kernels.add_bias_grad[grid](exponentials, exponentials.stride(0), coefficients, out, M, V, **tiles)


def _add_rows(
    scored: _Scored, values: Tensor, coefficients: Tensor, rows: Tensor, out: Tensor, and_targets: bool = False
) -> None:
    """out[rows] += diag(coefficients) values."""
    M, D = values.shape
    tiles = scored.tiles("add_rows")
    in_order, order = rows.sort(stable=True)
    kernels.add_rows[(M, _blocks(D, tiles["BLOCK_K"]))](
        values,
        coefficients,
        order,
        in_order,
        torch.searchsorted(in_order, in_order, right=True),
        scored.weight if and_targets else None,
        scored.weight.stride(0),
        scored.targets,
        scored.state,
        out,
        M,
        D=D,
        **tiles,
    )


def _up(size: Any, to: int) -> Any:
    return (size + to - 1) // to * to


def _blocks(size: int, block: int) -> int:
    return (size + block - 1) // block


ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor rows, Tensor targets, Tensor numbers, Tensor? temperatures"
)
torch.library.define(
    OPERATOR,
    f"({ARGUMENTS}, int budget, bool unit_grad) "
    "-> (Tensor logps, Tensor entropy, Tensor state, Tensor exponentials, Tensor unit_grad)",
)
# Adds to hidden_grad and to bias_grad, which is float32; writes weight_grad, or adds to it when it is float32.
torch.library.define(
    f"{OPERATOR}_backward",
    f"(Tensor grad, {ARGUMENTS}, Tensor state, Tensor exponentials, Tensor unit_grad, "
    "Tensor(a!)? hidden_grad, Tensor(b!)? weight_grad, Tensor(c!)? bias_grad, bool accumulate) -> ()",
)
torch.library.impl(OPERATOR, ("cpu", "cuda"), _forward)
torch.library.impl(f"{OPERATOR}_backward", ("cpu", "cuda"), _backward)
torch.library.register_fake(OPERATOR, _outputs)
torch.library.register_fake(f"{OPERATOR}_backward", lambda *arguments: None)
register_autograd(OPERATOR, add_grads)
