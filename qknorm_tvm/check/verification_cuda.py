"""A GPU as a device of `verification`: a case's memory goes there as it is, and comes back."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..load.module import Module
from ..spec import KernelSpec
from .calls import call_arguments
from .cases import Case, cases_for, shape_case
from .expected import Graph, outputs_of
from .inputs import Activations
from .layouts import PADDED
from .verification import Device

#: Beyond this many elements a case of a switch between kernels says nothing more.
_MOST_ELEMENTS = 12_000_000


class OnDevice:
    """NumPy arrays and all memory around them, copied to a device, and back.

    Parameters
    ----------
    device : str
        torch's name for it.
    """

    def __init__(self, device: str):
        self._device = device
        self._memory: dict[int, tuple[npt.NDArray, Any]] = {}

    def tensor(self, array: npt.NDArray) -> Any:
        """Return a tensor at the same place in a copy of the array's memory, with its strides."""
        import torch

        dtype = getattr(torch, array.dtype.name)
        if array.size == 0:
            return torch.empty(array.shape, dtype=dtype, device=self._device)
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        owner = owner.reshape(-1).view(np.uint8)
        start = owner.ctypes.data
        if start not in self._memory:
            self._memory[start] = (owner, torch.from_numpy(owner).to(self._device, copy=True))
        offset = array.ctypes.data - start
        copy = self._memory[start][1]
        elements = copy[offset : offset + (owner.size - offset) // array.itemsize * array.itemsize]
        strides = [stride // array.itemsize for stride in array.strides]
        return elements.view(dtype).as_strided(array.shape, strides)

    def fetch(self) -> None:
        """Copy all memory back into the arrays."""
        for owner, copy in self._memory.values():
            owner[...] = copy.cpu().numpy()


class Cuda(Device):
    """A GPU: compared with torch's graph there, or NumPy's where the bits are NumPy's.

    Parameters
    ----------
    device : str
        torch's name for it.
    """

    by_element = True

    def __init__(self, device: str = "cuda"):
        self._device = device

    def cases(self, module: Module, spec: KernelSpec, *, thorough: bool = False) -> Iterator[Case]:
        """Generate the CPU's cases for a spec, and the rows at which the module changes kernels.

        Each in rows that start at whole vectors too, whatever their columns.
        """
        switches = _switch_cases(module, spec)
        for case in itertools.chain(cases_for(spec, thorough=thorough), switches):
            yield dataclasses.replace(case, layouts=(*case.layouts, PADDED))

    def graphs(self, module: Module, spec: KernelSpec) -> Sequence[Graph]:
        return [_graph(spec, self._device)]

    def call(
        self, module: Module, op: str, arrays: Mapping[str, npt.NDArray], epsilon: float
    ) -> None:
        memory = OnDevice(self._device)
        tensors = {name: memory.tensor(array) for name, array in arrays.items()}
        getattr(module, op)(*call_arguments(op, tensors, epsilon))
        memory.fetch()


def _switch_cases(module: Module, spec: KernelSpec) -> Iterator[Case]:
    q_cols, k_cols = spec.q_cols or 1537, spec.k_cols or 257
    starts = {
        int(code["min_rows"])
        for level in module.metadata["levels"]
        for code in level["code"]
        if code["spec"] == spec.text
    }
    for rows in sorted({rows for start in starts - {1} for rows in (start - 1, start)}):
        if rows * (q_cols + k_cols) <= _MOST_ELEMENTS:
            yield shape_case(spec, rows, q_cols, k_cols, topic="where kernels change")


def _graph(spec: KernelSpec, device: str) -> Graph:
    """Return the graph that decides: reproducible specs and statistics promise NumPy's bits."""
    by_numpy = spec.reproducible or not spec.operation.normalises
    return Graph("cuda", torch_device=None if by_numpy else device)


def expected_outputs(
    spec: KernelSpec, inputs: Activations, device: str = "cuda"
) -> tuple[npt.NDArray, ...]:
    """Return what a spec's outputs must be on a GPU, in the order of the operation's."""
    return outputs_of(_graph(spec, device), inputs, spec)
