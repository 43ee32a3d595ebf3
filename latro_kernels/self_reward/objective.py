"""The self-reward objective, defined; and what any other objective has to be.

    ℓz_k = log π(z_k | x), ℓy_k = log π(y | x, z_k): sums of logps over the segment's tokens (the answer's option 0)
    r_k  = max(ℓy_k, floor) − β KL_k                   the KL only for "k1"
    A_k  = r_k − mean of the other rewards of the prompt, divided by a standard deviation on request
    loss = −(1 / denominator) Σ_k [A_k ℓz_k + λ ℓy_k]  + (β / denominator) Σ_k KL_k for "k2" and "k3"

r and A are detached, so ∂loss/∂logps is −A_k / denominator at rationale tokens and −λ / denominator at answer tokens.
Sizes: M scored tokens, R rationales, P prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from latro_kernels import checks
from latro_kernels.tree import ANSWER, RATIONALE, ScoredTokens

# Keeps a group of equal rewards finite; TRL's value, so that scaled advantages agree with it.
STD_EPSILON = 1e-4


class Objective(Protocol):
    """A loss of log-probs, in differentiable PyTorch over small tensors.

    Make it a frozen dataclass: torch.compile and caches compare it by value. `extras` holds what the caller gave
    besides: ref_logps [M], advantage [R], denominator, and tensors of its own. A property `couples` may say that a
    token's gradient depends on its own prompt's rationales alone ("group"); else it may depend on the whole "batch".
    One that couples a "group" may be called several times, with the log-probs of later prompts still 0. Tensors that
    require gradients come as extras.
    """

    def __call__(self, logps: Tensor, scored: ScoredTokens, extras: Mapping[str, Any]) -> Tensor: ...


class SelfRewardTerms(NamedTuple):
    """What the self-reward objective computes. Only `loss` carries gradient."""

    loss: Tensor  # []
    reward: Tensor  # [R]
    advantage: Tensor  # [R]
    kl: Tensor  # [R], NaN when there is no reference model to measure it against
    rationale_logp: Tensor  # [R], log π(z | x)
    answer_logp: Tensor  # [R], log π(y | x, z)
    coefficients: Tensor  # [M], ∂loss / ∂logps


@dataclass(frozen=True)
class SelfReward:
    """LaTRO: reward each rationale by the log-prob it gives to the answer, against the others of its prompt.

    beta: weight of the KL term. answer_weight: weight of log π(y | x, z) itself (λ).
    kl: "k1" puts log π − log π0 of the rationale into the reward; "k2" and "k3" add the sum over its tokens of
        (log π − log π0)² / 2 or of π0/π − 1 − log π0/π to the loss instead.
    floor: the answer's log-prob counts as no less than this in the reward, so that a confidently wrong rationale is not
        punished below an empty one.
    scale: divide advantages by the standard deviation of the rewards of their "group" or of the whole "batch".

    torch.compile compiles again for each new value of these.
    """

    beta: float = 0.05
    answer_weight: float = 1.0
    kl: Literal["k1", "k2", "k3"] = "k1"
    floor: float | None = None
    scale: Literal["group", "batch"] | None = None

    def __post_init__(self) -> None:
        checks.check_number("SelfReward", "beta", self.beta)
        checks.check_number("SelfReward", "answer_weight", self.answer_weight)
        if self.beta < 0:
            raise ValueError(f"SelfReward: beta must be >= 0, got {self.beta}")
        if self.kl not in ("k1", "k2", "k3"):
            raise ValueError(f"SelfReward: kl must be 'k1', 'k2' or 'k3', got {self.kl!r}")
        if self.floor is not None:
            checks.check_number("SelfReward", "floor", self.floor)
        if self.scale not in (None, "group", "batch"):
            raise ValueError(f"SelfReward: scale must be None, 'group' or 'batch', got {self.scale!r}")

    @property
    def couples(self) -> Literal["group", "batch"]:
        """Whether a token's gradient depends on its own prompt's rationales alone, or on the whole batch."""
        return "batch" if self.scale == "batch" else "group"

    def __call__(self, logps: Tensor, scored: ScoredTokens, extras: Mapping[str, Any]) -> Tensor:
        ref_logps, advantage = extras.get("ref_logps"), extras.get("advantage")
        self.check(scored, ref_logps, advantage)
        denominator = extras.get("denominator", scored.prompt.shape[0])
        return self_reward(logps, scored, self, ref_logps, advantage, denominator).loss

    def check(self, scored: ScoredTokens, ref_logps: Tensor | None, advantage: Tensor | None) -> None:
        """Raise unless the objective has what it needs, before any work is done."""
        if self.beta and ref_logps is None:
            raise ValueError(f"SelfReward: beta={self.beta} needs ref_logps, got None; pass ref_logps or beta=0")
        if advantage is None and scored.plan.smallest_group < 2:
            raise ValueError(
                "SelfReward: the leave-one-out advantage needs at least 2 rationales for every prompt, "
                f"got a prompt with {scored.plan.smallest_group}; sample more, or pass advantage"
            )


def self_reward(
    logps: Tensor,  # [M]
    scored: ScoredTokens,
    objective: SelfReward,
    ref_logps: Tensor | None,  # [M]
    advantage: Tensor | None,  # [R]
    denominator: float,
) -> SelfRewardTerms:
    """`loss` is differentiable in logps; `coefficients` is its gradient, in closed form."""
    kind = scored.kind[scored.segment]
    rationale = scored.rationale[scored.segment]
    in_rationale = kind == RATIONALE
    in_answer = (kind == ANSWER) & (scored.option[scored.segment] == 0)
    R = scored.prompt.shape[0]

    def per_rationale(values: Tensor, members: Tensor) -> Tensor:
        return values.new_zeros(R).index_add(0, rationale, torch.where(members, values, 0))

    rationale_logp = per_rationale(logps, in_rationale)
    answer_logp = per_rationale(logps, in_answer)
    ref = logps.detach() if ref_logps is None else ref_logps
    token_kl, token_kl_slope = _token_kl(torch.where(in_rationale, logps - ref, 0), objective.kl)
    kl = per_rationale(token_kl, in_rationale)

    reward = answer_logp.detach().clone() if objective.floor is None else answer_logp.detach().clamp(objective.floor)
    if objective.kl == "k1" and objective.beta:
        reward = reward - objective.beta * kl.detach()
    # Results share storage neither with each other nor with what was given.
    advantage = leave_one_out(reward, scored, objective.scale) if advantage is None else advantage.clone()

    loss = -(advantage * rationale_logp + objective.answer_weight * answer_logp).sum() / denominator
    coefficients = torch.where(in_rationale, -advantage[rationale], 0) - objective.answer_weight * in_answer.to(
        logps.dtype
    )
    if objective.kl != "k1" and objective.beta:
        loss = loss + objective.beta * kl.sum() / denominator
        coefficients = coefficients + objective.beta * token_kl_slope * in_rationale
    if ref_logps is None:
        kl = torch.full_like(kl, torch.nan)
    return SelfRewardTerms(
        loss,
        reward,
        advantage,
        kl.detach(),
        rationale_logp.detach(),
        answer_logp.detach(),
        coefficients.detach() / denominator,
    )


def _token_kl(d: Tensor, kl: str) -> tuple[Tensor, Tensor]:
    """The estimate of KL(π, π0) at each token from d = log π − log π0, and its derivative in d."""
    if kl == "k1":
        return d, torch.ones_like(d)
    if kl == "k2":
        return d.square() / 2, d
    return torch.expm1(-d) + d, -torch.expm1(-d)


def leave_one_out(reward: Tensor, scored: ScoredTokens, scale: str | None) -> Tensor:
    """A_k = r_k − mean_{j≠k} r_j = (K r_k − Σ_j r_j) / (K − 1)."""
    P = scored.plan.group_rationales.shape[0] - 1
    prompt = scored.prompt

    def per_prompt(values: Tensor) -> Tensor:
        return values.new_zeros(P).index_add(0, prompt, values)

    count = per_prompt(torch.ones_like(reward))
    mean = per_prompt(reward) / count
    K = count[prompt]
    centred = reward - mean[prompt]
    advantage = centred * K / (K - 1)
    if scale == "group":
        std = (per_prompt(centred.square()) / (count - 1)).sqrt()
        advantage = advantage / (std[prompt] + STD_EPSILON)
    if scale == "batch":
        advantage = advantage / (reward.std() + STD_EPSILON)
    return advantage
