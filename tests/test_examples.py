"""The examples run, teach, and train on LaTRO's own gradient: alone, in two processes, and in TRL's loop."""

import copy
import importlib.util
import math
import os
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from bench import trainers
from examples import accelerate_loop, plain_loop
from latro.demo.task import problems
from tests import examples_job
from tests.examples_job import K, trl_trainer
from tests.oracle import leave_one_out, oracle_loss, sequence_logp

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(ROOT.joinpath("examples").glob("*.py"))
ENDINGS = {(False, False), (False, True), (True, True)}  # of a completion: whether it stops, whether it ends
FIGURES = ("loss", "grad_norm", "reward", "answer_logp", "kl")
TAUGHT = -1.0  # a mean reward; the base begins below -2
SECONDS = 300

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo")
missing = [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]
needs_trl = pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)}: not installed; pip install trl")
MARKS = {"trl_rloo": [needs_trl]}


@pytest.mark.parametrize(
    "example",
    [pytest.param(path, marks=MARKS.get(path.stem, []), id=path.stem) for path in EXAMPLES],
)
def test_example_runs(example, capsys):
    runpy.run_path(str(example), run_name="__main__")
    out = capsys.readouterr().out
    assert out.strip()
    assert "nan" not in out


# The loops


def test_plain_loop_teaches():
    model, text = plain_loop.load()
    questions = problems(0, 64, "test")
    before = plain_loop.accuracy(model, text, questions)
    rewards = [reward for reward, _ in plain_loop.train(model, text, problems(0, 8 * plain_loop.PROMPTS), updates=8)]
    assert rewards[0] < 2 * TAUGHT
    assert sum(rewards[-3:]) / 3 > TAUGHT
    assert plain_loop.accuracy(model, text, questions) > before


def test_plain_loop_takes_the_gradient_of_the_definition():
    model, text = plain_loop.load()
    batch = problems(0, plain_loop.PROMPTS)
    prompts, rationales, answers = plain_loop.rollout(plain_loop.LocalEngine(model), text, batch, 0)
    plain = copy.deepcopy(model)
    loss = oracle_loss(
        plain, model, prompts, rationales, [of[0][0] for of in answers], beta=plain_loop.BETA, answer_weight=0.0
    )
    loss.backward()
    expected = torch.stack([weight.grad.norm() for weight in plain.parameters()]).norm().item()
    [(_, norm)] = plain_loop.train(model, text, batch, updates=1)
    assert norm == pytest.approx(expected, rel=1e-3)


def test_accelerate_loop_does_what_the_plain_one_does():
    model, text = accelerate_loop.load()
    plain = copy.deepcopy(model)
    examples = problems(0, 2 * plain_loop.PROMPTS)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    found = accelerate_loop.train(accelerator, model, text, examples, updates=2)
    expected = plain_loop.train(plain, text, examples, updates=2)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-3)


def test_accelerate_loop_needs_a_prompt_for_each_micro_batch():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="must have 2 prompts, one for each micro-batch, got 1"):
        accelerate_loop.share(accelerator, problems(0, 1))


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize("job", ["accelerate", pytest.param("trl", marks=needs_trl)])
def test_two_processes_do_what_one_does(job, tmp_path):
    """In float64; groups of unequal size, and unequal numbers of prompts in accelerate's loop."""
    launchers = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
    found = {}
    for name, launcher in launchers.items():
        command = [sys.executable, *launcher, str(ROOT / "tests" / "examples_job.py"), job, str(tmp_path / name)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stdout + done.stderr
        found[name] = torch.load(tmp_path / name)
    torch.testing.assert_close(found["two"], found["one"], rtol=0, atol=1e-10)


# TRL


@pytest.fixture
def make(tmp_path):
    def trainer(**options):
        return trl_trainer(tmp_path, **options)

    return trainer


def rows_of(trainer):
    """Two prompts."""
    return [row for row in list(trainer.train_dataset)[8:10] for _ in range(K)]


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def gradient_of_a_step(trainer, rows):
    trainer.model.train()
    trainer.compute_loss(trainer.model, trainer._prepare_inputs(rows)).backward()
    found = gradients(trainer.model)
    trainer.model.zero_grad()
    return found


def gradient_of_the_definition(trainer, reference, rows, answer_weight):
    """Each row by itself. The answer does not see the token that ended its rationale."""
    model = trainer.model
    prompts, said, _ = examples_job.completions([row["prompt"] for row in rows])
    end, [stop] = examples_job.TOKENIZER.eos_token_id, examples_job.TOKENIZER("=")["input_ids"]
    sampled = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in said]
    assert Counter((stop in tokens, tokens[-1] == end) for tokens in said).keys() == ENDINGS
    behind = [x + [token for token in z if token != end] for x, z in zip(prompts, sampled, strict=True)]
    answers = [examples_job.TOKENIZER(f"={row['answer']}")["input_ids"] + [end] for row in rows]
    rationale_logp = sequence_logp(model, prompts, sampled, trainer.temperature)
    answer_logp = sequence_logp(model, behind, answers)
    with torch.no_grad():
        reference_logp = sequence_logp(reference, prompts, sampled, trainer.temperature)
        reward = answer_logp - trainer.beta * (rationale_logp - reference_logp)
    advantage = leave_one_out(reward, [K] * (len(rows) // K))
    (-(advantage * rationale_logp + answer_weight * answer_logp).mean()).backward()
    return gradients(model)


@needs_trl
def test_trl_trains_in_its_own_loop(make):
    trainer = make(gradient_accumulation_steps=2, max_steps=3)
    packed, pack = [], trainer.pack
    trainer.pack = lambda samples, K: packed.append(samples) or pack(samples, K)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert len(packed) == 3 * 2
    for samples in packed:  # the rationales of a prompt stay together, prompt by prompt
        prompts = [tuple(prompt) for prompt, _, _ in samples]
        assert [prompt for prompt in prompts[::K] for _ in range(K)] == prompts
        assert len(set(prompts)) == examples_job.PROMPTS
    assert any((weight != before[name]).any() for name, weight in trainer.model.state_dict().items())
    logged = trainer.state.log_history[:-1]
    assert [line["step"] for line in logged] == [1, 2, 3]
    assert all(math.isfinite(line[name]) for line in logged for name in FIGURES)
    assert logged[0]["kl"] == pytest.approx(0, abs=1e-4)


@needs_trl
@pytest.mark.parametrize("answer_weight", [1.0, 0.0])
def test_trl_takes_the_gradient_of_the_definition(make, answer_weight):
    trainer = make(answer_weight=answer_weight)
    trainer._generate = examples_job.completions
    with torch.no_grad():
        for weight in trainer.ref_model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    rows = rows_of(trainer)
    found = gradient_of_a_step(trainer, rows)
    expected = gradient_of_the_definition(trainer, trainer.ref_model, rows, answer_weight)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@needs_trl
@pytest.mark.parametrize("contestant", [trainers.ours, trainers.trl])
def test_trl_itself_takes_the_gradient_of_the_definition(contestant, tmp_path):
    """Where log π(y | x, z) is a reward function, as in bench/trainers.py, which measures what that takes."""
    config, [sizes] = trainers.CASES["toy"]
    case = trainers.trainers_case(config, sizes, str(tmp_path))
    contestant(case.inputs)  # makes the trainer
    found = contestant(case.inputs)["gradient"]()
    assert (found - case.exact["gradient"]).norm() < 1e-4 * case.exact["gradient"].norm()


@needs_trl
def test_trl_evaluates(make):
    trainer = make(evaluated=4, per_device_eval_batch_size=8, num_generations_eval=2)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.state.log_history[-1]["eval_answer_logp"] < 0


@needs_trl
def test_trl_trains_an_adapter(make, tmp_path):
    """Its reference is the model without it."""
    peft = pytest.importorskip("peft", reason="peft is not installed; pip install peft")
    trainer = make(peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    trainer._generate = examples_job.completions
    rows = rows_of(trainer)
    found = gradient_of_a_step(trainer, rows)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = gradient_of_the_definition(trainer, reference, rows, answer_weight=1.0)
    assert all("lora" in name for name in found)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@needs_trl
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}, "per_device_train_batch_size must be 9"),
        ({"num_iterations": 2}, "num_iterations must be 1, got 2"),
        ({"steps_per_generation": 2}, "steps_per_generation must be 1, got 2"),
        ({"normalize_advantages": True}, "normalize_advantages must be False"),
        ({"reward_clip_range": (-1.0, 1.0)}, "reward_clip_range must be None"),
        ({"evaluated": 4, "per_device_eval_batch_size": 8}, "per_device_eval_batch_size must be 9, got 8"),
        ({"answer": "solution"}, "train_dataset must have a column `answer`, got .'prompt', 'solution'"),
    ],
)
def test_trl_refuses_what_it_would_not_do(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
