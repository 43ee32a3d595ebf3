"""Every benchmark runs, at toy size, and finds ours right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "bench", "--toy", "--benchmark-only", f"--benchmark-json={path}"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as in conftest.py
    return subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True), path


def test_benchmarks_end_well(toy):
    done, _ = toy
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is not measured" in done.stdout  # not every rival can be installed beside us


def test_every_question_is_answered(toy):
    _, path = toy
    records = [benchmark["extra_info"] for benchmark in json.loads(path.read_text())["benchmarks"]]
    assert {record["question"] for record in records} == {"head", "attention", "step", "scaling"}
    for record in records:
        ours = record["contestants"]["ours"]
        assert ours["seconds"] > 0
        assert ours["peak_bytes"] >= 0
        assert ours["error"] < (1e-3 if record["dtype"] == "float32" else 1e-1)
