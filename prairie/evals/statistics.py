"""Intervals that know what the independent units are.

Right answers on items are counted (`wilson`), two models on the same items are compared item by item
(`paired_difference`), and votes are compared USER by USER (`clustered_interval`): one person's votes resemble each
other, so forty votes of two people are two units, not forty. Every interval here is for ONE look, planned beforehand.
Not here: tests that may be looked at all the time (`sequential`), models, text, verdicts (`flywheel.gate`).

No scipy: the one function that is missing from the standard library, Student's t quantile, is computed here.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np

from prairie.errors import DataError


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the range that holds the truth in `confidence` of such experiments; `n` independent units."""

    value: float
    low: float
    high: float
    n: int
    confidence: float = 0.95

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n, "confidence": self.confidence}


def wilson(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """A share of `n` independent trials (Wilson 1927), sound near 0 and 1 and for small n, unlike value +- 2 stderr.

    Halves are allowed in `successes` (ties). Without trials the interval is everything: [0, 1].
    """
    if n <= 0:
        return Interval(math.nan, 0.0, 1.0, 0, confidence)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)), n, confidence)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """A mean of independent values, by Student's t. With fewer than two values the interval is infinite."""
    n = len(values)
    if n < 2:
        return Interval(values[0] if n else math.nan, -math.inf, math.inf, n, confidence)
    array = np.asarray(values, dtype=np.float64)
    half = student_quantile(0.5 + confidence / 2, n - 1) * float(array.std(ddof=1)) / math.sqrt(n)
    mean = float(array.mean())
    return Interval(mean, mean - half, mean + half, n, confidence)


def clustered_interval(
    values: Sequence[float], clusters: Sequence[Hashable], confidence: float = 0.95, rounds: int = 8_000
) -> Interval:
    """The mean over CLUSTERS of each cluster's mean, for values in [0, 1] (a win 1, a tie 1/2, a loss 0).

    Every cluster weighs the same, so nobody decides by voting often; `n` is the number of clusters. Two intervals are
    laid over each other and the outer ends kept:
      * Student's t over the clusters' means, right for means that are roughly normal;
      * Hartigan's typical values (JASA 64, 1969): quantiles of the means of random subsets of clusters, EXACT at any
        number of clusters when their means lie symmetrically about the truth, as when nobody has a preference.
    The second mends the first where votes are few and coarse. Clusters that all agree exactly have no spread to
    measure; then Wilson's interval over the clusters is given. The random subsets come from a fixed seed.
    Raises DataError for values outside [0, 1].
    """
    if len(values) != len(clusters):
        raise DataError("values and clusters do not match", got=f"{len(values)} and {len(clusters)}")
    if any(not 0.0 <= value <= 1.0 for value in values):
        raise DataError("a clustered share needs values between 0 and 1", got=f"{min(values)} to {max(values)}")
    means = cluster_means(values, clusters)
    count = len(means)
    if count < 2 or float(np.ptp(means)) < 1e-12:
        return wilson(float(means.sum()), count, confidence)
    student = mean_interval(means.tolist(), confidence)
    low, high = _typical_values(means, confidence, rounds)
    return Interval(
        student.value, max(0.0, min(student.low, low)), min(1.0, max(student.high, high)), count, confidence
    )


def cluster_means(values: Sequence[float], clusters: Sequence[Hashable]) -> np.ndarray:
    """(clusters,) the mean of each cluster's values, in the order in which the clusters appear."""
    sums: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        entry = sums.setdefault(cluster, [0.0, 0.0])
        entry[0] += value
        entry[1] += 1
    return np.array([total / number for total, number in sums.values()], dtype=np.float64)


def _typical_values(means: np.ndarray, confidence: float, rounds: int) -> tuple[float, float]:
    """Bounds such that the truth lies between them with `confidence`, from subset means; the empty subset counts on the
    outside, so too few clusters give an infinite interval. All subsets up to 14 clusters, else `rounds` random ones."""
    count = len(means)
    if count <= 14:
        chosen = (np.arange(1, 2**count)[:, None] >> np.arange(count)) & 1
    else:
        chosen = np.random.default_rng(0).integers(0, 2, (rounds, count))
        chosen = chosen[chosen.any(axis=1)]
    subset_means = np.sort(chosen @ means / chosen.sum(axis=1))
    outside = math.floor((1 - confidence) / 2 * (len(subset_means) + 1))  # so many of them lie beyond each bound
    if outside < 1:
        return -math.inf, math.inf
    return float(subset_means[outside - 1]), float(subset_means[-outside])


def bootstrap_interval(
    values: Sequence[float], clusters: Sequence[Hashable], *, seed: int, confidence: float = 0.95, rounds: int = 2000
) -> Interval:
    """The mean of ALL values (a busy cluster weighs more), whole clusters drawn with replacement, percentile bounds.

    For reports on many clusters. With fewer than about thirty it is too narrow: a gate uses `clustered_interval`.
    """
    order = list(dict.fromkeys(clusters))
    index = {cluster: place for place, cluster in enumerate(order)}
    places = np.array([index[cluster] for cluster in clusters])
    sums = np.bincount(places, weights=np.asarray(values, dtype=np.float64), minlength=len(order))
    counts = np.bincount(places, minlength=len(order))
    drawn = np.random.default_rng(seed).integers(0, len(order), (rounds, len(order)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high), len(order), confidence)


def paired_difference(before: Sequence[bool], after: Sequence[bool], confidence: float = 0.95) -> Interval:
    """After minus before, for right (True) and wrong answers of two models to the SAME items.

    Agresti and Min (Statistics in Medicine 24, 2005): half an item is added to each of the four outcomes, so that few
    items without a single change do not look like certainty. Raises DataError when the lengths differ.
    """
    if len(before) != len(after):
        raise DataError("paired answers do not match", got=f"{len(before)} and {len(after)}", wanted="the same items")
    n = len(before)
    gained = sum(new and not old for old, new in zip(before, after, strict=True))
    lost = sum(old and not new for old, new in zip(before, after, strict=True))
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = (gained - lost) / (n + 2)
    spread = (gained + lost + 1 - (gained - lost) ** 2 / (n + 2)) ** 0.5 / (n + 2)
    value = (gained - lost) / n if n else math.nan
    return Interval(value, max(-1.0, middle - z * spread), min(1.0, middle + z * spread), n, confidence)


def unpaired_difference(before: tuple[float, int], after: tuple[float, int], confidence: float = 0.95) -> Interval:
    """After minus before, each given as (right answers, items), for DIFFERENT items (Newcombe 1998, method 10)."""
    old, new = wilson(*before, confidence), wilson(*after, confidence)
    if not old.n or not new.n:
        return Interval(math.nan, -1.0, 1.0, 0, confidence)
    value = new.value - old.value
    low = value - math.hypot(new.value - new.low, old.high - old.value)
    high = value + math.hypot(new.high - new.value, old.value - old.low)
    return Interval(value, low, high, min(old.n, new.n), confidence)


@lru_cache(maxsize=256)
def student_quantile(probability: float, degrees: int) -> float:
    """The t below which `probability` of Student's distribution lies; accurate to 1e-9 of itself, by bisection."""
    if degrees < 1 or not 0 < probability < 1:
        raise DataError("no such quantile", got=f"probability {probability}, degrees of freedom {degrees}")
    if probability < 0.5:
        return -student_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while student_below(high, degrees) < probability:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if student_below(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def student_below(t: float, degrees: int) -> float:
    """The share of Student's t distribution below `t`."""
    tail = _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t)) / 2
    return 1 - tail if t > 0 else tail


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (Numerical Recipes, 3rd edition, 6.4)."""
    if x <= 0 or x >= 1:
        return min(1.0, max(0.0, x))
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side only
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tiny = 1e-300
    c, d = 1.0, 1 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > tiny else tiny)
    fraction = d
    for m in range(1, 300):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 + numerator * d
            d = 1 / (d if abs(d) > tiny else tiny)
            c = 1 + numerator / c
            c = c if abs(c) > tiny else tiny
            fraction *= d * c
        if abs(d * c - 1) < 1e-14:
            break
    return front * fraction / a
