"""Rotation and paged caches on CUDA: bits of the generated kernels, run on the CPU.

What only a device shows is tested in ``gpu/``. ``QKNORM_TVM_CAMPAIGN=1`` takes more of each.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from cuda_code import scheduled
from cuda_emulation import Kernel, with_reciprocals

from qknorm_tvm import KernelSpec
from qknorm_tvm.build import cuda as build_cuda
from qknorm_tvm.check import reference
from qknorm_tvm.check.inputs import generate
from qknorm_tvm.check.reference import NUMPY_DTYPES
from qknorm_tvm.declare.statistics import CHUNK, WARP
from qknorm_tvm.schedules import cuda_device
from qknorm_tvm.schedules.cuda_config import CudaVariant
from qknorm_tvm.schedules.cuda_row_config import operand_cols, partition_chunks
from qknorm_tvm.schedules.cuda_variants import default_variants

ROPE, CACHE = "qk_rms_norm_rope", "qk_rms_norm_rope_cache"
ROWS, POSITIONS, BLOCKS, BLOCK_SIZE = 3, 40, 3, 4
EPSILON = 1e-6
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)

_SLOW = pytest.mark.slow
_CAMPAIGN = bool(os.environ.get("QKNORM_TVM_CAMPAIGN"))

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


# ---- calls -------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Layout:
    """How a call's tensors lie: slices of one tensor or apart, outputs in place, heads first."""

    odd: bool = False
    in_place: bool = False
    heads_first: bool = False
    slots: tuple[int, ...] = (7, -1, 2)


LAYOUTS = (
    _Layout(),
    _Layout(in_place=True, heads_first=True, slots=(11, 0)),
    _Layout(odd=True, in_place=True, slots=(3, 8, 9)),
)


class _Memory:
    """Tensors by name, in memory that is compared as a whole."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.allocations: dict[str, npt.NDArray] = {}

    def place(self, name: str, x: npt.NDArray, strides: tuple[int, ...], odd: bool) -> npt.NDArray:
        """Copy to memory with strides of its own, counted in elements; odd: off by an element."""
        size = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) + 1
        raw = self.rng.integers(0, 200, (size + 1) * x.itemsize + 64, np.uint8)
        start = -raw.ctypes.data % 64 + odd * x.itemsize
        flat = raw[start : start + size * x.itemsize].view(x.dtype)
        self.allocations[name] = raw
        view = np.lib.stride_tricks.as_strided(flat, x.shape, [s * x.itemsize for s in strides])
        view[...] = x
        return view


def _rotated(x: npt.NDArray, spec: KernelSpec, cos_sin: npt.NDArray) -> npt.NDArray:
    """Rotate a normalised operand by the rows' cosines and sines; each step is rounded."""
    half = spec.rotary_dim // 2
    y = x.reshape(len(x), -1, spec.head_dim).copy()
    first, second = slice(0, half), slice(half, 2 * half)
    if spec.interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    a, b = y[..., first].astype(np.float32), y[..., second].astype(np.float32)
    c, s = (part.astype(np.float32)[:, None] for part in (cos_sin[:, :half], cos_sin[:, half:]))
    with np.errstate(all="ignore"):
        y[..., first] = (a * c - b * s).astype(x.dtype)
        y[..., second] = (b * c + a * s).astype(x.dtype)
    return y.reshape(x.shape)


def _stored(x: npt.NDArray, spec: KernelSpec, scale: npt.NDArray | None) -> npt.NDArray:
    """Return heads as a cache holds them."""
    heads = x.reshape(len(x), spec.kv_heads, spec.head_dim)
    if scale is None:
        return heads
    with np.errstate(all="ignore"):
        quotient = heads.astype(np.float32) / np.broadcast_to(scale, spec.kv_heads)[:, None]
        return np.clip(quotient, np.float32(-448), np.float32(448)).astype(FLOAT8)


def _kernel(spec: KernelSpec, variant: CudaVariant) -> Kernel:
    return Kernel(build_cuda.cuda_source([("emulated", scheduled(spec, variant))]))


def _inputs(spec: KernelSpec, seed: int) -> dict[str, npt.NDArray]:
    assert spec.q_cols is not None
    assert spec.k_cols is not None
    rng = np.random.default_rng(seed)
    a = generate(ROWS, spec.q_cols, spec.k_cols, spec.in_dtype, seed=seed)
    x = {"gamma_q": a.gamma_q, "gamma_k": a.gamma_k, "q": a.q.copy(), "k": a.k.copy()}
    x["v"] = (40 * rng.standard_normal(a.k.shape)).astype(a.k.dtype)
    for name, value in (("q", np.inf), ("k", np.nan), ("v", -np.inf), ("v", np.nan)):
        x[name][ROWS - 1, rng.integers(0, x[name].shape[1])] = value
    x["q"][0, : spec.q_cols // 2] = -0.0  # products and sums of zeros have signs
    x["positions"] = rng.permutation(POSITIONS)[:ROWS].astype(np.int64)
    angles = rng.uniform(0, 6.3, (POSITIONS, spec.rotary_dim // 2))
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    table[0], table[1] = 0.0, -0.0
    x["cos_sin_cache"] = table.astype(NUMPY_DTYPES[spec.rotary_dtype or "float32"])
    x["positions"][0] = seed % 2
    for tag in "kv":
        count = spec.kv_heads if seed % 2 else 1
        x[f"{tag}_scale"] = rng.uniform(0.02, 0.3, count).astype(np.float32)
    return x


def _check(spec: KernelSpec, variant: CudaVariant, kernel: Kernel, layout: _Layout, seed: int):
    x, memory, unit = _inputs(spec, seed), _Memory(seed), variant.stride_unit
    # What is wanted.
    qk_var = reference.row_mean_of_squares_qk(x["q"], x["k"], order="cuda")
    normalised = reference.apply_qk_rms_norm(
        x["q"], x["k"], qk_var, x["gamma_q"], x["gamma_k"], EPSILON,
        cast_before_gamma=spec.cast_before_gamma,
    )  # fmt: skip
    cos_sin = x["cos_sin_cache"][x["positions"]]
    wanted = dict(zip("qk", (_rotated(y, spec, cos_sin) for y in normalised), strict=True))
    # Where tensors lie.
    arrays: dict[str, npt.NDArray] = {"qk_var": qk_var}
    for name in ("gamma_q", "gamma_k", "positions", "k_scale", "v_scale"):
        arrays[name] = memory.place(name, x[name], (1,), odd=False)
    for name in ("q", "k", "v", "cos_sin_cache"):
        stride = x[name].shape[1] + (3 if layout.odd else 16)
        arrays[name] = memory.place(name, x[name], (stride, 1), layout.odd)
    given = {tensor.name for tensor in spec.tensors}
    for tag in "qk":
        out = f"{tag}_out"
        if layout.in_place and out in given:
            arrays[out] = arrays[tag]
        elif out in given:
            cols = x[tag].shape[1]
            arrays[out] = memory.place(out, np.zeros_like(x[tag]), (cols + 8, 1), layout.odd)
    slots = np.array(layout.slots, np.int64)
    arrays["slot_mapping"] = memory.place("slot_mapping", slots, (1,), odd=False)
    cache_dtype = FLOAT8 if spec.has_scales else NUMPY_DTYPES[spec.in_dtype]
    for name in {"k_cache", "v_cache"} & given:
        shape = (BLOCKS, BLOCK_SIZE, spec.kv_heads, spec.head_dim)
        inner = spec.head_dim + (1 if layout.odd else 16)
        slot, head = inner * spec.kv_heads, inner
        if layout.heads_first:
            slot, head = inner, inner * BLOCK_SIZE
        block = inner * spec.kv_heads * BLOCK_SIZE + (5 if layout.odd else 32)
        zeros = np.zeros(shape, cache_dtype)
        arrays[name] = memory.place(name, zeros, (block, slot, head, 1), layout.odd)
    # What memory is to hold afterwards.
    before = {name: raw.copy() for name, raw in memory.allocations.items()}
    scalars: dict[str, Any] = {"epsilon": EPSILON, "row_tiles": ROWS, "slots": len(slots)}
    scalars |= {"block_size": BLOCK_SIZE, "blocks": BLOCKS, "max_position": POSITIONS}
    scalars |= {f"{tag}_scale_count": len(x[f"{tag}_scale"]) for tag in "kv"}
    for tensor in spec.tensors:
        strides = arrays[tensor.name].strides[:-1]
        own = [s // arrays[tensor.name].itemsize for s in strides]
        for name, stride in zip(
            tensor.stride_names or ["qk_var_stride"] * len(own), own, strict=True
        ):
            assert name == "qk_var_stride" or stride % unit == 0
            scalars[name] = stride if name == "qk_var_stride" else stride // unit
    kernel(_blocks(spec, variant, kernel), {**arrays, **scalars}, reverse=seed % 2 == 1)
    about = (variant.name, layout)
    for name in ("q_out", "k_out"):
        if name in given:
            assert reference.differing(arrays[name], wanted[name[0]]) == 0, (name, *about)
            arrays[name][...] = 0
    for tag in "kv":
        name = f"{tag}_cache"
        if name in given:
            stored = np.zeros_like(arrays[name])
            scale = x[f"{tag}_scale"] if spec.has_scales else None
            heads = _stored(wanted["k"] if tag == "k" else x["v"], spec, scale)
            for row, slot in enumerate(layout.slots):
                if slot >= 0:
                    stored[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = heads[row]
            assert reference.differing(arrays[name], stored) == 0, (name, *about)
            arrays[name][...] = 0
    # Nothing else was written.
    for name, raw in memory.allocations.items():
        if layout.in_place and name in ("q", "k") and f"{name}_out" in given:
            arrays[name][...] = x[name]
        assert (raw == before[name]).all(), (name, *about)


def _blocks(spec: KernelSpec, variant: CudaVariant, kernel: Any) -> int:
    """Return the size of the grid: blocks of so many threads, for all warps of all rows."""
    chunks = [-(-(cols or 1) // CHUNK) for cols in operand_cols(spec)]
    partition = partition_chunks(chunks, variant.config.columns)
    assert partition is not None
    tiles = -(-ROWS // variant.config.rows)
    return tiles * sum(partition[1]) * WARP // kernel.threads


def _check_all(spec: KernelSpec, variants: list[CudaVariant] | None = None) -> None:
    checked = {}
    for variant in variants or default_variants(spec):
        kernel = _kernel(spec, variant)
        for seed, layout in enumerate(LAYOUTS):
            if not layout.odd or variant.alignment is None:
                _check(spec, variant, kernel, layout, seed)
                checked[variant.name] = True
    assert checked
    assert len(checked) == len({variant.name for variant in variants or default_variants(spec)})


def _spec(
    op: str, dtype: str, q_heads: int, k_heads: int, head_dim: int, **fields: Any
) -> KernelSpec:
    return KernelSpec(
        op=op, in_dtype=dtype, q_cols=q_heads * head_dim, k_cols=k_heads * head_dim,
        head_dim=head_dim, target="cuda:sm_90", **fields,
    )  # fmt: skip


# ---- tests -------------------------------------------------------------------------------------

CASES = {
    # Partners by shuffles: a part of a head, all of it, chunks that are not whole.
    "64 of 128": _spec(CACHE, "bfloat16", 12, 2, 128, rotary_dim=64),
    "local": _spec(CACHE, "bfloat16", 3, 1, 128, rotary_dim=64, statistics="local"),
    "all of 128": _spec(ROPE, "float16", 5, 1, 128, rotary_dim=128, statistics="local"),
    "64 of 64": _spec(ROPE, "float32", 7, 1, 64, rotary_dim=64),
    "256": _spec(CACHE, "bfloat16", 3, 1, 256, rotary_dim=256, writes_k_out=True),
    "32 of 96": _spec(ROPE, "bfloat16", 8, 3, 96, rotary_dim=32, cast_before_gamma=True),
    # Partners read again.
    "32 of 80": _spec(CACHE, "bfloat16", 10, 2, 80, rotary_dim=32, statistics="local"),
    "all of 80": _spec(CACHE, "float32", 5, 2, 80, rotary_dim=80, writes_k_out=True),
    "96 of 96": _spec(ROPE, "bfloat16", 6, 2, 96, rotary_dim=96),
    # Only elements, one by one.
    "20 of 30": _spec(CACHE, "bfloat16", 9, 5, 30, rotary_dim=20, writes_k_out=True),
    "10 of 11": _spec(CACHE, "float16", 9, 5, 11, rotary_dim=10, interleaved=True),
    # Pairs of neighbours.
    "interleaved": _spec(CACHE, "bfloat16", 4, 2, 128, rotary_dim=64, interleaved=True),
    "interleaved 80": _spec(
        ROPE, "float32", 6, 2, 80, rotary_dim=80, interleaved=True, statistics="local"
    ),
    # Types of the cosines and of the cache; no rotation.
    "float32 cosines": _spec(ROPE, "bfloat16", 4, 2, 64, rotary_dim=32, rotary_dtype="float32"),
    "float8": _spec(CACHE, "bfloat16", 4, 2, 64, rotary_dim=64, cache_dtype="float8_e4m3fn"),
    "float8 of float32": _spec(
        CACHE, "float32", 2, 2, 40, rotary_dim=8, cache_dtype="float8_e4m3fn", writes_k_out=True
    ),
    "no rotation": _spec(CACHE, "bfloat16", 5, 3, 64, statistics="local", writes_k_out=True),
    "long": _spec(CACHE, "bfloat16", 48, 8, 128, rotary_dim=64, statistics="local"),
}  # fmt: skip
_FEW = ("20 of 30",)
#: Between others.
_MORE = ("all of 128", "64 of 64", "96 of 96", "32 of 96", "all of 80", "float32 cosines", "long")


@pytest.mark.parametrize(
    "name",
    [
        name if name in _FEW else pytest.param(name, marks=_SLOW)
        for name in CASES
        if _CAMPAIGN or name not in _MORE
    ],
)
def test_default_kernels(name: str) -> None:
    """A partner of another head, a step that is not rounded, a slot's row in another's place."""
    _check_all(CASES[name])


_DIVISIONS = """
static uint64_t state = 1;
static uint32_t random_bits() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return state >> 32;
}
static void divide DIVIDE
static long differing(const float* x, const float* scales) {
  unsigned char float8[8];
  divide(x, scales, float8);
  long count = 0;
  for (int e = 0; e < 8; ++e) {
    unsigned char wanted = round_to_e4m3(x[e] / scales[e]);
    bool nan = (float8[e] & wanted & 0x7f) == 0x7f;
    count += float8[e] != wanted && !nan;
  }
  return count;
}
/* By each of the reciprocals that a GPU may have. */
static long differing_one(float x, float scale) {
  float many[8], one[8];
  std::fill(many, many + 8, x);
  std::fill(one, one + 8, scale);
  return differing(many, one);
}
/* Every bfloat16 over some scales; random numbers. */
extern "C" long differing_of(const float* scale, long scales, long random) {
  long count = 0;
  float x[8], s[8];
  for (long i = 0; i < scales; ++i) {
    std::fill(s, s + 8, scale[i]);
    for (uint32_t bits = 0; bits < 65536; bits += 8) {
      for (int e = 0; e < 8; ++e) x[e] = __uint_as_float((bits + e) << 16);
      count += differing(x, s);
    }
  }
  for (long i = 0; i < random; ++i) {
    for (int e = 0; e < 8; ++e) {
      s[e] = __uint_as_float((random_bits() & 0x81ffffff) | 0x3e000000);
      /* Quotients from float8's smallest to beyond its largest. */
      uint32_t significand = random_bits() & 0x807fffff, exponent = 115 + random_bits() % 24;
      x[e] = s[e] * __uint_as_float(significand | exponent << 23);
    }
    count += differing(x, s);
  }
  return count;
}
/* Quotients next to where a float8 is decided, half a float32's unit beside a midpoint: those of
   every step-th x of 24 bits over the two scales whose quotients are nearest. Other scales' are
   further away, by 2^-25 of themselves, than what one correction leaves. */
extern "C" long differing_where_decided(long step) {
  long count = 0;
  for (int64_t midpoint = 1; midpoint < 32; midpoint += 2) {
    int bits = 32 - __builtin_clz(midpoint);
    for (int above = 0; above < 2; ++above) {
      /* Of 25 bits; below a power of two units are half as large. */
      int64_t place = midpoint << (25 - bits);
      place = above ? place + 1 : midpoint == 1 ? 2 * place - 1 : place - 1;
      for (int64_t x = 1 << 23; x < 1 << 24; x += step) {
        int64_t scale = (x << 25) / place;
        for (int64_t near = scale; near <= scale + 1; ++near) {
          /* As a normal float8's midpoint, of 5 bits, or a denormal one's. */
          int exponent = ilogbf((float)x / near);
          int wanted = midpoint > 15 ? 4 : bits - 11 - (midpoint == 1 && !above);
          count += differing_one(ldexpf(x, wanted - exponent - 14), ldexpf(near, -14));
        }
      }
    }
  }
  return count;
}
"""


def test_division_by_scales(tmp_path: Path) -> None:
    """A quotient that is not the nearest, where it decides: the kernels divide by steps."""
    source, library = tmp_path / "divide.cpp", tmp_path / "divide.so"
    code = with_reciprocals(cuda_device._OVER_SCALES).replace("COUNT", "8")
    code = _DIVISIONS.replace("DIVIDE", code)
    source.write_text(f'#include "cuda_emulation.h"\n{code}')
    options = ["-O2", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "-w"]
    folder = Path(__file__).parent / "native"
    subprocess.run(["g++", *options, f"-I{folder}", source, "-o", library], check=True)
    functions = ctypes.CDLL(str(library))
    for function in (functions.differing_of, functions.differing_where_decided):
        function.restype = ctypes.c_long
    functions.differing_of.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
    functions.differing_where_decided.argtypes = [ctypes.c_long]
    # All of 11 bits, or of 24: three minutes.
    assert functions.differing_where_decided(1 if _CAMPAIGN else 1 << 13) == 0
    special = [0.0, -0.0, 1.0, 2.0**-60, 2.0**60, 2.0**-61, 2.0**61, 1e-45, 3e38, np.inf, np.nan]
    special += [np.nextafter(np.float32(x), np.float32(0)) for x in (1, 2, 4, 2.0**-60, 2.0**60)]
    special += [1 / 3, 0.1, -0.7, 448, 1 / 448, -np.inf, -1e-45, 1e30, 1e-30]
    drawn = np.random.default_rng(0).uniform(0.001, 2, 2000 if _CAMPAIGN else 40)
    scales = np.array([*special, *drawn], np.float32)
    count = 10**8 if _CAMPAIGN else 10**6
    assert functions.differing_of(scales.ctypes.data, len(scales), count) == 0
