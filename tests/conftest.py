import os

import pytest
import torch

# Before Triton is imported: its kernels then run on a CPU, in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from latro_kernels import _native

# The matrices are tiny: with more threads the model tests take four times as long.
torch.set_num_threads(1)

INSTRUCTION_SETS = torch.ops.latro_kernels.instruction_sets().split(",") if _native.available else []


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request, monkeypatch):
    """Each one that this machine has, and the emulation of one that it may not have."""
    monkeypatch.setenv("LATRO_CPU", request.param)
    return request.param
