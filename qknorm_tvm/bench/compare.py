"""Two runs of a benchmark: what got slower beyond the noise.

Times of two runs differ with whatever else the machine does. What is compared is the ratio of ours
to the copy that took turns with it in the same run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..machine import cpu_name
from ..operations import OPERATIONS
from .report import Row
from .timing import COPY, OURS

#: The least change that counts, whatever the quartiles say: where a process's memory happens to
#: lie, beyond the offsets that take turns, changes the ratios of two runs by some percent, of which
#: the spread inside a run shows nothing.
LEAST_CHANGE = 0.05
#: With more noise than this nothing can be said for a case: the run has to be repeated.
MOST_NOISE = 0.2
#: What is said below a table.
METHOD = (
    "old, new / copy: the median of ours over that of the copy in the same run. noise: half the "
    "distances between the quartiles of all four, added as independent errors, and at least "
    f"{LEAST_CHANGE:.0%}; beyond {MOST_NOISE:.0%} nothing can be said."
)
#: What must be equal for two rows to be the same case, with words for it in the order in which
#: a difference is reported. The note, the last of a key, tells misaligned rows.
_KEY = {
    "op": "operations",
    "device": "devices",
    "threads": "threads",
    "in_dtype": "dtypes",
    "out_dtype": "out dtypes",
    "q_cols": "columns of Q",
    "k_cols": "columns of K",
    "rows": "values of M",
    "note": "notes",
}


@dataclasses.dataclass(frozen=True)
class Ratio:
    """The ratio of our median time to the copy's in one run, and its spread.

    `spread` is the root of the sum of squares of both relative spreads, each half the distance
    between quartiles over the median. With 25 samples the error of the ratio is a third of it.
    """

    row: Row
    value: float
    spread: float


@dataclasses.dataclass(frozen=True)
class Change:
    """One case in both runs."""

    old: Ratio
    new: Ratio

    @property
    def row(self) -> Row:
        """Ours in the new run."""
        return self.new.row

    @property
    def change(self) -> float:
        """0.2 where the new ratio is 20 % larger: slower."""
        return self.new.value / self.old.value - 1

    @property
    def noise(self) -> float:
        """Changes up to this mean nothing: both spreads together, at least `LEAST_CHANGE`."""
        return max(LEAST_CHANGE, math.hypot(self.old.spread, self.new.spread))

    @property
    def verdict(self) -> str:
        """``"slower"``, ``"faster"``, ``"same"``, or ``"unclear"`` beyond `MOST_NOISE`."""
        if self.change > self.noise:
            return "slower"
        # A ratio of times: a fifth faster is to be undone by a quarter slower.
        if 1 / (1 + self.change) - 1 > self.noise:
            return "faster"
        return "unclear" if self.noise > MOST_NOISE else "same"

    @property
    def text(self) -> str:
        """One line for people."""
        return (
            f"{case_text(self.row)}: {self.old.value:.2f} -> {self.new.value:.2f} of the copy's "
            f"time, {self.change:+.1%}, noise {self.noise:.1%}"
        )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Cases in both runs, cases in one only, and what else differs between the runs."""

    changes: list[Change]
    only_old: list[str]
    only_new: list[str]
    differences: list[str]

    @property
    def slower(self) -> list[Change]:
        """Cases that got slower beyond the noise."""
        return [change for change in self.changes if change.verdict == "slower"]

    @property
    def unclear(self) -> list[Change]:
        """Cases with too much noise for a verdict."""
        return [change for change in self.changes if change.verdict == "unclear"]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return {
            "cases": [
                {
                    "case": case_text(change.row),
                    "old_ratio_to_copy": change.old.value,
                    "new_ratio_to_copy": change.new.value,
                    "change": change.change,
                    "noise": change.noise,
                    "verdict": change.verdict,
                }
                for change in self.changes
            ],
            "only_old": self.only_old,
            "only_new": self.only_new,
            "differences": self.differences,
        }


def compare(old: Sequence[Row], new: Sequence[Row]) -> Comparison:
    """Compare ours with the copy in two runs.

    Parameters
    ----------
    old, new : sequence of Row

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError
        The runs have no case in common; the message says in what they differ.
    """
    ratios_old, ratios_new = _ratios("old", old), _ratios("new", new)
    common = [key for key in ratios_old if key in ratios_new]
    if not common:
        raise ValueError(_nothing_in_common(list(ratios_old), list(ratios_new)))
    return Comparison(
        [Change(ratios_old[key], ratios_new[key]) for key in common],
        [case_text(ratio.row) for key, ratio in ratios_old.items() if key not in ratios_new],
        [case_text(ratio.row) for key, ratio in ratios_new.items() if key not in ratios_old],
        [
            f"{name}: {was} -> {now}"
            for name in ("target", "config", "versions")
            if (was := _values(old, name)) != (now := _values(new, name))
        ],
    )


def case_text(row: Row) -> str:
    """Return a case for people."""
    note = f", {row.note}" if row.note else ""
    return f"M = {row.rows:,}, {row.title}{note}"


def _values(rows: Sequence[Row], name: str) -> str:
    return " or ".join(dict.fromkeys(str(getattr(row, name)) for row in rows))


def _ratios(which: str, rows: Sequence[Row]) -> dict[tuple, Ratio]:
    """Return our ratio to the copy by key, for the cases in which both were timed."""

    def key_of(row: Row) -> tuple:
        return tuple(getattr(row, name) for name in _KEY)

    # The copy has a note of its own.
    copies = {key_of(row)[:-1]: row for row in rows if row.candidate == COPY and row.measured}
    ratios: dict[tuple, Ratio] = {}
    for row in rows:
        key = key_of(row)
        if row.candidate != OURS or not row.measured or key[:-1] not in copies:
            continue
        if key in ratios:
            raise ValueError(f"the {which} run must hold each case once, got two: {case_text(row)}")
        copy = copies[key[:-1]]
        spread = math.hypot(*((x.q3_us - x.q1_us) / 2 / x.median_us for x in (row, copy)))
        ratios[key] = Ratio(row, row.median_us / copy.median_us, spread)
    if not ratios:
        raise ValueError(f"the {which} run must hold timings of ours and of the copy, got none")
    return ratios


def _nothing_in_common(old: Sequence[tuple], new: Sequence[tuple]) -> str:
    for index, word in enumerate(_KEY.values()):
        values_old, values_new = ({key[index] for key in keys} for keys in (old, new))
        if not values_old & values_new:
            was, now = (
                ", ".join(str(value or "none") for value in sorted(values))
                for values in (values_old, values_new)
            )
            return f"runs must share {word} to be compared, got {was} and {now}"
    return "runs must share a case to be compared, got none that is in both"


def cases_of(rows: Sequence[Row], on_gpu: bool) -> dict[str, Any]:
    """Return the options of ``qknorm-tvm bench`` that measure the cases of some rows again.

    Parameters
    ----------
    rows : sequence of Row
    on_gpu : bool
        Where they are to be measured.

    Returns
    -------
    dict
        ``ops``, ``shapes``, ``rows``, ``dtypes``, ``out_dtype``, ``threads``.

    Raises
    ------
    ValueError
        This is another device, or no single set of options would do.
    """
    if any(on_gpu != (row.threads == 0) for row in rows):
        kind, option = ("a CPU", "leave out") if on_gpu else ("a GPU", "say")
        raise ValueError(f"the old run is {kind}'s: {option} --device cuda")
    if not on_gpu and cpu_name() not in {row.device for row in rows}:
        raise ValueError(
            f"runs must share devices to be compared, got {rows[0].device} and {cpu_name()}"
        )
    pairs = {
        (row.in_dtype, row.out_dtype)
        for row in rows
        if "out_dtype" in OPERATIONS[row.op].spec_fields
    }
    out_dtypes = {out for _, out in pairs}
    mixed = any(a != b for a, b in pairs)
    if mixed and len(out_dtypes) > 1:
        raise ValueError("the old run holds several out dtypes; pick one with --out-dtype")

    def distinct(values: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(values))

    return {
        "ops": distinct(row.op for row in rows),
        "shapes": distinct((row.q_cols, row.k_cols) for row in rows),
        "rows": distinct(row.rows for row in rows),
        "dtypes": distinct(row.in_dtype for row in rows),
        "out_dtype": out_dtypes.pop() if mixed else None,
        "threads": None if on_gpu else distinct(row.threads for row in rows),
    }
