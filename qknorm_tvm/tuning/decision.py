"""Whether a config beats the default: what the times of several processes say.

A record that is false costs every later build; one that was not kept costs a few percent. So a gain
must show at every placement of the tensors, and again in fresh processes: other addresses, other
pages, threads that were placed anew. Where the times spread wider than the gain nothing is decided,
and the default stays.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

#: A record must be this much faster than the default, at the low end of its interval.
MIN_GAIN = 1.01
#: Times that spread by more than this prove nothing, whatever the gain: on a machine that was busy
#: with other programs two threads took 36 ms for what one did in 67 µs, and takes 6 µs when idle.
MAX_SPREAD = 0.25
#: Fresh processes in which a config and the default are timed before one is kept.
PROCESSES = 3


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times faster one config is than another: a median with its interval.

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


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The default against a config at one row count."""

    rows: int
    #: Medians of all samples, microseconds.
    default_us: float
    config_us: float
    #: Of all pairs of samples.
    gain: Ratio
    #: The widest of: the quartiles of the paired ratios over their median; and, of the default and
    #: of the config, how far their medians in different processes lie apart.
    spread: float

    @property
    def faster(self) -> bool:
        """Whether the config is to be kept for what it was measured at."""
        return self.gain.low > MIN_GAIN and self.spread <= min(self.gain.median - 1, MAX_SPREAD)

    @property
    def slower(self) -> bool:
        """Whether the config must not serve this row count."""
        return self.gain.median < 1 / MIN_GAIN

    def reason(self) -> str:
        """Say why the config is not kept."""
        times = (
            f"{self.default_us:.4g} µs with the default, {self.config_us:.4g} µs with the config "
            f"at {self.rows} rows"
        )
        if self.slower:
            return f"slower than the default: {times}"
        if self.gain.low <= MIN_GAIN:
            return f"not faster by more than the noise: {times}, gain at least {self.gain.low:.3f}"
        limit = f"the gain of {self.gain.median - 1:.1%}"
        if self.gain.median - 1 > MAX_SPREAD:
            limit = f"{MAX_SPREAD:.0%}"
        return f"undecided: {times}, which spread by {self.spread:.1%}, more than {limit}"

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict JSON-ready, rounded."""
        return {
            "rows": self.rows,
            "default_us": round(self.default_us, 4),
            "config_us": round(self.config_us, 4),
            "gain": {name: round(value, 4) for name, value in vars(self.gain).items()},
            "spread": round(self.spread, 4),
        }


def judge(rows: int, processes: Sequence[Sequence[Sequence[float]]]) -> Verdict:
    """Compare a config with the default.

    `processes` are, of each process, the default's samples and the config's, in seconds, paired.
    """
    base = [sample for default, _ in processes for sample in default]
    other = [sample for _, config in processes for sample in config]
    ratios = [a / b for a, b in zip(base, other, strict=True)]
    widest = spread(ratios)
    for samples_by_process in zip(*processes, strict=True):
        medians = [statistics.median(samples) for samples in samples_by_process]
        widest = max(widest, max(medians) / min(medians) - 1)
    return Verdict(
        rows, 1e6 * statistics.median(base), 1e6 * statistics.median(other),
        paired_ratio(base, other), widest,
    )  # fmt: skip
