"""An update of the loops in examples/, sampling aside, and of the same loop as one writes it without this package.

plain loop, accelerate loop: one packed forward of the reference and one of the policy.
padded rewrite: one padded forward of each, and logits of scored tokens only.
published: LaTRO's procedure, at its fastest micro-batch.

Each copies the reference, makes the optimizer, and ends with clipping and a step of AdamW. Sizes: see bench_step.py.
"""

from __future__ import annotations

import copy
from functools import partial
from unittest.mock import patch

import torch
from accelerate import Accelerator

from bench import bench_step
from bench.bench_step import HALF_MODEL, MODEL, SMALL_MODEL, step_inputs
from bench.measure import Case
from examples import accelerate_loop, plain_loop

CASES = {  # P, R, A, K
    "toy": (SMALL_MODEL, [(64, 16, 4, 4)]),
    "default": (HALF_MODEL, [(100, 64, 8, 4), (400, 32, 8, 4)]),
    "full": (MODEL, [(100, 200, 8, 16), (900, 128, 8, 16)]),
}
ANSWER_WEIGHT = 1.0
ONE_EXAMPLE = [None]  # of which nothing is read: its rationales are given


def ours(inputs):
    with given(plain_loop, inputs), patch.object(plain_loop, "ANSWER_WEIGHT", ANSWER_WEIGHT):
        return result(plain_loop.train(inputs["model"], None, ONE_EXAMPLE, updates=1))


def accelerated(inputs):
    options = accelerate_loop.OPTIONS | {"answer_weight": ANSWER_WEIGHT}
    with given(accelerate_loop, inputs), patch.object(accelerate_loop, "OPTIONS", options):
        accelerator = Accelerator(cpu=True)
        return result(accelerate_loop.train(accelerator, inputs["model"], None, ONE_EXAMPLE, updates=1))


def given(example, inputs):
    """In place of what it would sample."""
    tokens = [inputs["prompt"]], [inputs["rationales"]], [inputs["answer"]]
    return patch.object(example, "rollout", lambda *arguments: tokens)


def by_hand(inputs, step):
    model = inputs["model"]
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plain_loop.LEARNING_RATE, weight_decay=0.0)
    step(inputs | {"reference": reference})
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), plain_loop.CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return {"gradient's norm": norm}


def result(log):
    [(_, norm)] = log
    return {"gradient's norm": torch.tensor(norm)}


def exact(inputs):
    results = bench_step.exact(inputs | {"reference": inputs["model"]})
    return {"gradient's norm": results["gradient"].norm()}


def loops_case(config, sizes):
    inputs = step_inputs(config, sizes, torch.float32)
    del inputs["reference"], inputs["reference tree"]
    micro_batch = bench_step.fastest_micro_batch(inputs)
    inputs["model"].zero_grad()
    return Case(
        question="loops",
        name=f"{bench_step.case_name(sizes, torch.float32)}, published by {micro_batch}",
        dtype=torch.float32,
        inputs=inputs,
        exact=exact(inputs),
        contestants={
            "ours": ours,
            "ours, accelerate loop": accelerated,
            "padded rewrite": partial(by_hand, step=bench_step.padded_rewrite),
            "published": partial(by_hand, step=partial(bench_step.published, micro_batch=micro_batch)),
        },
        flops=bench_step.flops(inputs),
    )


def pytest_generate_tests(metafunc):
    config = metafunc.config
    model, found = CASES["toy" if config.getoption("toy") else "full" if config.getoption("full") else "default"]
    names = [bench_step.case_name(sizes, torch.float32) for sizes in found]
    metafunc.parametrize(("config", "sizes"), [(model, sizes) for sizes in found], ids=names)


def test_loops(config, sizes, measured):
    measured(loops_case(config, sizes))
