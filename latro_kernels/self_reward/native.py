"""The self-reward objective in C++ and CUDA: csrc/self_reward. One pass, sums in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latro_kernels import _native
from latro_kernels._autograd import refuse_forward_mode
from latro_kernels.self_reward.objective import SelfReward, SelfRewardTerms
from latro_kernels.tree import ScoredTokens

OPERATOR = "latro_kernels::self_reward"
COEFFICIENTS = SelfRewardTerms._fields.index("coefficients")


def self_reward(
    logps: Tensor,
    scored: ScoredTokens,
    objective: SelfReward,
    ref_logps: Tensor | None,
    advantage: Tensor | None,
    denominator: float,
) -> SelfRewardTerms:
    refuse_forward_mode("self_reward")
    loss, reward, used, kl, rationale_logp, answer_logp, coefficients = torch.ops.latro_kernels.self_reward(
        logps,
        scored.segment,
        scored.kind,
        scored.rationale,
        scored.option,
        scored.prompt,
        ref_logps,
        advantage,
        objective.beta,
        objective.answer_weight,
        objective.kl,
        objective.floor,
        objective.scale,
    )
    # Not in the kernel: a number that changes from step to step would make torch.compile start again.
    return SelfRewardTerms(
        loss / denominator, reward, used, kl, rationale_logp, answer_logp, coefficients / denominator
    )


def _fake(
    logps: Tensor, segment: Tensor, kind: Tensor, rationale: Tensor, option: Tensor, prompt: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    per_rationale = [logps.new_empty(prompt.shape[0]) for _ in range(5)]
    return logps.new_empty(()), *per_rationale, torch.empty_like(logps)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[COEFFICIENTS])


def _backward(ctx: Any, grad_loss: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    (coefficients,) = ctx.saved_tensors
    return grad_loss * coefficients, *(None for _ in range(12))


if _native.available:
    torch.library.register_fake(OPERATOR, _fake)
    torch.library.register_autograd(OPERATOR, _backward, setup_context=_setup_context)
