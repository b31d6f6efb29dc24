"""Processes that build and time candidates: one that crashes or hangs takes no other along.

TVM's own pool of processes serves. MetaSchedule's builder and runners on top of it do not: the
builder's workers import every tensor intrinsic, and the runners time candidates one by one, where a
decision needs several timed in turns by one process.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import gc
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import TuningError
from ..spec import KernelSpec
from .bench import Built, open_bench
from .fleet import Fleet

#: Seconds that a task may take, and one on a fleet, with the wait for a server and the upload.
TIMEOUT_S, FLEET_TIMEOUT_S = 120, 480

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
    """Processes for tasks, restarted when one dies or hangs; `fresh`: one for every task."""

    def __init__(self, count: int, timeout_s: float = TIMEOUT_S, *, fresh: bool = False):
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

    def submit(self, function: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future:
        """Run a function that can be pickled in one of the processes."""
        future: concurrent.futures.Future = self._pool.submit(function, *arguments)
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        return future

    def close(self) -> None:
        """Kill the processes; tasks that wait are dropped."""
        for future in list(self._waiting):
            future.cancel()
        self._pool.shutdown(wait=False)


def result_or_cause(future: concurrent.futures.Future) -> Any:
    """Return a task's result, or as a string why it failed; KeyboardInterrupt at a signal."""
    while not future.done():
        check_signals()
        concurrent.futures.wait([future], timeout=0.2)
    check_signals()
    try:
        return future.result()
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


# ---- what runs in the processes ----------------------------------------------------------------

# Only the latest: the arrays of a large call take hundreds of megabytes.
_bench_here = functools.lru_cache(maxsize=1)(open_bench)


def time_group(
    fleet: Fleet | None, spec: KernelSpec, rows: int, group: Sequence[Built], rounds: int
) -> list[list[float]]:
    """Prove candidates exact and time them in turns; runs in a worker process."""
    if fleet is None:
        return _bench_here(spec, rows).time(group, rounds)
    try:
        fleet.check()
        return open_bench(spec, rows, fleet.connect()).time(group, rounds)
    except Exception as error:
        reason = cause(error)
    finally:
        # A session ends when nothing refers to it any more, tracebacks included.
        gc.collect()
    raise RuntimeError(reason)


def remote_cpu(fleet: Fleet) -> str:
    """Return LLVM's name of a server's CPU.

    Raises
    ------
    TuningError
        The server cannot tell.
    """
    pool = Pool(1, 30)
    try:
        return str(pool.submit(_remote_cpu, fleet).result())
    except Exception as error:
        raise TuningError(
            f"the server does not say which CPU it has ({cause(error)}); give its LLVM name with "
            "--device, such as x86_64-znver4"
        ) from None
    finally:
        pool.close()


def _remote_cpu(fleet: Fleet) -> str:
    return str(fleet.connect().get_function("target.llvm_get_system_cpu")())
