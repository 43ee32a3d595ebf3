"""What a micro-batch says of the training: figures of TRL's names and ours, and rationales to read.

`rationale_length` counts a rationale's tokens, `completions/mean_length` all that was sampled, stop string included.
`clip_ratio/region_mean` is the share of rationale tokens without a gradient because of epsilon.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latro.batch import Batch
from latro.metrics import group_deviation
from latro.objectives import Objective, PolicyGradient, Sums
from latro.objectives.base import in_rationale
from latro.text import Text
from latro_kernels import SelfRewardLoss


def figures(
    batch: Batch, objective: Objective, out: SelfRewardLoss, sums: Sums, reward: Tensor, advantage: Tensor
) -> dict[str, Tensor]:
    """Each of any size: what is logged is the mean of its elements."""
    samples = [sample for group in batch.groups for sample in group.samples]
    lengths = [len(rationale.tokens) for group in batch.groups for rationale in group.rationales]
    completions = torch.tensor([float(len(sample.tokens)) for sample in samples])
    deviation = group_deviation(reward, batch.scored.prompt)
    of_rationales = in_rationale(batch.scored)
    assert out.entropy is not None
    return {
        "reward": reward,
        "reward_std": deviation,
        "frac_reward_zero_std": deviation == 0,
        **({"correct": batch.correct} if len(batch.correct) else {}),
        "advantage_std": group_deviation(advantage, batch.scored.prompt),
        "answer_logp": sums.answer,
        "kl": sums.kl,
        "entropy": out.entropy[of_rationales],
        "rationale_length": torch.tensor(lengths),
        "truncated_frac": batch.truncated,
        "completions/mean_length": completions,
        **_mismatch(batch, out.logps),
        **_clipping(batch, objective, sums, advantage),
        **{f"rewards/{name}/mean": values for name, values in batch.rewards.items()},
    }


def log_ratios(batch: Batch, logps: Tensor) -> Tensor:
    """log π(z_t) − log π_sampler(z_t) of each rationale token that was drawn, π being the policy when it sampled."""
    policy = logps if batch.old_logps is None else batch.old_logps.to(logps.dtype)
    difference = policy - batch.sampling_logps.to(logps.dtype)
    return difference[~difference.isnan()]


def largest(batch: Batch, logps: Tensor) -> dict[str, Tensor]:
    """Each of any size: what is logged is the largest of its elements."""
    return {"sampling/max_ratio": log_ratios(batch, logps).exp()}


def _mismatch(batch: Batch, logps: Tensor) -> dict[str, Tensor]:
    """With ratio = π / π_sampler: the mean of ratio − 1 − log ratio estimates KL(π_sampler, π) at a token, and is never
    negative (k3 of http://joschu.net/blog/kl-approx.html)."""
    difference = log_ratios(batch, logps)
    return {"sampling/logp_difference": difference.abs(), "sampling/kl": torch.expm1(difference) - difference}


def _clipping(batch: Batch, objective: Objective, sums: Sums, advantage: Tensor) -> dict[str, Tensor]:
    if not isinstance(objective, PolicyGradient) or objective.epsilon is None:
        return {}
    clipped = objective.is_clipped(advantage, sums, batch.extras())
    return {"clip_ratio/region_mean": clipped[in_rationale(batch.scored)]}


def rationales(
    batch: Batch, text: Text, sums: Sums, reward: Tensor, advantage: Tensor, most: int
) -> list[dict[str, Any]]:
    """Of the batch's first prompts, each with its rationales and what they earned."""
    columns = {"reward": reward, "advantage": advantage, "answer_logp": sums.answer, "kl": sums.kl}
    values = {name: iter(column.detach().float().tolist()) for name, column in columns.items()}
    return [
        {
            "id": group.example.id,
            "prompt": text.decode(group.prompt),
            "answer": group.example.answer,
            "rationales": [
                {
                    "text": rationale.text,
                    "answer_text": text.decode(answer),
                    "ended_by": sample.ended_by,
                    "length": len(rationale.tokens),
                    **{name: next(column) for name, column in values.items()},
                }
                for rationale, answer, sample in zip(group.rationales, group.answers, group.samples, strict=True)
            ],
        }
        for group in batch.groups[:most]
    ]
