"""An operation on a CPU: NumPy arrays at several relative addresses, and candidates on them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..check import reference
from ..check.calls import call_arguments, operation_arguments
from ..check.inputs import Activations, aligned_copy
from ..check.reference_torch import to_numpy, to_torch, torch_or_none
from ..check.verification import expected_outputs
from ..dtypes import ELEMENT_TYPES
from ..load.module import Module
from ..spec import KernelSpec
from .timing import NUMPY, SCALAR, Candidate, HostSampler
from .workload import NOT_INSTALLED, Workload, copy_by_torch

#: Bytes by which an output lies off its input within a page, one after the other. What a call takes
#: depends on them by a factor of two: loads wait for stores to the same offset of other pages.
OFFSETS = range(0, 4096, 512)
_PAGE = 4096
#: Calls before each sample with several threads, see `HostSampler`.
_SETTLE_SECONDS = 0.005


def outputs_beside(x: npt.NDArray, shape: Sequence[int], dtype: npt.DTypeLike) -> list[npt.NDArray]:
    """Return arrays in one memory, at each of the `OFFSETS` from an input's place in a page."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.zeros(size + 2 * _PAGE, np.uint8)
    start = (x.ctypes.data - memory.ctypes.data) % _PAGE
    places = [memory[start + offset : start + offset + size] for offset in OFFSETS]
    return [place.view(dtype).reshape(shape) for place in places]


def _copy_by_numpy(pairs: Sequence[tuple[Any, Any]]) -> None:
    for target, source in pairs:
        np.copyto(target, source)


class CpuWorkload(Workload):
    """An operation on NumPy arrays; sets differ in where outputs lie, see `OFFSETS`.

    Parameters
    ----------
    spec, module, activations, rows
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
        rows: int | None = None,
        *,
        threads: int = 1,
        scalar: Module | None = None,
    ):
        super().__init__(spec, module, activations, rows)
        self.threads, self._scalar = threads, scalar
        self.sampler = functools.partial(
            HostSampler, settle=_SETTLE_SECONDS if threads > 1 else 0.0
        )
        module.library.get_function("qknorm_set_num_threads")(threads)
        torch = torch_or_none()
        if torch is not None and threads:
            torch.set_num_threads(threads)
        self.sets = [dict(self.inputs) for _ in OFFSETS]
        for name, (shape, dtype) in self.outputs.items():
            tensor = self.operation[name]
            beside = tensor.in_place_of or (name[0] if tensor.is_cache else "q")
            arrays = outputs_beside(self.inputs[beside], shape, ELEMENT_TYPES[dtype].numpy)
            for tensors, array in zip(self.sets, arrays, strict=True):
                tensors[name] = array

    def placed(self, array: npt.NDArray) -> npt.NDArray:
        return array

    def reference(self) -> Sequence[npt.NDArray]:
        return expected_outputs(self.module, self.spec, self.activations)

    def differ(self, actual: Any, expected: npt.NDArray) -> bool:
        array = actual if isinstance(actual, np.ndarray) else to_numpy(actual)
        return reference.differing(array, expected) > 0

    def arguments(self, op: str, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
        return operation_arguments(op, tensors, self.activations.epsilon)

    def overwrite(self, output: npt.NDArray) -> None:
        output.view(np.uint8)[...] = 0xA5

    def restore(self, cache: npt.NDArray, before: npt.NDArray) -> None:
        cache[...] = before

    def torch_sets(self) -> list[dict[str, Any]]:
        return [{name: to_torch(self.inputs[name].copy()) for name in self.graph_tensors}]

    def candidate(self, name: str) -> Candidate:
        if name == NUMPY:
            return self._numpy()
        if name == SCALAR:
            return self.ours(SCALAR, self._scalar)
        return super().candidate(name)

    def _numpy(self) -> Candidate:
        graph = functools.partial(
            reference.apply_qk_rms_norm, cast_before_gamma=self.spec.cast_before_gamma
        )
        inputs = [self.inputs[name] for name in self.operation.signature]
        arguments = (*inputs, self.activations.epsilon, str(self.spec.out_dtype))
        note = "one thread" if self.threads > 1 else ""
        return Candidate(NUMPY, graph, [arguments], exact=True, note=note)

    def copy(self, name: str) -> Candidate:
        item = 1
        if self.threads > 1 and self.spec.in_bytes == self.spec.out_bytes:
            item = self.spec.in_bytes  # torch splits work among threads by elements
        sets: list[list[tuple[Any, Any]]] = [[] for _ in OFFSETS]
        for size in self.copy_sizes(apart=True):
            source = aligned_copy(np.ones(size // item, f"i{item}"))
            for pairs, target in zip(
                sets, outputs_beside(source, source.shape, source.dtype), strict=True
            ):
                pairs.append((target, source))
        torch = torch_or_none()
        if self.threads == 1 or torch is None:
            note = f", one thread: {NOT_INSTALLED}" if self.threads > 1 else ""
            copy, note = _copy_by_numpy, f"numpy.copyto{note}"
        else:
            sets = [[tuple(map(torch.from_numpy, pair)) for pair in pairs] for pairs in sets]  # type: ignore[misc]
            copy, note = copy_by_torch, f"torch.copy_, {self.threads} threads"
        return Candidate(name, copy, [(pairs,) for pairs in sets], note=note)

    def host_calls(self) -> list[Candidate]:
        """Return calls of the module and of the API, with arrays of NumPy and of torch."""
        function, arrays = getattr(self.module, self.spec.op), self.sets[0]
        module, public = "module, torch tensors", "API, torch tensors"
        with_torch = [Candidate(name, None, note=NOT_INSTALLED) for name in (module, public)]
        if torch_or_none():
            tensors = {name: to_torch(array) for name, array in arrays.items()}
            arguments = call_arguments(self.spec.op, tensors, self.activations.epsilon)
            with_torch = [
                Candidate(module, function, [arguments]),
                Candidate(public, self.api_call(tensors)),
            ]
        return [
            Candidate("module, tvm-ffi tensors", function, [self.arguments(self.spec.op, arrays)]),
            with_torch[0],
            Candidate("API, NumPy arrays", self.api_call(arrays)),
            with_torch[1],
        ]
