"""Session-wide state: one cache folder, and modules compiled once for all tests (and workers).

``QKNORM_TVM_TEST_FOLDER`` names a folder in which what is compiled stays, for another session of
the same tests: .ci/run makes one for its parts.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Examples are the same in every run, and never fail for the time that they take. Here, because a
# test takes its settings when its file is imported.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("repeatable")

#: Set in the process that made the session's cache folder, and inherited by its workers.
_SESSION = "QKNORM_TVM_TEST_SESSION"
_SHARED = "QKNORM_TVM_TEST_FOLDER"


def pytest_configure(config: pytest.Config) -> None:
    if _SESSION not in os.environ:
        level = "-O0" if config.option.markexpr == "not slow" else "-O2"
        folder = config.stash[_folder] = _session_folder(level)
        os.environ[_SESSION] = folder
        os.environ["QKNORM_TVM_CACHE_DIR"] = os.path.join(folder, "cache")
        # The same code on every machine: no records of the one at hand.
        os.environ["QKNORM_TVM_TUNING_LOGS"] = ""
        os.environ.pop("QKNORM_TVM_DISABLE_CPU_FEATURES", None)
        if "CC" not in os.environ and shutil.which("gcc"):
            config.stash[_compiler] = os.environ["CC"] = quick_compiler(folder, level)


def _session_folder(level: str) -> str:
    """Return an empty folder; or one of sessions that compile the same, if they share any."""
    shared = os.environ.get(_SHARED)
    if not shared:
        return tempfile.mkdtemp(prefix="qknorm-tvm-tests-")
    folder = os.path.join(shared, _decides_code(level))
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return folder


def _decides_code(level: str) -> str:
    """Return a name for all that decides what tests compile on one machine.

    Nothing is imported for it: that would take seconds in a process that runs no test.
    """
    found = importlib.util.find_spec("qknorm_tvm")
    assert found is not None
    tests = Path(__file__).parent
    folders = [
        *map(Path, found.submodule_search_locations or ()),
        tests.parent / "schedules",
        tests,
    ]
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".c", ".h", ".cpp"):
                digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("apache-tvm", "apache-tvm-ffi")]
    rest = [level, os.environ.get("CC", ""), sys.version, *versions]
    return hashlib.sha256("\n".join([digest.hexdigest(), *rest]).encode()).hexdigest()[:16]


#: Files whose tests are long, or wait for one long compilation.
_FIRST = ("test_tuning", "test_structure_cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let these begin first: at the end a worker would wait for the other."""
    items.sort(key=lambda item: not item.path.name.startswith(_FIRST))


def pytest_unconfigure(config: pytest.Config) -> None:
    folder = config.stash.get(_folder, None)
    if folder is not None:
        if not os.environ.get(_SHARED):
            shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop(_SESSION, None)
        if config.stash.get(_compiler, None):
            os.environ.pop("CC", None)


def quick_compiler(folder: str, level: str) -> str:
    """Write a C compiler that compiles each file once for all tests; returns its path.

    The entry point is the larger part of what a small module takes to compile, and most tests are
    of other parts: a run without the slow ones does not optimise it. In the others it is as it is
    shipped.
    """
    path = os.path.join(folder, "quick-gcc")
    with open(path, "w") as file:
        file.write(_QUICK_COMPILER.replace("LEVEL", level))
    os.chmod(path, 0o700)
    return path


#: ``-c … SOURCE -o OBJECT``: what is kept has a name made of all that it reads of this project.
_QUICK_COMPILER = """#!/bin/sh
for argument do
    shift
    [ "$argument" = -O2 ] && argument=LEVEL
    set -- "$@" "$argument"
    [ "$last" = -o ] && object=$argument
    case $argument in *.c) source=$argument ;; esac
    last=$argument
done
[ "$1" = -c ] || exec gcc "$@"
case ${source##*/} in
    entry.c) operations=${object%/*}/operations.h ;;
    pool.c) operations= ;;
    *) exec gcc "$@" ;;
esac
kept=$(cat "$source" "${source%/*}/module.h" $operations | sha256sum)
kept=${0%/*}/${kept%% *}.o
if ! [ -f "$kept" ]; then
    gcc "$@" || exit
    cp "$object" "$kept.$$" && mv "$kept.$$" "$kept"
fi
cp "$kept" "$object"
"""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Fail a test that skips for want of a framework and is not marked as one that needs it.

    Where frameworks are installed .ci/run selects tests by the marker: such a test would run
    nowhere.
    """
    report = yield
    marked = item.get_closest_marker("frameworks") or item.get_closest_marker("gpu")
    if report.skipped and not marked:
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        if re.search(r"\b(torch|transformers|jax)\b.*(not installed|No module)", reason, re.I):
            report.outcome = "failed"
            report.longrepr = f"needs the marker `frameworks`: {reason}"
    return report


_folder = pytest.StashKey[str]()
_compiler = pytest.StashKey[str]()
