"""The demo's base model: it can reason about `latro.demo.task`, but mostly does not.

    python -m latro.demo.base --seed 0 --out FOLDER

It learns the task from clean texts, and then from texts as they are found: most have no rationale, others half of one,
or one with a mistake, and some answers are wrong. Only programs that are sums throughout, one in eight, are always
worked out. So the base reasons about those; elsewhere it answers at once, and is mostly wrong.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from latro.demo.task import ALPHABET, MARKER, STEPS, Problem, draws, written

FOLDER = Path(__file__).parent / "weights"  # of the base that is shipped
PAD, END = "<pad>", "<end>"

Progress = Callable[[int, float], object]  # called with the step and its loss


@dataclass(frozen=True)
class Recipe:
    """How a base is made. Shares are of the mixture's texts about programs that subtract; the rest are clean."""

    clean_steps: int = 1000
    mixed_steps: int = 500
    batch_size: int = 32
    learning_rate: float = 4e-3
    empty: float = 0.6  # no rationale
    half: float = 0.2  # one that breaks off
    sloppy: float = 0.08  # one with a mistake, from which it goes on
    random_answers: float = 0.1  # of all the mixture's answers

    @property
    def steps(self) -> int:
        return self.clean_steps + self.mixed_steps


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and nothing put between them."""
    vocabulary = {token: n for n, token in enumerate((PAD, END, *ALPHABET))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )


def new_model(seed: int, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            # At the usual 0.02 the model does not learn the task in so few steps.
            nn.init.normal_(module.weight, std=0.5, generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
    return model


def train(seed: int, recipe: Recipe | None = None, progress: Progress = lambda step, loss: None) -> LlamaForCausalLM:
    """A base model. The same seed gives the same one, on one machine with one number of threads."""
    recipe = recipe or Recipe()
    tokenizer = new_tokenizer()
    model = new_model(seed, tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_then_decayed(step, recipe.steps))
    problems, rng = draws(seed, "train"), random.Random(f"texts {seed}")
    for step in range(recipe.steps):
        write = clean if step < recipe.clean_steps else lambda problem: mixed(problem, recipe, rng)
        texts = [(problem.prompt, write(problem)) for problem in islice(problems, recipe.batch_size)]
        loss = model(**encode(texts, tokenizer)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1, loss.item())
    return model.eval()


def _warm_then_decayed(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / 50)
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def clean(problem: Problem) -> str:
    return problem.rationale + MARKER + problem.answer


def mixed(problem: Problem, recipe: Recipe, rng: random.Random) -> str:
    """A rationale and answer of the mixture."""
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


def encode(texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """Prompts, and what follows them, as a batch in which only the latter is learned."""
    batch = tokenizer([prompt + text + END for prompt, text in texts], padding=True, return_tensors="pt")
    position = torch.arange(batch.input_ids.shape[1])
    prompt_length = torch.tensor([len(prompt) for prompt, _ in texts])
    learned = (position >= prompt_length[:, None]) & batch.attention_mask.bool()
    # Padding is on the right, where no token before it sees it.
    return {"input_ids": batch.input_ids, "labels": batch.input_ids.where(learned, -100)}


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
