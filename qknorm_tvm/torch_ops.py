"""The operations as torch custom operators: ``torch.compile``, ``torch.export``, CUDA graphs.

Importing this module registers them in the namespace ``qknorm_tvm`` for CPU and CUDA tensors:

* ``row_mean_of_squares_qk(q, k) -> qk_var``
* ``apply_qk_rms_norm(q, k, qk_var, gamma_q, gamma_k, epsilon) -> (q_out, k_out)``
* ``qk_rms_norm(q, k, gamma_q, gamma_k, epsilon) -> (q_out, k_out)``
* ``..._out``: the same three, written to tensors that are given
* ``apply_qk_rms_norm_`` and ``qk_rms_norm_``: in place of q and k

The functions of this module are thin: each calls its operator under ``torch.ops.qknorm_tvm``. Plain
eager code is served faster by the functions of `qknorm_tvm` itself, which skip torch's dispatcher.

There is no derivative. With an argument that requires grad, under grad mode, or one that has a
tangent of forward-mode AD, every operator raises a ``ValueError``, in eager mode, under the
transforms of ``torch.func`` and while a graph is traced: call under ``torch.no_grad()``, or detach.

An exported program that uses them needs this module imported before ``torch.export.load``, and
Python to run in: their kernels are Python functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .call import api
from .call.arrays import canonical_dtype
from .call.torch_autograd import forward_mode, refuse_derivative
from .call.torch_overlap import check_overlap
from .dtypes import DTYPE_BYTES, ELEMENT_TYPES
from .operations import (
    IN_DTYPE,
    K_COLS,
    OPERATIONS,
    OUT_DTYPE,
    Q_COLS,
    ROWS,
    Operation,
    TensorArgument,
)

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


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).rpartition(".")[2]


def _named(operation: Operation, args: Sequence[Any], outputs: Sequence[Any]) -> dict[str, Tensor]:
    """Return an operator's tensors by name: inputs in the signature's order, then outputs."""
    tensors = dict(zip(operation.signature, args, strict=False))
    return tensors | dict(zip(operation.outputs, outputs, strict=False))


def _refuse_derivatives(form: str, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        refuse_derivative(name, tensor, f"qknorm_tvm::{form}")


def _require(condition: Any, message: str) -> None:
    torch._check_value(condition, lambda: message)


def _check(argument: TensorArgument, tensors: dict[str, Tensor], out_dtype: torch.dtype) -> None:
    """Raise for what is wrong with a fake tensor, in the words of the module's own checks.

    Sizes may be symbols: comparing them through torch's checks makes a guard, or an assertion at
    run time where nothing is known of them.
    """
    name, tensor, q = argument.name, tensors[argument.name], tensors["q"]
    dimensions = len(argument.shape)
    if tensor.dim() != dimensions:
        plural = "" if dimensions == 1 else "s"
        raise ValueError(f"{name} must have {dimensions} dimension{plural}, got {tensor.dim()}")
    dtypes = {IN_DTYPE: q.dtype, OUT_DTYPE: out_dtype}
    dtype = dtypes.get(argument.dtype) or ELEMENT_TYPES[argument.dtype].torch
    if argument.dtype in dtypes and _dtype_name(dtype) not in DTYPE_BYTES:
        raise TypeError(
            f"{name} must be one of {', '.join(DTYPE_BYTES)}, got {_dtype_name(tensor.dtype)}"
        )
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {_dtype_name(dtype)}, got {_dtype_name(tensor.dtype)}")
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on {q.device} like q, got a tensor on {tensor.device}")
    for size, extent in zip(tensor.shape, argument.shape, strict=True):
        if extent == ROWS:
            rows = q.shape[0]
            _require(size == rows, f"{name} must have {rows} rows like q, got {size}")
            continue
        owner = {Q_COLS: "q", K_COLS: "k"}.get(str(extent))
        wanted = tensors[owner].shape[1] if owner else extent
        unit = "elements" if dimensions == 1 else "columns"
        if owner != name:
            _require(size == wanted, f"{name} must have {wanted} {unit}, got {size}")
        _require(size >= 1, f"{name} must have at least 1 column, got 0")
    stride, cols = tensor.stride(-1), tensor.shape[-1]
    empty = argument.shape[0] == ROWS and isinstance(q.shape[0], int) and q.shape[0] == 0
    # A stride that is a symbol is left to the check at run time.
    if isinstance(stride, int) and stride != 1 and not empty and cols > 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension (stride 1), got stride {stride}"
        )


# ---- registration -----------------------------------------------------------------------------

#: Keys of a call with ordinary tensors: nothing wraps, traces or transforms them.
_ORDINARY = {
    (torch._C.DispatchKeySet(key) | torch._C.DispatchKeySet(autograd)).raw_repr()
    for key, autograd in (
        (torch._C.DispatchKey.CPU, torch._C.DispatchKey.AutogradCPU),
        (torch._C.DispatchKey.CUDA, torch._C.DispatchKey.AutogradCUDA),
    )
}


def _register(
    operation: Operation, form: str, schema: str, run: Callable[..., Any], *, in_place: bool = False
) -> None:
    """Define one operator: `run` on tensors in memory, and what traces it on fake tensors.

    Not `torch.library.custom_op`: with outputs given it took 39 µs a call where this took 10. For
    the same reason autograd's kernel calls `run` itself, unless something else has to see the call
    first: it refuses derivatives, also those of the transforms of ``torch.func``, whose wrappers no
    later kernel would see.
    """
    name, count, outputs = operation.name + form, len(operation.signature), operation.outputs

    def tensors_of(args: Sequence[Any], options: dict[str, Any]) -> dict[str, Tensor]:
        if in_place:
            return _named(
                operation,
                args,
                [
                    args[operation.signature.index(operation[out].in_place_of or "")]
                    for out in outputs
                ],
            )
        return _named(operation, args[:count], [options[out] for out in outputs if out in options])

    def kernel(*args: Any, **options: Any) -> Any:
        try:
            return run(*args, **options)
        except ValueError as error:  # nothing has been written
            refused = error
        _refuse_derivatives(name, tensors_of(args, options))  # the same, naming the operator
        raise refused

    def autograd(keys: Any, *args: Any, **options: Any) -> Any:
        if keys.raw_repr() in _ORDINARY:
            return kernel(*args, **options)
        if torch.is_grad_enabled() or forward_mode():
            _refuse_derivatives(name, tensors_of(args, options))
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *args, **options)

    def fake(*args: Any, **options: Any) -> Any:
        tensors = tensors_of(args, options)
        out_dtype = options.get("out_dtype") or tensors.get(outputs[0], tensors["q"]).dtype
        if options.get("out_dtype") is not None:
            canonical_dtype("out_dtype", out_dtype)
        for argument in operation.checked:
            if argument.name in tensors:
                _check(argument, tensors, out_dtype)
        if outputs[0] in tensors:
            check_overlap(operation, tensors)
            return None
        q, k = tensors["q"], tensors["k"]
        shapes = operation.shapes(q.shape[0], q.shape[1], k.shape[1])
        dtypes = operation.dtypes(_dtype_name(q.dtype), _dtype_name(out_dtype))
        # Packed row by row, as the kernel's: empty_like would keep a slice's row stride.
        new = [q.new_empty(shapes[out], dtype=ELEMENT_TYPES[dtypes[out]].torch) for out in outputs]
        return tuple(new) if len(new) > 1 else new[0]

    _library.define(name + schema, tags=_TAGS)
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
    _library.impl(name, autograd, "Autograd", with_keyset=True)
    torch.library.register_fake(f"qknorm_tvm::{name}", fake, lib=_library)
    operator = getattr(torch.ops.qknorm_tvm, name).default


def _register_forms(operation: Operation) -> None:
    """Register an operation that returns its outputs, is given them, and works in place."""
    function = getattr(api, operation.name)
    inputs, outputs = operation.signature, operation.outputs
    scalars = "".join(f", float {one.name}={one.default}" for one in operation.scalars)
    flags = "".join(
        f", bool {field}=False" for field in operation.spec_fields if field == "cast_before_gamma"
    )
    tensors = ", ".join(f"Tensor {name}" for name in inputs)
    dtype = ", ScalarType? out_dtype=None" if "out_dtype" in operation.spec_fields else ""
    options = f", *{dtype}{flags}" if dtype or flags else ""
    results = ", ".join("Tensor" for _ in outputs)
    results = f"({results})" if len(outputs) > 1 else results
    _register(operation, "", f"({tensors}{scalars}{options}) -> {results}", function)

    alias = dict(zip(outputs, "abcdefgh", strict=False))
    given = ", ".join(f"Tensor({alias[name]}!) {name}" for name in outputs)
    keywords = {name: operation[name].api_name for name in outputs}

    def write(*args: Any, **options: Any) -> None:
        function(*args, **{keywords.get(name, name): value for name, value in options.items()})

    _register(operation, "_out", f"({tensors}{scalars}, *, {given}{flags}) -> ()", write)
    if not operation.in_place:
        return
    places = {name: inputs.index(operation[name].in_place_of or "") for name in outputs}
    written = {place: alias[name] for name, place in places.items()}
    tensors = ", ".join(
        f"Tensor({written[place]}!) {name}" if place in written else f"Tensor {name}"
        for place, name in enumerate(inputs)
    )

    def write_in_place(*args: Any, **options: Any) -> None:
        function(*args, **{name: args[place] for name, place in places.items()}, **options)

    options = f", *{flags}" if flags else ""
    _register(operation, "_", f"({tensors}{scalars}{options}) -> ()", write_in_place, in_place=True)


for _operation in OPERATIONS.values():
    _register_forms(_operation)


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
