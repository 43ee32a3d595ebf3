"""Self-Explore (arXiv 2404.10346), whole: a model finds its own mistakes, and learns to avoid the first step of each.

1. sft            the base imitates golden rationales
2. sampling       it answers every problem, many times: rejection sampling sorts what it says
3. rft            the base imitates golden rationales and the right ones of its own
4. pairs          each right completion with the wrong one that is farthest from it
5. exploration    where each wrong one goes wrong: its first pit, and right ways to go on from before it
6. self_explore   DPO on those, from the model of 3, which is its reference and was the explorer; and beside it,
                  if wished, dpo on the whole pairs
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latro.checkpoint import load_weights
from latro.config import LatroConfig
from latro.data import Example
from latro.evaluate import Evaluation, evaluate
from latro.explore.exploration import explore
from latro.explore.explorer import Explorer, Progress
from latro.explore.notes import Notes, pair_of_json, pair_to_json, sorted_of_json, sorted_to_json
from latro.explore.pairing import WholePair, granular_pairs, whole_pairs
from latro.explore.rejection import Sorted, rejection_samples
from latro.explore.steps import MOST_STEPS, Reading, lines
from latro.grading import Grader, graders_for
from latro.prepare import text_of
from latro.rollout import Engine, LocalEngine
from latro.trainer import LatroTrainer

logger = logging.getLogger(__name__)

# The trainings, by which objective.
TRAININGS = {"sft": "sft_golden", "rft": "sft_golden", "self_explore": "dpo", "dpo": "dpo"}
# What the paper has for DPO; Mistral had a learning rate of 1e-7.
PAPER = {"beta": 0.1, "num_train_epochs": 3.0, "optim": "rmsprop", "warmup_steps": 0.1, "learning_rate": 1e-6}


@dataclass(frozen=True)
class Search:
    """How much is sampled. The values are the paper's."""

    samples: int = 100  # of each problem
    kept: int = 8  # right ones of each problem
    continuations: int = 4  # after each step
    most_steps: int = MOST_STEPS
    temperature: float = 0.7


@dataclass(frozen=True)
class Stage:
    """What a training came to; its model is in its output_dir."""

    evaluation: Evaluation | None
    log: tuple[dict[str, Any], ...] = ()  # of transformers
    updates: int = 0


@dataclass(frozen=True)
class SelfExplored:
    """The last model, the stages by name, `base` first, and what became of samples and pairs."""

    model: PreTrainedModel
    stages: dict[str, Stage]
    counts: dict[str, dict[str, int]]


def configs(
    folder: Path,
    common: Mapping[str, Any],
    *,
    sft: Mapping[str, Any] | None = None,
    rft: Mapping[str, Any] | None = None,
    dpo: Mapping[str, Any] | None = None,
    also_dpo: bool = False,
) -> dict[str, LatroConfig]:
    """Options of LatroConfig by training: those common to all, and over them those of sft, of rft, and of dpo, which
    are PAPER's where they are not given. also_dpo: train on whole pairs too, for comparison."""
    both = {**PAPER, **(dpo or {})}
    own: dict[str, Mapping[str, Any]] = {"sft": sft or {}, "rft": rft or {}, "self_explore": both}
    if also_dpo:
        own["dpo"] = both
    return {
        name: LatroConfig(**{**common, **options}, output_dir=str(Path(folder, name)), objective=TRAININGS[name])
        for name, options in own.items()
    }


def self_explore(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    folder: Path,
    configs: Mapping[str, LatroConfig],
    *,
    golden: Sequence[Example] | None = None,
    evaluation: Sequence[Example] = (),
    reading: Reading | None = None,
    graders: Sequence[Grader] = (),
    search: Search | None = None,
    engine: Callable[[PreTrainedModel], Engine] = LocalEngine,
    resume: bool = False,
) -> SelfExplored:
    """model: the base, which stays as it is.
    examples: the problems that are sampled.
    folder: where it is kept what was sampled, for resumption.
    configs: as `configs` makes them, by training; dpo may be missing. What they say of texts must be the same.
    golden: those with golden rationales that are imitated; by default all examples that have one.
    evaluation: questions on which base and every stage are measured.
    reading: how rationales are read; by default their steps are lines.
    graders: the first decides what is right; by default what stands behind the answer's template must be the answer.
    engine: what samples from a model.
    resume: go on from what the folder has of a run with the same options.
    """
    run = _Run(tokenizer, Path(folder), configs, list(evaluation), list(graders), search or Search(), engine, resume)
    reading = reading or Reading(lines)
    golden = [example for example in examples if example.rationale is not None] if golden is None else list(golden)
    run.begin(model, examples, golden)

    run.measure("base", copy.deepcopy(model))
    sft = run.train("sft", copy.deepcopy(model), golden)
    problems = run.sample(sft, examples, reading)
    imitated = [example for problem in problems for example in problem.examples(run.text)]
    explorer = run.train("rft", copy.deepcopy(model), [*golden, *imitated])
    granular, whole = run.pairs(explorer, problems, reading)
    if "dpo" in configs:
        run.train("dpo", copy.deepcopy(explorer), whole)
    return SelfExplored(run.train("self_explore", explorer, granular), run.stages, run.counts)


class _Run:
    """What all stages share, and what they left."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        configs: Mapping[str, LatroConfig],
        evaluation: list[Example],
        graders: list[Grader],
        search: Search,
        engine: Callable[[PreTrainedModel], Engine],
        resume: bool,
    ) -> None:
        _check_configs(configs)
        first = configs["sft"]
        self.tokenizer, self.configs, self.evaluation, self.search = tokenizer, configs, evaluation, search
        self.engine_of = engine
        self.text = text_of(first, tokenizer)
        self.graders = graders or list(graders_for("", first.answer_template))
        self.notes = Notes(folder, resume)
        self.stages: dict[str, Stage] = {}
        self.counts: dict[str, dict[str, int]] = {}

    def begin(self, model: PreTrainedModel, examples: Sequence[Example], golden: Sequence[Example]) -> None:
        for name, given in (("examples", examples), ("golden", golden)):
            if not given:
                raise ValueError(f"self_explore: {name} must hold at least one example, got none")
        if len({example.id for example in examples}) < len(examples):
            raise ValueError("self_explore: examples must have different ids")
        missing = next((example.id for example in golden if example.rationale is None), None)
        if missing is not None:
            raise ValueError(f"self_explore: golden examples must have a rationale, got none for {missing}")
        settings = {
            "model": model.name_or_path,
            "search": asdict(self.search),
            "configs": {name: _own_options(config) for name, config in self.configs.items()},
            "examples": [example.id for example in examples],
            "golden": [example.id for example in golden],
        }
        self.notes.begin(settings, ["samples", "pairs", *TRAININGS])

    def explorer(self, model: PreTrainedModel) -> Explorer:
        first, temperature = self.configs["sft"], self.search.temperature
        tokens, seed, engine = first.max_completion_length, first.seed, self.engine_of(model)
        return Explorer.of(model, self.text, self.graders[0], tokens, temperature=temperature, seed=seed, engine=engine)

    def train(self, name: str, model: PreTrainedModel, examples: Sequence[Example]) -> PreTrainedModel:
        """The model, trained; as it is where there is nothing to train on."""
        config, done = self.configs[name], self.notes.recall(name)
        if not examples:
            logger.warning("%s: there is nothing to learn from, and the model stays as it is: %s", name, self.counts)
            self.stages[name] = Stage(self._evaluation(name, model))
            return model
        if done is not None:
            load_weights(model, Path(str(config.output_dir)))
            model.to(config.device)  # type: ignore[arg-type]
        else:
            trainer = LatroTrainer(model, config, examples, processing_class=self.tokenizer, graders=self.graders)
            trainer.train()
            trainer.save_model()
            done = {"log": trainer.state.log_history, "updates": trainer.state.global_step}
            self.notes.keep(name, done)
        model.eval()
        self.stages[name] = Stage(self._evaluation(name, model), tuple(done["log"]), done["updates"])
        return model

    def measure(self, name: str, model: PreTrainedModel) -> None:
        self.stages[name] = Stage(self._evaluation(name, model))

    def _evaluation(self, name: str, model: PreTrainedModel) -> Evaluation | None:
        if not self.evaluation:
            return None
        config = self.configs["sft"]
        with self._bar(len(self.evaluation) * (1 + config.majority), f"evaluating {name}") as progress:
            return evaluate(
                model.to(config.device),  # type: ignore[arg-type]
                self.text,
                self.evaluation,
                graders=self.graders,
                max_tokens=config.max_completion_length,
                majority=config.majority,
                temperature=config.temperature,
                seed=config.seed,
                engine=self.engine_of(model),
                progress=progress,
            )

    def sample(self, model: PreTrainedModel, examples: Sequence[Example], reading: Reading) -> list[Sorted]:
        by_id, kept = {example.id: example for example in examples}, self.notes.recall("samples")
        if kept is None:
            count, most = self.search.samples, self.search.kept
            with self._bar(len(examples) * count, "sampling") as progress:
                found, counts = rejection_samples(
                    self.explorer(model), examples, reading, samples=count, kept=most, progress=progress
                )
            kept = {"counts": dict(counts), "problems": [sorted_to_json(problem) for problem in found]}
            self.notes.keep("samples", kept)
        self.counts["samples"] = kept["counts"]
        return [sorted_of_json(by_id[problem["id"]], problem) for problem in kept["problems"]]

    def pairs(
        self, model: PreTrainedModel, problems: Sequence[Sorted], reading: Reading
    ) -> tuple[list[Example], list[Example]]:
        """Granular ones, and whole ones."""
        pairs, counts = whole_pairs(problems, self.text, reading.normalised)
        self.counts["pairs"] = dict(counts)
        by_id, kept = {problem.example.id: problem.example for problem in problems}, self.notes.recall("pairs")
        if kept is None:
            granular, dropped = self._explore(model, pairs, reading)
            kept = {"counts": dict(dropped), "pairs": [pair_to_json(example) for example in granular]}
            self.notes.keep("pairs", kept)
        self.counts["granular pairs"] = kept["counts"]
        whole = [pair.to_example(n) for n, pair in enumerate(pairs)]
        return [pair_of_json(by_id, pair) for pair in kept["pairs"]], whole

    def _explore(
        self, model: PreTrainedModel, pairs: Sequence[WholePair], reading: Reading
    ) -> tuple[list[Example], Counter[str]]:
        with self._bar(None, "exploring") as progress:
            explored = explore(
                self.explorer(model),
                [(pair.example, pair.rejected) for pair in pairs],
                reading.steps_of,
                continuations=self.search.continuations,
                most_steps=self.search.most_steps,
                progress=progress,
            )
        return granular_pairs(pairs, explored, self.text)

    @contextmanager
    def _bar(self, total: int | None, what: str) -> Iterator[Progress]:
        hidden = bool(self.configs["sft"].disable_tqdm)
        with tqdm(total=total, desc=what, unit="sample", leave=False, disable=hidden) as bar:
            yield bar.update


def _check_configs(configs: Mapping[str, LatroConfig]) -> None:
    missing = TRAININGS.keys() - configs.keys() - {"dpo"}
    if missing or configs.keys() - TRAININGS.keys():
        raise ValueError(
            f"self_explore: configs must be of sft, rft, self_explore and perhaps dpo, got {sorted(configs)}"
        )
    first = configs["sft"]
    if first.world_size > 1:
        raise ValueError(f"self_explore: must run in one process, got {first.world_size}")
    for name, config in configs.items():
        if config.objective != TRAININGS[name]:
            raise ValueError(f"self_explore: {name} must have objective {TRAININGS[name]}, got {config.objective}")
        for option in ("answer_template", "separator", "stop_strings", "max_completion_length"):
            one, other = getattr(first, option), getattr(config, option)
            if one != other:
                raise ValueError(
                    f"self_explore: {option} must be the same in sft and {name}, got {one!r} and {other!r}"
                )


def _own_options(config: LatroConfig) -> dict[str, Any]:
    """What decides about a model, and not about where or how it is shown."""
    names = {*LatroConfig.__annotations__, "seed", "max_steps", "num_train_epochs", "optim", "lr_scheduler_type",
             "warmup_steps", "weight_decay", "max_grad_norm", "gradient_accumulation_steps"}  # fmt: skip
    shown = {"logging_steps", "save_steps", "log_completions", "num_completions_to_print", "completions_every"}
    return {name: str(getattr(config, name)) for name in sorted(names - shown)}
