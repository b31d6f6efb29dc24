"""What ours is timed against: a copy, unfused NumPy and torch, torch.compile, a scalar loop."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import reference
from .benchmark import Candidate, CaseResult, case_bytes, measure
from .calls import module_arguments
from .inputs import Activations, aligned_empty
from .reference_torch import apply_qk_rms_norm as torch_graph
from .reference_torch import to_numpy, to_torch, torch_or_none
from .runtime import Module
from .spec import DTYPE_BYTES

#: Names of candidates, in the order of the tables.
OURS, COPY, NUMPY, TORCH = "ours", "copy", "NumPy", "torch"
TORCH_COMPILE, SCALAR = "torch.compile", "scalar"
ALL = (COPY, NUMPY, TORCH, TORCH_COMPILE, SCALAR)
NOT_INSTALLED = "torch is not installed"

#: Untimed calls before each sample with several threads, see `measure`.
_SETTLE_SECONDS = 0.005
#: Handing work to Python threads takes some 50 µs, in which one thread copies more than this.
_LEAST_BYTES_FOR_PYTHON_THREADS = 2 << 20


def set_num_threads(module: Module, threads: int) -> None:
    """Set the threads of a module, and torch's where it is installed; 0: the module's default."""
    module.library.get_function("qknorm_set_num_threads")(threads)
    torch = torch_or_none()
    if torch is not None and threads:
        torch.set_num_threads(threads)


def compare(
    module: Module,
    activations: Activations,
    *,
    out_dtype: str,
    threads: int,
    min_time: float,
    names: Sequence[str] = ALL,
    scalar: Module | None = None,
    compile_limit: float = 60.0,
    status: Callable[[str], None] = lambda text: None,
) -> CaseResult:
    """Check results, then time ours and the alternatives on the same arrays.

    Parameters
    ----------
    module : Module
        Holds a spec for the activations.
    activations : Activations
    out_dtype : str
    threads : int
        For ours, the copy, torch and the scalar loop. NumPy has one.
    min_time : float
        Seconds for each candidate.
    names : sequence of str
        Some of `ALL`; ours is always first.
    scalar : Module, optional
        The same operation compiled with ``vector=1, row_tile=1``.
    compile_limit : float
        Seconds that torch.compile may take to compile.
    status : callable
        Told what is going on.

    Returns
    -------
    CaseResult
    """
    a = activations
    set_num_threads(module, threads)
    dtype = reference.NUMPY_DTYPES[out_dtype]
    q_out, k_out = aligned_empty(a.q.shape, dtype), aligned_empty(a.k.shape, dtype)
    for out in (q_out, k_out):  # touch the memory, and leave nothing that could pass for a result
        out.view(np.uint8)[...] = 0xA5
    status("the reference")
    expected = reference.apply_qk_rms_norm(
        a.q, a.k, a.qk_var, a.gamma_q, a.gamma_k, a.epsilon, out_dtype
    )

    def is_exact(outputs: Sequence[npt.NDArray]) -> bool:
        pairs = zip(outputs, expected, strict=True)
        return not any(reference.differing(actual, wanted) for actual, wanted in pairs)

    candidates = [_ours(OURS, module, a, q_out, k_out, is_exact)]
    for name in names:
        status(name)
        if name == COPY:
            candidates.append(_copy(a, q_out, k_out, threads))
        elif name == NUMPY:
            note = "one thread" if threads > 1 else ""
            candidates.append(
                Candidate(NUMPY, functools.partial(_numpy, a, out_dtype), (), True, note)
            )
        elif name == TORCH:
            candidates.append(_torch(a, out_dtype, is_exact))
        elif name == TORCH_COMPILE:
            candidates.append(_torch_compile(a, out_dtype, is_exact, compile_limit))
        elif name == SCALAR and scalar is not None:
            candidates.append(_ours(SCALAR, scalar, a, q_out, k_out, is_exact))
    status("timing")
    timings = measure(candidates, min_time=min_time, settle=_SETTLE_SECONDS if threads > 1 else 0.0)
    return CaseResult(
        a.rows,
        a.q_cols,
        a.k_cols,
        a.dtype,
        out_dtype,
        threads,
        case_bytes(a.rows, a.q_cols, a.k_cols, DTYPE_BYTES[a.dtype], DTYPE_BYTES[out_dtype]),
        timings,
    )


def _ours(
    name: str,
    module: Module,
    a: Activations,
    q_out: npt.NDArray,
    k_out: npt.NDArray,
    is_exact: Callable[[Sequence[npt.NDArray]], bool],
) -> Candidate:
    arguments = module_arguments(a, q_out, k_out)
    module.apply_qk_rms_norm(*arguments)
    return Candidate(name, module.apply_qk_rms_norm, arguments, is_exact((q_out, k_out)))


def _numpy(a: Activations, out_dtype: str) -> None:
    reference.apply_qk_rms_norm(a.q, a.k, a.qk_var, a.gamma_q, a.gamma_k, a.epsilon, out_dtype)


def _copy(a: Activations, q_out: npt.NDArray, k_out: npt.NDArray, threads: int) -> Candidate:
    """Return a copy that reads and writes as many bytes as ours, of the same arrays if it can."""
    pairs = []
    for x, out in ((a.q, q_out), (a.k, k_out)):
        if x.nbytes == out.nbytes:
            pairs.append((out.view(np.uint8).reshape(-1), x.view(np.uint8).reshape(-1)))
        else:
            half = (x.nbytes + out.nbytes) // 2
            pairs.append((aligned_empty((half,), np.uint8), np.ones(half, np.uint8)))
    torch = torch_or_none()
    total = sum(to.nbytes + x.nbytes for to, x in pairs)
    if threads == 1 or (torch is None and total < _LEAST_BYTES_FOR_PYTHON_THREADS):

        def copy() -> None:
            for to, x in pairs:
                np.copyto(to, x)

        note = "numpy.copyto" + (", one thread: too few bytes for Python's" if threads > 1 else "")
        return Candidate(COPY, copy, (), None, note)
    if torch is not None:
        # In elements of the array's own size: torch splits work among threads by elements.
        kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
        item = a.q.itemsize if a.q.itemsize == q_out.itemsize else 1
        tensors = [tuple(torch.from_numpy(x).view(kinds[item]) for x in pair) for pair in pairs]

        def copy_by_torch() -> None:
            for to, x in tensors:
                to.copy_(x)

        return Candidate(COPY, copy_by_torch, (), None, f"torch.copy_, {threads} threads")
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    pieces = [
        piece
        for to, x in pairs
        for piece in zip(np.array_split(to, threads), np.array_split(x, threads), strict=True)
    ]

    def copy_by_pool() -> None:
        for _ in pool.map(lambda piece: np.copyto(*piece), pieces):
            pass

    return Candidate(COPY, copy_by_pool, (), None, f"numpy.copyto in {threads} Python threads")


def _tensors(a: Activations) -> list[Any]:
    return [to_torch(x) for x in (a.q, a.k, a.qk_var, a.gamma_q, a.gamma_k)]


def _torch(
    a: Activations, out_dtype: str, is_exact: Callable[[Sequence[npt.NDArray]], bool]
) -> Candidate:
    torch = torch_or_none()
    if torch is None:
        return Candidate(TORCH, None, note=NOT_INSTALLED)
    arguments = (*_tensors(a), a.epsilon, getattr(torch, out_dtype))
    with torch.no_grad():
        exact = is_exact([to_numpy(x) for x in torch_graph(*arguments)])
    return Candidate(TORCH, torch_graph, arguments, exact)


def _torch_compile(
    a: Activations,
    out_dtype: str,
    is_exact: Callable[[Sequence[npt.NDArray]], bool],
    limit: float,
) -> Candidate:
    torch = torch_or_none()
    if torch is None:
        return Candidate(TORCH_COMPILE, None, note=NOT_INSTALLED)
    if a.rows == 0:
        return Candidate(TORCH_COMPILE, None, note="nothing to compile for no rows")
    arguments = (*_tensors(a), a.epsilon, getattr(torch, out_dtype))
    start = time.perf_counter()
    try:
        with _time_limit(limit), _quiet(), torch.no_grad():
            # Shapes fixed: the best that it can do. Guards of other shapes would cost it time.
            torch.compiler.reset()
            compiled = torch.compile(torch_graph, dynamic=False)
            exact = is_exact([to_numpy(x) for x in compiled(*arguments)])
            compiled(*arguments)
    except _TimeLimitError:
        return Candidate(TORCH_COMPILE, None, note=f"stopped: compiled for over {limit:g} s")
    except Exception as error:
        return Candidate(TORCH_COMPILE, None, note=f"failed: {_reason(error)}")
    note = f"compiled in {time.perf_counter() - start:.1f} s"
    return Candidate(TORCH_COMPILE, compiled, arguments, exact, note)


def _reason(error: BaseException) -> str:
    """Return the line of an inductor error that says most, short."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, _TimeLimitError):
            return "it took too long to compile"
        if type(seen).__name__ == "InvalidCxxCompiler" or "No working C++ compiler" in str(seen):
            return "no working C++ compiler (it needs g++)"
        seen = seen.__cause__ or seen.__context__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."


class _TimeLimitError(BaseException):
    """Not an ``Exception``: what it passes through must not take it for a failure of its own."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the block after some seconds; only in the main thread, where signals arrive."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise _TimeLimitError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.compile's warnings and its compiler's chatter out of the tables."""
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere:
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            with contextlib.redirect_stderr(nowhere):
                yield
        finally:
            logging.disable(level)
