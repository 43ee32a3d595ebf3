"""Bytes that a micro-batch needs on one device beside the parameters: what its backward pass reads, and the head.

Activations are those of eager transformers in layers like Llama's and Qwen3's, counted to the byte: what normalizations
(in float32), linear modules, activations and attention save. Other kinds of layers are counted as if they were such.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from latro.plan.shape import Layer, Norm, Shape
from latro.plan.work import PROCEDURES, Batch, Pass

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


@dataclass(frozen=True)
class Head:
    """Bytes of the head of one pass, gradients of its weight aside."""

    kept: int  # from its forward pass to its backward pass
    moments: tuple[tuple[int, int], ...]  # of its backward pass: bytes, and gradients of its weight beside them


def fused_head(shape: Shape, work: Pass, precision: Precision, budget: int) -> Head:
    kept = exponentials(shape, work, precision, budget)
    return Head(kept, ((kept + work.tokens * shape.D * precision.products, 1),))


def full_logits(shape: Shape, work: Pass, precision: Precision) -> Head:
    """Log-softmax in float32; its gradient and that of the logits; then the head's two products."""
    logits = work.head_rows * shape.V
    of_input = work.head_rows * shape.D * precision.products
    return Head(logits * FLOAT, ((3 * logits * FLOAT, 0), (logits * precision.products + of_input, 1)))


def waiting(procedure: str, shape: Shape, batch: Batch, precision: Precision, budget: int) -> list[tuple[Pass, Head]]:
    """Passes that a micro-batch, a prompt with all its rationales, makes before it goes backward through them."""
    works = [work for work in PROCEDURES[procedure](batch) if work.learns]
    if procedure == "ours":
        return [(work, fused_head(shape, work, precision, budget)) for work in works]
    return [(work, full_logits(shape, work, precision)) for work in works]


def backward_peak(
    shape: Shape, precision: Precision, passes: list[tuple[Pass, Head]], *, gradient: int = 0, is_first: bool = True
) -> int:
    """Most bytes that there are at once from the end of the forward passes to the last gradient, parameters aside.

    gradient: bytes of each parameter's gradient, 0 where they are counted elsewhere. is_first: there are no gradients
    of earlier micro-batches.
    """
    return max(_moments(shape, precision, passes, gradient, is_first))


def _moments(
    shape: Shape, precision: Precision, passes: list[tuple[Pass, Head]], gradient: int, is_first: bool
) -> Iterator[int]:
    """Bytes by moment, from the last pass's head to the first pass's embedding.

    A parameter's gradient waits until every pass has given its part; then it joins what earlier micro-batches left.
    """
    gradients = 0 if is_first else shape.trained * gradient
    saved = [activations(shape, precision, work.tokens, checkpoint=False) + head.kept for work, head in passes]
    of_head = 0 if shape.adapter else shape.D * shape.V * gradient
    of_embedding = 0 if shape.adapter else shape.unread * gradient or of_head
    for number, (work, head) in reversed(list(enumerate(passes))):
        is_last = number == len(passes) - 1
        stays = is_last and (is_first or number > 0)  # beside what there is; later ones join it
        made = 1 if is_last else 2  # a sum with what waits is one more
        held, flowing = sum(saved[: number + 1]) - head.kept, work.tokens * shape.D * precision.residual
        for size, weights in head.moments:
            yield held + size + gradients + weights * of_head
        yield held + flowing + gradients + made * of_head
        gradients += stays * of_head
        for layer in reversed(shape.layers):
            of_layer = gradient * (_adapter(layer) if shape.adapter else layer.parameters)
            yield held + flowing + gradients + of_layer
            gradients += stays * of_layer
            held -= work.tokens * saved_by_layer(shape, layer, precision)
        yield sum(saved[:number]) + flowing + gradients + made * of_embedding
        gradients += stays * of_embedding


def _adapter(layer: Layer) -> int:
    return sum(linear.size for linear in layer.linears if linear.trained)
