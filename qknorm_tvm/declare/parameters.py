"""The parameters of a declared function, from the table of operations.

In: a spec, and what a schedule may rely on about the call. Out: TVM's variables by name, in the
order in which a module's entry point passes them, and a function of them around given statements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm_ffi
from tvm import tirx
from tvm.s_tir import SBlock

from ..dtypes import ELEMENT_TYPES
from ..operations import (
    HEAD_DIM,
    K_COLS,
    KV_HEADS,
    Q_COLS,
    ROTARY_DIM,
    ROWS,
    SCALES,
)

if TYPE_CHECKING:
    from ..spec import KernelSpec

# What gammas and scales, read as vectors too, are aligned to at the most.
_VECTOR_BYTES = 16


def _int64(value: int) -> tirx.Expr:
    return tirx.IntImm("int64", value)


def parameters(
    spec: KernelSpec, *, row_tile: int = 1, stride_unit: int = 1, alignment: int | None = None
) -> dict[str, Any]:
    """Return what a spec's declared function takes: its tensors and scalars, by name, in order.

    Parameters
    ----------
    spec : KernelSpec
        Of an operation with fixed columns.
    row_tile, stride_unit, alignment
        As for `declare.norm.declare`. Caches and `cos_sin_cache` keep to both, like the rows of Q,
        K and V.

    Returns
    -------
    dict of str to tirx.Var
        The tensors that calls of the spec give, in the order of the entry point; the scalars that
        they give; and `operations.Operation.internal_scalars`.
    """
    row_tiles = tirx.Var("row_tiles", "int64")
    scalars = {
        name: row_tiles if name == "row_tiles" else tirx.Var(name, "int64")
        for name in spec.operation.internal_scalars(spec)
    }
    extents: dict[str, Any] = {ROWS: row_tiles * row_tile}
    for name in (Q_COLS, K_COLS, *((HEAD_DIM, ROTARY_DIM, KV_HEADS) if spec.head_dim else ())):
        extents[name] = _int64(getattr(spec, name))
    given: dict[str, Any] = {}
    for tensor in spec.tensors:
        dtype = spec.dtype_of(tensor)
        extents[SCALES] = tirx.Var(f"{tensor.name}_count", "int64")
        # A dimension that only a call knows comes with the tensor.
        shape = [
            extents.setdefault(extent, tirx.Var(str(extent), "int64"))
            if isinstance(extent, str)
            else _int64(extent)
            for extent in tensor.shape
        ]
        own = ELEMENT_TYPES[dtype].bytes
        if tensor.stride_names:
            strides = [scalars[name] * stride_unit for name in tensor.stride_names] + [_int64(1)]
            align = alignment or own
        else:
            strides = [tirx.Var(f"{tensor.name}_stride", "int64")] * (len(shape) - 1) + [_int64(1)]
            wide = alignment is not None and dtype == "float32" and len(shape) == 1
            align = min(alignment or own, _VECTOR_BYTES) if wide else own
        given[tensor.name] = tirx.decl_buffer(
            shape, dtype, tensor.name, strides=strides, data_alignment=align
        )
    for scalar in spec.operation.scalars_given(spec):
        given[scalar.name] = tirx.Var(scalar.name, scalar.dtype)
    return given | scalars


def function(name: str, given: dict[str, Any], body: tirx.Stmt) -> tirx.PrimFunc:
    """Return the function of `given` whose statements are `body`.

    What blocks read and write is worked out anew: a script without these parameters could not.
    """
    buffers = {value: value for value in given.values() if hasattr(value, "shape")}
    regions = tvm_ffi.get_global_func("s_tir.analysis.GetSBlockAccessRegion")
    blocks: list[SBlock] = []
    tvm_ffi.structural_walk(body, (SBlock, blocks.append))
    for block in blocks:
        buffers |= {buffer: buffer for buffer in block.alloc_buffers}

    def with_regions(block: SBlock) -> SBlock:
        if block.name_hint == "root":
            return block
        reads, writes, opaque = regions(block, buffers)
        return SBlock(
            block.iter_vars, [*reads, *opaque], [*writes, *opaque], block.name_hint, block.body,
            block.init, block.alloc_buffers, block.match_buffers, block.annotations,
        )  # fmt: skip

    body = tvm_ffi.structural_map(body, (SBlock, with_regions))
    return tirx.PrimFunc(list(given.values()), body).with_attrs(
        {"global_symbol": name, "s_tir": True}
    )
