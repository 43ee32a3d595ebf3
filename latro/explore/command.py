"""What `latro explore` and `latro self-explore` do, once their options are read."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from latro import data
from latro.config import LatroConfig
from latro.data import Example
from latro.evaluate import compare
from latro.explore.exploration import Explored, explore
from latro.explore.explorer import Explorer
from latro.explore.pipeline import Search, SelfExplored, self_explore
from latro.explore.show import in_words, write_page
from latro.explore.steps import reading_for
from latro.grading import Grader, graders_for
from latro.launch import load_model
from latro.rollout import sample_key
from latro.tasks import is_task, named
from latro.text import Text, end_of_answer

ROOM = 2  # a completion may be so many times as long as the longest golden one
LOOKED_AT = 256  # problems of which that is the longest

DEFAULTS = {
    "answer_template": "The answer is {answer}.",
    "separator": " ",
    "stop_strings": ["The answer is"],
    "max_completion_length": 500,
}


def text_options(dataset: str) -> dict[str, Any]:
    """How the answers of a data set are written, unless it is said otherwise: a small task has rules of its own."""
    if not is_task(dataset):
        return DEFAULTS
    task = named(dataset)
    golden = task.problems(0, min(LOOKED_AT, task.most("train")))
    longest = max(len(f"{one.rationale}{task.stop_string}{one.answer}") for one in golden)  # no fewer than its tokens
    return {
        "answer_template": task.answer_template,
        "separator": task.separator,
        "stop_strings": [task.stop_string],
        "max_completion_length": ROOM * longest,
    }


# explore


def show(known: argparse.Namespace) -> None:
    """Sample rationales, and say of the wrong ones where they go wrong."""
    for name, value in text_options(known.dataset).items():
        if getattr(known, name) is None:
            setattr(known, name, value)
    examples = data.load(known.dataset, known.split, prompt_template=known.prompt_template)[: known.limit]
    model, tokenizer = load_model(known.model)
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    text = Text(
        tokenizer,
        answer_template=known.answer_template,
        separator=known.separator,
        stop_strings=known.stop_strings,
        end=end_of_answer(tokenizer),
    )
    explorer = Explorer.of(
        model,
        text,
        _graders(known.dataset, known.answer_template, examples)[0],
        known.max_completion_length,
        temperature=known.temperature,
        seed=known.seed,
    )
    explored = _explore(explorer, examples, known)
    for example in examples:
        print(f"\n{text.decode(text.prompt(example.prompt))}\n=> {example.answer}")
        for one in (one for one in explored if one.example is example):
            print(
                f"\n{'right' if one.right else 'wrong'}\n{in_words(one, shutil.get_terminal_size((100, 24)).columns)}"
            )
    print(f"\n{_summary(explored, len(examples) * known.num_generations, known.all)}")
    if known.to is not None:
        title = f"Where {known.model} goes wrong on {known.dataset}"
        note = f"{known.continuations} continuations after each step; the bar is the share of them that are right."
        print(write_page(known.to, title, note, explored, text))


def _explore(explorer: Explorer, examples: list[Example], known: argparse.Namespace) -> list[Explored]:
    """Every different rationale of those that are sampled, or only those that are wrong."""
    prompts = [explorer.text.prompt(example.prompt) for example in examples]
    keys = [[sample_key(known.seed, "sample", e.id, k) for k in range(known.num_generations)] for e in examples]
    with tqdm(desc="exploring", unit="sample", leave=False) as bar:
        sampled = explorer.ask(prompts, keys, bar.update)
        different = {
            (example.id, *sample.tokens): (example, sample)
            for example, samples in zip(examples, sampled, strict=True)
            for sample in samples
            if known.all or not explorer.is_right(example, sample.tokens)
        }
        return explore(
            explorer,
            list(different.values()),
            reading_for(known.dataset).steps_of,
            continuations=known.continuations,
            progress=bar.update,
        )


def _summary(explored: list[Explored], sampled: int, every: bool) -> str:
    pits = [one.pit + 1 for one in explored if one.pit is not None]
    what = "different" if every else "different and wrong"
    where = f"; the first pit is at step {sum(pits) / len(pits):.1f} on average" if pits else ""
    return f"{len(explored)} of {sampled} rationales are {what}{where}"


def _graders(dataset: str, answer_template: str, examples: list[Example]) -> tuple[Grader, ...]:
    return graders_for(dataset, answer_template, options=bool(examples[0].options), examples=examples)


# self-explore


def run(options: Any, configs: Mapping[str, LatroConfig]) -> SelfExplored:
    for name in ("model", "dataset", "output_dir"):
        if not getattr(options, name):
            raise ValueError(f"self-explore: --{name} must be given; see latro self-explore --help")
    examples = data.load(options.dataset, options.split, prompt_template=options.prompt_template)[: options.limit]
    evaluation = _questions(options)
    model, tokenizer = load_model(options.model, dtype=torch.float32)
    folder = Path(options.output_dir)
    found = self_explore(
        model,
        tokenizer,
        examples,
        folder,
        configs,
        golden=[example for example in examples if example.rationale is not None][: options.golden],
        evaluation=evaluation,
        reading=reading_for(options.dataset),
        graders=_graders(options.dataset, configs["sft"].answer_template, [*examples, *evaluation]),
        search=Search(**{name: getattr(options, name) for name in Search.__dataclass_fields__}),
        resume=options.resume,
    )
    results = {
        "stages": {name: stage.evaluation.metrics() for name, stage in found.stages.items() if stage.evaluation},
        "counts": found.counts,
        "differences": _differences(found),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(_table(results, len(evaluation)))
    print(f"\nThe model is in {configs['self_explore'].output_dir}")
    return found


def _questions(options: Any) -> list[Example]:
    """Of test_dataset, or of the test split that the data set has."""
    dataset = options.test_dataset
    if dataset is None and (is_task(options.dataset) or options.dataset in data.NAMED):
        dataset = options.dataset
    if dataset is None or not options.test_limit:
        return []
    return data.load(dataset, "test", prompt_template=options.prompt_template)[: options.test_limit]


def _differences(found: SelfExplored) -> dict[str, Any]:
    """Of the greedy answers' accuracy, between the last model and the others."""
    last = found.stages["self_explore"].evaluation
    if last is None:
        return {}
    others = {name: stage.evaluation for name, stage in found.stages.items() if name != "self_explore"}
    return {name: compare(other, last)["accuracy"]._asdict() for name, other in others.items() if other is not None}


def _table(results: Mapping[str, Any], n: int) -> str:
    lines = []
    for what, counts in results["counts"].items():
        lines += [f"\n{what}", *(f"  {count:>8,}  {name}" for name, count in counts.items())]
    if results["stages"]:
        lines.append(f"\naccuracy on {n} questions (95 % interval)")
    for name, metrics in results["stages"].items():
        low, high = metrics["accuracy_low"], metrics["accuracy_high"]
        lines.append(f"  {name:<14} {metrics['accuracy']:.1%}  [{low:.1%}, {high:.1%}]")
    if results["differences"]:
        lines.append("\nself_explore less the others, on the same questions (95 % interval)")
    for name, one in results["differences"].items():
        lines.append(
            f"  {name:<14} {one['difference']:+.1%}  [{one['low']:+.1%}, {one['high']:+.1%}]  p = {one['p_value']:.2g}"
        )
    return "\n".join(lines)
