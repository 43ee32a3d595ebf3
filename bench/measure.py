"""How a case is measured: each contestant once in a fresh process, for its peak memory and its error against float64;
then all whose numbers are right, in turn, in this process."""

from __future__ import annotations

import functools
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import latro_kernels

ROOT = Path(__file__).parents[1]

# A contestant computes a whole forward and backward from the case's inputs. It must be importable by name, or a partial
# of such a function. A result that takes work to put into the form of `exact` is a function, which is not timed.
Results = dict[str, "Tensor | Callable[[], Tensor]"]
Contestant = Callable[[Any], Results]

# Relative RMS error above which a contestant does not compute the thing. Eager PyTorch errs a third of this at most.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}

# What contestants import, so that it does not count as their memory. Names that are not here are passed over.
PRELOADED = (
    "bench.bench_head",
    "bench.bench_attention",
    "bench.bench_step",
    "bench.bench_rollout",
    "cut_cross_entropy",
    "liger_kernel.chunked_loss.fused_linear_ppo",
    "torch._inductor.compile_fx",
    "trl.trainer.utils",
)

SECONDS_EACH = 1.0  # for the timed rounds of one contestant, after one that is not counted
MAX_ROUNDS = 15
FEWEST_ROUNDS = 3  # of ours, and of what others are measured against
FULL = 4  # times longer


@dataclass
class Case:
    question: str
    name: str
    dtype: torch.dtype
    inputs: Any
    exact: dict[str, Tensor]
    contestants: dict[str, Contestant]  # ours first
    flops: float  # that useful rates are counted with, whoever computes the result
    floor: str | None = None  # the contestant that others are measured against; without one, flops at the GEMM rate
    compiled: tuple[str, ...] = ()  # contestants that compile, or are made, when they first run
    axes: dict[str, int] = field(default_factory=dict)  # what a plot of this case puts on its axes


def measure(case: Case, benchmark: Any, *, toy: bool, full: bool) -> dict[str, Any]:
    """The record of a case. Raises if ours, which is the first contestant, is wrong."""
    rows = _checked(case)
    ours = next(iter(case.contestants))
    if "fault" in rows[ours]:
        raise AssertionError(f"{case.name}: {ours}: {rows[ours]['fault']}")
    right = {name: run for name, run in case.contestants.items() if "fault" not in rows[name]}
    rounds = {name: _rounds(rows[name]["once"], name in (ours, case.floor), toy, full) for name in right}
    for name in case.compiled:
        if name in right:
            right[name](case.inputs)
    times = _interleaved(right, case.inputs, rounds, ours, benchmark)
    for name in right:
        taken = times[name]
        middle = statistics.median(taken)
        spread = (max(taken) - min(taken)) / middle if len(taken) > 1 else None
        rows[name] |= {"seconds": middle, "spread": spread, "rounds": len(taken)}
    floor = rows[case.floor]["seconds"] if case.floor else case.flops / peak_gflops(case.dtype) / 1e9
    return {
        "question": case.question,
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "emulated": case.dtype == torch.bfloat16 and bf16_is_emulated(),
        "axes": case.axes,
        "gflop": case.flops / 1e9,
        "floor_seconds": floor,
        "floor": case.floor or "the useful operations at the measured GEMM rate",
        "contestants": rows,
    }


def _rounds(once: float, needed: bool, toy: bool, full: bool) -> int:
    """How often a contestant runs after a first time, which is counted where it is the only one."""
    if toy:
        return int(needed)
    fit = round(SECONDS_EACH * (FULL if full else 1) / once)
    return min(max(fit, FEWEST_ROUNDS) if needed else fit, MAX_ROUNDS)


def _interleaved(
    contestants: dict[str, Contestant], inputs: Any, rounds: dict[str, int], ours: str, benchmark: Any
) -> dict[str, list[float]]:
    """Seconds of each round. pytest-benchmark times ours; before each of its rounds others run, in an order that turns.

    Contestants with fewer rounds have them spread over all.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}

    def run(name: str) -> None:
        start = time.perf_counter()
        contestants[name](inputs)
        times[name].append(time.perf_counter() - start)

    others = deque(name for name in contestants if name != ours)
    most = max(rounds.values())

    def run_others() -> None:
        after = len(times[ours])  # rounds, the first not counted
        for name in others:
            if after == 0 or after * rounds[name] // most > (after - 1) * rounds[name] // most:
                run(name)
        others.rotate()

    benchmark.pedantic(run, args=(ours,), setup=run_others, rounds=most, warmup_rounds=1)
    return {name: taken[1:] or taken for name, taken in times.items()}


def _checked(case: Case) -> dict[str, dict[str, Any]]:
    """What each contestant did in a fresh process: seconds, peak memory, error; or the fault that bars it."""
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(case.inputs, Path(folder, "inputs"))
        torch.save(case.exact, Path(folder, "exact"))
        for name, run in case.contestants.items():
            rows[name] = _in_fresh_process(run, folder, name == case.floor, name in case.compiled)
            error = rows[name].get("error")
            if error is not None and not error <= TOLERANCE[case.dtype]:
                rows[name]["fault"] = f"wrong: relative error {error:.1e} against float64"
    return rows


def _in_fresh_process(run: Contestant, folder: str, inexact: bool, compiled: bool) -> dict[str, Any]:
    context = start_processes()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(run, folder, inexact, compiled, torch.get_num_threads(), sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return {"fault": f"its process ended with code {process.exitcode}"}
    finally:
        process.join()


@functools.cache
def start_processes() -> Any:
    """Makes processes by forking one that has imported everything and computed nothing, which starts doing so now.

    Blocks that a contestant lets go return to the system, so that its peak is what it needs: glibc keeps some, how many
    depends on what came before.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(64 << 10)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    forkserver.ensure_running()
    return context


def _child(run: Contestant, folder: str, inexact: bool, compiled: bool, threads: int, sender: Connection) -> None:
    torch.set_num_threads(threads)
    inputs = torch.load(Path(folder, "inputs"), weights_only=False)
    torch.ones(1024, 1024) @ torch.ones(1024, 1024)  # starts the threads and the libraries
    try:
        if compiled:
            run(inputs)
        _forget_peak()
        before = _resident()
        start = time.perf_counter()
        results = run(inputs)
        row = {"once": time.perf_counter() - start, "peak_bytes": max(0, _peak() - before)}
        row["error"] = None if inexact else _error(results, torch.load(Path(folder, "exact")))
    except Exception as error:
        row = {"fault": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
    sender.send(row)


def _error(results: Results, exact: dict[str, Tensor]) -> float:
    """The worst relative RMS error of any result; NaN if one is."""
    errors = []
    for name, truth in exact.items():
        result = results[name]
        given = result() if callable(result) else result
        errors.append((given.double() - truth).norm() / truth.double().norm())
    return float(torch.stack(errors).max())


def _resident() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else _peak()


def _forget_peak() -> None:
    """What loading and compiling took does not count, where the system can forget it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@functools.cache
def peak_gflops(dtype: torch.dtype = torch.float32) -> float:
    """What this machine can do: the best rate of torch's matrix product, in bfloat16 too where that is not emulated."""
    if dtype == torch.bfloat16 and bf16_is_emulated():
        return peak_gflops(torch.float32)
    return max(_product_gflops(size, dtype) for size in (512, 1024, 2048))


@functools.cache
def bf16_is_emulated() -> bool:
    """Whether torch's bfloat16 products, in the layouts of a head, run at less than a quarter of float32's rate.

    On one thread: several wait for each other while a process that starts takes a core.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _product_gflops(256, torch.bfloat16) < _product_gflops(256, torch.float32) / 4
    finally:
        torch.set_num_threads(threads)


def _product_gflops(n: int, dtype: torch.dtype) -> float:
    """The rate of logits = x wᵀ, dX = g w and dW = gᵀ x together, at its best of three."""
    x, w, g = (torch.randn(n, n, dtype=dtype) for _ in range(3))
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        x @ w.T, g @ w, g.T @ x
        taken.append(time.perf_counter() - start)
    return 6 * n**3 / min(taken[1:]) / 1e9


@contextmanager
def memory_budget(limit: int | None) -> Iterator[None]:
    """With so many bytes for what the head keeps; None: as it is."""
    if limit is None:
        yield
        return
    before = latro_kernels.get_memory_budget()
    latro_kernels.set_memory_budget(limit)
    try:
        yield
    finally:
        latro_kernels.set_memory_budget(before)
