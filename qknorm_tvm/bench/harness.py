"""One case of a benchmark: results checked, candidates timed; and what calls from Python cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..load.module import Module
from ..spec import KernelSpec
from .cpu import CpuWorkload
from .cuda import CudaWorkload, host_sampler
from .timing import HOST_ROWS, CaseResult, HostSampler, Timing, measure
from .workload import Workload, activations


def workload(spec: KernelSpec, module: Module, *arguments: Any, **options: Any) -> Workload:
    """Return the workload of a spec's kind of device; see `CpuWorkload` and `CudaWorkload`."""
    kinds = {kind.kind: kind for kind in (CpuWorkload, CudaWorkload)}
    return kinds[spec.parsed_target.kind](spec, module, *arguments, **options)


def compare(
    work: Workload,
    names: Sequence[str],
    *,
    min_time: float,
    status: Callable[[str], None] = lambda text: None,
) -> CaseResult:
    """Check results, then time ours and the alternatives on the same arrays.

    Parameters
    ----------
    work : Workload
    names : sequence of str
        Some of `Benchmark.candidates`; ours is always first.
    min_time : float
        Seconds for each candidate.
    status : callable
        Told what is going on.

    Returns
    -------
    CaseResult
    """
    status("the reference")
    candidates = [work.ours()]
    for name in names:
        status(name)
        candidates.append(work.candidate(name))
    status("timing")
    a, spec = work.activations, work.spec
    return CaseResult(
        a.rows,
        a.q_cols,
        a.k_cols,
        spec.in_dtype,
        str(spec.out_dtype),
        work.threads,
        work.bytes,
        work.measure(candidates, min_time),
    )


def host_costs(module: Module, spec: KernelSpec, *, min_time: float) -> list[Timing]:
    """Time what calls from Python cost the host, outputs given, by every way to call.

    Parameters
    ----------
    module : Module
        Holds `spec`.
    spec : KernelSpec
        Of ``apply_qk_rms_norm``, with fixed columns and equal in and out dtypes.
    min_time : float
        Seconds for each way.

    Returns
    -------
    list of Timing
    """
    assert spec.q_cols is not None
    assert spec.k_cols is not None
    kind = spec.parsed_target.kind
    inputs = activations(HOST_ROWS[kind], spec.q_cols, spec.k_cols, spec.in_dtype)
    calls = workload(spec, module, inputs).host_calls()
    sampler = host_sampler if kind == "cuda" else HostSampler
    return measure(calls, min_time=min_time, sampler=sampler)
