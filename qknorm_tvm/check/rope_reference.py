"""The operations that rotate, in NumPy: unfused, each float32 product and sum rounded by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..dtypes import ELEMENT_TYPES
from . import reference

if TYPE_CHECKING:
    from ..spec import KernelSpec

#: The largest float8_e4m3fn.
_FLOAT8_MAX = np.float32(448)


def rotate(
    y: npt.NDArray, cos: npt.NDArray, sin: npt.NDArray, *, interleaved: bool = False
) -> npt.NDArray:
    """Rotate the first columns of heads.

    Parameters
    ----------
    y : ndarray, ``[M, heads, head_dim]``
    cos, sin : ndarray, ``[M, rotary_dim / 2]``
    interleaved : bool
        Whether neighbouring columns are rotated with one another.

    Returns
    -------
    ndarray
        Like `y`.
    """
    pairs = cos.shape[1]
    if interleaved:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    out = y.copy()
    with np.errstate(all="ignore"):
        a, b = y[..., first].astype(np.float32), y[..., second].astype(np.float32)
        c, s = (angle.astype(np.float32)[:, None] for angle in (cos, sin))
        out[..., first] = (a * c - b * s).astype(y.dtype)
        out[..., second] = (b * c + a * s).astype(y.dtype)
    return out


def to_float8(x: npt.NDArray, scales: npt.NDArray) -> npt.NDArray:
    """Return ``[M, heads, head_dim]`` as a float8 cache holds it: scaled, to nearest even."""
    scale = np.broadcast_to(scales, (x.shape[1],))[:, None]
    with np.errstate(all="ignore"):
        quotient = x.astype(np.float32) / scale
        quotient = np.clip(quotient, -_FLOAT8_MAX, _FLOAT8_MAX)
    return quotient.astype(ELEMENT_TYPES["float8_e4m3fn"].numpy)


def _statistics(spec: KernelSpec, arrays: Mapping[str, Any], fused: bool) -> npt.NDArray:
    if spec.has_given_statistics:
        return np.asarray(arrays["qk_var"])
    order = spec.parsed_target.kind
    return reference.row_mean_of_squares_qk(arrays["q"], arrays["k"], fused=fused, order=order)


def rope_reference(
    spec: KernelSpec, arrays: Mapping[str, Any], epsilon: float = 1e-6, *, fused: bool = True
) -> dict[str, npt.NDArray]:
    """Compute every output of a call of ``qk_rms_norm_rope`` or ``qk_rms_norm_rope_cache``.

    Parameters
    ----------
    spec : KernelSpec
    arrays : mapping
        The call's tensors by the names of the table of operations: the inputs, and the caches
        before the call. None is changed.
    epsilon : float
    fused : bool
        As for `reference.row_mean_of_squares`, where statistics are the launch's own.

    Returns
    -------
    dict of str to ndarray
        The outputs that calls of the spec give, by name.
    """
    var = _statistics(spec, arrays, fused)
    norms = reference.apply_qk_rms_norm(
        arrays["q"],
        arrays["k"],
        var,
        arrays["gamma_q"],
        arrays["gamma_k"],
        epsilon,
        spec.in_dtype,
        cast_before_gamma=spec.cast_before_gamma,
    )
    return rotated_and_stored(spec, arrays, norms)


def rotated_and_stored(
    spec: KernelSpec, arrays: Mapping[str, Any], norms: Sequence[npt.NDArray]
) -> dict[str, npt.NDArray]:
    """Compute every output of a call from Q's and K's norms, rounded to their element type.

    Parameters
    ----------
    spec, arrays
        As for `rope_reference`.
    norms : sequence of ndarray, ``[M, Nq]`` and ``[M, Nk]``

    Returns
    -------
    dict of str to ndarray
        The outputs that calls of the spec give, by name.
    """
    assert spec.head_dim is not None
    head_dim, outputs = spec.head_dim, {}
    for tag, norm in zip("qk", norms, strict=True):
        x = arrays[tag]
        heads = norm.reshape(len(x), x.shape[1] // head_dim, head_dim)
        if spec.rotary_dim:
            angles = arrays["cos_sin_cache"][arrays["positions"]]
            half = spec.rotary_dim // 2
            heads = rotate(heads, angles[:, :half], angles[:, half:], interleaved=spec.interleaved)
        outputs[f"{tag}_out"] = heads.reshape(x.shape)
    if spec.operation.has_cache:
        for tag, x in (("k", outputs["k_out"]), ("v", arrays["v"])):
            cache = arrays[f"{tag}_cache"].copy()
            heads = x.reshape(len(x), x.shape[1] // head_dim, head_dim)
            if spec.has_scales:
                heads = to_float8(heads, arrays[f"{tag}_scale"])
            slots = arrays["slot_mapping"]
            (stored,) = np.nonzero(slots >= 0)
            cache[np.divmod(slots[stored], cache.shape[1])] = heads[stored]
            outputs[f"{tag}_cache"] = cache
    return {name: outputs[name] for name in spec.outputs}
