"""A prompt with its rationales, and several of them as one packed row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from latro.data import Example
from latro.objectives.base import in_rationale
from latro.rollout import Sample
from latro.text import Rationale, Text
from latro_kernels import PrefixTree, ScoredTokens, pack_rationales
from latro_kernels.tree import RATIONALE


@dataclass(frozen=True)
class Group:
    """A prompt with its rationales, and what an objective needs of them."""

    example: Example
    prompt: list[int]
    samples: list[Sample]
    rationales: list[Rationale]
    answers: list[list[int]]  # the tokens of the answer behind each rationale
    baseline: list[int] = field(default_factory=list)  # those of the answer straight behind the prompt
    wrong: list[list[list[int]]] = field(default_factory=list)  # likewise, of the other options
    correct: list[bool] = field(default_factory=list)  # whether each one's own answer was right
    pairs: list[tuple[int, int]] = field(default_factory=list)  # of rationales
    # Of the rationales' scored tokens, one after another, by the policy that sampled them: where they are trained on
    # again, and once it has scored them.
    old_logps: list[float] = field(default_factory=list)

    @staticmethod
    def of(text: Text, example: Example, samples: list[Sample]) -> Group:
        rationales = [text.rationale(sample.tokens) for sample in samples]
        answers = [text.answer(rationale, example.answer) for rationale in rationales]
        return Group(example, text.prompt(example.prompt), samples, rationales, answers)

    def count(self, what: str) -> int:
        """Of what an objective averages over."""
        counts = {"rationales": len(self.samples), "prompts": 1, "correct": sum(self.correct), "pairs": len(self.pairs)}
        return counts[what]


@dataclass(frozen=True)
class Batch:
    """A micro-batch: every prompt once, then its rationales, each with the answer behind it."""

    groups: list[Group]
    tree: PrefixTree
    scored: ScoredTokens
    rewards: dict[str, Tensor]  # [R], what each reward function gives
    truncated: Tensor  # [R], whether a rationale was cut off
    correct: Tensor  # [R], whether its own answer was right; empty where nobody asked
    pairs: Tensor  # [P, 2], rows of rationales
    sampling_logps: Tensor  # [M], with which a rationale's token was drawn; NaN where nothing drew it
    old_logps: Tensor | None  # [M], of rationales' tokens, by the policy when it sampled them
    denominator: int  # what the update's loss is averaged over: of all micro-batches and processes

    @staticmethod
    def of(
        groups: list[Group],
        rewards: Mapping[str, Tensor],
        denominator: int,
        *,
        score_end: bool,
        device: torch.device,
        baseline: bool = False,
    ) -> Batch:
        """score_end: score the token by which a rationale ended itself with it. baseline: also score the groups'
        answers without a rationale."""
        samples = [sample for group in groups for sample in group.samples]
        tree, scored = pack_rationales(
            [group.prompt for group in groups],
            [[rationale.tokens for rationale in group.rationales] for group in groups],
            [_options(group) for group in groups],
            ends=[[sample.end for sample in group.samples] for group in groups] if score_end else None,
            baseline=[group.baseline for group in groups] if baseline else False,
        )
        old = [logp for group in groups for logp in group.old_logps]
        return Batch(
            groups,
            tree.to(device),
            scored.to(device),
            {name: values.to(device) for name, values in rewards.items()},
            torch.tensor([sample.ended_by == "length" for sample in samples], device=device),
            torch.tensor([right for group in groups for right in group.correct], dtype=torch.bool, device=device),
            _pairs(groups).to(device),
            _at_rationales(scored, _drawn(groups, scored)).to(device),
            _at_rationales(scored, old).to(device) if old else None,
            denominator,
        )

    def extras(self) -> dict[str, Tensor]:
        """What the objective is given."""
        bonus = {"bonus": torch.stack(list(self.rewards.values())).sum(0)} if self.rewards else {}
        old = {} if self.old_logps is None else {"old_logps": self.old_logps}
        return {
            "truncated": self.truncated,
            "correct": self.correct,
            "pairs": self.pairs,
            "sampling_logps": self.sampling_logps,
            **bonus,
            **old,
        }

    def remember(self, logps: Tensor) -> None:
        """That these log-probs [M] are of the policy that sampled the groups."""
        lengths, values = iter(_rationale_lengths(self.scored)), iter(logps[in_rationale(self.scored)].tolist())
        for group in self.groups:
            group.old_logps[:] = islice(values, sum(islice(lengths, len(group.rationales))))


def _options(group: Group) -> list[list[list[int]]]:
    """Behind each rationale the right answer, then the wrong ones."""
    wrong = group.wrong or [[] for _ in group.answers]
    return [[answer, *others] for answer, others in zip(group.answers, wrong, strict=True)]


def _rationale_lengths(scored: ScoredTokens) -> list[int]:
    """Of each rationale, its scored tokens."""
    return torch.bincount(scored.segment, minlength=len(scored.kind))[scored.kind == RATIONALE].tolist()


def _drawn(groups: Sequence[Group], scored: ScoredTokens) -> list[float]:
    """With which log-prob each scored token of the rationales was drawn. Golden rationales were not sampled, nor those
    of an older policy by this one."""
    drawn: list[float] = []
    rationales = [pair for group in groups for pair in zip(group.samples, group.rationales, strict=True)]
    for (sample, rationale), count in zip(rationales, _rationale_lengths(scored), strict=True):
        own = sample.logps[: len(rationale.tokens)]
        # A scored end was drawn behind the whole sample, and so behind the rationale unless that is a part of it.
        if len(rationale.tokens) == len(sample.tokens):
            own = sample.logps[:count]
        drawn += own + [math.nan] * (count - len(own))
    return drawn


def _at_rationales(scored: ScoredTokens, values: list[float]) -> Tensor:
    """[M], values at the rationales' tokens, and NaN elsewhere."""
    found = torch.full(scored.rows.shape, math.nan, dtype=torch.float64)
    found[in_rationale(scored)] = torch.tensor(values, dtype=torch.float64)
    return found


def _pairs(groups: Sequence[Group]) -> Tensor:
    first, pairs = 0, []
    for group in groups:
        pairs += [(first + one, first + other) for one, other in group.pairs]
        first += len(group.samples)
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


def split(groups: Sequence[Group], sizes: Sequence[int]) -> list[list[Group]]:
    """Neighbours together, so many at a time."""
    rest = iter(groups)
    return [[next(rest) for _ in range(size)] for size in sizes]
