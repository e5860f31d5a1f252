"""Statistics of timings: medians and their intervals, with no assumption on the shape of the noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The fewest values whose smallest and largest enclose the median with 95% probability: 1 - 2 / 2**6 = 0.969.
FEWEST = 6


@dataclass(frozen=True)
class Quartiles:
    """The median of some values, and the values that a quarter of them lie below and above."""

    q1: float
    median: float
    q3: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """Quartiles by linear interpolation between neighbours."""
    return Quartiles(*(float(q) for q in np.percentile(values, (25, 50, 75))))


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Two of `values` that enclose the median of their population with at least this confidence.

    The sign test: the number of n values below the median is Binomial(n, 1/2), so the k-th smallest and the k-th
    largest miss the median with probability 2 P(Binomial(n, 1/2) < k). Values are taken to be independent.

    Raises:
        ValueError: too few values for any two of them to reach the confidence.
    """
    ordered = sorted(values)
    n = len(ordered)
    k, miss = 0, 0.0
    while k <= n // 2:
        miss += 2 * math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        if miss > 1 - confidence:
            break
        k += 1
    if k == 0:
        raise ValueError(f"{n} values cannot enclose a median with {confidence:.0%} confidence; take more")
    return ordered[k - 1], ordered[n - k]


def pooled_ratio(processes: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """The median of all processes' values, and an interval that also covers how processes differ.

    Memory's layout is drawn anew in each process and may favour one side, which no number of rounds in one process
    shows. So the interval is the sign test's of all values, widened to hold the median of each process.
    """
    pooled = [value for values in processes for value in values]
    low, high = median_interval(pooled)
    medians = [quartiles(values).median for values in processes]
    return quartiles(pooled).median, min(low, *medians), max(high, *medians)


def geometric_mean(values: Sequence[float]) -> float:
    """The n-th root of the product of n positive values."""
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))
