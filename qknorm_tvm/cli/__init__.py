"""The command line, ``qknorm-tvm``: one module a command."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``qknorm-tvm`` with some arguments, by default the process's; returns its exit status."""
    from .app import run_command

    return run_command(arguments)
