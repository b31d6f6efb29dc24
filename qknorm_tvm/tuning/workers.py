"""Processes that build and measure candidates: one that crashes or hangs takes no other along."""

from __future__ import annotations

import concurrent.futures
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..spec import KernelSpec
from . import interrupts
from .measure import Plan
from .target import Built


class Workers:
    """Worker processes, each fed by a thread of ours, restarted when one dies.

    Parameters
    ----------
    count : int
        Processes.
    timeout_s : float
        Seconds after which a task's process is killed.
    """

    def __init__(self, count: int, timeout_s: float):
        self._count = count
        self._threads = concurrent.futures.ThreadPoolExecutor(count)
        self._timeout_s = timeout_s
        self._local = threading.local()
        self._lock = threading.Lock()
        self._workers: list[Any] = []
        self._closed = False

    def _worker(self) -> Any:
        from tvm.support.popen_pool import PopenWorker

        worker = getattr(self._local, "worker", None)
        if worker is None:
            with self._lock:
                if self._closed:
                    raise RuntimeError("the workers are closed")
                # What a dying process prints would garble the progress; errors come back pickled.
                worker = PopenWorker(
                    maximum_uses=500, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                self._workers.append(worker)
            self._local.worker = worker
        return worker

    def _run(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        worker = self._worker()
        worker.send(function, arguments, timeout=self._timeout_s)
        return worker.recv()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future:
        """Run a module-level function in a worker process.

        The future raises ``TimeoutError`` when it took too long, ``ChildProcessError`` when its
        process died, or what the function raised.
        """
        return self._threads.submit(self._run, function, arguments)

    def warm(self) -> None:
        """Start the processes, so that they import TVM while something else is done."""
        for _ in range(self._count):
            self.submit(_warm_task)

    def close(self) -> None:
        """Kill the processes; tasks that wait are dropped."""
        with self._lock:
            self._closed = True
            workers = list(self._workers)
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()


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


def _warm_task() -> None:
    from . import (
        cpu_target,  # noqa: F401
        measure,  # noqa: F401
        space,  # noqa: F401
        trace,  # noqa: F401
    )


def build_task(text: str, threads: int | None, spec: str, rows: int, config: Any, folder: str) -> (
    Built
):  # fmt: skip
    """Build a candidate."""
    from .target import open_target

    target = open_target(text, threads=threads)
    directory = Path(tempfile.mkdtemp(dir=folder))
    return target.build(KernelSpec.from_text(spec), rows, target.config(config), directory)


_bench: dict[tuple[str, str, int], Any] = {}


def _bench_of(text: str, spec: str, rows: int) -> Any:
    key = (text, spec, rows)
    if key not in _bench:
        from .target import open_target

        # One at a time: the arrays of a large call take hundreds of megabytes.
        _bench.clear()
        _bench[key] = open_target(text).bench(KernelSpec.from_text(spec), rows)
    return _bench[key]


def measure_task(text: str, spec: str, rows: int, built: Built, plan: Plan) -> list[float]:
    """Check a candidate and time it, in this process."""
    bench = _bench_of(text, spec, rows)
    module = bench.load(built.path)
    for check_rows in built.check_rows:
        bench.check(module, check_rows)
    return bench.seconds(module, plan)


def compare_task(
    text: str, spec: str, rows: int, paths: Sequence[str], plan: Plan, rounds: int
) -> list[list[float]]:
    """Time candidates in turns, in this process."""
    bench = _bench_of(text, spec, rows)
    return bench.compare([bench.load(path) for path in paths], plan, rounds)


class LocalRunner:
    """Measures candidates on this machine, one after the other, in a process of their own.

    Parameters
    ----------
    target : str
        Text of the target.
    timeout_s : float
        Seconds that a candidate may take.
    """

    def __init__(self, target: str, timeout_s: float):
        self._target = target
        self._workers = Workers(1, timeout_s)

    def measure(
        self, spec: KernelSpec, rows: int, built: Sequence[Built], plan: Plan
    ) -> list[list[float] | str]:
        """Return each candidate's samples, or why it failed."""
        futures = [
            self._workers.submit(measure_task, self._target, spec.text, rows, one, plan)
            for one in built
        ]
        return [outcome(future) for future in futures]

    def compare(
        self, spec: KernelSpec, rows: int, paths: Sequence[str], plan: Plan, rounds: int
    ) -> list[list[float]]:
        """Return samples of candidates taken in turns."""
        task = self._workers.submit(
            compare_task, self._target, spec.text, rows, list(paths), plan, rounds
        )
        found: list[list[float]] = interrupts.wait(task)
        return found

    def warm(self) -> None:
        """Start the process."""
        self._workers.warm()

    def close(self) -> None:
        """End the process."""
        self._workers.close()


def outcome(future: concurrent.futures.Future) -> Any:
    """Return a task's result, or as a string why it failed."""
    try:
        return interrupts.wait(future)
    except Exception as error:
        return cause(error)
