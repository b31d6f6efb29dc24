"""Where a case's arrays lie: packed, sliced from a fused buffer, off by a byte, in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..spec import DTYPE_BYTES
from .inputs import Activations
from .reference import NUMPY_DTYPES

#: "fused": slices of a QKV projection; "strided": of one with rows at every alignment.
LAYOUTS = ("packed", "fused", "strided", "misaligned", "in place", "in place, strided")
#: Rows of any number of columns that start at whole vectors: for GPUs, whose code asks for that.
PADDED = "padded"
_CANARY = 0xA5
_LINE = 64


def layouts_for(in_dtype: str, out_dtype: str) -> tuple[str, ...]:
    """Return the layouts that a pairing allows: in place needs one dtype."""
    return LAYOUTS if in_dtype == out_dtype else LAYOUTS[:4]


class Placed:
    """Inputs and outputs of a case in one layout, with guards around what may be written.

    Attributes
    ----------
    activations : Activations
        The inputs, as views of memory of their own.
    q_out, k_out, qk_var_out : ndarray
        The outputs; before the call they hold no result, unless in place.

    Parameters
    ----------
    original : Activations
    out_dtype : str
    layout : str
        One of `LAYOUTS`, or `PADDED`.
    by_element : bool
        Misaligned means off by one element, which is what GPUs can address, not by one byte.
    """

    def __init__(
        self, original: Activations, out_dtype: str, layout: str, *, by_element: bool = False
    ):
        known = (*LAYOUTS, PADDED)
        if layout not in known:
            raise ValueError(f"layout must be one of {', '.join(known)}, got {layout!r}")
        self._original = original
        self._in_place = layout.startswith("in place")
        misaligned, strided = layout == "misaligned", layout.endswith("strided")
        fused = strided or layout == "fused"

        def offset(dtype: str) -> int:
            return (DTYPE_BYTES[dtype] if by_element else 1) if misaligned else 0

        dtype = original.dtype

        def memory(dtype: str) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray]:
            if layout == PADDED:
                return _padded(original, dtype)
            return _projections(original, dtype, fused, strided, offset(dtype))

        self._inputs, q, k = memory(dtype)
        q[...], k[...] = original.q, original.k
        if self._in_place:
            self._outputs, self.q_out, self.k_out = self._inputs, q, k
        else:
            self._outputs, self.q_out, self.k_out = memory(out_dtype)
        self.activations = dataclasses.replace(
            original,
            q=q,
            k=k,
            qk_var=_moved(original.qk_var, offset("float32"), pad=3 if strided else 0),
            gamma_q=_moved(original.gamma_q, offset("float32")),
            gamma_k=_moved(original.gamma_k, offset("float32")),
        )
        # Statistics as an output, between guards.
        self._statistics = np.full(original.rows * 8 + 2 * _LINE, _CANARY, np.uint8)
        self.qk_var_out = self._statistics[_LINE:-_LINE].view(np.float32).reshape(-1, 2)

    def arrays(self, outputs: Sequence[str]) -> dict[str, npt.NDArray]:
        """Return all tensors by name; `qk_var` is one to be written where it is an output."""
        arrays = {**self.activations.tensors, "q_out": self.q_out, "k_out": self.k_out}
        return {**arrays, "qk_var": self.qk_var_out} if "qk_var" in outputs else arrays

    def guards_intact(self) -> bool:
        """Overwrite the outputs, and return whether inputs and all other memory are as before."""
        names = ["qk_var", "gamma_q", "gamma_k"] + ([] if self._in_place else ["q", "k"])
        for name in names:
            if not _same_bits(getattr(self.activations, name), getattr(self._original, name)):
                return False
        for out in (self.q_out, self.k_out, self.qk_var_out):
            out.view(f"u{out.itemsize}")[...] = np.frombuffer(
                bytes([_CANARY]) * out.itemsize, f"u{out.itemsize}"
            )
        memories = (self._outputs, self._statistics)
        return all(bool((memory == _CANARY).all()) for memory in memories)


def _projections(
    a: Activations, dtype: str, fused: bool, strided: bool, offset: int
) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray]:
    """Return memory and, in it, arrays like q and k: apart, or slices of one QKV projection."""
    item = DTYPE_BYTES[dtype]
    # A V like K; where strided some more, so that an odd stride has rows start at every alignment.
    cols = a.q_cols + a.k_cols + fused * a.k_cols + 3 * strided
    cols += strided and cols % 2 == 0
    guard = 64
    memory = np.full(max(a.rows, 1) * cols * item + 3 * guard + offset, _CANARY, np.uint8)
    start = guard + offset

    def array(at: int, columns: int, row_stride: int) -> npt.NDArray:
        return np.ndarray(
            (a.rows, columns), NUMPY_DTYPES[dtype], memory, at, (row_stride * item, item)
        )

    if fused:
        return (
            memory,
            array(start, a.q_cols, cols),
            array(start + a.q_cols * item, a.k_cols, cols),
        )
    after_q = start + a.rows * a.q_cols * item + guard
    return memory, array(start, a.q_cols, a.q_cols), array(after_q, a.k_cols, a.k_cols)


def _padded(a: Activations, dtype: str) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray]:
    """Return memory and, in it, arrays like q and k whose rows start at cache lines."""
    item = DTYPE_BYTES[dtype]
    strides = [-(-cols * item // _LINE) * _LINE for cols in (a.q_cols, a.k_cols)]
    memory = np.full(a.rows * sum(strides) + 3 * _LINE, _CANARY, np.uint8)
    starts = (_LINE, 2 * _LINE + a.rows * strides[0])
    q, k = (
        np.ndarray((a.rows, cols), NUMPY_DTYPES[dtype], memory, start, (stride, item))
        for cols, start, stride in zip((a.q_cols, a.k_cols), starts, strides, strict=True)
    )
    return memory, q, k


def _moved(array: npt.NDArray, offset: int, pad: int = 0) -> npt.NDArray:
    """Copy an array to an address off by some bytes, its rows apart by some more elements."""
    stride = array.shape[-1] + pad
    rows = array.shape[0] if array.ndim == 2 else 1
    item = array.itemsize
    memory = np.zeros(rows * stride * item + offset, np.uint8)
    strides = (stride * item, item) if array.ndim == 2 else (item,)
    copy = np.ndarray(array.shape, array.dtype, memory, offset, strides)
    copy[...] = array
    return copy


def _same_bits(left: npt.NDArray, right: npt.NDArray) -> bool:
    bits = f"u{left.itemsize}"
    return np.array_equal(left.view(bits), right.view(bits))
