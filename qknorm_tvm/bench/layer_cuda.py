"""Timing the statistics and the one-rank layer on a GPU, inside CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..check import reference
from ..check.inputs import Activations
from ..check.reference_torch import row_mean_of_squares_qk as torch_statistics
from ..check.reference_torch import to_torch
from ..load.module import Module
from ..spec import DTYPE_BYTES
from . import alternatives
from . import cuda as benchmark_cuda
from .layer import torch_layer
from .timing import Candidate, CaseResult

#: Statistics and apply as two launches, as the ranks of a group run them.
TWO_LAUNCHES = "two launches"
ALL = (
    benchmark_cuda.EMPTY,
    alternatives.COPY,
    TWO_LAUNCHES,
    alternatives.TORCH,
    alternatives.TORCH_COMPILE,
)
#: What is said below a table.
METHOD = (
    "µs: median of a launch in a chain inside a CUDA graph, candidates taking turns; buffers "
    "beyond L2 rotate. copy: one torch copy_ that reads and writes, together, as many bytes as the "
    "operation. two launches: statistics, then apply. exact: statistics equal to NumPy in the "
    "stated order, outputs to unfused torch given those."
)
# Rows whose statistics are computed by NumPy; benchmarks repeat rows beyond them.
_UNIQUE_ROWS = 1024


def expected_statistics(a: Activations) -> npt.NDArray:
    """Return what ``row_mean_of_squares_qk`` must compute; blocks of rows that repeat, once."""
    found: list[npt.NDArray] = []
    first = [x[:_UNIQUE_ROWS].view(np.uint8) for x in (a.q, a.k)]
    for start in range(0, a.rows, _UNIQUE_ROWS):
        block = [x[start : start + _UNIQUE_ROWS] for x in (a.q, a.k)]
        count = len(block[0])
        repeats = all(
            np.array_equal(x.view(np.uint8), y[:count]) for x, y in zip(block, first, strict=True)
        )
        if start and repeats:
            found.append(found[0][:count])
        else:
            found.append(reference.row_mean_of_squares_qk(*block, order="cuda"))
    return np.concatenate(found)


class _Tensors:
    """One set of tensors on the GPU, and the calls that use them."""

    def __init__(self, a: Activations):
        import torch

        host = (a.q, a.k, a.gamma_q, a.gamma_k)
        q, k, gamma_q, gamma_k = (
            to_torch(np.ascontiguousarray(x)).to("cuda", copy=True) for x in host
        )
        self.layer = (q, k, gamma_q, gamma_k, a.epsilon)
        self.outputs = [torch.empty_like(x) for x in (q, k)]
        self.qk_var = torch.empty(a.rows, 2, device="cuda")
        for out in (*self.outputs, self.qk_var):  # nothing that could pass for a result
            out.view(torch.uint8).fill_(0xA5)
        self.statistics_call = (self.qk_var, q, k)
        self.fused_call = (*self.outputs, gamma_q, gamma_k, q, k, a.epsilon)
        self.apply_call = (*self.outputs, gamma_q, gamma_k, self.qk_var, q, k, a.epsilon)

    def torch_arguments(self, fused: bool) -> tuple[Any, ...]:
        return self.layer if fused else self.layer[:2]


def compare_layer(
    op: str,
    module: Module,
    activations: Activations,
    *,
    min_time: float,
    names: Sequence[str] = ALL,
    status: Callable[[str], None] = lambda text: None,
) -> CaseResult:
    """Check results on the GPU, then time an operation and the alternatives.

    Parameters
    ----------
    op : str
        ``"row_mean_of_squares_qk"`` or ``"qk_rms_norm"``.
    module : Module
        Holds a spec of `op` for the activations; with specs of both other operations too, two
        launches are timed beside ``"qk_rms_norm"``.
    activations : Activations
    min_time : float
        Seconds for each candidate.
    names : sequence of str
        Some of `ALL`; ours is always first.
    status : callable
        Told what is going on.

    Returns
    -------
    CaseResult
        With 0 threads; `bytes` are those read, and for ``"qk_rms_norm"`` those written too.
    """
    import torch

    a = activations
    fused = op == "qk_rms_norm"
    element = DTYPE_BYTES[a.dtype]
    moved = a.rows * (a.q_cols + a.k_cols) * element * (2 if fused else 1)
    count, launches = benchmark_cuda.rotation(moved)
    status("the reference")
    wanted = [to_torch(expected_statistics(a)).to("cuda")]
    status("copying to the GPU")
    sets = [_Tensors(a) for _ in range(count)]
    if fused:
        q, k, gamma_q, gamma_k, epsilon = sets[0].layer
        wanted = list(
            benchmark_cuda.torch_graph(q, k, wanted[0], gamma_q, gamma_k, epsilon, q.dtype)
        )

    def is_exact(outputs: Sequence[Any]) -> bool:
        return all(map(benchmark_cuda.equal_bits, outputs, wanted))

    function = getattr(module, op)
    calls = [one.fused_call if fused else one.statistics_call for one in sets]
    for call in calls:
        function(*call)
    torch.cuda.synchronize()
    exact = all(is_exact(one.outputs if fused else [one.qk_var]) for one in sets)
    candidates = [Candidate(alternatives.OURS, lambda i: function(*calls[i % count]), (), exact)]
    graph: Callable[..., Any] = torch_layer if fused else torch_statistics
    arguments = [one.torch_arguments(fused) for one in sets]
    for name in names:
        status(name)
        if name == benchmark_cuda.EMPTY:
            candidates.append(Candidate(name, benchmark_cuda.EmptyKernel()))
        elif name == alternatives.COPY:
            candidates.append(
                benchmark_cuda.copies(name, a.rows, [a.q_cols + a.k_cols], moved, count)
            )
        elif name == TWO_LAUNCHES:
            if fused and {spec.op for spec in module.specs} >= _BOTH:
                candidates.append(_two_launches(module, sets, is_exact))
        elif name == alternatives.TORCH:
            candidates.append(
                Candidate(name, lambda i: graph(*arguments[i % count]), (), None, "allocates")
            )
        elif name == alternatives.TORCH_COMPILE:
            candidates.append(benchmark_cuda.compiled(graph, arguments))
    status("timing")
    timings = benchmark_cuda.measure_graphs(candidates, launches=launches, min_time=min_time)
    out_dtype = a.dtype if fused else "float32"
    return CaseResult(a.rows, a.q_cols, a.k_cols, a.dtype, out_dtype, 0, moved, timings)


_BOTH = {"row_mean_of_squares_qk", "apply_qk_rms_norm"}


def _two_launches(
    module: Module, sets: Sequence[_Tensors], is_exact: Callable[[Sequence[Any]], bool]
) -> Candidate:
    statistics, apply = module.row_mean_of_squares_qk, module.apply_qk_rms_norm

    def both(i: int) -> None:
        one = sets[i % len(sets)]
        statistics(*one.statistics_call)
        apply(*one.apply_call)

    both(0)
    return Candidate(TWO_LAUNCHES, both, (), is_exact(sets[0].outputs))
