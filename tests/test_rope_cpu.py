"""Norm, rotation and paged cache on CPUs: bit for bit the unfused float32 graph.

Scheduled and lowered functions are called as a module's entry point calls them, without it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support import LEVELS, OWN, PLAIN, filled, needs_level, random_values

from qknorm_tvm import KernelSpec
from qknorm_tvm.build.cpu import cpu_features, generate
from qknorm_tvm.build.native import Variant
from qknorm_tvm.check.reference import NUMPY_DTYPES, differing
from qknorm_tvm.check.reference_torch import to_torch
from qknorm_tvm.check.rope_reference import rope_reference
from qknorm_tvm.schedules.cpu_config import CpuConfig, default_config

torch = pytest.importorskip("torch")

EPSILON = 1e-6
MAX_POSITION = 50
ROPE = KernelSpec(op="qk_rms_norm_rope", q_cols=384, k_cols=128, head_dim=64)
CACHE = ROPE.replace(op="qk_rms_norm_rope_cache")
FLOAT8 = "float8_e4m3fn"


@functools.lru_cache(maxsize=8)
def function(spec: KernelSpec, cpu: str, config: CpuConfig, row_tile: int) -> Callable[..., Any]:
    """Return the function of one variant, which takes what the entry point passes."""
    config = dataclasses.replace(config, row_tile=row_tile)
    module = generate(cpu, [(spec, config, Variant("row", "rope", row_tile=row_tile))])
    return module["rope"]


def call(
    spec: KernelSpec,
    arrays: dict[str, np.ndarray],
    *,
    cpu: str = OWN,
    row_tile: int = 1,
    config: CpuConfig | None = None,
) -> None:
    """Call the function of a spec with arrays by name, as many rows as q has."""
    needs_level(cpu)
    config = config or default_config(spec, frozenset(cpu_features(cpu)))
    scalars: dict[str, int] = {"row_tiles": len(arrays["q"]) // row_tile}
    for tensor in spec.tensors:
        array = arrays[tensor.name]
        strides = [stride // array.itemsize for stride in array.strides]
        scalars |= dict(zip(tensor.stride_names, strides, strict=False))
    tensors = [to_torch(arrays[tensor.name]) for tensor in spec.tensors]
    names = spec.operation.internal_scalars(spec)
    function(spec, cpu, config, row_tile)(*tensors, EPSILON, *(scalars[name] for name in names))


def make(
    spec: KernelSpec, rows: int, *, block_size: int = 16, slots: int | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return random arguments of a call, and canaries for what it writes."""
    rng = np.random.default_rng([seed, rows])
    heads, slots = spec.kv_heads, rows if slots is None else slots
    blocks = -(-2 * rows // block_size) + 1
    extents = {
        "rows": rows, "q_cols": spec.q_cols, "k_cols": spec.k_cols, "slots": slots,
        "head_dim": spec.head_dim, "rotary_dim": spec.rotary_dim, "max_position": MAX_POSITION,
        "kv_heads": heads, "blocks": blocks, "block_size": block_size, "scales": heads,
    }  # fmt: skip
    arrays: dict[str, np.ndarray] = {}
    for tensor in spec.tensors:
        shape = [extents[e] if isinstance(e, str) else e for e in tensor.shape]
        dtype = spec.dtype_of(tensor)
        if tensor.is_output:
            arrays[tensor.name] = filled(shape, dtype)
        elif dtype != "int64":
            arrays[tensor.name] = random_values(rng, shape, dtype)
    if "qk_var" in arrays:
        arrays["qk_var"] = np.abs(arrays["qk_var"])
    if spec.rotary_dim:
        arrays["positions"] = rng.integers(0, MAX_POSITION, rows)
    if spec.operation.has_cache:
        places = rng.permutation(blocks * block_size)[:slots]
        arrays["slot_mapping"] = np.where(rng.random(slots) < 0.2, -1 - places, places)
    for name in ("k_scale", "v_scale"):
        if name in arrays:
            arrays[name] = np.exp2(rng.uniform(-8, 8, heads)).astype(np.float32)
    return arrays


def check(spec: KernelSpec, arrays: dict[str, np.ndarray], **how: Any) -> None:
    expected = rope_reference(spec, arrays, EPSILON, fused=how.get("cpu") != PLAIN)
    call(spec, arrays, **how)
    for name, value in expected.items():
        assert differing(arrays[name], value) == 0, f"{name} of {spec}"


CHOICES = [
    ROPE.replace(rotary_dim=32),
    ROPE.replace(rotary_dim=64, interleaved=True, statistics="local"),
    ROPE.replace(rotary_dim=32, interleaved=True, cast_before_gamma=True),
    CACHE,
    CACHE.replace(rotary_dim=64, writes_k_out=True),
    CACHE.replace(rotary_dim=32, cache_dtype=FLOAT8, writes_k_out=True, statistics="local"),
    CACHE.replace(rotary_dim=32, cache_dtype=FLOAT8, interleaved=True),
    CACHE.replace(rotary_dim=64, interleaved=True, cast_before_gamma=True),
]


def _of_type(spec: KernelSpec, dtype: str, rotary_dtype: str | None) -> KernelSpec:
    return KernelSpec(
        op=spec.op, q_cols=spec.q_cols, k_cols=spec.k_cols, head_dim=spec.head_dim,
        in_dtype=dtype, rotary_dim=spec.rotary_dim, interleaved=spec.interleaved,
        rotary_dtype=rotary_dtype if spec.rotary_dim else None, statistics=spec.statistics,
        cache_dtype=FLOAT8 if spec.cache_dtype == FLOAT8 else None,
        writes_k_out=spec.writes_k_out, cast_before_gamma=spec.cast_before_gamma,
    )  # fmt: skip


@pytest.mark.parametrize("cpu", LEVELS)
@pytest.mark.parametrize("rotary_dtype", [None, "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("choice", range(len(CHOICES)))
def test_equals_the_reference(choice: int, dtype: str, rotary_dtype: str | None, cpu: str) -> None:
    """A product fused with a sum, a rounding left out, a float8 off by one, a slot mistaken."""
    spec = _of_type(CHOICES[choice], dtype, rotary_dtype)
    check(spec, make(spec, 8), cpu=cpu, row_tile=4 if choice % 2 else 1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(64, 64), (80, 32), (80, 80), (128, 64), (128, 128), (27, 10)]
)
def test_shapes_of_heads(head_dim: int, rotary_dim: int, interleaved: bool) -> None:
    """Pairs or columns beyond the last whole vector."""
    spec = CACHE.replace(
        q_cols=2 * head_dim, k_cols=head_dim, head_dim=head_dim, rotary_dim=rotary_dim,
        interleaved=interleaved, writes_k_out=True,
    )  # fmt: skip
    check(spec, make(spec, 4), row_tile=4)


@pytest.mark.parametrize("vector", [8, 32, 128])
@pytest.mark.parametrize("choice", [0, 2, 5])
def test_any_vector(choice: int, vector: int) -> None:
    """Vectors that hold pairs and other columns at once, or more than there are."""
    spec = CHOICES[choice]
    check(spec, make(spec, 4), config=CpuConfig(vector=vector))


def test_caches_of_any_shape_and_strides() -> None:
    """A block or a stride mistaken; a row without a slot stored; scales of a head and of all."""
    spec = CACHE.replace(rotary_dim=64, cache_dtype=FLOAT8)
    for block_size, slots in ((1, 24), (16, 24), (64, 0), (64, 7)):
        check(spec, make(spec, 24, block_size=block_size, slots=slots))
    arrays = make(spec, 24)
    for name in ("k_scale", "v_scale"):
        arrays[name] = arrays[name][:1]
    # K and V in one tensor, heads before slots.
    blocks, block_size, heads, head_dim = arrays["k_cache"].shape
    both = filled((blocks, 2, heads, block_size, head_dim), FLOAT8)
    arrays["k_cache"], arrays["v_cache"] = (both[:, i].swapaxes(1, 2) for i in range(2))
    check(spec, arrays)


@pytest.mark.parametrize("choice", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_in_place_on_slices_of_one_tensor(choice: int, dtype: str) -> None:
    """The second of a pair computed from a first that has been rotated already."""
    spec = _of_type(CHOICES[choice], dtype, None)
    arrays = make(spec, 8)
    qkv = random_values(np.random.default_rng(1), (8, 1030), dtype)
    arrays["q"], arrays["k"] = qkv[:, 3:387], qkv[:, 387:515]
    arrays["q_out"], arrays["k_out"] = arrays["q"], arrays["k"]
    before = qkv.copy()
    check(spec, arrays, row_tile=4)
    for columns in (slice(0, 3), slice(515, None)):
        assert qkv[:, columns].tobytes() == before[:, columns].tobytes()


#: Cosines and sines that go wrong first.
ANGLES = (0.0, -0.0, 1.0, -1.0, 0.7071, 2.0**-126, 2.0**-133, 3e38, np.inf, np.nan)


@pytest.mark.parametrize("cpu", LEVELS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dtype", [None, "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_pattern(dtype: str, rotary_dtype: str | None, interleaved: bool, cpu: str) -> None:
    """A rounding or a product that is wrong for some element, next to one wrong for others."""
    spec = KernelSpec(
        op="qk_rms_norm_rope", in_dtype=dtype, q_cols=256, k_cols=64, head_dim=64,
        rotary_dim=64, rotary_dtype=rotary_dtype, interleaved=interleaved,
    )  # fmt: skip
    patterns = np.arange(1 << 16, dtype=np.uint16).view(NUMPY_DTYPES[dtype])
    rng = np.random.default_rng(0)
    rows = 2 * len(patterns) // 256
    arrays = make(spec, rows)
    # Every pattern beside chance ones: as the first of a pair and as the second.
    partners = rng.permutation(patterns).reshape(-1, 4, 32)
    ordered = patterns.reshape(-1, 4, 32)
    arrays["q"] = np.concatenate([ordered, partners], axis=2).reshape(rows, 256)
    if interleaved:
        arrays["q"] = np.stack([ordered, partners], axis=3).reshape(rows, 256)
    arrays["gamma_q"][:], arrays["gamma_k"][:] = 3.1, -1
    arrays["gamma_q"][::7] = np.float32(np.nan)
    arrays["gamma_q"].view(np.uint32)[3] = 0x7FFFFFFF
    arrays["qk_var"][:] = rng.choice([1.0, 1e-12, 1e8, 0.0], (rows, 2))
    kind = arrays["cos_sin_cache"].dtype
    angles = rng.choice(np.array(ANGLES, np.float32), (MAX_POSITION, 64))
    with np.errstate(over="ignore"):
        arrays["cos_sin_cache"][:] = angles.astype(kind)
    check(spec, arrays, cpu=cpu, row_tile=4)


@pytest.mark.parametrize("cpu", LEVELS)
@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0**-9, 1 / 3, 3e-38, 1e38, 0.0, np.inf, np.nan])
def test_float8_of_every_bfloat16(scale: float, cpu: str) -> None:
    """A tie, a denormal, a carry into the exponent, or a number beyond 448 rounded wrongly."""
    spec = KernelSpec(
        op="qk_rms_norm_rope_cache", q_cols=64, k_cols=256, head_dim=64, cache_dtype=FLOAT8
    )
    patterns = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    arrays = make(spec, 256)
    arrays["v"] = patterns.reshape(256, 256)
    arrays["slot_mapping"] = np.arange(256)
    arrays["v_scale"] = np.array([scale], np.float32)
    check(spec, arrays, cpu=cpu)
