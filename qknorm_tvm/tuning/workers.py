"""Processes that build and measure candidates: one that crashes or hangs takes no other along.

TVM's own pool of processes serves; MetaSchedule's runners do not, because they time candidates one
by one, and a decision needs several timed in turns by one process.
"""

from __future__ import annotations

import concurrent.futures
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..spec import KernelSpec
from . import interrupts
from .measure import Bench, Plan
from .target import Built

#: Seconds that building or measuring a candidate may take.
_TIMEOUT_S = 120


class ComparisonError(Exception):
    """Candidates could not be timed in turns; the message says why."""


class Pool:
    """Processes for tasks, restarted when one dies or hangs.

    A future of `submit` raises ``TimeoutError`` when its task took too long, ``ChildProcessError``
    when the process died, or what the function raised.

    Parameters
    ----------
    count : int
        Processes.
    timeout_s : float
        Seconds after which a task's process is killed.
    fresh : bool
        Start a process for every task.
    """

    def __init__(self, count: int, timeout_s: float = _TIMEOUT_S, *, fresh: bool = False):
        from tvm.support.popen_pool import PopenPoolExecutor

        self._count = count
        # What a dying process prints would garble the progress; errors come back pickled.
        self._pool = PopenPoolExecutor(
            max_workers=count,
            timeout=timeout_s,
            maximum_process_uses=1 if fresh else 500,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._waiting: set[concurrent.futures.Future] = set()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future:
        """Run a module-level function in one of the processes."""
        future: concurrent.futures.Future = self._pool.submit(function, *arguments)
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        return future

    def warm(self) -> None:
        """Start the processes, so that they import TVM while something else is done."""
        for _ in range(self._count):
            self.submit(_import_all)

    def close(self) -> None:
        """Kill the processes; tasks that wait are dropped."""
        for future in list(self._waiting):
            future.cancel()
        self._pool.shutdown(wait=False)


def outcome(future: concurrent.futures.Future) -> Any:
    """Return a task's result, or as a string why it failed."""
    try:
        return interrupts.wait(future)
    except Exception as error:
        return cause(error)


def cause(error: BaseException) -> str:
    """Say in one line why a task failed."""
    if isinstance(error, TimeoutError):
        return "it took too long and was stopped"
    if isinstance(error, ChildProcessError):
        return "its process died"
    text = str(error)
    # A worker's exceptions come with their traceback as the message: the first line that is not
    # indented, after the last one's head, is what was raised.
    last = text.rpartition("Traceback (most recent call last)")[2] if "Traceback" in text else ""
    lines = [line for line in (last or text).splitlines()[bool(last) :] if line.strip()]
    plain = [line for line in lines if not line.startswith(" ")] or lines
    return plain[0].strip()[:300] if plain else type(error).__name__


# ---- what runs in the processes ------------------------------------------------------------


def _import_all() -> None:
    from . import cpu_target, space  # noqa: F401


def build_task(text: str, threads: int | None, spec: str, rows: int, config: Any, folder: str) -> (
    Built
):  # fmt: skip
    """Build a candidate."""
    from .targets import open_target

    target = open_target(text, threads=threads)
    directory = Path(tempfile.mkdtemp(dir=folder))
    return target.build(KernelSpec.from_text(spec), rows, target.config(config), directory)


def checked(bench: Bench, built: Built) -> Any:
    """Load a candidate and prove it exact."""
    module = bench.load(built.path)
    for rows in built.check_rows:
        bench.check(module, rows)
    return module


def measure(bench: Bench, built: Built, plan: Plan) -> list[float]:
    """Prove a candidate exact and time it."""
    return bench.seconds(checked(bench, built), plan)


def compare(bench: Bench, candidates: Sequence[Built], plan: Plan) -> list[list[float]]:
    """Prove candidates exact and time them in turns."""
    return bench.compare([checked(bench, built) for built in candidates], plan)


_bench: dict[tuple[str, str, int], Bench] = {}


def run_here(text: str, spec: str, rows: int, function: Callable[..., Any], *rest: Any) -> Any:
    """Call `measure` or `compare` with this process's buffers."""
    key = (text, spec, rows)
    if key not in _bench:
        from .targets import open_target

        # Only the latest: the arrays of a large call take hundreds of megabytes.
        _bench.clear()
        _bench[key] = open_target(text).bench(KernelSpec.from_text(spec), rows)
    return function(_bench[key], *rest)


# ---- who runs them --------------------------------------------------------------------------


class Runner:
    """Times candidates; `LocalRunner` here, `fleet.FleetRunner` elsewhere."""

    def measure(
        self, spec: KernelSpec, rows: int, candidates: Sequence[Built], plan: Plan
    ) -> list[list[float] | str]:
        """Return each candidate's samples, or why it failed.

        Raises
        ------
        TuningError
            No server is left.
        """
        return self._run(spec, rows, [(measure, built, plan) for built in candidates])

    def compare(
        self, spec: KernelSpec, rows: int, candidates: Sequence[Built], plan: Plan
    ) -> list[list[float]]:
        """Return samples of candidates taken in turns, in a fresh process.

        Raises
        ------
        ComparisonError
            A candidate fails.
        TuningError
            No server is left.
        """
        job = (compare, list(candidates), plan)
        (samples,) = self._run(spec, rows, [job], fresh=True)
        if isinstance(samples, str):
            raise ComparisonError(samples)
        result: list[list[float]] = samples
        return result

    def _run(
        self, spec: KernelSpec, rows: int, jobs: Sequence[tuple], *, fresh: bool = False
    ) -> list[Any]:
        """Return the result of each job, a function and what follows its `Bench`, or why not."""
        raise NotImplementedError

    def warm(self) -> None:
        """Start the processes."""
        raise NotImplementedError

    def close(self) -> None:
        """End the processes."""
        raise NotImplementedError


class LocalRunner(Runner):
    """Times candidates on this machine, one after the other, in processes of their own.

    Parameters
    ----------
    target : str
        Text of the target.
    """

    def __init__(self, target: str):
        self._target = target
        self._pool, self._fresh = Pool(1), Pool(1, fresh=True)

    def _run(
        self, spec: KernelSpec, rows: int, jobs: Sequence[tuple], *, fresh: bool = False
    ) -> list[Any]:
        pool = self._fresh if fresh else self._pool
        futures = [pool.submit(run_here, self._target, spec.text, rows, *job) for job in jobs]
        return [outcome(future) for future in futures]

    def warm(self) -> None:
        """Start the process that measures; fresh ones start when they are needed."""
        self._pool.warm()

    def close(self) -> None:
        """End the processes."""
        self._pool.close()
        self._fresh.close()
