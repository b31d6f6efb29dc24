"""A tuning session: search, measure, record, decide."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from ..build import tuned as selection
from ..declare.workload import workload_hash
from ..errors import TuningError
from ..spec import KernelSpec
from . import folders, records
from .decision import Verdict, judge
from .devices import Device
from .fleet import Fleet
from .measurer import ComparisonError, Measurer
from .report import Reporter
from .targets import TunableTarget
from .workers import cause, check_signals, deferred_signals

#: Candidates proposed, built and measured together; what a kill may lose.
_BATCH = 16
#: Candidates that are compared at the end, the default aside.
_FINALISTS = 4


@dataclasses.dataclass
class Summary:
    """What a session found.

    Parameters
    ----------
    folder : Path
        Where its logs are.
    outcomes : list of Outcome
        One for each spec and row count.
    measured, failed, reused : int
        Candidates of this session; of earlier ones that were not measured again.
    first_failure : str
        Why the first failed one did.
    rejected : list of Problem
        Lines that were put aside.
    seconds : float
    """

    folder: Path
    outcomes: list[selection.Outcome] = dataclasses.field(default_factory=list)
    measured: int = 0
    failed: int = 0
    reused: int = 0
    first_failure: str = ""
    rejected: list[records.Problem] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


class _Task:
    """One spec at one row count while it is tuned: its space, and what its candidates took."""

    def __init__(self, target: TunableTarget, spec: KernelSpec, rows: int, trials: int):
        self.spec, self.rows = spec, rows
        self.default = target.default(spec, rows)
        self.choices = target.choices(spec, rows)
        self.budget = min(trials, math.prod(len(values) for values in self.choices.values()))
        #: Samples of configs, those of earlier sessions included; why others failed.
        self.known: dict[Any, list[float]] = {}
        self.failed: dict[Any, str] = {}

    @property
    def spent(self) -> int:
        """Candidates tried so far."""
        return len(self.known) + len(self.failed)

    def holds(self, fields: Mapping[str, int]) -> bool:
        """Whether today's space has a candidate of an earlier session."""
        return fields.keys() == self.choices.keys() and all(
            fields[name] in values for name, values in self.choices.items()
        )

    def __str__(self) -> str:
        spec, dtype = self.spec, self.spec.in_dtype
        if spec.out_dtype != dtype:
            dtype += f"->{spec.out_dtype}"
        return f"{spec.q_cols}/{spec.k_cols} {dtype}, {self.rows:,} rows"


class Session:
    """Tunes specs on one device, into one folder; for the parameters see `tune`."""

    def __init__(
        self,
        target: TunableTarget,
        device: Device,
        logs: Path,
        *,
        trials: int,
        seed: int = 0,
        cost_model: str = "random",
        fleet: Fleet | None = None,
        workers: int = 1,
        command: str = "",
        reporter: Reporter | None = None,
    ):
        self._target, self._device, self._folder = target, device, logs / device.folder
        self._trials, self._seed, self._cost_model = trials, seed, cost_model
        self._command, self._reporter = command, reporter or Reporter()
        self._measurer = Measurer(target, fleet, workers)
        self._summary = Summary(self._folder)
        self._date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._records: list[records.Record] = []
        self._outcomes: dict[tuple[str, int], selection.Outcome] = {}

    def run(self, specs: Sequence[KernelSpec], rows: Sequence[int]) -> Summary:
        """Tune every spec at every row count.

        Raises
        ------
        TuningError
            The folder is in use, a default fails, or no server is left.
        KeyboardInterrupt
            Ctrl-C or SIGTERM; what was measured is kept.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._rows = sorted(set(rows))
        self._started = time.monotonic()
        with folders.locked(self._folder), deferred_signals(), self._measurer:
            ended = "interrupted"
            self._tasks: list[_Task] = []
            try:
                self._open_logs()
                self._tasks = [
                    _Task(self._target, spec, count, self._trials)
                    for spec in specs for count in self._rows
                ]  # fmt: skip
                self._reporter.line(
                    f"tuning {self._target.text} on {self._device.folder}, logs in {self._folder}; "
                    f"{len(self._tasks)} tasks, up to {sum(task.budget for task in self._tasks)} "
                    f"trials, cost model {self._cost_model}"
                )
                for index, task in enumerate(self._tasks):
                    check_signals()
                    outcome = self._tune(task)
                    self._summary.outcomes.append(outcome)
                    self._report_outcome(index, task, outcome)
                ended = "complete"
            except TuningError as error:
                ended = str(error)
                raise
            finally:
                self._summary.seconds = time.monotonic() - self._started
                self._note_session(ended)
        return self._summary

    # ---- logs ------------------------------------------------------------------------------

    def _open_logs(self) -> None:
        from tvm.s_tir import meta_schedule as ms

        try:
            self._provenance = folders.read_provenance(self._folder)
        except ValueError:
            folders.set_aside(self._folder / folders.PROVENANCE)
            self._provenance = folders.read_provenance(self._folder)
        before, today = self._provenance["versions"], self._target.versions
        if before and before != today:
            # Times with another TVM or schedule do not compare.
            text = ", ".join(f"{name} {value}" for name, value in before.items())
            self._summary.rejected += records.reject_all(self._folder, f"measured with {text}")
        self._provenance["device"] = {"folder": self._device.folder, **self._device.details}
        self._provenance["versions"] = today
        self._summary.rejected += records.repair(self._folder)
        if self._summary.rejected:
            self._reporter.line(
                f"put aside, in *.rejected: {len(self._summary.rejected)} lines, the first: "
                f"{self._summary.rejected[0]}"
            )
        self._records = records.read_logs(self._folder).records
        try:
            for outcome in selection.read_outcomes(self._folder):
                self._outcomes[outcome.spec, outcome.rows] = outcome
        except ValueError:
            # Decided anew below; the records that decide are in the database.
            folders.set_aside(self._folder / selection.FILE_NAME)
        try:
            self._database = ms.database.JSONDatabase(work_dir=str(self._folder))
        except Exception as error:
            raise TuningError(
                f"TVM cannot read the database in {self._folder} ({cause(error)}); see "
                f"`qknorm-tvm logs validate`, or move the folder away"
            ) from None

    def _note_session(self, ended: str) -> None:
        summary = self._summary
        if not summary.measured + summary.failed:
            return
        names = ("apache-tvm", "apache-tvm-ffi")
        about = {
            "date": self._date,
            "command": self._command,
            "seed": self._seed,
            "trials": self._trials,
            "cost_model": self._cost_model,
            "tasks": len(self._tasks),
            "measured": summary.measured,
            "failed": summary.failed,
            "minutes": round(summary.seconds / 60, 2),
            "ended": ended,
            "versions": {
                "qknorm-tvm": __version__,
                **{name: importlib.metadata.version(name) for name in names},
            },
        }
        self._provenance["sessions"].append(about)
        folders.write_provenance(self._folder, self._provenance)

    # ---- one spec at one row count ---------------------------------------------------------

    def _tune(self, task: _Task) -> selection.Outcome:
        """Search, and decide where something new was learnt or nothing was decided before."""
        mod = self._target.workload(task.spec, task.rows)
        workload = workload_hash(mod)
        for record in self._records:
            if record.workload == workload and task.holds(record.fields):
                task.known[self._target.decode(record.fields)] = record.seconds
        self._summary.reused += len(task.known)
        before = self._summary.measured
        self._search(task, mod)
        outcome = self._outcomes.get((task.spec.text, task.rows))
        if (
            outcome is None
            or outcome.workload != workload
            or dict(outcome.versions) != self._target.versions
            or dict(outcome.default) != task.default.to_dict()
            or self._summary.measured > before
        ):
            outcome = self._decide(task, workload)
            self._outcomes[task.spec.text, task.rows] = outcome
            selection.write_outcomes(self._folder, self._outcomes.values())
            folders.write_provenance(self._folder, self._provenance)
        self._measurer.forget()
        return outcome

    def _search(self, task: _Task, mod: Any) -> None:
        """Measure candidates until the budget is spent; the default before all others."""
        from .search import Search

        search = Search(
            self._target, mod, task.choices, self._database, self._cost_model,
            seed=self._seed + task.rows, budget=self._trials, batch=_BATCH,
        )  # fmt: skip
        try:
            if task.default not in task.known:
                self._measure(task, mod, {task.default: search.candidate(task.default)})
            if task.default in task.failed:
                raise TuningError(
                    f"the default of {task.spec.text} at {task.rows} rows fails: "
                    f"{task.failed[task.default]}"
                )
            while task.spent < task.budget:
                tried = {*task.known, *task.failed}
                candidates = search.propose(tried, min(_BATCH, task.budget - task.spent))
                if not candidates:
                    break
                self._measure(task, mod, candidates)
                search.learn(task.known)
        finally:
            search.close()

    def _measure(self, task: _Task, mod: Any, candidates: Mapping[Any, Any]) -> None:
        """Build and measure a batch, and record what succeeded."""
        from tvm.s_tir import meta_schedule as ms

        results = self._measurer.measure(task.spec, task.rows, list(candidates))
        workload = self._database.commit_workload(mod)
        for (config, candidate), result in zip(candidates.items(), results, strict=True):
            if isinstance(result, str):
                task.failed[config] = result
                self._summary.failed += 1
                self._summary.first_failure = self._summary.first_failure or (
                    f"{task.spec.text} at {task.rows} rows, {config}: {result}"
                )
                continue
            task.known[config] = result
            self._summary.measured += 1
            self._database.commit_tuning_record(
                ms.database.TuningRecord(
                    candidate.sch.trace,
                    workload,
                    result,
                    self._target.tvm_target(),
                    candidate.args_info,
                )
            )
        self._report_progress(task)

    def _decide(self, task: _Task, workload: str) -> selection.Outcome:
        """Time the fastest candidates in turns, and keep one that holds against the default."""
        by_speed = sorted(task.known, key=lambda config: statistics.median(task.known[config]))
        finalists = [config for config in by_speed if config != task.default][:_FINALISTS]
        counts = {rows for spec, rows in self._outcomes if spec == task.spec.text}
        best = task.default
        verdicts: list[Verdict] = []
        reason = "no candidate was faster"
        try:
            if finalists:
                best = self._measurer.fastest(task.spec, task.rows, [task.default, *finalists])
            if best != task.default:
                verdicts, reason = self._measurer.confirm(
                    task.spec, task.rows, best, [*counts, *self._rows]
                )
        except ComparisonError as error:
            best = task.default
            reason = f"the fastest candidates could not be compared: {error}"
        times = task.known[task.default]
        about = (verdicts[0] if verdicts else judge(task.rows, [[times, times]])).to_dict()
        return selection.Outcome(
            spec=task.spec.text,
            rows=task.rows,
            workload=workload,
            source="heuristic" if reason else "record",
            config=(task.default if reason else best).to_dict(),
            default=task.default.to_dict(),
            trials=len(task.known),
            failed=len(task.failed),
            versions=self._target.versions,
            date=self._date,
            best=best.to_dict(),
            reason=reason,
            ends=[verdict.to_dict() for verdict in verdicts[1:]],
            default_us=about["default_us"],
            best_us=about["config_us"],
            gain=about["gain"],
            spread=about["spread"],
        )

    # ---- what the user sees ----------------------------------------------------------------

    def _report_progress(self, task: _Task) -> None:
        total = sum(each.budget for each in self._tasks)
        done = min(sum(each.spent for each in self._tasks), total)
        measured = self._summary.measured + self._summary.failed
        elapsed = time.monotonic() - self._started
        best = 1e6 * min(map(statistics.median, task.known.values()), default=math.nan)
        failed = f", {len(task.failed)} failed" if task.failed else ""
        self._reporter.status(
            f"{done}/{total} trials  {task}: best {best:.4g} µs{failed}  {_minutes(elapsed)} gone, "
            f"{_minutes(elapsed / measured * (total - done))} left"
        )

    def _report_outcome(self, index: int, task: _Task, outcome: selection.Outcome) -> None:
        times = f"default kept, {outcome.default_us:.4g} µs"
        if outcome.source == "record":
            times = (
                f"record kept, {outcome.default_us:.4g} µs -> {outcome.best_us:.4g} µs, "
                f"{outcome.gain['median']:.3f} times faster (at least {outcome.gain['low']:.3f}), "
                f"spread {outcome.spread:.1%}"
            )
        elif outcome.best != outcome.default:
            times += f" ({outcome.reason})"
        self._reporter.line(
            f"[{index + 1}/{len(self._tasks)}] {task}, {outcome.trials} trials: {times}"
        )


def _minutes(seconds: float) -> str:
    """Format seconds as ``m:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
