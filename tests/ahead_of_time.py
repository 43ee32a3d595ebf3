"""Compiles the Triton kernels for a GPU that need not be there, and says what each of them takes of it.

python -m tests.ahead_of_time ARCH [--all]: prints a line of JSON for each compiled kernel, and in the end one with the
rows of tiles.json that were found for them. ARCH: 90 for 9.0.

The public operators run forward and backward on CPU tensors, but a launch only compiles, for the types, divisibility
and constants of that launch. So no value is right, and sizes are small: what is compiled does not depend on them.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

import torch

# Read when Triton is imported, and set by tests/conftest.py for the tests that run kernels.
os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.measure import memory_budget
from latro_kernels import PrefixTree, _gpu, fused_self_reward_loss, impl, linear_logprobs, tree_attention
from latro_kernels.linear_logprobs import strips
from latro_kernels.testing import random_batch

DTYPES = BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
SIZES = (64, 80, 96, 128, 256)  # of a head
Case = Callable[[], object]


class Driver:
    """As much of a CUDA driver as compiling asks for."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Compiler:
    """Compiles a kernel in place of its launch, and prints a record of it."""

    def __init__(self, arch: int):
        self.arch = arch
        self.case = ""
        self.known: set[str] = set()  # kernels and faults that were printed
        self.table: dict[str, list[dict]] = {}
        self.looked_up = _gpu._tile_sizes

    def launch(self, kernel, grid, *arguments, **constants):
        record = {"kernel": kernel.__name__, "arch": self.arch, "case": self.case, "constants": constants}
        log = io.StringIO()
        start = time.perf_counter()
        try:
            with redirect_stdout(log):
                compiled = kernel.warmup(*arguments, grid=tuple(grid), **constants)
        except Exception as error:  # whatever the compiler raises: the test names the kernel, and the next one is tried
            record["fault"] = innermost(error)
            known = f"{kernel.__name__} {record['fault']}"
        else:
            known = compiled.hash
            if known not in self.known:
                record |= {"seconds": time.perf_counter() - start, **properties(compiled, log.getvalue())}
        if known not in self.known:
            print(json.dumps(record, default=str), flush=True)
        self.known.add(known)

    def tile_sizes(self, kernel, *of):
        found = self.looked_up(kernel, *of)
        rows = self.table.setdefault(kernel, [])
        if found not in rows:
            rows.append(found)
        return found


def innermost(error: BaseException) -> str:
    """The compiler raises at the line of each call; the fault is at the last."""
    while error.__cause__:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def properties(compiled, log: str) -> dict:
    """What a kernel takes and is made of, from its compiled forms and what ptxas said of it."""

    def said(pattern: str) -> int:
        return int(re.search(pattern, log)[1])

    product = r"\btt\.dot .*: tensor<[\dx]+x(?:bf16|f16)\b"
    return {
        "registers": said(r"Used (\d+) registers"),
        "stack_bytes": said(r"(\d+) bytes stack frame"),
        "spilled_bytes": said(r"(\d+) bytes spill stores") + said(r"(\d+) bytes spill loads"),
        "shared_bytes": compiled.metadata.shared,  # Triton's kernels have no other
        "products": len(re.findall(product, compiled.asm["ttir"])),  # of 16-bit operands
        "products_without_wgmma": len(re.findall(product, compiled.asm["ttgir"])),  # of those
        "wgmma": "wgmma.mma_async" in compiled.asm["ptx"],
        "serialized": re.findall(r"wgmma.mma_async instructions are serialized due to (.*?) in ", log),
    }


def attention(
    E: int, dtype: torch.dtype, group: int = 4, T: int = 723, softcap=None, window=None, sinks: bool = False
) -> None:
    """Of two key heads. The tree is long enough for its first tiles of keys to be shared by programs."""
    tree = PrefixTree.pack([[0] * (T - 600), [0] * 300, [0] * 300], [-1, 0, 0])

    def operand(heads: int) -> torch.Tensor:
        return torch.zeros(T, heads, E, dtype=dtype).transpose(0, 1)

    def operator(q, k, v, sinks=None):
        return tree_attention(q, k, v, tree, softcap=softcap, window=window, sinks=sinks, impl="triton")

    operands = [operand(2 * group), operand(2), operand(2)]
    forward_and_backward(operator, *operands, *[torch.zeros(2 * group)] * sinks)


def head(
    dtype: torch.dtype, product: str = "vendor", D: int = 1024, frozen: bool = False, softcap=None, biased: bool = False
) -> None:
    """With room for half of the exponentials, so that the backward pass makes the others again."""
    T, M, V = 50, 40, 650
    rows, targets = torch.randint(T, (M,)), torch.randint(V, (M,))
    hidden, weight = torch.zeros(T, D, dtype=dtype), torch.zeros(V, D, dtype=dtype)
    bias = torch.zeros(V, dtype=dtype) if biased else None
    trained = [] if frozen else [weight, bias] if biased else [weight]

    def operator(hidden, weight=weight, bias=bias):
        return linear_logprobs(hidden, weight, rows, targets, bias=bias, softcap=softcap, impl="triton")

    with memory_budget(M * V * dtype.itemsize // 2), product_by(product):
        forward_and_backward(operator, hidden, *trained)


def fused_loss(dtype: torch.dtype, D: int = 1024, frozen: bool = False) -> None:
    tree, scored = random_batch(0, vocab=650).pack()
    hidden = torch.zeros(len(tree.tokens), D, dtype=dtype)
    weight = torch.zeros(650, D, dtype=dtype)

    def operator(hidden, weight=weight):
        return fused_self_reward_loss(hidden, weight, scored, beta=0, temperature=0.9, impl="triton").loss

    forward_and_backward(operator, hidden, *([] if frozen else [weight]))


@contextmanager
def product_by(maker: str) -> Iterator[None]:
    """With the head's logits made by the vendor's matrix product, or by a kernel of ours."""
    looked_up = _gpu._tile_sizes

    def replaced(kernel: str, *of: int) -> dict:
        found = looked_up(kernel, *of)
        return found | {"product": maker} if "product" in found else found

    _gpu._tile_sizes = replaced
    try:
        yield
    finally:
        _gpu._tile_sizes = looked_up


def forward_and_backward(operator: Callable[..., torch.Tensor], *operands: torch.Tensor) -> None:
    with torch.no_grad():
        operator(*operands)
    leaves = [operand.requires_grad_() for operand in operands]
    out = operator(*leaves)
    torch.autograd.grad(out, leaves, torch.zeros_like(out))


OPTIONS = {"softcap": 30.0, "window": 50, "sinks": True}
HEAD_OPTIONS = {"softcap": 30.0, "biased": True}


def cases(everything: bool) -> dict[str, Case]:
    found: dict[str, Case] = {}

    def add(function, *arguments, **options):
        shown = [str(argument).removeprefix("torch.") for argument in arguments]
        shown += [f"{key}={value}" for key, value in options.items()]
        found[f"{function.__name__}({', '.join(shown)})"] = functools.partial(function, *arguments, **options)

    add(attention, 64, BFLOAT16)
    add(attention, 128, BFLOAT16)
    add(attention, 128, BFLOAT16, **OPTIONS)
    add(head, BFLOAT16, biased=True)
    add(head, BFLOAT16, "fused")
    add(head, BFLOAT16, frozen=True, **HEAD_OPTIONS)
    if everything:
        for E, dtype, options in itertools.product(SIZES, DTYPES, ({}, OPTIONS)):
            largest = impl.LARGEST_HEAD["tree_attention", "triton"][dtype]
            if largest >= E:
                add(attention, E, dtype, **options)
        for E, group in itertools.product((64, 128), (1, 7)):
            add(attention, E, BFLOAT16, group)
        add(attention, 128, BFLOAT16, T=720)
        for option, value in OPTIONS.items():
            add(attention, 128, BFLOAT16, **{option: value})
        every = itertools.product(DTYPES, ("vendor", "fused"), (False, True), ({}, HEAD_OPTIONS))
        for dtype, product, frozen, options in every:
            add(head, dtype, product, frozen=frozen, **options)
        for product in ("vendor", "fused"):
            add(head, BFLOAT16, product, D=1000)
        for dtype, frozen in itertools.product(DTYPES, (False, True)):
            add(fused_loss, dtype, frozen=frozen)
    return found


def compile_all(arch: int, everything: bool) -> None:
    compiler = Compiler(arch)
    driver.set_active(Driver(arch))
    triton.JITFunction.__getitem__ = lambda kernel, grid: functools.partial(compiler.launch, kernel, grid)
    _gpu.capability = lambda device: arch
    _gpu._tile_sizes = compiler.tile_sizes
    impl._STATUS["triton", "cpu"] = impl.READY
    strips.WORKSPACE = 0  # for a head to have strips beyond the first
    triton.knobs.nvidia.dump_ptxas_log = True
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache  # a kernel from the user's cache would tell nothing of the compiler here
        for name, run in cases(everything).items():
            compiler.case = name
            run()
    print(json.dumps({"arch": arch, "table": compiler.table}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", type=int)
    parser.add_argument("--all", action="store_true", dest="everything")
    compile_all(**vars(parser.parse_args()))
