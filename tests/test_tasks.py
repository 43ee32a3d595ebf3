"""Small tasks: what they say is right is computed here once more, from their prompts' text."""

import random
import re
from collections import Counter
from itertools import islice

import pytest

from latro.cli import main
from latro.data import Example, load
from latro.grading import graders_for
from latro.tasks import ANSWER_TEMPLATE, MARKER, TASKS, is_task, named, split_of
from tests.tiny import character_tokenizer, tiny_llama

SPLITS = ["train", "validation", "test"]
OTHERS = [
    "prog(steps=6, largest=4)", "chain(steps=5)", "chain(steps=2, signs='+')", "rotation(length=3, letters=26)",
    "sort(length=7)", "cups(cups=3, steps=6)", "registers(registers=3, steps=5, functions='^|')",
    "choice(choices=6, steps=2)", "rotation(letters=8, chained=True)",
]  # fmt: skip
every_task = pytest.mark.parametrize("task", [named(name) for name in [*TASKS, *OTHERS]], ids=[*TASKS, *OTHERS])

# Each family from its prompt's text alone: the golden rationale, and the answer.


def prog(prompt):
    terms = re.findall(r"([a-z])([+-]?\d)", prompt)
    value, said = int(terms[0][1]), ""
    for variable, term in terms[1:]:
        value = eval(f"({value}{term}) % 10")
        said += f"{variable}{value}"
    return said, str(value)


def chain(prompt):
    value, said = prompt[0], ""
    for sign, digit in re.findall(r"([-+*])(\d)", prompt):
        result = eval(f"({value}{sign}{digit}) % 10")
        said += f"{value}{sign}{digit}={result};"
        value = result
    return said, str(value)


def rotation(prompt, letters, chained):
    word, by = prompt.strip(":").split("+")
    moved, by = "", int(by)
    for letter in word:
        moved += chr(97 + (ord(letter) - 97 + by) % letters)
        by = ord(moved[-1]) - 97 if chained else by
    said = "".join(f"{one}>{other};" for one, other in zip(word, moved, strict=True))
    return said, moved[-1] if chained else moved


def sort(prompt):
    left, said = list(prompt.strip(":")), ""
    answer = "".join(sorted(left))
    for letter in answer:
        left.remove(letter)
        said += f"{letter}|{''.join(left)};"
    return said, answer


def cups(prompt, cups):
    hidden, said = dict(zip(range(1, 10), "abcdefghi"[:cups], strict=False)), ""
    for one, other in re.findall(r"(\d)(\d)", prompt.partition("?")[0]):
        hidden[int(one)], hidden[int(other)] = hidden[int(other)], hidden[int(one)]
        said += "".join(hidden.values()) + ";"
    return said, hidden[int(prompt.partition("?")[2].strip(":"))]


def registers(prompt):
    bits, instructions, _ = prompt.split(":")
    values, said = dict(zip("abcdef", map(int, bits), strict=False)), ""
    for instruction in instructions.split(","):
        target, expression = instruction.split("=")
        values[target] = eval(expression, {}, values)
        said += "".join(map(str, values.values())) + ";"
    return said, "".join(map(str, values.values()))


def choice(prompt):
    said, value = chain(prompt.partition("?")[0])
    (letter,) = re.findall(f"([a-j]){value}", prompt.partition("?")[2])
    return f"{said}{value}={letter};", letter


def worked_out(task, prompt):
    parameters = {"rotation": ["letters", "chained"], "cups": ["cups"]}.get(task.name, [])
    return globals()[task.name](prompt, *(getattr(task, parameter) for parameter in parameters))


@every_task
def test_golden_rationales_and_answers_are_right(task):
    for example in task.problems(3, 300 if task.name != "prog" else 200, "train"):
        assert (example.rationale, example.answer) == worked_out(task, example.prompt)
        assert task.first_wrong_step(example, example.rationale) is None
        assert task.correct(example, example.answer)
        assert not task.correct(example, example.answer + "1")


@pytest.mark.parametrize(
    ("name", "prompt", "said"),
    [
        ("prog", "a4b+8c-3d+8:", "b2c9d7#7"),
        ("chain", "7*3+5-8:", "7*3=1;1+5=6;6-8=8;#8"),
        ("rotation", "jab+2:", "j>b;a>c;b>d;#bcd"),
        ("rotation(chained=True)", "jab+2:", "j>b;a>b;b>c;#c"),
        ("sort", "dbca:", "a|dbc;b|dc;c|d;d|;#abcd"),
        ("cups", "12,34,13?1:", "bacd;badc;dabc;#d"),
        ("registers", "101:b=a^c,a=b|c:", "101;101;#101"),
        ("choice", "7*3+5-8?a3b8c1:", "7*3=1;1+5=6;6-8=8;8=b;#b"),
    ],
)
def test_examples_of_the_docstrings(name, prompt, said):
    assert said in type(named(name)).__doc__.replace("\n    ", " ")
    assert "#".join(worked_out(named(name), prompt)) == said


# Steps


@every_task
def test_steps_are_a_rationales_text(task):
    for example in task.problems(0, 50):
        steps = task.steps_of(example.rationale)
        assert "".join(steps) == example.rationale
        assert len(steps) == len(next(task.draws(0)).operations)
        for n in range(len(steps) + 1):  # the beginning of a golden rationale has no wrong step
            assert task.first_wrong_step(example, "".join(steps[:n])) is None
            assert task.first_wrong_step(example, "".join(steps[:n]) + "z?") == n


@every_task
def test_a_wrong_step_is_found_at_its_place(task):
    rng = random.Random(0)
    for example in task.problems(1, 100):
        steps = task.steps_of(example.rationale)
        n = rng.randrange(len(steps))
        at = rng.randrange(len(steps[n].rstrip(";")))
        kind = [one for one in task.alphabet if one.isalpha() == steps[n][at].isalpha()]
        other = rng.choice([one for one in kind if one not in (steps[n][at], ";")])
        mutated = steps[n][:at] + other + steps[n][at + 1 :]
        assert task.first_wrong_step(example, "".join([*steps[:n], mutated, *steps[n + 1 :]])) == n
        if n + 1 < len(steps) and steps[n] != steps[n + 1]:
            assert task.first_wrong_step(example, "".join([*steps[:n], *steps[n + 1 :]])) == n
        assert task.first_wrong_step(example, example.rationale + steps[n]) == len(steps)


@every_task
def test_a_mistake_is_made_once_and_carried_on(task):
    rng, places, wrong_answers = random.Random(0), Counter(), 0
    for problem in islice(task.draws(2), 400):
        example = task.example(problem)
        rationale, answer = task.with_mistake(problem, rng)
        assert set(rationale + answer) <= set(task.alphabet)
        assert len(task.steps_of(rationale)) == len(problem.operations)
        places[task.first_wrong_step(example, rationale)] += 1
        wrong_answers += not task.correct(example, answer)
    assert set(places) == set(range(len(problem.operations)))
    assert wrong_answers > 100


def test_what_ends_a_step():
    task = named("chain")
    example = Example("x", "7*3+5-8:", "8", rationale="7*3=1;1+5=6;6-8=8;")
    assert task.first_wrong_step(example, "7*3=1;1+5=6;6-8=8") is None  # the marker ends it too
    assert task.first_wrong_step(example, "7*3=1;1+5=") == 1
    assert task.first_wrong_step(example, "7*3=1;;1+5=6;") == 1
    assert task.first_wrong_step(example, "") is None
    assert task.first_wrong_step(example, "1+5=6;") == 0
    with pytest.raises(ValueError, match="example y must have a golden rationale, got none"):
        task.first_wrong_step(Example("y", "1+1:", "2"), "1+1=2;")


# Splits, and what is in them


@every_task
def test_splits_do_not_overlap_over_20000_draws(task):
    rng = random.Random(0)
    drawn = [task.draw(rng).prompt for _ in range(20_000)]
    shares = Counter(map(split_of, drawn))
    assert shares["train"] / 20_000 == pytest.approx(0.8, abs=0.03)
    assert shares["test"] / 20_000 == pytest.approx(0.1, abs=0.03)
    found = {split: {problem.prompt for problem in islice(task.draws(0, split), 1500)} for split in SPLITS}
    for split, prompts in found.items():
        assert {split_of(prompt) for prompt in prompts} == {split}
    assert not found["train"] & (found["validation"] | found["test"])
    assert not found["validation"] & found["test"]


@every_task
def test_problems_are_different_and_the_same_in_any_number(task):
    few, many = task.problems(5, 20, "test"), task.problems(5, task.most("test") if task.prompts < 1e4 else 300, "test")
    assert few == many[:20]
    assert len({example.prompt for example in many}) == len({example.id for example in many}) == len(many)
    assert {split_of(example.prompt) for example in many} == {"test"}
    assert task.problems(6, 20, "test") != few


@pytest.mark.parametrize(
    "name",
    [
        "prog(steps=2, largest=3)", "chain(steps=1)", "rotation(length=2, letters=5)", "sort(length=3, letters=4)",
        "cups(cups=3, steps=2)", "registers(registers=2, steps=2)", "choice(steps=1, choices=2, signs='+')",
    ],
)  # fmt: skip
def test_the_number_of_prompts(name):
    """It bounds what is drawn, and where there are few all are seen."""
    few, rng = named(name), random.Random(0)
    seen = {few.draw(rng).prompt for _ in range(20 * few.prompts)}
    assert len(seen) == few.prompts


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("prog", 0.13), ("chain", 0.17), ("rotation", 0.01), ("sort", 0.01), ("cups", 0.29), ("registers", 0.2),
        ("choice", 0.29),
    ],
)  # fmt: skip
def test_no_constant_guess_is_often_right(name, rate):
    answers = Counter(example.answer for example in named(name).problems(0, 3000))
    assert answers.most_common(1)[0][1] / 3000 < rate


@every_task
def test_alphabets_are_what_a_character_tokenizer_takes(task):
    tokenizer = character_tokenizer()
    assert len(set(task.alphabet)) == len(task.alphabet)
    assert tokenizer.unk_token_id not in tokenizer(task.alphabet)["input_ids"]
    seen = set()
    for example in task.problems(0, 200):
        text = example.prompt + example.rationale + ANSWER_TEMPLATE.format(answer=example.answer)
        assert MARKER not in example.prompt + example.rationale
        seen |= set(text)
    assert seen <= set(task.alphabet)


# Parameters


@pytest.mark.parametrize(
    ("easy", "hard", "measure"),
    [
        ("prog(steps=2)", "prog(steps=8)", lambda e: len(e.rationale)),
        ("prog(largest=3)", "prog(largest=9)", lambda e: max(int(d) for d in re.findall(r"[+-](\d)", e.prompt))),
        ("chain(steps=2)", "chain(steps=8)", lambda e: e.rationale.count(";")),
        ("chain(signs='+')", "chain(signs='*')", lambda e: e.prompt.count("*")),
        ("rotation(length=3)", "rotation(length=9)", lambda e: len(e.answer)),
        ("rotation(chained=True)", "rotation", lambda e: len(e.answer)),
        ("rotation(letters=10)", "rotation(letters=26)", lambda e: max(map(ord, e.answer))),
        ("sort(length=4)", "sort(length=9)", lambda e: len(e.answer)),
        ("sort(letters=10)", "sort(letters=26)", lambda e: max(map(ord, e.answer))),
        ("cups(cups=3, steps=6)", "cups(cups=6, steps=6)", lambda e: len(e.rationale)),
        ("cups(steps=4)", "cups(steps=8)", lambda e: e.rationale.count(";")),
        ("registers(registers=3)", "registers(registers=6)", lambda e: len(e.answer)),
        ("registers(steps=2)", "registers(steps=6)", lambda e: e.rationale.count(";")),
        ("registers(functions='^')", "registers(functions='&|')", lambda e: sum(map(e.prompt.count, "&|"))),
        ("choice(choices=2)", "choice(choices=8)", lambda e: len(e.options)),
        ("choice(steps=2)", "choice(steps=6)", lambda e: e.rationale.count(";")),
    ],
)
def test_parameters_act(easy, hard, measure):
    low, high = (sum(map(measure, named(name).problems(0, 100))) for name in (easy, hard))
    assert low < high


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sums", r"task must be one of \['chain', 'choice', .*got 'sums'"),
        ("chain(5)", r"task must be a name, or like chain\(steps=5\), got 'chain\(5\)'"),
        ("chain(steps=", "task must be a name, or like"),
        ("chain(steps=print())", "task must be a name, or like"),
        ("chain(stops=5)", "chain: parameters are steps, signs, got 'stops'"),
        ("chain(steps=0)", "chain: steps must be from 1 to 30, got 0"),
        ("chain(steps='3')", "chain: steps must be from 1 to 30, got '3'"),
        ("chain(signs='/')", r"chain: signs must be some of '\+-\*', got '/'"),
        ("prog(steps=9)", "prog: steps must be from 1 to 8, got 9"),
        ("registers(functions='')", "registers: functions must be some of"),
        ("choice(choices=1)", "choice: choices must be from 2 to 10, got 1"),
    ],
)
def test_names_that_are_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        named(name)


def test_problems_that_are_not_there():
    with pytest.raises(ValueError, match=r"split must be one of \['train', 'validation', 'test'\], got 'dev'"):
        named("chain").problems(0, 5, "dev")
    with pytest.raises(ValueError, match="n must be from 0 to 9841, about half of the test split, got 50000"):
        named("chain").problems(0, 50_000, "test")


# As data sets


@pytest.mark.parametrize("name", [*TASKS, "chain(steps=5, signs='+-')"])
def test_loaded_by_name(name):
    train, test = load(name), load(name, "test")
    assert (len(train), len(test)) == (10_000, 1_000)
    assert load(name, "test") == test == named(name).problems(0, 1_000, "test")
    options = bool(test[0].options)
    (grader, *_) = graders_for(name, ANSWER_TEMPLATE, options=options)
    for example in test[:100]:
        said = f"{example.rationale}#{example.answer}"
        assert grader.is_right(grader.extract(said, example.options), example.answer)
        assert not grader.is_right(grader.extract(f"{example.rationale}#0101010", example.options), example.answer)


def test_loaded_with_a_template():
    (first, *_) = load("chain", prompt_template="Modulo ten: {question}")
    assert first.prompt.startswith("Modulo ten: ") and first.prompt.endswith(":")
    assert is_task("chain(steps=5)") and not is_task("gsm8k") and not is_task("chain.jsonl")


def test_options_are_in_the_prompt():
    for example in named("choice").problems(0, 200):
        assert example.options == ("a", "b", "c", "d")
        digits = re.findall(r"[a-d](\d)", example.prompt)
        assert len(set(digits)) == 4


def test_trained_on_by_name(tmp_path):
    tokenizer = character_tokenizer()
    tiny_llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = {
        "model": tmp_path / "model", "dataset": "chain(steps=2)", "output_dir": tmp_path / "run", "validation": 20,
        "answer_template": ANSWER_TEMPLATE, "stop_strings": MARKER, "separator": "", "limit": 200, "max_steps": 2,
        "num_generations": 2, "max_completion_length": 6, "per_device_train_batch_size": 2, "use_cpu": "true",
        "disable_tqdm": "true", "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no",
    }  # fmt: skip
    assert main(["train", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]) == 0
    assert '"eval_accuracy"' in (tmp_path / "run" / "metrics.jsonl").read_text()
