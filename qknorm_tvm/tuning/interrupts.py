"""Ctrl-C and SIGTERM, heard at once and acted on where it is safe.

An exception raised by a signal while TVM's own threads search ends the process in
``std::terminate``. So a signal is noted, and raised where this process waits for its workers.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_heard = threading.Event()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Defer signals to `check`, in the main thread; elsewhere there are none to hear."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _heard.clear()

    def note(*_: Any) -> None:
        _heard.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _heard.clear()


def check() -> None:
    """Raise KeyboardInterrupt if a signal has come."""
    if _heard.is_set():
        raise KeyboardInterrupt


def wait(future: concurrent.futures.Future) -> Any:
    """Return a future's result, or raise its exception, or KeyboardInterrupt."""
    while not future.done():
        check()
        concurrent.futures.wait([future], timeout=0.2)
    check()
    return future.result()
