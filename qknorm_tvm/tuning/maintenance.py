"""What ``qknorm-tvm logs`` does to folders of logs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..build import tuned as selection
from ..errors import TuningError
from ..spec import KernelSpec
from . import records
from .lock import FolderLock
from .provenance import Provenance


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

    def is_one(folder: Path) -> bool:
        return any((folder / name).exists() for name in names)

    if is_one(logs):
        return [logs]
    found = sorted(one for one in logs.glob("*") if one.is_dir() and is_one(one))
    if not found:
        raise TuningError(
            f"{logs} holds no tuning logs; make some with `qknorm-tvm tune`, or name their folder "
            "with --logs"
        )
    return found


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
        sum(one.source == "record" for one in outcomes),
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
    found = [str(problem) for problem in logs.problems]
    provenance = Provenance(folder)
    if provenance.damage:
        found.append(provenance.damage)
    try:
        outcomes = selection.read_outcomes(folder)
    except ValueError as error:
        return [*found, str(error)]
    known = {record.key for record in logs.records}
    path = folder / selection.FILE_NAME
    for one in outcomes:
        what = f"{path}: {one.spec} at {one.rows} rows"
        try:
            spec = KernelSpec.from_text(one.spec)
        except ValueError as error:
            found.append(f"{what}: {error}")
            continue
        if one.source == "record":
            fields = _encoded(spec, one.config)
            if fields is None:
                found.append(f"{what}: its config is none of this version's")
            elif (one.workload, tuple(sorted(fields.items()))) not in known:
                found.append(f"{what}: its config has no record in the database")
    if deep and not found:
        found += _validate_deep(folder, logs, provenance, outcomes)
    return found


def _config_class(spec: KernelSpec) -> tuple[Any, Mapping[str, Any]]:
    if spec.parsed_target.kind == "cuda":
        from .cuda_space import WORDS, CudaConfig

        return CudaConfig, WORDS
    from ..schedules.cpu_config import ROUNDINGS, CpuConfig

    return CpuConfig, {"rounding": ROUNDINGS}


def _encoded(spec: KernelSpec, config: Mapping[str, Any]) -> dict[str, int] | None:
    kind, words = _config_class(spec)
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

    from .space import workload_hash
    from .target import open_target
    from .workers import cause

    found = []
    for name, about in provenance.content["workloads"].items():
        if name not in logs.workloads:
            continue
        spec = KernelSpec.from_text(about["spec"])
        mod = open_target(spec.target).workload(spec, about["rows"])
        if workload_hash(mod) != name:
            found.append(
                f"{folder / records.WORKLOADS}: {about['spec']} at {about['rows']} rows is of "
                "another version of the declaration; its records are not used"
            )
    if not logs.workloads:
        return found
    try:
        size = len(ms.database.JSONDatabase(work_dir=str(folder), allow_missing=False))
    except Exception as error:
        return [*found, f"{folder}: TVM cannot load the database: {cause(error)}"]
    if size != len(logs.records):
        found.append(f"{folder}: TVM loads {size} records, the file holds {len(logs.records)}")
    return found


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
        Drop workloads whose outcome is the default, with all their records; the outcome stays.

    Returns
    -------
    int
        How many records went.
    """
    with FolderLock(folder):
        records.repair(folder)
        logs = records.read_logs(folder)
        always = []
        outcomes = selection.read_outcomes(folder)
        before = len(logs.records)
        if in_use:
            used = {one.workload for one in outcomes if one.source == "record"}
            logs.records[:] = [one for one in logs.records if one.workload in used]
        for one in outcomes:
            for config in (one.config, one.default):
                fields = _encoded(KernelSpec.from_text(one.spec), config)
                if fields is not None:
                    always.append((one.workload, fields))
        records.prune(logs, keep, always)
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
