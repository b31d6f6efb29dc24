"""Where a case's arrays lie: packed, sliced from a fused buffer, off by a byte, in place.

Paged caches lie packed with slots before heads, block by block in one buffer, or with heads before
slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..dtypes import ELEMENT_TYPES
from ..operations import TensorArgument
from ..spec import KernelSpec
from .inputs import Activations

_APART = ("packed", "fused", "strided", "misaligned")
#: "fused": slices of a QKV projection; "strided": of one with rows at every alignment.
LAYOUTS = (*_APART, "in place", "in place, strided")
#: Rows of any number of columns that start at whole vectors: for GPUs, whose code asks for that.
PADDED = "padded"
#: Every byte that no input fills.
CANARY = 0xA5
_LINE = 64


def layouts_for(spec: KernelSpec) -> tuple[str, ...]:
    """Return the layouts that a spec allows: in place needs one element type."""
    in_place = any(tensor.in_place_of for tensor in spec.tensors)
    return LAYOUTS if in_place and spec.in_dtype == spec.out_dtype else _APART


class Placed:
    """Inputs and outputs of a case in one layout, with guards around what may be written.

    Attributes
    ----------
    arrays : dict of str to ndarray
        The tensors that calls of the spec give, by name. Outputs that are neither in place nor in
        the activations hold `CANARY` in every byte.

    Parameters
    ----------
    spec : KernelSpec
        Its columns may be open.
    original : Activations
        They are copied.
    layout : str
        One of `LAYOUTS`, or `PADDED`.
    by_element : bool
        Misaligned means off by one element, which is what GPUs can address, not by one byte.
    """

    def __init__(
        self,
        spec: KernelSpec,
        original: Activations,
        layout: str,
        *,
        by_element: bool = False,
    ):
        known = (*LAYOUTS, PADDED)
        if layout not in known:
            raise ValueError(f"layout must be one of {', '.join(known)}, got {layout!r}")
        # Caches are among them: outputs that keep what they hold where nothing is stored.
        inputs = {
            tensor.name: original.tensors[tensor.name]
            for tensor in spec.tensors
            if tensor.is_cache or not tensor.is_output
        }
        shapes = spec.operation.shapes(original.rows, original.q_cols, original.k_cols)
        shapes |= {name: array.shape for name, array in inputs.items()}
        in_place = {
            tensor.name: tensor.in_place_of
            for tensor in spec.tensors
            if tensor.in_place_of and layout.startswith("in place")
        }
        apart = [tensor for tensor in spec.tensors if tensor.name not in in_place]
        # What has Q's or K's columns is sliced from one memory for inputs, and one for outputs.
        groups = [
            [tensor for tensor in apart if tensor.is_stream and tensor.is_output == is_output]
            for is_output in (False, True)
        ]
        groups.append([tensor for tensor in apart if tensor.is_cache])
        groups += [[tensor] for tensor in apart if not (tensor.is_stream or tensor.is_cache)]

        self.arrays: dict[str, npt.NDArray] = {}
        self._memories: list[_Memory] = []
        for group in filter(None, groups):
            names = [tensor.name for tensor in group]
            place = _place_caches if group[0].is_cache else _place
            memory, arrays = place(
                [shapes[name] for name in names],
                ELEMENT_TYPES[spec.dtype_of(group[0])].numpy,
                _layout_of(group[0], layout),
                by_element,
            )
            self._memories.append(memory)
            self.arrays |= zip(names, arrays, strict=True)
        self.arrays |= {name: self.arrays[source] for name, source in in_place.items()}
        for name, array in inputs.items():
            self.arrays[name][...] = array
        written = {*spec.outputs, *in_place.values()}
        self._read_only = {name: inputs[name] for name in inputs.keys() - written}

    def guards_intact(self) -> bool:
        """Whether inputs that are not written, and all memory beside the arrays, are as before."""
        return all(
            _same_bits(self.arrays[name], original) for name, original in self._read_only.items()
        ) and all(memory.guards_intact() for memory in self._memories)


class _Memory:
    """Bytes that hold `CANARY`, and the arrays in them; all other bytes are guards."""

    def __init__(self, size: int):
        self._bytes = np.full(size, CANARY, np.uint8)
        self._extents: list[tuple[tuple[int, ...], int, tuple[int, ...]]] = []

    def array(
        self, shape: Sequence[int], dtype: np.dtype, start: int, strides: Sequence[int]
    ) -> npt.NDArray:
        """Return an array that starts at a byte, with strides in bytes of all but the last one."""
        *outer, cols = shape
        self._extents.append(((*outer, cols * dtype.itemsize), start, (*strides, 1)))
        return np.ndarray(shape, dtype, self._bytes, start, (*strides, dtype.itemsize))

    def guards_intact(self) -> bool:
        """Whether all bytes outside of the arrays hold `CANARY`."""
        changed = self._bytes != CANARY
        for shape, start, strides in self._extents:
            np.ndarray(shape, bool, changed, start, strides)[...] = False
        return not changed.any()


def _layout_of(tensor: TensorArgument, layout: str) -> str:
    """Return the layout for one tensor: only Q, K, V and caches can be slices of something."""
    if tensor.is_stream or tensor.is_cache:
        return layout
    if tensor.is_output or layout not in ("misaligned", "strided", "in place, strided"):
        return "packed"
    return layout


def _place(
    shapes: Sequence[tuple[int, ...]], dtype: np.dtype, layout: str, by_element: bool
) -> tuple[_Memory, list[npt.NDArray]]:
    """Return memory, and arrays in it: side by side in every row where fused, otherwise apart."""
    flat = [shape if len(shape) == 2 else (1, math.prod(shape)) for shape in shapes]
    widths = [cols * dtype.itemsize for _, cols in flat]
    start = _LINE
    if layout == "misaligned":
        start += dtype.itemsize if by_element else 1
    strided = layout.endswith("strided")
    if strided or layout == "fused":
        # The last once more, as a V like K; where strided some more, so that an odd stride has
        # rows start at every alignment.
        row = sum(widths) + widths[-1]
        if strided:
            row = (row // dtype.itemsize + 3 | 1) * dtype.itemsize
        strides = [row] * len(flat)
        starts = [start + sum(widths[:i]) for i in range(len(flat))]
        end = start + max(flat[0][0], 1) * row
    else:
        strides = [-(-width // _LINE) * _LINE if layout == PADDED else width for width in widths]
        starts = []
        for (rows, _), stride in zip(flat, strides, strict=True):
            starts.append(start)
            start += rows * stride + _LINE
        end = start
    memory = _Memory(end + _LINE)
    return memory, [
        memory.array(extents, dtype, at, [stride]).reshape(shape)
        for extents, at, stride, shape in zip(flat, starts, strides, shapes, strict=True)
    ]


def _place_caches(
    shapes: Sequence[tuple[int, ...]], dtype: np.dtype, layout: str, by_element: bool
) -> tuple[_Memory, list[npt.NDArray]]:
    """Return memory, and K's and V's caches in it, as engines have them."""
    (shape,) = set(shapes)
    blocks, block_size, heads, head_dim = shape
    head = head_dim * dtype.itemsize
    slot, start = heads * head, _LINE
    if layout.endswith("strided"):
        # Heads before slots; an element between blocks, so that they start at every alignment.
        slot, head = head, block_size * head
        block = heads * head + dtype.itemsize
        apart = blocks * block + _LINE
        end = start + 2 * apart
    elif layout == "fused":  # a block of K, then one of V
        apart = block_size * slot
        block = 2 * apart
        end = start + blocks * block
    else:
        if layout == "misaligned":
            start += dtype.itemsize if by_element else 1
        block = block_size * slot
        apart = blocks * block + _LINE
        end = start + 2 * apart
    memory = _Memory(end + _LINE)
    strides = (block, slot, head)
    return memory, [memory.array(shape, dtype, at, strides) for at in (start, start + apart)]


def _same_bits(left: npt.NDArray, right: npt.NDArray) -> bool:
    bits = f"u{left.itemsize}"
    return np.array_equal(left.view(bits), right.view(bits))
