"""Every objective by name, in the trainer: a step, what the supply gives it, resumption, and which options it has."""

import json
import math
from dataclasses import replace

import pytest
import torch

from latro.batch import Batch
from latro.config import LatroConfig
from latro.data import Example
from latro.grading import graders_for
from latro.objectives import OBJECTIVES, Gain, Jepo, Latro, Rloo
from latro.rollout import Sample
from latro.supply import Supply
from latro.text import Text
from tests.float64 import Float64
from tests.test_trainer import gradients_of_an_update
from tests.tiny import character_tokenizer, tiny_llama

TOKENIZER = character_tokenizer()


def example(n):
    options = tuple(str(n + n % 3 + other) for other in (1, 0, 3))
    return Example(f"sum-{n}", f"{n} + {n % 3} = ?", str(n + n % 3), options, rationale=f"{n} and {n % 3}")


DATA = [example(n) for n in range(8)]


class Answers:
    """An engine of whose rationales one is right, the first or another one each time; its log-probs are nobody's."""

    def __init__(self, turns=False):
        self.turns, self.calls = turns, 0

    def sync(self, model):
        pass

    def generate(self, prompts, keys, sampling, progress=lambda n: None):
        self.sampling, self.calls = sampling, self.calls + 1
        answers = {example.prompt: example.answer for example in DATA}
        right = self.calls % 3 if self.turns else 0
        found = []
        for tokens, of_prompt in zip(prompts, keys, strict=True):
            answer = answers[TOKENIZER.decode(tokens)]
            said = [
                f"{'ab' * (k + self.calls)} The answer is {answer if k == right else '99'}."
                for k in range(len(of_prompt))
            ]
            rows = [TOKENIZER(text)["input_ids"] for text in said]
            found.append([Sample(row, [-1.0] * len(row), TOKENIZER.eos_token_id, "end") for row in rows])
        return found


def trainer_of(tmp_path, objective, engine=None, data=DATA, **options):
    from latro.trainer import LatroTrainer

    funcs, model = options.pop("reward_funcs", ()), options.pop("model", None)
    config = LatroConfig(
        output_dir=str(tmp_path),
        objective=objective,
        num_generations=3,
        max_completion_length=40,
        use_cpu=True,
        disable_tqdm=True,
        **{
            "per_device_train_batch_size": 2,
            "max_steps": 1,
            "save_strategy": "no",
            "learning_rate": 1e-3,
            **options,
        },
    )
    return LatroTrainer(
        model or tiny_llama(TOKENIZER),
        config,
        data,
        processing_class=TOKENIZER,
        engine=engine or Answers(),
        reward_funcs=funcs,
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_trainers_step_by_name(name, tmp_path):
    # The tiny model's probability of a sentence is 0 in float32.
    short = {"answer_template": "{answer}"} if name == "verifree" else {}
    trainer = trainer_of(tmp_path, name, **short)
    objective = trainer.objective
    assert type(objective) is OBJECTIVES[name]
    before = {n: p.detach().clone() for n, p in trainer.tree_model.named_parameters()}
    grads = gradients_of_an_update(trainer)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert any(grad.abs().max() > 0 for grad in grads.values())
    assert any(not torch.equal(p, before[n]) for n, p in trainer.tree_model.named_parameters())
    assert (trainer.reference is not None) == ("reference" in objective.needs)
    assert trainer.engine.calls == (1 if objective.samples else 0)
    (logged,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][:1]
    assert math.isfinite(logged["loss"]) and math.isfinite(logged["reward"])
    if trainer.supply.grades:
        assert logged["correct"] == pytest.approx(1 / 3)
        assert trainer.engine.sampling.are_over([TOKENIZER("x The answer is")["input_ids"]]) == [False]


@pytest.mark.parametrize(
    ("name", "terms"), [("rft", 4), ("dpo", 4), ("jepo_multi", 4), ("spin", 12), ("sft_golden", 4), ("rloo", 12)]
)
def test_an_update_does_not_depend_on_its_micro_batches(name, terms, tmp_path):
    """What they are averaged over is counted over the whole update: four prompts, of three samples one is right."""

    def found(folder, size):
        accumulation = 4 // size
        trainer = trainer_of(
            tmp_path / folder,
            name,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
            model=tiny_llama(TOKENIZER).double(),
        )
        pack = trainer.pack
        trainer.pack = lambda groups, denominator: pack(groups, denominators.append(denominator) or denominator)
        return gradients_of_an_update(trainer)

    denominators = []
    with Float64():
        whole, parts = found("whole", 4), found("parts", 1)
    assert denominators == [terms] * 5
    for parameter in whole:
        torch.testing.assert_close(parts[parameter], whole[parameter], rtol=1e-9, atol=1e-12, msg=parameter)


def supply_of(name, end=None):
    text = Text(TOKENIZER, end=TOKENIZER.eos_token_id)
    return Supply(text, OBJECTIVES[name](), graders_for("", text.answer_template)[0])


def said(text):
    return Sample(TOKENIZER(text)["input_ids"], [-1.0], None, "end")


RIGHT, WRONG = "a The answer is 0.", "bb The answer is 7."


def packed(groups, **options):
    return Batch.of(groups, {}, 1, score_end=False, device=torch.device("cpu"), **options)


def test_rightness_is_of_the_models_own_answer():
    group = supply_of("rft").group(DATA[0], [said(RIGHT), said(WRONG), said("c")])
    assert group.correct == [True, False, False]
    assert [rationale.text for rationale in group.rationales] == ["a ", "bb ", "c"]
    assert packed([group]).correct.tolist() == group.correct


def test_pairs_are_of_right_and_wrong_rationales():
    supply = supply_of("dpo")
    one = supply.group(DATA[0], [said(WRONG), said(RIGHT), said(RIGHT), said(WRONG), said(WRONG)])
    assert one.pairs == [(1, 0), (2, 3)]
    none = supply.group(DATA[0], [said(RIGHT)] * 2)
    assert none.pairs == []
    other = supply.group(DATA[0], [said(RIGHT), said(WRONG)])
    assert packed([one, none, other]).pairs.tolist() == [[1, 0], [2, 3], [7, 8]]


def test_golden_rationales():
    assert [r.text for r in supply_of("sft_golden").group(DATA[4], []).rationales] == ["4 and 1"]
    assert [r.text for r in supply_of("sft_answers").group(DATA[4], []).rationales] == [""]
    spin = supply_of("spin").group(DATA[4], [said(RIGHT), said(WRONG)])
    assert [r.text for r in spin.rationales] == ["a ", "bb ", "4 and 1"]
    assert spin.pairs == [(2, 0), (2, 1)]


def test_options_stand_behind_each_rationale_the_right_one_first():
    group = supply_of("multiple_choice").group(DATA[0], [said(RIGHT), said(WRONG)])
    batch = packed([group])
    assert batch.scored.option[batch.scored.kind == 1].tolist() == [0, 1, 2] * 2
    first = batch.scored.targets[batch.scored.segment == 1]
    assert TOKENIZER.decode(first.tolist()).startswith("The answer is 0.")


def test_a_baseline_is_encoded_as_behind_no_rationale():
    group = supply_of("gain").group(DATA[0], [said(RIGHT), said("b\nThe answer is 7.")])
    batch = packed([group], baseline=True)
    texts = [TOKENIZER.decode(batch.scored.targets[batch.scored.segment == s].tolist()) for s in (1, 3, 4)]
    assert batch.scored.kind.tolist() == [0, 1, 0, 1, 2]
    assert [text.partition("The")[0] for text in texts] == ["", "", " "]  # white space is the rationales' own
    assert all("The answer is 0." in text for text in texts)


def test_chains_keep_their_states():
    supply = supply_of("trice")
    first = supply.group(DATA[0], [said(WRONG), said(RIGHT)])
    assert first.pairs == [(1, 1)]  # chain 0 has no state yet
    second = supply.group(DATA[0], [said(RIGHT), said(WRONG)])
    assert [r.text for r in second.rationales] == ["a ", "bb ", "a "]
    assert second.pairs == [(0, 0), (2, 1)]
    assert second.correct == [True, False, True]
    assert supply.group(DATA[1], [said(WRONG)] * 2).pairs == []  # another example's are its own
    later = supply.group(DATA[0], [said("ccc" + RIGHT), said(WRONG)])
    assert [r.text for r in later.rationales] == ["ccca ", "bb ", "a "]

    resumed = supply_of("trice")
    resumed.restore(json.loads(json.dumps(supply.saved())))
    third = resumed.group(DATA[0], [said(WRONG), said(WRONG)])
    assert third.pairs == [(2, 0), (3, 1)]
    assert [r.text for r in third.rationales[2:]] == ["ccca ", "a "]
    again = resumed.remake(DATA[0], third.samples, third.correct, third.pairs)
    assert again == third


@pytest.mark.parametrize("name", ["trice", "dpo"])
def test_a_resumed_run_goes_on_as_if_nothing_had_been(name, tmp_path):
    def run(folder, resume=None, **options):
        engine = Answers(turns=True)
        trainer = trainer_of(
            folder, name, engine, **{"max_steps": 6, "save_strategy": "steps", "save_steps": 1, **options}
        )
        if resume:
            engine.calls = 2  # of the four micro-batches of two rounds
        trainer.train(resume_from_checkpoint=resume)
        return torch.cat([p.detach().flatten() for p in trainer.tree_model.parameters()])

    whole = run(tmp_path, steps_per_generation=2)
    resumed = run(tmp_path, str(tmp_path / "checkpoint-3"), steps_per_generation=2)
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sft_golden", {"rationale": None}, "example sum-1: objective SftGolden needs a golden rationale, got none"),
        ("spin", {"rationale": None}, "example sum-1: objective Spin needs a golden rationale"),
        ("spin", {"rationale": "x" * 41}, "at most max_completion_length tokens, 40, got 41"),
        ("multiple_choice", {"options": ()}, "example sum-1: objective MultipleChoice needs options, at least 2"),
        ("multiple_choice", {"options": ("5", "6")}, "and the answer among them, got"),
        ("multiple_choice", {"options": ("2", "2 °C")}, "answer: the tokenizer must give back"),
    ],
)
def test_examples_that_cannot_give_it_are_refused_before_training(name, change, message, tmp_path):
    data = [DATA[0], replace(DATA[1], **change)]
    engine = Answers()
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, name, engine, data)
    assert engine.calls == 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("verifree", {"reward_floor": -2.5}, "reward_floor must not be given with objective verifree, which has none"),
        ("verifree", {"beta": 0.1}, "beta must not be given with objective verifree"),
        ("verifree", {"answer_weight": 0.0}, "answer_weight must not be given with objective verifree"),
        ("sft_golden", {"answer_weight": 0.5}, "answer_weight must not be given with objective sft_golden"),
        (
            "dpo",
            {"mask_truncated_completions": True},
            "mask_truncated_completions must not be given with objective dpo",
        ),
        ("jepo", {"mask_stop": True}, "mask_stop must not be given with objective jepo"),
        ("gain", {"normalize_advantages": "group"}, "normalize_advantages must not be given with objective gain"),
        ("jepo", {"preset": "code"}, "preset must not be given with objective jepo: it is latro's"),
        ("dpo", {"beta": 0.0}, "Dpo: beta must be > 0"),
        ("dpo", {"reward_funcs": [len]}, "objective dpo has no reward to add reward_funcs to"),
    ],
)
def test_options_that_an_objective_does_not_have_are_refused(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, name, **options)


def test_options_reach_the_objective_and_defaults_are_its_own(tmp_path):
    given = {"answer_weight": 0.01, "normalize_advantages": "batch"}
    assert trainer_of(tmp_path, "jepo", **given).objective == Jepo(answer_weight=0.01, scale="batch")
    assert trainer_of(tmp_path, "gain", reward_floor=0.0).objective == Gain(floor=0.0)
    assert trainer_of(tmp_path, "rloo", beta=0.3).objective == Rloo(beta=0.3)
    for name, kind in OBJECTIVES.items():
        if name != "latro":
            assert trainer_of(tmp_path, name).objective == kind()
    paper = trainer_of(tmp_path, "latro").objective
    assert paper == Latro(beta=0.05, truncation_penalty=1.0)
