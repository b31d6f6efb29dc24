"""A tuning session: search, measure, record, decide."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..build import tuned as selection
from ..errors import TuningError
from ..spec import KernelSpec
from . import interrupts, provenance, records
from .decision import Verdict, spread
from .lock import FolderLock
from .measure import Plan
from .measurer import Measurer
from .report import Progress, Reporter, Task
from .target import Device, TunableTarget, decode, encode
from .workers import ComparisonError, Runner, cause

#: Candidates that are compared at the end, the default aside.
_FINALISTS = 4

#: A candidate: its fields as MetaSchedule samples them, sorted.
Key = tuple[tuple[str, int], ...]


def key_of(fields: Mapping[str, int]) -> Key:
    """Return the key of a candidate's fields."""
    return tuple(sorted(fields.items()))


@dataclasses.dataclass(frozen=True)
class Options:
    """How a session tunes.

    Parameters
    ----------
    trials : int
        Most candidates of a spec and row count, recorded ones included.
    seed : int
    cost_model : str
        ``"xgb"`` or ``"random"``.
    batch : int
        Candidates proposed, built and measured together; what a kill may lose.
    builders : int
        Processes that build.
    plan : Plan
        How long to measure.
    command : str
        For the provenance.
    """

    trials: int = 64
    seed: int = 0
    cost_model: str = "random"
    batch: int = 16
    builders: int = 1
    plan: Plan = dataclasses.field(default_factory=Plan)
    command: str = ""


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

    @property
    def trials_per_minute(self) -> float:
        """Candidates measured in a minute, all told: starting, comparing and deciding too."""
        return 60 * self.measured / self.seconds if self.seconds else math.nan


class _Task:
    """One spec at one row count while it is tuned: its space, and what its candidates took."""

    def __init__(self, target: TunableTarget, spec: KernelSpec, rows: int, trials: int):
        self.spec, self.rows = spec, rows
        self.choices = target.choices(spec, rows)
        empty = [name for name, values in self.choices.items() if not values]
        if empty:
            raise TuningError(f"the space of {spec.text} at {rows} rows is empty: {empty[0]}")
        self.budget = min(trials, math.prod(len(values) for values in self.choices.values()))
        self.default = target.default(spec, rows)
        self.default_key = key_of(encode(target, self.default))
        self.known: dict[Key, list[float]] = {}
        self.failed: dict[Key, str] = {}
        self.progress = Progress()

    def open(self, target: TunableTarget) -> None:
        """Make the workload, which takes a while."""
        from ..declare.workload import workload_hash

        self.mod = target.workload(self.spec, self.rows)
        self.workload = workload_hash(self.mod)

    @property
    def spent(self) -> int:
        """Candidates tried so far, those of earlier sessions included."""
        return len(self.known) + len(self.failed)

    def fastest(self) -> list[Key]:
        """Return the candidates of today's space but the default, the fastest first."""
        keys = [
            key for key in self.known
            if key != self.default_key
            and all(value in self.choices.get(name, ()) for name, value in key)
        ]  # fmt: skip
        return sorted(keys, key=lambda key: statistics.median(self.known[key]))


class Session:
    """Tunes specs on one device, into one folder.

    Parameters
    ----------
    target : TunableTarget
    device : Device
    logs : Path
        Folder of folders of logs.
    runner : Runner
    options : Options
    reporter : Reporter
    """

    def __init__(
        self,
        target: TunableTarget,
        device: Device,
        logs: Path,
        runner: Runner,
        options: Options,
        reporter: Reporter,
    ):
        self.target, self.device = target, device
        self.options, self.reporter = options, reporter
        self.folder = logs / device.folder
        self.summary = Summary(self.folder)
        self._measurer = Measurer(
            target, device.threads, runner, builders=options.builders, plan=options.plan
        )
        self._date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._versions = provenance.versions(target)
        self._known: dict[str, dict[Key, list[float]]] = {}
        self._outcomes: dict[tuple[str, int], selection.Outcome] = {}

    def run(self, specs: Sequence[KernelSpec], rows: Sequence[int]) -> Summary:
        """Tune every spec at every row count.

        Raises
        ------
        TuningError
            The folder is in use, no candidate works, or no server is left.
        KeyboardInterrupt
            Ctrl-C or SIGTERM; what was measured is kept.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rows = sorted(set(rows))
        started = time.monotonic()
        with FolderLock(self.folder), interrupts.deferred(), self._measurer:
            ended, tasks = "interrupted", []
            try:
                self._open_logs()
                tasks = [
                    _Task(self.target, spec, count, self.options.trials)
                    for spec in specs for count in self._rows
                ]  # fmt: skip
                told = [Task(task.spec.text, task.rows, task.budget) for task in tasks]
                place = f"{self.target.text} on {self.device.folder}, logs in {self.folder}"
                self.reporter.begin(told, place, self.options.cost_model)
                for index, task in enumerate(tasks):
                    interrupts.check()
                    self.reporter.task(index, told[index])
                    self._tune(index, task)
                ended = "complete"
            except TuningError as error:
                ended = str(error)
                raise
            finally:
                self.summary.seconds = time.monotonic() - started
                self._note_session(len(tasks), ended)
                self.reporter.end()
        return self.summary

    # ---- logs ------------------------------------------------------------------------------

    def _open_logs(self) -> None:
        from tvm.s_tir import meta_schedule as ms

        self._provenance = provenance.Provenance(self.folder)
        self._provenance.put_aside()
        self._reject_other_versions()
        self.summary.rejected += records.repair(self.folder)
        if self.summary.rejected:
            self.reporter.rejected(self.summary.rejected)
        for record in records.read_logs(self.folder).records:
            self._known.setdefault(record.workload, {})[key_of(record.fields)] = record.seconds
        self._provenance.describe(self.device, self._versions)
        try:
            for outcome in selection.read_outcomes(self.folder):
                self._outcomes[outcome.spec, outcome.rows] = outcome
        except ValueError:
            # Decided anew below; the records that decide are in the database.
            path = self.folder / selection.FILE_NAME
            path.replace(path.with_name(path.name + ".rejected"))
        try:
            self._database = ms.database.JSONDatabase(work_dir=str(self.folder))
        except Exception as error:
            raise TuningError(
                f"TVM cannot read the database in {self.folder} ({cause(error)}); see "
                f"`qknorm-tvm logs validate`, or move the folder away"
            ) from None

    def _reject_other_versions(self) -> None:
        """Put aside what was measured with another TVM or schedule: those times do not compare."""
        before = self._provenance.content["versions"]
        if before and before != self._versions:
            text = ", ".join(f"{name} {value}" for name, value in before.items())
            self.summary.rejected += records.reject_all(self.folder, f"measured with {text}")

    def _note_session(self, tasks: int, ended: str) -> None:
        if not self.summary.measured + self.summary.failed:
            return
        self._provenance.session(
            {
                "date": self._date,
                "command": self.options.command,
                "seed": self.options.seed,
                "trials": self.options.trials,
                "cost_model": self.options.cost_model,
                "tasks": tasks,
                "measured": self.summary.measured,
                "failed": self.summary.failed,
                "minutes": round(self.summary.seconds / 60, 2),
                "ended": ended,
                "versions": provenance.session_versions(),
            }
        )
        self._provenance.write()

    # ---- one spec at one row count ---------------------------------------------------------

    def _tune(self, index: int, task: _Task) -> None:
        task.open(self.target)
        self._provenance.workload(task.workload, task.spec.text, task.rows)
        task.known = self._known.setdefault(task.workload, {})
        task.progress.recorded = len(task.known)
        self.summary.reused += len(task.known)
        measured_before = self.summary.measured
        self._search(index, task)
        settled = self._outcomes.get((task.spec.text, task.rows))
        # Where nothing new was learnt, what was decided before stands.
        if (
            settled is None
            or settled.workload != task.workload
            or dict(settled.versions) != self._versions
            or dict(settled.default) != task.default.to_dict()
            or self.summary.measured > measured_before
        ):
            settled = self._decide(task)
            self._outcomes[task.spec.text, task.rows] = settled
            selection.write_outcomes(self.folder, self._outcomes.values())
            self._provenance.write()
        self._measurer.forget()
        self.summary.outcomes.append(settled)
        self.reporter.outcome(index, settled)

    def _search(self, index: int, task: _Task) -> None:
        from .space import Search, fields_of, make_cost_model

        options = self.options
        search = Search(
            self.target, task.mod, task.choices, self._database,
            make_cost_model(options.cost_model, options.seed),
            seed=options.seed + task.rows, budget=options.trials, batch=options.batch,
        )  # fmt: skip
        try:
            # The default first; also where earlier sessions have spent the budget without it.
            first = []
            if task.default_key not in task.known:
                first = [search.candidate(dict(task.default_key))]
                if task.spent >= task.budget:
                    self._measure(task, first)
            self._report(index, task)
            for proposed in search.batches() if task.spent < task.budget else ():
                wanted = min(options.batch, task.budget - task.spent)
                new: dict[Key, Any] = {}
                for candidate in (*first, *proposed):
                    key = key_of(fields_of(candidate))
                    if key not in task.known and key not in task.failed and len(new) < wanted:
                        new[key] = candidate
                first = []
                # The strategy may propose again what it knows; the rest of the batch is drawn.
                tried = {*task.known, *task.failed, *new}
                for candidate in search.draw(tried, wanted - len(new)):
                    new[key_of(fields_of(candidate))] = candidate
                if new:
                    self._measure(task, list(new.values()))
                    self._report(index, task)
                times = [task.known.get(key_of(fields_of(candidate))) for candidate in proposed]
                search.learn(proposed, times)
                if task.spent >= task.budget or not new:
                    break
        finally:
            search.close()
        if not task.known:
            why = next(iter(task.failed.values()), "none was found")
            raise TuningError(
                f"no candidate of {task.spec.text} at {task.rows} rows works: {why} "
                f"({len(task.failed)} tried)"
            )

    def _report(self, index: int, task: _Task) -> None:
        task.progress.failed = len(task.failed)
        if task.known:
            task.progress.best_us = 1e6 * min(map(statistics.median, task.known.values()))
        if task.default_key in task.known:
            task.progress.default_us = 1e6 * statistics.median(task.known[task.default_key])
        self.reporter.progress(index, task.progress)

    def _measure(self, task: _Task, candidates: Sequence[Any]) -> None:
        """Build and measure a batch, and record what succeeded."""
        from tvm.s_tir import meta_schedule as ms

        from .space import fields_of

        keys = [key_of(fields_of(candidate)) for candidate in candidates]
        configs = [decode(self.target, dict(key)) for key in keys]
        results = self._measurer.measure(task.spec, task.rows, configs)
        workload = self._database.commit_workload(task.mod)
        for key, candidate, result in zip(keys, candidates, results, strict=True):
            if isinstance(result, str):
                task.failed[key] = result
                self.summary.failed += 1
                self.summary.first_failure = self.summary.first_failure or (
                    f"{task.spec.text} at {task.rows} rows, {dict(key)}: {result}"
                )
                continue
            task.known[key] = result
            task.progress.measured += 1
            self.summary.measured += 1
            self._database.commit_tuning_record(
                ms.database.TuningRecord(
                    candidate.sch.trace,
                    workload,
                    result,
                    self.target.tvm_target(),
                    candidate.args_info,
                )
            )

    def _decide(self, task: _Task) -> selection.Outcome:
        """Time the fastest candidates in turns, and keep one that holds against the default."""
        if task.default_key not in task.known:
            why = task.failed.get(task.default_key, "it was not measured")
            raise TuningError(f"the default of {task.spec.text} at {task.rows} rows fails: {why}")
        finalists = [decode(self.target, dict(key)) for key in task.fastest()[:_FINALISTS]]
        counts = {rows for spec, rows in self._outcomes if spec == task.spec.text}
        best, times = task.default, task.known[task.default_key]
        verdicts: list[Verdict] = []
        reason = "no candidate was faster"
        try:
            if finalists:
                best, times = self._measurer.fastest(
                    task.spec, task.rows, [task.default, *finalists]
                )
            if best != task.default:
                verdicts, reason = self._measurer.confirm(
                    task.spec, task.rows, best, [*counts, *self._rows]
                )
        except ComparisonError as error:
            best, times = task.default, task.known[task.default_key]
            reason = f"the fastest candidates could not be compared: {error}"
        median_us = round(1e6 * statistics.median(times), 4)
        about: dict[str, Any] = {
            "default_us": median_us, "best_us": median_us, "spread": round(spread(times), 4),
            "gain": {"low": 1.0, "median": 1.0, "high": 1.0},
        }  # fmt: skip
        if verdicts:
            about = verdicts[0].to_dict()
            about["best_us"] = about.pop("config_us")
            del about["rows"]
        kept = not reason
        return selection.Outcome(
            spec=task.spec.text,
            rows=task.rows,
            workload=task.workload,
            source="record" if kept else "heuristic",
            config=(best if kept else task.default).to_dict(),
            default=task.default.to_dict(),
            trials=len(task.known),
            failed=len(task.failed),
            versions=self._versions,
            date=self._date,
            best=best.to_dict(),
            reason=reason,
            ends=[verdict.to_dict() for verdict in verdicts[1:]],
            **about,
        )
