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
from bench.render import text_table
from latro_kernels.__main__ import hardware, report, version, versions

RECORDS = pytest.StashKey[list]()
START = pytest.StashKey[float]()
RIVAL_PACKAGES = ("trl", "liger-kernel", "cut-cross-entropy")


def pytest_addoption(parser):
    group = parser.getgroup("latro benchmarks")
    group.addoption("--full", action="store_true", help="large shapes too, and more rounds; takes an hour")
    group.addoption("--toy", action="store_true", help="every benchmark at toy size, to see that it runs")
    group.addoption("--save", action="store_true", help="write the figures to bench/results/")


def pytest_configure(config):
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
    for note in found["notes"]:
        terminalreporter.write_line(f"note            {note}")
    terminalreporter.write_line(text_table(records))
    if config.getoption("save"):
        terminalreporter.write_line(f"written: {save(found, records)}")
    terminalreporter.write_line(f"wall time {time.time() - config.stash[START]:.0f} s")


def environment(config):
    found = report()
    found["versions"] |= {name: version(name) for name in RIVAL_PACKAGES}
    found["gemm_gflops"] = peak_gflops()
    found["notes"] = [f"{name} is not measured: {reason}" for name, reason in absent().items()]
    if bf16_is_emulated():
        found["notes"].append(
            "bfloat16 products of torch are emulated on this machine, at under a quarter of float32's rate: "
            "where contestants need them, bfloat16 cases are small"
        )
    found["command"] = " ".join(["pytest", *config.invocation_params.args])
    return found


def save(found, records):
    cpu = found["hardware"]["cpu"]
    size = ["full"] if "--full" in found["command"] else []
    name = "-".join([datetime.date.today().isoformat(), cpu["model"], *cpu["instruction_sets"][-1:], *size])
    path = ROOT / "bench" / "results" / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")
    path.parent.mkdir(exist_ok=True)
    del found["kernels"]
    path.write_text(json.dumps(found | {"commit": commit(), "cases": records}, indent=1) + "\n")
    return path.relative_to(ROOT)


def commit():
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "HEAD") + (", with changes" if git("status", "--porcelain", "--untracked-files=no") else "")
