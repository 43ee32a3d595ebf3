"""Loads the compiled extension, once. That it is missing is a state to tell of, not an error."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

TORCH_RANGE = ((2, 11), (2, 14))  # from, up to but without; as in pyproject.toml
INSTALL_AGAIN = "run `pip install -e .` again"


def _read_build() -> dict[str, Any]:
    """What setup.py wrote; empty where it never ran."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}


def _load(build: dict[str, Any], torch_version: str) -> tuple[str, str] | None:
    """Registers the operators; or why it cannot, and the mend."""
    lowest, above = TORCH_RANGE
    if not lowest <= tuple(int(part) for part in torch_version.split(".")[:2]) < above:
        wanted = f"torch>={_dotted(lowest)},<{_dotted(above)}"
        return f"the extension serves {wanted}, this is torch {torch_version}", f"install {wanted}"
    if "cpu" in build.get("missing", {}):
        reason, mend = build["missing"]["cpu"]
        return reason, mend
    try:
        importlib.import_module("latro_kernels._C")
    except ModuleNotFoundError:
        return "the extension latro_kernels._C is not built", INSTALL_AGAIN
    except ImportError as error:
        return f"the extension latro_kernels._C does not load: {error}", INSTALL_AGAIN
    return None


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


build = _read_build()
_fault = _load(build, torch.__version__)
available: bool = _fault is None
reason, mend = _fault or (None, None)
cuda_arches: tuple[str, ...] = tuple((build.get("cuda_arches") or "").split(", "))  # "sm_90a": code, "compute_80": PTX


def serves(capability: int) -> bool:
    """Whether the CUDA kernels have code for such a GPU, or PTX that becomes it."""
    for arch in cuda_arches:
        kind, _, number = arch.partition("_")
        if not number.isdigit():  # 90a is for 9.0 and nothing else
            found = kind == "sm" and number[:-1] == str(capability)
        elif kind == "sm":
            found = int(number) <= capability and int(number) // 10 == capability // 10
        else:
            found = int(number) <= capability
        if found:
            return True
    return False


def fault(device_type: str) -> tuple[str, str] | None:
    """Why the extension has no kernels for this device, and the mend; None when it has."""
    if _fault:
        return _fault
    missing = build.get("missing", {}).get(device_type)
    return (missing[0], missing[1]) if missing else None
