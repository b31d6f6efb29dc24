"""What the plugins of serving engines share: versions, switches and what they log. No torch.

In: an engine that has loaded a plugin. Out: whether the plugin may change it, and one line in the
engine's log for everything that it does or leaves.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

#: Versions of each engine that the plugins may change: from the first, below the second.
TESTED = {
    # Run with 0.32.0; in 0.33.0 the files that are changed, or whose classes are, are the same.
    "vllm": ((0, 32, 0), (0, 34, 0)),
    "sglang": ((0, 5, 23), (0, 5, 24)),
}
#: ``0`` leaves every engine as it is.
SWITCH = "QKNORM_TVM_ENGINES"
#: How mean squares are computed: ``fused``, or ``torch`` as the engine's own code does.
STATISTICS = "QKNORM_TVM_ENGINE_STATISTICS"

_said: set[tuple[str, str]] = set()


def say(engine: str, text: str, level: int = logging.INFO) -> None:
    """Write a line to an engine's log, once in a process.

    Engines configure the logger of their own name, so that only loggers below it are seen.
    """
    if (engine, text) not in _said:
        _said.add((engine, text))
        logging.getLogger(f"{engine}.qknorm_tvm").log(level, "qknorm-tvm: %s", text)


def statistics() -> str:
    """Return how mean squares are computed: ``"fused"`` or ``"torch"``."""
    return os.environ.get(STATISTICS) or "fused"


def may_change(engine: str) -> bool:
    """Return whether a plugin may change an engine, and say why not where that is a surprise."""
    switch = os.environ.get(SWITCH) or "1"
    if switch == "0":
        return False
    for name, value, known in (
        (SWITCH, switch, ("0", "1")),
        (STATISTICS, statistics(), ("fused", "torch")),
    ):
        if value not in known:
            expected = " or ".join(known)
            leave(engine, f"{name} must be {expected}, got {value!r}")
            return False
    version = str(getattr(importlib.import_module(engine), "__version__", "of no known version"))
    first, end = TESTED[engine]
    if not first <= _release(version) < end:
        tested = ".".join(map(str, first)), ".".join(map(str, end))
        leave(engine, f"it is tested with {engine} {tested[0]} to below {tested[1]}, got {version}")
        return False
    return True


def leave(engine: str, reason: str) -> None:
    """Say that the engine's own code stays as it is, and why."""
    say(engine, f"{engine} is left as it is: {reason}", logging.WARNING)


def _release(version: str) -> tuple[int, ...]:
    """Return the three numbers of a release, ``(0, 0, 0)`` for what has none.

    A development version is of the release that it leads to: its code may be that one's already.
    """
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return tuple(int(number or 0) for number in numbers.groups()) if numbers else (0, 0, 0)


# ---- changing modules when they are imported ----------------------------------------------------

Change = Callable[[ModuleType], None]


def when_imported(engine: str, changes: Mapping[str, Change]) -> None:
    """Call a function with each of some of an engine's modules, once it is imported, or now.

    A plugin runs before an engine has chosen its model: importing all models then would cost every
    process of the engine seconds, and touch devices too early. Where a module is not what the
    function expects, the engine goes on without the change, and a line says so.
    """
    later = {}
    for name, change in changes.items():
        guarded = _guarded(engine, change)
        if name in sys.modules:
            guarded(sys.modules[name])
        else:
            later[name] = guarded
    if later:
        sys.meta_path.insert(0, _Finder(later))


def _guarded(engine: str, change: Change) -> Change:
    def guarded(module: ModuleType) -> None:
        try:
            change(module)
        except (AttributeError, ImportError) as error:
            leave(engine, f"{module.__name__} is not as expected: {error}")

    return guarded


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules as the finders after it do, and has a function called when one has run."""

    def __init__(self, changes: dict[str, Change]):
        self.changes = changes

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec that the other finders have, with a loader that calls the function."""
        change = self.changes.pop(fullname, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(fullname)  # asks this finder too, which knows it no more
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, change)
        return spec


class _Loader(importlib.abc.Loader):
    """Runs a module by its own loader, and a function after it; then the module is the loader's."""

    def __init__(self, loader: Any, change: Change):
        self.loader, self.change = loader, change

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.change(module)
