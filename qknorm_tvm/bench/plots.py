"""Pictures of a benchmark's rows, by matplotlib: time and bandwidth over M, and the copy as roof.

They are drawn from rows alone, whatever the device; nothing is shown on a screen.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QKNormError
from .report import CSV_NAME, PAGE_NAME, Group, Row, candidates_of, groups_of, page, write_csv
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
    axes: Axes, rows: Sequence[Row], name: str, points: Sequence[tuple[float, float, float]]
) -> None:
    """Draw one candidate: (low, middle, high) for each row, bars from low to high."""
    colour, marker, line = _STYLES.get(name, _OTHER)
    ms = [row.rows for row in rows]
    low = [middle - low for low, middle, _ in points]
    high = [high - middle for _, middle, high in points]
    axes.errorbar(
        ms,
        [middle for _, middle, _ in points],
        yerr=[low, high],
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


def _of_copy(row: Row, copy_us: float) -> tuple[float, float, float]:
    """Return the share of the copy's bandwidth in percent, by a candidate's quartiles."""
    return tuple(100 * copy_us / us for us in (row.q3_us, row.median_us, row.q1_us))  # type: ignore[return-value]


def alternatives_picture(group: Group, rows: Sequence[Row]) -> Figure:
    """Draw every candidate of one group: time over M, and the share of the copy's bandwidth.

    Parameters
    ----------
    group : Group
    rows : sequence of Row
        Those of the group.

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure = _figure(12, 5.4)
    times, shares = figure.subplots(1, 2)
    names = candidates_of(rows)
    copies = {row.rows: row.median_us for row in _series(rows, COPY)}
    for name in names:
        series = _series(rows, name)
        _draw(times, series, name, [(row.q1_us, row.median_us, row.q3_us) for row in series])
        series = [row for row in series if row.rows in copies]
        # An empty kernel moves nothing.
        if series and name != EMPTY:
            points = [_of_copy(row, copies[row.rows]) for row in series]
            _draw(shares, series, name, points)
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
    figure.suptitle(f"QK-RMSNorm, Nq/Nk = {group.title} (bars: quartiles)")
    _footer(figure, rows[0])
    return figure


def roof_picture(groups: dict[Group, list[Row]]) -> Figure:
    """Draw ours below the copy as a roof: GB/s over M, a panel for each group.

    Parameters
    ----------
    groups : dict
        Groups that differ in columns only, with their rows.

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure = _figure(1 + 5.5 * len(groups), 5)
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    shares: list[float] = []
    seen: list[float] = []
    for axes, (group, rows) in zip(panels, groups.items(), strict=True):
        ours, copy = _series(rows, OURS), _series(rows, COPY)
        bounds = {}
        for name, series in ((COPY, copy), (OURS, ours)):
            bounds[name] = [_bandwidth(row) for row in series]
            _draw(axes, series, name, bounds[name])
            seen += [value for point in bounds[name] for value in point]
        shares += [row.share_of_copy for row in ours if not math.isnan(row.share_of_copy)]
        if copy:
            roof = [middle for _, middle, _ in bounds[COPY]]
            axes.fill_between([r.rows for r in copy], 1e-9, roof, color="#000000", alpha=0.07)
        for row, (_, middle, _) in zip(ours, bounds[OURS], strict=True):
            below = row.share_of_copy < 1  # away from the roof
            if not math.isnan(row.share_of_copy):
                axes.annotate(
                    f"{row.share_of_copy:.0%}",
                    (row.rows, middle),
                    textcoords="offset points",
                    xytext=(0, -16 if below else 9),
                    ha="center",
                    fontsize=8,
                    color=_STYLES[OURS][0],
                    fontweight="bold",
                )
        _over_m(axes, rows)
        axes.set_title(f"Nq/Nk = {group.shape}")
    panels[0].set_ylabel("bytes moved (GB/s)")
    low, high = min(seen, default=1.0), max(seen, default=1.0)
    if high / low > _MOST_LINEAR:
        panels[0].set_yscale("log")
        panels[0].set_ylim(low / 2, high * 4)
    else:
        panels[0].set_ylim(0, high * 1.25)  # the legend's space
    handles, _ = panels[0].get_legend_handles_labels()
    labels = ["roof: a copy of the same bytes", "ours (% of the roof)"][: len(handles)]
    panels[0].legend(handles, labels, loc="upper left", frameon=False)
    group = next(iter(groups))
    title = f"{group.dtypes}, {group.where}"
    if shares:
        title += f": {min(shares):.0%} to {max(shares):.0%} of what a copy of the same bytes moves"
    figure.suptitle(title, fontweight="bold")
    _footer(figure, next(iter(groups.values()))[0])
    return figure


def _bandwidth(row: Row) -> tuple[float, float, float]:
    """Return GB/s, by a candidate's quartiles."""
    return tuple(row.bytes_per_call / us / 1e3 for us in (row.q3_us, row.median_us, row.q1_us))  # type: ignore[return-value]


def pictures(rows: Sequence[Row]) -> dict[str, tuple[str, Any]]:
    """Return file name without its end -> (title, Figure); first those that say most.

    Parameters
    ----------
    rows : sequence of Row
        Of one device or several.
    """
    roofs: dict[tuple[str, str, str], dict[Group, list[Row]]] = {}
    groups = groups_of(rows)
    for group, members in groups.items():
        roofs.setdefault((group.dtypes, group.where, group.device), {})[group] = members
    figures: dict[str, tuple[str, Any]] = {}

    def add(name: str, title: str, figure: Figure) -> None:
        name = re.sub(r"\W+", "-", name)
        names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
        figures[next(n for n in names if n not in figures)] = (title, figure)

    for (dtypes, where, _), members_of in roofs.items():
        title = f"GB/s over M against a copy: {dtypes}, {where}"
        add(f"roof {dtypes} {where}", title, roof_picture(members_of))
    for group, members in groups.items():
        title = f"All alternatives: {group.title}"
        add(f"alternatives {group.title}", title, alternatives_picture(group, members))
    return figures


def write_pictures(folder: Path, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Write every picture as PNG; returns (title, file name) of each.

    Raises
    ------
    QKNormError
        matplotlib is not installed.
    """
    need_matplotlib()
    written = []
    for name, (title, figure) in pictures(rows).items():
        figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
        written.append((title, f"{name}.png"))
    return written


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
    folder.mkdir(exist_ok=True)
    written = [folder / CSV_NAME]
    write_csv(written[0], rows)
    pictures = write_pictures(folder, rows)
    written += [folder / file for _, file in pictures]
    text = page(rows, pictures, host_timings=host_timings, warning=warning)
    written.append(folder / PAGE_NAME)
    written[-1].write_text(text)
    return written
