"""Options of the benchmarks, what is printed before and after them, and the file that --save writes."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import time

import pytest

from bench.bench_head import absent
from bench.measure import ROOT, bf16_is_emulated, measure, peak_gflops, start_processes
from bench.render import RIVALS, text_table
from latro_kernels.__main__ import hardware, report, version, versions

RECORDS = pytest.StashKey[list]()
START = pytest.StashKey[float]()


def pytest_addoption(parser):
    group = parser.getgroup("latro benchmarks")
    group.addoption("--full", action="store_true", help="large shapes too, and more rounds; takes an hour")
    group.addoption("--toy", action="store_true", help="every benchmark at toy size, to see that it runs")
    group.addoption("--save", action="store_true", help="write the figures to a folder in bench/results/")


def pytest_configure(config):
    if config.getoption("save") and (config.getoption("toy") or config.getoption("keyword")):
        raise pytest.UsageError("--save keeps whole questions at real sizes: not with --toy, nor with -k")
    config.stash[RECORDS] = []
    config.stash[START] = time.time()
    config.addinivalue_line("filterwarnings", "default")  # other people's code runs here
    start_processes()


@pytest.fixture
def measured(benchmark, pytestconfig):
    """Measures a case and keeps its record."""

    def keep(case):
        record = measure(case, benchmark, toy=pytestconfig.getoption("toy"), full=pytestconfig.getoption("full"))
        benchmark.extra_info.update(record)
        pytestconfig.stash[RECORDS].append(record)
        return record

    return keep


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    records = config.stash[RECORDS]
    if not records:
        return
    terminalreporter.section("latro benchmarks")
    found = environment(config)
    terminalreporter.write_line(versions(found["versions"], found["extension"]))
    terminalreporter.write_line(hardware(found["hardware"]))
    terminalreporter.write_line(f"GEMM rate       {found['gemm_gflops']:.0f} GFLOP/s, the best of torch in float32")
    for line in [*found["absent"], *found["remarks"]]:
        terminalreporter.write_line(f"note            {line}")
    terminalreporter.write_line(text_table(records))
    if config.getoption("save"):
        terminalreporter.write_line(f"written: {save(config, found, records)}")
    terminalreporter.write_line(f"wall time {time.time() - config.stash[START]:.0f} s")


def environment(config):
    found = report()
    found["versions"] |= {name: version(name) for name in RIVALS}
    found["gemm_gflops"] = peak_gflops()
    found["absent"] = [f"{name} is not measured: {reason}" for name, reason in absent().items()]
    found["remarks"] = (
        [
            "torch's bfloat16 products are emulated here, at under a quarter of float32's rate: where others need "
            "them, bfloat16 cases are small, and say little."
        ]
        if bf16_is_emulated()
        else []
    )
    found["command"] = " ".join(["pytest", *config.invocation_params.args])
    return found


def save(config, found, records):
    """A folder for the day and the machine, a file for each question."""
    cpu = found["hardware"]["cpu"]
    size = ["full"] if config.getoption("full") else []
    name = " ".join([datetime.date.today().isoformat(), cpu["model"], *cpu["instruction_sets"][-1:], *size])
    folder = ROOT / "bench" / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    found = {key: value for key, value in found.items() if key != "kernels"} | {"commit": commit()}
    for question in {record["question"] for record in records}:
        cases = [record for record in records if record["question"] == question]
        (folder / f"{question}.json").write_text(json.dumps(found | {"cases": cases}, indent=1) + "\n")
    return folder.relative_to(ROOT)


def commit():
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "HEAD") + (", with changes" if git("status", "--porcelain", "--untracked-files=no") else "")
