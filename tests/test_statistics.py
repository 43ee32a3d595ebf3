"""Intervals and tests against closed forms, known values and brute force."""

from itertools import product
from math import comb, inf, sqrt

import numpy as np
import pytest

from latro import statistics
from latro.statistics import (
    auc,
    holm,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    paired_difference,
    t_quantile,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [(8, 10, (0.490162, 0.943318)), (50, 100, (0.403832, 0.596168)), (0, 10, (0.0, 0.277533)), (1, 1, (0.206549, 1.0))],
)
def test_wilson(successes, n, expected):
    assert wilson(successes, n) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(0, 7), (3, 7), (7, 7), (701, 1319)])
def test_wilson_bounds_are_the_rates_that_a_score_test_just_accepts(successes, n):
    z = 1.6448536269514722
    for bound in wilson(successes, n, confidence=0.9):
        assert abs(successes / n - bound) == pytest.approx(z * sqrt(bound * (1 - bound) / n), abs=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses(successes, n):
    with pytest.raises(ValueError, match="successes must be from 0 to n"):
        wilson(successes, n)


def brute_force_mcnemar(gained, lost):
    n = gained + lost
    as_rare = [comb(n, i) for i in range(n + 1) if comb(n, i) <= comb(n, gained)]
    return sum(as_rare) / 2**n


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 5), (9, 1), (1, 9), (30, 12), (200, 150)])
def test_mcnemar(gained, lost):
    pairs = [(False, True)] * gained + [(True, False)] * lost + [(True, True)] * 3 + [(False, False)] * 4
    first, second = zip(*pairs, strict=True)
    assert mcnemar(first, second) == pytest.approx(brute_force_mcnemar(gained, lost), rel=1e-12)


def test_mcnemar_known_value():
    assert mcnemar([True] + [False] * 9, [False] + [True] * 9) == pytest.approx(22 / 1024)


def test_bootstrap_of_one_difference():
    result = paired_bootstrap([0.0, 1.0, 2.0], [0.5, 1.5, 2.5], resamples=999)
    assert result == (0.5, 0.5, 0.5, 2 / 1000)


def test_bootstrap_of_two_questions():
    # Resampled means are 0, 1/2 and 1 with probability 1/4, 1/2 and 1/4.
    result = paired_bootstrap([0, 0], [0, 1], resamples=40_000)
    assert result[:3] == (0.5, 0.0, 1.0)
    assert result.p_value == pytest.approx(0.5, abs=0.02)


def test_bootstrap_of_many_questions_is_the_normal_interval():
    generator = np.random.default_rng(1)
    first = generator.random(800) < 0.4
    second = np.where(generator.random(800) < 0.8, first, generator.random(800) < 0.7)
    change = second.astype(float) - first
    difference, low, high, p_value = paired_bootstrap(list(first), list(second))
    half = 1.959964 * change.std() / sqrt(800)
    assert difference == change.mean()
    assert (low, high) == pytest.approx((difference - half, difference + half), abs=0.05 * half)
    assert p_value < 0.01


def test_bootstrap_without_a_difference():
    assert paired_bootstrap([1, 0, 1], [1, 0, 1]) == (0, 0, 0, 1)
    assert paired_bootstrap([0, 1] * 50, [1, 0] * 50).p_value > 0.5


def test_bootstrap_sign():
    better, worse = [0.9, 0.8, 0.95, 0.7], [0.1, 0.2, 0.3, 0.1]
    there, back = paired_bootstrap(worse, better), paired_bootstrap(better, worse)
    assert there.low > 0 > back.high
    assert there.difference == -back.difference == pytest.approx(0.6625)


def test_bootstrap_draws_all_resamples_in_pieces(monkeypatch):
    drawn = []
    generator = np.random.default_rng(0)

    class Counting:
        def integers(self, n, size):
            drawn.append(size)
            return generator.integers(n, size=size)

    monkeypatch.setattr(statistics, "CHUNK", 70)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Counting())
    paired_bootstrap([0.0] * 10, list(range(10)), resamples=45)
    assert drawn == [(7, 10)] * 6 + [(3, 10)]


def test_bootstrap_is_repeatable():
    first, second = [0.1, 0.5, 0.3], [0.2, 0.1, 0.9]
    assert paired_bootstrap(first, second, seed=3) == paired_bootstrap(first, second, seed=3)
    assert paired_bootstrap(first, second, resamples=50) != paired_bootstrap(first, second, resamples=50, seed=1)


@pytest.mark.parametrize(
    ("first", "second", "options", "rule"),
    [
        ([], [], {}, "must have at least one value"),
        ([1], [1, 2], {}, r"first, second must be equally many, got \[1, 2\]"),
        ([1], [float("nan")], {}, "must be finite, got nan"),
        ([1], [2], {"resamples": 0}, "resamples must be at least 1, got 0"),
        ([1], [2], {"confidence": 95}, "confidence must be between 0 and 1, got 95"),
    ],
)
def test_bootstrap_refuses(first, second, options, rule):
    with pytest.raises(ValueError, match=f"paired_bootstrap: .*{rule}"):
        paired_bootstrap(first, second, **options)


def brute_force_auc(scores, labels, groups):
    outcomes = [
        1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
        for i, j in product(range(len(scores)), repeat=2)
        if labels[i] and not labels[j] and groups[i] == groups[j]
    ]
    return sum(outcomes) / len(outcomes)


@pytest.mark.parametrize("seed", range(5))
def test_auc(seed):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 6, 60).astype(float)  # many ties
    labels = generator.random(60) < 0.3 + scores / 12
    groups = generator.integers(0, 9, 60).tolist()
    assert auc(scores, labels, groups) == pytest.approx(brute_force_auc(scores, labels, groups), abs=1e-12)
    assert auc(scores, labels) == pytest.approx(brute_force_auc(scores, labels, [0] * 60), abs=1e-12)


def test_auc_counts_only_pairs_of_a_group():
    scores, labels = [1.0, 2.0, 3.0, 4.0], [True, False, True, False]
    assert auc(scores, labels, ["a", "a", "b", "b"]) == 0
    assert auc(scores, labels, ["a", "b", "b", "a"]) == 0.5
    assert auc([-np.inf, 0.0], [False, True]) == 1


def test_auc_without_pairs():
    assert auc([], []) is None
    assert auc([1.0, 2.0], [True, True]) is None
    assert auc([1.0, 2.0], [True, False], ["a", "b"]) is None


def test_auc_refuses():
    with pytest.raises(ValueError, match="auc: scores must be numbers, got nan"):
        auc([float("nan"), 1.0], [True, False])
    with pytest.raises(ValueError, match=r"auc: scores, labels, groups must be equally many, got \[2, 1, 2\]"):
        auc([0.0, 1.0], [True])


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [
        (0.975, 1, 12.706205),
        (0.975, 2, 4.302653),
        (0.975, 3, 3.182446),
        (0.975, 4, 2.776445),
        (0.975, 9, 2.262157),
        (0.95, 4, 2.131847),
        (0.995, 7, 3.499483),
        (0.975, 30, 2.042272),
        (0.975, 200, 1.971896),
    ],
)
def test_t_quantile(probability, freedom, expected):
    assert t_quantile(probability, freedom) == pytest.approx(expected, abs=1e-6)
    assert t_quantile(1 - probability, freedom) == pytest.approx(-expected, abs=1e-6)


def test_t_quantile_of_many_degrees_of_freedom_is_the_normal_one():
    assert t_quantile(0.975, 100_000) == pytest.approx(1.959964, abs=3e-5)
    assert t_quantile(0.5, 3) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("probability", "freedom"), [(0, 3), (1, 3), (0.975, 0)])
def test_t_quantile_refuses(probability, freedom):
    with pytest.raises(ValueError, match="t_quantile: probability must be between 0 and 1, and freedom at least 1"):
        t_quantile(probability, freedom)


def test_mean_interval():
    mean, low, high, n = mean_interval([0.90, 0.94, 0.92, 0.98, 0.96])
    half = 2.776445 * sqrt(0.001 / 5)
    assert (mean, n) == (pytest.approx(0.94), 5)
    assert (low, high) == pytest.approx((0.94 - half, 0.94 + half), abs=1e-8)


def test_mean_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3, 2, size=(4000, 4))
    inside = [low <= 3 <= high for _, low, high, _ in (mean_interval(list(row), 0.9) for row in draws)]
    assert np.mean(inside) == pytest.approx(0.9, abs=0.015)


def test_mean_interval_of_one_value_is_none():
    assert mean_interval([0.5]) == (0.5, -inf, inf, 1)
    assert mean_interval([0.1] * 5)[1:] == (pytest.approx(0.1), pytest.approx(0.1), 5)


@pytest.mark.parametrize("values", [[], [0.5, float("nan")], [inf]])
def test_mean_interval_refuses(values):
    with pytest.raises(ValueError, match="mean_interval: values must be at least one finite number"):
        mean_interval(values)


def test_paired_difference():
    # The sleep of ten patients under two drugs (Student, 1908).
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    difference, low, high, p_value, n = paired_difference(first, second)
    assert (difference, n) == (pytest.approx(1.58), 10)
    assert (low, high) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert p_value == pytest.approx(0.00283289, abs=1e-7)
    back = paired_difference(second, first)
    assert (back.difference, back.low, back.high) == (-difference, -high, -low)
    assert back.p_value == p_value


def test_paired_difference_without_spread():
    assert paired_difference([1, 2, 3], [1, 2, 3]) == (0, 0, 0, 1, 3)
    assert paired_difference([0, 1], [1, 2]) == (1, 1, 1, 0, 2)
    assert paired_difference([0.2], [0.9]) == (pytest.approx(0.7), -inf, inf, 1, 1)


def test_paired_difference_refuses():
    with pytest.raises(ValueError, match="paired_difference: first, second must be equally many"):
        paired_difference([1, 2], [1])
    with pytest.raises(ValueError, match="paired_difference: first and second must have at least one value"):
        paired_difference([], [])


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1, 1]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []
