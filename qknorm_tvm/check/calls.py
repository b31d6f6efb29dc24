"""Calling a loaded module with NumPy arrays: the argument list, made once and used often."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from ..call.arrays import adapter_of
from ..operations import OPERATIONS


def call_arguments(op: str, tensors: Mapping[str, Any], epsilon: float) -> tuple[Any, ...]:
    """Return an entry point's arguments in its order, from tensors of any framework by name.

    Optional tensors that are not there are None.
    """
    operation = OPERATIONS[op]
    values = tuple(
        tensors.get(tensor.name) if tensor.given_if else tensors[tensor.name]
        for tensor in operation.arguments
    )
    return (*values, float(epsilon)) if operation.has_epsilon else values


def operation_arguments(
    op: str, arrays: Mapping[str, npt.NDArray], epsilon: float
) -> tuple[Any, ...]:
    """Return what a module's entry point of an operation takes for NumPy arrays by name.

    Nothing is copied; the arrays must outlive the calls. The last argument, 1, says that 16-bit
    integers are bfloat16.
    """
    operation = OPERATIONS[op]
    views = {
        name: adapter_of(name, arrays[name]).view(
            name, arrays[name], writable=name in operation.outputs
        )
        for name in operation.tensors
        if name in arrays
    }
    return (*call_arguments(op, views, epsilon), 1)
