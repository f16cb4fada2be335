"""Intervals for scores, for differences of paired scores and for throughput.

Every interval holds something even when all observations are equal: a perfect score over 20 samples
is no proof of a perfect model, and a bootstrap of it would be empty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval around it.

    Attributes:
        estimate, low, high: in the unit of what was measured; low <= estimate <= high.
        n: observations behind it.
        confidence: what the interval really covers; under 6 rounds less than asked for.
    """

    estimate: float
    low: float
    high: float
    n: int
    confidence: float = 0.95

    def scaled(self, factor: float) -> Interval:
        """The same in another unit; `factor` is positive."""
        low, estimate, high = (v * factor for v in (self.low, self.estimate, self.high))
        return Interval(estimate, low, high, self.n, self.confidence)

    def overlaps(self, other: Interval) -> bool:
        """Whether the two have a point in common, so that their order is not established."""
        return self.low <= other.high and other.low <= self.high


def _checked(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0:
        raise ValueError("there are no scores to average")
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"scores must lie in [0, 1], not {values.min()} to {values.max()}")
    return values


def effective_n(
    scores: Sequence[float] | np.ndarray, num_references: float = 10, confidence: float = 0.95
) -> float:
    """How many 0/1 answers carry as much information about the mean as these scores do.

    A score that is a share of several references found varies less than a 0/1 score of the same
    mean: n p(1-p) / s^2 (Kish's effective sample size, s^2 the sample variance), corrected for
    estimating s^2 from n samples by (z / t_{n-1})^2 (Korn and Graubard 1998, Survey Methodology
    24:193-201). Bounded below by n, since no variable in [0, 1] varies more than a 0/1 one, and
    above by n times the references of a sample (10 in RULER's widest task), since no more answers
    than that were given. Where all scores are equal their variance says nothing, and n is used.
    """
    from scipy import stats

    values = _checked(scores)
    n, mean = values.size, float(values.mean())
    variance = float(values.var(ddof=1)) if n > 1 else 0.0
    if math.isclose(variance, 0.0, abs_tol=1e-15):
        return float(n)
    tail = (1 + confidence) / 2
    correction = (stats.norm.ppf(tail) / stats.t.ppf(tail, n - 1)) ** 2
    wanted = n * mean * (1 - mean) / variance * float(correction)
    return float(min(max(wanted, n), n * max(num_references, 1)))


def mean_interval(
    scores: Sequence[float], confidence: float = 0.95, num_references: float = 10
) -> Interval:
    """Mean of scores in [0, 1] with Wilson's score interval.

    0/1 scores: Wilson (1927) as statsmodels has it. Fractional scores: the same with the effective
    number of observations (see `effective_n`); `num_references` is the mean number of references
    that a sample's score is a share of. Raises ValueError without scores or outside [0, 1].
    """
    from statsmodels.stats.proportion import proportion_confint

    values = _checked(scores)
    mean = float(values.mean())
    binary = bool(np.isin(values, (0.0, 1.0)).all())
    n = float(values.size) if binary else effective_n(values, num_references, confidence)
    low, high = proportion_confint(mean * n, n, alpha=1 - confidence, method="wilson")
    # Rounding may put a bound past the mean by one part in 10^16.
    low, high = max(0.0, min(float(low), mean)), min(1.0, max(float(high), mean))
    return Interval(mean, low, high, values.size, confidence)


def macro_average(
    intervals: Sequence[Interval], weights: Sequence[float] | None = None
) -> Interval:
    """Mean of independent estimates (tasks, lengths), with its interval; unweighted by default.

    Each estimate's distance to its own bound stands for its standard error on that side; squares
    are added as for a sum of independent variables: MOVER, Zou, Huang and Zhang 2009
    (Computational Statistics and Data Analysis 53:1080-1085). Works for means and for paired
    differences. `n` is the sum. Raises ValueError without intervals.
    """
    if not intervals:
        raise ValueError("there are no intervals to average")
    weights = [1.0] * len(intervals) if weights is None else weights
    pairs = list(zip(intervals, weights, strict=True))
    k = math.fsum(weights)
    mean = math.fsum(w * i.estimate for i, w in pairs) / k
    below = math.sqrt(math.fsum((w * (i.estimate - i.low)) ** 2 for i, w in pairs)) / k
    above = math.sqrt(math.fsum((w * (i.high - i.estimate)) ** 2 for i, w in pairs)) / k
    confidence = min(i.confidence for i in intervals)
    return Interval(mean, mean - below, mean + above, sum(i.n for i in intervals), confidence)


def _tango_upper(b: float, c: float, n: float, z: float) -> float:
    """Largest difference that Tango's score test does not reject, for gains b and losses c."""
    from scipy.optimize import brentq

    observed = (b - c) / n
    if observed >= 1 - 1e-12:
        return 1.0

    def margin(delta: float) -> float:
        # Losses under the hypothesis: the maximum-likelihood root of 2n q^2 + linear q - constant.
        linear = (2 * n - b + c) * delta - b - c
        constant = c * delta * (1 - delta)
        q = (math.sqrt(max(linear**2 + 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance = n * (2 * q + delta * (1 - delta))
        return b - c - n * delta + z * math.sqrt(max(variance, 0.0))

    # At the observed difference itself the margin may be 0 (no pair differs): start just above it.
    return float(brentq(margin, observed + 1e-12, 1.0, xtol=1e-12))


def paired_difference(
    method: Sequence[float],
    full: Sequence[float],
    confidence: float = 0.95,
    num_references: float = 10,
) -> Interval:
    """Mean of `method - full`, paired by sample, with Tango's score interval.

    Tango 1998 (Statistics in Medicine 17:891-908) inverts the score test of a difference of paired
    proportions, with b samples that only the method got and c that only full attention got. It
    is not empty when no pair differs.

    Fractional scores: b is the sum of the gains and c of the losses. As |d| >= d^2, that alone
    assumes more variance than there is; so b, c and n are scaled by how much less the differences
    vary, (mean|d| - mean^2) / s^2, with the correction and the bounds of `effective_n`: at least 1
    (always 1 for 0/1 scores) and at most `num_references`.
    Raises ValueError for unequal lengths and scores outside [0, 1].
    """
    from scipy import stats

    if len(method) != len(full):
        raise ValueError(f"{len(method)} scores cannot be paired with {len(full)}")
    difference = _checked(method) - _checked(full)
    gains = math.fsum(d for d in difference if d > 0)
    losses = math.fsum(-d for d in difference if d < 0)
    n, z = difference.size, float(stats.norm.ppf((1 + confidence) / 2))
    mean = (gains - losses) / n
    variance = float(difference.var(ddof=1)) if n > 1 else 0.0
    scale = 1.0
    if variance > 1e-15:
        correction = (z / float(stats.t.ppf((1 + confidence) / 2, n - 1))) ** 2
        scale = ((gains + losses) / n - mean**2) / variance * correction
        scale = min(max(scale, 1.0), max(num_references, 1.0))
    b, c, size = gains * scale, losses * scale, n * scale
    low, high = -_tango_upper(c, b, size, z), _tango_upper(b, c, size, z)
    return Interval(mean, min(low, mean), max(high, mean), n, confidence)


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Median with the interval between two order statistics, for throughput over rounds.

    The k-th smallest and k-th largest value enclose the median with probability
    1 - 2 P(Binomial(n, 1/2) < k), whatever the distribution (Hahn and Meeker, Statistical
    Intervals, 1991, chapter 5); k is the largest that reaches `confidence`. Under 6 values none
    does at 95 %: the whole range is returned, and `confidence` says what it covers (5 values: 94 %,
    3: 75 %, 1: 0). Raises ValueError without values.
    """
    from scipy import stats

    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = ordered.size
    if n == 0:
        raise ValueError("there are no values to take the median of")
    k = max(int(stats.binom.ppf((1 - confidence) / 2, n, 0.5)), 1)
    covered = 1 - 2 * float(stats.binom.cdf(k - 1, n, 0.5))
    median = float(np.median(ordered))
    return Interval(median, float(ordered[k - 1]), float(ordered[n - k]), n, max(covered, 0.0))
