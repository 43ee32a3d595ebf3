"""The Triton kernels compiled for GPUs that need not be here: they fit, do not spill, and multiply by wgmma on Hopper.

`python -m tests.ahead_of_time 90` prints what is asserted here. Of float32, whose exact products have no tensor cores
and are there for tests, only that it compiles and fits.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.tune import constants_of, rows_taken
from latro_kernels import _gpu, _triton

pytestmark = pytest.mark.skipif(not _triton.available, reason="triton is not installed")

ROOT = Path(__file__).parents[1]
TABLE = json.loads(_gpu.TABLE.read_text())
del TABLE["linear_logprobs.cuda"]  # which is for no Triton kernel

# What a block of threads may have, by architecture: A100, other Ampere and Ada, Hopper, Blackwell, other Blackwell.
SHARED_KIB = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}
COMMON = (80, 90)

SEVEN_HEADS = "7 query heads to a key head, whose rows take a division to find"
FULL = "the sums of a head of 256 leave few registers"

# (kernel, head size): bytes that it may store and load again for want of registers, and when. Others of COMMON: none.
SPILLS: dict[tuple[str, int | None], tuple[int, str]] = {
    ("forward", 64): (128, SEVEN_HEADS),
    ("forward", 128): (64, SEVEN_HEADS),
    ("forward", 256): (128, FULL),
    ("grad_queries", 64): (16, "a softcap"),
    ("grad_queries", 256): (640, FULL),
    ("grad_keys", 64): (256, f"a softcap, or {SEVEN_HEADS}"),
    ("grad_keys", 128): (
        256,
        "two sums of 64 keys fill the registers of 4 warps; 8 would share p with each other",
    ),
    ("grad_keys", 256): (2304, FULL),
    ("product_and_epilogue", None): (512, "a softcap, most on an A100 with Triton 3.6"),
    ("epilogue", None): (16, "a bias is one number too many for the 80 registers that ptxas keeps to on an A100"),
    ("add_rows", None): (16, "a ragged D"),
}

# Kernels of which ptxas lets each wgmma wait for the one before when there is a softcap, and why that stands.
SERIALIZED_WITH_SOFTCAP = {"grad_queries": "one stage in place of two would mend it, and load nothing ahead"}


@pytest.fixture(scope="module", params=["common", pytest.param("all", marks=pytest.mark.slow)])
def records(request):
    """Of tests/ahead_of_time.py, in a process for each architecture, two at once."""
    archs, options = (COMMON, []) if request.param == "common" else (SHARED_KIB, ["--all"])
    with ThreadPoolExecutor(2) as pool:
        return [record for of_arch in pool.map(lambda arch: compiled_for(arch, options), archs) for record in of_arch]


def compiled_for(arch, options):
    command = [sys.executable, "-m", "tests.ahead_of_time", str(arch), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def kernels(records):
    """Those that test_every_kernel_compiles does not name."""
    return [record for record in records if "registers" in record]


def assert_none(faults):
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)


def named(record):
    constants = ", ".join(f"{name}={value}" for name, value in record["constants"].items())
    return f"{record['kernel']} on sm_{record['arch']} in {record['case']} with {constants}"


def test_every_kernel_compiles(records):
    assert_none([f"{named(record)}: {record['fault']}" for record in records if "fault" in record])


def test_every_kernel_of_the_table_is_compiled(records):
    assert {kernel for record in records for kernel in record.get("table", {})} == set(TABLE)


@pytest.mark.parametrize("records", [pytest.param("all", marks=pytest.mark.slow)], indirect=True)
def test_every_row_of_the_table_is_compiled(records):
    tables = [record for record in records if "table" in record]
    assert len(tables) == len(SHARED_KIB)
    assert_none(
        [
            f"{kernel} on sm_{record['arch']}: {row}"
            for record in tables
            for kernel, rows in TABLE.items()
            for row in rows_taken(rows, record["arch"])
            if constants_of(row) not in record["table"][kernel]
        ]
    )


def test_shared_memory_suffices(kernels):
    assert_none(
        [
            f"{named(kernel)}: {kernel['shared_bytes'] / 1024:.1f} KiB of shared memory, there are {limit}"
            for kernel in kernels
            if kernel["shared_bytes"] > 1024 * (limit := SHARED_KIB[kernel["arch"]])
        ]
    )


def test_registers_suffice(kernels):
    assert_none(
        [
            f"{named(kernel)}: {kernel['spilled_bytes']} bytes spilled, allowed are {bound}"
            for kernel in kernels
            if kernel["arch"] in COMMON
            and "float32" not in kernel["case"]
            and kernel["spilled_bytes"]
            > (bound := SPILLS.get((kernel["kernel"], kernel["constants"].get("BLOCK_E")), (0, ""))[0])
        ]
    )


def test_products_of_16_bit_operands_are_hoppers(kernels):
    """wgmma, several in flight, rather than Ampere's mma, at half the rate."""
    of_hopper = [kernel for kernel in kernels if kernel["arch"] == 90 and kernel["products"]]
    assert of_hopper
    slow = [
        f"{named(kernel)}: {kernel['products_without_wgmma']} of {kernel['products']} products without wgmma"
        for kernel in of_hopper
        if kernel["products_without_wgmma"] or not kernel["wgmma"]
    ]
    one_at_a_time = [
        f"{named(kernel)}: each wgmma waits for the one before: {', '.join(kernel['serialized'])}"
        for kernel in of_hopper
        if kernel["serialized"] and not (kernel["kernel"] in SERIALIZED_WITH_SOFTCAP and "softcap" in kernel["case"])
    ]
    assert_none(slow + one_at_a_time)
