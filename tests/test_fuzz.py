"""Ragged trees, dtypes, strides and sizes of all kinds, at every native operator against the definition."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latro_kernels import (
    PrefixTree,
    SelfReward,
    fused_self_reward_loss,
    get_memory_budget,
    linear_logprobs,
    pack_rationales,
    self_reward,
    set_memory_budget,
    tree_attention,
)
from latro_kernels.impl import status

NATIVE = status("tree_attention", "native", "cpu")
pytestmark = pytest.mark.skipif(not NATIVE.ready, reason=f"native: {NATIVE.reason}")

# The same examples every time, unless more are asked for.
EXAMPLES = int(os.environ.get("LATRO_FUZZ", "0"))
fuzz = settings(
    max_examples=EXAMPLES or 40,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


@st.composite
def trees(draw):
    """Forests with empty nodes, long nodes, chains and bushes."""
    count = draw(st.integers(1, 12))
    longest = draw(st.sampled_from([1, 3, 20, 150]))
    parents = [-1] + [draw(st.integers(-1, n - 1)) for n in range(1, count)]
    lengths = [draw(st.integers(int(parent == -1), longest)) for parent in parents]
    return PrefixTree.pack([[0] * length for length in lengths], parents)


def tensor(draw, *shape, dtype):
    """Of the shape and the dtype, with strides of any kind along all but the last dimension."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    values = torch.randn(*shape, generator=generator).to(dtype)
    layout = draw(st.sampled_from(["contiguous", "turned", "wide", "last"]))
    if layout == "turned":
        return values.transpose(0, -2).contiguous().transpose(0, -2)
    if layout == "wide":
        wide = torch.zeros(*shape[:-1], shape[-1] + 3, dtype=dtype)
        wide[..., 1:-2] = values
        return wide[..., 1:-2]
    return values.repeat_interleave(2, -1)[..., ::2] if layout == "last" else values


def assert_equal(function, leaves, dtype, **constants):
    """function(impl, leaves) -> results, the first of which is differentiated along a fixed direction."""

    def run(impl, as_dtype):
        own = [leaf.detach().to(as_dtype) if as_dtype != leaf.dtype else leaf.detach() for leaf in leaves]
        for leaf in own:
            leaf.requires_grad_()
        out = function(impl, *own)
        direction = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).reshape(out.shape).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, own, direction)]

    for n, (ours, exact) in enumerate(zip(run("native", dtype), run("reference", torch.float64), strict=True)):
        # Of sums of numbers near 1, which may cancel.
        bound = TOLERANCE[dtype] * max(1.0, float(exact.abs().max()) if exact.numel() else 0)
        assert ours.shape == exact.shape
        if exact.numel():
            assert float((ours.double() - exact).abs().max()) <= bound, f"result {n}"


@fuzz
@given(st.data())
def test_tree_attention(data):
    draw = data.draw
    tree, dtype = draw(trees()), draw(st.sampled_from(DTYPES))
    Hkv, G, E = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 7, 16, 33, 64, 80]))
    T = len(tree.tokens)
    leaves = [tensor(draw, heads, T, E, dtype=dtype) for heads in (Hkv * G, Hkv, Hkv)]
    sinks = draw(st.booleans())
    if sinks:
        leaves.append(torch.linspace(-1, 1, Hkv * G).to(dtype))
    softcap = draw(st.sampled_from([None, 2.0]))
    window = draw(st.sampled_from([None, 1, 5, 100]))

    def attend(impl, q, k, v, s=None):
        return tree_attention(q, k, v, tree, softcap=softcap, window=window, sinks=s, impl=impl)

    assert_equal(attend, leaves, dtype)


@fuzz
@given(st.data())
def test_linear_logprobs(data):
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    T, D, V, M = (draw(st.integers(1, most)) for most in (40, 70, 600, 80))
    leaves = [tensor(draw, T, D, dtype=dtype), tensor(draw, V, D, dtype=dtype)]
    bias = draw(st.booleans())
    if bias:
        leaves.append(tensor(draw, 1, V, dtype=dtype)[0])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    rows, targets = torch.randint(T, (M,), generator=generator), torch.randint(V, (M,), generator=generator)
    each = 0.5 + torch.randint(3, (M,), generator=generator) / 2
    options = {
        "temperature": draw(st.sampled_from([1.0, 0.7, each])),
        "softcap": draw(st.sampled_from([None, 3.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.25, -1.0])),
    }
    budget = draw(st.sampled_from([0, 64 * 200 * 4, 1 << 30]))

    def score(impl, hidden, weight, b=None):
        return linear_logprobs(hidden, weight, rows, targets, bias=b, impl=impl, **options)

    before = get_memory_budget()
    set_memory_budget(budget)
    try:
        assert_equal(score, leaves, dtype)
    finally:
        set_memory_budget(before)


@st.composite
def scored_tokens(draw, vocab):
    def tokens(least, most):
        return draw(st.lists(st.integers(0, vocab - 1), min_size=least, max_size=most))

    prompts = draw(st.integers(1, 4))
    return pack_rationales(
        [tokens(1, 5) for _ in range(prompts)],
        [[tokens(0, 9) for _ in range(draw(st.integers(2, 4)))] for _ in range(prompts)],
        [[tokens(1, 4) for _ in range(draw(st.integers(1, 3)))] for _ in range(prompts)],
        baseline=draw(st.booleans()),
    )


@st.composite
def objectives(draw, scales=(None, "group")):
    return SelfReward(
        beta=draw(st.sampled_from([0.0, 0.05])),
        answer_weight=draw(st.sampled_from([0.0, 1.0])),
        kl=draw(st.sampled_from(["k1", "k2", "k3"])),
        floor=draw(st.sampled_from([None, -6.0])),
        scale=draw(st.sampled_from(scales)),
    )


@fuzz
@given(st.data())
def test_self_reward(data):
    _, scored = data.draw(scored_tokens(20))
    objective = data.draw(objectives())
    logps = -torch.rand(len(scored.rows), generator=torch.Generator().manual_seed(0)) * 3
    ref_logps = logps.flip(0)

    def loss(impl, logps):
        return self_reward(logps, scored, objective, ref_logps=ref_logps, impl=impl).loss

    assert_equal(loss, [logps], torch.float32)


@fuzz
@given(st.data())
def test_fused_self_reward_loss(data):
    draw = data.draw
    V, D, dtype = draw(st.integers(2, 300)), draw(st.integers(1, 40)), draw(st.sampled_from(DTYPES))
    tree, scored = draw(scored_tokens(V))
    # Dividing by the deviation of rewards that are almost equal would magnify every rounding.
    objective, temperature = draw(objectives(scales=[None])), draw(st.sampled_from([1.0, 0.6]))
    leaves = [tensor(draw, len(tree.tokens), D, dtype=dtype), tensor(draw, V, D, dtype=dtype)]
    ref_logps = -torch.rand(len(scored.rows), generator=torch.Generator().manual_seed(0)) * 5

    def loss(impl, hidden, weight):
        options = {"objective": objective, "ref_logps": ref_logps, "temperature": temperature, "impl": impl}
        return fused_self_reward_loss(hidden, weight, scored, logit_scale=D**-0.5, **options).loss

    assert_equal(loss, leaves, dtype)
