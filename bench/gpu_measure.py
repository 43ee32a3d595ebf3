"""How a case is measured on a GPU. Each contestant is first held against the exact results; those that are right then
take turns in one process, timed by CUDA events.

Before each run the L2 cache is overwritten, and the GPU waits while the host launches what is timed: launches count
only where the host falls behind. Records have the form of bench/measure.py's; memory is what torch allocated above the
inputs. Without a GPU everything runs on the CPU's clock, to see that it runs.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import TOLERANCE, Case, Contestant, Results

SECONDS_EACH = 0.3  # for the timed rounds of one contestant
FEWEST_ROUNDS, MOST_ROUNDS = 5, 25
L2_BYTES = 256 * 2**20  # several times the L2 cache of any GPU
WAIT_CYCLES = 2_000_000  # about a millisecond, in which a host launches a hundred kernels
GRACE = 30.0  # seconds that a process may go on past its deadline, to end the case it is in

# What nvidia-smi is asked for.
STATE = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw")


@dataclass(frozen=True)
class Options:
    """What a process that measures a question is told."""

    device: str
    toy: bool
    deadline: float  # in time.time()


def measure_question(question: str, options: Options, path: Path) -> None:
    """Measure the cases of bench/gpu_QUESTION.py, as far as time allows, into lines of JSON."""
    with path.open("a", buffering=1) as lines:
        for line in question_lines(question, options):
            lines.write(json.dumps(line) + "\n")


def question_lines(question: str, options: Options) -> Iterator[dict[str, Any]]:
    """A line for each case, {"record": ...}, {"note": ...} or {"failure": ...}; then one on the circumstances."""
    device = torch.device(options.device)
    rate = gemm_flops(device, options.toy)
    module = importlib.import_module(f"bench.gpu_{question}")
    for name, build in module.cases(device, options.toy):
        if time.time() > options.deadline:
            yield {"note": f"{question}: {name} was not measured, there was no time left"}
            continue
        print(f"{time.strftime('%H:%M:%S')} {question}: {name}", file=sys.stderr, flush=True)
        try:
            yield {"record": measure(build(), device, rate, options.toy)}
        except Exception as error:  # the other cases are still wanted
            yield {"failure": f"{question}: {name} was not measured: {type(error).__name__}: {first_line(error)}"}
    absent = getattr(module, "absent", dict)()
    yield {"circumstances": {"gemm_tflops": rate / 1e12, "hot": hot_state(device, options.toy), "absent": absent}}


def in_own_process(question: str, options: Options, path: Path) -> list[dict[str, Any]]:
    """The lines of a process that measures the question. It may crash or be ended: what it wrote stays."""
    process = multiprocessing.get_context("spawn").Process(target=measure_question, args=(question, options, path))
    process.start()
    process.join(max(0.0, options.deadline + GRACE - time.time()))
    late = process.is_alive()
    if late:
        process.kill()
        process.join()
    written = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in written[: written.rfind("\n") + 1].splitlines()]
    if late:
        lines.append({"failure": f"{question}: its process was ended {GRACE:.0f} s after its deadline"})
    elif process.exitcode:
        lines.append({"failure": f"{question}: its process ended with code {process.exitcode}"})
    return lines


def measure(case: Case, device: torch.device, rate: float, toy: bool) -> dict[str, Any]:
    """The record of a case. A contestant that fails or is wrong has a fault and no time."""
    clock = _Clock(device)
    rows = {name: _checked(case, name, clock) for name in case.contestants}
    right = {name: run for name, run in case.contestants.items() if "fault" not in rows[name]}
    rounds = {name: _rounds(rows[name]["once"], toy) for name in right}
    for name, taken in _interleaved(right, case.inputs, rounds, clock).items():
        middle = statistics.median(taken)
        rows[name] |= {"seconds": middle, "spread": (max(taken) - min(taken)) / middle, "rounds": len(taken)}
    floor = rows.get(case.floor or "", {})
    return {
        "question": case.question,
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "emulated": False,
        "axes": case.axes,
        "gflop": case.flops / 1e9,
        "floor_seconds": floor.get("seconds", case.flops / rate),
        "floor": case.floor if "seconds" in floor else "the useful operations at the measured GEMM rate",
        "gemm_gflops": rate / 1e9,
        "contestants": rows,
    }


def _checked(case: Case, name: str, clock: _Clock) -> dict[str, Any]:
    """Seconds of a second run, peak memory, error and dtypes; or the fault that bars the contestant."""
    run, inputs = case.contestants[name], case.inputs
    try:
        results = run(inputs)
        error = None if name == case.floor else worst_error(results, case.exact)
        dtypes = {key: str(value.dtype)[6:] for key, value in results.items() if isinstance(value, Tensor)}
        del results
        if error is not None and not error <= TOLERANCE[case.dtype]:
            return {"fault": f"wrong: relative error {error:.1e}"}
        peak = clock.peak_bytes(run, inputs)
        return {"once": clock.seconds(run, inputs), "peak_bytes": peak, "error": error, "dtypes": dtypes}
    except Exception as error:
        return {"fault": f"{type(error).__name__}: {first_line(error)}"}


def worst_error(results: Results, exact: dict[str, Tensor]) -> float:
    """The worst relative RMS error of any result."""
    errors = []
    for name, truth in exact.items():
        result = results[name]
        given = (result() if callable(result) else result).float()
        errors.append((given - truth).norm() / truth.norm())
    return float(torch.stack(errors).amax())  # NaN if any is


def _rounds(once: float, toy: bool) -> int:
    return 1 if toy else min(max(round(SECONDS_EACH / once), FEWEST_ROUNDS), MOST_ROUNDS)


def _interleaved(
    contestants: dict[str, Contestant], inputs: Any, rounds: dict[str, int], clock: _Clock
) -> dict[str, list[float]]:
    """Seconds of each round, in an order that turns. Contestants with fewer rounds have them spread over all."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order, most = deque(contestants), max(rounds.values(), default=0)
    for n in range(most):
        for name in order:
            if (n + 1) * rounds[name] // most > n * rounds[name] // most:
                times[name].append(clock.seconds(contestants[name], inputs))
        order.rotate()
    return times


class _Clock:
    """Time and memory on a device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.cache = torch.empty(L2_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def seconds(self, run: Contestant, inputs: Any) -> float:
        if not self.cuda:
            start = time.perf_counter()
            run(inputs)
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        torch.cuda._sleep(WAIT_CYCLES)
        begin.record()
        run(inputs)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peak_bytes(self, run: Contestant, inputs: Any) -> int | None:
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def gemm_flops(device: torch.device, toy: bool) -> float:
    """Operations per second of torch's bfloat16 product of 8192 x 8192 random matrices, once the clocks are up."""
    n, clock = 256 if toy else 8192, _Clock(device)
    product = _product(n, device)
    for _ in range(1 if toy else 200):
        product()
    return 2 * n**3 / statistics.median(clock.seconds(lambda _: product(), None) for _ in range(1 if toy else 20))


def _product(n: int, device: torch.device) -> Callable[[], Tensor]:
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    return lambda: a @ b


def hot_state(device: torch.device, toy: bool) -> dict[str, str] | None:
    """What nvidia-smi says while products run."""
    if device.type != "cuda" or toy:
        return None
    product = _product(8192, device)
    for _ in range(1500):  # a thousand of them wait in the queue, for more than a second
        product()
    state = gpu_state()
    torch.cuda.synchronize()
    return state


def gpu_state() -> dict[str, str] | None:
    """Clocks, power and temperature; None where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(STATE)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        return None
    return dict(zip(STATE, map(str.strip, done.stdout.splitlines()[0].split(",")), strict=False))


def to_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in inputs.items()}


def first_line(error: Exception) -> str:
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)
