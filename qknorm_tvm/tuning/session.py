"""A tuning session: search, measure, record, decide."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..build import tuned as selection
from ..errors import TuningError
from ..spec import KernelSpec
from . import interrupts, provenance, records
from .lock import FolderLock
from .measure import Plan
from .report import Progress, Reporter, Task
from .stats import paired_ratio, spread
from .target import Built, Device, TunableTarget, decode, encode
from .workers import Workers, build_task, cause, outcome

#: A record must be this much faster than the default, at the low end of its interval.
MIN_GAIN = 1.01
#: Candidates that are compared at the end, the default and configs of other row counts aside.
_FINALISTS = 4
#: Rounds in which finalists are measured in turns, and those for the decision.
_ROUNDS, _FINAL_ROUNDS = 9, 21


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


class Session:
    """Tunes specs on one device, into one folder.

    Parameters
    ----------
    target : TunableTarget
    device : Device
    logs : Path
        Folder of folders of logs.
    runner : LocalRunner or FleetRunner
    options : Options
    reporter : Reporter
    """

    def __init__(
        self,
        target: TunableTarget,
        device: Device,
        logs: Path,
        runner: Any,
        options: Options,
        reporter: Reporter,
    ):
        self.target, self.device, self.runner = target, device, runner
        self.options, self.reporter = options, reporter
        self.folder = logs / device.folder
        self.summary = Summary(self.folder)
        self._date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._versions = provenance.versions(target)
        self._known: dict[str, dict[tuple, list[float]]] = {}
        # Candidates of the task at hand, by config: the decision times some of them again.
        self._built: dict[Any, Built] = {}

    def run(self, specs: Sequence[KernelSpec], rows: Sequence[int]) -> Summary:
        """Tune every spec at every row count.

        Raises
        ------
        TuningError
            The folder is in use, no candidate works, or no server is left.
        KeyboardInterrupt
            Ctrl-C or SIGTERM; what was measured is kept.
        """
        tasks = [(spec, count) for spec in specs for count in sorted(set(rows))]
        self.folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with FolderLock(self.folder), interrupts.deferred(), self._resources():
            ended = "interrupted"
            try:
                self._open_logs()
                told = [self._task(spec, count) for spec, count in tasks]
                place = f"{self.target.text} on {self.device.folder}, logs in {self.folder}"
                self.reporter.begin(told, place, self.options.cost_model)
                for index, (spec, count) in enumerate(tasks):
                    interrupts.check()
                    self.reporter.task(index, told[index])
                    self._tune(index, spec, count)
                ended = "complete"
            except TuningError as error:
                ended = str(error)
                raise
            finally:
                self.summary.seconds = time.monotonic() - started
                self._note_session(tasks, ended)
                self.reporter.end()
        return self.summary

    @contextlib.contextmanager
    def _resources(self) -> Iterator[None]:
        self._scratch = tempfile.mkdtemp(prefix="qknorm-tvm-tune-")
        self._builders = Workers(self.options.builders, 120)
        # Their imports take seconds, in which this process has enough to do.
        self._builders.warm()
        self.runner.warm()
        try:
            yield
        finally:
            self._builders.close()
            self.runner.close()
            shutil.rmtree(self._scratch, ignore_errors=True)

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
            key = tuple(sorted(record.fields.items()))
            self._known.setdefault(record.workload, {})[key] = record.seconds
        self._provenance.describe(self.device, self._versions)
        try:
            self._outcomes = {
                (one.spec, one.rows): one for one in selection.read_outcomes(self.folder)
            }
        except ValueError:
            # Decided anew below; the records that decide are in the database.
            path = self.folder / selection.FILE_NAME
            path.replace(path.with_name(path.name + ".rejected"))
            self._outcomes = {}
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
        if not before or before == self._versions:
            return
        logs = records.read_logs(self.folder)
        path = self.folder / records.RECORDS
        text = ", ".join(f"{name} {value}" for name, value in before.items())
        old = [
            records.Problem(path, number, f"measured with {text}", line)
            for number, line in enumerate(path.read_text().splitlines(), start=1)
        ] if path.exists() else []  # fmt: skip
        records.reject(old)
        self.summary.rejected += old
        records.write_logs(records.Logs(self.folder, {}, [], logs.problems))

    def _note_session(self, tasks: Sequence[tuple[KernelSpec, int]], ended: str) -> None:
        if not hasattr(self, "_provenance") or not self.summary.measured + self.summary.failed:
            return
        self._provenance.session(
            {
                "date": self._date,
                "command": self.options.command,
                "seed": self.options.seed,
                "trials": self.options.trials,
                "cost_model": self.options.cost_model,
                "tasks": len(tasks),
                "measured": self.summary.measured,
                "failed": self.summary.failed,
                "minutes": round(self.summary.seconds / 60, 2),
                "ended": ended,
                "versions": provenance.session_versions(),
            }
        )
        self._provenance.write()

    # ---- one spec at one row count ---------------------------------------------------------

    def _task(self, spec: KernelSpec, rows: int) -> Task:
        choices = self.target.choices(spec, rows)
        empty = [name for name, values in choices.items() if not values]
        if empty:
            raise TuningError(f"the space of {spec.text} at {rows} rows is empty: {empty[0]}")
        size = math.prod(len(values) for values in choices.values())
        return Task(spec.text, rows, min(size, self.options.trials))

    def _tune(self, index: int, spec: KernelSpec, rows: int) -> None:
        from .space import workload_hash

        mod = self.target.workload(spec, rows)
        name = workload_hash(mod)
        self._provenance.workload(name, spec.text, rows)
        known = self._known.setdefault(name, {})
        self.summary.reused += len(known)
        state = Progress(recorded=len(known))
        default = self.target.default(spec, rows)
        measured_before = self.summary.measured
        self._search(index, spec, rows, mod, known, state)
        key = (spec.text, rows)
        settled = self._outcomes.get(key)
        fits = (
            settled is not None
            and settled.workload == name
            and dict(settled.versions) == self._versions
            and dict(settled.default) == default.to_dict()
        )
        # Nothing new was learnt: what was decided before stands.
        if settled is None or not fits or self.summary.measured > measured_before:
            settled = self._decide(spec, rows, name, known, state)
            self._outcomes[key] = settled
            selection.write_outcomes(self.folder, self._outcomes.values())
            self._provenance.write()
        self._forget_built()
        self.summary.outcomes.append(settled)
        self.reporter.outcome(index, settled)

    def _search(
        self, index: int, spec: KernelSpec, rows: int, mod: Any, known: dict, state: Progress
    ) -> None:
        from .space import Search, fields_of, make_cost_model

        options = self.options
        choices = self.target.choices(spec, rows)
        size = math.prod(len(values) for values in choices.values())
        default = encode(self.target, self.target.default(spec, rows))
        budget = min(options.trials, size)
        failed: dict[tuple, str] = {}

        def key_of(fields: Mapping[str, int]) -> tuple:
            return tuple(sorted(fields.items()))

        def spent() -> int:
            return len(known) + len(failed)

        search = Search(
            self.target, mod, choices, self._database,
            make_cost_model(options.cost_model, options.seed),
            seed=options.seed + rows, budget=options.trials, batch=options.batch,
        )  # fmt: skip
        try:
            first = [] if key_of(default) in known else [search.candidate(default)]
            # With the budget spent by earlier sessions, the default may still be to measure.
            if first and spent() >= budget:
                self._measure(spec, rows, mod, first, known, failed, state)
            self._report(index, default, known, failed, state)
            for candidates in search.batches() if spent() < budget else ():
                room = min(options.batch, budget - spent())
                new: dict[tuple, Any] = {}
                for candidate in (*first, *candidates):
                    key = key_of(fields_of(candidate))
                    if key not in known and key not in failed and len(new) < room:
                        new[key] = candidate
                first = []
                # The strategy may propose again what it knows; the rest of the batch is drawn.
                for candidate in search.draw({*known, *failed, *new}, room - len(new)):
                    new[key_of(fields_of(candidate))] = candidate
                if new:
                    self._measure(spec, rows, mod, list(new.values()), known, failed, state)
                    self._report(index, default, known, failed, state)
                search.learn(candidates, [known.get(key_of(fields_of(one))) for one in candidates])
                if spent() >= budget or not new:
                    break
        finally:
            search.close()
        if not known:
            why = next(iter(failed.values()), "none was found")
            raise TuningError(
                f"no candidate of {spec.text} at {rows} rows works: {why} ({len(failed)} tried)"
            )

    def _report(
        self, index: int, default: Mapping[str, int], known: dict, failed: dict, state: Progress
    ) -> None:
        state.failed = len(failed)
        if known:
            state.best_us = 1e6 * min(statistics.median(times) for times in known.values())
        base = known.get(tuple(sorted(default.items())))
        if base:
            state.default_us = 1e6 * statistics.median(base)
        self.reporter.progress(index, state)

    def _measure(
        self,
        spec: KernelSpec,
        rows: int,
        mod: Any,
        candidates: Sequence[Any],
        known: dict,
        failed: dict,
        state: Progress,
    ) -> None:
        """Build and measure a batch, and record what succeeded."""
        from tvm.s_tir import meta_schedule as ms

        from .space import fields_of

        keyed = {tuple(sorted(fields_of(one).items())): one for one in candidates}
        configs = [decode(self.target, dict(key)) for key in keyed]
        built = self._build(spec, rows, configs)
        good = [one for one in built if isinstance(one, Built)]
        times = iter(self.runner.measure(spec, rows, good, self.options.plan))
        workload = self._database.commit_workload(mod)
        for (key, candidate), one in zip(keyed.items(), built, strict=True):
            found = next(times) if isinstance(one, Built) else one
            if isinstance(found, str):
                failed[key] = found
                self.summary.failed += 1
                self.summary.first_failure = self.summary.first_failure or (
                    f"{spec.text} at {rows} rows, {dict(key)}: {found}"
                )
                continue
            known[key] = found
            state.measured += 1
            self.summary.measured += 1
            self._database.commit_tuning_record(
                ms.database.TuningRecord(
                    candidate.sch.trace,
                    workload,
                    found,
                    self.target.tvm_target(),
                    candidate.args_info,
                )
            )

    def _build(self, spec: KernelSpec, rows: int, configs: Sequence[Any]) -> list[Built | str]:
        futures = {
            config: self._builders.submit(
                build_task, self.target.text, self.device.threads, spec.text, rows,
                config.to_dict(), self._scratch,
            )
            for config in configs if config not in self._built
        }  # fmt: skip
        results = {config: outcome(future) for config, future in futures.items()}
        self._built |= {c: one for c, one in results.items() if isinstance(one, Built)}
        return [self._built.get(config) or results[config] for config in configs]

    def _forget_built(self) -> None:
        for one in self._built.values():
            shutil.rmtree(Path(one.path).parent, ignore_errors=True)
        self._built.clear()

    # ---- the decision ----------------------------------------------------------------------

    def _decide(
        self, spec: KernelSpec, rows: int, name: str, known: dict, state: Progress
    ) -> selection.Outcome:
        """Measure the fastest candidates in turns, and keep one where it beats the default."""
        default = self.target.default(spec, rows)
        base = encode(self.target, default)
        base_key = tuple(sorted(base.items()))
        order = sorted(known, key=lambda key: statistics.median(known[key]))
        keys = [key for key in order if key != base_key][:_FINALISTS]
        # A config kept at another row count: where it is as good, one serves both.
        shared = self._kept_elsewhere(spec, rows, known)
        keys += [key for key in shared if key not in keys]
        finalists = [default, *(decode(self.target, dict(key)) for key in keys)]
        built = self._build(spec, rows, finalists)
        usable = [
            (config, one) for config, one in zip(finalists, built, strict=True)
            if isinstance(one, Built)
        ]  # fmt: skip
        if not usable or usable[0][0] != default:
            raise TuningError(f"the default of {spec.text} cannot be built: {built[0]}")
        paths = [one.path for _, one in usable]
        plan = self.options.plan
        samples = self.runner.compare(spec, rows, paths, plan, _ROUNDS)
        shared_configs = [decode(self.target, dict(key)) for key in shared]
        best = self._pick([config for config, _ in usable], samples, shared_configs)
        source, config = "heuristic", default
        # Fresh samples decide: those that made it the fastest flatter it.
        if best == 0:
            gain, base_times, times = paired_ratio(samples[0], samples[0]), samples[0], samples[0]
        else:
            base_times, times = self.runner.compare(
                spec, rows, [paths[0], paths[best]], plan, _FINAL_ROUNDS
            )
            gain = paired_ratio(base_times, times)
            if gain.low > MIN_GAIN:
                source, config = "record", usable[best][0]
        return selection.Outcome(
            spec=spec.text,
            rows=rows,
            workload=name,
            source=source,
            config=config.to_dict(),
            default=default.to_dict(),
            default_us=round(1e6 * statistics.median(base_times), 4),
            best_us=round(1e6 * statistics.median(times), 4),
            gain={k: round(v, 4) for k, v in dataclasses.asdict(gain).items()},
            spread=round(spread(times), 4),
            trials=len(known),
            failed=state.failed,
            versions=self._versions,
            date=self._date,
        )

    def _kept_elsewhere(self, spec: KernelSpec, rows: int, known: dict) -> list[tuple]:
        """Return configs kept at other row counts of a spec that were measured at this one too."""
        found = []
        for one in self._outcomes.values():
            if one.spec == spec.text and one.rows != rows and one.source == "record":
                key = tuple(sorted(encode(self.target, self.target.config(one.config)).items()))
                if key in known and key not in found:
                    found.append(key)
        return found[:2]

    def _pick(
        self, configs: Sequence[Any], samples: Sequence[Sequence[float]], shared: Sequence[Any]
    ) -> int:
        """Return the index of the fastest; among equals the default's, then a shared one's."""
        medians = [statistics.median(one) for one in samples]
        best = medians.index(min(medians))
        for index in (0, *(i for i, config in enumerate(configs) if config in shared)):
            if paired_ratio(samples[index], samples[best]).low <= 1:
                return index
        return best
