"""Log-probs of targets under a linear head, defined: whole logits, then log-softmax.

logits = softcap(logit_scale * (hidden[rows] @ weight.T + bias)) / temperature
out[m] = logits[m, targets[m]] - logsumexp(logits[m])
d out[m] / d logits[m] = onehot(targets[m]) - softmax(logits[m])
entropy[m] = -sum(p log p) for p = softmax(logits[m]), without a gradient
"""

from __future__ import annotations

import torch
from torch import Tensor

from latro_kernels._autograd import accumulator


def linear_logprobs(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    rows: Tensor,  # [M]
    targets: Tensor,  # [M]
    bias: Tensor | None,  # [V]
    temperature: float | Tensor,  # [M] if a tensor
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    log_probs = logits_of(hidden, weight, rows, bias, temperature, softcap, logit_scale).log_softmax(-1)
    logps = log_probs.gather(-1, targets[:, None]).squeeze(-1)
    return logps, torch.special.entr(log_probs.detach().exp()).sum(-1) if entropy else None


def logits_of(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """[M, V]"""
    logits = torch.nn.functional.linear(hidden.index_select(0, rows), weight, bias)
    logits = logits.to(accumulator(hidden.dtype)) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
