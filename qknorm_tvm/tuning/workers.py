"""Processes that build and time candidates: one that crashes or hangs takes no other along.

TVM's own pool of processes serves. MetaSchedule's builder and runners on top of it do not: the
builder's workers import every tensor intrinsic, and the runners time candidates one by one, where a
decision needs several timed in turns by one process.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..spec import KernelSpec
from .bench import Built, open_bench

#: Seconds that building or timing a candidate may take.
_TIMEOUT_S = 120

_signalled = threading.Event()


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Note Ctrl-C and SIGTERM, for `check_signals` to raise where it is safe.

    An exception raised by a signal while TVM's own threads search ends the process in
    ``std::terminate``. In another thread than the main one there are no signals to hear.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _signalled.clear()
    before = {
        number: signal.signal(number, lambda *_: _signalled.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _signalled.clear()


def check_signals() -> None:
    """Raise KeyboardInterrupt if a signal has come."""
    if _signalled.is_set():
        raise KeyboardInterrupt


class Pool:
    """Processes for tasks, restarted when one dies or hangs.

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

        # What a dying process prints would garble the progress; errors come back pickled.
        self._pool = PopenPoolExecutor(
            max_workers=count,
            timeout=timeout_s,
            maximum_process_uses=1 if fresh else 500,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._waiting: set[concurrent.futures.Future] = set()
        if not fresh:
            # Their imports take seconds, in which this process has enough to do.
            for _ in range(count):
                self.submit(_import_all)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future:
        """Run a module-level function in one of the processes."""
        future: concurrent.futures.Future = self._pool.submit(function, *arguments)
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        return future

    def close(self) -> None:
        """Kill the processes; tasks that wait are dropped."""
        for future in list(self._waiting):
            future.cancel()
        self._pool.shutdown(wait=False)


def _import_all() -> None:
    from . import targets  # noqa: F401


def wait(future: concurrent.futures.Future) -> Any:
    """Return a task's result.

    Raises
    ------
    TimeoutError
        It took too long.
    ChildProcessError
        Its process died.
    KeyboardInterrupt
        A signal has come.
    Exception
        What the function raised.
    """
    while not future.done():
        check_signals()
        concurrent.futures.wait([future], timeout=0.2)
    check_signals()
    return future.result()


def result_or_cause(future: concurrent.futures.Future) -> Any:
    """Return a task's result, or as a string why it failed."""
    try:
        return wait(future)
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


# Only the latest: the arrays of a large call take hundreds of megabytes.
_bench = functools.lru_cache(maxsize=1)(open_bench)


def time_here(
    spec: KernelSpec, rows: int, candidates: Sequence[Built], rounds: int
) -> list[list[float]]:
    """Prove candidates exact and time them in turns, with this process's buffers."""
    return _bench(spec, rows).time(candidates, rounds)


class LocalRunner:
    """Times candidates on this machine, in processes of their own."""

    def __init__(self) -> None:
        self._pool, self._fresh = Pool(1), Pool(1, fresh=True)

    def time(
        self,
        spec: KernelSpec,
        rows: int,
        groups: Sequence[Sequence[Built]],
        rounds: int,
        *,
        fresh: bool = False,
    ) -> list[Any]:
        """Time groups of candidates, one group after the other, those of a group in turns.

        Parameters
        ----------
        spec : KernelSpec
        rows : int
        groups : sequence
            If one candidate of a group fails, the group does.
        rounds : int
            Samples at each placement of the tensors.
        fresh : bool
            Take a process that did nothing else.

        Returns
        -------
        list
            Of each group its candidates' samples, or as a string why it failed.
        """
        pool = self._fresh if fresh else self._pool
        futures = [pool.submit(time_here, spec, rows, group, rounds) for group in groups]
        return [result_or_cause(future) for future in futures]

    def close(self) -> None:
        """End the processes."""
        self._pool.close()
        self._fresh.close()
