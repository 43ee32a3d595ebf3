"""Every benchmark runs, at toy size, and finds ours right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import render
from bench.bench_head import absent
from latro_kernels.__main__ import report

ROOT = Path(__file__).parents[1]
QUESTIONS = [question for question in render.QUESTIONS if question != "trainers"]  # which needs TRL


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "bench", "--toy", "--benchmark-only", f"--benchmark-json={path}"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as in conftest.py
    return subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True), path


def test_benchmarks_end_well(toy):
    done, _ = toy
    assert done.returncode == 0, done.stdout + done.stderr
    for name, reason in absent().items():
        assert f"{name} is not measured: {reason}" in done.stdout


@pytest.fixture(scope="module")
def records(toy):
    _, path = toy
    return [benchmark["extra_info"] for benchmark in json.loads(path.read_text())["benchmarks"]]


def test_every_question_is_answered(records):
    assert {record["question"] for record in records} == set(QUESTIONS)
    for record in records:
        ours = record["contestants"]["ours"]
        assert ours["seconds"] > 0
        assert ours["peak_bytes"] >= 0
        assert ours["error"] < (1e-3 if record["dtype"] == "float32" else 1e-1)


def test_results_become_tables(records):
    circumstances = report() | {"gemm_gflops": 1.0, "commit": "0" * 40, "command": "pytest bench/ --toy", "remarks": []}
    circumstances["versions"] |= dict.fromkeys(render.RIVALS)
    runs = [
        circumstances | {"cases": [record for record in records if record["question"] == question]}
        for question in QUESTIONS
    ]
    table = render.summary(runs, "somewhere")
    for row in (
        "attention, float32 | two calls | 1",
        "head, float32 | bare GEMMs | 3",
        "step, float32 | published | 1",
    ):
        assert f"| {row} |" in table
    assert "One more rationale at P=16: ours" in table
    for run in runs:
        rows = render.every_case(run).splitlines()
        named = [name for record in run["cases"] for name in record["contestants"]]
        assert [
            line.split(" | ")[1] for line in rows if line.startswith("| ") and not line.startswith("| case")
        ] == named
