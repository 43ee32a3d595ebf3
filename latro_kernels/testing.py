"""Inputs that matter, and the bound on a kernel's error: shared by the tests and the benchmarks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from latro_kernels.packing import pack_rationales
from latro_kernels.tree import PrefixTree, ScoredTokens

SEEDS = range(5)


@dataclass(frozen=True)
class Batch:
    """N prompts with K_n rationales and an answer each, as token lists."""

    prompts: list[list[int]]
    rationales: list[list[list[int]]]
    answers: list[list[int]]

    def pack(self, **options: object) -> tuple[PrefixTree, ScoredTokens]:
        return pack_rationales(self.prompts, self.rationales, self.answers, **options)  # type: ignore[arg-type]

    def padded(self, side: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """input_ids, attention_mask, rationale_mask and answer_mask, with all padding on one side."""
        rows, parts = [], []
        for prompt, group, answer in zip(self.prompts, self.rationales, self.answers, strict=True):
            for z in group:
                rows.append(prompt + z + answer)
                parts.append([1] * len(prompt) + [2] * len(z) + [3] * len(answer))
        width = max(map(len, rows)) + 3

        def pad(lists: list[list[int]]) -> Tensor:
            return torch.tensor(
                [[0] * (width - len(a)) + a if side == "left" else a + [0] * (width - len(a)) for a in lists]
            )

        part = pad(parts)
        return pad(rows), (part > 0).long(), (part == 2).long(), (part == 3).long()


def path_to(tree: PrefixTree, t: int) -> list[int]:
    """The rows from the root to row t, found by walking up."""
    path = []
    while t != -1:
        path.append(t)
        t = int(tree.previous[t])
    return path[::-1]


def random_batch(
    seed: int,
    vocab: int,
    group_sizes: Iterable[int] = (3, 2, 4),
    prompt_length: int = 7,
    rationale_length: int = 9,
    answer_length: int = 3,
) -> Batch:
    """Ragged lengths up to those given; one rationale of the first group is empty, one answer has one token."""
    rng = random.Random(seed)
    group_sizes = list(group_sizes)

    def tokens(shortest: int, longest: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(rng.randint(shortest, longest))]

    prompts = [tokens(1, prompt_length) for _ in group_sizes]
    rationales = [[tokens(1, rationale_length) for _ in range(size)] for size in group_sizes]
    answers = [tokens(1, answer_length) for _ in group_sizes]
    rationales[0][-1] = []
    answers[-1] = answers[-1][:1]
    return Batch(prompts, rationales, answers)


def random_forest(seed: int, nodes: int = 12, longest: int = 5, vocab: int = 50) -> tuple[list[list[int]], list[int]]:
    """Nodes and parents of any depth, some nodes empty."""
    rng = random.Random(seed)
    parents = [-1] + [rng.randrange(-1, n) for n in range(1, nodes)]
    lists = [[rng.randrange(vocab) for _ in range(rng.randint(parent == -1, longest))] for parent in parents]
    return lists, parents


def peaked_head(
    T: int, D: int, V: int, M: int, p: float, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [T, D], weight [V, D], rows [M] and targets [M]; each row gives its last target the probability p.

    Random logits make every probability almost 0, where the errors that matter do not show. Rows repeat.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64) / D**0.5
    hidden = torch.randn(T, D, generator=generator, dtype=torch.float64) * 0.3
    rows = torch.randint(T, (M,), generator=generator)
    targets = torch.randint(V, (M,), generator=generator)
    aim = torch.zeros(T, dtype=torch.int64)
    aim[rows] = targets
    for _ in range(8):  # moving towards one weight row moves the other logits a little
        logits = hidden @ weight.T
        wanted = math.log(p / (1 - p)) + logits.scatter(1, aim[:, None], -torch.inf).logsumexp(1)
        missing = wanted - logits.gather(1, aim[:, None]).squeeze(1)
        hidden += (missing / weight[aim].square().sum(1))[:, None] * weight[aim]
    return hidden.to(dtype), weight.to(dtype), rows, targets


def assert_error_about_eagers(
    actual: Callable[[int], Tensor],
    eager: Callable[[int], Tensor],
    exact: Callable[[int], Tensor],
    what: str,
    seeds: Iterable[int] = SEEDS,
) -> None:
    """Over all seeds, against float64: RMS error at most 1.1 times eager's in the same dtype, maximum at most twice.

    Each argument maps a seed to a result.
    """
    ours, theirs, largest = [], [], 0.0
    for seed in seeds:
        truth = exact(seed).double()
        ours.append((actual(seed).double() - truth).flatten())
        theirs.append((eager(seed).double() - truth).flatten())
        largest = max(largest, float(truth.abs().max()))
    for name, bound, measure in (("RMS", 1.1, _rms), ("maximum", 2.0, _maximum)):
        error, allowed = measure(torch.cat(ours)), bound * measure(torch.cat(theirs))
        if not error <= allowed:
            raise AssertionError(
                f"{what}: {name} error against float64 is {error:.3g}, eager's in the same dtype is "
                f"{allowed / bound:.3g} (at most {bound} times that); the largest value is {largest:.3g}"
            )


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def _maximum(error: Tensor) -> float:
    return float(error.abs().max())
