"""Overlap of tensors that torch.compile traces, as the compiled module would find it at the call.

Imported only where torch is. The operators and the tensor-parallel layer use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ..operations import Operation


def _place(tensor: torch.Tensor) -> tuple[Any, Any, Any, Any]:
    """Return where a tensor lies in its storage: offset, rows, stride and width, in bytes."""
    rows, step = (tensor.shape[0], tensor.stride(0)) if tensor.dim() == 2 else (1, 0)
    size = tensor.element_size()
    return tensor.storage_offset() * size, rows, step * size, tensor.shape[-1] * size


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two fake tensors share memory, where that is known while tracing.

    A compiler may give the kernel copies of arguments that overlap, and the kernel then cannot see
    it.
    """
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return False
    if a.dim() > 2 or b.dim() > 2:
        # Caches may be views of one buffer: the rest is left to the check at run time.
        return a.dim() == b.dim() and bool(a.storage_offset() == b.storage_offset())
    numbers = (*_place(a), *_place(b))
    if any(free_unbacked_symbols(number) for number in numbers if not isinstance(number, int)):
        return False  # known to the data alone: left to the check at run time
    a_start, a_rows, a_step, a_row, b_start, b_rows, b_step, b_row = numbers
    if a_rows == 0 or b_rows == 0:
        return False
    if a_step == b_step and a_step >= a_row + b_row:
        # Rows side by side in one buffer: compare places within its rows, whatever their number.
        distance = (b_start - a_start) % a_step
        if a_row <= distance and distance + b_row <= a_step:
            return False
    a_end, b_end = a_start + (a_rows - 1) * a_step + a_row, b_start + (b_rows - 1) * b_step + b_row
    if a_end <= b_start or b_end <= a_start:
        return False
    if not all(isinstance(number, int) for number in numbers):
        # Walking over the rows would fix their number in the graph.
        return bool(a_step == b_step)
    i = j = 0
    while i < a_rows and j < b_rows:
        a_at, b_at = a_start + i * a_step, b_start + j * b_step
        if a_at + a_row <= b_at:
            i += 1
        elif b_at + b_row <= a_at:
            j += 1
        else:
            return True
    return False


def check_overlap(operation: Operation, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse outputs that overlap, while torch.compile traces: see `_overlap`.

    Parameters
    ----------
    operation : Operation
        Its arguments say which output may be in place of which input.
    tensors : mapping
        Fake tensors by argument; those that are not given are not there.

    Raises
    ------
    ValueError
        In the words of the module's own check.
    """
    outputs = [name for name in operation.outputs if name in tensors]
    inputs = [name for name in operation.signature if name in tensors]
    for index, out in enumerate(outputs):
        for earlier in outputs[:index]:
            if _overlap(tensors[out], tensors[earlier]):
                raise ValueError(f"{out} must not overlap {earlier}, got tensors that share memory")
    for out in outputs:
        own = operation[out].in_place_of
        for name in inputs:
            a, b = tensors[out], tensors[name]
            if name == own and _place(a) == _place(b) and a.dtype.itemsize == b.dtype.itemsize:
                continue
            if not _overlap(a, b):
                continue
            if name == own:
                raise ValueError(
                    f"{out} must be {name} itself (same address, strides and element size) or not "
                    "overlap it, got tensors that share memory otherwise"
                )
            raise ValueError(f"{out} must not overlap {name}, got tensors that share memory")
