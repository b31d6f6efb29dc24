"""What ``qknorm-tvm logs`` does to folders of logs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..build import tuned as selection
from ..errors import TuningError
from ..schedules import cpu_config, cuda_sampling
from ..schedules.cuda_config import CudaConfig
from ..spec import KernelSpec
from . import records
from .lock import FolderLock
from .provenance import Provenance

#: Fastest records that stay of a workload whose default was kept: the default may be one of them.
_EVIDENCE = 2


@dataclasses.dataclass(frozen=True)
class Overview:
    """What a device's folder holds."""

    folder: Path
    device: Mapping[str, Any]
    versions: Mapping[str, Any]
    workloads: int
    records: int
    kept: int
    tuned: int
    sessions: int
    last: str
    size: int
    problems: int


def device_folders(logs: Path) -> list[Path]:
    """Return the folders of devices in a folder of logs, or the folder itself if it is one.

    Raises
    ------
    TuningError
        There is none.
    """
    names = (records.WORKLOADS, records.RECORDS, selection.FILE_NAME)

    def of_device(folder: Path) -> bool:
        return any((folder / name).exists() for name in names)

    if of_device(logs):
        return [logs]
    folders = sorted(folder for folder in logs.glob("*") if folder.is_dir() and of_device(folder))
    if not folders:
        raise TuningError(
            f"{logs} holds no tuning logs; make some with `qknorm-tvm tune`, or name their folder "
            "with --logs"
        )
    return folders


def overview(folder: Path) -> Overview:
    """Count what a folder holds; damaged files too."""
    logs = records.read_logs(folder)
    provenance = Provenance(folder).content
    try:
        outcomes = selection.read_outcomes(folder)
    except ValueError:
        outcomes = []
    sessions = provenance["sessions"]
    return Overview(
        folder,
        provenance["device"],
        provenance["versions"],
        len(logs.workloads),
        len(logs.records),
        sum(outcome.source == "record" for outcome in outcomes),
        len(outcomes),
        len(sessions),
        str(sessions[-1]["date"]) if sessions else "",
        sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        len(logs.problems),
    )


def validate(folder: Path, *, deep: bool = True) -> list[str]:
    """Check a folder; returns what is wrong, each with file and line.

    Parameters
    ----------
    folder : Path
    deep : bool
        Also check with TVM that kept configs are their records', that workloads are those of
        today's declaration, and that TVM loads the database.

    Returns
    -------
    list of str
        Empty when all is well.
    """
    logs = records.read_logs(folder)
    problems = [str(problem) for problem in logs.problems]
    provenance = Provenance(folder)
    if provenance.damage:
        problems.append(provenance.damage)
    try:
        outcomes = selection.read_outcomes(folder)
    except ValueError as error:
        return [*problems, str(error)]
    known = {record.key for record in logs.records}
    path = folder / selection.FILE_NAME
    for outcome in outcomes:
        what = f"{path}: {outcome.spec} at {outcome.rows} rows"
        try:
            spec = KernelSpec.from_text(outcome.spec)
        except ValueError as error:
            problems.append(f"{what}: {error}")
            continue
        if outcome.source == "record":
            fields = _encoded(spec, outcome.config)
            if fields is None:
                problems.append(f"{what}: its config is none of this version's")
            elif (outcome.workload, tuple(sorted(fields.items()))) not in known:
                problems.append(f"{what}: its config has no record in the database")
    if deep and not problems:
        problems += _validate_deep(folder, logs, provenance, outcomes)
    return problems


def _encoded(spec: KernelSpec, config: Mapping[str, Any]) -> dict[str, int] | None:
    """Return a config's fields as records have them, or None where it is none of this version's."""
    kind: Any = cpu_config.CpuConfig
    words: Mapping[str, Any] = {"rounding": cpu_config.ROUNDINGS}
    if spec.parsed_target.kind == "cuda":
        kind, words = CudaConfig, cuda_sampling.WORDS
    try:
        fields = kind.from_dict(dict(config)).to_dict()
    except (TypeError, ValueError):
        return None
    return {
        name: words[name].index(value) if name in words else int(value)
        for name, value in fields.items()
    }


def _validate_deep(
    folder: Path, logs: records.Logs, provenance: Provenance, outcomes: list[selection.Outcome]
) -> list[str]:
    from tvm.s_tir import meta_schedule as ms

    from ..declare.workload import workload_hash
    from .targets import open_target
    from .workers import cause

    problems = []
    for name, about in provenance.content["workloads"].items():
        if name not in logs.workloads:
            continue
        spec = KernelSpec.from_text(about["spec"])
        mod = open_target(spec.target).workload(spec, about["rows"])
        if workload_hash(mod) != name:
            problems.append(
                f"{folder / records.WORKLOADS}: {about['spec']} at {about['rows']} rows is of "
                "another version of the declaration; its records are not used"
            )
    if not logs.workloads:
        return problems
    try:
        size = len(ms.database.JSONDatabase(work_dir=str(folder), allow_missing=False))
    except Exception as error:
        return [*problems, f"{folder}: TVM cannot load the database: {cause(error)}"]
    if size != len(logs.records):
        problems.append(f"{folder}: TVM loads {size} records, the file holds {len(logs.records)}")
    return problems


def remeasure(folder: Path, *, fix: bool = False) -> list[str]:
    """Time kept records against the default again, on the device that they are of.

    Parameters
    ----------
    folder : Path
    fix : bool
        Keep the default where a record does not hold.

    Returns
    -------
    list of str
        Records that do not hold, each with the times. Those that builds do not use, because they
        are of another version, are not measured.

    Raises
    ------
    TuningError
        This machine is not the device.
    """
    from ..declare.workload import workload_hash
    from ..machine import usable_processors
    from .devices import resolve
    from .measurer import Measurer
    from .provenance import versions
    from .targets import open_target
    from .workers import ComparisonError, LocalRunner

    problems = []
    # Nobody tunes into a folder that cannot be written to, such as an installed package's.
    with FolderLock(folder) if os.access(folder, os.W_OK) else contextlib.nullcontext():
        outcomes = selection.read_outcomes(folder)
        for index, outcome in enumerate(outcomes):
            if outcome.source != "record":
                continue
            spec = KernelSpec.from_text(outcome.spec)
            text, device = resolve(spec.target, None, None)
            if device.folder != folder.name:
                raise TuningError(f"its records are of another device; this is {device.folder}")
            target = open_target(text, threads=device.threads)
            if (
                dict(outcome.versions) != versions(target)
                or dict(outcome.default) != target.default(spec, outcome.rows).to_dict()
                or outcome.workload != workload_hash(target.workload(spec, outcome.rows))
            ):
                continue
            config = target.served(target.config(outcome.config))
            measured = [other.rows for other in outcomes if other.spec == outcome.spec]
            runner = LocalRunner(text)
            with Measurer(target, device.threads, runner, builders=usable_processors()) as measurer:
                try:
                    _, reason = measurer.confirm(spec, outcome.rows, config, measured)
                except ComparisonError as error:
                    reason = str(error)
            if reason:
                problems.append(
                    f"{folder / selection.FILE_NAME}: {outcome.spec} at {outcome.rows} rows: "
                    f"{reason}"
                )
                outcomes[index] = dataclasses.replace(
                    outcome, source="heuristic", config=outcome.default, best=outcome.config,
                    reason=reason,
                )  # fmt: skip
        if problems and fix:
            selection.write_outcomes(folder, outcomes)
    return problems


def mend(folder: Path) -> list[records.Problem]:
    """Put unusable lines aside; returns them."""
    with FolderLock(folder):
        return records.repair(folder)


def deduplicate(folder: Path) -> int:
    """Keep the latest record of each candidate; returns how many went."""
    with FolderLock(folder):
        records.repair(folder)
        logs = records.read_logs(folder)
        gone = records.deduplicate(logs)
        if gone:
            records.write_logs(logs)
    return gone


def prune(folder: Path, keep: int, *, in_use: bool = False) -> int:
    """Keep the fastest records of each workload, and those that outcomes name.

    Parameters
    ----------
    folder : Path
    keep : int
        Records of a workload.
    in_use : bool
        Of workloads whose outcome is the default keep only what shows why: the records of the
        default, of the config that was timed against it, and the two fastest.

    Returns
    -------
    int
        How many records went.
    """
    with FolderLock(folder):
        records.repair(folder)
        logs = records.read_logs(folder)
        before = len(logs.records)
        always, counts = [], {}
        for outcome in selection.read_outcomes(folder):
            if in_use and outcome.source != "record":
                counts[outcome.workload] = _EVIDENCE
            for config in (outcome.config, outcome.default, outcome.best):
                fields = _encoded(KernelSpec.from_text(outcome.spec), config) if config else None
                if fields is not None:
                    always.append((outcome.workload, fields))
        records.prune(logs, keep, always, counts)
        gone = before - len(logs.records)
        records.write_logs(logs)
        provenance = Provenance(folder)
        if not provenance.damage:
            held = provenance.content["workloads"]
            provenance.content["workloads"] = {
                name: about for name, about in held.items() if name in logs.workloads
            }
            provenance.write()
    return gone
