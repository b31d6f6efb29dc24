"""Checking and timing candidates, here or in a session of TVM's RPC: exact first, then how fast.

A call's time depends on where its tensors lie by up to a factor of two: inputs and outputs with one
offset within a page compete for the same cache sets. So all tensors of a timed call are views of
one allocation, and every time is taken at `LAYOUTS` placements.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..check import reference
from ..check.calls import call_arguments
from ..check.expected import Graph, outputs_of
from ..check.inputs import Activations
from ..check.rope_inputs import with_model_inputs
from ..dtypes import ELEMENT_TYPES
from ..spec import KernelSpec
from ..targets import adds_fused

#: Placements of the tensors at which each candidate is timed.
LAYOUTS = 8
_PAGE = 4096
_EPSILON = 1e-6
#: Seconds of a sample; it is the mean of as many calls as that takes.
_SAMPLE_S = 0.005
#: Launches in a CUDA graph.
_LAUNCHES = 40
#: Sets of buffers taken in turn where one does not fit half the L2 cache: none is found warm.
_SETS = 3


class InexactError(Exception):
    """A candidate's outputs differ from the reference."""


@dataclasses.dataclass(frozen=True)
class Built:
    """A candidate's module."""

    path: str
    #: Row counts at which all of its functions run, for the check of exactness.
    check_rows: tuple[int, ...]


def placements(sizes: Mapping[str, int], layout: int) -> dict[str, int]:
    """Return the byte at which each tensor, of a size in bytes, starts within one allocation.

    From layout to layout q and k move within a page, and outputs move against them, so that the
    distance between an input and its output takes `LAYOUTS` values modulo the page.
    """
    starts, page = {}, 0
    for name, size in sizes.items():
        offset = 0
        if not name.startswith("gamma_"):
            offset = 320 * layout + 1024 * name.startswith("k")
            if name.endswith("_out"):
                offset += layout * _PAGE // LAYOUTS
        starts[name] = page * _PAGE + offset % _PAGE
        page += math.ceil(size / _PAGE) + 1
    return starts


def arena_bytes(sizes: Mapping[str, int]) -> int:
    """Return the bytes of an allocation that holds the tensors at any layout."""
    return sum(_PAGE * (math.ceil(size / _PAGE) + 1) for size in sizes.values())


def exactness_case(spec: KernelSpec, rows: int) -> Activations:
    """Return inputs in which random bits, infinities, NaNs and denormals are strewn."""
    from ..check.cases import shape_case
    from ..check.special_values import special_gamma

    assert spec.q_cols is not None
    assert spec.k_cols is not None
    case = shape_case(spec, rows, spec.q_cols, spec.k_cols, seed=rows).make()
    for gamma in (case.gamma_q, case.gamma_k):
        gamma[::7] = special_gamma("NaN", len(gamma))[::7]
        gamma[1::11] = special_gamma("denormal", len(gamma))[1::11]
        gamma[2::13] = special_gamma("signed zero and inf", len(gamma))[2::13]
    return case


def _call_arrays(spec: KernelSpec, a: Activations) -> dict[str, npt.NDArray]:
    """Return what calls of a spec give, by name; outputs but for caches hold zeros."""
    shapes = spec.operation.shapes(a.rows, a.q_cols, a.k_cols)
    return {
        tensor.name: np.zeros(shapes[tensor.name], ELEMENT_TYPES[spec.dtype_of(tensor)].numpy)
        if tensor.is_output and not tensor.is_cache
        else a.tensors[tensor.name]
        for tensor in spec.tensors
    }


class Bench:
    """Checks and times candidates of one spec and row count on a CPU; `open_bench` makes it.

    They run in a session of TVM's RPC, if there is one, or in this process.
    """

    def __init__(self, spec: KernelSpec, rows: int, session: Any = None):
        self.spec, self.rows, self.session = spec, rows, session
        self._checks: dict[int, tuple[dict[str, npt.NDArray], tuple[npt.NDArray, ...]]] = {}
        self._arenas: list[Any] = []
        self._loads = 0

    def time(self, candidates: Sequence[Built], rounds: int = 1) -> list[list[float]]:
        """Prove candidates exact, then time them in turns; returns samples of each, in seconds."""
        modules = [self._load(built.path) for built in candidates]
        for module, built in zip(modules, candidates, strict=True):
            for rows in built.check_rows:
                self.check(module, rows)
        return self.compare(modules, rounds)

    def compare(self, modules: Sequence[Any], rounds: int = 1) -> list[list[float]]:
        """Return samples of modules, taken in turns: `rounds` at each layout.

        Samples of one index were taken side by side, with tensors at the same addresses.
        """
        samples: list[list[float]] = [[] for _ in modules]
        for layout in range(LAYOUTS):
            timers = [self._timer(module, layout) for module in modules]
            for turn in range(rounds):
                # To and fro, so that none always runs in the wake of the same other one.
                order = range(len(modules)) if turn % 2 else reversed(range(len(modules)))
                for index in order:
                    samples[index].append(timers[index]())
        return samples

    def check(self, module: Any, rows: int) -> None:
        """Compare a candidate's outputs with the reference, bit by bit, or raise InexactError."""
        spec = self.spec
        if rows not in self._checks:
            case = exactness_case(spec, rows)
            self._checks[rows] = _call_arrays(spec, case), self._expected(case)
        arrays, wanted = self._checks[rows]
        tensors = {name: self._tensor(array) for name, array in arrays.items()}
        module[spec.op](*call_arguments(spec.op, tensors, _EPSILON))
        for name, expected in zip(spec.outputs, wanted, strict=True):
            wrong = reference.differing(self._array(tensors[name]), expected)
            if wrong:
                raise InexactError(
                    f"not exact: {name} differs in {wrong} of {expected.size} elements at "
                    f"{rows} rows"
                )

    def _argument_lists(self, layout: int) -> list[tuple[Any, ...]]:
        """Return the arguments of timed calls at one of `LAYOUTS` placements, for each arena."""
        spec = self.spec
        arrays = self._timed_arrays
        sizes = {name: array.nbytes for name, array in arrays.items()}
        if not self._arenas:
            self._arenas = self._allocate(arena_bytes(sizes))
        starts, lists = placements(sizes, layout), []
        for arena in self._arenas:
            tensors = {
                name: self._view(arena, array.shape, array.dtype.name, starts[name])
                for name, array in arrays.items()
            }
            for name, array in arrays.items():
                if array.dtype == np.int64:  # what they say must be there; other numbers are any
                    self._write(tensors[name], array)
            lists.append(call_arguments(spec.op, tensors, _EPSILON))
        return lists

    @functools.cached_property
    def _timed_arrays(self) -> dict[str, npt.NDArray]:
        """The arrays of a timed call by name: their shapes and types, and positions and slots."""
        spec = self.spec
        assert spec.q_cols is not None
        assert spec.k_cols is not None
        # Of one row and many rows alike but for the indices: no numbers are made that nobody reads.
        q, k = (np.empty((self.rows, cols), ELEMENT_TYPES[spec.in_dtype].numpy)
                for cols in (spec.q_cols, spec.k_cols))  # fmt: skip
        qk_var, gamma_q, gamma_k = (
            np.empty(shape, np.float32) for shape in ((self.rows, 2), spec.q_cols, spec.k_cols)
        )
        inputs = with_model_inputs(spec, Activations(q, k, qk_var, gamma_q, gamma_k))
        return _call_arrays(spec, inputs)

    # ---- what a device's kind decides --------------------------------------------------------

    @property
    def _device(self) -> Any:
        import tvm

        return tvm.cpu(0) if self.session is None else self.session.cpu(0)

    def _load(self, path: str) -> Any:
        import tvm

        if self.session is None:
            return tvm.runtime.load_module(path)
        # A name of its own each time: to write over a file that is loaded crashes the server, and
        # TVM's servers do not outlive a session that crashed.
        self._loads += 1
        remote = f"candidate_{self._loads}.so"
        self.session.upload(path, remote)
        return self.session.load_module(remote)

    def _tensor(self, array: npt.NDArray) -> Any:
        import tvm

        return tvm.runtime.empty(array.shape, array.dtype.name, self._device).copyfrom(
            np.ascontiguousarray(array)
        )

    def _array(self, tensor: Any) -> npt.NDArray:
        array: npt.NDArray = tensor.numpy()
        return array

    def _expected(self, case: Activations) -> tuple[npt.NDArray, ...]:
        from ..build.cpu import cpu_features

        (cpu,) = self.spec.parsed_target.variants
        graph = Graph(fused=adds_fused(cpu, cpu_features(cpu)))
        return outputs_of(graph, case, self.spec)

    def _allocate(self, size: int) -> list[Any]:
        """Return arenas, taken in turn, whose elements are normal numbers, whatever their type."""
        import tvm

        arena = tvm.runtime.empty((size,), "uint8", self._device)
        # Filled where it lies: memory that was never written is one page of zeros to read.
        name = "tvm.contrib.random.random_fill_for_measure"
        find = tvm.get_global_func if self.session is None else self.session.get_function
        find(name)(self._view(arena, (size // 2,), "uint16", 0))
        return [arena]

    def _view(self, arena: Any, shape: tuple[int, ...], dtype: str, start: int) -> Any:
        return arena._create_view(shape, dtype, start)

    def _write(self, tensor: Any, array: npt.NDArray) -> None:
        tensor.copyfrom(array)

    def _timer(self, module: Any, layout: int) -> Callable[[], float]:
        """Return a function that takes one sample, in seconds."""
        (arguments,) = self._argument_lists(layout)
        first = module.time_evaluator(self.spec.op, self._device, number=1, repeat=2)
        once = max(min(first(*arguments).results), 1e-9)
        number = max(1, round(_SAMPLE_S / once))
        timer = module.time_evaluator(self.spec.op, self._device, number=number, repeat=1)
        return lambda: float(timer(*arguments).results[0])


class CudaBench(Bench):
    """Checks and times candidates on this machine's GPU, through torch.

    Launches are shorter than a call from the host: the time of a launch is that of a CUDA graph of
    launches divided by their number, as in a decode step. Buffers that fit L2 are reused, as a
    model finds its activations there; others are taken in turn.
    """

    @property
    def _device(self) -> Any:
        import torch

        return torch.device("cuda", 0)

    def _tensor(self, array: npt.NDArray) -> Any:
        from ..check.reference_torch import to_torch

        return to_torch(np.ascontiguousarray(array)).to(self._device, copy=True)

    def _array(self, tensor: Any) -> npt.NDArray:
        from ..check.reference_torch import to_numpy

        return to_numpy(tensor.cpu())

    def _expected(self, case: Activations) -> tuple[npt.NDArray, ...]:
        from ..check.verification_cuda import expected_outputs

        return expected_outputs(self.spec, case, str(self._device))

    def _allocate(self, size: int) -> list[Any]:
        import torch

        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 40_000_000)
        # Half-precision numbers from 1 to 10: normal ones too when they are read as other types.
        return [
            torch.empty(size // 2, dtype=torch.float16, device=self._device).uniform_(1, 10)
            .view(torch.uint8)
            for _ in range(1 if 2 * size <= cache else _SETS)
        ]  # fmt: skip

    def _view(self, arena: Any, shape: tuple[int, ...], dtype: str, start: int) -> Any:
        import torch

        element = getattr(torch, dtype)
        size = math.prod(shape) * element.itemsize
        return arena[start : start + size].view(element).view(shape)

    def _write(self, tensor: Any, array: npt.NDArray) -> None:
        tensor.copy_(self._tensor(array))

    def _timer(self, module: Any, layout: int) -> Callable[[], float]:
        import torch

        sets = self._argument_lists(layout)
        function = module[self.spec.op]
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for arguments in sets:
                function(*arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for index in range(_LAUNCHES):
                function(*sets[index % len(sets)])

        def seconds(replays: int) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3 / replays / _LAUNCHES

        # The first replay uploads the graph.
        seconds(1)
        replays = max(2, round(_SAMPLE_S / (seconds(3) * _LAUNCHES)))

        def sample() -> float:
            seconds(1)  # runs in the wake of another kernel's
            return seconds(replays)

        return sample


def open_bench(spec: KernelSpec, rows: int, session: Any = None) -> Bench:
    """Return what checks and times a spec's candidates, here or in a session of TVM's RPC."""
    if spec.parsed_target.kind == "cuda":
        return CudaBench(spec, rows)
    return Bench(spec, rows, session)
