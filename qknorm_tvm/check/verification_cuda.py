"""Bit-exactness on a GPU: where the cases of `verification` run, with unfused torch beside it.

What a case is, its layouts, the guards around outputs and the comparison are `verification`'s. The
memory of a case goes to the GPU as it is, and comes back after the call.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..load.module import Module
from ..spec import KernelSpec
from . import reference
from .calls import call_arguments
from .inputs import Activations
from .layouts import PADDED
from .verification import Case, Device, Expected, cases_for, shape_case, torch_outputs

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
        whole = copy[offset : offset + (owner.size - offset) // array.itemsize * array.itemsize]
        strides = [stride // array.itemsize for stride in array.strides]
        return whole.view(dtype).as_strided(array.shape, strides)

    def fetch(self) -> None:
        """Copy all memory back into the arrays."""
        for owner, copy in self._memory.values():
            owner[...] = copy.cpu().numpy()


class Cuda(Device):
    """A GPU: compared with what `expected_outputs` says.

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

    def expected(self, module: Module, spec: KernelSpec, inputs: Activations) -> list[Expected]:
        outputs = expected_outputs(spec, inputs, self._device)
        return [Expected(outputs, by_torch=not _by_numpy(spec))]

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


def _by_numpy(spec: KernelSpec) -> bool:
    # Reproducible specs and statistics promise NumPy's bits.
    return spec.reproducible or not spec.operation.normalises


def expected_outputs(
    spec: KernelSpec, inputs: Activations, device: str = "cuda"
) -> tuple[npt.NDArray, ...]:
    """Return what a spec's outputs must be: statistics in CUDA's order, and the graph with them.

    Parameters
    ----------
    spec : KernelSpec
        What is not reproducible is computed by the unfused torch graph on the device.
    inputs : Activations
    device : str

    Returns
    -------
    tuple of ndarray
        In the order of the operation's outputs.
    """
    if spec.op != "apply_qk_rms_norm":
        qk_var = reference.row_mean_of_squares_qk(inputs.q, inputs.k, order="cuda")
        if not spec.operation.normalises:
            return (qk_var,)
        inputs = dataclasses.replace(inputs, qk_var=qk_var)
    out_dtype, cast = str(spec.out_dtype), spec.cast_before_gamma
    if not _by_numpy(spec):
        return torch_outputs(inputs, out_dtype, device, cast_before_gamma=cast)
    return reference.apply_qk_rms_norm(
        inputs.q, inputs.k, inputs.qk_var, inputs.gamma_q, inputs.gamma_k, inputs.epsilon,
        out_dtype, cast_before_gamma=cast,
    )  # fmt: skip
