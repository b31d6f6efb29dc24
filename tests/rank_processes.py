"""Ranks as processes of a test: started together, and ended together where one of them hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

#: The script of `run_ranks`.
SCRIPT = Path(__file__).parent / "tensor_parallel" / "torchrun_layer.py"
#: torchrun gives its ranks 30 s to end before it kills them.
_SECONDS_TO_END = 45


def run_group(
    command: Sequence[str], *, seconds: float, logs: Callable[[], str] = lambda: ""
) -> tuple[int, str]:
    """Run a command with all that it starts, off the network.

    Parameters
    ----------
    command : sequence of str
    seconds : float
        After so many all are ended, and the test fails.
    logs : callable
        What else there is to show then.

    Returns
    -------
    (status, output)
        Standard output and error together, to their end: no process is left that could write.
    """
    process = subprocess.Popen(
        command,
        # gloo looks this machine's name up otherwise.
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # Not killed at once: torchrun's ranks are in sessions of their own, and it ends them.
        os.killpg(process.pid, signal.SIGTERM)
        try:
            output, _ = process.communicate(timeout=_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate(timeout=_SECONDS_TO_END)
        pytest.fail(f"not done after {seconds} s\n{output}\n{logs()}")
    return process.returncode, output


def run_ranks(world: int, *options: str, seconds: float) -> tuple[int, str]:
    """Start `SCRIPT` by torchrun, whose rendezvous is on a free port of the loopback."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    launcher += ["--local-addr", "127.0.0.1"]
    return run_group([*launcher, str(SCRIPT), *options], seconds=seconds)
