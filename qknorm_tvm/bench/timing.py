"""Timing: candidates that take turns in one process, and the figures that come out of it.

One loop, `measure`, serves every device and operation. How a candidate is sampled is left to a
`Sampler`: `HostSampler` times runs of calls by the clock, `qknorm_tvm.bench.cuda.GraphSampler`
replays CUDA graphs.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

#: Names of candidates, of which comparisons and pictures know more than the name.
OURS, COPY, NUMPY, TORCH = "ours", "copy", "NumPy", "torch"
TORCH_COMPILE, SCALAR = "torch.compile", "scalar"
EMPTY, TWO_COPIES, TWO_LAUNCHES = "empty kernel", "two copies", "two launches"

#: A sample is a run of calls that takes at least this long: the clock costs some 50 ns.
_SAMPLE_SECONDS = 500e-6
_MOST_CALLS = 20_000
_LEAST_SAMPLES = 5


class CannotRunError(Exception):
    """A candidate that cannot be sampled here; the message says why."""


@dataclasses.dataclass
class Candidate:
    """Something to time.

    Parameters
    ----------
    name : str
        ``"ours"``, ``"copy"``, ...
    function : callable or None
        What is called; None when it cannot be run here, and `note` says why.
    sets : sequence of tuple
        Sets of arguments, which take turns: a sample of the host uses one, so that what is
        measured does not hang on one choice of addresses; a chain of launches on a GPU uses all.
    exact : bool or None
        Whether its result equals the reference bit for bit; None where that means nothing.
    note : str
        For people.
    """

    name: str
    function: Callable[..., Any] | None
    sets: Sequence[tuple[Any, ...]] = ((),)
    exact: bool | None = None
    note: str = ""


@dataclasses.dataclass
class Timing:
    """What was measured of one candidate; times are seconds a call, NaN when it was not run.

    `worst` is the median with the slowest set of arguments, NaN where there is only one.
    """

    name: str
    median: float
    q1: float
    q3: float
    samples: int
    calls: int
    exact: bool | None
    note: str
    worst: float = math.nan

    @property
    def measured(self) -> bool:
        """Whether there is a time."""
        return self.samples > 0


class Sampler(Protocol):
    """How one candidate is timed.

    Attributes
    ----------
    calls : int
        Calls in a sample.
    sets : int
        How many sets of arguments samples use in turn.
    least : int
        The fewest samples that say something.
    """

    calls: int
    sets: int
    least: int

    def sample(self, turn: int) -> float:
        """Return the mean seconds of `calls` calls; at least as many calls before are not timed."""


class HostSampler:
    """Times runs of calls by the clock.

    Parameters
    ----------
    candidate : Candidate
    settle : float
        Seconds of calls before each sample that are not timed. Several threads need some: those of
        the runtime that ran before spin for a while yet, and the system has to move a woken thread
        to a processor of its own.
    finish : callable
        Called after each run: waits for what the calls have started.
    """

    def __init__(
        self,
        candidate: Candidate,
        *,
        settle: float = 0.0,
        finish: Callable[[], Any] = lambda: None,
    ):
        assert candidate.function is not None
        self._function, self._arguments = candidate.function, candidate.sets
        self._settle, self._finish = settle, finish
        self.sets = len(candidate.sets)
        self.least = max(_LEAST_SAMPLES, 2 * self.sets)
        once = min(self._run(0, 1) for _ in range(3))
        if once < _SAMPLE_SECONDS:  # short: ask more precisely
            once = min(self._run(0, 10) for _ in range(3))
        self.calls = min(_MOST_CALLS, max(1, math.ceil(_SAMPLE_SECONDS / max(once, 1e-9))))

    def _run(self, turn: int, calls: int) -> float:
        function, arguments = self._function, self._arguments[turn % self.sets]
        repeat = itertools.repeat(None, calls)
        start = time.perf_counter_ns()
        for _ in repeat:
            function(*arguments)
        seconds = (time.perf_counter_ns() - start) / calls * 1e-9
        self._finish()
        return seconds

    def sample(self, turn: int) -> float:
        """Return the mean seconds of a call, once caches are warm and threads have settled."""
        start = time.perf_counter()
        self._run(turn, self.calls)
        while time.perf_counter() - start < self._settle:
            self._run(turn, self.calls)
        return self._run(turn, self.calls)


def measure(
    candidates: Sequence[Candidate],
    *,
    min_time: float,
    sampler: Callable[[Candidate], Sampler] = HostSampler,
) -> list[Timing]:
    """Time candidates, interleaved.

    Whoever has had the least time so far is next, so that all see the same ups and downs of the
    machine, and a slow one does not hold up the others.

    Parameters
    ----------
    candidates : sequence of Candidate
        Those without a function come back unmeasured.
    min_time : float
        Seconds that each gets at least; and at least its sampler's `Sampler.least` samples.
    sampler : callable
        Makes a candidate's sampler. A `CannotRunError` becomes the candidate's note.

    Returns
    -------
    list of Timing
        In the order of the candidates; median and quartiles over samples.
    """
    samplers: dict[int, Sampler] = {}
    samples: dict[int, list[float]] = {i: [] for i in range(len(candidates))}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i, candidate in enumerate(candidates):
            if candidate.function is not None:
                try:
                    samplers[i] = sampler(candidate)
                except CannotRunError as error:
                    candidate.note = str(error)
        spent = dict.fromkeys(samplers, 0.0)
        waiting = set(samplers)
        while waiting:
            i = min(waiting, key=spent.__getitem__)
            start = time.perf_counter()
            samples[i].append(samplers[i].sample(len(samples[i])))
            spent[i] += time.perf_counter() - start
            if spent[i] >= min_time and len(samples[i]) >= samplers[i].least:
                waiting.remove(i)
    finally:
        if collecting:
            gc.enable()
    return [_timing(c, samples[i], samplers.get(i)) for i, c in enumerate(candidates)]


def _timing(candidate: Candidate, samples: list[float], sampler: Sampler | None) -> Timing:
    quartiles = np.percentile(samples, [25, 50, 75]) if samples else [math.nan] * 3
    q1, median, q3 = map(float, quartiles)
    calls, sets = (sampler.calls, sampler.sets) if sampler else (0, 1)
    worst = math.nan
    if sets > 1:
        worst = max(float(np.median(samples[i::sets])) for i in range(sets))
    return Timing(
        candidate.name, median, q1, q3, len(samples), calls, candidate.exact, candidate.note, worst
    )
