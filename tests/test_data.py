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
