"""This machine: processor, load, versions of libraries, and the user's folders."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import re
from pathlib import Path

from ._version import __version__


def user_folder(kind: str) -> Path:
    """Return the user's own folder for ``"cache"`` or ``"data"``, whether it exists or not.

    Raises
    ------
    FileNotFoundError
        The user has no home: neither ``$HOME`` nor the system says where it is.
    """
    import platformdirs

    find = {"cache": platformdirs.user_cache_dir, "data": platformdirs.user_data_dir}[kind]
    try:
        path = Path(find("qknorm-tvm", appauthor=False))
    except RuntimeError:  # some versions of platformdirs; others return "~/..." as it is
        path = Path()
    if not path.is_absolute():
        raise FileNotFoundError(errno.ENOENT, "this user has no home folder", "~")
    return path


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", text, re.MULTILINE))
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields and "model" in fields:
        # Virtual machines often hide the marketing name; the numbers tell.
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def usable_processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0))


def load_warning() -> str:
    """Return a sentence when other programs keep the processors busy, else ``""``."""
    load = os.getloadavg()[0]
    if load < 0.5 * usable_processors():
        return ""
    return (
        f"load average {load:.1f} on {usable_processors()} processors: other programs are running, "
        "so times are longer and spread wider than they would be"
    )


def library_versions() -> dict[str, str]:
    """Return the versions of what a measurement depends on, ``"not installed"`` included."""
    versions = {"qknorm-tvm": __version__, "python": platform.python_version()}
    for name in ("apache-tvm", "apache-tvm-ffi", "numpy", "torch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
