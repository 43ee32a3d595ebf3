"""The whole update step of LaTRO on a small random model: loss, and the gradient of every parameter.

ours: one packed policy forward and one of the reference.
published: LaTRO's procedure, per rationale three forwards with full logits without gradient and two with, over copies
    of the prompt, at its fastest micro-batch and without its emptying of caches.
padded rewrite: what a careful engineer writes without us, one padded policy forward and one of the reference, and
    logits of scored tokens only; "chunked" makes these again in the backward, for memory.

All rationales are equally long, which favours padding: there is none.
Sizes: P tokens of the prompt, K rationales of R tokens, each with an answer of A tokens.
"""

from __future__ import annotations

import copy
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.measure import Case, bf16_is_emulated
from latro.model import TreeModel
from latro_kernels import pack_rationales
from tests.float64 import Float64

BETA = 0.05
CHUNK = 128

MODEL = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
MODEL |= {"intermediate_size": 1536, "vocab_size": 32000}
HALF_MODEL = MODEL | {"num_hidden_layers": 3, "vocab_size": 16000}
SMALL_MODEL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL_MODEL |= {"head_dim": 16, "intermediate_size": 128, "vocab_size": 1000}

CASES = {  # P, R, A, K
    "toy": (SMALL_MODEL, [(64, 16, 4, 4)]),
    "default": (HALF_MODEL, [(100, 64, 8, 4), (400, 32, 8, 4)]),
    "full": (MODEL, [(100, 200, 8, 16), (900, 128, 8, 16)]),
}


def ours(inputs):
    model = inputs["model"]
    model.zero_grad()
    tree, scored = pack_rationales([inputs["prompt"]], [inputs["rationales"]], [inputs["answer"]])
    ref_logps = inputs["reference tree"].logprobs(tree, scored)
    out = inputs["tree"](tree, scored, ref_logps=ref_logps, beta=BETA)
    out.loss.backward()
    return _results(model, out.loss)


def published(inputs, micro_batch):
    model, reference = inputs["model"], inputs["reference"]
    model.zero_grad()
    x, z, y = _padded(inputs)
    xz = torch.cat([x, z], dim=1)
    parts = list(
        zip(x.split(micro_batch), z.split(micro_batch), xz.split(micro_batch), y.split(micro_batch), strict=True)
    )
    with torch.no_grad():
        scores = [(_logp(model, a, b), _logp(model, ab, c), _logp(reference, a, b)) for a, b, ab, c in parts]
    rationale_logp, answer_logp, reference_logp = (torch.cat(part) for part in zip(*scores, strict=True))
    advantages = _advantage(rationale_logp, answer_logp, reference_logp).split(micro_batch)
    total = 0.0
    for (a, b, ab, c), advantage in zip(parts, advantages, strict=True):
        loss = -(advantage * _logp(model, a, b) + _logp(model, ab, c)).sum() / len(x)
        loss.backward()
        total += loss.detach()
    return _results(model, total)


def padded_rewrite(inputs, chunked=False):
    model, reference = inputs["model"], inputs["reference"]
    model.zero_grad()
    x, z, y = _padded(inputs)
    rows, R = torch.cat([x, z, y], dim=1), z.shape[1]
    first = x.shape[1]
    targets = rows[:, first:]

    def logps(model):
        hidden = model.model(input_ids=rows, use_cache=False).last_hidden_state[:, first - 1 : -1]
        return _head(hidden.flatten(0, 1), model.lm_head.weight, targets.flatten(), chunked).view_as(targets)

    with torch.no_grad():
        reference_logp = logps(reference)[:, :R].sum(1)
    scored = logps(model)
    rationale_logp, answer_logp = scored[:, :R].sum(1), scored[:, R:].sum(1)
    advantage = _advantage(rationale_logp.detach(), answer_logp.detach(), reference_logp)
    loss = -(advantage * rationale_logp + answer_logp).mean()
    loss.backward()
    return _results(model, loss)


def _padded(inputs):
    x = torch.tensor([inputs["prompt"]] * len(inputs["rationales"]))
    return x, torch.tensor(inputs["rationales"]), torch.tensor([inputs["answer"]] * len(x))


def _logp(model, context, completion):
    """log π(completion | context), from the logits of every token."""
    rows = torch.cat([context, completion], dim=1)
    targets = torch.full_like(rows, -100)
    targets[:, context.shape[1] - 1 : -1] = completion
    logits = model(input_ids=rows, use_cache=False).logits
    return -_cross_entropy(logits.flatten(0, 1), targets.flatten()).view_as(rows).sum(1)


def _head(hidden, weight, targets, chunked):
    def logps(hidden, targets):
        return -_cross_entropy(F.linear(hidden, weight), targets)

    if not chunked:
        return logps(hidden, targets)
    parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.cat([checkpoint(logps, *part, use_reentrant=False) for part in parts])


def _cross_entropy(logits, targets):
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="none")


def _advantage(rationale_logp, answer_logp, reference_logp):
    reward = answer_logp - BETA * (rationale_logp - reference_logp)
    return (reward - reward.mean()) * len(reward) / (len(reward) - 1)


def _results(model, loss):
    return {
        "loss": loss.detach(),
        "gradient": lambda: torch.cat([parameter.grad.flatten() for parameter in model.parameters()]),
    }


def step_inputs(config, sizes, dtype):
    P, R, A, K = sizes
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**config, tie_word_embeddings=False, initializer_range=0.05)).to(dtype)
    reference = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.002 * torch.randn_like(parameter)
    tokens = torch.randint(config["vocab_size"], (P + A + K * R,)).tolist()
    rationales = [tokens[P + A + k * R :][:R] for k in range(K)]
    return {
        "model": model,
        "reference": reference,
        "tree": TreeModel(model),
        "reference tree": TreeModel(reference),
        "prompt": tokens[:P],
        "answer": tokens[P : P + A],
        "rationales": rationales,
    }


def exact(inputs):
    lifted = inputs | {name: copy.deepcopy(inputs[name]).double() for name in ("model", "reference")}
    with Float64():
        results = padded_rewrite(lifted, chunked=True)
    return {"loss": results["loss"].float(), "gradient": results["gradient"]().float()}


def fastest_micro_batch(inputs):
    """Rationales at a time by which log-probs from full logits, and their gradients, take least for each."""
    x, z, _ = _padded(inputs)

    def seconds(size):
        start = time.perf_counter()
        _logp(inputs["model"], x[:size], z[:size]).sum().backward()
        return (time.perf_counter() - start) / size

    seconds(1)
    return min([size for size in (1, 4, 16) if size <= len(z)], key=seconds)


def flops(inputs):
    """Each token once through the trunk and each scored token once through the head, policy and reference."""
    config = inputs["model"].config
    P, A, K = (len(inputs[name]) for name in ("prompt", "answer", "rationales"))
    R = len(inputs["rationales"][0])
    T, M = P + K * (R + A), K * (R + A)
    trunk = sum(p.numel() for layer in inputs["model"].model.layers for p in layer.parameters())
    pairs = P * (P + 1) // 2 + K * sum(range(P + 1, P + R + A + 1))
    attention = 18 * config.head_dim * pairs * config.num_attention_heads * config.num_hidden_layers
    return 8 * trunk * T + 8 * config.hidden_size * config.vocab_size * M + attention


def step_case(question, config, sizes, dtype, axes=None):
    inputs = step_inputs(config, sizes, dtype)
    micro_batch = fastest_micro_batch(inputs)
    return Case(
        question=question,
        name=f"{case_name(sizes, dtype)}, published by {micro_batch}",
        dtype=dtype,
        inputs=inputs,
        exact=exact(inputs),
        contestants={
            "ours": ours,
            "published": partial(published, micro_batch=micro_batch),
            "padded rewrite": padded_rewrite,
            "padded rewrite, chunked": partial(padded_rewrite, chunked=True),
        },
        flops=flops(inputs),
        axes=axes or {},
    )


def case_name(sizes, dtype):
    return " ".join(f"{name}={size}" for name, size in zip("PRAK", sizes, strict=True)) + f" {str(dtype)[6:]}"


def cases(size):
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model, every = CASES["toy" if dtype == torch.bfloat16 and bf16_is_emulated() else size]
        found += [(model, sizes, dtype) for sizes in every]
    return found


def pytest_generate_tests(metafunc):
    config = metafunc.config
    size = "toy" if config.getoption("toy") else "full" if config.getoption("full") else "default"
    found = cases(size)
    metafunc.parametrize(("config", "sizes", "dtype"), found, ids=[case_name(*case[1:]) for case in found])


def test_step(config, sizes, dtype, measured):
    measured(step_case("step", config, sizes, dtype))
