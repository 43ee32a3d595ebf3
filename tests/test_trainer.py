"""The trainer: its gradient is LaTRO's, its options act, its checkpoints continue, and what it refuses."""

import copy
import json
import math

import pytest
import torch

from latro.config import LatroConfig
from latro.data import Example
from latro.rollout import Sample
from latro.trainer import LatroTrainer
from latro.watch import NotFiniteError, Watch, rationale_margin
from tests.float64 import Float64
from tests.oracle import oracle_loss
from tests.tiny import character_tokenizer, examples, tiny_llama

TOKENIZER = character_tokenizer()


class Scripted:
    """An engine that says what it is told: for each prompt, texts."""

    def __init__(self, said=None, ended_by="stop"):
        self.said, self.ended_by, self.asked = said, ended_by, []

    def sync(self, model):
        pass

    def generate(self, prompts, keys, sampling, progress=lambda n: None):
        self.asked.append((prompts, keys))
        found = []
        for n, (prompt, of_prompt) in enumerate(zip(prompts, keys, strict=True)):
            texts = (
                self.said[n % len(self.said)]
                if self.said
                else [f"{sum(prompt) % 7}{'ab' * k} The answer is" for k in range(len(of_prompt))]
            )
            samples = []
            for text in texts:
                tokens = TOKENIZER(text)["input_ids"]
                samples.append(Sample(tokens, [-1.0] * len(tokens), None, self.ended_by))
            found.append(samples)
        return found


def trainer_of(tmp_path, engine=None, model=None, data=None, **options):
    config = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "num_generations": 3,
        "max_completion_length": 12,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "separator": " ",
        **options,
    }
    extra = {name: config.pop(name) for name in ("reward_funcs", "eval_dataset", "graders") if name in config}
    return LatroTrainer(
        model or tiny_llama(TOKENIZER),
        LatroConfig(**config),
        examples() if data is None else data,
        processing_class=TOKENIZER,
        engine=engine,
        **extra,
    )


def gradients_of_an_update(trainer):
    """Of the policy, before the optimizer's step; nothing is clipped."""
    seen = {}

    def keep(*args, **kwargs):
        seen.update({n: p.grad.clone() for n, p in trainer.tree_model.model.named_parameters()})

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return seen


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("answer_weight", [0.0, 1.0])
def test_an_updates_gradient_is_the_oracles(tmp_path, accumulation, answer_weight):
    model = tiny_llama(TOKENIZER).double()
    reference = tiny_llama(TOKENIZER, seed=1).double()
    engine = Scripted([["so 3 The answer is", "The answer is", "a\nb The answer is"], ["x The answer is"] * 2])
    trainer = trainer_of(
        tmp_path,
        engine,
        copy.deepcopy(model),
        beta=0.3,
        answer_weight=answer_weight,
        temperature=0.7,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        truncation_penalty=0.0,
    )
    trainer.reference.model.load_state_dict(reference.state_dict())
    with Float64():
        found = gradients_of_an_update(trainer)

    ((prompts, _),) = engine.asked
    golden = {tuple(trainer.text.prompt(example.prompt)): example.answer for example in examples()}
    rationales = [[TOKENIZER(text[: text.index("The")])["input_ids"] for text in said] for said in engine.said * 2]
    answers = [TOKENIZER(f"The answer is {golden[tuple(x)]}.")["input_ids"] + [TOKENIZER.eos_token_id] for x in prompts]
    with Float64():
        loss = oracle_loss(
            model, reference, prompts, rationales, answers, beta=0.3, answer_weight=answer_weight, temperature=0.7
        )
        loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=name)


def written(tmp_path):
    lines = [json.loads(line) for line in (tmp_path / "rationales.jsonl").read_text().splitlines()]
    return {(line["step"], line["id"]): line["rationales"] for line in lines}


def column(tmp_path, name):
    """Of every rationale of the first update, in the order of the prompts."""
    return torch.tensor([row[name] for rows in written(tmp_path).values() for row in rows], dtype=torch.float64)


def updated(tmp_path, engine=None, **options):
    """A trainer after one update, whose rationales are all written."""
    trainer = trainer_of(tmp_path, engine or Scripted(), num_completions_to_print=99, **options)
    if trainer.reference is not None:  # one that differs from the policy
        with torch.no_grad():
            trainer.reference.model.lm_head.weight.mul_(1.1)
    trainer.train()
    return trainer


def leave_one_out(reward):
    groups = reward.view(2, 3)
    return (groups - (groups.sum(1, keepdim=True) - groups) / 2).flatten()


def check_rewards(tmp_path, expected, scale=1.0):
    torch.testing.assert_close(column(tmp_path, "reward"), expected, rtol=1e-4, atol=1e-4)
    advantage = leave_one_out(expected) / scale
    torch.testing.assert_close(column(tmp_path, "advantage"), advantage, rtol=1e-3, atol=1e-3)


def test_beta(tmp_path):
    updated(tmp_path, beta=0.7, truncation_penalty=0.0)
    kl = column(tmp_path, "kl")
    assert (kl.abs() > 1e-3).all()
    check_rewards(tmp_path, column(tmp_path, "answer_logp") - 0.7 * kl)


def test_without_beta_there_is_no_reference(tmp_path):
    assert updated(tmp_path, beta=0.0).reference is None
    assert (column(tmp_path, "kl") == 0).all()
    check_rewards(tmp_path, column(tmp_path, "answer_logp"))


def test_reward_floor(tmp_path):
    updated(tmp_path, beta=0.0, reward_floor=-88.0)
    floored = column(tmp_path, "answer_logp").clamp(min=-88.0)
    assert 0 < (floored == -88.0).sum() < 6
    check_rewards(tmp_path, floored)


def test_reward_clip_range(tmp_path):
    updated(tmp_path, beta=0.0, reward_clip_range=[-88.1, -87.9])
    clipped = column(tmp_path, "answer_logp").clamp(-88.1, -87.9)
    assert clipped.unique().numel() >= 2
    check_rewards(tmp_path, clipped)


@pytest.mark.parametrize(("option", "scale"), [("group", "group"), ("batch", "batch"), (True, "batch")])
def test_normalize_advantages(tmp_path, option, scale):
    updated(tmp_path, beta=0.0, normalize_advantages=option)
    reward = column(tmp_path, "answer_logp")
    deviation = reward.view(2, 3).std(1).repeat_interleave(3) if scale == "group" else reward.std()
    check_rewards(tmp_path, reward, deviation)


def longer_is_better(prompts, completions, answer):
    return [float(len(text)) for text in completions]


def knows_the_answer(prompts, completions, answer):
    assert len(prompts) == len(completions) == len(answer)
    return [float(a) for a in answer]


def test_reward_funcs_and_their_weights(tmp_path):
    functions = [longer_is_better, knows_the_answer]
    updated(tmp_path, beta=0.0, reward_funcs=functions, reward_weights=[2.0, 0.5])
    lengths = column(tmp_path, "length")
    answers = [float(example.answer) for key in written(tmp_path) for example in examples() if example.id == key[1]]
    bonus = 2.0 * lengths + 0.5 * torch.tensor(answers, dtype=torch.float64).repeat_interleave(3)
    check_rewards(tmp_path, column(tmp_path, "answer_logp") + bonus)
    logged = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert logged["rewards/longer_is_better/mean"] == pytest.approx(2.0 * float(lengths.mean()))


class CutOff(Scripted):
    """The first rationale of every prompt is cut off by its length."""

    def generate(self, *args, **kwargs):
        found = super().generate(*args, **kwargs)
        for samples in found:
            samples[0].ended_by = "length"
        return found


FIRST = torch.tensor([True, False, False] * 2)


def test_truncation_penalty_subtracted(tmp_path):
    updated(tmp_path, CutOff(), beta=0.0, truncation_penalty=3.0)
    check_rewards(tmp_path, column(tmp_path, "answer_logp") - 3.0 * FIRST)


def test_truncation_penalty_of_the_mean(tmp_path):
    updated(tmp_path, CutOff(), beta=0.0, truncation_penalty=2.0, truncation_reward="mean")
    reward = column(tmp_path, "answer_logp")
    check_rewards(tmp_path, torch.where(FIRST, 2.0 * reward.mean(), reward))


def test_presets():
    paper = LatroConfig(output_dir="x", use_cpu=True, preset="paper")
    code = LatroConfig(output_dir="x", use_cpu=True, preset="code")
    assert (paper.answer_weight, paper.truncation_reward) == (1.0, "subtract")
    assert (code.answer_weight, code.truncation_penalty, code.truncation_reward) == (0.0, 2.0, "mean")
    assert LatroConfig(output_dir="x", use_cpu=True, preset="code", answer_weight=0.5).answer_weight == 0.5


def weights_after(tmp_path, engine=None, **options):
    trainer = trainer_of(tmp_path, engine or CutOff(), **options)
    return gradients_of_an_update(trainer)


def differ(one, other):
    return any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "change",
    [
        {"answer_weight": 0.0},
        {"temperature": 0.5},
        {"answer_template": "It is {answer}."},
        {"mask_truncated_completions": True},
        {"stop_strings": ["b"]},
        {"num_generations": 2},
        {"learning_rate": 2e-3, "expected": "equal"},  # does not act on a gradient: the comparison can fail
    ],
    ids=str,
)
def test_options_that_change_the_gradient(tmp_path, change):
    equal = change.pop("expected", None) == "equal"
    before, after = weights_after(tmp_path / "a"), weights_after(tmp_path / "b", **change)
    assert differ(before, after) != equal


def test_masked_rationales_have_no_loss(tmp_path):
    """Of two prompts' rationales all but one are masked: the loss has that one's terms alone."""

    class Nearly(Scripted):
        def generate(self, *args, **kwargs):
            found = super().generate(*args, **kwargs)
            for samples in found:
                for sample in samples:
                    sample.ended_by = "length"
            return found

    found = weights_after(tmp_path, Nearly(), mask_truncated_completions=True)
    assert all(bool((grad == 0).all()) for grad in found.values())


def test_separator(tmp_path):
    class Ends(Scripted):
        def generate(self, *args, **kwargs):
            found = super().generate(*args, **kwargs)
            for samples in found:
                for sample in samples:
                    sample.tokens, sample.ended_by = TOKENIZER("so")["input_ids"], "end"
                    sample.end = TOKENIZER.eos_token_id
            return found

    updated(tmp_path, Ends(), separator="\n")
    texts = [row["answer_text"] for rows in written(tmp_path).values() for row in rows]
    assert all(text.startswith("\nThe answer is ") for text in texts)
    plain = weights_after(tmp_path / "a", Ends())
    scored = weights_after(tmp_path / "b", Ends(), score_end=True)
    assert differ(plain, scored)


def test_sampling_options_reach_the_engine(tmp_path):
    class Sees(Scripted):
        def generate(self, prompts, keys, sampling, progress=lambda n: None):
            self.sampling = sampling
            return super().generate(prompts, keys, sampling, progress)

    engine = Sees()
    updated(tmp_path, engine, temperature=0.9, top_p=0.8, top_k=7, max_completion_length=9)
    sampling = engine.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.9, 0.8, 7, 9)
    assert sampling.ends == {TOKENIZER.eos_token_id}
    assert sampling.are_over([TOKENIZER("x The answer is")["input_ids"]]) == [True]


def test_biased_sampling_is_said(tmp_path, caplog):
    trainer_of(tmp_path, Scripted(), top_k=5)
    assert "bias the gradient" in caplog.text


def test_max_prompt_length_leaves_out_and_says_so(tmp_path, caplog):
    data = [*examples(4), Example("long", "x" * 50, "1")]
    trainer = trainer_of(tmp_path, Scripted(), data=data, max_prompt_length=20)
    assert [example.id for example in trainer.train_dataset] == [example.id for example in data[:4]]
    assert "leaves out 1 of 5" in caplog.text
    with pytest.raises(ValueError, match="longer than max_prompt_length"):
        trainer_of(tmp_path, Scripted(), data=data[4:], max_prompt_length=20)


def test_prompts_without_room_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"example sum-0 .* at most 64, got 9 \+ 500"):
        trainer_of(tmp_path, Scripted(), tiny_llama(TOKENIZER, max_position_embeddings=64), max_completion_length=500)


def test_answers_that_the_tokenizer_cannot_write_are_refused_before_training(tmp_path):
    data = [*examples(2), Example("cold", "How cold?", "0 °C")]
    with pytest.raises(ValueError, match="train_dataset: example cold: answer: the tokenizer must give back"):
        trainer_of(tmp_path, Scripted(), data=data)


def test_one_generation_for_several_updates(tmp_path, caplog):
    engine = Scripted()
    trainer_of(tmp_path, engine, max_steps=4, steps_per_generation=2).train()
    assert len(engine.asked) == 2
    assert [len(prompts) for prompts, _ in engine.asked] == [4, 4]
    assert "older than the policy" in caplog.text


def test_keys_depend_on_seed_update_example_and_number_alone(tmp_path):
    def keys(folder, **options):
        engine = Scripted()
        trainer = trainer_of(folder, engine, max_steps=2, **options)
        trainer.train()
        asked = [zip(map(tuple, prompts), map(tuple, keys), strict=True) for prompts, keys in engine.asked]
        return [dict(pairs) for pairs in asked]

    one = keys(tmp_path / "a", per_device_train_batch_size=4)
    accumulated = keys(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert one == accumulated
    other = keys(tmp_path / "c", per_device_train_batch_size=4, seed=1, data_seed=42)
    flat = [key for update in (*one, *other) for of_prompt in update.values() for key in of_prompt]
    assert len(set(flat)) == len(flat)


def test_what_is_written_of_rationales(tmp_path):
    updated(tmp_path, max_steps=3, completions_every=2)
    assert {step for step, _ in written(tmp_path)} == {0, 2}
    trainer_of(tmp_path / "none", Scripted(), log_completions=False).train()
    assert not (tmp_path / "none" / "rationales.jsonl").exists()
    trainer_of(tmp_path / "one", Scripted(), num_completions_to_print=1).train()
    assert len(written(tmp_path / "one")) == 1


def test_rollout_batch_size_and_majority(tmp_path):
    trainer = trainer_of(tmp_path, rollout_batch_size=5, majority=2, eval_dataset=examples(3))
    assert trainer.engine.max_rows == 5
    metrics = trainer.evaluate()
    assert {"eval_accuracy", "eval_majority@2", "eval_sample_accuracy", "eval_answer_logp"} <= metrics.keys()


def dropping(**changes):
    model = tiny_llama(TOKENIZER, attention_dropout=0.3, **changes)
    model.model.layers[0].mlp.drop = torch.nn.Dropout(0.3)
    return model


def test_disable_dropout(tmp_path):
    trainer = trainer_of(tmp_path, Scripted(), dropping())
    attention = trainer.tree_model.model.model.layers[0].self_attn
    assert (attention.attention_dropout, trainer.tree_model.model.model.layers[0].mlp.drop.p) == (0.0, 0.0)
    kept = trainer_of(tmp_path, Scripted(), dropping(), disable_dropout=False)
    assert kept.tree_model.model.model.layers[0].mlp.drop.p == 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"beta": -1.0}, "beta must be 0 or more"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"preset": "mine"}, r"preset must be one of \['code', 'paper'\]"),
        ({"objective": "none"}, "objective must be one of"),
        ({"normalize_advantages": "all"}, "normalize_advantages must be none, group or batch"),
        ({"reward_clip_range": [1.0, 0.0]}, "reward_clip_range must be two numbers"),
        ({"truncation_reward": "x"}, "truncation_reward must be subtract or mean"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "a multiple of gradient_accumulation_steps"),
        ({"reward_weights": [1.0]}, "one for each of the 0 reward_funcs"),
        ({"answer_template": "x"}, "answer_template must hold"),
        ({"completions_every": 0}, "completions_every must be at least 1"),
    ],
    ids=str,
)
def test_bad_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, Scripted(), **options)


def test_bad_reward_functions_are_named(tmp_path):
    def two(**kwargs):
        return [1.0, 2.0]

    with pytest.raises(ValueError, match="reward function two must give 6 rewards, got 2"):
        trainer_of(tmp_path, Scripted(), reward_funcs=[two]).train()


def test_numbers_that_are_none_stop_and_leave_the_batch(tmp_path):
    def nan(prompts, completions, answer):
        return [math.nan] * len(completions)

    trainer = trainer_of(tmp_path, Scripted(), reward_funcs=[nan])
    before = copy.deepcopy(trainer.tree_model.model.state_dict())
    with pytest.raises(
        NotFiniteError, match=r"loss must be finite, got nan at update 0; the batch is in .*stopped-at-0"
    ):
        trainer.train()
    saved = json.loads((tmp_path / "stopped-at-0.json").read_text())
    assert len(saved["groups"]) == 2
    for name, value in trainer.tree_model.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_rationales_that_are_worth_less_than_none_are_said(caplog):
    watch = Watch()
    watch.margin(-0.2)
    assert "nats" not in caplog.text
    watch.margin(-1.0)
    assert "1.00 nats less likely" in caplog.text
    for length in [8.0] * 12 + [1.0] * 12:
        watch.length(length)
    assert caplog.text.count("rationales shrank") == 1


def test_margin_of_the_longer_rationales(tmp_path):
    """Against the log-probs that the update itself finds."""
    trainer = updated(tmp_path, learning_rate=0.0, separator="")
    rows = list(written(tmp_path).values())
    longest = [max(of_prompt, key=lambda row: row["length"])["answer_logp"] for of_prompt in rows]
    empty = Scripted([["The answer is"] * 3])
    updated(tmp_path / "empty", empty, separator="")
    none = column(tmp_path / "empty", "answer_logp")[::3].tolist()
    expected = sum(one - other for one, other in zip(longest, none, strict=True)) / 2
    assert rationale_margin(trainer.tree_model, trainer.text, trainer._update) == pytest.approx(expected, abs=1e-3)


def test_lora(tmp_path):
    peft = pytest.importorskip("peft", reason="the package peft is not installed")

    def adapted(**options):
        adapter = peft.LoraConfig(r=4, target_modules="all-linear", **options)
        return peft.get_peft_model(tiny_llama(TOKENIZER), adapter)

    model = adapted(init_lora_weights=False)
    trainer = trainer_of(tmp_path, Scripted(), model, beta=0.5, num_completions_to_print=99, save_strategy="steps")
    assert trainer.reference is None
    frozen = trainer.tree_model.model.lm_head.weight.clone()
    trainer.train()
    assert (column(tmp_path, "kl").abs() > 1e-3).all()  # against the base without its adapter
    assert torch.equal(frozen, trainer.tree_model.model.lm_head.weight)
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").is_file()

    resumed = trainer_of(tmp_path, Scripted(), adapted(), max_steps=2, learning_rate=0.0)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    for name, value in resumed.language_model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], msg=name)
