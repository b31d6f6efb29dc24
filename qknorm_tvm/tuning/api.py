"""`qknorm_tvm.tune`. Imports no TVM until it is called."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..spec import KernelSpec
from .shapes import ROWS

if TYPE_CHECKING:
    from .fleet import Fleet
    from .report import Reporter
    from .session import Summary
    from .target import Device
    from .workers import Runner


def tune(
    specs: Sequence[KernelSpec] | None = None,
    *,
    target: str = "cpu",
    rows: Sequence[int] = ROWS,
    trials: int = 64,
    seed: int = 0,
    cost_model: str = "auto",
    logs: str | os.PathLike[str] | None = None,
    tracker: str | None = None,
    key: str | None = None,
    workers: int = 1,
    device: str | None = None,
    reporter: Reporter | None = None,
) -> Summary:
    """Search for configs that are faster than the heuristic's, on the device itself.

    For every spec and row count MetaSchedule samples the fields of the config in the product's
    schedule of the specialised declaration. A candidate is the product's module for the sampled
    config: it must equal the reference bit for bit before it is timed. The fastest are then timed
    in turns with the default, in fresh processes, and one is kept where it is faster by more than
    the times spread, and not slower at the ends of the range of rows that it would serve. The build
    uses what was kept.

    A session that was interrupted goes on where it was when it is called again: what is recorded
    is not measured again.

    Parameters
    ----------
    specs : sequence of KernelSpec, optional
        Specs with fixed columns, of the target's kind; by default the bfloat16 shapes of one rank
        of MiniMax-M2 and OLMo-2 7B and 32B, for 1, 2, 4 and 8 ranks.
    target : str
        ``"cpu"`` (the best level that the device runs), a level, a CPU's name, or one CUDA
        architecture such as ``"cuda:sm_90"``; ``"cuda"`` is this machine's GPU.
    rows : sequence of int
        Row counts to tune for; each speaks for those around it.
    trials : int
        Most candidates for each spec and row count; recorded ones count.
    seed : int
        Of the search.
    cost_model : str
        ``"xgb"``, ``"random"``, or ``"auto"``: xgb where xgboost is installed.
    logs : path-like, optional
        Folder of logs, in which every device has a folder; by default
        ``$QKNORM_TVM_TUNING_LOGS``, a source checkout's ``tuning_logs``, or one in the user's data
        folder. The build reads the same.
    tracker : str, optional
        ``HOST:PORT`` of a TVM RPC tracker, to measure on other machines.
    key : str, optional
        Under which their servers are registered.
    workers : int
        Servers to use at a time.
    device : str, optional
        Name of the device's folder; by default found out.
    reporter : Reporter, optional
        Hears how far it is.

    Returns
    -------
    Summary
        What was found for each spec and row count, and where the logs are.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong; the message names it.
    TuningError
        Something that is needed is missing, the folder is in use, no candidate works, or no server
        is left. The message says what to do; what was measured is kept.
    KeyboardInterrupt
        Ctrl-C or SIGTERM. What was measured is kept.
    """
    from . import preflight
    from .devices import resolve

    if cost_model not in preflight.COST_MODELS:
        raise ValueError(
            f"cost_model must be one of {', '.join(preflight.COST_MODELS)}, got {cost_model!r}"
        )
    preflight.check_numbers(trials=trials, workers=workers)
    for count in rows:
        preflight.check_numbers(rows=count)
    if not rows:
        raise ValueError("rows must name at least one row count, got none")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    if tracker is None and key is not None:
        raise ValueError("key needs tracker, the address of the fleet's tracker")
    fleet = None
    if tracker is not None:
        from .fleet import Fleet

        fleet = Fleet.parse(tracker, key)
    cost_model = preflight.check_extras(cost_model, remote=fleet is not None)
    if fleet is not None:
        workers = min(workers, fleet.check())
    text, tuned_device = resolve(target, fleet, device)
    preflight.check_compiler(text)

    from ..build.tuned import default_logs
    from .shapes import default_specs

    chosen = preflight.check_specs(default_specs(text) if specs is None else specs, text)
    folder = Path(logs) if logs is not None else default_logs()
    preflight.check_space(folder)
    return _run(chosen, text, tuned_device, rows, folder, fleet, workers, reporter, {
        "trials": trials, "seed": seed, "cost_model": cost_model,
    })  # fmt: skip


def _run(
    specs: Sequence[KernelSpec],
    text: str,
    device: Device,
    rows: Sequence[int],
    folder: Path,
    fleet: Fleet | None,
    workers: int,
    reporter: Reporter | None,
    options: dict[str, Any],
) -> Summary:
    from ..machine import usable_processors
    from .report import Reporter
    from .session import Options, Session
    from .targets import open_target
    from .workers import LocalRunner

    runner: Runner
    if fleet is None:
        runner = LocalRunner(text)
    else:
        from .fleet import FleetRunner

        runner = FleetRunner(fleet, text, workers)
    from_command = sys.argv and Path(sys.argv[0]).name == "qknorm-tvm"
    settings = Options(
        builders=usable_processors(),
        command=shlex.join(["qknorm-tvm", *sys.argv[1:]]) if from_command else "qknorm_tvm.tune",
        **options,
    )
    target = open_target(text, threads=device.threads)
    return Session(target, device, folder, runner, settings, reporter or Reporter()).run(
        specs, rows
    )
