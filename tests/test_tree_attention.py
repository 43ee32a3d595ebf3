import pytest
import torch

from latro_kernels import PrefixTree, tree_attention
from latro_kernels.testing import path_to, random_forest

VARIANTS = {
    "plain": {},
    "scale": {"scale": 0.4},
    "softcap": {"softcap": 1.5},
    "window": {"window": 4},
    "window of one": {"window": 1},
    "sinks": {"sinks": True},
    "everything": {"scale": 0.7, "softcap": 2.0, "window": 5, "sinks": True},
}


def operands(tree, heads=(4, 2), size=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    T = len(tree.tokens)
    return [
        torch.randn(h, T, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for h in (heads[0], heads[1], heads[1])
    ]


def options_of(variant, heads=4, dtype=torch.float64):
    options = dict(VARIANTS[variant])
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-1, 2, heads, dtype=dtype, requires_grad=True)
    return options


def one_query(q, k, v, scale=None, softcap=None, sinks=None):
    """Attention of one query [H, E] over its keys [H, n, E], in the words of the formula."""
    s = (k * q[:, None]).sum(-1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * (s / softcap).tanh()
    weights = s.exp()
    total = weights.sum(-1) + (0 if sinks is None else sinks.exp())
    return (weights / total[:, None])[..., None].mul(v).sum(1)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_each_token_attends_to_its_path_alone(seed, variant, heads):
    tree = PrefixTree.pack(*random_forest(seed))
    q, k, v = operands(tree, heads)
    options = options_of(variant, heads[0])
    inputs = [q, k, v] + ([options["sinks"]] if "sinks" in options else [])
    out = tree_attention(q, k, v, tree, **options)
    assert out.shape == q.shape

    window = options.pop("window", None)
    group = heads[0] // heads[1]
    expected = []
    for t in range(len(tree.tokens)):
        path = path_to(tree, t)[-window if window else None :]
        keys, values = (x[:, path].repeat_interleave(group, 0) for x in (k, v))
        expected.append(one_query(q[:, t], keys, values, **options))
    expected = torch.stack(expected, 1)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)

    direction = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(7))
    ours = torch.autograd.grad((out * direction).sum(), inputs)
    theirs = torch.autograd.grad((expected * direction).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_layout_of_the_result(dtype):
    tree = PrefixTree.pack(*random_forest(2))
    q, k, v = operands(tree, dtype=dtype)
    out = tree_attention(q, k, v, tree)
    assert out.dtype == dtype
    flat = out.transpose(0, 1).reshape(len(tree.tokens), -1)
    assert flat.data_ptr() == out.data_ptr()
    exact = tree_attention(*(x.detach().double() for x in (q, k, v)), tree)
    tolerance = {torch.float16: 3e-3, torch.bfloat16: 3e-2, torch.float32: 1e-6, torch.float64: 0}[dtype]
    assert (out.double() - exact).abs().max() <= tolerance


def test_any_strides_give_the_same_result():
    tree = PrefixTree.pack(*random_forest(4))
    q, k, v = (x.detach() for x in operands(tree))
    expected = tree_attention(q, k, v, tree)
    as_model_has_them = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    every_other = [torch.stack([x, torch.zeros_like(x)], -1).flatten(-2)[..., ::2] for x in (q, k, v)]
    for strided in (as_model_has_them, every_other):
        assert not any(x.is_contiguous() for x in strided)
        torch.testing.assert_close(tree_attention(*strided, tree), expected, rtol=1e-13, atol=1e-13)


def test_autocast_casts_the_operands():
    tree = PrefixTree.pack(*random_forest(5))
    q, k, v = operands(tree, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = tree_attention(q, k, v, tree)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, tree_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), tree))
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32
