"""A device's folder of logs: its lock, ``provenance.json``, and what ``qknorm-tvm logs`` does."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..build import tuned as selection
from ..errors import TuningError
from ..spec import KernelSpec
from . import records

if TYPE_CHECKING:
    from .targets import TunableTarget

PROVENANCE = "provenance.json"
_FORMAT = 1


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return where a folder's records come from: ``device``, ``versions`` and ``sessions``.

    Raises
    ------
    ValueError
        The file is damaged.
    """
    path = folder / PROVENANCE
    content: dict[str, Any] = {"format": _FORMAT, "device": {}, "versions": {}, "sessions": []}
    if not path.exists():
        return content
    try:
        stored = json.loads(path.read_text())
        if stored["format"] != _FORMAT:
            raise ValueError("it is of another format")
        if not all(isinstance(stored[name], type(content[name])) for name in content):
            raise ValueError("its fields are of other types")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    return {name: stored[name] for name in content}


def write_provenance(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the file, atomically."""
    selection.write_json(folder / PROVENANCE, content)


def set_aside(path: Path) -> None:
    """Keep a damaged file under another name."""
    path.replace(path.with_name(path.name + ".rejected"))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder of logs, as two tuners would corrupt its database.

    The lock is the operating system's: a process that is killed frees it. What others read about
    its holder lies beside it.

    Raises
    ------
    TuningError
        Another process holds it; the message says which.
    """
    import filelock

    lock = filelock.FileLock(folder / ".lock", mode=0o644)
    holder = folder / ".lock-holder"
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        try:
            about = json.loads(holder.read_text())
            who = f"process {about['pid']} on {about['host']} since {about['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            who = "another process"  # which is just about to say so
        raise TuningError(
            f"{folder} is in use by {who}; wait for it, stop it, or give another folder with --logs"
        ) from None
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        holder.write_text(json.dumps(about))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


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
    folders = sorted(folder for folder in logs.glob("*") if of_device(folder))
    if not folders:
        raise TuningError(
            f"{logs} holds no tuning logs; make some with `qknorm-tvm tune`, or name their folder "
            "with --logs"
        )
    return folders


def overview(folder: Path) -> dict[str, Any]:
    """Count what a folder holds; damaged files too."""
    logs = records.read_logs(folder)
    damaged, outcomes, sessions = len(logs.problems), [], []
    try:
        outcomes = selection.read_outcomes(folder)
    except ValueError:
        damaged += 1
    try:
        sessions = read_provenance(folder)["sessions"]
    except ValueError:
        damaged += 1
    kept = sum(outcome.source == "record" for outcome in outcomes)
    return {
        "device": folder.name,
        "workloads": len({record.workload for record in logs.records}),
        "records": len(logs.records),
        "kept": f"{kept} of {len(outcomes)}",
        "sessions": len(sessions),
        "last": str(sessions[-1]["date"])[: len("2026-01-01")] if sessions else "",
        "size": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "damaged": damaged or "",
    }


def validate(folder: Path) -> list[str]:
    """Check a folder; returns what is wrong, each with its file, and its line where it has one.

    Every line must be usable; kept configs must be their records'; workloads must be those of
    today's declaration; and TVM must load the database. The installed package's folders come
    without their databases: there no record is looked for.
    """
    from tvm.s_tir import meta_schedule as ms

    from .workers import cause

    logs = records.read_logs(folder)
    problems = [str(problem) for problem in logs.problems]
    try:
        read_provenance(folder)
    except ValueError as error:
        problems.append(str(error))
    try:
        outcomes = selection.read_outcomes(folder)
    except ValueError as error:
        return [*problems, str(error)]
    has_database = any((folder / name).exists() for name in (records.WORKLOADS, records.RECORDS))
    known = {record.key for record in logs.records} if has_database else None
    for outcome in outcomes:
        problem = _problem_of(outcome, known)
        if problem:
            path = folder / selection.FILE_NAME
            problems.append(f"{path}: {outcome.spec} at {outcome.rows} rows: {problem}")
    if problems or not logs.workloads:
        return problems
    try:
        size = len(ms.database.JSONDatabase(work_dir=str(folder), allow_missing=False))
    except Exception as error:
        return [f"{folder}: TVM cannot load the database: {cause(error)}"]
    if size != len(logs.records):
        return [f"{folder}: TVM loads {size} records, the file holds {len(logs.records)}"]
    return []


def _problem_of(outcome: selection.Outcome, known: set[tuple[str, Any]] | None) -> str:
    """Say what is wrong with an outcome, if anything, given the keys of its folder's records."""
    from ..declare.workload import workload_hash
    from .targets import open_target

    try:
        spec = KernelSpec.from_text(outcome.spec)
    except ValueError as error:
        return str(error)
    target = open_target(spec.target)
    if outcome.source == "record":
        key = _key(target, outcome, outcome.config)
        if key is None:
            return "its config is none of this version's"
        if known is not None and key not in known:
            return "its config has no record in the database"
    if workload_hash(target.workload(spec, outcome.rows)) != outcome.workload:
        return "it is of another version of the declaration; its records are not used"
    return ""


def _key(
    target: TunableTarget, outcome: selection.Outcome, config: Mapping[str, Any]
) -> tuple[str, Any] | None:
    """Return the key of a config's record, or None where it is none of this version's."""
    try:
        fields = target.encode(target.config.from_dict(dict(config)))
    except (TypeError, ValueError):
        return None
    return outcome.workload, frozenset(fields.items())


def remeasure(folder: Path, *, fix: bool = False) -> list[str]:
    """Time kept records against the default again, on the device that they are of.

    Returns which do not hold, each with the times; `fix`: the default is kept in their place. Those
    that builds do not use, because they are of another version, are not measured.

    Raises
    ------
    TuningError
        This machine is not the device.
    """
    from ..declare.workload import workload_hash
    from .devices import resolve
    from .measurer import ComparisonError, Measurer
    from .targets import open_target

    problems = []
    # Nobody tunes into a folder that cannot be written to, such as an installed package's.
    with locked(folder) if os.access(folder, os.W_OK) else contextlib.nullcontext():
        outcomes = selection.read_outcomes(folder)
        for index, outcome in enumerate(outcomes):
            if outcome.source != "record":
                continue
            spec, rows = KernelSpec.from_text(outcome.spec), outcome.rows
            text, device = resolve(spec.target, None, None)
            if device.folder != folder.name:
                raise TuningError(f"its records are of another device; this is {device.folder}")
            target = open_target(text, threads=device.threads)
            if (
                dict(outcome.versions) != target.versions
                or dict(outcome.default) != target.default(spec, rows).to_dict()
                or outcome.workload != workload_hash(target.workload(spec, rows))
            ):
                continue
            config = target.served(outcome.config)
            measured = [other.rows for other in outcomes if other.spec == outcome.spec]
            with Measurer(target) as measurer:
                try:
                    _, reason = measurer.confirm(spec, rows, config, measured)
                except ComparisonError as error:
                    reason = str(error)
            if reason:
                path = folder / selection.FILE_NAME
                problems.append(f"{path}: {outcome.spec} at {rows} rows: {reason}")
                outcomes[index] = dataclasses.replace(
                    outcome, source="heuristic", config=outcome.default, best=outcome.config,
                    reason=reason,
                )  # fmt: skip
        if problems and fix:
            selection.write_outcomes(folder, outcomes)
    return problems


def mend(folder: Path) -> list[records.Problem]:
    """Put unusable lines aside; returns them."""
    with locked(folder):
        return records.repair(folder)


def prune(folder: Path, keep: int) -> int:
    """Keep of each workload the `keep` fastest records, and those that its outcome names.

    Those are the records of the default, of the config in use, and of the config that was timed
    against the default. Returns how many records went.
    """
    from .targets import open_target

    with locked(folder):
        records.repair(folder)
        always = set()
        for outcome in selection.read_outcomes(folder):
            target = open_target(KernelSpec.from_text(outcome.spec).target)
            for config in (outcome.config, outcome.default, outcome.best):
                always.add(_key(target, outcome, config))
        return records.prune(folder, keep, always)
