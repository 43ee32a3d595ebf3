"""Sampling K rationales of one prompt, none of which stops early: that favours whoever keeps finished ones.

ours: the prompt is read once, and its keys and values are stored once.
generate: transformers' `generate(num_return_sequences=K)`, its defaults but for what changes the distribution.

The error of ours is that of the probabilities that tokens were drawn with, against those of whole forward passes.
Sizes: P tokens of the prompt, K rationales of R tokens.
"""

from __future__ import annotations

import copy

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.bench_step import HALF_MODEL, MODEL, SMALL_MODEL
from bench.measure import Case
from latro.rollout import LocalEngine, Sampling
from tests.float64 import Float64

CASES = {  # P, R, K
    "toy": (SMALL_MODEL, [(64, 8, 4)]),
    "default": (HALF_MODEL, [(400, 16, 8)]),
    "full": (MODEL, [(900, 32, 16), (900, 128, 16), (900, 256, 16)]),
}


def ours(inputs):
    (samples,) = inputs["engine"].generate([inputs["prompt"]], [range(inputs["K"])], Sampling(inputs["R"]))
    return {"probability over exact": lambda: ratios(inputs, samples)}


def generate(inputs):
    inputs["engine"].model.generate(
        torch.tensor([inputs["prompt"]]),
        attention_mask=torch.ones(1, len(inputs["prompt"]), dtype=torch.int64),
        num_return_sequences=inputs["K"],
        do_sample=True,
        top_k=0,
        min_new_tokens=inputs["R"],
        max_new_tokens=inputs["R"],
    )


@torch.no_grad()
def ratios(inputs, samples):
    """Of the first and the last sample."""
    model = copy.deepcopy(inputs["engine"].model).double()
    P, R = len(inputs["prompt"]), inputs["R"]
    found = []
    for sample in (samples[0], samples[-1]):
        path = torch.tensor([inputs["prompt"] + sample.tokens])
        with Float64():
            logits = model(input_ids=path, use_cache=False, logits_to_keep=R + 1).logits[0, :-1]
        exact = logits.log_softmax(-1).gather(-1, path[0, P:, None])[:, 0]
        found.append((torch.tensor(sample.logps) - exact).exp())
    return torch.stack(found)


def rollout_case(config, sizes):
    P, R, K = sizes
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**config, tie_word_embeddings=False, initializer_range=0.05)).eval()
    model.generation_config.pad_token_id = 0
    return Case(
        question="rollout",
        name=case_name(sizes),
        dtype=torch.float32,
        inputs={
            "engine": LocalEngine(model),
            "prompt": torch.randint(config["vocab_size"], (P,)).tolist(),
            "R": R,
            "K": K,
        },
        exact={"probability over exact": torch.ones(2, R)},
        contestants={"ours": ours, "generate": generate},
        flops=flops(model, *sizes),
        floor="generate",
    )


def flops(model, P, R, K):
    """Each token once through the trunk, and each that is drawn once through the head."""
    config = model.config
    trunk = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    pairs = P * (P + 1) // 2 + K * sum(range(P + 1, P + R))
    attention = 4 * config.head_dim * pairs * config.num_attention_heads * config.num_hidden_layers
    return 2 * trunk * (P + K * (R - 1)) + 2 * config.hidden_size * config.vocab_size * K * R + attention


def case_name(sizes):
    return "P={} R={} K={} float32".format(*sizes)


def pytest_generate_tests(metafunc):
    config = metafunc.config
    size = "toy" if config.getoption("toy") else "full" if config.getoption("full") else "default"
    model, found = CASES[size]
    metafunc.parametrize("sizes", found, ids=map(case_name, found))
    metafunc.parametrize("config", [model], ids=[""])


def test_rollout(config, sizes, measured):
    measured(rollout_case(config, sizes))
