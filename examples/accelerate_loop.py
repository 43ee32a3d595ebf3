"""LaTRO in an accelerate loop: data parallelism, gradient accumulation and mixed precision are accelerate's.

python examples/accelerate_loop.py
ACCELERATE_GRADIENT_ACCUMULATION_STEPS=2 accelerate launch --num_processes 2 examples/accelerate_loop.py
"""

import copy

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from latro.demo.base import FOLDER
from latro.demo.task import ANSWER_TEMPLATE, MARKER, problems
from latro.model import TreeModel
from latro.rollout import LocalEngine, Sampling, sample_key
from latro.text import Text
from latro_kernels import pack_rationales

UPDATES, PROMPTS, K, MAX_TOKENS = 20, 16, 8, 14
LEARNING_RATE, CLIP = 1e-3, 1.0
OPTIONS = {"beta": 0.05, "answer_weight": 0.0}  # 1 would teach this base to end its rationales early


def load(folder=FOLDER):
    """The demo's base, and the rules of its texts: in `a8b+7c+4d+4:b5c9d3#3` the rationale is `b5c9d3`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    text = Text(tokenizer, answer_template=ANSWER_TEMPLATE, stop_strings=[MARKER], separator="", end=end)
    return AutoModelForCausalLM.from_pretrained(folder), text


def share(accelerator, examples):
    """This process's prompts of an update, in as many micro-batches as every other process has."""
    steps = accelerator.gradient_accumulation_steps
    parts = accelerator.num_processes * steps
    if len(examples) < parts:
        raise ValueError(f"an update must have {parts} prompts, one for each micro-batch, got {len(examples)}")
    own = examples[accelerator.process_index :: accelerator.num_processes]
    return [own[n::steps] for n in range(steps)]


def rollout(engine, text, examples, update):
    """K rationales of each example's prompt, and behind each of them the example's answer, as tokens."""
    prompts = [text.prompt(example.prompt) for example in examples]
    # By these keys a prompt has the same rationales whichever process samples them.
    keys = [[sample_key(update, example.id, k) for k in range(K)] for example in examples]
    sampling = Sampling(MAX_TOKENS, ends=frozenset([text.end]), are_over=text.are_over)
    groups = [[text.rationale(sample.tokens) for sample in group] for group in engine.generate(prompts, keys, sampling)]
    rationales = [[rationale.tokens for rationale in group] for group in groups]
    answers = [
        [[text.answer(rationale, example.answer)] for rationale in group]
        for example, group in zip(examples, groups, strict=True)
    ]
    return prompts, rationales, answers


def train(accelerator, model, text, examples, updates=UPDATES, prompts=PROMPTS):
    """-> of each update the mean reward, and the norm of the gradient."""
    reference = TreeModel(copy.deepcopy(model).requires_grad_(False)).to(accelerator.device)
    engine = LocalEngine(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    policy, optimizer = accelerator.prepare(TreeModel(model), optimizer)
    log = []
    for update in range(updates):
        batch = examples[update * prompts : (update + 1) * prompts]
        with accelerator.autocast():
            packed = [pack_rationales(*rollout(engine, text, part, update)) for part in share(accelerator, batch)]
        parts = [(tree.to(accelerator.device), scored.to(accelerator.device)) for tree, scored in packed]
        own = torch.tensor(sum(len(scored.prompt) for _, scored in parts), device=accelerator.device)
        rationales = int(accelerator.reduce(own, "sum"))
        rewards = []
        for tree, scored in parts:
            with accelerator.autocast():
                ref_logps = reference.logprobs(tree, scored)
            with accelerator.accumulate(policy):
                out = policy(tree, scored, ref_logps=ref_logps, denominator=rationales, **OPTIONS)
                # The gradients add up to that of one batch: processes average them, and backward() divides the loss.
                accelerator.backward(out.loss * accelerator.num_processes * accelerator.gradient_accumulation_steps)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(policy.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
            rewards.append(out.reward.sum())
        log.append((accelerator.reduce(torch.stack(rewards).sum(), "sum").item() / rationales, norm.item()))
    return log


def main():
    torch.set_num_threads(1)  # the matrices are small
    accelerator = Accelerator()
    for update, (reward, norm) in enumerate(train(accelerator, *load(), problems(0, UPDATES * PROMPTS))):
        accelerator.print(f"update {update}: mean reward {reward:.2f}, gradient norm {norm:.2f}")
    accelerator.free_memory()  # the wrapped model, which holds the process group
    accelerator.end_training()


if __name__ == "__main__":
    main()
