"""A declared function as MetaSchedule's database knows it: specialised to a row count, hashed.

In: a spec and a number of packed rows. Out: a module whose shapes are static and whose parameters
are tensors only. Tuning searches on it; the build compares its hash with a tuned record's.
"""

from __future__ import annotations

import functools
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

from ..spec import KernelSpec
from .norm import declare


@functools.lru_cache(maxsize=8)
def declared(
    spec: KernelSpec, *, stride_unit: int = 1, alignment: int | None = None
) -> tirx.PrimFunc:
    """Return a declaration; kept, as it takes a second, and each row count asks for it."""
    return declare(spec, stride_unit=stride_unit, alignment=alignment)


def specialise(func: tirx.PrimFunc, rows: int, *, row_tile: int = 1, stride_unit: int = 1) -> Any:
    """Bind all that is symbolic or scalar in a declared function, for packed rows.

    MetaSchedule needs static shapes and tensors only; the declaration stays the only one.
    """

    def int64(value: int) -> tirx.IntImm:
        return tirx.IntImm("int64", value)

    params = {param.name: param for param in func.params}
    bound = {params["row_tiles"]: int64(rows // row_tile)}
    if "epsilon" in params:
        bound[params["epsilon"]] = tirx.const(1e-6, "float32")
    for name in ("q_out", "k_out", "q", "k"):
        if name in params:
            cols = int(params[name].shape[1])
            bound[params[f"{name}_stride"]] = int64(cols // stride_unit)
    func = func.specialize(bound)
    # The stride of qk_var is the buffer's own, not a parameter.
    for qk_var in [param for param in func.params if param.name == "qk_var"]:
        packed = tirx.decl_buffer(
            (int64(rows), int64(2)),
            "float32",
            name="qk_var",
            strides=[int64(2), int64(1)],
            data_alignment=4,
        )
        func = func.specialize({qk_var: packed})
    return tvm.IRModule({"main": func.with_attr("global_symbol", "main")})


def workload_hash(mod: tvm.IRModule) -> str:
    """Return the hash by which MetaSchedule's database knows a workload."""
    return str(tvm_ffi.structural_hash(mod) & (1 << 64) - 1)
