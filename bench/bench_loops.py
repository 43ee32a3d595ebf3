"""An update of the loops in examples/, sampling aside, and of the same loop with a padded rewrite of its scoring.

ours: plain_loop.py and accelerate_loop.py, one packed forward of the reference and one of the policy.
padded rewrite: one padded forward of each, and logits of scored tokens only; see bench_step.py, also for the sizes.

Each copies the reference, makes the optimizer, and ends with clipping and a step of AdamW.
"""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager
from unittest.mock import patch

import torch
from accelerate import Accelerator

from bench import bench_step
from bench.measure import Case
from examples import accelerate_loop, plain_loop

ANSWER_WEIGHT = 1.0
ONE_EXAMPLE = [None]  # of which nothing is read: its rationales are given


def ours(inputs):
    with given(plain_loop, inputs), patch.object(plain_loop, "ANSWER_WEIGHT", ANSWER_WEIGHT), gradients() as found:
        plain_loop.train(inputs["model"], None, ONE_EXAMPLE, updates=1)
    return found


def accelerated(inputs):
    options = patch.dict(accelerate_loop.OPTIONS, answer_weight=ANSWER_WEIGHT)
    with given(accelerate_loop, inputs), options, gradients() as found:
        accelerate_loop.train(Accelerator(cpu=True), inputs["model"], None, ONE_EXAMPLE, updates=1)
    return found


def padded_rewrite(inputs):
    model = inputs["model"]
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plain_loop.LEARNING_RATE, weight_decay=0.0)
    bench_step.padded_rewrite(inputs | {"reference": reference})
    with gradients() as found:
        torch.nn.utils.clip_grad_norm_(model.parameters(), plain_loop.CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return found


def given(example, inputs):
    """In place of what it would sample."""
    tokens = [inputs["prompt"]], [inputs["rationales"]], [inputs["answer"]]
    return patch.object(example, "rollout", lambda *arguments: tokens)


@contextmanager
def gradients():
    """As they come to be clipped; so as to be compared, they are clipped to infinity."""
    clip, found = torch.nn.utils.clip_grad_norm_, {}

    def keep(parameters, most, **options):
        parameters = list(parameters)
        kept = [parameter.grad for parameter in parameters]
        found["gradient"] = lambda: torch.cat([gradient.flatten() for gradient in kept])
        return clip(parameters, math.inf, **options)

    with patch.object(torch.nn.utils, "clip_grad_norm_", keep):
        yield found


def loops_case(config, sizes):
    inputs = bench_step.step_inputs(config, sizes, torch.float32)
    del inputs["reference"], inputs["reference tree"]
    gradient = bench_step.exact(inputs | {"reference": inputs["model"]})["gradient"]
    return Case(
        question="loops",
        name=bench_step.case_name(sizes, torch.float32),
        dtype=torch.float32,
        inputs=inputs,
        exact={"gradient": gradient},
        contestants={"ours": ours, "ours, accelerate loop": accelerated, "padded rewrite": padded_rewrite},
        flops=bench_step.flops(inputs),
    )


def pytest_generate_tests(metafunc):
    config = metafunc.config
    size = "toy" if config.getoption("toy") else "full" if config.getoption("full") else "default"
    model, found = bench_step.CASES[size]
    names = [bench_step.case_name(sizes, torch.float32) for sizes in found]
    metafunc.parametrize(("config", "sizes"), [(model, sizes) for sizes in found], ids=names)


def test_loops(config, sizes, measured):
    measured(loops_case(config, sizes))
