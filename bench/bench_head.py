"""The output head: log-probs of T tokens and their gradients, forward and backward, against its bare matrix products.

ours: linear_logprobs, or fused_self_reward_loss where the loss is self-reward. definition: the same with
impl="reference". bare GEMMs: torch's products x Wᵀ, G W and, unless the weight is frozen, Gᵀ x alone, over the distinct
hidden rows, outputs allocated. The rivals' own kernels are for GPUs; here is what they run on a CPU.
Sizes: T tokens, all scored; D hidden; V vocabulary.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from bench.measure import Case, bf16_is_emulated, memory_budget
from latro_kernels import SelfReward, fused_self_reward_loss, linear_logprobs, pack_rationales
from latro_kernels.testing import peaked_head

SMALL_BUDGET = 64 * 2**20
GROUP = 16  # rationales of the prompt, where the loss is self-reward
BETA = 0.05
BLOCK = 64  # distinct hidden rows: making each one peaked costs eight logits in float64
EMULATED = (64, 128, 2048)  # where a bfloat16 product of 512x1024x32768 takes half a minute

SHAPES = {
    "toy": [(64, 32, 500)],
    "default": [(256, 1024, 32768)],
    "full": [(512, 1024, 32768), (2048, 512, 32000), (1024, 2048, 128256)],
}


def ours(hidden, weight, inputs, impl="auto", budget=None):
    with memory_budget(budget):
        return linear_logprobs(hidden, weight, inputs["rows"], inputs["targets"], impl=impl)


def trl(hidden, weight, inputs):
    from trl.kernels import ChunkedLogProbFunction

    # 32768 columns at a time, and nothing but log-probs, as its trainers call it.
    return ChunkedLogProbFunction.apply(hidden, weight, None, inputs["targets"], 1.0, 32768, None, 1.0, ())[0]


def liger(hidden, weight, inputs):
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return LigerFusedLinearPPOBase.chunk_forward(hidden[None], weight, inputs["targets"][None])[0]


def cut_cross_entropy(hidden, weight, inputs):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, inputs["targets"], reduction="none", impl="torch_compile")


def torch_head(hidden, weight, inputs, chunked=False):
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return -F.linear_cross_entropy(hidden, weight, inputs["targets"], reduction="none", options=options)


COMPILED = "CCE torch_compile"

# name: the contestant, and the module that it needs.
EAGER_RIVALS = {"torch linear_cross_entropy": (torch_head, "torch")}
RIVALS = EAGER_RIVALS | {COMPILED: (cut_cross_entropy, "cut_cross_entropy")}
SLOW_RIVALS = {"Liger": (liger, "liger_kernel.chunked_loss"), "TRL": (trl, "trl.trainer.utils")}
SLOWEST_RIVALS = {"torch linear_cross_entropy, chunked": (partial(torch_head, chunked=True), "torch")}


def missing(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a rival's import does, it is a reason
        return f"{type(error).__name__}: {error}"
    if module == "torch" and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} is older than 2.13"
    return None


@functools.cache
def absent() -> dict[str, str]:
    """Contestants that cannot run here, and why."""
    reasons = {name: missing(module) for name, (_, module) in (RIVALS | SLOW_RIVALS).items()}
    reasons["verl linear_cross_entropy"] = "needs ray, and transformers older than 5.11"
    reasons["FlexAttention"] = "has no backward pass on CPUs"
    return {name: reason for name, reason in reasons.items() if reason}


def weighted(logps, inputs):
    return (inputs["coefficient"] * logps).sum()


def self_reward(logps, inputs):
    return SelfReward(beta=BETA)(logps, inputs["scored"], {"ref_logps": inputs["ref_logps"]})


def through_logprobs(inputs, *, logprobs, loss, frozen):
    hidden, weight, leaves = _leaves(inputs, frozen)
    logps = logprobs(hidden, weight, inputs)
    return {"logps": logps.detach()} | _gradients(loss(logps, inputs), leaves)


def of_rows(hidden, weight, inputs, *, logprobs):
    """A rival's log-probs, of one hidden row for each scored token."""
    rows = inputs["rows"]
    return logprobs(hidden if len(rows) == len(hidden) else hidden[rows], weight, inputs)


def through_fused_loss(inputs, *, frozen, impl="auto", budget=None):
    hidden, weight, leaves = _leaves(inputs, frozen)
    with memory_budget(budget):
        out = fused_self_reward_loss(
            hidden, weight, inputs["scored"], ref_logps=inputs["ref_logps"], beta=BETA, impl=impl
        )
        return {"logps": out.logps} | _gradients(out.loss, leaves)


def bare_products(inputs, *, frozen):
    hidden, weight = inputs["hidden"][inputs["rows"].unique()], inputs["weight"]
    logits = hidden @ weight.T
    return {"logits": logits, "dX": logits @ weight} | ({} if frozen else {"dW": logits.T @ hidden})


def _leaves(inputs, frozen):
    hidden, weight = inputs["hidden"].detach().requires_grad_(), inputs["weight"].detach().requires_grad_(not frozen)
    return hidden, weight, [hidden] if frozen else [hidden, weight]


def _gradients(loss, leaves):
    return dict(zip(("dX", "dW"), torch.autograd.grad(loss, leaves), strict=False))


def head_inputs(shape, loss, dtype):
    """Peaked rows: each gives its target the probability 0.9. All values are exact in bfloat16, whatever the dtype."""
    T, D, V = shape
    block, weight, rows, targets = peaked_head(min(T, BLOCK), D, V, 8 * BLOCK, 0.9, seed=0, dtype=torch.bfloat16)
    aim = torch.zeros(len(block), dtype=torch.int64)
    aim[rows] = targets
    generator = torch.Generator().manual_seed(1)
    inputs = {"weight": weight.to(dtype)}
    if loss is weighted:
        inputs["rows"] = torch.arange(T)
        inputs["coefficient"] = torch.randn(T, generator=generator) / T
        tokens = T
    else:
        answer = max(1, T // GROUP // 8)
        rationale = [0] * (T // GROUP - answer)
        tree, scored = pack_rationales([[0]], [[rationale] * GROUP], [[0] * answer])
        tokens = len(tree.tokens)
        inputs["rows"] = scored.rows
        inputs["scored"] = replace(scored, targets=aim[scored.rows % len(aim)], plan=replace(scored.plan, min_vocab=V))
        inputs["ref_logps"] = -torch.rand(len(scored.rows), generator=generator)
    inputs["targets"] = aim[inputs["rows"] % len(aim)]
    inputs["hidden"] = block.repeat(-(-tokens // len(block)), 1)[:tokens].to(dtype)
    return inputs


@functools.lru_cache(maxsize=1)
def exact(shape, loss):
    """Float64, some rows of logits at a time: the log-probs, then by their gradients those of the operands."""
    inputs = head_inputs(shape, loss, torch.float64)
    hidden, weight = inputs["hidden"], inputs["weight"]
    chunks = [slice(start, start + 256) for start in range(0, len(inputs["rows"]), 256)]

    def logits(chunk):
        return hidden[inputs["rows"][chunk]] @ weight.T

    logps = torch.cat([-F.cross_entropy(logits(c), inputs["targets"][c], reduction="none") for c in chunks])
    logps.requires_grad_()
    (coefficients,) = torch.autograd.grad(loss(logps, inputs), logps)
    dX, dW = torch.zeros_like(hidden), torch.zeros_like(weight)
    for c in chunks:
        rows, slope = inputs["rows"][c], logits(c).softmax(-1).mul_(-coefficients[c, None])
        slope[torch.arange(len(rows)), inputs["targets"][c]] += coefficients[c]
        dX.index_add_(0, rows, slope @ weight)
        dW += slope.T @ hidden[rows]
    return {"logps": logps.detach().float(), "dX": dX.float(), "dW": dW.float()}


def contestants(shape, loss, frozen, dtype, rivals):
    T, _, V = shape
    budgets = {"ours": None}
    if not frozen and T * V * dtype.itemsize > SMALL_BUDGET:
        budgets["ours, 64 MB"] = SMALL_BUDGET
    heads = {name: partial(of_rows, logprobs=rival) for name, (rival, _) in rivals.items()}
    run = partial(through_logprobs, loss=loss, frozen=frozen)
    if loss is weighted:
        heads = {name: partial(ours, budget=budget) for name, budget in budgets.items()} | heads
        heads["definition"] = partial(ours, impl="reference")
        runs = {}
    else:
        runs = {name: partial(through_fused_loss, frozen=frozen, budget=budget) for name, budget in budgets.items()}
        runs["definition"] = partial(through_fused_loss, frozen=frozen, impl="reference")
    runs |= {name: partial(run, logprobs=head) for name, head in heads.items()}
    runs["bare GEMMs"] = partial(bare_products, frozen=frozen)
    return {name: run for name, run in runs.items() if name not in absent()}


def cases(size):
    """(shape, loss, frozen, dtype, rivals)"""
    full = size == "full"
    for dtype in (torch.float32, torch.bfloat16):
        small = dtype == torch.bfloat16 and size != "toy" and bf16_is_emulated()
        for shape in [EMULATED] if small else SHAPES[size]:
            # torch's chunks are meant for more tokens than hidden columns.
            slowest = SLOWEST_RIVALS if full and shape[0] > shape[1] else {}
            yield shape, weighted, False, dtype, RIVALS | SLOW_RIVALS | slowest
            yield shape, weighted, True, dtype, RIVALS if full else EAGER_RIVALS
            yield shape, self_reward, False, dtype, RIVALS if full else EAGER_RIVALS
            if full:
                yield shape, self_reward, True, dtype, EAGER_RIVALS


def pytest_generate_tests(metafunc):
    config = metafunc.config
    size = "toy" if config.getoption("toy") else "full" if config.getoption("full") else "default"
    found = list(cases(size))
    names = ("shape", "loss", "frozen", "dtype", "rivals")
    metafunc.parametrize(names, found, ids=[case_name(*case[:-1]) for case in found])


def case_name(shape, loss, frozen, dtype):
    kind = "log-probs" if loss is weighted else "self-reward"
    return f"{kind} {'x'.join(map(str, shape))}{' frozen' if frozen else ''} {str(dtype)[6:]}"


def test_head(shape, loss, frozen, dtype, rivals, measured):
    _, D, V = shape
    truth, inputs = exact(shape, loss), head_inputs(shape, loss, dtype)
    measured(
        Case(
            question="head",
            name=case_name(shape, loss, frozen, dtype),
            dtype=dtype,
            inputs=inputs,
            exact={name: value for name, value in truth.items() if name != "dW" or not frozen},
            contestants=contestants(shape, loss, frozen, dtype, rivals),
            flops=(4 if frozen else 6) * len(inputs["rows"].unique()) * D * V,
            floor="bare GEMMs",
            compiled=(COMPILED,),
        )
    )
