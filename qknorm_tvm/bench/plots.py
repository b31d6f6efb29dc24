"""Pictures of a benchmark's rows, by matplotlib: time and bandwidth over M, and the copy as roof.

They are drawn from rows alone, whatever the device; nothing is shown on a screen.
"""

from __future__ import annotations

import importlib.util
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QKNormError
from .report import CSV_NAME, PAGE_NAME, Row, candidates_of, groups_of, page, write_csv
from .timing import COPY, EMPTY, NUMPY, OURS, SCALAR, TORCH, TORCH_COMPILE, TWO_COPIES, Timing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MISSING = "pictures need matplotlib, which is not installed: pip install 'qknorm-tvm[bench]'"
#: Colour, marker and line of a candidate, the same in every picture; colours that all can tell
#: apart (Okabe and Ito's).
_STYLES = {
    OURS: ("#D55E00", "o", "-"),
    COPY: ("#000000", "s", "-"),
    TWO_COPIES: ("#777777", "s", ":"),
    EMPTY: ("#777777", "_", "--"),
    SCALAR: ("#E69F00", ".", "--"),
    TORCH_COMPILE: ("#0072B2", "^", "-"),
    TORCH: ("#56B4E9", "v", "-"),
    NUMPY: ("#009E73", "D", "-"),
}
_OTHER = ("#999999", "x", "-")
#: Bandwidths further apart than this go on a logarithmic axis: on a GPU they span three decades.
_MOST_LINEAR = 30


def need_matplotlib() -> None:
    """Refuse to go on without matplotlib, before time is spent on measuring.

    Raises
    ------
    QKNormError
        It is not installed; the message says what to install.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise QKNormError(_MISSING)


def _figure(width: float, height: float) -> Figure:
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _series(rows: Sequence[Row], name: str) -> list[Row]:
    return sorted((r for r in rows if r.candidate == name and r.measured), key=lambda r: r.rows)


def _draw(
    axes: Axes,
    rows: Sequence[Row],
    name: str,
    value: Callable[[Row, float], float],
) -> list[float]:
    """Draw one candidate over M, with bars of its quartiles; returns the medians' values.

    Parameters
    ----------
    axes : Axes
    rows : sequence of Row
        The candidate's.
    name : str
        The candidate.
    value : callable
        Returns what is drawn from a row and a time of it in µs.
    """
    colour, marker, line = _STYLES.get(name, _OTHER)
    values = [value(row, row.median_us) for row in rows]
    ends = [sorted((value(row, row.q1_us), value(row, row.q3_us))) for row in rows]
    axes.errorbar(
        [row.rows for row in rows],
        values,
        yerr=[
            [middle - low for middle, (low, _) in zip(values, ends, strict=True)],
            [high - middle for middle, (_, high) in zip(values, ends, strict=True)],
        ],
        label=name,
        color=colour,
        marker=marker,
        linestyle=line,
        linewidth=2.5 if name in (OURS, COPY) else 1.3,
        markersize=6 if name == OURS else 4.5,
        elinewidth=1.2,
        capsize=3,
        zorder=5 if name == OURS else 3,
    )
    return values


def _time(row: Row, us: float) -> float:
    return us


def _bandwidth(row: Row, us: float) -> float:
    return row.bytes_per_call / us / 1e3


def _over_m(axes: Axes, rows: Sequence[Row]) -> None:
    ms = sorted({row.rows for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ms, [f"{m:,}" for m in ms], rotation=45 if len(ms) > 6 else 0)
    axes.minorticks_off()
    axes.set_xlabel("M (rows)")
    axes.grid(alpha=0.3)


#: Of an inch, in the footer's size.
_FOOTER_CHARACTERS = 13


def _footer(figure: Figure, row: Row) -> None:
    parts = [row.device, row.date.partition("T")[0], row.versions]
    text = "  |  ".join(filter(None, parts))
    # A picture shows so many characters a line.
    lines = textwrap.wrap(text, width=int(figure.get_figwidth() * _FOOTER_CHARACTERS))
    figure.supxlabel("\n".join(lines), fontsize=7, color="#555555")


def alternatives_picture(rows: Sequence[Row]) -> Figure:
    """Draw every candidate of one group: time over M, and the share of the copy's bandwidth."""
    figure = _figure(12, 5.4)
    times, shares = figure.subplots(1, 2)
    names = candidates_of(rows)
    copies = {row.rows: row.median_us for row in _series(rows, COPY)}
    for name in names:
        series = _series(rows, name)
        _draw(times, series, name, _time)
        series = [row for row in series if row.rows in copies]
        # An empty kernel moves nothing.
        if series and name != EMPTY:
            _draw(shares, series, name, lambda row, us: 100 * copies[row.rows] / us)
    for axes in (times, shares):
        _over_m(axes, rows)
    times.set_yscale("log")
    times.set_ylabel("time of a call (µs)")
    times.set_title("Time: lower is better")
    shares.set_ylim(bottom=0)
    shares.set_ylabel("share of a copy's bandwidth (%)")
    shares.set_title("Bandwidth, 100 %: a copy; higher is better")
    handles, labels = times.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle(f"QK-RMSNorm, Nq/Nk = {rows[0].title} (bars: quartiles)")
    _footer(figure, rows[0])
    return figure


def roof_picture(groups: Sequence[Sequence[Row]]) -> Figure:
    """Draw ours below the copy as a roof: GB/s over M, a panel for each of several shapes."""
    figure = _figure(1 + 5.5 * len(groups), 5)
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    shares: list[float] = []
    drawn: list[float] = []
    for axes, rows in zip(panels, groups, strict=True):
        copy, ours = _series(rows, COPY), _series(rows, OURS)
        roof, values = _draw(axes, copy, COPY, _bandwidth), _draw(axes, ours, OURS, _bandwidth)
        drawn += roof + values
        axes.fill_between([row.rows for row in copy], 1e-9, roof, color="#000000", alpha=0.07)
        for row, value in zip(ours, values, strict=True):
            if math.isnan(row.share_of_copy):
                continue
            shares.append(row.share_of_copy)
            axes.annotate(
                f"{row.share_of_copy:.0%}",
                (row.rows, value),
                textcoords="offset points",
                xytext=(0, -16 if row.share_of_copy < 1 else 9),  # away from the roof
                ha="center",
                fontsize=8,
                color=_STYLES[OURS][0],
                fontweight="bold",
            )
        _over_m(axes, rows)
        axes.set_title(f"Nq/Nk = {rows[0].shape}")
    panels[0].set_ylabel("bytes moved (GB/s)")
    low, high = min(drawn, default=1.0), max(drawn, default=1.0)
    if high / low > _MOST_LINEAR:
        panels[0].set_yscale("log")
        panels[0].set_ylim(low / 2, high * 4)
    else:
        panels[0].set_ylim(0, high * 1.25)  # the legend's space
    handles, _ = panels[0].get_legend_handles_labels()
    labels = ["roof: a copy of the same bytes", "ours (% of the roof)"][: len(handles)]
    panels[0].legend(handles, labels, loc="upper left", frameon=False)
    first = groups[0][0]
    title = f"{first.prefix}{first.dtypes}, {first.where}"
    if shares:
        title += f": {min(shares):.0%} to {max(shares):.0%} of what a copy of the same bytes moves"
    figure.suptitle(title, fontweight="bold")
    _footer(figure, first)
    return figure


def pictures(rows: Sequence[Row]) -> dict[str, tuple[str, Any]]:
    """Return the pictures of a run: file name without its end -> (title, Figure)."""
    groups = groups_of(rows)
    shapes: dict[str, list[list[Row]]] = {}
    for members in groups:
        first = members[0]
        label = f"{first.prefix}{first.dtypes}, {first.where}"
        shapes.setdefault(label, []).append(members)
    named: list[tuple[str, str, Figure]] = []
    for label, panels in shapes.items():  # first those that say most
        title = f"GB/s over M against a copy: {label}"
        named.append((f"roof {label}", title, roof_picture(panels)))
    for members in groups:
        label = members[0].title
        title = f"All alternatives: {label}"
        named.append((f"alternatives {label}", title, alternatives_picture(members)))
    return {re.sub(r"\W+", "-", name): (title, figure) for name, title, figure in named}


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
    need_matplotlib()
    folder.mkdir(exist_ok=True)
    write_csv(folder / CSV_NAME, rows)
    named = []
    for name, (title, figure) in pictures(rows).items():
        figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
        named.append((title, f"{name}.png"))
    text = page(rows, named, host_timings=host_timings, warning=warning)
    (folder / PAGE_NAME).write_text(text)
    return [folder / file for file in (CSV_NAME, *(file for _, file in named), PAGE_NAME)]
