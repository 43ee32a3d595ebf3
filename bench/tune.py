"""Finds tile sizes of the Triton kernels for the GPU of this machine, and by which product the CUDA kernels of the head
should make its logits, and writes them into latro_kernels/tiles.json.

python -m bench.tune [kernel ...] [--bytes 2] [--size 128] [--dry-run]

Of each row of the table that this GPU takes, neighbours are tried: a constant is a step larger or smaller, or two that
belong together are. Each is checked against the row itself; then all are timed in turn, on shapes of real models, in
the pass that the kernel is part of and of which nothing else changes. The table is written after each row. Nothing else
tunes, least of all a kernel at its first call.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from latro_kernels import PrefixTree, _gpu, linear_logprobs, tree_attention

Row = dict[str, Any]  # of the table: what it is for, constants, and why
Constants = dict[str, Any]
Table = dict[str, list[Row]]

ABOUT = ("arch", "bytes", "size", "why")  # the entries of a row that are no constants
CHOICES = {"product": ("vendor", "fused")}  # constants that are no numbers
RANGES = {"num_warps": (1, 16), "num_stages": (1, 6), "GROUP": (1, 64), "BLOCK": (8, 4096)}

ROUNDS = 25
LEAST_GAIN = 0.01  # of the time, below which the row stays as it is
DTYPES = {2: torch.bfloat16, 4: torch.float32}  # by element size
TOLERANCE = {2: 1e-2, 4: 1e-5}  # of results, relative: other tiles round elsewhere
FLUSHED_BYTES = 2**31  # written before each run: the L2 cache is cold then, and the host is ahead of the GPU

DEVICE = "cuda"
TREES = ((256, 220, 16), (1024, 220, 16))  # P tokens of a prompt, R of each of its K rationales
HEADS = {64: (14, 2), 128: (32, 8), 256: (8, 4)}  # by their size: Qwen2.5-0.5B, Llama-3-8B, Gemma-2-2B
HEAD = (3520, 4096, 128256)  # M scored tokens, D hidden, V vocabulary: 16 rationales of 220 tokens of Llama-3-8B


class Case:
    """An operator on a real shape, of which the forward pass is timed or the backward pass."""

    def __init__(self, name: str, operator: Callable[..., Tensor], operands: list[Tensor], backward: bool):
        self.name = name
        self.operator = operator
        self.leaves = [operand.requires_grad_() for operand in operands]
        out = operator(*self.leaves)
        self.direction = torch.randn_like(out)
        self.out = out if backward else None

    def run(self) -> None:
        if self.out is None:
            self.operator(*self.leaves)
        else:
            torch.autograd.grad(self.out, self.leaves, self.direction, retain_graph=True)

    def results(self) -> list[Tensor]:
        out = self.operator(*self.leaves)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.direction)]


def attention(size: int, dtype: torch.dtype, backward: bool = False) -> Iterator[Case]:
    heads, key_heads = HEADS[size]
    for P, R, K in TREES:
        tree = PrefixTree.pack([[0] * P, *[[0] * R] * K], [-1, *[0] * K]).to(DEVICE)
        q, k, v = (
            torch.randn(P + K * R, count, size, device=DEVICE, dtype=dtype).transpose(0, 1)
            for count in (heads, key_heads, key_heads)
        )
        name = f"P={P} R={R} K={K} heads {heads}/{key_heads}"
        yield Case(name, partial(tree_attention, tree=tree, impl="triton"), [q, k, v], backward)


def head(size: int, dtype: torch.dtype, backward: bool = False, impl: str = "triton") -> Iterator[Case]:
    M, D, V = HEAD
    D = min(D, size)
    hidden = torch.randn(M, D, device=DEVICE, dtype=dtype)
    weight = torch.randn(V, D, device=DEVICE, dtype=dtype) / D**0.5
    bias = torch.randn(V, device=DEVICE, dtype=dtype)
    rows, targets = torch.arange(M, device=DEVICE), torch.randint(V, (M,), device=DEVICE)

    def operator(hidden: Tensor, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
        return linear_logprobs(hidden, weight, rows, targets, bias=bias, impl=impl)

    yield Case(f"M={M} D={D} V={V}", operator, [hidden, weight, bias], backward)


# kernel: the pass that it is part of.
PASSES: dict[str, Callable[[int, torch.dtype], Iterator[Case]]] = {
    "tree_attention.forward": attention,
    "tree_attention.grad_queries": partial(attention, backward=True),
    "tree_attention.grad_keys": partial(attention, backward=True),
    "linear_logprobs.logits": head,
    "linear_logprobs.epilogue": head,
    "linear_logprobs.guess": head,
    "linear_logprobs.combine": head,
    "linear_logprobs.settle": head,
    "linear_logprobs.add_rows": partial(head, backward=True),
    "linear_logprobs.add_bias_grad": partial(head, backward=True),
    "linear_logprobs.cuda": partial(head, impl="native"),
}


def rows_taken(rows: list[Row], arch: int) -> list[Row]:
    """The rows that `_gpu.tile_sizes` finds on a GPU of this architecture."""
    known = [row for row in rows if row["arch"] <= arch]
    newest = {row["bytes"]: max(r["arch"] for r in known if r["bytes"] == row["bytes"]) for row in known}
    return [row for row in known if row["arch"] == newest[row["bytes"]]]


def constants_of(row: Row) -> Constants:
    return {name: value for name, value in row.items() if name not in ABOUT}


def neighbours(constants: Constants) -> list[Constants]:
    """The constants themselves, then those with one changed, or two that belong together, by a step each."""
    steps = [(name, value) for name, old in constants.items() for value in _steps(name, old)]
    pairs = (pair for pair in itertools.combinations(steps, 2) if _belong_together(pair[0][0], pair[1][0]))
    return [constants, *(constants | dict(changes) for changes in itertools.chain(zip(steps), pairs))]


def _belong_together(name: str, other: str) -> bool:
    """The warps that share a block; and a choice, with all that is best after it."""
    names = {name, other}
    block_and_warps = "num_warps" in names and any(n.startswith("BLOCK") for n in names)
    return len(names) == 2 and (block_and_warps or not names.isdisjoint(CHOICES))


def _steps(name: str, value: Any) -> list[Any]:
    if name in CHOICES:
        return [other for other in CHOICES[name] if other != value]
    least, most = RANGES[name if name in RANGES else name.partition("_")[0]]
    steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
    return [step for step in steps if least <= step <= most]


def choose(times: list[list[float]]) -> int:
    """The candidate with the least geometric mean over all cases, or 0, the row as it is, where that gains too little.

    times[c][n] is that of candidate c in case n.
    """
    ratios = [
        math.exp(statistics.fmean(math.log(t / now) for t, now in zip(of_candidate, times[0], strict=True)))
        for of_candidate in times
    ]
    best = min(range(len(ratios)), key=ratios.__getitem__)
    return best if ratios[best] < 1 - LEAST_GAIN else 0


def with_row(rows: list[Row], new: Row) -> list[Row]:
    """The table's rows, the new one in the place of that for the same architecture, element size and size."""

    def key(row: Row) -> tuple[int, int, int]:
        return row["bytes"], row["arch"], row["size"]

    return sorted([*(row for row in rows if key(row) != key(new)), new], key=key)


def as_text(table: Table) -> str:
    """JSON with a line for each row."""
    kernels = (
        f"  {json.dumps(kernel)}: [\n" + ",\n".join(f"    {json.dumps(row)}" for row in rows) + "\n  ]"
        for kernel, rows in table.items()
    )
    return "{\n" + ",\n".join(kernels) + "\n}\n"


@contextmanager
def tiles(kernel: str, constants: Constants) -> Iterator[None]:
    """With these constants for the kernel, and the table's for all others."""
    looked_up = _gpu._tile_sizes
    _gpu._tile_sizes = lambda name, *of: constants if name == kernel else looked_up(name, *of)
    try:
        yield
    finally:
        _gpu._tile_sizes = looked_up


def fault_of(case: Case, expected: list[Tensor], tolerance: float) -> str | None:
    """Why a candidate is passed over: it does not compile, does not fit, or does not compute the same."""
    try:
        found = case.results()
    except Exception as error:  # whatever the compiler or the driver raises
        torch.cuda.synchronize()  # raises in its turn where the device is lost, after which nothing could run
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]:.100}"
    for ours, theirs in zip(found, expected, strict=True):
        difference = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
        if not difference <= tolerance:
            return f"wrong: its results differ by {difference:.1e}"
    return None


def milliseconds(kernel: str, candidates: list[Constants], case: Case) -> list[float]:
    """The median time of each, all in turn."""
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=DEVICE)
    times: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in candidates]
    for _ in range(ROUNDS):
        for constants, of_candidate in zip(candidates, times, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flushed.zero_()
            with tiles(kernel, constants):
                start.record()
                case.run()
                end.record()
            of_candidate.append((start, end))
    torch.cuda.synchronize()
    return [statistics.median(start.elapsed_time(end) for start, end in of_candidate) for of_candidate in times]


def tuned(kernel: str, row: Row, arch: int) -> Row:
    """The row, or the best of its neighbours, for this architecture."""
    label = f"{kernel}, size {row['size']}, {8 * row['bytes']} bits"
    cases = list(PASSES[kernel](row["size"], DTYPES[row["bytes"]]))
    expected = [case.results() for case in cases]
    tolerance = TOLERANCE[row["bytes"]]
    candidates = neighbours(constants_of(row))
    right = []
    for n, constants in enumerate(candidates):
        progress(f"{label}: compiling {n + 1} of {len(candidates)}")
        with tiles(kernel, constants):
            faults = (fault_of(case, of_case, tolerance) for case, of_case in zip(cases, expected, strict=True))
            fault = next(filter(None, faults), None)
        if fault:
            print(f"{label}: passed over {in_words(constants)}: {fault}")
        else:
            right.append(constants)
    if right[:1] != candidates[:1]:
        raise RuntimeError(f"{label}: two runs of the row itself differ, see above: nothing can be checked against it")

    times = []
    for case in cases:
        progress(f"{label}: timing {len(right)} at {case.name}")
        times.append(milliseconds(kernel, right, case))
    by_candidate = [list(of_candidate) for of_candidate in zip(*times, strict=True)]
    best = choose(by_candidate)
    why = reason([case.name for case in cases], by_candidate[best], by_candidate[0], len(right))
    print(f"{label}: {in_words(right[best])}: {why}")
    return {"arch": arch, "bytes": row["bytes"], "size": row["size"], **right[best], "why": why}


def reason(names: list[str], times: list[float], before: list[float], candidates: int) -> str:
    measured = ", ".join(
        f"{time:.3f} ms at {name} (before: {old:.3f})" for name, time, old in zip(names, times, before, strict=True)
    )
    import triton

    where = f"{torch.cuda.get_device_name()}, Triton {triton.__version__}, {datetime.date.today()}"
    return f"best of {candidates} in its pass: {measured}; {where}"


def in_words(constants: Constants) -> str:
    return " ".join(f"{name}={value}" for name, value in constants.items())


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    table: Table = json.loads(_gpu.TABLE.read_text())
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="*", metavar="kernel", help=f"of {', '.join(table)}; all by default")
    parser.add_argument("--bytes", type=int, help="rows of this element size alone")
    parser.add_argument("--size", type=int, help="rows of this size alone")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    wanted = parser.parse_args()
    if unknown := set(wanted.kernels) - set(table):
        parser.error(f"no such kernel: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        print("bench.tune: no CUDA device is visible to torch; run it on the GPU to tune for", file=sys.stderr)
        return 1
    arch = _gpu.capability(torch.device(DEVICE))
    for kernel in wanted.kernels or table:
        taken = rows_taken(table[kernel], arch)
        for row in taken:  # those of an older architecture too: one of this one would come before all of them
            table[kernel] = with_row(table[kernel], row | {"arch": arch})
        for row in taken:
            if wanted.bytes in (None, row["bytes"]) and wanted.size in (None, row["size"]):
                table[kernel] = with_row(table[kernel], tuned(kernel, row, arch))
                if not wanted.dry_run:
                    _gpu.TABLE.write_text(as_text(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
