"""The public API under random layouts: bit-exact, or an error and nothing written."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, NAMES, from_torch, random_values, to_torch

import qknorm_tvm
from qknorm_tvm import reference

#: Few pairs of columns and dtypes: each is a module to compile.
KINDS = (
    ("bfloat16", "bfloat16", 33, 5),
    ("float16", "float32", 7, 16),
    ("float32", "bfloat16", 16, 33),
)
_BYTES = 1 << 14


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


def _legal(found: dict[str, Region], dtypes: dict[str, str], wanted: dict[str, Any]) -> bool:
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
            if name.endswith("_out") and region.strides[0] < region.shape[1] * region.item:
                return False
    if rows == 0:
        return True
    covered = {name: set(region.bytes().tolist()) for name, region in found.items()}
    if covered["q_out"] & covered["k_out"]:
        return False
    for out in ("q_out", "k_out"):
        for name in NAMES[2:]:
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


@settings(max_examples=600)
@given(data=st.data())
def test_exact_or_refused(data: st.DataObject) -> None:
    """Any layout in one buffer: a wrong bit, a byte written beside an output, or by a refusal."""
    in_dtype, out_dtype, q_cols, k_cols = data.draw(st.sampled_from(KINDS), "kind")
    rows = data.draw(st.sampled_from([0, 1, 2, 3, 4, 5, 9]), "rows")
    wanted = _wanted_shapes(rows, q_cols, k_cols)
    dtypes = dict.fromkeys(NAMES, "float32")
    dtypes |= dict.fromkeys(("q", "k"), in_dtype) | dict.fromkeys(("q_out", "k_out"), out_dtype)
    shapes = dict(wanted)
    mistake = data.draw(st.sampled_from([None] * 9 + ["dtype", "shape", "rank"]), "mistake")
    # Not q or q_out alone: that would only ask for another module.
    victim = data.draw(st.sampled_from(["k", "k_out", "qk_var", "gamma_q", "gamma_k"]), "victim")
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
    for index, name in enumerate(NAMES):
        item = reference.NUMPY_DTYPES[dtypes[name]].itemsize
        region = data.draw(regions(shapes[name], item), name)
        if place == "apart":  # no chance of overlap, so that many calls are legal
            region.start = region.start % 1536 + index * 2200
        elif place == "fused" and len(shapes[name]) == 2:
            region.start, region.strides = fused, (700, item)
            fused += shapes[name][1] * item + data.draw(st.sampled_from([0, 0, 0, 2, -2]), "gap")
        if index > 4 and data.draw(st.integers(0, 5), "in place") == 0 and shapes[name]:
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
        if not name.endswith("_out"):
            view[...] = random_values(rng, region.shape, dtypes[name])
        arrays[name] = view
    use_torch = data.draw(st.booleans(), "torch") and all(
        stride >= 0 and stride % region.item == 0 and region.start % region.item == 0
        for region in found.values()
        for stride in region.strides
    )
    legal = _legal(found, dtypes, wanted)
    expected = None
    if legal:
        expected = (
            reference.rms_norm(
                arrays["q"].copy(),
                arrays["qk_var"][:, 0].copy(),
                arrays["gamma_q"].copy(),
                1e-6,
                out_dtype,
            ),
            reference.rms_norm(
                arrays["k"].copy(),
                arrays["qk_var"][:, 1].copy(),
                arrays["gamma_k"].copy(),
                1e-6,
                out_dtype,
            ),
        )
    before = memory.copy()
    arguments: dict[str, Any] = dict(arrays)
    if use_torch:
        pytest.importorskip("torch", reason="half of the calls pass torch tensors")
        arguments = {name: to_torch(array) for name, array in arrays.items()}

    def call() -> tuple[Any, Any]:
        return qknorm_tvm.apply_qk_rms_norm(
            *(arguments[name] for name in ("q", "k", "qk_var", "gamma_q", "gamma_k")),
            q_out=arguments["q_out"],
            k_out=arguments["k_out"],
        )

    if expected is None:
        with pytest.raises((TypeError, ValueError), match=r"^(q|k|gamma_|qk_var)\w* must "):
            call()
        assert (memory == before).all(), "a refused call wrote"
        return
    outputs = [one if not use_torch else from_torch(one) for one in call()]
    for got, want in zip(outputs, expected, strict=True):
        assert reference.differing(got, want) == 0
    written = np.zeros(_BYTES, bool)
    for name in ("q_out", "k_out"):
        written[found[name].bytes()] = True
    assert (memory[~written] == before[~written]).all(), "a byte beside the outputs was written"
