"""`qknorm_tvm.tune`, and what must be there before the first trial. Imports no TVM until called."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TuningError
from ..models import MODELS
from ..spec import KernelSpec
from ..targets import parse_target

if TYPE_CHECKING:
    from .report import Reporter
    from .session import Summary

#: Those whose columns are tuned by default.
_MODELS = ("minimax-m2", "olmo2-7b", "olmo2-32b")
#: Decode, and prefill.
ROWS = (1, 16, 64, 512, 4096, 16384)
COST_MODELS = ("auto", "xgb", "random")


def default_shapes() -> list[tuple[int, int]]:
    """Return ``(q_cols, k_cols)`` of one of 1, 2, 4 or 8 ranks of every model, each pair once."""
    layouts = (MODELS[name].layout(ranks) for name in _MODELS for ranks in (1, 2, 4, 8))
    shapes = ((layout.q_cols, layout.k_cols) for layout in layouts)
    return list(dict.fromkeys(shapes))


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
        Something that is needed is missing, the folder is in use, a default fails, or no server is
        left. The message says what to do; what was measured is kept.
    KeyboardInterrupt
        Ctrl-C or SIGTERM. What was measured is kept.
    """
    if cost_model not in COST_MODELS:
        raise ValueError(f"cost_model must be one of {', '.join(COST_MODELS)}, got {cost_model!r}")
    for name, value in [("trials", trials), ("workers", workers), *(("rows", m) for m in rows)]:
        _check_integer(name, value, 1, "at least 1")
    if not rows:
        raise ValueError("rows must name at least one row count, got none")
    _check_integer("seed", seed, 0, "0 or more")
    if tracker is None and key is not None:
        raise ValueError("key needs tracker, the address of the fleet's tracker")
    from .fleet import Fleet

    fleet = None if tracker is None else Fleet.parse(tracker, key)
    cost_model = check_packages(cost_model, remote=fleet is not None)
    if fleet is not None:
        workers = min(workers, fleet.check())

    from ..build.tuned import default_logs
    from .devices import resolve
    from .session import Session
    from .targets import open_target

    text, tuned_device = resolve(target, fleet, device)
    if specs is None:
        specs = [KernelSpec(q_cols=q, k_cols=k, target=text) for q, k in default_shapes()]
    checked = _check_specs(specs, text)
    folder = Path(logs) if logs is not None else default_logs()
    _check_folder(folder)
    from_command = sys.argv and Path(sys.argv[0]).name == "qknorm-tvm"
    session = Session(
        open_target(text, threads=tuned_device.threads),
        tuned_device,
        folder,
        trials=trials,
        seed=seed,
        cost_model=cost_model,
        fleet=fleet,
        workers=workers,
        command=shlex.join(["qknorm-tvm", *sys.argv[1:]]) if from_command else "qknorm_tvm.tune",
        reporter=reporter,
    )
    return session.run(checked, rows)


def _check_integer(name: str, value: Any, least: int, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be {expected}, got {value}")


def check_packages(cost_model: str, *, remote: bool) -> str:
    """Return the cost model to use, ``"xgb"`` or ``"random"``.

    Raises
    ------
    TuningError
        A package is missing.
    """
    needed = ["tvm", "cloudpickle", "psutil"]
    needed += ["tornado"] * remote + ["xgboost"] * (cost_model == "xgb")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise TuningError(
            f"tuning needs {' and '.join(missing)}, which {verb} not installed; install what it "
            "needs with: pip install 'qknorm-tvm[tune]'"
        )
    if cost_model == "auto":
        return "xgb" if importlib.util.find_spec("xgboost") else "random"
    return cost_model


def _check_specs(specs: Sequence[Any], text: str) -> list[KernelSpec]:
    """Return the specs for the target that is tuned, each once."""
    kind = parse_target(text).kind
    checked = []
    for spec in specs:
        if not isinstance(spec, KernelSpec):
            raise TypeError(f"specs must be KernelSpecs, got {type(spec).__name__}")
        if spec.has_peers:
            raise ValueError(
                f"specs must not exchange statistics with other ranks to be tuned, got {spec.text}"
            )
        if spec.q_cols is None or spec.k_cols is None:
            raise ValueError(f"specs must have fixed columns to be tuned, got {spec.text}")
        if spec.parsed_target.kind != kind:
            raise ValueError(f"specs must be for {text}, which is tuned, got {spec.text}")
        spec.check_alone("tuned")
        checked.append(spec.replace(target=text))
    if not checked:
        raise ValueError("specs must name at least one KernelSpec, got none")
    return list(dict.fromkeys(checked))


def _check_folder(folder: Path) -> None:
    """Check that a folder of logs can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TuningError(
            f"{folder} cannot be made ({error.strerror}); give another folder with --logs"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise TuningError(f"{folder} cannot be written to; give another folder with --logs")
    if shutil.disk_usage(folder).free < 1 << 26:
        raise TuningError(f"less than 64 MiB are free at {folder}; make room for its database")
