"""Comparing noisy times: medians, and an interval for the ratio of paired samples."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times faster one is than another: a median with its interval.

    `low` and `high` are order statistics of the paired ratios that hold the true median with at
    least 95 % probability, whatever the distribution.
    """

    low: float
    median: float
    high: float


def paired_ratio(base: Sequence[float], other: Sequence[float]) -> Ratio:
    """Return ``base / other`` of samples that were taken side by side."""
    ratios = sorted(a / b for a, b in zip(base, other, strict=True))
    skip = _binomial_skip(len(ratios))
    return Ratio(ratios[skip], statistics.median(ratios), ratios[len(ratios) - 1 - skip])


def _binomial_skip(count: int, confidence: float = 0.95) -> int:
    """Return how many ordered samples may be left out at each end (a sign test's interval)."""
    skip, tail = -1, 0.0
    while True:
        tail += math.comb(count, skip + 1) / 2**count
        if 2 * tail > 1 - confidence or 2 * (skip + 1) >= count:
            return max(skip, 0)
        skip += 1


def spread(samples: Sequence[float]) -> float:
    """Return the interquartile range relative to the median."""
    if len(samples) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle if middle else 0.0
