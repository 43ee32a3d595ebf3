"""The study's base models: what they are trained on, and that a seed makes the same ones."""

import json
from dataclasses import replace
from itertools import islice
from random import Random

import pytest
import torch

from latro.study import bases, gate
from latro.study.bases import RECIPES, SIZES, Recipe, mixed, tokenizer_of, train_bases
from latro.tasks import named

CHAIN = named("chain(steps=3)")
FEW = Recipe(clean_steps=3, mixed_steps=2, batch_size=4)
TWO = {"guessing": FEW, "sloppy": replace(FEW, empty=0.0, sloppy=0.8)}


def same(one, other):
    return all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize("name", RECIPES)
def test_every_task_has_three_recipes_that_share_their_clean_phase(name):
    assert len(RECIPES[name]) == 3
    assert len({recipe.clean_phase for recipe in RECIPES[name].values()}) == 1
    assert len(set(RECIPES[name].values())) == 3


@pytest.mark.parametrize("name", RECIPES)
def test_an_answer_is_one_character_and_texts_are_in_the_alphabet(name):
    task = named(name)
    for example in task.problems(0, 100):
        assert len(example.answer) == 1
        text = f"{example.prompt}{example.rationale}#{example.answer}"
        assert len(tokenizer_of(task)(text)["input_ids"]) == len(text)


@pytest.mark.parametrize("name", RECIPES)
def test_shares_of_the_mixture(name):
    task, rng = named(name), Random(0)
    recipe = Recipe(empty=0.4, half=0.3, sloppy=0.2, random_answers=0.0)
    found = dict.fromkeys(("empty", "half", "golden", "mistaken"), 0)
    problems = list(islice(task.draws(0), 4000))
    for problem in problems:
        rationale, _, answer = mixed(task, problem, recipe, rng).partition("#")
        golden, right = task.work(problem)
        wrong = task.first_wrong_step(task.example(problem), rationale) is not None
        kind = "mistaken" if wrong else "golden" if rationale == golden else "half" if rationale else "empty"
        found[kind] += 1
        assert answer == right or kind == "mistaken"
        if kind == "mistaken":
            assert len(task.steps_of(rationale)) == len(problem.operations)
    shares = {kind: count / len(problems) for kind, count in found.items()}
    assert shares == pytest.approx({"empty": 0.4, "half": 0.3, "golden": 0.1, "mistaken": 0.2}, abs=0.03)


def test_a_rationale_breaks_off_behind_any_step_but_the_last():
    recipe = Recipe(empty=0.0, half=1.0, sloppy=0.0)
    problem = next(CHAIN.draws(0))
    golden, _ = CHAIN.work(problem)
    halves = {mixed(CHAIN, problem, recipe, Random(seed)).partition("#")[0] for seed in range(50)}
    assert halves == {golden[:6], golden[:12]}


def test_a_mistake_is_carried_on_to_the_answer():
    recipe, rng = Recipe(empty=0.0, half=0.0, sloppy=1.0, random_answers=0.0), Random(0)
    texts = [mixed(CHAIN, problem, recipe, rng) for problem in islice(CHAIN.draws(0), 200)]
    assert all(text.endswith(f"={text[-1]};#{text[-1]}") for text in texts)


def test_random_answers_are_any():
    recipe = Recipe(empty=1.0, half=0.0, sloppy=0.0, random_answers=0.5)
    problems = list(islice(CHAIN.draws(0), 4000))
    right = sum(mixed(CHAIN, one, recipe, Random(n)) == "#" + CHAIN.work(one)[1] for n, one in enumerate(problems))
    # Half, and those that are right by chance: about one in eight, for 0 is frequent among products modulo ten.
    assert 0.53 < right / len(problems) < 0.60


def test_a_seed_makes_the_same_bases():
    first, again, other = (train_bases(CHAIN, seed, TWO) for seed in (0, 0, 1))
    assert list(first) == list(TWO)
    assert all(same(first[name], again[name]) for name in TWO)
    assert not same(first["guessing"], other["guessing"])
    assert not first["guessing"].training
    new = [bases.new_model(seed, tokenizer_of(CHAIN)) for seed in (0, 0, 1)]
    assert same(new[0], new[1]) and not same(new[0], new[2])


def test_a_shared_clean_phase_is_that_of_one_alone():
    losses = []
    together = train_bases(CHAIN, 0, TWO, progress=lambda step, loss: losses.append((step, loss)))
    # Three clean steps for both.
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 4, 5]
    for name, recipe in TWO.items():
        assert same(together[name], train_bases(CHAIN, 0, {name: recipe})[name])
    assert not same(together["guessing"], together["sloppy"])


def test_recipes_of_other_clean_phases_keep_their_order():
    longer = {"guessing": FEW, "longer": replace(FEW, clean_steps=4), "sloppy": TWO["sloppy"]}
    found = train_bases(CHAIN, 0, longer)
    assert list(found) == list(longer)
    assert same(found["sloppy"], train_bases(CHAIN, 0, TWO)["sloppy"])


@pytest.mark.parametrize(("size", "parameters"), [("0.15M", 0.15e6), ("1M", 1e6), ("5M", 5e6), ("40M", 40e6)])
def test_sizes(size, parameters):
    model = bases.new_model(0, tokenizer_of(CHAIN), SIZES[size])
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(parameters, rel=0.05)
    assert model.lm_head.weight.std().item() == pytest.approx(SIZES[size].width ** -0.5, rel=0.1)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.5, rel=0.1)
    steps = []
    recipe = Recipe(clean_steps=20, mixed_steps=0, batch_size=1)
    if size == "1M":  # fewer steps, at a lower learning rate
        train_bases(CHAIN, 0, {"one": recipe}, size, lambda step, loss: steps.append(step))
        assert len(steps) == round(20 * SIZES[size].steps) < 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"empty": 0.9, "half": 0.2}, r"shares of at most 1 together, got \(0.9, 0.2"),
        ({"sloppy": -0.1}, "shares of at most 1 together"),
        ({"random_answers": 1.5}, "random_answers must be from 0 to 1, got 1.5"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"clean_steps": -1}, "clean_steps must be at least 0, got -1"),
    ],
)
def test_a_recipe_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match=r"size must be one of \['0.15M', '1M', '5M', '40M'\], got '7B'"):
        train_bases(CHAIN, 0, TWO, "7B")


def test_the_gate_is_measured_of_every_base(monkeypatch, tmp_path):
    # A model that always works it out, for the gate is of full samples.
    clean = Recipe(clean_steps=0, mixed_steps=60, batch_size=16, empty=0.0, half=0.0, sloppy=0.0)
    monkeypatch.setattr(gate, "RECIPES", {"chain(steps=1)": {"clean": clean}})
    monkeypatch.setattr(gate, "QUESTIONS", 8)
    gate.main([str(tmp_path / "gate.json"), "--seeds", "1"])
    (row,) = json.loads((tmp_path / "gate.json").read_text())
    assert (row["task"], row["size"], row["recipe"], row["seed"]) == ("chain(steps=1)", "0.15M", "clean", 0)
    assert row["full"] > 0.2 and row["length"] > 4
    assert 0 <= row["greedy"] <= 1 and 0 <= row["sampled"] <= 1
