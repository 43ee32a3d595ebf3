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

from latro.config import OBJECTIVE_OPTIONS, LatroConfig
from latro.data import Example
from latro.explore import Explorer, Search, configs, reading_for, rejection_samples, self_explore
from latro.grading import Grader, graders_for
from latro.progress import Progress
from latro.rollout import LocalEngine, Sample
from latro.study.measure import right
from latro.tasks import Task, named
from latro.text import Text, end_of_answer
from latro.trainer import LatroTrainer

GOLDEN, PROBLEMS = 100, 1200  # examples that Self-Explore imitates at first, and that it samples
VISITS = 8  # of TRICE to each of its examples
ROOM = 1.5  # a completion may be so much longer than the longest golden one
SHOWN = ("objective", "learning_rate", "num_generations", *OBJECTIVE_OPTIONS)
LOGGED = ("reward", "rationale_length", "answer_logp", "kl", "grad_norm", "correct")


@dataclass(frozen=True)
class Budget:
    """What every method may spend, and how often it is looked at meanwhile."""

    updates: int = 48
    prompts: int = 16  # of an update
    rationales: int = 8  # of a prompt
    learning_rate: float = 1e-3  # of the smallest models
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
    options: dict[str, Any] = field(default_factory=dict)  # of the last training, those of SHOWN
    tested: Sequence[Example] = ()  # questions that every stage of a method of several is asked
    stages: dict[str, Any] = field(default_factory=dict)

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
        with tempfile.TemporaryDirectory() as folder:
            config, looks = LatroConfig(output_dir=folder, **options_of(self, options)), Looks(self)
            trainer = LatroTrainer(
                self.model,
                config,
                examples,
                processing_class=self.tokenizer,
                engine=Counting(self.model, self.cost),
                callbacks=[looks],
            )
            trainer.remove_callback(Progress)
            begun = time.process_time()
            trainer.train()
            self.cost.seconds += time.process_time() - begun - looks.seconds
        self.options = {name: getattr(config, name) for name in SHOWN if getattr(config, name) is not None}
        self.count(trainer.state.log_history, trainer.state.global_step)
        self.model.eval()

    def count(self, log: Sequence[Mapping[str, Any]], updates: int) -> None:
        lines = [line for line in log if "num_tokens" in line]
        self.cost.updates += updates
        self.cost.trained_tokens += sum(int(line["num_tokens"]) for line in lines[-1:])
        self.log += [
            {"step": line["step"], **{name: round(line[name], 5) for name in LOGGED if name in line}} for line in lines
        ]


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


def options_of(run: Run, options: Mapping[str, Any]) -> dict[str, Any]:
    """Of LatroConfig: the study's, and over them these."""
    budget, task = run.budget, run.task
    if options.get("objective") == "latro":
        options = {"truncation_penalty": 0.0, **options}
    return {
        "seed": run.seed,
        "max_steps": budget.updates,
        "learning_rate": budget.learning_rate,
        "per_device_train_batch_size": budget.prompts,
        "num_generations": budget.rationales,
        "max_completion_length": run.max_tokens,
        "rollout_batch_size": 1024,
        "answer_template": task.answer_template,
        "stop_strings": [task.stop_string],
        "separator": task.separator,
        "logging_steps": max(1, budget.updates // budget.looks),
        "eval_strategy": "no",
        "save_strategy": "no",
        "log_completions": False,
        "disable_tqdm": True,
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        **options,
    }


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


def explored(run: Run, changed: Mapping[str, Any]) -> None:
    """Self-Explore, whole, from a few golden rationales; beside it DPO on whole pairs, which is not counted."""
    begun, updates = time.process_time(), run.budget.updates
    with tempfile.TemporaryDirectory() as folder:
        preferring = {"max_steps": max(1, updates * 2 // 5), "learning_rate": 3e-5, **changed}
        found = self_explore(
            run.model,
            run.tokenizer,
            run.examples[:PROBLEMS],
            Path(folder),
            configs(Path(folder), options_of(run, {}), dpo=preferring, also_dpo=bool(run.tested)),
            golden=run.examples[:GOLDEN],
            evaluation=run.tested,
            reading=reading_for(run.dataset),
            search=Search(samples=run.budget.rationales),
            engine=lambda model: Counting(model, run.cost),
        )
    run.cost.seconds += time.process_time() - begun
    run.model = found.model
    for name, stage in found.stages.items():
        run.count(stage.log, stage.updates if name != "dpo" else 0)
        if stage.evaluation is not None:
            run.stages[name] = {"accuracy": stage.evaluation.metrics()["accuracy"], "right": right(stage.evaluation)}
    run.stages["counts"] = found.counts


def from_memory(run: Run, changed: Mapping[str, Any]) -> None:
    """TRICE on fewer examples, which it comes back to: what a chain has from its last visit is what it learns from."""
    run.fit(run.examples[: len(run.examples) // VISITS], objective="trice", **changed)


METHODS: dict[str, Method] = {
    "base": Method(leave),
    "sft_answers": Method(by("sft_answers")),
    "sft_golden": Method(by("sft_golden")),
    "latro": Method(by("latro", answer_weight=1.0)),
    "latro_masked_stop": Method(by("latro", answer_weight=1.0, mask_stop=True)),
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
    "trice": Method(from_memory),
    "dpo": Method(by("dpo")),
    "ranked_dpo": Method(by("ranked_dpo")),
    "spin": Method(by("spin")),
    "self_explore": Method(explored),
}
