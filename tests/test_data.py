"""Data sets: what rows become, and what is said of those that cannot be used."""

import json
import os
from pathlib import Path

import pytest

from latro.data import DataError, Example, as_examples, load

# Real GSM8K and ARC-Challenge, where they are at hand.
REAL = Path(os.environ.get("LATRO_DATA") or Path(__file__).parents[2] / "shared" / "data")
real = pytest.mark.skipif(
    not (REAL / "gsm8k_test.jsonl").is_file(), reason=f"no GSM8K and ARC in {REAL}; name a folder by LATRO_DATA"
)

GSM8K = {
    "question": "Ann has {3} pens and buys 1,200 more. How many has she?",
    "answer": "She has 3 + 1200 = <<3+1200=1203>>1203 pens.\n#### 1,203",
}
ARC = {
    "question": "Which melts?",
    "choices": {"text": ["ice", "stone"], "label": ["1", "2"]},
    "answerKey": "1",
}


@pytest.fixture
def invented(monkeypatch, tmp_path):
    monkeypatch.setenv("LATRO_DATA", str(tmp_path))
    (tmp_path / "gsm8k_train.jsonl").write_text(json.dumps(GSM8K))
    (tmp_path / "arc_challenge_train.jsonl").write_text(json.dumps(ARC))


def test_gsm8k(invented):
    assert load("gsm8k") == [
        Example(
            "0",
            "Ann has {3} pens and buys 1,200 more. How many has she? Let's think step by step.",
            "1203",
            rationale="She has 3 + 1200 = 1203 pens.",
        )
    ]


def test_arc(invented):
    (example,) = load("arc")
    assert (example.answer, example.options) == ("ice", ("ice", "stone"))
    assert example.prompt == (
        "Question: Which melts? Options: ['ice', 'stone'] Let's think step by step first then print your answer like "
        "'The answer is (one of the options)'."
    )


# Rows as the hub has them.
CSQA = {
    "id": "075e483d21c29a511267ef62bedc0461",
    "question": "Where do you keep a key?",
    "question_concept": "key",
    "choices": {"label": ["A", "B", "C", "D", "E"], "text": ["moon", "pocket", "river", "egg", "cloud"]},
    "answerKey": "B",
}
HELLASWAG = {
    "ind": 4,
    "activity_label": "Washing a dog",
    "ctx_a": "[header] How to wash a dog [title] Prepare. [step] Fill a tub.",
    "ctx_b": "then",
    "ctx": "[header] How to wash a dog [title] Prepare. [step] Fill a tub. then",
    "endings": ["fly away.", "put the dog in. [substeps] Be  kind.", "eat soap.", "paint it."],
    "source_id": "wikihow~1",
    "split": "train",
    "split_type": "indomain",
    "label": "1",
}
MATH = {
    "problem": "What is $\\frac{1}{4}+\\frac{1}{4}$?",
    "level": "Level 1",
    "type": "Algebra",
    "solution": "Two quarters, not $\\boxed{1}$, are $\\boxed{\\frac{1}{2}}$.",
}
SVAMP = {
    "ID": "chal-777",
    "Body": "Ann had 8 pens and lost 5 of them",
    "Question": "How many has she now?",
    "Equation": "( 8.0 - 5.0 )",
    "Answer": "3.0",
    "Type": "Subtraction",
    "question_concat": "Ann had 8 pens and lost 5 of them. How many has she now?",
}
HUMANEVAL = {
    "task_id": "HumanEval/900",
    "prompt": 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """ The sum.\n    """\n',
    "canonical_solution": "    return sum(xs)\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == 3\n",
    "entry_point": "total",
}
MBPP = {
    "task_id": 900,
    "text": "Write a function to double a number.",
    "code": "def double(x):\r\n    return 2 * x",
    "test_list": ["assert double(1) == 2", "assert double(-2) == -4"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
SANITIZED = {
    "source_file": "Benchmark Questions Verification V2.ipynb",
    "task_id": 901,
    "prompt": "Write a function to double a number.",
    "code": "def double(x):\n    return 2 * x",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(double(1.0), 2.0)"],
}


@pytest.fixture
def row(monkeypatch, tmp_path):
    def loaded(name, *rows, split="train"):
        monkeypatch.setenv("LATRO_DATA", str(tmp_path))
        (tmp_path / f"{name}_{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return load(name, split)[0]

    return loaded


def test_csqa(row):
    example = row("csqa", CSQA)
    assert (example.id, example.answer) == (CSQA["id"], "pocket")
    assert example.options == ("moon", "pocket", "river", "egg", "cloud")
    assert example.prompt.startswith("Question: Where do you keep a key? Options: ['moon', 'pocket',")
    with pytest.raises(DataError, match="answerKey must be a text that is not empty, got ''"):
        row("csqa", {**CSQA, "answerKey": ""})  # the test split


@pytest.mark.parametrize("label", ["1", 1])
def test_hellaswag(row, label):
    example = row("hellaswag", {**HELLASWAG, "label": label})
    assert (example.id, example.answer) == ("4", "put the dog in. Be kind.")
    assert example.options == ("fly away.", "put the dog in. Be kind.", "eat soap.", "paint it.")
    assert example.prompt.startswith(
        "How does this go on? Washing a dog: How to wash a dog. Prepare. Fill a tub. then Options: ['fly away.', "
    )


@pytest.mark.parametrize("label", ["", "4", None])
def test_hellaswag_without_a_label(row, label):
    with pytest.raises(DataError, match=r"label must number one of the 4 endings, got .*; the test split has none"):
        row("hellaswag", {**HELLASWAG, "label": label})


def test_math(row):
    example = row("math", MATH)
    assert example.prompt == MATH["problem"] + " Let's think step by step."
    assert (example.answer, example.rationale) == (r"\frac{1}{2}", MATH["solution"])
    with pytest.raises(DataError, match=r"solution must have its answer in \\boxed\{\}, got 'It is 5.'"):
        row("math", {**MATH, "solution": "It is 5."})


@pytest.mark.parametrize(
    ("given", "answer"), [("3.0", "3"), (3.0, "3"), ("0.5", "0.5"), ("1500.0", "1500"), (-2, "-2")]
)
def test_svamp(row, given, answer):
    example = row("svamp", {**SVAMP, "Answer": given})
    assert (example.id, example.answer, example.rationale) == ("chal-777", answer, "( 8.0 - 5.0 )")
    assert example.prompt == SVAMP["question_concat"] + " Let's think step by step."


@pytest.mark.parametrize("given", ["", "three", None])
def test_svamp_without_a_number(row, given):
    with pytest.raises(DataError, match="Answer must be a number"):
        row("svamp", {**SVAMP, "Answer": given})


def test_humaneval(row):
    example = row("humaneval", HUMANEVAL, split="test")
    assert example.id == "HumanEval/900"
    assert example.answer == (HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"]).strip()
    assert HUMANEVAL["prompt"].strip() in example.prompt
    before, after = example.harness
    assert before == HUMANEVAL["prompt"]
    assert after == HUMANEVAL["test"] + "\n\ncheck(total)\n"
    with pytest.raises(DataError, match="entry_point must be a text"):
        row("humaneval", {**HUMANEVAL, "entry_point": None})


def test_mbpp(row):
    example = row("mbpp", MBPP)
    assert (example.id, example.answer) == ("900", "def double(x):\n    return 2 * x")
    assert example.prompt.startswith("Write a function to double a number. It must pass:\nassert double(1) == 2\n")
    assert example.harness == ("\n", "assert double(1) == 2\nassert double(-2) == -4\n")
    sanitized = row("mbpp", SANITIZED)
    assert sanitized.prompt.startswith("Write a function to double a number. It must pass:")
    assert sanitized.harness[0] == "import math\n"
    with pytest.raises(DataError, match="test_list must be a list"):
        row("mbpp", {**MBPP, "test_list": []})


def test_templates(invented):
    assert load("gsm8k", prompt_template="Q: {question}\nA:")[0].prompt == f"Q: {GSM8K['question']}\nA:"
    with pytest.raises(ValueError, match=r"prompt_template must hold \{question\}"):
        load("gsm8k", prompt_template="Q:")


@real
@pytest.mark.parametrize(
    ("name", "split", "count"),
    [("gsm8k", "train", 7473), ("gsm8k", "test", 1319), ("arc", "train", 1119), ("arc", "test", 1172)],
)
def test_real_files(monkeypatch, name, split, count):
    monkeypatch.setenv("LATRO_DATA", str(REAL))
    examples = load(name, split)
    assert len(examples) == count == len({example.id for example in examples})
    for example in examples:
        assert example.answer
        if name == "arc":
            assert example.answer in example.options
        else:
            assert float(example.answer) == int(float(example.answer))
            assert "<<" not in example.rationale


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_rows_of_every_kind(tmp_path):
    messages = [{"role": "user", "content": "2 + 2?"}]
    path = write(
        tmp_path,
        {"prompt": "1 + 1?", "completion": "2"},
        {"prompt": messages, "completion": [{"role": "assistant", "content": "4"}]},
        {"question": "3?", "answer": "3", "id": "three"},
        "",
        {"question": "which?", "answer": "b", "options": ["a", "b"]},
    )
    one, two, three, four = load(path)
    assert (one.prompt, one.answer) == ("1 + 1?", "2")
    assert (list(two.prompt), two.answer) == (messages, "4")
    assert (three.id, three.prompt) == ("three", "3?")
    assert four.options == ("a", "b")
    assert len({one.id, two.id, three.id, four.id}) == 4


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{not json", "not JSON"),
        ("[1]", "must be an object"),
        ({"prompt": "x"}, "completion must be a text"),
        ({"prompt": "", "completion": "y"}, "prompt must be a text that is not empty"),
        ({"question": "x", "answer": 3}, "answer must be a text"),
        ({"text": "x"}, "prompt and completion, or question and answer"),
        ({"prompt": [{"role": "user"}], "completion": "y"}, "messages with role and content"),
        ({"prompt": "x", "completion": [{"role": "user", "content": "y"}]}, "one message of the assistant"),
        ({"question": "x", "answer": "c", "options": ["a", "b"]}, "answer must be one of the options"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, reason):
    path = write(tmp_path, {"prompt": "x", "completion": "y"}, row)
    with pytest.raises(DataError, match=reason) as error:
        load(path)
    assert f"{path}, line 2" in str(error.value)


def test_what_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="no rows"):
        load(write(tmp_path))
    monkeypatch.setenv("LATRO_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"gsm8k_train\.jsonl"):
        load("gsm8k")


def test_rows_of_other_trainers():
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    assert [example.answer for example in as_examples(rows)] == ["b", "d"]
    own = [Example("x", "p", "a")]
    assert as_examples(own) == own
    with pytest.raises(DataError, match="row 1: completion"):
        as_examples([rows[0], {"prompt": "c"}])
