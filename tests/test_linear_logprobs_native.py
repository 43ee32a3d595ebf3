"""The C++ kernels of the linear head against the definition, on every instruction set that this machine has."""

import functools
import itertools

import pytest
import torch

from latro_kernels import get_memory_budget, linear_logprobs, set_memory_budget
from latro_kernels.impl import status
from latro_kernels.testing import assert_error_about_eagers, peaked_head

NATIVE = status("linear_logprobs", "native", "cpu")
pytestmark = pytest.mark.skipif(not NATIVE.ready, reason=f"native: {NATIVE.reason}")

NAMES = ["logps", "gradient of hidden", "gradient of weight", "gradient of bias"]
VARIANTS = {
    "plain": {},
    "temperatures": {"temperature": "each", "logit_scale": 0.5},
    "softcap": {"softcap": 4.0, "logit_scale": 0.7, "temperature": 0.8},
}
# Tokens, hidden, vocabulary, scored tokens: none a multiple of a block; the vocabulary's last strip has one entry.
SHAPE = (63, 37, 385, 90)
EVERYTHING, NOTHING = 1 << 30, 0
A_PART = 128 * 200 * 2  # of the vocabulary's exponentials


@pytest.fixture(params=[EVERYTHING, A_PART, NOTHING], ids=["kept", "kept in part", "made again"])
def budget(request):
    before = get_memory_budget()
    set_memory_budget(request.param)
    yield request.param
    set_memory_budget(before)


@pytest.fixture
def no_budget():
    before = get_memory_budget()
    set_memory_budget(0)
    yield
    set_memory_budget(before)


def inputs(seed=0, dtype=torch.float32, p=0.99, variant="plain", shape=SHAPE, bias=True):
    """Operands that the dtype can hold, and a gradient of each log-prob."""
    T, D, V, M = shape
    hidden, weight, rows, targets = peaked_head(T, D, V, M, p, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    options = dict(VARIANTS[variant])
    if options.get("temperature") == "each":
        options["temperature"] = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)[torch.arange(M) % 3]
    b = torch.randn(V, generator=generator).to(dtype) / 8 if bias else None
    return (hidden, weight, b, rows, targets), torch.randn(M, generator=generator), options


def results(arguments, direction, options, impl, dtype=None, wanted=(True, True, True)):
    hidden, weight, bias, rows, targets = arguments
    tensors = [t if t is None else t.to(dtype or t.dtype, copy=True) for t in (hidden, weight, bias)]
    leaves = [t.requires_grad_() for t, want in zip(tensors, wanted, strict=True) if t is not None and want]
    hidden, weight, bias = tensors
    logps = linear_logprobs(hidden, weight, rows, targets, bias=bias, impl=impl, **options)
    return [logps.detach(), *torch.autograd.grad(logps, leaves, direction.to(logps.dtype))]


CASES = list(itertools.product((torch.float32, torch.bfloat16), VARIANTS, (0.5, 0.99, 0.9999)))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{str(case[0])[6:]}-{case[1]}-{case[2]}")
def case(request):
    return request.param


@pytest.fixture(scope="module")
def reference(case):
    """Its results by seed and dtype, once for all budgets and instruction sets: they take most of the time."""
    dtype, variant, p = case
    return functools.cache(lambda seed, of: results(*inputs(seed, dtype, p, variant), "reference", of))


def test_error_is_about_that_of_eager(case, reference, budget, instruction_set):
    dtype, variant, p = case
    native = functools.cache(lambda seed: results(*inputs(seed, dtype, p, variant), "native"))
    for n, name in enumerate(NAMES):
        assert_error_about_eagers(
            actual=lambda seed, n=n: native(seed)[n],
            eager=lambda seed, n=n: reference(seed, dtype)[n],
            exact=lambda seed, n=n: reference(seed, torch.float64)[n],
            what=f"{name}, {variant}, p={p}",
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (2, 3, 2, 5), (9, 1, 400, 7), (5, 130, 3, 70), (5, 1100, 3, 70)])
def test_any_size(shape, dtype, budget, instruction_set):
    """The last is wider than what one task does of the gradient of hidden."""
    assert_equals_the_definition(*inputs(0, dtype, 0.5, shape=shape))


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False)], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_blocks_of_tokens_and_chunks_of_the_vocabulary(dtype, wanted, no_budget):
    """2100 tokens are two blocks; of the first, 12 MiB of exponentials are less than the vocabulary."""
    T, D, V = 2100, 8, 1700 if dtype == torch.float32 else 3200
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((T, D), (V, D), (V,)))
    targets = torch.randint(V, (T,), generator=generator)
    direction = torch.randn(T, generator=generator)
    assert_equals_the_definition((hidden, weight, bias, torch.arange(T), targets), direction, {}, wanted)


def assert_equals_the_definition(arguments, direction, options, wanted=(True, True, True)):
    dtype = arguments[0].dtype
    exact = results(arguments, direction, options, "reference", torch.float64, wanted)
    found = results(arguments, direction, options, "native", wanted=wanted)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for name, ours, truth in zip(NAMES, found, exact, strict=False):
        size = max(float(truth.abs().max()), 1e-3)
        assert (ours.double() - truth).abs().max() <= tolerance * size, name


@pytest.mark.parametrize("D", [256, 500])
def test_error_of_long_sums_is_about_that_of_eager(D, instruction_set):
    """Products of many columns under large logits, whose roundings are what is seen of the error."""

    def run(seed, impl, dtype):
        arguments, *_ = inputs(seed, p=0.9999, shape=(200, D, 300, 200), bias=False)
        hidden, weight, _, rows, targets = arguments
        return linear_logprobs(hidden.to(dtype), weight.to(dtype), rows, targets, impl=impl)

    assert_error_about_eagers(
        actual=lambda seed: run(seed, "native", torch.float32),
        eager=lambda seed: run(seed, "reference", torch.float32),
        exact=lambda seed: run(seed, "reference", torch.float64),
        what=f"logps, {D} columns",
    )


@pytest.mark.parametrize("p", [0.5, 0.99, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_where_an_entry_that_is_no_target_is_almost_certain(dtype, p, instruction_set):
    """It is in the sums, and of those next to nothing is left in the entropy."""

    @functools.cache
    def run(seed, impl, of):
        (hidden, weight, _, rows, targets), direction, _ = inputs(seed, dtype, p)
        hidden, weight = (tensor.to(of, copy=True).requires_grad_() for tensor in (hidden[rows], weight))
        where = torch.arange(len(rows)), targets.roll(1)
        logps, entropy = linear_logprobs(hidden, weight, *where, entropy=True, impl=impl)
        grads = torch.autograd.grad(logps, (hidden, weight), direction.to(logps.dtype))
        return dict(zip(["entropy", *NAMES], (entropy, logps.detach(), *grads), strict=False))

    for name in run(0, "native", dtype):
        assert_error_about_eagers(
            actual=lambda seed, name=name: run(seed, "native", dtype)[name],
            eager=lambda seed, name=name: run(seed, "reference", dtype)[name],
            exact=lambda seed, name=name: run(seed, "reference", torch.float64)[name],
            what=f"{name}, p={p}",
        )


def test_what_is_made_again_is_what_was_kept(no_budget):
    arguments, direction, options = inputs(variant="softcap")
    again = results(arguments, direction, options, "native")
    set_memory_budget(EVERYTHING)
    for name, a, b in zip(NAMES, again, results(arguments, direction, options, "native"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)
    assert torch.equal(again[0], results(arguments, direction, options, "native")[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_frozen_head_gives_the_same_gradient_of_hidden(variant, dtype, instruction_set):
    wanted = (True, False, False)

    def run(seed, impl, as_dtype):
        return results(*inputs(seed, dtype, variant=variant), impl, as_dtype, wanted)[1]

    assert_error_about_eagers(
        actual=lambda seed: run(seed, "native", dtype),
        eager=lambda seed: run(seed, "reference", dtype),
        exact=lambda seed: run(seed, "reference", torch.float64),
        what=f"gradient of hidden under a frozen head, {variant}",
    )


@pytest.mark.parametrize(
    "wanted", [(False, True, False), (False, False, True), (True, False, True), (True, True, False)]
)
def test_only_the_gradients_that_are_wanted(wanted, budget):
    arguments, direction, options = inputs()
    every = results(arguments, direction, options, "native")
    expected = [every[0], *(grad for grad, want in zip(every[1:], wanted, strict=True) if want)]
    for a, b in zip(results(arguments, direction, options, "native", wanted=wanted), expected, strict=True):
        assert torch.equal(a, b)


def test_strides_do_not_matter():
    (hidden, weight, bias, rows, targets), direction, options = inputs()
    wide = torch.randn(hidden.shape[0], hidden.shape[1] + 3)
    wide[:, 1:-2] = hidden
    turned = weight.t().contiguous().t()
    strided = (wide[:, 1:-2], turned, bias.repeat_interleave(2)[::2], rows.flip(0).flip(0), targets)
    for a, b in zip(
        results(strided, direction, options, "native"),
        results((hidden, weight, bias, rows, targets), direction, options, "native"),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_results_do_not_depend_on_the_number_of_threads(budget):
    arguments, direction, options = inputs(shape=(200, 300, 2000, 150))
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3, 16):
            torch.set_num_threads(n)
            found.append(results(arguments, direction, options, "native"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("height", [1e2, 1e4])
def test_a_logit_far_above_all_that_were_guessed_from(height, budget, instruction_set):
    """The shift is a guess from a sample of the vocabulary; entry 1 of 385 is not in it."""
    (hidden, weight, bias, rows, targets), direction, options = inputs(bias=False)
    bias = torch.zeros(weight.shape[0])
    bias[1] = height
    targets = targets.clone()
    targets[::2] = 1
    arguments = (hidden, weight, bias, rows, targets)
    exact = results(arguments, direction, options, "reference", torch.float64)
    for name, ours, truth in zip(NAMES, results(arguments, direction, options, "native"), exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("forbidden", [-torch.inf, torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("height", [-200.0, 200.0])
def test_all_that_were_guessed_from_forbidden(height, forbidden, budget, instruction_set):
    """As when an answer is one of a few tokens."""
    (hidden, weight, _, rows, targets), direction, options = inputs()
    allowed = torch.tensor([1, 2, 5, 383])
    bias = torch.full((weight.shape[0],), forbidden).index_fill(0, allowed, height)
    arguments = (hidden, weight, bias, rows, allowed[targets % 4])
    exact = results(arguments, direction, options, "reference", torch.float64)
    for name, ours, truth in zip(NAMES, results(arguments, direction, options, "native"), exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("height", [88.5, 88.9])
def test_padding_that_would_overflow_where_it_is_made_again(height, no_budget, instruction_set):
    """e^88.9 is no float32, nor is 0 times it one; tokens are padded to 128."""
    (hidden, weight, bias, rows, targets), direction, options = inputs()
    bias[1] = height
    for grad in results((hidden, weight, bias, rows, targets), direction, options, "native"):
        assert grad.isfinite().all()


def test_entries_that_bias_forbids(budget, instruction_set):
    """A vocabulary padded with rows that must not be predicted."""
    (hidden, weight, bias, rows, targets), direction, options = inputs()
    targets = targets % 300
    bias[300:] = -torch.inf
    arguments = (hidden, weight, bias, rows, targets)
    exact = results(arguments, direction, options, "reference", torch.float64)
    for name, ours, truth in zip(NAMES, results(arguments, direction, options, "native"), exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_spoils_its_own_tokens_alone(value, instruction_set):
    (hidden, weight, bias, rows, targets), _, options = inputs()
    hidden[rows[0]] = value
    logps = linear_logprobs(hidden, weight, rows, targets, bias=bias, impl="native", **options)
    spoilt = rows == rows[0]
    assert logps[spoilt].isnan().all()
    assert logps[~spoilt].isfinite().all()


@pytest.mark.parametrize("forbidden", [0, 100])
def test_entropy(forbidden, instruction_set):
    """Some forbidden entries are targets."""
    (hidden, weight, bias, rows, targets), *_ = inputs()
    bias[:forbidden] = -torch.inf
    assert not forbidden or (targets < forbidden).any()
    options = {"bias": bias, "temperature": 0.7, "impl": "native"}
    logps, entropy = linear_logprobs(hidden, weight, rows, targets, entropy=True, **options)
    assert logps.equal(linear_logprobs(hidden, weight, rows, targets, **options))
    logits = (hidden[rows].double() @ weight.double().T + bias.double()) / 0.7
    expected = torch.special.entr(logits.softmax(-1)).sum(-1)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit_grad", [False, True])
@pytest.mark.parametrize("each", [False, True])
def test_operator_passes_opcheck(each, unit_grad):
    (hidden, weight, bias, rows, targets), *_ = inputs(shape=(9, 16, 300, 12))
    leaves = [hidden.requires_grad_(), *(t if unit_grad else t.requires_grad_() for t in (weight, bias))]
    numbers = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    temperatures = torch.linspace(0.5, 2, len(rows), dtype=torch.float64) if each else None
    torch.library.opcheck(
        torch.ops.latro_kernels.linear_logprobs.default,
        (*leaves, rows, targets, numbers, temperatures, 64 * 200 * 4, unit_grad),
        # The exponentials of padding are whatever the memory held.
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("budget", [2**70, 1e30])
def test_a_budget_may_be_larger_than_any_memory(budget, no_budget):
    arguments, direction, options = inputs()
    set_memory_budget(budget)
    assert all(result.isfinite().all() for result in results(arguments, direction, options, "native"))


@pytest.mark.parametrize("budget", [-1, 1.5, torch.nan, "1", True])
def test_a_bad_budget_is_refused(budget):
    with pytest.raises((ValueError, TypeError), match="set_memory_budget: budget must be"):
        set_memory_budget(budget)
