"""Configs in, times out: builds configs, has them timed, confirms one against the default."""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..build.configs import bucket_ends
from ..machine import usable_processors
from ..spec import KernelSpec
from .bench import Built
from .decision import MIN_GAIN, PROCESSES, Verdict, judge, paired_ratio
from .fleet import Fleet
from .targets import TunableTarget
from .workers import FLEET_TIMEOUT_S, TIMEOUT_S, Pool, result_or_cause, time_group

#: Samples at each placement of the tensors where candidates are compared.
_ROUNDS = 2
#: Times that a candidate is tried on a fleet, each on a server that is free.
_FLEET_ATTEMPTS = 3


class ComparisonError(Exception):
    """Candidates could not be timed in turns; the message says why."""


class Measurer:
    """Builds configs here and times them, here or on a fleet.

    It is a context, which owns its processes and its files.
    """

    def __init__(self, target: TunableTarget, fleet: Fleet | None = None, workers: int = 1):
        self._target, self._fleet, self._workers = target, fleet, workers
        # Modules by row count and config: the decision times some of them again.
        self._built: dict[tuple[int, Any], Built] = {}

    def __enter__(self) -> Measurer:
        self._scratch = Path(tempfile.mkdtemp(prefix="qknorm-tvm-tune-"))
        self._builders = Pool(usable_processors())
        timeout_s = TIMEOUT_S if self._fleet is None else FLEET_TIMEOUT_S
        self._timers = Pool(self._workers, timeout_s)
        self._fresh_timers = Pool(self._workers, timeout_s, fresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._builders, self._timers, self._fresh_timers):
            pool.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _build(self, spec: KernelSpec, rows: int, configs: Sequence[Any]) -> list[Built | str]:
        """Return each config's module, or why it cannot be built."""
        futures = {
            config: self._builders.submit(
                self._target.build, spec, rows, config, Path(tempfile.mkdtemp(dir=self._scratch))
            )
            for config in configs if (rows, config) not in self._built
        }  # fmt: skip
        results = {config: result_or_cause(future) for config, future in futures.items()}
        for config, built in results.items():
            if isinstance(built, Built):
                self._built[rows, config] = built
        return [self._built.get((rows, config)) or results[config] for config in configs]

    def _time(
        self,
        spec: KernelSpec,
        rows: int,
        groups: Sequence[Sequence[Built]],
        rounds: int,
        *,
        fresh: bool = False,
    ) -> list[Any]:
        """Time groups of modules: those of a group in turns, by one process or session.

        `fresh`: by a process that did nothing else; a server forks for each session anyway. Returns
        of each group its modules' samples, or as a string why one of them failed.
        """
        pool = self._fresh_timers if fresh else self._timers
        results: list[Any] = [""] * len(groups)
        left = list(range(len(groups)))
        for _ in range(1 if self._fleet is None else _FLEET_ATTEMPTS):
            if self._fleet is not None and left:
                self._fleet.wait_for_server()
            futures = [
                pool.submit(time_group, self._fleet, spec, rows, groups[index], rounds)
                for index in left
            ]
            for index, future in zip(left, futures, strict=True):
                results[index] = result_or_cause(future)
            left = [index for index in left if isinstance(results[index], str)]
        return results

    def forget(self) -> None:
        """Delete what was built, between one spec or row count and the next."""
        for built in self._built.values():
            shutil.rmtree(Path(built.path).parent, ignore_errors=True)
        self._built.clear()

    def measure(
        self, spec: KernelSpec, rows: int, configs: Sequence[Any]
    ) -> list[list[float] | str]:
        """Return each config's samples, or why it failed."""
        built = self._build(spec, rows, configs)
        groups = [[module] for module in built if isinstance(module, Built)]
        times = iter(self._time(spec, rows, groups, rounds=1))
        results = [next(times) if isinstance(module, Built) else module for module in built]
        return [result if isinstance(result, str) else result[0] for result in results]

    def compare(self, spec: KernelSpec, rows: int, configs: Sequence[Any]) -> list[list[float]]:
        """Return samples of configs taken in turns, in one fresh process, or a ComparisonError."""
        group: list[Built] = []
        for built in self._build(spec, rows, configs):
            if isinstance(built, str):
                raise ComparisonError(built)
            group.append(built)
        (samples,) = self._time(spec, rows, [group], _ROUNDS, fresh=True)
        if isinstance(samples, str):
            raise ComparisonError(samples)
        times: list[list[float]] = samples
        return times

    def fastest(self, spec: KernelSpec, rows: int, configs: Sequence[Any]) -> Any:
        """Time configs in turns; return the fastest, or the first where it cannot be told from it.

        Raises
        ------
        ComparisonError
            One cannot be built or fails.
        """
        samples = self.compare(spec, rows, configs)
        medians = [statistics.median(times) for times in samples]
        best = medians.index(min(medians))
        return configs[best if paired_ratio(samples[0], samples[best]).low > 1 else 0]

    def against_default(self, spec: KernelSpec, rows: int, config: Any, least: float) -> Verdict:
        """Time a config and the default in turns, in `PROCESSES` fresh processes.

        One process is enough where the gain is not above `least` in it.
        """
        pair = [self._target.default(spec, rows), config]
        processes = [self.compare(spec, rows, pair)]
        if judge(rows, processes).gain.low > least:
            processes += [self.compare(spec, rows, pair) for _ in range(PROCESSES - 1)]
        return judge(rows, processes)

    def confirm(
        self, spec: KernelSpec, rows: int, config: Any, measured: Sequence[int]
    ) -> tuple[list[Verdict], str]:
        """Time a config against the default where a build would use it.

        At `rows` it must be faster; at the smallest and at the largest row count of its bucket,
        which the `measured` row counts bound, it must not be slower.

        Returns
        -------
        verdicts : list of Verdict
            The first is at `rows`.
        reason : str
            Why the default is to be kept; empty where the config holds.

        Raises
        ------
        ComparisonError
            The config or the default fails.
        """
        verdicts = [self.against_default(spec, rows, config, MIN_GAIN)]
        if not verdicts[0].faster:
            return verdicts, verdicts[0].reason()
        for end in bucket_ends(rows, measured):
            if end != rows and self._target.default(spec, end) != config:
                verdicts.append(self.against_default(spec, end, config, 0))
                if verdicts[-1].slower:
                    return verdicts, verdicts[-1].reason()
        return verdicts, ""
