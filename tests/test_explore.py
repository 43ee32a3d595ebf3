"""Exploration finds the first wrong step, and pairs are those of Self-Explore (arXiv 2404.10346)."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from latro.config import LatroConfig
from latro.data import Example, Pair
from latro.demo.base import FOLDER
from latro.explore import (
    Attempt,
    Explored,
    Explorer,
    Reading,
    Search,
    Sorted,
    Step,
    WholePair,
    configs,
    edit_distance,
    explore,
    farthest,
    granular_pairs,
    lines,
    reading_for,
    rejection_samples,
    self_explore,
    sentences,
    steps_in,
    whole_pairs,
)
from latro.explore.equations import equations, has_false_equation
from latro.explore.show import in_words, write_page
from latro.grading import graders_for
from latro.rollout import Sample
from latro.supply import Supply
from latro.tasks import TASKS, named
from latro.text import Text
from tests.float64 import Float64
from tests.test_trainer import gradients_of_an_update
from tests.tiny import byte_fallback_tokenizer, byte_pair_tokenizer, character_tokenizer, tiny_llama

TOKENIZER = character_tokenizer()
END = TOKENIZER.eos_token_id
TASK_NAMES = {name: f"{name}(length=4)" if name in ("rotation", "sort") else f"{name}(steps=4)" for name in TASKS}


def sampled(text, ended=True, tokenizer=TOKENIZER):
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Sample(tokens, end=tokenizer.eos_token_id if ended else None, ended_by="end" if ended else "length")


def text_of(tokenizer=TOKENIZER, template="#{answer}", separator="", stops=("#",)):
    return Text(
        tokenizer, answer_template=template, separator=separator, stop_strings=stops, end=tokenizer.eos_token_id
    )


def explorer_of(engine, text=None, max_tokens=64, **options):
    text = text or text_of()
    return Explorer(engine, text, graders_for("", text.answer_template)[0], frozenset({END}), max_tokens, **options)


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


# Pairs


def levenshtein(first, second):
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        row, above = [i], row
        for j, b in enumerate(second, 1):
            row.append(min(row[-1] + 1, above[j] + 1, above[j - 1] + (a != b)))
    return row[-1]


def test_edit_distance_is_levenshteins():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "ab") == edit_distance("ab", "") == 2
    rng = random.Random(0)
    for _ in range(300):
        first, second = ("".join(rng.choices("abc", k=rng.randrange(80))) for _ in range(2))
        assert edit_distance(first, second) == levenshtein(first, second)


def test_each_right_text_takes_the_farthest_wrong_one_that_is_left():
    assert farthest(["aaaa", "bbbb", "cccc"], ["aaab", "bbbb"]) == [(0, 1), (1, 0)]
    assert farthest(["aaaa"], ["bbbb", "cccc"]) == [(0, 0)]  # of equally distant ones the first
    assert farthest(["ab"], ["zz", "abcdef"]) == [(0, 1)]
    assert farthest(["ab"], ["zz", "abcdef"], normalised=True) == [(0, 0)]
    assert farthest([], ["a"]) == farthest(["a"], []) == []


def test_whole_pairs_and_what_is_left_over():
    example = Example("e", "p", "1")
    problems = [
        Sorted(example, (sampled("aa#1"), sampled("bb#1")), (sampled("bb#2"),)),
        Sorted(Example("f", "p", "1"), (), (sampled("c#2"), sampled("d#2"))),
    ]
    pairs, counts = whole_pairs(problems, text_of())
    assert pairs == [WholePair(example, problems[0].right[0], problems[0].wrong[0])]
    assert list(counts.values()) == [1, 1, 2]
    pair = pairs[0].to_example(7)
    assert (pair.id, pair.pair) == ("e/7", Pair((*sampled("aa#1").tokens, END), (*sampled("bb#2").tokens, END)))


CHAIN = Example("e", "7*3+5:", "6", rationale="7*3=1;1+5=6;")
STEPS = ("7*3=1;", "1+5=7;", "#7")


def explored_as(rates, ways=(("1+5=6;#6",), ("1+5=6;#6",), ("#6",)), right=False):
    """STEPS, with right continuations before each of them as they are given, and none where the rate is 0."""
    steps = tuple(Step(text, tuple(sampled(text).tokens), is_answer=text[0] == "#") for text in STEPS)
    attempts = [
        (*(Attempt(sampled(way), True) for way in of_prefix if rate), Attempt(sampled("#0"), False))
        for rate, of_prefix in zip(rates, ways, strict=True)
    ]
    return Explored(CHAIN, sampled("".join(STEPS)), right, steps, tuple(attempts))


def whole_pair(chosen="7*3=1;1+5=6;#6"):
    return WholePair(CHAIN, sampled(chosen), sampled("".join(STEPS)))


def in_text(example):
    decode = text_of().decode
    return tuple(decode(tokens) for tokens in (example.pair.before, example.pair.chosen, example.pair.rejected))


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


def test_granular_pairs():
    shortest = explored_as([1, 1, 0], ((), ("1+5=6; so #6", "1+5=6;#6"), ()))
    (example,), counts = granular_pairs([whole_pair()], [shortest], text_of())
    assert in_text(example) == ("7*3=1;", "1+5=6;#6<end>", "1+5=7;")
    assert counts == Counter({"paired": 1})
    assert (example.prompt, example.answer) == (CHAIN.prompt, CHAIN.answer)

    # The answer itself is the pit.
    (example,), _ = granular_pairs([whole_pair()], [explored_as([1, 1, 1])], text_of())
    assert in_text(example) == ("7*3=1;1+5=7;", "#6<end>", "#7")

    # The first step is: what is right as a whole stands against it.
    (example,), _ = granular_pairs([whole_pair("21;21+5=26;#6")], [explored_as([1, 0, 0])], text_of())
    assert in_text(example) == ("", "21;21+5=26;#6<end>", "7*3=1;")


def test_granular_pairs_that_are_dropped():
    text = text_of()
    no_pit = explored_as([1, 1, 1], right=True)
    only = explored_as([1, 1, 0], ((), ("1+5=6;#6",), ()))
    holds = explored_as([1, 1, 0], ((), ("no, 1+5=7; is 1+5=6;#6",), ()))
    other = explored_as([1, 1, 0], ((), ("1+5=6;#6", "1+5=6;;#6"), ()))
    first = explored_as([1, 0, 0])
    explored = [no_pit, only, only, holds, other, first]
    found, counts = granular_pairs([whole_pair()] * len(explored), explored, text)
    assert [in_text(one)[1] for one in found] == ["1+5=6;#6<end>", "1+5=6;;#6<end>"]
    assert dict(counts) == {
        "paired": 2,
        "no first pit": 1,
        "every right continuation is chosen already": 1,
        "every other right continuation has the rejected step in it": 2,  # the last one's chosen begins with it
    }
    assert len({one.id for one in found}) == 2


# Exploration


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


# Rejection sampling


class Script:
    """An engine that says the same of every prompt."""

    def __init__(self, said):
        self.said = said

    def generate(self, prompts, keys, sampling, progress=lambda ended: None):
        assert all(len(own) == len(self.said) for own in keys)
        return [[sampled(text) for text in self.said] for _ in prompts]


def test_rejection_sampling_keeps_what_is_right_sound_and_new():
    said = ["7*3=1;1+5=6;#6", "7*3=1;#6", "7*3=2;1+5=6;#6", "7*3=1;#6", "#6", "#7", "#7", "7*3=1;#8"]
    reading = reading_for("chain(steps=2)")
    (problem,), counts = rejection_samples(explorer_of(Script(said)), [CHAIN], reading, samples=8, kept=2)
    decode = text_of().decode
    assert [decode(one.tokens) for one in problem.right] == said[:2]
    assert [decode(one.tokens) for one in problem.wrong] == ["#7", "7*3=1;#8"]
    assert list(counts.values()) == [2, 1, 1, 1, 2, 1]
    assert sum(counts.values()) == len(said)
    imitated = problem.examples(text_of())
    assert [one.rationale for one in imitated] == ["7*3=1;1+5=6;", "7*3=1;"]
    assert len({one.id for one in imitated}) == 2


def test_rationales_of_texts_are_the_same_by_their_equations():
    reading = reading_for("gsm8k")
    said = ["so 1+1=2 and 2+4=6#6", "then 1 + 1 = 2, and 2+4 = 6#6", "2*3=6#6", "2*3=7, no, 6#6", "six#6", "six #6"]
    (problem,), counts = rejection_samples(explorer_of(Script(said)), [CHAIN], reading, samples=6)
    assert [text_of().decode(one.tokens) for one in problem.right] == [said[0], said[2], said[4]]
    assert counts["right, but with a false step"] == 1


# DPO on given pairs


def given(n, before, chosen, rejected):
    tokens = (tuple(TOKENIZER(part)["input_ids"]) for part in (chosen, rejected, before))
    return Example(f"g{n}", f"{n}+1:", "2", pair=Pair(*tokens))


GIVEN = [
    given(0, "a;b;", "c;#2", "dd;"),
    given(1, "", "e;#3", "f;"),
    given(2, "gg;", "#4", "hhh;"),
    given(3, "i;", "j", "k"),
]


def trainer_of(folder, examples, model=None, objective="dpo", **options):
    from latro.trainer import LatroTrainer

    config = LatroConfig(
        output_dir=str(folder), objective=objective, max_completion_length=12, use_cpu=True, disable_tqdm=True,
        **{"max_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 4, "answer_template": "#{answer}",
           "stop_strings": ["#"], "separator": "", "max_grad_norm": 0.0, **options},
    )  # fmt: skip
    return LatroTrainer(model or tiny_llama(TOKENIZER), config, examples, processing_class=TOKENIZER)


def path_logp(model, prompt, tokens):
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None]).sum()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_gradient_of_granular_pairs_is_that_of_the_published_loss(tmp_path, accumulation):
    model, reference = tiny_llama(TOKENIZER).double(), tiny_llama(TOKENIZER, seed=1).double()
    own = tiny_llama(TOKENIZER).double()
    trainer = trainer_of(
        tmp_path, GIVEN, own, beta=0.3,
        per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    trainer.reference.model.load_state_dict(reference.state_dict())
    with Float64():
        found = gradients_of_an_update(trainer)
        losses = []
        for example in GIVEN:
            prompt = [*TOKENIZER(example.prompt)["input_ids"], *example.pair.before]
            ratio = {
                way: path_logp(model, prompt, list(way)) - path_logp(reference, prompt, list(way)).detach()
                for way in (example.pair.chosen, example.pair.rejected)
            }
            losses.append(-logsigmoid(0.3 * (ratio[example.pair.chosen] - ratio[example.pair.rejected])))
        torch.stack(losses).mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_given_pairs_are_not_sampled(tmp_path):
    trainer = trainer_of(tmp_path, GIVEN, max_steps=3, learning_rate=1e-2)
    trainer.engine = None
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-4)
    assert losses[-1] < losses[0]


def test_a_group_of_a_given_pair_is_made_again():
    from latro.objectives import Dpo

    supply = Supply(text_of(), Dpo(), graders_for("", "#{answer}")[0])
    supply.check(GIVEN, 12)
    group = supply.group(GIVEN[0], [])
    assert text_of().decode(group.prompt) == "0+1:a;b;"
    assert [one.text for one in group.rationales] == ["c;#2", "dd;"]
    assert group.pairs == [(0, 1)]
    assert supply.remake(GIVEN[0], [], [], []) == group


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        ([GIVEN[0], CHAIN], {}, "example e: must have a pair, as others have, got none"),
        (GIVEN, {"objective": "latro"}, "example g0: objective Latro takes no given pair; dpo does"),
        ([given(0, "", "a", "a")], {}, "its pair must be of two different ways to go on"),
        ([given(0, "", "", "a")], {}, "of at least one token each"),
        ([given(0, "abcdef;", "abcdef", "b")], {}, "at most max_completion_length tokens, 12, got 13"),
    ],
)
def test_given_pairs_that_cannot_be_trained_on_are_refused(examples, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, examples, **options)


def test_bad_numbers_are_refused():
    explorer = explorer_of(Script([]))
    with pytest.raises(ValueError, match="explore: continuations must be at least 1, got 0"):
        explore(explorer, [], lines, continuations=0)
    with pytest.raises(ValueError, match="explore: most_steps must be at least 1, got 0"):
        explore(explorer, [], lines, most_steps=0)
    for name in ("samples", "kept"):
        with pytest.raises(ValueError, match=f"rejection_samples: {name} must be at least 1, got 0"):
            rejection_samples(explorer, [], Reading(lines), **{name: 0})


# The pipeline


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)


PROG = named("prog")


def configs_of(folder, **changes):
    common = {
        "max_steps": 2, "per_device_train_batch_size": 8, "max_completion_length": 14, "learning_rate": 1e-3,
        "answer_template": "#{answer}", "stop_strings": ["#"], "separator": "", "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "seed": 3, **changes,
    }  # fmt: skip
    return configs(folder, common, dpo={"learning_rate": 1e-3}, also_dpo=True)


def self_explored(base, folder, examples, changes=None, **options):
    return self_explore(
        *base,
        examples,
        folder,
        configs_of(folder, **(changes or {})),
        reading=reading_for("prog"),
        search=Search(samples=6, kept=2),
        **options,
    )


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_whole_pipeline_and_its_resumption(base, tmp_path, monkeypatch):
    examples, questions = PROG.problems(0, 24), PROG.problems(0, 8, "validation")
    before = weights(base[0])
    found = self_explored(base, tmp_path, examples, evaluation=questions)
    assert torch.equal(weights(base[0]), before)
    assert list(found.stages) == ["base", "sft", "rft", "dpo", "self_explore"]
    assert [stage.updates for stage in found.stages.values()] == [0, 2, 2, 2, 2]
    assert all(len(stage.evaluation.records) == 8 for stage in found.stages.values())
    samples, pairs, granular = (found.counts[name] for name in ("samples", "pairs", "granular pairs"))
    assert sum(samples.values()) == 24 * 6
    assert samples["kept"] == pairs["paired"] + pairs["right, but there is no wrong one left"]
    assert sum(granular.values()) == pairs["paired"] > 0 and granular["paired"] > 0
    for name in ("sft", "rft", "dpo", "self_explore"):
        assert (tmp_path / name / "model.safetensors").is_file()

    monkeypatch.setattr("latro.explore.pipeline.LatroTrainer.train", lambda self: pytest.fail("trained again"))
    monkeypatch.setattr("latro.explore.pipeline.rejection_samples", lambda *given, **more: pytest.fail("sampled again"))
    again = self_explored(base, tmp_path, examples, evaluation=questions, resume=True)
    assert torch.equal(weights(again.model), weights(found.model))
    assert (again.stages, again.counts) == (found.stages, found.counts)
    with pytest.raises(ValueError, match="is of a run with other configs; use another folder"):
        self_explored(base, tmp_path, examples, {"learning_rate": 1e-4}, resume=True)


def test_a_run_that_stopped_goes_on_where_it_was(base, tmp_path, monkeypatch):
    examples = PROG.problems(0, 16)
    whole = self_explored(base, tmp_path / "whole", examples)

    def killed(*given, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("latro.explore.pipeline.explore", killed)
        with pytest.raises(KeyboardInterrupt):
            self_explored(base, tmp_path / "other", examples)
    resumed = self_explored(base, tmp_path / "other", examples, resume=True)
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_without_pairs_the_model_stays_that_of_rft(base, tmp_path, caplog):
    examples = PROG.problems(0, 4)
    never = [Example(one.id, one.prompt, "x" * 0 or "9-9", rationale=one.rationale) for one in examples]
    found = self_explored(base, tmp_path, never)
    assert found.counts["samples"]["kept"] == found.counts["granular pairs"]["paired"] == 0
    assert found.stages["self_explore"].updates == 0
    assert "there is nothing to learn from" in caplog.text


@pytest.mark.parametrize(
    ("examples", "changes", "options", "message"),
    [
        ([], {}, {}, "self_explore: examples must hold at least one example, got none"),
        ([Example("a", "p", "1")], {}, {}, "golden must hold at least one example, got none"),
        ([CHAIN, CHAIN], {}, {}, "examples must have different ids"),
        ([CHAIN], {}, {"golden": [Example("a", "p", "1")]}, "golden examples must have a rationale, got none for a"),
    ],
)
def test_what_the_pipeline_refuses(base, tmp_path, examples, changes, options, message):
    with pytest.raises(ValueError, match=message):
        self_explored(base, tmp_path, examples, changes, **options)


def test_configurations_that_do_not_fit_together_are_refused(base, tmp_path):
    good = configs_of(tmp_path)
    assert {name: (one.objective, one.optim) for name, one in good.items()} == {
        "sft": ("sft_golden", good["sft"].optim),
        "rft": ("sft_golden", good["sft"].optim),
        "self_explore": ("dpo", "rmsprop"),
        "dpo": ("dpo", "rmsprop"),
    }
    other = configs_of(tmp_path, max_completion_length=15)
    for changed, message in (
        ({name: good[name] for name in ("sft", "rft")}, "configs must be of sft, rft, self_explore and perhaps dpo"),
        (good | {"rft": good["dpo"]}, "rft must have objective sft_golden, got dpo"),
        (good | {"dpo": other["dpo"]}, "max_completion_length must be the same in sft and dpo, got 14 and 15"),
    ):
        with pytest.raises(ValueError, match=message):
            self_explore(*base, PROG.problems(0, 4), tmp_path, changed)


def test_the_commands(base, tmp_path, capsys):
    from latro.cli import main

    data = ["--dataset", "prog", "--limit", "6"]
    page = tmp_path / "page.html"
    assert main(["explore", str(FOLDER), *data, "--num_generations", "3", "--all", "--to", str(page)]) == 0
    said = capsys.readouterr().out
    assert "(before the first step)" in said and "18 rationales are different" in said
    assert page.read_text().count("<h3>") == said.count("(before the first step)")

    run = tmp_path / "run"
    flags = ["--max_steps", "2", "--use_cpu", "true", "--disable_tqdm", "true", "--save_strategy", "no",
             "--per_device_train_batch_size", "4", "--learning_rate", "1e-3", "--dpo.max_steps", "1"]  # fmt: skip
    options = ["--model", str(FOLDER), *data, "--output_dir", str(run), "--samples", "4", "--test_limit", "8"]
    assert main(["self-explore", *options, *flags]) == 0
    said = capsys.readouterr().out
    assert "accuracy on 8 questions" in said and "granular pairs" in said
    assert (run / "self_explore" / "model.safetensors").is_file() and (run / "results.json").is_file()
    assert main(["self-explore", *options, *flags, "--no_such", "1"]) == 1
    assert "there is no option --no_such" in capsys.readouterr().err
    assert main(["self-explore", "--model", str(FOLDER), "--dataset", "prog"]) == 1
    assert "--output_dir must be given" in capsys.readouterr().err
    assert main(["self-explore", "--help"]) == 0
    assert "--continuations" in capsys.readouterr().out


def test_options_of_one_training():
    from latro.cli import self_explore_options

    flags = ["--dataset", "chain", "--output_dir", "o", "--learning_rate", "1e-3", "--also_dpo", "true"]
    flags += ["--sft.max_steps", "7", "--dpo.beta", "0.3"]
    options, found = self_explore_options([*flags, "--use_cpu", "true"])
    assert options.temperature == 0.7
    assert list(found) == ["sft", "rft", "self_explore", "dpo"]
    assert [one.max_steps for one in found.values()] == [7, -1, -1, -1]
    assert [one.learning_rate for one in found.values()] == [1e-3, 1e-3, 1e-6, 1e-6]
    assert found["dpo"].beta == found["self_explore"].beta == 0.3
    assert found["sft"].answer_template == "#{answer}" and found["sft"].stop_strings == ["#"]


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
