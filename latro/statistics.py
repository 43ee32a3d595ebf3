"""How sure a figure is: intervals of rates and of differences, tests, and how well a score ranks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import atan, cos, inf, pi, sin, sqrt
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


class MeanInterval(NamedTuple):
    """Of one value the interval is (−∞, ∞): there is nothing to tell its spread by."""

    mean: float
    low: float
    high: float
    n: int


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> MeanInterval:
    """A mean and Student's interval of it, as of training runs that differ by their seed."""
    name = "mean_interval"
    _check_confidence(name, confidence)
    column = np.asarray(values, dtype=np.float64)
    if not len(column) or not np.isfinite(column).all():
        raise ValueError(f"{name}: values must be at least one finite number, got {list(values)}")
    n, mean = len(column), float(column.mean())
    if n == 1:
        return MeanInterval(mean, -inf, inf, n)
    half = t_quantile((1 + confidence) / 2, n - 1) * _standard_error(column)
    return MeanInterval(mean, mean - half, mean + half, n)


class PairedDifference(NamedTuple):
    """Of one pair the interval is (−∞, ∞), and the p-value 1."""

    difference: float  # mean of second − first
    low: float
    high: float
    p_value: float  # two-sided, of no difference
    n: int


def paired_difference(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> PairedDifference:
    """The mean of second − first over pairs, as of runs with the same seed, by Student's paired test."""
    _check_pairs("paired_difference", first, second)
    change = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    difference, low, high, n = mean_interval(list(change), confidence)
    if n == 1:
        return PairedDifference(difference, low, high, 1.0, n)
    error = _standard_error(change)
    t = abs(difference) / error if error else (inf if difference else 0.0)
    return PairedDifference(difference, low, high, 1 - _within(t, n - 1), n)


def t_quantile(probability: float, freedom: int) -> float:
    """Where Student's t distribution of so many degrees of freedom has this probability below."""
    if not 0 < probability < 1 or freedom < 1:
        raise ValueError(
            f"t_quantile: probability must be between 0 and 1, and freedom at least 1, got {probability} and {freedom}"
        )
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while (1 + _within(high, freedom)) / 2 < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 + _within(middle, freedom)) / 2 < probability else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """The probability of Student's t between −t and t: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = atan(t / sqrt(freedom))
    odd = freedom % 2
    term = total = cos(angle) if odd else 1.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cos(angle) ** 2 * (k - 1) / k
        total += term
    if not odd:
        return min(1.0, sin(angle) * total)
    return min(1.0, 2 / pi * (angle + (sin(angle) * total if freedom > 1 else 0.0)))


def _standard_error(values: np.ndarray) -> float:
    # Equal values have none, but for rounding.
    return 0.0 if (values == values[0]).all() else float(values.std(ddof=1) / sqrt(len(values)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of tests made together, adjusted so that below a level α no more than α of such families err at all."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = least
    return adjusted


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
