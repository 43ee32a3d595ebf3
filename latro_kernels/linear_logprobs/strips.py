"""Log-probs under a linear head a strip of the vocabulary at a time: the plan that every backend on a GPU follows.

    l_v = softcap(logit_scale (x·W_v + bias_v)) / τ · log2 e                              a logit, in bits
    E[m, v] = 2^(l_v − shift_m) σ_v, and 0 at the target;  s_m = Σ_v 2^(l_v − shift_m)    σ: slope of softcap, or 1
    o_m = Σ_{v≠target} 2^(l_v − shift_m),  logp_m = −log(1 + o_m / 2^(l_target − shift_m))
    a_m = −(∂loss/∂logp_m) logit_scale / (τ_m s_m),  t_m = −a_m σ o_m, what E would add at the target
    dX_m = a_m (E W)_m + t_m W_target                              X: the scored rows of hidden, [M, D]
    dW = Eᵀ (diag(a) X) + Σ_m t_m x_m at row target_m,             dbias likewise with 1 for x_m

The coefficients are folded into the small operands, so E serves whatever the gradient of the log-probs turns out to be.
The target is left out of every sum, and its own terms, the large ones, are added in float32 and never rounded with E:
1 − p is never taken, so it keeps its digits where p is near 1. Tokens are sorted by their row of hidden: where one is
scored for several targets, at one temperature, E is 0 at all of them, and t_m has what those tokens would add there.

                   V: a strip     a strip                      W: V x D
            ┌────┬────┬────┬────┬────┬────┐        x·Wᵀ in float32, of a strip at a time into a workspace, or of a
            │tile│    │    │    │    │    │        tile in registers ("fused")
          M ├────┼────┼────┼────┼────┼────┤          -> maximum, sum, moment of each tile and row: partials
            │    │    │    │    │    │    │          -> E of the tile, in hidden's dtype
            └────┴────┴────┴────┴────┴────┘        partials -> logp, entropy, shift, s, e: combine
             E is kept: `kept`   is not

E is written before its row's maximum is known. Its shift is a guess, the target's logit rounded to a whole number; a
tile whose maximum is too far from that takes a whole number of steps from it. So what a row's tiles differ by is an
exact power of two, and `settle` multiplies by it, in the few rows where there is anything to do.

    trainable head   E is kept for as many columns as the budget holds, and made again for the others:   (6 + 2f) M D V
    frozen head      E of a strip times W is added up at once, U [M, D] kept, no E:                       4 M D V
    evaluation       statistics alone, nothing kept:                                                      2 M D V
    float16          has not the range for a guess: E is made again in the backward pass from the log-sum-exp

Logits are never stored whole, probabilities and gradients of logits never at all.
What each step does, and its memory traffic, is in protocol.py.
Sizes: T tokens, D hidden, V vocabulary, M scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latro_kernels._gpu import on_device_of
from latro_kernels.linear_logprobs.head import Grads, Head, Kernels, OfShard, register_autograd
from latro_kernels.linear_logprobs.protocol import (
    ALIGNMENT,
    ENTRY,
    HIGHEST,
    LOGIT,
    SHIFT,
    SLOPE,
    STATE_ROWS,
    TEMPERATURE,
    TOTAL,
    Scored,
    Steps,
    aligned,
)

# Bytes of a strip's float32 products and E: enough for the vendor's kernels to run at full rate. At M = 3520, in
# bfloat16, the strip is a tenth of a vocabulary of 128k; with more than 40,000 tokens it is one tile, and takes more.
WORKSPACE = 256 << 20


def register(operator: str, steps: Steps) -> Kernels:
    """Defines the operator, its backward pass, their fakes and the gradient."""
    arguments = (
        "Tensor hidden, Tensor weight, Tensor? bias, Tensor rows, Tensor targets, Tensor numbers, Tensor? temperatures"
    )
    torch.library.define(
        operator,
        f"({arguments}, int budget, bool unit_grad) "
        "-> (Tensor logps, Tensor entropy, Tensor state, Tensor exponentials, Tensor unit_grad)",
    )
    # Adds to hidden_grad and to bias_grad, which is float32; writes weight_grad, or adds to it when it is float32.
    torch.library.define(
        f"{operator}_backward",
        f"(Tensor grad, {arguments}, Tensor state, Tensor exponentials, Tensor unit_grad, "
        "Tensor(a!)? hidden_grad, Tensor(b!)? weight_grad, Tensor(c!)? bias_grad, bool accumulate) -> ()",
    )
    torch.library.impl(operator, ("cpu", "cuda"), lambda *arguments: _forward(steps, *arguments))
    torch.library.impl(f"{operator}_backward", ("cpu", "cuda"), lambda *arguments: _backward(steps, *arguments))
    torch.library.register_fake(operator, _outputs)
    torch.library.register_fake(f"{operator}_backward", lambda *arguments: None)

    namespace, name = operator.split("::")
    operators = getattr(torch.ops, namespace)

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return getattr(operators, name)(*arguments)

    def add_grads(grad: Tensor, head: Head, kept: Sequence[Tensor], grads: Grads, first: bool) -> None:
        """kept: the forward's state, exponentials and unit_grad."""
        getattr(operators, f"{name}_backward")(grad, *head, *kept, *grads, not first)

    register_autograd(operator, add_grads)
    return Kernels(forward, add_grads, _of_shard)


def _of_shard(here: Tensor, logps: Tensor, kept: Sequence[Tensor]) -> OfShard:
    state, *more = kept
    lse = (state[SHIFT].double() + state[TOTAL].double().log2()) * math.log(2)
    taken = state.clone()
    taken[ENTRY] = torch.where(here, state[ENTRY], torch.exp2(state[LOGIT] - state[SHIFT]) * state[SLOPE])
    return OfShard(lse, logps.double(), state[SLOPE].double(), [taken, *more])


def _sorted(head: Head) -> tuple[Head, Tensor]:
    """With the tokens in the order of their rows; and that order."""
    rows, order = head.rows.sort(stable=True)
    each = None if head.temperatures is None else head.temperatures[order]
    return head._replace(rows=rows, targets=head.targets[order], temperatures=each), order


def _scored(head: Head, state: Tensor) -> Scored:
    _, softcap, logit_scale = head.numbers.tolist()
    return Scored(
        head.rows,
        torch.searchsorted(head.rows, head.rows),
        torch.searchsorted(head.rows, head.rows, right=True),
        head.hidden.index_select(0, head.rows),
        head.weight if head.weight.stride(1) == 1 else head.weight.contiguous(),
        None if head.bias is None else head.bias.contiguous(),
        head.targets,
        logit_scale,
        softcap or None,
        state,
    )


def _forward(steps: Steps, *arguments: Any) -> tuple[Tensor, ...]:
    head = Head(*arguments[:-2])
    if not head.hidden.shape[1]:
        raise RuntimeError(f"linear_logprobs: hidden must have at least one column, got {list(head.hidden.shape)}")
    logps, entropy, state, exponentials, unit = outputs = _outputs(*arguments)
    if len(logps):
        head, order = _sorted(head)
        state.zero_()
        state[TEMPERATURE] = head.numbers[0].item() if head.temperatures is None else head.temperatures
        state[HIGHEST] = -torch.inf
        found = torch.empty_like(logps), torch.empty_like(entropy)
        with on_device_of(state):
            _score(steps, _scored(head, state), *found, exponentials, unit if len(unit) else None)
        logps.index_copy_(0, order, found[0])
        entropy.index_copy_(0, order, found[1])
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

    exponentials = hidden.new_empty(M, aligned(kept))
    unit = floats(M if unit_grad and can_guess else 0, D)
    return floats(M), floats(M), floats(STATE_ROWS, M), exponentials, unit


def _score(
    steps: Steps, scored: Scored, logps: Tensor, entropy: Tensor, exponentials: Tensor, unit: Tensor | None
) -> None:
    M, V = len(scored.hidden), len(scored.weight)
    kept = min(exponentials.shape[1], V)
    fused, width = steps.width(scored)
    in_memory = not fused or unit is not None
    strips = _strips(scored, 0, kept, width, in_memory) + _strips(scored, kept, V, width, in_memory)
    partials = scored.state.new_empty(3, sum(_blocks(end - begin, width) for begin, end in strips), M)
    steps.guess(scored)
    first = 0
    for begin, end in strips:
        tiles = _blocks(end - begin, width)
        if unit is None:
            _make(steps, scored, begin, end, exponentials[:, begin:end] if begin < kept else None, partials, first)
        else:
            own = scored.room(end - begin, scored.hidden.dtype)
            _make(steps, scored, begin, end, own, partials, first)
            steps.settle(scored, partials, first, tiles, own, unit if begin else None)
            _multiply(own, scored.weight[begin:end], unit, add=begin > 0)
        first += tiles
    steps.combine(scored, partials, logps, entropy)
    if kept:
        steps.settle(scored, partials, 0, _blocks(kept, width), exponentials[:, :kept], None)


def _strips(scored: Scored, begin: int, end: int, width: int, in_memory: bool) -> list[tuple[int, int]]:
    """Of the columns [begin, end), whole tiles but for the last. in_memory: products or E of a strip have to be in the
    workspace."""
    if not in_memory:
        return [(begin, end)] if begin < end else []
    M, D = scored.hidden.shape
    of_column = M * (4 + scored.hidden.element_size())
    if scored.hidden.dtype == torch.float16:
        of_column += 4 * D  # of dW, which has a power of two of its own until it is added up
    step = math.lcm(width, ALIGNMENT)
    columns = max(1, WORKSPACE // (of_column * step)) * step
    return [(first, min(first + columns, end)) for first in range(begin, end, columns)]


def _make(
    steps: Steps,
    scored: Scored,
    begin: int,
    end: int,
    exponentials: Tensor | None,
    partials: Tensor | None = None,
    first_tile: int = 0,
) -> None:
    """E of the strip, or statistics of its tiles, or both."""
    fused, _ = steps.width(scored)
    if fused:
        steps.product_and_epilogue(scored, begin, end, exponentials, partials, first_tile)
    else:
        products = scored.room(end - begin, torch.float32)
        _multiply(scored.hidden, scored.weight[begin:end].T, products)
        steps.epilogue(scored, begin, products, exponentials, partials, first_tile)
    if exponentials is not None:
        steps.clear_targets(scored, begin, exponentials)


def _backward(
    steps: Steps,
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
    if len(unit) and (weight_grad is not None or bias_grad is not None):
        raise RuntimeError("linear_logprobs: unit_grad gives the gradient of hidden alone")
    head, order = _sorted(Head(hidden, weight, bias, rows, targets, numbers, temperatures))
    with on_device_of(hidden):
        scored = _scored(head, state)
        coefficients = grad[order] * (-scored.logit_scale) / state[TEMPERATURE]
        of_targets = torch.empty_like(coefficients)
        steps.couple_targets(scored, coefficients, of_targets)
        coefficients = coefficients / state[TOTAL]
        if not len(unit):
            grads = Grads(hidden_grad, weight_grad, bias_grad)
            unit = _add_head_grads(steps, scored, coefficients, of_targets, exponentials, grads, accumulate)
        if hidden_grad is not None:
            in_order = torch.arange(len(rows), device=rows.device)
            steps.add_rows(scored, unit, coefficients, in_order, scored.rows, scored.ends, hidden_grad, of_targets)


def _add_head_grads(
    steps: Steps,
    scored: Scored,
    coefficients: Tensor,
    of_targets: Tensor,
    exponentials: Tensor,
    grads: Grads,
    accumulate: bool,
) -> Tensor:
    """Those of weight and bias. Returns E W [M, D], where the gradient of hidden is wanted."""
    M, D = scored.hidden.shape
    V = len(scored.weight)
    kept = min(exponentials.shape[1], V)
    _, width = steps.width(scored)
    folded = None if grads.weight is None else _fold(scored, coefficients)
    unit = scored.state.new_empty(M if grads.hidden is not None else 0, D)
    for begin, end in _strips(scored, 0, kept, width, False) + _strips(scored, kept, V, width, True):
        own = exponentials[:, begin:end]
        if begin >= kept:
            own = scored.room(end - begin, scored.hidden.dtype)
            _make(steps, scored, begin, end, own)
        if grads.hidden is not None:
            _multiply(own, scored.weight[begin:end], unit, add=begin > 0)
        if grads.weight is not None and folded is not None:
            _add_weight_grad(own, folded, grads.weight[begin:end], accumulate)
        if grads.bias is not None:
            steps.add_bias_grad(own, coefficients, grads.bias[begin:end])
    targets, order = scored.targets.sort(stable=True)
    ends = torch.searchsorted(targets, targets, right=True)
    if grads.weight is not None:
        steps.add_rows(scored, scored.hidden, of_targets, order, targets, ends, grads.weight, None)
    if grads.bias is not None:
        ones = torch.ones_like(of_targets)[:, None]
        steps.add_rows(scored, ones, of_targets, order, targets, ends, grads.bias[:, None], None)
    return unit


class _Folded(NamedTuple):
    """diag(coefficients) hidden [M, D], in float16 times a power of two that keeps it in range."""

    hidden: Tensor
    unfold: Tensor | None  # one over that power


def _fold(scored: Scored, coefficients: Tensor) -> _Folded:
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


def _blocks(size: int, block: int) -> int:
    return (size + block - 1) // block
