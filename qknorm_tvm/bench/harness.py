"""The harness: every spec at every M, results checked, candidates timed; and what calls cost."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..load.module import Module
from ..machine import usable_processors
from ..spec import KernelSpec
from .cpu import CpuWorkload
from .cuda import CudaWorkload
from .report import HOST_ROWS, Row, are_exact, rows_of
from .timing import SCALAR, Timing, measure
from .workload import BENCHMARKS, Workload


def workload(spec: KernelSpec, module: Module, *arguments: Any, **options: Any) -> Workload:
    """Return the workload of a spec's kind of device; see `CpuWorkload` and `CudaWorkload`."""
    kinds = {kind.kind: kind for kind in (CpuWorkload, CudaWorkload)}
    return kinds[spec.parsed_target.kind](spec, module, *arguments, **options)


def workload_of_rows(spec: KernelSpec, module: Module, rows: int, **options: Any) -> Workload:
    """Return the workload of a spec with the inputs of its operation's benchmark."""
    benchmark = BENCHMARKS[spec.op]
    unique_rows = min(rows, benchmark.unique_rows or rows)
    return workload(spec, module, benchmark.inputs(spec, unique_rows), rows, **options)


def compare(
    work: Workload,
    names: Sequence[str],
    facts: Mapping[str, str],
    *,
    min_time: float,
    status: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Check results, then time ours and the alternatives on the same arrays.

    Parameters
    ----------
    work : Workload
    names : sequence of str
        Some of `Benchmark.candidates`; ours is always first.
    facts : mapping
        Columns of the rows that say what the timings were taken on.
    min_time : float
        Seconds for each candidate.
    status : callable
        Told what is going on.

    Returns
    -------
    list of Row
    """
    status("the reference")
    candidates = [work.ours()]
    for name in names:
        status(name)
        candidates.append(work.candidate(name))
    status("timing")
    columns = {
        "op": work.spec.op,
        "q_cols": work.activations.q_cols,
        "k_cols": work.activations.k_cols,
        "rows": work.rows,
        "in_dtype": work.spec.in_dtype,
        "out_dtype": str(work.spec.out_dtype),
        "threads": work.threads,
        "bytes_per_call": work.bytes,
        **facts,
    }
    return rows_of(measure(candidates, min_time=min_time, sampler=work.sampler), columns)


@dataclasses.dataclass
class Measured:
    """What `measure_all` measured: timings, and what calls from Python cost."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    host_timings: list[Timing] = dataclasses.field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether what is ours equals the reference in every case."""
        return are_exact(self.rows)


def measure_all(
    specs: Sequence[KernelSpec],
    rows: Sequence[int],
    *,
    module_for: Callable[[KernelSpec], Module],
    facts_of: Callable[[Module], Mapping[str, str]],
    is_timed: Callable[[str], bool] = lambda name: True,
    min_time: float,
    threads: Sequence[int] | None = None,
    misaligned: bool = False,
    host: bool = False,
    status: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Check and time specs of one kind of device.

    Parameters
    ----------
    specs : sequence of KernelSpec
        With fixed columns.
    rows : sequence of int
        Values of M.
    module_for : callable
        Loads or compiles what holds a spec.
    facts_of : callable
        Says what timings of a module are taken on: columns of `Row`.
    is_timed : callable
        Says which of `Benchmark.candidates` ours is timed against.
    min_time : float
        Seconds for each candidate.
    threads : sequence of int, optional
        Numbers of threads, on CPUs; by default 1 and all.
    misaligned : bool
        On a GPU: rows at every alignment.
    host : bool
        Also time calls from Python, of the first spec that has one element type.
    status : callable
        Told what is going on.
    """
    measured = Measured()
    for spec in specs:
        spec.check_alone("timed")
        status(f"compiling {spec.text}")
        module, kind = module_for(spec), spec.parsed_target.kind
        facts = facts_of(module)
        names = list(filter(is_timed, BENCHMARKS[spec.op].candidates(kind)))
        options: list[dict[str, Any]] = [{"misaligned": misaligned}]
        if kind == "cpu":
            scalar = _scalar_module(spec) if SCALAR in names else None
            counts = threads or sorted({1, usable_processors()})
            options = [{"threads": count, "scalar": scalar} for count in counts]
        if host and not measured.host_timings and spec.in_dtype == spec.out_dtype:
            status("cost of a call")
            work = workload_of_rows(spec, module, HOST_ROWS[kind])
            calls = work.host_calls()
            measured.host_timings = measure(calls, min_time=min_time, sampler=work.host_sampler)
        for how, m in itertools.product(options, rows):
            work = workload_of_rows(spec, module, m, **how)
            where = f"{spec.op} {spec.q_cols}/{spec.k_cols} {spec.in_dtype}"
            where += f", threads: {work.threads}" * (kind == "cpu") + f", M = {m}"
            measured.rows += compare(
                work,
                names,
                facts,
                min_time=min_time,
                status=lambda text, where=where: status(f"{where}: {text}"),  # type: ignore[misc]
            )
    return measured


def _scalar_module(spec: KernelSpec) -> Module:
    """Return a module without explicit vectors."""
    from ..call.compiled import compile
    from ..schedules.cpu_config import CpuConfig

    return compile([spec], config=CpuConfig(vector=1, row_tile=1)).module
