"""A tuning session without compiling and without time: builds are notes, the clock a function."""

from __future__ import annotations

import concurrent.futures
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qknorm_tvm import KernelSpec
from qknorm_tvm.tuning import measurer, session
from qknorm_tvm.tuning.report import Reporter
from qknorm_tvm.tuning.target import Built, Device
from qknorm_tvm.tuning.targets import open_target

#: Seconds of a config (its fields) at a row count, in a process by its number.
Clock = Callable[[dict[str, Any], int, int], float]


class Here:
    """In place of worker processes: tasks are done at once."""

    def __init__(self, count: int):
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future:
        future: concurrent.futures.Future = concurrent.futures.Future()
        future.set_result(function(*arguments))
        return future

    def warm(self) -> None:
        pass

    def close(self) -> None:
        pass


def build(text: str, threads: Any, spec: str, rows: int, config: Any, folder: str) -> Built:
    """Build nothing but a note of the config."""
    path = Path(tempfile.mkdtemp(dir=folder)) / "candidate.so"
    path.write_text(json.dumps(config))
    return Built(str(path), (1,))


class MadeUpRunner:
    """Times configs by a clock; every comparison is a process of its own."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self.processes = 0

    def _times(self, rows: int, candidates: Sequence[Built]) -> list[list[float]]:
        configs = [json.loads(Path(built.path).read_text()) for built in candidates]
        return [[self._clock(config, rows, self.processes)] * 16 for config in configs]

    def measure(
        self, spec: KernelSpec, rows: int, candidates: Sequence[Built], plan: Any
    ) -> list[list[float]]:
        return self._times(rows, candidates)

    def compare(
        self, spec: KernelSpec, rows: int, candidates: Sequence[Built], plan: Any
    ) -> list[list[float]]:
        self.processes += 1
        return self._times(rows, candidates)

    def warm(self) -> None:
        pass

    def close(self) -> None:
        pass


def patch_builds(patch: pytest.MonkeyPatch) -> None:
    """Replace the processes that build."""
    patch.setattr(measurer, "Pool", Here)
    patch.setattr(measurer, "build_task", build)


def tune_by(
    clock: Clock, target: str, device: str, logs: Path, spec: KernelSpec, rows: Sequence[int],
    trials: int = 8,
) -> session.Summary:  # fmt: skip
    """Tune a spec by a made-up clock."""
    with pytest.MonkeyPatch.context() as patch:
        patch_builds(patch)
        return session.Session(
            open_target(target), Device(device, {"gpu": "none"}), logs, MadeUpRunner(clock),
            session.Options(trials=trials), Reporter(),
        ).run([spec], rows)  # fmt: skip
