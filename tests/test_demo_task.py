"""The demo's task and the base model that is shipped for it."""

import random
import re
from itertools import islice, pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from latro.demo import base, task
from latro.rollout import LocalEngine, Sampling, sample_key
from latro.text import Text, end_of_answer

SPLITS = ["train", "validation", "test"]


def values_of(prompt):
    """The values of all variables, by reading the program as text."""
    assert re.fullmatch(r"a\db[+-][1-9]c[+-][1-9]d[+-][1-9]:", prompt)
    lines = re.findall(r"([a-d])([+-]?\d)", prompt)
    values = {"a": int(lines[0][1])}
    for (before, _), (name, step) in pairwise(lines):
        values[name] = eval(f"({values[before]}{step}) % 10")
    return values


def prompts(examples):
    return {example.prompt for example in examples}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base.FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(base.FOLDER, local_files_only=True).eval()


def test_the_arithmetic_is_right():
    for example in task.problems(3, 500, "train"):
        values = values_of(example.prompt)
        assert example.rationale == "".join(f"{name}{values[name]}" for name in "bcd")
        assert example.answer == str(values["d"])


def test_a_program_that_is_known():
    problem = task.Problem(4, (8, -3, 8))
    assert (problem.prompt, problem.rationale, problem.answer) == ("a4b+8c-3d+8:", "b2c9d7", "7")


def test_splits_share_no_prompt_whatever_the_seed():
    found = {split: [prompts(task.problems(seed, 1500, split)) for seed in (0, 1)] for split in SPLITS}
    for split, (first, second) in found.items():
        assert len(first) == len(second) == 1500
        assert first != second
        assert {task.split_of(prompt) for prompt in first | second} == {split}
    assert not set.union(*found["train"]) & set.union(*found["validation"], *found["test"])
    assert not set.union(*found["validation"]) & set.union(*found["test"])


def test_problems_are_the_same_in_any_number():
    few, many = task.problems(5, 20, "test"), task.problems(5, 200, "test")
    assert few == many[:20]
    assert len({example.id for example in many}) == 200


def test_every_digit_is_an_answer():
    answers = [example.answer for example in task.problems(0, 1000)]
    assert set(answers) == set("0123456789")
    assert max(map(answers.count, "0123456789")) < 150


def test_problems_refuse_what_is_not_there():
    with pytest.raises(ValueError, match=r"split must be one of \['train', 'validation', 'test'\], got 'dev'"):
        task.problems(0, 5, "dev")
    with pytest.raises(ValueError, match=r"n must be from 0 to .*, got 50000"):
        task.problems(0, 50_000, "test")


def test_tokens_are_characters_and_decode_to_the_same_text(tokenizer, tmp_path):
    base.new_tokenizer().save_pretrained(tmp_path)
    for some in (tokenizer, base.new_tokenizer(), AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)):
        for example in task.problems(0, 50):
            text = example.prompt + example.rationale + task.ANSWER_TEMPLATE.format(answer=example.answer)
            tokens = some(text)["input_ids"]
            assert len(tokens) == len(text)
            assert some.decode(tokens) == text
            assert some.decode([*tokens, some.eos_token_id]) == text + base.END
            assert some(text + base.END)["input_ids"] == [*tokens, some.eos_token_id]


def test_the_seam_between_rationale_and_answer(tokenizer):
    """The trainer scores the tokens that the base was trained on."""
    text = Text(
        tokenizer,
        answer_template=task.ANSWER_TEMPLATE,
        separator="",
        stop_strings=[task.MARKER],
        end=end_of_answer(tokenizer),
    )
    sampled = tokenizer("b2c9d7#")["input_ids"]
    assert text.are_over([sampled, sampled[:-1]]) == [True, False]
    rationale = text.rationale(sampled)
    assert rationale.text == "b2c9d7"
    assert rationale.tokens + text.answer(rationale, "7") == tokenizer("b2c9d7#7<end>")["input_ids"]
    assert text.answer(text.rationale(sampled[:6]), "7") == tokenizer("#7<end>")["input_ids"]


def test_texts_of_the_mixture():
    recipe, rng = base.Recipe(), random.Random(0)
    subtract = (problem for problem in task.draws(0) if min(problem.steps) < 0)
    problems = list(islice(subtract, 6000))
    rationales, right = [], 0
    for problem in problems:
        rationale, answer = re.fullmatch(r"((?:[bcd]\d)*)#(\d)", base.mixed(problem, recipe, rng)).groups()
        rationales.append((problem, rationale))
        right += answer == problem.answer
        if len(rationale) in (2, 4):
            assert problem.rationale.startswith(rationale)

    def share(holds):
        return sum(holds(problem, rationale) for problem, rationale in rationales) / len(rationales)

    assert share(lambda problem, rationale: rationale == "") == pytest.approx(recipe.empty, abs=0.02)
    assert share(lambda problem, rationale: len(rationale) in (2, 4)) == pytest.approx(recipe.half, abs=0.02)
    wrong = share(lambda problem, rationale: len(rationale) == 6 and rationale != problem.rationale)
    assert wrong == pytest.approx(recipe.sloppy, abs=0.02)
    # A random answer is right once in ten times, and one that follows from a mistake is wrong.
    expected = (1 - recipe.sloppy) * (1 - 0.9 * recipe.random_answers) + recipe.sloppy * 0.1 * recipe.random_answers
    assert right / len(problems) == pytest.approx(expected, abs=0.02)


def test_sums_are_always_worked_out():
    rng = random.Random(0)
    problems = [task.Problem(n, (1, 9, n + 1)) for n in range(9) for _ in range(50)]
    texts = [base.mixed(problem, base.Recipe(), rng).partition("#") for problem in problems]
    assert all(rationale == problem.rationale for problem, (rationale, _, _) in zip(problems, texts, strict=True))
    right = [answer == problem.answer for problem, (_, _, answer) in zip(problems, texts, strict=True)]
    assert 0.85 < sum(right) / len(right) < 0.96


def test_a_mistake_is_carried_on():
    problem = task.Problem(4, (8, -3, 8))
    seen = {base.with_mistake(problem, random.Random(seed)) for seed in range(300)}
    assert problem.values not in seen
    first_wrong = {next(n for n in range(3) if values[n] != problem.values[n]) for values in seen}
    assert first_wrong == {0, 1, 2}
    for values in seen:
        offs = [(value - true) % 10 for value, true in zip(values, problem.values, strict=True)]
        assert len(set(offs) - {0}) == 1 and offs == sorted(offs, key=bool)


def test_only_what_follows_the_prompt_is_learned():
    tokenizer = base.new_tokenizer()
    batch = base.encode([("a4b+8c-3d+8:", "b2c9d7#7"), ("a1b+1c+1d+1:", "#4")], tokenizer)
    texts = [tokenizer.decode(row[row >= 0]) for row in batch["labels"]]
    assert texts == ["b2c9d7#7<end>", "#4<end>"]
    assert tokenizer.decode(batch["input_ids"][0]) == "a4b+8c-3d+8:b2c9d7#7<end>"


def completions(model, tokenizer, examples, max_tokens=12):
    """Greedy ones, up to the end token."""
    sampling = Sampling(max_tokens, temperature=0, ends=frozenset([tokenizer.eos_token_id]))
    tokens = [tokenizer(example.prompt)["input_ids"] for example in examples]
    keys = [[sample_key(example.id)] for example in examples]
    return [tokenizer.decode(sample.tokens) for (sample,) in LocalEngine(model).generate(tokens, keys, sampling)]


def test_the_shipped_base_mostly_does_not_reason(model, tokenizer):
    assert sum(file.stat().st_size for file in base.FOLDER.iterdir()) < 1_000_000
    assert sum(weight.numel() for weight in model.parameters()) < 200_000
    examples = task.problems(1, 200, "validation")
    texts = completions(model, tokenizer, examples)
    right = [text.partition(task.MARKER)[2] == example.answer for text, example in zip(texts, examples, strict=True)]
    assert 0.1 <= sum(right) / len(right) <= 0.35
    assert sum(text.startswith(task.MARKER) for text in texts) > 100


def test_the_shipped_base_can_reason(model, tokenizer):
    """With its rationale given it answers rightly, and it can write one."""
    examples = task.problems(1, 100, "validation")
    rows = [tokenizer(example.prompt + example.rationale + "#" + example.answer)["input_ids"] for example in examples]
    ids = torch.tensor(rows)
    with torch.no_grad():
        greedy = model(input_ids=ids[:, :-1]).logits.argmax(-1)
    assert (greedy[:, -1] == ids[:, -1]).float().mean() > 0.9
    values = [12, 14, 16]  # where the values of b, c and d are predicted
    assert (greedy[:, values] == ids[:, [at + 1 for at in values]]).float().mean() > 0.8


TINY = base.Recipe(clean_steps=3, mixed_steps=3, batch_size=8)


def test_a_few_steps_of_training_are_the_same_again():
    losses = []
    first = base.train(0, TINY, lambda step, loss: losses.append((step, loss)))
    assert [step for step, _ in losses] == list(range(1, 7))
    assert all(0 < loss < 10 for _, loss in losses)
    second, other = base.train(0, TINY), base.train(1, TINY)
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_the_command_writes_what_is_shipped(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(base, "Recipe", lambda: TINY)
    base.main(["--seed", "2", "--out", str(tmp_path)])
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in base.FOLDER.iterdir()}
    assert "step 6/6" in capsys.readouterr().out
    written = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    assert torch.equal(written.lm_head.weight, base.train(2, TINY).lm_head.weight)
