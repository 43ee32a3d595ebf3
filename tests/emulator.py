"""The CUDA kernels on the CPU: csrc/**/*.cu built by a C++ compiler against tests/emulated_cuda, as torch operators.

`build()` is the namespace of the library: its operators are those of torch.ops.latro_kernels, take CPU tensors, and run
every thread that a GPU would run. CXX and CXXFLAGS act as they do for any build.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from latro_kernels import impl
from latro_kernels.linear_logprobs import api, cuda, native

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
EMULATED_CUDA = ROOT / "tests" / "emulated_cuda"
BUILT = ROOT / "build" / "emulated"
FLAGS = [
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    *("-Wall", "-Wextra", "-Wno-psabi"),
    "-Wno-unknown-pragmas",  # unroll
    *("-DLATRO_EMULATED", "-DLATRO_CUDA_KEY=CPU", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
    *(f"-I{folder}" for folder in (EMULATED_CUDA, CSRC)),
    *(f"-isystem{folder}" for folder in (*cpp_extension.include_paths(), sysconfig.get_path("include"))),
]


@functools.cache
def build():
    """torch.ops.latro_emulated."""
    return library("latro_emulated", CSRC / "ops.cpp", *sorted(CSRC.glob("**/*.cu")))


def library(namespace: str, *sources: Path):
    """torch.ops.<namespace> of these sources, built if they have changed; skips the test without a compiler."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"the emulator needs a C++ compiler, and {compiler[0]} is not on PATH")
    command = [*compiler, *FLAGS, f"-DLATRO_NAMESPACE={namespace}", *shlex.split(os.environ.get("CXXFLAGS", ""))]
    files = [*sources, *sorted(EMULATED_CUDA.glob("*.cpp"))]
    BUILT.mkdir(parents=True, exist_ok=True)
    with (BUILT / f"{namespace}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # CI runs tests in two processes, and one build is enough
        built = BUILT / f"{namespace}-{_key(command, files)}.so"
        if not built.exists():
            for old in BUILT.glob(f"{namespace}-*.so"):
                old.unlink()
            _compile(command, files, built)
        torch.ops.load_library(built)
    return getattr(torch.ops, namespace)


@contextlib.contextmanager
def in_place_of(operator: str) -> Iterator[None]:
    """torch.ops.latro_kernels.<operator> runs the emulated CUDA kernel on CPU tensors."""
    emulated = getattr(build(), operator)
    override = torch.library.Library("latro_kernels", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")  # it is meant
        override.impl(operator, emulated.default, "CPU", allow_override=True)
    try:
        yield
    finally:
        override._destroy()


def _key(command: list[str], files: list[Path]) -> str:
    headers = [*sorted(EMULATED_CUDA.glob("*.h")), *sorted(CSRC.glob("**/*.h"))]
    parts = [torch.__version__, *command, *(path.read_text() for path in (*files, *headers))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(command: list[str], files: list[Path], out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [Path(folder, f"{i}.o") for i in range(len(files))]
        jobs = [[*command, "-c", "-xc++", str(file), "-o", str(to)] for file, to in zip(files, objects, strict=True)]
        list(pool.map(_run, jobs))
        whole = Path(folder, out.name)
        paths = [f"-L{path}" for path in cpp_extension.library_paths()]
        _run([*command, "-shared", *map(str, objects), *paths, "-ltorch_cpu", "-o", str(whole)])
        whole.rename(out)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stderr}"


def use_as_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has impl="native" run the CUDA kernels of the linear head on CPU tensors."""
    monkeypatch.setattr(cuda, "OPS", build())
    monkeypatch.setattr(native, "KERNELS", cuda.KERNELS)
    monkeypatch.setitem(api.KERNELS, "native", cuda.KERNELS)
    for operator in ("linear_logprobs", "fused_self_reward_loss"):
        monkeypatch.setitem(impl.DTYPES, (operator, "native", "cpu"), impl.HALF_AND_SINGLE)
