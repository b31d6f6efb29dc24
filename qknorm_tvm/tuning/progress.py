"""Live progress on a terminal, and a line for each task where there is none."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..build.tuned import Outcome
from .records import Problem
from .report import Progress, Reporter, Task


def short(spec: str, rows: int) -> str:
    """Return a task in few words: columns, dtypes and rows."""
    from ..spec import KernelSpec

    kernel = KernelSpec.from_text(spec)
    kinds = (
        kernel.in_dtype
        if kernel.in_dtype == kernel.out_dtype
        else f"{kernel.in_dtype}->{kernel.out_dtype}"
    )
    return f"{kernel.q_cols}/{kernel.k_cols} {kinds}, {rows:,} rows"


def time_text(us: float) -> str:
    """Format microseconds with three digits."""
    if math.isnan(us):
        return "-"
    return f"{us:,.0f} µs" if us >= 1000 else f"{us:.3g} µs"


def duration(seconds: float) -> str:
    """Format seconds as ``m:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


class RichReporter(Reporter):
    """Trials, best so far and time left, live; tasks as they are done, above.

    Parameters
    ----------
    console : rich.console.Console
    """

    def __init__(self, console: Console):
        self._console = console
        self._live: Live | None = None

    def begin(self, tasks: Sequence[Task], place: str, cost_model: str) -> None:
        """Start the display."""
        self._tasks = list(tasks)
        self._done: dict[int, int] = {}
        self._measured: dict[int, int] = {}
        self._index, self._state = 0, Progress()
        self._started = time.monotonic()
        self._console.print(
            f"tuning {place}; {len(tasks)} tasks, up to {sum(t.trials for t in tasks)} trials, "
            f"cost model {cost_model}"
        )
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._line, console=self._console, transient=True)
            self._live.start()

    def rejected(self, problems: Sequence[Problem]) -> None:
        """Print what was put aside."""
        for problem in problems[:5]:
            self._console.print(f"put aside: {problem}")
        if len(problems) > 5:
            self._console.print(f"put aside: {len(problems) - 5} more lines")

    def task(self, index: int, task: Task) -> None:
        """Follow a task."""
        self._index, self._state = index, Progress()

    def progress(self, index: int, progress: Progress) -> None:
        """Count."""
        self._state = progress
        self._done[index] = progress.recorded + progress.measured + progress.failed
        self._measured[index] = progress.measured + progress.failed

    def outcome(self, index: int, outcome: Outcome) -> None:
        """Print a line for a task that is done."""
        self._done[index] = self._tasks[index].trials
        times = f"default kept, {time_text(outcome.default_us)}"
        if outcome.source == "record":
            times = (
                f"record kept, {time_text(outcome.default_us)} -> {time_text(outcome.best_us)} "
                f"({outcome.gain['median']:.2f}x)"
            )
        self._console.print(
            f"[{index + 1}/{len(self._tasks)}] {short(outcome.spec, outcome.rows)}: {times}, "
            f"{outcome.trials} trials"
        )

    def end(self) -> None:
        """Stop the display."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self) -> Text:
        total = sum(task.trials for task in self._tasks)
        done = min(sum(self._done.values()), total)
        measured = sum(self._measured.values())
        elapsed = time.monotonic() - self._started
        left = duration(elapsed / measured * (total - done)) if measured else "?"
        task, state = self._tasks[self._index], self._state
        failed = f", {state.failed} failed" if state.failed else ""
        return Text(
            f"{done}/{total} trials  {short(task.spec, task.rows)}: best "
            f"{time_text(state.best_us)}, default {time_text(state.default_us)}{failed}  "
            f"{duration(elapsed)} gone, {left} left"
        )
