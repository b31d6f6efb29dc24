"""What the commands print: rich tables that stay readable in 80 columns and in a pipe."""

from __future__ import annotations

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

from ..bench.report import METHODS, microseconds, notes_of
from ..bench.timing import BYTES_FORMULA, COPY, EMPTY, OURS, CaseResult, Timing
from ..errors import printable

#: Columns below which a table of times goes without its quartiles.
_NARROW = 76


class _Console(Console):
    """A console to which no text sends control sequences; styles are its own."""

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
    made = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
    )
    made.title_style = "bold"
    left = set(left)
    for index, header in enumerate(headers):
        on_left = index in left
        made.add_column(
            header,
            justify="left" if on_left else "right",
            overflow="fold",
            no_wrap=not on_left,
        )
    return made


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """Return lines of a name and what there is to say about it."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, text in pairs:
        made.add_row(name, text)
    return made


def ratio(value: float) -> str:
    """Format a ratio."""
    return "-" if math.isnan(value) else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def size(count: int) -> str:
    """Format a file's size."""
    return f"{count / 1000:.1f} kB" if count < 1e6 else f"{count / 1e6:.2f} MB"


def plural(count: int, noun: str) -> str:
    """Format a count of something."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def timing_table(results: Sequence[CaseResult], *, title: str) -> Table:
    """Return the timings of several shapes: a line each candidate, blocks by shape."""
    headers = ["µs", "quartiles", "worst", "GB/s", "/ copy", "/ ours", "exact"]
    if _on_gpu(results):
        headers = ["µs", "quartiles", "GB/s", "/ empty", "/ copy", "exact"]
    # What a narrow terminal has no place for.
    left_out = headers.index("quartiles") if console().width < _NARROW else None
    shown = [index for index in range(len(headers)) if index != left_out]
    made = table("M", "", *(headers[index] for index in shown), title=title, left=(1,))
    made.columns[1].no_wrap = True  # names
    for result in results:
        for index, timing in enumerate(result.timings):
            figures = _figures(result, timing) if timing.measured else ["-"] * len(headers)
            made.add_row(
                f"{result.rows:,}" if index == 0 else "",
                Text(timing.name, style="bold" if index == 0 else ""),
                *(figures[column] for column in shown),
                end_section=index + 1 == len(result.timings),
            )
    return made


def _on_gpu(results: Sequence[CaseResult]) -> bool:
    return any(not result.threads for result in results)


def _figures(result: CaseResult, timing: Timing) -> list[str]:
    to = (COPY, OURS) if result.threads else (EMPTY, COPY)
    worst = "" if math.isnan(timing.worst) else microseconds(timing.worst)
    return [
        microseconds(timing.median),
        f"{microseconds(timing.q1)}-{microseconds(timing.q3)}",
        *([worst] if result.threads else []),
        f"{result.bandwidth(timing):.1f}",
        *(ratio(result.ratio(timing, name)) for name in to),
        {None: "", True: "yes", False: "NO"}[timing.exact],
    ]


def timing_notes(results: Sequence[CaseResult]) -> list[str]:
    """Return what must be said below a timing table, each note once."""
    timings = ((r.rows, t.name, t.note, t.measured) for r in results for t in r.timings)
    method = METHODS["cuda" if _on_gpu(results) else "cpu"]
    return [method, f"GB/s: {BYTES_FORMULA}.", *notes_of(timings)]
