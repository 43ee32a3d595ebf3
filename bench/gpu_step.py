"""The whole update step of LaTRO on a GPU: layers of Qwen3-8B, all of its head, in bfloat16; without the optimizer.

Contestants are those of bench/bench_step.py. Two numbers of layers are measured, which give the step of the whole
model: the head counts once, a layer as often as there are. Packing and its copies are timed. "bare GEMMs" are the
products of the linear layers alone, as few as there can be: forward and backward for the policy and forward for the
reference, of each packed token, or for the head of each scored one. Errors are against eager float32: float64 would
not fit.
Sizes: P tokens of the prompt, K rationales of R tokens, each with an answer of A tokens.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn

from bench.bench_step import BETA, SMALL_MODEL, case_name, flops, padded_rewrite, published, step_inputs
from bench.measure import Case
from latro_kernels import pack_rationales

MODEL = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
MODEL |= {"intermediate_size": 12288, "vocab_size": 151936}
LAYERS = (2, 4)
WHOLE = 36  # layers of Qwen3-8B
TOY_LAYERS = (1, 2)

CASES = [  # (P, R, A, K), rationales that the published procedure takes at a time
    ((256, 200, 20, 16), (4, 16)),
    ((1024, 200, 20, 16), (4,)),
]
TOY = [((64, 16, 4, 4), (2,))]


def ours(inputs):
    device = inputs["model"].device
    packed = pack_rationales([inputs["prompt"]], [inputs["rationales"]], [inputs["answer"]])
    tree, scored = (part.to(device, non_blocking=True) for part in packed)
    ref_logps = inputs["reference tree"].logprobs(tree, scored)
    out = inputs["tree"](tree, scored, ref_logps=ref_logps, beta=BETA)
    out.loss.backward()
    return {"loss": out.loss.detach()}


def step(inputs, *, run):
    """Loss and gradients, which the model then no longer holds."""
    model = inputs["model"]
    results = {"loss": run(inputs)["loss"]} | gradients(model)
    model.zero_grad(set_to_none=True)
    return results


def on_device(inputs, *, run):
    """bench/bench_step.py's contestants make their token tensors on the default device."""
    with inputs["model"].device:
        return run(inputs)


def gradients(model):
    def joined(parameters):
        grads = [parameter.grad for parameter in parameters]
        return lambda: torch.cat([grad.flatten() for grad in grads])

    return {"layers": joined(model.model.layers.parameters()), "head": joined(model.lm_head.parameters())}


def bare_products(inputs):
    for weight, x, grad in inputs["products"]:
        for _ in ("policy", "reference"):
            x @ weight.T
        grad @ weight
        grad.T @ x
    return {}


def linear_layers(inputs, tokens, scored):
    """The weight of each, an input and a gradient of its output."""
    model, made = inputs["model"], {}

    def operand(*sizes):
        if sizes not in made:
            made[sizes] = torch.randn(*sizes, device=model.device).to(model.dtype)
        return made[sizes]

    found = []
    for linear in model.modules():
        if isinstance(linear, nn.Linear):
            rows = scored if linear is model.lm_head else tokens
            x, grad = operand(rows, linear.in_features), operand(rows, linear.out_features)
            found.append((linear.weight.detach(), x, grad))
    return found


def exact(inputs):
    """Eager float32, each layer's activations made again in the backward."""
    lifted = inputs | {name: copy.deepcopy(inputs[name]).float() for name in ("model", "reference")}
    model = lifted["model"].train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # transformers 5.23, 5.17
    loss = on_device(lifted, run=partial(padded_rewrite, chunked=True))["loss"]
    return {"loss": loss.float()} | {name: joined() for name, joined in gradients(model).items()}


def step_case(name, config, sizes, micro_batches, compiled, device):
    P, R, A, K = sizes
    torch.compiler.reset()
    with device:
        inputs = step_inputs(config, sizes, torch.bfloat16)
    truth = exact(inputs)
    if compiled:
        for layer in (*inputs["model"].model.layers, *inputs["reference"].model.layers):
            layer.compile()
    inputs["products"] = linear_layers(inputs, P + K * (R + A), K * (R + A))
    others = {"padded rewrite": padded_rewrite, "padded rewrite, chunked": partial(padded_rewrite, chunked=True)}
    if not compiled:
        others |= {f"published, {size} at a time": partial(published, micro_batch=size) for size in micro_batches}
    runs = {"ours": ours} | {other: partial(on_device, run=run) for other, run in others.items()}
    return Case(
        question="step",
        name=name,
        dtype=torch.bfloat16,
        inputs=inputs,
        exact=truth,
        contestants={who: partial(step, run=run) for who, run in runs.items()} | {"bare GEMMs": bare_products},
        flops=flops(inputs),
        floor="bare GEMMs",
        axes={"P": P, "K": K, "layers": config["num_hidden_layers"]},
    )


def cases(device, toy):
    """(name, a function that makes the case)"""
    model, numbers = (SMALL_MODEL, TOY_LAYERS) if toy else (MODEL, LAYERS)
    for compiled in (False,) if toy else (False, True):
        for sizes, micro_batches in TOY if toy else CASES[: 1 if compiled else None]:
            for layers in numbers:
                config = model | {"num_hidden_layers": layers}
                name = f"{case_name(sizes, torch.bfloat16)} {layers} layers{', compiled' if compiled else ''}"
                yield name, partial(step_case, name, config, sizes, micro_batches, compiled, device)


def whole_model(records):
    """Seconds of a step of the whole model for each case and contestant, from its two numbers of layers."""
    by_name = {}
    for record in records:
        if record["question"] == "step":
            layers = record["axes"]["layers"]
            by_name.setdefault(record["case"].replace(f" {layers} layers", ""), {})[layers] = record["contestants"]
    found = {}
    for name, numbers in by_name.items():
        if len(numbers) != 2:
            continue
        (few, of_few), (many, of_many) = sorted(numbers.items())
        times = {
            contestant: (of_few[contestant].get("seconds"), row.get("seconds")) for contestant, row in of_many.items()
        }
        found[name] = {
            contestant: more + (WHOLE - many) * (more - less) / (many - few)
            for contestant, (less, more) in times.items()
            if less and more
        }
    return found
