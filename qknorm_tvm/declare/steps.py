"""Every float32 step of the operations, as an expression: the one source of what is rounded when.

The declared blocks are made of these, and so is every kernel that primitives do not make from the
declaration. Each function takes and returns expressions of one element.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm.script import tirx as T

if TYPE_CHECKING:
    from ..spec import KernelSpec


def widened(x: Any) -> Any:
    """Return an element as float32, which holds all of its values."""
    return T.Cast("float32", x)


def add_square(total: Any, x32: Any) -> Any:
    """Return a sum with one more square, rounded once: a fused multiply-add."""
    return T.fma(x32, x32, total)


def mean(total: Any, cols: Any) -> Any:
    """Return the mean of a row's `cols` squares; a division, correctly rounded."""
    return over_columns(total, T.Cast("float32", cols))


def over_columns(total: Any, cols: Any) -> Any:
    """Return the mean of squares whose number, `cols`, is a float32 already."""
    return total / cols


def inverse_root(variance: Any, epsilon: Any, *, reproducible: bool) -> Any:
    """Return rs of a row.

    ``T.rsqrt`` is each target's own: 1/sqrt with both steps correctly rounded on LLVM, ``rsqrtf``
    on CUDA, as in the unfused graph of that device. Written out, it is the same on both.
    """
    x = variance + epsilon
    return T.float32(1) / T.sqrt(x) if reproducible else T.rsqrt(x)


def type_before_gamma(spec: KernelSpec) -> str:
    """Return the type to which x times rs is rounded before it is multiplied by gamma."""
    return spec.in_dtype if spec.cast_before_gamma else "float32"


def scaled(x32: Any, rs: Any, dtype: str) -> Any:
    """Return x times rs as float32, rounded to `dtype` before (`type_before_gamma`)."""
    product = x32 * rs
    return product if dtype == "float32" else widened(rounded(product, dtype))


def weighted(scaled_x: Any, gamma: Any) -> Any:
    """Return the scaled element times gamma."""
    return scaled_x * gamma


def rounded(x: Any, dtype: str) -> Any:
    """Return a result in the output's type, rounded to nearest even."""
    return T.Cast(dtype, x)


def normalised(spec: KernelSpec, x: Any, rs: Any, gamma: Any) -> Any:
    """Return an element x of q or k normalised, in the outputs' type."""
    scaled_x = scaled(widened(x), rs, type_before_gamma(spec))
    return rounded(weighted(scaled_x, gamma), spec.out_dtype)


def scale_index(head: Any, scales: Any) -> Any:
    """Return the index of a head's scale: there is one for each, or a single one."""
    return T.min(head, scales.shape[0] - 1)


def rotated(own: Any, partner: Any, cosine: Any, sine: Any) -> Any:
    """Return ``own * cosine - partner * sine`` in float32: the first element of a rotated pair.

    The second is the same with minus the sine. Both products are rounded, then the difference. The
    second element is no sum, though that has the same bits, because TVM contracts a sum and a
    product on every target that has ``fma``.
    """
    return own * cosine - partner * sine


def negated(x: Any) -> Any:
    """Return -x, zeros' signs too."""
    return x * T.float32(-1)


def rotated_first(a: Any, b: Any, cosine: Any, sine: Any) -> Any:
    """Return the first of the rotated pair a, b: a cosine - b sine."""
    return rotated(a, b, cosine, sine)


def rotated_second(a: Any, b: Any, cosine: Any, sine: Any) -> Any:
    """Return the second of the rotated pair a, b: b cosine + a sine."""
    return rotated(b, a, cosine, negated(sine))


#: The largest float8_e4m3fn.
FLOAT8_MAX = 448.0


def divided_by_scale(x32: Any, scale: Any) -> Any:
    """Return what a float8 cache stores before it is rounded: x / scale within float8's range.

    The quotient is correctly rounded; one that is not a number stays so.
    """
    quotient = x32 / scale
    low = T.Select(quotient < T.float32(-FLOAT8_MAX), T.float32(-FLOAT8_MAX), quotient)
    return T.Select(low > T.float32(FLOAT8_MAX), T.float32(FLOAT8_MAX), low)
