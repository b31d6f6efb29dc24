"""The unfused float32 graph in NumPy: what every output must equal, bit for bit.

One reference for the tests, ``qknorm-tvm verify`` and the benchmarks.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

#: NumPy's types for the dtypes of a spec.
NUMPY_DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


def rms_norm(
    x: npt.NDArray, var: npt.NDArray, gamma: npt.NDArray, epsilon: float, out_dtype: str
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

    Returns
    -------
    ndarray, ``[M, N]``
    """
    with np.errstate(all="ignore"):
        # 1 / sqrt, both correctly rounded: what T.rsqrt is on CPUs, and torch's rsqrt there.
        rs = np.float32(1) / np.sqrt(var + np.float32(epsilon))
        x32 = x.astype(np.float32)
        scaled = x32 * rs[:, None]
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
) -> tuple[npt.NDArray, npt.NDArray]:
    """Compute both operands of the definition, unfused; see `qknorm_tvm.apply_qk_rms_norm`."""
    out_dtype = out_dtype or q.dtype.name
    return (
        rms_norm(q, qk_var[:, 0], gamma_q, epsilon, out_dtype),
        rms_norm(k, qk_var[:, 1], gamma_k, epsilon, out_dtype),
    )


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
