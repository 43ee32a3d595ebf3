"""What the study measures of a model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import exp, nan
from typing import Any

from transformers import PreTrainedModel

from latro.batch import Group
from latro.data import Example
from latro.evaluate import Completion, Evaluation, Record, evaluate
from latro.grading import Grader
from latro.model import TreeModel
from latro.rollout import LocalEngine, Sampling, sample_key
from latro.score import answer_logps, path_of
from latro.tasks import Task
from latro.text import Text, end_tokens

VOTES = 8
BINS = 10  # of the answer's probability, for calibration
CASES = 10
SHOWN = 4  # samples of a case
LOOKED_AT = ("accuracy", "sample_accuracy", "answer_logp", "rationale_length", "self_reward_auc")


def ask(
    model: PreTrainedModel, text: Text, grader: Grader, questions: Sequence[Example], max_tokens: int
) -> Evaluation:
    return evaluate(model, text, questions, graders=[grader], max_tokens=max_tokens, majority=VOTES, batch_size=1024)


def metrics_of(evaluation: Evaluation, text: Text) -> dict[str, float]:
    """Those of `Evaluation.metrics` but for intervals; best_of_8: whether that sample is right that makes the right
    answer likeliest, which takes knowing it; completion_tokens: of greedy completions."""
    grader = evaluation.graders[0]
    found = {name: value for name, value in evaluation.metrics().items() if not name.endswith(("_low", "_high"))}
    best = [max(record.samples, key=lambda sample: sample.answer_logp).right[grader] for record in evaluation.records]
    lengths = [len(text.tokenizer(record.greedy.text)["input_ids"]) for record in evaluation.records]
    found |= {f"best_of_{VOTES}": _mean(best), "completion_tokens": _mean(lengths)}
    return {name: round(value, 6) for name, value in found.items()}


def right(evaluation: Evaluation) -> dict[str, str]:
    """Question by question: a bit for each, the first question's the highest, as hexadecimal digits."""
    columns = evaluation.columns()
    return {
        name: f"{int(''.join('1' if value else '0' for value in columns[name]), 2):x}"
        for name in ("accuracy", f"majority@{VOTES}")
        if name in columns
    }


def calibration(evaluation: Evaluation) -> list[list[float]]:
    """Of samples whose π(y | x, z) lies in a bin: its bounds, how many, their mean π(y | x, z), and how many of them
    answered rightly themselves."""
    grader = evaluation.graders[0]
    samples = [(exp(s.answer_logp), s.right[grader]) for record in evaluation.records for s in record.samples]
    bins = []
    for n in range(BINS):
        inside = [(p, is_right) for p, is_right in samples if min(int(p * BINS), BINS - 1) == n]
        if inside:
            mean, share = _mean([p for p, _ in inside]), _mean([is_right for _, is_right in inside])
            bins.append([n / BINS, (n + 1) / BINS, len(inside), round(mean, 4), round(share, 4)])
    return bins


def by_step(
    model: PreTrainedModel, text: Text, task: Task, evaluation: Evaluation, examples: Sequence[Example]
) -> list[float]:
    """What a longer rationale buys: the mean ln π(y | x, z) behind the first 0, 1, … steps of the greedy rationale. A
    rationale that has no more steps counts as it is."""
    golden = {example.id: example for example in examples}
    steps = max(len(task.steps_of(example.rationale or "")) for example in examples)
    columns = []
    for count in range(steps + 1):
        paths = []
        for record in evaluation.records:
            said = task.steps_of(record.greedy.text.partition(task.stop_string)[0])
            tokens = list(text.tokenizer("".join(said[:count]), add_special_tokens=False)["input_ids"])
            example = golden[record.id]
            paths.append(path_of(text, text.prompt(example.prompt), text.rationale(tokens), [example.answer]))
        columns.append(round(_mean([logp for (logp,) in answer_logps(TreeModel(model), paths)]), 4))
    return columns


def look(evaluation: Evaluation, update: int) -> dict[str, float]:
    metrics = evaluation.metrics()
    return {"step": update, **{name: round(metrics[name], 5) for name in LOOKED_AT if name in metrics}}


def cases(evaluation: Evaluation, examples: Sequence[Example], task: Task, seed: int) -> list[dict[str, Any]]:
    """Questions that the seed chooses, whatever was said to them."""
    golden = {example.id: example for example in examples}
    chosen = random.Random(f"cases {seed}").sample(evaluation.records, min(CASES, len(evaluation.records)))
    return [_case(record, golden[record.id], task, evaluation.graders[0]) for record in chosen]


def _case(record: Record, example: Example, task: Task, grader: str) -> dict[str, Any]:
    def said(completion: Completion) -> dict[str, Any]:
        rationale = completion.text.partition(task.stop_string)[0]
        return {
            "text": completion.text,
            "answer_logp": round(completion.answer_logp, 3),
            "right": completion.right[grader],
            "first_wrong_step": task.first_wrong_step(example, rationale),
        }

    return {
        "prompt": record.prompt,
        "answer": record.answer,
        "golden": example.rationale,
        "greedy": said(record.greedy),
        "samples": [said(sample) for sample in record.samples[:SHOWN]],
    }


def margin(
    model: PreTrainedModel, text: Text, examples: Sequence[Example], max_tokens: int, samples: int = VOTES
) -> float:
    """The gate: the mean ln π(y | x, z) of a base's full samples, which have as many tokens as the golden rationale or
    more, less that of no rationale at all, over prompts that have a full one; NaN where none has."""
    sampling = Sampling(max_tokens, ends=end_tokens(text.tokenizer, model.generation_config), are_over=text.are_over)
    prompts = [text.prompt(example.prompt) for example in examples]
    keys = [[sample_key(0, "margin", example.id, k) for k in range(samples)] for example in examples]
    groups = [
        Group.of(text, example, sampled)
        for example, sampled in zip(examples, LocalEngine(model, 1024).generate(prompts, keys, sampling), strict=True)
    ]
    return full_margin(TreeModel(model), text, groups)


def full_margin(model: TreeModel, text: Text, groups: Sequence[Group]) -> float:
    none = text.rationale([])
    paths, counts = [], []
    for group in groups:
        golden = len(text.tokenizer(group.example.rationale)["input_ids"])
        full = [rationale for rationale in group.rationales if len(rationale.tokens) >= golden]
        if full:
            paths += [path_of(text, group.prompt, rationale, [group.example.answer]) for rationale in (none, *full)]
            counts.append(len(full))
    logps = iter([logp for (logp,) in answer_logps(model, paths)] if paths else [])
    margins = [-next(logps) + _mean([next(logps) for _ in range(count)]) for count in counts]
    return _mean(margins) if margins else nan


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
