"""What a session tells while it runs: an interface, and nothing, for those who do not listen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..build.tuned import Outcome
from .records import Problem


@dataclasses.dataclass(frozen=True)
class Task:
    """One spec at one row count.

    Parameters
    ----------
    spec : str
        `KernelSpec.text`.
    rows : int
    trials : int
        Most candidates that will be measured: the budget, or the space where that is smaller.
    """

    spec: str
    rows: int
    trials: int


@dataclasses.dataclass
class Progress:
    """How far a session is.

    Parameters
    ----------
    recorded : int
        Candidates of this task that earlier sessions measured.
    measured, failed : int
        Candidates of this task in this session.
    best_us, default_us : float
        Microseconds; NaN while unknown.
    """

    recorded: int = 0
    measured: int = 0
    failed: int = 0
    best_us: float = float("nan")
    default_us: float = float("nan")


class Reporter:
    """Hears of a session; this one stays silent."""

    def begin(self, tasks: Sequence[Task], place: str, cost_model: str) -> None:
        """Tuning begins; `place` says on what and where its logs are."""

    def rejected(self, problems: Sequence[Problem]) -> None:
        """Lines of the logs were put aside."""

    def task(self, index: int, task: Task) -> None:
        """A task begins."""

    def progress(self, index: int, progress: Progress) -> None:
        """Candidates were measured."""

    def outcome(self, index: int, outcome: Outcome) -> None:
        """A task is done."""

    def end(self) -> None:
        """Tuning ends, also when interrupted."""
