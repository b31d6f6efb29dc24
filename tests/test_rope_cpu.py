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
from support import LEVELS, OWN, PLAIN, filled, random_values

from qknorm_tvm import KernelSpec
from qknorm_tvm.build.cpu import cpu_features, generate
from qknorm_tvm.build.native import Variant
from qknorm_tvm.check.reference import differing
from qknorm_tvm.check.rope_reference import rope_reference
from qknorm_tvm.schedules.cpu_config import CpuConfig, default_config

torch = pytest.importorskip("torch")

EPSILON = 1e-6
MAX_POSITION = 50
ROPE = KernelSpec(op="qk_rms_norm_rope", q_cols=384, k_cols=128, head_dim=64)
CACHE = ROPE.replace(op="qk_rms_norm_rope_cache")
FLOAT8 = "float8_e4m3fn"


def as_tensor(array: np.ndarray) -> Any:
    """Return a torch tensor on the memory of an array of any strides."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


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
    config = config or default_config(spec, frozenset(cpu_features(cpu)))
    scalars: dict[str, int] = {"row_tiles": len(arrays["q"]) // row_tile}
    for tensor in spec.tensors:
        array = arrays[tensor.name]
        strides = [stride // array.itemsize for stride in array.strides]
        scalars |= dict(zip(tensor.stride_names, strides, strict=False))
    tensors = [as_tensor(arrays[tensor.name]) for tensor in spec.tensors]
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
