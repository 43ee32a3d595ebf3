"""Every objective is the published one: its value, its gradient, its mean, and what it is given by the trainer."""

import itertools
import json
import math
from dataclasses import fields, replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from latro.batch import Batch
from latro.config import LatroConfig
from latro.data import Example
from latro.grading import graders_for
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
from latro.rollout import Sample
from latro.supply import Supply
from latro.text import Text
from latro_kernels import fused_self_reward_loss, memory, pack_rationales
from latro_kernels.self_reward import grouped
from latro_kernels.testing import random_batch
from tests.float64 import Float64
from tests.test_trainer import gradients_of_an_update
from tests.tiny import character_tokenizer, tiny_llama

V, D = 40, 16
TOKENIZER = character_tokenizer()

# Rows (chosen, rejected) of three prompts with 3, 2 and 4 rationales; some in no pair, some in several.
PAIRS = torch.tensor([[0, 1], [2, 1], [3, 4], [8, 5]])
# Chains: three whose proposal was accepted, and two whose state stayed.
CHAINS = torch.tensor([[0, 0], [1, 2], [4, 4], [5, 5], [6, 7]])
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


class Plain:
    """A batch in the papers' words: sums over tokens, found one token at a time."""

    def __init__(self, logps, scored, extras):
        self.K = torch.bincount(scored.prompt).tolist()
        R = len(scored.prompt)
        self.prompts = [[r for r in range(R) if scored.prompt[r] == n] for n in range(len(self.K))]
        tokens = {}
        for m, s in enumerate(scored.segment.tolist()):
            of = int(scored.kind[s]), int(scored.rationale[s]), int(scored.option[s])
            tokens.setdefault(of, []).append(m)
        self.z = [logps[tokens[0, r, 0]].sum() for r in range(R)]
        self.y_tokens = [logps[tokens[1, r, 0]] for r in range(R)]
        self.y = [t.sum() for t in self.y_tokens]
        self.options = [[logps[tokens[1, r, o]].sum() for o in range(3)] for r in range(R)]
        self.base_tokens = [logps[tokens[2, self.prompts[n][0], 0]] for n in scored.prompt.tolist()]
        self.ratio = [self.z[r] - extras["ref_logps"][tokens[0, r, 0]].sum() for r in range(R)]
        self.bonus, self.correct = extras["bonus"], extras["correct"].double()
        self.R = R

    def loo(self, values):
        found = [None] * self.R
        for group in self.prompts:
            for k in group:
                others = [values[j] for j in group if j != k]
                found[k] = (values[k] - sum(others) / len(others)).detach()
        return found

    def deviation(self, values, rows):
        return torch.stack([values[r] for r in rows]).detach().std()

    def group_of(self, r):
        return next(group for group in self.prompts if r in group)


def mean(values):
    return sum(values) / len(values)


def log_mean_exp(values):
    return torch.stack(values).exp().mean().log()


def latro(p):
    advantage = p.loo([p.y[r] + p.bonus[r] - 0.05 * p.ratio[r] for r in range(p.R)])
    return -mean([advantage[r] * p.z[r] + p.y[r] for r in range(p.R)])


def latro_without_stop(p):
    advantage = p.loo([p.y[r] + p.bonus[r] - 0.05 * p.ratio[r] for r in range(p.R)])
    return -mean([advantage[r] * p.z[r] + p.y_tokens[r][1:].sum() for r in range(p.R)])


def jepo(p):
    advantage = p.loo([p.y[r] + p.bonus[r] for r in range(p.R)])
    reward = [p.y[r] + p.bonus[r] for r in range(p.R)]
    scaled = [a / (p.deviation(reward, p.group_of(r)) + 1e-4) for r, a in enumerate(advantage)]
    assert any(abs(a) > 1 for a in scaled) and any(abs(a) < 1 for a in scaled)
    return -mean([max(-1, min(1, float(a))) * p.z[r] + p.y[r] for r, a in enumerate(scaled)])


def jepo_multi_advantage(p, values):
    found = []
    for r in range(p.R):
        group = p.group_of(r)
        others = log_mean_exp([values[j] for j in group if j != r])
        found.append((log_mean_exp([values[j] for j in group]) - others).detach())
    return found


def jepo_multi(p):
    """The bound itself, and the score function's term; the bonus is a log-likelihood of something else."""
    advantage = jepo_multi_advantage(p, [p.y[r] + p.bonus[r] for r in range(p.R)])
    bound = [log_mean_exp([p.y[r] for r in group]) for group in p.prompts]
    score = [sum(advantage[r] * p.z[r] for r in group) for group in p.prompts]
    return -mean([a + b for a, b in zip(bound, score, strict=True)])


def verifree(p):
    advantage = p.loo([p.y[r].exp() + p.bonus[r] for r in range(p.R)])
    return -mean([advantage[r] * p.z[r] + p.y[r].exp() for r in range(p.R)])


def avg_logprob(p):
    average = [p.y_tokens[r].mean() for r in range(p.R)]
    advantage = p.loo([average[r] + p.bonus[r] for r in range(p.R)])
    return -mean([advantage[r] * p.z[r] + average[r] for r in range(p.R)])


def rlpr(p):
    def reward(r):
        return (p.y_tokens[r].exp().mean() - p.base_tokens[r].exp().mean()).clamp(0, 1) + p.bonus[r]

    rewards = [reward(r).detach() for r in range(p.R)]
    advantage = []
    for r in range(p.R):
        group = p.group_of(r)
        centred = rewards[r] - mean([rewards[j] for j in group])
        advantage.append(centred / (p.deviation(rewards, group) + 1e-4))
    return -mean([advantage[r] * p.z[r] for r in range(p.R)])


def gain(p):
    reward = [torch.clamp(p.y[r] - p.base_tokens[r].sum(), min=0) + p.bonus[r] for r in range(p.R)]
    advantage = p.loo(reward)
    return -mean([advantage[r] * p.z[r] for r in range(p.R)])


def rloo(p):
    advantage = p.loo([p.correct[r] - 0.2 * p.ratio[r] + p.bonus[r] for r in range(p.R)])
    return -mean([advantage[r] * p.z[r] + 0.7 * p.correct[r] * p.y[r] for r in range(p.R)])


def multiple_choice(p):
    right = [torch.stack(options).log_softmax(0)[0] for options in p.options]
    odds = [a - (1 - a.exp()).log() for a in right]
    advantage = p.loo([odds[r] + p.bonus[r] for r in range(p.R)])
    return -mean([advantage[r] * p.z[r] + 0.5 * right[r] for r in range(p.R)])


def rft(p):
    """The mean log-likelihood of the data set of right samples."""
    return -mean([p.z[r] + p.y[r] for r in range(p.R) if p.correct[r]])


def dpo(p):
    return -mean([logsigmoid(0.1 * (p.ratio[w] - p.ratio[l])) for w, l in PAIRS.tolist()])


def ranked_dpo(p):
    found = []
    for group in p.prompts:
        ranked = sorted(group, key=lambda r: float(p.y[r].detach()))
        best, worst = ranked[-1], ranked[0]
        found.append(logsigmoid(0.1 * (p.ratio[best] - p.ratio[worst])))
    return -mean(found)


def trice(p):
    terms = []
    for c, (state, proposal) in enumerate(CHAINS.tolist()):
        others = [float(a == b) for d, (a, b) in enumerate(CHAINS.tolist()) if d != c]
        terms.append(p.z[state] - mean(others) * p.z[proposal] + p.y[state])
    return -mean(terms)


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


# By name, in the trainer


def example(n):
    options = tuple(str(n + n % 3 + other) for other in (1, 0, 3))
    return Example(f"sum-{n}", f"{n} + {n % 3} = ?", str(n + n % 3), options, rationale=f"{n} and {n % 3}")


DATA = [example(n) for n in range(8)]


class Answers:
    """An engine of whose rationales one is right, the first or another one each time; its log-probs are nobody's."""

    def __init__(self, turns=False):
        self.turns, self.calls = turns, 0

    def sync(self, model):
        pass

    def generate(self, prompts, keys, sampling, progress=lambda n: None):
        self.sampling, self.calls = sampling, self.calls + 1
        answers = {example.prompt: example.answer for example in DATA}
        right = self.calls % 3 if self.turns else 0
        found = []
        for tokens, of_prompt in zip(prompts, keys, strict=True):
            answer = answers[TOKENIZER.decode(tokens)]
            said = [
                f"{'ab' * (k + self.calls)} The answer is {answer if k == right else '99'}."
                for k in range(len(of_prompt))
            ]
            rows = [TOKENIZER(text)["input_ids"] for text in said]
            found.append([Sample(row, [-1.0] * len(row), TOKENIZER.eos_token_id, "end") for row in rows])
        return found


def trainer_of(tmp_path, objective, engine=None, data=DATA, **options):
    from latro.trainer import LatroTrainer

    funcs, model = options.pop("reward_funcs", ()), options.pop("model", None)
    config = LatroConfig(
        output_dir=str(tmp_path),
        objective=objective,
        num_generations=3,
        max_completion_length=40,
        use_cpu=True,
        disable_tqdm=True,
        **{
            "per_device_train_batch_size": 2,
            "max_steps": 1,
            "save_strategy": "no",
            "learning_rate": 1e-3,
            **options,
        },
    )
    return LatroTrainer(
        model or tiny_llama(TOKENIZER),
        config,
        data,
        processing_class=TOKENIZER,
        engine=engine or Answers(),
        reward_funcs=funcs,
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_trainers_step_by_name(name, tmp_path):
    # The tiny model's probability of a sentence is 0 in float32.
    short = {"answer_template": "{answer}"} if name == "verifree" else {}
    trainer = trainer_of(tmp_path, name, **short)
    objective = trainer.objective
    assert type(objective) is OBJECTIVES[name]
    before = {n: p.detach().clone() for n, p in trainer.tree_model.named_parameters()}
    grads = gradients_of_an_update(trainer)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert any(grad.abs().max() > 0 for grad in grads.values())
    assert any(not torch.equal(p, before[n]) for n, p in trainer.tree_model.named_parameters())
    assert (trainer.reference is not None) == ("reference" in objective.needs)
    assert trainer.engine.calls == (1 if objective.samples else 0)
    (logged,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][:1]
    assert math.isfinite(logged["loss"]) and math.isfinite(logged["reward"])
    if trainer.supply.grades:
        assert logged["correct"] == pytest.approx(1 / 3)
        assert trainer.engine.sampling.are_over([TOKENIZER("x The answer is")["input_ids"]]) == [False]


@pytest.mark.parametrize(
    ("name", "terms"), [("rft", 4), ("dpo", 4), ("jepo_multi", 4), ("spin", 12), ("sft_golden", 4), ("rloo", 12)]
)
def test_an_update_does_not_depend_on_its_micro_batches(name, terms, tmp_path):
    """What they are averaged over is counted over the whole update: four prompts, of three samples one is right."""

    def found(folder, size):
        accumulation = 4 // size
        trainer = trainer_of(
            tmp_path / folder,
            name,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
            model=tiny_llama(TOKENIZER).double(),
        )
        pack = trainer.pack
        trainer.pack = lambda groups, denominator: pack(groups, denominators.append(denominator) or denominator)
        return gradients_of_an_update(trainer)

    denominators = []
    with Float64():
        whole, parts = found("whole", 4), found("parts", 1)
    assert denominators == [terms] * 5
    for parameter in whole:
        torch.testing.assert_close(parts[parameter], whole[parameter], rtol=1e-9, atol=1e-12, msg=parameter)


def supply_of(name, end=None):
    text = Text(TOKENIZER, end=TOKENIZER.eos_token_id)
    return Supply(text, OBJECTIVES[name](), graders_for("", text.answer_template)[0])


def said(text):
    return Sample(TOKENIZER(text)["input_ids"], [-1.0], None, "end")


RIGHT, WRONG = "a The answer is 0.", "bb The answer is 7."


def packed(groups, **options):
    return Batch.of(groups, {}, 1, score_end=False, device=torch.device("cpu"), **options)


def test_rightness_is_of_the_models_own_answer():
    group = supply_of("rft").group(DATA[0], [said(RIGHT), said(WRONG), said("c")])
    assert group.correct == [True, False, False]
    assert [rationale.text for rationale in group.rationales] == ["a ", "bb ", "c"]
    assert packed([group]).correct.tolist() == group.correct


def test_pairs_are_of_right_and_wrong_rationales():
    supply = supply_of("dpo")
    one = supply.group(DATA[0], [said(WRONG), said(RIGHT), said(RIGHT), said(WRONG), said(WRONG)])
    assert one.pairs == [(1, 0), (2, 3)]
    none = supply.group(DATA[0], [said(RIGHT)] * 2)
    assert none.pairs == []
    other = supply.group(DATA[0], [said(RIGHT), said(WRONG)])
    assert packed([one, none, other]).pairs.tolist() == [[1, 0], [2, 3], [7, 8]]


def test_golden_rationales():
    assert [r.text for r in supply_of("sft_golden").group(DATA[4], []).rationales] == ["4 and 1"]
    assert [r.text for r in supply_of("sft_answers").group(DATA[4], []).rationales] == [""]
    spin = supply_of("spin").group(DATA[4], [said(RIGHT), said(WRONG)])
    assert [r.text for r in spin.rationales] == ["a ", "bb ", "4 and 1"]
    assert spin.pairs == [(2, 0), (2, 1)]


def test_options_stand_behind_each_rationale_the_right_one_first():
    group = supply_of("multiple_choice").group(DATA[0], [said(RIGHT), said(WRONG)])
    batch = packed([group])
    assert batch.scored.option[batch.scored.kind == 1].tolist() == [0, 1, 2] * 2
    first = batch.scored.targets[batch.scored.segment == 1]
    assert TOKENIZER.decode(first.tolist()).startswith("The answer is 0.")


def test_a_baseline_is_encoded_as_behind_no_rationale():
    group = supply_of("gain").group(DATA[0], [said(RIGHT), said("b\nThe answer is 7.")])
    batch = packed([group], baseline=True)
    texts = [TOKENIZER.decode(batch.scored.targets[batch.scored.segment == s].tolist()) for s in (1, 3, 4)]
    assert batch.scored.kind.tolist() == [0, 1, 0, 1, 2]
    assert [text.partition("The")[0] for text in texts] == ["", "", " "]  # white space is the rationales' own
    assert all("The answer is 0." in text for text in texts)


def test_chains_keep_their_states():
    supply = supply_of("trice")
    first = supply.group(DATA[0], [said(WRONG), said(RIGHT)])
    assert first.pairs == [(1, 1)]  # chain 0 has no state yet
    second = supply.group(DATA[0], [said(RIGHT), said(WRONG)])
    assert [r.text for r in second.rationales] == ["a ", "bb ", "a "]
    assert second.pairs == [(0, 0), (2, 1)]
    assert second.correct == [True, False, True]
    assert supply.group(DATA[1], [said(WRONG)] * 2).pairs == []  # another example's are its own
    later = supply.group(DATA[0], [said("ccc" + RIGHT), said(WRONG)])
    assert [r.text for r in later.rationales] == ["ccca ", "bb ", "a "]

    resumed = supply_of("trice")
    resumed.restore(json.loads(json.dumps(supply.saved())))
    third = resumed.group(DATA[0], [said(WRONG), said(WRONG)])
    assert third.pairs == [(2, 0), (3, 1)]
    assert [r.text for r in third.rationales[2:]] == ["ccca ", "a "]
    again = resumed.remake(DATA[0], third.samples, third.correct, third.pairs)
    assert again == third


@pytest.mark.parametrize("name", ["trice", "dpo"])
def test_a_resumed_run_goes_on_as_if_nothing_had_been(name, tmp_path):
    def run(folder, resume=None, **options):
        engine = Answers(turns=True)
        trainer = trainer_of(
            folder, name, engine, **{"max_steps": 6, "save_strategy": "steps", "save_steps": 1, **options}
        )
        if resume:
            engine.calls = 2  # of the four micro-batches of two rounds
        trainer.train(resume_from_checkpoint=resume)
        return torch.cat([p.detach().flatten() for p in trainer.tree_model.parameters()])

    whole = run(tmp_path, steps_per_generation=2)
    resumed = run(tmp_path, str(tmp_path / "checkpoint-3"), steps_per_generation=2)
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sft_golden", {"rationale": None}, "example sum-1: objective SftGolden needs a golden rationale, got none"),
        ("spin", {"rationale": None}, "example sum-1: objective Spin needs a golden rationale"),
        ("spin", {"rationale": "x" * 41}, "at most max_completion_length tokens, 40, got 41"),
        ("multiple_choice", {"options": ()}, "example sum-1: objective MultipleChoice needs options, at least 2"),
        ("multiple_choice", {"options": ("5", "6")}, "and the answer among them, got"),
        ("multiple_choice", {"options": ("2", "2 °C")}, "answer: the tokenizer must give back"),
    ],
)
def test_examples_that_cannot_give_it_are_refused_before_training(name, change, message, tmp_path):
    data = [DATA[0], replace(DATA[1], **change)]
    engine = Answers()
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, name, engine, data)
    assert engine.calls == 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("verifree", {"reward_floor": -2.5}, "reward_floor must not be given with objective verifree, which has none"),
        ("verifree", {"beta": 0.1}, "beta must not be given with objective verifree"),
        ("verifree", {"answer_weight": 0.0}, "answer_weight must not be given with objective verifree"),
        ("sft_golden", {"answer_weight": 0.5}, "answer_weight must not be given with objective sft_golden"),
        (
            "dpo",
            {"mask_truncated_completions": True},
            "mask_truncated_completions must not be given with objective dpo",
        ),
        ("jepo", {"mask_stop": True}, "mask_stop must not be given with objective jepo"),
        ("gain", {"normalize_advantages": "group"}, "normalize_advantages must not be given with objective gain"),
        ("jepo", {"preset": "code"}, "preset must not be given with objective jepo: it is latro's"),
        ("dpo", {"beta": 0.0}, "Dpo: beta must be > 0"),
        ("dpo", {"reward_funcs": [len]}, "objective dpo has no reward to add reward_funcs to"),
    ],
)
def test_options_that_an_objective_does_not_have_are_refused(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, name, **options)


def test_options_reach_the_objective_and_defaults_are_its_own(tmp_path):
    given = {"answer_weight": 0.01, "normalize_advantages": "batch"}
    assert trainer_of(tmp_path, "jepo", **given).objective == Jepo(answer_weight=0.01, scale="batch")
    assert trainer_of(tmp_path, "gain", reward_floor=0.0).objective == Gain(floor=0.0)
    assert trainer_of(tmp_path, "rloo", beta=0.3).objective == Rloo(beta=0.3)
    for name, kind in OBJECTIVES.items():
        if name != "latro":
            assert trainer_of(tmp_path, name).objective == kind()
    paper = trainer_of(tmp_path, "latro").objective
    assert paper == Latro(beta=0.05, truncation_penalty=1.0)


def test_every_need_is_declared():
    for kind in OBJECTIVES.values():
        objective = kind()
        assert objective.needs <= NEEDS.keys()
        assert objective.over in ("rationales", "prompts", "correct", "pairs")
        assert "loss" in kind.__doc__
        assert {field.name for field in fields(kind)}.isdisjoint({"over", "samples", "compares", "NEEDS"})
