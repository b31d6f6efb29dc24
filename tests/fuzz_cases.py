"""Random calls of the fuzz tests: where their tensors lie, and what must come of them.

All tensors of a case lie in one buffer, anyhow. What is drawn is asked of `Choices`, which answer
from a number, so that a case can be made again, or from hypothesis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from support import (
    DTYPES,
    SPECIAL_GAMMAS,
    VARIANCES,
    RawTensor,
    random_values,
)

from qknorm_tvm import KernelSpec
from qknorm_tvm.check import reference
from qknorm_tvm.check.expected import Graph, outputs_of
from qknorm_tvm.check.inputs import Activations
from qknorm_tvm.check.special_values import ANGLES, SCALES
from qknorm_tvm.dtypes import ELEMENT_TYPES
from qknorm_tvm.operations import MAX_POSITION, SLOTS, Operation
from qknorm_tvm.operations import SCALES as SCALE_COUNT

SPECIAL = {
    **dict.fromkeys(("gamma_q", "gamma_k"), SPECIAL_GAMMAS),
    "qk_var": VARIANCES,
    "cos_sin_cache": ANGLES,
    **dict.fromkeys(("k_scale", "v_scale"), SCALES),
}
#: Lists of numbers that say where in another tensor to read or to write.
INDICES = ("positions", "slot_mapping")
SPECIAL_INPUTS = np.array(
    [0, -0.0, 1e-45, 6e-8, 1e-20, 65504, 1.8e19, 2e19, -3.3e38, np.inf, -np.inf, np.nan], np.float32
)
EPSILONS = [1e-6] * 8 + [0.0, -0.0, 1, -1e-6, 1e-45, 1e300, math.inf, -math.inf, math.nan]
#: What the message of an API call that is refused begins with.
REFUSED = (
    r"^(q|k|v|gamma_|qk_var|epsilon|positions|cos_sin_cache|slot_mapping|rotary_dtype|head_dim|validate)\w*"
    r"( and \w+)? must "
)


class Choices(Protocol):
    """Whatever a case is drawn from; `label` names the choice to whoever reads it."""

    def one_of(self, options: Sequence[Any], label: str) -> Any: ...
    def integer(self, low: int, high: int, label: str) -> int: ...


class FromNumber:
    """Choices that follow from a number, or from a generator."""

    def __init__(self, number: int | np.random.Generator):
        self._rng = np.random.default_rng(number)

    def one_of(self, options: Sequence[Any], label: str) -> Any:
        return options[int(self._rng.integers(len(options)))]

    def integer(self, low: int, high: int, label: str) -> int:
        return int(self._rng.integers(low, high + 1))


def draw_rotating(choices: Choices, target: str) -> KernelSpec:
    """Draw a spec of an operation that rotates: any heads, rotation, types and outputs."""
    head_dim = choices.one_of([8, 16, 24, 30, 33, 40, 64, 80, 96, 128], "head_dim")
    dtype = choices.one_of(["bfloat16", *DTYPES], "dtype")
    rotary_dim = 2 * choices.integer(0, head_dim // 2, "pairs")
    if choices.one_of([True, False], "all of a head, or none"):
        rotary_dim = choices.one_of([0, head_dim // 2 * 2], "rotary_dim")
    op = choices.one_of(["qk_rms_norm_rope", *["qk_rms_norm_rope_cache"] * 3], "operation")
    fields: dict[str, Any] = {}
    if rotary_dim:
        fields["interleaved"] = choices.one_of([False, True], "interleaved")
        fields["rotary_dtype"] = choices.one_of([dtype, "float32"], "rotary_dtype")
    if op == "qk_rms_norm_rope_cache":
        fields["cache_dtype"] = choices.one_of([dtype, "float8_e4m3fn"], "cache_dtype")
        fields["writes_k_out"] = choices.one_of([False, True], "writes_k_out")
    return KernelSpec(
        op=op,
        in_dtype=dtype,
        q_cols=head_dim * choices.integer(1, 6, "heads of Q"),
        k_cols=head_dim * choices.integer(1, 3, "heads of K"),
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        statistics=choices.one_of(["given", "local"], "statistics"),
        cast_before_gamma=choices.one_of([False, True], "cast_before_gamma"),
        target=target,
        **fields,
    )


@dataclasses.dataclass
class Kind:
    """What a case calls: a spec with columns, and the extents that a call decides besides rows."""

    spec: KernelSpec
    extents: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def op(self) -> Operation:
        return self.spec.operation

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that a call gives, in the order of the entry point."""
        return tuple(tensor.name for tensor in self.spec.tensors)

    def __str__(self) -> str:
        return f"{self.spec} {dict(self.extents) or ''}"

    def shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes that its tensors must have."""
        cols = self.spec.q_cols, self.spec.k_cols
        shapes = self.op.shapes(rows, *cols, **self.extents)  # type: ignore[arg-type]
        return {name: shapes[name] for name in self.tensors}

    def dtypes(self) -> dict[str, str]:
        """Return the dtypes that its tensors must have."""
        return {tensor.name: self.spec.dtype_of(tensor) for tensor in self.spec.tensors}

    def expected(
        self, tensors: Mapping[str, np.ndarray], epsilon: float, graph: Graph
    ) -> dict[str, np.ndarray]:
        """Compute what the outputs must be; before the call, which may be in place."""
        copies: dict[str, Any] = {name: array.copy() for name, array in tensors.items()}
        with np.errstate(over="ignore"):
            epsilon = float(np.float32(epsilon))  # beyond float32 torch takes none
        names = ("q", "k", "qk_var", "gamma_q", "gamma_k")
        inputs = Activations(*(copies.pop(name, None) for name in names), epsilon, extra=copies)
        return dict(zip(self.spec.outputs, outputs_of(graph, inputs, self.spec), strict=True))

    def api_arguments(self, given: Mapping[str, Any], epsilon: float) -> dict[str, Any]:
        """Return what the Python API's function takes, for tensors by name."""
        op, spec = self.op, self.spec
        arguments = {tensor.api_name: given.get(tensor.name) for tensor in op.arguments}
        if op.has_epsilon:
            arguments["epsilon"] = epsilon
        if "cast_before_gamma" in op.spec_fields:
            arguments["cast_before_gamma"] = spec.cast_before_gamma
        if op.rotates:
            arguments |= {"head_dim": spec.head_dim, "interleaved": spec.interleaved}
        return arguments


def draw_kind(choices: Choices, spec: KernelSpec, rows: int) -> Kind:
    """Draw the extents that a call of a spec decides besides rows."""
    if not spec.operation.rotates:
        return Kind(spec)
    assert spec.head_dim is not None
    slots = choices.one_of([rows] * 4 + [rows // 2, 0], "slots")
    block_size = choices.one_of([1, 2, 7, 16, 16, 32, 64], "block size")
    extents = {
        "head_dim": spec.head_dim,
        "kv_heads": spec.kv_heads,
        "rotary_dim": spec.rotary_dim,
        MAX_POSITION: choices.one_of([40, 5, 1], "positions"),
        SLOTS: slots,
        "block_size": block_size,
        "blocks": -(-slots // block_size) + choices.one_of([0, 1, 2], "blocks"),
        SCALE_COUNT: choices.one_of([1, spec.kv_heads], "scales"),
    }
    return Kind(spec, extents)


def fill_indices(
    rng: np.random.Generator, name: str, array: np.ndarray, kind: Kind, *, wrong: bool = False
) -> None:
    """Write positions, or slots: each once, some negative; `wrong`: one that there is not."""
    extents, count = kind.extents, len(array)
    if name == "positions":
        end = extents[MAX_POSITION]
        array[...] = rng.integers(0, end, count)
    else:
        end = extents["blocks"] * extents["block_size"]
        places = rng.permutation(end)[:count]
        array[...] = np.where(rng.random(count) < 0.2, -1 - places * (1 << 30), places)
    if wrong:
        values = [end, end + 7, 1 << 40, (1 << 63) - 1]
        if name == "positions":
            values += [-1, -(1 << 63)]
        array[int(rng.integers(count))] = values[int(rng.integers(len(values)))]


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


def cache_strides(choices: Choices, shape: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Draw strides of a paged cache, in elements, in any order of its dimensions.

    Returns them, and how far from it another cache with these strides may lie in its gaps; 0:
    nowhere.
    """
    # Innermost first: slots before heads, heads before slots, and what no engine has.
    order = choices.one_of([(2, 1, 0), (2, 1, 0), (1, 2, 0), (2, 0, 1)], "order")
    gap_at = choices.one_of([None, 0, 1, 2, 2], "gap at")
    strides, reach, beside = [0, 0, 0, 1], shape[3], 0
    for level, dim in enumerate(order):
        gap = choices.one_of([reach, reach, 8, 1], "gap") if level == gap_at else 0
        beside = reach if gap == reach and shape[dim] > 1 else beside
        strides[dim] = reach + gap
        reach += max(shape[dim] - 1, 0) * strides[dim]
    return tuple(strides), beside


class Layout:
    """Draws where tensors of some shapes lie in a buffer that is made for them.

    Parameters
    ----------
    choices : Choices
    kind : Kind
    shapes : mapping
        Of the tensors, which are not all that the kind has, or not as they should be.
    rows : int
    by_element : bool
        Whether a tensor that is not aligned to its elements is refused, so that few are drawn.
    orderly : bool
        Draw legal layouts only, aligned ones as far as columns allow.
    """

    def __init__(
        self,
        choices: Choices,
        kind: Kind,
        shapes: Mapping[str, tuple[int, ...]],
        rows: int,
        *,
        by_element: bool,
        orderly: bool,
    ):
        self._choices = choices
        cols = kind.spec.q_cols or 1, kind.spec.k_cols or 1
        self._by_element = by_element
        #: A row stride in elements that all tensors may share.
        self._wide = _round_up(max(cols) + 7, 64)
        #: Bytes that a tensor takes, wherever it starts in them; a cache with its gaps.
        most = max(max(rows, 1) * self._wide, *(2 * math.prod(shape) for shape in shapes.values()))
        self._room = _round_up(most * 4 + 1100, 64)
        self._pitch = _round_up(4 * (2 * cols[0] + 3 * cols[1] + 130) + 64, 16)
        self._pitch += 4 * choices.one_of([0, 0, 0, 1], "pitch")
        self._whole = choices.one_of([True, True, True, False], "whole elements")
        places = ["apart"] * 3 + ([] if orderly else ["anywhere", "fused"])
        self._place = choices.one_of(places, "places")
        #: Addresses and strides for the kernels that rely on alignment.
        self._tidy = orderly or choices.one_of([True, False], "tidy")
        self._odd = not orderly and choices.one_of([False] * 3 + [True], "odd strides")
        self._fused = self._beside = 0
        # Indices lie behind all else: what an input that overlaps them makes of them is chance.
        self._end = (max(len(shapes), 7) + 1) * self._room
        self._indices = self._end
        self.size = self._end + len(INDICES) * self._room

    def _cache_strides(self, shape: tuple[int, ...], item: int) -> tuple[int, ...]:
        choices = self._choices
        drawn, self._beside = cache_strides(choices, shape)
        strides = list(drawn)
        if self._odd:
            dim = choices.integer(0, 3, "odd dimension")
            strides[dim] = choices.one_of([0, -strides[dim], strides[dim] - 1, 1, 2], "odd stride")
        return tuple(stride * item for stride in strides)

    def beside(self, other: Region) -> Region | None:
        """Return a region like a cache's, in its gaps, or rarely off by an element."""
        choices = self._choices
        if not self._beside or choices.integer(0, 1, "in its gaps"):
            return None
        off = choices.one_of([0] * 6 + [-1, 1], "off by") * other.item
        region = dataclasses.replace(other, start=other.start + self._beside * other.item + off)
        low, high = region.span()
        return region if low >= 0 and high <= self._end else None

    def _strides(self, shape: tuple[int, ...], item: int) -> tuple[int, ...]:
        """Draw strides, legal ones unless they are to be odd."""
        choices, cols = self._choices, shape[-1]
        if len(shape) == 4:
            return self._cache_strides(shape, item)
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

    def region(self, index: int, name: str, shape: tuple[int, ...], item: int) -> Region:
        """Draw a layout of the tensor with this number, legal more often than not."""
        choices = self._choices
        strides = self._strides(shape, item)
        offsets = [0, 0, 0, 1, 2, 4, 32, 66, 128, 1000]
        if self._tidy:
            offsets = [0, 0, 32, 128]
        elif self._by_element:
            offsets = [0] * 6 + [item, 3 * item, 32, 128, 1000] * 2 + [2, 1]
        start, end = choices.one_of(offsets, "start"), self._end
        if name in INDICES:
            start, end = start + self._indices, self.size
            self._indices += self._room
        elif self._place == "apart":  # no chance of overlap, so that many calls are legal
            start += index * self._room
        else:
            start += choices.integer(0, 9, "block") * _round_up(self._room // 2, 64)
        region = Region(start, shape, strides, item)
        region.start += start - region.span()[0]
        if self._place == "fused" and len(shape) == 2 and name not in INDICES:
            region.strides = (self._pitch, item)
            region.start = _round_up(self._fused, item if self._whole else 1)
            gap = choices.one_of([0, 0, 0, item, -item, 2, -2], "gap")
            self._fused = max(0, region.start + shape[1] * item + gap)
        low, high = region.span()
        if low < 0 or high > end:
            self._beside = 0
            packed = tuple(math.prod(shape[d + 1 :]) * item for d in range(len(shape)))
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
        if self.mistake in ("device", "none", "index"):
            return False
        if self.kind.op.has_epsilon and math.isnan(self.epsilon):
            return False
        wanted, dtypes = self.kind.shapes(self.rows), self.kind.dtypes()
        for name, region in self.regions.items():
            if self.dtypes[name] != dtypes[name] or region.shape != wanted[name]:
                return False
            if not all(region.shape):
                continue
            if region.shape[-1] > 1 and region.strides[-1] != region.item:
                return False
            if by_element and region.start % region.item:
                return False
            if len(region.shape) == 4 and not self._keeps_slots_apart(region):
                return False
            if len(region.shape) == 2 and region.shape[0] > 1:
                if region.strides[0] < 0:
                    return False
                is_output = name in self.kind.op.outputs
                if is_output and region.strides[0] < region.shape[1] * region.item:
                    return False
        return self.rows == 0 or not self._overlaps()

    def _keeps_slots_apart(self, cache: Region) -> bool:
        strides = [s for s, n in zip(cache.strides, cache.shape, strict=True) if n > 1]
        covered = np.zeros(self.size, bool)
        covered[cache.bytes()] = True
        size = math.prod(cache.shape) * cache.item
        return min(strides, default=0) >= 0 and int(covered.sum()) == size

    def _overlaps(self) -> bool:
        covered = {}
        for name, region in self.regions.items():
            if all(region.shape):
                covered[name] = np.zeros(self.size, bool)
                covered[name][region.bytes()] = True
        outputs = [name for name in self.kind.op.outputs if name in covered]
        for number, out in enumerate(outputs):
            others = [*outputs[:number], *(name for name in covered if name not in outputs)]
            for name in others:
                if name == self.kind.op[out].in_place_of and self._is(out, name):
                    continue
                if (covered[out] & covered[name]).any() or self._within_a_cache(out, name):
                    return True
        return False

    def _within_a_cache(self, *names: str) -> bool:
        """Say whether one lies between the elements of a cache that is not the other's like."""
        if not any(self.kind.op[name].is_cache for name in names):
            return False
        regions = [self.regions[name] for name in names]
        (low_a, high_a), (low_b, high_b) = (region.span() for region in regions)
        if high_a <= low_b or high_b <= low_a:
            return False
        looks = {
            (region.shape, region.item, region.start % region.item, *(
                stride for stride, extent in zip(region.strides, region.shape, strict=True)
                if extent > 1
            ))
            for region in regions
        }  # fmt: skip
        return len(looks) > 1

    def _is(self, out: str, name: str) -> bool:
        a, b = self.regions[out], self.regions[name]
        same_rows = self.rows == 1 or a.strides[0] == b.strides[0]
        return a.start == b.start and a.item == b.item and same_rows

    def views(self, memory: np.ndarray) -> dict[str, np.ndarray]:
        """Return the tensors in some memory."""
        return {
            name: np.ndarray(
                region.shape, ELEMENT_TYPES[self.dtypes[name]].numpy, memory, region.start,
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
            if name in self.kind.op.outputs or self.dtypes[name] != self.kind.dtypes()[name]:
                continue  # caches keep what they hold where nothing is stored
            if name in INDICES:
                if view.shape == self.kind.shapes(self.rows)[name]:
                    wrong = self.mistake == "index" and name == self.victim
                    fill_indices(rng, name, view, self.kind, wrong=wrong)
                continue
            if self.plain and name in ("q", "k"):
                view[...] = rng.standard_normal(view.shape, np.float32).astype(view.dtype)
                for _ in range(int(rng.integers(4)) if view.size else 0):
                    with np.errstate(over="ignore"):
                        value = rng.choice(SPECIAL_INPUTS).astype(view.dtype)
                    view[tuple(rng.integers(view.shape))] = value
            else:
                view[...] = random_values(rng, view.shape, self.dtypes[name])
            if name in SPECIAL:
                special = rng.random(view.shape) < 0.2
                with np.errstate(over="ignore"):
                    values = rng.choice(SPECIAL[name], int(special.sum())).astype(view.dtype)
                view[special] = values
        return memory, arrays

    def check_written(
        self, before: np.ndarray, after: np.ndarray, expected: Mapping[str, np.ndarray]
    ) -> None:
        """Check every byte after a call: outputs are as expected, all else is as it was."""
        written = np.zeros(self.size, bool)
        arrays = self.views(after)
        for name in self.regions.keys() & set(self.kind.op.outputs):
            array, wanted, places = arrays[name], expected[name], self.regions[name].bytes()
            wrong = reference.differing(array, wanted)
            if name == "v_cache" and not self.kind.spec.has_scales:  # NaNs as they came
                wrong = int((array.view(np.uint8) != wanted.view(np.uint8)).sum())
            assert wrong == 0, f"{name} differs in {wrong} of {array.size} elements"
            if self.kind.op[name].is_cache:
                slots = arrays["slot_mapping"]
                count = math.prod(array.shape[:2])
                places = places.reshape(count, -1)[slots[slots >= 0]] if count else places
            written[places] = True
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
    wrong_indices: bool = False,
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
    wrong_indices : bool
        Whether positions and slots that are not there are refused, so that some are drawn.
    """
    op, dtypes, shapes = kind.op, kind.dtypes(), kind.shapes(rows)
    names = [name for name in kind.tensors if name not in missing]
    mistakes = [] if orderly else ["dtype", "shape", "rank", "device", "none"]
    if op.rotates and wrong_indices:
        mistakes += ["index"] * 2
    mistake = choices.one_of([None] * 20 + mistakes, "mistake")
    victims = [name for name in names if _can_have(mistake, kind, name, shapes)]
    victim = choices.one_of(victims, "victim") if victims else ""
    if not victims:
        mistake = None
    if mistake == "dtype":
        # Angles of the model's type or of float32 only ask for another module.
        others = {kind.spec.in_dtype, "float32"} if victim == "cos_sin_cache" else set()
        dtypes[victim] = choices.one_of([dtype for dtype in DTYPES if dtype not in others], "dtype")
    elif mistake == "shape":
        shapes[victim] = _other_shape(choices, kind, victim, shapes[victim], rows)
    elif mistake == "rank":
        shapes[victim] = (1, *shapes[victim]) if len(shapes[victim]) == 1 else (1,)
    given = {name: shapes[name] for name in names}
    layout = Layout(choices, kind, given, rows, by_element=by_element, orderly=orderly)
    regions: dict[str, Region] = {}
    for index, name in enumerate(names):
        item = ELEMENT_TYPES[dtypes[name]].bytes
        region = None
        k_cache = regions.get("k_cache")
        if name == "v_cache" and k_cache and (k_cache.shape, k_cache.item) == (shapes[name], item):
            region = layout.beside(k_cache)
        regions[name] = region or layout.region(index, name, shapes[name], item)
        out = regions.get(f"{name}_out")
        if (
            out is not None
            and (out.shape, out.item) == (shapes[name], item)
            and choices.integer(0, 5, "in place") == 0
        ):
            regions[name] = dataclasses.replace(out)
    adds_up = not op.normalises or "qk_var" not in kind.tensors
    return FuzzCase(
        kind, rows, layout.size, regions, dtypes, mistake, victim,
        epsilon=choices.one_of(EPSILONS, "epsilon"),
        # In a sum of squares one value of any bits hides the others.
        plain=adds_up and choices.integer(0, 9, "plain") < 7,
        seed=choices.integer(0, 1 << 16, "seed"),
    )  # fmt: skip


def _can_have(
    mistake: str | None, kind: Kind, name: str, shapes: Mapping[str, tuple[int, ...]]
) -> bool:
    """Say whether a call with this mistake of this tensor is wrong."""
    if mistake == "index":
        return name in INDICES and all(shapes[name])
    tensor = kind.op[name]
    if mistake == "none":  # without an output or these statistics it only asks for another module
        return tensor.is_cache or not (
            tensor.is_output or tensor.given_if == "has_given_statistics"
        )
    # Not q or q_out: that would only ask for another module.
    return name not in ("q", "q_out")


def _other_shape(
    choices: Choices, kind: Kind, name: str, shape: tuple[int, ...], rows: int
) -> tuple[int, ...]:
    """Return a shape that is wrong, or where there is none on the axis drawn the same."""
    changed, axis = list(shape), choices.integer(0, len(shape) - 1, "axis")
    extent = kind.op[name].shape[axis]
    if extent == SLOTS:
        changed[axis] = rows + 1
    elif extent == SCALE_COUNT:
        changed[axis] = kind.spec.kv_heads + 1
    elif extent != MAX_POSITION and not (name == "k" and axis == 1):
        changed[axis] = max(0, shape[axis] + choices.one_of([-1, 1], "by"))
    return tuple(changed)
