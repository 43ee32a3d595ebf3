"""The one place that chooses a backend: which kernels exist, which are ready here, and which one "auto" takes."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch

from latro_kernels import _gpu, _native, _triton

OPERATORS = ("tree_attention", "linear_logprobs", "self_reward", "fused_self_reward_loss")
BACKENDS = ("native", "triton", "reference")  # in order of preference
DEVICES = ("cpu", "cuda")

# Device types that a backend has kernels for. The reference is eager PyTorch, for every operator on every device.
# On a CPU, Triton's are for tests: they run in its interpreter, and "auto" never takes them.
KERNELS: dict[tuple[str, str], tuple[str, ...]] = {
    ("tree_attention", "native"): ("cpu",),
    ("tree_attention", "triton"): ("cpu", "cuda"),
    ("linear_logprobs", "native"): ("cpu", "cuda"),
    ("linear_logprobs", "triton"): ("cpu", "cuda"),
    ("self_reward", "native"): ("cpu", "cuda"),
    ("fused_self_reward_loss", "native"): ("cpu", "cuda"),
    ("fused_self_reward_loss", "triton"): ("cpu", "cuda"),
}

SINGLE = (torch.float32, torch.bfloat16)
HALF_AND_SINGLE = (*SINGLE, torch.float16)
LOWEST_CAPABILITY = 80  # of the GPUs that there are kernels for

# The dtypes that a kernel takes on a type of device, where it does not take every floating one.
DTYPES: dict[tuple[str, str, str], tuple[torch.dtype, ...]] = {
    (operator, backend, device_type): HALF_AND_SINGLE if backend == "triton" or device_type == "cuda" else SINGLE
    for (operator, backend), device_types in KERNELS.items()
    for device_type in device_types
    if operator != "self_reward"
}

# The largest head that a kernel takes, where not every one: the sums of more do not fit a GPU's registers.
LARGEST_HEAD: dict[tuple[str, str], dict[torch.dtype, int]] = {
    ("tree_attention", "triton"): {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256},
}


class Status(NamedTuple):
    ready: bool
    reason: str | None = None
    mend: str | None = None


READY = Status(True)


def exists(operator: str, backend: str, device_type: str) -> bool:
    """Whether such a kernel is part of the package, ready here or not."""
    return backend == "reference" or device_type in KERNELS.get((operator, backend), ())


def status(operator: str, backend: str, device_type: str) -> Status:
    """Whether the kernel can run in this process; if not, why, and what to do about it."""
    if not exists(operator, backend, device_type):
        return Status(False, f"{operator} has no {backend} kernel for {device_type}", "use impl='auto'")
    return _STATUS.get((backend, device_type), READY)


def refusal(
    operator: str, backend: str, device: torch.device, dtype: torch.dtype | None, head_size: int | None
) -> str | None:
    """What a backend asks for and is not given, and the mend; None when it takes everything."""
    taken = DTYPES.get((operator, backend, device.type), ())
    if taken and dtype and dtype not in taken:
        *others, last = map(str, taken)
        return f"takes {', '.join(others)} and {last}, got {dtype}; cast, or use impl='reference'"
    largest = LARGEST_HEAD.get((operator, backend), {}).get(dtype) if dtype else None
    if largest and head_size and head_size > largest:
        return f"takes heads of at most {largest} in {dtype}, got {head_size}; use impl='reference'"
    capability = LOWEST_CAPABILITY if backend == "reference" else _gpu.capability(device)
    if capability < LOWEST_CAPABILITY:
        return (
            f"needs a GPU of capability {LOWEST_CAPABILITY / 10} or later, got {capability / 10}; use impl='reference'"
        )
    built = status(operator, backend, device.type).ready and device.type == "cuda" and backend == "native"
    if built and not _native.serves(capability):
        return (
            f"was built for {', '.join(_native.cuda_arches)}, which does not serve capability {capability / 10}; "
            "set TORCH_CUDA_ARCH_LIST to it and install again"
        )
    return None


def choose(
    operator: str, impl: str, device: torch.device, dtype: torch.dtype | None = None, head_size: int | None = None
) -> str:
    """The backend to run. "auto" takes the first that is ready; a named one is ready or raises."""
    if impl == "auto":
        return _best(operator, device, dtype, head_size)
    if impl not in BACKENDS:
        names = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"{operator}: impl must be one of {names}, got {impl!r}")
    found = status(operator, impl, device.type)
    if not found.ready:
        raise RuntimeError(f"{operator}: impl={impl!r} cannot run on {device.type}: {found.reason}; {found.mend}")
    refused = refusal(operator, impl, device, dtype, head_size)
    if refused:
        raise RuntimeError(f"{operator}: impl={impl!r} {refused}")
    return impl


def _best(operator: str, device: torch.device, dtype: torch.dtype | None, head_size: int | None) -> str:
    missing = None
    for backend in BACKENDS[:-1]:
        in_interpreter = backend == "triton" and device.type == "cpu"
        if in_interpreter or refusal(operator, backend, device, dtype, head_size):
            continue
        found = status(operator, backend, device.type)
        if found.ready:
            return backend
        if exists(operator, backend, device.type):
            missing = missing or found
    if missing and not torch.compiler.is_compiling():
        _warn_once(operator, device.type, missing)
    return "reference"


def _warn_once(operator: str, device_type: str, found: Status) -> None:
    if found not in _warned:
        _warned.add(found)
        warnings.warn(
            f"latro_kernels: {operator} on {device_type} runs on reference: {found.reason}; {found.mend}", stacklevel=5
        )


def _status(backend: str, device_type: str) -> Status:
    fault = {"native": _native, "triton": _triton}[backend].fault(device_type)
    return Status(False, *fault) if fault else READY


# Read at import, so that choosing is a dictionary look-up that torch.compile can trace.
_STATUS = {
    (backend, device_type): _status(backend, device_type) for backend in ("native", "triton") for device_type in DEVICES
}
_warned: set[Status] = set()
