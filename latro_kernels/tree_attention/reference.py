"""Tree attention, defined: softmax over the keys on the query's own path.

out[h, i] = sum_j p[h, i, j] v[h // G, j]          G = H / Hkv query heads share a key head
p[h, i, :] = softmax over visible j of softcap(scale * q[h, i] . k[h // G, j]), with sinks[h] as one more logit
visible: j <= i < reach[j], and positions[i] - positions[j] < window
"""

from __future__ import annotations

import torch
from torch import Tensor

from latro_kernels._autograd import accumulator
from latro_kernels.tree import PrefixTree


def tree_attention(
    q: Tensor,  # [H, T, E]
    k: Tensor,  # [Hkv, T, E]
    v: Tensor,  # [Hkv, T, E]
    tree: PrefixTree,
    sinks: Tensor | None,  # [H]
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    H, T, E = q.shape
    Hkv = k.shape[0]
    scores = q.reshape(Hkv, H // Hkv, T, E) @ k[:, None].mT
    scores = scores.to(accumulator(q.dtype)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible(tree, window), -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype).reshape(Hkv, H // Hkv, 1, 1).expand(-1, -1, T, 1)
        scores = torch.cat([scores, sink], dim=-1)
    p = torch.softmax(scores, dim=-1)[..., :T].to(v.dtype)
    out = (p @ v[:, None]).reshape(H, T, E)
    return out.transpose(0, 1).contiguous().transpose(0, 1)  # [T, H * E] is a view


def visible(tree: PrefixTree, window: int | None) -> Tensor:
    """The mask [T queries, T keys] that the kernels never store."""
    reach, positions = tree.reach, tree.positions
    row = torch.arange(reach.shape[0], device=reach.device)
    i, j = row[:, None], row[None, :]
    mask = (j <= i) & (i < reach[None, :])
    if window is not None:
        mask &= positions[:, None] - positions[None, :] < window
    return mask
