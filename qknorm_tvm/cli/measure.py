"""What ``bench`` and ``bench-layer`` do alike: every spec at every M, with a line of progress."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .output import console, plural

if TYPE_CHECKING:
    from ..bench.timing import CaseResult, Timing
    from ..load.module import Module
    from ..spec import KernelSpec


@dataclasses.dataclass
class Measured:
    """What a command measured: cases, calls from Python, and what they were taken on."""

    cases: list[tuple[KernelSpec, CaseResult]] = dataclasses.field(default_factory=list)
    host_timings: list[Timing] = dataclasses.field(default_factory=list)
    facts: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether ours equals the reference in every case."""
        return all(result.exact for _, result in self.cases)


def measure(
    specs: Sequence[KernelSpec],
    rows: Sequence[int],
    *,
    module_for: Callable[[KernelSpec], Module],
    names: Callable[[KernelSpec], Sequence[str]],
    min_time: float,
    threads: Sequence[int] | None = None,
    misaligned: bool = False,
    host: bool = False,
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
    names : callable
        Says what a spec is timed against.
    min_time : float
        Seconds for each candidate.
    threads : sequence of int, optional
        Numbers of threads, on CPUs; by default 1 and all.
    misaligned : bool
        On a GPU: rows at every alignment.
    host : bool
        Also time calls from Python, of the first spec that has one element type.
    """
    from ..bench.harness import compare, host_costs, workload
    from ..bench.timing import SCALAR
    from ..bench.workload import UNIQUE_ROWS, activations
    from ..machine import usable_processors
    from ..schedules.cpu_config import CpuConfig
    from .modules import compile_module, facts_of

    on_gpu = specs[0].parsed_target.kind == "cuda"
    counts = [0] if on_gpu else threads or sorted({1, usable_processors()})
    measured = Measured()
    with console(stderr=True).status("compiling") as status:
        for spec in specs:
            assert spec.q_cols is not None
            assert spec.k_cols is not None
            module = module_for(spec)
            options: dict[str, Any] = {"misaligned": misaligned} if on_gpu else {}
            if SCALAR in names(spec):
                options["scalar"] = compile_module([spec], CpuConfig(vector=1, row_tile=1))
            measured.facts = measured.facts or facts_of(module)
            if host and not measured.host_timings and spec.in_dtype == spec.out_dtype:
                status.update("cost of a call")
                measured.host_timings = host_costs(module, spec, min_time=min_time)
            for count, m in itertools.product(counts, rows):
                where = f"{spec.op} {spec.q_cols}/{spec.k_cols} {spec.in_dtype}"
                where += f", {plural(count, 'thread')}" * (not on_gpu) + f", M = {m}"
                status.update(where)
                if not on_gpu:
                    options["threads"] = count
                inputs = activations(m, spec.q_cols, spec.k_cols, spec.in_dtype)
                result = compare(
                    workload(spec, module, inputs, UNIQUE_ROWS, **options),
                    names(spec),
                    min_time=min_time,
                    status=lambda text, where=where: status.update(  # type: ignore[misc]
                        f"{where}: {text}"
                    ),
                )
                measured.cases.append((spec, result))
    return measured
