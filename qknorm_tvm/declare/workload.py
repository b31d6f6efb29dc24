"""A declared function as MetaSchedule's database knows it: specialised to a row count, hashed.

In: a spec and a number of packed rows. Out: a module whose shapes are static and whose parameters
are tensors only. Tuning searches on it; the build compares its hash with a tuned record's.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

from ..operations import BLOCK_SIZE, BLOCKS, MAX_POSITION, OPERATIONS, ROWS, SCALES, SLOTS
from ..spec import KernelSpec
from .norm import declare

#: The operations' tensors, by name.
_TENSORS = {tensor.name: tensor for op in OPERATIONS.values() for tensor in op.arguments}
#: Of what only a call knows: an engine's slots in a block, a model's positions.
_BLOCK_SIZE, _POSITIONS = 16, 4096


@functools.lru_cache(maxsize=8)
def declared(
    spec: KernelSpec, *, stride_unit: int = 1, alignment: int | None = None
) -> tirx.PrimFunc:
    """Return a declaration; kept, as it takes a second, and each row count asks for it."""
    return declare(spec, stride_unit=stride_unit, alignment=alignment)


def specialise(func: tirx.PrimFunc, rows: int, *, row_tile: int = 1, stride_unit: int = 1) -> Any:
    """Bind all that is symbolic or scalar in a declared function, for packed tensors.

    MetaSchedule needs static shapes and tensors only; the declaration stays the only one. Tensors
    that tuning makes do not share memory, as those of a call may.
    """

    def int64(value: int) -> tirx.IntImm:
        return tirx.IntImm("int64", value)

    extents = {
        ROWS: rows,
        SLOTS: rows,
        SCALES: 1,
        MAX_POSITION: _POSITIONS,
        BLOCK_SIZE: _BLOCK_SIZE,
        BLOCKS: -(-rows // _BLOCK_SIZE) + 1,
    }
    params = {param.name: param for param in func.params}
    shapes = {
        name: [extents.get(str(named), extent) for named, extent in
               zip(_TENSORS[name].shape, param.shape, strict=True)]
        for name, param in params.items() if name in _TENSORS
    }  # fmt: skip
    shapes = {name: [int(extent) for extent in shape] for name, shape in shapes.items()}
    bound = {params["row_tiles"]: int64(rows // row_tile)}
    if "epsilon" in params:
        bound[params["epsilon"]] = tirx.const(1e-6, "float32")
    for name, shape in shapes.items():
        for dim, scalar in enumerate(_TENSORS[name].stride_names):
            bound[params[scalar]] = int64(math.prod(shape[dim + 1 :]) // stride_unit)
    func = func.specialize(bound)
    # What no scalar says is the buffers' own: other extents, and the stride of qk_var.
    for name, shape in shapes.items():
        (buffer,) = (param for param in func.params if param.name == name)
        if all(isinstance(value, tirx.IntImm) for value in (*buffer.shape, *buffer.strides)):
            continue
        packed = tirx.decl_buffer(
            [int64(extent) for extent in shape],
            buffer.dtype,
            name=name,
            strides=[int64(math.prod(shape[dim + 1 :])) for dim in range(len(shape))],
            data_alignment=buffer.data_alignment,
        )
        func = func.specialize({buffer: packed})
    return tvm.IRModule({"main": func.with_attrs({"global_symbol": "main", "tirx.noalias": True})})


def workload_hash(mod: tvm.IRModule) -> str:
    """Return the hash by which MetaSchedule's database knows a workload."""
    return str(tvm_ffi.structural_hash(mod) & (1 << 64) - 1)
