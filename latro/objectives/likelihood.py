"""Likelihood: rationales and answers that are imitated as they are. ℓz = log π(z | x), ℓy = log π(y | x, z)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from latro.objectives.base import Extras, Objective, Sums


@dataclass(frozen=True)
class Rft(Objective):
    """STaR, RFT and ReST-EM: fine-tuning on the model's own rationales that led to the right answer.

        loss = −Σ_k 1{correct_k} (ℓz_k + ℓy_k) / Σ_k 1{correct_k}

    The methods differ in what surrounds it, which is the caller's: RFT (arXiv 2308.01825) leaves out duplicates and
    starts from the base model; STaR (2203.14465) does so in every round, and asks again with the answer as a hint where
    none was right; ReST-EM (2312.06585) samples at most so many per problem. With fresh samples in each step it is
    Rloo without a baseline.
    """

    NEEDS: ClassVar[tuple[str, ...]] = ("correct",)
    over: ClassVar[Literal["correct"]] = "correct"

    def reward_and_advantage(self, sums: Sums, extras: Extras) -> tuple[Tensor, Tensor]:
        correct = extras["correct"].to(sums.logps.dtype)
        return correct, correct

    def answer_term(self, sums: Sums, extras: Extras) -> Tensor:
        return extras["correct"] * sums.answer


@dataclass(frozen=True)
class SftAnswers(Objective):
    """Fine-tuning on answers: loss = −mean_k ℓy_k, of rationales that are not trained, by default empty ones."""

    samples: ClassVar[bool] = False

    def reward_and_advantage(self, sums: Sums, extras: Extras) -> tuple[Tensor, Tensor]:
        return sums.answer, torch.zeros_like(sums.answer)

    def answer_term(self, sums: Sums, extras: Extras) -> Tensor:
        return sums.answer


@dataclass(frozen=True)
class SftGolden(Objective):
    """Fine-tuning on golden rationales and their answers: loss = −mean_k [ℓz_k + ℓy_k]."""

    NEEDS: ClassVar[tuple[str, ...]] = ("golden",)
    samples: ClassVar[bool] = False

    def reward_and_advantage(self, sums: Sums, extras: Extras) -> tuple[Tensor, Tensor]:
        return sums.answer, torch.ones_like(sums.answer)

    def answer_term(self, sums: Sums, extras: Extras) -> Tensor:
        return sums.answer
