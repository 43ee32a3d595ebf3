"""The C++ kernels of tree attention against the definition, on every instruction set that this machine has."""

import functools
import itertools
import random

import pytest
import torch

from latro_kernels import PrefixTree, tree_attention
from latro_kernels.impl import status
from latro_kernels.testing import assert_error_about_eagers, random_forest

NATIVE = status("tree_attention", "native", "cpu")
pytestmark = pytest.mark.skipif(not NATIVE.ready, reason=f"native: {NATIVE.reason}")


VARIANTS = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "window": {"window": 37},
    "sinks": {"sinks": True},
    "gradients of one sign": {"same_sign": True},
    "everything": {"scale": 0.3, "softcap": 4.0, "window": 150, "sinks": True},
}


def inputs(seed, E, heads=(4, 2), longest=90, dtype=torch.float32, sinks=False):
    """A tree, operands that the dtype can hold, and the direction of a gradient."""
    tree = PrefixTree.pack(*random_forest(seed, nodes=10, longest=longest))
    generator = torch.Generator().manual_seed(seed)
    T, (H, Hkv) = len(tree.tokens), heads
    operands = [torch.randn(h, T, E, generator=generator).to(dtype) for h in (H, Hkv, Hkv, H)]
    return tree, operands, torch.randn(H, generator=generator) if sinks else None


NAMES = ("out", "grad_q", "grad_k", "grad_v", "grad_sinks")


def results(dtype, E, variant, seed, impl, compute_dtype):
    """out, grad_q, grad_k and grad_v; of grad_sinks, four numbers of one sum each, no ratio of errors can be told."""
    options = dict(VARIANTS[variant])
    same_sign = options.pop("same_sign", False)
    tree, operands, sinks = inputs(seed, E, dtype=dtype, sinks=options.pop("sinks", False))
    *leaves, direction = (x.to(compute_dtype) for x in operands)
    if same_sign:
        direction = torch.ones_like(direction)
    for leaf in leaves:
        leaf.requires_grad_()
    if sinks is not None:
        options["sinks"] = sinks.to(compute_dtype if impl == "reference" else torch.float32).requires_grad_()
    out = tree_attention(*leaves, tree, impl=impl, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


CASES = list(itertools.product((torch.float32, torch.bfloat16), (64, 80), VARIANTS))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{str(case[0])[6:]}-{case[1]}-{case[2]}")
def case(request):
    return request.param


@pytest.fixture(scope="module")
def reference(case):
    """Its results by seed and dtype, once for all instruction sets: they take most of the time."""
    return functools.cache(lambda seed, dtype: results(*case, seed, "reference", dtype))


def test_error_is_about_eagers(case, reference, instruction_set):
    dtype, *_ = case
    native = functools.cache(lambda seed: results(*case, seed, "native", dtype))
    for n, name in enumerate(NAMES[:4]):
        assert_error_about_eagers(
            actual=lambda seed, n=n: native(seed)[n],
            eager=lambda seed, n=n: reference(seed, dtype)[n],
            exact=lambda seed, n=n: reference(seed, torch.float64)[n],
            what=f"tree_attention[native, {instruction_set}] {name}",
        )


@pytest.mark.parametrize("seed", range(60))
def test_any_tree_heads_size_and_strides(seed, instruction_set):
    rng = random.Random(seed)
    heads = rng.choice([(1, 1), (3, 3), (4, 2), (8, 1), (6, 2)])
    E = rng.choice([1, 3, 8, 17, 33, 64, 96, 128, 256])
    nodes, longest = rng.choice([(1, 1), (3, 300), (40, 3), (12, 40), (25, 9)])
    tree = PrefixTree.pack(*random_forest(seed, nodes=nodes, longest=longest))
    generator = torch.Generator().manual_seed(seed)
    T, (H, Hkv) = len(tree.tokens), heads
    options = {
        "scale": rng.choice([None, 0.2]),
        "softcap": rng.choice([None, 3.0]),
        "window": rng.choice([None, 1, 5, 64, 1000]),
    }
    leaves = [torch.randn(T, h, E, generator=generator, dtype=torch.float64) for h in (H, Hkv, Hkv)]
    if rng.random() < 0.5:
        leaves.append(torch.randn(H, generator=generator, dtype=torch.float64))
    direction = torch.randn(H, T, E, generator=generator, dtype=torch.float64)
    dtype, tolerance = rng.choice([(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
    leaves = [leaf.to(dtype) for leaf in leaves]
    direction = direction.to(dtype)

    def run(impl, dtype):
        mine = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        q, k, v = (x.transpose(0, 1) for x in mine[:3])  # as a model has them
        out = tree_attention(q, k, v, tree, sinks=mine[3] if len(mine) > 3 else None, impl=impl, **options)
        assert out.transpose(0, 1).is_contiguous()
        return out, *torch.autograd.grad(out, mine, direction.to(dtype))

    for name, ours, exact in zip(NAMES, run("native", dtype), run("reference", torch.float64), strict=False):
        torch.testing.assert_close(
            ours.double(),
            exact,
            rtol=10 * tolerance,
            atol=tolerance * (1 + float(exact.detach().abs().max())),
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_the_same_bits_every_time_whatever_the_threads(instruction_set):
    tree, operands, sinks = inputs(0, 64, heads=(8, 4), sinks=True)

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            leaves = [x.clone().requires_grad_() for x in (*operands[:3], sinks)]
            out = tree_attention(*leaves[:3], tree, sinks=leaves[3], impl="native")
            return out, *torch.autograd.grad(out, leaves, operands[3])
        finally:
            torch.set_num_threads(before)

    first = run(1)
    for threads in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(run(threads), first, strict=True))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7FC00001, -0x400000], ids=hex)
def test_nan_goes_through(bits, softcap, instruction_set):
    """Of whatever bits: the canonical ones of CPU and GPU, a payload, a sign."""
    tree, (q, k, v, _), _ = inputs(0, 16)
    k[0, 0, 0] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    assert tree_attention(q, k, v, tree, softcap=softcap, impl="native")[0, 0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_nan_stays_in_its_branch(dtype, instruction_set):
    """Branches overwrite each other's place in scratch, and there a token of another depth is one of the pair."""
    tree = PrefixTree.pack([[1] * 3, [2] * 6, [3] * 2], [-1, 0, 0])
    q, k, v, direction = (torch.randn(h, 11, 16).to(dtype) for h in (4, 2, 2, 4))
    for operand in (q, k, v, direction):
        operand[:, 3:9] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = tree_attention(*leaves, tree, impl="native")
    results = out, *torch.autograd.grad(out, leaves, direction)
    assert all(x[:, 9:].isfinite().all() for x in results)


def test_no_graph_without_gradients(instruction_set):
    tree, (q, k, v, _), _ = inputs(0, 16)
    assert not tree_attention(q, k, v, tree, impl="native").requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_run_on_the_reference_or_raise(dtype):
    tree, operands, _ = inputs(0, 16)
    q, k, v = (x.to(dtype) for x in operands[:3])
    assert torch.equal(tree_attention(q, k, v, tree), tree_attention(q, k, v, tree, impl="reference"))
    with pytest.raises(RuntimeError, match=r"impl='native' takes torch.float32 and torch.bfloat16, got torch.float"):
        tree_attention(q, k, v, tree, impl="native")


@pytest.mark.parametrize("wish", ["avx1024", "AVX2"])
def test_an_unknown_instruction_set_is_refused(wish, monkeypatch):
    monkeypatch.setenv("LATRO_CPU", wish)
    tree, (q, k, v, _), _ = inputs(0, 16)
    with pytest.raises(RuntimeError, match=f"LATRO_CPU must be one of .*portable.* on this machine, got {wish}"):
        tree_attention(q, k, v, tree, impl="native")


def test_forward_mode_is_refused():
    tree, (q, k, v, direction), _ = inputs(0, 16)
    with pytest.raises(RuntimeError, match="tree_attention: impl='native' has no forward-mode derivative; use impl="):
        torch.func.jvp(lambda x: tree_attention(x, k, v, tree, impl="native"), (q,), (direction,))


@pytest.mark.parametrize(
    ("tiles", "positions", "message"),
    [
        ([[0, 2], [2, 4]], [0, 1, 3, 4], "positions must be the depths of a tree, got 3 at row 2"),
        ([[0, 2], [2, 4]], [0, 1, -1, 0], "positions must be the depths of a tree, got -1 at row 2"),
        ([[0, 2], [3, 4]], [0, 1, 2, 3], r"tiles must cover the rows in order, got \[3, 4\) after row 2"),
        ([[0, 2]], [0, 1, 2, 3], "tiles must cover all 4 rows, got 2"),
        ([[0, 9]], [0, 1, 2, 3], r"tiles must cover the rows in order, got \[0, 9\) after row 0"),
    ],
)
def test_the_operator_refuses_what_is_no_tree(tiles, positions, message):
    q = torch.zeros(2, 4, 8)
    arguments = (q, q, q, torch.tensor(tiles, dtype=torch.int32), torch.tensor(positions), None, 1.0, None, None)
    with pytest.raises(RuntimeError, match=f"tree_attention: {message}"):
        torch.ops.latro_kernels.tree_attention(*arguments)


def test_the_operator_refuses_an_empty_row():
    q = torch.zeros(2, 0, 8)
    arguments = (torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0, dtype=torch.int64), None, 1.0, None, None)
    with pytest.raises(RuntimeError, match="tree_attention: q must have at least one token"):
        torch.ops.latro_kernels.tree_attention(q, q, q, *arguments)


@pytest.mark.parametrize("sinks", [False, True])
def test_opcheck(sinks):
    tree, (q, k, v, direction), sink = inputs(0, 16, longest=20, sinks=sinks)
    for leaf in (q, k, v):
        leaf.requires_grad_()
    arguments = (q, k, v, tree.tiles.query, tree.positions, sink, 0.3, None, 5)
    torch.library.opcheck(torch.ops.latro_kernels.tree_attention.default, arguments)
    with torch.no_grad():
        out, stats = torch.ops.latro_kernels.tree_attention(*arguments)
    operands = [x.detach() for x in (direction.transpose(0, 1).contiguous().transpose(0, 1), q, k, v)]
    torch.library.opcheck(
        torch.ops.latro_kernels.tree_attention_backward.default, (*operands, out, stats, *arguments[3:])
    )
