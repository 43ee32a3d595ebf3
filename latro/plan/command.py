"""`latro plan`: which layouts fit, what the best one holds and takes, and what a rationale costs by each procedure."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from latro.plan.layout import (
    Estimate,
    Layout,
    Update,
    estimates,
    pieces_of_prompt,
    precision_of,
    rollout_seconds,
)
from latro.plan.machine import ATTENTION, GPUS, LINKS, MEMORY, PRODUCTS, USABLE, Machine
from latro.plan.memory import backward_peak, waiting
from latro.plan.shape import named_shape
from latro.plan.work import PROCEDURES, Batch, flops

SAMPLING = ("sampling", "reading prompts")

ASSUMED = f"""Assumed: of the datasheet's rates {PRODUCTS:.0%} in products, {ATTENTION:.0%} in attention,
{MEMORY:.0%} of the memory's bandwidth, {LINKS:.0%} of the links'; {USABLE:.0%} of memory in use; lengths all equal;
AdamW in float32; collectives beside products; gradients reduced after every micro-batch;
sampling before learning. Not counted: launches, the longest rationale that others wait for, the data."""


def plan(known: argparse.Namespace) -> None:
    print(text(*read(known)))


def read(known: argparse.Namespace) -> tuple[str, Update, Machine]:
    if known.gpu.lower() not in GPUS:
        raise ValueError(f"plan: --gpu must be one of {', '.join(GPUS)}, got {known.gpu!r}")
    if known.num_generations < 2:
        raise ValueError(f"plan: --num_generations must be at least 2, got {known.num_generations}")
    machine = Machine(GPUS[known.gpu.lower()], known.gpus, known.gpus_per_machine, known.network * 1e9 / 8)
    batch = Batch(known.prompt, known.rationale, known.answer, known.num_generations)
    shape = named_shape(known.model)
    update = Update(
        shape if known.lora is None else shape.with_adapter(known.lora),
        batch,
        known.prompts,
        known.reference or ("kept" if known.lora is None else "adapter off"),
        known.memory_budget << 20,
        known.rollout_batch_size,
        known.rollout_gpus,
    )
    return known.model, update, machine


def text(model: str, update: Update, machine: Machine) -> str:
    found = estimates(update, machine)
    # Of those that fit, the fastest that runs here, if any does.
    best = min(found, key=lambda one: (not one.micro_batch, not one.layout.is_ours(update)))
    parts = [_heading(model, update, machine), _layouts(found, update)]
    if best.micro_batch:
        parts += [_memory(best, machine), _time(best, update), _procedures(best.layout, update, machine)]
    else:
        parts += [f"No layout fits. {best.layout.name}, with one prompt in a micro-batch:", _memory(best, machine)]
    return "\n\n".join([*parts, ASSUMED])


def _heading(model: str, update: Update, machine: Machine) -> str:
    shape, gpu = update.shape, machine.gpu
    P, R, A, K = update.batch.sizes
    learns = f"an adapter of {shape.adapter / 1e6:.0f} M" if shape.adapter else "all of them"
    return (
        f"{model}: {shape.base / 1e9:.2f} billion parameters, training {learns}; reference {update.reference}\n"
        f"{machine.gpus} x {gpu.name.upper()}, {machine.machines} machines ({gpu.source})\n"
        f"an update: {update.prompts} prompts of {P} tokens, each with {K} rationales of {R} and answers of {A}"
    )


def _layouts(found: Sequence[Estimate], update: Update) -> str:
    rows = [("layout", "runs here", "micro-batch", "GB", "seconds", "learning is bound by")]
    for one in found:
        ours = "yes" if one.layout.is_ours(update) else ""
        size = f"{sum(one.memory.values()) / 1e9:.0f}"
        if one.micro_batch:
            rows.append((one.layout.name, ours, str(one.micro_batch), size, f"{one.total:.1f}", one.bound))
        else:
            rows.append((one.layout.name, ours, "does not fit", size, "", ""))
    return _table(rows)


def _memory(best: Estimate, machine: Machine) -> str:
    total = sum(best.memory.values())
    rows = [(f"GB of a GPU: {best.layout.name}", f"of {machine.gpu.memory / 1e9:.0f}")]
    rows += [(name, f"{size / 1e9:.1f}") for name, size in _largest_first(best.memory)]
    return _table([*rows, ("total", f"{total / 1e9:.1f}")])


def _time(best: Estimate, update: Update) -> str:
    rows = [(f"seconds of an update: {best.layout.name}", "", "share")]
    rows += [(name, f"{s:.2f}", f"{s / best.total:.0%}") for name, s in _largest_first(best.seconds) if s]
    rows.append(("total", f"{best.total:.2f}", ""))
    bounds = ", ".join(f"{name} {seconds:.2f}" for name, seconds in best.bounds.items())
    made = update.prompts * update.batch.num_generations
    return f"{_table(rows)}\n{made / best.total:.0f} rationales a second; learning by resource, in seconds: {bounds}"


def _procedures(layout: Layout, update: Update, machine: Machine) -> str:
    """GPU-milliseconds of one rationale, links and optimizer aside, which do not depend on the procedure."""
    columns = {name: _of_rationale(name, layout, update, machine) for name in PROCEDURES}
    names = [name for name, _ in _largest_first(next(iter(columns.values())))]
    totals = [sum(pieces.values()) for pieces in columns.values()]
    learning = [sum(pieces[name] for name in names if name not in SAMPLING) for pieces in columns.values()]
    return _table(
        [
            ("milliseconds of a GPU for a rationale", *columns),
            *((name, *(f"{pieces[name]:.1f}" for pieces in columns.values())) for name in names),
            ("total", *(f"{total:.1f}" for total in totals)),
            ("times ours", *(f"{total / totals[-1]:.1f}" for total in totals)),
            ("without sampling, times ours", *(f"{one / learning[-1]:.1f}" for one in learning)),
            ("TFLOP", *(f"{_flops_of_rationale(name, update) / 1e12:.2f}" for name in columns)),
            ("GB of a prompt's backward pass", *(f"{_peak(name, layout, update) / 1e9:.1f}" for name in columns)),
        ]
    )


def _flops_of_rationale(procedure: str, update: Update) -> float:
    """Of scoring and learning."""
    works = PROCEDURES[procedure](update.batch)
    return sum(sum(flops(update.shape, work).values()) for work in works) / update.batch.num_generations


def _peak(procedure: str, layout: Layout, update: Update) -> int:
    """Bytes of a prompt with all its rationales, no layer checkpointed, parameters and their gradients aside."""
    precision = precision_of(update, layout)
    return backward_peak(
        update.shape, precision, waiting(procedure, update.shape, update.batch, precision, update.budget)
    )


def _of_rationale(procedure: str, layout: Layout, update: Update, machine: Machine) -> dict[str, float]:
    K = update.batch.num_generations
    learning = pieces_of_prompt(procedure, update, machine, layout)
    found = {name: 1000 * layout.tensor * seconds / K for name, seconds in learning.items()}
    sampled = rollout_seconds(update, machine, layout, shares_prefix=procedure == "ours")
    gpus = update.rollout_gpus or machine.gpus
    return found | {name: 1000 * gpus * sampled[name] / (update.prompts * K) for name in SAMPLING}


def _largest_first(pieces: dict[str, int] | dict[str, float]) -> list[tuple[str, float]]:
    return sorted(pieces.items(), key=lambda piece: -piece[1])


def _table(rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    head, *body = rows
    return "\n".join([line(head), "-" * len(line(head)), *map(line, body)])
