"""What the study's bases are before anything is trained on them, by validation questions alone.

    python -m latro.study.gate gate.json --seeds 3             # about 20 minutes on one core

The gate is the margin: where full samples make the answer less likely than no rationale does, LaTRO is predicted to
remove the rationales.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from latro.grading import graders_for
from latro.study import measure
from latro.study.bases import RECIPES, SIZES, SMALL, tokenizer_of, train_bases
from latro.study.methods import text_of, tokens_needed
from latro.tasks import Task, named

QUESTIONS = 192


def rows_of(name: str, seed: int, size: str) -> Iterator[dict[str, Any]]:
    task, begun = named(name), time.process_time()
    bases = train_bases(task, seed, RECIPES[name], size)
    seconds = round(time.process_time() - begun)  # of all recipes together
    for recipe, model in bases.items():
        yield {"task": name, "size": size, "recipe": recipe, "seed": seed, **looked_at(task, model), "seconds": seconds}


def looked_at(task: Task, model: LlamaForCausalLM) -> dict[str, float]:
    """full: the share of samples with as many tokens as the golden rationale or more; full_right: of them."""
    tokenizer = tokenizer_of(task)
    text, max_tokens = text_of(task, tokenizer), tokens_needed(task, tokenizer)
    questions = task.problems(0, QUESTIONS, "validation")
    golden = {example.id: len(example.rationale or "") for example in questions}
    grader = graders_for("", task.answer_template)[0]
    evaluation = measure.ask(model, text, grader, questions, max_tokens)
    samples = [(golden[record.id], sample) for record in evaluation.records for sample in record.samples]
    full = [sample for length, sample in samples if sample.rationale_length >= length]
    metrics = evaluation.metrics()
    found = {
        "greedy": metrics["accuracy"],
        "sampled": metrics["sample_accuracy"],
        "length": _mean([sample.rationale_length for _, sample in samples]),
        "full": len(full) / len(samples),
        "full_right": _mean([sample.right[grader.name] for sample in full]),
        "margin": measure.margin(model, text, questions, max_tokens),
    }
    return {name: round(value, 3) for name, value in found.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m latro.study.gate", description="Measure the study's bases.")
    parser.add_argument("out", type=Path, help="the file to write, a list with an object for each base")
    parser.add_argument("--tasks", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="TASK")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", default=SMALL, choices=list(SIZES))
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for task in options.tasks:
            for row in rows_of(task, seed, options.size):
                rows.append(row)
                print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
            options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    # As many threads whatever the machine, so that the seed alone decides.
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    main()
