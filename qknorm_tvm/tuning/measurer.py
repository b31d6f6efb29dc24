"""Configs in, times out: builds configs, has them timed, confirms one against the default."""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..build.configs import bucket_ends
from ..spec import KernelSpec
from .decision import MIN_GAIN, PROCESSES, Verdict, judge, paired_ratio
from .measure import Plan
from .target import Built, TunableTarget
from .workers import ComparisonError, Pool, Runner, build_task, outcome


class Measurer:
    """Builds and times configs of a target; a context that owns its processes and its files.

    Parameters
    ----------
    target : TunableTarget
    threads : int or None
        Threads of the measured calls.
    runner : Runner
    builders : int
        Processes that build.
    plan : Plan
        How long to measure.
    """

    def __init__(
        self,
        target: TunableTarget,
        threads: int | None,
        runner: Runner,
        *,
        builders: int = 1,
        plan: Plan | None = None,
    ):
        self._target, self._threads, self._runner = target, threads, runner
        self._count, self._plan = builders, plan or Plan()
        # Modules by row count and config: the decision times some of them again.
        self._built: dict[tuple[int, Any], Built] = {}

    def __enter__(self) -> Measurer:
        self._scratch = tempfile.mkdtemp(prefix="qknorm-tvm-tune-")
        self._builders = Pool(self._count)
        # Their imports take seconds, in which this process has enough to do.
        self._builders.warm()
        self._runner.warm()
        return self

    def __exit__(self, *_: object) -> None:
        self._builders.close()
        self._runner.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _build(self, spec: KernelSpec, rows: int, configs: Sequence[Any]) -> list[Built | str]:
        futures = {
            config: self._builders.submit(
                build_task, self._target.text, self._threads, spec.text, rows, config.to_dict(),
                self._scratch,
            )
            for config in configs if (rows, config) not in self._built
        }  # fmt: skip
        results = {config: outcome(future) for config, future in futures.items()}
        for config, built in results.items():
            if isinstance(built, Built):
                self._built[rows, config] = built
        return [self._built.get((rows, config)) or results[config] for config in configs]

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
        good = [module for module in built if isinstance(module, Built)]
        times = iter(self._runner.measure(spec, rows, good, self._plan))
        return [next(times) if isinstance(module, Built) else module for module in built]

    def compare(self, spec: KernelSpec, rows: int, configs: Sequence[Any]) -> list[list[float]]:
        """Return samples of configs taken in turns, in one fresh process.

        Raises
        ------
        ComparisonError
            One cannot be built or fails.
        """
        built = self._build(spec, rows, configs)
        for module in built:
            if not isinstance(module, Built):
                raise ComparisonError(module)
        return self._runner.compare(spec, rows, built, self._plan)  # type: ignore[arg-type]

    def fastest(
        self, spec: KernelSpec, rows: int, configs: Sequence[Any]
    ) -> tuple[Any, list[float]]:
        """Time configs in turns; return the fastest and its samples.

        Where the first, the default, cannot be told from the fastest, it is the default.
        """
        samples = self.compare(spec, rows, configs)
        medians = [statistics.median(times) for times in samples]
        best = medians.index(min(medians))
        if paired_ratio(samples[0], samples[best]).low <= 1:
            best = 0
        return configs[best], samples[best]

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

        Parameters
        ----------
        spec : KernelSpec
        rows : int
            Row count at which it must be faster. At the smallest and at the largest one of its
            bucket it must not be slower.
        config : object
        measured : sequence of int
            Row counts that are tuned for the spec; they bound the bucket.

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
