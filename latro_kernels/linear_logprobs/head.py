"""What the backends with kernels share: the operator's arguments, its gradients, and its place in autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latro_kernels.memory import get_memory_budget


class Head(NamedTuple):
    """The arguments of the operator, in its order."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    rows: Tensor  # [M]
    targets: Tensor  # [M]
    numbers: Tensor  # [3], on the CPU: temperature, softcap (0: none), logit_scale
    temperatures: Tensor | None  # [M]

    def part(self, begin: int, end: int) -> Head:
        """Of the scored tokens [begin, end) alone."""
        each = None if self.temperatures is None else self.temperatures[begin:end]
        return self._replace(rows=self.rows[begin:end], targets=self.targets[begin:end], temperatures=each)


class Grads(NamedTuple):
    """Of hidden, weight and bias, where they are wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class OfShard(NamedTuple):
    """What ranks that share a vocabulary need of what a backend has found on one's rows. [M], in float64."""

    lse: Tensor  # log of the sum of exponentials of logits
    logps: Tensor
    slope: Tensor  # of the softcap at the target
    kept: Sequence[Tensor]  # makes add_grads take a target of another rank for any entry: gradients of p, not of p − 1


class Kernels(NamedTuple):
    """The two halves of a backend, for callers who make gradients themselves."""

    # Takes the operator's arguments, a memory budget in bytes, and whether to make the gradient of hidden for a
    # coefficient of 1. Returns logps [M], entropy [M], and what add_grads needs.
    forward: Callable[..., tuple[Tensor, ...]]
    # Takes d loss / d logps [M], the head, what forward returned behind entropy, and whether the gradient of weight is
    # to be written, not added to.
    add_grads: Callable[[Tensor, Head, Sequence[Tensor], Grads, bool], None]
    # Where weight has some of the vocabulary's rows: takes which targets are among them [M], logps, and what add_grads
    # takes.
    of_shard: Callable[[Tensor, Tensor, Sequence[Tensor]], OfShard]


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


def score(kernels: Kernels, head: Head) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy, keeping what the gradients that are wanted need."""
    for_head = any(tensor is not None and tensor.requires_grad for tensor in (head.weight, head.bias))
    for_hidden_alone = head.hidden.requires_grad and not for_head
    budget = get_memory_budget() if for_head and torch.is_grad_enabled() else 0
    unit_grad = for_hidden_alone and torch.is_grad_enabled()
    logps, entropy, *_ = kernels.forward(*head, budget, unit_grad)
    return logps, entropy


def new_grads(head: Head, for_hidden: bool, for_weight: bool, for_bias: bool, whole: bool) -> Grads:
    """Room for gradients; that of weight is not set to zero, the first call of add_grads writes it.

    whole: that call is the only one. Gradients in float16 stay in float32 until a GradScaler's factor is in them.
    """
    hidden, weight, _ = head[:3]
    dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    return Grads(
        hidden.new_zeros(hidden.shape, dtype=dtype) if for_hidden else None,
        weight.new_empty(weight.shape, dtype=dtype if whole else torch.float32) if for_weight else None,
        weight.new_zeros(weight.shape[0], dtype=torch.float32) if for_bias else None,
    )


def register_autograd(operator: str, add_grads: Callable[[Tensor, Head, Sequence[Tensor], Grads, bool], None]) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, entropy, *kept = output
        ctx.mark_non_differentiable(entropy, *kept)
        ctx.save_for_backward(*inputs[: len(Head._fields)], *kept)

    def backward(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: torch.utils.checkpoint refuses a second time
        head = Head(*saved[: len(Head._fields)])
        for_hidden, for_weight, for_bias, *_ = ctx.needs_input_grad
        grads = new_grads(head, for_hidden, for_weight, for_bias, whole=True)
        add_grads(grad, head, saved[len(Head._fields) :], grads, True)
        dtype = head.hidden.dtype
        return *(None if own is None else own.to(dtype) for own in grads), *(None for _ in range(6))

    torch.library.register_autograd(operator, backward, setup_context=setup_context)
