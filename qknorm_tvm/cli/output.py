"""What the commands print: rich tables that stay readable in 80 columns and in a pipe."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ..bench.report import BYTES_FORMULA, METHODS, Row, microseconds, notes_of, quartiles
from ..errors import printable

#: Columns below which a table of times goes without its quartiles.
_NARROW = 76
#: Columns of a table of times, by kind of device.
_HEADERS = {
    "cpu": ("µs", "quartiles", "worst", "GB/s", "/ copy", "/ ours", "exact"),
    "cuda": ("µs", "quartiles", "GB/s", "/ empty", "/ copy", "exact"),
}


class _Console(Console):
    """A console that escapes control sequences in text."""

    def render(self, *arguments: Any, **options: Any) -> Iterator[Segment]:
        for segment in super().render(*arguments, **options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def console(*, stderr: bool = False) -> Console:
    """Return a console: as wide as the terminal, 100 columns in a pipe unless COLUMNS is set."""
    stream = sys.stderr if stderr else sys.stdout
    width = None
    if not stream.isatty():
        given = os.environ.get("COLUMNS", "")
        width = int(given) if given.isdigit() and int(given) > 20 else 100
    elif shutil.get_terminal_size().columns < 20:
        width = 80
    return _Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def table(*headers: str, title: str | None = None, left: Iterable[int] = (0,)) -> Table:
    """Return an empty table; columns are right-aligned but for those in `left`."""
    rich_table = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
    )
    rich_table.title_style = "bold"
    left = set(left)
    for index, header in enumerate(headers):
        on_left = index in left
        rich_table.add_column(
            header,
            justify="left" if on_left else "right",
            overflow="fold",
            no_wrap=not on_left,
        )
    return rich_table


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """Return pairs of a name and a text, a line each."""
    lines = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    lines.add_column(style="bold", no_wrap=True)
    lines.add_column(overflow="fold")
    for name, text in pairs:
        lines.add_row(name, text)
    return lines


def ratio(value: float) -> str:
    """Format a ratio."""
    return "-" if math.isnan(value) else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def size(count: int) -> str:
    """Format a file's size."""
    return f"{count / 1000:.1f} kB" if count < 1e6 else f"{count / 1e6:.2f} MB"


def plural(count: int, noun: str) -> str:
    """Format a count of something."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def timing_table(rows: Sequence[Row], *, title: str) -> Table:
    """Return timings: a line each candidate, blocks by M."""
    left_out = "quartiles" if console().width < _NARROW else None
    headers = [header for header in _HEADERS[rows[0].kind] if header != left_out]
    timings = table("M", "", *headers, title=title, left=(1,))
    timings.columns[1].no_wrap = True  # names
    for m, block in itertools.groupby(rows, lambda row: row.rows):
        for index, row in enumerate(block):
            if index == 0:
                timings.add_section()
            figures = _figures(row)
            timings.add_row(
                f"{m:,}" if index == 0 else "",
                Text(row.candidate, style="bold" if index == 0 else ""),
                *(figures[header] if row.measured else "-" for header in headers),
            )
    return timings


def _figures(row: Row) -> dict[str, str]:
    return {
        "µs": microseconds(row.median_us * 1e-6),
        "quartiles": quartiles(row),
        "worst": "" if math.isnan(row.worst_us) else microseconds(row.worst_us * 1e-6),
        "GB/s": f"{row.bandwidth_GB_per_s:.1f}",
        "/ empty": ratio(row.ratio_to_empty),
        "/ copy": ratio(row.ratio_to_copy),
        "/ ours": ratio(row.ratio_to_ours),
        "exact": {None: "", True: "yes", False: "NO"}[row.exact],
    }


def timing_notes(rows: Sequence[Row]) -> list[str]:
    """Return what must be said below a timing table, each note once."""
    return [METHODS[rows[0].kind], f"GB/s: {BYTES_FORMULA}.", *notes_of(rows)]
