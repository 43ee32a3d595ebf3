"""Attention over a tree, forward and backward, against what PyTorch offers for shared prefixes.

Only pairs of a query and a key that it sees are counted, 14 · E operations for each and query head: 4 forward and 10
backward, where scores are made again, as FlashAttention's authors count.
Sizes: P tokens of the prompt, K rationales of S tokens, T = P + K S; H query heads over Hkv key heads of size E.
"""

from __future__ import annotations

import itertools
from functools import partial

import torch
import torch.nn.functional as F

from bench.measure import Case, bf16_is_emulated
from latro_kernels import PrefixTree, tree_attention
from latro_kernels.testing import random_forest
from latro_kernels.tree_attention.reference import visible

TREES = [(100, 208, 16), (900, 136, 16), (256, 220, 16)]
TOY = (10, 12, 3)
TINY_NODES = "tiny nodes"  # a forest of nodes of at most 5 tokens


def ours(inputs, impl="auto"):
    q, k, v = leaves = _leaves(inputs, "q", "k", "v")
    return _results(tree_attention(q, k, v, inputs["tree"], impl=impl), leaves, inputs)


def dense_mask(inputs):
    """SDPA with the whole mask, which is made once and not timed."""
    q, k, v = leaves = _leaves(inputs, "q", "k", "v")
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=inputs["mask"], enable_gqa=True)
    return _results(out[0], leaves, inputs)


def two_calls(inputs):
    """The prompt by itself, then each rationale's queries against the prompt's keys, repeated, and its own."""
    q, k, v = leaves = _leaves(inputs, "q", "k", "v")
    P, S, K = inputs["sizes"]
    prompt = F.scaled_dot_product_attention(
        q[None, :, :P], k[None, :, :P], v[None, :, :P], is_causal=True, enable_gqa=True
    )

    def rationales(x):
        return x[:, P:].unflatten(1, (K, S)).transpose(0, 1)

    def with_prompt(x):
        return torch.cat([x[None, :, :P].expand(K, -1, -1, -1), rationales(x)], dim=2)

    rest = F.scaled_dot_product_attention(
        rationales(q).contiguous(), with_prompt(k), with_prompt(v), attn_mask=inputs["branch_mask"], enable_gqa=True
    )
    out = torch.cat([prompt[0], rest.transpose(0, 1).flatten(1, 2)], dim=1)
    return _results(out, leaves, inputs)


def repeated_rows(inputs):
    """K causal sequences, the prompt repeated in each, as a padded batch has them: repeating is not timed."""
    q, k, v = leaves = _leaves(inputs, "rows_q", "rows_k", "rows_v")
    P = inputs["sizes"][0]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    gradients = torch.autograd.grad(out, leaves, inputs["rows_direction"])

    def packed(x):
        return torch.cat([x[0, :, :P], x[:, :, P:].transpose(0, 1).flatten(1, 2)], dim=1)

    def packed_gradient(x):
        return torch.cat([x[:, :, :P].sum(0), x[:, :, P:].transpose(0, 1).flatten(1, 2)], dim=1)

    results = {"out": lambda: packed(out.detach())}
    return results | {
        name: partial(packed_gradient, grad) for name, grad in zip(("dq", "dk", "dv"), gradients, strict=True)
    }


def _leaves(inputs, *names):
    return [inputs[name].detach().requires_grad_() for name in names]


def _results(out, leaves, inputs):
    gradients = torch.autograd.grad(out, leaves, inputs["direction"])
    return {"out": out.detach()} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))


def attention_inputs(sizes, heads, E, dtype, nodes=400):
    generator = torch.Generator().manual_seed(0)
    if sizes == TINY_NODES:
        tree = PrefixTree.pack(*random_forest(0, nodes=nodes))
    else:
        P, S, K = sizes
        tree = PrefixTree.pack([[0] * P, *[[0] * S] * K], [-1, *[0] * K])
    T = len(tree.tokens)

    def operand(heads):
        return torch.randn(T, heads, E, generator=generator).bfloat16().to(dtype).transpose(0, 1)

    H, Hkv = heads
    q, k, v, direction = operand(H), operand(Hkv), operand(Hkv), operand(H)
    inputs = {"tree": tree, "q": q, "k": k, "v": v, "direction": direction, "mask": visible(tree, None)}
    if sizes != TINY_NODES:
        inputs |= {"sizes": sizes, "branch_mask": torch.ones(S, P + S, dtype=torch.bool).tril(P)}
        rows = torch.cat([torch.arange(P).expand(K, -1), P + torch.arange(K * S).view(K, S)], dim=1)
        for name, x in (("q", q), ("k", k), ("v", v), ("direction", direction)):
            inputs[f"rows_{name}"] = x.transpose(0, 1)[rows].transpose(1, 2)
        inputs["rows_direction"][1:, :, :P] = 0
    return inputs


def exact(inputs):
    def lift(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    inputs = {name: lift(value) for name, value in inputs.items()}
    results = two_calls(inputs) if "sizes" in inputs else ours(inputs, impl="reference")
    return {name: value.float() for name, value in results.items()}


def contestants(sizes, dtype, all_of_them):
    found = {"ours": ours}
    if sizes != TINY_NODES:
        found |= {"two calls": two_calls, "repeated rows": repeated_rows}
    if all_of_them or sizes == TINY_NODES:
        found["dense mask"] = dense_mask
        if dtype == torch.float32 or not bf16_is_emulated():
            found["definition"] = partial(ours, impl="reference")
    return found


def cases(size):
    """(tree, heads, head size, dtype, whether the slow contestants take part)"""
    dtypes = (torch.float32, torch.bfloat16)
    if size == "toy":
        return [(sizes, (4, 2), 16, dtype, True) for dtype in dtypes for sizes in (TOY, TINY_NODES)]
    if size == "default":
        found = [(sizes, (8, 2), 64, torch.float32, sizes == TREES[0]) for sizes in TREES]
        found += [(TREES[0], (8, 8), 128, torch.float32, False), (TREES[0], (8, 2), 64, torch.bfloat16, False)]
        return found + [(TINY_NODES, (8, 2), 64, dtype, False) for dtype in dtypes]
    every = itertools.product(dtypes, TREES, ((8, 2), (8, 8)), (64, 128))
    found = [(*case, dtype, dtype == torch.float32 and case[1:] == [(8, 2), 64]) for dtype, *case in every]
    found += [(TREES[0], (8, 2), E, dtype, False) for dtype in dtypes for E in (80, 96, 256)]
    return found + [(TINY_NODES, (8, 2), 64, dtype, False) for dtype in dtypes]


def pytest_generate_tests(metafunc):
    config = metafunc.config
    size = "toy" if config.getoption("toy") else "full" if config.getoption("full") else "default"
    found = cases(size)
    names = ("sizes", "heads", "E", "dtype", "all_of_them")
    metafunc.parametrize(names, found, ids=[case_name(*case[:-1]) for case in found])


def case_name(sizes, heads, E, dtype):
    tree = sizes if sizes == TINY_NODES else f"P={sizes[0]} S={sizes[1]} K={sizes[2]}"
    return f"{tree} heads {heads[0]}/{heads[1]} E={E} {str(dtype)[6:]}"


def test_attention(sizes, heads, E, dtype, all_of_them, measured, pytestconfig):
    inputs = attention_inputs(sizes, heads, E, dtype, nodes=20 if pytestconfig.getoption("toy") else 400)
    pairs = int((inputs["tree"].positions + 1).sum())
    measured(
        Case(
            question="attention",
            name=case_name(sizes, heads, E, dtype),
            dtype=dtype,
            inputs=inputs,
            exact=exact(inputs),
            contestants=contestants(sizes, dtype, all_of_them),
            flops=14 * E * pairs * heads[0],
        )
    )
