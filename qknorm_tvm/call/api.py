"""The operations for arrays and tensors of any framework."""

from __future__ import annotations

import contextlib
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
_ROPE, _ROPE_CACHE = entries["qk_rms_norm_rope"], entries["qk_rms_norm_rope_cache"]


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
    key = None
    try:
        key = (q.dtype, q_out.dtype, q.shape[-1], k.shape[-1], q.device, cast_before_gamma)
        entry = _APPLY[key]
    except Exception:
        entry = _find_entry(
            "apply_qk_rms_norm", key, q=q, k=k, q_out=q_out, cast_before_gamma=cast_before_gamma
        )
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
    key = None
    try:
        key = (q.dtype, qk_var_out.dtype, q.shape[-1], k.shape[-1], q.device)
        entry = _MEANS[key]
    except Exception:
        entry = _find_entry("row_mean_of_squares_qk", key, q=q, k=k)
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
    key = None
    try:
        key = (q.dtype, q_out.dtype, q.shape[-1], k.shape[-1], q.device, cast_before_gamma)
        entry = _FUSED[key]
    except Exception:
        entry = _find_entry(
            "qk_rms_norm", key, q=q, k=k, q_out=q_out, cast_before_gamma=cast_before_gamma
        )
    entry(q_out, k_out, gamma_q, gamma_k, q, k, epsilon, stream)
    return q_out, k_out


def qk_rms_norm_rope(
    q: Any,
    k: Any,
    gamma_q: Any,
    gamma_k: Any,
    positions: Any,
    cos_sin_cache: Any,
    *,
    head_dim: int,
    interleaved: bool = False,
    epsilon: float = 1e-6,
    qk_var: Any = None,
    q_out: Any = None,
    k_out: Any = None,
    stream: Any = None,
    cast_before_gamma: bool = False,
    validate: bool = False,
) -> tuple[Any, Any]:
    """Normalise Q and K and rotate their heads, in one launch.

    ::

        y  = cast((cast(x, f32) * rsqrt(mean_square + epsilon)) * gamma, dtype of x)
        a' = cast(a * c - b * s, dtype of x)
        b' = cast(b * c + a * s, dtype of x)

    for the pairs ``a, b`` of y: columns ``i`` and ``i + rotary_dim / 2`` of every head, or with
    `interleaved` ``2 i`` and ``2 i + 1``, with the i-th cosine ``c`` and sine ``s`` at the row's
    position. In float32, each product and each sum rounded. Columns from `rotary_dim` on are those
    of y. Rotary embedding: Su et al., "RoFormer", arXiv 2104.09864; pairs as in GPT-NeoX and GPT-J.

    Parameters
    ----------
    q, k, gamma_q, gamma_k, epsilon, stream, cast_before_gamma
        As for `apply_qk_rms_norm`.
    positions : array, ``[M]``, int64, or None
        Rows of `cos_sin_cache`. On CPUs one that it does not have is an error; on GPUs it is read
        past the end, unless `validate` is True. None, with no `cos_sin_cache`: no rotation.
    cos_sin_cache : array, ``[max_position, rotary_dim]``, q's type or float32, or None
        Cosines in the first half of a row, sines in the second. `rotary_dim` is even, and at most
        `head_dim`.
    head_dim : int
        Columns of a head; it divides q's and k's.
    interleaved : bool
        Rotate neighbouring columns with one another.
    qk_var : array, ``[M, 2]``, float32, optional
        Mean squares of the rows, as for `apply_qk_rms_norm`. By default they are computed in the
        same launch, as by `row_mean_of_squares_qk`.
    q_out, k_out : array of q's type, optional
        Where to write; ``q_out is q`` and ``k_out is k`` are allowed, any other overlap is not.
    validate : bool
        On GPUs, check `positions` first, which waits for the GPU.

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
    if q_out is None or k_out is None:
        q_out, k_out = _outputs(q, k, q_out, k_out, None)
    key = None
    try:
        key = (
            q.dtype, q.shape[-1], k.shape[-1], q.device, head_dim, interleaved, cast_before_gamma,
            qk_var is None, positions is None,
            None if cos_sin_cache is None else (cos_sin_cache.dtype, cos_sin_cache.shape[-1]),
        )  # fmt: skip
        entry = _ROPE[key]
    except Exception:
        entry = _find_entry(
            "qk_rms_norm_rope",
            key,
            q=q,
            k=k,
            cast_before_gamma=cast_before_gamma,
            statistics="local" if qk_var is None else "given",
            **rotation_fields(positions, cos_sin_cache, head_dim, interleaved),
        )
    if validate:
        _check_bounds("positions", positions, cos_sin_cache)
    entry(
        q_out, k_out, gamma_q, gamma_k, qk_var, q, k, positions, cos_sin_cache, epsilon, stream
    )  # fmt: skip
    return q_out, k_out


def qk_rms_norm_rope_cache(
    q: Any,
    k: Any,
    v: Any,
    gamma_q: Any,
    gamma_k: Any,
    positions: Any,
    cos_sin_cache: Any,
    k_cache: Any,
    v_cache: Any,
    slot_mapping: Any,
    *,
    head_dim: int,
    interleaved: bool = False,
    epsilon: float = 1e-6,
    qk_var: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    q_out: Any = None,
    k_out: Any = None,
    stream: Any = None,
    cast_before_gamma: bool = False,
    validate: bool = False,
) -> tuple[Any, Any]:
    """Normalise Q and K, rotate their heads, and store K and V in a paged cache, in one launch.

    What `qk_rms_norm_rope` computes; then, for the first rows, as many as `slot_mapping` has,
    ::

        k_cache[slot // block_size, slot % block_size] = K's heads, rotated
        v_cache[slot // block_size, slot % block_size] = V's heads, as they came

    bit by bit, or in a cache of float8_e4m3fn ``cast(clamp(cast(x, f32) / scale, -448, 448))``,
    rounded to the nearest, ties to even.

    Parameters
    ----------
    q, k, gamma_q, gamma_k, epsilon, stream, cast_before_gamma
        As for `apply_qk_rms_norm`.
    v : array, ``[M, Nk]``, of q's type
        Rows may be strided.
    positions, cos_sin_cache, head_dim, interleaved, qk_var
        As for `qk_rms_norm_rope`.
    k_cache, v_cache : array, ``[blocks, block_size, kv_heads, head_dim]``
        Of q's type or float8_e4m3fn. Written. Any strides that keep slots apart, but heads
        contiguous: views of one buffer, ``[2, blocks, ...]``, ``[blocks, 2, ...]``, or with heads
        before slots.
    slot_mapping : array, ``[S]``, int64, S at most M
        ``block * block_size + offset`` of each row; a negative slot stores nothing, and rows from S
        on are not stored. On CPUs a slot that the cache does not have is an error; on GPUs it is
        written past the end, unless `validate` is True. Of rows with one slot, any one is stored.
    k_scale, v_scale : array, ``[1]`` or ``[kv_heads]``, float32
        What float8 is multiplied by to give the value, for all heads or each. With a float8 cache
        only, which needs them.
    q_out : array of q's type, optional
        Where to write Q; q itself is allowed.
    k_out : array of q's type, optional
        Where to write K as well, k itself is allowed; by default K goes to the cache only.
    validate : bool
        On GPUs, check `positions` and `slot_mapping` first, which waits for the GPU.

    Returns
    -------
    (q_out, k_out)
        `k_out` is None where none is given.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong: the message says which, what was expected and what came. Nothing has
        been launched or written.
    BuildError
        The code had to be compiled and could not be.
    """
    if q_out is None:
        q_cols, dtype = _columns("q", q), _operand_dtype("q", q)
        q_out = adapter_of("q", q).empty(q, (q.shape[0], q_cols), dtype)
    key = None
    try:
        key = (
            q.dtype, q.shape[-1], k.shape[-1], q.device, head_dim, interleaved, cast_before_gamma,
            qk_var is None, positions is None, k_out is None, k_cache.dtype, k_scale is None,
            v_scale is None,
            None if cos_sin_cache is None else (cos_sin_cache.dtype, cos_sin_cache.shape[-1]),
        )  # fmt: skip
        entry = _ROPE_CACHE[key]
    except Exception:
        entry = _find_entry(
            "qk_rms_norm_rope_cache",
            key,
            q=q,
            k=k,
            cast_before_gamma=cast_before_gamma,
            statistics="local" if qk_var is None else "given",
            writes_k_out=k_out is not None,
            cache_dtype=cache_dtype_of(q, k_cache, k_scale, v_scale),
            **rotation_fields(positions, cos_sin_cache, head_dim, interleaved),
        )
    if k_scale is not None:
        k_scale, v_scale = as_list(k_scale), as_list(v_scale)
    if validate:
        _check_bounds("positions", positions, cos_sin_cache)
        _check_bounds("slot_mapping", slot_mapping, k_cache)
    entry(
        q_out, k_out, k_cache, v_cache, gamma_q, gamma_k, qk_var, q, k, v, positions,
        cos_sin_cache, slot_mapping, k_scale, v_scale, epsilon, stream,
    )  # fmt: skip
    return q_out, k_out


# ---- what a call asks for ----------------------------------------------------------------------


def rotation_fields(
    positions: Any, cos_sin_cache: Any, head_dim: int, interleaved: bool
) -> dict[str, Any]:
    """Return the fields of a spec for a rotation, or for none."""
    if (positions is None) != (cos_sin_cache is None):
        given = "cos_sin_cache" if positions is None else "positions"
        raise ValueError(
            f"positions and cos_sin_cache must be given both or neither, got {given} alone"
        )
    fields: dict[str, Any] = {"head_dim": head_dim}
    if not isinstance(interleaved, bool):
        raise TypeError(f"interleaved must be a bool, got {type(interleaved).__name__}")
    if cos_sin_cache is None:
        return fields  # without a rotation it makes no difference which pairs it would have had
    rotary_dim = _columns("cos_sin_cache", cos_sin_cache)
    limit = head_dim if isinstance(head_dim, int) else rotary_dim
    if rotary_dim % 2 or rotary_dim > limit:
        raise ValueError(
            "cos_sin_cache must have an even number of columns, at most head_dim "
            f"({head_dim}), got {rotary_dim}"
        )
    dtype = _dtype("cos_sin_cache", cos_sin_cache)
    return fields | {"rotary_dim": rotary_dim, "rotary_dtype": dtype, "interleaved": interleaved}


def cache_dtype_of(q: Any, k_cache: Any, k_scale: Any, v_scale: Any) -> str:
    """Return the element type of a call's caches."""
    in_dtype, dtype = _operand_dtype("q", q), _dtype("k_cache", k_cache)
    if dtype not in (in_dtype, "float8_e4m3fn"):
        raise TypeError(f"k_cache must be {in_dtype} like q, or float8_e4m3fn, got {dtype}")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is not None) != (dtype == "float8_e4m3fn"):
            wanted, came = ("given", "None") if scale is None else ("None", "a scale")
            raise ValueError(f"{name} must be {wanted} for a cache of {dtype}, got {came}")
    return dtype


def as_list(scale: Any) -> Any:
    """Return a scale of no dimension as one of a single element."""
    return scale.reshape(1) if getattr(scale, "shape", None) == () else scale


def _check_bounds(name: str, indices: Any, of: Any) -> None:
    """Refuse positions or slots that are out of range, with the message of a CPU module.

    A wrong type or shape is left to the module, which refuses it at the call.
    """
    if indices is None:
        return
    adapter = adapter_of(name, indices)
    adapter.check_metadata(name, indices)
    adapter.view(name, indices, writable=False)
    dimensions = 2 if name == "positions" else 4
    has_numbers = adapter.dtype(indices) == "int64" and all(indices.shape)
    if not has_numbers or len(of.shape) != dimensions:
        return
    least, largest = adapter.bounds(indices)
    if name == "positions":
        end, below = of.shape[0], least < 0
        wanted = f"less than cos_sin_cache's {end} rows, and 0 or more"
    else:
        end, below = of.shape[0] * of.shape[1], False
        wanted = f"less than k_cache's {end} slots"
    if below or largest >= end:
        raise ValueError(f"{name} must be {wanted}, got {least if below else largest}")


def _dtype(name: str, array: Any) -> str:
    adapter = adapter_of(name, array)
    adapter.check_metadata(name, array)
    return adapter.dtype(array)


def _operand_dtype(name: str, array: Any) -> str:
    dtype = _dtype(name, array)
    if dtype not in DTYPE_BYTES:
        raise TypeError(f"{name} must be one of {', '.join(DTYPE_BYTES)}, got {dtype}")
    return dtype


def _outputs(q: Any, k: Any, q_out: Any, k_out: Any, out_dtype: Any) -> tuple[Any, Any]:
    dtype = None if out_dtype is None else canonical_dtype("out_dtype", out_dtype)
    for name, given in (("q_out", q_out), ("k_out", k_out)):
        if given is None:
            continue
        own = _dtype(name, given)
        if dtype is not None and own != dtype:
            raise TypeError(f"{name} must be {dtype} like out_dtype, got {own}")
    given = q_out if q_out is not None else k_out
    if dtype is None:
        source = q if given is None else given
        name = "q" if given is None else "k_out" if q_out is None else "q_out"
        dtype = _dtype(name, source)
    if dtype not in DTYPE_BYTES:
        raise TypeError(f"{name} must be one of {', '.join(DTYPE_BYTES)}, got {dtype}")
    q_cols, k_cols = _columns("q", q), _columns("k", k)
    if q_out is None:
        q_out = adapter_of("q", q).empty(q, (q.shape[0], q_cols), dtype)
    if k_out is None:
        k_out = adapter_of("q", q).empty(q, (k.shape[0], k_cols), dtype)
    return q_out, k_out


def _columns(name: str, array: Any) -> int:
    adapter_of(name, array).check_metadata(name, array)
    if len(array.shape) != 2:
        raise ValueError(f"{name} must have 2 dimensions, got {len(array.shape)}")
    if array.shape[1] < 1:
        raise ValueError(f"{name} must have at least 1 column, got 0")
    return int(array.shape[1])


def spec_of(
    op: str, target: str, *, q: Any, k: Any, q_out: Any = None, **choices: Any
) -> KernelSpec:
    """Return the spec of calls with such arrays."""
    q_cols, k_cols = _columns("q", q), _columns("k", k)
    in_dtype = _operand_dtype("q", q)
    out_dtype = None if q_out is None else _operand_dtype("q_out", q_out)
    return KernelSpec(
        op=op,
        in_dtype=in_dtype,
        out_dtype=out_dtype,  # type: ignore[arg-type]
        q_cols=q_cols,
        k_cols=k_cols,
        target=target,
        **choices,
    )


def _find_entry(
    op: str, key: tuple | None, *, q: Any, k: Any, q_out: Any = None, **choices: Any
) -> Callable[..., Any]:
    """Return a function of the module's arguments and a stream that serves calls like this one.

    It is kept in `cache.entries` by `key`, the properties of the arguments that the operation's
    function above looks at, so that the next such call does not come here.
    """
    operation = OPERATIONS[op]
    adapter = adapter_of("q", q)
    spec = spec_of(op, adapter.target(q), q=q, k=k, q_out=q_out, **choices)
    function = getattr(module_for(spec), op)
    is_cuda = spec.parsed_target.kind == "cuda"
    entry = adapter.fast_call(function, _general(operation, function, is_cuda), spec)
    # An array without a type, a shape or a device that can be a key is looked at every time.
    if key is not None and len(entries[op]) < 4096:
        with contextlib.suppress(TypeError):
            entries[op][key] = entry
    return entry


def _general(
    operation: Operation, function: Callable[..., Any], is_cuda: bool
) -> Callable[..., Any]:
    """Return the call that takes any mix of frameworks and says what is wrong with an argument."""

    def general(*args: Any) -> None:
        *given, stream = args
        arrays = dict(zip(operation.names, given, strict=True))
        absent = {
            tensor.name
            for tensor in operation.arguments
            if tensor.given_if and arrays[tensor.name] is None
        }
        adapters = {
            tensor.name: adapter_of(tensor.api_name, arrays[tensor.name])
            for tensor in operation.arguments
            if tensor.name not in absent
        }
        for tensor in operation.checked:
            if tensor.name not in absent:
                adapters[tensor.name].refuse_derivative(tensor.api_name, arrays[tensor.name])
        views = [
            None
            if tensor.name in absent
            else adapters[tensor.name].view(
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
            if name not in absent:
                adapters[name].count_write(arrays[name])

    return general


def _number(name: str, value: Any) -> float:
    """Return a scalar as a float; it may be of NumPy or torch, or an array without dimensions."""
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
        tvm_ffi.from_dlpack(value)
        if hasattr(value, "__dlpack__") and not isinstance(value, tvm_ffi.Tensor)
        else value
        for value in args
    )
    with tvm_ffi.use_raw_stream(tvm_ffi.device(f"cuda:{device}"), handle):
        function(*args)
