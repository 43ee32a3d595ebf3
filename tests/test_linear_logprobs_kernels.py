"""What every backend of the linear head that has kernels promises besides its numbers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from latro_kernels import linear_logprobs
from latro_kernels.impl import status
from latro_kernels.linear_logprobs.api import KERNELS
from latro_kernels.testing import peaked_head
from tests import emulator

# NumPy's in Triton's interpreter, of infinities and NaN in entries that are then masked.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

GPU = "cuda" if torch.cuda.is_available() else "cpu"  # without one in the emulator, and in Triton's interpreter


BACKENDS = {"native": ("native", "cpu"), "cuda": ("native", GPU), "triton": ("triton", GPU)}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Its impl and its device."""
    impl, device = BACKENDS[request.param]
    if request.param == "cuda" and device == "cpu":
        emulator.use_as_native(monkeypatch)
    else:
        found = status("linear_logprobs", impl, device)
        if not found.ready:
            pytest.skip(f"{impl}: {found.reason}")
    return impl, device


def inputs(device):
    """hidden, weight, bias, rows and targets."""
    hidden, weight, rows, targets = peaked_head(7, 37, 201, 11, 0.99, 0, torch.float32)
    bias = torch.linspace(-0.2, 0.2, 201)
    return [tensor.to(device) for tensor in (hidden, weight, bias, rows, targets)]


@pytest.mark.parametrize(("V", "M"), [(5, 0), (0, 0)])
def test_nothing_to_score(V, M, backend):
    impl, device = backend
    hidden = torch.randn(3, 4, requires_grad=True, device=device)
    weight = torch.randn(V, 4, requires_grad=True, device=device)
    none = torch.zeros(M, dtype=torch.int64, device=device)
    linear_logprobs(hidden, weight, none, none, impl=impl).sum().backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_no_columns_are_refused(backend):
    impl, device = backend
    row = torch.zeros(1, dtype=torch.int64, device=device)
    hidden, weight = torch.zeros(3, 0, device=device), torch.zeros(5, 0, device=device)
    with pytest.raises(RuntimeError, match=r"linear_logprobs: hidden must have at least one column, got \[3, 0\]"):
        linear_logprobs(hidden, weight, row, row, impl=impl)


def test_under_checkpointing(backend):
    impl, device = backend
    hidden, weight, bias, rows, targets = inputs(device)
    weight.requires_grad_()

    def score():
        return linear_logprobs(hidden, weight, rows, targets, bias=bias, impl=impl).sum()

    (expected,) = torch.autograd.grad(score(), weight)
    (found,) = torch.autograd.grad(checkpoint(score, use_reentrant=False), weight)
    assert torch.equal(found, expected)


def test_the_default_device_does_not_matter(backend):
    impl, device = backend
    hidden, weight, bias, rows, targets = inputs(device)
    expected = linear_logprobs(hidden, weight, rows, targets, bias=bias, impl=impl)
    with torch.device("meta"):
        found = linear_logprobs(hidden, weight, rows, targets, bias=bias, impl=impl)
    assert torch.equal(found, expected)


OPERATORS = [f"latro_kernels::linear_logprobs{backend}" for backend in ("", "_cuda", "_triton")]


class Kept(TorchDispatchMode):
    """How many numbers each call of an operator's forward returns for its backward."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if function.name() in OPERATORS:
            *_, exponentials, unit_grad = results
            self.counts.append(exponentials.numel() + unit_grad.numel())
        return results


@pytest.mark.parametrize("frozen", [False, True])
def test_evaluation_keeps_nothing(frozen, backend):
    impl, device = backend
    hidden, weight, _, rows, targets = inputs(device)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    with Kept() as kept:
        linear_logprobs(hidden, weight, rows, targets, impl=impl)
        with torch.no_grad():
            linear_logprobs(hidden, weight, rows, targets, impl=impl)
    training, evaluation = kept.counts
    assert training > 0
    assert evaluation == 0


def test_unit_grad_is_for_a_frozen_head_alone(backend):
    impl, device = backend
    hidden, weight, bias, rows, targets = inputs(device)
    numbers = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    weight.requires_grad_()
    logps, *_ = KERNELS[impl].forward(hidden, weight, bias, rows, targets, numbers, None, 0, True)
    with pytest.raises(RuntimeError, match="unit_grad gives the gradient of hidden alone"):
        logps.sum().backward()
