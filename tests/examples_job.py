"""Examples in each of some processes, and in one for comparison: python tests/examples_job.py JOB FILE."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState

from examples import accelerate_loop
from latro.demo.task import problems
from latro.launch import leave_process_group
from latro.text import Text
from tests.float64 import Float64
from tests.tiny import character_tokenizer, tiny_llama

TOKENIZER = character_tokenizer()
TEXT = Text(TOKENIZER, answer_template="={answer}", stop_strings=["="], separator="", end=TOKENIZER.eos_token_id)
PROMPTS, K = 4, 3  # of an update of TRL's


def by_accelerate():
    """Two updates on five prompts each, which two processes cannot share out equally, nor each in two parts."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, text = accelerate_loop.load()
    model.double()
    with Float64():
        log = accelerate_loop.train(accelerator, model, text, problems(0, 10), updates=2, prompts=5)
    return {"log": torch.tensor(log), "weights": model.state_dict()}


def by_trl():
    """Two updates. Under SGD, and with little clipping, weights show the scale of a gradient."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(Path(folder), max_steps=2, optim="sgd", learning_rate=1e-3, max_grad_norm=1e3)
        trainer._generate = completions
        trainer.model.double()
        trainer.ref_model.double()
        with Float64():
            trainer.train()
    log = [[line["grad_norm"], line["reward"], line["kl"]] for line in trainer.state.log_history[:-1]]
    return {"log": torch.tensor(log), "weights": trainer.model.state_dict()}


def trl_trainer(folder, *, answer_weight=1.0, peft_config=None, evaluated=0, answer="answer", **options):
    """The example's trainer of a small random model. answer: what the column is called."""
    from datasets import Dataset
    from trl import RLOOConfig

    from examples.trl_rloo import LatroRLOOTrainer

    tiny_llama(TOKENIZER).save_pretrained(folder / "model")
    rows = [{"prompt": f"{n} + {n * n}:", answer: str(n + n * n)} for n in range(24)]
    defaults = {
        "output_dir": str(folder / "run"),
        "num_generations": K,
        "per_device_train_batch_size": PROMPTS * K // int(os.environ.get("WORLD_SIZE", 1)),
        "max_completion_length": 9,
        "max_steps": 3,
        "logging_steps": 1,
        "beta": 0.3,
        "temperature": 0.8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return LatroRLOOTrainer(
        str(folder / "model"),
        RLOOConfig(**defaults | options),
        TEXT,
        answer_weight=answer_weight,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:evaluated]) if evaluated else None,
        peft_config=peft_config,
        processing_class=TOKENIZER,
    )


def completions(prompts):
    """In place of the trainer's own: by the prompt alone, and ended in every way."""
    prompt_ids = TOKENIZER(text=prompts)["input_ids"]
    found = [completion(sum(tokens), row % K) for row, tokens in enumerate(prompt_ids)]
    return prompt_ids, found, TOKENIZER.batch_decode(found)


def completion(number, k):
    tokens = TOKENIZER(f"{number % 7}{'ab' * ((number + k) % 4)}{k}")["input_ids"]
    ended_by = ("length", "end", "stop")[(number + k) % 3]
    end, answer = [TOKENIZER.eos_token_id], TOKENIZER("=7")["input_ids"]
    return tokens + {"length": [], "end": end, "stop": answer + end}[ended_by]


JOBS = {"accelerate": by_accelerate, "trl": by_trl}


def main(job, file):
    torch.set_num_threads(1)
    found = JOBS[job]()
    if PartialState().is_main_process:
        torch.save(found, file)
    leave_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
