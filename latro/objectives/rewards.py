"""Policy gradients: a rationale's log-prob is weighed by what it earned, less what others of its prompt earned.

    ℓz_k = log π(z_k | x), ℓy_k = log π(y | x, z_k), R_k = exp ℓy_k, KL_k = ℓz_k − log π0(z_k | x)
    LOO(r)_k = r_k − mean_{j≠k} r_j

Rewards and advantages are detached, and averages are over the rationales of the batch where nothing else is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from latro.objectives.base import Extras, Objective, Sums, in_rationale
from latro_kernels import ScoredTokens, checks
from latro_kernels.self_reward.objective import STD_EPSILON, leave_one_out


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Objective):
    """c_k = LOO(reward + bonus)_k; extras may hold bonus [R], what reward functions give.

    Rationales that the policy did not draw itself are corrected token by token. In place of c_k ℓz_k there is

        Σ_t w_t min(ρ_t c_k, clip(ρ_t, 1 − ε, 1 + ε_high) c_k)           with epsilon, PPO's (arXiv 1707.06347)
        Σ_t w_t c_k log π(z_t)                                           without it

        ρ_t = π(z_t) / π_old(z_t)                                        π_old: the policy when it sampled
        w_t = min(C, π_old(z_t) / π_sampler(z_t)), detached              with importance_weight_cap C, else 1

    w is what Yao et al. (2025), "Your efficient RL framework secretly brings you off-policy RL training", call
    truncated importance sampling: what samples may compute other log-probs than what is trained. Of extras it reads
    sampling_logps [M], log π_sampler, where NaN stands for a token that nothing sampled: w is 1 there. old_logps [M] is
    log π_old, and that of π, detached, where it is not given. Where it is not and the samples are old, w has the
    staleness in it too.

    ρ is a token's and not the sequence's, as in PPO and GRPO: the product over hundreds of tokens leaves any interval
    after one update, and a rationale that is clipped as a whole teaches nothing. Rewards and advantages are those of
    the policy as it is at each update, which the same forward pass finds; the answer's term has no ratio.
    """

    compares: ClassVar[bool] = True
    importance_weight_cap: float | None = None
    epsilon: float | None = None
    epsilon_high: float | None = None  # epsilon by default

    def __post_init__(self) -> None:
        name = type(self).__name__
        for option in ("importance_weight_cap", "epsilon", "epsilon_high"):
            if getattr(self, option) is not None:
                checks.check_positive(name, option, getattr(self, option))
        if self.epsilon is not None and self.epsilon >= 1:
            raise ValueError(f"{name}: epsilon must be below 1, got {self.epsilon}")
        if self.epsilon is None and self.epsilon_high is not None:
            raise ValueError(f"{name}: epsilon_high must stand beside epsilon, got {self.epsilon_high} alone")

    def check(self, scored: ScoredTokens, extras: Extras) -> None:
        super().check(scored, extras)
        name = type(self).__name__
        if self.importance_weight_cap is not None and extras.get("sampling_logps") is None:
            raise ValueError(
                f"{name}: extras must hold sampling_logps [M], with which each token was drawn, for "
                f"importance_weight_cap, got {sorted(extras)}"
            )
        for extra in ("sampling_logps", "old_logps"):
            if extras.get(extra) is not None:
                checks.check_shape(name, extra, extras[extra], (scored.rows.shape[0],))

    def rationale_term(self, weight: Tensor, sums: Sums, extras: Extras) -> Tensor:
        if self.importance_weight_cap is None and self.epsilon is None:
            return super().rationale_term(weight, sums, extras)
        weight = weight[sums.scored.rationale[sums.scored.segment]]
        if self.epsilon is None:
            terms = weight * sums.logps
        else:
            ratio = self._ratio(sums, extras)
            terms = torch.minimum(ratio * weight, ratio.clamp(*self._trusted) * weight)
        if self.importance_weight_cap is not None:
            sampled = extras["sampling_logps"].to(terms.dtype)
            drawn = (_old_logps(sums, extras) - sampled).exp().clamp(max=self.importance_weight_cap)
            terms = terms * torch.where(sampled.isnan(), 1, drawn)
        return sums.over_rationale(terms)

    def is_clipped(self, weight: Tensor, sums: Sums, extras: Extras) -> Tensor:
        """[M], the rationales' tokens that have no gradient because of epsilon."""
        weight, ratio = weight[sums.scored.rationale[sums.scored.segment]], self._ratio(sums, extras)
        low, high = self._trusted
        return in_rationale(sums.scored) & (((ratio < low) & (weight < 0)) | ((ratio > high) & (weight > 0)))

    @property
    def _trusted(self) -> tuple[float, float]:
        assert self.epsilon is not None
        return 1 - self.epsilon, 1 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)

    def _ratio(self, sums: Sums, extras: Extras) -> Tensor:
        """ρ, and 1 at the tokens of answers."""
        return torch.where(in_rationale(sums.scored), sums.logps - _old_logps(sums, extras), 0).exp()

    def reward_and_advantage(self, sums: Sums, extras: Extras) -> tuple[Tensor, Tensor]:
        reward = self.reward(sums, extras) + extras.get("bonus", 0)
        return reward, self.advantage(reward, sums.scored)

    def reward(self, sums: Sums, extras: Extras) -> Tensor:
        raise NotImplementedError

    def advantage(self, reward: Tensor, scored: ScoredTokens) -> Tensor:
        return leave_one_out(reward, scored, getattr(self, "scale", None))


@dataclass(frozen=True)
class Latro(PolicyGradient):
    """LaTRO (arXiv 2411.04282), with what people add to its reward.

        r_k  = clip(max(ℓy_k, floor) + bonus_k) − β KL_k, less what a rationale that was cut off is punished by
        loss = −mean_k kept_k [LOO(r)_k ℓz_k + λ ℓy_k]                   LOO divided by a deviation on request

    mask_stop leaves the first token of y out of λ ℓy: it ends the rationale, and the term would teach to end rationales
    where they were ended, at once where most were empty. In the reward it stays.
    Of extras it reads ref_logps [M], bonus [R] and truncated [R] (whether a rationale was cut off).
    """

    beta: float = 0.05
    answer_weight: float = 1.0
    floor: float | None = None
    clip: tuple[float, float] | None = None
    scale: Literal["group", "batch"] | None = None
    truncation_penalty: float = 0.0
    truncation_reward: Literal["subtract", "mean"] = "subtract"
    mask_truncated: bool = False
    mask_stop: bool = False

    @property
    def couples(self) -> Literal["group", "batch"]:
        return "batch" if self.scale == "batch" or self.truncation_reward == "mean" else "group"

    def check(self, scored: ScoredTokens, extras: Extras) -> None:
        super().check(scored, extras)
        if (self.truncation_penalty or self.mask_truncated) and extras.get("truncated") is None:
            raise ValueError(
                "Latro: extras must hold truncated [R], whether a rationale was cut off, for truncation_penalty and "
                f"mask_truncated, got {sorted(extras)}"
            )

    def reward_and_advantage(self, sums: Sums, extras: Extras) -> tuple[Tensor, Tensor]:
        reward = sums.answer
        if self.floor is not None:
            reward = reward.clamp(min=self.floor)
        reward = reward + extras.get("bonus", 0)
        if self.clip is not None:
            reward = reward.clamp(*self.clip)
        reward = reward - self.beta * sums.kl
        if self.truncation_penalty:
            truncated = extras["truncated"]
            if self.truncation_reward == "mean":
                reward = torch.where(truncated, self.truncation_penalty * reward.mean(), reward)
            else:
                reward = reward - self.truncation_penalty * truncated
        return reward, self.advantage(reward, sums.scored)

    def answer_term(self, sums: Sums, extras: Extras) -> Tensor:
        return self.answer_weight * (sums.answer_behind_stop if self.mask_stop else sums.answer)

    def kept(self, terms: Tensor, extras: Extras) -> Tensor:
        return terms * ~extras["truncated"] if self.mask_truncated else terms


@dataclass(frozen=True)
class Jepo(PolicyGradient):
    """JEPO with one sample (arXiv 2503.19618): the bound E_z log π(y | x, z) ≤ log π(y | x).

        A_k  = LOO(ℓy)_k / its deviation, clipped to ±1
        loss = −mean_k [A_k ℓz_k + λ ℓy_k]

    The deviation is the group's, or the batch's on request; which of them the paper takes is not confirmed. λ is its
    β_sup, for which 0 to 0.01 is good with short answers and 1 with long ones.
    """

    answer_weight: float = 1.0
    scale: Literal["group", "batch"] | None = "group"
    advantage_clip: float = 1.0

    def reward(self, sums: Sums, extras: Extras) -> Tensor:
        return sums.answer

    def advantage(self, reward: Tensor, scored: ScoredTokens) -> Tensor:
        return super().advantage(reward, scored).clamp(-self.advantage_clip, self.advantage_clip)

    def answer_term(self, sums: Sums, extras: Extras) -> Tensor:
        return self.answer_weight * sums.answer


@dataclass(frozen=True)
class JepoMulti(PolicyGradient):
    """JEPO with n samples (arXiv 2503.19618): the tighter bound E log (1/K) Σ_k π(y | x, z_k).

    A_k  = log mean_j R_j − log mean_{j≠k} R_j
    loss = −mean over prompts of Σ_k [A_k ℓz_k + λ softmax_k(ℓy) ℓy_k]           softmax detached
    """

    over: ClassVar[Literal["prompts"]] = "prompts"
    answer_weight: float = 1.0

    def reward(self, sums: Sums, extras: Extras) -> Tensor:
        return sums.answer

    def advantage(self, reward: Tensor, scored: ScoredTokens) -> Tensor:
        itself = torch.eye(len(reward), dtype=torch.bool, device=reward.device)
        return _log_mean_exp(reward, _same_prompt(scored)) - _log_mean_exp(reward, _same_prompt(scored) & ~itself)

    def answer_term(self, sums: Sums, extras: Extras) -> Tensor:
        same, answer = _same_prompt(sums.scored), sums.answer.detach()
        share = (answer - _log_mean_exp(answer, same)).exp() / same.sum(1)
        return self.answer_weight * share * sums.answer


def _old_logps(sums: Sums, extras: Extras) -> Tensor:
    old = extras.get("old_logps")
    return sums.logps.detach() if old is None else old.to(sums.logps.dtype)


def _same_prompt(scored: ScoredTokens) -> Tensor:
    return scored.prompt[:, None] == scored.prompt  # [R, R]


def _log_mean_exp(values: Tensor, members: Tensor) -> Tensor:
    """Of each row's members: values [R], members [R, R] -> [R]."""
    return torch.where(members, values, -torch.inf).logsumexp(1) - members.sum(1).to(values.dtype).log()


@dataclass(frozen=True)
class VeriFree(PolicyGradient):
    """VeriFree (arXiv 2505.21493): the gradient of E_z π(y | x, z), of the answer's probability itself.

        loss = −mean_k [LOO(R)_k ℓz_k + R_k ℓy_k]                       R detached

    There is no KL term. Where an answer has many tokens, R is 0 and nothing is learned.
    """

    def reward(self, sums: Sums, extras: Extras) -> Tensor:
        return sums.answer.exp()

    def answer_term(self, sums: Sums, extras: Extras) -> Tensor:
        return sums.answer.detach().exp() * sums.answer


@dataclass(frozen=True)
class AvgLogprob(PolicyGradient):
    """The average log-prob of arXiv 2602.03979: an answer counts alike whatever its length.

    loss = −mean_k [LOO(ℓy / |y|)_k ℓz_k + λ ℓy_k / |y|]
    """

    answer_weight: float = 1.0

    def reward(self, sums: Sums, extras: Extras) -> Tensor:
        return sums.answer / sums.answer_tokens

    def answer_term(self, sums: Sums, extras: Extras) -> Tensor:
        return self.answer_weight * sums.answer / sums.answer_tokens


@dataclass(frozen=True)
class Rlpr(PolicyGradient):
    """RLPR (arXiv 2506.18254): the mean probability of the answer's tokens, less the same without a rationale.

        r_k  = clip(mean_t π(y_t | x, z_k, y_<t) − mean_t π(y_t | x, y_<t), 0, 1)
        loss = −mean_k (r_k − mean_j r_j) / deviation ℓz_k               over the prompt's rationales

    The paper also leaves out prompts whose rewards hardly differ, by a threshold that moves: that is the caller's.
    """

    NEEDS: ClassVar[tuple[str, ...]] = ("baseline",)

    def reward(self, sums: Sums, extras: Extras) -> Tensor:
        return (sums.answer_probability - sums.baseline_probability).clamp(0, 1)

    def advantage(self, reward: Tensor, scored: ScoredTokens) -> Tensor:
        """GRPO's, whose mean has the rationale itself in it."""
        of_prompt = _same_prompt(scored).to(reward.dtype)
        count = of_prompt.sum(1)
        centred = reward - of_prompt @ reward / count
        return centred / ((of_prompt @ centred.square() / (count - 1)).sqrt() + STD_EPSILON)


@dataclass(frozen=True)
class Gain(PolicyGradient):
    """The reward of RLP (arXiv 2510.01265): how much likelier the rationale makes the answer than no rationale does.

        g_k  = max(ℓy_k − log π(y | x), floor)
        loss = −mean_k LOO(g)_k ℓz_k

    log π(y | x) is the same for all rationales of a prompt and falls out of LOO: without a floor this is the gradient
    of Latro(beta=0, answer_weight=0). With floor=0 no rationale is worth less than none. RLP takes the baseline from a
    moving average of the policy, and has a clipped ratio for its stale samples; here it is the policy's own.
    """

    NEEDS: ClassVar[tuple[str, ...]] = ("baseline",)
    floor: float | None = None

    def reward(self, sums: Sums, extras: Extras) -> Tensor:
        gain = sums.answer - sums.baseline
        return gain if self.floor is None else gain.clamp(min=self.floor)


@dataclass(frozen=True)
class Rloo(PolicyGradient):
    """Verified RLOO: the reward is whether the model's own answer was right.

        loss = −mean_k [LOO(1{correct_k} − β KL_k)_k ℓz_k + λ 1{correct_k} ℓy_k]

    With λ = 1 and β = 0 an estimate without bias of the gradient of P(correct), where one text alone is right: a right
    answer of its own is y, and a wrong one, which is not scored, is left out of a baseline of mean 0. VeriFree is the
    same with the probability in place of the outcome.
    """

    NEEDS: ClassVar[tuple[str, ...]] = ("correct",)
    beta: float = 0.0
    answer_weight: float = 1.0

    def reward(self, sums: Sums, extras: Extras) -> Tensor:
        return extras["correct"].to(sums.logps.dtype) - self.beta * sums.kl

    def answer_term(self, sums: Sums, extras: Extras) -> Tensor:
        return self.answer_weight * (extras["correct"] * sums.answer)


@dataclass(frozen=True)
class MultipleChoice(PolicyGradient):
    """The log-odds of the right option, which a likelier wording of all options does not change.

    o_k  = log π(y | x, z_k) − log Σ_wrong π(y_o | x, z_k)
    loss = −mean_k [LOO(o)_k ℓz_k + λ log σ(o_k)]                    log σ(o): of the right option among the options
    """

    NEEDS: ClassVar[tuple[str, ...]] = ("options",)
    answer_weight: float = 1.0

    def reward(self, sums: Sums, extras: Extras) -> Tensor:
        return sums.log_odds

    def answer_term(self, sums: Sums, extras: Extras) -> Tensor:
        return self.answer_weight * logsigmoid(sums.log_odds)
