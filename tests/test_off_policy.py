"""Rationales that the policy did not draw itself, or not as it is now: weights and ratios, of losses and trained."""

import itertools
import json
import math

import pytest
import torch

from latro.config import LatroConfig
from latro.objectives import OBJECTIVES, Gain, Latro, MultipleChoice, PolicyGradient, Sums, VeriFree
from latro.objectives.base import in_rationale
from latro.rollout import LocalEngine
from latro_kernels import fused_self_reward_loss, memory, pack_rationales
from latro_kernels.self_reward import grouped
from latro_kernels.testing import random_batch
from tests.test_trainer import TOKENIZER, Scripted, gradients_of_an_update, trainer_of
from tests.tiny import tiny_llama

V, D = 40, 16
POLICY_GRADIENTS = [name for name, kind in OBJECTIVES.items() if issubclass(kind, PolicyGradient)]


def inputs(seed=0):
    """Log-probs near each other, of the policy, the one that sampled and what drew the tokens, of which some are not
    known; and what else objectives need."""
    batch = random_batch(seed, V)
    answers = [[answer, [3, 4], [5]] for answer in batch.answers]
    tree, scored = pack_rationales(batch.prompts, batch.rationales, answers, ends=V - 1, baseline=True)
    generator = torch.Generator().manual_seed(seed)

    def near(logps, spread):
        return logps + spread * torch.randn(logps.shape, generator=generator, dtype=torch.float64)

    logps = -torch.rand(len(scored.rows), generator=generator, dtype=torch.float64)
    sampling_logps = torch.where(in_rationale(scored), near(logps, 0.6), math.nan)
    sampling_logps[in_rationale(scored).nonzero()[::7]] = math.nan
    extras = {
        "ref_logps": near(logps, 0.3),
        "sampling_logps": sampling_logps,
        "old_logps": torch.where(in_rationale(scored), near(logps, 0.3), math.nan),
        "correct": torch.tensor([True, False, True, False, False, True, True, False, True]),
        "truncated": torch.tensor([True, False, False] * 3),
    }
    return logps.requires_grad_(), scored, extras, tree


def without(extras, *names):
    return {name: value for name, value in extras.items() if name not in names}


def gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0]


def published(logps, scored, extras, cap=None, low=None, high=None):
    """Latro's loss with the weights of truncated importance sampling and PPO's clipping, one token at a time."""
    tokens = {}
    for m, s in enumerate(scored.segment.tolist()):
        tokens.setdefault((int(scored.kind[s]), int(scored.rationale[s]), int(scored.option[s])), []).append(m)
    R = len(scored.prompt)
    answer = [logps[tokens[1, r, 0]].sum() for r in range(R)]
    kl = [(logps - extras["ref_logps"])[tokens[0, r, 0]].sum() for r in range(R)]
    reward = [float((answer[r] - 0.05 * kl[r]).detach()) for r in range(R)]
    old = extras.get("old_logps")
    old = logps.detach() if old is None else old
    total = 0.0
    for r in range(R):
        others = [reward[j] for j in range(R) if j != r and scored.prompt[j] == scored.prompt[r]]
        advantage = reward[r] - sum(others) / len(others)
        for m in tokens[0, r, 0]:
            drawn = extras["sampling_logps"][m]
            weight = 1.0
            if cap is not None and not drawn.isnan():
                weight = min(cap, math.exp(float(old[m] - drawn)))
            if low is None:
                total = total + weight * advantage * logps[m]
            else:
                ratio = torch.exp(logps[m] - old[m])
                clipped = torch.clamp(ratio, 1 - low, 1 + high)
                total = total + weight * torch.min(ratio * advantage, clipped * advantage)
        total = total + answer[r]
    return -total / R


CORRECTIONS = {
    "weights": ({"importance_weight_cap": 1.5}, {"cap": 1.5}),
    "clipping": ({"epsilon": 0.2}, {"low": 0.2, "high": 0.2}),
    "higher clipping": ({"epsilon": 0.1, "epsilon_high": 0.4}, {"low": 0.1, "high": 0.4}),
    "both": ({"importance_weight_cap": 1.2, "epsilon": 0.2}, {"cap": 1.2, "low": 0.2, "high": 0.2}),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("known", [True, False], ids=["old", "new"])
def test_the_gradient_is_that_of_the_published_loss(correction, known, seed):
    options, plain = CORRECTIONS[correction]
    logps, scored, extras, _ = inputs(seed)
    if not known:
        extras = without(extras, "old_logps")
    ours, theirs = Latro(**options)(logps, scored, extras), published(logps, scored, extras, **plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(ours, logps), gradient(theirs, logps), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(theirs, published(logps, scored, extras), rtol=1e-3)


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_weights_multiply_the_coefficients_of_rationale_tokens_alone(name):
    logps, scored, extras, _ = inputs()
    extras = without(extras, "old_logps")
    plain = gradient(OBJECTIVES[name]()(logps, scored, extras), logps)
    found = gradient(OBJECTIVES[name](importance_weight_cap=1.5)(logps, scored, extras), logps)
    weight = (logps.detach() - extras["sampling_logps"]).exp().clamp(max=1.5).nan_to_num(1.0)
    assert (weight == 1.5).any() and (weight < 1).any() and (weight[in_rationale(scored)] == 1).any()
    torch.testing.assert_close(found, plain * weight, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_a_policy_that_has_not_changed_has_the_same_gradient_bit_for_bit(name):
    logps, scored, extras, _ = inputs()
    plain = gradient(OBJECTIVES[name]()(logps, scored, extras), logps)
    for old in (None, logps.detach()):
        clipped = OBJECTIVES[name](epsilon=0.2)(logps, scored, {**extras, "old_logps": old})
        assert torch.equal(gradient(clipped, logps), plain)


@pytest.mark.parametrize("seed", range(3))
def test_clipped_tokens_have_no_gradient(seed):
    logps, scored, extras, _ = inputs(seed)
    objective = Latro(epsilon=0.1, epsilon_high=0.3)
    sums = Sums(logps.detach(), scored, extras["ref_logps"])
    _, advantage = objective.reward_and_advantage(sums, extras)
    clipped = objective.is_clipped(advantage, sums, extras)
    assert clipped.any() and not clipped[~in_rationale(scored)].any()
    found = gradient(objective(logps, scored, extras), logps)
    assert torch.equal((found == 0) & in_rationale(scored), clipped)


@pytest.mark.parametrize("cut", [False, True], ids=["at once", "cut"])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_through_the_fused_head(correction, cut, monkeypatch):
    if cut:
        monkeypatch.setattr(grouped, "FEWEST_TOKENS", 1)
        monkeypatch.setattr(memory, "_budget", 20 * V * 4)
    objective = Latro(**CORRECTIONS[correction][0])
    _, scored, extras, tree = inputs()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(tree.tokens), D, generator=generator, dtype=torch.float64).div(2).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).div(2).requires_grad_()
    logps = (hidden[scored.rows] @ weight.T).log_softmax(1).gather(1, scored.targets[:, None]).squeeze(1)
    spread = 0.5 * torch.linspace(-1, 1, len(logps), dtype=torch.float64)
    extras = {name: logps.detach() + spread if name.endswith("logps") else value for name, value in extras.items()}
    loss = objective(logps, scored, extras)
    truth = [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]
    more = without(extras, "ref_logps")
    for impl, dtype, tolerance in (("reference", torch.float64, 1e-12), ("auto", torch.float32, 2e-5)):
        operands = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight)]
        out = fused_self_reward_loss(
            *operands, scored, objective=objective, ref_logps=extras["ref_logps"], extras=more, impl=impl
        )
        for ours, exact in zip([out.loss, *torch.autograd.grad(out.loss, operands)], truth, strict=True):
            size = float(exact.abs().max())
            torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance * size)


def test_compiles_as_one_graph():
    logps, scored, extras, _ = inputs()
    objective = Latro(importance_weight_cap=1.2, epsilon=0.2)
    torch.compiler.reset()
    compiled = torch.compile(lambda values: objective(values, scored, extras), fullgraph=True, backend="aot_eager")
    ours, theirs = (gradient(loss(logps), logps) for loss in (compiled, lambda x: objective(x, scored, extras)))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def mean_gradient(cap):
    """Of two rationales of a token each, over all that a sampler of another distribution can draw, and what it is of
    the expected reward."""
    generator = torch.Generator().manual_seed(0)
    z, y, sampler = (torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(3))
    z.requires_grad_()
    y, drawn = y.sigmoid().log(), sampler.log_softmax(0)
    objective, total = Latro(beta=0.0, answer_weight=0.0, importance_weight_cap=cap), 0.0
    for pair in itertools.product(range(3), repeat=2):
        _, scored = pack_rationales([[0]], [[[k] for k in pair]], [[0]])
        policy = z.log_softmax(0)
        logps = torch.stack([logp for k in pair for logp in (policy[k], y[k])])
        known = torch.tensor([logp for k in pair for logp in (drawn[k], math.nan)], dtype=torch.float64)
        total = total + drawn[list(pair)].sum().exp() * objective(logps, scored, {"sampling_logps": known})
    return gradient(total, z), gradient(-(z.softmax(0) * y).sum(), z)


def test_weights_without_a_limit_leave_no_bias():
    torch.testing.assert_close(*mean_gradient(cap=1e9))
    for cap in (None, 0.9):
        found, exact = mean_gradient(cap)
        assert not torch.allclose(found, exact, rtol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance_weight_cap": 0.0}, "Latro: importance_weight_cap must be > 0"),
        ({"epsilon": -0.1}, "Latro: epsilon must be > 0"),
        ({"epsilon": 1.0}, "Latro: epsilon must be below 1, got 1.0"),
        ({"epsilon_high": 0.3}, "Latro: epsilon_high must stand beside epsilon, got 0.3 alone"),
    ],
)
def test_bad_corrections_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Latro(**options)


def test_log_probs_that_are_missing_are_said():
    logps, scored, extras, _ = inputs()
    with pytest.raises(ValueError, match=r"Latro: extras must hold sampling_logps \[M\], with which each token"):
        Latro(importance_weight_cap=2.0)(logps, scored, without(extras, "sampling_logps"))
    with pytest.raises(ValueError, match=r"Gain: old_logps must have shape"):
        Gain(epsilon=0.2)(logps, scored, {**extras, "old_logps": logps[1:].detach()})


# In the trainer


class Perturbed(LocalEngine):
    """Another model than the one that is trained."""

    def __init__(self, scale=0.9):
        super().__init__(tiny_llama(TOKENIZER))
        with torch.no_grad():
            self.model.lm_head.weight.mul_(scale)

    def sync(self, model):
        pass


def batches_of(trainer):
    """Of every micro-batch that is trained on: it, as it is then, and its log-probs."""
    seen, record = [], trainer.record

    def kept(batch, out, ref_logps):
        seen.append((batch, out.logps.clone()))
        record(batch, out, ref_logps)

    trainer.record = kept
    return seen


def logged(tmp_path):
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize("score_end", [False, True])
def test_what_drew_a_token_stands_at_it(tmp_path, score_end):
    """The model's own samples: all but rounding is alike, ends among them."""
    trainer = trainer_of(tmp_path, score_end=score_end, num_generations=8, max_completion_length=60)
    seen = batches_of(trainer)
    trainer.train()
    ((batch, logps),) = seen
    assert any(sample.end is not None for group in batch.groups for sample in group.samples)
    drawn = batch.sampling_logps
    assert torch.equal(~drawn.isnan(), in_rationale(batch.scored))
    torch.testing.assert_close(drawn[~drawn.isnan()].float(), logps[~drawn.isnan()], rtol=1e-4, atol=1e-4)
    (line,) = logged(tmp_path)
    assert 0 <= line["sampling/kl"] < 1e-8
    assert line["sampling/max_ratio"] == pytest.approx(1, abs=1e-3)


def test_an_end_behind_a_rationale_that_stopped_before_was_not_drawn_there(tmp_path):
    class Graded(Scripted):
        def generate(self, *args, **kwargs):
            found = super().generate(*args, **kwargs)
            for samples in found:
                for sample in samples:
                    sample.end, sample.ended_by = TOKENIZER.eos_token_id, "end"
                    sample.logps.append(-2.0)
            return found

    trainer = trainer_of(tmp_path, Graded(), score_end=True)
    seen = batches_of(trainer)
    trainer.train()
    ((batch, _),) = seen
    ends = in_rationale(batch.scored) & (batch.scored.targets == TOKENIZER.eos_token_id)
    assert torch.equal(ends, in_rationale(batch.scored) & batch.sampling_logps.isnan())


def test_mismatch_is_logged(tmp_path):
    trainer = trainer_of(tmp_path, Perturbed(), max_steps=1)
    seen = batches_of(trainer)
    trainer.train()
    ((batch, logps),) = seen
    ratios = [
        math.exp(float(logps[m]) - float(batch.sampling_logps[m]))
        for m in in_rationale(batch.scored).nonzero().flatten().tolist()
    ]
    expected = [ratio - 1 - math.log(ratio) for ratio in ratios]
    (line,) = logged(tmp_path)
    assert line["sampling/kl"] == pytest.approx(sum(expected) / len(expected), rel=1e-3)
    assert line["sampling/kl"] > 1e-3
    assert line["sampling/max_ratio"] == pytest.approx(max(ratios), rel=1e-4)


def test_the_cap_reaches_the_gradient(tmp_path):
    """Without one it is as if there were no option; of 1, tokens that the sampler liked less pull less."""
    found = {
        cap: gradients_of_an_update(
            trainer_of(tmp_path / str(cap), Perturbed(), importance_weight_cap=cap, max_grad_norm=0.0)
        )
        for cap in (None, 1.0, 1e9)
    }
    for one, other in itertools.combinations(found, 2):
        assert any(not torch.allclose(found[one][name], found[other][name], rtol=1e-3) for name in found[one])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
        ({"epsilon": 0.2}, "epsilon must be None unless rationales grow old: num_iterations above 1"),
        (
            {"num_iterations": 2, "objective": "dpo"},
            "num_iterations must be 1 with objective dpo, which does not correct",
        ),
        ({"num_iterations": 2, "objective": "rft"}, "num_iterations must be 1 with objective rft"),
        ({"importance_weight_cap": 2.0, "objective": "rft"}, "importance_weight_cap must not be given with objective"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LatroConfig(output_dir="x", use_cpu=True, **options)


def test_options_reach_the_objective(tmp_path):
    given = {"num_iterations": 2, "epsilon_high": 0.28, "importance_weight_cap": 2.0}
    objective = trainer_of(tmp_path, Scripted(), objective="verifree", **given).objective
    assert objective == VeriFree(epsilon=0.2, epsilon_high=0.28, importance_weight_cap=2.0)
    assert trainer_of(tmp_path, Scripted(), objective="gain").objective == Gain()
    assert MultipleChoice(answer_weight=0.5) != MultipleChoice(answer_weight=0.5, epsilon=0.2)
