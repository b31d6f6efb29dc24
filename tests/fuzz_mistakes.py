"""One wrong argument of a call of a module's own entry point, drawn from a generator.

Each function makes the raw tensor, or what is no tensor, that is passed instead of one argument of
a call that is right; or returns None where this mistake cannot be made of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from support import RawTensor

from qknorm_tvm.check import reference
from qknorm_tvm.operations import Operation

#: What a refusal of an entry point says.
REFUSED = r" must |^[a-z_]+ takes "
_CPU, _CUDA, _PINNED = 1, 2, 3


@dataclasses.dataclass
class Given:
    """One argument: how it looks, in the host's memory, and where it is."""

    array: np.ndarray
    address: int
    extent: int
    device: tuple[int, int] = (_CPU, 0)

    def raw(self, array: np.ndarray | None = None, **changes: Any) -> RawTensor:
        """Return it as a raw tensor, but for some changes; another array lends only its looks."""
        known = {"address": self.address, "device": self.device}
        return RawTensor(self.array if array is None else array, **{**known, **changes})


def _other_device(
    rng: np.random.Generator, op: Operation, name: str, given: Mapping[str, Given]
) -> RawTensor:
    kinds = [_CPU, _CUDA, _PINNED, 4, 7, 8, 9, 10, 12, 13, 14, 15, 16]
    # Modules for CPUs take pinned memory.
    right = (_CPU, _PINNED) if given[name].device[0] == _CPU else (_CUDA,)
    kind = int(rng.choice([one for one in kinds if one not in right]))
    return given[name].raw(device=(kind, int(rng.integers(0, 3))))


def _other_shape(
    rng: np.random.Generator, op: Operation, name: str, given: Mapping[str, Given]
) -> RawTensor:
    array = given[name].array
    shape = list(array.shape)
    axis = int(rng.integers(0, len(shape)))
    change = int(rng.choice([-1, 1, 1 << 20]))
    if name in ("q", "k") and axis == 1 and not op.normalises:
        change = -shape[axis]  # any others would be legal
    shape[axis] = max(0, shape[axis] + change)
    return given[name].raw(np.lib.stride_tricks.as_strided(array, shape, array.strides))


def _other_rank(
    rng: np.random.Generator, op: Operation, name: str, given: Mapping[str, Given]
) -> RawTensor:
    array = given[name].array
    rank = int(rng.choice([n for n in (0, 1, 2, 3, 5) if n != array.ndim]))
    shape = ((1,) * 5 + array.shape)[len(array.shape) + 5 - rank :]
    return given[name].raw(np.empty(shape, array.dtype))


def _other_dtype(
    rng: np.random.Generator, op: Operation, name: str, given: Mapping[str, Given]
) -> RawTensor:
    array = given[name].array
    kinds = [np.dtype(k) for k in ("f2", "f4", "f8", "i1", "u2", "i4", "c8", "?")]
    kinds.append(reference.NUMPY_DTYPES["bfloat16"])
    kinds = [kind for kind in kinds if kind != array.dtype]
    other = kinds[int(rng.integers(len(kinds)))]
    strides = tuple(s // array.itemsize for s in array.strides)
    return given[name].raw(np.empty(array.shape, other), strides=strides)


def _more_lanes(
    rng: np.random.Generator, op: Operation, name: str, given: Mapping[str, Given]
) -> RawTensor:
    return given[name].raw(lanes=int(rng.choice([0, 2, 4, 65535])))


def _bad_strides(
    rng: np.random.Generator, op: Operation, name: str, given: Mapping[str, Given]
) -> RawTensor | None:
    array = given[name].array
    strides = [s // array.itemsize for s in array.strides]
    if array.ndim == 2 and rng.random() < 0.5:
        strides[0] = -int(rng.integers(1, 1 << 30))
        if name in op.outputs:
            strides[0] = int(rng.integers(-array.shape[1], array.shape[1]))
    elif array.shape[-1] > 1:
        strides[-1] = int(rng.choice([-1, 0, 2, 1 << 40]))
    else:
        return None
    return given[name].raw(strides=strides)


def _no_data(
    rng: np.random.Generator, op: Operation, name: str, given: Mapping[str, Given]
) -> RawTensor:
    return given[name].raw(address=0)


def _overlap(
    rng: np.random.Generator, op: Operation, name: str, given: Mapping[str, Given]
) -> RawTensor | None:
    """Return an output whose first or last byte is another argument's."""
    if name not in op.outputs:
        return None
    others = [n for n in op.tensors if n not in (name, name.removesuffix("_out"))]
    other = given[others[int(rng.integers(len(others)))]]
    begins_in = other.address + int(rng.integers(0, other.array.shape[-1] * other.array.itemsize))
    ends_in = other.address + int(rng.integers(1, 5)) - given[name].extent
    return given[name].raw(address=begins_in if rng.random() < 0.5 else ends_in)


def _no_tensor(
    rng: np.random.Generator, op: Operation, name: str, given: Mapping[str, Given]
) -> Any:
    return [3, "x", 1.5, b"x", [1.0], (), {}][int(rng.integers(7))]


_MISTAKES: dict[str, Callable[..., Any]] = {
    "device": _other_device,
    "shape": _other_shape,
    "rank": _other_rank,
    "dtype": _other_dtype,
    "lanes": _more_lanes,
    "strides": _bad_strides,
    "data": _no_data,
    "overlap": _overlap,
    "type": _no_tensor,
}


def spoil(
    rng: np.random.Generator, op: Operation, given: Mapping[str, Given], arguments: list[Any]
) -> tuple[str, str, list[Any]]:
    """Make one mistake in a call that is right.

    Parameters
    ----------
    rng : numpy.random.Generator
    op : Operation
    given : mapping of str to Given
        The call's tensors, of two rows or more.
    arguments : list
        What the entry point takes: the tensors in the operation's order, and epsilon.

    Returns
    -------
    (str, str, list)
        What is wrong, of which tensor if it is of one, and arguments that must be refused.
    """
    victim = op.tensors[int(rng.integers(len(op.tensors)))]
    mistakes = [*_MISTAKES, "count", *(["epsilon"] if op.has_epsilon else [])]
    what = mistakes[int(rng.integers(len(mistakes)))]
    if what == "epsilon":
        return what, "", [*arguments[:-1], [math.nan, None, "1", True][int(rng.integers(4))]]
    if what == "count":
        count = int(rng.integers(len(arguments)))
        return what, "", arguments[:count] if count else [*arguments, 1, 1]
    changed = _MISTAKES[what](rng, op, victim, given)
    if changed is None:
        what, changed = "device", _other_device(rng, op, victim, given)
    arguments = list(arguments)
    arguments[op.tensors.index(victim)] = changed
    return what, victim, arguments
