"""Timing: candidates interleaved in one process, and the figures that come out of it."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

#: How bandwidth is computed, for people.
BYTES_FORMULA = (
    "bytes = M*(Nq+Nk)*(in_bytes+out_bytes); gamma and qk_var, which caches hold, are not counted"
)
#: A sample is a run of calls that takes at least this long: the clock costs some 50 ns.
_SAMPLE_SECONDS = 500e-6
_MOST_CALLS = 20_000
_LEAST_SAMPLES = 5


@dataclasses.dataclass
class Candidate:
    """Something to time.

    Parameters
    ----------
    name : str
        ``"ours"``, ``"copy"``, ...
    function : callable or None
        Called with `arguments`; None when it cannot be run here, and `note` says why.
    arguments : tuple
    exact : bool or None
        Whether its result equals the reference bit for bit; None where that means nothing.
    note : str
        For people.
    """

    name: str
    function: Callable[..., Any] | None
    arguments: tuple[Any, ...] = ()
    exact: bool | None = None
    note: str = ""


@dataclasses.dataclass
class Timing:
    """What was measured of one candidate; times are seconds a call, NaN when it was not run."""

    name: str
    median: float
    q1: float
    q3: float
    samples: int
    calls: int
    exact: bool | None
    note: str

    @property
    def measured(self) -> bool:
        """Whether there is a time."""
        return self.samples > 0


@dataclasses.dataclass
class CaseResult:
    """The timings of one shape, with what they were taken on.

    `bytes` is what one call reads and writes, see `BYTES_FORMULA`. `timings` begins with ours.
    """

    rows: int
    q_cols: int
    k_cols: int
    in_dtype: str
    out_dtype: str
    threads: int
    bytes: int
    timings: list[Timing]

    def timing(self, name: str) -> Timing | None:
        """Return a candidate's timing, or None when there is no such candidate, or no time."""
        for timing in self.timings:
            if timing.name == name and timing.measured:
                return timing
        return None

    def bandwidth(self, timing: Timing) -> float:
        """Return GB/s (1e9 bytes)."""
        return self.bytes / timing.median / 1e9

    def ratio(self, timing: Timing, to: str) -> float:
        """Return a candidate's median over another's; NaN without either."""
        other = self.timing(to)
        if other is None or not timing.measured:
            return float("nan")
        return timing.median / other.median

    @property
    def exact(self) -> bool:
        """Whether ours equals the reference."""
        return all(t.exact is not False for t in self.timings if t.name in ("ours", "scalar"))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CaseResult:
        """Build a result from `to_dict`'s."""
        return cls(**{**fields, "timings": [Timing(**one) for one in fields["timings"]]})


def case_bytes(rows: int, q_cols: int, k_cols: int, in_bytes: int, out_bytes: int) -> int:
    """Return the bytes that one call reads and writes, by `BYTES_FORMULA`."""
    return rows * (q_cols + k_cols) * (in_bytes + out_bytes)


def _sample(candidate: Candidate, calls: int) -> float:
    """Return seconds a call, over some calls in a row."""
    function, arguments = candidate.function, candidate.arguments
    assert function is not None
    repeat = itertools.repeat(None, calls)
    start = time.perf_counter_ns()
    for _ in repeat:
        function(*arguments)
    return (time.perf_counter_ns() - start) / calls * 1e-9


def measure(
    candidates: Sequence[Candidate], *, min_time: float, settle: float = 0.0
) -> list[Timing]:
    """Time candidates, interleaved.

    Whoever has had the least time so far is next, so that all see the same ups and downs of the
    machine, and a slow one does not hold up the others. Before each sample the candidate runs as
    often without being timed, so that caches and threads are in its own steady state.

    Parameters
    ----------
    candidates : sequence of Candidate
        Those without a function come back unmeasured.
    min_time : float
        Seconds that each gets at least; and at least 5 samples.
    settle : float
        Seconds of calls before each sample that are not timed. Several threads need some: those of
        the runtime that ran before spin for a while yet, and the system has to move a woken thread
        to a processor of its own.

    Returns
    -------
    list of Timing
        In the order of the candidates; median and quartiles over samples.
    """
    runnable = [i for i, c in enumerate(candidates) if c.function is not None]
    calls = dict.fromkeys(runnable, 1)
    samples: dict[int, list[float]] = {i: [] for i in range(len(candidates))}
    spent = dict.fromkeys(runnable, 0.0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in runnable:
            once = min(_sample(candidates[i], 1) for _ in range(3))
            if once < _SAMPLE_SECONDS:  # short: ask more precisely
                once = min(_sample(candidates[i], 10) for _ in range(3))
            calls[i] = min(_MOST_CALLS, max(1, int(np.ceil(_SAMPLE_SECONDS / max(once, 1e-9)))))
        waiting = set(runnable)
        while waiting:
            i = min(waiting, key=spent.__getitem__)
            start = time.perf_counter()
            _sample(candidates[i], calls[i])
            while time.perf_counter() - start < settle:
                _sample(candidates[i], calls[i])
            samples[i].append(_sample(candidates[i], calls[i]))
            spent[i] += time.perf_counter() - start
            if spent[i] >= min_time and len(samples[i]) >= _LEAST_SAMPLES:
                waiting.remove(i)
    finally:
        if collecting:
            gc.enable()
    return [_timing(c, samples[i], calls.get(i, 0)) for i, c in enumerate(candidates)]


def _timing(candidate: Candidate, samples: list[float], calls: int) -> Timing:
    quartiles = np.percentile(samples, [25, 50, 75]) if samples else [float("nan")] * 3
    q1, median, q3 = map(float, quartiles)
    return Timing(
        candidate.name,
        median,
        q1,
        q3,
        len(samples),
        calls,
        candidate.exact,
        candidate.note,
    )
