"""Checking and timing candidates, here or in a session of TVM's RPC: exact first, then how fast.

A call's time depends on where its tensors lie by up to a factor of two: inputs and outputs with one
offset within a page compete for the same cache sets. So all tensors of a timed call are views of
one allocation, and every time is taken at `LAYOUTS` placements.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..check import reference
from ..check.inputs import Activations
from ..dtypes import ELEMENT_TYPES
from ..spec import KernelSpec
from ..targets import adds_fused

#: Placements of the tensors at which each candidate is timed.
LAYOUTS = 8
_PAGE = 4096
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


class Bench:
    """Checks and times candidates of one spec and row count on a CPU; `open_bench` makes it.

    They run in a session of TVM's RPC, if there is one, or in this process.
    """

    def __init__(self, spec: KernelSpec, rows: int, session: Any = None):
        self.spec, self.rows, self.session = spec, rows, session
        self._scalars = [1e-6] if spec.operation.has_epsilon else []
        self._checks: dict[int, tuple[list[Any], tuple[npt.NDArray, ...]]] = {}
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
        operation = self.spec.operation
        if rows not in self._checks:
            case = exactness_case(self.spec, rows)
            inputs = [getattr(case, name) for name in operation.tensors
                      if name not in operation.outputs]  # fmt: skip
            self._checks[rows] = [self._tensor(array) for array in inputs], self._expected(case)
        tensors, wanted = self._checks[rows]
        outs = [self._tensor(np.zeros_like(expected)) for expected in wanted]
        module[self.spec.op](*outs, *tensors, *self._scalars)
        for name, tensor, expected in zip(operation.outputs, outs, wanted, strict=True):
            wrong = reference.differing(self._array(tensor), expected)
            if wrong:
                raise InexactError(
                    f"not exact: {name} differs in {wrong} of {expected.size} elements at "
                    f"{rows} rows"
                )

    def _argument_lists(self, layout: int) -> list[list[Any]]:
        """Return the arguments of timed calls at one of `LAYOUTS` placements, for each arena."""
        spec = self.spec
        assert spec.q_cols is not None
        assert spec.k_cols is not None
        shapes = spec.operation.shapes(self.rows, spec.q_cols, spec.k_cols)
        dtypes = spec.operation.dtypes(spec.in_dtype, str(spec.out_dtype))
        sizes = {
            name: math.prod(shape) * ELEMENT_TYPES[dtypes[name]].bytes
            for name, shape in shapes.items()
        }
        if not self._arenas:
            self._arenas = self._allocate(arena_bytes(sizes))
        starts = placements(sizes, layout)
        return [
            [*(self._view(arena, shape, dtypes[name], starts[name])
               for name, shape in shapes.items()), *self._scalars]
            for arena in self._arenas
        ]  # fmt: skip

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

        spec, qk_var = self.spec, case.qk_var
        if spec.op != "apply_qk_rms_norm":
            (cpu,) = spec.parsed_target.variants
            fused = adds_fused(cpu, cpu_features(cpu))
            qk_var = reference.row_mean_of_squares_qk(case.q, case.k, fused=fused)
        if not spec.operation.normalises:
            return (qk_var,)
        return reference.apply_qk_rms_norm(
            case.q, case.k, qk_var, case.gamma_q, case.gamma_k, case.epsilon, spec.out_dtype,
            cast_before_gamma=spec.cast_before_gamma,
        )  # fmt: skip

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
