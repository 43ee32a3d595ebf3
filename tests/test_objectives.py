"""Every objective is the published one: its value, its gradient and its mean."""

import itertools
import math
from dataclasses import fields

import pytest
import torch

from latro.objectives import (
    NEEDS,
    OBJECTIVES,
    AvgLogprob,
    Dpo,
    Gain,
    Jepo,
    JepoMulti,
    Latro,
    MultipleChoice,
    RankedDpo,
    Rft,
    Rloo,
    Rlpr,
    SftAnswers,
    SftGolden,
    Spin,
    Sums,
    Trice,
    VeriFree,
)
from latro_kernels import fused_self_reward_loss, memory, pack_rationales
from latro_kernels.self_reward import grouped
from latro_kernels.testing import random_batch
from tests.published_losses import (
    CHAINS,
    PAIRS,
    Plain,
    avg_logprob,
    dpo,
    gain,
    jepo,
    jepo_multi,
    jepo_multi_advantage,
    latro,
    latro_without_stop,
    mean,
    multiple_choice,
    ranked_dpo,
    rft,
    rloo,
    rlpr,
    trice,
    verifree,
)

V, D = 40, 16
CORRECT = torch.tensor([True, False, True, False, False, True, True, False, True])


def inputs(seed=0):
    """Log-probs of answers with three options, ends and baselines, those of a reference, and all extras."""
    batch = random_batch(seed, V)
    answers = [[answer, [3, 4], [5]] for answer in batch.answers]
    tree, scored = pack_rationales(batch.prompts, batch.rationales, answers, ends=V - 1, baseline=True)
    generator = torch.Generator().manual_seed(seed)
    logps = -torch.rand(len(scored.rows), generator=generator, dtype=torch.float64)
    ref_logps = logps + 0.3 * torch.randn(logps.shape, generator=generator, dtype=torch.float64)
    extras = {
        "ref_logps": ref_logps,
        "correct": CORRECT,
        "bonus": torch.linspace(-1, 1, 9, dtype=torch.float64),
        "truncated": torch.tensor([True, False, False] * 3),
    }
    return logps, scored, extras, tree


# An objective, what else it is given, and the loss whose gradient it must have.
CASES = {
    "latro": (Latro(), {}, latro),
    "jepo": (Jepo(), {}, jepo),
    "jepo_multi": (JepoMulti(), {}, jepo_multi),
    "verifree": (VeriFree(), {}, verifree),
    "avg_logprob": (AvgLogprob(), {}, avg_logprob),
    "rlpr": (Rlpr(), {}, rlpr),
    "gain": (Gain(floor=0.0), {}, gain),
    "rloo": (Rloo(beta=0.2, answer_weight=0.7), {}, rloo),
    "multiple_choice": (MultipleChoice(answer_weight=0.5), {}, multiple_choice),
    "star": (Rft(), {}, rft),
    "rft": (Rft(), {}, rft),
    "trice": (Trice(), {"pairs": CHAINS}, trice),
    "dpo": (Dpo(), {"pairs": PAIRS}, dpo),
    "ranked_dpo": (RankedDpo(), {}, ranked_dpo),
    "spin": (Spin(), {"pairs": PAIRS}, dpo),
    "sft_answers": (SftAnswers(), {}, lambda p: -mean(p.y)),
    "sft_golden": (SftGolden(), {}, lambda p: -mean([z + y for z, y in zip(p.z, p.y, strict=True)])),
}


def case(name, seed=0):
    objective, more, published = CASES[name]
    logps, scored, extras, tree = inputs(seed)
    return objective, logps.requires_grad_(), scored, {**extras, **more}, published, tree


def gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0]


def test_every_objective_is_tested():
    assert CASES.keys() == OBJECTIVES.keys()
    assert all(type(objective) is OBJECTIVES[name] for name, (objective, *_) in CASES.items())


def test_every_need_is_declared():
    for kind in OBJECTIVES.values():
        objective = kind()
        assert objective.needs <= NEEDS.keys()
        assert objective.over in ("rationales", "prompts", "correct", "pairs")
        assert "loss" in kind.__doc__
        assert {field.name for field in fields(kind)}.isdisjoint({"over", "samples", "compares", "NEEDS"})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_published_loss(name, seed):
    objective, logps, scored, extras, published, _ = case(name, seed)
    ours = gradient(objective(logps, scored, extras), logps)
    theirs = gradient(published(Plain(logps, scored, extras)), logps)
    assert (theirs != 0).any()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


# Where the answer's term is a detached number times ℓy, the value is not the published bound's, but the gradient is.
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"jepo_multi", "verifree"}))
def test_the_value_is_that_of_the_published_loss(name):
    objective, logps, scored, extras, published, _ = case(name)
    ours = objective(logps, scored, extras)
    torch.testing.assert_close(ours, published(Plain(logps, scored, extras)), rtol=1e-12, atol=1e-12)


def test_a_masked_stop_is_not_trained_but_rewarded():
    logps, scored, extras, _ = inputs(0)
    logps.requires_grad_()
    plain = Plain(logps, scored, extras)
    ours = Latro(mask_stop=True)(logps, scored, extras)
    assert any(len(tokens) > 1 for tokens in plain.y_tokens) and any(len(tokens) == 1 for tokens in plain.y_tokens)
    torch.testing.assert_close(
        gradient(ours, logps), gradient(latro_without_stop(plain), logps), rtol=1e-10, atol=1e-12
    )
    rewards = [
        objective.reward_and_advantage(Sums(logps, scored, extras["ref_logps"]), extras)[0]
        for objective in (Latro(mask_stop=True), Latro())
    ]
    assert torch.equal(*rewards)


def softmax_in_groups(p):
    weights = [None] * p.R
    for group in p.prompts:
        for r, weight in zip(group, torch.stack([p.y[r] for r in group]).softmax(0), strict=True):
            weights[r] = weight
    return weights


def clipped_jepo(p):
    scaled = [a / (p.deviation(p.y, p.group_of(r)) + 1e-4) for r, a in enumerate(p.loo(p.y))]
    return [max(-1.0, min(1.0, float(a))) for a in scaled]


# c^z and c^y, and the number of terms that they are averaged over: the table of the methods, without a bonus.
TABLE = {
    "latro": (lambda p: p.loo([y - 0.05 * k for y, k in zip(p.y, p.ratio, strict=True)]), lambda p: [1] * p.R, 9),
    "jepo": (clipped_jepo, lambda p: [1] * p.R, 9),
    "jepo_multi": (lambda p: jepo_multi_advantage(p, p.y), softmax_in_groups, 3),
    "verifree": (lambda p: p.loo([y.exp() for y in p.y]), lambda p: [y.exp() for y in p.y], 9),
    "avg_logprob": (
        lambda p: p.loo([t.mean() for t in p.y_tokens]),
        lambda p: [1 / len(t) for t in p.y_tokens],
        9,
    ),
    "rloo": (lambda p: p.loo(list(p.correct)), lambda p: list(p.correct), 9),
    "rft": (lambda p: list(p.correct), lambda p: list(p.correct), 5),
    "sft_golden": (lambda p: [1] * p.R, lambda p: [1] * p.R, 9),
}


@pytest.mark.parametrize("name", TABLE)
def test_coefficients_are_those_of_the_table(name):
    of_rationale, of_answer, terms = TABLE[name]
    logps, scored, extras, _ = inputs()
    extras["bonus"] = torch.zeros(9, dtype=torch.float64)
    logps.requires_grad_()
    found = gradient(OBJECTIVES[name]()(logps, scored, extras), logps)
    plain = Plain(logps.detach(), scored, extras)
    expected = torch.zeros_like(found)
    for kind, weights in enumerate((of_rationale(plain), of_answer(plain))):
        for r, weight in enumerate(weights):
            segment = (scored.kind == kind) & (scored.rationale == r) & (scored.option == 0)
            expected[segment[scored.segment]] = -float(weight) / terms
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["dpo", "spin"])
def test_coefficients_of_pairs(name):
    """±β σ(−m) at the two rationales, and nothing at answers."""
    objective, logps, scored, extras, _, _ = case(name)
    found = gradient(objective(logps, scored, extras), logps)
    plain = Plain(logps.detach(), scored, extras)
    weight = torch.zeros(9, dtype=torch.float64)
    for chosen, rejected in PAIRS.tolist():
        pull = 0.1 / (1 + math.exp(0.1 * float(plain.ratio[chosen] - plain.ratio[rejected])))
        weight[chosen] += pull
        weight[rejected] -= pull
    in_rationale = (scored.kind == 0)[scored.segment]
    expected = torch.where(in_rationale, -weight[scored.rationale[scored.segment]] / 4, 0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    reward, advantage = objective.reward_and_advantage(Sums(logps.detach(), scored, extras["ref_logps"]), extras)
    torch.testing.assert_close(advantage, weight)
    torch.testing.assert_close(reward, 0.1 * torch.stack(plain.ratio))


# Means over everything that can be drawn


class World:
    """Three rationales and three answers, each a token; answer 0 is right."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.z = torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_()
        self.y = torch.randn(3, 3, generator=generator, dtype=torch.float64).requires_grad_()

    def log_probs(self):
        return self.z.log_softmax(0), self.y.log_softmax(1)

    def loss(self, objective, rationales, **extras):
        _, scored = pack_rationales([[0]], [[[z] for z in rationales]], [[0]])
        z, y = self.log_probs()
        logps = torch.stack([logp for k in rationales for logp in (z[k], y[k, 0])])
        return objective(logps, scored, extras)

    def gradient(self, value):
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(value, [self.z, self.y])])


def probability(logp):
    return float(logp.detach().exp())


def expected_gradient(world, draws):
    """draws: (probability, loss)."""
    weights, losses = zip(*draws, strict=True)
    assert sum(weights) == pytest.approx(1)
    return world.gradient(sum(weight * loss for weight, loss in zip(weights, losses, strict=True)))


@pytest.mark.parametrize(
    ("objective", "ascended"),
    [
        (Latro(beta=0.0), lambda z, y: (z.exp() * y[:, 0]).sum()),
        (AvgLogprob(), lambda z, y: (z.exp() * y[:, 0]).sum()),
        (VeriFree(), lambda z, y: (z.exp() * y[:, 0].exp()).sum()),
        (
            JepoMulti(),
            lambda z, y: sum(
                (z[a] + z[b]).exp() * ((y[a, 0].exp() + y[b, 0].exp()) / 2).log()
                for a, b in itertools.product(range(3), repeat=2)
            ),
        ),
    ],
    ids=lambda value: type(value).__name__ if not callable(value) or hasattr(value, "couples") else "",
)
def test_the_mean_gradient_of_two_samples_is_that_of_what_is_ascended(objective, ascended):
    world = World()
    z, y = world.log_probs()
    draws = [
        (probability(z[a] + z[b]), world.loss(objective, [a, b])) for a, b in itertools.product(range(3), repeat=2)
    ]
    torch.testing.assert_close(expected_gradient(world, draws), -world.gradient(ascended(z, y)))


def test_the_mean_gradient_of_rloo_is_that_of_being_right():
    world = World()
    z, y = world.log_probs()
    draws = []
    for a, b, first, second in itertools.product(range(3), repeat=4):
        weight = probability(z[a] + z[b] + y[a, first] + y[b, second])
        correct = torch.tensor([first == 0, second == 0])
        draws.append((weight, world.loss(Rloo(), [a, b], correct=correct)))
    torch.testing.assert_close(expected_gradient(world, draws), -world.gradient((z.exp() * y[:, 0].exp()).sum()))


def test_the_mean_gradient_of_trice_is_that_of_the_marginal_likelihood():
    """Of two chains whose states are samples of the posterior, which is where they stay."""
    world = World()
    z, y = world.log_probs()
    marginal = (z + y[:, 0]).logsumexp(0)
    posterior = (z + y[:, 0] - marginal).exp()
    steps = []  # of a chain: (probability, state before, proposal, whether its own answer is right)
    for before, proposal in itertools.product(range(3), repeat=2):
        right = probability(y[proposal, 0])
        weight = float(posterior[before].detach()) * probability(z[proposal])
        steps += [(weight * right, before, proposal, True), (weight * (1 - right), before, proposal, False)]
    draws = []
    for one, other in itertools.product(steps, repeat=2):
        rationales, pairs = [], []
        for _, before, proposal, right in (one, other):
            row = len(rationales)
            rationales += [proposal] if right else [proposal, before]
            pairs.append((row, row) if right else (row + 1, row))
        loss = world.loss(Trice(), rationales, pairs=torch.tensor(pairs))
        draws.append((one[0] * other[0], loss))
    torch.testing.assert_close(expected_gradient(world, draws), -world.gradient(marginal))


def test_a_gain_without_a_floor_is_latro_without_the_answer():
    logps, scored, extras, _ = inputs()
    logps.requires_grad_()
    ours, theirs = (
        gradient(objective(logps, scored, extras), logps) for objective in (Gain(), Latro(beta=0.0, answer_weight=0.0))
    )
    torch.testing.assert_close(ours, theirs)
    floored = gradient(Gain(floor=0.0)(logps, scored, extras), logps)
    assert not torch.allclose(floored, ours)


# What couples


def cut_gradient(objective, logps, scored, extras):
    """Prompt by prompt, each with the log-probs of later ones still 0: as the fused head does it."""
    ends = scored.plan.segment_tokens[scored.plan.group_segments].tolist()
    found = torch.zeros_like(logps)
    for begin, end in itertools.pairwise(ends):
        known = torch.where(torch.arange(len(logps)) < end, logps.detach(), 0).requires_grad_()
        found[begin:end] = gradient(objective(known, scored, extras), known)[begin:end]
    return found


# Those of CASES, and all that a scale or a truncation reward makes of them.
COUPLED = [
    *((name, *CASES[name][:2]) for name in CASES),
    ("latro by group", Latro(scale="group"), {}),
    ("latro by batch", Latro(scale="batch"), {}),
    ("latro, stop masked", Latro(mask_stop=True), {}),
    ("latro, mean of the truncated", Latro(truncation_penalty=2.0, truncation_reward="mean"), {}),
    ("jepo by batch", Jepo(scale="batch", advantage_clip=1e9), {}),
]


@pytest.mark.parametrize(("name", "objective", "more"), COUPLED, ids=[name for name, *_ in COUPLED])
def test_couples_says_what_a_gradient_depends_on(name, objective, more):
    logps, scored, extras, _ = inputs()
    extras = {**extras, **more}
    logps.requires_grad_()
    whole = gradient(objective(logps, scored, extras), logps)
    found = cut_gradient(objective, logps, scored, extras)
    if objective.couples == "group":
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-14)
    else:
        assert not torch.allclose(found, whole, rtol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_a_denominator_takes_the_place_of_the_number_of_terms(name):
    objective, logps, scored, extras, _, _ = case(name)
    terms = {"rationales": 9, "prompts": 3, "correct": 5, "pairs": len(extras.get("pairs", []))}[objective.over]
    own = objective(logps, scored, extras)
    torch.testing.assert_close(objective(logps, scored, {**extras, "denominator": 2 * terms}), own / 2)


# Through the head


@pytest.mark.parametrize("cut", [False, True], ids=["at once", "cut"])
@pytest.mark.parametrize("name", CASES)
def test_through_the_fused_head(name, cut, monkeypatch):
    """impl="auto" and "reference" against float64 autograd through whole logits."""
    if cut:
        monkeypatch.setattr(grouped, "FEWEST_TOKENS", 1)
        monkeypatch.setattr(memory, "_budget", 20 * V * 4)
    objective, _, scored, extras, _, tree = case(name)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(tree.tokens), D, generator=generator, dtype=torch.float64).div(2).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).div(2).requires_grad_()
    # Near the model, as a reference is.
    logits = (hidden[scored.rows] @ weight.T).log_softmax(1)
    logps = logits.gather(1, scored.targets[:, None]).squeeze(1)
    extras["ref_logps"] = ref_logps = logps.detach() + 0.1 * torch.linspace(-1, 1, len(logps), dtype=torch.float64)
    loss = objective(logps, scored, extras)
    truth = [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]

    more = {name: value for name, value in extras.items() if name != "ref_logps"}
    for impl, dtype in (("reference", torch.float64), ("auto", torch.float32)):
        operands = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight)]
        out = fused_self_reward_loss(
            *operands, scored, objective=objective, ref_logps=ref_logps, extras=more, impl=impl
        )
        tolerance = 1e-12 if dtype == torch.float64 else 2e-5
        for ours, exact in zip([out.loss, *torch.autograd.grad(out.loss, operands)], truth, strict=True):
            size = float(exact.abs().max())
            assert size > 1e-12
            torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("name", CASES)
def test_compiles_as_one_graph(name):
    objective, logps, scored, extras, _, _ = case(name)
    torch.compiler.reset()
    compiled = torch.compile(lambda values: objective(values, scored, extras), fullgraph=True, backend="aot_eager")
    ours, theirs = (gradient(loss(logps), logps) for loss in (compiled, lambda x: objective(x, scored, extras)))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


# Bad input


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        (Latro(), {"ref_logps": None}, r"Latro: extras must hold ref_logps \[M\], .*; pass ref_logps, or beta=0"),
        (Latro(beta=0.0, mask_truncated=True), {"truncated": None}, r"Latro: extras must hold truncated \[R\]"),
        (Dpo(), {"ref_logps": None, "pairs": PAIRS}, r"Dpo: extras must hold ref_logps"),
        (Dpo(), {}, r"Dpo: extras must hold pairs \[P, 2\], rows of a prompt's rationales: a chosen one"),
        (Dpo(), {"pairs": PAIRS[0]}, r"Dpo: pairs must have shape \[P, 2\], got \[2\]"),
        (Dpo(), {"pairs": PAIRS + 1}, r"Dpo: pairs must be in \[0, R\) = \[0, 9\), got 9"),
        (Spin(), {}, r"Spin: extras must hold pairs \[P, 2\], .* the golden one"),
        (Trice(), {}, r"Trice: extras must hold pairs \[P, 2\], .* a chain's state"),
        (Rloo(), {"correct": None}, r"Rloo: extras must hold correct \[R\], whether the model's own answer"),
        (Rft(), {"correct": CORRECT[1:]}, r"Rft: correct must have shape \[9\], got \[8\]"),
    ],
)
def test_what_is_missing_is_said(objective, changes, message):
    logps, scored, extras, _ = inputs()
    with pytest.raises(ValueError, match=message):
        objective(logps, scored, {**extras, **changes})


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Gain(), r"Gain: scored must have the answer scored straight after the prompt: .*; prompt 0 has none"),
        (Rlpr(), r"Rlpr: scored must have the answer scored straight after the prompt"),
        (MultipleChoice(), r"MultipleChoice: scored must have several answers .*; rationale 0 has one answer"),
        (VeriFree(), r"VeriFree: every prompt must have at least 2 rationales, .* got a prompt with 1"),
        (RankedDpo(), r"RankedDpo: every prompt must have at least 2 rationales"),
    ],
)
def test_segments_that_are_missing_are_said(objective, message):
    rationales = [[[1], [2]], [[3]]] if "2 rationales" in message else [[[1], [2]], [[3], [4]]]
    _, scored = pack_rationales([[0], [5]], rationales, [[3], [4]])
    logps = torch.zeros(len(scored.rows))
    with pytest.raises(ValueError, match=message):
        objective(logps, scored, {"ref_logps": logps})


def test_on_a_device_what_is_missing_makes_a_loss_that_is_no_number(monkeypatch):
    monkeypatch.setattr("latro.objectives.base._check_segments", lambda *given: None)
    _, scored = pack_rationales([[0]], [[[1], [2]]], [[3]])
    logps = torch.tensor([-1.0, -2, -3, -4])
    for objective in (Gain(), Rlpr(), MultipleChoice()):
        assert not objective(logps, scored, {}).isfinite()


def test_dpo_needs_a_reference():
    with pytest.raises(ValueError, match="Dpo: beta must be > 0, got 0"):
        Dpo(beta=0)
