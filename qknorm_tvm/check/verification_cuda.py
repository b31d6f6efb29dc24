"""Bit-exactness on a GPU: the cases of `verification`, with unfused torch beside it.

What a case is, its layouts and the guards around outputs are the CPU's: the memory of a
`Placed` case goes to the GPU as it is, and comes back after the call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..load.module import Module
from ..spec import KernelSpec
from . import reference
from .inputs import Activations
from .layouts import PADDED, Placed
from .reference_torch import apply_qk_rms_norm as torch_graph
from .reference_torch import to_numpy, to_torch
from .verification import (
    Case,
    Guarded,
    Report,
    Tally,
    cases_for,
    describe_difference,
    of_operation,
    shape_case,
)

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


def torch_outputs(
    a: Activations, out_dtype: str, device: str, *, cast_before_gamma: bool = False
) -> tuple[npt.NDArray, ...]:
    """Return the outputs of the unfused graph in torch on a device."""
    import torch

    inputs = (a.q, a.k, a.qk_var, a.gamma_q, a.gamma_k)
    q, k, var, gamma_q, gamma_k = (to_torch(np.ascontiguousarray(x)).to(device) for x in inputs)
    outputs = torch_graph(
        q, k, var, gamma_q, gamma_k, a.epsilon, getattr(torch, out_dtype),
        cast_before_gamma=cast_before_gamma,
    )  # fmt: skip
    return tuple(to_numpy(x.cpu()) for x in outputs)


def cuda_cases(module: Module, spec: KernelSpec, *, thorough: bool = False) -> Iterator[Case]:
    """Generate the CPU's cases for a spec, and the rows at which the module changes kernels.

    Each in rows that start at whole vectors too, whatever their columns.
    """
    for case in _cases(module, spec, thorough):
        yield dataclasses.replace(case, layouts=(*case.layouts, PADDED))


def _cases(module: Module, spec: KernelSpec, thorough: bool) -> Iterator[Case]:
    for case in cases_for(spec, thorough=thorough):
        yield of_operation(spec, case)
    q_cols, k_cols = spec.q_cols or 1537, spec.k_cols or 257
    starts = {
        int(code["min_rows"])
        for level in module.metadata["levels"]
        for code in level["code"]
        if code["spec"] == spec.text
    }
    for rows in sorted({rows for start in starts - {1} for rows in (start - 1, start)}):
        if rows * (q_cols + k_cols) <= _MOST_ELEMENTS:
            case = shape_case(spec, rows, q_cols, k_cols)
            case = dataclasses.replace(case, group="where kernels change")
            yield of_operation(spec, case)


def run_case(
    module: Module, spec: KernelSpec, case: Case, report: Report, device: str = "cuda"
) -> None:
    """Make all checks of a case and add them to a report.

    Parameters
    ----------
    module : Module
        Holds `spec`.
    spec : KernelSpec
        Reproducible ones, and statistics, are compared with NumPy, whose bits they promise; others
        with the unfused torch graph on the same device, given those statistics.
    case : Case
    report : Report
        Changed.
    device : str
    """
    inputs = case.make()
    operation = spec.operation
    # Torch has no part in a sum of another order.
    from_numpy = spec.reproducible or not operation.normalises
    expected = expected_outputs(spec, inputs, device)
    tally = report.groups.setdefault(case.group, Tally())
    for layout in case.layouts:
        placed = Placed(inputs, case.out_dtype, layout, by_element=True)
        guarded, there = Guarded(inputs.qk_var.shape), OnDevice(device)
        a = placed.activations
        arrays = {"q_out": placed.q_out, "k_out": placed.k_out, "q": a.q, "k": a.k}
        arrays |= {"gamma_q": a.gamma_q, "gamma_k": a.gamma_k}
        arrays["qk_var"] = guarded.array if "qk_var" in operation.outputs else a.qk_var
        given = [there.tensor(arrays[name]) for name in operation.tensors]
        epsilon = [a.epsilon] if operation.has_epsilon else []
        getattr(module, spec.op)(*given, *epsilon)
        there.fetch()
        tally.checks += 1
        where = f"{case.description}; {layout}"
        for name, wanted in zip(operation.outputs, expected, strict=True):
            wrong = reference.differing(arrays[name], wanted)
            if from_numpy:
                tally.elements += wanted.size
                tally.from_numpy += wrong
            else:
                tally.torch_elements += wanted.size
                tally.from_torch += wrong
            if wrong:
                told = describe_difference(name, inputs, arrays[name], wanted)
                report.note(f"{where}: {told}")
        if not (placed.intact() and guarded.intact()):
            tally.spoilt += 1
            report.note(f"{where}: memory that is no output was written to")


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
    if not spec.reproducible:
        return torch_outputs(inputs, out_dtype, device, cast_before_gamma=cast)
    return reference.apply_qk_rms_norm(
        inputs.q, inputs.k, inputs.qk_var, inputs.gamma_q, inputs.gamma_k, inputs.epsilon,
        out_dtype, cast_before_gamma=cast,
    )  # fmt: skip


def iterate(
    modules: Iterable[Module], *, thorough: bool = False
) -> Iterator[tuple[Module, KernelSpec, Case]]:
    """Generate every case of every spec of some modules."""
    for module in modules:
        for spec in module.specs:
            for case in cuda_cases(module, spec, thorough=thorough):
                yield module, spec, case
