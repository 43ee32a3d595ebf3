"""LaTRO as published (arXiv 2411.04282), written plainly: five padded forwards with full logits for each rationale.

It knows nothing of trees or of this package. Everything else is compared with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAD = 0


def oracle_loss(model, reference, prompts, rationales, answers, *, beta, answer_weight, temperature=1.0) -> Tensor:
    """The loss over N prompts with K_n rationales each; `prompts`, `rationales[n]` and `answers` hold token lists."""
    x = [prompts[n] for n, group in enumerate(rationales) for _ in group]
    z = [rationale for group in rationales for rationale in group]
    y = [answers[n] for n, group in enumerate(rationales) for _ in group]
    xz = [a + b for a, b in zip(x, z, strict=True)]

    with torch.no_grad():
        rationale_logp = sequence_logp(model, x, z, temperature)
        answer_logp = sequence_logp(model, xz, y)
        reference_logp = sequence_logp(reference, x, z, temperature)
    reward = answer_logp - beta * (rationale_logp - reference_logp)
    advantage = leave_one_out(reward, [len(group) for group in rationales])

    rationale_logp = sequence_logp(model, x, z, temperature)
    answer_logp = sequence_logp(model, xz, y)
    return -(advantage * rationale_logp + answer_weight * answer_logp).mean()


def sequence_logp(model, contexts: list[list[int]], completions: list[list[int]], temperature: float = 1.0) -> Tensor:
    """log π(completion | context) of each row, from one right-padded batch."""
    rows = [c + d for c, d in zip(contexts, completions, strict=True)]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    attention_mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    completion_mask = torch.tensor(
        [
            [0] * len(c) + [1] * len(d) + [0] * (width - len(c) - len(d))
            for c, d in zip(contexts, completions, strict=True)
        ]
    )
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1] / temperature
    logps = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return (logps * completion_mask[:, 1:]).sum(-1)


def leave_one_out(reward: Tensor, group_sizes: list[int]) -> Tensor:
    advantages = []
    for group in reward.split(group_sizes):
        baseline = (group.sum() - group) / (len(group) - 1)
        advantages.append(group - baseline)
    return torch.cat(advantages)
