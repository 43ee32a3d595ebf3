"""Which tokens go through a model in an update, and the FLOPs of it.

A multiplication and an addition count 2. Counted are products: of tokens with weights, of queries with the keys that
they see and of attention with values, of scored rows with the head. Not counted are softmax, normalization,
activations, rotary embeddings and the optimizer, which bandwidth bounds.

Sizes: P, R, A tokens of a prompt, a rationale, an answer; K rationales of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

from latro.plan.shape import Layer, Shape

# Products of [queries, keys] with a head in attention: scores and output; their gradients; and the scores once more,
# which kernels make again in the backward pass where the definition keeps them.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS, REMADE_PRODUCTS = 2, 4, 1


@dataclass(frozen=True)
class Span:
    """Tokens at positions begin to end of a path, so many times."""

    begin: int
    end: int
    times: int = 1


@dataclass(frozen=True)
class Pass:
    """Tokens through a model, once forward and, where it learns from them, once backward."""

    name: str
    spans: tuple[Span, ...]
    head_rows: int
    learns: bool = False

    @property
    def tokens(self) -> int:
        return sum(span.times * (span.end - span.begin) for span in self.spans)

    def pairs(self, window: int | None = None) -> int:
        """Of a query and a key that it sees."""
        return sum(span.times * (_seen(span.end, window) - _seen(span.begin, window)) for span in self.spans)


def _seen(positions: int, window: int | None) -> int:
    """Keys that the first tokens of a path see, together."""
    growing = positions if window is None else min(positions, window)
    return growing * (growing + 1) // 2 + (positions - growing) * growing


@dataclass(frozen=True)
class Batch:
    """A prompt with its rationales and their answers, all of them equally long."""

    prompt: int
    rationale: int
    answer: int
    num_generations: int

    def __post_init__(self) -> None:
        for name in ("prompt", "rationale", "answer", "num_generations"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan: --{name} must be at least 1, got {getattr(self, name)}")

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.prompt, self.rationale, self.answer, self.num_generations


def ours(batch: Batch) -> list[Pass]:
    """Each prompt once, and a head row once for all tokens that it scores."""
    P, R, A, K = batch.sizes
    spans = Span(0, P), Span(P, P + R + A, K)
    rows = 1 + K * (R + A - 1)
    return [Pass("reference", spans, rows), Pass("policy", spans, rows, learns=True)]


def padded(batch: Batch) -> list[Pass]:
    """A row for each rationale, without padding as all are equally long, and logits of scored tokens alone."""
    P, R, A, K = batch.sizes
    spans = (Span(0, P + R + A, K),)
    rows = K * (R + A)
    return [Pass("reference", spans, rows), Pass("policy", spans, rows, learns=True)]


def published(batch: Batch) -> list[Pass]:
    """The authors' procedure: three passes to score and two to learn, with logits of every token."""
    P, R, A, K = batch.sizes
    xz, xzy = (Span(0, P + R, K),), (Span(0, P + R + A, K),)
    rows = K * (P + R), K * (P + R + A)
    return [
        Pass("policy x+z", xz, rows[0]),
        Pass("policy x+z+y", xzy, rows[1]),
        Pass("reference", xz, rows[0]),
        Pass("policy x+z, learnt from", xz, rows[0], learns=True),
        Pass("policy x+z+y, learnt from", xzy, rows[1], learns=True),
    ]


PROCEDURES = {"the authors'": published, "padded rewrite": padded, "ours": ours}


def flops(shape: Shape, work: Pass, *, checkpoint: bool = False) -> dict[str, int]:
    """By kind, with attention as kernels do it, and a head that keeps what its backward pass needs."""
    again = work.learns and checkpoint
    products = FORWARD_PRODUCTS
    if work.learns:
        products += BACKWARD_PRODUCTS + REMADE_PRODUCTS + again * FORWARD_PRODUCTS
    pairs = {layer.window: work.pairs(layer.window) for layer in shape.layers}
    return {
        "linear": linear_flops(shape, work.tokens, learns=work.learns, checkpoint=again),
        "attention": sum(attention_flops(shape, pairs[layer.window], products) for layer in shape.layers),
        "head": head_flops(shape, work.head_rows, learns=work.learns),
    }


def linear_flops(shape: Shape, tokens: int, *, learns: bool, checkpoint: bool = False) -> int:
    return 2 * tokens * sum(_products(shape, i, learns, checkpoint) for i in range(len(shape.layers)))


def _products(shape: Shape, index: int, learns: bool, checkpoint: bool) -> int:
    """Multiplications of a token with a layer's weights, forward, for gradients of inputs and of weights, and again."""
    layer = shape.layers[index]
    found = sum(linear.size for linear in layer.linears)
    if learns:
        # Below the first adapter nothing learns: what the first layer's attention reads needs no gradient, unless the
        # layer is checkpointed, for which transformers asks for that.
        is_leaf = index == 0 and shape.adapter > 0 and not checkpoint
        found += sum(linear.size for linear in layer.linears if not (is_leaf and linear.source == "attention"))
        found += sum(linear.size for linear in layer.linears if linear.trained)
    return found + _products_again(layer) * checkpoint


def _products_again(layer: Layer) -> int:
    """What a checkpointed layer does twice: all but a last product, whose result no gradient needs."""
    return sum(linear.size for linear in layer.linears) - layer.ends_in_product * layer.linears[-1].size


def attention_flops(shape: Shape, pairs: int, products: int) -> int:
    """Of one layer."""
    return 2 * products * pairs * shape.H * shape.E


def head_flops(shape: Shape, rows: int, *, learns: bool) -> int:
    """2, 4 with a frozen head, or 6 times rows, D and V."""
    products = 1 if not learns else 2 if shape.adapter else 3
    return 2 * products * rows * shape.D * shape.V
