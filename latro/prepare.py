"""What a configuration says of a run, made: the text's rules, the objective, the examples that fit, a reference."""

from __future__ import annotations

import copy
import logging

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latro.config import OBJECTIVE_OPTIONS, LatroConfig
from latro.data import Example
from latro.model import TreeModel
from latro.objectives import OBJECTIVES, Objective
from latro.rollout import Sampling
from latro.text import Text, end_of_answer, end_tokens

logger = logging.getLogger(__name__)


def sampling_of(args: LatroConfig, text: Text, model: PreTrainedModel, *, answers: bool = False) -> Sampling:
    """answers: go on behind a stop string, up to the end of the model's own answer."""
    return Sampling(
        max_tokens=args.max_completion_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        ends=end_tokens(text.tokenizer, model.generation_config),
        are_over=(lambda rows: [False] * len(rows)) if answers else text.are_over,
        stop_strings=() if answers else text.stop_strings,
    )


def text_of(args: LatroConfig, tokenizer: PreTrainedTokenizerBase) -> Text:
    return Text(
        tokenizer,
        answer_template=args.answer_template,
        separator=args.separator,
        stop_strings=args.stop_strings,
        end=end_of_answer(tokenizer),
    )


def objective_of(args: LatroConfig) -> Objective:
    """An option of None is not one that the objective has."""
    options = {field: getattr(args, name) for name, field in OBJECTIVE_OPTIONS.items()}
    if options["scale"] == "none":
        options["scale"] = None
    if options["clip"] is not None:
        options["clip"] = tuple(options["clip"])
    kind = OBJECTIVES[args.objective]
    return kind(**{name: value for name, value in options.items() if name in kind.__dataclass_fields__})  # type: ignore[attr-defined]


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
