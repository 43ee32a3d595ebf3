"""Loss and gradients of a linear head in one go, a few prompts at a time.

A token's coefficient is known once its prompt's rationales are all scored, so exponentials have to be kept for a group
of prompts alone: log-probs of the group, the objective's coefficients, then its gradients. The backward pass scales.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latro_kernels.linear_logprobs.head import Grads, Head, Kernels, new_grads
from latro_kernels.memory import get_memory_budget
from latro_kernels.self_reward.objective import SelfRewardTerms
from latro_kernels.tree import LossPlan

# Fewer tokens than this make poor matrix products: prompts are joined until there are as many, whatever the budget.
FEWEST_TOKENS = 512


def loss_and_logps(
    kernels: Kernels, head: Head, plan: LossPlan, couples_batch: bool, terms_of: Callable[[Tensor], SelfRewardTerms]
) -> tuple[SelfRewardTerms, Tensor, Tensor]:
    """The terms, their loss differentiable in hidden, weight and bias; the log-probs [M]; and the entropy [M].

    terms_of: log-probs to terms, whose loss is differentiable in them.
    """
    for_head = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    budget = get_memory_budget()
    if couples_batch or not for_head:
        parts = [(0, head.rows.shape[0])]
    else:
        parts = _parts(plan, budget // (head.weight.shape[0] * head.weight.element_size()))
    *values, logps, entropy = _Grouped.apply(
        head.hidden, head.weight, head.bias, kernels, head, parts, budget, terms_of
    )
    return SelfRewardTerms(*values), logps, entropy


def _parts(plan: LossPlan, most_tokens: int) -> list[tuple[int, int]]:
    """Scored tokens [begin, end) of consecutive prompts, as many as fit."""
    ends = plan.segment_tokens[plan.group_segments].tolist()
    parts = [(0, 0)]
    for begin, end in pairwise(ends):
        first, last = parts[-1]
        if end - first <= most_tokens or last - first < FEWEST_TOKENS:
            parts[-1] = (first, end)
        else:
            parts.append((begin, end))
    return parts


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kernels: Kernels,
        head: Head,
        parts: list[tuple[int, int]],
        budget: int,
        terms_of: Callable[[Tensor], SelfRewardTerms],
    ) -> tuple[Tensor, ...]:
        head = head._replace(hidden=hidden, weight=weight, bias=bias)
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grads = new_grads(head, for_hidden, for_weight, for_bias, whole=len(parts) == 1)
        logps = hidden.new_zeros(head.rows.shape[0], dtype=torch.float32)
        entropy = torch.zeros_like(logps)
        for begin, end in parts:
            terms = _add_part(kernels, head, slice(begin, end), budget, grads, logps, entropy, terms_of)
        results = (*(value.detach() for value in terms[1:]), logps, entropy)
        ctx.mark_non_differentiable(*results)
        # In float16 what a GradScaler's factor would save must not be lost before it.
        kept = (
            grads if hidden.dtype == torch.float16 else (None if own is None else own.to(hidden.dtype) for own in grads)
        )
        ctx.save_for_backward(*kept)
        ctx.dtype = hidden.dtype
        return terms.loss.detach(), *results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = (None if own is None else _scaled(own, grad, ctx.dtype) for own in ctx.saved_tensors)
        return *grads, None, None, None, None, None


def _scaled(own: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """own * grad, rounded once."""
    if grad.device.type == "cpu":  # where reading it is free, and scaling the gradient of weight is not
        return (own if grad == 1 else own * grad.item()).to(dtype)
    # Of one dimension grad keeps its float32; as a scalar it would be rounded to the dtype of own first.
    return torch.mul(own, grad.reshape(1), out=torch.empty_like(own, dtype=dtype))


def _add_part(
    kernels: Kernels,
    head: Head,
    part: slice,
    budget: int,
    grads: Grads,
    logps: Tensor,
    entropy: Tensor,
    terms_of: Callable[[Tensor], SelfRewardTerms],
) -> SelfRewardTerms:
    """Fills in the part's log-probs and entropy, and adds its gradients. What is kept for those goes with the call."""
    of_part = head.part(part.start, part.stop)
    for_head = grads.weight is not None or grads.bias is not None
    found, uncertainty, *kept = kernels.forward(*of_part, budget, not for_head)
    logps[part], entropy[part] = found, uncertainty
    # The log-probs of later prompts are still 0; this part's coefficients do not depend on them.
    terms, coefficients = _coefficients(terms_of, logps)
    kernels.add_grads(coefficients[part].contiguous(), of_part, kept, grads, part.start == 0)
    return terms


def _coefficients(terms_of: Callable[[Tensor], SelfRewardTerms], logps: Tensor) -> tuple[SelfRewardTerms, Tensor]:
    with torch.enable_grad():
        leaf = logps.clone().requires_grad_()
        terms = terms_of(leaf)
        _refuse_other_leaves(terms.loss, leaf)
        if not terms.loss.requires_grad:  # the objective does not depend on the log-probs
            return terms, torch.zeros_like(logps)
        (coefficients,) = torch.autograd.grad(terms.loss, leaf)
    return terms, coefficients


def _refuse_other_leaves(loss: Tensor, logps: Tensor) -> None:
    """A tensor of the objective's own that requires a gradient would silently get none."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", logps)  # that a leaf's node adds gradients to
        if variable is not logps:
            raise ValueError(
                "fused_self_reward_loss: objective must reach tensors that require gradients through extras, "
                f"got one of its own of shape {list(variable.shape)}"
            )
        nodes.extend(function for function, _ in node.next_functions)
