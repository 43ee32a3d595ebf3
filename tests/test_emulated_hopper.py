"""That tests/emulated_cuda/emulated_hopper.h does what Hopper does, and shows what goes wrong there only at times."""

from pathlib import Path

import pytest
import torch

from tests import emulator

# What comes as late as it may, and else at once.
LATE = ["", "copies", "products", "copies products"]


def product(mistake, rows=64, columns=256, D=192):
    """What the kernel makes of it, and what is right: of whole numbers, so that no sum is rounded."""
    torch.manual_seed(0)
    a, b = torch.randint(-4, 5, (rows, D)).half(), torch.randint(-4, 5, (columns, D)).half()
    out = torch.full((2, 64, 256), torch.nan)
    ops = emulator.library("latro_hopper_kernels", Path(__file__).with_name("hopper_kernels.cu"))
    ops.product(mistake, a, b, out)
    right = torch.zeros(64, 256)
    right[:rows, :columns] = a.float() @ b.float().T
    return out, right.expand(2, -1, -1)


@pytest.mark.parametrize("seed", ["", "1"])
@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("size", [(64, 256, 192), (50, 130, 72), (1, 1, 8)], ids=str)
def test_a_product_is_right_whenever_its_parts_are_done(size, late, seed, monkeypatch):
    monkeypatch.setenv("LATRO_EMULATOR_LATE", late)
    monkeypatch.setenv("LATRO_EMULATOR_SEED", seed)
    out, right = product("none", *size)
    assert torch.equal(out, right)


@pytest.mark.parametrize(
    ("mistake", "D", "late"),
    [
        ("operands are read before they are copied", 64, "copies"),
        ("sums are read before they are made", 64, "products"),
        ("operands are overwritten before they are read", 192, "products"),
    ],
)
def test_a_mistake_shows_where_something_is_late(mistake, D, late, monkeypatch):
    monkeypatch.setenv("LATRO_EMULATOR_LATE", late)
    out, right = product(mistake, D=D)
    assert not torch.equal(out, right)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("products that nothing begins", "a product before begin_products"),
        ("a barrier that expects too much", "no thread can go on\n.*hopper::wait.* of .*product_kernel"),
        ("a barrier at which too many arrive", "more arrive at a barrier than it was made for"),
        ("a barrier that is not made", "a barrier is used before it is made"),
    ],
)
def test_what_a_gpu_would_hang_on_is_reported(mistake, message):
    with pytest.raises(RuntimeError, match=message):
        product(mistake)


def test_a_matrix_that_copies_cannot_read_is_refused():
    with pytest.raises(RuntimeError, match="the driver would refuse this matrix"):
        product("none", D=9)
