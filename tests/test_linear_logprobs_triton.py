"""The Triton kernels of the linear head against the definition: in the interpreter, or on a GPU where there is one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latro_kernels import get_memory_budget, linear_logprobs, set_memory_budget
from latro_kernels.impl import status
from latro_kernels.testing import assert_error_about_eagers, peaked_head

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = status("linear_logprobs", "triton", DEVICE)
if not TRITON.ready:
    pytest.skip(f"triton on {DEVICE}: {TRITON.reason}", allow_module_level=True)

from latro_kernels.linear_logprobs import triton  # noqa: E402
from latro_kernels.linear_logprobs.head import head_of, new_grads  # noqa: E402

# NumPy's, of infinities and NaN in entries that are then masked.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# The interpreter's products of bfloat16 are wrong, and it cuts numbers off where a GPU rounds them.
DTYPES = [torch.float32, torch.float16, *[torch.bfloat16] * (DEVICE == "cuda")]
NAMES = ["logps", "entropy", "gradient of hidden", "gradient of weight", "gradient of bias"]
VARIANTS = {
    "plain": {},
    "temperature": {"temperature": 0.8},
    "temperatures": {"temperature": "each", "logit_scale": 0.5},
    "softcap": {"softcap": 4.0, "logit_scale": 0.7, "temperature": 0.8},
}
# Tokens, hidden, vocabulary, scored tokens: none a multiple of a block.
SHAPE = (7, 37, 201, 11)
MORE_TOKENS = (11, 37, 201, 17)  # where it is statistics that are compared
EVERYTHING, NOTHING = 1 << 30, 0
A_PART = 11 * 4 * 70  # 64 columns of the vocabulary
TILES = {
    "logits": {"BLOCK_M": 16, "BLOCK_V": 64, "BLOCK_K": 32, "GROUP_M": 2},
    "epilogue": {"BLOCK_M": 16, "BLOCK_V": 64},
    "guess_shift": {"BLOCK_K": 64},
    "combine": {"BLOCK_M": 16, "BLOCK_TILES": 2},
    "unit_grad_of_far": {"BLOCK_M": 16, "BLOCK_V": 64, "BLOCK_K": 32},
    "add_rows": {"BLOCK_K": 64},
    "add_bias_grad": {"BLOCK_M": 16, "BLOCK_V": 128},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that small matrices have several, and strips."""
    tile_sizes = triton.tile_sizes

    def small(kernel, size, tensor):
        return {**tile_sizes(kernel, size, tensor), **TILES[kernel.removeprefix("linear_logprobs.")]}

    monkeypatch.setattr(triton, "tile_sizes", small)
    monkeypatch.setattr(triton, "WORKSPACE", 4 * SHAPE[-1] * 128)


@pytest.fixture(params=["vendor", "fused"])
def product(request, monkeypatch):
    take_product(request.param, monkeypatch)
    return request.param


def take_product(name, monkeypatch):
    tile_sizes = triton.tile_sizes
    monkeypatch.setattr(
        triton,
        "tile_sizes",
        lambda kernel, *rest: tile_sizes(kernel, *rest) | ({"product": name} if kernel.endswith("logits") else {}),
    )


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


@pytest.fixture(params=[EVERYTHING, A_PART, NOTHING], ids=["kept", "kept in part", "made again"])
def budget(request):
    set_memory_budget(request.param)
    return request.param


def inputs(seed=0, dtype=torch.float32, p=0.99, variant="plain", shape=SHAPE):
    """Operands that the dtype can hold, and a gradient of each log-prob."""
    T, D, V, M = shape
    hidden, weight, rows, targets = peaked_head(T, D, V, M, p, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    options = dict(VARIANTS[variant])
    if options.get("temperature") == "each":
        options["temperature"] = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)[torch.arange(M) % 3].to(DEVICE)
    bias = torch.randn(V, generator=generator).to(dtype) / 8
    arguments = tuple(tensor.to(DEVICE) for tensor in (hidden, weight, bias, rows, targets))
    return arguments, torch.randn(M, generator=generator).to(DEVICE), options


def results(arguments, direction, options, impl="triton", dtype=None, wanted=(True, True, True)):
    hidden, weight, bias, rows, targets = arguments
    tensors = [t.to(dtype or t.dtype, copy=True) for t in (hidden, weight, bias)]
    leaves = [t.requires_grad_() for t, want in zip(tensors, wanted, strict=True) if want]
    hidden, weight, bias = tensors
    logps, entropy = linear_logprobs(hidden, weight, rows, targets, bias=bias, impl=impl, entropy=True, **options)
    return [logps.detach(), entropy, *torch.autograd.grad(logps, leaves, direction.to(logps.dtype))]


def assert_equals_the_definition(arguments, direction, options, wanted=(True, True, True), tolerance=None):
    dtype = arguments[0].dtype
    exact = results(arguments, direction, options, "reference", torch.float64, wanted)
    tolerance = tolerance or (1e-5 if dtype == torch.float32 else 1e-2)
    for name, ours, truth in zip(NAMES, results(arguments, direction, options, wanted=wanted), exact, strict=False):
        # The entropy of a peaked distribution is a small difference of sums that are about 1.
        size = max(float(truth.abs().max()), 1.0 if name == "entropy" else 1e-3)
        torch.testing.assert_close(
            ours.double(), truth, rtol=0, atol=tolerance * size, msg=lambda m, n=name: f"{n}: {m}"
        )


ERROR_CASES = [
    (torch.float32, 0.5, "plain", EVERYTHING, "vendor"),
    (torch.float32, 0.99, "softcap", A_PART, "vendor"),
    (torch.float32, 0.9999, "temperatures", EVERYTHING, "fused"),
]
for half in DTYPES[1:]:
    ERROR_CASES += [(half, p, "plain", EVERYTHING, "vendor") for p in (0.5, 0.99, 0.9999)]
    ERROR_CASES += [(half, 0.99, "softcap", NOTHING, "fused")]


@pytest.mark.parametrize(("dtype", "p", "variant", "budget_", "product_"), ERROR_CASES, ids=str)
def test_error_is_about_that_of_eager(dtype, p, variant, budget_, product_, monkeypatch):
    set_memory_budget(budget_)
    take_product(product_, monkeypatch)

    def run(seed, impl, as_dtype):
        key = (seed, impl, as_dtype)
        if key not in found:
            found[key] = results(*inputs(seed, dtype, p, variant, MORE_TOKENS), impl, as_dtype)
        return found[key]

    found = {}
    for n, name in enumerate(NAMES):
        assert_error_about_eagers(
            actual=lambda seed, n=n: run(seed, "triton", dtype)[n],
            eager=lambda seed, n=n: run(seed, "reference", dtype)[n],
            exact=lambda seed, n=n: run(seed, "reference", torch.float64)[n],
            what=f"{name}, {variant}, p={p}",
        )
    assert all((run(seed, "triton", dtype)[0] <= 0).all() for seed in range(5))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_error_of_the_gradient_under_a_frozen_head(dtype):
    def run(seed, impl, as_dtype):
        return results(*inputs(seed, dtype), impl, as_dtype, (True, False, False))[2]

    assert_error_about_eagers(
        actual=lambda seed: run(seed, "triton", dtype),
        eager=lambda seed: run(seed, "reference", dtype),
        exact=lambda seed: run(seed, "reference", torch.float64),
        what="gradient of hidden under a frozen head",
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("budget_", "product_"),
    [(EVERYTHING, "vendor"), (A_PART, "vendor"), (NOTHING, "vendor"), (A_PART, "fused")],
    ids=["kept", "kept in part", "made again", "fused"],
)
def test_equals_the_definition(variant, budget_, product_, monkeypatch):
    set_memory_budget(budget_)
    take_product(product_, monkeypatch)
    assert_equals_the_definition(*inputs(variant=variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_definition_under_a_frozen_head(variant, product):
    assert_equals_the_definition(*inputs(variant=variant), wanted=(True, False, False))


@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (2, 3, 2, 5), (9, 1, 200, 7), (5, 130, 3, 17)])
def test_any_size(shape, product):
    assert_equals_the_definition(*inputs(0, p=0.5, shape=shape))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_any_size_in_half_precision(dtype, product):
    assert_equals_the_definition(*inputs(0, dtype, 0.5, shape=(5, 130, 7, 17)))


@pytest.mark.parametrize(
    "wanted", [(False, True, False), (False, False, True), (True, False, True), (True, True, False)]
)
def test_only_the_gradients_that_are_wanted(wanted):
    arguments, direction, options = inputs()
    every = results(arguments, direction, options)
    expected = [*every[:2], *(grad for grad, want in zip(every[2:], wanted, strict=True) if want)]
    for a, b in zip(results(arguments, direction, options, wanted=wanted), expected, strict=True):
        assert torch.equal(a, b)


def test_strides_do_not_matter():
    (hidden, weight, bias, rows, targets), direction, options = inputs()
    wide = torch.randn(hidden.shape[0], hidden.shape[1] + 3, device=DEVICE)
    wide[:, 1:-2] = hidden
    turned = weight.t().contiguous().t()
    strided = (wide[:, 1:-2], turned, bias.repeat_interleave(2)[::2], rows.flip(0).flip(0), targets)
    expected = results((hidden, weight, bias, rows, targets), direction, options)
    for a, b in zip(results(strided, direction, options), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("wanted", "budget_"),
    [((True, True, True), EVERYTHING), ((True, True, True), A_PART), ((True, False, False), NOTHING)],
    ids=["trained head", "kept in part", "frozen head"],
)
@pytest.mark.parametrize("height", [50.0, 300.0])
def test_a_guess_that_is_far_off(height, wanted, budget_):
    """Of a quarter of the targets by hundreds of nats; half hold the largest logit themselves."""
    set_memory_budget(budget_)
    (hidden, weight, bias, rows, targets), direction, options = inputs()
    bias[1], bias[100] = height, -height
    targets[::2], targets[1::4] = 1, 100
    arguments = (hidden, weight, bias, rows, targets)
    assert_equals_the_definition(arguments, direction, options, wanted, tolerance=1e-4)


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False)], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_guess_that_is_far_off_in_half_precision(dtype, wanted):
    (hidden, weight, bias, rows, targets), direction, options = inputs(dtype=dtype)
    bias[1], targets[::2] = 300.0, 1
    assert_equals_the_definition((hidden, weight, bias, rows, targets), direction, options, wanted)


@pytest.mark.parametrize("forbidden", [-torch.inf, torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("height", [-200.0, 200.0])
def test_almost_all_forbidden(height, forbidden):
    """As when an answer is one of a few tokens: whole tiles have no possible entry."""
    set_memory_budget(A_PART)
    (hidden, weight, _, rows, targets), direction, options = inputs()
    allowed = torch.tensor([1, 2, 5, 199], device=DEVICE)
    bias = torch.full((weight.shape[0],), forbidden, device=DEVICE).index_fill(0, allowed, height)
    arguments = (hidden, weight, bias, rows, allowed[targets % 4])
    assert_equals_the_definition(arguments, direction, options, tolerance=1e-4)


def test_forbidden_targets():
    (hidden, weight, bias, rows, targets), direction, options = inputs()
    bias[:100] = -torch.inf
    assert (targets < 100).any()
    assert_equals_the_definition((hidden, weight, bias, rows, targets), direction, options)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False)], ids=["trained head", "frozen head"])
def test_a_row_that_is_not_finite_spoils_its_own_tokens_alone(value, wanted, product):
    (hidden, weight, bias, rows, targets), direction, options = inputs()
    hidden[rows[0]] = value
    logps, _, of_hidden, *_ = results((hidden, weight, bias, rows, targets), direction, options, wanted=wanted)
    spoilt = rows == rows[0]
    assert logps[spoilt].isnan().all()
    assert logps[~spoilt].isfinite().all()
    assert of_hidden[rows[0]].isnan().all()
    assert of_hidden[rows[~spoilt]].isfinite().all()


def test_tiny_coefficients_in_float16():
    """float16 ends at 6e-8; a GradScaler's factor comes after the gradients are made, when a loss is fused."""
    (hidden, weight, bias, rows, targets), direction, _ = inputs(dtype=torch.float16)
    head = head_of(hidden, weight, rows, targets, bias, 1.0, None, 1.0)
    logps, _, *kept = triton.forward(*head, EVERYTHING, False)

    def grads_of(coefficients):
        grads = new_grads(head, True, True, True, whole=True)
        triton.add_grads(coefficients, head, [logps, *kept], grads, True)
        return grads

    for tiny, truth in zip(grads_of(direction * 2.0**-30), grads_of(direction), strict=True):
        assert torch.equal(tiny * 2.0**30, truth)


def test_parts_add_up():
    """As the fused loss makes them: some tokens at a time, in float32."""
    for dtype in DTYPES:
        (hidden, weight, bias, rows, targets), direction, _ = inputs(dtype=dtype)
        head = head_of(hidden, weight, rows, targets, bias, 1.0, None, 1.0)

        def grads_of(*parts, head=head, direction=direction):
            grads = new_grads(head, True, True, True, whole=False)
            for begin, end in parts:
                part = head.part(begin, end)
                logps, _, *kept = triton.forward(*part, EVERYTHING, False)
                triton.add_grads(direction[begin:end], part, [logps, *kept], grads, begin == 0)
            return grads

        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        for ours, truth in zip(grads_of((0, 4), (4, 5), (5, 11)), grads_of((0, 11)), strict=True):
            torch.testing.assert_close(ours, truth, rtol=0, atol=tolerance * float(truth.abs().max()))


def test_the_graph_may_be_retained(budget):
    (hidden, weight, bias, rows, targets), *_ = inputs()
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    loss = linear_logprobs(hidden, weight, rows, targets, bias=bias, impl="triton").sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss * 4, leaves), strict=True):
        assert torch.equal(4 * a, b)


def test_autocast_leaves_the_kernels_alone():
    """A backward pass may run under it; products there are of the dtype that the forward pass chose."""
    arguments, direction, options = inputs()
    expected = results(arguments, direction, options)
    hidden, weight, bias, rows, targets = arguments
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    logps = linear_logprobs(hidden, weight, rows, targets, bias=bias, impl="triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        grads = torch.autograd.grad(logps, leaves, direction)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected[2:], strict=True))


class Kept(TorchDispatchMode):
    """How many numbers each call of the operator's forward returns for its backward."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if function.name() == triton.OPERATOR:
            *_, exponentials, unit_grad = results
            self.counts.append(exponentials.numel() + unit_grad.numel())
        return results


def test_what_is_kept_is_within_the_budget():
    arguments, direction, options = inputs()
    for budget in (EVERYTHING, A_PART, NOTHING):
        set_memory_budget(budget)
        with Kept() as kept:
            results(arguments, direction, options)
        assert kept.counts[0] == {EVERYTHING: 11 * 256, A_PART: 11 * 64, NOTHING: 0}[budget]


@pytest.mark.parametrize("unit_grad", [False, True])
@pytest.mark.parametrize("each", [False, True])
def test_operator_passes_opcheck(each, unit_grad):
    (hidden, weight, bias, rows, targets), *_ = inputs(shape=(9, 16, 300, 12))
    leaves = [hidden.requires_grad_(), *(t if unit_grad else t.requires_grad_() for t in (weight, bias))]
    numbers = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    temperatures = torch.linspace(0.5, 2, len(rows), dtype=torch.float64, device=DEVICE) if each else None
    torch.library.opcheck(
        torch.ops.latro_kernels.linear_logprobs_triton.default,
        (*leaves, rows, targets, numbers, temperatures, 12 * 200 * 4, unit_grad),
        # Columns between one row of exponentials and the next are whatever the memory held.
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_the_same_bits_every_time(budget):
    arguments, direction, options = inputs()
    first, second = (results(arguments, direction, options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
