"""Temporary files: in memory where the system has such, otherwise where there is space."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def temporary_folder(
    least: int = 0, *, executable: bool = False
) -> tempfile.TemporaryDirectory[str]:
    """Make a temporary folder of this user's own.

    Below the temporary folder, or below ``/dev/shm`` where that one is full, read-only or missing.

    Parameters
    ----------
    least : int
        Bytes that must be free.
    executable : bool
        Whether code must be able to run from there.

    Raises
    ------
    OSError
        There is neither.
    """
    reasons = []
    for parent in (None, "/dev/shm"):
        try:
            parent = parent or tempfile.gettempdir()
            system = os.statvfs(parent)
            free = system.f_bavail * system.f_frsize
            if free < least:
                reason = f"{free >> 20} MiB free of {-(-least >> 20)} needed"
                raise OSError(errno.ENOSPC, reason, parent)
            if executable and system.f_flag & os.ST_NOEXEC:
                raise PermissionError(errno.EACCES, "mounted noexec", parent)
            return tempfile.TemporaryDirectory(prefix="qknorm-tvm-", dir=parent)
        except OSError as error:
            reasons.append(str(error))
    raise OSError(errno.ENOSPC, f"no temporary folder can be used ({'; '.join(reasons)})")


@contextmanager
def memory_file(name: str) -> Iterator[tuple[int, Path]]:
    """Make a file in memory: it needs no space on a disk, and no folder that code may run from.

    Yields its descriptor and a path to it; at the end the descriptor is closed.

    Raises
    ------
    OSError
        The system lets nobody have one, or shows no ``/proc``.
    """
    handle = os.memfd_create(name)
    try:
        path = Path(f"/proc/self/fd/{handle}")
        path.stat()
        yield handle, path
    finally:
        os.close(handle)
