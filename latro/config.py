"""What a user decides about a run. Names are TRL's (RLOO) where TRL has the thing."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from latro.objectives import OBJECTIVES

# The two documented variants of LaTRO: what the paper says, and what the authors' code does where it differs.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"answer_weight": 1.0, "truncation_penalty": 1.0, "truncation_reward": "subtract"},
    "code": {"answer_weight": 0.0, "truncation_penalty": 2.0, "truncation_reward": "mean"},
}

# Options that are an objective's: by what name it has them, if it does.
OBJECTIVE_OPTIONS = {
    "beta": "beta",
    "answer_weight": "answer_weight",
    "reward_floor": "floor",
    "reward_clip_range": "clip",
    "normalize_advantages": "scale",
    "truncation_penalty": "truncation_penalty",
    "truncation_reward": "truncation_reward",
    "mask_truncated_completions": "mask_truncated",
    "mask_stop": "mask_stop",
    "importance_weight_cap": "importance_weight_cap",
    "epsilon": "epsilon",
    "epsilon_high": "epsilon_high",
}
EPSILON = 0.2  # PPO's and TRL's


def _option(default: Any, help: str) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class LatroConfig(TrainingArguments):
    """TrainingArguments of transformers, and LaTRO's.

    A batch is made of prompts: `per_device_train_batch_size` counts them, and each has `num_generations` rationales,
    all of which stay in one micro-batch. Options that are None here are the preset's or the objective's, and stay None
    where the objective has none of that name.
    """

    learning_rate: float = _option(1e-6, "of AdamW; the paper has 5e-7")
    logging_steps: float = _option(1, "updates between two lines of metrics")
    per_device_train_batch_size: int = _option(4, "prompts per device and micro-batch")
    save_steps: float = _option(50, "updates between two checkpoints")

    num_generations: int = _option(16, "K: rationales sampled for each prompt, at least 2")
    max_prompt_length: int | None = _option(None, "tokens; longer prompts are left out, and their number is printed")
    max_completion_length: int = _option(500, "tokens after which a rationale is cut off")
    temperature: float = _option(1.0, "of sampling, and of the rationales' log-probs in the loss")
    top_p: float = _option(1.0, "sample from the likeliest tokens of this probability; below 1 the gradient is biased")
    top_k: int = _option(0, "sample from so many of the likeliest tokens; 0: any, else the gradient is biased")
    steps_per_generation: int | None = _option(
        None, "micro-batches that one round of sampling serves; by default those of one update, so none is stale"
    )
    num_iterations: int = _option(1, "times that an update is made of the same rationales, clipped by epsilon")
    epsilon: float | None = _option(
        None,
        "a token of an old rationale pulls no further once its probability has changed by this share: PPO's clipping; "
        f"{EPSILON} with num_iterations above 1, else none",
    )
    epsilon_high: float | None = _option(None, "the same upwards; epsilon by default")
    importance_weight_cap: float | None = _option(
        None,
        "weigh each rationale token by the policy's probability over that of what sampled it, at most this; "
        "2 is usual where another program samples",
    )
    rollout_batch_size: int = _option(256, "rationales that grow at once while sampling")

    use_vllm: bool = _option(False, "sample by vLLM (docs/vllm.md)")
    vllm_mode: str = _option("colocate", "colocate or server: on the GPUs that train, or elsewhere")
    vllm_server_base_url: str = _option("http://localhost:8000", "of the server")
    vllm_server_timeout: float = _option(240.0, "seconds to wait for the server to be there")
    vllm_group_port: int = _option(51216, "by which weights go to the server; of two trainers each has its own")
    vllm_gpu_memory_utilization: float = _option(0.3, "share of the GPU's memory that is vLLM's; colocate")
    vllm_max_model_length: int | None = _option(
        None, "tokens of prompt and rationale; colocate, the model's by default"
    )

    objective: str = _option("latro", f"what a step ascends: {', '.join(OBJECTIVES)}")
    preset: str = _option("paper", "paper or code: LaTRO as published, or as its authors' code has it")
    beta: float | None = _option(
        None,
        "weight of KL(policy, reference) in the reward, 0.05 for latro, or of the log-ratio for dpo, 0.1; "
        "0: no reference model is kept",
    )
    answer_weight: float | None = _option(None, "weight of log p(answer | prompt, rationale) itself in the loss")
    reward_floor: float | None = _option(
        None,
        "log p(answer), or what a rationale adds to it for gain, counts as no less than this in the reward: "
        "about -2.5, or 0 for gain, keeps rationales from vanishing",
    )
    reward_clip_range: list[float] | None = _option(None, "lowest and highest reward, before the KL term")
    reward_weights: list[float] | None = _option(None, "one for each of reward_funcs; 1 by default")
    normalize_advantages: str | None = _option(
        None, "divide advantages by the rewards' deviation in the group, or batch, or by none"
    )
    mask_stop: bool = _option(
        False, "leave the answer's first token, which ends the rationale, out of the term of answer_weight"
    )
    mask_truncated_completions: bool = _option(False, "give no loss to rationales that were cut off")
    truncation_penalty: float | None = _option(None, "how a rationale that was cut off is punished")
    truncation_reward: str | None = _option(
        None, "subtract: the penalty comes off the reward; mean: the reward is the penalty times the batch's mean"
    )
    score_end: bool = _option(False, "score the token by which a rationale ends itself too: it teaches stopping")

    answer_template: str = _option("The answer is {answer}.", "the text that is scored as the answer")
    separator: str = _option(" ", "between the answer and a rationale that ended by itself")
    stop_strings: list[str] = _option(["The answer is"], "a rationale ends before the first of these")

    disable_dropout: bool = _option(True, "dropout would make two forward passes disagree")
    log_completions: bool = _option(True, "write rationales and their rewards to rationales.jsonl, for latro report")
    num_completions_to_print: int = _option(2, "prompts of an update whose rationales are written")
    completions_every: int = _option(10, "updates between two writings of rationales")
    majority: int = _option(0, "samples of each evaluated prompt, for majority votes and the reward's quality; 0: none")

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {self.preset!r}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {sorted(OBJECTIVES)}, got {self.objective!r}")
        if isinstance(self.normalize_advantages, bool):  # TRL's
            self.normalize_advantages = "batch" if self.normalize_advantages else "none"
        if self.num_iterations > 1 and self.epsilon is None:
            self.epsilon = EPSILON
        self._complete()
        self._check()
        self.remove_unused_columns = False  # the collator hands examples on as they are
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        super().__post_init__()

    def _complete(self) -> None:
        """What was not given is the preset's, which is LaTRO's, or the objective's. Others are refused."""
        preset = PRESETS[self.preset] if self.objective == "latro" else {}
        own: Any = OBJECTIVES[self.objective]
        defaults = {field.name: field.default for field in fields(own)}
        for name, field_name in OBJECTIVE_OPTIONS.items():
            given = getattr(self, name)
            if field_name not in defaults:
                if name == "epsilon" and self.num_iterations > 1:
                    raise ValueError(
                        f"num_iterations must be 1 with objective {self.objective}, which does not correct for old "
                        f"rationales, got {self.num_iterations}"
                    )
                if given is not None and given is not False:
                    raise ValueError(f"{name} must not be given with objective {self.objective}, which has none")
            elif given is None:
                value = preset.get(name, defaults[field_name])
                setattr(self, name, "none" if name == "normalize_advantages" and value is None else value)
        if self.preset != "paper" and self.objective != "latro":
            raise ValueError(f"preset must not be given with objective {self.objective}: it is latro's")

    def _check(self) -> None:
        updates = self.gradient_accumulation_steps
        rules = [
            ("num_generations", self.num_generations >= 2, "at least 2: an advantage is over the other rationales"),
            ("max_completion_length", self.max_completion_length >= 1, "at least 1"),
            ("temperature", self.temperature > 0, "above 0: rationales are samples of the policy"),
            ("beta", self.beta is None or self.beta >= 0, "0 or more"),
            (
                "normalize_advantages",
                self.normalize_advantages in (None, "none", "group", "batch"),
                "none, group or batch",
            ),
            ("truncation_reward", self.truncation_reward in (None, "subtract", "mean"), "subtract or mean"),
            ("reward_clip_range", _is_range(self.reward_clip_range), "two numbers, the lower one first"),
            ("completions_every", self.completions_every >= 1, "at least 1"),
            ("rollout_batch_size", self.rollout_batch_size >= 1, "at least 1"),
            ("majority", self.majority >= 0, "0 or more"),
            (
                "steps_per_generation",
                self.steps_per_generation is None
                or (
                    self.steps_per_generation > 0 and self.steps_per_generation % self.gradient_accumulation_steps == 0
                ),
                f"a multiple of gradient_accumulation_steps ({updates})",
            ),
            ("num_iterations", self.num_iterations >= 1, "at least 1"),
            ("vllm_mode", self.vllm_mode in ("colocate", "server"), "colocate or server"),
            (
                "epsilon",
                self.epsilon is None or self.num_iterations > 1 or (self.steps_per_generation or 0) > updates,
                "None unless rationales grow old: num_iterations above 1, or steps_per_generation above "
                f"gradient_accumulation_steps ({updates})",
            ),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")


def _is_range(value: list[float] | None) -> bool:
    return value is None or (len(value) == 2 and value[0] < value[1])
