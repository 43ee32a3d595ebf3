"""Attention over a tree on a GPU against what PyTorch offers for shared prefixes, in bfloat16.

FlexAttention is compiled for each length, its block mask made beforehand; it takes part with several tiles, each a
contestant of its own. Useful operations are counted as in bench/bench_attention.py. "forward" is that of a training
step, which keeps what its backward needs.
Sizes: P tokens of the prompt, K rationales of S tokens, T = P + K S; H query heads over Hkv key heads of size E.
"""

from __future__ import annotations

import functools
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.bench_attention import TOY, attention_inputs, case_name, exact
from bench.gpu_measure import to_device
from bench.measure import Case
from latro_kernels import tree_attention

CASES = [  # (P, S, K), (H, Hkv), E, whether every choice of FlexAttention's tiles takes part
    ((256, 220, 16), (32, 8), 128, True),
    ((1024, 220, 16), (32, 8), 128, True),
    ((128, 64, 8), (32, 8), 128, False),
    ((256, 220, 16), (14, 2), 64, False),
    ((256, 220, 16), (8, 8), 128, False),
]

# Blocks of FlexAttention's mask and tiles of its kernels: its own choice, and two that 220 tokens may fill better.
FLEX = {
    "FlexAttention": (128, {}),
    "FlexAttention, 64x64": (
        64,
        {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3}
        | {"bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64}
        | {"bwd_num_warps": 4, "bwd_num_stages": 2},
    ),
    "FlexAttention, 128x64": (
        128,
        {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3}
        | {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 128, "bwd_BLOCK_M2": 128, "bwd_BLOCK_N2": 32}
        | {"bwd_num_warps": 8, "bwd_num_stages": 2},
    ),
}


def ours(q, k, v, inputs):
    return tree_attention(q, k, v, inputs["tree"], impl="triton" if q.is_cuda else "auto")


def flex_attention(q, k, v, inputs, name):
    block, options = FLEX[name]
    mask = inputs["block_masks"][block]
    return compiled_flex()(q[None], k[None], v[None], block_mask=mask, enable_gqa=True, kernel_options=options)[0]


@functools.cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def block_mask(tree, block):
    from torch.nn.attention.flex_attention import create_block_mask

    reach, T = tree.reach, len(tree.tokens)

    def sees(batch, head, query, key):
        return (key <= query) & (query < reach[key])

    return create_block_mask(sees, None, None, T, T, device=reach.device, BLOCK_SIZE=block)


def dense_mask(q, k, v, inputs):
    """SDPA with the whole mask. Its kernel that takes masks has no groups: keys are repeated for every query head."""
    k, v = (_for_every_head(x, q) for x in (k, v))
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=inputs["mask"])[0]


def two_calls(q, k, v, inputs):
    """The prompt by itself, then each rationale's queries against the prompt's keys, repeated, and its own."""
    P, S, K = inputs["sizes"]
    prompt = _causal(q[None, :, :P], k[None, :, :P], v[None, :, :P])
    k, v = (_for_every_head(x, q) for x in (k, v))
    k, v = (torch.cat([x[None, :, :P].expand(K, -1, -1, -1), _branches(x[:, P:], K, S)], dim=2) for x in (k, v))
    mask = inputs["branch_mask"]
    rest = F.scaled_dot_product_attention(_branches(q[:, P:], K, S), k, v, attn_mask=mask)
    return torch.cat([prompt[0], _packed(rest)], dim=1)


def merged_calls(q, k, v, inputs):
    """The prompt by itself, all rationales over the prompt, each over itself; the last two merged, nothing repeated."""
    P, S, K = inputs["sizes"]
    prompt = _causal(q[None, :, :P], k[None, :, :P], v[None, :, :P])
    return torch.cat([prompt[0], _Merged.apply(q[:, P:], k, v, P, S, K)], dim=1)


class _Merged(torch.autograd.Function):
    """FlashAttention over the prompt and over the own rationale, weighted by their log-sum-exps.

    Given the merged output and log-sum-exp, each call's backward makes its own part of the gradients.
    """

    @staticmethod
    def forward(ctx, q, k, v, P, S, K):
        over_prompt, lse, *prompt_rest = _flash(q[None], k[None, :, :P], v[None, :, :P], causal=False)
        own = (_branches(x, K, S) for x in (q, k[:, P:], v[:, P:]))
        over_own, own_lse, *own_rest = _flash(*own, causal=True)
        own_lse = own_lse.transpose(0, 1).flatten(1)[None]
        merged = torch.logaddexp(lse, own_lse)
        out = over_prompt * (lse - merged).exp()[..., None] + _packed(over_own) * (own_lse - merged).exp()[..., None]
        out = out[0].to(q.dtype)
        ctx.save_for_backward(q, k, v, out, merged)
        ctx.sizes, ctx.rest = (P, S, K), (prompt_rest, own_rest)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, merged = ctx.saved_tensors
        (P, S, K), (prompt_rest, own_rest) = ctx.sizes, ctx.rest
        operands = (grad[None], q[None], k[None, :, :P], v[None, :, :P], out[None], merged.contiguous())
        dq, *prompt_grads = _flash_backward(*operands, prompt_rest, causal=False)
        own = [_branches(x, K, S) for x in (grad, q, k[:, P:], v[:, P:], out)]
        own_lse = merged[0].unflatten(1, (K, S)).transpose(0, 1).contiguous()
        own_dq, *own_grads = _flash_backward(*own, own_lse, own_rest, causal=True)
        dk, dv = (torch.cat([a[0], _packed(b)], dim=1) for a, b in zip(prompt_grads, own_grads, strict=True))
        return dq[0] + _packed(own_dq), dk, dv, None, None, None


def _flash(q, k, v, *, causal):
    """Output, log-sum-exp, and what else the backward is given."""
    if q.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:8]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)


def _flash_backward(grad, q, k, v, out, lse, rest, *, causal):
    if not q.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal)
    lengths, random_state = rest[:4], rest[4:]
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, *lengths, 0.0, causal, *random_state
    )


def repeated_rows(q, k, v, inputs):
    """K causal sequences, the prompt repeated in each, as a padded batch has them: repeating is not timed."""
    return _causal(q, k, v)


def repeated_rows_cudnn(q, k, v, inputs):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _causal(q, k, v)


def _causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _for_every_head(x, q):
    return x.repeat_interleave(len(q) // len(x), dim=0)


def _branches(x, K, S):
    return x.unflatten(1, (K, S)).transpose(0, 1)


def _packed(x):
    return x.transpose(0, 1).flatten(1, 2)


def on_tree(inputs, *, attend, backward):
    leaves = [inputs[name].detach().requires_grad_() for name in "qkv"]
    out = attend(*leaves, inputs)
    grads = torch.autograd.grad(out, leaves, inputs["direction"]) if backward else ()
    return {"out": out.detach()} | dict(zip(("dq", "dk", "dv"), grads, strict=False))


def on_rows(inputs, *, attend, backward):
    leaves = [inputs[f"rows_{name}"].detach().requires_grad_() for name in "qkv"]
    out = attend(*leaves, inputs)
    grads = torch.autograd.grad(out, leaves, inputs["rows_direction"]) if backward else ()
    P = inputs["sizes"][0]

    def packed(x, of_prompt):
        return torch.cat([of_prompt, _packed(x[:, :, P:])], dim=1)

    results = {"out": lambda: packed(out.detach(), out.detach()[0, :, :P])}
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=False):
        results[name] = partial(packed, grad, grad[:, :, :P].sum(0))
    return results


def contestants(backward, every_flex, cuda):
    of_tree = {"ours": ours}
    if cuda:  # on a CPU, FlexAttention has no backward
        of_tree |= {name: partial(flex_attention, name=name) for name in (FLEX if every_flex else ["FlexAttention"])}
    of_tree |= {"merged calls": merged_calls, "two calls": two_calls, "dense mask": dense_mask}
    of_rows = {"repeated rows": repeated_rows} | ({"repeated rows, cuDNN": repeated_rows_cudnn} if cuda else {})
    found = {name: partial(on_tree, attend=attend, backward=backward) for name, attend in of_tree.items()}
    return found | {name: partial(on_rows, attend=attend, backward=backward) for name, attend in of_rows.items()}


@functools.lru_cache(maxsize=1)
def inputs_and_exact(sizes, heads, E, device):
    torch.compiler.reset()  # past eight versions of a function, torch.compile would leave FlexAttention uncompiled
    inputs = to_device(attention_inputs(sizes, heads, E, torch.bfloat16), device)
    truth = exact(inputs)
    if device.type == "cuda":
        inputs["block_masks"] = {block: block_mask(inputs["tree"], block) for block, _ in FLEX.values()}
    return inputs, truth


def attention_case(name, sizes, heads, E, every_flex, backward, device):
    inputs, truth = inputs_and_exact(sizes, heads, E, device)
    pairs = int((inputs["tree"].positions + 1).sum())
    return Case(
        question="attention",
        name=name,
        dtype=torch.bfloat16,
        inputs=inputs,
        exact=truth if backward else {"out": truth["out"]},
        contestants=contestants(backward, every_flex, device.type == "cuda"),
        flops=(14 if backward else 4) * E * pairs * heads[0],
    )


def cases(device, toy):
    """(name, a function that makes the case)"""
    for sizes, heads, E, every_flex in [(TOY, (4, 2), 16, True)] if toy else CASES:
        for backward in (True, False):
            name = case_name(sizes, heads, E, torch.bfloat16) + ("" if backward else " forward")
            yield name, partial(attention_case, name, sizes, heads, E, every_flex, backward, device)
