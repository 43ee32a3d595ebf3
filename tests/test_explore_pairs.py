"""Samples are kept and pairs made as Self-Explore (arXiv 2404.10346) does it, and DPO takes pairs that are given."""

import random
from collections import Counter

import pytest
import torch
from torch.nn.functional import logsigmoid

from latro.config import LatroConfig
from latro.data import Example, Pair
from latro.explore import (
    Reading,
    Sorted,
    WholePair,
    edit_distance,
    explore,
    farthest,
    granular_pairs,
    lines,
    reading_for,
    rejection_samples,
    whole_pairs,
)
from latro.grading import graders_for
from latro.supply import Supply
from tests.explored import CHAIN, END, STEPS, TOKENIZER, explored_as, explorer_of, sampled, text_of
from tests.float64 import Float64
from tests.test_trainer import gradients_of_an_update
from tests.tiny import tiny_llama

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


def whole_pair(chosen="7*3=1;1+5=6;#6"):
    return WholePair(CHAIN, sampled(chosen), sampled("".join(STEPS)))


def in_text(example):
    decode = text_of().decode
    return tuple(decode(tokens) for tokens in (example.pair.before, example.pair.chosen, example.pair.rejected))


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


def test_bad_numbers_are_refused():
    explorer = explorer_of(Script([]))
    with pytest.raises(ValueError, match="explore: continuations must be at least 1, got 0"):
        explore(explorer, [], lines, continuations=0)
    with pytest.raises(ValueError, match="explore: most_steps must be at least 1, got 0"):
        explore(explorer, [], lines, most_steps=0)
    for name in ("samples", "kept"):
        with pytest.raises(ValueError, match=f"rejection_samples: {name} must be at least 1, got 0"):
            rejection_samples(explorer, [], Reading(lines), **{name: 0})


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
