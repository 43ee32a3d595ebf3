"""Prompts and answers: known data sets, small tasks, JSON lines, and data sets of the hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from latro.latex import boxed
from latro.text import Message

# Where the data sets of NAMED look for their files before they ask the hub.
FOLDER = "LATRO_DATA"
# Problems of a small task, where it has so many.
TRAINED, HELD_OUT = 10_000, 1_000

GSM8K_PROMPT = "{question} Let's think step by step."
ARC_PROMPT = (
    "Question: {question} Options: {options} "
    "Let's think step by step first then print your answer like 'The answer is (one of the options)'."
)
HELLASWAG_PROMPT = (
    "How does this go on? {question} Options: {options} "
    "Let's think step by step first then print your answer like 'The answer is (one of the options)'."
)
CODE_PROMPT = "{question}\n\nLet's think step by step, then write all of the function as one block of ```python."
CALCULATION = re.compile(r"<<[^>]*>>")  # GSM8K's calculator annotations


@dataclass(frozen=True)
class Pair:
    """Two ways to go on behind a prompt and what stands of a rationale already, in tokens. Where one is a completion's
    end, the token that ended it is its last."""

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    before: tuple[int, ...] = ()


@dataclass(frozen=True)
class Example:
    """A prompt, text or chat messages, and its answer."""

    id: str  # names the example wherever it is, so that its samples are the same in any order
    prompt: str | tuple[Message, ...]
    answer: str
    options: tuple[str, ...] = ()  # of which the answer is one
    rationale: str | None = None  # a golden one
    harness: tuple[str, str] | None = None  # of code: what it stands between, in a program that ends if it is right
    pair: Pair | None = None  # of what DPO prefers, where it is not to be sampled


class DataError(ValueError):
    """A row that cannot be used: which, and why."""


def load(name: str, split: str = "train", *, prompt_template: str | None = None) -> list[Example]:
    """The examples of a data set of NAMED, a small task, a file of JSON lines, or a data set of the hub.

    prompt_template: with {question}, and {options} where options are listed; the LaTRO paper's by default.
    """
    from latro.tasks import is_task  # which makes examples

    if is_task(name):
        return _problems(name, split, prompt_template)
    if name in NAMED:
        return _read(_named_rows(name, split), NAMED[name].parse, prompt_template or NAMED[name].template)
    path = Path(name)
    if path.suffix in (".jsonl", ".json") or path.exists():
        return _read(_json_lines(path), _parse_row, prompt_template)
    return _read(_hub_rows(name, None, split), _parse_row, prompt_template)


def _problems(name: str, split: str, template: str | None) -> list[Example]:
    """The same ones every time."""
    from latro.tasks import named

    task, part = named(name), cast(Any, split)
    given = task.problems(0, min(task.most(part), TRAINED if split == "train" else HELD_OUT), part)
    return [replace(one, prompt=_fill(template or "{question}", question=str(one.prompt))) for one in given]


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
            f"dataset: {name!r} is neither a small task nor a file, and a data set of the hub needs the package "
            "datasets: pip install datasets"
        ) from error
    for number, row in enumerate(load_dataset(name, config, split=split)):
        yield f"{name} ({split}), row {number}", row


@dataclass(frozen=True)
class _Named:
    file: str
    hub: tuple[str, str | None]
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


def _parse_hellaswag(id: str, row: Mapping[str, Any], template: str | None) -> Example:
    endings, label = [_unmarked(one) for one in _field(row, "endings", list)], str(row.get("label"))
    if label not in map(str, range(len(endings))):
        raise DataError(f"label must number one of the {len(endings)} endings, got {label!r}; the test split has none")
    context = _unmarked(f"{_field(row, 'activity_label')}: {_field(row, 'ctx')}")
    prompt = _fill(template or HELLASWAG_PROMPT, question=context, options=str(endings))
    return Example(str(row.get("ind", id)), prompt, endings[int(label)], options=tuple(endings))


def _unmarked(text: str) -> str:
    """Without WikiHow's marks, such as [header]; a title is a sentence."""
    return " ".join(re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).split())


def _parse_math(id: str, row: Mapping[str, Any], template: str | None) -> Example:
    solution = _field(row, "solution")
    answer = boxed(solution)
    if answer is None:
        raise DataError(f"solution must have its answer in \\boxed{{}}, got {solution[-60:]!r}")
    prompt = _fill(template or GSM8K_PROMPT, question=_field(row, "problem"))
    return Example(id, prompt, answer, rationale=solution.strip())


def _parse_svamp(id: str, row: Mapping[str, Any], template: str | None) -> Example:
    try:
        answer = float(row.get("Answer", ""))  # 145.0, as a number or as its text
    except (TypeError, ValueError):
        raise DataError(f"Answer must be a number, got {row.get('Answer')!r}") from None
    body = _field(row, "Body").strip()
    question = f"{body if body[-1] in '.,!?' else body + '.'} {_field(row, 'Question').strip()}"
    prompt = _fill(template or GSM8K_PROMPT, question=question)
    return Example(str(row.get("ID", id)), prompt, f"{answer:.12g}", rationale=_field(row, "Equation").strip())


def _parse_humaneval(id: str, row: Mapping[str, Any], template: str | None) -> Example:
    """The prompt is a function's beginning; what a model writes may go on there, or begin the function again."""
    begun = _field(row, "prompt")
    test = f"{_field(row, 'test')}\n\ncheck({_field(row, 'entry_point')})\n"
    prompt = _fill(template or CODE_PROMPT, question=begun.rstrip())
    answer = (begun + _field(row, "canonical_solution")).strip()
    return Example(str(row.get("task_id", id)), prompt, answer, harness=(begun, test))


def _parse_mbpp(id: str, row: Mapping[str, Any], template: str | None) -> Example:
    """The whole of it, and its sanitized part, whose names differ."""
    text = _field(row, "prompt" if "prompt" in row else "text").strip()
    tests = _field(row, "test_list", list)
    before = "\n".join(row.get("test_imports") or []) or row.get("test_setup_code") or ""
    question = f"{text} It must pass:\n" + "\n".join(tests)
    prompt = _fill(template or CODE_PROMPT, question=question)
    answer = _field(row, "code").replace("\r\n", "\n").strip()
    return Example(str(row.get("task_id", id)), prompt, answer, harness=(before + "\n", "\n".join(tests) + "\n"))


NAMED = {
    "gsm8k": _Named("gsm8k_{split}.jsonl", ("openai/gsm8k", "main"), GSM8K_PROMPT, _parse_gsm8k),
    "arc": _Named("arc_challenge_{split}.jsonl", ("allenai/ai2_arc", "ARC-Challenge"), ARC_PROMPT, _parse_arc),
    "csqa": _Named("csqa_{split}.jsonl", ("tau/commonsense_qa", None), ARC_PROMPT, _parse_arc),
    "hellaswag": _Named("hellaswag_{split}.jsonl", ("Rowan/hellaswag", None), HELLASWAG_PROMPT, _parse_hellaswag),
    "math": _Named("math_{split}.jsonl", ("DigitalLearningGmbH/MATH-lighteval", "default"), GSM8K_PROMPT, _parse_math),
    "svamp": _Named("svamp_{split}.jsonl", ("ChilleD/SVAMP", None), GSM8K_PROMPT, _parse_svamp),
    "humaneval": _Named("humaneval_{split}.jsonl", ("openai/openai_humaneval", None), CODE_PROMPT, _parse_humaneval),
    "mbpp": _Named("mbpp_{split}.jsonl", ("google-research-datasets/mbpp", "full"), CODE_PROMPT, _parse_mbpp),
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
