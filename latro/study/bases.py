"""The study's base models: they can reason about a task of `latro.tasks`, but mostly do not.

    bases = train_bases(named("chain(steps=3)"), seed=0, recipes=RECIPES["chain(steps=3)"])

A base learns its task from clean texts, and then from texts as they are found, a mixture: most have no rationale,
others half of one, or one with a mistake, and some answers are wrong. So the skill is there, and what it mostly says is
a guess.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from latro.tasks import MARKER, Problem, Task

PAD, END = "<pad>", "<end>"
POSITIONS = 512  # more than a text of any task has
# With the usual 10,000 it takes more steps to tell neighbours apart.
ROPE = {"rope_type": "default", "rope_theta": 100.0}
WARM_STEPS = 50
FLOOR = 0.05  # of the learning rate: what it decays to

Progress = Callable[[int, float], object]  # called with the step and its loss
Pair = tuple[str, str]  # a prompt, and what follows it


@dataclass(frozen=True)
class Size:
    """Of a model. steps: for each step of a recipe. Wider models learn more from each, and take longer over it."""

    width: int
    layers: int
    heads: int
    steps: float = 1.0


SIZES: dict[str, Size] = {
    "0.15M": Size(64, 3, 4),
    "1M": Size(128, 5, 4, steps=0.75),
    "5M": Size(256, 6, 8, steps=0.4),
    "40M": Size(512, 12, 8, steps=0.4),  # for a GPU
}
SMALL = "0.15M"


@dataclass(frozen=True)
class Recipe:
    """How a base is made. Shares are of the mixture's texts; those that remain are clean."""

    clean_steps: int = 1000
    mixed_steps: int = 500
    batch_size: int = 32
    learning_rate: float = 4e-3  # of a width of 64; a wider model's is lower in proportion
    empty: float = 0.6  # no rationale
    half: float = 0.2  # one that breaks off
    sloppy: float = 0.08  # one with a mistake, from which it goes on
    random_answers: float = 0.1  # of all the mixture's answers

    def __post_init__(self) -> None:
        for name, least in (("clean_steps", 0), ("mixed_steps", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"Recipe: {name} must be at least {least}, got {getattr(self, name)}")
        shares = (self.empty, self.half, self.sloppy)
        if min(shares) < 0 or sum(shares) > 1 + 1e-9:
            raise ValueError(f"Recipe: empty, half and sloppy must be shares of at most 1 together, got {shares}")
        if not 0 <= self.random_answers <= 1:
            raise ValueError(f"Recipe: random_answers must be from 0 to 1, got {self.random_answers}")

    @property
    def steps(self) -> int:
        return self.clean_steps + self.mixed_steps

    @property
    def clean_phase(self) -> Recipe:
        """The same for recipes that differ only in their mixture. The learning rate decays over both phases."""
        return replace(self, empty=0.0, half=0.0, sloppy=0.0, random_answers=0.0)

    def at(self, size: Size) -> Recipe:
        clean, mixed = (round(steps * size.steps) for steps in (self.clean_steps, self.mixed_steps))
        return replace(self, clean_steps=clean, mixed_steps=mixed)


def _recipes(clean_steps: int) -> dict[str, Recipe]:
    """Two healthy ones, and one whose full rationales are mostly wrong, so that they are worth less than none."""
    of_all = Recipe(clean_steps, mixed_steps=250)
    return {
        "guessing": replace(of_all, empty=0.6, half=0.15, sloppy=0.03),
        "halting": replace(of_all, empty=0.6, half=0.25, sloppy=0.02),
        "sloppy": replace(of_all, empty=0.6, half=0.1, sloppy=0.25, random_answers=0.0),
    }


# By task, as `latro.tasks.named` takes it.
RECIPES: dict[str, dict[str, Recipe]] = {
    "chain(steps=3)": _recipes(500),
    "rotation(length=4, letters=8, chained=True)": _recipes(400),
    "cups(steps=3)": _recipes(500),
    "choice(steps=2)": _recipes(800),
}

# Whose skill is not finished: what Self-Explore begins with.
UNFINISHED: dict[str, dict[str, Recipe]] = {"chain(steps=4)": {"unfinished": Recipe(clean_steps=250, mixed_steps=100)}}


def recipe_of(task: str, name: str) -> Recipe:
    return (RECIPES | UNFINISHED)[task][name]


def tokenizer_of(task: Task) -> PreTrainedTokenizerFast:
    return characters(task.alphabet)


def characters(alphabet: str) -> PreTrainedTokenizerFast:
    """One token per character, and nothing put between them."""
    vocabulary = {token: n for n, token in enumerate((PAD, END, *alphabet))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )


def new_model(
    seed: int, tokenizer: PreTrainedTokenizerFast, size: Size = SIZES[SMALL], **others: Any
) -> LlamaForCausalLM:
    """others: of the configuration, in place of the study's own."""
    chosen: dict[str, Any] = {"max_position_embeddings": POSITIONS, "rope_parameters": ROPE} | others
    config = LlamaConfig(
        **chosen,
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=11 * size.width // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            # At the usual 0.02 the model does not learn its task in so few steps.
            nn.init.normal_(module.weight, std=0.5, generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
    return model


def train_bases(
    task: Task,
    seed: int,
    recipes: Mapping[str, Recipe],
    size: str = SMALL,
    progress: Progress = lambda step, loss: None,
) -> dict[str, LlamaForCausalLM]:
    """A base of each recipe. The same seed gives the same ones, on one machine with one number of threads.

    Recipes that differ only in their mixture share the clean phase: it is trained once. progress: its steps are counted
    once, and then each recipe's.
    """
    if size not in SIZES:
        raise ValueError(f"train_bases: size must be one of {list(SIZES)}, got {size!r}")
    phases: dict[Recipe, dict[str, Recipe]] = {}
    for name, recipe in recipes.items():
        phases.setdefault(recipe.at(SIZES[size]).clean_phase, {})[name] = recipe
    found: dict[str, LlamaForCausalLM] = {}
    for phase, of_phase in phases.items():
        found |= _train(task, seed, phase, of_phase, size, progress)
    return {name: found[name] for name in recipes}


def _train(
    task: Task, seed: int, phase: Recipe, recipes: Mapping[str, Recipe], size: str, progress: Progress
) -> Iterator[tuple[str, LlamaForCausalLM]]:
    """Bases that share their clean phase."""
    tokenizer, problems = tokenizer_of(task), task.draws(seed)
    training = Training(new_model(seed, tokenizer, SIZES[size]), tokenizer, phase)
    training.learn(((problem.prompt, clean(task, problem)) for problem in problems), phase.clean_steps, progress)
    rest = list(islice(problems, phase.mixed_steps * phase.batch_size))
    for name, recipe in recipes.items():
        rng = random.Random(f"texts {seed}")
        texts = ((problem.prompt, mixed(task, problem, recipe, rng)) for problem in rest)
        own = copy.deepcopy(training)
        own.learn(texts, phase.mixed_steps, progress)
        yield name, own.model.eval()


class Training:
    """A model on its way to a base."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
        model.to(device())  # type: ignore[arg-type]
        self.model, self.tokenizer, self.recipe = model.train(), tokenizer, recipe
        self.learning_rate = recipe.learning_rate * SIZES[SMALL].width / model.config.hidden_size
        self.optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
        self.step = 0

    def learn(self, texts: Iterable[Pair], steps: int, progress: Progress) -> None:
        texts = iter(texts)
        for _ in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * _warm_then_decayed(self.step, self.recipe.steps)
            batch = encode(list(islice(texts, self.recipe.batch_size)), self.tokenizer)
            loss = self.model(**{name: tokens.to(self.model.device) for name, tokens in batch.items()}).loss
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            progress(self.step, loss.item())


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _warm_then_decayed(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARM_STEPS)
    return warm * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def clean(task: Task, problem: Problem) -> str:
    rationale, answer = task.work(problem)
    return rationale + MARKER + answer


def mixed(task: Task, problem: Problem, recipe: Recipe, rng: random.Random) -> str:
    """A rationale and answer of the mixture. Of a rationale that breaks off, the first step is there."""
    rationale, answer = task.work(problem)
    kind = rng.random()
    if kind < recipe.empty:
        rationale = ""
    elif kind < recipe.empty + recipe.half:
        steps = task.steps_of(rationale)
        rationale = "".join(steps[: rng.randrange(1, max(2, len(steps)))])
    elif kind < recipe.empty + recipe.half + recipe.sloppy:
        rationale, answer = task.with_mistake(problem, rng)
    if rng.random() < recipe.random_answers:
        _, answer = task.work(task.draw(rng))
    return rationale + MARKER + answer


def encode(texts: Sequence[Pair], tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """Prompts, and what follows them, as a batch in which only the latter is learned."""
    batch = tokenizer([prompt + text + END for prompt, text in texts], padding=True, return_tensors="pt")
    position = torch.arange(batch.input_ids.shape[1])
    prompt_length = torch.tensor([len(prompt) for prompt, _ in texts])
    learned = (position >= prompt_length[:, None]) & batch.attention_mask.bool()
    # Padding is on the right, where no token before it sees it.
    return {"input_ids": batch.input_ids, "labels": batch.input_ids.where(learned, -100)}
