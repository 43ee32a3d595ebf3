"""Evaluation against each completion scored by itself, known texts graded by hand, and pairs of evaluations."""

import json
import string
from math import exp, log

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from latro import score
from latro.data import Example
from latro.evaluate import compare, evaluate, split_off
from latro.grading import Grader, graders_for
from latro.model import logprobs
from latro.rollout import LocalEngine, Sample
from latro.text import Text, end_of_answer

TEMPLATE = "The answer is {answer}."
EXAMPLES = [
    Example("a", "Two and two?", "4"),
    Example("b", "Three and four, then?", "7"),
    Example("c", "Nine?", "9"),
]
COLOURS = [
    Example("sky", "Colour of the sky?", "blue", options=("blue", "red", "a rather long kind of green")),
    Example("sun", "Colour of the sun?", "warm yellow", options=("black", "warm yellow")),
    Example("sea", "Colour of the sea?", "deep green", options=("green", "no", "deep green", "yes")),
]


@pytest.fixture(scope="module")
def text():
    characters = {character: n for n, character in enumerate(["<pad>", "<end>", *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(characters, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    return Text(fast, answer_template=TEMPLATE, end=end_of_answer(fast))


@pytest.fixture
def model(text):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(text.tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=text.end,
        bos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


class Saying:
    """An engine that says what it is told: for each prompt's text, the greedy completion and then samples."""

    def __init__(self, text, said, ended_by="end"):
        self.text, self.said, self.ended_by = text, said, ended_by

    def generate(self, prompts, keys, sampling, progress=lambda ended: None):
        progress(sum(map(len, keys)))
        return [
            [
                Sample(tokens(self.text, said), ended_by=self.ended_by)
                for said in self.of(prompt, sampling, len(of_prompt))
            ]
            for prompt, of_prompt in zip(prompts, keys, strict=True)
        ]

    def of(self, prompt, sampling, count):
        greedy, *samples = self.said[self.text.decode(prompt)]
        return [greedy] if sampling.temperature == 0 else samples[:count]


def tokens(text, said):
    return text.tokenizer(said, add_special_tokens=False)["input_ids"]


def log_prob(model, prompt, answer):
    """log π(answer | prompt), token by token, by the model alone."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return float(logits.double().log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())


SAID = {
    "Two and two?": ["2+2 is 4. The answer is 4.", "I say\nThe answer is 5.", "4", "So. The answer is 4. Yes"],
    "Three and four, then?": ["The answer is 8.", "The answer is 8.", "The answer is 7.", "? The answer is 7."],
    "Nine?": ["It goes on", "The answer is 3.", "no number", "The answer is 9."],
}
GSM8K = graders_for("gsm8k", TEMPLATE)


def evaluation(model, text, said=SAID, examples=EXAMPLES, majority=3, **options):
    options = {"graders": GSM8K, "max_tokens": 40, "engine": Saying(text, said)} | options
    return evaluate(model, text, examples, majority=majority, **options)


# --- What is said ---


def test_grades(model, text):
    metrics = evaluation(model, text).metrics()
    expected = {
        "n": 3,
        "accuracy": 1 / 3,
        "accuracy/latro": 1 / 3,
        "accuracy/strict": 0,
        "accuracy/cot": 1 / 3,
        "majority@3": 2 / 3,  # of 5, 4, 4 and 8, 7, 7 and 3, none, 9
        "majority@3/latro": 2 / 3,
        "majority@3/strict": 0,
        "sample_accuracy": 5 / 9,
        "sample_accuracy/cot": 4 / 9,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == pytest.approx((0.061492, 0.792340), abs=1e-6)
    assert metrics["accuracy/strict_high"] == pytest.approx(0.561497, abs=1e-6)


def test_records(model, text):
    one = evaluation(model, text).records[0]
    assert (one.id, one.prompt, one.answer, one.options, one.option_logps) == ("a", "Two and two?", "4", (), ())
    assert one.greedy.text == "2+2 is 4. The answer is 4."
    assert one.greedy.extracted == {"flexible": "4", "latro": "4", "strict": None, "cot": "4"}
    assert one.greedy.right == {"flexible": True, "latro": True, "strict": False, "cot": True}
    assert [len(one.samples), one.samples[1].text, one.samples[0].right["latro"]] == [3, "4", False]
    # Characters before the stop string, or all of them
    assert [sample.rationale_length for sample in (one.greedy, *one.samples)] == [10, 6, 1, 4]


def test_lengths_and_truncation(model, text):
    engine = Saying(text, {example.prompt: ["x" * 5] for example in EXAMPLES}, ended_by="length")
    metrics = evaluation(model, text, majority=0, engine=engine).metrics()
    assert (metrics["rationale_length"], metrics["truncated_frac"], metrics["accuracy"]) == (5, 1, 0)


def test_majority_of_none_is_wrong(model, text):
    said = {example.prompt: ["words", "only", "words"] for example in EXAMPLES}
    always = Grader("always", lambda said, options: None, lambda said, answer: True)
    assert evaluation(model, text, said, majority=2, graders=[always]).metrics()["majority@2"] == 0


def test_without_samples(model, text):
    metrics = evaluation(model, text, majority=0).metrics()
    assert not [name for name in metrics if "sample" in name or "majority" in name or "marginal" in name]
    assert "self_reward_auc" not in metrics


# --- Likelihood ---


@pytest.mark.parametrize("batch_tokens", [1, 150, 10_000])
@torch.no_grad()
def test_answer_log_probs(model, text, batch_tokens):
    given = evaluation(model, text, batch_tokens=batch_tokens)
    for example, record in zip(EXAMPLES, given.records, strict=True):
        for said, completion in zip(SAID[example.prompt], (record.greedy, *record.samples), strict=True):
            rationale = text.rationale(tokens(text, said))
            path = text.prompt(example.prompt) + rationale.tokens
            answer = tokens(text, f"{rationale.separator}The answer is {example.answer}.") + [text.end]
            assert completion.answer_logp == pytest.approx(log_prob(model, path, answer), abs=1e-3)


def test_scored_rows_hold_as_many_tokens_as_they_may(model, text, monkeypatch):
    rows = []

    def counting(model, tree, scored):
        rows.append(len(tree.tokens))
        return logprobs(model, tree, scored)

    monkeypatch.setattr(score, "logprobs", counting)
    evaluation(model, text)
    assert len(rows) == 1
    (everything,) = rows
    for batch_tokens, expected in ((everything, 1), (everything - 1, 2), (1, 9)):
        rows.clear()
        evaluation(model, text, batch_tokens=batch_tokens)
        assert len(rows) == expected  # of 12 rationales, 9 are different
    assert max(rows) < 60


def test_means_of_log_probs(model, text):
    given = evaluation(model, text)
    metrics, logps = given.metrics(), [[sample.answer_logp for sample in record.samples] for record in given.records]
    assert metrics["answer_logp"] == pytest.approx(sum(record.greedy.answer_logp for record in given.records) / 3)
    assert metrics["sample_answer_logp"] == pytest.approx(sum(map(sum, logps)) / 9)
    # Above exp's range
    expected = sum(max(of) + log(sum(exp(logp - max(of)) for logp in of) / 3) for of in logps) / 3
    assert metrics["marginal_answer_logp"] == pytest.approx(expected)
    assert metrics["marginal_answer_logp"] > metrics["sample_answer_logp"] + 0.1


def test_self_reward_auc(model, text):
    given = evaluation(model, text)
    wins = [
        (right.answer_logp > wrong.answer_logp) + (right.answer_logp == wrong.answer_logp) / 2
        for record in given.records
        for right in record.samples
        for wrong in record.samples
        if right.right["flexible"] and not wrong.right["flexible"]
    ]
    assert len(wins) == 6
    assert wins.count(0.5) == 2  # equal rationales, before another answer
    assert given.metrics()["self_reward_auc"] == sum(wins) / 6


def test_nan_is_refused(model, text):
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(ValueError, match=r"log π\(answer\) of example 'a' must be finite, got \[nan"):
        evaluation(model, text)


@torch.no_grad()
def test_option_likelihood(model, text):
    said = {example.prompt: ["The answer is B."] for example in COLOURS}
    graders = graders_for("colours.jsonl", TEMPLATE, options=True)
    given = evaluation(model, text, said, COLOURS, majority=0, graders=graders)
    acc, acc_norm = [], []
    for example, record in zip(COLOURS, given.records, strict=True):
        prompt = text.prompt(example.prompt)
        logps = [log_prob(model, prompt, tokens(text, f" The answer is {o}.") + [text.end]) for o in example.options]
        assert record.option_logps == pytest.approx(logps, abs=1e-3)
        per_byte = [logp / len(option) for logp, option in zip(logps, example.options, strict=True)]
        acc.append(example.options[logps.index(max(logps))] == example.answer)
        acc_norm.append(example.options[per_byte.index(max(per_byte))] == example.answer)
    columns = given.columns()
    assert (columns["acc"], columns["acc_norm"]) == (acc, acc_norm)
    assert acc != acc_norm
    assert columns["accuracy"] == [False, True, False]
    assert given.metrics()["acc_high"] > given.metrics()["acc"]


@torch.no_grad()
def test_options_behind_the_prompt_that_was_answered(model, text):
    """An example alone: its answer's path and its options' are packed side by side."""
    given = evaluation(model, text, {COLOURS[0].prompt: [""]}, COLOURS[:1], majority=0)
    (record,) = given.records
    assert len(record.option_logps) == 3
    assert record.option_logps[0] == pytest.approx(record.greedy.answer_logp, abs=1e-4)


def test_options_of_some_examples(model, text):
    said = {example.prompt: ["x"] for example in (*EXAMPLES, *COLOURS)}
    given = evaluation(model, text, said, [*EXAMPLES[:1], *COLOURS], majority=0)
    assert given.columns()["acc"][0] is None
    assert given.metrics()["acc"] in (0, 1 / 3, 2 / 3, 1)


# --- With the model itself ---


@torch.no_grad()
def test_greedy_is_the_likeliest_token_each_time(model, text):
    given = evaluation(model, text, majority=0, engine=None, max_tokens=12)
    for example, record in zip(EXAMPLES, given.records, strict=True):
        ids = text.prompt(example.prompt)
        for _ in range(12):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == text.end:
                ids.pop()
                break
        assert text.decode(ids) == example.prompt + record.greedy.text


def test_samples_depend_on_seed_and_example_alone(model, text):
    options = {"engine": None, "max_tokens": 8, "majority": 4}
    given = evaluation(model, text, **options)
    assert evaluation(model, text, batch_size=1, **options).to_json() == given.to_json()
    twin = evaluation(model, text, examples=[*EXAMPLES, Example("d", EXAMPLES[0].prompt, "4")], **options)
    assert twin.records[3].greedy.text == twin.records[0].greedy.text
    assert [s.text for s in twin.records[3].samples] != [s.text for s in twin.records[0].samples]
    alone = evaluation(model, text, examples=EXAMPLES[1:2], **options)
    assert [s.text for s in alone.records[0].samples] == [s.text for s in given.records[1].samples]
    other = evaluation(model, text, seed=1, **options)
    assert [s.text for s in other.records[0].samples] != [s.text for s in given.records[0].samples]
    cold = evaluation(model, text, temperature=1e-4, **options)
    assert {s.text for s in cold.records[0].samples} == {cold.records[0].greedy.text}


def test_model_is_left_as_it_was(model, text):
    model.train()
    model.model.layers[0].eval()
    evaluation(model, text, engine=None, max_tokens=3)
    assert model.training
    assert not model.model.layers[0].training


def test_dropout_is_off(model, text):
    expected = evaluation(model.eval(), text).to_json()
    for layer in model.train().model.layers:
        layer.mlp.register_forward_hook(lambda mlp, args, out: torch.nn.functional.dropout(out, 0.5, mlp.training))
    assert evaluation(model, text).to_json() == expected


def test_progress_counts_completions(model, text):
    for engine in (None, Saying(text, SAID)):
        ended = []
        evaluation(model, text, engine=engine, max_tokens=4, progress=ended.append)
        assert sum(ended) == len(EXAMPLES) * (1 + 3)


def test_json(model, text):
    given = evaluation(model, text)
    read = json.loads(json.dumps(given.to_json(), allow_nan=False))
    assert read["metrics"] == given.metrics()
    assert read["graders"] == ["flexible", "latro", "strict", "cot"]
    assert [example["id"] for example in read["examples"]] == ["a", "b", "c"]
    assert read["examples"][0]["samples"][1]["text"] == "4"


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"examples": []}, "examples must not be empty"),
        ({"graders": []}, "graders must not be empty"),
        ({"examples": [*EXAMPLES, EXAMPLES[1]]}, "examples must be named differently, got 'b' 2 times"),
        ({"graders": [GSM8K[0], *GSM8K]}, "graders must be named differently, got 'flexible' 2 times"),
        ({"majority": -1}, "majority must be 0 or more samples, got -1"),
        ({"max_tokens": 218}, r"256 positions, got 21 \+ 218 \+ 18 tokens for example 'b'; use a smaller max_tokens"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    ],
)
def test_bad_arguments(model, text, options, rule):
    with pytest.raises(ValueError, match=rule):
        evaluation(model, text, **options)


def test_longest_that_fits(model, text):
    assert evaluation(model, text, max_tokens=217).metrics()["n"] == 3


# --- Two models ---


def test_comparison(model, text):
    better = {prompt: [said[0].replace("8", "7"), *said[1:]] for prompt, said in SAID.items()}
    first, second = evaluation(model, text), evaluation(model, text, better)
    given = compare(first, second)
    assert given["accuracy"][:3] == pytest.approx((1 / 3, 2 / 3, 1 / 3))
    assert (given["accuracy"].low, given["accuracy"].high) == (0, 1)
    assert given["accuracy"].p_value == 1  # McNemar: one question changed
    assert given["accuracy/latro"] == given["accuracy"]
    assert given["majority@3"].difference == 0
    logps = [[record.greedy.answer_logp for record in one.records] for one in (first, second)]
    assert given["answer_logp"].difference == pytest.approx((sum(logps[1]) - sum(logps[0])) / 3)
    assert given["answer_logp"].low <= given["answer_logp"].difference <= given["answer_logp"].high
    assert compare(second, first)["accuracy"].difference == -given["accuracy"].difference


def test_comparison_is_paired_by_id(model, text):
    first = evaluation(model, text)
    reordered = evaluation(model, text, examples=EXAMPLES[::-1])
    for name, one in compare(first, reordered).items():
        assert one.low == pytest.approx(0, abs=1e-4), name
        assert one.high == pytest.approx(0, abs=1e-4), name


def test_comparison_of_what_both_have(model, text):
    given = compare(evaluation(model, text), evaluation(model, text, majority=2, graders=GSM8K[:2]))
    assert "accuracy/latro" in given
    assert not {"accuracy/cot", "majority@3", "majority@2"} & given.keys()


def test_comparison_of_other_examples(model, text):
    first = evaluation(model, text)
    with pytest.raises(ValueError, match="of the same examples, got 1 that only one of them has, such as 'c'"):
        compare(first, evaluation(model, text, examples=EXAMPLES[:2]))
    other = [*EXAMPLES[:2], Example("c", "Nine?", "10")]
    with pytest.raises(ValueError, match="of the same examples, got '9' and '10' as the answer of 'c'"):
        compare(first, evaluation(model, text, examples=other))


def test_comparison_by_other_graders(model, text):
    with pytest.raises(ValueError, match="the same primary grader, got flexible and latro"):
        compare(evaluation(model, text), evaluation(model, text, graders=GSM8K[1:]))


# --- Validation ---


def test_split_off():
    examples = [Example(str(n), "?", "!") for n in range(2000)]
    rest, part = split_off(examples, 0.2)
    assert sorted(rest + part, key=lambda e: int(e.id)) == examples
    assert len(part) == pytest.approx(400, abs=60)
    # An example stays where it is whatever else there is, and in whatever order.
    assert split_off(examples[1000:][::-1], 0.2)[1] == [e for e in part if int(e.id) >= 1000][::-1]
    assert split_off(examples, 0.2, seed=1)[1] != part
    assert {e.id for e in part} < {e.id for e in split_off(examples, 0.3)[1]}


def test_split_off_refuses():
    examples = [Example(str(n), "?", "!") for n in range(3)]
    with pytest.raises(ValueError, match="fraction must be between 0 and 1, got 1"):
        split_off(examples, 1)
    with pytest.raises(ValueError, match=r"both parts must have an example, got 3 and 0 for the fraction 0.0001 of 3"):
        split_off(examples, 0.0001)


def test_engine_protocol(model, text):
    """The default engine is LocalEngine."""
    options = {"max_tokens": 5, "majority": 2}
    given = evaluation(model, text, engine=LocalEngine(model), **options)
    assert given.to_json() == evaluation(model, text, engine=None, **options).to_json()
