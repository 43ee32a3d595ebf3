"""Builds latro_kernels._C where a C++ compiler is, and writes how it went to latro_kernels/_build.json.

LATRO_CUDA  unset: with CUDA when the build's torch has it and a toolkit is found; 1: with CUDA or fail; 0: without.
CC, CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS act as they do for any PyTorch extension.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from setuptools import setup
from setuptools.errors import OptionError, PlatformError
from torch.utils import cpp_extension

EXTENSION = "latro_kernels._C"
TORCH_ABI = "0x020b000000000000"  # 2.11: the oldest torch whose stable ABI the sources may use
DEFAULT_CUDA_ARCHES = "8.0+PTX;9.0"  # where no GPU is visible to build for; PTX serves the later ones

WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]  # vectors are only ever passed within a file
COMMON_FLAGS = [
    "-std=c++20",  # some torch in range would say c++17
    "-O3",
    # Again, as system directories: torch's own headers are not clean under -Wextra.
    *(flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)),
]


def sources(suffix: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc").glob(f"**/*{suffix}"))


def compiler_command() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "c++")


def compiler_fault() -> str | None:
    """Why no C++20 extension can be built here, or None."""
    for variable in ("CC", "CXX"):
        command = shlex.split(os.environ.get(variable, ""))
        if command and shutil.which(command[0]) is None:
            return f"{variable}={os.environ[variable]}, which is no program"
    compiler = compiler_command()
    if shutil.which(compiler[0]) is None:
        return f"no C++ compiler: {compiler[0]} is not on PATH"
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text(
            "#include <Python.h>\n#include <concepts>\n#include <string>\nstd::string f() { return {}; }\n"
        )
        flags = ["-std=c++20", "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}"]
        command = [*compiler, *flags, str(probe), "-o", str(probe.with_suffix(".so"))]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        return f"{shlex.join(compiler)} cannot build a C++20 extension: {first_line(result.stderr)}"
    return None


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")


def compiler_version() -> str:
    return first_line(subprocess.run([*compiler_command(), "--version"], capture_output=True, text=True).stdout)


def cuda_toolkit() -> Path | None:
    chosen = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    homes = [chosen] if chosen else [nvcc and Path(nvcc).parents[1], "/usr/local/cuda"]
    for home in map(Path, filter(None, homes)):
        # nvcc on PATH may be a wrapper that lies elsewhere than its toolkit.
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def cuda_version(toolkit: Path) -> str:
    text = subprocess.run([toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", text)
    return release[1] if release else "unknown"


def cuda_fault(toolkit: Path | None) -> tuple[str, str] | None:
    """Why the extension is built without CUDA, and the mend; or None to build with it."""
    wish = os.environ.get("LATRO_CUDA", "")
    if wish not in ("", "0", "1"):
        raise OptionError(f"LATRO_CUDA must be 0, 1 or unset, got {wish!r}")
    if wish == "0":
        return "installed with LATRO_CUDA=0", "install again without LATRO_CUDA=0"
    if toolkit is None:
        searched = "no CUDA toolkit in CUDA_HOME or CUDA_PATH, nor else beside nvcc on PATH or in /usr/local/cuda"
        if wish == "1":
            raise PlatformError(f"LATRO_CUDA=1 but {searched}; install one, or set CUDA_HOME to it")
        return f"{searched} at install", "install one or set CUDA_HOME to it, then install again"
    if wish == "1":
        return None
    if torch.version.cuda is None:
        return (
            f"installed with torch {torch.__version__}, which has no CUDA",
            "install a CUDA build of torch, then `pip install --no-build-isolation -e .`",
        )
    if cuda_version(toolkit).split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"the toolkit in {toolkit} is CUDA {cuda_version(toolkit)}, torch {torch.__version__} needs another major",
            f"install CUDA toolkit {torch.version.cuda} or set CUDA_HOME to it, then install again",
        )
    return None


def cuda_arch_flags() -> list[str]:
    """The architectures to build for; torch chooses the visible GPUs when it is told nothing.

    Machine code for 9.0 is 9.0a's, which alone has wgmma. PTX stays as it is: that of 9.0a serves no later GPU.
    """
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and torch.cuda.device_count() == 0:
        os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_CUDA_ARCHES
    flags = cpp_extension._get_cuda_arch_flags()
    return sorted({flag.replace("=compute_90,code=sm_90", "=compute_90a,code=sm_90a") for flag in flags})


class BuildNative(cpp_extension.BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        # Not the temporary folder of an editable install, so that ninja finds what it built before.
        self.build_temp = str(Path("build", "native"))

    def run(self) -> None:
        toolkit = cuda_toolkit()
        without_cuda = cuda_fault(toolkit)
        fault = compiler_fault()
        if fault:
            if os.environ.get("LATRO_CUDA") == "1":
                raise PlatformError(f"LATRO_CUDA=1 but {fault}")
            self.skip(fault)
            return
        arches = self.add_cuda(toolkit) if toolkit and not without_cuda else None
        os.environ.setdefault("CXX", shlex.join(compiler_command()))  # links with what compiled
        super().run()
        self.record(
            compiler=compiler_version(),
            torch=torch.__version__,
            cuda=None if without_cuda or not toolkit else cuda_version(toolkit),
            cuda_arches=arches,
            missing={"cuda": without_cuda} if without_cuda else {},
        )

    def skip(self, fault: str) -> None:
        mend = "install a C++20 compiler and Python's headers, or point CC and CXX at the compiler, then install again"
        print(f"latro: built without native kernels: {fault}.\nlatro: to mend it, {mend}.", file=sys.stderr)
        for stale in self.package_folder().glob("_C*.so"):
            stale.unlink()
        self.extensions = []
        missing = (f"not built at install: {fault}", mend)
        self.record(
            compiler=None,
            torch=torch.__version__,
            cuda=None,
            cuda_arches=None,
            missing={"cpu": missing, "cuda": missing},
        )

    def add_cuda(self, toolkit: Path) -> str:
        """Returns what is built for: machine code (sm) and PTX (compute)."""
        cpp_extension.CUDA_HOME = str(toolkit)  # torch looks for a toolkit only when it is a CUDA build itself
        flags = cuda_arch_flags()
        (extension,) = self.extensions
        # Among the extension's own flags: torch adds none where one has "arch" in it, as a path may.
        extension.extra_compile_args["nvcc"] += flags
        extension.sources += sources(".cu")
        extension.libraries += ["cudart"] + (["c10_cuda", "torch_cuda"] if torch.version.cuda else [])
        extension.library_dirs += [str(toolkit / "lib64"), str(toolkit / "lib")]
        return ", ".join(flag.rpartition("=")[2] for flag in flags)

    def record(self, **facts: object) -> None:
        self.package_folder().mkdir(parents=True, exist_ok=True)
        (self.package_folder() / "_build.json").write_text(json.dumps(facts, indent=2) + "\n")

    def package_folder(self) -> Path:
        return Path(self.get_ext_fullpath(EXTENSION)).parent


setup(
    ext_modules=[
        cpp_extension.CppExtension(
            EXTENSION,
            sources(".cpp"),
            depends=sources(".h") + sources(".cu"),
            include_dirs=[str(Path("csrc").absolute())],  # ninja compiles elsewhere
            py_limited_api=True,
            define_macros=[("TORCH_TARGET_VERSION", TORCH_ABI)],
            extra_compile_args={
                "cxx": [
                    *COMMON_FLAGS,
                    "-ffp-contract=fast",  # multiply and add in one rounding, where the instruction set has it
                    "-fvisibility=hidden",
                    *WARNINGS,
                ],
                "nvcc": [*COMMON_FLAGS, "-DUSE_CUDA", "-Xcompiler", ",".join(["-fvisibility=hidden", *WARNINGS])],
            },
        )
    ],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
