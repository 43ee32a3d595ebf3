"""The operators and a whole step on a GPU, against what else there is.

python -m bench.gpu                       every question, each in a process of its own, in five minutes
python -m bench.gpu head --seconds 120    one of them
python -m bench.gpu --save                also writes bench/results/DATE-GPU/gpu.json
python -m bench.gpu --toy --device cpu    every case at toy size, to see that it runs
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.gpu_head import goals
from bench.gpu_measure import GRACE, Options, gpu_state, in_own_process
from bench.gpu_step import WHOLE, whole_model
from bench.measure import ROOT
from latro_kernels.__main__ import hardware, report, version, versions

SHARES = {"attention": 0.35, "head": 0.3, "step": 0.35}  # of the time; what one leaves, the next ones have
RIVALS = ("liger-kernel", "cut-cross-entropy", "trl", "quack-kernels")
HEAD = ("contestant", "ms", "range", "TFLOP/s", "of GEMM", "× floor", "goal", "peak MiB", "error", "gradients")
GRADIENTS = ("dq", "dk", "dv", "dX", "dW")
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
LEGEND = (
    "ms: median, by CUDA events, contestants taking turns, the L2 cache overwritten before each run; range: slowest "
    "less fastest round, of the median; TFLOP/s: of the useful operations; of GEMM: of torch's bfloat16 product of "
    "8192 x 8192; goal: the most that × floor should be; peak: what torch allocated above the inputs; error: the worst "
    "relative RMS error of a result against float64, of a step's against float32; gradients: their dtypes. A "
    "contestant that is wrong is not timed."
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="*", help="by default, all of them")
    parser.add_argument("--seconds", type=float, default=300.0, help="for everything together")
    parser.add_argument("--save", action="store_true", help="write the figures to a folder in --results")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    parser.add_argument("--toy", action="store_true", help="every case at toy size, to see that it runs")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    unknown = [name for name in options.questions if name not in SHARES]
    if unknown:
        parser.error(f"questions are {', '.join(SHARES)}, got {', '.join(unknown)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is visible to torch; --toy --device cpu shows that everything runs")
    if options.device == "cpu" and not options.toy:
        parser.error("--device cpu needs --toy")
    if options.save and (options.toy or options.questions):
        parser.error("--save keeps every question at real sizes: not with --toy, nor with some of the questions")
    found = measured(options)
    print(text(found))
    sys.exit(bool(failures(found)))


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Everything; with --save also in a file, which is written again after each question."""
    end = time.time() + options.seconds - GRACE
    found = circumstances(options)
    shares = {name: share for name, share in SHARES.items() if name in (options.questions or SHARES)}
    for question in list(shares):
        now = time.time()
        deadline = now + max(0.0, end - now) * shares[question] / sum(shares.values())
        del shares[question]
        with tempfile.TemporaryDirectory() as folder:
            given = Options(options.device, options.toy, deadline)
            add(found, question, in_own_process(question, given, Path(folder, "lines")))
        found["whole_model"] = {"layers": WHOLE, "seconds": whole_model(found["cases"])}
        if options.save:
            save(found, options.results)
    return found


def circumstances(options: argparse.Namespace) -> dict[str, Any]:
    found = report()
    found["kernels"] = [kernel for kernel in found["kernels"] if kernel["device"] == options.device]
    found["versions"] |= {"cuda": torch.version.cuda} | {name: version(name) for name in RIVALS}
    return found | {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench.gpu", *sys.argv[1:]]),
        "commit": options.commit or commit(),
        "clocks": {"cold": gpu_state()},
        "gemm_tflops": {},
        "legend": LEGEND,
        "notes": [],
        "failures": [],
        "cases": [],
    }


def add(found: dict[str, Any], question: str, lines: list[dict[str, Any]]) -> None:
    """What a process wrote."""
    found["cases"] += [line["record"] for line in lines if "record" in line]
    found["notes"] += [line["note"] for line in lines if "note" in line]
    found["failures"] += [line["failure"] for line in lines if "failure" in line]
    for line in lines:
        if "circumstances" in line:
            found["gemm_tflops"][question] = line["circumstances"]["gemm_tflops"]
            found["clocks"][f"hot, after {question}"] = line["circumstances"]["hot"]
            found["notes"] += [
                f"{name} is not measured: {why}" for name, why in line["circumstances"]["absent"].items()
            ]


def failures(found: dict[str, Any]) -> list[str]:
    """What could not be measured, and where ours is at fault."""
    of_ours = [
        f"{record['case']}: {name}: {row['fault']}"
        for record in found["cases"]
        for name, row in record["contestants"].items()
        if name.startswith("ours") and "fault" in row
    ]
    return found["failures"] + of_ours


def save(found: dict[str, Any], results: Path) -> Path:
    """A folder for the day and the GPU."""
    name = f"{found['date'][:10]} {found['hardware']['gpus'][0]['model']}"
    folder = results / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "gpu.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def commit() -> str | None:
    if shutil.which("git") is None:
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    head = git("rev-parse", "HEAD")
    return head + (", with changes" if git("status", "--porcelain", "--untracked-files=no") else "") if head else None


def text(found: dict[str, Any]) -> str:
    """A table of all cases, and what it was measured on."""
    rates = ", ".join(f"{rate:.0f} before {question}" for question, rate in found["gemm_tflops"].items())
    lines = [versions(found["versions"], found["extension"]), hardware(found["hardware"])]
    lines += [f"{'GEMM':<18}{rates} TFLOP/s"]
    lines += [f"{when:<18}{', '.join(state.values())}" for when, state in found["clocks"].items() if state]
    lines += [f"{'note':<18}{note}" for note in found["notes"]]
    lines += ["", table(found["cases"]), "", *whole_model_lines(found["whole_model"]), "", LEGEND]
    lines += [f"goal missed: {miss}" for miss in missed_goals(found["cases"])]
    return "\n".join([*lines, *(f"FAILED: {failure}" for failure in failures(found))])


def table(records: list[dict[str, Any]]) -> str:
    lines, question = [], None
    for record in records:
        if record["question"] != question:
            question = record["question"]
            lines += ["", f"{question}; floor: {record['floor']}", _line(*HEAD)]
        lines.append(f"  {record['case']}")
        for name, row in record["contestants"].items():
            goal = goals(record["case"]).get(name)
            figures = () if "fault" in row else _figures(record, row, goal)
            lines.append(_line(name, *figures) if figures else f"    {name:<36}{row['fault']}")
    return "\n".join(lines)


def missed_goals(records: list[dict[str, Any]]) -> list[str]:
    ratios = [
        (f"{record['case']}: {name}", record["contestants"][name]["seconds"] / record["floor_seconds"], goal)
        for record in records
        for name, goal in goals(record["case"]).items()
        if "seconds" in record["contestants"].get(name, {})
    ]
    return [f"{what}: {ratio:.3f} × floor, allowed are {goal:.3f}" for what, ratio, goal in ratios if ratio > goal]


def _figures(record: dict[str, Any], row: dict[str, Any], goal: float | None) -> tuple[str, ...]:
    rate = record["gflop"] / row["seconds"]
    gradients = [name for name in GRADIENTS if name in row["dtypes"]]
    return (
        f"{row['seconds'] * 1e3:.3f}",
        f"{row['spread']:.0%}",
        f"{rate / 1e3:.1f}",
        f"{rate / record['gemm_gflops']:.0%}",
        f"{row['seconds'] / record['floor_seconds']:.2f}",
        "" if goal is None else f"{goal:.2f}",
        "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
        "" if row["error"] is None else f"{row['error']:.1e}",
        " ".join(dict.fromkeys(SHORT.get(row["dtypes"][name], row["dtypes"][name]) for name in gradients)),
    )


def _line(name: str, *figures: str) -> str:
    return f"    {name:<36}" + "".join(f"{figure:>10}" for figure in figures)


def whole_model_lines(whole: dict[str, Any]) -> list[str]:
    lines = []
    for name, seconds in whole["seconds"].items():
        lines.append(f"step of {whole['layers']} layers, {name}:")
        for contestant, time_of in seconds.items():
            ratio = f"{time_of / seconds['ours']:.2f} × ours" if "ours" in seconds else ""
            lines.append(f"    {contestant:<36}{time_of * 1e3:>10.1f} ms  {ratio}")
    return lines


if __name__ == "__main__":
    main()
