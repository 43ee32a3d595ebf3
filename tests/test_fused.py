"""The fused loss in C++, CUDA and Triton: gradients made with the loss, some prompts at a time."""

import itertools
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latro_kernels import SelfReward, fused_self_reward_loss, memory
from latro_kernels.impl import status
from latro_kernels.linear_logprobs.api import KERNELS
from latro_kernels.self_reward import grouped
from latro_kernels.testing import assert_error_about_eagers, random_batch
from tests import emulator

CUDA = torch.cuda.is_available()
GPU = "cuda" if CUDA else "cpu"  # where kernels for a GPU run: without one in the emulator, and in the interpreter
DEVICES = {"native": "cpu", "cuda": GPU, "triton": GPU}
IMPL = {"native": "native", "cuda": "native", "triton": "triton", "reference": "reference"}
# The interpreter's products of bfloat16 are wrong.
HALF = {"native": torch.bfloat16, "cuda": torch.bfloat16, "triton": torch.bfloat16 if CUDA else torch.float16}

# NumPy's, in Triton's interpreter, of infinities and NaN in entries that are then masked.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

V, D = 210, 24
NAMES = ["loss", "reward", "advantage", "kl", "rationale_logp", "answer_logp", "logps", "entropy"]


def require(backend, monkeypatch):
    if backend == "cuda" and not CUDA:
        emulator.use_as_native(monkeypatch)
    else:
        found = status("fused_self_reward_loss", IMPL[backend], DEVICES[backend])
        if not found.ready:
            pytest.skip(f"{backend} on {DEVICES[backend]}: {found.reason}")


@pytest.fixture(params=DEVICES)
def backend(request, monkeypatch):
    require(request.param, monkeypatch)
    return request.param


def cut_batch(parts, monkeypatch):
    """How much of the batch is kept at once."""
    if parts != "all prompts at once":
        monkeypatch.setattr(grouped, "FEWEST_TOKENS", 1)
        monkeypatch.setattr(memory, "_budget", 0 if parts == "nothing kept" else 40 * V * 4)


PARTS = ["all prompts at once", "some prompts at once", "nothing kept"]


# Triton's interpreter is slow, and what differs between parts is not the backend's.
@pytest.fixture(params=[*itertools.product(["native", "cuda"], PARTS), ("triton", PARTS[1])], ids=" ".join)
def cut_backend(request, monkeypatch):
    """A backend, and a batch that is cut for it."""
    backend, parts = request.param
    require(backend, monkeypatch)
    cut_batch(parts, monkeypatch)
    return backend


def inputs(seed=0, dtype=torch.float32, device="cpu"):
    batch = random_batch(seed, V, group_sizes=(3, 2, 4, 5), prompt_length=3, rationale_length=4, answer_length=2)
    tree, scored = batch.pack(ends=39, baseline=True)
    generator = torch.Generator().manual_seed(seed)
    sizes = (len(tree.tokens), D), (V, D), (V,)
    # Logits of a few units, as a model's are: no token is much less likely than e^-15.
    tensors = [torch.randn(*size, generator=generator).div(2).to(device, dtype) for size in sizes]
    return *tensors, scored.to(device), torch.linspace(-4, 0, len(scored.rows), device=device)


def results(backend, seed=0, dtype=torch.float32, as_dtype=None, wanted=(True, True, True), scale=1.0, **options):
    *tensors, scored, ref_logps = inputs(seed, dtype, DEVICES.get(backend, "cpu"))
    tensors = [tensor.to(as_dtype or dtype) for tensor in tensors]
    leaves = [tensor.requires_grad_() for tensor, want in zip(tensors, wanted, strict=True) if want]
    hidden, weight, bias = tensors
    options = {"temperature": 0.8, "ref_logps": ref_logps, "entropy": True, **options}
    out = fused_self_reward_loss(hidden, weight, scored, bias=bias, impl=IMPL[backend], **options)
    found = [*(value.detach() for value in out), *torch.autograd.grad(out.loss * scale, leaves)]
    return [value.cpu() for value in found]


def assert_gradients_err_as_eagers(backend, dtype, what):
    def run(seed, backend, as_dtype=None):
        return torch.cat([grad.double().flatten() for grad in results(backend, seed, dtype, as_dtype)[len(NAMES) :]])

    assert_error_about_eagers(
        actual=lambda seed: run(seed, backend),
        eager=lambda seed: run(seed, "reference"),
        exact=lambda seed: run(seed, "reference", torch.float64),
        what=f"gradients, {what}",
    )


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_of_native_is_about_that_of_eager(dtype, parts, instruction_set, monkeypatch):
    cut_batch(parts, monkeypatch)
    assert_gradients_err_as_eagers("native", dtype, parts)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("backend", ["cuda", "triton"], indirect=True)
def test_error_on_a_gpu_is_about_that_of_eager(backend, half):
    assert_gradients_err_as_eagers(backend, HALF[backend] if half else torch.float32, backend)


@dataclass(frozen=True)
class Clipped:
    """Someone else's objective, which weighs tokens by the others of their prompt."""

    couples = "group"

    def __call__(self, logps, scored, extras):
        ratio = (logps - extras["old_logps"]).exp()
        of_prompt = logps.new_zeros(int(scored.prompt.max()) + 1)
        prompt = scored.prompt[scored.rationale[scored.segment]]
        of_prompt = of_prompt.index_add(0, prompt, logps)
        return -(ratio.clamp(0.8, 1.2) * of_prompt[prompt]).sum() / 100


@pytest.mark.parametrize(
    "objective",
    [SelfReward(), SelfReward(kl="k3", scale="group", floor=-9.0), SelfReward(scale="batch"), Clipped()],
    ids=str,
)
def test_equals_the_definition_however_the_batch_is_cut(objective, cut_backend):
    def run(backend, **options):
        if isinstance(objective, Clipped):
            options["extras"] = {"old_logps": inputs(device=DEVICES.get(backend, "cpu"))[-1] - 1}
        return results(backend, objective=objective, **options)

    for n, (ours, truth) in enumerate(zip(run(cut_backend), run("reference", as_dtype=torch.float64), strict=True)):
        size = float(truth.nan_to_num().abs().max())
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=1e-5 * size, equal_nan=True, msg=f"result {n}")


@pytest.mark.parametrize("parts", PARTS)
def test_a_small_budget_cuts_the_batch_between_prompts(parts, monkeypatch):
    require("native", monkeypatch)
    cut_batch(parts, monkeypatch)
    seen = []
    kernels = KERNELS["native"]

    def add_grads(grad, *rest):
        seen.append(len(grad))
        kernels.add_grads(grad, *rest)

    monkeypatch.setitem(KERNELS, "native", kernels._replace(add_grads=add_grads))
    results("native")
    *_, scored, _ = inputs()
    ends = scored.plan.segment_tokens[scored.plan.group_segments].tolist()
    assert {0, *itertools.accumulate(seen)} <= set(ends)
    assert sum(seen) == len(scored.rows)
    assert len(seen) == {"all prompts at once": 1, "some prompts at once": 3, "nothing kept": 4}[parts]


def test_a_part_is_forgotten_before_the_next(backend, monkeypatch):
    """What is kept for one part's gradients is within the budget, and nothing else is kept beside it."""
    if backend == "triton" and not CUDA:
        pytest.skip("Triton's interpreter leaves arguments in cycles of references; its plan is that of cuda")
    forward = "latro_kernels::linear_logprobs" + ("" if backend == "native" else f"_{backend}")
    kept = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.name() == forward:
                assert all(storage() is None for storage in kept)
            results = function(*args, **(kwargs or {}))
            if function.name() == forward:
                kept.append(weakref.ref(results[3].untyped_storage()))
            return results

    cut_batch("some prompts at once", monkeypatch)
    with Watch():
        results(backend)
    assert len(kept) > 1


def test_small_prompts_are_joined():
    *_, scored, _ = inputs()
    assert grouped._parts(scored.plan, most_tokens=0) == [(0, len(scored.rows))], "they are fewer than FEWEST_TOKENS"


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_wanted(wanted, cut_backend):
    every = results(cut_backend)[len(NAMES) :]
    (ours,) = results(cut_backend, wanted=wanted)[len(NAMES) :]
    torch.testing.assert_close(ours, every[wanted.index(True)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("half", [False, True])
def test_the_backward_pass_scales(half, cut_backend):
    """By a power of two, so that gradients which are rounded after they are scaled come out the same."""
    dtype = HALF[cut_backend] if half else torch.float32
    once, scaled = (results(cut_backend, dtype=dtype, scale=scale)[len(NAMES) :] for scale in (1.0, 4.0))
    for a, b in zip(once, scaled, strict=True):
        if dtype == torch.float16:  # whose smallest numbers are 2^-24 apart whatever the scale
            torch.testing.assert_close(a * 4.0, b, rtol=0, atol=2.0**-22)
        else:
            assert torch.equal(a * 4.0, b)


@pytest.mark.parametrize("backend", ["cuda", "triton"], indirect=True)
def test_float16_gradients_wait_for_the_scaler(backend):
    """Of a loss over ten million rationales, whose gradients are below all that float16 can hold."""
    tiny = {"dtype": torch.float16, "denominator": 14e6, "scale": 2.0**24}
    exact = results("reference", **tiny | {"dtype": torch.float16, "as_dtype": torch.float64})[len(NAMES) :]
    for ours, truth in zip(results(backend, **tiny)[len(NAMES) :], exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=5e-3 * float(truth.abs().max()))


def test_the_graph_may_be_retained(backend):
    hidden, weight, bias, scored, ref_logps = inputs(device=DEVICES[backend])
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    loss = fused_self_reward_loss(hidden, weight, scored, bias=bias, ref_logps=ref_logps, impl=IMPL[backend]).loss
    loss = loss * 3
    loss.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    loss.backward()
    assert all(torch.equal(leaf.grad, 2 * grad) for leaf, grad in zip(leaves, first, strict=True))


def test_extras_may_carry_gradients(backend):
    class Baseline:
        def __call__(self, logps, scored, extras):
            return (logps * extras["baseline"]).sum()

    hidden, weight, _, scored, _ = inputs(device=DEVICES[backend])
    baseline = torch.ones(len(scored.rows), requires_grad=True, device=DEVICES[backend])
    out = fused_self_reward_loss(
        hidden.requires_grad_(), weight, scored, objective=Baseline(), extras={"baseline": baseline}, impl=IMPL[backend]
    )
    out.loss.backward()
    assert torch.equal(baseline.grad, out.logps)


def test_an_objective_without_gradient_moves_nothing(backend):
    class Constant:
        def __call__(self, logps, scored, extras):
            return torch.tensor(5.0, device=DEVICES[backend])

    hidden, weight, _, scored, _ = inputs(device=DEVICES[backend])
    hidden.requires_grad_()
    fused_self_reward_loss(hidden, weight, scored, objective=Constant(), impl=IMPL[backend]).loss.backward()
    assert not hidden.grad.any()


def test_a_tensor_that_would_silently_get_no_gradient_is_refused(backend):
    class Owns:
        scale = torch.ones((), requires_grad=True, device=DEVICES[backend])

        def __call__(self, logps, scored, extras):
            return (logps * self.scale).sum()

    hidden, weight, _, scored, _ = inputs(device=DEVICES[backend])
    with pytest.raises(ValueError, match="objective must reach tensors that require gradients through extras, got one"):
        fused_self_reward_loss(hidden.requires_grad_(), weight, scored, objective=Owns(), impl=IMPL[backend])
