"""Whether Triton runs here."""

from __future__ import annotations

import importlib.util

LOWEST = (3, 6)  # the Triton of torch 2.11

available = importlib.util.find_spec("triton") is not None


def fault(device_type: str) -> tuple[str, str] | None:
    """Why Triton kernels cannot run on this device, and the mend; None when they can."""
    wanted = f"triton>={LOWEST[0]}.{LOWEST[1]}"
    if not available:
        return "triton is not installed", f"install {wanted}, which is there for Linux"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < LOWEST:
        return f"the kernels need {wanted}, this is triton {triton.__version__}", f"install {wanted}"
    if device_type == "cpu" and not triton.knobs.runtime.interpret:
        return "Triton runs on a CPU in its interpreter alone", "to test kernels, slowly, set TRITON_INTERPRET=1"
    return None
