"""The build, and the report of `python -m latro_kernels`. Builds happen in a copy of the sources."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latro_kernels import __main__ as report
from latro_kernels import _native, impl

ROOT = Path(__file__).parents[1]
HAS_COMPILER = shutil.which(os.environ.get("CXX", "c++")) is not None
NEEDS_COMPILER = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here")


def setuptools_major() -> int:
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


NEEDS_SETUPTOOLS = pytest.mark.skipif(setuptools_major() < 77, reason="builds need setuptools>=77 here")


@pytest.fixture
def sources(tmp_path):
    """What a build reads, with the extension of an earlier one."""
    copy_sources(tmp_path)
    (tmp_path / "latro_kernels" / "_C.abi3.so").write_text("of an earlier build")
    return tmp_path


def copy_sources(folder):
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for package in ("latro", "latro_kernels"):
        (folder / package).mkdir()
        shutil.copy(ROOT / package / "__init__.py", folder / package)


def build(sources, **environment):
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {**os.environ, "LATRO_CUDA": "0", **environment}
    return subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True)


def record(sources):
    return json.loads((sources / "latro_kernels" / "_build.json").read_text())


@NEEDS_SETUPTOOLS
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}, "CC=/nowhere/cc, which is no program"),
        ({"CC": "", "CXX": "false"}, "false cannot build a C++20 extension: no message"),
    ],
)
def test_without_a_compiler_the_build_succeeds_and_says_why(sources, environment, reason):
    result = build(sources, **environment)
    assert result.returncode == 0, result.stderr
    assert f"built without native kernels: {reason}" in result.stderr
    assert "to mend it, install a C++20 compiler" in result.stderr
    assert not list((sources / "latro_kernels").glob("*.so"))
    assert record(sources)["missing"]["cpu"][0] == f"not built at install: {reason}"


@NEEDS_SETUPTOOLS
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LATRO_CUDA": "yes"}, "LATRO_CUDA must be 0, 1 or unset, got 'yes'"),
        ({"LATRO_CUDA": "1", "CUDA_HOME": "/nowhere"}, "LATRO_CUDA=1 but no CUDA toolkit in CUDA_HOME"),
    ],
)
def test_a_wish_for_cuda_that_cannot_be_met_fails(sources, environment, message):
    result = build(sources, **environment)
    assert result.returncode != 0
    assert message in result.stderr


@pytest.mark.slow
@NEEDS_COMPILER
@NEEDS_SETUPTOOLS
def test_a_compile_error_fails_the_build(sources):
    with open(sources / "csrc" / "self_reward" / "cpu.cpp", "a") as file:
        file.write('#error "broken on purpose"\n')
    result = build(sources)
    assert result.returncode != 0
    assert "broken on purpose" in result.stdout + result.stderr


@pytest.mark.slow
@NEEDS_COMPILER
@NEEDS_SETUPTOOLS
def test_sources_compile_without_warnings_and_only_when_changed(sources):
    first, again = build(sources), build(sources)
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert "warning:" not in first.stdout + first.stderr
    assert "self_reward/cpu.o" in first.stdout + first.stderr
    assert "no work to do" in again.stdout + again.stderr
    assert record(sources)["torch"] == torch.__version__
    load = "import torch, importlib; importlib.import_module('latro_kernels._C'); torch.ops.latro_kernels.self_reward"
    subprocess.run([sys.executable, "-c", load], cwd=sources, check=True)


def test_the_range_of_torch_is_the_same_everywhere():
    lowest, above = (".".join(map(str, version)) for version in _native.TORCH_RANGE)
    ranges = re.findall(r'"torch(>=[^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert ranges == [f">={lowest},<{above}"] * 2


def test_latro_kernels_needs_no_transformers():
    script = "import sys, latro_kernels; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_report_names_every_kernel_and_its_mend():
    result = subprocess.run([sys.executable, "-m", "latro_kernels"], capture_output=True, text=True, check=True)
    for operator in impl.OPERATORS:
        assert len(re.findall(rf"^{operator} +(?:cpu|cuda) ", result.stdout, re.M)) == len(impl.DEVICES)
    kernels = report.report()["kernels"]
    assert result.stdout.count("no [") == sum(kernel["exists"] and not kernel["ready"] for kernel in kernels)
    for number in set(re.findall(r"no (\[\d+\])", result.stdout)):
        assert re.search(rf"^{re.escape(number)} .*?To mend it: ", result.stdout, re.M | re.S)
    assert max(map(len, result.stdout.splitlines())) <= 110
    assert torch.__version__.split("+")[0] in result.stdout


def test_the_report_for_machines_agrees_with_impl():
    result = subprocess.run([sys.executable, "-m", "latro_kernels", "--json"], capture_output=True, check=True)
    found = json.loads(result.stdout)
    assert len(found["kernels"]) == len(impl.OPERATORS) * len(impl.DEVICES) * len(impl.BACKENDS)
    for kernel in found["kernels"]:
        if kernel["device"] == "cpu":
            status = impl.status(kernel["operator"], kernel["backend"], "cpu")
            assert (kernel["ready"], kernel["reason"], kernel["mend"]) == status
        assert kernel["ready"] or (kernel["reason"] and kernel["mend"])
    assert found["extension"]["available"] == _native.available


def test_the_report_copes_with_missing_packages(monkeypatch):
    monkeypatch.setattr(report, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(_native, "build", {})
    assert re.search(r"^no-such-package +not installed$", report.as_text(report.report()), re.M)
    assert re.search(r"^extension +not built$", report.as_text(report.report()), re.M)
