"""Tree attention in Triton against the definition: on a GPU, or in Triton's interpreter where there is none."""

import random

import pytest
import torch

from latro_kernels import PrefixTree, pack_rationales, tree, tree_attention
from latro_kernels.impl import status
from latro_kernels.testing import SEEDS, assert_error_about_eagers, random_forest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = status("tree_attention", "triton", DEVICE)
pytestmark = pytest.mark.skipif(not TRITON.ready, reason=f"triton: {TRITON.reason}")
if TRITON.ready:
    from latro_kernels.tree_attention import triton as backend

# tl.dot of bfloat16 is wrong in Triton's interpreter.
HALVES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
VARIANTS = {
    "plain": {},
    "everything": {"scale": 0.3, "softcap": 4.0, "window": 30, "sinks": True},
}
NAMES = ("out", "grad_q", "grad_k", "grad_v", "grad_sinks")


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch):
    """The interpreter takes its time for every program: few large ones. A GPU takes what is in the table.

    In float32 sums over more rows than the table has would err more.
    """
    if DEVICE == "cpu":
        monkeypatch.setattr(
            backend, "tile_sizes", lambda kernel, size, x: {"BLOCK_M": 32 if x.dtype == torch.float32 else 128}
        )


def inputs(seed, E, heads=(2, 1), longest=30, dtype=torch.float32, sinks=False):
    """A tree, operands that the dtype can hold, and the direction of a gradient."""
    tree = PrefixTree.pack(*random_forest(seed, nodes=5, longest=longest)).to(DEVICE)
    generator = torch.Generator().manual_seed(seed)
    T, (H, Hkv) = len(tree.tokens), heads
    operands = [torch.randn(T, h, E, generator=generator).to(DEVICE, dtype).transpose(0, 1) for h in (H, Hkv, Hkv, H)]
    return tree, operands, torch.randn(H, generator=generator).to(DEVICE) if sinks else None


def results(tree, operands, sinks, impl, dtype, **options):
    """out, grad_q, grad_k, grad_v and grad_sinks."""
    *leaves, direction = (x.to(dtype) for x in operands)
    if sinks is not None:
        leaves.append(sinks.to(dtype if impl == "reference" else torch.float32))
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = tree_attention(*leaves[:3], tree, sinks=leaves[3] if sinks is not None else None, impl=impl, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_error_is_about_eagers(dtype, variant):
    options = dict(VARIANTS[variant])
    sinks = options.pop("sinks", False)
    found = {
        (impl, as_dtype): [
            results(*inputs(seed, 64, dtype=dtype, sinks=sinks), impl, as_dtype, **options) for seed in SEEDS
        ]
        for impl, as_dtype in (("triton", dtype), ("reference", dtype), ("reference", torch.float64))
    }
    # Not of grad_sinks: four numbers of one sum each are too few for a ratio of errors. The test below has them.
    for of, name in enumerate(NAMES[:4]):
        assert_error_about_eagers(
            actual=lambda seed, of=of: found["triton", dtype][seed][of],
            eager=lambda seed, of=of: found["reference", dtype][seed][of],
            exact=lambda seed, of=of: found["reference", torch.float64][seed][of],
            what=f"tree_attention[triton] {name}",
        )


def assert_equals_the_definition(tree, operands, sinks=None, tolerance=2e-5, **options):
    ours = results(tree, operands, sinks, "triton", operands[0].dtype, **options)
    exact = results(tree, operands, sinks, "reference", torch.float64, **options)
    for name, a, b in zip(NAMES, ours, exact, strict=False):
        size = 1 + float(b.abs().max())
        torch.testing.assert_close(
            a.double(), b, rtol=10 * tolerance, atol=tolerance * size, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("seed", range(9))
def test_any_tree_heads_size_and_options(seed, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(backend, "tile_sizes", lambda kernel, size, x: {"BLOCK_M": (16, 64, 128)[seed % 3]})
    rng = random.Random(seed)
    heads = ((1, 1), (3, 3), (4, 2), (6, 1), (18, 1))[seed % 5]
    E = (1, 17, 33, 64, 80, 96, 128)[seed % 7]
    nodes, longest = ((1, 1), (2, 90), (12, 3), (5, 30))[seed % 4]
    dtype, tolerance = rng.choice([(torch.float32, 2e-5), (torch.float16, 4e-3)])
    packed = PrefixTree.pack(*random_forest(seed, nodes=nodes, longest=longest)).to(DEVICE)
    generator = torch.Generator().manual_seed(seed)
    operands = [
        torch.randn(h, len(packed.tokens), E, generator=generator).to(DEVICE, dtype)
        for h in (*heads, heads[1], heads[0])
    ]
    sinks = torch.randn(heads[0], generator=generator).to(DEVICE) if rng.random() < 0.5 else None
    options = {
        "scale": rng.choice([None, 0.2]),
        "softcap": rng.choice([None, 3.0]),
        "window": rng.choice([None, 1, 5, 64, 1000]),
    }
    assert_equals_the_definition(packed, operands, sinks, tolerance, **options)


def test_a_deep_tree_of_several_prompts():
    lists = [[1] * 66, [2] * 5, [3] * 9, [4] * 3, [5] * 6, [6] * 2, [7] * 10, [8] * 4]
    deep = PrefixTree.pack(lists, [-1, 0, 1, 2, 2, 0, -1, 6]).to(DEVICE)
    operands = [torch.randn(h, len(deep.tokens), 32, device=DEVICE) for h in (2, 1, 1, 2)]
    assert_equals_the_definition(deep, operands)


def test_keys_that_many_see_are_shared_by_programs(monkeypatch):
    """At small sizes: with 512 queries for a part the interpreter would take minutes."""
    monkeypatch.setattr(tree, "LEAST_PART", 20)
    packed, _ = pack_rationales([[1] * 70], [[[2] * 10] * 3], [[3]])
    assert len(packed.tiles.parts) > 4
    operands = [torch.randn(h, len(packed.tokens), 16, device=DEVICE) for h in (2, 1, 1, 2)]
    for options in ({}, {"window": 25}):
        assert_equals_the_definition(packed.to(DEVICE), operands, **options)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # the interpreter says so of NaN
def test_keys_outside_the_window_are_skipped():
    long = PrefixTree.pack([[1] * 300], [-1]).to(DEVICE)
    operands = [torch.randn(1, 300, 16, device=DEVICE) for _ in range(4)]
    assert_equals_the_definition(long, operands, window=40)
    # What it never reads may be anything.
    operands[1][:, :64], operands[2][:, :64] = torch.nan, torch.nan
    out = tree_attention(*operands[:3], long, window=40, impl="triton")
    assert out[:, 128:].isfinite().all()


def inside_nan(x, of):
    """The same numbers among others that nobody may read; of: how many tensors share the memory, as in a fused qkv."""
    room = x.new_full((x.shape[1] + 2, x.shape[0] * of, x.shape[2]), torch.nan)
    view = room[1:-1, : x.shape[0]].transpose(0, 1)
    return view.copy_(x)


@pytest.mark.parametrize("shared", [(3, 3, 3, 1), (1, 3, 1, 1), (1, 1, 1, 2)])
def test_views_of_larger_tensors(shared):
    packed, operands, _ = inputs(3, 16, heads=(4, 2))
    assert_equals_the_definition(packed, [inside_nan(x, of) for x, of in zip(operands, shared, strict=True)])


def test_sinks_of_any_strides():
    packed, operands, _ = inputs(3, 16)
    assert_equals_the_definition(packed, operands, torch.randn(4, device=DEVICE)[::2])
    assert_equals_the_definition(packed, operands, torch.ones(1, device=DEVICE).expand(2))


def test_blocks_are_full(monkeypatch):
    def rows_and_blocks(G):
        blocks, of_tile = backend._blocks_of_rows("forward", torch.empty(2, 9, 64, dtype=torch.float16), G)
        return blocks["BLOCK_M"], of_tile

    monkeypatch.setattr(backend, "tile_sizes", lambda kernel, size, x: {"BLOCK_M": 128, "num_warps": 8})
    assert [rows_and_blocks(G) for G in (1, 2, 3, 7, 71)] == [(64, 1), (128, 1), (128, 2), (128, 4), (128, 36)]


@pytest.mark.parametrize("expanded", [False, True])
def test_any_strides(expanded):
    packed, operands, _ = inputs(3, 16)
    every_other = [torch.stack([x, torch.zeros_like(x)], -1).flatten(-2)[..., ::2] for x in operands]
    k = operands[1].transpose(0, 1).contiguous().transpose(0, 1)
    mixed = [operands[0].contiguous(), k, operands[2].contiguous(), operands[3]]
    if expanded:
        every_other[3] = mixed[3] = operands[3][:1, :1, :1].expand_as(operands[3])
    for strided in (every_other, mixed):
        assert_equals_the_definition(packed, strided)


def test_the_same_bits_every_time():
    packed, operands, sinks = inputs(0, 64, heads=(4, 2), sinks=True)
    first, second = (results(packed, operands, sinks, "triton", torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_nan_goes_through():
    packed, (q, k, v, _), _ = inputs(0, 16)
    k = k.clone()
    k[0, 0, 0] = torch.nan
    assert tree_attention(q, k, v, packed, impl="triton")[0, 0].isnan().all()


def test_no_graph_without_gradients():
    packed, (q, k, v, _), _ = inputs(0, 16)
    assert not tree_attention(q, k, v, packed, impl="triton").requires_grad


def test_what_it_does_not_take_is_refused(monkeypatch):
    packed, (q, k, v, direction), _ = inputs(0, 16)
    with pytest.raises(RuntimeError, match=r"impl='triton' takes torch.float32, torch.bfloat16 and torch.float16, got"):
        tree_attention(q.double(), k.double(), v.double(), packed, impl="triton")
    with pytest.raises(RuntimeError, match="tree_attention: impl='triton' has no forward-mode derivative; use impl="):
        torch.func.jvp(lambda x: tree_attention(x, k, v, packed, impl="triton"), (q,), (direction,))
    monkeypatch.undo()
    large = [x.repeat(1, 1, 17) for x in (q, k, v)]
    with pytest.raises(RuntimeError, match=r"impl='triton' takes heads of at most 128 in torch.float32, got 272; use"):
        tree_attention(*large, packed, impl="triton")


@pytest.mark.parametrize("sinks", [False, True])
def test_opcheck(sinks):
    packed, (q, k, v, direction), sink = inputs(0, 16, longest=5, sinks=sinks)
    operands = [x.detach().requires_grad_() for x in (q, k, v)]
    tiles = [getattr(packed.tiles, name) for name in ("query", "offset", "key", "full", "seen", "parts")]
    options = (*tiles, packed.reach, packed.positions, sink, 0.3, None, 5)
    torch.library.opcheck(torch.ops.latro_kernels.tree_attention_triton.default, (*operands, *options))
    with torch.no_grad():
        out, stats = torch.ops.latro_kernels.tree_attention_triton(*operands, *options)
    torch.library.opcheck(
        torch.ops.latro_kernels.tree_attention_triton_backward.default, (direction, q, k, v, out, stats, *options)
    )
