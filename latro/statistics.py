"""How sure a figure is: intervals of rates and of differences, tests, and how well a score ranks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

# Numbers that a bootstrap draws at once.
CHUNK = 1 << 20


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a rate."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"wilson: successes must be from 0 to n, and n at least 1, got {successes} of {n}")
    _check_confidence("wilson", confidence)
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    rate = successes / n
    middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At the ends the bound is the rate itself, but for rounding.
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == n else middle + half
    return low, high


class PairedBootstrap(NamedTuple):
    difference: float  # mean of second − first
    low: float
    high: float
    p_value: float  # two-sided, of no difference; no less than 2 / (resamples + 1)


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    *,
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedBootstrap:
    """The mean of second − first over questions that both were asked, and its percentile interval."""
    name = "paired_bootstrap"
    _check_pairs(name, first, second)
    _check_confidence(name, confidence)
    if resamples < 1:
        raise ValueError(f"{name}: resamples must be at least 1, got {resamples}")
    change = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    if not np.isfinite(change).all():
        raise ValueError(f"{name}: first and second must be finite, got {change[~np.isfinite(change)][0]}")

    generator = np.random.default_rng(seed)
    n, rows = len(change), max(1, CHUNK // len(change))
    counts = [min(rows, resamples - done) for done in range(0, resamples, rows)]
    means = np.concatenate([change[generator.integers(n, size=(count, n))].mean(axis=1) for count in counts])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    on_other_side = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p_value = min(1.0, 2 * (1 + on_other_side) / (1 + resamples))
    return PairedBootstrap(float(change.mean()), float(low), float(high), p_value)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """The exact two-sided p-value of McNemar's test: do two models, right or wrong on the same questions, differ?"""
    _check_pairs("mcnemar", first, second)
    n = sum(bool(a) != bool(b) for a, b in zip(first, second, strict=True))
    fewer = sum(bool(a) and not b for a, b in zip(first, second, strict=True))
    fewer = min(fewer, n - fewer)
    ways = total = 1  # n choose i, and their sum up to i
    for i in range(fewer):
        ways = ways * (n - i) // (i + 1)
        total += ways
    return min(1.0, 2 * total / 2**n)


def auc(scores: Sequence[float], labels: Sequence[bool], groups: Sequence[Hashable] | None = None) -> float | None:
    """How often a score ranks a right one above a wrong one of its group; a tie counts half.

    Of all such pairs together; None where there is none.
    """
    _check_lengths("auc", scores=scores, labels=labels, groups=scores if groups is None else groups)
    score, label = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    if np.isnan(score).any():
        raise ValueError("auc: scores must be numbers, got nan")
    members: dict[Hashable, list[int]] = {}
    for index in range(len(score)):
        members.setdefault(None if groups is None else groups[index], []).append(index)
    wins, pairs = 0.0, 0
    for group in members.values():
        in_group, is_right = score[group], label[group]
        right, wrong = in_group[is_right], np.sort(in_group[~is_right])
        below, not_above = np.searchsorted(wrong, right, side="left"), np.searchsorted(wrong, right, side="right")
        wins += float((below + not_above).sum()) / 2
        pairs += len(right) * len(wrong)
    return wins / pairs if pairs else None


def _check_pairs(name: str, first: Sequence[float], second: Sequence[float]) -> None:
    _check_lengths(name, first=first, second=second)
    if not len(first):
        raise ValueError(f"{name}: first and second must have at least one value, got none")


def _check_lengths(name: str, **columns: Sequence[object]) -> None:
    lengths = [len(column) for column in columns.values()]
    if len(set(lengths)) > 1:
        raise ValueError(f"{name}: {', '.join(columns)} must be equally many, got {lengths}")


def _check_confidence(name: str, confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"{name}: confidence must be between 0 and 1, got {confidence}")
