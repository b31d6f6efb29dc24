"""Tuning through a tracker with servers of our own, on the loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qknorm_tvm import KernelSpec, TuningError, tune
from qknorm_tvm.tuning import records, session
from qknorm_tvm.tuning.fleet import Fleet
from qknorm_tvm.tuning.report import Reporter

for _name in ("cloudpickle", "psutil", "tornado"):
    pytest.importorskip(_name, reason="tuning needs the extra qknorm-tvm[tune]")

SPEC = KernelSpec(q_cols=96, k_cols=64, target="cpu")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen]:
    """Run a module of TVM's in a process group of its own: the real server is a child."""
    environment = {**os.environ, "TVM_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [sys.executable, "-m", *arguments], start_new_session=True, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield started
    finally:
        kill(started)


def kill(started: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    started.wait()


class Rack:
    """A tracker and two servers."""

    def __init__(self, stack: contextlib.ExitStack):
        self.port = free_port()
        self._stack = stack
        stack.enter_context(
            process("tvm.exec.rpc_tracker", "--host", "127.0.0.1", "--port", str(self.port),
                    "--port-end", str(self.port + 1))
        )  # fmt: skip
        self.servers = [self.serve(), self.serve()]
        self.wait(2)

    def serve(self) -> subprocess.Popen:
        port = free_port()
        return self._stack.enter_context(
            process("tvm.exec.rpc_server", "--host", "127.0.0.1", "--port", str(port),
                    "--port-end", str(port + 1), "--tracker", self.address, "--key", "cpu")
        )  # fmt: skip

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def wait(self, count: int) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with contextlib.suppress(TuningError):
                if Fleet("127.0.0.1", self.port, "cpu").keys() == ["cpu"] * count:
                    return
            time.sleep(0.3)
        raise AssertionError(f"there never were {count} servers")


@pytest.fixture(scope="module")
def rack() -> Iterator[Rack]:
    with contextlib.ExitStack() as stack:
        yield Rack(stack)


class AfterBatches(Reporter):
    """Calls a function when a batch has been measured, the next one after the next batch."""

    def __init__(self, *acts: Callable[[], None]):
        # After the default, which is measured alone.
        self._acts = iter((lambda: None, *acts))

    def status(self, text: str) -> None:
        next(self._acts)()


def test_a_wrong_key_is_said_within_seconds(rack: Rack, tmp_path: Path) -> None:
    """TVM itself waits for ever."""
    began = time.monotonic()
    with pytest.raises(TuningError, match=r"no server with key 'gpu' \(it has 'cpu'\); start one"):
        tune([SPEC], tracker=rack.address, key="gpu", logs=tmp_path)
    assert time.monotonic() - began < 20


def test_what_is_no_tracker_is_said_within_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: listener.accept()[0].recv(4), daemon=True)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(TuningError, match=f"no tracker at {address}"):
            tune([SPEC], tracker=address, key="cpu", logs=tmp_path)
        assert time.monotonic() - began < 20


@pytest.mark.slow
def test_servers_that_die_one_after_the_other(
    rack: Rack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One dead: its candidates go elsewhere. All dead: a clear end, and a run that goes on."""
    monkeypatch.setattr(session, "_BATCH", 6)  # still several for each server
    arguments = {"rows": (16,), "tracker": rack.address, "key": "cpu", "workers": 2,
                 "cost_model": "random", "logs": tmp_path}  # fmt: skip
    one_dead: list[float] = []
    first, second = rack.servers

    def kill_one() -> None:
        kill(first)
        one_dead.append(time.monotonic())

    def kill_the_other() -> None:
        one_dead.append(time.monotonic())
        kill(second)

    with pytest.raises(TuningError, match=r"no server with key 'cpu' is left .*same command again"):
        tune([SPEC], trials=40, reporter=AfterBatches(kill_one, kill_the_other), **arguments)
    began, ended = one_dead
    assert ended - began < 120
    (folder,) = tmp_path.iterdir()
    # The default and both batches: no candidate failed for want of the first server.
    assert len(records.read_logs(folder).records) == 13

    rack.serve()
    rack.wait(1)
    summary = tune([SPEC], trials=15, **arguments)
    assert (summary.measured, summary.failed, summary.reused) == (2, 0, 13), summary.first_failure
    assert len(records.read_logs(folder).records) == 15
