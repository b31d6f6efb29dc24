"""The operations as torch custom operators: ``torch.compile``, ``torch.export``, CUDA graphs.

Importing this module registers them in the namespace ``qknorm_tvm`` for CPU and CUDA tensors:

* ``row_mean_of_squares_qk(q, k) -> qk_var``
* ``apply_qk_rms_norm(q, k, qk_var, gamma_q, gamma_k, epsilon) -> (q_out, k_out)``
* ``qk_rms_norm(q, k, gamma_q, gamma_k, epsilon) -> (q_out, k_out)``
* ``qk_rms_norm_rope(q, k, gamma_q, gamma_k, positions, cos_sin_cache, qk_var, epsilon, *, head_dim)
  -> (q_out, k_out)``
* ``qk_rms_norm_rope_cache(q, k, v, gamma_q, gamma_k, positions, cos_sin_cache, slot_mapping,
  qk_var, k_scale, v_scale, epsilon, *, k_cache, v_cache, head_dim) -> q_out``, which writes K and V
  to the caches
* ``..._out``: the same, written to tensors that are given
* ``apply_qk_rms_norm_``, ``qk_rms_norm_`` and ``qk_rms_norm_rope_``: in place of q and k;
  ``qk_rms_norm_rope_cache_``: in place of q

The functions of this module are thin: each calls its operator under ``torch.ops.qknorm_tvm``. Plain
eager code is served faster by the functions of `qknorm_tvm` itself, which skip torch's dispatcher.

There is no derivative. With an argument that requires grad, under grad mode, or one that has a
tangent of forward-mode AD, every operator raises a ``ValueError``, in eager mode, under the
transforms of ``torch.func`` and while a graph is traced: call under ``torch.no_grad()``, or detach.

An exported program that uses them needs this module imported before ``torch.export.load``, and
Python to run in: their kernels are Python functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch

from .call import api
from .call.arrays import canonical_dtype
from .call.torch_autograd import forward_mode, refuse_derivative
from .call.torch_overlap import check_overlap
from .dtypes import DTYPE_BYTES, ELEMENT_TYPES
from .operations import (
    BLOCK_SIZE,
    BLOCKS,
    CACHE_DTYPE,
    HEAD_DIM,
    IN_DTYPE,
    K_COLS,
    KV_HEADS,
    MAX_POSITION,
    OPERATIONS,
    OUT_DTYPE,
    Q_COLS,
    ROTARY_DIM,
    ROTARY_DTYPE,
    ROWS,
    SCALES,
    SLOTS,
    Operation,
    TensorArgument,
)

__all__ = [
    "apply_qk_rms_norm",
    "apply_qk_rms_norm_",
    "qk_rms_norm",
    "qk_rms_norm_",
    "qk_rms_norm_rope",
    "qk_rms_norm_rope_",
    "qk_rms_norm_rope_cache",
    "qk_rms_norm_rope_cache_",
    "row_mean_of_squares_qk",
]

Tensor = torch.Tensor

#: Tensors that may have no dimension, for one of a single element.
_SCALES = {
    argument.name
    for operation in OPERATIONS.values()
    for argument in operation.arguments
    if argument.shape == (SCALES,)
}

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


def _refuse_derivatives(form: str, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        refuse_derivative(name, tensor, f"qknorm_tvm::{form}")


def _require(condition: Any, message: str) -> None:
    torch._check_value(condition, lambda: message)


def _check(
    argument: TensorArgument, tensors: dict[str, Tensor], out_dtype: torch.dtype, head_dim: Any
) -> None:
    """Raise for what is wrong with a fake tensor, in the words of the module's own checks.

    Sizes may be symbols: comparing them through torch's checks makes a guard, or an assertion at
    run time where nothing is known of them.
    """
    name, tensor, q = argument.name, tensors[argument.name], tensors["q"]
    dimensions = len(argument.shape)
    if tensor.dim() != dimensions:
        plural = "" if dimensions == 1 else "s"
        raise ValueError(f"{name} must have {dimensions} dimension{plural}, got {tensor.dim()}")
    if argument.dtype != ROTARY_DTYPE:  # checked with the spec
        cache_dtype = tensors["k_cache"].dtype if argument.is_cache else None
        _check_dtype(argument, tensor, q.dtype, out_dtype, cache_dtype)
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on {q.device} like q, got a tensor on {tensor.device}")
    _check_shape(argument, tensors, head_dim)
    stride, cols = tensor.stride(-1), tensor.shape[-1]
    empty = argument.shape[0] == ROWS and isinstance(q.shape[0], int) and q.shape[0] == 0
    # A stride that is a symbol is left to the check at run time.
    if isinstance(stride, int) and stride != 1 and not empty and cols > 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension (stride 1), got stride {stride}"
        )


def _check_dtype(
    argument: TensorArgument,
    tensor: Tensor,
    in_dtype: torch.dtype,
    out_dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
) -> None:
    name, came = argument.name, _dtype_name(tensor.dtype)
    operands = {IN_DTYPE: in_dtype, OUT_DTYPE: out_dtype}
    dtype = (operands | {CACHE_DTYPE: cache_dtype}).get(argument.dtype)
    dtype = dtype or ELEMENT_TYPES[argument.dtype].torch
    if argument.dtype in operands and _dtype_name(dtype) not in DTYPE_BYTES:
        raise TypeError(f"{name} must be one of {', '.join(DTYPE_BYTES)}, got {came}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {_dtype_name(dtype)}, got {came}")


def _check_shape(argument: TensorArgument, tensors: dict[str, Tensor], head_dim: Any) -> None:
    name, tensor, q, k = argument.name, tensors[argument.name], tensors["q"], tensors["k"]
    is_list = len(argument.shape) == 1
    rows, kv_heads = q.shape[0], k.shape[1] // (head_dim or 1)
    # How much an extent is, and how it is called: of what, and like which tensor's.
    known: dict[Any, tuple[Any, str, str]] = {
        ROWS: (rows, "elements" if is_list else "rows", "like q's rows" if is_list else "like q"),
        Q_COLS: (q.shape[1], "elements" if is_list else "columns", ""),
        K_COLS: (k.shape[1], "elements" if is_list else "columns", ""),
        KV_HEADS: (kv_heads, "heads", ""),
        HEAD_DIM: (head_dim, "columns in a head", ""),
    }
    if "k_cache" in tensors:
        blocks, block_size = tensors["k_cache"].shape[:2]
        known[BLOCKS] = blocks, "blocks", "like k_cache"
        known[BLOCK_SIZE] = block_size, "slots in a block", "like k_cache"
    for size, extent in zip(tensor.shape, argument.shape, strict=True):
        if extent in (MAX_POSITION, ROTARY_DIM):
            continue  # its own, and checked with the spec
        if extent == SLOTS:
            _require(
                size <= rows, f"{name} must have at most {rows} elements like q's rows, got {size}"
            )
            continue
        if extent == SCALES:
            _require(
                size == 1 or size == kv_heads,
                f"{name} must have 1 or {kv_heads} elements like k's heads, got {size}",
            )
            continue
        wanted, unit, like = known.get(extent, (extent, "columns", ""))
        text = f"{wanted} {unit} {like}".rstrip()
        _require(size == wanted, f"{name} must have {text}, got {size}")
        if extent in (Q_COLS, K_COLS):
            _require(size >= 1, f"{name} must have at least 1 column, got 0")


def _check_spec(operation: Operation, tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
    """Raise, as the Python API does, where a rotating operation has no spec for such tensors."""
    q, k, choices = tensors["q"], tensors["k"], {}
    if operation.has_cache:
        scales = tensors.get("k_scale"), tensors.get("v_scale")
        choices["cache_dtype"] = api.cache_dtype_of(q, tensors["k_cache"], *scales)
    positions, cos_sin_cache = tensors.get("positions"), tensors.get("cos_sin_cache")
    choices |= api.rotation_fields(
        positions, cos_sin_cache, options["head_dim"], options.get("interleaved", False)
    )
    api.spec_of(operation.name, "cpu", q=q, k=k, **choices)


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
    name, outputs = operation.name + form, operation.outputs

    def tensors_of(args: Sequence[Any], options: dict[str, Any]) -> dict[str, Tensor]:
        tensors = dict(zip(operation.signature, args, strict=False))
        tensors |= {output: options[output] for output in outputs if output in options}
        if in_place:
            tensors |= {out: tensors[own] for out, own in _in_place(operation).items()}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

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
        tensors |= {name: api.as_list(tensors[name]) for name in _SCALES & tensors.keys()}
        if operation.rotates:
            _check_spec(operation, tensors, options)
        q, k = tensors["q"], tensors["k"]
        out_dtype = options.get("out_dtype") or tensors.get(outputs[0], q).dtype
        if options.get("out_dtype") is not None:
            canonical_dtype("out_dtype", out_dtype)
        if operation.rotates and out_dtype != q.dtype:
            raise TypeError(f"q_out must be {_dtype_name(q.dtype)}, got {_dtype_name(out_dtype)}")
        for argument in operation.checked:
            if argument.name in tensors:
                _check(argument, tensors, out_dtype, options.get("head_dim"))
        check_overlap(operation, tensors)
        shapes = operation.shapes(q.shape[0], q.shape[1], k.shape[1])
        dtypes = operation.dtypes(_dtype_name(q.dtype), _dtype_name(out_dtype))
        # Packed row by row, as the kernel's: empty_like would keep a slice's row stride.
        new = tuple(
            q.new_empty(shapes[out], dtype=ELEMENT_TYPES[dtypes[out]].torch)
            for out in _returned(operation)
            if out not in tensors
        )
        return new if len(new) > 1 else new[0] if new else None

    _library.define(name + schema, tags=_TAGS)
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
    _library.impl(name, autograd, "Autograd", with_keyset=True)
    torch.library.register_fake(f"qknorm_tvm::{name}", fake, lib=_library)
    operator = getattr(torch.ops.qknorm_tvm, name).default


def _returned(operation: Operation) -> tuple[str, ...]:
    """Return the outputs that are allocated where none is given: no caches, no optional ones."""
    return tuple(
        name
        for name in operation.outputs
        if not operation[name].is_cache and operation[name].given_if is None
    )


def _in_place(operation: Operation) -> dict[str, str]:
    """Return, by output, the input that it overwrites in an operation's in-place form."""
    return {name: operation[name].in_place_of or "" for name in _returned(operation)}


def _default(parameter: inspect.Parameter) -> str:
    is_required = parameter.default is inspect.Parameter.empty
    return "" if is_required else f"={parameter.default}"


def _register_forms(operation: Operation) -> None:
    """Register an operation with new outputs, with given ones (``_out``), and in place (``_``)."""
    function = getattr(api, operation.name)
    inputs, returned = operation.signature, _returned(operation)
    alias = dict(zip(operation.outputs, "abcdefgh", strict=False))
    caches = [f"Tensor({alias[name]}!) {name}" for name in operation.outputs
              if operation[name].is_cache]  # fmt: skip
    parameters = inspect.signature(function).parameters
    # The Python function's choices that are fields of a spec: those have the types of a schema.
    flags = [
        f"{parameter.annotation} {name}{_default(parameter)}"
        for name, parameter in parameters.items()
        if name in operation.spec_fields and name != "out_dtype"
    ]
    scalars = [f"float {scalar.name}={scalar.default}" for scalar in operation.scalars]
    # The function's own names, in case their order is another.
    positional = list(parameters)[: len(inputs)] == list(inputs)
    keywords = {name: operation[name].api_name for name in operation.outputs}
    order = (*inputs, *(scalar.name for scalar in operation.scalars))

    def call(args: Sequence[Any], options: dict[str, Any]) -> Any:
        options = {keywords.get(name, name): value for name, value in options.items()}
        if positional:
            return function(*args, **options)
        return function(**dict(zip(order, args, strict=False)), **options)

    def schema(mutable: dict[str, str], keyword_only: Sequence[str], results: str) -> str:
        kinds = {name: "Tensor?" if operation[name].given_if else "Tensor" for name in inputs}
        tensors = [f"{kinds[name]} {name}" for name in inputs]
        tensors = [
            f"Tensor({mutable[name]}!) {name}" if name in mutable else text
            for name, text in zip(inputs, tensors, strict=True)
        ]
        options = ["*", *keyword_only] if keyword_only else []
        return f"({', '.join([*tensors, *scalars, *options])}) -> {results}"

    def run(*args: Any, **options: Any) -> Any:
        results = call(args, options)
        return results[0] if len(returned) == 1 and isinstance(results, tuple) else results

    dtype = ["ScalarType? out_dtype=None"] if "out_dtype" in operation.spec_fields else []
    results = ", ".join("Tensor" for _ in returned)
    results = f"({results})" if len(returned) > 1 else results
    _register(operation, "", schema({}, [*caches, *dtype, *flags], results), run)

    given = [
        f"Tensor({alias[name]}!)? {name}=None"
        if operation[name].given_if
        else f"Tensor({alias[name]}!) {name}"
        for name in operation.outputs
    ]

    def write(*args: Any, **options: Any) -> None:
        call(args, options)

    _register(operation, "_out", schema({}, [*given, *flags], "()"), write)
    if not all(operation[name].in_place_of for name in returned):
        return
    places = {name: inputs.index(own) for name, own in _in_place(operation).items()}
    mutable = {own: alias[name] for name, own in _in_place(operation).items()}

    def write_in_place(*args: Any, **options: Any) -> None:
        call(args, {name: args[place] for name, place in places.items()} | options)

    _register(
        operation, "_", schema(mutable, [*caches, *flags], "()"), write_in_place, in_place=True
    )


for _operation in OPERATIONS.values():
    _register_forms(_operation)


# ---- for callers ------------------------------------------------------------------------------

P = ParamSpec("P")
R = TypeVar("R")

_DOCUMENTATION = """{summary}: ``torch.ops`` form.

    Takes what `qknorm_tvm.{name}` takes, {less}: torch tensors, on the CPU or one CUDA device.
    Returns {returns}.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong, or requires grad under grad mode.

    See Also
    --------
    qknorm_tvm.{name} : the definition, and the same without torch's dispatcher.
    """


def _check_given(
    operation: Operation, outputs: dict[str, Tensor | None], dtype: torch.dtype | None
) -> None:
    """Refuse outputs of which some are missing, or that contradict `out_dtype`."""
    returned = _returned(operation)
    if any(outputs[name] is None for name in returned):
        given = [name for name, tensor in outputs.items() if tensor is not None]
        both = "both or neither" if len(returned) > 1 else f"with {given[0]}"
        wanted = " and ".join(returned)
        raise ValueError(f"{wanted} must be given {both}, got {given[0]} alone")
    first = outputs[returned[0]]  # the module compares the others
    if first is not None and dtype is not None and first.dtype != dtype:
        raise TypeError(
            f"{returned[0]} must be {_dtype_name(dtype)} like out_dtype, got "
            f"{_dtype_name(first.dtype)}"
        )


def _function(function: Callable[P, R], form: str = "") -> Callable[P, R]:
    """Return the function around an operator, with the signature of the Python API's.

    It has no `stream`, which torch knows, and no `validate`; the in-place form has no outputs
    either. Its source is made here from the table of operations, so that torch.compile traces it
    like any other; ``qk_rms_norm`` is::

        def qk_rms_norm(q, k, gamma_q, gamma_k, epsilon=1e-06, *, q_out=None, k_out=None,
                        out_dtype=None, cast_before_gamma=False):
            if q_out is not None or k_out is not None:
                check_given(operation, {'q_out': q_out, 'k_out': k_out}, out_dtype)
                out(q, k, gamma_q, gamma_k, epsilon, q_out=q_out, k_out=k_out,
                    cast_before_gamma=cast_before_gamma)
                return q_out, k_out
            return new(q, k, gamma_q, gamma_k, epsilon, out_dtype=out_dtype,
                       cast_before_gamma=cast_before_gamma)
    """
    operation = OPERATIONS[function.__name__]
    written = {
        name: operation[name].api_name for name in operation.outputs if not operation[name].is_cache
    }
    dropped = {"stream", "validate"} | ({*written.values(), "out_dtype"} if form else set())
    parameters = {
        name: parameter.replace(annotation=inspect.Parameter.empty)
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in dropped
    }
    positional = (*operation.signature, *(scalar.name for scalar in operation.scalars))
    apart = {*positional, *written.values(), "out_dtype"}
    options = [f"{name}={name}" for name in parameters if name not in apart]
    dtype = "out_dtype" if "out_dtype" in parameters else "None"
    given = ", ".join(f"{name!r}: {own}" for name, own in written.items())
    to_given = [f"{name}={own}" for name, own in written.items()]
    to_new = [f"out_dtype={dtype}"] if dtype != "None" else []
    # An output that may be left is None where the others are new.
    left = ", None" * (len(written) - len(_returned(operation)))
    if form:
        body = f"in_place({', '.join([*positional, *options])})"
    else:
        body = f"""if {" or ".join(f"{own} is not None" for own in written.values())}:
            check_given(operation, {{{given}}}, {dtype})
            out({", ".join([*positional, *to_given, *options])})
            return {", ".join(written.values())}
        return new({", ".join([*positional, *to_new, *options])}){left}"""
    name = operation.name + form
    # Closed over, not global: torch.compile knows a global by its name and the module's.
    source = f"""
def make(operation, check_given, new, out, in_place):
    def {name}{inspect.Signature(list(parameters.values()))}:
        {body}
    return {name}
"""
    names: dict[str, Any] = {"__name__": __name__}
    exec(source, names)
    operators = [getattr(torch.ops.qknorm_tvm, operation.name + end) for end in ("", "_out", form)]
    made = names["make"](operation, _check_given, *(operator.default for operator in operators))
    made.__qualname__ = name
    summary = (inspect.getdoc(function) or "").partition(".\n")[0]
    made.__doc__ = _DOCUMENTATION.format(
        summary=f"{summary}, in place" if form else summary,
        name=operation.name,
        less="but no outputs and no stream" if form else "but no stream",
        returns="nothing" if form else "the same",
    )
    return made


row_mean_of_squares_qk = _function(api.row_mean_of_squares_qk)
apply_qk_rms_norm = _function(api.apply_qk_rms_norm)
qk_rms_norm = _function(api.qk_rms_norm)
qk_rms_norm_rope = _function(api.qk_rms_norm_rope)
qk_rms_norm_rope_cache = _function(api.qk_rms_norm_rope_cache)
apply_qk_rms_norm_ = _function(api.apply_qk_rms_norm, "_")
qk_rms_norm_ = _function(api.qk_rms_norm, "_")
qk_rms_norm_rope_ = _function(api.qk_rms_norm_rope, "_")
qk_rms_norm_rope_cache_ = _function(api.qk_rms_norm_rope_cache, "_")
