"""Timing candidates on other machines, through TVM's RPC tracker and servers.

A server runs whatever code it is sent. Nothing here starts one, or listens: who starts a tracker or
a server says on which address, and 127.0.0.1 is what the documentation shows.
"""

from __future__ import annotations

import dataclasses
import gc
import socket
import time
from collections.abc import Sequence
from typing import Any

from ..errors import TuningError
from ..spec import KernelSpec
from .bench import Built, InexactError, open_bench
from .workers import Pool, cause, check_signals, wait

#: Seconds to wait for an answer of the tracker.
_TRACKER_S = 5
#: Times that a candidate is tried, each on a free server.
_ATTEMPTS = 3
#: Seconds to wait for a server to come back when none is left.
_GRACE_S = 10
#: Seconds that timing candidates may take, the wait for a server and the upload included.
_TIMEOUT_S = 480


@dataclasses.dataclass(frozen=True)
class Fleet:
    """A tracker, and the key under which the servers to use are registered."""

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

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def servers(self) -> int:
        """Return how many servers have the key; never hangs, as TVM does where there is none.

        Raises
        ------
        TuningError
            No tracker answers.
        """
        return self._keys().count(self.key)

    def check(self) -> int:
        """Return how many servers have the key, at least one.

        Raises
        ------
        TuningError
            There is no tracker, or no server with the key.
        """
        keys = self._keys()
        if self.key not in keys:
            others = f" (it has {', '.join(map(repr, sorted(set(keys))))})" if keys else ""
            raise TuningError(
                f"the tracker at {self} has no server with key {self.key!r}{others}; start one "
                f"with: python -m tvm.exec.rpc_server --host 127.0.0.1 --port 9290 --port-end 9299 "
                f"--tracker {self} --key {self.key}"
            )
        return keys.count(self.key)

    def connect(self) -> Any:
        """Return a session on a free server; waits for one."""
        return self._tracker().request(self.key, session_timeout=600)

    def _tracker(self) -> Any:
        from tvm import rpc

        return rpc.connect_tracker(self.host, self.port)

    def _keys(self) -> list[str]:
        """Return the key of every server."""
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
                f"no tracker at {self} ({error}); start one with: python -m tvm.exec.rpc_tracker "
                f"--host {self.host} --port {self.port} --port-end {self.port + 9}"
            ) from None
        try:
            servers = self._tracker().summary()["server_info"]
            return [str(server["key"]).removeprefix("server:") for server in servers]
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            raise TuningError(
                f"the tracker at {self} does not answer as one ({cause(error)}); check the address"
            ) from None


class FleetRunner:
    """Times candidates on a fleet, each group in a session of its own; see `workers.LocalRunner`.

    Parameters
    ----------
    fleet : Fleet
    count : int
        Sessions at a time.
    """

    def __init__(self, fleet: Fleet, count: int):
        self._fleet = fleet
        self._pool = Pool(count, _TIMEOUT_S)

    def time(
        self,
        spec: KernelSpec,
        rows: int,
        groups: Sequence[Sequence[Built]],
        rounds: int,
        *,
        fresh: bool = False,
    ) -> list[Any]:
        """Time groups of candidates; one whose session fails is tried on another server.

        A server forks for each session: all are fresh.

        Raises
        ------
        TuningError
            No server is left.
        """
        results: list[Any] = [None] * len(groups)
        attempts = dict.fromkeys(range(len(groups)), _ATTEMPTS)
        while attempts:
            self._wait_for_server()
            futures = {
                index: self._pool.submit(
                    _time_there, self._fleet, spec, rows, groups[index], rounds
                )
                for index in attempts
            }
            for index, future in futures.items():
                attempts[index] -= 1
                try:
                    results[index] = wait(future)
                except Exception as error:
                    results[index] = cause(error)
                    if attempts[index]:
                        continue
                del attempts[index]
        return results

    def _wait_for_server(self) -> None:
        until = time.monotonic() + _GRACE_S
        while not self._fleet.servers():
            check_signals()
            if time.monotonic() > until:
                raise TuningError(
                    f"no server with key {self._fleet.key!r} is left at the tracker {self._fleet}; "
                    "what was measured is kept: start a server, and run the same command again to "
                    "go on"
                )
            time.sleep(0.5)

    def close(self) -> None:
        """End the sessions."""
        self._pool.close()


def _time_there(
    fleet: Fleet, spec: KernelSpec, rows: int, candidates: Sequence[Built], rounds: int
) -> list[list[float]] | str:
    """Time candidates in a session; in a worker process. A string: one of them is not exact."""
    try:
        fleet.check()
        return open_bench(spec, rows, fleet.connect()).time(candidates, rounds)
    except InexactError as error:
        return str(error)
    except Exception as error:
        reason = cause(error)
    finally:
        # A session ends when nothing refers to it any more, tracebacks included.
        gc.collect()
    raise ConnectionError(reason)


def remote_cpu(fleet: Fleet) -> str:
    """Return LLVM's name of a server's CPU.

    Raises
    ------
    TuningError
        The server cannot tell.
    """
    pool = Pool(1, 30, fresh=True)
    try:
        return str(wait(pool.submit(_ask_cpu, fleet)))
    except Exception as error:
        raise TuningError(
            f"the server does not say which CPU it has ({cause(error)}); give its LLVM name with "
            "--device, such as x86_64-znver4"
        ) from None
    finally:
        pool.close()


def _ask_cpu(fleet: Fleet) -> str:
    return str(fleet.connect().get_function("target.llvm_get_system_cpu")())
