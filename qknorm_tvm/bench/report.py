"""The rows of a benchmark: as a CSV file that can be compared later, and as a page to read."""

from __future__ import annotations

import csv
import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .alternatives import COPY, OURS
from .cuda import EMPTY
from .timing import BYTES_FORMULA, CaseResult, Timing

#: Files of a report, besides its pictures.
CSV_NAME, PAGE_NAME = "results.csv", "README.md"
#: Columns that files written by earlier versions lack.
_LATER = ("share_of_copy", "command", "date")


@dataclasses.dataclass(frozen=True)
class Row:
    """One candidate's timing in one case; the fields are the columns of the CSV file.

    Units are in the names. What was not measured is NaN, or None, and an empty cell in the file;
    0 threads mean a GPU. `share_of_copy` is the part of the copy's bandwidth in the same case that
    the candidate reaches.
    """

    q_cols: int
    k_cols: int
    rows: int
    in_dtype: str
    out_dtype: str
    threads: int
    candidate: str
    median_us: float
    q1_us: float
    q3_us: float
    samples: int
    calls_per_sample: int
    bytes_per_call: int
    bandwidth_GB_per_s: float
    ratio_to_copy: float
    ratio_to_ours: float
    ratio_to_empty: float
    exact: bool | None
    note: str
    target: str
    config: str
    device: str
    versions: str
    share_of_copy: float = math.nan
    command: str = ""
    date: str = ""

    @property
    def measured(self) -> bool:
        """Whether there is a time."""
        return self.samples > 0

    @property
    def group(self) -> Group:
        """What all rows of one table or picture have in common."""
        return Group(
            self.q_cols, self.k_cols, self.in_dtype, self.out_dtype, self.threads, self.device
        )

    def cells(self) -> dict[str, Any]:
        """Return column -> value for CSV and JSON: None for what was not measured."""
        found = dataclasses.asdict(self)
        for name, value in found.items():
            if isinstance(value, float) and math.isnan(value):
                found[name] = None
        found["threads"] = self.threads or None
        return found


@dataclasses.dataclass(frozen=True)
class Group:
    """Columns, element types, threads (0: a GPU) and device: all but M and the candidate."""

    q_cols: int
    k_cols: int
    in_dtype: str
    out_dtype: str
    threads: int
    device: str

    @property
    def shape(self) -> str:
        """``"1536/256"``."""
        return f"{self.q_cols}/{self.k_cols}"

    @property
    def dtypes(self) -> str:
        """``"bfloat16"``, or ``"bfloat16 to float32"``."""
        same = self.in_dtype == self.out_dtype
        return self.in_dtype if same else f"{self.in_dtype} to {self.out_dtype}"

    @property
    def where(self) -> str:
        """``"1 thread"``, or ``"GPU"``."""
        return f"{self.threads} thread" + "s" * (self.threads != 1) if self.threads else "GPU"

    @property
    def title(self) -> str:
        """All of it but the device, for people."""
        return f"{self.shape} {self.dtypes}, {self.where}"


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def rows_of(result: CaseResult, facts: Mapping[str, str]) -> list[Row]:
    """Return a result as rows.

    Parameters
    ----------
    result : CaseResult
    facts : mapping
        Columns that are the same in every row: ``target``, ``config``, ``device``, ``versions``,
        ``command``, ``date``.
    """

    def figure(value: float, digits: int) -> float:
        return value if math.isnan(value) else round(value, digits)

    copy = result.timing(COPY)
    return [
        Row(
            q_cols=result.q_cols,
            k_cols=result.k_cols,
            rows=result.rows,
            in_dtype=result.in_dtype,
            out_dtype=result.out_dtype,
            threads=result.threads,
            candidate=timing.name,
            median_us=figure(timing.median * 1e6, 4),
            q1_us=figure(timing.q1 * 1e6, 4),
            q3_us=figure(timing.q3 * 1e6, 4),
            samples=timing.samples,
            calls_per_sample=timing.calls,
            bytes_per_call=result.bytes,
            bandwidth_GB_per_s=figure(result.bandwidth(timing), 3),
            ratio_to_copy=figure(result.ratio(timing, COPY), 4),
            ratio_to_ours=figure(result.ratio(timing, OURS), 4),
            ratio_to_empty=figure(result.ratio(timing, EMPTY), 4),
            share_of_copy=figure(copy.median / timing.median if copy else math.nan, 4),
            exact=timing.exact,
            note=timing.note,
            **facts,  # type: ignore[arg-type]
        )
        for timing in result.timings
    ]


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write rows to a file."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row.cells() for row in rows)


def read_csv(path: Path) -> list[Row]:
    """Read what `write_csv` wrote.

    Raises
    ------
    ValueError
        The file lacks a column, holds no rows, or a cell is not what its column holds.
    """
    types_of = typing.get_type_hints(Row)
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        try:
            missing = [x for x in COLUMNS if x not in (reader.fieldnames or ()) and x not in _LATER]
            if missing:
                raise ValueError(
                    f"{path} must be a file that qknorm-tvm bench wrote, got one without the "
                    f"column {missing[0]}"
                )
            lines = list(reader)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} must be a CSV file: {error}") from None
    if not lines:
        raise ValueError(f"{path} must hold timings, got none")
    found = []
    for number, line in enumerate(lines, start=2):
        values = {}
        for name in COLUMNS:
            try:
                values[name] = _value(line.get(name) or "", types_of[name])
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {name} {error}") from None
        found.append(Row(**values))
    return found


def _value(text: str, kind: Any) -> Any:
    if isinstance(kind, types.UnionType):  # exact
        choices = {"": None, "True": True, "False": False}
        if text not in choices:
            raise ValueError(f"must be True, False or empty, got {text!r}")
        return choices[text]
    if kind is str:
        return text
    if not text:
        return kind("nan" if kind is float else 0)
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"must be a number, got {text!r}") from None


def groups_of(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    """Return the rows of each table or picture, in the order of the file."""
    found: dict[Group, list[Row]] = {}
    for row in rows:
        found.setdefault(row.group, []).append(row)
    return found


def candidates_of(rows: Iterable[Row]) -> list[str]:
    """Return the names of the candidates that have a time, in the order of the file."""
    return list(dict.fromkeys(row.candidate for row in rows if row.measured))


# ---- the page ----------------------------------------------------------------------------------


def _microseconds(value: float) -> str:
    from ..cli.output import microseconds

    return microseconds(value * 1e-6)


def _table(headers: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    texts = [headers, ["---"] * len(headers), *lines]
    return ["| " + " | ".join(cells) + " |" for cells in texts]


def _group_table(rows: Sequence[Row]) -> list[str]:
    names = candidates_of(rows)
    by_m: dict[int, dict[str, Row]] = {}
    for one in rows:
        by_m.setdefault(one.rows, {})[one.candidate] = one
    lines = []
    for m, found in by_m.items():
        cells = [f"{m:,}"]
        for name in names:
            row = found.get(name)
            if row is None or not row.measured:
                cells.append("-")
                continue
            time = _microseconds(row.median_us)
            spread = f" ({_microseconds(row.q1_us)}-{_microseconds(row.q3_us)})"
            wrong = ", not exact" if row.exact is False else ""
            cells.append((f"**{time}**" if name == OURS else time) + spread + wrong)
        ours = found[OURS]
        share = ours.share_of_copy
        cells.append(f"{ours.bandwidth_GB_per_s:.1f}")
        cells.append("-" if math.isnan(share) else f"{share:.0%}")
        lines.append(cells)
    headers = ["M", *names, "ours, GB/s", "ours, of the copy's bandwidth"]
    return _table(headers, lines)


def _notes(rows: Sequence[Row]) -> list[str]:
    seen: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        # What each compilation took is of no interest below a table of many.
        if row.note and not (row.measured and row.note.startswith("compiled in")):
            seen.setdefault((row.candidate, row.note), []).append(f"{row.rows:,}")
    count = len({row.rows for row in rows})
    return [
        f"* {name}: {note}" + ("" if len(ms) == count else f" (M = {', '.join(ms)})")
        for (name, note), ms in seen.items()
    ]


def page(
    rows: Sequence[Row],
    pictures: Sequence[tuple[str, str]],
    *,
    host_timings: Sequence[Timing] = (),
    warning: str = "",
) -> str:
    """Return a report as Markdown.

    Parameters
    ----------
    rows : sequence of Row
        Of one run.
    pictures : sequence of (title, file name)
    host_timings : sequence of Timing
        What calls from Python cost.
    warning : str
        What a reader must know before anything else.
    """
    first = rows[0]
    names = ("command", "date", "device", "target", "config", "versions")
    lines = ["# qknorm-tvm bench", ""]
    if warning:
        lines += [f"**{warning}**", ""]
    lines += _table(("", ""), [(name, str(getattr(first, name))) for name in names])
    lines.append("")
    for title, file in pictures:
        lines += [f"![{title}]({file})", ""]
    for group, members in groups_of(rows).items():
        lines += [f"## {group.title}", "", "µs a call, median (quartiles):", ""]
        lines += [*_group_table(members), ""]
        notes = _notes(members)
        lines += [*notes, ""] if notes else []
    measured = [timing for timing in host_timings if timing.measured]
    if measured:
        cells = [
            (t.name, *(_microseconds(x * 1e6) for x in (t.median, t.q1, t.q3))) for t in measured
        ]
        lines += [f"## One call from Python, M = {1 if first.threads else 16}", ""]
        lines += [*_table(("", "µs", "first quartile", "third quartile"), cells), ""]
    lines += [
        "## How to read it",
        "",
        "Candidates took turns in one process; quartiles are of samples. Compare ratios of one "
        'run, not times of two: `qknorm-tvm bench --compare results.csv` does. "Not exact" '
        "means: not equal to the unfused graph bit for bit. The copy reads and writes as many "
        f"bytes. GB/s: {BYTES_FORMULA}.",
        "",
        f"All figures: [{CSV_NAME}]({CSV_NAME}).",
    ]
    return "\n".join(lines) + "\n"


def write_report(
    folder: Path,
    rows: Sequence[Row],
    *,
    host_timings: Sequence[Timing] = (),
    warning: str = "",
) -> list[Path]:
    """Write the CSV file, the pictures and the page; returns the files.

    Raises
    ------
    QKNormError
        matplotlib is not installed.
    """
    from .plots import write_pictures

    folder.mkdir(exist_ok=True)
    written = [folder / CSV_NAME]
    write_csv(written[0], rows)
    pictures = write_pictures(folder, rows)
    written += [folder / file for _, file in pictures]
    text = page(rows, pictures, host_timings=host_timings, warning=warning)
    written.append(folder / PAGE_NAME)
    written[-1].write_text(text)
    return written
