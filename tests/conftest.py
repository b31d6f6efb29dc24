"""Session-wide state: one cache folder, and modules compiled once for all tests (and workers)."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator

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


def pytest_configure(config: pytest.Config) -> None:
    if _SESSION not in os.environ:
        folder = tempfile.mkdtemp(prefix="qknorm-tvm-tests-")
        config.stash[_folder] = folder
        os.environ[_SESSION] = folder
        os.environ["QKNORM_TVM_CACHE_DIR"] = os.path.join(folder, "cache")
        # The same code on every machine: no records of the one at hand.
        os.environ["QKNORM_TVM_TUNING_LOGS"] = ""
        os.environ.pop("QKNORM_TVM_DISABLE_CPU_FEATURES", None)


def pytest_unconfigure(config: pytest.Config) -> None:
    folder = config.stash.get(_folder, None)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop(_SESSION, None)


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
