import pytest
import torch

from latro_kernels import linear_logprobs
from latro_kernels.testing import assert_error_about_eagers, peaked_head

VARIANTS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "temperatures": {"temperature": "each"},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "logit scale": {"logit_scale": 0.25},
    "everything": {"temperature": "each", "bias": True, "softcap": 5.0, "logit_scale": 2.0},
}


def inputs_of(variant, p=0.99, shape=(63, 37, 123, 90), seed=0, dtype=torch.float64):
    T, D, V, M = shape
    hidden, weight, rows, targets = peaked_head(T, D, V, M, p, seed, dtype)
    options = dict(VARIANTS[variant])
    if options.get("temperature") == "each":
        options["temperature"] = torch.linspace(0.5, 2, M, dtype=torch.float64)
    if options.pop("bias", False):
        options["bias"] = torch.linspace(-1, 1, V, dtype=torch.float64).to(dtype)
    return hidden, weight, rows, targets, options


def formula(hidden, weight, rows, targets, bias=None, temperature=1.0, softcap=None, logit_scale=1.0):
    """Token by token, in the words of the formula."""
    out = []
    for m in range(len(rows)):
        logits = logit_scale * (weight @ hidden[rows[m]] + (0 if bias is None else bias))
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        logits = logits / (temperature[m] if isinstance(temperature, torch.Tensor) else temperature)
        out.append(logits[targets[m]] - logits.exp().sum().log())
    return torch.stack(out)


@pytest.mark.parametrize("p", [0.5, 0.99, 0.9999])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_formula_forward_and_backward(variant, p):
    hidden, weight, rows, targets, options = inputs_of(variant, p)
    leaves = [hidden, weight] + ([options["bias"]] if "bias" in options else [])
    for leaf in leaves:
        leaf.requires_grad_()
    out = linear_logprobs(hidden, weight, rows, targets, **options)
    expected = formula(hidden, weight, rows, targets, **options)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    per_token = torch.linspace(-2, 1, len(rows), dtype=torch.float64)
    ours = torch.autograd.grad((out * per_token).sum(), leaves)
    theirs = torch.autograd.grad((expected * per_token).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_entropy_is_of_the_scored_distribution(variant):
    hidden, weight, rows, targets, options = inputs_of(variant, p=0.5)
    hidden.requires_grad_()
    logps, entropy = linear_logprobs(hidden, weight, rows, targets, entropy=True, **options)
    every = torch.arange(len(weight)).repeat(len(rows))
    if isinstance(options.get("temperature"), torch.Tensor):
        options["temperature"] = options["temperature"].repeat_interleave(len(weight))
    of_all = linear_logprobs(hidden, weight, rows.repeat_interleave(len(weight)), every, **options)
    of_all = of_all.view(len(rows), -1)
    torch.testing.assert_close(entropy, -(of_all.exp() * of_all).sum(-1).detach(), rtol=1e-11, atol=1e-11)
    assert logps.requires_grad
    assert not entropy.requires_grad


def test_entropy_of_an_impossible_entry_is_none():
    weight = torch.zeros(3, 2, dtype=torch.float64)
    bias = torch.tensor([0.0, 0.0, -torch.inf], dtype=torch.float64)
    index = torch.zeros(1, dtype=torch.int64)
    _, entropy = linear_logprobs(weight, weight, index, index, bias=bias, entropy=True)
    torch.testing.assert_close(entropy, torch.full((1,), 2, dtype=torch.float64).log())


@pytest.mark.parametrize("p", [0.5, 0.9999])
def test_peaked_inputs_are_peaked(p):
    hidden, weight, rows, targets, _ = inputs_of("plain", p)
    last = {int(row): m for m, row in enumerate(rows)}
    chosen = linear_logprobs(hidden, weight, rows, targets).exp()[list(last.values())]
    torch.testing.assert_close(1 - chosen, torch.full_like(chosen, 1 - p), rtol=0.2, atol=0)
    assert len(last) < len(rows), "rows must repeat"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_is_float32_or_float64(dtype):
    hidden, weight, rows, targets, _ = inputs_of("plain", dtype=dtype)
    out = linear_logprobs(hidden, weight, rows, targets)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_error_is_about_that_of_log_softmax_in_float32():
    def inputs(seed, dtype):
        hidden, weight, rows, targets, _ = inputs_of("plain", seed=seed)
        return hidden.to(dtype), weight.to(dtype), rows, targets

    def eager(seed):
        hidden, weight, rows, targets = inputs(seed, torch.float32)
        return (hidden[rows] @ weight.T).log_softmax(-1)[torch.arange(len(rows)), targets]

    assert_error_about_eagers(
        actual=lambda seed: linear_logprobs(*inputs(seed, torch.float32)),
        eager=eager,
        exact=lambda seed: formula(*(x.double() if x.is_floating_point() else x for x in inputs(seed, torch.float32))),
        what="linear_logprobs",
    )


def test_scoring_nothing_gives_nothing():
    hidden, weight, rows, targets, _ = inputs_of("plain")
    hidden.requires_grad_()
    out = linear_logprobs(hidden, weight, rows[:0], targets[:0])
    assert out.shape == (0,)
    out.sum().backward()
    assert not hidden.grad.any()


def test_autocast_casts_both_operands():
    hidden, weight, rows, targets, _ = inputs_of("plain", dtype=torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprobs(hidden, weight, rows, targets)
    assert torch.equal(out, linear_logprobs(hidden.bfloat16(), weight.bfloat16(), rows, targets))
    out.sum().backward()
    assert weight.grad.dtype == torch.float32
