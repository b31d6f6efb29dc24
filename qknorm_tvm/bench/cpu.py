"""Candidates on CPUs: ours, copies, NumPy, torch, and code without vectors."""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..call import api
from ..check import reference
from ..check.calls import call_arguments, operation_arguments
from ..check.inputs import Activations
from ..check.reference_torch import to_numpy, to_torch, torch_or_none
from ..check.verification import expected_outputs
from ..load.module import Module
from ..spec import KernelSpec
from .timing import (
    COPY,
    FLOOR,
    NUMPY,
    SCALAR,
    TORCH,
    TORCH_COMPILE,
    Candidate,
    HostSampler,
    Timing,
    measure,
)
from .workload import NOT_INSTALLED, Workload

#: Bytes by which an output lies off its input within a page, one after the other. What a call takes
#: depends on them by a factor of two: loads wait for stores to the same offset of other pages.
OFFSETS = range(0, 4096, 512)
_PAGE = 4096
#: Calls before each sample with several threads, see `HostSampler`.
_SETTLE_SECONDS = 0.005
#: Handing work to Python threads takes some 50 µs, in which one thread copies more than this.
_LEAST_BYTES_FOR_PYTHON_THREADS = 2 << 20


def outputs_beside(x: npt.NDArray, shape: Sequence[int], dtype: npt.DTypeLike) -> list[npt.NDArray]:
    """Return arrays in one memory, at each of the `OFFSETS` from an input's place in a page."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.zeros(size + 2 * _PAGE, np.uint8)
    start = (x.ctypes.data - memory.ctypes.data) % _PAGE
    places = [memory[start + offset : start + offset + size] for offset in OFFSETS]
    return [place.view(dtype).reshape(shape) for place in places]


def _flat_bytes(array: npt.NDArray) -> npt.NDArray:
    """Return a packed array's memory."""
    return array.reshape(-1).view(np.uint8)


class CpuWorkload(Workload):
    """An operation on NumPy arrays; sets differ in where outputs lie, see `OFFSETS`.

    Parameters
    ----------
    spec, module, activations, unique_rows
        See `Workload`.
    threads : int
        For ours, the copy, torch and the scalar loop; NumPy has one. 0: the module's default.
    scalar : Module, optional
        The same operation compiled with ``vector=1, row_tile=1``.
    """

    kind = "cpu"

    def __init__(
        self,
        spec: KernelSpec,
        module: Module,
        activations: Activations,
        unique_rows: int | None = None,
        *,
        threads: int = 1,
        scalar: Module | None = None,
    ):
        super().__init__(spec, module, activations, unique_rows)
        self.threads, self._scalar = threads, scalar
        module.library.get_function("qknorm_set_num_threads")(threads)
        torch = torch_or_none()
        if torch is not None and threads:
            torch.set_num_threads(threads)
        self.sets = [dict(activations.tensors) for _ in OFFSETS]
        for name in self.operation.outputs:
            tensor = self.operation[name]
            beside = activations.tensors[tensor.in_place_of or self.operation.signature[0]]
            dtype = self._element_type(tensor).numpy
            arrays = outputs_beside(beside, self._shape(tensor), dtype)
            for tensors, array in zip(self.sets, arrays, strict=True):
                tensors[name] = array

    def _reference(self, a: Activations) -> Sequence[Any]:
        return expected_outputs(self.module, self.spec, a)

    def _differ(self, actual: Any, expected: Any) -> bool:
        array = actual if isinstance(actual, np.ndarray) else to_numpy(actual)
        return reference.differing(array, expected) > 0

    def _call(self, function: Callable[..., Any], tensors: Mapping[str, Any]) -> tuple[Any, ...]:
        arguments = operation_arguments(self.spec.op, tensors, self.activations.epsilon)
        for name in self.operation.outputs:
            _flat_bytes(tensors[name])[...] = 0xA5
        function(*arguments)
        return arguments

    def _torch_tensors(self) -> list[dict[str, Any]]:
        return [{name: to_torch(self.sets[0][name]) for name in self.operation.signature}]

    def candidate(self, name: str) -> Candidate:
        """Return one of the candidates of `Benchmark.candidates`, its result checked."""
        if name in (TORCH, TORCH_COMPILE):
            return self.torch(name)
        if name == NUMPY:
            note = "one thread" if self.threads > 1 else ""
            a, out_dtype = self.activations, str(self.spec.out_dtype)
            graph = functools.partial(
                reference.apply_qk_rms_norm, cast_before_gamma=self.spec.cast_before_gamma
            )
            arguments = (a.q, a.k, a.qk_var, a.gamma_q, a.gamma_k, a.epsilon, out_dtype)
            return Candidate(NUMPY, graph, [arguments], exact=True, note=note)
        if name == SCALAR:
            return self.ours(SCALAR, self._scalar)
        if name == FLOOR and not self.operation.normalises:
            return self._read()
        assert name in (COPY, FLOOR), name
        return self._copy(name)

    def _copy(self, name: str) -> Candidate:
        """Return a copy of as many bytes as ours reads and writes, of the same arrays if it can."""
        sets: list[list[tuple[Any, Any]]] = [[] for _ in OFFSETS]
        for operand in "qk":
            x = self.sets[0][operand]
            targets = [arrays[f"{operand}_out"] for arrays in self.sets]
            if x.nbytes != targets[0].nbytes:
                x = np.ones((x.nbytes + targets[0].nbytes) // 2, np.uint8)
                targets = outputs_beside(x, x.shape, np.uint8)
            for pairs, target in zip(sets, targets, strict=True):
                pairs.append((_flat_bytes(target), _flat_bytes(x)))
        torch = torch_or_none()
        if self.threads > 1 and torch is not None:
            # In elements of the array's own size: torch splits work among threads by elements.
            item = self.spec.in_bytes if self.spec.in_bytes == self.spec.out_bytes else 1
            kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[item]
            by_torch = [
                [tuple(torch.from_numpy(x).view(kind) for x in pair) for pair in pairs]
                for pairs in sets
            ]

            def copy_by_torch(pairs: Sequence[tuple[Any, Any]]) -> None:
                for to, x in pairs:
                    to.copy_(x)

            note = f"torch.copy_, {self.threads} threads"
            return Candidate(name, copy_by_torch, [(pairs,) for pairs in by_torch], note=note)
        if self.threads > 1 and self.bytes >= _LEAST_BYTES_FOR_PYTHON_THREADS:
            pool = concurrent.futures.ThreadPoolExecutor(self.threads)
            parts = [
                [part for to, x in pairs for part in zip(*self._split(to, x), strict=True)]
                for pairs in sets
            ]

            def copy_by_pool(parts: Sequence[tuple[Any, Any]]) -> None:
                for _ in pool.map(lambda part: np.copyto(*part), parts):
                    pass

            note = f"numpy.copyto in {self.threads} Python threads"
            return Candidate(name, copy_by_pool, [(pairs,) for pairs in parts], note=note)

        def copy(pairs: Sequence[tuple[Any, Any]]) -> None:
            for to, x in pairs:
                np.copyto(to, x)

        note = "numpy.copyto" + ", one thread: too few bytes for Python's" * (self.threads > 1)
        return Candidate(name, copy, [(pairs,) for pairs in sets], note=note)

    def _split(self, *arrays: npt.NDArray) -> list[list[npt.NDArray]]:
        return [np.array_split(array, self.threads) for array in arrays]

    def _read(self) -> Candidate:
        """Return one read of q and k: a sum over the same bytes as 64-bit integers."""
        memory = [_flat_bytes(x) for x in (self.activations.q, self.activations.k)]
        words = [x[: len(x) // 8 * 8].view(np.int64) for x in memory]
        if self.threads == 1:
            note = "a sum over the bytes by numpy.add.reduce"
            return Candidate(FLOOR, lambda: [np.add.reduce(x) for x in words], note=note)
        torch = torch_or_none()
        if torch is None:
            return Candidate(FLOOR, None, note=NOT_INSTALLED)
        tensors = [torch.from_numpy(x) for x in words]
        note = "a sum over the bytes by torch.sum"
        return Candidate(FLOOR, lambda: [x.sum() for x in tensors], note=note)

    def host_calls(self) -> list[Candidate]:
        """Return calls of the module and of the API, with arrays of NumPy and of torch."""
        function, arrays = getattr(self.module, self.spec.op), self.sets[0]
        epsilon = self.activations.epsilon
        module, public = "module, torch tensors", "API, torch tensors"
        by_torch = [Candidate(name, None, note=NOT_INSTALLED) for name in (module, public)]
        if torch_or_none():
            tensors = {name: to_torch(array) for name, array in arrays.items()}
            arguments = call_arguments(self.spec.op, tensors, epsilon)
            by_torch = [
                Candidate(module, function, [arguments]),
                Candidate(public, public_call(tensors, epsilon)),
            ]
        arguments = operation_arguments(self.spec.op, arrays, epsilon)
        return [
            Candidate("module, tvm-ffi tensors", function, [arguments]),
            by_torch[0],
            Candidate("API, NumPy arrays", public_call(arrays, epsilon)),
            by_torch[1],
        ]

    def measure(self, candidates: Sequence[Candidate], min_time: float) -> list[Timing]:
        """Time calls; outputs take turns in lying at each of the `OFFSETS`."""
        settle = _SETTLE_SECONDS if self.threads > 1 else 0.0
        sampler = functools.partial(HostSampler, settle=settle)
        return measure(candidates, min_time=min_time, sampler=sampler)


def public_call(tensors: Mapping[str, Any], epsilon: float) -> Callable[[], Any]:
    """Return a call of `qknorm_tvm.apply_qk_rms_norm` with outputs given."""
    t = tensors
    return lambda: api.apply_qk_rms_norm(
        t["q"], t["k"], t["qk_var"], t["gamma_q"], t["gamma_k"], epsilon,
        q_out=t["q_out"], k_out=t["k_out"],
    )  # fmt: skip
