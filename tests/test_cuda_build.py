"""The CUDA kernels built for GPUs that need not be here, and what ptxas and the machine code say of them: nothing
spills, blocks fit, and the fused product multiplies by wgmma.

One build serves all tests. It leaves the CPU's kernels out, which every install compiles. Shared memory is bounded
elsewhere: what a kernel declares by ptxas, what its launch asks for by the sources' static_assert and by the emulator.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.test_install import NEEDS_COMPILER, NEEDS_SETUPTOOLS, build, copy_sources, record

pytestmark = [
    NEEDS_SETUPTOOLS,
    NEEDS_COMPILER,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA toolkit here"),
]

ARCHS = ("sm_80", "sm_90a")
REGISTERS = 65536  # of a multiprocessor


@dataclass(frozen=True)
class Kernel:
    symbol: str
    name: str  # with its template arguments
    arch: str
    registers: int
    stack_bytes: int
    spilled_bytes: int

    def __str__(self):
        return f"{self.name} on {self.arch}"


@dataclass(frozen=True)
class Build:
    folder: Path
    said: str  # by the compilers
    kernels: list[Kernel]

    def library(self):
        return self.folder / "latro_kernels" / "_C.abi3.so"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    copy_sources(folder)
    for source in (folder / "csrc").glob("*/*.cpp"):
        source.unlink()
    # No GPU visible: built for what a machine without one builds for.
    options = {
        "LATRO_CUDA": "1",
        "NVCC_APPEND_FLAGS": "-Xptxas=-v",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_CUDA_ARCH_LIST": "",
    }
    result = build(folder, **options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    return Build(folder, result.stdout, kernels_of(result.stdout))


def kernels_of(said):
    """ptxas speaks of each kernel, and of the functions in it that were not inlined."""
    found = []
    for part in said.split("Compiling entry function ")[1:]:
        symbol, arch = re.match(r"'(\w+)' for '(\w+)'", part).groups()

        def total(pattern, part=part):
            return sum(int(number) for number in re.findall(pattern, part))

        found.append(
            Kernel(
                symbol,
                demangled(symbol),
                arch,
                registers=total(r"Used (\d+) registers"),
                stack_bytes=total(r"(\d+) bytes stack frame"),
                spilled_bytes=total(r"(\d+) bytes spill"),
            )
        )
    return found


def demangled(symbol):
    whole = run("c++filt", symbol)
    return re.search(r"\w+(<[^(]*>)?(?=\()", whole)[0]


def run(*command):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def cuobjdump():
    """Of Triton's wheel, or of the toolkit, of which some lack it."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent / "backends" / "nvidia" / "bin"] if triton else []
    found = shutil.which("cuobjdump", path=os.pathsep.join([*map(str, folders), os.environ["PATH"]]))
    if found is None:
        pytest.skip("cuobjdump is neither in Triton nor on PATH")
    return found


def assert_none(faults):
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)


def test_the_sources_compile_and_link_without_a_warning(built):
    assert "warning" not in built.said.lower()
    assert record(built.folder)["cuda"]
    assert record(built.folder)["cuda_arches"] == "compute_80, sm_80, sm_90a"


def test_the_driver_is_not_linked(built):
    """It is there on machines with a GPU alone; its functions come through the runtime."""
    undefined = run("nm", "--dynamic", "--undefined-only", built.library())
    assert "cudaLaunchKernel" in undefined
    assert not re.findall(r"\bcu[A-Z]\w+", undefined)


def test_every_kernel_is_there_for_every_gpu(built):
    of_arch = {arch: {kernel.name for kernel in built.kernels if kernel.arch == arch} for arch in ARCHS}
    assert of_arch[ARCHS[0]] == of_arch[ARCHS[1]]
    assert len(built.kernels) == sum(map(len, of_arch.values()))
    assert any(name.startswith("self_reward_kernel") for name in of_arch[ARCHS[0]])


def test_registers_suffice(built):
    assert_none(
        [
            f"{kernel}: a stack of {kernel.stack_bytes} bytes, {kernel.spilled_bytes} of them spilled and loaded again"
            for kernel in built.kernels
            if kernel.spilled_bytes or kernel.stack_bytes
        ]
    )


def test_a_block_of_the_size_that_is_launched_has_its_registers(built):
    most = most_threads(built)
    faults = [f"{kernel} has no launch bounds" for kernel in built.kernels if (kernel.arch, kernel.symbol) not in most]
    for kernel in built.kernels:
        threads = most.get((kernel.arch, kernel.symbol), 0)
        if threads * -(-kernel.registers // 8) * 8 > REGISTERS:
            faults.append(f"{kernel}: {kernel.registers} registers for each of {threads} threads")
    assert_none(faults)


def most_threads(built):
    """(architecture, symbol): threads of a block, from the kernel's launch bounds."""
    found, arch, symbol = {}, None, None
    for line in run(cuobjdump(), "--dump-elf", built.library()).splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif line.startswith(".nv.info."):
            symbol = line.removeprefix(".nv.info.")
        elif "EIATTR_" in line:
            attribute = line.split()[-1]
        elif "Value:" in line and attribute == "EIATTR_MAX_THREADS":
            x, y, z = (int(number, 16) for number in line.split()[1:])
            found[arch, symbol] = x * y * z
    return found


def test_the_fused_product_is_hoppers(built):
    """wgmma, whose operands the copy engine brings, several in flight; ptxas says so when it makes each wait."""
    assert not re.findall(r".*(?:Potential Performance Loss|setmaxnreg ignored).*", built.said)
    products = [kernel for kernel in built.kernels if kernel.arch == "sm_90a" and "product" in kernel.name]
    assert products
    code = machine_code(built, "sm_90a")
    assert_none(
        [
            f"{kernel}: no {instruction}"
            for kernel in products
            for instruction in ("HGMMA.64x256x16", "UTMALDG")
            if instruction not in code[kernel.symbol]
        ]
    )


def machine_code(built, arch):
    """symbol: its instructions."""
    dumped = run(cuobjdump(), "--dump-sass", "--gpu-architecture", arch, built.library())
    parts = (part.partition("\n") for part in dumped.split("Function : ")[1:])
    return {symbol.strip(): code for symbol, _, code in parts}
