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
from fuzz_cases import INDICES, Kind, fill_indices
from support import RawTensor

from qknorm_tvm.check import reference
from qknorm_tvm.operations import SCALES, SLOTS

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
    rng: np.random.Generator, kind: Kind, name: str, given: Mapping[str, Given]
) -> RawTensor:
    kinds = [_CPU, _CUDA, _PINNED, 4, 7, 8, 9, 10, 12, 13, 14, 15, 16]
    # Modules for CPUs take pinned memory.
    right = (_CPU, _PINNED) if given[name].device[0] == _CPU else (_CUDA,)
    kind = int(rng.choice([other for other in kinds if other not in right]))
    return given[name].raw(device=(kind, int(rng.integers(0, 3))))


def _other_shape(
    rng: np.random.Generator, kind: Kind, name: str, given: Mapping[str, Given]
) -> RawTensor:
    array = given[name].array
    shape = list(array.shape)
    # Of positions that there are any number is right.
    axis = int(rng.integers(int(name == "cos_sin_cache"), len(shape)))
    change = int(rng.choice([-1, 1, 1 << 20]))
    extent = kind.op[name].shape[axis]
    if extent == SLOTS:
        shape[axis] = len(given["q"].array)
    elif extent == SCALES:
        shape[axis] = kind.spec.kv_heads
    if extent in (SLOTS, SCALES):
        change = abs(change)
    if not shape[axis]:
        change = 1
    if name in ("q", "k") and axis == 1 and not kind.op.normalises:
        change = -shape[axis]  # any others would be legal
    shape[axis] = max(0, shape[axis] + change)
    return given[name].raw(np.lib.stride_tricks.as_strided(array, shape, array.strides))


def _other_rank(
    rng: np.random.Generator, kind: Kind, name: str, given: Mapping[str, Given]
) -> RawTensor:
    array = given[name].array
    rank = int(rng.choice([n for n in (0, 1, 2, 3, 5) if n != array.ndim]))
    shape = ((1,) * 5 + array.shape)[len(array.shape) + 5 - rank :]
    return given[name].raw(np.empty(shape, array.dtype))


def _other_dtype(
    rng: np.random.Generator, kind: Kind, name: str, given: Mapping[str, Given]
) -> RawTensor:
    array = given[name].array
    kinds = [np.dtype(k) for k in ("f2", "f4", "f8", "i1", "u2", "i4", "c8", "?")]
    kinds.append(reference.NUMPY_DTYPES["bfloat16"])
    kinds = [kind for kind in kinds if kind != array.dtype]
    other = kinds[int(rng.integers(len(kinds)))]
    strides = tuple(s // array.itemsize for s in array.strides)
    return given[name].raw(np.empty(array.shape, other), strides=strides)


def _more_lanes(
    rng: np.random.Generator, kind: Kind, name: str, given: Mapping[str, Given]
) -> RawTensor:
    return given[name].raw(lanes=int(rng.choice([0, 2, 4, 65535])))


def _bad_strides(
    rng: np.random.Generator, kind: Kind, name: str, given: Mapping[str, Given]
) -> RawTensor | None:
    array = given[name].array
    strides = [s // array.itemsize for s in array.strides]
    outer = [axis for axis in range(array.ndim - 1) if array.shape[axis] > 1]
    if not array.size:
        return None
    if outer and rng.random() < 0.5:
        axis = outer[int(rng.integers(len(outer)))]
        strides[axis] = -int(rng.integers(1, 1 << 30))
        if name in kind.op.outputs:
            strides[axis] = int(rng.integers(-array.shape[-1], array.shape[-1]))
    elif array.shape[-1] > 1:
        strides[-1] = int(rng.choice([-1, 0, 2, 1 << 40]))
    else:
        return None
    return given[name].raw(strides=strides)


def _no_data(
    rng: np.random.Generator, kind: Kind, name: str, given: Mapping[str, Given]
) -> RawTensor | None:
    return given[name].raw(address=0) if given[name].array.size else None


def _overlap(
    rng: np.random.Generator, kind: Kind, name: str, given: Mapping[str, Given]
) -> RawTensor | None:
    """Return an output whose first or last byte is another argument's."""
    if name not in kind.op.outputs or not given[name].array.size:
        return None
    own = (name, kind.op[name].in_place_of)
    others = [n for n in kind.tensors if n not in own and given[n].array.size]
    other = given[others[int(rng.integers(len(others)))]]
    begins_in = other.address + int(rng.integers(0, other.array.shape[-1] * other.array.itemsize))
    ends_in = other.address + int(rng.integers(1, 5)) - given[name].extent
    return given[name].raw(address=begins_in if rng.random() < 0.5 else ends_in)


def _no_tensor(rng: np.random.Generator, kind: Kind, name: str, given: Mapping[str, Given]) -> Any:
    return [3, "x", 1.5, b"x", [1.0], (), {}][int(rng.integers(7))]


def _bad_index(
    rng: np.random.Generator, kind: Kind, name: str, given: Mapping[str, Given]
) -> RawTensor | None:
    """Write a position or a slot that is not there; GPUs do not look."""
    tensor = given[name]
    if name not in INDICES or not tensor.array.size or tensor.device[0] != _CPU:
        return None
    fill_indices(rng, name, tensor.array, kind, wrong=True)
    return tensor.raw()


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
    "index": _bad_index,
}


def make_mistake(
    rng: np.random.Generator, kind: Kind, given: Mapping[str, Given], arguments: list[Any]
) -> tuple[str, str, list[Any]]:
    """Make one mistake in a call that is right.

    Parameters
    ----------
    rng : numpy.random.Generator
    kind : Kind
    given : mapping of str to Given
        The call's tensors, of two rows or more.
    arguments : list
        What the entry point takes: the tensors in the operation's order, None where one is not
        given, and epsilon.

    Returns
    -------
    (str, str, list)
        What is wrong, of which tensor if it is of one, and arguments that must be refused.
    """
    op, names = kind.op, kind.op.tensors
    absent = [name for name in names if name not in given]
    mistakes = [*_MISTAKES, "count", "none", *(["epsilon"] if op.has_epsilon else [])]
    mistakes += ["not asked for"] * bool(absent)
    mistake = mistakes[int(rng.integers(len(mistakes)))]
    if mistake == "epsilon":
        return mistake, "", [*arguments[:-1], [math.nan, None, "1", True][int(rng.integers(4))]]
    if mistake == "count":
        count = int(rng.integers(len(arguments)))
        return mistake, "", arguments[:count] if count else [*arguments, 1, 1]
    victims = {"not asked for": absent, "index": [name for name in INDICES if name in given]}
    among = victims.get(mistake) or kind.tensors
    victim = among[int(rng.integers(len(among)))]
    if mistake == "none":
        changed = None
    elif mistake == "not asked for":
        changed = given["gamma_q"].raw()
    else:
        changed = _MISTAKES[mistake](rng, kind, victim, given)
        if changed is None:
            mistake, changed = "device", _other_device(rng, kind, victim, given)
    arguments = list(arguments)
    arguments[names.index(victim)] = changed
    return mistake, victim, arguments
