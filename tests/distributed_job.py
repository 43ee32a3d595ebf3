"""Runs of the trainer as test_trainer_distributed.py has them: in each of some processes, and in one for comparison.

python tests/distributed_job.py FOLDER: FOLDER/runs.json names runs and their arguments; each has a folder in FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file

from latro import cli, evaluate, score, watch
from latro.config import LatroConfig
from latro.launch import leave_process_group
from latro.rollout import Sample
from latro.trainer import LatroTrainer
from latro.vllm import whole_weights
from tests.float64 import Float64
from tests.tiny import character_tokenizer, examples, tiny_llama

TOKENIZER = character_tokenizer()
OPTIONS = {
    "num_generations": 3,
    "max_completion_length": 12,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "temperature": 0.8,
    "beta": 0.3,
    "majority": 2,
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "completions_every": 1,
}


class ByPrompt:
    """An engine whose samples depend on the prompt alone: two to four of them, which end in every way."""

    def sync(self, model):
        pass

    def generate(self, prompts, keys, sampling, progress=lambda ended: None):
        return [[self.sample(sum(prompt), k) for k in range(2 + sum(prompt) % 3)] for prompt in prompts]

    def sample(self, number, k):
        tokens = TOKENIZER(f"{number % 7}{'ab' * ((number + k) % 4)}{k}")["input_ids"]
        ended_by = ("length", "end", "stop")[(number + k) % 3]
        if ended_by == "stop":
            tokens += TOKENIZER(" The answer is")["input_ids"]
        return Sample(tokens, [-1.0] * len(tokens), TOKENIZER.eos_token_id if ended_by == "end" else None, ended_by)


class AsAsked(ByPrompt):
    """As many of a prompt's as it is asked for."""

    def generate(self, prompts, keys, sampling, progress=lambda ended: None):
        return [
            [self.sample(sum(prompt), k) for k in range(len(of_prompt))]
            for prompt, of_prompt in zip(prompts, keys, strict=True)
        ]


class Recorded:
    """An engine that keeps what it was asked: of each call, the prompts and their samples' tokens."""

    def __init__(self, engine):
        self.engine, self.calls = engine, []

    def sync(self, model):
        self.engine.sync(model)

    def generate(self, prompts, keys, sampling, progress=lambda ended: None):
        found = self.engine.generate(prompts, keys, sampling, progress)
        texts = [TOKENIZER.decode(prompt) for prompt in prompts]
        self.calls.append(dict(zip(texts, [[sample.tokens for sample in of] for of in found], strict=True)))
        return found


def run(folder, options=None, injected=True, double=True, adapter=False, tied=False, spoilt_from=None, resume=False):
    """Train, save the model to `folder/model`, and what this process has seen to `folder/process-N.json`.

    injected: rationales are ByPrompt's, and the model's own otherwise. spoilt_from: from this update on, the last
    process meets a reward that is no number.
    """
    args = LatroConfig(output_dir=str(folder), **{**OPTIONS, **(options or {})})
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate shards on accelerators alone: this is what it asks. Device and backend stay those of the CPU.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    # Processes score in different numbers of batches, as they do where rationales are long.
    watch.answer_logps = evaluate.answer_logps = partial(answer_logps, most=1 if args.process_index else None)
    model = tiny_llama(TOKENIZER, tie_word_embeddings=tied).to(torch.float64 if double else torch.float32)

    def spoilt(prompts, completions, answer):
        bad = trainer.state.global_step >= spoilt_from and args.process_index == args.world_size - 1
        return [float("nan") if bad else 0.0] * len(prompts)

    with Float64() if double else nullcontext():
        trainer = LatroTrainer(
            with_adapter(model) if adapter else model,
            args,
            examples(16),
            examples(5),
            processing_class=TOKENIZER,
            engine=ByPrompt() if injected else None,
            reward_funcs=[] if spoilt_from is None else [spoilt],
        )
        trainer.engine = recorded = Recorded(trainer.engine)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(str(folder / "model"))
        trainer.engine = AsAsked() if injected else recorded.engine
        seen = {
            "sampled": recorded.calls,
            "history": trainer.state.log_history,
            "sharded": sharded(trainer.model),
            "sharded_reference": sharded(trainer.reference),
            "evaluations": [trainer.evaluation_of(examples(n)).to_json() for n in (5, 1)],
        }
        handed_on = dict(whole_weights(trainer.model))
    (folder / f"process-{args.process_index}.json").write_text(json.dumps(seen))
    if trainer.is_world_process_zero():
        save_file(handed_on, folder / "handed-on.safetensors")


def sharded(model):
    """Its parameters that FSDP2 or ZeRO-3 has sharded."""
    weights = () if model is None else model.named_parameters()
    return [name for name, weight in weights if hasattr(weight, "full_tensor") or hasattr(weight, "ds_id")]


def answer_logps(model, paths, batch_tokens=score.BATCH_TOKENS, *, most, **options):
    return score.answer_logps(model, paths, most or batch_tokens, **options)


def with_adapter(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    adapter = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    return get_peft_model(model, adapter)


def main(folder):
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed  # noqa: F401

        # It would compile an operator first, for sums in shared memory.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    for name, arguments in json.loads((folder / "runs.json").read_text()).items():
        if "command" in arguments:
            assert cli.main(arguments["command"]) == 0
        else:
            run(folder / name, **arguments)
    leave_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
