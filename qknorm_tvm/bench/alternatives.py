"""What ours is timed against: a copy, unfused NumPy and torch, compilers, a scalar loop."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib.util
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

from ..check import reference
from ..check.calls import module_arguments
from ..check.inputs import Activations, aligned_empty
from ..check.reference_torch import apply_qk_rms_norm as torch_graph
from ..check.reference_torch import to_numpy, to_torch, torch_or_none
from ..load.module import Module
from ..machine import usable_processors
from ..spec import DTYPE_BYTES
from .timing import Candidate, CaseResult, case_bytes, measure

#: Names of candidates, in the order of the tables.
OURS, COPY, NUMPY, TORCH = "ours", "copy", "NumPy", "torch"
TORCH_COMPILE, SCALAR = "torch.compile", "scalar"
ALL = (COPY, NUMPY, TORCH, TORCH_COMPILE, SCALAR)
#: Compilers that only a report asks for, where they are installed; numba's name is its package's.
NUMBA, JAX = "numba", "JAX"
MORE = (NUMBA, JAX)
NOT_INSTALLED = "torch is not installed"

#: Untimed calls before each sample with several threads, see `measure`.
SETTLE_SECONDS = 0.005
#: Handing work to Python threads takes some 50 µs, in which one thread copies more than this.
_LEAST_BYTES_FOR_PYTHON_THREADS = 2 << 20


def more_installed() -> tuple[str, ...]:
    """Return those of `MORE` that are installed."""
    return tuple(name for name in MORE if importlib.util.find_spec(name.lower()) is not None)


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
        Some of `ALL` and `MORE`; ours is always first.
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
        elif name == NUMBA:
            candidates.append(_numba(a, q_out, k_out, threads, is_exact))
        elif name == JAX:
            candidates.append(_jax(a, out_dtype, threads, is_exact))
    status("timing")
    timings = measure(candidates, min_time=min_time, settle=SETTLE_SECONDS if threads > 1 else 0.0)
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


# ---- numba ---------------------------------------------------------------------------------------


@functools.cache
def _numba_loop(in_dtype: str, out_dtype: str, parallel: bool) -> Any:
    """Return one fused loop over rows, which numba compiles at its first call.

    numba has neither bfloat16 nor, on CPUs, float16: both go in and out as uint16, converted
    exactly by operations on bits that LLVM vectorises.
    """
    import numba
    from numba import prange

    u32, f32 = np.uint32, np.float32
    sign, nan = u32(0x80000000), u32(0x7F800000)

    def load(value: Any) -> Any:
        return value

    store = load

    def load_bfloat16(value: Any) -> Any:
        return u32(u32(value) << u32(16)).view(f32)

    def store_bfloat16(value: Any) -> Any:
        bits = f32(value).view(u32)
        rounded = u32(bits + u32(0x7FFF) + (u32(bits >> u32(16)) & u32(1)))
        quiet = u32(bits | u32(0x400000))
        return np.uint16((quiet if u32(bits & ~sign) > nan else rounded) >> u32(16))

    def load_float16(value: Any) -> Any:
        half = u32(value)
        # The exponent's bias by a product, exact also for denormals; infinity and NaN apart.
        moved = u32((half & u32(0x7FFF)) << u32(13))
        scaled = f32(moved.view(f32) * f32(2.0**112)).view(u32)
        special = u32(moved | nan)
        bits = special if (half & u32(0x7C00)) == u32(0x7C00) else scaled
        return u32(bits | u32((half & u32(0x8000)) << u32(16))).view(f32)

    def store_float16(value: Any) -> Any:
        bits = f32(value).view(u32)
        size = u32(bits & ~sign)
        # Adding 0.5 rounds where float16's denormals end.
        denormal = u32(f32(size.view(f32) + f32(0.5)).view(u32) - u32(0x3F000000))
        normal = u32(u32(size - u32(0x37FFF001) + (u32(size >> u32(13)) & u32(1))) >> u32(13))
        special = u32(0x7E00) if size > nan else u32(0x7C00)
        half = denormal if size < u32(0x38800000) else normal
        half = special if size >= u32(0x47800000) else half
        return np.uint16(u32(half | u32(u32(bits & sign) >> u32(16))))

    loads = {"bfloat16": load_bfloat16, "float16": load_float16, "float32": load}
    stores = {"bfloat16": store_bfloat16, "float16": store_float16, "float32": store}
    read = numba.njit(loads[in_dtype], inline="always")
    write = numba.njit(stores[out_dtype], inline="always")

    def loop(q_out, k_out, gamma_q, gamma_k, var, q, k, epsilon):  # type: ignore[no-untyped-def]
        for row in prange(q.shape[0]):
            rs = f32(1) / np.sqrt(var[row, 0] + epsilon)
            for col in range(q.shape[1]):
                q_out[row, col] = write(f32(f32(read(q[row, col]) * rs) * gamma_q[col]))
            rs = f32(1) / np.sqrt(var[row, 1] + epsilon)
            for col in range(k.shape[1]):
                k_out[row, col] = write(f32(f32(read(k[row, col]) * rs) * gamma_k[col]))

    return numba.njit(loop, parallel=parallel, fastmath=False, error_model="numpy")


def _numba(
    a: Activations,
    q_out: npt.NDArray,
    k_out: npt.NDArray,
    threads: int,
    is_exact: Callable[[Sequence[npt.NDArray]], bool],
) -> Candidate:
    try:
        import numba
    except ImportError as error:
        return Candidate(NUMBA, None, note=f"cannot be imported: {_reason(error)}")
    config: Any = numba.config
    if threads > config.NUMBA_NUM_THREADS:
        return Candidate(NUMBA, None, note=f"has {config.NUMBA_NUM_THREADS} threads at most")
    # Its OpenMP layer would bring an OpenMP into the process, which ours would then use.
    config.THREADING_LAYER = "workqueue"
    loop = _numba_loop(a.dtype, q_out.dtype.name, threads > 1)
    if threads > 1:
        numba.set_num_threads(threads)

    def view(x: npt.NDArray) -> npt.NDArray:
        return x.view(np.uint16) if x.itemsize == 2 else x

    arguments = (
        *map(view, (q_out, k_out)),
        *(a.gamma_q, a.gamma_k, a.qk_var),
        *map(view, (a.q, a.k)),
        np.float32(a.epsilon),
    )
    loop(*arguments)
    exact = is_exact((q_out, k_out))
    return Candidate(NUMBA, loop, arguments, exact, f"{numba.__version__}, one fused loop")


# ---- JAX -----------------------------------------------------------------------------------------


@functools.cache
def _jax_graph(out_dtype: str) -> Any:
    import jax

    def graph(q: Any, k: Any, var: Any, gamma_q: Any, gamma_k: Any, epsilon: Any) -> Any:
        rs = jax.lax.rsqrt(var + epsilon)
        q_out = (q.astype("float32") * rs[:, 0:1]) * gamma_q
        k_out = (k.astype("float32") * rs[:, 1:2]) * gamma_k
        return q_out.astype(out_dtype), k_out.astype(out_dtype)

    return jax.jit(graph)


def _jax(
    a: Activations,
    out_dtype: str,
    threads: int,
    is_exact: Callable[[Sequence[npt.NDArray]], bool],
) -> Candidate:
    try:
        import jax
    except ImportError as error:
        return Candidate(JAX, None, note=f"cannot be imported: {_reason(error)}")
    # Before its first use: handing a call to another thread costs more than a small call.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    (cpu,) = jax.devices("cpu")[:1]
    tensors = (a.q, a.k, a.qk_var, a.gamma_q, a.gamma_k, np.float32(a.epsilon))
    arguments = [jax.device_put(x, cpu) for x in tensors]
    compiled = _jax_graph(out_dtype).lower(*arguments).compile()

    def call() -> Any:
        return jax.block_until_ready(compiled(*arguments))

    exact = is_exact([np.asarray(x) for x in call()])
    # XLA makes its threads when it is first used, and takes what there are.
    others = "" if threads == usable_processors() else f", XLA's {usable_processors()} threads"
    return Candidate(JAX, call, (), exact, f"{jax.__version__}, jit of the unfused graph{others}")


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
