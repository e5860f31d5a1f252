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


def geometric_mean(values: Sequence[float]) -> float:
    """The n-th root of the product of n positive values."""
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))
