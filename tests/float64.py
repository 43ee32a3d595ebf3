"""Run a model in float64 throughout, although it casts norms, softmax, rotary angles and routing to float32."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode


class Float64(TorchFunctionMode):
    """Every request for float32 is one for float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [_lift(value) for value in args]
        kwargs = {name: _lift(value) for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def _lift(value):
    return torch.float64 if value is torch.float32 else value
