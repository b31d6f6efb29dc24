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
the target's order of `declare.statistics`; ``qk_rms_norm`` is the one after the other, with
statistics that never leave the registers. What rotates is declared in `declare.rope`. Of a launch
that exchanges its statistics with other ranks only the parameters are declared.
``qknorm_tvm.schedules`` decides the rest, per target.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm import tirx
from tvm.script import tirx as T

from . import steps
from .parameters import function, parameters
from .parsing import parses_script
from .rope import declare_rope
from .statistics import row_mean, sum_of_squares

if TYPE_CHECKING:
    from ..spec import KernelSpec


def _normalise(tag: str, spec: KernelSpec) -> Callable[..., Any]:
    """Return the statements that normalise one operand, their blocks named after `tag`.

    A factory, because TVM numbers the blocks of a second expansion of one inline function.
    """
    rs_name, x32_name, out_name = f"rs_{tag}", f"x32_{tag}", f"{tag}_out"
    scaled_name, weighted_name = f"scaled_{tag}", f"weighted_{tag}"
    out_dtype, reproducible = spec.out_dtype, spec.reproducible
    before_gamma = steps.type_before_gamma(spec)

    @T.inline
    def normalise(out, gamma, qk_var, column, x, rows, cols, epsilon):
        rs = T.sblock_alloc_buffer((rows,), "float32")
        x32 = T.sblock_alloc_buffer((rows, cols), "float32")
        scaled = T.sblock_alloc_buffer((rows, cols), "float32")
        weighted = T.sblock_alloc_buffer((rows, cols), "float32")
        for i in range(rows):
            with T.sblock(rs_name):
                vi = T.axis.spatial(rows, i)
                rs[vi] = steps.inverse_root(qk_var[vi, column], epsilon, reproducible=reproducible)
        for i, j in T.grid(rows, cols):
            with T.sblock(x32_name):
                vi, vj = T.axis.remap("SS", [i, j])
                x32[vi, vj] = steps.widened(x[vi, vj])
        for i, j in T.grid(rows, cols):
            with T.sblock(scaled_name):
                vi, vj = T.axis.remap("SS", [i, j])
                scaled[vi, vj] = steps.scaled(x32[vi, vj], rs[vi], before_gamma)
        for i, j in T.grid(rows, cols):
            with T.sblock(weighted_name):
                vi, vj = T.axis.remap("SS", [i, j])
                weighted[vi, vj] = steps.weighted(scaled[vi, vj], gamma[vj])
        for i, j in T.grid(rows, cols):
            with T.sblock(out_name):
                vi, vj = T.axis.remap("SS", [i, j])
                out[vi, vj] = steps.rounded(weighted[vi, vj], out_dtype)

    return normalise


@dataclasses.dataclass(frozen=True)
class _Parameters:
    """The tensors that a declared function takes, with what may be relied on about them."""

    spec: KernelSpec
    row_tile: int
    stride_unit: int
    alignment: int | None

    @property
    def columns(self) -> tuple[tirx.Expr, tirx.Expr]:
        # int64 extents: 32-bit indices overflow at M * Nq >= 2**31.
        q, k = (
            tirx.Var(name, "int64") if cols is None else tirx.IntImm("int64", cols)
            for name, cols in (("q_cols", self.spec.q_cols), ("k_cols", self.spec.k_cols))
        )
        return q, k

    def rows(self, row_tiles: Any) -> Any:
        return row_tiles * self.row_tile

    def x(self, handle: Any, row_tiles: Any, cols: Any, stride: Any) -> Any:
        """Declare q or k."""
        return self._matrix(handle, row_tiles, cols, stride, self.spec.in_dtype, self.spec.in_bytes)

    def out(self, handle: Any, row_tiles: Any, cols: Any, stride: Any) -> Any:
        """Declare q_out or k_out."""
        spec = self.spec
        return self._matrix(handle, row_tiles, cols, stride, spec.out_dtype, spec.out_bytes)

    def gamma(self, handle: Any, cols: Any) -> Any:
        align = 4 if self.alignment is None else min(self.alignment, 16)
        return T.match_buffer(handle, (cols,), "float32", align=align)

    def qk_var(self, handle: Any, row_tiles: Any, stride: Any) -> Any:
        shape, strides = (self.rows(row_tiles), T.int64(2)), [stride, T.int64(1)]
        return T.match_buffer(handle, shape, "float32", strides=strides, align=4)

    def _matrix(
        self, handle: Any, row_tiles: Any, cols: Any, stride: Any, dtype: str, size: int
    ) -> Any:
        return T.match_buffer(
            handle,
            (self.rows(row_tiles), cols),
            dtype,
            strides=[stride * self.stride_unit, T.int64(1)],
            align=self.alignment or size,
        )


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
    # What is computed depends on the kind of target alone: every CPU level shares a declaration.
    spec = spec.replace(target=spec.parsed_target.kind)
    return _declared(_Parameters(spec, row_tile, stride_unit, alignment))


@functools.lru_cache(maxsize=64)
@parses_script
def _declared(given: _Parameters) -> tirx.PrimFunc:
    """Declare once: parsing TVMScript takes longer than scheduling and LLVM together."""
    promises: dict[str, Any] = {
        "row_tile": given.row_tile, "stride_unit": given.stride_unit, "alignment": given.alignment
    }  # fmt: skip
    if given.spec.has_peers:
        # Parameters alone: what other ranks' memory is to hold by then has no expression. The
        # kernel is written out, of the same `steps`.
        return function(given.spec.op, parameters(given.spec, **promises), tirx.Evaluate(0))
    if given.spec.operation.rotates:
        return declare_rope(given.spec, **promises)
    declare_operation = {
        "apply_qk_rms_norm": _apply_qk_rms_norm,
        "row_mean_of_squares_qk": _row_mean_of_squares_qk,
        "qk_rms_norm": _qk_rms_norm,
    }[given.spec.op]
    return declare_operation(given.spec, given)


def _apply_qk_rms_norm(spec: KernelSpec, given: _Parameters) -> tirx.PrimFunc:
    nq, nk = given.columns
    normalise_q, normalise_k = _normalise("q", spec), _normalise("k", spec)

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
        T.func_attr({"global_symbol": "apply_qk_rms_norm"})
        qk_var_stride = T.int64()
        q_out = given.out(q_out_handle, row_tiles, nq, q_out_stride)
        k_out = given.out(k_out_handle, row_tiles, nk, k_out_stride)
        gamma_q = given.gamma(gamma_q_handle, nq)
        gamma_k = given.gamma(gamma_k_handle, nk)
        qk_var = given.qk_var(qk_var_handle, row_tiles, qk_var_stride)
        q = given.x(q_handle, row_tiles, nq, q_stride)
        k = given.x(k_handle, row_tiles, nk, k_stride)
        normalise_q(q_out, gamma_q, qk_var, 0, q, given.rows(row_tiles), nq, epsilon)
        normalise_k(k_out, gamma_k, qk_var, 1, k, given.rows(row_tiles), nk, epsilon)

    return apply_qk_rms_norm


def _row_mean_of_squares_qk(spec: KernelSpec, given: _Parameters) -> tirx.PrimFunc:
    nq, nk = given.columns
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
        T.func_attr({"global_symbol": "row_mean_of_squares_qk"})
        qk_var_stride = T.int64()
        qk_var = given.qk_var(qk_var_handle, row_tiles, qk_var_stride)
        q = given.x(q_handle, row_tiles, nq, q_stride)
        k = given.x(k_handle, row_tiles, nk, k_stride)
        total_q = T.sblock_alloc_buffer((given.rows(row_tiles), T.int64(1)), "float32")
        total_k = T.sblock_alloc_buffer((given.rows(row_tiles), T.int64(1)), "float32")
        add_up_q(total_q, q, given.rows(row_tiles), nq)
        add_up_k(total_k, k, given.rows(row_tiles), nk)
        # One block: two that wrote to one buffer could not be made parallel.
        for i, column in T.grid(given.rows(row_tiles), T.int64(2)):
            with T.sblock("mean"):
                vi, vc = T.axis.remap("SS", [i, column])
                qk_var[vi, vc] = T.if_then_else(
                    vc == T.int64(0),
                    steps.mean(total_q[vi, T.int64(0)], nq),
                    steps.mean(total_k[vi, T.int64(0)], nk),
                )

    return row_mean_of_squares_qk


def _qk_rms_norm(spec: KernelSpec, given: _Parameters) -> tirx.PrimFunc:
    nq, nk = given.columns
    normalise_q, normalise_k = _normalise("q", spec), _normalise("k", spec)
    add_up_q, add_up_k = (sum_of_squares(tag, spec.parsed_target.kind) for tag in ("q", "k"))
    mean_q, mean_k = row_mean("q"), row_mean("k")

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
        T.func_attr({"global_symbol": "qk_rms_norm"})
        q_out = given.out(q_out_handle, row_tiles, nq, q_out_stride)
        k_out = given.out(k_out_handle, row_tiles, nk, k_out_stride)
        gamma_q = given.gamma(gamma_q_handle, nq)
        gamma_k = given.gamma(gamma_k_handle, nk)
        q = given.x(q_handle, row_tiles, nq, q_stride)
        k = given.x(k_handle, row_tiles, nk, k_stride)
        var_q = T.sblock_alloc_buffer((given.rows(row_tiles), T.int64(1)), "float32")
        var_k = T.sblock_alloc_buffer((given.rows(row_tiles), T.int64(1)), "float32")
        total_q = T.sblock_alloc_buffer((given.rows(row_tiles), T.int64(1)), "float32")
        total_k = T.sblock_alloc_buffer((given.rows(row_tiles), T.int64(1)), "float32")
        add_up_q(total_q, q, given.rows(row_tiles), nq)
        mean_q(var_q, total_q, given.rows(row_tiles), nq)
        add_up_k(total_k, k, given.rows(row_tiles), nk)
        mean_k(var_k, total_k, given.rows(row_tiles), nk)
        normalise_q(q_out, gamma_q, var_q, 0, q, given.rows(row_tiles), nq, epsilon)
        normalise_k(k_out, gamma_k, var_k, 0, k, given.rows(row_tiles), nk, epsilon)

    return qk_rms_norm
