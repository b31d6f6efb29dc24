"""MetaSchedule's database files, read and mended in Python before TVM sees them.

TVM's loader dies of a blank line or of ``{}``, and does not say which line is truncated. A database
is two files with one JSON value a line: workloads ``["hash", "module in base64"]``, and records
``[index of a workload, [trace, seconds, target, arguments]]``.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import os
import statistics
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..operations import OPERATIONS

WORKLOADS = "database_workload.json"
RECORDS = "database_tuning_record.json"
#: What TVM stores for a candidate that failed.
_FAILED_S = 1e9


@dataclasses.dataclass(frozen=True)
class Problem:
    """A line that is not usable."""

    path: Path
    line: int
    reason: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Record:
    """One measured candidate.

    Parameters
    ----------
    workload : str
        Hash of its workload.
    fields : mapping
        The sampled fields.
    seconds : list of float
        Samples.
    content : list
        The record as stored, without the workload's index.
    """

    workload: str
    fields: dict[str, int]
    seconds: list[float]
    content: list[Any]

    @property
    def median(self) -> float:
        """Median of the samples, seconds."""
        return statistics.median(self.seconds)

    @property
    def key(self) -> tuple[str, tuple[tuple[str, int], ...]]:
        """Workload and fields: equal for two measurements of one candidate."""
        return self.workload, tuple(sorted(self.fields.items()))


@dataclasses.dataclass
class Logs:
    """The usable content of a folder, and what is wrong with the rest.

    `workloads` maps hashes to lines, in the order of the file.
    """

    folder: Path
    workloads: dict[str, str]
    records: list[Record]
    problems: list[Problem]


def read_logs(folder: Path) -> Logs:
    """Read a folder's database files, line by line, whatever is in them.

    Parameters
    ----------
    folder : Path
        A missing file is an empty one.

    Returns
    -------
    Logs
    """
    _finish_replacement(folder)
    logs = Logs(folder, {}, [], [])
    # Hash by line, for the records; None where the line is not usable.
    hashes: list[str | None] = []
    path = folder / WORKLOADS
    for number, text in _lines(path):
        try:
            name = _workload(text)
        except ValueError as error:
            logs.problems.append(Problem(path, number, str(error), text))
            # A blank line was inserted; it stands for no workload that a record could name.
            if text.strip():
                hashes.append(None)
            continue
        hashes.append(name)
        logs.workloads.setdefault(name, text)
    path = folder / RECORDS
    for number, text in _lines(path):
        try:
            logs.records.append(_record(text, hashes))
        except ValueError as error:
            logs.problems.append(Problem(path, number, str(error), text))
    return logs


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    text = data.decode("utf-8", errors="replace")
    lines = text.split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    return list(enumerate(lines, start=1))


def _value(text: str) -> Any:
    if not text.strip():
        raise ValueError("blank line")
    try:
        value = json.loads(text)
    except ValueError:
        raise ValueError("truncated or no JSON") from None
    if not isinstance(value, list):
        raise ValueError(f"foreign line: must be a list, got {type(value).__name__}")
    return value


def _workload(text: str) -> str:
    """Check a workload's line and return its hash."""
    value = _value(text)
    if len(value) != 2 or not all(isinstance(part, str) for part in value):
        raise ValueError("foreign line: must be [hash, module], two strings")
    name, encoded = value
    if not name.isdigit():
        raise ValueError(f"foreign line: {name[:20]!r} is no hash")
    try:
        data = base64.b64decode(encoded, validate=True)
        (size,) = struct.unpack_from("<Q", data)
        module = json.loads(data[8:])
    except (binascii.Error, struct.error, ValueError):
        raise ValueError("the workload's module is damaged") from None
    if size != len(data) - 8:
        raise ValueError("the workload's module is damaged")
    try:
        root = module["nodes"][module["root_index"]]["type"]
    except (TypeError, KeyError, IndexError):
        raise ValueError("the workload's module is damaged") from None
    if root != "ir.IRModule":
        raise ValueError(f"foreign line: the workload is a {root}, no module")
    return str(name)


def _record(text: str, hashes: Sequence[str | None]) -> Record:
    from .trace import sampled_fields

    value = _value(text)
    if len(value) != 2 or not isinstance(value[1], list) or len(value[1]) != 4:
        raise ValueError("foreign line: must be [workload, [trace, seconds, target, arguments]]")
    index, content = value
    trace, seconds, target, arguments = content
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(hashes):
        raise ValueError(f"workload {str(index)[:20]} does not exist")
    workload = hashes[index]
    if workload is None:
        raise ValueError(f"its workload, line {index + 1} of {WORKLOADS}, is not usable")
    if not isinstance(seconds, list) or not seconds:
        raise ValueError("it holds no times")
    if not all(isinstance(time, (int, float)) and 0 < time < _FAILED_S for time in seconds):
        raise ValueError("it is of a candidate that failed, or its times are no times")
    if not isinstance(target, dict) or "kind" not in target:
        raise ValueError("foreign line: it names no target")
    shapes_ok = isinstance(arguments, list) and all(
        isinstance(info, list) and len(info) == 3 and info[0] == "TENSOR" for info in arguments
    )
    if not shapes_ok or len(arguments) not in {
        len(operation.tensors) for operation in OPERATIONS.values()
    }:
        raise ValueError("foreign line: its arguments are no operation's tensors")
    return Record(workload, sampled_fields(trace), [float(time) for time in seconds], content)


# ---- changing files -------------------------------------------------------------------------


def repair(folder: Path) -> list[Problem]:
    """Put unusable lines aside, in ``<file>.rejected``, and leave the rest; returns them.

    Call it with the folder's lock held.
    """
    logs = read_logs(folder)
    if logs.problems:
        reject(logs.problems)
        write_logs(logs)
    return logs.problems


def reject(problems: Sequence[Problem]) -> None:
    """Keep lines aside, each with its place and what is wrong with it."""
    for problem in problems:
        aside = problem.path.with_name(problem.path.name + ".rejected")
        entry = {"line": problem.line, "reason": problem.reason, "text": problem.text}
        with aside.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def reject_all(folder: Path, reason: str) -> list[Problem]:
    """Put all records of a folder aside, for one reason; returns them."""
    _finish_replacement(folder)
    path = folder / RECORDS
    problems = [Problem(path, number, reason, text) for number, text in _lines(path)]
    reject(problems)
    write_logs(Logs(folder, {}, [], []))
    return problems


def write_logs(logs: Logs) -> None:
    """Replace a folder's database files by what `logs` holds.

    The two files refer to each other by line: an interruption must not leave one new and one old.
    The new workloads' file appears last, and is the sign that both are complete.
    """
    index = {name: number for number, name in enumerate(logs.workloads)}
    records = [
        json.dumps([index[record.workload], record.content], separators=(",", ":"))
        for record in logs.records
    ]
    _finish_replacement(logs.folder)
    for name, lines in ((RECORDS, records), (WORKLOADS, list(logs.workloads.values()))):
        new = logs.folder / f"{name}.new"
        partial = logs.folder / f"{name}.partial"
        with partial.open("w") as file:
            file.writelines(line + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, new)
    _finish_replacement(logs.folder)


def _finish_replacement(folder: Path) -> None:
    records, workloads = folder / f"{RECORDS}.new", folder / f"{WORKLOADS}.new"
    if not workloads.exists():
        records.unlink(missing_ok=True)
        return
    if records.exists():
        os.replace(records, folder / RECORDS)
    os.replace(workloads, folder / WORKLOADS)


def deduplicate(logs: Logs) -> int:
    """Keep one record of each candidate, the latest; returns how many went."""
    latest = {record.key: record for record in logs.records}
    kept = [record for record in logs.records if latest[record.key] is record]
    gone = len(logs.records) - len(kept)
    logs.records = kept
    return gone


def prune(
    logs: Logs,
    keep: int,
    always: Sequence[tuple[str, dict[str, int]]] = (),
    counts: Mapping[str, int] | None = None,
) -> int:
    """Keep the fastest records of each workload; returns how many went.

    Parameters
    ----------
    logs : Logs
        Changed in place; workloads left without a record go too.
    keep : int
        Records of a workload.
    always : sequence
        Workloads and fields that stay whatever their times.
    counts : mapping, optional
        Records of workloads of which another number is kept.
    """
    held = {(name, tuple(sorted(fields.items()))) for name, fields in always}
    by_workload: dict[str, list[Record]] = {}
    for record in logs.records:
        by_workload.setdefault(record.workload, []).append(record)
    kept = []
    for name, group in by_workload.items():
        fastest = sorted(group, key=lambda record: record.median)
        best = fastest[: (counts or {}).get(name, keep)]
        kept += [record for record in group if record in best or record.key in held]
    gone = len(logs.records) - len(kept)
    logs.records = kept
    used = {record.workload for record in kept}
    logs.workloads = {name: line for name, line in logs.workloads.items() if name in used}
    return gone
