"""Random calls of the fuzz tests: where their tensors lie, and what must come of them.

All tensors of a case lie in one buffer, anyhow. What is drawn is asked of `Choices`, which answer
from a number, so that a case can be made again, or from hypothesis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from support import (
    DTYPES,
    NAMES,
    SPECIAL_GAMMAS,
    VARIANCES,
    RawTensor,
    random_values,
)

from qknorm_tvm.check import reference
from qknorm_tvm.operations import Operation

SPECIAL = {"gamma_q": SPECIAL_GAMMAS, "gamma_k": SPECIAL_GAMMAS, "qk_var": VARIANCES}
SPECIAL_INPUTS = np.array(
    [0, -0.0, 1e-45, 6e-8, 1e-20, 65504, 1.8e19, 2e19, -3.3e38, np.inf, -np.inf, np.nan], np.float32
)
EPSILONS = [1e-6] * 8 + [0.0, -0.0, 1, -1e-6, 1e-45, 1e300, math.inf, -math.inf, math.nan]
#: What the message of an API call that is refused begins with.
REFUSED = r"^(q|k|gamma_|qk_var|epsilon)\w* must "


class Choices(Protocol):
    """Whatever a case is drawn from; `what` names the choice to whoever reads it."""

    def one_of(self, options: Sequence[Any], what: str) -> Any: ...
    def integer(self, low: int, high: int, what: str) -> int: ...


class FromNumber:
    """Choices that follow from a number."""

    def __init__(self, number: int):
        self._rng = np.random.default_rng(number)

    def one_of(self, options: Sequence[Any], what: str) -> Any:
        return options[int(self._rng.integers(len(options)))]

    def integer(self, low: int, high: int, what: str) -> int:
        return int(self._rng.integers(low, high + 1))


@dataclasses.dataclass
class Kind:
    """What a case calls."""

    op: Operation
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

    def shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes that its tensors must have."""
        return self.op.shapes(rows, self.q_cols, self.k_cols)

    def dtypes(self) -> dict[str, str]:
        """Return the dtypes that its tensors must have."""
        return self.op.dtypes(self.in_dtype, self.out_dtype)

    def expected(
        self,
        tensors: Mapping[str, np.ndarray],
        epsilon: float,
        *,
        statistics: Callable[..., np.ndarray] = reference.row_mean_of_squares_qk,
        graph: Callable[..., tuple[np.ndarray, ...]] = reference.apply_qk_rms_norm,
    ) -> dict[str, np.ndarray]:
        """Compute what the outputs must be; before the call, which may be in place."""
        q, k = (tensors[name].copy() for name in ("q", "k"))
        given = self.op.normalises and "qk_var" in self.op.tensors
        qk_var = tensors["qk_var"].copy() if given else statistics(q, k)
        if not self.op.normalises:
            return {"qk_var": qk_var}
        gammas = (tensors[name].copy() for name in ("gamma_q", "gamma_k"))
        outputs = graph(
            q, k, qk_var, *gammas, epsilon, self.out_dtype,
            cast_before_gamma=self.cast_before_gamma,
        )  # fmt: skip
        return dict(zip(self.op.outputs, outputs, strict=True))


class Elsewhere(RawTensor):
    """A tensor known by DLPack alone, wherever it says that it is."""

    def __init__(self, array: np.ndarray, **given: Any):
        super().__init__(array, **given)
        self.dtype, self.shape = array.dtype, array.shape


# ---- where tensors lie -------------------------------------------------------------------------


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

    def span(self) -> tuple[int, int]:
        """Return its first byte and the one after its last."""
        if not all(self.shape):
            return self.start, self.start
        steps = [s * (n - 1) for s, n in zip(self.strides, self.shape, strict=True)]
        low, high = (sum(f(step, 0) for step in steps) for f in (min, max))
        return self.start + low, self.start + high + self.item

    def is_plain(self) -> bool:
        """Return whether torch can make it: whole elements, and no step backwards."""
        return all(n >= 0 and n % self.item == 0 for n in (self.start, *self.strides))


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


class Layout:
    """Draws where tensors of some shapes lie in a buffer that is made for them.

    Parameters
    ----------
    choices : Choices
    kind : Kind
    rows : int
    by_element : bool
        Whether a tensor that is not aligned to its elements is refused, so that few are drawn.
    orderly : bool
        Draw legal layouts only, aligned ones as far as columns allow.
    """

    def __init__(self, choices: Choices, kind: Kind, rows: int, *, by_element: bool, orderly: bool):
        self._choices = choices
        self._by_element = by_element
        #: A row stride in elements that all tensors may share.
        self._wide = _round_up(max(kind.q_cols, kind.k_cols) + 7, 64)
        #: Bytes that a tensor takes at most, wherever it starts in them.
        self._room = _round_up(max(rows, 1) * self._wide * 4 + 1100, 64)
        self._pitch = _round_up(4 * (2 * (kind.q_cols + kind.k_cols) + 2) + 64, 16)
        self._pitch += 4 * choices.one_of([0, 0, 0, 1], "pitch")
        self._whole = choices.one_of([True, True, True, False], "whole elements")
        places = ["apart"] * 3 + ([] if orderly else ["anywhere", "fused"])
        self._place = choices.one_of(places, "places")
        #: Addresses and strides for the kernels that rely on alignment.
        self._tidy = orderly or choices.one_of([True, False], "tidy")
        self._odd = not orderly and choices.one_of([False] * 3 + [True], "odd strides")
        self._fused = 0
        self.size = (len(NAMES) + 1) * self._room

    def _strides(self, shape: tuple[int, ...], item: int) -> tuple[int, ...]:
        """Draw strides, legal ones unless they are to be odd."""
        choices, cols = self._choices, shape[-1]
        huge = 1 << 40  # no stride at all where there is one column, or one row
        step = 1
        if self._odd:
            odd = huge if cols == 1 else -1
            step = choices.one_of([1] * 6 + [2, odd, 0], "column stride")
        if len(shape) == 1:
            return (step * item,)
        rows = [cols] * 3 + [self._wide] * 3 + [_round_up(self._wide - 24, 8)]
        if not self._tidy:
            rows.append(cols + 3)
        if self._odd:
            rows += [0, -cols, huge if shape[0] < 2 else cols - 1]
        return (choices.one_of(rows, "row stride") * item, step * item)

    def region(self, index: int, shape: tuple[int, ...], item: int) -> Region:
        """Draw a layout of the tensor with this number, legal more often than not."""
        choices = self._choices
        strides = self._strides(shape, item)
        offsets = [0, 0, 0, 1, 2, 4, 32, 66, 128, 1000]
        if self._tidy:
            offsets = [0, 0, 32, 128]
        elif self._by_element:
            offsets = [0] * 6 + [item, 3 * item, 32, 128, 1000] * 2 + [2, 1]
        start = choices.one_of(offsets, "start")
        if self._place == "apart":  # no chance of overlap, so that many calls are legal
            start += index * self._room
        else:
            start += choices.integer(0, 9, "block") * _round_up(self._room // 2, 64)
        region = Region(start, shape, strides, item)
        region.start += start - region.span()[0]
        if self._place == "fused" and len(shape) == 2:
            region.strides = (self._pitch, item)
            region.start = _round_up(self._fused, item if self._whole else 1)
            gap = choices.one_of([0, 0, 0, item, -item, 2, -2], "gap")
            self._fused = max(0, region.start + shape[1] * item + gap)
        low, high = region.span()
        if low < 0 or high > self.size:
            packed = (math.prod(shape[1:]) * item, item)[-len(shape) :]
            region = Region(index * self._room, shape, packed, item)
        return region


# ---- one case ----------------------------------------------------------------------------------


@dataclasses.dataclass
class FuzzCase:
    """A call: what it is of, and every argument; tensors that are missing the API allocates."""

    kind: Kind
    rows: int
    size: int
    regions: dict[str, Region]
    dtypes: dict[str, str]
    mistake: str | None
    victim: str
    epsilon: float
    plain: bool
    seed: int

    def is_legal(self, *, by_element: bool = False) -> bool:
        """Say what the documentation says, byte by byte."""
        if self.mistake == "device" or (self.kind.op.has_epsilon and math.isnan(self.epsilon)):
            return False
        op, rows = self.kind.op, self.rows
        wanted, dtypes = self.kind.shapes(rows), self.kind.dtypes()
        for name, region in self.regions.items():
            if self.dtypes[name] != dtypes[name] or region.shape != wanted[name]:
                return False
            if rows == 0 and len(region.shape) == 2:
                continue
            if region.shape[-1] > 1 and region.strides[-1] != region.item:
                return False
            if by_element and region.start % region.item:
                return False
            if len(region.shape) == 2 and rows > 1:
                if region.strides[0] < 0:
                    return False
                if name in op.outputs and region.strides[0] < region.shape[1] * region.item:
                    return False
        return rows == 0 or not self._overlaps()

    def _overlaps(self) -> bool:
        covered = {name: np.zeros(self.size, bool) for name in self.regions}
        for name, region in self.regions.items():
            covered[name][region.bytes()] = True
        outputs = [name for name in self.kind.op.outputs if name in covered]
        for number, out in enumerate(outputs):
            others = [*outputs[:number], *(name for name in covered if name not in outputs)]
            for name in others:
                in_place = name == out.removesuffix("_out") and self._is(out, name)
                if not in_place and (covered[out] & covered[name]).any():
                    return True
        return False

    def _is(self, out: str, name: str) -> bool:
        a, b = self.regions[out], self.regions[name]
        same_rows = self.rows == 1 or a.strides[0] == b.strides[0]
        return a.start == b.start and a.item == b.item and same_rows

    def views(self, memory: np.ndarray) -> dict[str, np.ndarray]:
        """Return the tensors in some memory."""
        return {
            name: np.ndarray(
                region.shape, reference.NUMPY_DTYPES[self.dtypes[name]], memory, region.start,
                region.strides,
            )
            for name, region in self.regions.items()
        }  # fmt: skip

    def fill(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return memory of any bytes with the inputs in it, and the tensors."""
        rng = np.random.default_rng(self.seed)
        memory = np.frombuffer(rng.bytes(self.size), np.uint8).copy()
        arrays = self.views(memory)
        for name, view in arrays.items():
            if name in self.kind.op.outputs:
                continue
            if self.plain and name in ("q", "k"):
                view[...] = rng.standard_normal(view.shape, np.float32).astype(view.dtype)
                for _ in range(int(rng.integers(4)) if view.size else 0):
                    with np.errstate(over="ignore"):
                        value = rng.choice(SPECIAL_INPUTS).astype(view.dtype)
                    view[tuple(rng.integers(view.shape))] = value
            else:
                view[...] = random_values(rng, view.shape, self.dtypes[name])
            if name in SPECIAL and self.dtypes[name] == "float32":
                special = rng.random(view.shape) < 0.2
                view[special] = rng.choice(SPECIAL[name], int(special.sum()))
        return memory, arrays

    def check_written(
        self, before: np.ndarray, after: np.ndarray, expected: Mapping[str, np.ndarray]
    ) -> None:
        """Check every byte after a call: outputs are as expected, all else is as it was."""
        written = np.zeros(self.size, bool)
        for name, array in self.views(after).items():
            if name in self.kind.op.outputs:
                wrong = reference.differing(array, expected[name])
                assert wrong == 0, f"{name} differs in {wrong} of {array.size} elements"
                written[self.regions[name].bytes()] = True
        beside = np.flatnonzero((before != after) & ~written)
        assert not beside.size, (
            f"{beside.size} bytes beside the outputs were written, from byte {beside[:1]} on; "
            f"{self.regions}"
        )

    def __str__(self) -> str:
        wrong = f", wrong {self.mistake} of {self.victim or 'the call'}" if self.mistake else ""
        return f"{self.kind}, {self.rows} rows, epsilon {self.epsilon}{wrong}; {self.regions}"


def draw_case(
    choices: Choices,
    kind: Kind,
    rows: int,
    *,
    by_element: bool = False,
    orderly: bool = False,
    missing: Sequence[str] = (),
) -> FuzzCase:
    """Draw all that is not given of a case.

    Parameters
    ----------
    choices : Choices
    kind : Kind
    rows : int
    by_element, orderly : bool
        See `Layout`.
    missing : sequence of str
        Outputs that have no place.
    """
    op, dtypes, shapes = kind.op, kind.dtypes(), kind.shapes(rows)
    names = [name for name in op.tensors if name not in missing]
    mistakes = [] if orderly else ["dtype", "shape", "rank", "device"]
    mistake = choices.one_of([None] * 20 + mistakes, "mistake")
    # Not q or q_out: that would only ask for another module.
    victim = choices.one_of([one for one in names if one not in ("q", "q_out")], "victim")
    if mistake == "dtype":
        dtypes[victim] = choices.one_of(DTYPES, "dtype")
    elif mistake == "shape":
        shape = list(shapes[victim])
        axis = choices.integer(0, len(shape) - 1, "axis")
        if not (victim == "k" and axis == 1):
            shape[axis] = max(0, shape[axis] + choices.one_of([-1, 1], "by"))
        shapes[victim] = tuple(shape)
    elif mistake == "rank":
        shapes[victim] = (1, *shapes[victim])[:2] if victim.startswith("gamma") else (1,)
    layout = Layout(choices, kind, rows, by_element=by_element, orderly=orderly)
    regions: dict[str, Region] = {}
    for index, name in enumerate(names):
        item = reference.NUMPY_DTYPES[dtypes[name]].itemsize
        regions[name] = layout.region(index, shapes[name], item)
        out = regions.get(f"{name}_out")
        if (
            out is not None
            and (out.shape, out.item) == (shapes[name], item)
            and choices.integer(0, 5, "in place") == 0
        ):
            regions[name] = dataclasses.replace(out)
    sums = "qk_var" not in op.tensors or not op.normalises
    return FuzzCase(
        kind, rows, layout.size, regions, dtypes, mistake, victim,
        epsilon=choices.one_of(EPSILONS, "epsilon"),
        # In a sum of squares one value of any bits hides the others.
        plain=sums and choices.integer(0, 9, "plain") < 7,
        seed=choices.integer(0, 1 << 16, "seed"),
    )  # fmt: skip
