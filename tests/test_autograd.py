"""What every operator promises of autograd, whatever the backend."""

import pytest
import torch

from latro_kernels import fused_self_reward_loss, linear_logprobs, self_reward, tree_attention
from latro_kernels.testing import random_batch

V, D = 40, 16


@pytest.fixture(params=[(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"])
def precision(request):
    """The dtype, which decides the backend, and how closely sums agree."""
    return request.param


def setup(operator, dtype=torch.float64):
    """A function of leaves that gives a scalar, and the leaves."""
    tree, scored = random_batch(0, V).pack()
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    T, M = len(tree.tokens), len(scored.rows)
    ref_logps = torch.linspace(-3, 0, M)
    if operator == "tree_attention":
        return lambda q, k, v, s: tree_attention(q, k, v, tree, sinks=s).square().sum(), [
            leaf(4, T, D), leaf(2, T, D), leaf(2, T, D), leaf(4)
        ]  # fmt: skip
    if operator == "linear_logprobs":
        return lambda h, w, b: linear_logprobs(h, w, scored.rows, scored.targets, bias=b).square().sum(), [
            leaf(T, D), leaf(V, D), leaf(V)
        ]  # fmt: skip
    if operator == "self_reward":
        return lambda logps: self_reward(logps, scored, ref_logps=ref_logps).loss.square(), [leaf(M)]
    return lambda h, w, b: fused_self_reward_loss(h, w, scored, ref_logps=ref_logps, bias=b).loss.square(), [
        leaf(T, D), leaf(V, D), leaf(V)
    ]  # fmt: skip


OPERATORS = ["tree_attention", "linear_logprobs", "self_reward", "fused_self_reward_loss"]
every_operator = pytest.mark.parametrize("operator", OPERATORS)


@pytest.mark.parametrize("operator", ["tree_attention", "linear_logprobs"])
def test_gradients_are_those_of_finite_differences(operator):
    """Of the other two they are not: reward and advantage count as constants there."""
    function, leaves = setup(operator)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@every_operator
def test_no_graph_without_gradients(operator, precision):
    function, leaves = setup(operator, precision[0])
    with torch.no_grad():
        assert not function(*leaves).requires_grad
    assert not function(*(leaf.detach() for leaf in leaves)).requires_grad


@every_operator
def test_each_input_may_be_frozen(operator, precision):
    function, leaves = setup(operator, precision[0])
    expected = torch.autograd.grad(function(*leaves), leaves)
    for n, leaf in enumerate(leaves):
        others = [x if i == n else x.detach() for i, x in enumerate(leaves)]
        (grad,) = torch.autograd.grad(function(*others), leaf)
        torch.testing.assert_close(grad, expected[n], rtol=precision[1], atol=precision[1])


@every_operator
def test_backward_twice_and_accumulation(operator, precision):
    function, leaves = setup(operator, precision[0])
    loss = function(*leaves)
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    loss.backward()
    function(*leaves).backward()
    for leaf, grad in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * grad, rtol=precision[1], atol=precision[1])


@every_operator
def test_double_backward_raises(operator, precision):
    function, leaves = setup(operator, precision[0])
    for n, leaf in enumerate(leaves):
        others = [x if i == n else x.detach() for i, x in enumerate(leaves)]
        (grad,) = torch.autograd.grad(function(*others), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.sum().backward()


@every_operator
def test_inputs_are_not_changed(operator, precision):
    function, leaves = setup(operator, precision[0])
    before = [leaf.detach().clone() for leaf in leaves]
    function(*leaves).backward()
    assert all(torch.equal(leaf, copy) for leaf, copy in zip(leaves, before, strict=True))


@pytest.mark.parametrize("operator", ["linear_logprobs", "fused_self_reward_loss"])
def test_nan_in_gives_nan_out(operator, precision):
    function, leaves = setup(operator, precision[0])
    with torch.no_grad():
        leaves[1][3, 2] = torch.nan
    assert function(*leaves).isnan()


def test_only_the_loss_carries_gradient():
    tree, scored = random_batch(0, V).pack()
    hidden = torch.randn(len(tree.tokens), D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    out = fused_self_reward_loss(hidden, weight, scored, ref_logps=torch.zeros(len(scored.rows)), entropy=True)
    assert [name for name, value in out._asdict().items() if value.requires_grad] == ["loss"]


def test_autocast_gives_what_the_cast_operands_give():
    tree, scored = random_batch(0, V).pack()
    hidden = torch.randn(len(tree.tokens), D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        under = fused_self_reward_loss(hidden, weight, scored, beta=0)
    cast = fused_self_reward_loss(hidden.bfloat16(), weight.bfloat16(), scored, beta=0)
    assert torch.equal(under.logps, cast.logps)
    assert under.loss.dtype == torch.float32
    under.loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
