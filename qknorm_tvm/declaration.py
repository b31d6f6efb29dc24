"""The one TensorIR declaration of ``apply_qk_rms_norm``.

Nothing here says how the operation runs: no vector, no thread, no order over rows. It says what is
computed, with every float32 intermediate named, so that the order of rounding can be read off::

    rs       = rsqrt(qk_var[:, column] + epsilon)
    x32      = cast(x, float32)
    scaled   = x32 * rs
    weighted = scaled * gamma
    out      = cast(weighted, out_dtype)

once for Q (column 0) and once for K (column 1). ``qknorm_tvm.schedules`` decides the rest, per
target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script import tirx as T

if TYPE_CHECKING:
    from .spec import KernelSpec

#: Name of the declared function, and of the entry point of every exported module.
FUNCTION_NAME = "apply_qk_rms_norm"

#: The scalars that the declared function takes after ``epsilon``. A module's entry point computes
#: them from the tensors; a caller never sees them.
INTERNAL_SCALARS = ("row_tiles", "q_out_stride", "k_out_stride", "q_stride", "k_stride")


def _one_operand(tag: str, out_dtype: str, reproducible: bool):
    """Return the statements that normalise one operand, their blocks named after `tag`.

    A factory, because TVM numbers the blocks of a second expansion of one inline function.
    """
    rs_name, x32_name, out_name = f"rs_{tag}", f"x32_{tag}", f"{tag}_out"
    scaled_name, weighted_name = f"scaled_{tag}", f"weighted_{tag}"

    def inverse_root(x):
        # T.rsqrt is each target's own: 1/sqrt with both steps correctly rounded on LLVM, rsqrtf on
        # CUDA, as in the unfused graph of that device. Written out, it is the same on both.
        return T.float32(1) / T.sqrt(x) if reproducible else T.rsqrt(x)

    @T.inline
    def one_operand(out, gamma, qk_var, column, x, rows, cols, epsilon):
        rs = T.sblock_alloc_buffer((rows,), "float32")
        x32 = T.sblock_alloc_buffer((rows, cols), "float32")
        scaled = T.sblock_alloc_buffer((rows, cols), "float32")
        weighted = T.sblock_alloc_buffer((rows, cols), "float32")
        for i in range(rows):
            with T.sblock(rs_name):
                vi = T.axis.spatial(rows, i)
                rs[vi] = inverse_root(qk_var[vi, column] + epsilon)
        for i, j in T.grid(rows, cols):
            with T.sblock(x32_name):
                vi, vj = T.axis.remap("SS", [i, j])
                x32[vi, vj] = T.Cast("float32", x[vi, vj])
        for i, j in T.grid(rows, cols):
            with T.sblock(scaled_name):
                vi, vj = T.axis.remap("SS", [i, j])
                scaled[vi, vj] = x32[vi, vj] * rs[vi]
        for i, j in T.grid(rows, cols):
            with T.sblock(weighted_name):
                vi, vj = T.axis.remap("SS", [i, j])
                weighted[vi, vj] = scaled[vi, vj] * gamma[vj]
        for i, j in T.grid(rows, cols):
            with T.sblock(out_name):
                vi, vj = T.axis.remap("SS", [i, j])
                out[vi, vj] = T.Cast(out_dtype, weighted[vi, vj])

    return one_operand


def declare(
    spec: KernelSpec,
    *,
    row_tile: int = 1,
    stride_unit: int = 1,
    alignment: int | None = None,
) -> tirx.PrimFunc:
    """Declare ``apply_qk_rms_norm`` for a spec, for any number of rows and any row strides.

    The three keywords state what a schedule may rely on about the *call*, never what is computed.
    The module's entry point tests them before it chooses a function that was declared with them.

    Parameters
    ----------
    spec : KernelSpec
        Operation, dtypes and columns. ``None`` columns are declared symbolic.
    row_tile : int
        M is ``row_tiles * row_tile``, so that a schedule may handle `row_tile` rows together
        without a test inside its loops. ``row_tiles`` is a run-time scalar.
    stride_unit : int
        Row strides of q, k and their outputs are the scalars of `INTERNAL_SCALARS` times this many
        elements, so that a schedule can prove rows aligned. ``qk_var`` keeps a stride of its own.
    alignment : int, optional
        Bytes to which the data of q, k, q_out and k_out is promised to be aligned; by default one
        element: a slice may start anywhere. gamma_q, gamma_k and qk_var promise one element
        whenever this is the default, else 16 bytes for the gammas.

    Returns
    -------
    tirx.PrimFunc
        ``apply_qk_rms_norm(q_out, k_out, gamma_q, gamma_k, qk_var, q, k, epsilon, row_tiles,
        q_out_stride, k_out_stride, q_stride, k_stride)``.
    """
    in_dtype, out_dtype = spec.in_dtype, spec.out_dtype
    in_align = alignment or spec.in_bytes
    out_align = alignment or spec.out_bytes
    gamma_align = 4 if alignment is None else min(alignment, 16)
    # int64 extents: 32-bit indices overflow at M * Nq >= 2**31.
    nq = tirx.Var("q_cols", "int64") if spec.q_cols is None else tirx.IntImm("int64", spec.q_cols)
    nk = tirx.Var("k_cols", "int64") if spec.k_cols is None else tirx.IntImm("int64", spec.k_cols)
    normalise_q = _one_operand("q", out_dtype, spec.reproducible)
    normalise_k = _one_operand("k", out_dtype, spec.reproducible)

    @T.prim_func(s_tir=True)
    def apply_qk_rms_norm(
        q_out_handle: T.handle,
        k_out_handle: T.handle,
        gamma_q_handle: T.handle,
        gamma_k_handle: T.handle,
        qk_var_handle: T.handle,
        q_handle: T.handle,
        k_handle: T.handle,
        epsilon: T.float32,
        row_tiles: T.int64,
        q_out_stride: T.int64,
        k_out_stride: T.int64,
        q_stride: T.int64,
        k_stride: T.int64,
    ):
        T.func_attr({"global_symbol": "apply_qk_rms_norm", "tirx.noalias": True})
        qk_var_stride = T.int64()
        q_out = T.match_buffer(
            q_out_handle,
            (row_tiles * row_tile, nq),
            out_dtype,
            strides=[q_out_stride * stride_unit, T.int64(1)],
            align=out_align,
        )
        k_out = T.match_buffer(
            k_out_handle,
            (row_tiles * row_tile, nk),
            out_dtype,
            strides=[k_out_stride * stride_unit, T.int64(1)],
            align=out_align,
        )
        gamma_q = T.match_buffer(gamma_q_handle, (nq,), "float32", align=gamma_align)
        gamma_k = T.match_buffer(gamma_k_handle, (nk,), "float32", align=gamma_align)
        qk_var = T.match_buffer(
            qk_var_handle,
            (row_tiles * row_tile, T.int64(2)),
            "float32",
            strides=[qk_var_stride, T.int64(1)],
            align=4,
        )
        q = T.match_buffer(
            q_handle,
            (row_tiles * row_tile, nq),
            in_dtype,
            strides=[q_stride * stride_unit, T.int64(1)],
            align=in_align,
        )
        k = T.match_buffer(
            k_handle,
            (row_tiles * row_tile, nk),
            in_dtype,
            strides=[k_stride * stride_unit, T.int64(1)],
            align=in_align,
        )
        normalise_q(q_out, gamma_q, qk_var, 0, q, row_tiles * row_tile, nq, epsilon)
        normalise_k(k_out, gamma_k, qk_var, 1, k, row_tiles * row_tile, nk, epsilon)

    return apply_qk_rms_norm
