"""The command line, ``qknorm-tvm``: one module a command."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``qknorm-tvm`` with some arguments, by default the process's; returns its exit status."""
    missing = [name for name in ("click", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"Error: the command line needs {' and '.join(missing)}: "
            "pip install 'qknorm-tvm[compile]'",
            file=sys.stderr,
        )
        return 2
    from .app import run_command

    return run_command(arguments)
