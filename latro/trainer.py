"""LaTRO's training loop on transformers' Trainer (Algorithm 1 of arXiv 2411.04282).

For each update: sample K rationales of each prompt from the policy; pack `x z_1 y z_2 y … z_K y`; score all of them in
one forward pass of the policy and one of the reference; reward, advantage, loss; one step.

Precision, accumulation, clipping, schedules, data parallelism, checkpoints and logging are left to transformers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latro import recording
from latro.batch import Batch, Group, split
from latro.checkpoint import WholeCheckpoints, newest
from latro.config import LatroConfig
from latro.data import Example, as_examples
from latro.evaluate import Evaluation, evaluate
from latro.grading import Grader, graders_for
from latro.metrics import Meter, RunLog
from latro.model import TreeModel, logprobs, verify_tree
from latro.objectives import Objective, PolicyGradient, Sums
from latro.prepare import disable_dropout, frozen_copy, longest_path, objective_of, sampling_of, text_of, those_that_fit
from latro.progress import Progress
from latro.rollout import Engine, LocalEngine, Sample, sample_key
from latro.rounds import rounds_of
from latro.score import answer_logps
from latro.sharding import check_fsdp, check_whole, keep_output_dtype, placed, whole_copy
from latro.supply import Supply
from latro.vllm import VllmEngine
from latro.watch import Watch, rationale_margin, refuse
from latro_kernels import SelfRewardLoss

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., Sequence[float]]


def _as_it_is(examples: list[Example]) -> Any:
    return examples


def _saved(group: Group) -> tuple[Any, ...]:
    samples = [asdict(sample) for sample in group.samples]
    return group.example.id, samples, group.correct, group.pairs, group.old_logps


class LatroTrainer(WholeCheckpoints):
    """Trains `model` to reason its way to the answers of `train_dataset`.

    train_dataset, eval_dataset: examples of `latro.data.load`, or rows as TRL has them.
    reward_funcs: called as TRL calls them, with prompts, completions and the examples' answers; added to the
        self-reward.
    engine: what samples rationales; the model itself by default.
    graders: by which evaluation finds completions right, the most important one first; by default what stands behind
        the answer's template must be the answer.
    """

    args: LatroConfig
    train_dataset: list[Example]
    eval_dataset: list[Example] | None
    loss_is_scaled_for_ga = False  # transformers divides the loss by the number of micro-batches

    def __init__(
        self,
        model: Any,
        args: LatroConfig,
        train_dataset: Sequence[Any],
        eval_dataset: Sequence[Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_funcs: Sequence[RewardFunction] = (),
        engine: Engine | None = None,
        graders: Sequence[Grader] = (),
        **options: Any,
    ) -> None:
        if processing_class is None:
            raise ValueError("LatroTrainer: processing_class must be the model's tokenizer, got None")
        if len(args.reward_weights or reward_funcs) != len(reward_funcs):
            raise ValueError(
                f"LatroTrainer: reward_weights must be one for each of the {len(reward_funcs)} reward_funcs, "
                f"got {args.reward_weights}"
            )
        if args.use_vllm and engine is not None:
            raise ValueError(
                f"LatroTrainer: engine must be None with use_vllm, which is one, got {type(engine).__name__}"
            )
        # Under a LoRA adapter the model is its own reference, without it.
        self.adapted = model if hasattr(model, "disable_adapter") else None
        policy: PreTrainedModel = model if self.adapted is None else model.get_base_model()
        check_whole(policy)
        if args.disable_dropout:
            disable_dropout(policy)
        tree_model = TreeModel(policy)
        verify_tree(tree_model)
        self.text = text_of(args, processing_class)
        self.objective: Objective = objective_of(args)
        if reward_funcs and not isinstance(self.objective, PolicyGradient):
            raise ValueError(f"LatroTrainer: objective {args.objective} has no reward to add reward_funcs to")
        self.reward_funcs = list(reward_funcs)
        self.graders = list(graders) or list(graders_for("", args.answer_template))
        self.supply = Supply(self.text, self.objective, self.graders[0])
        self.sampling = sampling_of(args, self.text, policy, answers=self.supply.grades)
        self.run_log, self.meter, self.watch = RunLog(Path(str(args.output_dir))), Meter(), Watch()
        self._update: list[Group] = []  # what the update is made of
        self._begun: tuple[int, list[list[Group]], Meter] = (-1, [], self.meter)  # as an update began
        # Micro-batches that are sampled, for later updates; the same one again where it is trained on again.
        self._ahead: list[list[Group]] = []
        self._behind = 0  # micro-batches sampled before a resumption, that the data still has to pass by
        train_examples = those_that_fit(as_examples(train_dataset), self.text, args, longest_path(policy))
        self.supply.check(train_examples, args.max_completion_length)
        super().__init__(
            model=tree_model,
            args=args,
            train_dataset=train_examples,
            eval_dataset=None if eval_dataset is None else as_examples(eval_dataset),
            processing_class=processing_class,
            data_collator=_as_it_is,
            **options,
        )
        refers = "reference" in self.objective.needs and not self.adapted
        check_fsdp(self.accelerator)
        keep_output_dtype(self.accelerator)
        self.reference = placed(frozen_copy(policy), self.accelerator) if refers else None
        # Where parameters are sharded, each process samples with a whole copy: were one to call the shards more often
        # than the others, it would wait for them. Where something else samples, all score in step.
        self.sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        samples_itself = engine is None and not args.use_vllm
        copied = self.sharded and samples_itself
        self.whole = TreeModel(whole_copy(policy, self.accelerator)) if copied else None
        self.in_step = self.sharded and not samples_itself
        if args.use_vllm:
            engine = VllmEngine(model, args, self.accelerator, processing_class)
        self.engine: Engine = engine or LocalEngine(self.whole or policy, args.rollout_batch_size)
        Progress.take_over(self)
        if args.top_p < 1 or args.top_k:
            logger.warning("top_p and top_k bias the gradient: what is sampled is not the policy that is scored")
        stale = (args.steps_per_generation or 0) > args.gradient_accumulation_steps
        if stale and args.epsilon is None and args.importance_weight_cap is None:
            logger.warning("steps_per_generation makes rationales older than the policy they train, uncorrected")

    # Algorithm 1

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """The micro-batches of one update: sample z_1 … z_K ~ π(· | x) for each prompt x (line 3)."""
        super().get_batch_samples(epoch_iterator, self._behind, device)
        self._behind = 0
        if not self._ahead:
            most, again = max(num_batches, self.args.steps_per_generation or 0), self.args.num_iterations
            batches, _ = super().get_batch_samples(epoch_iterator, most * again, device)
            batches = batches[: len(batches) // again]  # the data has them so often
            groups = self.rollouts([example for batch in batches for example in batch])
            sampled = split(groups, [len(batch) for batch in batches])
            if self.args.epsilon is not None:
                self.score_waiting(sampled[num_batches:])
            self._ahead = sampled * again
        parts, self._ahead = self._ahead[:num_batches], self._ahead[num_batches:]
        self._begun = (self.state.global_step, parts, self.meter.copy())
        self._update = [group for part in parts for group in part]
        if self.state.global_step == 0 and self._update and self.supply.samples:
            self.watch.margin(rationale_margin(self.scorer, self.text, self._update, in_step=self.in_step))
        own = torch.tensor(sum(group.count(self.objective.over) for group in self._update), device=device)
        denominator = max(int(self.accelerator.reduce(own, "sum")), 1)
        return [self.pack(part, denominator) for part in parts], None

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Rewards, advantages and the gradient of a micro-batch (lines 4 to 6)."""
        # log π0(z_k | x), of the frozen model
        ref_logps = self.reference_logps(inputs)
        # log π(z_k | x) and log π(y | x, z_k); r_k = log π(y | x, z_k) − β (log π(z_k | x) − log π0(z_k | x));
        # A_k = r_k − mean of the others; loss = −1/R Σ_k A_k log π(z_k | x) + λ log π(y | x, z_k);
        # or what another objective has in their place
        out = model(
            inputs.tree,
            inputs.scored,
            ref_logps=ref_logps,
            objective=self.objective,
            extras=inputs.extras(),
            temperature=self.args.temperature,
            denominator=inputs.denominator,
            entropy=True,
        )
        if self.args.epsilon is not None and inputs.old_logps is None:
            inputs.remember(out.logps)
        self.record(inputs, out, ref_logps)
        # Gradients are averaged over processes and micro-batches, and ours are to be added up.
        loss = out.loss * self.accelerator.num_processes * self.current_gradient_accumulation_steps
        return (loss, out) if return_outputs else loss

    # What its lines are made of

    def rollouts(self, examples: Sequence[Example]) -> list[Group]:
        if not self.supply.samples:
            return [self.supply.group(example, []) for example in examples]
        self.engine.sync(self.model_wrapped)
        prompts = [self.text.prompt(example.prompt) for example in examples]
        step, K = self.state.global_step, self.args.num_generations
        keys = [[sample_key(self.args.seed, step, example.id, k) for k in range(K)] for example in examples]
        with self.compute_loss_context_manager(), Progress.bar(self, len(examples) * K, "sampling") as progress:
            sampled = self.engine.generate(prompts, keys, self.sampling, progress)
        return [self.supply.group(*parts) for parts in zip(examples, sampled, strict=True)]

    @torch.no_grad()
    def score_waiting(self, parts: list[list[Group]]) -> None:
        """log π(z_k | x) of rationales that the policy will have changed before an update is made of them. The others'
        are found when they are first trained on."""
        for part in parts:
            batch = self.pack(part, 1, {})
            with self.compute_loss_context_manager():
                batch.remember(logprobs(self.hooked, batch.tree, batch.scored, temperature=self.args.temperature))

    def pack(self, groups: list[Group], denominator: int, rewards: dict[str, Tensor] | None = None) -> Batch:
        return Batch.of(
            groups,
            self.rewards(groups) if rewards is None else rewards,
            denominator,
            score_end=self.args.score_end,
            device=self.args.device,
            baseline="baseline" in self.objective.needs,
        )

    def rewards(self, groups: list[Group]) -> dict[str, Tensor]:
        """What each of reward_funcs gives each rationale, by its weight."""
        examples = [group.example for group in groups for _ in group.rationales]
        weights = self.args.reward_weights or [1.0] * len(self.reward_funcs)
        found = {}
        for weight, function in zip(weights, self.reward_funcs, strict=True):
            given = function(
                prompts=[example.prompt for example in examples],
                completions=[rationale.text for group in groups for rationale in group.rationales],
                answer=[example.answer for example in examples],
            )
            name = getattr(function, "__name__", type(function).__name__)
            if len(given) != len(examples):
                raise ValueError(f"reward function {name} must give {len(examples)} rewards, got {len(given)}")
            found[name] = weight * torch.tensor(list(given), dtype=torch.float32)
        return found

    @torch.no_grad()
    def reference_logps(self, batch: Batch) -> Tensor | None:
        if "reference" not in self.objective.needs:
            return None
        if self.reference is not None:
            return self.reference.logprobs(batch.tree, batch.scored, temperature=self.args.temperature)
        assert self.adapted is not None
        with self.adapted.disable_adapter():
            return logprobs(self.hooked, batch.tree, batch.scored, temperature=self.args.temperature)

    @property
    def tree_model(self) -> TreeModel:
        return self.accelerator.unwrap_model(self.model)

    @property
    def scorer(self) -> TreeModel:
        """For log-probs that are not trained on."""
        return self.whole or self.hooked

    @property
    def hooked(self) -> TreeModel:
        """The policy with what must be called where it is sharded, and nothing else."""
        model = self.tree_model
        return model if self.sharded else getattr(model, "_orig_mod", model)

    @property
    def language_model(self) -> Any:
        return self.tree_model.model if self.adapted is None else self.adapted

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        order = super()._get_train_sampler(train_dataset)
        return order if self.args.num_iterations == 1 else rounds_of(order, self.args)

    # transformers expects dictionaries of tensors

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs  # on their device since they were packed

    def floating_point_ops(self, inputs: Any) -> int:
        return 6 * sum(p.numel() for p in self.tree_model.parameters()) * len(inputs.tree.tokens)

    # Figures

    def record(self, batch: Batch, out: SelfRewardLoss, ref_logps: Tensor | None) -> None:
        sums = Sums(out.logps, batch.scored, ref_logps)
        reward, advantage = self.objective.reward_and_advantage(sums, batch.extras())
        if not torch.isfinite(out.loss):
            found = {"reward": reward, "answer_logp": sums.answer, "rationale_logp": sums.rationale}
            self.stop("loss", out.loss.item(), batch.groups, found)
        found = recording.figures(batch, self.objective, out, sums, reward, advantage)
        self.meter.add(found)
        self.meter.add_largest(recording.largest(batch, out.logps))
        self.meter.count({"num_tokens": len(batch.tree.tokens)})
        self.watch.length(float(found["rationale_length"].float().mean()))
        step = self.state.global_step
        if self.args.log_completions and step % self.args.completions_every == 0 and self.is_world_process_zero():
            most = self.args.num_completions_to_print
            for rows in recording.rationales(batch, self.text, sums, reward, advantage, most):
                self.run_log.rationales(step, rows)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self.meter.take(self.accelerator)}
        super().log(logs, start_time)
        if self.is_world_process_zero():
            self.run_log.metrics(self.state.global_step, self.state.log_history[-1])

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # A GradScaler leaves out the steps whose gradients overflowed.
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)) and self.accelerator.scaler is None:
            self.stop("gradient norm", float(norm), self._update, {})
        return norm

    def stop(self, what: str, value: float, groups: Sequence[Group], found: dict[str, Tensor]) -> None:
        refuse(what, value, self.state.global_step, self.run_log.folder, groups, found)

    # Evaluation, and what a resumed run has to find again

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Accuracy of greedy completions, and what else `latro.evaluate` measures."""
        examples = self.eval_dataset if eval_dataset is None else as_examples(eval_dataset)
        if not examples:
            raise ValueError("LatroTrainer: evaluation needs an eval_dataset, got none")
        evaluation = self.evaluation_of(examples)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in evaluation.metrics().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluation_of(self, examples: Sequence[Example]) -> Evaluation:
        """Each process asks a part of the questions; all have the whole result."""
        self.engine.sync(self.model_wrapped)
        own = examples[self.args.process_index :: self.args.world_size]
        if self.in_step and not own:
            answer_logps(self.scorer, [], in_step=True)
        gathered = gather_object([self._evaluate_part(own)] if own else [])
        order = {example.id: n for n, example in enumerate(examples)}
        records = [record for part in gathered for record in part.records]
        return Evaluation(gathered[0].graders, tuple(sorted(records, key=lambda record: order[record.id])))

    def _evaluate_part(self, examples: Sequence[Example]) -> Evaluation:
        with Progress.bar(self, len(examples) * (1 + self.args.majority), "evaluating") as progress:
            return evaluate(
                self.scorer,
                self.text,
                examples,
                graders=self.graders,
                max_tokens=self.args.max_completion_length,
                majority=self.args.majority,
                temperature=self.args.temperature,
                seed=self.args.seed,
                engine=self.engine,
                in_step=self.in_step,
                progress=progress,
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """resume_from_checkpoint: a checkpoint's folder, or True for the newest whole one of output_dir."""
        if resume_from_checkpoint is True:
            found = newest(self.run_log.folder)
            if found is None:
                raise FileNotFoundError(f"train: there is no checkpoint in {self.run_log.folder} to resume from")
            resume_from_checkpoint = str(found)
        self._ahead, self._behind = [], 0
        if resume_from_checkpoint:
            self._restore(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint or None, *args, **options)

    def save_more(self, checkpoint: Path) -> None:
        """What was measured, and rationales not yet trained on: sampled again, they would be of another policy.

        An update may be under way (enable_jit_checkpoint): a resumed run begins it again.
        """
        step, parts, meter = self._begun
        waiting, measured = (self._ahead, self.meter) if step < self.state.global_step else (parts + self._ahead, meter)
        distinct = list({id(part): part for part in waiting}.values())
        saved = {
            "meter": measured.state(),
            "ahead": [[_saved(group) for group in part] for part in distinct],
            "order": [next(n for n, other in enumerate(distinct) if other is part) for part in waiting],
            "states": self.supply.saved(),
        }
        (checkpoint / self._own_file).write_text(json.dumps(saved))

    def _restore(self, checkpoint: Path) -> None:
        path = checkpoint / self._own_file
        if not path.is_file():
            return
        saved = json.loads(path.read_text())
        self.meter.restore(saved["meter"], self.args.device)
        examples = {example.id: example for example in self.train_dataset}
        self.supply.restore(saved["states"])

        def group(
            id: str, samples: list[Any], correct: list[bool], pairs: list[Any], old_logps: Sequence[float] = ()
        ) -> Group:
            made = self.supply.remake(examples[id], [Sample(**sample) for sample in samples], correct, pairs)
            return replace(made, old_logps=list(old_logps))

        parts = [[group(*of_group) for of_group in part] for part in saved["ahead"]]
        self._ahead = [parts[n] for n in saved.get("order", range(len(parts)))]
        self._behind = len(self._ahead)

    @property
    def _own_file(self) -> str:
        """Of this process. Another number of processes has other micro-batches, and finds none."""
        return f"latro-{self.args.process_index}-of-{self.args.world_size}.json"
