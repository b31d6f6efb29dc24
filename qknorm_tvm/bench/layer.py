"""Timing the statistics and the one-rank layer against what a user would write instead, on CPUs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..check import reference
from ..check.calls import operation_arguments
from ..check.inputs import Activations, aligned_empty
from ..check.reference_torch import apply_qk_rms_norm as torch_apply
from ..check.reference_torch import row_mean_of_squares_qk as torch_statistics
from ..check.reference_torch import to_torch, torch_or_none
from ..check.verification import expected_statistics
from ..load.module import Module
from .alternatives import NOT_INSTALLED, SETTLE_SECONDS, set_num_threads
from .timing import Candidate, CaseResult, measure


def torch_layer(q: Any, k: Any, gamma_q: Any, gamma_k: Any, epsilon: float) -> tuple[Any, Any]:
    """Compute the layer of one rank in torch, operation by operation."""
    return torch_apply(q, k, torch_statistics(q, k), gamma_q, gamma_k, epsilon)


def compare_layer(
    op: str,
    module: Module,
    activations: Activations,
    *,
    threads: int,
    min_time: float,
    torch_compile: bool = True,
    status: Callable[[str], None] = lambda text: None,
) -> CaseResult:
    """Check results, then time an operation and the alternatives on the same arrays.

    The floor of the statistics is one read of q and k (a sum over the same bytes as 64-bit
    integers), that of the fused operation a copy.

    Parameters
    ----------
    op : str
        ``"row_mean_of_squares_qk"`` or ``"qk_rms_norm"``.
    module : Module
        Holds a spec of `op` for the activations.
    activations : Activations
    threads : int
        For ours, torch's, and the floor, which is torch's where there are several.
    min_time : float
        Seconds for each candidate.
    torch_compile : bool
        Also time torch.compile.
    status : callable
        Told what is going on.

    Returns
    -------
    CaseResult
        `bytes` are those read, and for ``"qk_rms_norm"`` those written too.
    """
    a = activations
    set_num_threads(module, threads)
    fused = op == "qk_rms_norm"
    q_out, k_out = aligned_empty(a.q.shape, a.q.dtype), aligned_empty(a.k.shape, a.k.dtype)
    qk_var = aligned_empty(a.qk_var.shape, a.qk_var.dtype)
    for out in (q_out, k_out, qk_var):
        out.view(np.uint8)[...] = 0xA5
    status("the reference")
    wanted: Sequence[Any] = [expected_statistics(module, a)]
    outputs: Sequence[Any] = [qk_var]
    if fused:
        wanted = reference.apply_qk_rms_norm(a.q, a.k, wanted[0], a.gamma_q, a.gamma_k, a.epsilon)
        outputs = [q_out, k_out]
    arrays = {"q_out": q_out, "k_out": k_out, "qk_var": qk_var, "q": a.q, "k": a.k}
    arrays |= {"gamma_q": a.gamma_q, "gamma_k": a.gamma_k}
    function, arguments = getattr(module, op), operation_arguments(op, arrays, a.epsilon)
    function(*arguments)
    exact = not any(reference.differing(x, y) for x, y in zip(outputs, wanted, strict=True))
    candidates = [Candidate("ours", function, arguments, exact)]
    pairs = [(q_out, a.q), (k_out, a.k)]
    candidates.append(_copy(pairs, threads) if fused else _read([a.q, a.k], threads))
    graph = torch_layer if fused else torch_statistics
    candidates += _torch(graph, a, fused, torch_compile, status)
    status("timing")
    timings = measure(candidates, min_time=min_time, settle=SETTLE_SECONDS if threads > 1 else 0.0)
    size = a.q.nbytes + a.k.nbytes
    return CaseResult(
        a.rows, a.q_cols, a.k_cols, a.dtype, a.dtype if fused else "float32", threads,
        2 * size if fused else size, timings,
    )  # fmt: skip


def _words(array: Any) -> Any:
    flat = array.reshape(-1).view(np.uint8)
    whole = len(flat) // 8 * 8
    return flat[:whole].view(np.int64)


def _read(arrays: Sequence[Any], threads: int) -> Candidate:
    words = [_words(one) for one in arrays]
    if threads == 1:

        def read() -> None:
            for one in words:
                np.add.reduce(one)

        return Candidate("floor", read, (), None, "a sum over the bytes by numpy.add.reduce")
    torch = torch_or_none()
    if torch is None:
        return Candidate("floor", None, note=NOT_INSTALLED)
    tensors = [torch.from_numpy(one) for one in words]

    def read_by_torch() -> None:
        for one in tensors:
            one.sum()

    return Candidate("floor", read_by_torch, (), None, "a sum over the bytes by torch.sum")


def _copy(pairs: Sequence[tuple[Any, Any]], threads: int) -> Candidate:
    torch = torch_or_none()
    if threads == 1 or torch is None:

        def copy() -> None:
            for to, x in pairs:
                np.copyto(to, x)

        return Candidate("floor", copy, (), None, "a copy by numpy.copyto, one thread")
    tensors = [(to_torch(to), to_torch(x)) for to, x in pairs]

    def copy_by_torch() -> None:
        for to, x in tensors:
            to.copy_(x)

    return Candidate("floor", copy_by_torch, (), None, "a copy by torch.copy_")


def _torch(
    graph: Callable[..., Any], a: Activations, fused: bool, torch_compile: bool, status: Any
) -> list[Candidate]:
    torch = torch_or_none()
    if torch is None:
        return [Candidate(name, None, note=NOT_INSTALLED) for name in ("torch", "torch.compile")]
    arguments: tuple[Any, ...] = (to_torch(a.q), to_torch(a.k))
    if fused:
        arguments += (to_torch(a.gamma_q), to_torch(a.gamma_k), a.epsilon)
    found = [Candidate("torch", graph, arguments)]
    if torch_compile:
        status("torch.compile")
        try:
            with torch.no_grad(), contextlib.redirect_stderr(None):
                torch.compiler.reset()
                compiled = torch.compile(graph, dynamic=False)
                compiled(*arguments)
            found.append(Candidate("torch.compile", functools.partial(compiled), arguments))
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            found.append(Candidate("torch.compile", None, note=f"failed: {reason[0][:80]}"))
    return found
