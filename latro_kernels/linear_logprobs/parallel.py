"""Log-probs under a linear head whose vocabulary is cut over the ranks of a process group: tensor parallelism.

Rank r has V_r rows of weight and of bias; hidden, rows and targets are the same on all ranks, and so are results.

    lse_r = log Σ_{v of r} exp l_v          w_r = exp lse_r / Σ_s exp lse_s       the share of rank r's rows
    logp  = logp_r + log w_r                of the rank that has the target; logp_r is what its own kernels find
    H     = Σ_r (w_r H_r − w_r log w_r)     entropy
    ∂logp / ∂l_v = 1[v is the target] − w_r p_v                                   p_v = exp(l_v − lse_r)

So a backend's kernels run on the rank's rows as they are. Ranks gather 4 M numbers when they score, and add up the
gradient of hidden; those of weight and bias stay where they are. The kernels are given the coefficient c w_r, for which
they make c w_r (1[target] − p_v); what the target lacks, c (1 − w_r), is added to it in float32. A token whose target
another rank has is given a row of this one, at which the kernels are told to make −c w_r p_v as anywhere.
Sizes: T hidden rows, D hidden, V vocabulary, M scored tokens, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from latro_kernels._autograd import accumulator, refuse_forward_mode
from latro_kernels.linear_logprobs.head import Grads, Head, Kernels, head_of, new_grads, score
from latro_kernels.linear_logprobs.reference import logits_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class VocabularyShard:
    """Which rows of the head's weight this rank has: [begin, end) of `size`.

    Made once, by all ranks of `group` together: each gives the row that it begins with, and has those up to where the
    next begins. Where a bias masks rows by -inf, each rank must have one that it does not mask, or results are NaN.
    """

    group: dist.ProcessGroup
    begin: int
    size: int
    end: int = field(init=False)

    def __post_init__(self) -> None:
        if dist.get_rank(self.group) < 0:
            raise ValueError("VocabularyShard: group must have this process among its ranks")
        places: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(places, (self.begin, self.size), group=self.group)
        # Of all ranks' numbers, so that all of them raise.
        begins, sizes = zip(*places, strict=True)
        if not all(type(number) is int for number in (*begins, *sizes)):
            raise TypeError(f"VocabularyShard: begin and size must be whole numbers, got {begins} and {sizes}")
        bounds = [*sorted(begins), self.size]
        if len(set(sizes)) > 1 or bounds[0] != 0 or not all(one < next_one for one, next_one in pairwise(bounds)):
            raise ValueError(
                "VocabularyShard: the ranks of group must begin at different rows in [0, size), one of them at 0, and "
                f"have the same size, got begin {begins} and size {sizes}"
            )
        object.__setattr__(self, "end", min(bound for bound in bounds if bound > self.begin))

    @classmethod
    def of(cls, weight: DTensor) -> VocabularyShard:
        """Of a DTensor that one dimension of its mesh cuts by Shard(0); weight.to_local() are the rows."""
        from torch.distributed.tensor import Replicate, Shard

        cut = [n for n, placement in enumerate(weight.placements) if type(placement) is Shard and placement.dim == 0]
        if len(cut) != 1 or not all(isinstance(p, Replicate) for n, p in enumerate(weight.placements) if n not in cut):
            raise ValueError(
                "VocabularyShard.of: weight must be cut by Shard(0) over one dimension of its mesh and replicated over "
                f"the others, got {weight.placements}"
            )
        group = weight.device_mesh.get_group(cut[0])
        V, W = weight.shape[0], dist.get_world_size(group)
        rows = -(-V // W)  # of each rank but the last
        if rows * (W - 1) >= V:
            raise ValueError(f"VocabularyShard.of: weight must have a row for each rank, got {V} over {W} ranks")
        return cls(group, rows * dist.get_rank(group), V)

    def own_targets(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Which targets are rows of this rank, and a row of its weight for each: the target's where it is here."""
        own = targets - self.begin
        rows = self.end - self.begin
        return (own >= 0) & (own < rows), own % rows


def vocabulary_size(operator: str, weight: Tensor, shard: VocabularyShard | None) -> int:
    """Of the whole vocabulary, after a check of the shard."""
    rows = weight.shape[0]
    if shard is None:
        return rows
    if not isinstance(shard, VocabularyShard):
        raise TypeError(f"{operator}: shard must be a VocabularyShard, got {type(shard).__name__}")
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{operator}: shard cannot be compiled; call it under torch.compiler.disable")
    if rows != shard.end - shard.begin:
        raise ValueError(
            f"{operator}: weight must have the rows [begin, end) = [{shard.begin}, {shard.end}) of its shard, "
            f"{shard.end - shard.begin}, got {rows}"
        )
    return shard.size


def backend(kernels: Kernels | None, shard: VocabularyShard) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The operator with these kernels, or with none the definition, on this rank's rows."""
    return partial(_reference, shard) if kernels is None else partial(_linear_logprobs, sharded(kernels, shard))


def sharded(kernels: Kernels, shard: VocabularyShard) -> Kernels:
    """The same halves for targets of the whole vocabulary, on this rank's rows."""
    forward, add_grads = partial(_Sharded.apply, kernels, shard), partial(_add_grads, kernels, shard)
    return kernels._replace(forward=forward, add_grads=add_grads)


def _linear_logprobs(kernels: Kernels, *operands: Any) -> tuple[Tensor, Tensor | None]:
    refuse_forward_mode("linear_logprobs")
    *head, entropy = operands
    logps, found = score(kernels, head_of(*head))
    return logps, found if entropy else None


def _reference(
    shard: VocabularyShard,
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """In float64, as what is summed over the ranks must not be rounded to hidden's dtype first."""
    dtype = accumulator(hidden.dtype)
    hidden = _SumGradient.apply(hidden.double(), shard.group)
    bias = None if bias is None else bias.double()
    logits = logits_of(hidden, weight.double(), rows, bias, temperature, softcap, logit_scale)
    here, own = shard.own_targets(targets)
    lse = logits.logsumexp(-1)
    of_shard = logits.gather(-1, own[:, None]).squeeze(-1) - lse
    found = torch.special.entr(logits.detach().softmax(-1)).sum(-1) if entropy else torch.zeros_like(lse)
    logps, found, _ = _combine(shard, here, lse, of_shard, found)
    return logps.to(dtype), found.detach().to(dtype) if entropy else None


class _Sharded(torch.autograd.Function):
    """Kernels.forward. What it returns more: what the kernels' own add_grads takes, ∂l / ∂(x·W + b) at the target [M]
    and log w_r [M]."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, shard: VocabularyShard, *arguments: Any) -> tuple[Tensor, ...]:
        *operands, budget, unit_grad = arguments
        head = Head(*operands)
        of_shard, here = _head_of_shard(shard, head)
        logps, entropy, *kept = kernels.forward(*of_shard, budget, unit_grad)
        own = kernels.of_shard(here, logps, kept)
        logps, entropy, log_share = _combine(shard, here, own.lse, own.logps, entropy)
        outputs = logps.float(), entropy.float(), *own.kept, _slope(head, own.slope), log_share
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.save_for_backward(*head, *outputs[2:])
        ctx.kernels, ctx.shard = kernels, shard
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: torch.utils.checkpoint refuses a second time
        head = Head(*saved[: len(Head._fields)])
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[2:5]
        grads = new_grads(head, for_hidden, for_weight, for_bias, whole=True)
        _add_grads(ctx.kernels, ctx.shard, grad, head, saved[len(Head._fields) :], grads, True)
        dtype = head.hidden.dtype
        return None, None, *(None if own is None else own.to(dtype) for own in grads), *(None for _ in range(6))


def _head_of_shard(shard: VocabularyShard, head: Head) -> tuple[Head, Tensor]:
    """The head that the kernels see, with a hidden row for each token and a target here; and which targets are here.

    A row of its own, because of tokens that share one the kernels would find each other's targets.
    """
    here, own = shard.own_targets(head.targets)
    hidden = head.hidden.index_select(0, head.rows)
    return head._replace(hidden=hidden, rows=torch.arange(len(own), device=own.device), targets=own), here


def _combine(
    shard: VocabularyShard, here: Tensor, lse: Tensor, logps: Tensor, entropy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """logps and entropy of the whole vocabulary, and this rank's log w_r, from those of its rows. All [M], float64.

    In float64 the log of a share near 1 keeps the digits of what is missing. Differentiable in lse and logps.
    """
    own = torch.stack([here.double(), lse.double(), logps.double(), entropy.double()])
    has_target, lses, own_logps, entropies = _Gather.apply(own, shard.group).unbind(1)
    log_shares = lses.log_softmax(0)
    logps = torch.where(has_target > 0, own_logps + log_shares, 0).sum(0)
    # A target that no rank has, where values are not checked, must not pass for a certain one.
    logps = torch.where(has_target.sum(0) > 0, logps, torch.nan)
    shares = log_shares.exp()
    entropy = (shares * entropies + torch.special.entr(shares)).sum(0)
    return logps, entropy, log_shares[dist.get_rank(shard.group)]


def _add_grads(
    kernels: Kernels,
    shard: VocabularyShard,
    grad: Tensor,
    head: Head,
    kept: Sequence[Tensor],
    grads: Grads,
    first: bool,
) -> None:
    *of_kernels, slope, log_share = kept
    of_shard, here = _head_of_shard(shard, head)
    own = _own_grads(of_shard, grads)
    kernels.add_grads((grad * log_share.exp()).float(), of_shard, of_kernels, own, first)
    missing = torch.where(here, grad * -torch.expm1(log_share), 0) * slope
    missing = missing.float()[:, None]
    if grads.hidden is not None and own.hidden is not None:
        of_tokens = own.hidden + missing * head.weight[of_shard.targets]
        dist.all_reduce(of_tokens, group=shard.group)
        _add_rows(grads.hidden, head.rows, of_tokens)
    if grads.weight is not None and own.weight is not None:
        _add_rows(own.weight, of_shard.targets, missing * of_shard.hidden)
        if own.weight is not grads.weight:
            grads.weight.copy_(own.weight)
    if grads.bias is not None:
        _add_rows(grads.bias, of_shard.targets, missing[:, 0])


def _own_grads(of_shard: Head, grads: Grads) -> Grads:
    """Room for what the kernels make: of hidden by token, of weight before it is rounded."""
    rounded = grads.weight is not None and grads.weight.dtype != torch.float32
    room = new_grads(of_shard, grads.hidden is not None, rounded, False, whole=False)
    return Grads(room.hidden, room.weight if rounded else grads.weight, grads.bias)


def _slope(head: Head, of_softcap: Tensor) -> Tensor:
    temperature, _, logit_scale = head.numbers
    return of_softcap * logit_scale / (temperature if head.temperatures is None else head.temperatures)


def _add_rows(to: Tensor, rows: Tensor, values: Tensor) -> None:
    """to[rows] += values, in float32 and always in the same order."""
    total = to if to.dtype == torch.float32 else torch.zeros_like(to, dtype=torch.float32)
    total.index_put_((rows,), values, accumulate=True)
    if total is not to:
        to.add_(total)


class _Gather(torch.autograd.Function):
    """Of all ranks, [W, ...]. Each goes on to compute the same from it, so its gradient is already the whole one."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank = dist.get_rank(group)
        every = own.new_empty(dist.get_world_size(group), *own.shape)
        dist.all_gather(list(every), own, group=group)
        return every

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rank], None


class _SumGradient(torch.autograd.Function):
    """The tensor, whose gradient is the sum of those that the ranks find."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
