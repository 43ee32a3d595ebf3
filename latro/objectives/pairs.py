"""Objectives of two rationales of a prompt. ℓz = log π(z | x), ℓ0 the same under the reference.

extras["pairs"] [P, 2] holds rows of the batch's rationales, both of one prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from latro.objectives.base import Extras, Objective, Sums
from latro_kernels import ScoredTokens, checks


@dataclass(frozen=True)
class Dpo(Objective):
    """DPO (arXiv 2305.18290), the logistic loss of two rationales' log-ratios.

        m    = β [(ℓz − ℓ0)_chosen − (ℓz − ℓ0)_rejected]
        loss = −mean over pairs of log σ(m)                              ∂loss/∂ℓz = ∓β σ(−m) / P

    Self-Explore's granular pairs (2404.10346) are the same with the steps before the pit at the end of the prompt, the
    pit as the rejected rationale, and a right continuation as the chosen one. The answer behind is not trained: where
    it should be, let it be part of the rationale. The trainer samples pairs, or takes those that examples have.
    """

    NEEDS: ClassVar[tuple[str, ...]] = ("right and wrong",)
    over: ClassVar[Literal["rationales", "prompts", "correct", "pairs"]] = "pairs"
    beta: float = 0.1

    def __post_init__(self) -> None:
        checks.check_positive(type(self).__name__, "beta", self.beta)

    def __call__(self, logps: Tensor, scored: ScoredTokens, extras: Extras) -> Tensor:
        self.check(scored, extras)
        sums = Sums(logps, scored, extras["ref_logps"])
        return -logsigmoid(self.margin(sums, extras)).sum() / self.denominator(scored, extras)

    def margin(self, sums: Sums, extras: Extras) -> Tensor:
        chosen, rejected = self.pairs(sums.detach(), extras).unbind(1)
        ratio = sums.kl
        return self.beta * (ratio[chosen] - ratio[rejected])

    def pairs(self, sums: Sums, extras: Extras) -> Tensor:
        return extras["pairs"]

    def reward_and_advantage(self, sums: Sums, extras: Extras) -> tuple[Tensor, Tensor]:
        """DPO's implicit reward β (ℓz − ℓ0)."""
        reward = self.beta * sums.kl
        pull = self.beta * torch.sigmoid(-self.margin(sums, extras))
        chosen, rejected = self.pairs(sums, extras).unbind(1)
        return reward, torch.zeros_like(reward).index_add(0, chosen, pull).index_add(0, rejected, -pull)


@dataclass(frozen=True)
class RankedDpo(Dpo):
    """Iterative DPO without a checker: the rationale that makes the answer likeliest against the one that least does.

    chosen = argmax_k ℓy_k, rejected = argmin_k ℓy_k of each prompt, in Dpo's loss; the mean is over prompts
    """

    NEEDS: ClassVar[tuple[str, ...]] = ()
    compares: ClassVar[bool] = True
    over: ClassVar[Literal["rationales", "prompts", "correct", "pairs"]] = "prompts"

    def pairs(self, sums: Sums, extras: Extras) -> Tensor:
        answer = sums.answer
        groups = list(pairwise(sums.scored.plan.group_rationales.tolist()))
        rows = [begin + pick(answer[begin:end]) for begin, end in groups for pick in (torch.argmax, torch.argmin)]
        return torch.stack(rows).view(-1, 2)


@dataclass(frozen=True)
class Spin(Dpo):
    """SPIN (arXiv 2401.01335), whose logistic loss is Dpo's: the golden rationale against one of the model's own.

    The reference is the model that sampled: SPIN's next iteration is a run that starts from this one's model.
    """

    NEEDS: ClassVar[tuple[str, ...]] = ("golden", "golden and own")


@dataclass(frozen=True)
class Trice(Objective):
    """TRICE (arXiv 2312.02179): the gradient of log Σ_z π(z, y | x), by Markov chains over rationales that are right.

        chain c: a proposal z̃_c ~ π(z | x) becomes the state z_c if its own answer is right; else the state stays
        a_c  = mean over the other chains of the call of 1{their proposal was accepted}
        loss = −mean_c [ℓz(z_c) − a_c ℓz(z̃_c) + ℓy(z_c)]                 a detached

    a_c ℓz(z̃_c) is the control variate: of gradient 0 on average, and as the model improves nearly that of ℓz(z_c). It
    has no answer in it, for a wrong one of the model's own is not scored. Row c of pairs is (z_c, z̃_c), the same twice
    where the proposal was accepted; chains without a state, for nothing was right so far, are left out. Keeping states
    from one visit of a prompt to the next is the caller's, and so is a first state drawn with the answer as a hint.
    """

    NEEDS: ClassVar[tuple[str, ...]] = ("chains",)
    over: ClassVar[Literal["pairs"]] = "pairs"

    def reward_and_advantage(self, sums: Sums, extras: Extras) -> tuple[Tensor, Tensor]:
        """As reward, of how many chains a rationale is the state."""
        state, proposal = extras["pairs"].unbind(1)
        accepted = (state == proposal).to(sums.logps.dtype)
        rate = (accepted.sum() - accepted) / max(len(accepted) - 1, 1)
        states = self._states(sums, extras)
        return states, states.index_add(0, proposal, -rate)

    def answer_term(self, sums: Sums, extras: Extras) -> Tensor:
        return self._states(sums, extras) * sums.answer

    def _states(self, sums: Sums, extras: Extras) -> Any:
        state = extras["pairs"][:, 0]
        return sums.logps.new_zeros(sums.scored.prompt.shape[0]).index_add(
            0, state, torch.ones_like(state, dtype=sums.logps.dtype)
        )
