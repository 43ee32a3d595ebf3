"""What a step descends, as a few lines over the log-probs of rationales and answers.

    ℓz_k = log π(z_k | x), ℓy_k = log π(y | x, z_k)
    r_k  = clip(max(ℓy_k, floor) + bonus_k) − β KL_k, less what a rationale that was cut off is punished by
    A_k  = r_k − mean of the other rewards of the prompt, divided by a standard deviation on request
    loss = −(1 / denominator) Σ_k kept_k [A_k ℓz_k + λ ℓy_k]

Sizes: M scored tokens, R rationales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from latro_kernels import ScoredTokens
from latro_kernels.self_reward.objective import leave_one_out
from latro_kernels.tree import ANSWER, RATIONALE


class Sums(NamedTuple):
    """Over the tokens of each rationale and its answer [R]."""

    rationale: Tensor  # ℓz
    answer: Tensor  # ℓy
    kl: Tensor  # ℓz − ℓz under the reference; 0 without one

    @staticmethod
    def of(logps: Tensor, scored: ScoredTokens, ref_logps: Tensor | None) -> Sums:
        kind, rationale = scored.kind[scored.segment], scored.rationale[scored.segment]

        def total(values: Tensor, members: Tensor) -> Tensor:
            zeros = values.new_zeros(scored.prompt.shape[0])
            return zeros.index_add(0, rationale, torch.where(members, values, 0))

        in_rationale = kind == RATIONALE
        in_answer = (kind == ANSWER) & (scored.option[scored.segment] == 0)
        of_rationale = total(logps, in_rationale)
        kl = torch.zeros_like(of_rationale) if ref_logps is None else of_rationale - total(ref_logps, in_rationale)
        return Sums(of_rationale, total(logps, in_answer), kl)


@dataclass(frozen=True)
class Latro:
    """LaTRO's objective, with what people add to its reward.

    Of extras it reads ref_logps [M], bonus [R] (added to the reward), truncated [R] (whether a rationale was cut off),
    and denominator.
    """

    beta: float = 0.05
    answer_weight: float = 1.0
    floor: float | None = None
    clip: tuple[float, float] | None = None
    scale: Literal["group", "batch"] | None = None
    truncation_penalty: float = 0.0
    truncation_reward: Literal["subtract", "mean"] = "subtract"
    mask_truncated: bool = False

    @property
    def couples(self) -> Literal["group", "batch"]:
        return "batch" if self.scale == "batch" or self.truncation_reward == "mean" else "group"

    def __call__(self, logps: Tensor, scored: ScoredTokens, extras: Mapping[str, Any]) -> Tensor:
        sums = Sums.of(logps, scored, extras.get("ref_logps"))
        _, advantage = self.reward_and_advantage(sums, scored, extras)
        loss = -(advantage * sums.rationale + self.answer_weight * sums.answer)
        if self.mask_truncated:
            loss = loss * ~extras["truncated"]
        return loss.sum() / extras.get("denominator", len(loss))

    def reward_and_advantage(
        self, sums: Sums, scored: ScoredTokens, extras: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        reward = sums.answer.detach()
        if self.floor is not None:
            reward = reward.clamp(min=self.floor)
        reward = reward + extras.get("bonus", 0)
        if self.clip is not None:
            reward = reward.clamp(*self.clip)
        reward = reward - self.beta * sums.kl.detach()
        if self.truncation_penalty:
            truncated = extras["truncated"]
            if self.truncation_reward == "mean":
                reward = torch.where(truncated, self.truncation_penalty * reward.mean(), reward)
            else:
                reward = reward - self.truncation_penalty * truncated
        return reward, leave_one_out(reward, scored, self.scale)


OBJECTIVES = {"latro": Latro}
