"""Values that have gone wrong elsewhere: patterns of bits, mean squares and scales."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .reference import NUMPY_DTYPES

#: Mean squares with an epsilon of 1e-6 that have gone wrong elsewhere.
VARIANCES = np.array(
    [0.37, 1, 0, -0.0, -1, -1e-6, 1e-30, 1e-40, 1e-45, 3e38, np.inf, -np.inf, np.nan], np.float32
)
#: float32 NaNs that a rounding carry could turn into another number: 0x7fffffff rounds to -0 where
#: a NaN is rounded like a number.
NAN_BITS = np.array(
    [
        *(0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001),
        *(0x7FFF7FFF, 0x7FFF8000, 0xFF800001, 0xFFC00000),
    ],
    np.uint32,
)
#: Cosines and sines that go wrong first.
ANGLES = np.array([0, -0.0, 1, -1, 0.7071, 2.0**-126, 2.0**-133, 3e38, np.inf, np.nan], np.float32)
#: Scales of float8 caches: powers of two and others, ones that make all zero or all 448.
SCALES = np.array([1, 0.5, 2.0**-9, 1 / 3, 0.01, 3, 3e-38, 1e38, 0, np.inf, np.nan], np.float32)
#: Kinds of gamma; neighbours go to Q and to K of one case.
GAMMAS = ("ordinary", "one", "denormal", "huge", "signed zero and inf", "NaN")


def special_gamma(kind: str, cols: int) -> npt.NDArray:
    """Return a gamma of one of the `GAMMAS`.

    Parameters
    ----------
    kind : str
        ``"ordinary"``, ``"one"``, ``"denormal"``, ``"huge"``, ``"signed zero and inf"`` or
        ``"NaN"``, with the `NAN_BITS`.
    cols : int
        Its length.
    """
    rng = np.random.default_rng(cols)
    sign = np.where(np.arange(cols) % 3 == 2, np.float32(-1), np.float32(1))
    if kind == "ordinary":
        return 1 + rng.standard_normal(cols, dtype=np.float32) / 8
    if kind == "one":
        return np.ones(cols, np.float32)
    if kind == "denormal":
        bits = rng.integers(1, 1 << 23, cols, dtype=np.uint32)
        bits[::5] = 1
        return bits.view(np.float32) * sign
    if kind == "huge":
        return rng.uniform(1e37, 3.4e38, cols).astype(np.float32) * sign
    if kind == "signed zero and inf":
        return np.resize(np.array([0, -0.0, np.inf, -np.inf], np.float32), cols)
    if kind == "NaN":
        return np.resize(NAN_BITS, cols).view(np.float32)
    raise ValueError(f"kind must be one of {', '.join(GAMMAS)}, got {kind!r}")


def all_patterns(dtype: str) -> npt.NDArray:
    """Return every bit pattern of a 16-bit type; of float32 every upper half with some lower ones.

    The lower halves are those around which rounding to bfloat16 turns, and two random ones, so
    that the NaNs with all payload bits set are among them.
    """
    upper = np.arange(1 << 16, dtype=np.uint16)
    if dtype != "float32":
        return upper.view(NUMPY_DTYPES[dtype])
    lower = np.random.default_rng(0).integers(0, 1 << 16, (1 << 16, 6), dtype=np.uint32)
    lower[:, :4] = (0, 0x7FFF, 0x8000, 0xFFFF)
    return ((upper.astype(np.uint32)[:, None] << 16) | lower).reshape(-1).view(np.float32)
