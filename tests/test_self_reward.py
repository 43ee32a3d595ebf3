import contextlib
import itertools

import emulator
import pytest
import torch

from latro_kernels import SelfReward, self_reward
from latro_kernels.impl import status
from latro_kernels.testing import assert_error_about_eagers, random_batch

NATIVE = status("self_reward", "native", "cpu")
OBJECTIVES = [
    SelfReward(beta=beta, answer_weight=answer_weight, kl=kl, floor=floor, scale=scale)
    for (beta, answer_weight), kl, floor, scale in itertools.product(
        [(0.05, 1.0), (0.0, 0.0), (0.5, 0.3)], ["k1", "k2", "k3"], [None, -2.5], [None, "group", "batch"]
    )
]


@pytest.fixture(params=["reference", "native", "native for CUDA, emulated"])
def impl(request):
    if request.param == "reference":
        yield "reference"
        return
    if not NATIVE.ready:
        pytest.skip(f"native: {NATIVE.reason}")
    emulated = emulator.in_place_of("self_reward") if "CUDA" in request.param else contextlib.nullcontext()
    with emulated:
        yield "native"


def inputs(seed=0, dtype=torch.float64, options=1):
    batch = random_batch(seed, vocab=40)
    answers = [[answer, *([[3, 4]] * (options - 1))] for answer in batch.answers]
    _, scored = type(batch)(batch.prompts, batch.rationales, answers).pack(ends=39, baseline=True)
    generator = torch.Generator().manual_seed(seed)
    logps = -torch.rand(len(scored.rows), generator=generator, dtype=torch.float64) * 3
    ref_logps = logps + torch.randn(logps.shape, generator=generator, dtype=torch.float64)
    return logps.to(dtype), scored, ref_logps.to(dtype)


def plain(logps, scored, objective, ref_logps, advantage=None, denominator=None):
    """Rationale by rationale, in the words of the formula: loss, reward, advantage, kl."""
    R = len(scored.prompt)
    of = [[[] for _ in range(R)] for _ in range(2)]
    for m, s in enumerate(scored.segment.tolist()):
        if scored.kind[s] != 2 and scored.option[s] == 0:
            of[scored.kind[s]][scored.rationale[s]].append(m)
    z = torch.stack([logps[m].sum() for m in of[0]])
    y = torch.stack([logps[m].sum() for m in of[1]])
    estimate = {
        "k1": lambda d: d,
        "k2": lambda d: d**2 / 2,
        "k3": lambda d: torch.exp(-d) - 1 + d,
    }[objective.kl]
    kl = torch.stack([estimate(logps[m] - ref_logps[m]).sum() for m in of[0]])
    reward = y.detach() if objective.floor is None else torch.maximum(y.detach(), torch.tensor(objective.floor))
    if objective.kl == "k1":
        reward = reward - objective.beta * kl.detach()
    if advantage is None:
        advantage = torch.empty_like(reward)
        for n in scored.prompt.unique():
            group = (scored.prompt == n).nonzero().flatten().tolist()
            for k in group:
                others = [reward[j] for j in group if j != k]
                advantage[k] = reward[k] - sum(others) / len(others)
            if objective.scale == "group":
                advantage[group] /= reward[group].std() + 1e-4
        if objective.scale == "batch":
            advantage /= reward.std() + 1e-4
    denominator = R if denominator is None else denominator
    loss = -(advantage * z + objective.answer_weight * y).sum() / denominator
    if objective.kl != "k1":
        loss = loss + objective.beta * kl.sum() / denominator
    return loss, reward, advantage, kl.detach()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_equals_the_formula_forward_and_backward(objective, impl):
    logps, scored, ref_logps = inputs(options=2)
    logps.requires_grad_()
    terms = self_reward(logps, scored, objective, ref_logps=ref_logps, impl=impl)
    expected = plain(logps, scored, objective, ref_logps)
    for name, value in zip(("loss", "reward", "advantage", "kl"), expected, strict=True):
        torch.testing.assert_close(
            getattr(terms, name), value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
    (ours,) = torch.autograd.grad(3 * terms.loss, logps)
    (theirs,) = torch.autograd.grad(expected[0], logps)
    torch.testing.assert_close(ours, 3 * theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.coefficients, theirs, rtol=1e-12, atol=1e-12)
    assert [value.requires_grad for value in terms] == [True] + [False] * 6


@pytest.mark.parametrize("objective", [SelfReward(), SelfReward(kl="k3", scale="batch")], ids=str)
def test_given_advantage_and_denominator_are_used_as_they_are(objective, impl):
    logps, scored, ref_logps = inputs()
    advantage = torch.linspace(-1, 3, len(scored.prompt), dtype=torch.float64)
    given = {"advantage": advantage, "denominator": 17}
    terms = self_reward(logps, scored, objective, ref_logps=ref_logps, impl=impl, **given)
    loss, reward, _, _ = plain(logps, scored, objective, ref_logps, **given)
    torch.testing.assert_close(terms.loss, loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(terms.reward, reward, rtol=1e-13, atol=0)
    assert torch.equal(terms.advantage, advantage)


def test_without_a_reference_model_kl_is_not_a_number(impl):
    logps, scored, _ = inputs()
    terms = self_reward(logps, scored, SelfReward(beta=0), impl=impl)
    assert terms.kl.isnan().all()
    assert not any(value.isnan().any() for name, value in terms._asdict().items() if name != "kl")


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_reference_log_probs_of_answers_are_not_read(kl, impl):
    logps, scored, ref_logps = inputs()
    expected = self_reward(logps, scored, SelfReward(kl=kl), ref_logps=ref_logps, impl=impl)
    ref_logps[scored.kind[scored.segment] != 0] = torch.nan
    actual = self_reward(logps, scored, SelfReward(kl=kl), ref_logps=ref_logps, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("floor", [None, -1.0])
def test_nan_goes_through(kind, floor, impl):
    logps, scored, ref_logps = inputs()
    logps[(scored.kind[scored.segment] == kind).nonzero()[0]] = torch.nan
    assert self_reward(logps, scored, SelfReward(floor=floor), ref_logps=ref_logps, impl=impl).loss.isnan()


@pytest.mark.skipif(not NATIVE.ready, reason=f"native: {NATIVE.reason}")
# More tokens and rationales than the block has threads, and few.
@pytest.mark.parametrize("group_sizes", [[2], [3, 1030]], ids=["small", "large"])
def test_the_cuda_kernel_gives_the_same_bits_in_any_order_of_its_threads(group_sizes, monkeypatch):
    batch = random_batch(1, vocab=40, group_sizes=group_sizes)
    _, scored = batch.pack()
    generator = torch.Generator().manual_seed(1)
    logps, ref_logps = -torch.rand(2, len(scored.rows), generator=generator, dtype=torch.float64)
    objective = SelfReward(kl="k3")

    def terms():
        return self_reward(logps, scored, objective, ref_logps=ref_logps)

    with emulator.in_place_of("self_reward"):
        expected = terms()
        for seed in ("1", "2", "3"):
            monkeypatch.setenv("LATRO_EMULATOR_SEED", seed)
            assert all(torch.equal(a, b) for a, b in zip(terms(), expected, strict=True))
    for name, value in zip(expected._fields, terms(), strict=True):
        torch.testing.assert_close(getattr(expected, name), value, rtol=1e-11, atol=1e-12)


@pytest.mark.skipif(not NATIVE.ready, reason=f"native: {NATIVE.reason}")
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_error_is_about_eagers_in_float32(kl):
    objective = SelfReward(kl=kl, scale="group")

    def result(seed, dtype, impl):
        logps, scored, ref_logps = inputs(seed, torch.float32)
        terms = self_reward(logps.to(dtype), scored, objective, ref_logps=ref_logps, impl=impl)
        return torch.cat([terms.loss[None], terms.reward, terms.advantage, terms.coefficients])

    assert_error_about_eagers(
        actual=lambda seed: result(seed, torch.float32, "native"),
        eager=lambda seed: result(seed, torch.float32, "reference"),
        exact=lambda seed: result(seed, torch.float64, "reference"),
        what="self_reward[native]",
    )


@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_a_banned_option_does_not_spoil_the_gradient(kl, impl):
    logps, scored, ref_logps = inputs(options=2)
    banned = (scored.kind[scored.segment] == 1) & (scored.option[scored.segment] == 1)
    logps[banned] = ref_logps[banned] = -torch.inf
    logps.requires_grad_()
    terms = self_reward(logps, scored, SelfReward(kl=kl), ref_logps=ref_logps, impl=impl)
    (grad,) = torch.autograd.grad(terms.loss, logps)
    assert grad.isfinite().all()
    torch.testing.assert_close(grad, terms.coefficients, rtol=1e-13, atol=0)


def test_results_share_no_storage(impl):
    logps, scored, _ = inputs()
    advantage = torch.ones(len(scored.prompt), dtype=torch.float64)
    terms = self_reward(logps, scored, SelfReward(beta=0), advantage=advantage, impl=impl)
    pointers = [value.data_ptr() for value in (*terms, logps, advantage)]
    assert len(set(pointers)) == len(pointers)


def test_an_objective_says_what_it_couples():
    assert SelfReward().couples == SelfReward(scale="group").couples == "group"
    assert SelfReward(scale="batch").couples == "batch"
