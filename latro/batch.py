"""A prompt with its rationales, and several of them as one packed row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latro.data import Example
from latro.rollout import Sample
from latro.text import Rationale, Text
from latro_kernels import PrefixTree, ScoredTokens, pack_rationales


@dataclass(frozen=True)
class Group:
    """A prompt with its K rationales."""

    example: Example
    prompt: list[int]
    samples: list[Sample]
    rationales: list[Rationale]
    answers: list[list[int]]  # the tokens of the answer behind each rationale

    @staticmethod
    def of(text: Text, example: Example, samples: list[Sample]) -> Group:
        rationales = [text.rationale(sample.tokens) for sample in samples]
        answers = [text.answer(rationale, example.answer) for rationale in rationales]
        return Group(example, text.prompt(example.prompt), samples, rationales, answers)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: every prompt once, then its rationales, each with the answer behind it."""

    groups: list[Group]
    tree: PrefixTree
    scored: ScoredTokens
    rewards: dict[str, Tensor]  # [R], what each reward function gives
    truncated: Tensor  # [R], whether a rationale was cut off
    denominator: int  # rationales of the update, over all micro-batches and processes

    @staticmethod
    def of(
        groups: list[Group],
        rewards: Mapping[str, Tensor],
        denominator: int,
        *,
        score_end: bool,
        device: torch.device,
    ) -> Batch:
        """score_end: score the token by which a rationale ended itself with it."""
        samples = [sample for group in groups for sample in group.samples]
        tree, scored = pack_rationales(
            [group.prompt for group in groups],
            [[rationale.tokens for rationale in group.rationales] for group in groups],
            [[[answer] for answer in group.answers] for group in groups],
            ends=[[sample.end for sample in group.samples] for group in groups] if score_end else None,
        )
        return Batch(
            groups,
            tree.to(device),
            scored.to(device),
            {name: values.to(device) for name, values in rewards.items()},
            torch.tensor([sample.ended_by == "length" for sample in samples], device=device),
            denominator,
        )

    def extras(self) -> dict[str, Tensor]:
        """What the objective is given."""
        bonus = {"bonus": torch.stack(list(self.rewards.values())).sum(0)} if self.rewards else {}
        return {"truncated": self.truncated, **bonus}


def split(groups: Sequence[Group], sizes: Sequence[int]) -> list[list[Group]]:
    """Neighbours together, so many at a time."""
    rest = iter(groups)
    return [[next(rest) for _ in range(size)] for size in sizes]
