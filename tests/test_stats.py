"""Intervals: published values, invariants, and how often they cover the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowkv_cli.stats import (
    Interval,
    effective_n,
    macro_average,
    mean_interval,
    median_interval,
    paired_difference,
)

Z = 1.959963984540054
QUICK = settings(max_examples=60, deadline=None)
fractions = st.integers(0, 4).map(lambda k: k / 4)
score_lists = st.lists(fractions, min_size=1, max_size=40)


def pairs(gains: int, losses: int, n: int) -> tuple[list[float], list[float]]:
    """0/1 scores of method and full with that many discordant pairs."""
    same = n - gains - losses
    return [1.0] * gains + [0.0] * losses + [1.0] * same, [0.0] * gains + [1.0] * losses + [
        1.0
    ] * same


# Fagerland, Lydersen, Laake, Statistical Analysis of Contingency Tables (2017), chapter 8 (Bentur
# 2009: 1 against 7 of 21; Cavo 2012: 6 against 16 of 161), and PropCIs::scoreci.mp (48, 41 of 549).
@pytest.mark.parametrize(
    ("gains", "losses", "n", "confidence", "low", "high"),
    [
        (1, 7, 21, 0.95, -0.5172, -0.0260),
        (6, 16, 161, 0.95, -0.1240, -0.0054),
        (48, 41, 549, 0.90, -0.0157, 0.0414),
    ],
)
def test_tango_published_values(gains, losses, n, confidence, low, high):
    interval = paired_difference(*pairs(gains, losses, n), confidence)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=6e-5)
    assert interval.estimate == pytest.approx((gains - losses) / n)


@pytest.mark.parametrize("n", [1, 5, 44, 1000])
def test_no_pair_differs_is_no_proof_of_equality(n):
    interval = paired_difference([1.0] * n, [1.0] * n)
    expected = Z**2 / (n + Z**2)
    assert (interval.low, interval.high) == pytest.approx((-expected, expected), abs=1e-8), n


@pytest.mark.parametrize("n", [1, 10, 96])
def test_all_pairs_differ_one_way(n):
    interval = paired_difference([0.0] * n, [1.0] * n)
    assert (interval.estimate, interval.low) == (-1, -1)
    assert interval.high == pytest.approx((Z**2 - n) / (Z**2 + n), abs=1e-8)


@QUICK
@given(st.lists(st.tuples(fractions, fractions), min_size=1, max_size=30))
def test_paired_difference_invariants(scores):
    method, full = ([s[i] for s in scores] for i in (0, 1))
    there, back = paired_difference(method, full), paired_difference(full, method)
    assert -1 <= there.low <= there.estimate <= there.high <= 1, scores
    assert there.estimate == pytest.approx(float(np.mean(np.subtract(method, full))), abs=1e-12)
    assert there.high > there.low, scores
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-9), scores


@QUICK
@given(score_lists)
def test_mean_interval_invariants(scores):
    interval = mean_interval(scores, num_references=4)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1, scores
    assert interval.high > interval.low, scores
    assert interval.n == len(scores)
    wider = mean_interval(scores, confidence=0.99, num_references=4)
    assert wider.high - wider.low >= interval.high - interval.low - 1e-9, scores


@QUICK
@given(score_lists)
def test_mean_interval_shrinks_with_n(scores):
    few = mean_interval(scores, num_references=4)
    many = mean_interval(scores * 4, num_references=4)
    assert many.high - many.low < few.high - few.low, scores


@QUICK
@given(score_lists)
def test_mean_interval_is_symmetric_under_exchange(scores):
    a = mean_interval(scores, num_references=4)
    b = mean_interval([1 - s for s in scores], num_references=4)
    assert (a.low, a.high) == pytest.approx((1 - b.high, 1 - b.low), abs=1e-9), scores


def test_wilson_of_binary_scores():
    # Newcombe 1998 (Statistics in Medicine 17:857-872), table I: 81/263, 15/148, 0/20.
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
    ]:
        interval = mean_interval([1.0] * successes + [0.0] * (n - successes))
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5), (successes, n)


def test_effective_n_bounds():
    assert effective_n([0.5, 0.5, 0.5]) == 3, "no variance says nothing"
    assert effective_n([0.0, 1.0, 1.0, 0.0]) == 4, "0/1 scores count once"
    assert effective_n([0.9, 0.9, 0.9, 1.0] * 10, num_references=10) == 400, "capped"
    assert effective_n([0.25, 0.5, 0.75] * 10, num_references=1) == 30, "one reference, one answer"


@pytest.mark.parametrize("bad", [[], [1.2], [-0.1], [math.nan]])
def test_scores_outside_the_unit_interval_are_refused(bad):
    with pytest.raises(ValueError, match="scores"):
        mean_interval(bad)


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="2 scores cannot be paired with 1"):
        paired_difference([1, 0], [1])


@pytest.mark.parametrize("references", [1, 4, 10])
def test_coverage(references):
    """Over 95 % of the intervals should hold the truth, though samples differ in difficulty."""
    random = np.random.default_rng(7)
    n, rounds, kept, gained = 30, 250, 0.9, 0.05
    hits = {"mean": 0, "difference": 0}
    for _ in range(rounds):
        full = random.binomial(references, random.beta(8, 2, n))
        method = random.binomial(full, kept) + random.binomial(references - full, gained)
        mean = mean_interval(full / references, num_references=references)
        hits["mean"] += mean.low <= 0.8 <= mean.high
        difference = paired_difference(
            method / references, full / references, num_references=references
        )
        hits["difference"] += difference.low <= 0.8 * kept + 0.2 * gained - 0.8 <= difference.high
    for name, count in hits.items():
        assert count / rounds >= 0.92, (name, references, count / rounds)


def test_macro_average_by_hand():
    a, b = Interval(0.8, 0.7, 0.86, 20), Interval(0.4, 0.1, 0.48, 30)
    average = macro_average([a, b])
    assert average.estimate == pytest.approx(0.6)
    assert average.low == pytest.approx(0.6 - math.hypot(0.1, 0.3) / 2)
    assert average.high == pytest.approx(0.6 + math.hypot(0.06, 0.08) / 2)
    assert average.n == 50
    with pytest.raises(ValueError, match="no intervals"):
        macro_average([])


@pytest.mark.parametrize(
    ("n", "low", "high", "confidence"),
    [(1, 0, 0, 0.0), (3, 0, 2, 0.75), (5, 0, 4, 0.9375), (6, 0, 5, 0.96875), (10, 1, 8, 0.9785)],
)
def test_median_interval_order_statistics(n, low, high, confidence):
    values = np.random.default_rng(n).permutation(n).astype(float)
    interval = median_interval(values)
    assert (interval.low, interval.high) == (low, high)
    assert interval.estimate == (n - 1) / 2
    assert interval.confidence == pytest.approx(confidence, abs=1e-4)


@QUICK
@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=60))
def test_median_interval_invariants(values):
    interval = median_interval(values)
    assert min(values) <= interval.low <= interval.estimate <= interval.high <= max(values)
    assert interval.confidence >= 0.95 or len(values) < 6, values


def test_interval_scaled_and_overlaps():
    interval = Interval(0.5, 0.4, 0.6, 10)
    assert interval.scaled(100) == Interval(50, 40, 60, 10)
    assert interval.overlaps(Interval(0.7, 0.6, 0.8, 10))
    assert not interval.overlaps(Interval(0.7, 0.61, 0.8, 10))
