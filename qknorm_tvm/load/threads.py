"""How many threads CPU calls use: a setting of the process, whether a module is loaded or not.

The thread pool is in the modules (``native/pool.c``), one pool for all of them. Until the first of
them is loaded, a number that was asked for is kept here, and the default is computed here, by the
same rules.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

#: `kMaxThreads` of ``native/pool.c``.
_MOST = 1024

_lock = threading.Lock()
_pool: Any = None  # a loaded library through which the pool is reached
_asked = 0  # before there is one; 0: the default


def _new_lock() -> None:
    """Replace the lock: in a forked child the thread that held it is gone."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_new_lock)


def reach_pool(library: Any) -> None:
    """Reach the pool through a loaded CPU module's library, if none was loaded before."""
    global _pool
    with _lock:
        if _pool is None:
            if _asked:
                library.get_function("qknorm_set_num_threads")(_asked)
            _pool = library


def set_num_threads(threads: int) -> None:
    """Set how many threads CPU calls may use, in this process, in every module.

    Parameters
    ----------
    threads : int
        At least 1; or 0 for the default: ``TVM_NUM_THREADS`` where it is set, otherwise the
        processors that this process may use (affinity and cgroup quota).

    Raises
    ------
    TypeError, ValueError
        `threads` is no such number.
    """
    global _asked
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads must be an int, got {type(threads).__name__}")
    if threads < 0:
        raise ValueError(f"threads must be 0 or more, got {threads}")
    threads = min(threads, _MOST)
    with _lock:
        if _pool is None:
            _asked = threads
        else:
            _pool.get_function("qknorm_set_num_threads")(threads)


def get_num_threads() -> int:
    """Return how many threads CPU calls may use, the caller's included."""
    with _lock:
        if _pool is not None:
            return int(_pool.get_function("qknorm_get_num_threads")())
        return _asked or default_num_threads()


def default_num_threads() -> int:
    """Return how many threads the pool uses by default."""
    given = _leading_int(os.environ.get("TVM_NUM_THREADS", ""))
    if given >= 1:
        return min(given, _MOST)
    threads = len(os.sched_getaffinity(0))
    return max(1, min(threads, _cgroup_quota() or threads, _MOST))


def _leading_int(text: str) -> int:
    """Return what C's ``atoi`` does: the number that a text begins with, or 0."""
    match = re.match(r"[ \t\n\v\f\r]*([+-]?[0-9]+)", text)
    if match is None:
        return 0
    value = max(-(1 << 63), min(int(match[1]), (1 << 63) - 1)) & 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _read_ints(path: str) -> list[int]:
    """Return the numbers that a file begins with."""
    numbers = []
    try:
        for word in Path(path).read_text().split():
            numbers.append(int(word))
    except (OSError, ValueError):
        pass
    return numbers


def _cgroup_quota() -> int:
    """Return the processors' worth of time that cgroups grant, rounded up; 0 for no limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return 0
    best = 0
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, colon, group = rest.partition(":")
        if not colon or (controllers and "cpu" not in controllers):
            continue
        # Inside a container the group's own path is not mounted: its root then is the group.
        while True:
            if controllers:
                folder = f"/sys/fs/cgroup/cpu{group}"
                limit = _read_ints(f"{folder}/cpu.cfs_quota_us")[:1]
                limit += _read_ints(f"{folder}/cpu.cfs_period_us")[:1]
            else:
                limit = _read_ints(f"/sys/fs/cgroup{group}/cpu.max")
            if len(limit) >= 2 and limit[0] > 0 and limit[1] > 0:
                processors = min(-(-limit[0] // limit[1]), _MOST)
                best = min(best, processors) if best else processors
            parent, slash, _ = group.rpartition("/")  # a parent's quota binds too
            if not slash or not group:
                break
            group = parent
    return best
