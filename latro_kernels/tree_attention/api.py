"""Attention over a prefix tree: every token attends to the tokens on its own path and to nothing else."""

from __future__ import annotations

from torch import Tensor

from latro_kernels import _triton, checks
from latro_kernels._autograd import autocast_operands, first_order
from latro_kernels.impl import choose
from latro_kernels.tree import PrefixTree
from latro_kernels.tree_attention import native, reference

BACKENDS = {"native": native.tree_attention, "reference": reference.tree_attention}
if _triton.available:
    from latro_kernels.tree_attention import triton

    BACKENDS["triton"] = triton.tree_attention


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: PrefixTree,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """softmax(softcap(scale * q kᵀ) where i sees j) v, over one row of T tokens -> [H, T, E].

    q [H, T, E]; k and v [Hkv, T, E], where Hkv divides H; any strides.
    scale: E ** -0.5 by default. softcap(s) = softcap * tanh(s / softcap).
    window: a token sees itself and the window - 1 tokens before it on its path.
    sinks [H]: a logit per head that takes part in the softmax and has no value.

    The result is stored so that `out.transpose(0, 1).reshape(T, H * E)` is a view. Differentiable in q, k, v and sinks.
    """
    checks.check_tensors("tree_attention", q=q, k=k, v=v)
    q, k, v = autocast_operands(q, k, v)
    _check(q, k, v, tree, scale, softcap, window, sinks)
    backend = BACKENDS[choose("tree_attention", impl, q.device, q.dtype, q.shape[2])]
    return backend(
        first_order(q),
        first_order(k),
        first_order(v),
        tree,
        first_order(sinks),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
        window=window,
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: PrefixTree,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
) -> None:
    operator = "tree_attention"
    if not isinstance(tree, PrefixTree):
        raise TypeError(f"{operator}: tree must be a PrefixTree, got {type(tree).__name__}")
    checks.check_shape(operator, "q", q, ("H", tree.reach.shape[0], "E"))
    checks.check_shape(operator, "k", k, ("Hkv", tree.reach.shape[0], q.shape[2]))
    checks.check_shape(operator, "v", v, tuple(k.shape))
    checks.check_floating(operator, "q", q)
    checks.check_like(operator, "k", k, "q", q)
    checks.check_like(operator, "v", v, "q", q)
    checks.check_device(operator, "tree", tree.reach, "q", q)
    if q.shape[0] == 0:
        raise ValueError(f"{operator}: q must have at least one head, got {list(q.shape)}")
    if q.shape[2] == 0:
        raise ValueError(f"{operator}: q must have a head size E > 0, got {list(q.shape)}")
    if k.shape[0] == 0 or q.shape[0] % k.shape[0]:
        raise ValueError(f"{operator}: the heads of k must divide the {q.shape[0]} heads of q, got {k.shape[0]}")
    if scale is not None:
        checks.check_number(operator, "scale", scale)
    if softcap is not None:
        checks.check_positive(operator, "softcap", softcap)
    if window is not None:
        checks.check_positive(operator, "window", window)
        if isinstance(window, float):
            raise TypeError(f"{operator}: window must be a whole number of tokens, got {window}")
    if sinks is not None:
        checks.check_shape(operator, "sinks", sinks, (q.shape[0],))
        checks.check_floating(operator, "sinks", sinks)
        checks.check_device(operator, "sinks", sinks, "q", q)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.check_finite(operator, name, tensor)
