"""torch.compile: in a process that has never seen the package, without graph breaks, for changing lengths."""

import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import torch._dynamo.testing

from latro_kernels import fused_self_reward_loss, linear_logprobs, self_reward, tree_attention
from latro_kernels.impl import status
from latro_kernels.testing import random_batch

V, D = 40, 16

# Inductor writes C++; without a compiler the graph is checked up to there.
BACKEND = "inductor" if shutil.which(os.environ.get("CXX") or "g++") else "aot_eager"

PREPARE = """
    import torch
    import latro_kernels
    from latro_kernels.testing import random_batch

    torch.manual_seed(0)
    tree, scored = random_batch(0, 40).pack()
    T = len(tree.tokens)
"""
COLD = {
    "tree_attention": """
        q = torch.randn(4, T, 8, requires_grad=True)
        f = lambda q, tree: latro_kernels.tree_attention(q, q[:2], q[2:], tree, softcap=2.0, window=5).sum()
        arguments = (q, tree)
    """,
    "linear_logprobs": """
        q = torch.randn(T, 16, requires_grad=True)
        weight = torch.randn(40, 16)
        f = lambda q, s: latro_kernels.linear_logprobs(q, weight, s.rows, s.targets, temperature=0.7).sum()
        arguments = (q, scored)
    """,
    "self_reward": """
        q = torch.randn(len(scored.rows), requires_grad=True)
        f = lambda q, s: latro_kernels.self_reward(q, s, ref_logps=q.detach() - 1).loss
        arguments = (q, scored)
    """,
    "fused_self_reward_loss": """
        q = torch.randn(T, 16, requires_grad=True)
        weight = torch.randn(40, 16)
        f = lambda q, s: latro_kernels.fused_self_reward_loss(q, weight, s, beta=0, temperature=0.7).loss
        arguments = (q, scored)
    """,
}
CHECK = """
    compiled = torch.compile(f, fullgraph=True, backend="{backend}")(*arguments)
    compiled.backward()
    grad, q.grad = q.grad, None
    eager = f(*arguments)
    eager.backward()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(grad, q.grad)
"""


@pytest.mark.parametrize("operator", COLD)
def test_first_call_of_a_cold_process(operator):
    script = "".join(map(textwrap.dedent, (PREPARE, COLD[operator], CHECK.format(backend=BACKEND))))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_new_lengths_do_not_compile_again_and_again():
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def step(hidden, weight, q, tree, scored, denominator):
        out = tree_attention(q, q[:2], q[2:], tree)
        logps = linear_logprobs(hidden, weight, scored.rows, scored.targets)
        return (
            out.sum()
            + logps.sum()
            + fused_self_reward_loss(hidden, weight, scored, beta=0, denominator=denominator).loss
        )

    torch._dynamo.reset()
    for seed in range(6):
        tree, scored = random_batch(seed, V, group_sizes=(2, 3 + seed)).pack()
        T = len(tree.tokens)
        step(torch.randn(T, D), torch.randn(V, D), torch.randn(4, T, 8), tree, scored, 10 + seed)
    assert counter.frame_count <= 2, "once for the first lengths, once for all others"


def test_new_numbers_do_not_compile_again_and_again():
    counter = torch._dynamo.testing.CompileCounter()
    tree, scored = random_batch(0, V).pack()

    @torch.compile(backend=counter, fullgraph=True)
    def step(hidden, weight, temperature, softcap, denominator):
        options = {"temperature": temperature, "softcap": softcap, "denominator": denominator}
        return fused_self_reward_loss(hidden, weight, scored, beta=0, **options).loss

    torch._dynamo.reset()
    hidden, weight = torch.randn(len(tree.tokens), D), torch.randn(V, D)
    compiled = []
    for n in range(8):
        temperature, softcap, denominator = 1.5 + n / 10, 3.0 + n, 10.5 + n
        options = {"temperature": temperature, "softcap": softcap, "denominator": denominator}
        expected = fused_self_reward_loss(hidden, weight, scored, beta=0, **options).loss
        torch.testing.assert_close(step(hidden, weight, temperature, softcap, denominator), expected)
        compiled.append(counter.frame_count)
    assert compiled[-1] <= 2, "once for the first numbers, once for all others"


NATIVE = status("self_reward", "native", "cpu")


@pytest.mark.skipif(not NATIVE.ready, reason=f"native: {NATIVE.reason}")
@pytest.mark.parametrize(
    "options", [(False, "k1", None, None), (False, "k3", -2.0, "group"), (True, "k2", None, "batch")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_operator_passes_opcheck(dtype, options):
    _, scored = random_batch(0, V).pack(baseline=True)
    given_advantage, kl, floor, scale = options
    logps = (-torch.rand(len(scored.rows), dtype=dtype)).requires_grad_()
    torch.library.opcheck(
        torch.ops.latro_kernels.self_reward.default,
        (
            logps,
            scored.segment,
            scored.kind,
            scored.rationale,
            scored.option,
            scored.prompt,
            torch.rand_like(logps).detach(),  # without it kl is NaN, and opcheck cannot compare NaN
            torch.rand(len(scored.prompt), dtype=dtype) if given_advantage else None,
            0.1,
            0.5,
            kl,
            floor,
            scale,
        ),
    )


def test_compiled_self_reward_has_the_gradient():
    _, scored = random_batch(0, V).pack()
    logps = (-torch.rand(len(scored.rows), dtype=torch.float64)).requires_grad_()
    ref_logps = logps.detach() - 0.5
    compiled = torch.compile(self_reward, fullgraph=True, backend=BACKEND)(logps, scored, ref_logps=ref_logps)
    (grad,) = torch.autograd.grad(compiled.loss, logps)
    torch.testing.assert_close(grad, self_reward(logps, scored, ref_logps=ref_logps).coefficients)
