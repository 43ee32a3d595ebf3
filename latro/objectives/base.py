"""What every objective is made of: sums over a rationale's tokens, what it needs of its caller, and its loss.

Sizes: M scored tokens, S segments, R rationales, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from latro_kernels import ScoredTokens, checks
from latro_kernels.tree import ANSWER, BASELINE, RATIONALE

Extras = Mapping[str, Any]

# What an objective may need beside the rationales' log-probs: the name of the tensor in extras, if it is one, and what
# it is. `latro.supply` gives all of them to the trainer's objectives.
NEEDS: dict[str, tuple[str | None, str]] = {
    "reference": ("ref_logps", "[M], the log-probs of a reference model"),
    "correct": ("correct", "[R], whether the model's own answer behind the rationale was right"),
    "right and wrong": ("pairs", "[P, 2], rows of a prompt's rationales: a chosen one, and a rejected one"),
    "golden and own": ("pairs", "[P, 2], rows of a prompt's rationales: the golden one, and one of the model's own"),
    "chains": ("pairs", "[P, 2], rows of a prompt's rationales: a chain's state, and what was proposed to it"),
    "baseline": (None, "the answer scored straight after the prompt: pack_rationales(baseline=True)"),
    "options": (None, "several answers behind each rationale, the right one first"),
    "golden": (None, "golden rationales"),
}


@dataclass(frozen=True, eq=False)
class Sums:
    """Over the tokens of each rationale, its answers and its prompt's baseline [R]."""

    logps: Tensor  # [M]
    scored: ScoredTokens
    ref_logps: Tensor | None = None  # [M]

    @property
    def rationale(self) -> Tensor:
        """ℓz = log π(z | x)"""
        return self._per_rationale(self.logps, RATIONALE)

    @property
    def answer(self) -> Tensor:
        """ℓy = log π(y | x, z)"""
        return self._per_rationale(self.logps, ANSWER)

    @property
    def answer_behind_stop(self) -> Tensor:
        """ℓy without the first token of the answer, which is the one that ends the rationale."""
        segment = self.scored.segment
        goes_on = torch.cat([segment.new_zeros(1, dtype=torch.bool), segment[1:] == segment[:-1]])
        return self._per_rationale(torch.where(goes_on, self.logps, 0), ANSWER)

    @property
    def kl(self) -> Tensor:
        """ℓz − ℓz under the reference; 0 without one."""
        if self.ref_logps is None:
            return torch.zeros_like(self.rationale)
        return self._per_rationale(self.logps - self.ref_logps, RATIONALE)

    def over_rationale(self, values: Tensor) -> Tensor:
        """The sum of values [M] over the tokens of each rationale."""
        return self._per_rationale(values, RATIONALE)

    @property
    def answer_tokens(self) -> Tensor:
        """|y|"""
        return self._per_rationale(torch.ones_like(self.logps), ANSWER)

    @property
    def answer_probability(self) -> Tensor:
        """The mean of π(y_t | x, z, y_<t) over the answer's tokens."""
        return self._per_rationale(self.logps.exp(), ANSWER) / self.answer_tokens

    @property
    def baseline(self) -> Tensor:
        """log π(y | x), the same for all rationales of a prompt; NaN where it was not scored."""
        return self._per_prompt(self.logps) + 0 / self._baseline_tokens

    @property
    def baseline_probability(self) -> Tensor:
        """The mean of π(y_t | x, y_<t) over the answer's tokens; NaN where they were not scored."""
        return self._per_prompt(self.logps.exp()) / self._baseline_tokens

    @property
    def log_odds(self) -> Tensor:
        """log π(y | x, z) − log Σ_o π(y_o | x, z) over the wrong options."""
        of_segment = self.logps.new_zeros(len(self.scored.kind)).index_add(0, self.scored.segment, self.logps)
        wrong = (self.scored.kind == ANSWER) & (self.scored.option > 0)
        values, rationale = torch.where(wrong, of_segment, -torch.inf), self.scored.rationale
        R = self.scored.prompt.shape[0]
        largest = values.detach().new_full((R,), -torch.inf).scatter_reduce(0, rationale, values.detach(), "amax")
        # Not the exponential of what is no wrong option: it may overflow, and 0 times its gradient would be NaN.
        scaled = torch.where(wrong, of_segment - largest[rationale], -torch.inf).exp()
        return self.answer - largest - scaled.new_zeros(R).index_add(0, rationale, scaled).log()

    def detach(self) -> Sums:
        return Sums(self.logps.detach(), self.scored, self.ref_logps)

    @property
    def _baseline_tokens(self) -> Tensor:
        return self._per_prompt(torch.ones_like(self.logps))

    def _per_rationale(self, values: Tensor, kind: int) -> Tensor:
        """The sum over tokens of one kind; of several answers over the first, which is the right one."""
        members = ((self.scored.kind == kind) & (self.scored.option == 0))[self.scored.segment]
        zeros = values.new_zeros(self.scored.prompt.shape[0])
        return zeros.index_add(0, self.scored.rationale[self.scored.segment], torch.where(members, values, 0))

    def _per_prompt(self, values: Tensor) -> Tensor:
        """The baseline's sum, which stands at its prompt's first rationale, for all rationales of the prompt."""
        at_first, prompt = self._per_rationale(values, BASELINE), self.scored.prompt
        prompts = self.scored.plan.group_rationales.shape[0] - 1
        return values.new_zeros(prompts).index_add(0, prompt, at_first)[prompt]


def in_rationale(scored: ScoredTokens) -> Tensor:
    """[M], which tokens are a rationale's."""
    return (scored.kind == RATIONALE)[scored.segment]


class Objective:
    """A loss whose terms belong to rationales.

        loss = −(1 / denominator) Σ_k [c_k ℓz_k + answer_term_k]         c detached

    extras["denominator"] is what the sum is divided by: by default the number of what `over` names. With micro-batches
    or processes that hold different numbers, give each the number of them all.
    Subclasses are frozen dataclasses; a beta above 0 is the weight of a reference model.
    """

    NEEDS: ClassVar[tuple[str, ...]] = ()
    samples: ClassVar[bool] = True  # whether it learns from the model's own rationales
    compares: ClassVar[bool] = False  # whether a rationale is measured by the others of its prompt
    over: ClassVar[Literal["rationales", "prompts", "correct", "pairs"]] = "rationales"

    @property
    def needs(self) -> frozenset[str]:
        """Of NEEDS."""
        return frozenset(self.NEEDS) | ({"reference"} if getattr(self, "beta", 0) else set())

    @property
    def couples(self) -> Literal["group", "batch"]:
        """Whether a token's gradient depends on its own prompt's rationales alone, or on the whole batch."""
        return "batch" if getattr(self, "scale", None) == "batch" else "group"

    def __call__(self, logps: Tensor, scored: ScoredTokens, extras: Extras) -> Tensor:
        self.check(scored, extras)
        sums = Sums(logps, scored, extras.get("ref_logps"))
        _, weight = self.reward_and_advantage(sums.detach(), extras)
        terms = self.rationale_term(weight, sums, extras) + self.answer_term(sums, extras)
        return -self.kept(terms, extras).sum() / self.denominator(scored, extras)

    def reward_and_advantage(self, sums: Sums, extras: Extras) -> tuple[Tensor, Tensor]:
        """What a rationale earns, to be logged, and c: what its log-prob is multiplied by."""
        raise NotImplementedError

    def rationale_term(self, weight: Tensor, sums: Sums, extras: Extras) -> Tensor:
        """c_k ℓz_k [R], or what has its gradient where the policy itself sampled the rationales."""
        return weight * sums.rationale

    def answer_term(self, sums: Sums, extras: Extras) -> Tensor:
        """What is added for the answer [R], differentiable in its log-probs."""
        return torch.zeros_like(sums.answer)

    def kept(self, terms: Tensor, extras: Extras) -> Tensor:
        return terms

    def denominator(self, scored: ScoredTokens, extras: Extras) -> Any:
        if "denominator" in extras:
            return extras["denominator"]
        if self.over == "correct":
            return extras["correct"].sum().clamp(min=1)
        if self.over == "pairs":
            return max(len(extras["pairs"]), 1)
        return scored.prompt.shape[0] if self.over == "rationales" else len(scored.plan.group_rationales) - 1

    def check(self, scored: ScoredTokens, extras: Extras) -> None:
        """Raise unless everything that the objective needs is there."""
        name, R = type(self).__name__, scored.prompt.shape[0]
        for need in sorted(self.needs):
            extra, meaning = NEEDS[need]
            if extra is not None and extras.get(extra) is None:
                remedy = "; pass ref_logps, or beta=0" if need == "reference" else ""
                raise ValueError(f"{name}: extras must hold {extra} {meaning}, got {sorted(extras)}{remedy}")
        if "ref_logps" in extras and extras["ref_logps"] is not None:
            checks.check_shape(name, "ref_logps", extras["ref_logps"], (scored.rows.shape[0],))
        if "correct" in self.needs:
            checks.check_shape(name, "correct", extras["correct"], (R,))
        if any(NEEDS[need][0] == "pairs" for need in self.needs):
            checks.check_shape(name, "pairs", extras["pairs"], ("P", 2))
            checks.check_index(name, "pairs", extras["pairs"])
            checks.check_range(name, "pairs", extras["pairs"], R, "R")
        if self.compares and scored.plan.smallest_group < 2:
            raise ValueError(
                f"{name}: every prompt must have at least 2 rationales, which are compared, "
                f"got a prompt with {scored.plan.smallest_group}"
            )
        _check_segments(name, self.needs, scored)


def _check_segments(name: str, needs: frozenset[str], scored: ScoredTokens) -> None:
    """Read on the CPU alone. On a GPU what is missing makes a loss that is not finite."""
    if scored.kind.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if "baseline" in needs:
        with_baseline = scored.prompt[scored.rationale[(scored.kind == BASELINE) & (scored.option == 0)]]
        missing = set(scored.prompt.tolist()) - set(with_baseline.tolist())
        if missing:
            raise ValueError(f"{name}: scored must have {NEEDS['baseline'][1]}; prompt {min(missing)} has none")
    if "options" in needs:
        wrong = scored.rationale[(scored.kind == ANSWER) & (scored.option > 0)]
        missing = set(range(scored.prompt.shape[0])) - set(wrong.tolist())
        if missing:
            raise ValueError(f"{name}: scored must have {NEEDS['options'][1]}; rationale {min(missing)} has one answer")
