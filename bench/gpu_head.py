"""The output head on a GPU: log-probs of M tokens and their gradients, against its bare matrix products, in bfloat16.

"ours" is what impl="auto" takes, beside it each backend by name; "cuda" makes its logits by the vendor's product or by
its own, which is there for Hopper. Others are those of bench/bench_head.py, with the kernels that they have for GPUs;
and whole logits compiled, and "chunks", which makes the logits of some tokens at a time and again in the backward.
What the bare products write has the operands' dtype, gradients that which the table names.
Sizes: M scored tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bench.bench_head import (
    GROUP,
    SMALL_BUDGET,
    liger,
    missing,
    of_rows,
    self_reward,
    through_fused_loss,
    through_logprobs,
    torch_head,
    trl,
    weighted,
)
from bench.bench_head import ours as logprobs_within
from bench.measure import Case
from bench.tune import tiles
from latro_kernels import _gpu, pack_rationales

SHAPES = [(3520, 4096, 128256), (2048, 1024, 151936)]  # Llama 3 8B with 16 rationales of 220 tokens; Qwen3 0.6B
TOY = (64, 32, 500)
CHUNK = 512  # tokens, as in verl
PROBABILITIES = (0.02, 0.999)  # of targets: random logits would make all of them 0, and hide the errors that matter
SOME_ROWS = 512


class Kind(NamedTuple):
    name: str
    loss: Callable
    products: int  # 1: the log-probs alone; 2: the weight is frozen; 3: all gradients


class Ours(NamedTuple):
    impl: str = "auto"
    budget: int | None = None
    product: str | None = None  # that makes the logits of impl="native": "vendor" or "fused"


OURS = {"ours": Ours(), "ours, 64 MB": Ours(budget=SMALL_BUDGET)}
VENDOR, FUSED = "ours, cuda (vendor)", "ours, cuda (fused)"
GPU_OURS = {VENDOR: Ours("native", product="vendor"), FUSED: Ours("native", product="fused")}
GPU_OURS |= {"ours, triton": Ours("triton")}


def compiled(hidden, weight, inputs):
    return _compiled_logps()(hidden, weight, inputs["targets"])


@functools.cache
def _compiled_logps():
    return torch.compile(_logps, dynamic=False)


def _logps(hidden, weight, targets):
    return F.linear(hidden, weight).float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def chunks(hidden, weight, inputs):
    parts = zip(hidden.split(CHUNK), inputs["targets"].split(CHUNK), strict=True)
    return torch.cat([checkpoint(_logps, x, weight, targets, use_reentrant=False) for x, targets in parts])


def cut_cross_entropy(hidden, weight, inputs):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, inputs["targets"], reduction="none", impl="cce")


def liger_scaled(hidden, weight, inputs):
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    given = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, inputs["targets"])
    return -(given[0] if isinstance(given, tuple) else given)


def quack_mean(inputs):
    """QuACK has no weights of tokens: the mean of the log-probs, of which it takes the gradient in its forward."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    hidden, weight = (inputs[name].detach().requires_grad_() for name in ("hidden", "weight"))
    loss = chunked_linear_cross_entropy(hidden, weight, inputs["targets"], reduction="mean")
    return dict(zip(("dX", "dW"), torch.autograd.grad(-loss, [hidden, weight]), strict=True))


# name: the contestant, and the module that it needs.
RIVALS = {
    "torch linear_cross_entropy": (torch_head, "torch"),
    "torch linear_cross_entropy, chunked": (partial(torch_head, chunked=True), "torch"),
    "Liger": (liger, "liger_kernel.chunked_loss"),
    "Liger scaled": (liger_scaled, "liger_kernel.ops.fused_linear_scaled_cross_entropy"),
    "TRL": (trl, "trl.trainer.utils"),
}
GPU_RIVALS = {"CCE": (cut_cross_entropy, "cut_cross_entropy"), "torch.compile": (compiled, "torch._inductor")}
QUACK = "quack.linear_cross_entropy"


@functools.cache
def absent():
    """Contestants that cannot run here, and why."""
    reasons = {name: missing(module) for name, (_, module) in (RIVALS | GPU_RIVALS).items()}
    reasons["QuACK"] = missing(QUACK)
    return {name: reason for name, reason in reasons.items() if reason}


def mean(logps, inputs):
    return logps.mean()


KINDS = [
    Kind("log-probs", weighted, 3),
    Kind("log-probs, frozen", weighted, 2),
    Kind("log-probs alone", weighted, 1),
    Kind("self-reward", self_reward, 3),
    Kind("self-reward, frozen", self_reward, 2),
]
MEAN = Kind("mean of log-probs", mean, 3)

# What ours should take at the first shape, as a multiple of the bare products' time. On an H200: 15.8 and 14.8 ms where
# three products take 14.15, and 9.9 ms where two take 9.45.
GOALS = {
    "log-probs": {"ours": 15.8 / 14.15, VENDOR: 15.8 / 14.15, FUSED: 14.8 / 14.15},
    "log-probs, frozen": {"ours": 9.9 / 9.45},
}


def without_gradient(inputs, *, logprobs):
    with torch.no_grad():
        return {"logps": logprobs(inputs["hidden"], inputs["weight"], inputs)}


def bare_products(inputs, *, products):
    """Of the distinct hidden rows: logits, then dX, then dW, as many as the case has."""
    hidden, weight = inputs["distinct"], inputs["weight"]
    logits = hidden @ weight.T
    if products > 1:
        logits @ weight
    if products > 2:
        logits.T @ hidden
    return {}


def head_inputs(shape, loss, device):
    """Every row is another and gives its target another probability."""
    M, D, V = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, device=device)

    inputs = {"weight": (normal(V, D) / D**0.5).bfloat16()}
    if loss is self_reward:
        answer = max(1, M // GROUP // 8)
        tree, scored = pack_rationales([[0]], [[[0] * (M // GROUP - answer)] * GROUP], [[0] * answer])
        T = len(tree.tokens)
        inputs["rows"] = scored.rows.to(device)
        inputs["ref_logps"] = -torch.rand(M, generator=generator, device=device)
    else:
        T = M
        inputs["rows"] = torch.arange(M, device=device)
        inputs["coefficient"] = normal(M) / M
    aim = torch.randint(V, (T,), generator=generator, device=device)
    inputs["targets"] = aim[inputs["rows"]]
    if loss is self_reward:
        plan = replace(scored.plan, min_vocab=V)
        inputs["scored"] = replace(scored.to(device), targets=inputs["targets"], plan=plan)
    low, high = PROBABILITIES
    p = low + (high - low) * torch.rand(T, 1, generator=generator, device=device)
    inputs["hidden"] = _peaked(normal(T, D) * 0.3, inputs["weight"].float(), aim, p).bfloat16()
    inputs["distinct"] = inputs["hidden"][: int(inputs["rows"].max()) + 1]
    return inputs


def _peaked(hidden, weight, aim, p):
    """Move each row towards the weight of its target until that has probability p [T, 1]."""
    for x, targets, wanted in zip(*(whole.split(SOME_ROWS) for whole in (hidden, aim, p.logit())), strict=True):
        of_target = weight[targets]
        for _ in range(8):  # the other logits move a little with it
            logits = x @ weight.T
            own = logits.gather(1, targets[:, None])
            others = logits.scatter(1, targets[:, None], -torch.inf).logsumexp(1, keepdim=True)
            x += (wanted + others - own) / of_target.square().sum(1, keepdim=True) * of_target
    return hidden


@functools.lru_cache(maxsize=1)
def inputs_and_exact(shape, loss, device):
    """The inputs; and in float64, some rows of logits at a time, the log-probs and then the gradients."""
    torch.compiler.reset()
    inputs = head_inputs(shape, loss, device)
    hidden, weight = inputs["hidden"].double(), inputs["weight"].double()
    parts = torch.arange(len(inputs["rows"]), device=device).split(SOME_ROWS)

    def logits(part):
        return hidden[inputs["rows"][part]] @ weight.T

    logps = torch.cat([-F.cross_entropy(logits(part), inputs["targets"][part], reduction="none") for part in parts])
    (coefficients,) = torch.autograd.grad(loss(logps.requires_grad_(), inputs), logps)
    dX, dW = torch.zeros_like(hidden), torch.zeros_like(weight)
    for part in parts:
        rows, slope = inputs["rows"][part], logits(part).softmax(-1).mul_(-coefficients[part, None])
        slope[torch.arange(len(part), device=device), inputs["targets"][part]] += coefficients[part]
        dX.index_add_(0, rows, slope @ weight)
        dW += slope.T @ hidden[rows]
    return inputs, {"logps": logps.detach().float(), "dX": dX.float(), "dW": dW.float()}


def run_ours(inputs, *, kind, impl, budget, product):
    with tiles("linear_logprobs.cuda", {"product": product}) if product else nullcontext():
        if kind.loss is self_reward:  # in place of the log-probs and then the loss
            return through_fused_loss(inputs, frozen=kind.products == 2, impl=impl, budget=budget)
        return through(inputs, kind=kind, logprobs=partial(logprobs_within, impl=impl, budget=budget))


def through(inputs, *, kind, logprobs):
    if kind.products == 1:
        return without_gradient(inputs, logprobs=logprobs)
    return through_logprobs(inputs, logprobs=logprobs, loss=kind.loss, frozen=kind.products == 2)


def contestants(kind, device):
    cuda = device.type == "cuda"
    ours = OURS | (GPU_OURS if cuda else {}) | {"definition": Ours("reference")}
    if kind.products < 3:  # nothing is kept for the backward pass
        del ours["ours, 64 MB"]
    if cuda and _gpu.capability(device) != 90:
        del ours[FUSED]
    rivals = RIVALS | (GPU_RIVALS if cuda else {})
    heads = {name: rival for name, (rival, _) in rivals.items() if name not in absent()} | {"chunks": chunks}
    runs = {name: partial(run_ours, kind=kind, **how._asdict()) for name, how in ours.items()}
    runs |= {
        name: partial(through, kind=kind, logprobs=partial(of_rows, logprobs=head)) for name, head in heads.items()
    }
    if kind.loss is mean:
        runs |= {"QuACK": quack_mean}
    return runs | {"bare GEMMs": partial(bare_products, products=kind.products)}


def head_case(name, shape, kind, device):
    _, D, V = shape
    inputs, truth = inputs_and_exact(shape, kind.loss, device)
    results = ("dX", "dW") if kind.loss is mean else ("logps", "dX", "dW")[: kind.products]
    return Case(
        question="head",
        name=name,
        dtype=torch.bfloat16,
        inputs=inputs,
        exact={result: truth[result] for result in results},
        contestants=contestants(kind, device),
        flops=2 * kind.products * len(inputs["distinct"]) * D * V,
        floor="bare GEMMs",
    )


def cases(device, toy):
    """(name, a function that makes the case)"""
    largest, *smaller = [TOY] if toy else SHAPES
    kinds = [*KINDS, MEAN] if device.type == "cuda" and "QuACK" not in absent() else KINDS
    found = [(largest, kind) for kind in kinds]
    found += [(shape, kind) for shape in smaller for kind in KINDS if kind.products == 3]
    for shape, kind in found:
        name = case_name(kind.name, shape)
        yield name, partial(head_case, name, shape, kind, device)


def case_name(kind, shape):
    return f"{kind} {'x'.join(map(str, shape))} bfloat16"


def goals(case):
    """contestant: times the floor's time."""
    return next((goals for kind, goals in GOALS.items() if case == case_name(kind, SHAPES[0])), {})
