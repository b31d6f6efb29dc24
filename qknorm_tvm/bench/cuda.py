"""Candidates on a GPU: chains of launches inside CUDA graphs, results checked first.

Inside a graph the host's part of a launch is gone, as it is where engines replay their decode
steps. A chain of launches on the same buffers is what decode does: what fits L2 is there. Where a
call moves more bytes than L2 holds, buffers rotate, so that none of it is.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..call import cache
from ..check.calls import call_arguments
from ..check.inputs import Activations
from ..check.reference_torch import to_torch
from ..check.verification_cuda import expected_outputs
from ..dtypes import ELEMENT_TYPES
from ..load.module import Module
from ..spec import KernelSpec
from .timing import (
    EMPTY,
    OURS,
    TWO_COPIES,
    TWO_LAUNCHES,
    Candidate,
    CannotRunError,
    HostSampler,
)
from .workload import Workload, copy_by_torch

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

    def __call__(self) -> None:
        import torch

        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        grid, block = (1, 1, 1), (128, 1, 1)
        sizes = [ctypes.c_uint(size) for size in (*grid, *block, 0)]
        self._check(self._driver.cuLaunchKernel(self._function, *sizes, stream, None, None))


def capture(function: Callable[[int], Any], launches: int) -> Any:
    """Return a CUDA graph of ``function(0)``, ``function(1)``, ... ``function(launches - 1)``.

    The function is called three times before the capture. If it has collectives, their communicator
    must exist, and the other ranks must capture the same.
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


class GraphSampler:
    """Times a chain of launches inside a CUDA graph, which uses all sets of arguments in turn.

    Parameters
    ----------
    candidate : Candidate
    launches : int
        Calls in a graph.
    """

    sets = 1
    least = _LEAST_SAMPLES

    def __init__(self, candidate: Candidate, *, launches: int):
        import torch

        function, sets = candidate.function, candidate.sets
        assert function is not None
        self._launches = launches
        try:
            self._graph = capture(lambda i: function(*sets[i % len(sets)]), launches)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            torch.cuda.synchronize()
            reason = str(error).splitlines()[0][:80]
            raise CannotRunError(f"cannot be captured: {reason}") from None
        once = min(self._sample(2) for _ in range(3)) * launches
        self._replays = max(1, math.ceil(_SAMPLE_SECONDS / max(once, 1e-7)))
        self.calls = self._replays * launches

    def _sample(self, replays: int) -> float:
        import torch

        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._graph.replay()  # untimed: caches in this candidate's steady state, a full queue
        first.record()
        for _ in range(replays):
            self._graph.replay()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) * 1e-3 / (replays * self._launches)

    def sample(self, turn: int) -> float:
        """Return seconds a launch."""
        return self._sample(self._replays)


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


class CudaWorkload(Workload):
    """An operation on tensors of the GPU, in as many sets as L2 asks for.

    Parameters
    ----------
    spec, module, activations, rows
        See `Workload`.
    misaligned : bool
        Rows of ours and torch start at every alignment; the copies stay aligned.
    device : str
        torch's name for it.
    """

    kind = "cuda"

    def __init__(
        self,
        spec: KernelSpec,
        module: Module,
        activations: Activations,
        rows: int | None = None,
        *,
        misaligned: bool = False,
        device: str = "cuda",
    ):
        import torch

        super().__init__(spec, module, activations, rows)
        self._misaligned, self._device = misaligned, device
        self.sets = [self._tensors()]
        count, launches = rotation(self.bytes)
        self.sets += [self._tensors() for _ in range(count - 1)]
        self.sampler = functools.partial(GraphSampler, launches=launches)
        # The GPU is waited for between samples.
        self.host_sampler = functools.partial(HostSampler, finish=torch.cuda.synchronize)

    def _tensors(self) -> dict[str, Any]:
        """Return one set of tensors by name."""
        import torch

        tensors = {name: self.placed(array) for name, array in self.inputs.items()}
        for name, (shape, dtype) in self.outputs.items():
            if name in tensors:
                continue
            torch_dtype = ELEMENT_TYPES[dtype].torch
            tensors[name] = torch.empty(shape, dtype=torch_dtype, device=self._device)
        for name in set(self.operation.strided) & set(tensors) if self._misaligned else ():
            tensors[name] = _misaligned(tensors[name])
        return tensors

    def placed(self, array: npt.NDArray) -> Any:
        return to_torch(np.ascontiguousarray(array)).to(self._device, copy=True)

    def reference(self) -> Sequence[npt.NDArray]:
        return expected_outputs(self.spec, self.activations, self._device)

    def differ(self, actual: Any, expected: Any) -> bool:
        return not equal_bits(actual, expected)

    def arguments(self, op: str, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
        return call_arguments(op, tensors, self.activations.epsilon)

    def overwrite(self, output: Any) -> None:
        output.fill_(-77)

    def restore(self, cache: Any, before: npt.NDArray) -> None:
        cache.copy_(self.placed(before))

    def torch_sets(self) -> list[dict[str, Any]]:
        return self.sets

    def ours(self, name: str = OURS, module: Module | None = None) -> Candidate:
        candidate = super().ours(name, module)
        candidate.note = "rows at every alignment" if self._misaligned else ""
        return candidate

    def candidate(self, name: str) -> Candidate:
        if name == EMPTY:
            return Candidate(EMPTY, EmptyKernel())
        if name == TWO_LAUNCHES:
            return self._two_launches()
        return super().candidate(name)

    def copy(self, name: str) -> Candidate:
        """Return one copy, or q's and k's, that read and write as many bytes as ours together."""
        import torch

        def memory(size: int) -> Any:
            return torch.ones(size, dtype=torch.uint8, device=self._device)

        sizes = self.copy_sizes(apart=name == TWO_COPIES)
        sets = [([(memory(size), memory(size)) for size in sizes],) for _ in self.sets]

        return Candidate(name, copy_by_torch, sets)

    def _two_launches(self) -> Candidate:
        """Return statistics and apply in two launches, as the ranks of a group run them."""
        steps = self.benchmark.steps
        if not {spec.op for spec in self.module.specs}.issuperset(steps):
            note = f"needs a module that also holds {' and '.join(steps)}"
            return Candidate(TWO_LAUNCHES, None, note=note)
        functions = [getattr(self.module, op) for op in steps]
        sets = [tuple(self.arguments(op, tensors) for op in steps) for tensors in self.sets]

        def launch_all(*arguments: tuple[Any, ...]) -> None:
            for function, args in zip(functions, arguments, strict=True):
                function(*args)

        launch_all(*sets[0])
        outputs = [self.sets[0][name] for name in self.outputs]
        return Candidate(TWO_LAUNCHES, launch_all, sets, self.is_exact(outputs))

    def host_calls(self) -> list[Candidate]:
        """Return calls of the module and of the API, and torch's copy_."""
        import torch

        tensors = self.sets[0]
        cache.use(self.module)
        source = torch.ones(self.bytes // 2, dtype=torch.uint8, device=self._device)
        arguments = self.arguments(self.spec.op, tensors)
        return [
            Candidate("module", getattr(self.module, self.spec.op), [arguments]),
            Candidate("API", self.api_call(tensors)),
            Candidate("torch copy_", torch.empty_like(source).copy_, [(source,)]),
        ]


def _misaligned(tensor: Any) -> Any:
    """Copy a matrix to one whose rows start at every alignment: an odd row stride and offset."""
    import torch

    rows, cols = tensor.shape
    stride = cols + 1 + cols % 2
    memory = torch.empty(rows * stride + 1, dtype=tensor.dtype, device=tensor.device)
    copy = memory[1:].as_strided((rows, cols), (stride, 1))
    copy.copy_(tensor)
    return copy


def equal_bits(actual: Any, expected: Any) -> bool:
    """Whether two tensors on one device are equal in every bit; of NaNs only the position."""
    import torch

    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[actual.element_size()]
    same = actual.contiguous().view(bits) == expected.contiguous().view(bits)
    # Of float8 torch does not say it.
    nans = [x.to(torch.float32).isnan() if x.element_size() == 1 else x.isnan()
            for x in (actual, expected)]  # fmt: skip
    return bool((same | (nans[0] & nans[1])).all())


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
