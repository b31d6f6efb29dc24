"""The operations for arrays and tensors of any framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..dtypes import DTYPE_BYTES
from ..operations import OPERATIONS, Operation
from ..spec import KernelSpec
from .arrays import adapter_of, canonical_dtype
from .cache import entries, module_for

_APPLY, _MEANS, _FUSED = (
    entries[op] for op in ("apply_qk_rms_norm", "row_mean_of_squares_qk", "qk_rms_norm")
)


def apply_qk_rms_norm(
    q: Any,
    k: Any,
    qk_var: Any,
    gamma_q: Any,
    gamma_k: Any,
    epsilon: float = 1e-6,
    *,
    q_out: Any = None,
    k_out: Any = None,
    out_dtype: Any = None,
    stream: Any = None,
    cast_before_gamma: bool = False,
) -> tuple[Any, Any]:
    """Normalise Q and K by given mean squares, in one launch.

    ::

        q_out = cast((cast(q, f32) * rsqrt(qk_var[:, 0] + epsilon)) * gamma_q, out_dtype)
        k_out = cast((cast(k, f32) * rsqrt(qk_var[:, 1] + epsilon)) * gamma_k, out_dtype)

    bit-equal to that unfused float32 graph on the same device. This is the last step of an RMSNorm
    over the whole Q and K projections whose mean squares were reduced over tensor-parallel ranks
    first, as in MiniMax-M2 and OLMo-2.

    The code for the dtypes and columns is compiled on first use and cached on disk.

    Parameters
    ----------
    q, k : array, ``[M, Nq]`` and ``[M, Nk]``, bfloat16, float16 or float32
        NumPy arrays (with ml_dtypes' bfloat16), torch tensors, or anything with DLPack, on one
        device. Not copied. Rows may be strided (slices of a fused QKV projection); columns must be
        contiguous. Any alignment on CPUs.
    qk_var : array, ``[M, 2]``, float32
        Column 0: mean of squares of q's rows, column 1: of k's.
    gamma_q, gamma_k : array, ``[Nq]`` and ``[Nk]``, float32
        Scales.
    epsilon : float
        Added to the mean squares, as float32.
    q_out, k_out : array, optional
        Where to write; ``q_out is q`` and ``k_out is k`` are allowed, any other overlap is not.
        By default new arrays of q's framework, packed row by row.
    out_dtype : dtype or str, optional
        Element type of outputs allocated here; by default q's.
    stream : int or object with ``cuda_stream`` or ``ptr``, optional
        CUDA stream to launch on; by default torch's current stream, or the default stream.
    cast_before_gamma : bool
        Round ``cast(q, f32) * rsqrt(...)`` to q's type before gamma multiplies it, as models of
        Llama's line do, MiniMax-M2 among them.

    Returns
    -------
    (q_out, k_out)

    Raises
    ------
    TypeError, ValueError
        An argument is wrong: the message says which, what was expected and what came. Nothing has
        been launched or written.
    BuildError
        The code had to be compiled and could not be.
    """
    if q_out is None or k_out is None or out_dtype is not None:
        q_out, k_out = _outputs(q, k, q_out, k_out, out_dtype)
    # Spelt out in each function: at M = 1 the call is all.
    try:
        entry = _APPLY[
            q.dtype, q_out.dtype, q.shape[-1], k.shape[-1], q.device, cast_before_gamma
        ]  # fmt: skip
    except Exception:
        entry = _find_entry("apply_qk_rms_norm", q, k, q_out, cast_before_gamma)
    entry(q_out, k_out, gamma_q, gamma_k, qk_var, q, k, epsilon, stream)
    return q_out, k_out


def row_mean_of_squares_qk(q: Any, k: Any, *, qk_var_out: Any = None, stream: Any = None) -> Any:
    """Compute the mean of squares of every row of Q and of K, in one launch.

    ::

        qk_var[:, 0] = mean(cast(q, f32) ** 2, axis=1)
        qk_var[:, 1] = mean(cast(k, f32) ** 2, axis=1)

    in float32, in an order of summation that is always the same: a row's result does not change
    from run to run, nor with the number of threads, nor with the other rows of the batch.
    `qknorm_tvm.declare.statistics` states the order. What `apply_qk_rms_norm` takes, once it is
    reduced over the ranks that share the columns.

    Parameters
    ----------
    q, k : array, ``[M, Nq]`` and ``[M, Nk]``, bfloat16, float16 or float32
        As for `apply_qk_rms_norm`.
    qk_var_out : array, ``[M, 2]``, float32, optional
        Where to write; by default a new array of q's framework.
    stream : int or object with ``cuda_stream`` or ``ptr``, optional
        CUDA stream to launch on.

    Returns
    -------
    qk_var : array, ``[M, 2]``, float32

    Raises
    ------
    TypeError, ValueError
        An argument is wrong: the message says which, what was expected and what came. Nothing has
        been launched or written.
    BuildError
        The code had to be compiled and could not be.
    """
    if qk_var_out is None:
        _columns("q", q)
        qk_var_out = adapter_of("q", q).empty(q, (q.shape[0], 2), "float32", name="qk_var_out")
    try:
        entry = _MEANS[q.dtype, qk_var_out.dtype, q.shape[-1], k.shape[-1], q.device, False]
    except Exception:
        entry = _find_entry("row_mean_of_squares_qk", q, k, qk_var_out, False)
    entry(qk_var_out, q, k, stream)
    return qk_var_out


def qk_rms_norm(
    q: Any,
    k: Any,
    gamma_q: Any,
    gamma_k: Any,
    epsilon: float = 1e-6,
    *,
    q_out: Any = None,
    k_out: Any = None,
    out_dtype: Any = None,
    stream: Any = None,
    cast_before_gamma: bool = False,
) -> tuple[Any, Any]:
    """Normalise Q and K, each by its own mean squares, in one launch.

    ``row_mean_of_squares_qk`` followed by ``apply_qk_rms_norm``, bit-equal to the two, for one rank
    that holds all columns; q and k are read from memory once.

    Parameters
    ----------
    q, k, gamma_q, gamma_k, epsilon, q_out, k_out, out_dtype, stream, cast_before_gamma
        As for `apply_qk_rms_norm`.

    Returns
    -------
    (q_out, k_out)

    Raises
    ------
    TypeError, ValueError
        An argument is wrong: the message says which, what was expected and what came. Nothing has
        been launched or written.
    BuildError
        The code had to be compiled and could not be.
    """
    if q_out is None or k_out is None or out_dtype is not None:
        q_out, k_out = _outputs(q, k, q_out, k_out, out_dtype)
    try:
        entry = _FUSED[
            q.dtype, q_out.dtype, q.shape[-1], k.shape[-1], q.device, cast_before_gamma
        ]  # fmt: skip
    except Exception:
        entry = _find_entry("qk_rms_norm", q, k, q_out, cast_before_gamma)
    entry(q_out, k_out, gamma_q, gamma_k, q, k, epsilon, stream)
    return q_out, k_out


def _outputs(q: Any, k: Any, q_out: Any, k_out: Any, out_dtype: Any) -> tuple[Any, Any]:
    dtype = None if out_dtype is None else canonical_dtype("out_dtype", out_dtype)
    for name, given in (("q_out", q_out), ("k_out", k_out)):
        if given is None:
            continue
        found = adapter_of(name, given).dtype(given)
        if dtype is not None and found != dtype:
            raise TypeError(f"{name} must be {dtype} like out_dtype, got {found}")
    given = q_out if q_out is not None else k_out
    if dtype is None:
        source = q if given is None else given
        name = "q" if given is None else "k_out" if q_out is None else "q_out"
        dtype = adapter_of(name, source).dtype(source)
    if dtype not in DTYPE_BYTES:
        raise TypeError(f"{name} must be one of {', '.join(DTYPE_BYTES)}, got {dtype}")
    q_cols, k_cols = _columns("q", q), _columns("k", k)
    if q_out is None:
        q_out = adapter_of("q", q).empty(q, (q.shape[0], q_cols), dtype)
    if k_out is None:
        k_out = adapter_of("q", q).empty(q, (k.shape[0], k_cols), dtype)
    return q_out, k_out


def _columns(name: str, array: Any) -> int:
    adapter_of(name, array).check_shape(name, array)
    if len(array.shape) != 2:
        raise ValueError(f"{name} must have 2 dimensions, got {len(array.shape)}")
    if array.shape[1] < 1:
        raise ValueError(f"{name} must have at least 1 column, got 0")
    return int(array.shape[1])


def _find_entry(op: str, q: Any, k: Any, out: Any, cast_before_gamma: bool) -> Callable[..., Any]:
    """Return a function of the module's arguments and a stream, for calls like this one.

    The next one finds it in `entries`, by what the operations above ask of their arguments.
    """
    operation = OPERATIONS[op]
    adapter = adapter_of("q", q)
    q_cols, k_cols = _columns("q", q), _columns("k", k)
    dtypes = {"q": q, "q_out": out} if operation.normalises else {"q": q}
    for name, array in dtypes.items():
        dtypes[name] = adapter_of(name, array).dtype(array)
        if dtypes[name] not in DTYPE_BYTES:
            raise TypeError(f"{name} must be one of {', '.join(DTYPE_BYTES)}, got {dtypes[name]}")
    target = adapter.target(q)
    spec = KernelSpec(
        op=operation.name,
        in_dtype=dtypes["q"],
        out_dtype=dtypes.get("q_out", "float32"),
        q_cols=q_cols,
        k_cols=k_cols,
        target=target,
        cast_before_gamma=cast_before_gamma,
    )
    function = getattr(module_for(spec), operation.name)
    is_cuda = spec.parsed_target.kind == "cuda"
    entry = adapter.fast_call(function, _general(operation, function, is_cuda), spec)
    try:
        key = (q.dtype, out.dtype, q.shape[-1], k.shape[-1], q.device, cast_before_gamma)
        if len(entries[op]) < 4096:
            entries[op][key] = entry
    except (AttributeError, IndexError, RuntimeError, TypeError):
        pass  # an array without such attributes is looked at every time
    return entry


def _general(
    operation: Operation, function: Callable[..., Any], is_cuda: bool
) -> Callable[..., Any]:
    """Return the call that takes any mix of frameworks and says what is wrong with an argument."""

    def general(*args: Any) -> None:
        *given, stream = args
        arrays = dict(zip(operation.names, given, strict=True))
        adapters = {
            tensor.name: adapter_of(tensor.api_name, arrays[tensor.name])
            for tensor in operation.arguments
        }
        for tensor in operation.checked:
            adapters[tensor.name].refuse_derivative(tensor.api_name, arrays[tensor.name])
        views = [
            adapters[tensor.name].view(
                tensor.api_name, arrays[tensor.name], writable=tensor.is_output
            )
            for tensor in operation.arguments
        ]
        scalars = [_number(scalar.name, arrays[scalar.name]) for scalar in operation.scalars]
        if stream is not None:
            _on_stream(function, is_cuda, arrays["q"], stream, *views, *scalars, 1)
        else:
            function(*views, *scalars, 1)
        for name in operation.outputs:
            adapters[name].count_write(arrays[name])

    return general


def _number(name: str, value: Any) -> float:
    """Return a scalar as a float; numbers of NumPy and torch, and arrays of no dimension, are."""
    kind = getattr(value, "dtype", None)
    if not isinstance(value, (bool, str, bytes)) and str(kind) not in ("bool", "torch.bool"):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            pass
    raise TypeError(f"{name} must be a float, got {value!r}")


def _on_stream(function: Any, is_cuda: bool, q: Any, stream: Any, *args: Any) -> None:
    import tvm_ffi

    if not is_cuda:
        raise ValueError(f"stream must be None for tensors on the CPU, got {stream!r}")
    handle = getattr(stream, "cuda_stream", getattr(stream, "ptr", stream))
    if isinstance(handle, bool) or not isinstance(handle, int):
        raise TypeError(f"stream must be an int or a stream object, got {type(stream).__name__}")
    device = adapter_of("q", q).device_index(q)
    # As tensors of tvm-ffi: with torch's own it would take torch's current stream all the same.
    args = tuple(
        tvm_ffi.from_dlpack(one)
        if hasattr(one, "__dlpack__") and not isinstance(one, tvm_ffi.Tensor)
        else one
        for one in args
    )
    with tvm_ffi.use_raw_stream(tvm_ffi.device(f"cuda:{device}"), handle):
        function(*args)
