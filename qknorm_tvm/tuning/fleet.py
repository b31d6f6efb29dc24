"""Other machines to time candidates on, behind TVM's RPC tracker.

A server runs whatever code it is sent. Nothing here starts one, or listens: who starts a tracker or
a server says on which address, and 127.0.0.1 is what the documentation shows.
"""

from __future__ import annotations

import dataclasses
import socket
import time
from typing import Any

from ..errors import TuningError

#: Seconds to wait for an answer of the tracker.
_TRACKER_S = 5
#: Seconds to wait for a server to come back when none is left.
_GRACE_S = 10


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

    def check(self) -> int:
        """Return how many servers have the key, at least one.

        Raises
        ------
        TuningError
            There is no tracker, or no server with the key.
        """
        keys = self.keys()
        if self.key not in keys:
            others = f" (it has {', '.join(map(repr, sorted(set(keys))))})" if keys else ""
            raise TuningError(
                f"the tracker at {self} has no server with key {self.key!r}{others}; start one "
                f"with: python -m tvm.exec.rpc_server --host 127.0.0.1 --port 9290 --port-end 9299 "
                f"--tracker {self} --key {self.key}"
            )
        return keys.count(self.key)

    def wait_for_server(self) -> None:
        """Wait a little where no server has the key.

        Raises
        ------
        TuningError
            There still is none.
        """
        until = time.monotonic() + _GRACE_S
        while self.key not in self.keys():
            if time.monotonic() > until:
                raise TuningError(
                    f"no server with key {self.key!r} is left at the tracker {self}; what was "
                    "measured is kept: start a server, and run the same command again to go on"
                )
            time.sleep(0.5)

    def connect(self) -> Any:
        """Return a session on a free server; waits for one."""
        return self._tracker().request(self.key, session_timeout=600)

    def _tracker(self) -> Any:
        from tvm import rpc

        return rpc.connect_tracker(self.host, self.port)

    def keys(self) -> list[str]:
        """Return the key of every server; never hangs, as TVM does where there is none.

        Raises
        ------
        TuningError
            No tracker answers.
        """
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
                f"the tracker at {self} does not answer as one ({error}); check the address"
            ) from None
