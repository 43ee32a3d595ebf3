from dataclasses import dataclass

import pytest
import torch

from latro_kernels import (
    RATIONALE,
    SelfReward,
    fused_self_reward_loss,
    linear_logprobs,
    pack_rationales,
    self_reward,
)
from latro_kernels.testing import Batch, random_batch

V, D = 40, 16
HEAD_OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "everything": {"temperature": 1.7, "softcap": 4.0, "logit_scale": 0.5, "bias": True},
}


def head_inputs(rows, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, D, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_()


def inputs(dtype=torch.float64, seed=0, **pack):
    tree, scored = random_batch(seed, V).pack(**pack)
    hidden, weight = head_inputs(len(tree.tokens), dtype, seed)
    ref_logps = torch.linspace(-4, 0, len(scored.rows), dtype=torch.float64)
    return hidden, weight, scored, ref_logps


@pytest.mark.parametrize("variant", HEAD_OPTIONS)
def test_is_the_objective_of_the_log_probs(variant):
    hidden, weight, scored, ref_logps = inputs(ends=39, baseline=True)
    options = dict(HEAD_OPTIONS[variant])
    temperature = options.pop("temperature", 1.0)
    leaves = [hidden, weight]
    if options.pop("bias", False):
        options["bias"] = torch.linspace(-1, 1, V, dtype=torch.float64, requires_grad=True)
        leaves.append(options["bias"])
    out = fused_self_reward_loss(hidden, weight, scored, ref_logps=ref_logps, temperature=temperature, **options)

    sampled = scored.kind[scored.segment] == RATIONALE
    arguments = (hidden, weight, scored.rows, scored.targets)
    logps = torch.where(
        sampled,
        linear_logprobs(*arguments, temperature=temperature, **options),
        linear_logprobs(*arguments, **options),
    )
    terms = self_reward(logps, scored, ref_logps=ref_logps)
    torch.testing.assert_close(out.logps, logps.detach(), rtol=1e-13, atol=1e-13)
    for name in ("loss", "reward", "advantage", "kl", "rationale_logp", "answer_logp"):
        torch.testing.assert_close(getattr(out, name), getattr(terms, name), rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(out.loss, leaves)
    theirs = torch.autograd.grad(terms.loss, leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_estimator_of_the_paper():
    """Equation 4 of arXiv 2411.04282 with its log-probs as leaves: one number per rationale, worked out by hand."""
    _, scored = pack_rationales([[0]], [[[1], [2]]], [[3]])
    hidden = torch.eye(4, dtype=torch.float64)[[0, 1, 3, 2, 3]].requires_grad_()
    weight = torch.tensor([[0.0, 1, 2, 3], [1, 0, 1, 0], [2, 2, 0, 1], [0, 1, 1, 1]], dtype=torch.float64)
    log_softmax = (hidden @ weight.T).log_softmax(-1)
    z, y = torch.stack([log_softmax[0, 1], log_softmax[0, 2]]), torch.stack([log_softmax[1, 3], log_softmax[3, 3]])
    ref = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    reward = (y - 0.05 * (z - ref)).detach()
    advantage = reward - reward.flip(0)
    expected = -(advantage * z + y).sum() / 2
    ref_logps = torch.tensor([-1.0, 0, -2.0, 0], dtype=torch.float64)
    out = fused_self_reward_loss(hidden, weight, scored, ref_logps=ref_logps)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in (out.loss, expected)))


@pytest.mark.parametrize("objective", [SelfReward(beta=0), SelfReward(beta=0, scale="group")], ids=str)
def test_micro_batches_with_a_denominator_equal_one_batch(objective):
    batch = random_batch(2, V, group_sizes=(2, 5, 3))
    tree, scored = batch.pack()
    hidden, weight = head_inputs(len(tree.tokens))
    whole = fused_self_reward_loss(hidden, weight, scored, objective=objective)
    whole.loss.backward()
    expected, weight.grad = weight.grad, None

    R, losses = len(scored.prompt), []
    for n in range(3):
        part_tree, part = Batch([batch.prompts[n]], [batch.rationales[n]], [batch.answers[n]]).pack()
        start = int((tree.previous == -1).nonzero()[n])
        part_hidden = hidden.detach()[start : start + len(part_tree.tokens)]
        out = fused_self_reward_loss(part_hidden, weight, part, objective=objective, denominator=R)
        out.loss.backward()
        losses.append(out.loss)
    torch.testing.assert_close(sum(losses), whole.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-12)


def test_a_group_may_be_split_when_the_advantage_is_given():
    batch = random_batch(2, V, group_sizes=(4,))
    tree, scored = batch.pack()
    hidden, weight = head_inputs(len(tree.tokens))
    whole = fused_self_reward_loss(hidden, weight, scored, beta=0)
    losses = []
    for k in range(4):
        part_tree, part = Batch(batch.prompts, [batch.rationales[0][k : k + 1]], batch.answers).pack()
        own = torch.isin(tree.node, torch.tensor([0, 1 + 2 * k, 2 + 2 * k])).nonzero().flatten()
        assert tree.tokens[own].tolist() == part_tree.tokens.tolist()
        advantage = whole.advantage[k : k + 1]
        losses.append(
            fused_self_reward_loss(hidden[own], weight, part, beta=0, advantage=advantage, denominator=4).loss
        )
    torch.testing.assert_close(sum(losses), whole.loss, rtol=1e-12, atol=1e-12)


@dataclass(frozen=True)
class ClippedRatio:
    """An objective of someone else's: per token, off policy, with a tensor of its own."""

    clip: float = 0.2
    couples = "group"

    def __call__(self, logps, scored, extras):
        ratio = (logps - extras["old_logps"]).exp()
        advantage = extras["advantage"][scored.rationale[scored.segment]]
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        return -torch.minimum(ratio * advantage, clipped * advantage).sum() / extras["denominator"]


def test_any_objective_goes_through():
    hidden, weight, scored, ref_logps = inputs()
    logps = linear_logprobs(hidden, weight, scored.rows, scored.targets)
    given = {"advantage": torch.linspace(-1, 1, len(scored.prompt), dtype=torch.float64), "denominator": 3}
    extras = {"old_logps": logps.detach() + 0.1}
    out = fused_self_reward_loss(
        hidden, weight, scored, objective=ClippedRatio(), extras=extras, ref_logps=ref_logps, **given
    )
    expected = ClippedRatio()(logps, scored, {**given, **extras})
    torch.testing.assert_close(out.loss, expected, rtol=1e-13, atol=0)
    for a, b in zip(*(torch.autograd.grad(loss, [hidden, weight]) for loss in (out.loss, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    terms = self_reward(logps, scored, ref_logps=ref_logps)
    for name in ("kl", "rationale_logp", "answer_logp"):
        torch.testing.assert_close(getattr(out, name), getattr(terms, name), rtol=1e-13, atol=1e-13)
    assert out.reward.isnan().all()
    assert out.advantage.isnan().all()


def test_a_subclass_of_self_reward_computes_what_it_says():
    class Constant(SelfReward):
        def __call__(self, logps, scored, extras):
            return logps.sum() * 0 + 123

    hidden, weight, scored, _ = inputs()
    assert fused_self_reward_loss(hidden, weight, scored, objective=Constant()).loss == 123


def test_self_reward_itself_is_an_objective():
    hidden, weight, scored, ref_logps = inputs()
    objective = SelfReward(beta=0.2, kl="k3", scale="group")
    out = fused_self_reward_loss(hidden, weight, scored, ref_logps=ref_logps, objective=objective)
    logps = linear_logprobs(hidden, weight, scored.rows, scored.targets)
    torch.testing.assert_close(objective(logps, scored, {"ref_logps": ref_logps}), out.loss, rtol=1e-13, atol=0)


def test_beta_and_answer_weight_are_short_for_the_objective():
    hidden, weight, scored, ref_logps = inputs()
    given = {"ref_logps": ref_logps, "entropy": True}
    short = fused_self_reward_loss(hidden, weight, scored, beta=0.3, answer_weight=0.1, **given)
    objective = SelfReward(beta=0.3, answer_weight=0.1)
    long = fused_self_reward_loss(hidden, weight, scored, objective=objective, **given)
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))
    default = fused_self_reward_loss(hidden, weight, scored, ref_logps=ref_logps)
    same = fused_self_reward_loss(hidden, weight, scored, ref_logps=ref_logps, objective=SelfReward())
    assert torch.equal(default.loss, same.loss)


def test_hidden_may_have_a_batch_dimension():
    hidden, weight, scored, ref_logps = inputs()
    flat = fused_self_reward_loss(hidden, weight, scored, ref_logps=ref_logps, entropy=True)
    batched = fused_self_reward_loss(hidden[None], weight, scored, ref_logps=ref_logps, entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(flat, batched, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_floating_dtype(dtype):
    hidden, weight, scored, ref_logps = inputs(dtype)
    out = fused_self_reward_loss(hidden, weight, scored, ref_logps=ref_logps, entropy=True)
    exact = fused_self_reward_loss(hidden.detach().double(), weight.detach().double(), scored, ref_logps=ref_logps)
    assert all(value.dtype == torch.float32 for value in out)
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 2e-1, torch.float32: 1e-5}[dtype]
    assert (out.logps - exact.logps).abs().max() < tolerance
    out.loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype
