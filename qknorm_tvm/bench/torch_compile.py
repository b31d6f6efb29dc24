"""torch.compile as a candidate: bounded in time, quiet, and a sentence where it fails."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .timing import TORCH_COMPILE, Candidate


def torch_compile(
    graph: Callable[..., Any],
    sets: Sequence[tuple[Any, ...]],
    is_exact: Callable[[Any], bool | None],
    *,
    limit: float = 60.0,
) -> Candidate:
    """Compile a graph for the shapes of its arguments.

    Parameters
    ----------
    graph : callable
        Operations of torch.
    sets : sequence of tuple
        Sets of arguments of one shape.
    is_exact : callable
        What to say of the outputs: `Candidate.exact`.
    limit : float
        Seconds that compiling may take.

    Returns
    -------
    Candidate
        Without a function where it failed.
    """
    import torch

    start = time.perf_counter()
    try:
        with _time_limit(limit), _quiet(), torch.no_grad():
            # Shapes fixed: the best that it can do. Guards of other shapes would cost it time.
            torch.compiler.reset()
            compiled = torch.compile(graph, dynamic=False)
            exact = is_exact(compiled(*sets[0]))
            compiled(*sets[0])
    except _TimeLimitError:
        return Candidate(TORCH_COMPILE, None, note=f"stopped: compiled for over {limit:g} s")
    except Exception as error:
        return Candidate(TORCH_COMPILE, None, note=f"failed: {_reason(error)}")
    note = f"compiled in {time.perf_counter() - start:.1f} s"
    return Candidate(TORCH_COMPILE, compiled, sets, exact, note)


def _reason(error: BaseException) -> str:
    """Return what an inductor error says, in one short line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _TimeLimitError):
            return "it took too long to compile"
        if type(cause).__name__ == "InvalidCxxCompiler" or "No working C++ compiler" in str(cause):
            return "no working C++ compiler (it needs g++)"
        cause = cause.__cause__ or cause.__context__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."


class _TimeLimitError(BaseException):
    """Not an ``Exception``, so that no handler of the code that it interrupts catches it."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the block after some seconds; only in the main thread, where signals arrive."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise _TimeLimitError

    before = signal.signal(signal.SIGALRM, interrupt)
    # Again and again: an exception may be swallowed where it is raised, in a compiler's callback.
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.compile's warnings and its compiler's chatter out of the tables."""
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere:
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            with contextlib.redirect_stderr(nowhere):
                yield
        finally:
            logging.disable(level)
