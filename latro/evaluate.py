"""How good a model's answers are: as it says them, by their likelihood, and beside another model's.

A model is asked greedily, and on request K times at a temperature, and says its answer itself. Of the same completions,
cut where training cuts them, the right answer's log-prob is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, log
from typing import Any, NamedTuple

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from latro.data import Example
from latro.grading import Grader, majority_answer
from latro.model import TreeModel
from latro.model.verify import evaluating
from latro.rollout import Engine, LocalEngine, Sample, Sampling, sample_key, unwrapped
from latro.score import BATCH_TOKENS, answer_logps, path_of
from latro.statistics import auc, mcnemar, paired_bootstrap, wilson
from latro.text import Rationale, Text, end_tokens


@dataclass(frozen=True)
class Completion:
    """What a model said to a prompt."""

    text: str
    ended_by: str
    rationale_length: int  # tokens before the stop string
    answer_logp: float  # log π(y | x, z): the right answer behind this rationale
    extracted: dict[str, str | None]  # by each grader
    right: dict[str, bool]


@dataclass(frozen=True)
class Record:
    """What was measured on an example."""

    id: str
    prompt: str
    answer: str
    greedy: Completion
    samples: tuple[Completion, ...]
    options: tuple[str, ...]
    option_logps: tuple[float, ...]  # each option as the answer straight after the prompt


@dataclass(frozen=True)
class Evaluation:
    """What was measured on a data set. graders: their names, the primary one first."""

    graders: tuple[str, ...]
    records: tuple[Record, ...]

    def columns(self) -> dict[str, list[float | None]]:
        """Metrics example by example: a bool where an answer is right or wrong, None where there is no value."""
        columns: dict[str, list[float | None]] = {}
        k = len(self.records[0].samples)
        for grader in self.graders:
            suffix = "" if grader == self.graders[0] else f"/{grader}"
            columns[f"accuracy{suffix}"] = [record.greedy.right[grader] for record in self.records]
            if k:
                samples = [record.samples for record in self.records]
                columns[f"majority@{k}{suffix}"] = [_majority_is_right(of_prompt, grader) for of_prompt in samples]
                columns[f"sample_accuracy{suffix}"] = [_mean([s.right[grader] for s in of]) for of in samples]
        columns["answer_logp"] = [record.greedy.answer_logp for record in self.records]
        if k:
            logps = np.array([[sample.answer_logp for sample in record.samples] for record in self.records])
            columns["sample_answer_logp"] = logps.mean(1).tolist()
            # log (1/K) Σ π(y | x, z_k), an estimate of log π(y | x)
            columns["marginal_answer_logp"] = (np.logaddexp.reduce(logps, axis=1) - log(k)).tolist()
        if any(record.options for record in self.records):
            columns["acc"] = [_likeliest_is_right(record, lambda option: 1) for record in self.records]
            columns["acc_norm"] = [_likeliest_is_right(record, _bytes) for record in self.records]
        columns["rationale_length"] = [float(record.greedy.rationale_length) for record in self.records]
        columns["truncated_frac"] = [float(record.greedy.ended_by == "length") for record in self.records]
        return columns

    def metrics(self) -> dict[str, float]:
        """Means over the examples; NAME_low and NAME_high are Wilson's 95 % interval of a rate.

        accuracy, accuracy/GRADER: of the greedy completion. answer_logp: of the right answer behind its rationale.
        With samples also majority@K, sample_accuracy (of a single sample), sample_answer_logp, marginal_answer_logp,
        and self_reward_auc: how often log π(y | x, z) is higher for a sample that the primary grader finds right than
        for a wrong one of the same prompt.
        With options acc and acc_norm, as lm-eval's: whether the likeliest option is the right one, without a rationale;
        acc_norm divides log-probs by bytes.
        """
        metrics: dict[str, float] = {"n": len(self.records)}
        for name, column in self.columns().items():
            values = [value for value in column if value is not None]
            metrics[name] = _mean(values)
            if isinstance(values[0], bool):
                metrics[f"{name}_low"], metrics[f"{name}_high"] = wilson(int(sum(values)), len(values))
        ranked = self._self_reward_auc()
        return metrics if ranked is None else metrics | {"self_reward_auc": ranked}

    def _self_reward_auc(self) -> float | None:
        samples = [(record.id, sample) for record in self.records for sample in record.samples]
        rewards = [sample.answer_logp for _, sample in samples]
        labels = [sample.right[self.graders[0]] for _, sample in samples]
        return auc(rewards, labels, [id for id, _ in samples])

    def to_json(self) -> dict[str, Any]:
        """What json.dump can write: the metrics, and every example's record."""
        return {
            "metrics": self.metrics(),
            "graders": list(self.graders),
            "examples": [asdict(record) for record in self.records],
        }


def evaluate(
    model: nn.Module,
    text: Text,
    examples: Sequence[Example],
    *,
    graders: Sequence[Grader],
    max_tokens: int,
    majority: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    engine: Engine | None = None,
    batch_size: int = 256,
    batch_tokens: int = BATCH_TOKENS,
    in_step: bool = False,
    progress: Callable[[int], object] = lambda ended: None,
) -> Evaluation:
    """Ask a model every example's prompt, and grade what it says.

    model: of transformers, or a TreeModel of one, or what wraps that for training.
    graders: of `latro.grading.graders_for`, the primary one first.
    max_tokens: of a completion, rationale and answer together.
    majority: how many samples are drawn besides the greedy completion, at `temperature`, from random numbers that
        depend on `seed`, the example's id and the sample's number alone.
    engine: what draws completions, and is in sync with the model; by default the model itself, `batch_size` at once.
    batch_tokens: how many tokens are scored at once.
    in_step: as latro.score.answer_logps has it, for parameters that are sharded.
    progress: called with the number of completions, of len(examples) * (1 + majority), that ended since the last call.
    """
    _check_arguments(examples, graders, majority)
    scorer = TreeModel(model) if isinstance(model, PreTrainedModel) else model
    model = unwrapped(model)
    prompts = [text.prompt(example.prompt) for example in examples]
    _check_lengths(model, text, examples, prompts, max_tokens)
    ends = end_tokens(text.tokenizer, model.generation_config)
    greedily = Sampling(max_tokens, temperature=0, ends=ends)
    keys = [[sample_key(seed, "eval", example.id, k) for k in range(majority)] for example in examples]
    engine = engine or LocalEngine(model, batch_size)
    with evaluating(model):
        said = engine.generate(prompts, [[0]] * len(prompts), greedily, progress)
        if majority:
            samples = engine.generate(prompts, keys, Sampling(max_tokens, temperature, ends=ends), progress)
            said = [greedy + sampled for greedy, sampled in zip(said, samples, strict=True)]
        asked = [_Asked.of(text, *of_one) for of_one in zip(examples, prompts, said, strict=True)]
        logps = _score(scorer, text, asked, batch_tokens, in_step)
    records = [_record(text, graders, one, *of_one) for one, of_one in zip(asked, logps, strict=True)]
    return Evaluation(tuple(grader.name for grader in graders), tuple(records))


class Comparison(NamedTuple):
    """Two models on the same examples, of which `n` have a value of both."""

    first: float
    second: float
    difference: float  # second − first
    low: float  # 95 % interval of the difference, by a paired bootstrap over the examples
    high: float
    p_value: float  # McNemar's exact one for what is right or wrong, or else the bootstrap's
    n: int


def compare(first: Evaluation, second: Evaluation, *, seed: int = 0) -> dict[str, Comparison]:
    """Every metric that both have example by example."""
    _check_comparable(first, second)
    records = {record.id: record for record in second.records}
    in_order = Evaluation(second.graders, tuple(records[record.id] for record in first.records))
    others = in_order.columns()
    return {name: _compare(column, others[name], seed) for name, column in first.columns().items() if name in others}


def _compare(first: Sequence[float | None], second: Sequence[float | None], seed: int) -> Comparison:
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    a, b = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    difference, low, high, p_value = paired_bootstrap(a, b, seed=seed)
    if isinstance(a[0], bool):
        p_value = mcnemar([bool(value) for value in a], [bool(value) for value in b])
    return Comparison(_mean(a), _mean(b), difference, low, high, p_value, len(pairs))


def split_off(examples: Sequence[Example], fraction: float, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """The examples but for about this fraction of them, and that fraction, to which its id alone assigns an example."""
    if not 0 < fraction < 1:
        raise ValueError(f"split_off: fraction must be between 0 and 1, got {fraction}")
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        place = sample_key(seed, "split", example.id) % 2**64 / 2**64
        parts[place < fraction].append(example)
    if not all(parts):
        raise ValueError(
            f"split_off: both parts must have an example, got {len(parts[0])} and {len(parts[1])} for the fraction "
            f"{fraction} of {len(examples)}; use another fraction or seed, or more examples"
        )
    return parts


# What is checked beforehand


def _check_arguments(examples: Sequence[Example], graders: Sequence[Grader], majority: int) -> None:
    for what, names in (("examples", [e.id for e in examples]), ("graders", [g.name for g in graders])):
        if not names:
            raise ValueError(f"evaluate: {what} must not be empty")
        name, count = Counter(names).most_common(1)[0]
        if count > 1:
            raise ValueError(f"evaluate: {what} must be named differently, got {name!r} {count} times")
    if majority < 0:
        raise ValueError(f"evaluate: majority must be 0 or more samples, got {majority}")


def _check_lengths(
    model: PreTrainedModel, text: Text, examples: Sequence[Example], prompts: Sequence[list[int]], max_tokens: int
) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for example, prompt in zip(examples, prompts, strict=True):
        answer = text.answer(text.rationale([]), example.answer)
        if most is not None and len(prompt) + max_tokens + len(answer) > most:
            raise ValueError(
                f"evaluate: prompt, completion and answer must fit into the model's {most} positions, got "
                f"{len(prompt)} + {max_tokens} + {len(answer)} tokens for example {example.id!r}; "
                "use a smaller max_tokens, or leave the example out"
            )


def _check_comparable(first: Evaluation, second: Evaluation) -> None:
    primary = [one.graders[0] for one in (first, second)]
    if primary[0] != primary[1]:
        raise ValueError(f"compare: both evaluations must have the same primary grader, got {' and '.join(primary)}")
    answers, others = ({record.id: record.answer for record in one.records} for one in (first, second))
    rule = "compare: both evaluations must be of the same examples"
    alone = sorted(answers.keys() ^ others.keys())
    if alone:
        raise ValueError(f"{rule}, got {len(alone)} that only one of them has, such as {alone[0]!r}")
    for id, answer in answers.items():
        if others[id] != answer:
            raise ValueError(f"{rule}, got {answer!r} and {others[id]!r} as the answer of {id!r}")


# Likelihood


@dataclass(frozen=True)
class _Asked:
    example: Example
    prompt: list[int]
    said: list[Sample]  # the greedy completion, then samples
    rationales: list[Rationale]

    @staticmethod
    def of(text: Text, example: Example, prompt: list[int], said: list[Sample]) -> _Asked:
        return _Asked(example, prompt, said, [text.rationale(sample.tokens) for sample in said])


def _score(
    model: nn.Module, text: Text, asked: Sequence[_Asked], batch_tokens: int, in_step: bool
) -> list[tuple[list[float], list[float]]]:
    """For each example, the log-prob of its answer behind each rationale, and that of each option behind none."""
    of_answers, of_options = [], []
    for one in asked:
        of_answers.append([path_of(text, one.prompt, z, [one.example.answer]) for z in one.rationales])
        of_options.append(path_of(text, one.prompt, text.rationale([]), one.example.options))
    # Equal rationales are scored once, so that they tie.
    paths = list(dict.fromkeys(path for ps in (*of_answers, of_options) for path in ps if path.answers))
    logps = dict(zip(paths, answer_logps(model, paths, batch_tokens, in_step=in_step), strict=True))
    scores = []
    for one, answers, options in zip(asked, of_answers, of_options, strict=True):
        found = [logps[path][0] for path in answers], logps.get(options, [])
        if not all(map(isfinite, found[0] + found[1])):
            raise ValueError(
                f"evaluate: log π(answer) of example {one.example.id!r} must be finite, got {found[0] + found[1]}; "
                "look for weights that are not, or a dtype that overflows"
            )
        scores.append(found)
    return scores


# An example's record, and what follows from it


def _record(
    text: Text,
    graders: Sequence[Grader],
    asked: _Asked,
    answer_logps: Sequence[float],
    option_logps: Sequence[float],
) -> Record:
    example = asked.example

    def completion(sample: Sample, rationale: Rationale, answer_logp: float) -> Completion:
        said = text.decode(sample.tokens)
        extracted = {grader.name: grader.extract(said, example.options) for grader in graders}
        right = {grader.name: grader.is_right(extracted[grader.name], example.answer) for grader in graders}
        return Completion(said, sample.ended_by, len(rationale.tokens), answer_logp, extracted, right)

    greedy, *samples = map(completion, asked.said, asked.rationales, answer_logps)
    return Record(
        id=example.id,
        prompt=text.decode(asked.prompt),
        answer=example.answer,
        greedy=greedy,
        samples=tuple(samples),
        options=example.options,
        option_logps=tuple(option_logps),
    )


def _majority_is_right(samples: Sequence[Completion], grader: str) -> bool:
    answer = majority_answer([sample.extracted[grader] for sample in samples])
    return any(sample.right[grader] for sample in samples if sample.extracted[grader] == answer)


def _likeliest_is_right(record: Record, length: Callable[[str], int]) -> bool | None:
    if not record.options:
        return None
    ratios = [logp / length(option) for logp, option in zip(record.option_logps, record.options, strict=True)]
    return record.options[ratios.index(max(ratios))] == record.answer


def _bytes(text: str) -> int:
    return max(1, len(text.encode()))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
