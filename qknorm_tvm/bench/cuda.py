"""Timing on a GPU: chains of launches inside CUDA graphs, interleaved, results checked first.

Inside a graph the host's part of a launch is gone, as it is where engines replay their decode
steps. A chain of launches on the same buffers is what decode does: what fits L2 is there. Where a
call moves more bytes than L2 holds, buffers rotate, so that none of it is.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..check import reference
from ..check.inputs import Activations
from ..check.reference_torch import apply_qk_rms_norm as torch_graph
from ..check.reference_torch import to_torch
from ..load.module import Module
from ..spec import DTYPE_BYTES
from . import alternatives
from .timing import Candidate, CaseResult, Timing, case_bytes

#: Names of candidates beyond those of `alternatives`.
EMPTY, TWO_COPIES = "empty kernel", "two copies"
ALL = (EMPTY, alternatives.COPY, TWO_COPIES, alternatives.TORCH, alternatives.TORCH_COMPILE)
#: What is said below a table.
METHOD = (
    "µs: median of a launch in a chain inside a CUDA graph, candidates taking turns; buffers "
    "beyond L2 rotate. copy: one torch copy_ of as many bytes as q and k together; two copies: of "
    "q's and of k's. exact: equal to unfused torch on this GPU bit for bit."
)

_CHAIN = 40
_LARGE_CHAIN = 12
#: A sample lasts at least this long: events resolve half a microsecond.
_SAMPLE_SECONDS = 1e-3
_LEAST_SAMPLES = 9

_EMPTY_PTX = b"""
.version 7.0
.target sm_80
.address_size 64
.visible .entry qknorm_empty() { ret; }
"""


class EmptyKernel:
    """A kernel that does nothing, launched plainly: what a launch in a graph costs at least.

    The driver compiles it from PTX, so neither nvcc nor a file is needed.
    """

    def __init__(self) -> None:
        import torch

        torch.cuda.current_stream()  # makes torch's context the current one
        torch.zeros(1, device="cuda")
        self._driver = ctypes.CDLL("libcuda.so.1")
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._driver.cuModuleLoadData(ctypes.byref(module), _EMPTY_PTX))
        self._check(
            self._driver.cuModuleGetFunction(ctypes.byref(self._function), module, b"qknorm_empty")
        )

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"the CUDA driver refused an empty kernel (error {status})")

    def __call__(self, _: int) -> None:
        import torch

        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        one, block = ctypes.c_uint(1), ctypes.c_uint(128)
        none = ctypes.c_void_p()
        self._check(
            self._driver.cuLaunchKernel(
                self._function, one, one, one, block, one, one, ctypes.c_uint(0), stream, none, none
            )
        )


@dataclasses.dataclass
class _Buffers:
    """One set of tensors on the GPU."""

    inputs: tuple[Any, Any, Any, Any, Any]  # q, k, qk_var, gamma_q, gamma_k
    outputs: tuple[Any, Any]

    def arguments(self, epsilon: float) -> tuple[Any, ...]:
        q, k, var, gamma_q, gamma_k = self.inputs
        return (*self.outputs, gamma_q, gamma_k, var, q, k, epsilon)


def _misaligned(tensor: Any) -> Any:
    """Copy a matrix to one whose rows start at every alignment: an odd row stride and offset."""
    import torch

    rows, cols = tensor.shape
    stride = cols + 1 + cols % 2
    memory = torch.empty(rows * stride + 1, dtype=tensor.dtype, device=tensor.device)
    copy = memory[1:].as_strided((rows, cols), (stride, 1))
    copy.copy_(tensor)
    return copy


def _buffers(a: Activations, out_dtype: str, count: int, misaligned: bool) -> list[_Buffers]:
    import torch

    host = [to_torch(np.ascontiguousarray(x)) for x in (a.q, a.k, a.qk_var, a.gamma_q, a.gamma_k)]
    found = []
    for _ in range(count):
        inputs = [x.to("cuda", copy=True) for x in host]
        outputs = [torch.empty_like(x, dtype=getattr(torch, out_dtype)) for x in inputs[:2]]
        for out in outputs:  # nothing that could pass for a result
            out.view(torch.uint8).fill_(0xA5)
        if misaligned:
            inputs[:2] = map(_misaligned, inputs[:2])
            outputs = [_misaligned(x) for x in outputs]
        q, k, var, gamma_q, gamma_k = inputs
        found.append(_Buffers((q, k, var, gamma_q, gamma_k), (outputs[0], outputs[1])))
    return found


def capture(function: Callable[[int], Any], launches: int) -> Any:
    """Return a CUDA graph of a chain of calls; each gets its number.

    It is called three times before. Collectives in it need a communicator that exists, and ranks
    that do the same.
    """
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what the first call sets up must not be captured
        for i in range(3):
            function(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Other threads, NCCL's watchdog among them, may call CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for i in range(launches):
            function(i)
    return graph


def measure_graphs(
    candidates: Sequence[Candidate], *, launches: int, min_time: float
) -> list[Timing]:
    """Time candidates, whose functions take the number of the call, interleaved.

    Parameters
    ----------
    candidates : sequence of Candidate
    launches : int
        Calls in a graph.
    min_time : float
        Seconds that each gets at least; and at least 9 samples.

    Returns
    -------
    list of Timing
        In the order of the candidates; seconds a call.
    """
    import torch

    graphs: dict[int, Any] = {}
    for i, candidate in enumerate(candidates):
        if candidate.function is not None:
            try:
                graphs[i] = capture(candidate.function, launches)
            except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
                torch.cuda.synchronize()
                candidate.note = f"cannot be captured: {str(error).splitlines()[0][:80]}"

    def sample(i: int, replays: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graphs[i].replay()  # untimed: caches in this candidate's steady state, a queue that is full
        first.record()
        for _ in range(replays):
            graphs[i].replay()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) * 1e-3 / (replays * launches)

    replays, spent = {}, dict.fromkeys(graphs, 0.0)
    samples: dict[int, list[float]] = {i: [] for i in range(len(candidates))}
    for i in graphs:
        once = min(sample(i, 2) for _ in range(3)) * launches
        replays[i] = max(1, int(np.ceil(_SAMPLE_SECONDS / max(once, 1e-7))))
    waiting = set(graphs)
    while waiting:
        i = min(waiting, key=spent.__getitem__)
        start = time.perf_counter()
        samples[i].append(sample(i, replays[i]))
        spent[i] += time.perf_counter() - start
        if spent[i] >= min_time and len(samples[i]) >= _LEAST_SAMPLES:
            waiting.remove(i)
    found = []
    for i, one in enumerate(candidates):
        quartiles = np.percentile(samples[i], [25, 50, 75]) if samples[i] else [float("nan")] * 3
        q1, median, q3 = map(float, quartiles)
        calls = replays.get(i, 0) * launches
        count = len(samples[i])
        found.append(Timing(one.name, median, q1, q3, count, calls, one.exact, one.note))
    return found


def rotation(moved: int) -> tuple[int, int]:
    """Return how many sets of buffers take turns, and how many launches are in a chain.

    Parameters
    ----------
    moved : int
        Bytes that a call reads and writes.
    """
    import torch

    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(3, -(-2 * cache // moved) + 1) if moved > cache else 1
    return count, _LARGE_CHAIN if moved > 8 * cache else _CHAIN


def compare(
    module: Module,
    activations: Activations,
    *,
    out_dtype: str,
    min_time: float,
    names: Sequence[str] = ALL,
    misaligned: bool = False,
    status: Callable[[str], None] = lambda text: None,
) -> CaseResult:
    """Check results on the GPU, then time ours and the alternatives.

    Parameters
    ----------
    module : Module
        Holds a spec for the activations.
    activations : Activations
    out_dtype : str
    min_time : float
        Seconds for each candidate.
    names : sequence of str
        Some of `ALL`; ours is always first.
    misaligned : bool
        Ours and torch get rows at every alignment; the copies stay aligned.
    status : callable
        Told what is going on.

    Returns
    -------
    CaseResult
        With 0 threads; `exact` of ours says whether it equals unfused torch, for a reproducible
        module NumPy.
    """
    import torch

    a = activations
    in_bytes, out_bytes = DTYPE_BYTES[a.dtype], DTYPE_BYTES[out_dtype]
    moved = case_bytes(a.rows, a.q_cols, a.k_cols, in_bytes, out_bytes)
    count, launches = rotation(moved)
    status("copying to the GPU")
    sets = _buffers(a, out_dtype, count, misaligned)

    def graph_of(i: int) -> tuple[Any, Any]:
        return torch_graph(*sets[i % count].inputs, a.epsilon, getattr(torch, out_dtype))

    expected = graph_of(0)
    if any(spec.reproducible for spec in module.specs):
        arrays = (a.q, a.k, a.qk_var, a.gamma_q, a.gamma_k)
        wanted = reference.apply_qk_rms_norm(*arrays, a.epsilon, out_dtype)
        expected = tuple(to_torch(x).to("cuda") for x in wanted)  # type: ignore[assignment]

    def is_exact(outputs: Sequence[Any]) -> bool:
        return all(map(equal_bits, outputs, expected))

    arguments = [one.arguments(a.epsilon) for one in sets]
    function = module.apply_qk_rms_norm
    for each in arguments:
        function(*each)
    ours_exact = all(is_exact(one.outputs) for one in sets)
    candidates = [
        Candidate(
            alternatives.OURS,
            lambda i: function(*arguments[i % count]),
            (),
            ours_exact,
            "rows at every alignment" if misaligned else "",
        )
    ]
    for name in names:
        status(name)
        if name == EMPTY:
            candidates.append(Candidate(EMPTY, EmptyKernel()))
        elif name in (alternatives.COPY, TWO_COPIES):
            cols = [a.q_cols + a.k_cols] if name == alternatives.COPY else [a.q_cols, a.k_cols]
            candidates.append(copies(name, a.rows, cols, moved, count))
        elif name == alternatives.TORCH:
            candidates.append(Candidate(name, graph_of, (), is_exact(graph_of(0))))
        elif name == alternatives.TORCH_COMPILE:
            given = [(*one.inputs, a.epsilon, getattr(torch, out_dtype)) for one in sets]
            candidates.append(compiled(torch_graph, given, is_exact))
    status("timing")
    timings = measure_graphs(candidates, launches=launches, min_time=min_time)
    return CaseResult(a.rows, a.q_cols, a.k_cols, a.dtype, out_dtype, 0, moved, timings)


def copies(name: str, rows: int, cols: Sequence[int], moved: int, count: int) -> Candidate:
    """Return copies, one for each of `cols`, that read and write `moved` bytes together."""
    import torch

    half = moved // (2 * rows * sum(cols))
    pairs = [
        [
            tuple(torch.ones(rows * one * half, dtype=torch.uint8, device="cuda") for _ in "io")
            for one in cols
        ]
        for _ in range(count)
    ]

    def copy(i: int) -> None:
        for source, to in pairs[i % count]:
            to.copy_(source)

    return Candidate(name, copy)


def compiled(
    graph: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    is_exact: Callable[[Sequence[Any]], bool] | None = None,
) -> Candidate:
    """Return torch.compile's version of a graph, which takes turns with lists of arguments."""
    import torch

    name = alternatives.TORCH_COMPILE
    start = time.perf_counter()
    try:
        torch.compiler.reset()
        # Shapes fixed: the best that it can do.
        made: Any = torch.compile(graph, dynamic=False)
        outputs = made(*arguments[0])
        exact = None if is_exact is None else is_exact(outputs)
    except Exception as error:
        return Candidate(name, None, note=f"failed: {str(error).splitlines()[0][:100]}")
    note = f"compiled in {time.perf_counter() - start:.1f} s"
    return Candidate(name, lambda i: made(*arguments[i % len(arguments)]), (), exact, note)


def equal_bits(actual: Any, expected: Any) -> bool:
    """Whether two tensors on one device are equal in every bit; of NaNs only the position."""
    import torch

    bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
    same = actual.contiguous().view(bits) == expected.contiguous().view(bits)
    return bool((same | (actual.isnan() & expected.isnan())).all())


def host_costs(module: Module, activations: Activations, *, min_time: float) -> list[Timing]:
    """Time what a call costs the host: of the module, of the public API, and of torch's copy_.

    The GPU works on behind it; it is waited for between samples.

    Parameters
    ----------
    module : Module
        Holds a spec for the activations, with equal in and out dtypes.
    activations : Activations
        Few rows, or the host waits for the queue.
    min_time : float
        Seconds for each way to call.

    Returns
    -------
    list of Timing
    """
    import torch

    from ..call import api

    (one,) = _buffers(activations, activations.dtype, 1, False)
    q, k, var, gamma_q, gamma_k = one.inputs
    q_out, k_out = one.outputs
    half = DTYPE_BYTES[activations.dtype]
    source = torch.ones(
        activations.rows * (activations.q_cols + activations.k_cols) * half,
        dtype=torch.uint8,
        device="cuda",
    )
    to = torch.empty_like(source)

    def public() -> None:
        api.apply_qk_rms_norm(
            q, k, var, gamma_q, gamma_k, activations.epsilon, q_out=q_out, k_out=k_out
        )

    arguments = one.arguments(activations.epsilon)
    ways = [
        Candidate("module", lambda: module.apply_qk_rms_norm(*arguments)),
        Candidate("API", public),
        Candidate("torch copy_", lambda: to.copy_(source)),
    ]
    samples: list[list[float]] = [[] for _ in ways]
    calls = 50
    deadline = time.perf_counter() + min_time * len(ways)
    for turn in itertools.count():
        for way, found in zip(ways, samples, strict=True):
            assert way.function is not None
            start = time.perf_counter_ns()
            for _ in range(calls):
                way.function()
            took = (time.perf_counter_ns() - start) * 1e-9 / calls
            torch.cuda.synchronize()
            if turn >= 3:  # the first are warm-up
                found.append(took)
        if turn >= 3 + _LEAST_SAMPLES and time.perf_counter() > deadline:
            break
    timings = []
    for way, found in zip(ways, samples, strict=True):
        q1, median, q3 = map(float, np.percentile(found, [25, 50, 75]))
        timings.append(Timing(way.name, median, q1, q3, len(found), calls, None, ""))
    return timings


def device_facts() -> dict[str, str]:
    """Return what a measurement was taken on: the GPU, its driver's and torch's CUDA."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return {
        "device": f"{properties.name} (sm_{properties.major}{properties.minor}, "
        f"{properties.multi_processor_count} multiprocessors, L2 "
        f"{properties.L2_cache_size / 1e6:.0f} MB)",
        "cuda": f"driver for CUDA {driver}, torch built for {torch.version.cuda}",
    }
