"""The linear head's kernels for GPUs against the definition: on a GPU, or without one in interpreter and emulator."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latro_kernels import get_memory_budget, linear_logprobs, set_memory_budget
from latro_kernels._gpu import capability
from latro_kernels.impl import status
from latro_kernels.linear_logprobs import cuda, strips
from latro_kernels.linear_logprobs.api import KERNELS
from latro_kernels.linear_logprobs.head import head_of, new_grads
from latro_kernels.testing import assert_error_about_eagers, peaked_head
from tests import emulator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# NumPy's, of infinities and NaN in entries that are then masked.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
EVERY = (True, True, True)
FROZEN = (True, False, False)
NAMES = ["logps", "entropy", "gradient of hidden", "gradient of weight", "gradient of bias"]
VARIANTS = {
    "plain": {},
    "temperature": {"temperature": 0.8},
    "temperatures": {"temperature": "each", "logit_scale": 0.5},
    "softcap": {"softcap": 4.0, "logit_scale": 0.7, "temperature": 0.8},
}
SCORED = 11
MORE = {"tokens": 33, "scored": 64}  # where it is statistics that are compared
TRITON_TILES = {
    "logits": {"BLOCK_M": 16, "BLOCK_V": 64, "BLOCK_K": 32, "GROUP_M": 2},
    "epilogue": {"BLOCK_M": 16, "BLOCK_V": 64},
    "guess": {"BLOCK_K": 64},
    "combine": {"BLOCK_M": 16, "BLOCK_TILES": 2},
    "settle": {"BLOCK_M": 8, "BLOCK_TILES": 2, "BLOCK_K": 32},
    "add_rows": {"BLOCK_K": 64},
    "add_bias_grad": {"BLOCK_M": 16, "BLOCK_V": 128},
}


def small_triton_tiles(monkeypatch, product):
    from latro_kernels.linear_logprobs import triton

    tile_sizes = triton.tile_sizes

    def small(kernel, size, tensor):
        found = {**tile_sizes(kernel, size, tensor), **TRITON_TILES[kernel.removeprefix("linear_logprobs.")]}
        return found | {"product": product} if "product" in found else found

    monkeypatch.setattr(triton, "tile_sizes", small)


def cuda_kernels(monkeypatch, product):
    monkeypatch.setattr(cuda, "tile_sizes", lambda *arguments: {"product": product})
    if DEVICE == "cpu":
        emulator.use_as_native(monkeypatch)


class Backend(NamedTuple):
    impl: str
    operator: str
    prepare: Callable[[pytest.MonkeyPatch, str], None]  # before a test, with who makes the products
    width: int  # columns of a tile then
    halves: tuple[torch.dtype, ...]
    fused: tuple[torch.dtype, ...]  # dtypes in which products may be fused


# Triton's interpreter multiplies bfloat16 wrongly, and cuts numbers off where a GPU rounds them.
TRITON_HALVES = (FLOAT16, BFLOAT16) if DEVICE == "cuda" else (FLOAT16,)
BACKENDS = {
    "triton": Backend(
        "triton",
        "linear_logprobs_triton",
        small_triton_tiles,
        TRITON_TILES["epilogue"]["BLOCK_V"],
        halves=TRITON_HALVES,
        fused=(FLOAT32, *TRITON_HALVES),
    ),
    "cuda": Backend(
        "native",
        "linear_logprobs_cuda",
        cuda_kernels,
        cuda.EPILOGUE_WIDTH,
        halves=(FLOAT16, BFLOAT16),
        fused=(FLOAT16, BFLOAT16),
    ),
}


@pytest.fixture(params=[(name, "vendor") for name in BACKENDS], ids="-".join)
def backend(request, monkeypatch):
    """With tiles so small that a small vocabulary has several, and strips of two."""
    name, product = request.param
    found = BACKENDS[name]
    ready = status("linear_logprobs", found.impl, DEVICE)
    if not ready.ready:
        pytest.skip(f"{name} on {DEVICE}: {ready.reason}")
    if product == "fused" and name == "cuda" and capability(torch.device(DEVICE)) != 90:
        pytest.skip("the fused product is for GPUs of capability 9.0")
    found.prepare(monkeypatch, product)
    monkeypatch.setattr(strips, "WORKSPACE", 8 * SCORED * 2 * found.width)
    return found


VENDOR = [(name, "vendor") for name in BACKENDS]
either_product = pytest.mark.parametrize(
    "backend",
    VENDOR + [(name, "fused") for name, found in BACKENDS.items() if FLOAT32 in found.fused],
    indirect=True,
    ids="-".join,
)
HALVES = [((name, "vendor"), half) for name, found in BACKENDS.items() for half in found.halves]
in_half_precision = pytest.mark.parametrize(("backend", "dtype"), HALVES, indirect=["backend"], ids=str)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Whatever is read before it is written is NaN."""
    new_empty = torch.Tensor.new_empty

    def poison(self, *arguments, **options):
        out = new_empty(self, *arguments, **options)
        return out.fill_(torch.nan) if out.is_floating_point() and out.device.type == DEVICE else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)


@pytest.fixture(autouse=True)
def same_budget_after():
    before = get_memory_budget()
    yield
    set_memory_budget(before)


BUDGETS = ["kept", "kept in part", "made again"]


@pytest.fixture(params=BUDGETS)
def budget(request, backend):
    set_budget(request.param, backend)
    return request.param


def set_budget(keeping, backend):
    """Of float32, for everything, for a tile and 64 columns of the next, or for nothing."""
    set_memory_budget({"kept": 1 << 30, "kept in part": SCORED * 4 * (backend.width + 70), "made again": 0}[keeping])


def inputs(backend, seed=0, dtype=FLOAT32, p=0.99, variant="plain", tokens=7, scored=SCORED, shape=None):
    """Operands that the dtype can hold, and a gradient of each log-prob. No size is a multiple of a block."""
    T, D, V, M = shape or (tokens, 40, 3 * backend.width + 9, scored)
    hidden, weight, rows, targets = peaked_head(T, D, V, M, p, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    options = dict(VARIANTS[variant])
    if options.get("temperature") == "each":
        options["temperature"] = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)[torch.arange(M) % 3].to(DEVICE)
    bias = torch.randn(V, generator=generator).to(dtype) / 8
    arguments = tuple(tensor.to(DEVICE) for tensor in (hidden, weight, bias, rows, targets))
    return arguments, torch.randn(M, generator=generator).to(DEVICE), options


def results(impl, arguments, direction, options, dtype=None, wanted=EVERY):
    hidden, weight, bias, rows, targets = arguments
    tensors = [t.to(dtype or t.dtype, copy=True) for t in (hidden, weight, bias)]
    leaves = [t.requires_grad_() for t, want in zip(tensors, wanted, strict=True) if want]
    hidden, weight, bias = tensors
    logps, entropy = linear_logprobs(hidden, weight, rows, targets, bias=bias, impl=impl, entropy=True, **options)
    return [logps.detach(), entropy, *torch.autograd.grad(logps, leaves, direction.to(logps.dtype))]


def assert_equals_the_definition(backend, arguments, direction, options, wanted=EVERY, tolerance=None):
    tolerance = tolerance or (1e-5 if arguments[0].dtype == FLOAT32 else 1e-2)
    exact = results("reference", arguments, direction, options, torch.float64, wanted)
    found = results(backend.impl, arguments, direction, options, wanted=wanted)
    for name, ours, truth in zip(NAMES, found, exact, strict=False):
        # The entropy of a peaked distribution is a small difference of sums that are about 1.
        size = max(float(truth.nan_to_num(posinf=0, neginf=0).abs().max()), 1.0 if name == "entropy" else 1e-3)
        torch.testing.assert_close(
            ours.double(), truth, rtol=0, atol=tolerance * size, msg=lambda m, n=name: f"{n}: {m}"
        )


def error_cases():
    for name, found in BACKENDS.items():
        vendor, fused = (name, "vendor"), (name, "fused")
        yield vendor, FLOAT32, 0.5, "plain", "kept"
        yield vendor, FLOAT32, 0.99, "softcap", "kept in part"
        yield fused if FLOAT32 in found.fused else vendor, FLOAT32, 0.9999, "temperatures", "kept"
        for half in found.halves:
            for p in (0.5, 0.99, 0.9999):
                yield vendor, half, p, "plain", "kept"
            yield fused if half in found.fused else vendor, half, 0.99, "softcap", "made again"


@pytest.mark.parametrize(("backend", "dtype", "p", "variant", "keeping"), error_cases(), indirect=["backend"], ids=str)
def test_error_is_about_that_of_eager(backend, dtype, p, variant, keeping):
    set_budget(keeping, backend)

    def run(seed, impl, as_dtype):
        key = (seed, impl, as_dtype)
        if key not in found:
            found[key] = results(impl, *inputs(backend, seed, dtype, p, variant, **MORE), as_dtype)
        return found[key]

    found = {}
    for n, name in enumerate(NAMES):
        assert_error_about_eagers(
            actual=lambda seed, n=n: run(seed, backend.impl, dtype)[n],
            eager=lambda seed, n=n: run(seed, "reference", dtype)[n],
            exact=lambda seed, n=n: run(seed, "reference", torch.float64)[n],
            what=f"{name}, {variant}, p={p}",
        )
    assert all((run(seed, backend.impl, dtype)[0] <= 0).all() for seed in range(5))


@in_half_precision
def test_error_of_the_gradient_under_a_frozen_head(backend, dtype):
    def run(seed, impl, as_dtype):
        return results(impl, *inputs(backend, seed, dtype), as_dtype, FROZEN)[2]

    assert_error_about_eagers(
        actual=lambda seed: run(seed, backend.impl, dtype),
        eager=lambda seed: run(seed, "reference", dtype),
        exact=lambda seed: run(seed, "reference", torch.float64),
        what="gradient of hidden under a frozen head",
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_definition(variant, backend, budget):
    assert_equals_the_definition(backend, *inputs(backend, variant=variant))


@either_product
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_definition_under_a_frozen_head(variant, backend):
    assert_equals_the_definition(backend, *inputs(backend, variant=variant), wanted=FROZEN)


@either_product
@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (2, 3, 2, 5), (9, 1, 200, 7), (5, 130, 3, 17)])
def test_any_size(shape, backend):
    assert_equals_the_definition(backend, *inputs(backend, p=0.5, shape=shape))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    HALVES + [((name, "fused"), half) for (name, _), half in HALVES if half in BACKENDS[name].fused],
    indirect=["backend"],
    ids=str,
)
def test_any_size_in_half_precision(backend, dtype):
    assert_equals_the_definition(backend, *inputs(backend, 0, dtype, 0.5, shape=(5, 136, 7, 17)))


@pytest.mark.parametrize(
    "wanted", [(False, True, False), (False, False, True), (True, False, True), (True, True, False)]
)
def test_only_the_gradients_that_are_wanted(wanted, backend):
    arguments, direction, options = inputs(backend)
    every = results(backend.impl, arguments, direction, options)
    expected = [*every[:2], *(grad for grad, want in zip(every[2:], wanted, strict=True) if want)]
    for a, b in zip(results(backend.impl, arguments, direction, options, wanted=wanted), expected, strict=True):
        assert torch.equal(a, b)


def test_strides_do_not_matter(backend):
    (hidden, weight, bias, rows, targets), direction, options = inputs(backend)
    wide = torch.randn(hidden.shape[0], hidden.shape[1] + 3, device=DEVICE)
    wide[:, 1:-2] = hidden
    turned = weight.t().contiguous().t()
    strided = (wide[:, 1:-2], turned, bias.repeat_interleave(2)[::2], rows.flip(0).flip(0), targets)
    expected = results(backend.impl, (hidden, weight, bias, rows, targets), direction, options)
    for a, b in zip(results(backend.impl, strided, direction, options), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# What becomes of the bias and the targets, for logits to be far from the guess or to have none. Numbers are in nats.


def own_and_lowest(bias, targets, width):
    """Half of the targets hold the largest logit themselves, a quarter the smallest."""
    bias[1], bias[width + 1] = 300, -300
    targets[::2], targets[1::4] = 1, width + 1


def above(bias, targets, width):
    """Targets are 100 below the largest logit, of their own tile or of another's."""
    bias[1] = 100
    targets[::2], targets[1::2] = 5, 2 * width + 3


def rising(bias, targets, width):
    """Each tile is further above the target than those before it, and so is each strip."""
    bias += 70 * (torch.arange(len(bias), device=DEVICE) // width)
    targets[::2] = 3


def falling(bias, targets, width):
    bias -= 70 * (torch.arange(len(bias), device=DEVICE) // width)
    targets[::2] = len(bias) - 2


def forbidden(height, by=-torch.inf):
    def change(bias, targets, width):
        """Half of the targets are impossible, the first of a strip among them, and all others are at `height`."""
        targets[::2], targets[3] = targets[::2] % 4, 0
        bias += height
        bias[targets[::2]] = by

    return change


def rising_from_forbidden(bias, targets, width):
    rising(bias, targets, width)
    bias -= 300
    bias[3] = -torch.inf
    bias[width : 2 * width] = -torch.inf


FAR_OFF = {
    "largest and smallest": own_and_lowest,
    "above": above,
    "rising": rising,
    "falling": falling,
    "forbidden, others low": forbidden(-300),
    "forbidden, others high": forbidden(300),
    "forbidden by a number, others low": forbidden(-300, -1e9),
    "forbidden by a number, others high": forbidden(300, -1e30),
    "rising from forbidden": rising_from_forbidden,
}


@pytest.mark.parametrize("keeping", [*BUDGETS, "frozen"])
@pytest.mark.parametrize("change", FAR_OFF)
def test_far_from_the_guess(change, keeping, backend):
    set_budget("made again" if keeping == "frozen" else keeping, backend)
    (hidden, weight, bias, rows, targets), direction, options = inputs(backend)
    FAR_OFF[change](bias, targets, backend.width)
    wanted = FROZEN if keeping == "frozen" else EVERY
    assert_equals_the_definition(backend, (hidden, weight, bias, rows, targets), direction, options, wanted, 1e-4)


@pytest.mark.parametrize("wanted", [EVERY, FROZEN], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("change", ["largest and smallest", "above", "rising from forbidden"])
@in_half_precision
def test_far_from_the_guess_in_half_precision(dtype, change, wanted, backend):
    (hidden, weight, bias, rows, targets), direction, options = inputs(backend, dtype=dtype)
    FAR_OFF[change](bias, targets, backend.width)
    assert_equals_the_definition(backend, (hidden, weight, bias, rows, targets), direction, options, wanted)


@pytest.mark.parametrize("by", [-torch.inf, torch.finfo(FLOAT32).min, -1e9])
@pytest.mark.parametrize("height", [-200.0, 200.0])
def test_almost_all_forbidden(height, by, backend):
    """As when an answer is one of a few tokens: whole tiles have no possible entry."""
    set_budget("kept in part", backend)
    (hidden, weight, _, rows, targets), direction, options = inputs(backend)
    V = len(weight)
    allowed = torch.tensor([1, 2, 5, V - 2], device=DEVICE)
    bias = torch.full((V,), by, device=DEVICE).index_fill(0, allowed, height)
    arguments = (hidden, weight, bias, rows, allowed[targets % 4])
    assert_equals_the_definition(backend, arguments, direction, options, tolerance=1e-4)


@either_product
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("wanted", [EVERY, FROZEN], ids=["trained head", "frozen head"])
def test_a_row_that_is_not_finite_spoils_its_own_tokens_alone(value, wanted, backend):
    (hidden, weight, bias, rows, targets), direction, options = inputs(backend)
    hidden[rows[0]] = value
    arguments = (hidden, weight, bias, rows, targets)
    logps, _, of_hidden, *_ = results(backend.impl, arguments, direction, options, wanted=wanted)
    spoilt = rows == rows[0]
    assert logps[spoilt].isnan().all()
    assert logps[~spoilt].isfinite().all()
    assert of_hidden[rows[0]].isnan().all()
    assert of_hidden[rows[~spoilt]].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_entry_that_is_not_finite_spoils_every_token(value, backend):
    """As it does in eager, the token whose target it is included."""
    (hidden, weight, bias, rows, targets), *_ = inputs(backend)
    bias[targets[0]] = value
    logps = linear_logprobs(hidden, weight, rows, targets, bias=bias, impl=backend.impl)
    assert logps.isnan().all()


def test_tiny_coefficients_in_float16(backend):
    """float16 ends at 6e-8; a GradScaler's factor comes after the gradients are made, when a loss is fused."""
    (hidden, weight, bias, rows, targets), direction, _ = inputs(backend, dtype=FLOAT16)
    head = head_of(hidden, weight, rows, targets, bias, 1.0, None, 1.0)
    kernels = KERNELS[backend.impl]
    _, _, *kept = kernels.forward(*head, 1 << 30, False)

    def grads_of(coefficients):
        grads = new_grads(head, True, True, True, whole=True)
        kernels.add_grads(coefficients, head, kept, grads, True)
        return grads

    for tiny, truth in zip(grads_of(direction * 2.0**-30), grads_of(direction), strict=True):
        assert torch.equal(tiny * 2.0**30, truth)


def test_parts_add_up(backend):
    """As the fused loss makes them: some tokens at a time, in float32."""
    kernels = KERNELS[backend.impl]
    for dtype in (FLOAT32, *backend.halves):
        (hidden, weight, bias, rows, targets), direction, _ = inputs(backend, dtype=dtype)
        head = head_of(hidden, weight, rows, targets, bias, 1.0, None, 1.0)

        def grads_of(*parts, head=head, direction=direction):
            grads = new_grads(head, True, True, True, whole=False)
            for begin, end in parts:
                part = head.part(begin, end)
                _, _, *kept = kernels.forward(*part, 1 << 30, False)
                kernels.add_grads(direction[begin:end], part, kept, grads, begin == 0)
            return grads

        tolerance = 1e-5 if dtype == FLOAT32 else 1e-2
        for ours, truth in zip(grads_of((0, 4), (4, 5), (5, 11)), grads_of((0, 11)), strict=True):
            torch.testing.assert_close(ours, truth, rtol=0, atol=tolerance * float(truth.abs().max()))


def test_the_graph_may_be_retained(backend, budget):
    (hidden, weight, bias, rows, targets), *_ = inputs(backend)
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    loss = linear_logprobs(hidden, weight, rows, targets, bias=bias, impl=backend.impl).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss * 4, leaves), strict=True):
        assert torch.equal(4 * a, b)


def test_autocast_leaves_the_kernels_alone(backend):
    """A backward pass may run under it; products there are of the dtype that the forward pass chose."""
    arguments, direction, options = inputs(backend)
    expected = results(backend.impl, arguments, direction, options)
    hidden, weight, bias, rows, targets = arguments
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    logps = linear_logprobs(hidden, weight, rows, targets, bias=bias, impl=backend.impl)
    with torch.autocast(DEVICE, BFLOAT16):
        grads = torch.autograd.grad(logps, leaves, direction)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected[2:], strict=True))


class Kept(TorchDispatchMode):
    """How many numbers each call of an operator returns for its backward."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator
        self.counts = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if function.name() == f"latro_kernels::{self.operator}":
            *_, exponentials, unit_grad = results
            self.counts.append(exponentials.numel() + unit_grad.numel())
        return results


def test_what_is_kept_is_within_the_budget(backend, budget):
    with Kept(backend.operator) as kept:
        results(backend.impl, *inputs(backend))
    columns = {"kept": 3 * backend.width + 64, "kept in part": backend.width + 64, "made again": 0}[budget]
    assert kept.counts == [SCORED * columns]


@pytest.mark.parametrize("unit_grad", [False, True])
@pytest.mark.parametrize("each", [False, True])
def test_operator_passes_opcheck(each, unit_grad, backend):
    (hidden, weight, bias, rows, targets), *_ = inputs(backend, shape=(9, 16, 300, 12))
    leaves = [hidden.requires_grad_(), *(t if unit_grad else t.requires_grad_() for t in (weight, bias))]
    numbers = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    temperatures = torch.linspace(0.5, 2, len(rows), dtype=torch.float64, device=DEVICE) if each else None
    torch.library.opcheck(
        getattr(torch.ops.latro_kernels, backend.operator).default,
        (*leaves, rows, targets, numbers, temperatures, 12 * 200 * 4, unit_grad),
        # Columns between one row of exponentials and the next are whatever the memory held.
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_the_same_bits_every_time(backend, budget):
    arguments, direction, options = inputs(backend)
    first, second = (results(backend.impl, arguments, direction, options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
