"""What a micro-batch says of the training: figures of TRL's names and ours, and rationales to read.

`rationale_length` counts a rationale's tokens, `completions/mean_length` all that was sampled, stop string included.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from latro.batch import Batch
from latro.metrics import group_deviation
from latro.objectives import Sums
from latro.text import Text
from latro_kernels import SelfRewardLoss
from latro_kernels.tree import RATIONALE


def figures(batch: Batch, out: SelfRewardLoss, sums: Sums, reward: Tensor, advantage: Tensor) -> dict[str, Tensor]:
    """Each of any size: what is logged is the mean of its elements."""
    samples = [sample for group in batch.groups for sample in group.samples]
    lengths = [len(rationale.tokens) for group in batch.groups for rationale in group.rationales]
    completions = torch.tensor([float(len(sample.tokens)) for sample in samples])
    deviation = group_deviation(reward, batch.scored.prompt)
    in_rationale = batch.scored.kind[batch.scored.segment] == RATIONALE
    assert out.entropy is not None
    return {
        "reward": reward,
        "reward_std": deviation,
        "frac_reward_zero_std": deviation == 0,
        **({"correct": batch.correct} if len(batch.correct) else {}),
        "advantage_std": group_deviation(advantage, batch.scored.prompt),
        "answer_logp": sums.answer,
        "kl": sums.kl,
        "entropy": out.entropy[in_rationale],
        "rationale_length": torch.tensor(lengths),
        "truncated_frac": batch.truncated,
        "completions/mean_length": completions,
        "sampling/logp_difference": _sampling_difference(batch, out.logps[in_rationale]),
        **{f"rewards/{name}/mean": values for name, values in batch.rewards.items()},
    }


def _sampling_difference(batch: Batch, logps: Tensor) -> Tensor:
    """|log-prob when sampled − log-prob in training| of each rationale token."""
    kind, segment = batch.scored.kind, batch.scored.segment
    per_segment = torch.bincount(segment, minlength=len(kind))[kind == RATIONALE].tolist()
    samples = [sample for group in batch.groups for sample in group.samples]
    # Golden rationales were not sampled, nor those of an older policy by this one.
    sampled = [
        logp
        for sample, count in zip(samples, per_segment, strict=True)
        for logp in (sample.logps[:count] if sample.logps else [math.nan] * count)
    ]
    difference = (logps - torch.tensor(sampled, device=logps.device, dtype=logps.dtype)).abs()
    return difference[~difference.isnan()]


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
