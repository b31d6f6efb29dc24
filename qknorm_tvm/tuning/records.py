"""MetaSchedule's database files, read and mended in Python before TVM sees them. Imports no TVM.

TVM's loader dies of a blank line or of ``{}``, and does not say which line is truncated. A database
is two files with one JSON value a line: workloads ``["hash", "module in base64"]``, and records
``[index of a workload, [trace, seconds, target, arguments]]``.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import statistics
import struct
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..operations import OPERATIONS

WORKLOADS = "database_workload.json"
RECORDS = "database_tuning_record.json"
#: Head of the annotations that say which config a scheduled module is, as in `schedules`.
NOTE = "qknorm."
#: What TVM stores for a candidate that failed is more.
_FAILED_S = 1e9
#: How many tensors a call may give.
_TENSOR_COUNTS = {
    count
    for operation in OPERATIONS.values()
    for count in range(
        sum(tensor.given_if is None for tensor in operation.arguments),
        len(operation.arguments) + 1,
    )
}


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
    """One measured candidate: its workload's hash, its fields, its samples, and its line."""

    workload: str
    fields: dict[str, int]
    seconds: list[float]
    line: str

    @property
    def median(self) -> float:
        """Median of the samples, seconds."""
        return statistics.median(self.seconds)

    @property
    def key(self) -> tuple[str, frozenset[tuple[str, int]]]:
        """Equal for two measurements of one candidate."""
        return self.workload, frozenset(self.fields.items())


@dataclasses.dataclass
class Logs:
    """The usable content of a folder, and what is wrong with the rest.

    `workloads` are the hashes by line, as records name them; None where a line is not usable.
    """

    workloads: list[str | None]
    records: list[Record]
    problems: list[Problem]


def read_logs(folder: Path) -> Logs:
    """Read a folder's database files, whatever is in them; a missing file is an empty one."""
    logs = Logs([], [], [])
    path = folder / WORKLOADS
    for number, text in _lines(path):
        try:
            logs.workloads.append(_workload(text))
        except ValueError as error:
            logs.problems.append(Problem(path, number, str(error), text))
            # A blank line was inserted; it stands for no workload that a record could name.
            if text.strip():
                logs.workloads.append(None)
    path = folder / RECORDS
    for number, text in _lines(path):
        try:
            logs.records.append(_record(text, logs.workloads))
        except ValueError as error:
            logs.problems.append(Problem(path, number, str(error), text))
    return logs


def _lines(path: Path) -> list[tuple[int, str]]:
    data = path.read_bytes() if path.exists() else b""
    if not data:
        return []
    text = data.decode("utf-8", errors="replace").removesuffix("\n")
    return list(enumerate(text.split("\n"), start=1))


def _list(text: str) -> list[Any]:
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
    value = _list(text)
    if len(value) != 2 or not all(isinstance(part, str) for part in value):
        raise ValueError("foreign line: must be [hash, module], two strings")
    name, encoded = value
    if not name.isdigit():
        raise ValueError(f"foreign line: {name[:20]!r} is no hash")
    try:
        data = base64.b64decode(encoded, validate=True)
        (size,) = struct.unpack_from("<Q", data)
        module = json.loads(data[8:])
        root = module["nodes"][module["root_index"]]["type"]
    except (struct.error, ValueError, TypeError, KeyError, IndexError):
        raise ValueError("the workload's module is damaged") from None
    if size != len(data) - 8:
        raise ValueError("the workload's module is damaged")
    if root != "ir.IRModule":
        raise ValueError(f"foreign line: the workload is a {root}, no module")
    return str(name)


def _record(text: str, hashes: Sequence[str | None]) -> Record:
    value = _list(text)
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
    if not shapes_ok or len(arguments) not in _TENSOR_COUNTS:
        raise ValueError("foreign line: its arguments are no operation's tensors")
    return Record(workload, sampled_fields(trace), [float(time) for time in seconds], text)


def sampled_fields(trace: Sequence[Any]) -> dict[str, int]:
    """Read a config's fields back from a trace in JSON form: ``[instructions, decisions]``.

    Raises
    ------
    ValueError
        It is no trace of our schedules.
    """
    try:
        instructions, decisions = trace
        taken = {int(index): int(value) for index, value in decisions}
        values, fields = {}, {}
        for index, (kind, inputs, attributes, outputs) in enumerate(instructions):
            if kind == "SampleCategorical":
                values[outputs[0]] = int(attributes[0][taken[index]])
            elif kind == "Annotate" and str(attributes[0]).startswith(NOTE):
                fields[attributes[0].removeprefix(NOTE)] = int(values.get(inputs[1], inputs[1]))
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        raise ValueError("the trace is damaged, or not of this project's schedules") from None
    if not fields:
        raise ValueError("the trace is not of this project's schedules: it names no config")
    return fields


# ---- changing; the folder's lock is held ------------------------------------------------------


def repair(folder: Path) -> list[Problem]:
    """Put unusable lines aside, in ``<file>.rejected``, and leave the rest; returns them.

    Records refer to workloads by line number, so workloads keep theirs: an unusable one is replaced
    by a copy of a usable one. Records that refer to it are removed before that, so that none refers
    to the copy if this is interrupted.
    """
    logs = read_logs(folder)
    if not logs.problems:
        return []
    _put_aside(logs.problems)
    _write(folder / RECORDS, [record.line for record in logs.records])
    bad = {problem.line for problem in logs.problems if problem.path.name == WORKLOADS}
    if bad:
        lines = _lines(folder / WORKLOADS)
        usable = [text for number, text in lines if number not in bad]
        _write(folder / WORKLOADS, [
            usable[0] if number in bad else text
            for number, text in lines if usable and text.strip()
        ])  # fmt: skip
    return logs.problems


def reject_all(folder: Path, reason: str) -> list[Problem]:
    """Put all records of a folder aside, for one reason; returns them."""
    path = folder / RECORDS
    problems = [Problem(path, number, reason, text) for number, text in _lines(path)]
    _put_aside(problems)
    _write(path, [])
    return problems


def prune(folder: Path, keep: int, always: Collection[Any] = ()) -> int:
    """Leave of each workload its fastest records, and those whose key is in `always`.

    Of a candidate that was measured several times the latest record counts. Returns how many went.
    """
    records = read_logs(folder).records
    by_workload: dict[str, list[Record]] = {}
    for record in {record.key: record for record in records}.values():
        by_workload.setdefault(record.workload, []).append(record)
    kept = []
    for group in by_workload.values():
        fastest = sorted(group, key=lambda record: record.median)[:keep]
        kept += [record for record in group if record in fastest or record.key in always]
    _write(folder / RECORDS, [record.line for record in kept])
    return len(records) - len(kept)


def _put_aside(problems: Sequence[Problem]) -> None:
    for problem in problems:
        entry = {"line": problem.line, "reason": problem.reason, "text": problem.text}
        with problem.path.with_name(problem.path.name + ".rejected").open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _write(path: Path, lines: Sequence[str]) -> None:
    """Replace a file by lines, atomically."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
