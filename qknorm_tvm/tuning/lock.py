"""One tuner a folder: two would corrupt its database."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from ..errors import TuningError


class FolderLock:
    """Holds a folder of logs, and tells others who does.

    The lock is the operating system's: a process that is killed frees it. What others read about
    its holder lies beside it.

    Parameters
    ----------
    folder : Path
        It must exist.
    """

    def __init__(self, folder: Path):
        import filelock

        self.folder = folder
        self._lock = filelock.FileLock(folder / ".lock", mode=0o644)
        self._holder = folder / ".lock-holder"

    def __enter__(self) -> FolderLock:
        import filelock

        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise TuningError(
                f"{self.folder} is in use by {self._who()}; wait for it, stop it, or give another "
                "folder with --logs"
            ) from None
        about = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._holder.write_text(json.dumps(about))
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.unlink(missing_ok=True)
        self._lock.release()

    def _who(self) -> str:
        try:
            about = json.loads(self._holder.read_text())
            return f"process {about['pid']} on {about['host']} since {about['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            # It holds the lock, and is just about to say so.
            return "another process"
