"""Where TVMScript is parsed: not below whatever called for it."""

from __future__ import annotations

import concurrent.futures
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from tvm.script.parser.core.parser import ScriptMacro


def _find_parser_def(macro: ScriptMacro) -> Any:
    """Return the parser that inlines a function: the nearest that a caller has.

    As TVM finds it, but for the source of every caller, which it looks up and throws away: 85 % of
    the time that a kernel of many inlined functions takes to parse.
    """
    frame = inspect.currentframe()
    while frame is not None:
        parser = frame.f_globals.get(ScriptMacro.parser_object_name)
        if parser is not None:
            return parser
        frame = frame.f_back
    raise RuntimeError(f"{ScriptMacro.parser_object_name} not available")


ScriptMacro._find_parser_def = _find_parser_def

_get_macro_def = ScriptMacro.get_macro_def


def _get_macro_def_once(macro: ScriptMacro) -> Any:
    """Return the syntax tree of a function to inline, which TVM makes anew wherever it is called.

    Parsing adds to it at most what a slice leaves out. A sixth of the time that a kernel takes.
    """
    known = vars(macro)
    if "_definition" not in known:
        known["_definition"] = _get_macro_def(macro)
    return known["_definition"]


ScriptMacro.get_macro_def = _get_macro_def_once

F = TypeVar("F", bound=Callable[..., Any])


def parses_script(function: F) -> F:
    """Run a function that makes a ``T.prim_func`` in a thread of its own, whose stack is short.

    TVM's parser reads the source of all its callers: below a test runner, or an engine, that takes
    longer than all the rest.
    """

    @functools.wraps(function)
    def in_thread(*args: Any, **kwargs: Any) -> Any:
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(function, *args, **kwargs).result()

    return in_thread  # type: ignore[return-value]
