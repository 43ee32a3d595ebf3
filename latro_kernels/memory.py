"""How much memory kernels may keep between a forward pass and its backward pass."""

from __future__ import annotations

from latro_kernels import checks

_budget = 1 << 30


def get_memory_budget() -> int:
    """Bytes of exponentials that a call may keep: 1 GiB unless set."""
    return _budget


def set_memory_budget(budget: int) -> None:
    """Let a call keep `budget` bytes of exponentials of the logits; all of them are M * V numbers of hidden's dtype.

    What is not kept is made again in the backward pass: at 0, the head costs four thirds of the time at most.
    """
    global _budget
    checks.check_number("set_memory_budget", "budget", budget)
    if budget < 0 or budget != int(budget):
        raise ValueError(f"set_memory_budget: budget must be a whole number of bytes >= 0, got {budget}")
    _budget = min(int(budget), 2**63 - 1)  # what the kernels can count to
