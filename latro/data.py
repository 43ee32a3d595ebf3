"""Prompts and answers: GSM8K, ARC-Challenge, JSON lines, and data sets of the hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latro.text import Message

# Where `gsm8k` and `arc` look for GSM8K's and ARC's files before they ask the hub.
FOLDER = "LATRO_DATA"

GSM8K_PROMPT = "{question} Let's think step by step."
ARC_PROMPT = (
    "Question: {question} Options: {options} "
    "Let's think step by step first then print your answer like 'The answer is (one of the options)'."
)
CALCULATION = re.compile(r"<<[^>]*>>")  # GSM8K's calculator annotations


@dataclass(frozen=True)
class Example:
    """A prompt, text or chat messages, and its answer."""

    id: str  # names the example wherever it is, so that its samples are the same in any order
    prompt: str | tuple[Message, ...]
    answer: str
    options: tuple[str, ...] = ()  # of which the answer is one
    rationale: str | None = None  # a golden one


class DataError(ValueError):
    """A row that cannot be used: which, and why."""


def load(name: str, split: str = "train", *, prompt_template: str | None = None) -> list[Example]:
    """The examples of `gsm8k`, `arc`, a file of JSON lines, or a data set of the hub.

    prompt_template: with {question}, and {options} for ARC; the LaTRO paper's by default.
    """
    if name in NAMED:
        return _read(_named_rows(name, split), NAMED[name].parse, prompt_template or NAMED[name].template)
    path = Path(name)
    if path.suffix in (".jsonl", ".json") or path.exists():
        return _read(_json_lines(path), _parse_row, prompt_template)
    return _read(_hub_rows(name, None, split), _parse_row, prompt_template)


def as_examples(rows: Iterable[Any]) -> list[Example]:
    """Examples as they are; rows with prompt and completion, or question and answer, as examples."""
    given = list(rows)
    if all(isinstance(row, Example) for row in given):
        return given
    return _read(((f"row {number}", row) for number, row in enumerate(given)), _parse_row, None)


def _read(rows: Iterable[tuple[str, Any]], parse: Any, template: str | None) -> list[Example]:
    """rows: (where it is, what it holds)."""
    examples = []
    for number, (where, row) in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: a row must be an object with fields, got {type(row).__name__}")
        try:
            examples.append(parse(str(row.get("id", number)), row, template))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    if not examples:
        raise DataError("the data set has no rows")
    return examples


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"dataset: there is no file {path}")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    yield where, json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None


def _hub_rows(name: str, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"dataset: {name!r} is neither 'gsm8k', 'arc' nor a file, and a data set of the hub needs the package "
            "datasets: pip install datasets"
        ) from error
    for number, row in enumerate(load_dataset(name, config, split=split)):
        yield f"{name} ({split}), row {number}", row


@dataclass(frozen=True)
class _Named:
    file: str
    hub: tuple[str, str]
    template: str
    parse: Any


def _named_rows(name: str, split: str) -> Iterator[tuple[str, Any]]:
    folder = os.environ.get(FOLDER)
    if folder:
        yield from _json_lines(Path(folder, NAMED[name].file.format(split=split)))
    else:
        yield from _hub_rows(*NAMED[name].hub, split)


def _field(row: Mapping[str, Any], name: str, kind: type = str) -> Any:
    value = row.get(name)
    if not isinstance(value, kind) or not value:
        expected = "a text" if kind is str else "a list" if kind is list else "an object"
        raise DataError(f"{name} must be {expected} that is not empty, got {value!r:.60}")
    return value


def _parse_gsm8k(id: str, row: Mapping[str, Any], template: str | None) -> Example:
    rationale, mark, answer = _field(row, "answer").rpartition("####")
    if not mark or not answer.strip():
        raise DataError(f"answer must end with '#### ' and a number, got {row['answer'][-60:]!r}")
    prompt = _fill(template or GSM8K_PROMPT, question=_field(row, "question"))
    return Example(id, prompt, answer.strip().replace(",", ""), rationale=CALCULATION.sub("", rationale).strip())


def _parse_arc(id: str, row: Mapping[str, Any], template: str | None) -> Example:
    choices = _field(row, "choices", dict)
    texts, labels = _field(choices, "text", list), _field(choices, "label", list)
    key = _field(row, "answerKey")
    if len(texts) != len(labels) or key not in labels:
        raise DataError(f"answerKey must be one of {labels}, with a text for each, got {key!r}")
    prompt = _fill(template or ARC_PROMPT, question=_field(row, "question"), options=str(texts))
    return Example(id, prompt, texts[labels.index(key)], options=tuple(texts))


NAMED = {
    "gsm8k": _Named("gsm8k_{split}.jsonl", ("openai/gsm8k", "main"), GSM8K_PROMPT, _parse_gsm8k),
    "arc": _Named("arc_challenge_{split}.jsonl", ("allenai/ai2_arc", "ARC-Challenge"), ARC_PROMPT, _parse_arc),
}


def _parse_row(id: str, row: Mapping[str, Any], template: str | None) -> Example:
    """`prompt` and `completion`, texts or messages, as TRL has them; or `question` and `answer`."""
    options = tuple(row.get("options") or ())
    if "prompt" in row:
        prompt, answer = _prompt(row["prompt"]), _completion(row.get("completion", row.get("answer")))
    elif "question" in row:
        prompt, answer = _fill(template or "{question}", question=_field(row, "question")), _field(row, "answer")
    else:
        raise DataError(f"a row must have prompt and completion, or question and answer, got {sorted(row)}")
    if options and answer not in options:
        raise DataError(f"answer must be one of the options {list(options)}, got {answer!r}")
    return Example(id, prompt, answer, options, row.get("rationale"))


def _prompt(value: Any) -> str | tuple[Message, ...]:
    if isinstance(value, list):
        return _messages("prompt", value)
    return str(_field({"prompt": value}, "prompt"))


def _completion(value: Any) -> str:
    if isinstance(value, list):
        messages = _messages("completion", value)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise DataError(f"completion must be one message of the assistant, got {value!r:.100}")
        return messages[0]["content"]
    return str(_field({"completion": value}, "completion"))


def _messages(name: str, value: list[Any]) -> tuple[Message, ...]:
    for message in value:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise DataError(f"{name} must be messages with role and content, got {message!r:.80}")
    if not value:
        raise DataError(f"{name} must have at least one message")
    return tuple({"role": str(message["role"]), "content": str(message["content"])} for message in value)


def _fill(template: str, **values: str) -> str:
    """Braces in the values stay as they are."""
    for name in values:
        if "{" + name + "}" not in template:
            raise ValueError(f"prompt_template must hold {{{name}}}, got {template!r}")
    return re.sub("{(" + "|".join(values) + ")}", lambda found: values[found[1]], template)
