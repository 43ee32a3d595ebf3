"""What `latro plan` is told. Nothing large is imported here, so that `latro --help` stays quick."""

from __future__ import annotations

import argparse

from latro.plan.machine import GPUS

REFERENCES = ("kept", "offloaded", "adapter off", "none")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a folder with config.json, or a name such as llama-3.1-8b")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(GPUS)} [h100]")
    for name, default, help in (
        ("gpus", 8, "on all machines"),
        ("gpus_per_machine", 8, "of a machine, linked by NVLink"),
        ("network", 400, "Gbit/s of each GPU's port to other machines"),
        ("prompt", 256, "tokens"),
        ("rationale", 200, "tokens"),
        ("answer", 20, "tokens"),
        ("num_generations", 16, "rationales of a prompt, K"),
        ("prompts", 64, "of an update, on all GPUs"),
        ("rollout_batch_size", 256, "rationales that grow at once on a GPU"),
        ("rollout_gpus", 0, "others, which sample; 0: those that train"),
        ("memory_budget", 1024, "MiB of exponentials that the head may keep"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{help} [{default}]")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train an adapter of this rank; else all weights")
    parser.add_argument("--reference", help=f"{', '.join(REFERENCES)} [kept; under --lora adapter off]")
