"""Log-probs of chosen tokens under a linear output head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast, overload

from torch import Tensor

from latro_kernels import _triton, checks
from latro_kernels._autograd import accumulator, autocast_operands, first_order
from latro_kernels.impl import choose
from latro_kernels.linear_logprobs import native, parallel, reference
from latro_kernels.linear_logprobs.head import Kernels
from latro_kernels.linear_logprobs.parallel import VocabularyShard

BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "native": native.linear_logprobs,
    "reference": reference.linear_logprobs,
}
KERNELS: dict[str, Kernels] = {"native": native.KERNELS}
if _triton.available:
    from latro_kernels.linear_logprobs import triton

    BACKENDS["triton"] = triton.linear_logprobs
    KERNELS["triton"] = triton.KERNELS


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: Literal[False] = False,
    shard: VocabularyShard | None = None,
    impl: str = "auto",
) -> Tensor: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: Literal[True],
    shard: VocabularyShard | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    shard: VocabularyShard | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(softcap(logit_scale * (hidden[rows] Wᵀ + bias)) / temperature)[targets] -> [M].

    hidden [T, D]; weight [V, D]; bias [V]; rows and targets [M], int64; a row may be scored any number of times.
    temperature: a number, or one for each scored token [M]. softcap(s) = softcap * tanh(s / softcap).
    entropy: also return that of each token's distribution [M], in nats, without a gradient.
    shard: weight and bias are this rank's rows of the whole, by whose numbers targets are given. Hidden, rows and
        targets are the same on all ranks of the group, and so are results and the gradient of hidden.

    The result is float32, or float64 for float64 inputs. Differentiable in hidden, weight and bias.
    """
    operator = "linear_logprobs"
    operands = head_operands(operator, hidden, weight, rows, targets, bias, temperature, softcap, logit_scale, shard)
    backend = choose(operator, impl, operands[0].device, operands[0].dtype)
    logps, found = backend_of(backend, shard)(*operands, entropy)
    return (logps, cast(Tensor, found)) if entropy else logps


def backend_of(name: str, shard: VocabularyShard | None) -> Callable[..., tuple[Tensor, Tensor | None]]:
    return BACKENDS[name] if shard is None else parallel.backend(KERNELS.get(name), shard)


def kernels_of(name: str, shard: VocabularyShard | None) -> Kernels:
    return KERNELS[name] if shard is None else parallel.sharded(KERNELS[name], shard)


def head_operands(
    operator: str,
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    shard: VocabularyShard | None,
) -> tuple[Any, ...]:
    """The arguments of a backend: checked, cast under autocast, and not differentiable twice."""
    checks.check_tensors(operator, hidden=hidden, weight=weight, **({} if bias is None else {"bias": bias}))
    hidden, weight, bias = autocast_operands(hidden, weight, bias)
    _check(operator, hidden, weight, rows, targets, bias, temperature, softcap, logit_scale, shard)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(accumulator(hidden.dtype))
    hidden, weight, bias = map(first_order, (hidden, weight, bias))
    return hidden, weight, rows, targets, bias, temperature, softcap, logit_scale


def _check(
    operator: str,
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    shard: VocabularyShard | None,
) -> None:
    checks.check_shape(operator, "hidden", hidden, ("T", "D"))
    checks.check_shape(operator, "weight", weight, ("V", hidden.shape[1]))
    checks.check_shape(operator, "rows", rows, ("M",))
    checks.check_shape(operator, "targets", targets, (rows.shape[0],))
    checks.check_floating(operator, "hidden", hidden)
    checks.check_like(operator, "weight", weight, "hidden", hidden)
    V = parallel.vocabulary_size(operator, weight, shard)
    for name, index, bound, letter in (("rows", rows, hidden.shape[0], "T"), ("targets", targets, V, "V")):
        checks.check_index(operator, name, index)
        checks.check_device(operator, name, index, "hidden", hidden)
        checks.check_range(operator, name, index, bound, letter)
    if bias is not None:
        checks.check_shape(operator, "bias", bias, (weight.shape[0],))
        checks.check_like(operator, "bias", bias, "hidden", hidden)
    if isinstance(temperature, Tensor):
        checks.check_shape(operator, "temperature", temperature, (rows.shape[0],))
        checks.check_floating(operator, "temperature", temperature)
        checks.check_device(operator, "temperature", temperature, "hidden", hidden)
        checks.check_all_positive(operator, "temperature", temperature)
    else:
        checks.check_positive(operator, "temperature", temperature)
    if softcap is not None:
        checks.check_positive(operator, "softcap", softcap)
    checks.check_number(operator, "logit_scale", logit_scale)
    checks.check_finite(operator, "hidden", hidden)
    checks.check_finite(operator, "weight", weight)
