"""Measuring on other machines, through TVM's RPC tracker and servers.

A server runs whatever code it is sent. Nothing here starts one, or listens: who starts a tracker or
a server says on which address, and 127.0.0.1 is what the documentation shows.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import TuningError
from ..spec import KernelSpec
from . import interrupts
from .measure import Plan
from .target import Built
from .workers import Workers, cause

#: Seconds to wait for an answer of the tracker.
_TRACKER_S = 5
#: Times that a candidate is tried elsewhere when its server is lost.
_ATTEMPTS = 3
#: Seconds to wait for a server to come back when none is left: one that ends a session starts
#: anew and registers again, which took over 2 s on a busy machine.
_GRACE_S = 10
#: Seconds after which a session is given back, so that others get their turn, and those after
#: which one that is not used is: a worker that waits may need this very server.
_SESSION_S, _IDLE_S = 20, 1.0


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
        found = self.count()
        if not found:
            raise TuningError(
                f"the tracker at {self.host}:{self.port} has no server with key {self.key!r}"
                f"{self._other_keys()}; start one with: python -m tvm.exec.rpc_server --host "
                f"127.0.0.1 --port 9290 --port-end 9299 --tracker {self.host}:{self.port} --key "
                f"{self.key}"
            )
        return found

    def _other_keys(self) -> str:
        try:
            info = self._config().connect_tracker().summary()["server_info"]
        except (ValueError, RuntimeError, OSError, KeyError):
            return ""
        keys = sorted({str(one["key"]).partition(":")[2] for one in info})
        return f" (it has {', '.join(map(repr, keys))})" if keys else ""

    def connect(self) -> Any:
        """Return a session on a free server; waits for one while there are any."""
        config = self._config()._replace(session_timeout_sec=_TRACKER_S)
        tracker = config.connect_tracker()
        return tracker.request(self.key, session_timeout=600)


class FleetRunner:
    """Measures candidates on a fleet; one that loses its server is tried elsewhere.

    Parameters
    ----------
    fleet : Fleet
    target : str
        Text of the target.
    count : int
        Sessions at a time.
    timeout_s : float
        Seconds that a candidate may take, its uploads included.
    """

    def __init__(self, fleet: Fleet, target: str, count: int, timeout_s: float):
        self._fleet, self._target = fleet, target
        self._workers = Workers(count, timeout_s)
        self.lost = 0

    def measure(
        self, spec: KernelSpec, rows: int, built: Sequence[Built], plan: Plan
    ) -> list[list[float] | str]:
        """Return each candidate's samples, or why it failed.

        Raises
        ------
        TuningError
            No server is left.
        """
        jobs = [(_measure_remote, (rows, one, plan)) for one in built]
        return self._run(spec, jobs)

    def compare(
        self, spec: KernelSpec, rows: int, paths: Sequence[str], plan: Plan, rounds: int
    ) -> list[list[float]]:
        """Return samples of candidates taken in turns, on one server."""
        (found,) = self._run(spec, [(_compare_remote, (rows, list(paths), plan, rounds))])
        if isinstance(found, str):
            raise TuningError(f"the fastest candidates could not be compared: {found}")
        return found

    def _run(self, spec: KernelSpec, jobs: Sequence[tuple[Callable[..., Any], tuple]]) -> list[Any]:
        results: list[Any] = ["" for _ in jobs]
        todo = dict.fromkeys(range(len(jobs)), _ATTEMPTS)
        while todo:
            futures = {
                self._workers.submit(
                    _remote_task, jobs[index][0], self._fleet, self._target, spec.text,
                    *jobs[index][1],
                ): index
                for index in todo
            }  # fmt: skip
            retry = {}
            for future, index in futures.items():
                kind, value = _outcome(future)
                if kind == "done":
                    results[index] = value
                elif kind == "lost" and todo[index] > 1:
                    self.lost += 1
                    retry[index] = todo[index] - 1
                elif kind == "no server":
                    retry[index] = todo[index]
                else:
                    results[index] = value
            todo = retry
            if todo:
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
        self._workers.warm()

    def close(self) -> None:
        """End the sessions."""
        self._workers.close()


def _outcome(future: concurrent.futures.Future) -> tuple[str, Any]:
    try:
        return interrupts.wait(future)
    except ChildProcessError as error:
        return "lost", cause(error)
    except TimeoutError as error:
        return "lost", cause(error)
    except Exception as error:
        return "failed", cause(error)


# ---- what runs in the worker processes -----------------------------------------------------


class _Held:
    """This process's session with its arrays, kept from one candidate to the next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: tuple[str, int] | None = None
        self._bench: Any = None
        self._since = 0.0
        self._timer: threading.Timer | None = None

    def __enter__(self) -> _Held:
        self._lock.acquire()
        if self._timer is not None:
            self._timer.cancel()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer = threading.Timer(_IDLE_S, self._idle)
        self._timer.daemon = True
        self._timer.start()
        self._lock.release()

    def _idle(self) -> None:
        with self._lock:
            self.drop()

    def drop(self) -> None:
        """End the session: it does when nothing refers to it any more."""
        self._bench = self._key = None
        gc.collect()

    def bench(self, fleet: Fleet, text: str, spec: str, rows: int) -> Any:
        """Return what measures, with a session on a server."""
        from .target import open_target

        if self._key != (spec, rows) or time.monotonic() - self._since > _SESSION_S:
            self.drop()
        if self._bench is None:
            fleet.check()
            session = fleet.connect()
            self._bench = open_target(text).bench(KernelSpec.from_text(spec), rows, session)
            self._key, self._since = (spec, rows), time.monotonic()
        return self._bench


_held = _Held()


def _remote_task(
    function: Callable[..., Any], fleet: Fleet, text: str, spec: str, rows: int, *rest: Any
) -> tuple[str, Any]:
    """Run `function` with a session; says whether it was done, failed, or its server is lost."""
    with _held:
        try:
            bench = _held.bench(fleet, text, spec, rows)
        except TuningError as error:
            return "no server", str(error)
        except Exception as error:
            _held.drop()
            return "lost", cause(error)
        try:
            return "done", function(bench, *rest)
        except Exception as error:
            # The candidate's fault, or the server's? One that is alive still answers.
            reason = cause(error)
        try:
            bench.session.get_function("runtime.GetDeviceAttr")
        except Exception:
            del bench
            _held.drop()
            return "lost", "the server was lost while it ran"
        return "failed", reason


def _measure_remote(bench: Any, built: Built, plan: Plan) -> list[float]:
    module = bench.load(built.path)
    for check_rows in built.check_rows:
        bench.check(module, check_rows)
    return bench.seconds(module, plan)


def _compare_remote(bench: Any, paths: Sequence[str], plan: Plan, rounds: int) -> list[list[float]]:
    return bench.compare([bench.load(path) for path in paths], plan, rounds)


def remote_cpu(fleet: Fleet) -> str:
    """Return LLVM's name of a server's CPU.

    Raises
    ------
    TuningError
        The server cannot tell.
    """
    workers = Workers(1, 30)
    try:
        return str(workers.submit(_remote_cpu, fleet).result())
    except TuningError:
        raise
    except Exception as error:
        raise TuningError(
            f"the server does not say which CPU it has ({cause(error)}); give its LLVM name with "
            "--device, such as x86_64-znver4"
        ) from None
    finally:
        workers.close()


def _remote_cpu(fleet: Fleet) -> str:
    return str(fleet.connect().get_function("target.llvm_get_system_cpu")())
