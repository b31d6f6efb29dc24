"""Where TVMScript is parsed: not below whatever called for it."""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def parses_script(function: F) -> F:
    """Run a function that makes a ``T.prim_func`` in a thread of its own, whose stack is short.

    For every inlined function TVM's parser looks for itself among all its callers, and reads the
    source of each: below a test runner, or an engine, that takes longer than all the rest.
    """

    @functools.wraps(function)
    def in_thread(*args: Any, **kwargs: Any) -> Any:
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(function, *args, **kwargs).result()

    return in_thread  # type: ignore[return-value]
