"""The head with its vocabulary cut over processes, as test_parallel_head.py has it: what each of four finds."""

from __future__ import annotations

import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

from latro_kernels import ANSWER, SelfReward, VocabularyShard, fused_self_reward_loss, linear_logprobs, memory
from latro_kernels.impl import status
from latro_kernels.self_reward import grouped
from latro_kernels.testing import peaked_head, random_batch

RANKS = 4
# A hidden row that is scored several times is a row for each, and those err together: a maximum takes more seeds than
# usual to settle.
SEEDS = range(20)
T, V, D, M = 40, 101, 24, 60
# Where the ranks' rows begin: as torch cuts them, and one of the ranks with a single row.
EVEN = {2: (0, 51), 4: (0, 26, 52, 78)}
ONE_ROW = {2: (0, 100), 4: (0, 1, 60, 61)}
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "everything": {"temperature": 1.3, "softcap": 5.0, "logit_scale": 2.0, "bias": True},
    "masked": {"bias": True},  # half the entries that are no targets, of no rank all
}


@dataclass(frozen=True)
class MeanLikelihood:
    """Someone else's objective: −Σ over prompts of log mean_k π(y | x, z_k)."""

    couples = "group"

    def __call__(self, logps, scored, extras):
        in_answer = scored.kind[scored.segment] == ANSWER
        answers = logps.new_zeros(len(scored.prompt)).index_add(
            0, scored.rationale[scored.segment], torch.where(in_answer, logps, 0)
        )
        return -sum(answers[scored.prompt == n].exp().mean().log() for n in range(int(scored.prompt.max()) + 1))


OBJECTIVES = {
    "floor": SelfReward(beta=0.1, floor=-6.0),
    "batch": SelfReward(beta=0.0, scale="batch"),
    "mean": MeanLikelihood(),
}


@dataclass(frozen=True)
class Case:
    """A call of linear_logprobs; with an objective, of fused_self_reward_loss."""

    begins: tuple[int, ...]
    options: str = "everything"
    p: float = 0.99  # of the targets, without an objective
    objective: str | None = None
    dtype: torch.dtype = torch.float64
    impl: str = "reference"
    wanted: tuple[str, ...] = ("hidden", "weight", "bias")
    budget: int | None = None  # bytes of exponentials that are kept
    group_sizes: tuple[int, ...] = (3, 2, 4, 2)
    denominator: float | None = None
    scale: float = 1.0  # of the loss, as a GradScaler's
    seed: int = 0

    def __str__(self):
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default)

    def inputs(self):
        """The whole head, where it is scored and for what, and options."""
        options = dict(OPTIONS[self.options])
        bias = torch.linspace(-1, 1, V, dtype=torch.float64).to(self.dtype) if options.pop("bias", False) else None
        if self.objective is None:
            hidden, weight, *where = peaked_head(T, D, V, M, self.p, self.seed, self.dtype)
            if self.options == "masked":
                bias[torch.tensor(sorted({*range(V - 1)} - {*where[1].tolist()}))[::2]] = -torch.inf
        else:
            batch = random_batch(self.seed, V, self.group_sizes, prompt_length=3, rationale_length=5, answer_length=2)
            tree, *where = batch.pack(ends=V - 1)
            generator = torch.Generator().manual_seed(self.seed)
            hidden, weight = (
                torch.randn(size, D, generator=generator, dtype=torch.float64).div(2).to(self.dtype)
                for size in (len(tree.tokens), V)
            )
        return {"hidden": hidden, "weight": weight, "bias": bias}, where, options

    def results(self, shard=None, own_rows=False, **other):
        """Values and gradients, with impl or dtype other than the case's own; of the whole head, or of a shard.

        own_rows: each token has a hidden row of its own.
        """
        impl, dtype = other.get("impl", self.impl), other.get("dtype", self.dtype)
        tensors, where, options = self.inputs()
        begin, end = (0, V) if shard is None else (shard.begin, shard.end)
        for name, tensor in tensors.items():
            if tensor is not None:
                own = tensor if name == "hidden" else tensor[begin:end]
                tensors[name] = own.to(dtype, copy=True).requires_grad_(name in self.wanted)
        hidden, weight, bias = tensors.values()
        if own_rows:
            hidden, where = hidden[where[0]], (torch.arange(M), where[1])
        options.update(bias=bias, entropy=True, impl=impl, shard=shard)
        with budget_of(self.budget):
            if self.objective is None:
                logps, entropy = linear_logprobs(hidden, weight, *where, **options)
                loss = (logps.double() * torch.linspace(-2, 1, M, dtype=torch.float64)).sum()
            else:
                ref_logps = torch.linspace(-4, 0, len(where[0].rows), dtype=torch.float64)
                options.update(objective=OBJECTIVES[self.objective], denominator=self.denominator)
                out = fused_self_reward_loss(hidden, weight, *where, ref_logps=ref_logps, **options)
                loss, logps, entropy = out.loss, out.logps, out.entropy
            (loss * self.scale).backward()
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        grads = {f"{name} grad": given[name].grad for name in self.wanted if name in given}
        return {"loss": loss.detach(), "logps": logps.detach(), "entropy": entropy, **grads}


@contextmanager
def budget_of(budget):
    before = grouped.FEWEST_TOKENS, memory._budget
    if budget is not None:
        grouped.FEWEST_TOKENS, memory._budget = 1, budget
    try:
        yield
    finally:
        grouped.FEWEST_TOKENS, memory._budget = before


EXACT = [
    Case(begins, **what)
    for begins in (*EVEN.values(), *ONE_ROW.values())
    for what in [
        *({"options": options, "p": 0.9999} for options in OPTIONS),
        {"p": 0.5, "wanted": ("hidden",)},
        {"p": 0.99, "wanted": ("weight", "bias")},
        {"options": "masked"},
        *({"objective": objective} for objective in OBJECTIVES),
    ]
]
SINGLE_AND_HALF = [
    Case(begins, dtype=dtype, **what)
    for dtype in (torch.float32, torch.bfloat16)
    for begins, what in [
        *((EVEN[2], {"impl": "native", "options": "plain", "p": p}) for p in (0.5, 0.99, 0.9999)),
        *((ONE_ROW[4], {"impl": "native", "p": p}) for p in (0.5, 0.99, 0.9999)),
        (EVEN[4], {"impl": "reference"}),
        (EVEN[4], {"impl": "native", "options": "masked"}),
        (EVEN[4], {"impl": "native", "wanted": ("hidden",)}),
        (EVEN[2], {"impl": "native", "wanted": ("hidden",), "objective": "floor"}),
        (EVEN[2], {"impl": "native", "wanted": ("weight", "bias"), "objective": "floor"}),
        (EVEN[4], {"impl": "native", "objective": "floor"}),
        *((EVEN[4], {"impl": "native", "objective": "floor", "budget": budget}) for budget in (0, 16_000)),
        (EVEN[4], {"impl": "native", "objective": "mean", "budget": 0}),
    ]
]
TRITON = [
    Case(EVEN[2], impl="triton", dtype=torch.float32),
    Case(EVEN[2], impl="triton", dtype=torch.float16, objective="floor", scale=1024.0),
]
# Two data ranks with other groups, and each of two tensor ranks.
DATA = [
    Case(EVEN[2], objective="floor", group_sizes=sizes, denominator=9.0, seed=seed)
    for seed, sizes in enumerate([(3, 2), (4,)])
]


def of_seeds(case):
    return [replace(case, seed=seed) for seed in SEEDS]


def cases():
    yield from EXACT
    for case in SINGLE_AND_HALF:
        if status("linear_logprobs", case.impl, "cpu").ready:
            yield from of_seeds(case)
    if status("linear_logprobs", "triton", "cpu").ready:
        yield from TRITON


def run(rank, folder):
    """One of the processes: writes FOLDER/rank-N.pt."""
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, in Triton's interpreter, of entries that are masked
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    groups = {2: mesh.get_group("tensor"), 4: dist.group.WORLD}
    shards = {
        begins[W]: VocabularyShard(group, begins[W][dist.get_rank(group)], V)
        for W, group in groups.items()
        for begins in (EVEN, ONE_ROW)
    }
    found = {case: case.results(shards[case.begins]) for case in cases()}
    found["data"] = DATA[mesh.get_local_rank("data")].results(shards[EVEN[2]])
    for name in ("weight grad", "bias grad"):
        dist.all_reduce(found["data"][name], group=mesh.get_group("data"))
    weight = torch.arange(V * D).view(V, D)
    found["dtensors"] = []
    for over, placements in ((mesh, [Replicate(), Shard(0)]), (init_device_mesh("cpu", (4,)), [Shard(0)])):
        cut = distribute_tensor(weight, over, placements)
        shard = VocabularyShard.of(cut)
        found["dtensors"].append(torch.equal(cut.to_local(), weight[shard.begin : shard.end]))
    try:
        VocabularyShard(groups[4], (0, 26, 26, 78)[rank], V)
    except ValueError as error:
        found["refused"] = str(error)
    torch.save(found, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()
