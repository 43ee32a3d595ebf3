"""How a model is spread over GPUs: what each then holds, and what an update takes by a roofline.

Seconds are those of the slowest of products, memory and links, each at its reachable rate. They are a bound that good
code comes near, and no measurement: launches, waiting for the longest rationale and the host are not in them.

Assumed: gradients are reduced after every micro-batch, collectives run beside the products, sampling reads its weights
and keys from memory once for each token of all sequences that grow at once, tensor parallelism splits activations too
(sequence parallelism) and the vocabulary of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product

from latro.plan.machine import ATTENTION, LINKS, MEMORY, PRODUCTS, USABLE, Machine
from latro.plan.memory import HALF, MIXED, Precision, activations, cast_weights, exponentials
from latro.plan.options import REFERENCES
from latro.plan.shape import Shape
from latro.plan.work import PROCEDURES, Batch, Pass, flops, head_flops, ours

HALF_BYTES, FLOAT_BYTES, ADAM_BYTES = 2, 4, 8
# AdamW reads a parameter, its gradient and two moments, and writes all but the gradient, in float32.
OPTIMIZER_TRAFFIC = 28
# Saved activations are written and read going forward, and again with their gradients going backward.
ACTIVATION_TRAFFIC = {False: 2, True: 6}
# Bytes for each logit. Ours: products in float32 strips written and read, exponentials written and read by two
# products. Full logits: bfloat16 and float32 copies, log-softmax; their gradients.
OUR_LOGIT_TRAFFIC = {False: 8, True: 14}
FULL_LOGIT_TRAFFIC = {False: 16, True: 36}


@dataclass(frozen=True)
class Update:
    """What an update is to do, and what is decided about it."""

    shape: Shape
    batch: Batch
    prompts: int
    reference: str = "kept"
    budget: int = 1 << 30  # for exponentials, as latro_kernels.get_memory_budget() has it
    sequences: int = 256  # that grow at once while sampling, as rollout_batch_size has it
    rollout_gpus: int = 0  # others, for sampling; 0: each process samples its own

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise ValueError(f"plan: --prompts must be at least 1, got {self.prompts}")
        if self.reference not in REFERENCES:
            raise ValueError(f"plan: --reference must be one of {', '.join(REFERENCES)}, got {self.reference!r}")
        if self.reference == "adapter off" and not self.shape.adapter:
            raise ValueError("plan: --reference 'adapter off' needs --lora, got a model that is trained whole")
        if self.sequences < 1:
            raise ValueError(f"plan: --rollout_batch_size must be at least 1, got {self.sequences}")
        for name, count in (("rollout_gpus", self.rollout_gpus), ("memory_budget", self.budget)):
            if count < 0:
                raise ValueError(f"plan: --{name} must be at least 0, got {count}")


@dataclass(frozen=True)
class Layout:
    sharded: bool  # FSDP2 or ZeRO-3; else every GPU holds all (DDP)
    tensor: int = 1  # GPUs of a machine that share each product
    checkpoint: bool = False

    @property
    def name(self) -> str:
        parts = ["FSDP2" if self.sharded else "DDP"]
        parts += [f"tensor {self.tensor}"] if self.tensor > 1 else []
        return ", ".join([*parts, "checkpointing"] if self.checkpoint else parts)

    def is_ours(self, update: Update) -> bool:
        """Whether the trainer of this package runs it."""
        return self.tensor == 1 and update.reference != "offloaded"


@dataclass(frozen=True)
class Estimate:
    """Of one GPU. micro_batch counts prompts; 0: not even one fits."""

    layout: Layout
    micro_batch: int
    memory: dict[str, int]  # bytes
    seconds: dict[str, float]  # of an update, in pieces that come one after another
    bounds: dict[str, float]  # of learning: what products, memory and links would take by themselves

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def bound(self) -> str:
        return max(self.bounds, key=self.bounds.__getitem__)


def layouts(machine: Machine) -> list[Layout]:
    tensors = [size for size in (1, 2, 4, 8) if size <= machine.per_machine and machine.gpus % size == 0]
    return [
        Layout(sharded, tensor, checkpoint)
        for tensor, sharded, checkpoint in product(tensors, (False, True), (False, True))
        if not (sharded and machine.gpus == tensor)
    ]


def estimates(update: Update, machine: Machine) -> list[Estimate]:
    """Of every layout: those that fit by time, then the others by what they lack."""
    found = [estimate(update, machine, layout) for layout in layouts(machine)]
    return sorted(found, key=lambda one: (not one.micro_batch, one.total if one.micro_batch else _sum(one.memory)))


def estimate(update: Update, machine: Machine, layout: Layout) -> Estimate:
    most = _prompts_of_group(update, machine, layout)
    room = int(machine.gpu.memory * USABLE)
    fits = [size for size in _sizes(most) if _sum(memory(update, machine, layout, size)) <= room]
    size = max(fits, default=0)
    held = memory(update, machine, layout, size or 1)
    seconds, bounds = learning_seconds(update, machine, layout, size or 1)
    return Estimate(layout, size, held, seconds | rollout_seconds(update, machine, layout), bounds)


def _sum(pieces: dict[str, int]) -> int:
    return sum(pieces.values())


def _sizes(most: int) -> list[int]:
    return sorted({most, *(2**n for n in range(most.bit_length()))})


def _prompts_of_group(update: Update, machine: Machine, layout: Layout) -> int:
    groups = machine.gpus // layout.tensor
    return -(-update.prompts // groups)


def precision_of(update: Update, layout: Layout) -> Precision:
    return HALF if layout.sharded or update.shape.adapter else MIXED


def memory(update: Update, machine: Machine, layout: Layout, micro_batch: int) -> dict[str, int]:
    """Bytes on one GPU by piece."""
    shape, precision = update.shape, precision_of(update, layout)
    shards = machine.gpus // layout.tensor if layout.sharded else 1
    frozen = shape.base * HALF_BYTES if shape.adapter else 0
    pieces = {
        "weights": (frozen + shape.trained * FLOAT_BYTES) // shards,
        "gradients": shape.trained * FLOAT_BYTES // shards,
        "AdamW": shape.trained * ADAM_BYTES // shards,
    }
    if layout.sharded:
        # The root's: embedding and head. A layer and the next one, and the gradient of one on its way.
        root = shape.base - sum(layer.parameters for layer in shape.layers)
        pieces["gathered weights"] = (root + 3 * max(layer.parameters for layer in shape.layers)) * HALF_BYTES
    if update.reference == "kept":  # as the model was loaded
        pieces["reference"] = shape.base * (HALF_BYTES if shape.adapter else FLOAT_BYTES) // shards
    if update.reference == "offloaded":
        pieces["reference"] = 2 * max(layer.parameters for layer in shape.layers) * HALF_BYTES
    if layout.sharded and not update.rollout_gpus:
        pieces["copy that samples"] = shape.base * HALF_BYTES
    _, work = ours(update.batch)
    tokens = micro_batch * work.tokens
    learning = {
        "activations": activations(shape, precision, tokens, checkpoint=layout.checkpoint)
        + sum(cast_weights(shape, layer, precision) for layer in shape.layers),
        "head": _head_bytes(update, work, precision, micro_batch),
    }
    sampling = {"keys and values": 0 if update.rollout_gpus else _cache_bytes(update, machine, layout)}
    pieces |= learning if _sum(learning) > _sum(sampling) else sampling  # never at the same time
    return {name: size // layout.tensor for name, size in pieces.items() if size}


def _head_bytes(update: Update, work: Pass, precision: Precision, micro_batch: int) -> int:
    """Exponentials of as many prompts as the budget holds, and the gradients that are made with the loss."""
    shape = update.shape
    kept = min(update.budget, micro_batch * exponentials(shape, work, precision, update.budget))
    of_weight = 0 if shape.adapter else shape.D * shape.V * FLOAT_BYTES
    return kept + of_weight + micro_batch * work.tokens * shape.D * precision.products


def _cache_bytes(update: Update, machine: Machine, layout: Layout) -> int:
    P, R, _, K = update.batch.sizes
    rows = min(update.sequences, _prompts_of_group(update, machine, layout) * K)
    return update.shape.cache * HALF_BYTES * (P * -(-rows // K) + rows * R)


def learning_seconds(
    update: Update, machine: Machine, layout: Layout, micro_batch: int
) -> tuple[dict[str, float], dict[str, float]]:
    """What an update takes once its rationales are there, and what each resource would take of it alone."""
    prompts = _prompts_of_group(update, machine, layout)
    batches = -(-prompts // micro_batch)
    each = pieces_of_prompt("ours", update, machine, layout)
    compute = {name: prompts * seconds for name, seconds in each.items()}
    network = batches * _micro_batch_network(update, machine, layout) + prompts * _prompt_network(
        update, machine, layout
    )
    busy = sum(compute.values())
    seconds = compute | {"waiting for links": max(0.0, network - busy)}
    seconds["optimizer"] = _optimizer_seconds(update, machine, layout)
    seconds["links, once"] = _update_network(update, machine, layout)
    elementwise = compute["elementwise"] + seconds["optimizer"]
    bounds = {
        "products": busy - compute["elementwise"],
        "memory": elementwise,
        "links": network + seconds["links, once"],
    }
    return seconds, bounds


def pieces_of_prompt(procedure: str, update: Update, machine: Machine, layout: Layout) -> dict[str, float]:
    """Seconds of a GPU's products and memory for a prompt with all its rationales, after sampling."""
    shape, gpu, is_ours = update.shape, machine.gpu, procedure == "ours"
    traffic = OUR_LOGIT_TRAFFIC if is_ours else FULL_LOGIT_TRAFFIC
    found = dict.fromkeys(("linear", "attention", "head", "elementwise"), 0.0)
    for work in PROCEDURES[procedure](update.batch):
        if work.name == "reference" and update.reference == "none":
            continue
        counted = flops(shape, work, checkpoint=layout.checkpoint)
        if is_ours and work.learns:
            counted["head"] += remade_head_flops(update, work)
        found["linear"] += counted["linear"] / (gpu.flops * PRODUCTS)
        found["attention"] += counted["attention"] / (gpu.flops * ATTENTION)
        found["head"] += counted["head"] / (gpu.flops * PRODUCTS)
        saved = activations(shape, precision_of(update, layout), work.tokens, checkpoint=False)
        logits = work.head_rows * shape.V * traffic[work.learns]
        found["elementwise"] += (saved * ACTIVATION_TRAFFIC[work.learns] + logits) / (gpu.bandwidth * MEMORY)
    return {name: seconds / layout.tensor for name, seconds in found.items()}


def remade_head_flops(update: Update, work: Pass) -> int:
    """Logits made again, of a prompt whose exponentials are more than the budget."""
    of_row = update.shape.V * HALF_BYTES
    over = 0 if update.shape.adapter else max(0, work.head_rows - update.budget // of_row)
    return head_flops(update.shape, over, learns=False)


def _micro_batch_network(update: Update, machine: Machine, layout: Layout) -> float:
    """Weights gathered forward and backward, and gradients scattered, in bfloat16; and the reference's."""
    shape = update.shape
    weights = shape.base * HALF_BYTES // layout.tensor
    gather = partial(machine.gather_seconds, every=layout.tensor)
    found = 0.0
    if layout.sharded:
        found += 2 * gather(weights) + gather(shape.trained * HALF_BYTES // layout.tensor)
    if layout.sharded and update.reference in ("kept", "adapter off"):
        found += gather(weights)
    if update.reference == "offloaded":
        found += weights / machine.gpu.host
    return found


def _prompt_network(update: Update, machine: Machine, layout: Layout) -> float:
    """Of tensor parallelism: two sums in each layer forward, two backward, and what is done again."""
    if layout.tensor == 1:
        return 0.0
    forwards = 2 if update.reference == "none" else 4
    sums = len(update.shape.layers) * (forwards + 2 + 2 * layout.checkpoint)
    size = ours(update.batch)[1].tokens * update.shape.D * HALF_BYTES
    return sums * machine.neighbour_sum_seconds(size, layout.tensor)


def _optimizer_seconds(update: Update, machine: Machine, layout: Layout) -> float:
    shards = machine.gpus if layout.sharded else layout.tensor
    return update.shape.trained * OPTIMIZER_TRAFFIC / shards / (machine.gpu.bandwidth * MEMORY)


def _update_network(update: Update, machine: Machine, layout: Layout) -> float:
    """Summed gradients of DDP; new weights for what samples, which one machine hands to others."""
    shape = update.shape
    weights = shape.base * HALF_BYTES
    found = 0.0
    if not layout.sharded:
        found += machine.sum_seconds(shape.trained * FLOAT_BYTES // layout.tensor, layout.tensor)
    if update.rollout_gpus:
        return found + weights / (machine.per_machine * machine.network) / LINKS
    return found + layout.sharded * machine.gather_seconds(weights // layout.tensor, layout.tensor)


def rollout_seconds(
    update: Update, machine: Machine, layout: Layout, *, shares_prefix: bool = True
) -> dict[str, float]:
    """Sampling: prompts read by products, then a token of every sequence at a time, by memory.

    shares_prefix: a prompt is read once, and its keys and values lie in memory once, for all its rationales.
    """
    shape, gpu = update.shape, machine.gpu
    P, R, _, K = update.batch.sizes
    tensor = _rollout_tensor(shape, machine) if update.rollout_gpus else layout.tensor
    groups = max(1, (update.rollout_gpus or machine.gpus) // tensor)
    prompts = -(-update.prompts // groups)
    rows = min(update.sequences, prompts * K)
    prefixes = -(-rows // K) if shares_prefix else rows
    size = FLOAT_BYTES if not layout.sharded and not shape.adapter and not update.rollout_gpus else HALF_BYTES
    read = (shape.base - shape.unread) * size
    read += shape.cache * HALF_BYTES * (prefixes * P + rows * R // 2)
    work = Pass("sampling", (), rows)
    products = flops(shape, work)["head"] + 2 * rows * sum(
        linear.size for layer in shape.layers for linear in layer.linears
    )
    token = max(read / (gpu.bandwidth * MEMORY), products / (gpu.flops * PRODUCTS)) / tensor
    waves = -(-prompts * K // rows)
    prefill = 2 * P * prompts * (1 if shares_prefix else K) * (shape.base - shape.unread - shape.D * shape.V)
    return {"reading prompts": prefill / (gpu.flops * PRODUCTS) / tensor, "sampling": token * R * waves}


def _rollout_tensor(shape: Shape, machine: Machine) -> int:
    """The fewest GPUs that leave half of their memory to keys and values."""
    fits = (
        size
        for size in (1, 2, 4, 8)
        if size <= machine.per_machine and shape.base * HALF_BYTES / size <= machine.gpu.memory / 2
    )
    return next(fits, machine.per_machine)
