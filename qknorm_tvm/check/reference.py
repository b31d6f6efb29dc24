"""The unfused float32 graph in NumPy: what every output must equal, bit for bit.

One reference for the tests, ``qknorm-tvm verify`` and the benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..dtypes import numpy_dtypes

#: NumPy's types for the dtypes of a spec.
NUMPY_DTYPES: dict[str, np.dtype] = numpy_dtypes()


def rms_norm(
    x: npt.NDArray,
    var: npt.NDArray,
    gamma: npt.NDArray,
    epsilon: float,
    out_dtype: str,
    *,
    cast_before_gamma: bool = False,
) -> npt.NDArray:
    """Compute one operand: ``cast((cast(x, f32) * rsqrt(var + epsilon)) * gamma, out_dtype)``.

    Parameters
    ----------
    x : ndarray, ``[M, N]``
        bfloat16, float16 or float32.
    var : ndarray, ``[M]``, float32
        Mean of squares of each row.
    gamma : ndarray, ``[N]``, float32
    epsilon : float
        Rounded to float32 first.
    out_dtype : str
        Element type of the result.
    cast_before_gamma : bool
        Round to x's type before gamma multiplies.

    Returns
    -------
    ndarray, ``[M, N]``
    """
    with np.errstate(all="ignore"):
        # 1 / sqrt, both correctly rounded: what T.rsqrt is on CPUs, and torch's rsqrt there.
        rs = np.float32(1) / np.sqrt(var + np.float32(epsilon))
        x32 = x.astype(np.float32)
        scaled = x32 * rs[:, None]
        if cast_before_gamma:
            scaled = scaled.astype(x.dtype).astype(np.float32)
        weighted = scaled * gamma
        return weighted.astype(NUMPY_DTYPES[out_dtype])


def apply_qk_rms_norm(
    q: npt.NDArray,
    k: npt.NDArray,
    qk_var: npt.NDArray,
    gamma_q: npt.NDArray,
    gamma_k: npt.NDArray,
    epsilon: float = 1e-6,
    out_dtype: str | None = None,
    *,
    cast_before_gamma: bool = False,
) -> tuple[npt.NDArray, npt.NDArray]:
    """Compute both operands of the definition, unfused; see `qknorm_tvm.apply_qk_rms_norm`."""
    out_dtype, cast = out_dtype or q.dtype.name, cast_before_gamma
    return (
        rms_norm(q, qk_var[:, 0], gamma_q, epsilon, out_dtype, cast_before_gamma=cast),
        rms_norm(k, qk_var[:, 1], gamma_k, epsilon, out_dtype, cast_before_gamma=cast),
    )


#: Partial sums of a row on CPUs, and terms of each before they are added to a total: the order of
#: `row_mean_of_squares`.
LANES, STEPS = 64, 16
#: On CUDA: columns of a thread, threads of a warp, and slots of warps' sums.
VECTOR, WARP, SLOTS = 8, 32, 32


def _add_square(x: npt.NDArray, total: npt.NDArray) -> npt.NDArray:
    """Return ``total + x * x``, rounded once to float32: a fused multiply-add.

    float64 holds the square exactly, but not always the sum: it is rounded to odd there, so that
    rounding it again to float32 gives the one right result.
    """
    a, b = x.astype(np.float64) ** 2, total.astype(np.float64)
    near = a + b
    part = near - a
    error = (a - (near - part)) + (b - part)
    even = near.view(np.uint64) % 2 == 0
    inexact = (error != 0) & even & np.isfinite(near)
    toward = np.where(error > 0, np.inf, -np.inf)
    return np.where(inexact, np.nextafter(near, toward), near).astype(np.float32)


def _adder(x: npt.NDArray, fused: bool) -> Callable[[npt.NDArray, npt.NDArray], npt.NDArray]:
    """Return the fastest function that adds squares of values like `x`'s with one rounding.

    Squares of 16-bit elements have at most 22 bits, so that float32 holds them exactly unless they
    are among its smallest numbers.
    """
    if fused:
        if x.dtype.itemsize > 2:
            return _add_square
        size = np.abs(x.astype(np.float32))
        if ((size > 0) & (size < 2.0**-60)).any():
            return _add_square
    return lambda part, total: part * part + total


def _halves(sums: npt.NDArray) -> npt.NDArray:
    """Add the second half of the last axis to the first, until one is left."""
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def sum_of_squares_cuda(x: npt.NDArray) -> npt.NDArray:
    """Compute the float32 sum of squares of each row, in the order of CUDA's modules."""
    rows, cols = x.shape
    vectors_there = -(-cols // VECTOR)
    chunks = -(-vectors_there // WARP)
    turns = -(-chunks // SLOTS)
    # Lanes and slots that no row has anything for hold zeros, which change no sum.
    lanes = _power_of_two(min(vectors_there, WARP))
    slots = _power_of_two(min(chunks, SLOTS))
    padded = np.zeros((rows, turns * slots * lanes * VECTOR), np.float32)
    padded[:, :cols] = x
    add_square = _adder(x, fused=True)
    with np.errstate(all="ignore"):
        columns = padded.reshape(rows, turns, slots, lanes, VECTOR)
        vectors = np.zeros(columns.shape[:-1], np.float32)
        for column in range(VECTOR):
            vectors = add_square(columns[..., column], vectors)
        sums = _halves(vectors)
        total = np.zeros((rows, slots), np.float32)
        for turn in range(turns):
            total += sums[:, turn]
        return _halves(total)


def row_mean_of_squares(x: npt.NDArray, *, fused: bool = True, order: str = "cpu") -> npt.NDArray:
    """Compute one operand's float32 mean of squares, in the modules' order of summation.

    The orders are those of `qknorm_tvm.declare.statistics`.

    Parameters
    ----------
    x : ndarray, ``[M, N]``
        bfloat16, float16 or float32.
    fused : bool
        Whether squares are added by a fused multiply-add, as from x86-64-v3 on, on AArch64 and on
        CUDA.
    order : str
        ``"cpu"`` or ``"cuda"``: whose modules'.

    Returns
    -------
    ndarray, ``[M]``, float32
    """
    if order == "cuda":
        return sum_of_squares_cuda(x) / np.float32(x.shape[1])
    rows, cols = x.shape
    steps = -(-cols // LANES)
    padded = np.zeros((rows, steps * LANES), np.float32)
    padded[:, :cols] = x
    total = np.zeros((rows, LANES), np.float32)
    add_square = _adder(x, fused)
    with np.errstate(all="ignore"):
        for first in range(0, steps, STEPS):
            partial = np.zeros((rows, LANES), np.float32)
            for step in range(first, min(first + STEPS, steps)):
                part = padded[:, step * LANES : (step + 1) * LANES]
                partial = add_square(part, partial)
            total += partial
        return _halves(total[:, ::2] + total[:, 1::2]) / np.float32(cols)


def row_mean_of_squares_qk(
    q: npt.NDArray, k: npt.NDArray, *, fused: bool = True, order: str = "cpu"
) -> npt.NDArray:
    """Compute both operands' statistics; see `qknorm_tvm.row_mean_of_squares_qk`."""
    means = [row_mean_of_squares(x, fused=fused, order=order) for x in (q, k)]
    return np.stack(means, axis=1)


def mean_of_squares(x: npt.NDArray) -> npt.NDArray:
    """Return the float32 mean of squares of each row, summed in float64."""
    x64 = x.astype(np.float64)
    return (x64 * x64).mean(axis=1).astype(np.float32) if len(x) else np.zeros(0, np.float32)


def differing(actual: npt.NDArray, expected: npt.NDArray) -> int:
    """Count elements that differ in their bits; two NaNs are equal, whatever their payload."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise ValueError(
            f"actual must be {expected.dtype}{list(expected.shape)}, got "
            f"{actual.dtype}{list(actual.shape)}"
        )
    bits = np.dtype(f"u{actual.dtype.itemsize}")
    unequal = np.ascontiguousarray(actual).view(bits) != np.ascontiguousarray(expected).view(bits)
    if not unequal.any():
        return 0
    both_nan = np.isnan(actual[unequal].astype(np.float32)) & np.isnan(
        expected[unequal].astype(np.float32)
    )
    return int((~both_nan).sum())
