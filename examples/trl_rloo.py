"""LaTRO in TRL: RLOOTrainer with the self-reward for its reward functions, and one packed forward pass for its loss.

TRL (1.16) samples, steps, logs and saves. Its data set has the columns `prompt`, text or messages, and `answer`.

pip install trl && python examples/trl_rloo.py
"""

import tempfile
from contextlib import nullcontext

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import RLOOConfig, RLOOTrainer
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import use_adapter

from latro.demo.base import FOLDER
from latro.demo.task import ANSWER_TEMPLATE, MARKER, problems
from latro.model import TreeModel, verify_tree
from latro.text import Text
from latro_kernels import pack_rationales


class LatroRLOOTrainer(RLOOTrainer):
    """text: where a rationale ends, and how the answer follows it. answer_weight: λ, of the answer's own likelihood."""

    def __init__(self, model, args, text, answer_weight=1.0, **options):
        check(args, **options)
        super().__init__(model, reward_funcs=[], args=args, **options)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("LatroRLOOTrainer: the model must be whole in each process; latro.LatroTrainer shards it")
        self.text, self.answer_weight = text, answer_weight
        self.adapted = hasattr(self.model, "peft_config")
        self.policy = TreeModel(self.model.get_base_model() if self.adapted else self.model)
        self.reference = TreeModel(self.ref_model) if self.ref_model else self.policy
        verify_tree(self.policy)

    def _prepare_inputs(self, rows):
        training = self.model.training
        at = self._step % self.args.steps_per_generation if training else 0
        if at == 0:
            size = self.args.per_device_train_batch_size if training else len(rows)
            K = self.num_generations if training else self.num_generations_eval
            prompts, completions, _ = self._generate([row["prompt"] for row in rows])
            samples = list(zip(prompts, completions, [row["answer"] for row in rows], strict=True))
            self._buffered_inputs = [self.pack(samples[n : n + size], K) for n in range(0, len(rows), size)]
        return self._buffered_inputs[at]

    def pack(self, samples, K):
        """Neighbours, K at a time, are of one prompt."""
        groups = [samples[n : n + K] for n in range(0, len(samples), K)]
        parts = [[self.split(completion) for _, completion, _ in group] for group in groups]
        answers = [
            [[self.text.answer(rationale, answer)] for (rationale, _), (*_, answer) in zip(part, group, strict=True)]
            for part, group in zip(parts, groups, strict=True)
        ]
        rationales = [[rationale.tokens for rationale, _ in part] for part in parts]
        ends = [[end for _, end in part] for part in parts]
        tree, scored = pack_rationales([group[0][0] for group in groups], rationales, answers, ends=ends)
        return tree.to(self.accelerator.device), scored.to(self.accelerator.device)

    def split(self, completion):
        """The rationale, and the token that ended it where that was not a stop string."""
        said = completion[:-1] if completion[-1] in self.eos_token_ids else completion
        rationale = self.text.rationale(said)
        return rationale, completion[-1] if len(rationale.tokens) == len(said) < len(completion) else None

    def reference_logps(self, batch):
        if not self.beta:
            return None
        name = "ref" if self.adapted and "ref" in self.model.peft_config else None
        with use_adapter(self.model, name) if self.adapted else nullcontext():
            return self.reference.logprobs(*batch, temperature=self.temperature)

    def _compute_loss(self, model, batch):
        options = {"beta": self.beta, "answer_weight": self.answer_weight, "temperature": self.temperature}
        options["ref_logps"] = self.reference_logps(batch)
        # Through the forward of DistributedDataParallel, where there is one, for it to reduce the gradients.
        out = _ForwardRedirection()(model, self.accelerator.unwrap_model(model), self.policy, *batch, **options)
        for name in ("reward", "answer_logp", "kl"):
            value = self.accelerator.gather(getattr(out, name)).mean().item()
            self._metrics["train" if self.model.training else "eval"][name].append(value)
        return out.loss


def check(args, train_dataset, eval_dataset=None, **options):
    """Refuse what would part a prompt's rationales, make them older than the policy, or not be done."""
    needed = {"num_iterations": 1, "steps_per_generation": args.gradient_accumulation_steps}
    needed |= dict.fromkeys(("normalize_advantages", "mask_truncated_completions", "log_completions"), False)
    needed |= {"reward_clip_range": None, "reward_weights": None}
    needed["per_device_train_batch_size"] = next_multiple(args.per_device_train_batch_size, args.num_generations)
    if eval_dataset is not None:
        K = args.num_generations_eval or args.num_generations
        needed["per_device_eval_batch_size"] = next_multiple(args.per_device_eval_batch_size, K)
    for name, value in needed.items():
        if getattr(args, name) != value:
            raise ValueError(f"LatroRLOOTrainer: {name} must be {value}, got {getattr(args, name)}")
    for name, rows in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        columns = getattr(rows, "column_names", None)
        if isinstance(columns, list) and "answer" not in columns:
            raise ValueError(f"LatroRLOOTrainer: {name} must have a column `answer`, got {columns}")


def next_multiple(size, K):
    return -(-size // K) * K


def main():
    torch.set_num_threads(1)  # the matrices are small
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    end = tokenizer.eos_token_id
    rows = [{"prompt": example.prompt, "answer": example.answer} for example in problems(0, 320)]
    with tempfile.TemporaryDirectory() as folder:
        args = RLOOConfig(
            output_dir=folder,
            per_device_train_batch_size=128,
            num_generations=8,
            max_completion_length=14,
            max_steps=20,
            learning_rate=1e-3,
            logging_steps=5,
            save_strategy="no",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
        )
        trainer = LatroRLOOTrainer(
            str(FOLDER),
            args,
            Text(tokenizer, answer_template=ANSWER_TEMPLATE, stop_strings=[MARKER], separator="", end=end),
            answer_weight=0.0,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
    for line in trainer.state.log_history[:-1]:
        print(f"step {line['step']}: reward {line['reward']:.2f}, log-prob of the answer {line['answer_logp']:.2f}")


if __name__ == "__main__":
    main()
