"""Bytes that a micro-batch needs on one device beside the parameters: what its backward pass reads, and the head.

Activations are those of eager transformers in layers like Llama's and Qwen3's, counted to the byte: what normalizations
(in float32), linear modules, activations and attention save. Other kinds of layers are counted as if they were such.
"""

from __future__ import annotations

from dataclasses import dataclass

from latro.plan.shape import Layer, Norm, Shape
from latro.plan.work import Batch, Pass, ours, padded, published

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Precision:
    """Bytes of a number: of parameters, in products, and of the residual stream."""

    weights: int
    products: int
    residual: int


SINGLE = Precision(4, 4, 4)
HALF = Precision(2, 2, 2)  # bfloat16 parameters: as FSDP2 gathers them, or frozen below adapters
MIXED = Precision(4, 2, 4)  # float32 parameters under autocast


def activations(shape: Shape, precision: Precision, tokens: int, *, checkpoint: bool) -> int:
    """What is saved between forward and backward; of checkpointed layers their input, and the largest one whole."""
    saved = [saved_by_layer(shape, layer, precision) for layer in shape.layers]
    of_layers = len(saved) * shape.D * precision.residual + max(saved) if checkpoint else sum(saved)
    return tokens * (of_layers + _saved_by_norm(shape, Norm(shape.D), precision) + shape.D * precision.products)


def saved_by_layer(shape: Shape, layer: Layer, precision: Precision) -> int:
    """Of each token."""
    of_norms = sum(_saved_by_norm(shape, norm, precision) for norm in layer.norms)
    inputs = {}
    for linear in layer.linears:
        # A linear that learns keeps its input. Autocast makes a copy for each that reads it; adapters have their own.
        copied = linear.own_input or (precision.residual > precision.products and linear.source in ("attention", "mlp"))
        if linear.trained:
            inputs[linear.name if copied else linear.source] = linear.inputs * linear.times
    # Queries, keys and values; the output too, where no learning linear keeps it as its input.
    heads = shape.H + 2 * shape.Hkv + shape.H * (shape.adapter > 0)
    numbers = sum(inputs.values()) + layer.activated + heads * shape.E
    return of_norms + numbers * precision.products + 2 * shape.H * FLOAT


def _saved_by_norm(shape: Shape, norm: Norm, precision: Precision) -> int:
    """The input in float32, one over the deviation, and for the weight, where it learns, the normalized input."""
    normalized = precision.residual if norm.groups == 1 else precision.products
    return norm.width * (FLOAT + normalized * (not shape.adapter)) + norm.groups * FLOAT


def cast_weights(shape: Shape, layer: Layer, precision: Precision) -> int:
    """What autocast keeps of a layer's float32 weights, in the dtype of products, until the backward pass."""
    learnt = sum(linear.size for linear in layer.linears if linear.trained) if shape.adapter else layer.weights
    is_cast = shape.adapter > 0 or precision.weights > precision.products
    return learnt * precision.products * is_cast


def exponentials(shape: Shape, work: Pass, precision: Precision, budget: int) -> int:
    """What the fused head keeps of a micro-batch; nothing where it is frozen."""
    return 0 if shape.adapter else min(budget, work.head_rows * shape.V * precision.products)


def full_logits(shape: Shape, rows: int) -> int:
    """Log-softmax, its gradient and that of the logits, in float32: the most that is there at once."""
    return 3 * rows * shape.V * FLOAT


def step_bytes(procedure: str, shape: Shape, batch: Batch, precision: Precision, budget: int) -> dict[str, int]:
    """Of a micro-batch by kind, gradients of parameters and the parameters themselves aside.

    A micro-batch is a prompt with all its rationales; for the authors' procedure it is one of `batch`'s size.
    """

    def saved(work: Pass) -> int:
        return activations(shape, precision, work.tokens, checkpoint=False)

    if procedure == "ours":
        _, work = ours(batch)
        head = exponentials(shape, work, precision, budget) + work.tokens * shape.D * precision.products
        return {"activations": saved(work), "head": head}
    if procedure == "padded rewrite":
        _, work = padded(batch)
        return {"activations": saved(work), "head": full_logits(shape, work.head_rows)}
    *_, first, second = published(batch)
    kept = first.head_rows * shape.V * FLOAT  # the log-softmax of x+z, while x+z+y goes backward
    return {"activations": saved(first) + saved(second), "head": kept + full_logits(shape, second.head_rows)}
