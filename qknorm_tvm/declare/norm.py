"""The one TensorIR declaration of each operation.

Nothing here says how an operation runs: no vector, no thread, no order over rows. It says what is
computed, with every float32 intermediate named, so that the order of rounding can be read off.
``apply_qk_rms_norm`` is ::

    rs       = rsqrt(qk_var[:, column] + epsilon)
    x32      = cast(x, float32)
    scaled   = x32 * rs                        with cast_before_gamma: cast to in_dtype and back
    weighted = scaled * gamma
    out      = cast(weighted, out_dtype)

once for Q (column 0) and once for K (column 1); ``row_mean_of_squares_qk`` computes ``qk_var`` in
the target's order of `declaration_statistics`; ``qk_rms_norm`` is the one after the other, with
statistics that never leave the registers. ``qknorm_tvm.schedules`` decides the rest, per target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script import tirx as T

from .statistics import sum_of_squares

if TYPE_CHECKING:
    from ..spec import KernelSpec


def _one_operand(tag: str, spec: KernelSpec):
    """Return the statements that normalise one operand, their blocks named after `tag`.

    A factory, because TVM numbers the blocks of a second expansion of one inline function.
    """
    rs_name, x32_name, out_name = f"rs_{tag}", f"x32_{tag}", f"{tag}_out"
    scaled_name, weighted_name = f"scaled_{tag}", f"weighted_{tag}"
    in_dtype, out_dtype, reproducible = spec.in_dtype, spec.out_dtype, spec.reproducible
    cast_before_gamma = spec.cast_before_gamma and in_dtype != "float32"

    def rounded(x):
        return T.Cast("float32", T.Cast(in_dtype, x)) if cast_before_gamma else x

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
                scaled[vi, vj] = rounded(x32[vi, vj] * rs[vi])
        for i, j in T.grid(rows, cols):
            with T.sblock(weighted_name):
                vi, vj = T.axis.remap("SS", [i, j])
                weighted[vi, vj] = scaled[vi, vj] * gamma[vj]
        for i, j in T.grid(rows, cols):
            with T.sblock(out_name):
                vi, vj = T.axis.remap("SS", [i, j])
                out[vi, vj] = T.Cast(out_dtype, weighted[vi, vj])

    return one_operand


def _one_mean(tag: str):
    """Return the statement that divides one operand's sums."""
    mean_name = f"mean_{tag}"

    @T.inline
    def one_mean(var, total, rows, cols):
        for i in range(rows):
            with T.sblock(mean_name):
                vi = T.axis.spatial(rows, i)
                var[vi, T.int64(0)] = total[vi, T.int64(0)] / T.Cast("float32", cols)

    return one_mean


def declare(
    spec: KernelSpec,
    *,
    row_tile: int = 1,
    stride_unit: int = 1,
    alignment: int | None = None,
) -> tirx.PrimFunc:
    """Declare a spec's operation, for any number of rows and any row strides.

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
        Row strides of q, k and their outputs are scalar arguments times this many
        elements, so that a schedule can prove rows aligned. ``qk_var`` keeps a stride of its own.
        The scalars are `operations.Operation.internal_scalars`, which a module's entry point
        computes from the tensors; a caller never sees them.
    alignment : int, optional
        Bytes to which the data of q, k, q_out and k_out is promised to be aligned; by default one
        element: a slice may start anywhere. gamma_q, gamma_k and qk_var promise one element
        whenever this is the default, else 16 bytes for the gammas.

    Returns
    -------
    tirx.PrimFunc
        Named like the operation; its parameters are the operation's tensors, ``epsilon`` if it has
        one, and the scalars: ``apply_qk_rms_norm(q_out, k_out, gamma_q, gamma_k, qk_var, q, k,
        epsilon, row_tiles, q_out_stride, k_out_stride, q_stride, k_stride)``.
    """
    in_align = alignment or spec.in_bytes
    out_align = alignment or spec.out_bytes
    gamma_align = 4 if alignment is None else min(alignment, 16)
    declare_operation = {
        "apply_qk_rms_norm": _apply_qk_rms_norm,
        "row_mean_of_squares_qk": _row_mean_of_squares_qk,
        "qk_rms_norm": _qk_rms_norm,
    }[spec.op]
    return declare_operation(spec, row_tile, stride_unit, in_align, out_align, gamma_align)


def _columns(spec: KernelSpec) -> tuple[tirx.Expr, tirx.Expr]:
    # int64 extents: 32-bit indices overflow at M * Nq >= 2**31.
    nq = tirx.Var("q_cols", "int64") if spec.q_cols is None else tirx.IntImm("int64", spec.q_cols)
    nk = tirx.Var("k_cols", "int64") if spec.k_cols is None else tirx.IntImm("int64", spec.k_cols)
    return nq, nk


def _apply_qk_rms_norm(
    spec: KernelSpec,
    row_tile: int,
    stride_unit: int,
    in_align: int,
    out_align: int,
    gamma_align: int,
) -> tirx.PrimFunc:
    in_dtype, out_dtype = spec.in_dtype, spec.out_dtype
    nq, nk = _columns(spec)
    normalise_q, normalise_k = _one_operand("q", spec), _one_operand("k", spec)

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


def _row_mean_of_squares_qk(
    spec: KernelSpec,
    row_tile: int,
    stride_unit: int,
    in_align: int,
    out_align: int,
    gamma_align: int,
) -> tirx.PrimFunc:
    in_dtype = spec.in_dtype
    nq, nk = _columns(spec)
    add_up_q, add_up_k = (sum_of_squares(tag, spec.parsed_target.kind) for tag in ("q", "k"))

    @T.prim_func(s_tir=True)
    def row_mean_of_squares_qk(
        qk_var_handle: T.handle,
        q_handle: T.handle,
        k_handle: T.handle,
        row_tiles: T.int64,
        q_stride: T.int64,
        k_stride: T.int64,
    ):
        T.func_attr({"global_symbol": "row_mean_of_squares_qk", "tirx.noalias": True})
        qk_var_stride = T.int64()
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
        total_q = T.sblock_alloc_buffer((row_tiles * row_tile, T.int64(1)), "float32")
        total_k = T.sblock_alloc_buffer((row_tiles * row_tile, T.int64(1)), "float32")
        add_up_q(total_q, q, row_tiles * row_tile, nq)
        add_up_k(total_k, k, row_tiles * row_tile, nk)
        # One block: two that wrote to one buffer could not be made parallel.
        for i, column in T.grid(row_tiles * row_tile, T.int64(2)):
            with T.sblock("mean"):
                vi, vc = T.axis.remap("SS", [i, column])
                qk_var[vi, vc] = T.if_then_else(
                    vc == T.int64(0),
                    total_q[vi, T.int64(0)] / T.Cast("float32", nq),
                    total_k[vi, T.int64(0)] / T.Cast("float32", nk),
                )

    return row_mean_of_squares_qk


def _qk_rms_norm(
    spec: KernelSpec,
    row_tile: int,
    stride_unit: int,
    in_align: int,
    out_align: int,
    gamma_align: int,
) -> tirx.PrimFunc:
    in_dtype, out_dtype = spec.in_dtype, spec.out_dtype
    nq, nk = _columns(spec)
    normalise_q, normalise_k = _one_operand("q", spec), _one_operand("k", spec)
    add_up_q, add_up_k = (sum_of_squares(tag, spec.parsed_target.kind) for tag in ("q", "k"))
    mean_q, mean_k = _one_mean("q"), _one_mean("k")

    @T.prim_func(s_tir=True)
    def qk_rms_norm(
        q_out_handle: T.handle,
        k_out_handle: T.handle,
        gamma_q_handle: T.handle,
        gamma_k_handle: T.handle,
        q_handle: T.handle,
        k_handle: T.handle,
        epsilon: T.float32,
        row_tiles: T.int64,
        q_out_stride: T.int64,
        k_out_stride: T.int64,
        q_stride: T.int64,
        k_stride: T.int64,
    ):
        T.func_attr({"global_symbol": "qk_rms_norm", "tirx.noalias": True})
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
        var_q = T.sblock_alloc_buffer((row_tiles * row_tile, T.int64(1)), "float32")
        var_k = T.sblock_alloc_buffer((row_tiles * row_tile, T.int64(1)), "float32")
        total_q = T.sblock_alloc_buffer((row_tiles * row_tile, T.int64(1)), "float32")
        total_k = T.sblock_alloc_buffer((row_tiles * row_tile, T.int64(1)), "float32")
        add_up_q(total_q, q, row_tiles * row_tile, nq)
        mean_q(var_q, total_q, row_tiles * row_tile, nq)
        add_up_k(total_k, k, row_tiles * row_tile, nk)
        mean_k(var_k, total_k, row_tiles * row_tile, nk)
        normalise_q(q_out, gamma_q, var_q, 0, q, row_tiles * row_tile, nq, epsilon)
        normalise_k(k_out, gamma_k, var_k, 0, k, row_tiles * row_tile, nk, epsilon)

    return qk_rms_norm
