"""LaTRO's loss: reward each rationale by the log-prob it gives to the answer.

    r_k  = log π(y | x, z_k) − β log [π(z_k | x) / π0(z_k | x)]
    A_k  = r_k − mean of the other r_j of the same prompt
    loss = −(1/R) Σ_k [A_k log π(z_k | x) + λ log π(y | x, z_k)]     r and A detached

Sizes: T hidden rows, D hidden, V vocabulary, M scored tokens, R rationales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latro_kernels import checks
from latro_kernels._autograd import first_order
from latro_kernels.impl import choose
from latro_kernels.linear_logprobs.api import KERNELS, backend_of, head_operands, kernels_of
from latro_kernels.linear_logprobs.head import head_of
from latro_kernels.linear_logprobs.parallel import VocabularyShard, vocabulary_size
from latro_kernels.self_reward import grouped, native
from latro_kernels.self_reward import objective as definition
from latro_kernels.self_reward.objective import Objective, SelfReward, SelfRewardTerms
from latro_kernels.tree import RATIONALE, ScoredTokens

BACKENDS = {"native": native.self_reward, "reference": definition.self_reward}


class SelfRewardLoss(NamedTuple):
    """Only `loss` carries gradient. With an objective other than SelfReward, reward and advantage are NaN."""

    loss: Tensor  # []
    reward: Tensor  # [R]
    advantage: Tensor  # [R]
    kl: Tensor  # [R], NaN without ref_logps
    rationale_logp: Tensor  # [R], log π(z | x)
    answer_logp: Tensor  # [R], log π(y | x, z)
    logps: Tensor  # [M]
    entropy: Tensor | None  # [M], when it is asked for


def fused_self_reward_loss(
    hidden: Tensor,
    weight: Tensor,
    scored: ScoredTokens,
    *,
    ref_logps: Tensor | None = None,
    beta: float | None = None,
    answer_weight: float | None = None,
    objective: Objective | None = None,
    advantage: Tensor | None = None,
    denominator: float | None = None,
    extras: Mapping[str, Tensor] | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    shard: VocabularyShard | None = None,
    impl: str = "auto",
) -> SelfRewardLoss:
    """The self-reward loss from hidden states and the weight of the output head.

    hidden: [T, D], or [B, L, D] with the rows of `ScoredTokens.from_padded`. weight: [V, D]. bias: [V].
    ref_logps: [M], `linear_logprobs` of the same tokens under the reference model; not read at answers.
    beta, answer_weight: short for objective=SelfReward(beta, answer_weight); 0.05 and 1 by default.
    objective: any `Objective`; `extras` are tensors for it.
    advantage: [R], used as is in place of the leave-one-out advantage, so that a prompt's rationales may be split over
        micro-batches or ranks.
    denominator: what the sum over rationales is divided by; by default R. With micro-batches or ranks that hold
        different numbers, give each the global number and add up the gradients.
    temperature: of the rationales, which were sampled at it. Answers are scored at 1.
    entropy: also find that of each scored token's distribution, for logs.
    shard: weight and bias are this rank's rows of a vocabulary that is cut over a process group; all else is the same
        on all ranks of the group, and so are results and the gradient of hidden.
    """
    operator = "fused_self_reward_loss"
    objective = _objective(operator, objective, beta, answer_weight)
    hidden = _flatten(operator, hidden, scored)
    checks.check_shape(operator, "weight", weight, ("V", hidden.shape[1]))
    V = vocabulary_size(operator, weight, shard)
    if scored.plan.min_vocab > V:
        raise ValueError(f"{operator}: weight must have a row for target {scored.plan.min_vocab - 1}, got {V} rows")
    checks.check_positive(operator, "temperature", temperature)
    given = _given(operator, scored, "hidden", hidden, ref_logps, advantage, denominator)
    extras = _own_extras(operator, extras)
    # Not a subclass, which may compute something else.
    self_reward_objective = objective if type(objective) is SelfReward else None
    if self_reward_objective:
        self_reward_objective.check(scored, ref_logps, advantage)
        if extras:
            raise ValueError(f"{operator}: SelfReward reads no extras, got {sorted(extras)}")
    operands = head_operands(
        operator,
        hidden,
        weight,
        scored.rows,
        scored.targets,
        bias,
        _temperatures(temperature, scored),
        softcap,
        logit_scale,
        shard,
    )
    backend = choose(operator, impl, operands[0].device, operands[0].dtype)
    part = "reference" if backend == "reference" else "auto"

    def terms_of(logps: Tensor) -> SelfRewardTerms:
        if self_reward_objective:
            return self_reward(logps, scored, self_reward_objective, **given, impl=part)
        return _other_terms(objective(logps, scored, {**given, **extras}), logps, scored, ref_logps)

    found: Tensor | None
    if backend in KERNELS and _in_one_go(operands, extras):
        # With shards the batch stays whole: ranks that have more rows would cut it into more parts than others.
        couples_batch = shard is not None or getattr(objective, "couples", "batch") != "group"
        terms, logps, found = grouped.loss_and_logps(
            kernels_of(backend, shard), head_of(*operands), scored.plan, couples_batch, terms_of
        )
    else:
        logps, found = backend_of(backend, shard)(*operands, entropy)
        terms = terms_of(logps)
    return SelfRewardLoss(
        terms.loss,
        terms.reward,
        terms.advantage,
        terms.kl,
        terms.rationale_logp,
        terms.answer_logp,
        logps.detach(),
        found if entropy else None,
    )


def _in_one_go(operands: tuple[Any, ...], extras: Mapping[str, Any]) -> bool:
    """Whether to make gradients with the loss: torch.compile could not see into it, nor gradients reach extras."""
    hidden, weight, *_, bias = operands[:5]
    wanted = any(tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias))
    carried = any(isinstance(value, Tensor) and value.requires_grad for value in extras.values())
    return wanted and torch.is_grad_enabled() and not carried and not torch.compiler.is_compiling()


def self_reward(
    logps: Tensor,
    scored: ScoredTokens,
    objective: SelfReward | None = None,
    *,
    ref_logps: Tensor | None = None,
    advantage: Tensor | None = None,
    denominator: float | None = None,
    impl: str = "auto",
) -> SelfRewardTerms:
    """The self-reward objective alone: log-probs [M] to loss, reward, advantage, KL, and ∂loss/∂logps [M]."""
    operator = "self_reward"
    objective = SelfReward() if objective is None else objective
    if type(objective) is not SelfReward:  # a subclass may compute something else, which this would ignore
        raise TypeError(
            f"{operator}: objective must be a SelfReward, got {objective!r:.80}; "
            "fused_self_reward_loss takes any objective"
        )
    _check_scored(operator, scored)
    checks.check_shape(operator, "logps", logps, (scored.rows.shape[0],))
    if logps.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{operator}: logps must have dtype torch.float32 or torch.float64, got {logps.dtype}")
    checks.check_device(operator, "scored", scored.rows, "logps", logps)
    given = _given(operator, scored, "logps", logps, ref_logps, advantage, denominator)
    objective.check(scored, ref_logps, advantage)
    backend = BACKENDS[choose(operator, impl, logps.device)]
    return backend(
        first_order(logps),
        scored,
        objective,
        _like(given.get("ref_logps"), logps),
        _like(given.get("advantage"), logps),
        float(given.get("denominator", scored.prompt.shape[0])),
    )


def _objective(
    operator: str, objective: Objective | None, beta: float | None, answer_weight: float | None
) -> Objective:
    if objective is None:
        defaults = SelfReward()
        return SelfReward(
            beta=defaults.beta if beta is None else beta,
            answer_weight=defaults.answer_weight if answer_weight is None else answer_weight,
        )
    for name, value in (("beta", beta), ("answer_weight", answer_weight)):
        if value is not None:
            raise ValueError(
                f"{operator}: {name} is short for objective=SelfReward({name}=...) and cannot stand beside objective, "
                f"got {name}={value}"
            )
    if not callable(objective):
        raise TypeError(f"{operator}: objective must be callable, got {type(objective).__name__}")
    return objective


def _flatten(operator: str, hidden: Tensor, scored: ScoredTokens) -> Tensor:
    """hidden as [T, D]."""
    checks.check_tensors(operator, hidden=hidden)
    _check_scored(operator, scored)
    if hidden.dim() == 3:
        hidden = hidden.flatten(0, 1)
    checks.check_shape(operator, "hidden", hidden, (scored.plan.hidden_rows, "D"))
    if scored.rows.device != hidden.device:
        raise ValueError(
            f"{operator}: scored must be on {hidden.device} with hidden, got {scored.rows.device}; "
            f"use scored.to('{hidden.device}')"
        )
    return hidden


def _check_scored(operator: str, scored: ScoredTokens) -> None:
    if not isinstance(scored, ScoredTokens):
        raise TypeError(f"{operator}: scored must be ScoredTokens, got {type(scored).__name__}")


def _own_extras(operator: str, extras: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    if extras is None:
        return {}
    if not isinstance(extras, Mapping):
        raise TypeError(f"{operator}: extras must be a mapping of names to tensors, got {type(extras).__name__}")
    for name in ("ref_logps", "advantage", "denominator"):
        if name in extras:
            raise ValueError(f"{operator}: extras must not hold {name!r}, which is an argument of its own")
    return extras


def _given(
    operator: str,
    scored: ScoredTokens,
    like_name: str,
    like: Tensor,
    ref_logps: Tensor | None,
    advantage: Tensor | None,
    denominator: float | None,
) -> dict[str, Any]:
    """What was given besides the log-probs, checked and detached."""
    given: dict[str, Any] = {}
    for name, tensor, size in (("ref_logps", ref_logps, scored.rows), ("advantage", advantage, scored.prompt)):
        if tensor is not None:
            checks.check_shape(operator, name, tensor, (size.shape[0],))
            checks.check_floating(operator, name, tensor)
            checks.check_device(operator, name, tensor, like_name, like)
            given[name] = tensor.detach()
    if denominator is not None:
        checks.check_positive(operator, "denominator", denominator)
        given["denominator"] = denominator
    return given


def _temperatures(temperature: float, scored: ScoredTokens) -> float | Tensor:
    """One for each scored token: the policy's at rationales, 1 elsewhere."""
    if temperature == 1:
        return 1.0
    sampled = scored.kind[scored.segment] == RATIONALE
    # Arithmetic, because torch.compile would compile a fill again for each new temperature.
    return 1 + sampled.double() * (temperature - 1)


def _like(tensor: Tensor | None, logps: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(logps.dtype)


def _other_terms(loss: Tensor, logps: Tensor, scored: ScoredTokens, ref_logps: Tensor | None) -> SelfRewardTerms:
    """The same record for an objective that defines no reward: what can be said of any."""
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"fused_self_reward_loss: objective must return a loss of shape [], got {got}")
    unknown = logps.new_full((scored.prompt.shape[0],), torch.nan)
    ref_logps = _like(ref_logps, logps)
    terms = definition.self_reward(logps.detach(), scored, SelfReward(beta=0), ref_logps, unknown, 1.0)
    return SelfRewardTerms(
        loss,
        unknown,
        unknown.clone(),
        terms.kl,
        terms.rationale_logp,
        terms.answer_logp,
        terms.coefficients,
    )
