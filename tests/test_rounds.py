"""Rationales that are trained on several times: rounds, their ratios, their data, and going on amid one."""

import pytest
import torch
import torch.distributed as dist
from accelerate.data_loader import SeedableRandomSampler

from latro.objectives.base import in_rationale
from latro.rounds import Rounds
from tests import distributed_job
from tests.checkpoint_job import trainer_of as learning_trainer
from tests.test_off_policy import batches_of, logged
from tests.test_trainer import Scripted, gradients_of_an_update, trainer_of
from tests.test_trainer_distributed import (
    FOUR,
    FSDP2,
    SAVING,
    SGD,
    TORCHRUN,
    TWO,
    assert_same_weights,
    launched,
    weights,
)
from tests.tiny import examples


def flat(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.tree_model.parameters()])


def test_the_first_update_of_a_round_is_that_of_one_without_others(tmp_path):
    weights, gradients = [], []
    for folder, options in (("one", {}), ("two", {"num_iterations": 2})):
        trainer = trainer_of(tmp_path / folder, max_steps=1, **options)
        gradients.append(gradients_of_an_update(trainer))
        weights.append(flat(trainer))
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert torch.equal(*weights)


def test_updates_of_a_round_use_its_rationales_again(tmp_path):
    """Two updates of two micro-batches, twice: A B A B. Old log-probs are those of the policy before the first."""
    trainer = trainer_of(
        tmp_path,
        max_steps=5,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        num_iterations=2,
        learning_rate=1e-2,
        score_end=True,
    )
    rounds, generate = [], trainer.engine.generate
    trainer.engine.generate = lambda prompts, *rest: rounds.append(len(prompts)) or generate(prompts, *rest)
    seen, score = batches_of(trainer), trainer.score_waiting
    before = {}

    def scored(parts):
        score(parts)
        before.update({id(group): list(group.old_logps) for part in parts for group in part})

    trainer.score_waiting = scored
    trainer.train()
    assert rounds == [4, 4]
    of_update = [[batch.groups for batch, _ in seen[n : n + 2]] for n in range(0, 10, 2)]
    A, B, again_A, again_B, _ = of_update
    assert [id(g) for part in A for g in part] == [id(g) for part in again_A for g in part]
    assert [id(g) for part in B for g in part] == [id(g) for part in again_B for g in part]
    assert {id(g) for part in A + B for g in part}.isdisjoint({id(g) for part in of_update[4] for g in part})
    for n, (batch, logps) in enumerate(seen[:8]):
        if n < 2:  # found when first trained on
            assert batch.old_logps is None
            continue
        old = batch.old_logps[in_rationale(batch.scored)]
        if n in (4, 5):
            first = seen[n - 4][1][in_rationale(batch.scored)]
            assert torch.equal(old.float(), first)
        else:
            assert old.tolist() == [logp for group in batch.groups for logp in before[id(group)]]
            # What drew them was the policy of then, which the one of now is not.
            drawn = batch.sampling_logps[in_rationale(batch.scored)]
            torch.testing.assert_close(old, drawn, rtol=1e-3, atol=1e-3)
            assert not torch.allclose(old.float(), logps[in_rationale(batch.scored)], rtol=1e-2)
    lines = logged(tmp_path)
    assert lines[0]["clip_ratio/region_mean"] == 0
    assert max(line["clip_ratio/region_mean"] for line in lines) > 0
    assert max(line["sampling/kl"] for line in lines) < 1e-6  # what sampled was the policy, however it changed since


def test_a_second_updates_gradient_is_the_surrogates(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=2, num_iterations=2, learning_rate=3e-2, beta=0.0, max_grad_norm=0.0)
    seen, found = batches_of(trainer), []
    trainer.create_optimizer()
    before = []

    def keep(*args, **kwargs):
        model = trainer.tree_model.model
        before.append({name: p.detach().clone() for name, p in model.named_parameters()})
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})

    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    (first, old), (second, _) = seen
    assert second.groups is first.groups or second.groups == first.groups

    model = trainer.tree_model
    model.model.load_state_dict(before[1])
    model.zero_grad()
    extras = {"old_logps": old.double(), "sampling_logps": second.sampling_logps, "ref_logps": old}

    def surrogate(logps, scored, given):
        total, R = 0.0, len(scored.prompt)
        kind, of = scored.kind[scored.segment], scored.rationale[scored.segment]
        answer = torch.stack([logps[(kind == 1) & (of == r)].sum() for r in range(R)])
        for r in range(R):
            others = [j for j in range(R) if j != r and scored.prompt[j] == scored.prompt[r]]
            cut_off = second.truncated.float()
            reward = answer.detach() - cut_off
            advantage = reward[r] - reward[others].mean()
            ratio = (logps - extras["old_logps"].float())[(kind == 0) & (of == r)].exp()
            total = total + torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum() + answer[r]
        return -total / R

    model(second.tree, second.scored, objective=surrogate).loss.backward()
    for name, parameter in model.model.named_parameters():
        size = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[1][name], parameter.grad, rtol=1e-3, atol=1e-4 * size, msg=name)


def test_old_rationales_are_said_unless_something_corrects_them(tmp_path, caplog):
    for n, options in enumerate(({"epsilon": 0.2}, {"importance_weight_cap": 2.0}, {})):
        caplog.clear()
        trainer_of(tmp_path / str(n), Scripted(), steps_per_generation=2, **options)
        assert ("older than the policy" in caplog.text) == (not options)


# The data


def test_a_round_stands_as_often_as_it_is_trained_on():
    order = list(Rounds(range(7), per_update=2, per_round=4, times=2))
    assert order == [0, 1, 2, 3] * 2 + [4, 5, 6, 0] * 2
    assert order[14:] == [6, 0]
    assert list(Rounds(range(6), 2, 4, 3)) == [0, 1, 2, 3] * 3 + [4, 5] * 3
    assert list(Rounds(range(1), 4, 4, 2)) == [0] * 8
    for rounds in (Rounds(range(7), 2, 4, 2), Rounds(range(6), 2, 4, 3), Rounds(range(1), 4, 4, 2)):
        assert len(rounds) == len(list(rounds))


def test_epochs_have_orders_of_their_own():
    rounds = Rounds(SeedableRandomSampler(range(8), data_seed=3), 2, 2, 2)
    first = list(rounds)
    rounds.set_epoch(1)
    second = list(rounds)
    rounds.set_epoch(0)
    assert list(rounds) == first != second


def test_an_epoch_samples_every_example_once(tmp_path):
    engine = Scripted()
    trainer = trainer_of(tmp_path, engine, num_iterations=3, max_steps=-1, num_train_epochs=2, data=examples(6))
    trainer.train()
    assert trainer.state.global_step == 2 * 3 * 3
    texts = [tuple(prompt) for prompts, _ in engine.asked for prompt in prompts]
    assert len(engine.asked) == 6
    assert len(set(texts[:6])) == len(set(texts[6:])) == 6
    assert texts[:6] != texts[6:]


# Going on


ROUNDS = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "save_steps": 1,
    "max_steps": 7,
    "learning_rate": 3e-2,
}


def state_of(trainer):
    optimizer = trainer.optimizer.state_dict()["state"]
    return flat(trainer), torch.cat([state["exp_avg_sq"].flatten() for state in optimizer.values()])


def test_a_run_goes_on_amid_a_round_as_if_nothing_had_been(tmp_path):
    whole = learning_trainer(tmp_path / "whole", config=ROUNDS)
    whole.train()
    lines = logged(tmp_path / "whole")
    for step in (1, 2, 3, 5):
        folder = tmp_path / str(step)
        resumed = learning_trainer(folder, config=ROUNDS)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for found, expected in zip(state_of(resumed), state_of(whole), strict=True):
            assert torch.equal(found, expected)
        assert logged(folder) == [line for line in lines if line["step"] > step]


def test_a_checkpoint_amid_an_update_keeps_micro_batches_that_come_again_one(tmp_path):
    """Then what the update finds of a micro-batch is found of it everywhere, and a later one has it."""
    config = {**ROUNDS, "save_strategy": "no", "steps_per_generation": 1, "max_steps": 2}
    trainer = learning_trainer(tmp_path / "run", config=config)
    compute, saved = trainer.compute_loss, []

    def saving(*args, **options):
        if not saved:
            saved.append(trainer.save_more(tmp_path))
        return compute(*args, **options)

    trainer.compute_loss = saving
    trainer.train()
    other = learning_trainer(tmp_path / "other", config=config)
    other._restore(tmp_path)
    first, again = other._ahead
    assert first is again and other._behind == 2


# In several processes

TWICE = {**SGD, "gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 3, "importance_weight_cap": 2.0}
IN_TURN = {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 5, "learning_rate": 1e-2}


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo")
def test_two_processes_train_as_one(tmp_path):
    launched(TORCHRUN, tmp_path / "two", {"twice": {"options": {**TWO, **TWICE}}})
    distributed_job.run(tmp_path / "alone", {**FOUR, **TWICE})
    assert_same_weights(weights(tmp_path / "two" / "twice"), weights(tmp_path / "alone"), 1e-10)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo")
def test_a_sharded_model_is_trained_as_a_whole_one_and_goes_on(tmp_path):
    runs = {
        "whole": {"options": {**TWO, **IN_TURN, **SAVING}, "injected": False},
        "resumed": {
            "options": {**TWO, **IN_TURN},
            "injected": False,
            "resume": str(tmp_path / "two" / "whole" / "checkpoint-2"),
        },
    }
    folder = launched(FSDP2, tmp_path / "two", runs)
    distributed_job.run(tmp_path / "alone", {**FOUR, **IN_TURN}, injected=False)
    assert_same_weights(weights(folder / "whole"), weights(tmp_path / "alone"), 1e-10)
    assert_same_weights(weights(folder / "resumed"), weights(folder / "whole"), 0)
