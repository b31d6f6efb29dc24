"""What the operations that rotate take besides Q, K and their norms, as NumPy arrays."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from ..dtypes import ELEMENT_TYPES
from ..spec import KernelSpec
from .inputs import Activations, aligned_copy, aligned_empty
from .special_values import ANGLES, SCALES

#: Rows of `cos_sin_cache` in a case.
_CASE_POSITIONS = 40
#: Slots in a block of a case's caches, by rows.
_CASE_BLOCK_SIZES = (16, 1, 7)
#: What a model and an engine have.
_POSITIONS, _BLOCK_SIZE, _THETA = 4096, 16, 10000.0


def special_rope_inputs(
    spec: KernelSpec, a: Activations, rng: np.random.Generator
) -> dict[str, npt.NDArray]:
    """Return inputs that go wrong first: special angles and scales, rows that are not stored.

    Of the rows the last eighth has no slot, and of the slots a fifth is negative. V is K's rows in
    another order: they hold the special values of a case. Caches hold chance bytes.
    """
    inputs: dict[str, npt.NDArray] = {}
    if spec.rotary_dim:
        angles = rng.choice(ANGLES, (_CASE_POSITIONS, spec.rotary_dim))
        # Half of the positions have ordinary ones.
        angles[::2] = rng.uniform(-1, 1, angles[::2].shape)
        inputs["cos_sin_cache"] = _as_type(angles, spec.rotary_dtype)
        inputs["positions"] = rng.integers(0, _CASE_POSITIONS, a.rows)
    if spec.operation.has_cache:
        slots = a.rows - a.rows // 8
        inputs["v"] = a.k[rng.permutation(a.rows)]
        inputs |= _paged(spec, slots, rng, _CASE_BLOCK_SIZES[a.rows % 3])
        places = inputs["slot_mapping"]
        inputs["slot_mapping"] = np.where(rng.random(slots) < 0.2, -1 - places, places)
        for name in ("k_cache", "v_cache"):
            data = inputs[name].view(np.uint8)
            data[...] = rng.integers(0, 256, data.shape, np.uint8)
    if spec.has_scales:
        # One for all heads, or one for each.
        count = spec.kv_heads if a.rows % 2 else 1
        inputs |= {name: rng.choice(SCALES, count) for name in ("k_scale", "v_scale")}
    return inputs


def with_model_inputs(spec: KernelSpec, a: Activations, seed: int = 0) -> Activations:
    """Add inputs like a model's: rotary embedding's angles, a slot for every row, in any order."""
    rng = np.random.default_rng(seed)
    inputs: dict[str, npt.NDArray] = {}
    if spec.rotary_dim:
        frequencies = _THETA ** -(np.arange(0, spec.rotary_dim, 2) / spec.rotary_dim)
        angles = np.arange(_POSITIONS)[:, None] * frequencies
        table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        inputs["cos_sin_cache"] = aligned_copy(_as_type(table, spec.rotary_dtype))
        inputs["positions"] = aligned_copy(rng.integers(0, _POSITIONS, a.rows))
    if spec.operation.has_cache:
        v = rng.standard_normal(a.k.shape, dtype=np.float32)
        inputs["v"] = aligned_copy(_as_type(v, spec.in_dtype))
        inputs |= paged_inputs(spec, a.rows, seed)
    if spec.has_scales:
        inputs |= {name: np.full(1, 1 / 64, np.float32) for name in ("k_scale", "v_scale")}
    return dataclasses.replace(a, extra=inputs)


def paged_inputs(spec: KernelSpec, rows: int, seed: int = 0) -> dict[str, npt.NDArray]:
    """Return `slot_mapping` and the caches of an engine: a slot for every row, in any order."""
    return _paged(spec, rows, np.random.default_rng(seed))


def _paged(
    spec: KernelSpec, slots: int, rng: np.random.Generator, block_size: int = _BLOCK_SIZE
) -> dict[str, npt.NDArray]:
    """Return caches that hold zeros, and different slots in them."""
    assert spec.head_dim is not None
    blocks = -(-slots // block_size) + 1
    shape = (blocks, block_size, spec.kv_heads, spec.head_dim)
    dtype = ELEMENT_TYPES[str(spec.cache_dtype)].numpy
    inputs = {"slot_mapping": aligned_copy(rng.permutation(blocks * block_size)[:slots])}
    for name in ("k_cache", "v_cache"):
        inputs[name] = aligned_empty(shape, dtype)
        inputs[name].view(np.uint8)[...] = 0
    return inputs


def _as_type(values: npt.NDArray, dtype: str | None) -> npt.NDArray:
    with np.errstate(over="ignore"):
        return values.astype(np.float32).astype(ELEMENT_TYPES[str(dtype)].numpy)
