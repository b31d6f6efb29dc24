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

from .timing import COPY, EMPTY, OURS, SCALAR, Timing

_APPLY = "apply_qk_rms_norm"
#: Files of a report, besides its pictures.
CSV_NAME, PAGE_NAME = "results.csv", "README.md"
#: M where calls from Python are timed: few rows, or the host waits for a GPU's queue.
HOST_ROWS = {"cpu": 1, "cuda": 16}
#: How bandwidth is computed, for people.
BYTES_FORMULA = (
    "bytes = M rows of Q and K, and where they are stored of V, as they are read, and as they are "
    "written, to outputs and to a paged cache: M*(Nq+Nk)*(in_bytes+out_bytes) without one, of "
    "statistics without out_bytes; gamma, qk_var, positions and angles, which the processor's "
    "caches hold, are not counted"
)
#: What is said below a table, by kind of device.
METHODS = {
    "cpu": "µs: median of a call, interleaved; quartiles: of the samples; worst: the median with "
    "outputs at the slowest of 8 offsets from their inputs in a page; / copy, / ours: ratios of "
    "medians; exact: equal to the unfused NumPy graph bit for bit.",
    "cuda": "µs: median of a launch in a chain inside a CUDA graph, candidates taking turns; "
    "buffers beyond L2 rotate. copy: one torch copy_ of as many bytes as q and k together; two "
    "copies: of q's and of k's; two launches: statistics, then apply. exact: equal bit for bit to "
    "unfused torch on this GPU, statistics to NumPy in the stated order.",
}
#: Columns that files written by earlier versions lack.
_LATER = ("share_of_copy", "command", "date", "worst_us", "op")


@dataclasses.dataclass(frozen=True)
class Row:
    """One candidate's timing in one case; the fields are the columns of the CSV file.

    Units are in the names. What was not measured is NaN, or None, and an empty cell in the file;
    0 threads mean a GPU. `share_of_copy` is the part of the copy's bandwidth in the same case that
    the candidate reaches, `worst_us` the median at the slowest of several relative addresses.
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
    worst_us: float = math.nan
    op: str = _APPLY

    @property
    def measured(self) -> bool:
        """Whether there is a time."""
        return self.samples > 0

    @property
    def kind(self) -> str:
        """The kind of device: ``"cpu"`` or ``"cuda"``."""
        return "cpu" if self.threads else "cuda"

    @property
    def shape(self) -> str:
        """``"1536/256"``."""
        return f"{self.q_cols}/{self.k_cols}"

    @property
    def prefix(self) -> str:
        """The operation and a space; nothing for apply."""
        return "" if self.op == _APPLY else f"{self.op} "

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
        """What all rows of one table or picture have in common."""
        return f"{self.prefix}{self.shape} {self.dtypes}, {self.where}"

    def cells(self) -> dict[str, Any]:
        """Return column -> value for CSV and JSON: None for what was not measured."""
        cells = dataclasses.asdict(self)
        for name, value in cells.items():
            if isinstance(value, float) and math.isnan(value):
                cells[name] = None
        cells["threads"] = self.threads or None
        return cells


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def rows_of(timings: Sequence[Timing], columns: Mapping[str, Any]) -> list[Row]:
    """Return the timings of one case as rows.

    Parameters
    ----------
    timings : sequence of Timing
    columns : mapping
        Those that are the same in every row: what was timed, and what it was taken on.
    """
    medians = {timing.name: timing.median for timing in timings}

    def rounded(value: float, digits: int = 4) -> float:
        return value if math.isnan(value) else round(value, digits)

    def median(name: str) -> float:
        return medians.get(name, math.nan)

    return [
        Row(
            candidate=timing.name,
            median_us=rounded(timing.median * 1e6),
            q1_us=rounded(timing.q1 * 1e6),
            q3_us=rounded(timing.q3 * 1e6),
            worst_us=rounded(timing.worst * 1e6),
            samples=timing.samples,
            calls_per_sample=timing.calls,
            bandwidth_GB_per_s=rounded(columns["bytes_per_call"] / timing.median / 1e9, 3),
            ratio_to_copy=rounded(timing.median / median(COPY)),
            ratio_to_ours=rounded(timing.median / median(OURS)),
            ratio_to_empty=rounded(timing.median / median(EMPTY)),
            share_of_copy=rounded(median(COPY) / timing.median),
            exact=timing.exact,
            note=timing.note,
            **columns,
        )
        for timing in timings
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
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        try:
            present = (*(reader.fieldnames or ()), *_LATER)
            missing = [name for name in COLUMNS if name not in present]
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
    return [_row(path, number, line) for number, line in enumerate(lines, start=2)]


def _row(path: Path, number: int, line: Mapping[str, str | None]) -> Row:
    column_types = typing.get_type_hints(Row)
    values = {}
    for name in COLUMNS:
        if name in _LATER and name not in line:
            continue
        try:
            values[name] = _value(line.get(name) or "", column_types[name])
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {name} {error}") from None
    return Row(**values)


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


def groups_of(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the rows of each table or picture, in the order of the file."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.title, []).append(row)
    return list(groups.values())


def candidates_of(rows: Iterable[Row]) -> list[str]:
    """Return the names of the candidates that have a time, in the order of the file."""
    return list(dict.fromkeys(row.candidate for row in rows if row.measured))


def are_exact(rows: Iterable[Row]) -> bool:
    """Whether what is ours equals the reference in every case."""
    return all(row.exact is not False for row in rows if row.candidate in (OURS, SCALAR))


def notes_of(rows: Sequence[Row]) -> list[str]:
    """Return what candidates say, each note once, with the M that it is about."""
    all_rows = {row.rows for row in rows}
    by_note: dict[tuple[str, str], dict[int, None]] = {}
    for row in rows:
        # What each compilation took is of no interest below a table of many.
        if row.note and not (row.measured and row.note.startswith("compiled in")):
            by_note.setdefault((row.candidate, row.note), {})[row.rows] = None
    return [
        f"{candidate}: {note}"
        + ("" if len(ms) == len(all_rows) else f" (M = {', '.join(f'{m:,}' for m in ms)})")
        for (candidate, note), ms in by_note.items()
    ]


def microseconds(seconds: float) -> str:
    """Format a time in µs with three or four digits."""
    us = seconds * 1e6
    if math.isnan(us):
        return "-"
    return f"{us:,.0f}" if us >= 100 else f"{us:.2f}"


def quartiles(row: Row) -> str:
    """Format a candidate's quartiles in µs."""
    return f"{microseconds(row.q1_us * 1e-6)}-{microseconds(row.q3_us * 1e-6)}"


# ---- the page ----------------------------------------------------------------------------------


def _table(headers: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    texts = [headers, ["---"] * len(headers), *lines]
    return ["| " + " | ".join(cells) + " |" for cells in texts]


def _group_table(rows: Sequence[Row]) -> list[str]:
    names = candidates_of(rows)
    by_m: dict[int, dict[str, Row]] = {}
    for row in rows:
        by_m.setdefault(row.rows, {})[row.candidate] = row
    lines = []
    for m, by_name in by_m.items():
        ours = by_name[OURS]
        share = "-" if math.isnan(ours.share_of_copy) else f"{ours.share_of_copy:.0%}"
        times = [_time_cell(by_name.get(name)) for name in names]
        lines.append([f"{m:,}", *times, f"{ours.bandwidth_GB_per_s:.1f}", share])
    headers = ["M", *names, "ours, GB/s", "ours, of the copy's bandwidth"]
    return _table(headers, lines)


def _time_cell(row: Row | None) -> str:
    if row is None or not row.measured:
        return "-"
    median = microseconds(row.median_us * 1e-6)
    worst = "" if math.isnan(row.worst_us) else f", worst {microseconds(row.worst_us * 1e-6)}"
    wrong = ", not exact" if row.exact is False else ""
    median = f"**{median}**" if row.candidate == OURS else median
    return f"{median} ({quartiles(row)}{worst}){wrong}"


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
    worst = ", worst of several relative addresses" if first.threads else ""
    for members in groups_of(rows):
        lines += [f"## {members[0].title}", "", f"µs a call, median (quartiles{worst}):", ""]
        lines += [*_group_table(members), ""]
        notes = [f"* {note}" for note in notes_of(members)]
        lines += [*notes, ""] if notes else []
    measured = [timing for timing in host_timings if timing.measured]
    if measured:
        cells = [(t.name, *map(microseconds, (t.median, t.q1, t.q3))) for t in measured]
        lines += [f"## One call from Python, M = {HOST_ROWS[first.kind]}", ""]
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
