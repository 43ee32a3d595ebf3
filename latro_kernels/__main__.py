"""`python -m latro_kernels`: which backends are ready here, why the others are not, and how to mend that."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import textwrap
from pathlib import Path
from typing import Any

import torch

from latro_kernels import _native, impl

PACKAGES = ("latro", "torch", "triton", "transformers")
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
WIDTH = 96
NO_DEVICE = impl.Status(False, "no CUDA device is visible to torch", "run on a machine with an NVIDIA GPU")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m latro_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the same for machines")
    found = report()
    print(json.dumps(found, indent=2) if parser.parse_args().json else as_text(found))


def report() -> dict[str, Any]:
    return {
        "kernels": [kernel(*names) for names in all_kernels()],
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "extension": {"available": _native.available, **_native.build},
        "hardware": {"cpu": cpu(), "gpus": [gpu(i) for i in range(torch.cuda.device_count())]},
    }


def all_kernels() -> list[tuple[str, str, str]]:
    return [(o, d, b) for o in impl.OPERATORS for d in impl.DEVICES for b in impl.BACKENDS]


def kernel(operator: str, device: str, backend: str) -> dict[str, Any]:
    found = impl.status(operator, backend, device)
    if found.ready and device == "cuda" and not torch.cuda.is_available():
        found = NO_DEVICE
    exists = impl.exists(operator, backend, device)
    return {"operator": operator, "device": device, "backend": backend, "exists": exists, **found._asdict()}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return {
        "model": facts.get("model name") or platform.processor() or platform.machine(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "model": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def as_text(found: dict[str, Any]) -> str:
    sections = [matrix(found["kernels"]), versions(found["versions"], found["extension"]), hardware(found["hardware"])]
    return "\n\n".join(sections)


def matrix(kernels: list[dict[str, Any]]) -> str:
    notes: list[tuple[str, str]] = []
    lines = [row("operator", "device", impl.BACKENDS)]
    for start in range(0, len(kernels), len(impl.BACKENDS)):
        cells = kernels[start : start + len(impl.BACKENDS)]
        lines.append(row(cells[0]["operator"], cells[0]["device"], [cell(kernel, notes) for kernel in cells]))
    lines += ["", "impl='auto' takes the first ready one from the left; - means that no such kernel is written."]
    lines += ["fused_self_reward_loss on reference is made of linear_logprobs and self_reward, each by its own best."]
    for number, (reason, mend) in enumerate(notes, 1):
        lines.append(textwrap.fill(f"[{number}] {reason}. To mend it: {mend}.", WIDTH, subsequent_indent="    "))
    return "\n".join(lines)


def row(operator: str, device: str, cells: Any) -> str:
    return f"{operator:<24}{device:<8}{''.join(f'{cell:<12}' for cell in cells)}".rstrip()


def cell(kernel: dict[str, Any], notes: list[tuple[str, str]]) -> str:
    if kernel["ready"]:
        return "ready"
    if not kernel["exists"]:
        return "-"
    note = (kernel["reason"], kernel["mend"])
    if note not in notes:
        notes.append(note)
    return f"no [{notes.index(note) + 1}]"


def versions(found: dict[str, str | None], extension: dict[str, Any]) -> str:
    lines = [f"{name:<18}{number or 'not installed'}" for name, number in found.items()]
    if extension.get("compiler"):
        cuda = f"CUDA {extension['cuda']} for {extension['cuda_arches']}" if extension["cuda"] else "without CUDA"
        lines.append(f"{'extension':<18}{extension['compiler']}, torch {extension['torch']}, {cuda}")
    else:
        lines.append(f"{'extension':<18}not built")
    return "\n".join(lines)


def hardware(found: dict[str, Any]) -> str:
    cpu, gpus = found["cpu"], found["gpus"]
    sets = " ".join(cpu["instruction_sets"]) or "instruction sets unknown"
    lines = [f"{'cpu':<18}{cpu['model']}, {cpu['cores']} cores, torch uses {cpu['torch_threads']}; {sets}"]
    for index, gpu in enumerate(gpus):
        lines.append(f"{f'gpu {index}':<18}{gpu['model']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB")
    return "\n".join(lines if gpus else [*lines, f"{'gpu':<18}none visible to torch"])


if __name__ == "__main__":
    main()
