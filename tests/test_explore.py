"""Exploration finds the first wrong step, and shows what it found (Self-Explore, arXiv 2404.10346)."""

import random
from dataclasses import replace

import pytest
import torch

from latro.explore import Attempt, Explored, Explorer, Step, explore, lines, sentences, steps_in
from latro.explore.equations import equations, has_false_equation
from latro.explore.show import in_words, write_page
from latro.grading import graders_for
from latro.tasks import TASKS, named
from latro.text import Text
from tests.explored import CHAIN, END, TOKENIZER, explored_as, explorer_of, sampled, text_of
from tests.tiny import byte_fallback_tokenizer, byte_pair_tokenizer

TASK_NAMES = {name: f"{name}(length=4)" if name in ("rotation", "sort") else f"{name}(steps=4)" for name in TASKS}


# Steps


def test_lines_and_sentences_are_the_whole_text():
    assert lines("one\n\ntwo = 3.\nthree") == ["one\n\n", "two = 3.\n", "three"]
    text = "We add $1. 5$ and 3.5. Then: is it so? Yes\n\nSo $x$ it is. End"
    assert sentences(text) == ["We add $1. 5$ and 3.5. ", "Then: is it so? ", "Yes\n\n", "So $x$ it is. ", "End"]
    for unusual in ("", "a $5 lamp. And more", ". . .", "\n\n", "$$ a. b $$ c."):
        assert "".join(sentences(unusual)) == unusual
    many = "".join(f"Sentence {n}. " for n in range(45))
    assert "".join(sentences(many)) == many
    assert len(sentences(many)) == 15  # three at a time


def test_steps_are_made_of_sampled_tokens_and_the_answer_is_the_last():
    text, sample = text_of(), sampled("1+1=2;2+2=4;#4")
    steps = steps_in(text, sample, named("chain").steps_of)
    assert [step.text for step in steps] == ["1+1=2;", "2+2=4;", "#4"]
    assert [step.is_answer for step in steps] == [False, False, True]
    assert [token for step in steps for token in step.tokens] == [*sample.tokens, END]
    assert [step.text for step in steps_in(text, sampled("#4"), lines)] == ["#4"]
    cut_off = steps_in(text, sampled("1+1=2;2+", ended=False), named("chain").steps_of)
    assert [(step.text, step.is_answer) for step in cut_off] == [("1+1=2;", False), ("2+", False)]
    first = steps_in(text, sample, named("chain").steps_of, most=1)
    assert [(step.text, step.is_answer) for step in first] == [("1+1=2;", False)]
    with pytest.raises(ValueError, match="steps_of: the steps must together be the rationale"):
        steps_in(text, sample, lambda rationale: rationale.split(";"))


def test_a_token_over_the_end_of_a_step_belongs_to_the_next():
    said = "So 1 + 1 = 2.\nThen 2 + 2 = 4.\nThe answer is 4."
    tokenizer = byte_pair_tokenizer([said] * 4, size=300)
    text = text_of(tokenizer, "The answer is {answer}.", " ", ("The answer is",))
    sample = sampled(said, tokenizer=tokenizer)
    assert any("\n" in token[:-1] for token in map(tokenizer.decode, sample.tokens)), "no token straddles lines"
    steps = steps_in(text, sample, lines)
    assert [token for step in steps for token in step.tokens] == [*sample.tokens, tokenizer.eos_token_id]
    assert "".join(step.text for step in steps) == said


def test_equations():
    assert equations("She has 48/2 = 24 clips, so 48+24 = 72.") == ("48/2=24", "48+24=72")
    for true in (
        "10 / 3 = 3.33",
        "$1,000 * 20% = $200",
        "2 x (3 + 4) = 14",
        "5+3 = 4+4 = 8",
        "x = 3",
        "07 + 1 = 8",
        "3.5 - 5 = -1.5",
    ):
        assert not has_false_equation(f"so {true} there"), true
    for false in ("10 / 3 = 3.4", "2 + 2 = 5", "5+3 = 4+4 = 9", "7/2 = 3", "100 * 10% = 1"):
        assert has_false_equation(f"so {false} there"), false
    assert not has_false_equation("Then 3x = 12, 1/0 = 5 and a+b=4")


def test_characters_of_several_tokens_stay_whole():
    tokenizer = byte_fallback_tokenizer()
    assert len(tokenizer.decode(tokenizer("😀")["input_ids"][:3])) == 3
    for said in ("😀\n", "so 😀😀\n數 1\n😀", "😀😀😀\n1\n😀😀\n", "so\n😀\n"):
        steps = steps_in(text_of(tokenizer), sampled(said, tokenizer=tokenizer), lines)
        assert [tokenizer.decode(step.tokens) for step in steps[:-1]] == lines(said), said


# Exploration


def test_the_first_pit_is_the_first_step_after_which_none_is_right():
    assert explored_as([1, 1, 0]).rates == [0.5, 0.5, 0.0, 0.0]
    assert [explored_as(rates).pit for rates in ([1, 1, 0], [1, 0, 0], [0, 0, 1], [1, 1, 1], [0, 1, 1])] == [
        1,
        0,
        0,
        2,
        2,
    ]
    assert explored_as([1, 1, 1], right=True).pit is None
    seldom = explored_as([1, 1, 1])
    seldom = replace(seldom, attempts=tuple((*own, *[Attempt(sampled("#0"), False)] * 98) for own in seldom.attempts))
    assert seldom.rates == [0.01, 0.01, 0.01, 0.0] and seldom.pit == 2


class Golden:
    """An engine that goes on from the last state as written: right if and only if what stands there is right."""

    def __init__(self, task, examples):
        self.task, self.examples, self.calls = task, examples, []

    def generate(self, prompts, keys, sampling, progress=lambda ended: None):
        self.calls.append((prompts, keys, sampling))
        return [[self.said(TOKENIZER.decode(prompt)) for _ in own] for prompt, own in zip(prompts, keys, strict=True)]

    def said(self, given):
        (example,) = (one for one in self.examples if given.startswith(one.prompt))
        prefix = given[len(example.prompt) :]
        rest = self.task.steps_of(example.rationale)[len(self.task.steps_of(prefix)) :]
        answer = example.answer if self.task.first_wrong_step(example, prefix) is None else "wrong"
        return sampled("".join(rest) + "#" + answer)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_the_first_pit_is_the_first_wrong_step(name):
    task, rng = named(TASK_NAMES[name]), random.Random(0)
    problems = {problem.prompt: problem for problem, _ in zip(task.draws(0), range(20), strict=False)}
    examples = [task.example(problem) for problem in problems.values()]
    mistaken = [(example, task.with_mistake(problems[example.prompt], rng)) for example in examples for _ in range(3)]
    completions = [(example, sampled(f"{rationale}#{answer}")) for example, (rationale, answer) in mistaken]
    engine = Golden(task, examples)
    explored = explore(explorer_of(engine, max_tokens=200), completions, task.steps_of)
    for one, (example, (rationale, _)) in zip(explored, mistaken, strict=True):
        assert one.pit == task.first_wrong_step(example, rationale)
        assert one.rates[: one.pit + 2] == [1.0] * (one.pit + 1) + [0.0]
    golden = [(example, sampled(f"{example.rationale}#{example.answer}")) for example in examples]
    assert [one.pit for one in explore(explorer_of(engine, max_tokens=200), golden, task.steps_of)] == [None] * len(
        golden
    )


def test_all_prefixes_are_one_call_and_each_is_explored_once():
    task = named("chain(steps=3)")
    engine = Golden(task, [CHAIN])
    completions = [(CHAIN, sampled(said)) for said in ("7*3=1;1+5=6;#6", "7*3=1;1+5=7;#7", "#9")]
    explored = explore(explorer_of(engine), completions, task.steps_of, continuations=3)
    ((prompts, keys, sampling),) = engine.calls
    behind = ["", "7*3=1;", "7*3=1;1+5=6;", "7*3=1;1+5=7;"]
    assert [TOKENIZER.decode(prompt) for prompt in prompts] == [CHAIN.prompt + prefix for prefix in behind]
    assert [len(own) for own in keys] == [3] * 4
    assert len({key for own in keys for key in own}) == 12
    assert (sampling.temperature, sampling.max_tokens) == (0.7, 64)
    assert [one.rates for one in explored] == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0]]
    assert explored[2].pit == 0


def test_a_continuation_that_does_not_fit_is_wrong():
    engine = Golden(named("chain"), [CHAIN])
    completion = (CHAIN, sampled("7*3=1;1+5=6;#6"))
    (one,) = explore(explorer_of(engine, max_tokens=15), [completion], named("chain").steps_of)
    assert one.rates[:2] == [1.0, 1.0]
    (one,) = explore(explorer_of(engine, max_tokens=14), [completion], named("chain").steps_of)
    assert one.rates[:2] == [0.0, 0.0]


@pytest.mark.slow
def test_a_real_models_first_pits():
    """A model that has the skill. Sums alone: a wrong product of two digits may still lead to the right answer."""
    from latro.study.bases import Recipe, tokenizer_of, train_bases

    torch.set_num_threads(1)
    task, rng = named("chain(steps=3, signs='+-')"), random.Random(0)
    model = train_bases(task, 0, {"clean": Recipe(clean_steps=800, mixed_steps=0)})["clean"]
    tokenizer = tokenizer_of(task)
    text = Text(tokenizer, answer_template="#{answer}", separator="", stop_strings=["#"], end=tokenizer.eos_token_id)
    explorer = Explorer.of(model, text, graders_for("", "#{answer}")[0], 40)
    problems = [problem for problem, _ in zip(task.draws(1, "test"), range(100), strict=False)]
    mistaken = [(task.example(problem), task.with_mistake(problem, rng)) for problem in problems]
    completions = [
        (example, sampled(f"{rationale}#{answer}", tokenizer=tokenizer)) for example, (rationale, answer) in mistaken
    ]
    explored = explore(explorer, completions, task.steps_of)
    agree = [
        one.pit == task.first_wrong_step(example, rationale)
        for one, (example, (rationale, _)) in zip(explored, mistaken, strict=True)
    ]
    print(f"first pit = first wrong step in {sum(agree)} of {len(agree)}")
    assert sum(agree) >= 0.9 * len(agree)


# Shown


def test_a_shown_rationale():
    explored = explored_as([1, 1, 0])
    shown = in_words(explored, width=80).splitlines()
    assert [line.split() for line in shown] == [
        ["█████·····", "1/2", "(before", "the", "first", "step)"],
        ["1", "█████·····", "1/2", "7*3=1;"],
        ["2", "··········", "0/1", "1+5=7;", "<-", "first", "pit"],
        ["3", "··········", "wrong", "#7"],
    ]


def test_a_page_takes_what_a_model_wrote_as_text(tmp_path):
    explored = explored_as([1, 1, 0])
    steps = (Step("<script>x</script>", (1,)), *explored.steps[1:])
    hostile = Explored(CHAIN, explored.sample, False, steps, explored.attempts)
    page = write_page(tmp_path / "page.html", "a & b", "note {x}", [explored, hostile], text_of()).read_text()
    assert page.startswith("<!DOCTYPE html>") and "<script>" not in page and "&lt;script&gt;" in page
    assert "a &amp; b" in page and "note {x}" in page
    assert page.count("first pit</b>") == 2
    assert page.count('<rect class="right" width="50.0"') == 4
    assert page.count("<details") == 1  # of one prompt
