"""The demo's base model: it can reason about `latro.demo.task`, but mostly does not.

    python -m latro.demo.base --seed 0 --out FOLDER

It learns the task from clean texts, and then from texts as they are found: most have no rationale, others half of one,
or one with a mistake, and some answers are wrong. Only programs that are sums throughout, one in eight, are always
worked out. So the base reasons about those; elsewhere it answers at once, and is mostly wrong.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from latro.demo.task import ALPHABET, MARKER, STEPS, Problem, draws, written
from latro.study.bases import END, Progress, Recipe, Training, characters, encode, new_model

__all__ = ["END", "FOLDER", "Recipe", "clean", "encode", "main", "mixed", "new_tokenizer", "train", "with_mistake"]

FOLDER = Path(__file__).parent / "weights"  # of the base that is shipped
# The shipped one's configuration.
SHIPPED: dict[str, Any] = {
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def new_tokenizer() -> PreTrainedTokenizerFast:
    return characters(ALPHABET)


def train(seed: int, recipe: Recipe | None = None, progress: Progress = lambda step, loss: None) -> LlamaForCausalLM:
    """A base model. The same seed gives the same one, on one machine with one number of threads."""
    recipe = recipe or Recipe()
    tokenizer = new_tokenizer()
    training = Training(new_model(seed, tokenizer, **SHIPPED), tokenizer, recipe)
    problems, rng = draws(seed, "train"), random.Random(f"texts {seed}")
    training.learn(((problem.prompt, clean(problem)) for problem in problems), recipe.clean_steps, progress)
    training.learn(
        ((problem.prompt, mixed(problem, recipe, rng)) for problem in problems), recipe.mixed_steps, progress
    )
    return training.model.eval()


def clean(problem: Problem) -> str:
    return problem.rationale + MARKER + problem.answer


def mixed(problem: Problem, recipe: Recipe, rng: random.Random) -> str:
    """A rationale and answer of the mixture, which is of programs that subtract; the rest are clean."""
    values, answer = problem.values, problem.answer
    kind = rng.random() if min(problem.steps) < 0 else 1.0
    if kind < recipe.empty:
        values = ()
    elif kind < recipe.empty + recipe.half:
        values = values[: rng.randrange(1, STEPS)]
    elif kind < recipe.empty + recipe.half + recipe.sloppy:
        values = with_mistake(problem, rng)
        answer = str(values[-1])
    if rng.random() < recipe.random_answers:
        answer = str(rng.randrange(10))
    return written(values) + MARKER + answer


def with_mistake(problem: Problem, rng: random.Random) -> tuple[int, ...]:
    """The values after one step has been taken wrongly: all that follow are off as much."""
    at, off = rng.randrange(STEPS), rng.randrange(1, 10)
    return tuple((value + off) % 10 if n >= at else value for n, value in enumerate(problem.values))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m latro.demo.base", description="Train the demo's base model.")
    parser.add_argument("--seed", type=int, default=0, help="0 is the one that is shipped")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write model and tokenizer to")
    options = parser.parse_args(arguments)
    # As many threads whatever the machine, so that the seed alone decides; with such matrices one is also the fastest.
    torch.set_num_threads(1)
    recipe, start = Recipe(), time.monotonic()

    def progress(step: int, loss: float) -> None:
        if step % 10 == 0 or step == recipe.steps:
            took = time.monotonic() - start
            print(
                f"\rbase {options.seed}: step {step}/{recipe.steps}, loss {loss:.3f}, {took:.0f} s", end="", flush=True
            )

    model = train(options.seed, recipe, progress)
    model.save_pretrained(options.out)
    new_tokenizer().save_pretrained(options.out)
    print(f"\n{sum(weight.numel() for weight in model.parameters()):,} parameters in {options.out}", file=sys.stdout)


if __name__ == "__main__":
    main()
