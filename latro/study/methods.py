"""The methods that the study compares, and how a base is trained by each of them.

All take as many updates on the same prompts, and where they sample as many rationales of each. What a method costs is
counted: tokens that it trained on, tokens that it sampled, and seconds of one core.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from latro.config import LatroConfig
from latro.data import Example
from latro.explore.explorer import Explorer
from latro.explore.rejection import rejection_samples
from latro.explore.steps import reading_for
from latro.grading import Grader, graders_for
from latro.progress import Progress
from latro.rollout import LocalEngine, Sample
from latro.tasks import Task, named
from latro.text import Text, end_of_answer
from latro.trainer import LatroTrainer

ROOM = 1.5  # a completion may be so much longer than the longest golden one
LOGGED = ("reward", "rationale_length", "answer_logp", "kl", "grad_norm", "correct")


@dataclass(frozen=True)
class Budget:
    """What every method may spend, and how often it is looked at meanwhile."""

    updates: int = 60
    prompts: int = 16  # of an update
    rationales: int = 8  # of a prompt
    learning_rate: float = 1e-3
    looks: int = 6

    @property
    def examples(self) -> int:
        return self.updates * self.prompts


@dataclass
class Cost:
    seconds: float = 0.0  # of one core, evaluation not counted
    updates: int = 0
    trained_tokens: int = 0  # through the model that is trained; a prompt counts once for all its rationales
    sampled_tokens: int = 0


@dataclass
class Run:
    """A model in training, and what was seen of it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dataset: str  # a small task
    examples: list[Example]
    seed: int
    budget: Budget
    max_tokens: int
    look: Callable[[int], object] = lambda update: None
    cost: Cost = field(default_factory=Cost)
    log: list[dict[str, float]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)  # of the last training

    @property
    def text(self) -> Text:
        return text_of(self.task, self.tokenizer)

    @property
    def task(self) -> Task:
        return named(self.dataset)

    @property
    def grader(self) -> Grader:
        return graders_for("", self.task.answer_template)[0]

    def fit(self, examples: Sequence[Example], **options: Any) -> None:
        """Train on the examples by LatroTrainer."""
        self.options = options
        with tempfile.TemporaryDirectory() as folder:
            engine = Counting(self.model, self.cost)
            looks = Looks(self)
            trainer = LatroTrainer(
                self.model,
                config_of(self, Path(folder), options),
                examples,
                processing_class=self.tokenizer,
                engine=engine,
                callbacks=[looks],
            )
            trainer.remove_callback(Progress)
            begun = time.process_time()
            trainer.train()
            self.cost.seconds += time.process_time() - begun - looks.seconds
        self.cost.updates += trainer.state.global_step
        lines = [line for line in trainer.state.log_history if "loss" in line]
        self.cost.trained_tokens += int(lines[-1]["num_tokens"])
        self.log += [
            {"step": line["step"], **{name: round(line[name], 5) for name in LOGGED if name in line}} for line in lines
        ]
        self.model.eval()


class Counting(LocalEngine):
    """Counts what it samples."""

    def __init__(self, model: PreTrainedModel, cost: Cost) -> None:
        super().__init__(model, max_rows=1024)
        self.cost = cost

    def generate(self, *arguments: Any, **options: Any) -> list[list[Sample]]:
        samples = super().generate(*arguments, **options)
        self.cost.sampled_tokens += sum(len(sample.tokens) + 1 for of_prompt in samples for sample in of_prompt)
        return samples


class Looks(TrainerCallback):
    """Looks at the model after every so many updates; what that takes is not training."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.every = max(1, run.budget.updates // run.budget.looks)
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step % self.every == 0:
            begun, training = time.process_time(), self.run.model.training
            self.run.look(self.run.cost.updates + state.global_step)
            self.run.model.train(training)
            self.seconds += time.process_time() - begun


def text_of(task: Task, tokenizer: PreTrainedTokenizerBase) -> Text:
    return Text(
        tokenizer,
        answer_template=task.answer_template,
        separator=task.separator,
        stop_strings=[task.stop_string],
        end=end_of_answer(tokenizer),
    )


def tokens_needed(task: Task, tokenizer: PreTrainedTokenizerBase) -> int:
    """Of a completion: room for the longest golden one of some problems, and more."""
    problems = task.problems(0, min(256, task.most("train")))
    longest = max(len(tokenizer(f"{one.rationale}{task.stop_string}{one.answer}")["input_ids"]) for one in problems)
    return int(ROOM * longest)


def config_of(run: Run, folder: Path, options: Mapping[str, Any]) -> LatroConfig:
    budget, task = run.budget, run.task
    chosen = {
        "learning_rate": budget.learning_rate,
        "num_generations": budget.rationales,
        "max_completion_length": run.max_tokens,
        **options,
    }
    if chosen.get("objective", "latro") == "latro":
        chosen.setdefault("truncation_penalty", 0.0)
    return LatroConfig(
        output_dir=str(folder),
        seed=run.seed,
        max_steps=budget.updates,
        per_device_train_batch_size=budget.prompts,
        rollout_batch_size=1024,
        answer_template=task.answer_template,
        stop_strings=[task.stop_string],
        separator=task.separator,
        logging_steps=10,
        eval_strategy="no",
        save_strategy="no",
        log_completions=False,
        disable_tqdm=True,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        **chosen,
    )


# The methods


@dataclass(frozen=True)
class Method:
    train: Callable[[Run, Mapping[str, Any]], None]  # given options that differ from its own
    for_options: bool = False  # only where there are options to choose from


def by(objective: str, **options: Any) -> Callable[[Run, Mapping[str, Any]], None]:
    """One training on the examples as they are."""

    def train(run: Run, changed: Mapping[str, Any]) -> None:
        run.fit(run.examples, **{"objective": objective, **options, **changed})

    return train


def leave(run: Run, changed: Mapping[str, Any]) -> None:
    """The base as it is."""


def rft(run: Run, changed: Mapping[str, Any]) -> None:
    """Fine-tuning, for one round, on rationales of the base that led to the right answer."""
    begun = time.process_time()
    engine = Counting(run.model, run.cost)
    explorer = Explorer.of(run.model, run.text, run.grader, run.max_tokens, seed=run.seed, engine=engine)
    drawn, _ = rejection_samples(explorer, run.examples, reading_for(run.dataset), samples=run.budget.rationales)
    kept = [example for of_prompt in drawn for example in of_prompt.examples(run.text)]
    run.cost.seconds += time.process_time() - begun
    run.fit(kept, objective="sft_golden", **changed)


METHODS: dict[str, Method] = {
    "base": Method(leave),
    "sft_answers": Method(by("sft_answers")),
    "sft_golden": Method(by("sft_golden")),
    "latro": Method(by("latro", answer_weight=1.0)),
    "latro_no_answer": Method(by("latro", answer_weight=0.0)),
    "latro_floor": Method(by("latro", answer_weight=0.0, reward_floor=-2.5)),
    "gain": Method(by("gain", reward_floor=0.0)),
    "jepo": Method(by("jepo", answer_weight=0.01)),
    "jepo_multi": Method(by("jepo_multi", answer_weight=0.01)),
    "verifree": Method(by("verifree")),
    "avg_logprob": Method(by("avg_logprob", answer_weight=0.0)),
    "rlpr": Method(by("rlpr")),
    "multiple_choice": Method(by("multiple_choice", answer_weight=0.0), for_options=True),
    "rloo": Method(by("rloo")),
    "star": Method(by("star")),
    "rft": Method(rft),
    "trice": Method(by("trice")),
    "dpo": Method(by("dpo")),
    "ranked_dpo": Method(by("ranked_dpo")),
    "spin": Method(by("spin")),
}
