"""The fused loss in C++: gradients made with the loss, some prompts at a time."""

import itertools
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latro_kernels import SelfReward, fused_self_reward_loss, get_memory_budget, set_memory_budget
from latro_kernels.impl import status
from latro_kernels.self_reward import grouped
from latro_kernels.testing import assert_error_about_eagers, random_batch

NATIVE = status("fused_self_reward_loss", "native", "cpu")
pytestmark = pytest.mark.skipif(not NATIVE.ready, reason=f"native: {NATIVE.reason}")

V, D = 210, 24
NAMES = ["loss", "reward", "advantage", "kl", "rationale_logp", "answer_logp", "logps", "entropy"]


@pytest.fixture(params=["all prompts at once", "some prompts at once", "nothing kept"])
def parts(request, monkeypatch):
    """How much of the batch is kept at once."""
    before = get_memory_budget()
    if request.param != "all prompts at once":
        monkeypatch.setattr(grouped, "FEWEST_TOKENS", 1)
        set_memory_budget(0 if request.param == "nothing kept" else 64 * V * 4)
    yield request.param
    set_memory_budget(before)


def inputs(seed=0, dtype=torch.float32, bias=True):
    tree, scored = random_batch(seed, V, group_sizes=(3, 2, 4, 5)).pack(ends=39, baseline=True)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(tree.tokens), D, generator=generator).to(dtype)
    weight = torch.randn(V, D, generator=generator).to(dtype)
    b = torch.randn(V, generator=generator).to(dtype) if bias else None
    return hidden, weight, b, scored, torch.linspace(-4, 0, len(scored.rows))


def results(seed=0, impl="native", dtype=torch.float32, as_dtype=None, wanted=(True, True, True), scale=1.0, **options):
    *tensors, scored, ref_logps = inputs(seed, dtype)
    tensors = [tensor.to(as_dtype or dtype) for tensor in tensors]
    leaves = [tensor.requires_grad_() for tensor, want in zip(tensors, wanted, strict=True) if want]
    hidden, weight, bias = tensors
    options = {"temperature": 0.8, "ref_logps": ref_logps, "entropy": True, **options}
    out = fused_self_reward_loss(hidden, weight, scored, bias=bias, impl=impl, **options)
    return [*(value.detach() for value in out), *torch.autograd.grad(out.loss * scale, leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_about_that_of_eager(dtype, parts, instruction_set):
    def run(seed, impl, as_dtype):
        return torch.cat([grad.double().flatten() for grad in results(seed, impl, dtype, as_dtype)[len(NAMES) :]])

    assert_error_about_eagers(
        actual=lambda seed: run(seed, "native", dtype),
        eager=lambda seed: run(seed, "reference", dtype),
        exact=lambda seed: run(seed, "reference", torch.float64),
        what=f"gradients, {parts}",
    )


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
def test_equals_the_definition_however_the_batch_is_cut(objective, parts):
    options = {"objective": objective}
    if isinstance(objective, Clipped):
        *_, ref_logps = inputs()
        options["extras"] = {"old_logps": ref_logps - 1}
    exact = results(as_dtype=torch.float64, impl="reference", **options)
    for n, (ours, truth) in enumerate(zip(results(**options), exact, strict=True)):
        size = float(truth.nan_to_num().abs().max())
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=1e-5 * size, equal_nan=True, msg=f"result {n}")


def test_a_small_budget_cuts_the_batch_between_prompts(parts, monkeypatch):
    seen = []
    add_grads = grouped.add_grads
    monkeypatch.setattr(
        grouped, "add_grads", lambda grad, *rest, **options: (seen.append(len(grad)), add_grads(grad, *rest, **options))
    )
    results()
    *_, scored, _ = inputs()
    ends = scored.plan.segment_tokens[scored.plan.group_segments].tolist()
    assert {0, *itertools.accumulate(seen)} <= set(ends)
    assert sum(seen) == len(scored.rows)
    assert len(seen) == {"all prompts at once": 1, "some prompts at once": 3, "nothing kept": 4}[parts]


def test_a_part_is_forgotten_before_the_next(monkeypatch):
    """What is kept for one part's gradients is within the budget, and nothing else is kept beside it."""
    kept = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.name() == "latro_kernels::linear_logprobs":
                assert all(storage() is None for storage in kept)
            results = function(*args, **(kwargs or {}))
            if function.name() == "latro_kernels::linear_logprobs":
                kept.append(weakref.ref(results[3].untyped_storage()))
            return results

    monkeypatch.setattr(grouped, "FEWEST_TOKENS", 1)
    before = get_memory_budget()
    set_memory_budget(64 * V * 4)
    try:
        with Watch():
            results()
    finally:
        set_memory_budget(before)
    assert len(kept) > 1


def test_small_prompts_are_joined():
    *_, scored, _ = inputs()
    assert grouped._parts(scored.plan, most_tokens=0) == [(0, len(scored.rows))], "they are fewer than FEWEST_TOKENS"


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_wanted(wanted, parts):
    every = results()[len(NAMES) :]
    (ours,) = results(wanted=wanted)[len(NAMES) :]
    torch.testing.assert_close(ours, every[wanted.index(True)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backward_pass_scales(dtype, parts):
    for once, thrice in zip(
        results(dtype=dtype)[len(NAMES) :], results(dtype=dtype, scale=3.0)[len(NAMES) :], strict=True
    ):
        assert torch.equal(once * 3.0, thrice)


def test_the_graph_may_be_retained():
    hidden, weight, bias, scored, ref_logps = inputs()
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    loss = fused_self_reward_loss(hidden, weight, scored, bias=bias, ref_logps=ref_logps).loss
    loss = loss * 3
    loss.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    loss.backward()
    assert all(torch.equal(leaf.grad, 2 * grad) for leaf, grad in zip(leaves, first, strict=True))


def test_extras_may_carry_gradients():
    class Baseline:
        def __call__(self, logps, scored, extras):
            return (logps * extras["baseline"]).sum()

    hidden, weight, _, scored, _ = inputs()
    baseline = torch.ones(len(scored.rows), requires_grad=True)
    out = fused_self_reward_loss(
        hidden.requires_grad_(), weight, scored, objective=Baseline(), extras={"baseline": baseline}, impl="native"
    )
    out.loss.backward()
    assert torch.equal(baseline.grad, out.logps)


def test_an_objective_without_gradient_moves_nothing():
    class Constant:
        def __call__(self, logps, scored, extras):
            return torch.tensor(5.0)

    hidden, weight, _, scored, _ = inputs()
    hidden.requires_grad_()
    fused_self_reward_loss(hidden, weight, scored, objective=Constant(), impl="native").loss.backward()
    assert not hidden.grad.any()


def test_a_tensor_that_would_silently_get_no_gradient_is_refused():
    class Owns:
        scale = torch.ones((), requires_grad=True)

        def __call__(self, logps, scored, extras):
            return (logps * self.scale).sum()

    hidden, weight, _, scored, _ = inputs()
    with pytest.raises(ValueError, match="objective must reach tensors that require gradients through extras, got one"):
        fused_self_reward_loss(hidden.requires_grad_(), weight, scored, objective=Owns(), impl="native")
