"""Random calls: bit-exact, or an error and nothing written.

Of every operation, and of two kinds. The public API, on NumPy arrays and torch tensors that lie
anyhow in one buffer, drawn by hypothesis. And the entry point of exported modules, on raw tensors
flush against pages that nobody may touch, in a process of its own for each CPU level, each case
drawn from its number: what reads or writes a byte too far is a crash, reported with that number.

``QKNORM_TVM_FUZZ_CASES=10000`` makes so many cases of the first kind and of the second for each
level, other ones in every run; by default there are some hundreds, always the same.
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import math
import mmap
import os
import secrets
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    DISABLE_FOR_LEVEL,
    DTYPES,
    FIXED_COLUMNS,
    LEVELS,
    NAMES,
    PAIRINGS,
    SPECIAL_GAMMAS,
    SPECIAL_VARIANCES,
    RawTensor,
    compiled,
    from_torch,
    needs_level,
    open_columns,
    random_values,
    raw_call,
    run_python,
    smallest,
    statistics_and_fused,
    to_torch,
)

import qknorm_tvm
from qknorm_tvm import KernelSpec, Module, load, reference
from qknorm_tvm.operations import OPERATIONS, Operation
from qknorm_tvm.targets import host_features

_GIVEN = os.environ.get("QKNORM_TVM_FUZZ_CASES")
_CASES = int(_GIVEN or 600)

#: Few pairs of columns and dtypes: each is a module to compile.
KINDS = (
    ("bfloat16", "bfloat16", 33, 5),
    ("float16", "float32", 7, 16),
    ("float32", "bfloat16", 16, 33),
)
_BYTES = 1 << 14
#: Of `KINDS`, the input that is rounded before gamma in half of the calls.
_CASTS = "bfloat16"

_SPECIAL = {"gamma_q": SPECIAL_GAMMAS, "gamma_k": SPECIAL_GAMMAS, "qk_var": SPECIAL_VARIANCES}
_SPECIAL_INPUTS = np.array(
    [0, -0.0, 1e-45, 6e-8, 1e-20, 65504, 1.8e19, 2e19, -3.3e38, np.inf, -np.inf, np.nan], np.float32
)
_EPSILONS = [1e-6] * 8 + [0.0, -0.0, 1, -1e-6, 1e-45, 1e300, math.inf, -math.inf, math.nan]
_API_ORDER = ("q", "k", "qk_var", "gamma_q", "gamma_k")
#: Whether squares are added by a fused multiply-add in what the API compiles here.
_HOST_FUSES = "fma" in host_features()
_REFUSED = r"^(q|k|gamma_|qk_var|epsilon)\w* must "


class _Elsewhere(RawTensor):
    """A tensor that says it is on another device, for whoever asks by DLPack."""

    def __init__(self, array: np.ndarray, **given: Any):
        super().__init__(array, **given)
        self.dtype, self.shape = array.dtype, array.shape


@dataclasses.dataclass
class Region:
    """Where one argument lies in the buffer, in bytes."""

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item: int

    def bytes(self) -> np.ndarray:
        """Return every byte that it covers; the oracle of overlap."""
        places = np.array([self.start])
        for extent, stride in zip(self.shape, self.strides, strict=True):
            places = (places[:, None] + stride * np.arange(extent)).ravel()
        return (places[:, None] + np.arange(self.item)).ravel()

    def fits(self) -> bool:
        covered = self.bytes()
        return not covered.size or (covered.min() >= 0 and covered.max() < _BYTES)


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...], item: int) -> Region:
    """Draw a layout, legal more often than not."""
    cols = shape[-1]
    step = draw(st.sampled_from([1] * 12 + [2, -1, 0]))
    strides: tuple[int, ...] = (step * item,)
    if len(shape) == 2:
        row = draw(st.sampled_from([cols] * 3 + [64, 64, 64, 40, 0, -cols, cols - 1, cols + 3]))
        strides = (row * item, step * item)
    block = draw(st.integers(0, 9)) * 1536
    start = block + draw(st.sampled_from([0, 0, 0, 1, 2, 4, 32, 66, 128, 1000]))
    region = Region(start, shape, strides, item)
    low = min(0, *(s * (n - 1) for s, n in zip(strides, shape, strict=True)), 0) if shape[0] else 0
    region.start -= min(low, 0)
    return region


def _wanted_shapes(rows: int, q_cols: int, k_cols: int) -> dict[str, tuple[int, ...]]:
    return {
        "q_out": (rows, q_cols),
        "k_out": (rows, k_cols),
        "gamma_q": (q_cols,),
        "gamma_k": (k_cols,),
        "qk_var": (rows, 2),
        "q": (rows, q_cols),
        "k": (rows, k_cols),
    }


def _expected(
    op: Operation,
    tensors: dict[str, np.ndarray],
    epsilon: float,
    *,
    cast_before_gamma: bool = False,
    fused: bool = True,
) -> dict[str, np.ndarray]:
    """Compute what the outputs must be; before the call, which may be in place."""
    q, k = (tensors[name].copy() for name in ("q", "k"))
    if "qk_var" in op.tensors and op.normalises:
        qk_var = tensors["qk_var"].copy()
    else:
        qk_var = reference.row_mean_of_squares_qk(q, k, fused=fused)
    if not op.normalises:
        return {"qk_var": qk_var}
    gamma_q, gamma_k = (tensors[name].copy() for name in ("gamma_q", "gamma_k"))
    out_dtype = tensors["q_out"].dtype.name
    outputs = reference.apply_qk_rms_norm(
        q, k, qk_var, gamma_q, gamma_k, epsilon, out_dtype, cast_before_gamma=cast_before_gamma
    )
    return dict(zip(op.outputs, outputs, strict=True))


def _legal(
    op: Operation, found: dict[str, Region], dtypes: dict[str, str], wanted: dict[str, Any]
) -> bool:
    """Say what the documentation says, byte by byte."""
    rows = found["q"].shape[0]
    for name, region in found.items():
        kind = "float32" if name in ("gamma_q", "gamma_k", "qk_var") else None
        same = {"k": "q", "k_out": "q_out"}.get(name)
        if (kind and dtypes[name] != kind) or (same and dtypes[name] != dtypes[same]):
            return False
        if region.shape != wanted[name]:
            return False
        if rows == 0 and len(region.shape) == 2:
            continue
        if region.shape[-1] > 1 and region.strides[-1] != region.item:
            return False
        if len(region.shape) == 2 and rows > 1:
            if region.strides[0] < 0:
                return False
            if name in op.outputs and region.strides[0] < region.shape[1] * region.item:
                return False
    if rows == 0:
        return True
    covered = {name: set(region.bytes().tolist()) for name, region in found.items()}
    if op.normalises and covered["q_out"] & covered["k_out"]:
        return False
    for out in op.outputs:
        for name in op.tensors:
            if name in op.outputs:
                continue
            own = name == out.removesuffix("_out")
            a, b = found[out], found[name]
            in_place = (
                a.start == b.start
                and a.item == b.item
                and (rows == 1 or a.strides[0] == b.strides[0])
            )
            if covered[out] & covered[name] and not (own and in_place):
                return False
    return True


@settings(max_examples=_CASES, derandomize=_GIVEN is None)
@given(data=st.data())
def test_exact_or_refused(data: st.DataObject) -> None:
    """Any layout in one buffer: a wrong bit, a byte written beside an output, or by a refusal."""
    op = data.draw(st.sampled_from(list(OPERATIONS.values())), "operation")
    in_dtype, out_dtype, q_cols, k_cols = data.draw(st.sampled_from(KINDS), "kind")
    casts = op.normalises and in_dtype == _CASTS
    cast_before_gamma = casts and data.draw(st.booleans(), "cast_before_gamma")
    rows = data.draw(st.sampled_from([0, 1, 2, 3, 4, 5, 9]), "rows")
    every = _wanted_shapes(rows, q_cols, k_cols)
    wanted = {name: every[name] for name in op.tensors}
    dtypes = dict.fromkeys(NAMES, "float32")
    dtypes |= dict.fromkeys(("q", "k"), in_dtype) | dict.fromkeys(("q_out", "k_out"), out_dtype)
    shapes = dict(wanted)
    mistake = data.draw(
        st.sampled_from([None] * 12 + ["dtype", "shape", "rank", "device"]), "mistake"
    )
    # Not q or q_out alone: that would only ask for another module.
    victims = [name for name in op.tensors if name not in ("q", "q_out")]
    victim = data.draw(st.sampled_from(victims), "victim")
    if mistake == "dtype":
        dtypes[victim] = data.draw(st.sampled_from(DTYPES), "dtype")
    elif mistake == "shape":
        shape = list(shapes[victim])
        axis = data.draw(st.integers(0, len(shape) - 1), "axis")
        if not (victim == "k" and axis == 1):
            shape[axis] = max(0, shape[axis] + data.draw(st.sampled_from([-1, 1]), "by"))
        shapes[victim] = tuple(shape)
    elif mistake == "rank":
        shapes[victim] = (1, *shapes[victim])[:2] if victim.startswith("gamma") else (1,)
    place = data.draw(st.sampled_from(["apart", "apart", "anywhere", "fused"]), "places")
    found: dict[str, Region] = {}
    fused = 0
    for index, name in enumerate(op.tensors):
        item = reference.NUMPY_DTYPES[dtypes[name]].itemsize
        region = data.draw(regions(shapes[name], item), name)
        if place == "apart":  # no chance of overlap, so that many calls are legal
            region.start = region.start % 1536 + index * 2200
        elif place == "fused" and len(shapes[name]) == 2:
            region.start, region.strides = fused, (700, item)
            fused += shapes[name][1] * item + data.draw(st.sampled_from([0, 0, 0, 2, -2]), "gap")
        if f"{name}_out" in found and data.draw(st.integers(0, 5), "in place") == 0:
            out = found[f"{name}_out"]
            if out.shape == shapes[name] and out.item == item:
                region = dataclasses.replace(out)
        if not region.fits():
            region = Region(index * 2200, shapes[name], (0,) * len(shapes[name]), item)
            if len(shapes[name]) == 2:
                region.strides = (shapes[name][1] * item, item)
            else:
                region.strides = (item,)
        found[name] = region
    seed = data.draw(st.integers(0, 1 << 16), "seed")
    rng = np.random.default_rng(seed)
    memory = rng.integers(0, 256, _BYTES, dtype=np.uint8)
    arrays: dict[str, np.ndarray] = {}
    for name, region in found.items():
        view = np.ndarray(
            region.shape,
            reference.NUMPY_DTYPES[dtypes[name]],
            memory,
            region.start,
            region.strides,
        )
        if name not in op.outputs:
            view[...] = random_values(rng, region.shape, dtypes[name])
        if name in _SPECIAL and name not in op.outputs and dtypes[name] == "float32":
            special = rng.random(region.shape) < 0.2
            view[special] = rng.choice(_SPECIAL[name], int(special.sum()))
        arrays[name] = view
    epsilon = data.draw(st.sampled_from(_EPSILONS), "epsilon")
    use_torch = data.draw(st.booleans(), "torch") and all(
        stride >= 0 and stride % region.item == 0 and region.start % region.item == 0
        for region in found.values()
        for stride in region.strides
    )
    legal = _legal(op, found, dtypes, wanted) and mistake != "device"
    legal = legal and not (op.has_epsilon and math.isnan(epsilon))
    expected = None
    if legal:
        expected = _expected(
            op, arrays, epsilon, cast_before_gamma=cast_before_gamma, fused=_HOST_FUSES
        )
    before = memory.copy()
    arguments: dict[str, Any] = dict(arrays)
    if use_torch:
        pytest.importorskip("torch", reason="half of the calls pass torch tensors")
        arguments = {name: to_torch(array) for name, array in arrays.items()}
    if mistake == "device":
        device = data.draw(st.sampled_from([(2, 0), (10, 1), (8, 0), (13, 0)]), "device")
        arguments[victim] = _Elsewhere(arrays[victim], device=device)

    def call() -> tuple[Any, ...]:
        inputs = [arguments[name] for name in _API_ORDER if name in op.tensors[len(op.outputs) :]]
        if not op.normalises:
            return (qknorm_tvm.row_mean_of_squares_qk(*inputs, qk_var_out=arguments["qk_var"]),)
        return getattr(qknorm_tvm, op.name)(
            *inputs,
            epsilon,
            q_out=arguments["q_out"],
            k_out=arguments["k_out"],
            cast_before_gamma=cast_before_gamma,
        )

    if expected is None:
        with pytest.raises((TypeError, ValueError), match=_REFUSED):
            call()
        assert (memory == before).all(), "a refused call wrote"
        return
    outputs = [one if not use_torch else from_torch(one) for one in call()]
    for got, want in zip(outputs, expected.values(), strict=True):
        assert reference.differing(got, want) == 0
    written = np.zeros(_BYTES, bool)
    for name in op.outputs:
        written[found[name].bytes()] = True
    assert (memory[~written] == before[~written]).all(), "a byte beside the outputs was written"


# ---- the entry point, between pages that nobody may touch --------------------------------------

_PAGE = mmap.PAGESIZE
_NONE, _READ, _WRITE = 0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
_CANARY = 0xA5
#: Bytes of an arena; the larger one takes calls that store past the caches.
_SMALL, _LARGE = 1 << 21, 20 << 20


class Arena:
    """Memory between two pages that nobody may read or write."""

    def __init__(self, size: int):
        self._map = mmap.mmap(-1, size + 2 * _PAGE)
        self.size = size
        self.memory = np.frombuffer(self._map, np.uint8, size, _PAGE)
        self.start = self.memory.ctypes.data
        self._protect = ctypes.CDLL(None, use_errno=True).mprotect
        self._protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self._set(self.start - _PAGE, _PAGE, _NONE)
        self._set(self.start + size, _PAGE, _NONE)

    def _set(self, address: int, size: int, access: int) -> None:
        if self._protect(address, size, access):
            raise OSError(ctypes.get_errno(), "mprotect failed")

    def allow(self, access: int) -> None:
        self._set(self.start, self.size, access)


@dataclasses.dataclass
class Placed:
    """One argument in its arena."""

    arena: Arena
    array: np.ndarray
    start: int
    extent: int

    def window(self) -> slice:
        """Return the bytes around it that are painted before a call and looked at after it."""
        return slice(max(0, self.start - 4096), self.start + self.extent + 4096)


@dataclasses.dataclass
class Kind:
    """What one case calls."""

    op: Operation
    module: Module
    in_dtype: str
    out_dtype: str
    q_cols: int
    k_cols: int
    cast_before_gamma: bool = False

    def __str__(self) -> str:
        flag = ", cast_before_gamma" if self.cast_before_gamma else ""
        return (
            f"{self.op.name} of {self.in_dtype} to {self.out_dtype}, {self.q_cols} and "
            f"{self.k_cols} columns{flag}"
        )


class Guarded:
    """Cases from numbers, and their calls."""

    def __init__(self, modules: dict[str, Module]):
        self.modules = modules
        self.small = {name: Arena(_SMALL) for name in NAMES}
        self.large: dict[str, Arena] = {}
        rng = np.random.default_rng(0)
        self._pool = {kind: random_values(rng, (1 << 18,), kind) for kind in DTYPES}
        # In a sum of squares one value of any bits hides the others.
        self._plain = {
            kind: rng.standard_normal(1 << 18, np.float32).astype(reference.NUMPY_DTYPES[kind])
            for kind in DTYPES
        }
        self.done = {"exact": 0, "refused": 0, "streamed": 0}

    def _values(
        self, rng: np.random.Generator, shape: tuple[int, ...], pool: np.ndarray
    ) -> np.ndarray:
        size = math.prod(shape)
        first = int(rng.integers(0, len(pool)))
        return np.resize(np.roll(pool, -first)[: max(size, 1)], size).reshape(shape)

    def _place(
        self,
        rng: np.random.Generator,
        arena: Arena,
        shape: tuple[int, ...],
        kind: str,
        row_stride: int,
    ) -> Placed:
        dtype = reference.NUMPY_DTYPES[kind]
        strides = (row_stride, 1)[-len(shape) :]
        steps = (s * (n - 1) for s, n in zip(strides, shape, strict=True))
        extent = (sum(steps) + 1) * dtype.itemsize if math.prod(shape) else 0
        shift = int(rng.choice([0, 0, 0, 0, 0, 1, 2, 4, 16, 100]))
        at_end = rng.random() < 0.6
        start = arena.size - extent - shift if at_end else shift
        placed = Placed(arena, np.empty(0), start, extent)
        arena.memory[placed.window()] = _CANARY
        byte_strides = tuple(s * dtype.itemsize for s in strides)
        if extent:
            placed.array = np.ndarray(shape, dtype, arena.memory, start, byte_strides)
        else:
            placed.array = np.empty(shape, dtype)
        return placed

    def _columns(self, rng: np.random.Generator) -> int:
        """Draw a number of columns: many small ones, and those around a block's and a lane's."""
        which = rng.random()
        if which < 0.25:
            unit = int(rng.choice([64, 64, 1024]))
            return unit * int(rng.integers(1, 2200 // unit + 1)) + int(rng.integers(-1, 2))
        return int(rng.integers(1, int(rng.choice([9, 40, 40, 140, 140, 600, 2201]))))

    def _kind(self, rng: np.random.Generator) -> Kind:
        ops = list(OPERATIONS.values())
        op = ops[int(rng.integers(len(ops)))]
        which = rng.random()
        columns = self._columns(rng), self._columns(rng)
        if op.name == "apply_qk_rms_norm":
            if which < 0.15:
                return Kind(op, self.modules["smallest"], "float32", "float32", 33, 7)
            if which < 0.25:
                return Kind(op, self.modules["large"], "bfloat16", "bfloat16", 1536, 256)
            if which < 0.4:
                columns = (33, 7) if which < 0.3 else columns
                return Kind(op, self.modules["mixed"], "bfloat16", "bfloat16", *columns, True)
            in_dtype, out_dtype = PAIRINGS[int(rng.integers(len(PAIRINGS)))]
            return Kind(op, self.modules["open"], in_dtype, out_dtype, *columns)
        if which < 0.2:
            columns = FIXED_COLUMNS[int(rng.integers(len(FIXED_COLUMNS)))]
        elif which > 0.7 and op.normalises:
            cast = rng.random() < 0.5
            out_dtype = "bfloat16" if cast else "float32"
            return Kind(op, self.modules["mixed"], "bfloat16", out_dtype, *columns, cast)
        dtype = DTYPES[int(rng.integers(len(DTYPES)))]
        return Kind(op, self.modules[dtype], dtype, dtype, *columns)

    def _fill(
        self,
        rng: np.random.Generator,
        op: Operation,
        placed: dict[str, Placed],
        kinds: dict[str, str],
    ) -> None:
        plain = op.name != "apply_qk_rms_norm" and rng.random() < 0.7
        specials = plain and rng.random() < 0.3
        for name in op.tensors:
            if name in op.outputs:
                continue
            array, kind = placed[name].array, kinds[name]
            array[...] = self._values(
                rng, array.shape, (self._plain if plain else self._pool)[kind]
            )
            if name in _SPECIAL:
                wild = rng.random(array.shape) < 0.1
                array[wild] = rng.choice(_SPECIAL[name], int(wild.sum()))
            elif specials and array.size:
                for row in rng.integers(0, len(array), 3):
                    value = rng.choice(_SPECIAL_INPUTS)
                    with np.errstate(over="ignore"):
                        array[row, rng.integers(array.shape[1])] = value.astype(array.dtype)
                if rng.random() < 0.3:
                    array[rng.integers(len(array))] = 0

    def run(self, number: int) -> None:
        """Make one case and check it."""
        rng = np.random.default_rng(number)
        kind = self._kind(rng)
        op, q_cols, k_cols = kind.op, kind.q_cols, kind.k_cols
        refused = rng.random() < 0.35
        rows = int(rng.choice([1, 2, 3, 4, 7, 8, 9, 16, 17, 30]))
        kinds = dict.fromkeys(NAMES, "float32")
        kinds |= dict.fromkeys(("q", "k"), kind.in_dtype)
        kinds |= dict.fromkeys(("q_out", "k_out"), kind.out_dtype)
        arenas = self.small
        if not refused:
            special = rng.random()
            if special < 0.04:
                rows = 0
            elif special < 0.14:  # enough for several threads
                rows = 500_000 // (4 * (q_cols + k_cols + 2 * 70)) + 1
            elif special < 0.15 and op.normalises:  # enough for stores past the caches
                items = [reference.NUMPY_DTYPES[kinds[name]].itemsize for name in ("q_out", "q")]
                many = (17 << 20) // (items[0] * (q_cols + k_cols)) + 1
                if many * max(items) * max(q_cols, k_cols) < _LARGE - _PAGE and many <= 100_000:
                    rows = many
                    arenas = self.large = self.large or {name: Arena(_LARGE) for name in NAMES}
                    self.done["streamed"] += 1
        rows = max(rows, 2) if refused else rows
        shapes = _wanted_shapes(rows, q_cols, k_cols)
        gap_kinds = [0, 0, 1, int(rng.integers(1, 70))] if arenas is self.small else [0]
        placed: dict[str, Placed] = {}
        for name in op.tensors:
            cols = shapes[name][-1]
            stride = cols + int(rng.choice(gap_kinds))
            if name not in op.outputs and rng.random() < 0.1:
                stride = int(rng.integers(0, cols + 1))  # rows of an input may overlap
            placed[name] = self._place(rng, arenas[name], shapes[name], kinds[name], stride)
        for own in ("q", "k"):
            if op.normalises and kind.in_dtype == kind.out_dtype and rng.random() < 0.12:
                placed[own] = placed[f"{own}_out"]
        self._fill(rng, op, placed, kinds)
        epsilon = _EPSILONS[int(rng.integers(len(_EPSILONS) - 1))]
        if rng.random() < 0.05:
            kind.module.library.get_function("qknorm_set_num_threads")(int(rng.integers(0, 5)))
        arguments: dict[str, Any] = {}
        for name, one in placed.items():
            extra: dict[str, Any] = {}
            if not one.extent:  # nothing to read: whoever looks reads the guard page
                extra["address"] = one.arena.start - _PAGE + 64
            elif rng.random() < 0.1:
                extra["byte_offset"] = int(rng.integers(1, 1 << 40))
            arguments[name] = RawTensor(one.array, **extra)
        scalars = [epsilon] if op.has_epsilon else []
        if refused:
            self._check_refused(rng, kind, placed, [*arguments.values(), *scalars])
        else:
            self._check_exact(kind, placed, [*arguments.values(), *scalars], epsilon)
        for name in NAMES:
            arenas[name].allow(_WRITE)

    def _check_exact(
        self, kind: Kind, placed: dict[str, Placed], arguments: list[Any], epsilon: float
    ) -> None:
        op = kind.op
        expected = _expected(
            op,
            {name: one.array for name, one in placed.items()},
            epsilon,
            cast_before_gamma=kind.cast_before_gamma,
            fused=kind.module.active_level != "x86-64-v2",
        )
        for name in op.tensors:
            if name not in op.outputs and placed[name] is not placed.get(f"{name}_out"):
                placed[name].arena.allow(_READ)
        raw_call(kind.module, *arguments, op=op.name)
        for name, wanted in expected.items():
            one = placed[name]
            wrong = reference.differing(one.array, wanted)
            assert wrong == 0, f"{kind}: {name} differs in {wrong} of {wanted.size} elements"
            one.array.view(f"u{one.array.itemsize}")[...] = int.from_bytes(
                bytes([_CANARY]) * one.array.itemsize, "little"
            )
            beside = int((one.arena.memory[one.window()] != _CANARY).sum())
            assert beside == 0, f"{kind}: {beside} bytes beside {name} were written"
        self.done["exact"] += 1

    def _check_refused(
        self,
        rng: np.random.Generator,
        kind: Kind,
        placed: dict[str, Placed],
        arguments: list[Any],
    ) -> None:
        op = kind.op
        victim = op.tensors[int(rng.integers(len(op.tensors)))]
        mistakes = [*_MISTAKES, "count", *(["epsilon"] if op.has_epsilon else [])]
        what = mistakes[int(rng.integers(len(mistakes)))]
        if what == "epsilon":
            arguments[-1] = [math.nan, None, "1", True][int(rng.integers(4))]
        elif what == "count":
            arguments = [*arguments, 1, 1]
            count = int(rng.integers(len(arguments) - 2))
            arguments = arguments[: count or len(arguments)]
        else:
            changed = _MISTAKES[what](rng, op, victim, placed)
            if changed is None:
                what, changed = "device", _other_device(rng, op, victim, placed)
            arguments[op.tensors.index(victim)] = changed
        for one in placed.values():
            one.arena.allow(_NONE)
        try:
            with pytest.raises((TypeError, ValueError), match=r" must |^[a-z_]+ takes "):
                raw_call(kind.module, *arguments, op=op.name)
        except BaseException as error:
            raise AssertionError(
                f"{kind}: {what} of {victim} is not refused as it should be"
            ) from error
        self.done["refused"] += 1


def _other_device(
    rng: np.random.Generator, op: Operation, name: str, placed: dict[str, Placed]
) -> RawTensor:
    kind = int(rng.choice([2, 4, 7, 8, 9, 10, 12, 13, 14, 15, 16]))
    return RawTensor(placed[name].array, device=(kind, int(rng.integers(0, 3))))


def _other_shape(
    rng: np.random.Generator, op: Operation, name: str, placed: dict[str, Placed]
) -> RawTensor:
    array = placed[name].array
    shape = list(array.shape)
    axis = int(rng.integers(0, len(shape)))
    change = int(rng.choice([-1, 1, 1 << 20]))
    if name in ("q", "k") and axis == 1 and not op.normalises:
        change = -shape[axis]  # any others would be legal
    shape[axis] = max(0, shape[axis] + change)
    return RawTensor(
        np.lib.stride_tricks.as_strided(array, shape, array.strides), address=array.ctypes.data
    )


def _other_rank(
    rng: np.random.Generator, op: Operation, name: str, placed: dict[str, Placed]
) -> RawTensor:
    array = placed[name].array
    rank = int(rng.choice([n for n in (0, 1, 2, 3, 5) if n != array.ndim]))
    shape = ((1,) * 5 + array.shape)[len(array.shape) + 5 - rank :]
    return RawTensor(np.empty(shape, array.dtype), address=array.ctypes.data)


def _other_dtype(
    rng: np.random.Generator, op: Operation, name: str, placed: dict[str, Placed]
) -> RawTensor:
    array = placed[name].array
    kinds = [np.dtype(k) for k in ("f2", "f4", "f8", "i1", "u2", "i4", "c8", "?")]
    kinds.append(reference.NUMPY_DTYPES["bfloat16"])
    kinds = [kind for kind in kinds if kind != array.dtype]
    other = kinds[int(rng.integers(len(kinds)))]
    strides = tuple(s // array.itemsize for s in array.strides)
    return RawTensor(np.empty(array.shape, other), address=array.ctypes.data, strides=strides)


def _more_lanes(
    rng: np.random.Generator, op: Operation, name: str, placed: dict[str, Placed]
) -> RawTensor:
    return RawTensor(placed[name].array, lanes=int(rng.choice([0, 2, 4, 65535])))


def _bad_strides(
    rng: np.random.Generator, op: Operation, name: str, placed: dict[str, Placed]
) -> RawTensor | None:
    array = placed[name].array
    strides = [s // array.itemsize for s in array.strides]
    if array.ndim == 2 and rng.random() < 0.5:
        strides[0] = -int(rng.integers(1, 1 << 30))
        if name in op.outputs:
            strides[0] = int(rng.integers(-array.shape[1], array.shape[1]))
    elif array.shape[-1] > 1:
        strides[-1] = int(rng.choice([-1, 0, 2, 1 << 40]))
    else:
        return None
    return RawTensor(array, strides=strides)


def _no_data(
    rng: np.random.Generator, op: Operation, name: str, placed: dict[str, Placed]
) -> RawTensor:
    return RawTensor(placed[name].array, address=0)


def _overlap(
    rng: np.random.Generator, op: Operation, name: str, placed: dict[str, Placed]
) -> RawTensor | None:
    """Return an output whose first or last byte is another argument's."""
    if name not in op.outputs:
        return None
    others = [n for n in op.tensors if n not in (name, name.removesuffix("_out"))]
    other = placed[others[int(rng.integers(len(others)))]]
    mine = placed[name]
    first = other.array.ctypes.data
    begins_in = first + int(rng.integers(0, other.array.shape[-1] * other.array.itemsize))
    ends_in = first + int(rng.integers(1, 5)) - mine.extent
    return RawTensor(mine.array, address=begins_in if rng.random() < 0.5 else ends_in)


def _no_tensor(
    rng: np.random.Generator, op: Operation, name: str, placed: dict[str, Placed]
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


#: What `_paths` returns, and a dtype's are those of its statistics and fused operation.
_MODULES = ("open", "smallest", "large", "mixed", *DTYPES)


def _paths() -> tuple[Path, ...]:
    """Compile the modules; all but one are other test files' too."""
    cast = KernelSpec(cast_before_gamma=True)
    mixed = [KernelSpec(op="qk_rms_norm", out_dtype="float32"), cast.replace(op="qk_rms_norm")]
    mixed += [cast.replace(q_cols=33, k_cols=7), cast]
    return (
        open_columns(),
        smallest(),
        compiled("large", KernelSpec(in_dtype="bfloat16", q_cols=1536, k_cols=256)),
        compiled("mixed", *mixed),
        *map(statistics_and_fused, DTYPES),
    )


def run_guarded(progress: str, first: str, count: str, *paths: str) -> None:
    """Run cases in this process; each one's number is in the file `progress` before it begins."""
    faulthandler.enable()
    modules = dict(zip(_MODULES, map(load, paths), strict=True))
    guarded = Guarded(modules)
    note = os.open(progress, os.O_WRONLY | os.O_CREAT, 0o600)
    for number in range(int(first), int(first) + int(count)):
        os.pwrite(note, b"%20d" % number, 0)
        guarded.run(number)
    print(modules["open"].active_level, *guarded.done.values())


@pytest.mark.parametrize("level", LEVELS)
def test_exact_or_refused_between_guard_pages(level: str, tmp_path: Path) -> None:
    """A byte read or written before or after a tensor; an input written; a refusal that looks."""
    needs_level(level)
    progress = tmp_path / "case"
    first = 0 if _GIVEN is None else secrets.randbelow(1 << 40)
    done = run_python(
        "import sys, test_fuzz; test_fuzz.run_guarded(*sys.argv[1:])",
        str(progress),
        str(first),
        str(_CASES),
        *map(str, _paths()),
        env={"QKNORM_TVM_DISABLE_CPU_FEATURES": DISABLE_FOR_LEVEL[level]},
        check=False,
        timeout=60 + _CASES,
    )
    number = int(progress.read_text()) if progress.exists() else None
    assert done.returncode == 0, (
        f"case {number} ended with status {done.returncode}\n{done.stderr[-6000:]}"
    )
    ran, exact, refused, streamed = done.stdout.split()
    assert ran == level
    assert int(exact) + int(refused) == _CASES
    assert min(int(exact), int(refused)) > _CASES // 5
    print(f"from case {first}: {exact} exact ({streamed} past the caches), {refused} refused")


@pytest.mark.parametrize("edge", ["after", "before"])
def test_guard_pages_are_there(edge: str) -> None:
    """A byte too far that goes unnoticed: then the test above says nothing."""
    done = run_python(
        """
        import sys
        import numpy as np
        from support import Case, RawTensor, raw_call
        from test_fuzz import Arena
        from qknorm_tvm import load
        edge = sys.argv[2]
        arena = Arena(1 << 16)
        size = 4 * 33 * 4
        start = arena.size - size + 1 if edge == "after" else -1
        f4 = [np.ones(s, np.float32) for s in ((4, 7), 33, 7, (4, 2), (4, 33), (4, 7))]
        q_out = RawTensor(np.empty((4, 33), np.float32), address=arena.start + start)
        raw_call(load(sys.argv[1]), q_out, *f4, 1e-6)
        """,
        str(smallest()),
        edge,
        check=False,
    )
    assert done.returncode == -signal.SIGSEGV, (done.returncode, done.stderr)
