"""The operations as torch custom operators: ``torch.compile``, ``torch.export``, CUDA graphs.

Importing this module registers them in the namespace ``qknorm_tvm`` for CPU and CUDA tensors:

* ``row_mean_of_squares_qk(q, k) -> qk_var``
* ``apply_qk_rms_norm(q, k, qk_var, gamma_q, gamma_k, epsilon) -> (q_out, k_out)``
* ``qk_rms_norm(q, k, gamma_q, gamma_k, epsilon) -> (q_out, k_out)``
* ``..._out``: the same three, written to tensors that are given
* ``apply_qk_rms_norm_`` and ``qk_rms_norm_``: in place of q and k

The functions of this module are thin: each calls its operator under ``torch.ops.qknorm_tvm``. Plain
eager code is served faster by the functions of `qknorm_tvm` itself, which skip torch's dispatcher.

There is no backward. With an argument that requires grad, under grad mode, every operator raises a
``ValueError``, in eager mode and while a graph is traced: call under ``torch.no_grad()``, or
detach.

An exported program that uses them needs this module imported before ``torch.export.load``, and
Python to run in: their kernels are Python functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import qknorm_tvm

from .call.arrays import canonical_dtype
from .dtypes import DTYPE_BYTES

__all__ = [
    "apply_qk_rms_norm",
    "apply_qk_rms_norm_",
    "qk_rms_norm",
    "qk_rms_norm_",
    "row_mean_of_squares_qk",
]

Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor]

_library = torch.library.Library("qknorm_tvm", "DEF")
#: Compilers may lay intermediate tensors out anew, column by column too, but not for these.
_STRIDES = "needs_exact_strides" if hasattr(torch.Tag, "needs_exact_strides") else None
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, _STRIDES or "needs_fixed_stride_order"),
)


# ---- checks -----------------------------------------------------------------------------------


def _refuse_grad(op: str, **tensors: Tensor) -> None:
    """Raise for a tensor that requires grad under grad mode: torch would drop it in silence."""
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise ValueError(
                f"{name} must not require grad (qknorm_tvm::{op} has no backward), got a tensor "
                "that does: call under torch.no_grad(), or pass a detached tensor"
            )


def _check(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    shape: Sequence[Any],
    like: Tensor,
) -> None:
    """Raise for what is wrong with a fake tensor, in the words of the module's own checks.

    ``None`` in `shape` is any number of columns. Sizes may be symbols: comparing them through
    torch's checks makes a guard, or an assertion at run time where nothing is known of them.
    """
    if tensor.dim() != len(shape):
        plural = "" if len(shape) == 1 else "s"
        raise ValueError(f"{name} must have {len(shape)} dimension{plural}, got {tensor.dim()}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {_dtype_name(dtype)}, got {_dtype_name(tensor.dtype)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like q, got a tensor on {tensor.device}")
    cols, wanted = tensor.shape[-1], shape[-1]
    if len(shape) == 2:
        rows = tensor.shape[0]
        torch._check_value(
            rows == shape[0], lambda: f"{name} must have {shape[0]} rows like q, got {rows}"
        )
    if wanted is not None:
        unit = "elements" if len(shape) == 1 else "columns"
        torch._check_value(cols == wanted, lambda: f"{name} must have {wanted} {unit}, got {cols}")
    torch._check_value(cols >= 1, lambda: f"{name} must have at least 1 column, got 0")
    stride = tensor.stride(-1)
    empty = isinstance(shape[0], int) and shape[0] == 0
    # A stride that is a symbol is left to the check at run time.
    if isinstance(stride, int) and stride != 1 and not empty and cols > 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension (stride 1), got stride {stride}"
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).rpartition(".")[2]


def _check_operands(q: Tensor, k: Tensor) -> None:
    if q.dim() == 2 and _dtype_name(q.dtype) not in DTYPE_BYTES:
        raise TypeError(f"q must be one of {', '.join(DTYPE_BYTES)}, got {_dtype_name(q.dtype)}")
    rows = q.shape[0] if q.dim() else 0
    _check("q", q, q.dtype, (rows, None), q)
    _check("k", k, q.dtype, (rows, None), q)


def _check_scales(q: Tensor, k: Tensor, gamma_q: Tensor, gamma_k: Tensor) -> None:
    _check("gamma_q", gamma_q, torch.float32, (q.shape[1],), q)
    _check("gamma_k", gamma_k, torch.float32, (k.shape[1],), q)


def _check_outputs(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor) -> None:
    if _dtype_name(q_out.dtype) not in DTYPE_BYTES:
        raise TypeError(
            f"q_out must be one of {', '.join(DTYPE_BYTES)}, got {_dtype_name(q_out.dtype)}"
        )
    _check("q_out", q_out, q_out.dtype, q.shape, q)
    _check("k_out", k_out, q_out.dtype, k.shape, q)


def _new_outputs(q: Tensor, k: Tensor, out_dtype: torch.dtype | None) -> Pair:
    if out_dtype is not None:
        canonical_dtype("out_dtype", out_dtype)
    # Packed row by row, as the kernel's: empty_like would keep a slice's row stride.
    return q.new_empty(q.shape, dtype=out_dtype), k.new_empty(k.shape, dtype=out_dtype)


# ---- registration -----------------------------------------------------------------------------


def _register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define one operator with its kernel, and the function that traces it on fake tensors.

    Not `torch.library.custom_op`: with outputs given it took 39 µs a call where this took 10.

    No kernel for the dispatch key of autograd either: that would be a second Python function on
    the way. Kernels see ``requires_grad`` and grad mode as the caller set them, and refuse there.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=_TAGS)
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
    torch.library.register_fake(f"qknorm_tvm::{name}", fake, lib=_library)


def _written(*tensors: Tensor) -> None:
    """Count a write, so that autograd sees it in a tensor saved for someone else's backward."""
    for tensor in tensors:  # torch 2.4 takes one at a time
        torch.autograd.graph.increment_version(tensor)


# ---- row_mean_of_squares_qk -------------------------------------------------------------------


def _row_mean_of_squares_qk(q: Tensor, k: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        _refuse_grad("row_mean_of_squares_qk", q=q, k=k)
    return qknorm_tvm.row_mean_of_squares_qk(q, k)


def _row_mean_of_squares_qk_fake(q: Tensor, k: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        _refuse_grad("row_mean_of_squares_qk", q=q, k=k)
    _check_operands(q, k)
    return q.new_empty((q.shape[0], 2), dtype=torch.float32)


def _row_mean_of_squares_qk_out(q: Tensor, k: Tensor, *, qk_var: Tensor) -> None:
    if torch.is_grad_enabled():
        _refuse_grad("row_mean_of_squares_qk_out", q=q, k=k, qk_var=qk_var)
    qknorm_tvm.row_mean_of_squares_qk(q, k, qk_var_out=qk_var)
    _written(qk_var)


def _row_mean_of_squares_qk_out_fake(q: Tensor, k: Tensor, *, qk_var: Tensor) -> None:
    if torch.is_grad_enabled():
        _refuse_grad("row_mean_of_squares_qk_out", q=q, k=k, qk_var=qk_var)
    _check_operands(q, k)
    _check("qk_var", qk_var, torch.float32, (q.shape[0], 2), q)


_register(
    "row_mean_of_squares_qk(Tensor q, Tensor k) -> Tensor",
    _row_mean_of_squares_qk,
    _row_mean_of_squares_qk_fake,
)
_register(
    "row_mean_of_squares_qk_out(Tensor q, Tensor k, *, Tensor(a!) qk_var) -> ()",
    _row_mean_of_squares_qk_out,
    _row_mean_of_squares_qk_out_fake,
)


# ---- apply_qk_rms_norm ------------------------------------------------------------------------


def _check_apply(
    op: str, q: Tensor, k: Tensor, qk_var: Tensor, gamma_q: Tensor, gamma_k: Tensor
) -> None:
    if torch.is_grad_enabled():
        _refuse_grad(op, q=q, k=k, qk_var=qk_var, gamma_q=gamma_q, gamma_k=gamma_k)
    _check_operands(q, k)
    _check("qk_var", qk_var, torch.float32, (q.shape[0], 2), q)
    _check_scales(q, k, gamma_q, gamma_k)


def _apply_qk_rms_norm(
    q: Tensor, k: Tensor, qk_var: Tensor, gamma_q: Tensor, gamma_k: Tensor, epsilon: float = 1e-6,
    *, out_dtype: torch.dtype | None = None, cast_before_gamma: bool = False,
) -> Pair:  # fmt: skip
    if torch.is_grad_enabled():
        _refuse_grad("apply_qk_rms_norm", q=q, k=k, qk_var=qk_var, gamma_q=gamma_q, gamma_k=gamma_k)
    return qknorm_tvm.apply_qk_rms_norm(
        q, k, qk_var, gamma_q, gamma_k, epsilon,
        out_dtype=out_dtype, cast_before_gamma=cast_before_gamma,
    )  # fmt: skip


def _apply_qk_rms_norm_fake(
    q: Tensor, k: Tensor, qk_var: Tensor, gamma_q: Tensor, gamma_k: Tensor, epsilon: float = 1e-6,
    *, out_dtype: torch.dtype | None = None, cast_before_gamma: bool = False,
) -> Pair:  # fmt: skip
    _check_apply("apply_qk_rms_norm", q, k, qk_var, gamma_q, gamma_k)
    return _new_outputs(q, k, out_dtype)


def _apply_qk_rms_norm_out(
    q: Tensor, k: Tensor, qk_var: Tensor, gamma_q: Tensor, gamma_k: Tensor, epsilon: float = 1e-6,
    *, q_out: Tensor, k_out: Tensor, cast_before_gamma: bool = False,
) -> None:  # fmt: skip
    if torch.is_grad_enabled():
        _refuse_grad(
            "apply_qk_rms_norm_out", q=q, k=k, qk_var=qk_var, gamma_q=gamma_q, gamma_k=gamma_k,
            q_out=q_out, k_out=k_out,
        )  # fmt: skip
    qknorm_tvm.apply_qk_rms_norm(
        q, k, qk_var, gamma_q, gamma_k, epsilon,
        q_out=q_out, k_out=k_out, cast_before_gamma=cast_before_gamma,
    )  # fmt: skip
    _written(q_out, k_out)


def _apply_qk_rms_norm_out_fake(
    q: Tensor, k: Tensor, qk_var: Tensor, gamma_q: Tensor, gamma_k: Tensor, epsilon: float = 1e-6,
    *, q_out: Tensor, k_out: Tensor, cast_before_gamma: bool = False,
) -> None:  # fmt: skip
    _check_apply("apply_qk_rms_norm_out", q, k, qk_var, gamma_q, gamma_k)
    if torch.is_grad_enabled():
        _refuse_grad("apply_qk_rms_norm_out", q_out=q_out, k_out=k_out)
    _check_outputs(q, k, q_out, k_out)


def _apply_qk_rms_norm_(
    q: Tensor, k: Tensor, qk_var: Tensor, gamma_q: Tensor, gamma_k: Tensor, epsilon: float = 1e-6,
    *, cast_before_gamma: bool = False,
) -> None:  # fmt: skip
    if torch.is_grad_enabled():
        _refuse_grad(
            "apply_qk_rms_norm_", q=q, k=k, qk_var=qk_var, gamma_q=gamma_q, gamma_k=gamma_k
        )
    qknorm_tvm.apply_qk_rms_norm(
        q, k, qk_var, gamma_q, gamma_k, epsilon,
        q_out=q, k_out=k, cast_before_gamma=cast_before_gamma,
    )  # fmt: skip
    _written(q, k)


def _apply_qk_rms_norm__fake(
    q: Tensor, k: Tensor, qk_var: Tensor, gamma_q: Tensor, gamma_k: Tensor, epsilon: float = 1e-6,
    *, cast_before_gamma: bool = False,
) -> None:  # fmt: skip
    _check_apply("apply_qk_rms_norm_", q, k, qk_var, gamma_q, gamma_k)


_register(
    "apply_qk_rms_norm(Tensor q, Tensor k, Tensor qk_var, Tensor gamma_q, Tensor gamma_k, "
    "float epsilon=1e-6, *, ScalarType? out_dtype=None, bool cast_before_gamma=False) "
    "-> (Tensor, Tensor)",
    _apply_qk_rms_norm,
    _apply_qk_rms_norm_fake,
)
_register(
    "apply_qk_rms_norm_out(Tensor q, Tensor k, Tensor qk_var, Tensor gamma_q, Tensor gamma_k, "
    "float epsilon=1e-6, *, Tensor(a!) q_out, Tensor(b!) k_out, bool cast_before_gamma=False) "
    "-> ()",
    _apply_qk_rms_norm_out,
    _apply_qk_rms_norm_out_fake,
)
_register(
    "apply_qk_rms_norm_(Tensor(a!) q, Tensor(b!) k, Tensor qk_var, Tensor gamma_q, "
    "Tensor gamma_k, float epsilon=1e-6, *, bool cast_before_gamma=False) -> ()",
    _apply_qk_rms_norm_,
    _apply_qk_rms_norm__fake,
)


# ---- qk_rms_norm ------------------------------------------------------------------------------


def _check_norm(op: str, q: Tensor, k: Tensor, gamma_q: Tensor, gamma_k: Tensor) -> None:
    if torch.is_grad_enabled():
        _refuse_grad(op, q=q, k=k, gamma_q=gamma_q, gamma_k=gamma_k)
    _check_operands(q, k)
    _check_scales(q, k, gamma_q, gamma_k)


def _qk_rms_norm(
    q: Tensor, k: Tensor, gamma_q: Tensor, gamma_k: Tensor, epsilon: float = 1e-6,
    *, out_dtype: torch.dtype | None = None, cast_before_gamma: bool = False,
) -> Pair:  # fmt: skip
    if torch.is_grad_enabled():
        _refuse_grad("qk_rms_norm", q=q, k=k, gamma_q=gamma_q, gamma_k=gamma_k)
    return qknorm_tvm.qk_rms_norm(
        q, k, gamma_q, gamma_k, epsilon, out_dtype=out_dtype, cast_before_gamma=cast_before_gamma
    )


def _qk_rms_norm_fake(
    q: Tensor, k: Tensor, gamma_q: Tensor, gamma_k: Tensor, epsilon: float = 1e-6,
    *, out_dtype: torch.dtype | None = None, cast_before_gamma: bool = False,
) -> Pair:  # fmt: skip
    _check_norm("qk_rms_norm", q, k, gamma_q, gamma_k)
    return _new_outputs(q, k, out_dtype)


def _qk_rms_norm_out(
    q: Tensor, k: Tensor, gamma_q: Tensor, gamma_k: Tensor, epsilon: float = 1e-6,
    *, q_out: Tensor, k_out: Tensor, cast_before_gamma: bool = False,
) -> None:  # fmt: skip
    if torch.is_grad_enabled():
        _refuse_grad(
            "qk_rms_norm_out", q=q, k=k, gamma_q=gamma_q, gamma_k=gamma_k, q_out=q_out, k_out=k_out
        )
    qknorm_tvm.qk_rms_norm(
        q, k, gamma_q, gamma_k, epsilon,
        q_out=q_out, k_out=k_out, cast_before_gamma=cast_before_gamma,
    )  # fmt: skip
    _written(q_out, k_out)


def _qk_rms_norm_out_fake(
    q: Tensor, k: Tensor, gamma_q: Tensor, gamma_k: Tensor, epsilon: float = 1e-6,
    *, q_out: Tensor, k_out: Tensor, cast_before_gamma: bool = False,
) -> None:  # fmt: skip
    _check_norm("qk_rms_norm_out", q, k, gamma_q, gamma_k)
    if torch.is_grad_enabled():
        _refuse_grad("qk_rms_norm_out", q_out=q_out, k_out=k_out)
    _check_outputs(q, k, q_out, k_out)


def _qk_rms_norm_(
    q: Tensor, k: Tensor, gamma_q: Tensor, gamma_k: Tensor, epsilon: float = 1e-6,
    *, cast_before_gamma: bool = False,
) -> None:  # fmt: skip
    if torch.is_grad_enabled():
        _refuse_grad("qk_rms_norm_", q=q, k=k, gamma_q=gamma_q, gamma_k=gamma_k)
    qknorm_tvm.qk_rms_norm(
        q, k, gamma_q, gamma_k, epsilon, q_out=q, k_out=k, cast_before_gamma=cast_before_gamma
    )
    _written(q, k)


def _qk_rms_norm__fake(
    q: Tensor, k: Tensor, gamma_q: Tensor, gamma_k: Tensor, epsilon: float = 1e-6,
    *, cast_before_gamma: bool = False,
) -> None:  # fmt: skip
    _check_norm("qk_rms_norm_", q, k, gamma_q, gamma_k)


_register(
    "qk_rms_norm(Tensor q, Tensor k, Tensor gamma_q, Tensor gamma_k, float epsilon=1e-6, *, "
    "ScalarType? out_dtype=None, bool cast_before_gamma=False) -> (Tensor, Tensor)",
    _qk_rms_norm,
    _qk_rms_norm_fake,
)
_register(
    "qk_rms_norm_out(Tensor q, Tensor k, Tensor gamma_q, Tensor gamma_k, float epsilon=1e-6, *, "
    "Tensor(a!) q_out, Tensor(b!) k_out, bool cast_before_gamma=False) -> ()",
    _qk_rms_norm_out,
    _qk_rms_norm_out_fake,
)
_register(
    "qk_rms_norm_(Tensor(a!) q, Tensor(b!) k, Tensor gamma_q, Tensor gamma_k, "
    "float epsilon=1e-6, *, bool cast_before_gamma=False) -> ()",
    _qk_rms_norm_,
    _qk_rms_norm__fake,
)


# ---- for callers ------------------------------------------------------------------------------


def _both(q_out: Tensor | None, k_out: Tensor | None, out_dtype: torch.dtype | None) -> bool:
    """Return whether outputs are given; raise where only one is, or they contradict `out_dtype`."""
    if (q_out is None) != (k_out is None):
        given = "k_out" if q_out is None else "q_out"
        raise ValueError(f"q_out and k_out must be given both or neither, got {given} alone")
    if q_out is None:
        return False
    if out_dtype is not None and q_out.dtype != out_dtype:
        raise TypeError(
            f"q_out must be {_dtype_name(out_dtype)} like out_dtype, got {_dtype_name(q_out.dtype)}"
        )
    return True


def row_mean_of_squares_qk(q: Tensor, k: Tensor, *, qk_var_out: Tensor | None = None) -> Tensor:
    """Compute the mean of squares of every row of Q and of K: ``torch.ops`` form.

    Parameters
    ----------
    q, k : torch.Tensor, ``[M, Nq]`` and ``[M, Nk]``, bfloat16, float16 or float32
        On the CPU or one CUDA device. Rows may be strided, columns must be contiguous.
    qk_var_out : torch.Tensor, ``[M, 2]``, float32, optional
        Where to write.

    Returns
    -------
    torch.Tensor, ``[M, 2]``, float32
        Column 0: of q's rows, column 1: of k's.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong, or requires grad under grad mode.

    See Also
    --------
    qknorm_tvm.row_mean_of_squares_qk : the definition, and the same without torch's dispatcher.
    """
    if qk_var_out is None:
        return torch.ops.qknorm_tvm.row_mean_of_squares_qk.default(q, k)
    torch.ops.qknorm_tvm.row_mean_of_squares_qk_out.default(q, k, qk_var=qk_var_out)
    return qk_var_out


def apply_qk_rms_norm(
    q: Tensor,
    k: Tensor,
    qk_var: Tensor,
    gamma_q: Tensor,
    gamma_k: Tensor,
    epsilon: float = 1e-6,
    *,
    q_out: Tensor | None = None,
    k_out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    cast_before_gamma: bool = False,
) -> Pair:
    """Normalise Q and K by given mean squares, in one launch: ``torch.ops`` form.

    Parameters
    ----------
    q, k : torch.Tensor, ``[M, Nq]`` and ``[M, Nk]``, bfloat16, float16 or float32
        On the CPU or one CUDA device. Rows may be strided, columns must be contiguous.
    qk_var : torch.Tensor, ``[M, 2]``, float32
    gamma_q, gamma_k : torch.Tensor, ``[Nq]`` and ``[Nk]``, float32
    epsilon : float
    q_out, k_out : torch.Tensor, optional
        Where to write, both or neither; q and k themselves are allowed.
    out_dtype : torch.dtype, optional
        Element type of new outputs; by default q's.
    cast_before_gamma : bool
        Round to q's type before the multiplication by gamma too, as MiniMax-M2 does.

    Returns
    -------
    (q_out, k_out)

    Raises
    ------
    TypeError, ValueError
        An argument is wrong, or requires grad under grad mode.

    See Also
    --------
    qknorm_tvm.apply_qk_rms_norm : the definition, and the same without torch's dispatcher.
    """
    if _both(q_out, k_out, out_dtype):
        torch.ops.qknorm_tvm.apply_qk_rms_norm_out.default(
            q, k, qk_var, gamma_q, gamma_k, epsilon,
            q_out=q_out, k_out=k_out, cast_before_gamma=cast_before_gamma,
        )  # fmt: skip
        return q_out, k_out  # type: ignore[return-value]  # both are given
    return torch.ops.qknorm_tvm.apply_qk_rms_norm.default(
        q, k, qk_var, gamma_q, gamma_k, epsilon,
        out_dtype=out_dtype, cast_before_gamma=cast_before_gamma,
    )  # fmt: skip


def apply_qk_rms_norm_(
    q: Tensor,
    k: Tensor,
    qk_var: Tensor,
    gamma_q: Tensor,
    gamma_k: Tensor,
    epsilon: float = 1e-6,
    *,
    cast_before_gamma: bool = False,
) -> None:
    """Normalise Q and K by given mean squares, in place; see `apply_qk_rms_norm`."""
    torch.ops.qknorm_tvm.apply_qk_rms_norm_.default(
        q, k, qk_var, gamma_q, gamma_k, epsilon, cast_before_gamma=cast_before_gamma
    )


def qk_rms_norm(
    q: Tensor,
    k: Tensor,
    gamma_q: Tensor,
    gamma_k: Tensor,
    epsilon: float = 1e-6,
    *,
    q_out: Tensor | None = None,
    k_out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    cast_before_gamma: bool = False,
) -> Pair:
    """Normalise Q and K by the mean squares of their own rows, in one launch: ``torch.ops`` form.

    Parameters
    ----------
    q, k, gamma_q, gamma_k, epsilon, q_out, k_out, out_dtype, cast_before_gamma
        As for `apply_qk_rms_norm`.

    Returns
    -------
    (q_out, k_out)

    Raises
    ------
    TypeError, ValueError
        An argument is wrong, or requires grad under grad mode.

    See Also
    --------
    qknorm_tvm.qk_rms_norm : the definition, and the same without torch's dispatcher.
    """
    if _both(q_out, k_out, out_dtype):
        torch.ops.qknorm_tvm.qk_rms_norm_out.default(
            q, k, gamma_q, gamma_k, epsilon,
            q_out=q_out, k_out=k_out, cast_before_gamma=cast_before_gamma,
        )  # fmt: skip
        return q_out, k_out  # type: ignore[return-value]  # both are given
    return torch.ops.qknorm_tvm.qk_rms_norm.default(
        q, k, gamma_q, gamma_k, epsilon, out_dtype=out_dtype, cast_before_gamma=cast_before_gamma
    )


def qk_rms_norm_(
    q: Tensor,
    k: Tensor,
    gamma_q: Tensor,
    gamma_k: Tensor,
    epsilon: float = 1e-6,
    *,
    cast_before_gamma: bool = False,
) -> None:
    """Normalise Q and K by the mean squares of their own rows, in place; see `qk_rms_norm`."""
    torch.ops.qknorm_tvm.qk_rms_norm_.default(
        q, k, gamma_q, gamma_k, epsilon, cast_before_gamma=cast_before_gamma
    )
