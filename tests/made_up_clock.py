"""A tuning session without compiling and without time: builds are notes, the clock a function."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qknorm_tvm import KernelSpec
from qknorm_tvm.tuning import measurer, session, targets
from qknorm_tvm.tuning.bench import Built
from qknorm_tvm.tuning.devices import Device

#: Seconds of a config (its fields) at a row count, in a process by its number.
Clock = Callable[[dict[str, Any], int, int], float]


class NoPool:
    """In place of worker processes: tasks are done at once."""

    def __init__(self, count: int, timeout_s: float = 0, *, fresh: bool = False):
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future:
        future: concurrent.futures.Future = concurrent.futures.Future()
        future.set_result(function(*arguments))
        return future

    def close(self) -> None:
        pass


def build(target: Any, spec: KernelSpec, rows: int, config: Any, directory: Path) -> Built:
    """Build nothing but a note of the config."""
    path = directory / "candidate.so"
    path.write_text(json.dumps(config.to_dict()))
    return Built(str(path), (1,))


def use_clock(clock: Clock, patch: pytest.MonkeyPatch) -> None:
    """Replace the processes that build and those that time; every comparison is a process."""
    processes = 0

    def time(
        self: Any,
        spec: KernelSpec,
        rows: int,
        groups: Sequence[Sequence[Built]],
        rounds: int,
        *,
        fresh: bool = False,
    ) -> list[list[list[float]]]:
        nonlocal processes
        processes += fresh
        configs = [
            [json.loads(Path(built.path).read_text()) for built in group] for group in groups
        ]
        return [[[clock(config, rows, processes)] * 16 for config in group] for group in configs]

    patch.setattr(measurer, "Pool", NoPool)
    patch.setattr(measurer.Measurer, "_time", time)
    patch.setattr(targets.CpuTarget, "build", build)
    patch.setattr(targets.CudaTarget, "build", build)


def tune_by(
    clock: Clock, target: str, device: str, logs: Path, spec: KernelSpec, rows: Sequence[int],
    trials: int = 8,
) -> session.Summary:  # fmt: skip
    """Tune a spec by a made-up clock."""
    with pytest.MonkeyPatch.context() as patch:
        use_clock(clock, patch)
        opened = targets.open_target(target)
        made_up = Device(device, {"gpu": "none"})
        return session.Session(opened, made_up, logs, trials=trials).run([spec], rows)
