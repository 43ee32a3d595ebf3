"""What a configuration says of a run, made: the text's rules, the objective, the examples that fit, a reference."""

from __future__ import annotations

import copy
import logging
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latro.config import LatroConfig
from latro.data import Example
from latro.model import TreeModel
from latro.objectives import OBJECTIVES, Latro
from latro.rollout import Sampling
from latro.text import Text, end_of_answer, end_tokens

logger = logging.getLogger(__name__)


def sampling_of(args: LatroConfig, text: Text, model: PreTrainedModel) -> Sampling:
    return Sampling(
        max_tokens=args.max_completion_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        ends=end_tokens(text.tokenizer, model.generation_config),
        are_over=text.are_over,
    )


def text_of(args: LatroConfig, tokenizer: PreTrainedTokenizerBase) -> Text:
    return Text(
        tokenizer,
        answer_template=args.answer_template,
        separator=args.separator,
        stop_strings=args.stop_strings,
        end=end_of_answer(tokenizer),
    )


def objective_of(args: LatroConfig) -> Latro:
    options: dict[str, Any] = {
        "beta": args.beta,
        "answer_weight": args.answer_weight,
        "floor": args.reward_floor,
        "clip": None if args.reward_clip_range is None else tuple(args.reward_clip_range),
        "scale": None if args.normalize_advantages == "none" else args.normalize_advantages,
        "truncation_penalty": args.truncation_penalty,
        "truncation_reward": args.truncation_reward,
        "mask_truncated": args.mask_truncated_completions,
    }
    return OBJECTIVES[args.objective](**options)


def longest_path(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def those_that_fit(examples: list[Example], text: Text, args: LatroConfig, longest: int | None) -> list[Example]:
    """The examples without those whose prompt is too long for args. What cannot be trained on at all is refused."""
    kept, empty = [], text.rationale([])
    for example in examples:
        try:
            prompt, answer = len(text.prompt(example.prompt)), len(text.answer(empty, example.answer))
        except ValueError as error:
            raise ValueError(f"train_dataset: example {example.id}: {error}") from None
        if args.max_prompt_length is not None and prompt > args.max_prompt_length:
            continue
        needed = prompt + args.max_completion_length + answer
        if not prompt or (longest is not None and needed > longest):
            raise ValueError(
                f"train_dataset: example {example.id} must have a prompt of at least one token and, with its rationale "
                f"and answer, at most {longest}, got {prompt} + {args.max_completion_length} + {answer}; "
                "lower max_completion_length, or leave long prompts out by max_prompt_length"
            )
        kept.append(example)
    if len(kept) < len(examples):
        logger.warning("max_prompt_length leaves out %d of %d examples", len(examples) - len(kept), len(examples))
    if not kept:
        raise ValueError(
            f"train_dataset must have an example, got {len(examples)} that are longer than max_prompt_length"
        )
    return kept


def frozen_copy(model: PreTrainedModel) -> TreeModel:
    return TreeModel(copy.deepcopy(model).requires_grad_(False).eval())


def disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Attention modules keep theirs as numbers of their own, which they read from the configuration at first.
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
