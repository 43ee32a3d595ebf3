"""LaTRO in a plain PyTorch loop: within a minute on a CPU, a model that can reason but mostly guesses learns to reason.

python examples/plain_loop.py
"""

import copy

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from latro.demo.base import FOLDER
from latro.demo.task import ANSWER_TEMPLATE, MARKER, problems
from latro.model import TreeModel
from latro.rollout import LocalEngine, Sampling, sample_key
from latro.text import Text
from latro_kernels import pack_rationales

UPDATES, PROMPTS, K, MAX_TOKENS = 60, 16, 8, 14
LEARNING_RATE, CLIP, BETA = 1e-3, 1.0, 0.05
ANSWER_WEIGHT = 0.0  # the answer's own likelihood would teach this base to end its rationales early
QUESTIONS = 256


def load(folder=FOLDER):
    """The demo's base, and the rules of its texts: in `a8b+7c+4d+4:b5c9d3#3` the rationale is `b5c9d3`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    text = Text(tokenizer, answer_template=ANSWER_TEMPLATE, stop_strings=[MARKER], separator="", end=end)
    return AutoModelForCausalLM.from_pretrained(folder), text


def rollout(engine, text, examples, update):
    """K rationales of each example's prompt, and behind each of them the example's answer, as tokens."""
    prompts = [text.prompt(example.prompt) for example in examples]
    keys = [[sample_key(update, example.id, k) for k in range(K)] for example in examples]
    sampling = Sampling(MAX_TOKENS, ends=frozenset([text.end]), are_over=text.are_over)
    groups = [[text.rationale(sample.tokens) for sample in group] for group in engine.generate(prompts, keys, sampling)]
    rationales = [[rationale.tokens for rationale in group] for group in groups]
    answers = [
        [[text.answer(rationale, example.answer)] for rationale in group]
        for example, group in zip(examples, groups, strict=True)
    ]
    return prompts, rationales, answers


def train(model, text, examples, updates=UPDATES):
    """-> of each update the mean reward, and the norm of the gradient."""
    policy, reference = TreeModel(model), TreeModel(copy.deepcopy(model).requires_grad_(False))
    engine = LocalEngine(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    log = []
    for update in range(updates):
        batch = examples[update * PROMPTS : (update + 1) * PROMPTS]
        tree, scored = pack_rationales(*rollout(engine, text, batch, update))
        ref_logps = reference.logprobs(tree, scored)
        out = policy(tree, scored, ref_logps=ref_logps, beta=BETA, answer_weight=ANSWER_WEIGHT)
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        log.append((out.reward.mean().item(), norm.item()))
    return log


def accuracy(model, text, examples):
    """How often what the model says, likeliest token by likeliest token, ends in the answer."""
    prompts = [text.prompt(example.prompt) for example in examples]
    greedily = Sampling(MAX_TOKENS, temperature=0, ends=frozenset([text.end]))
    said = LocalEngine(model).generate(prompts, [[0]] * len(prompts), greedily)
    answers = [text.decode(sample.tokens).rpartition(MARKER)[2] for (sample,) in said]
    return sum(answer == example.answer for answer, example in zip(answers, examples, strict=True)) / len(examples)


def main():
    torch.set_num_threads(1)  # the matrices are small
    model, text = load()
    questions = problems(0, QUESTIONS, "test")
    before = accuracy(model, text, questions)
    log = train(model, text, problems(0, UPDATES * PROMPTS))
    after = accuracy(model, text, questions)
    for update in range(0, UPDATES, 10):
        print(f"update {update}: mean reward {log[update][0]:.2f}, gradient norm {log[update][1]:.2f}")
    print(f"right are, of {QUESTIONS} questions it was not trained on: {before:.0%} before, {after:.0%} after")


if __name__ == "__main__":
    main()
