"""Measuring on other machines, through TVM's RPC tracker and servers.

A server runs whatever code it is sent. Nothing here starts one, or listens: who starts a tracker or
a server says on which address, and 127.0.0.1 is what the documentation shows.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import socket
import time
from collections.abc import Sequence
from typing import Any

from ..errors import TuningError
from ..spec import KernelSpec
from . import interrupts
from .workers import Pool, Runner, cause

#: Seconds to wait for an answer of the tracker.
_TRACKER_S = 5
#: Times that a candidate is tried elsewhere when its server is lost.
_ATTEMPTS = 3
#: Seconds to wait for a server to come back when none is left: one that ends a session starts
#: anew and registers again, which took over 2 s on a busy machine.
_GRACE_S = 10
#: Candidates that one session measures: others may wait for its server.
_CHUNK = 4
#: Seconds that a candidate may take, its upload included.
_TIMEOUT_S = 120


@dataclasses.dataclass(frozen=True)
class Fleet:
    """A tracker, and the key under which the servers to use are registered.

    Parameters
    ----------
    host : str
    port : int
    key : str
    """

    host: str
    port: int
    key: str

    @classmethod
    def parse(cls, tracker: str, key: str | None) -> Fleet:
        """Read ``HOST:PORT``.

        Raises
        ------
        ValueError
            It is no such thing, or there is no key.
        """
        host, colon, port = tracker.rpartition(":")
        if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"tracker must be HOST:PORT, got {tracker!r}")
        if not key:
            raise ValueError("key must name the servers to use, as given to rpc_server --key")
        return cls(host, int(port), key)

    def _config(self) -> Any:
        from tvm.s_tir.meta_schedule.runner import RPCConfig

        return RPCConfig(
            tracker_host=self.host,
            tracker_port=self.port,
            tracker_key=self.key,
            session_timeout_sec=_TRACKER_S,
        )

    def count(self) -> int:
        """Return how many servers there are; it never hangs.

        Raises
        ------
        TuningError
            No tracker answers.
        """
        self._probe()
        try:
            return int(self._config().count_num_servers(allow_missing=True))
        except (ValueError, RuntimeError, OSError) as error:
            raise TuningError(
                f"the tracker at {self.host}:{self.port} does not answer as one "
                f"({cause(error)}); check the address"
            ) from None

    def _probe(self) -> None:
        # TVM's own connection retries for a minute; what listens but is no tracker hangs it.
        try:
            with socket.create_connection((self.host, self.port), timeout=_TRACKER_S) as connection:
                connection.settimeout(_TRACKER_S)
                magic = (0x2F271).to_bytes(4, "little")
                connection.sendall(magic)
                if connection.recv(4) != magic:
                    raise OSError("what listens there is no TVM tracker")
        except OSError as error:
            raise TuningError(
                f"no tracker at {self.host}:{self.port} ({error}); start one with: python -m "
                f"tvm.exec.rpc_tracker --host {self.host} --port {self.port} --port-end "
                f"{self.port + 9}"
            ) from None

    def check(self) -> int:
        """Return how many servers there are, at least one.

        Raises
        ------
        TuningError
            There is no tracker, or no server with the key.
        """
        servers = self.count()
        if not servers:
            raise TuningError(
                f"the tracker at {self.host}:{self.port} has no server with key {self.key!r}"
                f"{self._other_keys()}; start one with: python -m tvm.exec.rpc_server --host "
                f"127.0.0.1 --port 9290 --port-end 9299 --tracker {self.host}:{self.port} --key "
                f"{self.key}"
            )
        return servers

    def _other_keys(self) -> str:
        try:
            info = self._config().connect_tracker().summary()["server_info"]
        except (ValueError, RuntimeError, OSError, KeyError):
            return ""
        keys = sorted({str(server["key"]).partition(":")[2] for server in info})
        return f" (it has {', '.join(map(repr, keys))})" if keys else ""

    def connect(self) -> Any:
        """Return a session on a free server; waits for one while there are any."""
        return self._config().connect_tracker().request(self.key, session_timeout=600)


class FleetRunner(Runner):
    """Measures candidates on a fleet; one that loses its server is tried elsewhere.

    Parameters
    ----------
    fleet : Fleet
    target : str
        Text of the target.
    count : int
        Sessions at a time.
    """

    def __init__(self, fleet: Fleet, target: str, count: int):
        self._fleet, self._target, self._count = fleet, target, count
        self._pool = Pool(count, _CHUNK * _TIMEOUT_S)

    def _run(
        self, spec: KernelSpec, rows: int, jobs: Sequence[tuple], *, fresh: bool = False
    ) -> list[Any]:
        # A server forks for each session, and a session is for one call of this: all are fresh.
        results: list[Any] = ["" for _ in jobs]
        attempts = dict.fromkeys(range(len(jobs)), _ATTEMPTS)
        # Several jobs share a session at first; after a loss each has its own.
        size = min(_CHUNK, math.ceil(len(jobs) / self._count))
        while attempts:
            left = list(attempts)
            chunks = [left[start : start + size] for start in range(0, len(left), size)]
            futures = [
                self._pool.submit(_run_remotely, self._fleet, self._target, spec.text, rows,
                                  [jobs[index] for index in chunk])
                for chunk in chunks
            ]  # fmt: skip
            for chunk, future in zip(chunks, futures, strict=True):
                try:
                    done, why = interrupts.wait(future)
                except Exception as error:
                    done, why = [], cause(error)
                for index, result in zip(chunk, done, strict=False):
                    results[index] = result
                    del attempts[index]
                if len(done) == len(chunk) or why is None:
                    continue
                suspect = chunk[len(done)]
                attempts[suspect] -= 1
                if not attempts[suspect]:
                    results[suspect] = why
                    del attempts[suspect]
            size = 1
            if attempts:
                self._wait_for_server()
        return results

    def _wait_for_server(self) -> None:
        until = time.monotonic() + _GRACE_S
        while not self._fleet.count():
            interrupts.check()
            if time.monotonic() > until:
                raise TuningError(
                    f"no server with key {self._fleet.key!r} is left at the tracker "
                    f"{self._fleet.host}:{self._fleet.port}; what was measured is kept: start a "
                    "server, and run the same command again to go on"
                )
            time.sleep(0.5)

    def warm(self) -> None:
        """Start the processes that hold the sessions."""
        self._pool.warm()

    def close(self) -> None:
        """End the sessions."""
        self._pool.close()


# ---- what runs in the worker processes -----------------------------------------------------


def _run_remotely(
    fleet: Fleet, text: str, spec: str, rows: int, jobs: Sequence[tuple]
) -> tuple[list[Any], str | None]:
    """Run jobs in one session: their results, fewer where its server was lost, and why.

    A job that fails by itself has a string as its result. No reason: there was no server.
    """
    from .targets import open_target

    try:
        fleet.check()
    except TuningError:
        return [], None
    results: list[Any] = []
    try:
        bench = open_target(text).bench(KernelSpec.from_text(spec), rows, fleet.connect())
    except Exception as error:
        return [], cause(error)
    try:
        for function, *arguments in jobs:
            try:
                results.append(function(bench, *arguments))
            except Exception as error:
                # The candidate's fault, or the server's? One that is alive still answers.
                reason = cause(error)
                try:
                    bench.session.get_function("runtime.GetDeviceAttr")
                except Exception:
                    return results, "the server was lost while it ran"
                results.append(reason)
        return results, None
    finally:
        # A session ends when nothing refers to it any more.
        del bench
        gc.collect()


def remote_cpu(fleet: Fleet) -> str:
    """Return LLVM's name of a server's CPU.

    Raises
    ------
    TuningError
        The server cannot tell.
    """
    pool = Pool(1, 30)
    try:
        return str(pool.submit(_remote_cpu, fleet).result())
    except TuningError:
        raise
    except Exception as error:
        raise TuningError(
            f"the server does not say which CPU it has ({cause(error)}); give its LLVM name with "
            "--device, such as x86_64-znver4"
        ) from None
    finally:
        pool.close()


def _remote_cpu(fleet: Fleet) -> str:
    return str(fleet.connect().get_function("target.llvm_get_system_cpu")())
