"""Norm, rotation and paged cache on a GPU: bit for bit the unfused float32 graph of torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
from gpu_calls import torch
from module_list import ROTATING
from test_cuda_calls import _launches
from test_cuda_streams import _capture

import qknorm_tvm
from qknorm_tvm import KernelSpec, Module

GetModule = Callable[[str], Module]
EPSILON, BLOCK_SIZE, POSITIONS = 1e-6, 16, 4096
ROWS = (0, 1, 2, 17, 64, 513, 2049)
LAYOUTS = ("one buffer", "heads first", "misaligned", "in place")


def _bits(x: Any) -> Any:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return x.contiguous().view(kinds[x.element_size()])


def _differing(actual: Any, wanted: Any) -> int:
    """Count what differs: a NaN is any NaN."""
    unequal = _bits(actual) != _bits(wanted)
    both_nan = actual.float().isnan() & wanted.float().isnan()
    return int((unequal & ~both_nan).sum())


class Call:
    """Tensors of a call by name, and what it must write."""

    def __init__(
        self, spec: KernelSpec, rows: int, layout: str = "one buffer", *, scattered: bool = True
    ):
        torch.manual_seed(rows)
        kind, random = getattr(torch, spec.in_dtype), functools.partial(torch.randn, device="cuda")
        widths = (spec.q_cols, spec.k_cols, spec.k_cols)
        odd = layout == "misaligned"
        row = sum(widths) + (1 if odd else 0)
        memory = (random(rows * row + 8) * 2).to(kind)[int(odd) :]
        qkv = memory[: rows * row].view(rows, row)[:, : sum(widths)]
        q, k, v = qkv.split(widths, dim=1)
        self.spec, self.rows = spec, rows
        blocks = -(-2 * rows // BLOCK_SIZE) + 1
        places = torch.randperm(blocks * BLOCK_SIZE, device="cuda")[: rows - rows // 3]
        slots = torch.where(torch.rand(len(places), device="cuda") < 0.2, -1 - places, places)
        if not scattered:
            slots = torch.arange(rows, device="cuda")
        cache_kind = getattr(torch, spec.cache_dtype or spec.in_dtype)
        heads, head_dim = spec.kv_heads, spec.head_dim
        shape = (blocks, 2, BLOCK_SIZE, heads, head_dim + (8 if not odd else 3))
        if layout == "heads first":
            shape = (blocks, 2, heads, BLOCK_SIZE, head_dim)
        caches = random(shape).to(cache_kind)
        if layout == "heads first":
            caches = caches.transpose(2, 3)
        self.caches = caches
        angles = random(POSITIONS, max(spec.rotary_dim, 2))
        tensors = {
            "q": q, "k": k, "v": v,
            "gamma_q": random(spec.q_cols), "gamma_k": random(spec.k_cols),
            "qk_var": torch.rand(rows, 2, device="cuda") + 0.1,
            "positions": torch.randint(0, POSITIONS, (rows,), device="cuda"),
            "cos_sin_cache": angles.to(getattr(torch, spec.rotary_dtype or "float32")),
            "slot_mapping": slots,
            "k_cache": caches[:, 0, ..., :head_dim], "v_cache": caches[:, 1, ..., :head_dim],
            "k_scale": torch.rand(heads, device="cuda") + 0.01,
            "v_scale": torch.rand(1, device="cuda") + 0.01,
            "q_out": q if layout == "in place" else torch.empty_like(q),
            "k_out": k if layout == "in place" else torch.empty_like(k),
        }  # fmt: skip
        names = {tensor.name for tensor in spec.tensors}
        self.tensors = {name: tensors[name] for name in names}

    def arguments(self) -> list[Any]:
        """Return what the entry point takes."""
        return [*(self.tensors.get(name) for name in self.spec.operation.tensors), EPSILON]

    def expected(self, module: Module) -> dict[str, Any]:
        """Compute every output, operation by operation."""
        spec, t = self.spec, self.tensors
        var = t.get("qk_var")
        if var is None:
            var = torch.empty(self.rows, 2, device="cuda")
            module.row_mean_of_squares_qk(var, t["q"], t["k"])
        outputs = {}
        for column, tag in enumerate("qk"):
            x = t[tag]
            rs = torch.rsqrt(var[:, column] + EPSILON)[:, None]
            y = ((x.float() * rs) * t[f"gamma_{tag}"]).to(x.dtype)
            heads = y.view(self.rows, x.shape[1] // spec.head_dim, spec.head_dim)
            outputs[f"{tag}_out"] = self._rotated(heads).reshape(x.shape)
        if spec.operation.has_cache:
            where = t["slot_mapping"] >= 0
            slots, stored = t["slot_mapping"][where], len(where)
            for tag, x in (("k", outputs["k_out"]), ("v", t["v"])):
                cache = t[f"{tag}_cache"].clone()
                rows = x[:stored][where].reshape(len(slots), spec.kv_heads, spec.head_dim)
                if spec.has_scales:
                    scaled = rows.float() / t[f"{tag}_scale"].view(1, -1, 1)
                    rows = scaled.clamp(-448, 448).to(cache.dtype)
                bits = _bits(rows) if spec.has_scales else rows
                target = cache.view(bits.dtype) if spec.has_scales else cache
                target[slots // BLOCK_SIZE, slots % BLOCK_SIZE] = bits
                outputs[f"{tag}_cache"] = cache
        return {name: value for name, value in outputs.items() if name in t}

    def _rotated(self, heads: Any) -> Any:
        half = self.spec.rotary_dim // 2
        if not half:
            return heads
        angles = self.tensors["cos_sin_cache"][self.tensors["positions"]].float()[:, None]
        c, s = angles[..., :half], angles[..., half:]
        if self.spec.interleaved:
            first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        else:
            first, second = slice(0, half), slice(half, 2 * half)
        a, b, out = heads[..., first].float(), heads[..., second].float(), heads.clone()
        out[..., first] = (a * c - b * s).to(heads.dtype)
        out[..., second] = (b * c + a * s).to(heads.dtype)
        return out

    def check(self, module: Module) -> None:
        expected = self.expected(module)
        beside = self.caches[..., self.spec.head_dim :].clone()
        getattr(module, self.spec.op)(*self.arguments())
        torch.cuda.synchronize()
        for name, wanted in expected.items():
            assert _differing(self.tensors[name], wanted) == 0, name
        assert _differing(self.caches[..., self.spec.head_dim :], beside) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index", range(len(ROTATING)))
def test_equals_the_unfused_graph(get_module: GetModule, index: int, layout: str) -> None:
    """Another kernel for some rows or layout; a partner, slot or scale of another row or head."""
    module = get_module("rotating")
    for rows in ROWS:
        Call(ROTATING[index], rows, layout).check(module)


@pytest.mark.parametrize("index", [0, 2])
def test_every_pattern(get_module: GetModule, index: int) -> None:
    """Every bfloat16 through norm and rotation, with special cosines."""
    spec = ROTATING[index]
    rows = 2 * 65536 // spec.k_cols
    call = Call(spec, rows)
    patterns = torch.arange(65536, device="cuda").to(torch.int16).view(torch.bfloat16)
    for tag, cols in (("q", spec.q_cols), ("k", spec.k_cols)):
        count = -(-rows * cols // 65536)
        call.tensors[tag][...] = patterns.repeat(count)[: rows * cols].view(rows, cols)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-30, float("inf"), float("nan"), 0.7])
    cache = call.tensors["cos_sin_cache"]
    cache[:8] = special[:, None].to(cache)
    cache[8:16, ::2] = special[:, None].to(cache)
    call.tensors["positions"] %= 24
    call.check(get_module("rotating"))


def test_every_pattern_over_scales(get_module: GetModule) -> None:
    """A float8 that is not the nearest: every bfloat16 as V, by scales of all sizes."""
    spec = next(spec for spec in ROTATING if spec.has_scales)
    call = Call(spec, 65536 // spec.k_cols)
    patterns = torch.arange(65536, device="cuda").to(torch.int16).view(torch.bfloat16)
    call.tensors["v"][...] = patterns.view(call.rows, spec.k_cols)
    scales = [0.0, -0.0, 1.0, 2.0**-60, 2.0**60, 2.0**-61, 2.0**61, 1e-45, 3e38, math.inf]
    scales += [math.nan, 1 / 3, 0.1, -0.7, 448.0, 1 / 448, 0.99999994, 1.0000001]
    for scale in [*scales, *torch.rand(100).tolist()]:
        call.tensors["v_scale"].fill_(scale)
        call.check(get_module("rotating"))


def test_replayed_in_a_graph(get_module: GetModule) -> None:
    """Slots and positions are read when the graph runs, as decoding needs."""
    module, spec = get_module("rotating"), ROTATING[0]
    call = Call(spec, 16)
    graph = _capture(lambda: module.qk_rms_norm_rope_cache(*call.arguments()))
    for seed in range(3):
        fresh = Call(spec, 16 + seed)
        call.tensors["positions"].copy_(fresh.tensors["positions"][:16])
        call.tensors["slot_mapping"].copy_(torch.roll(call.tensors["slot_mapping"], 1))
        expected = call.expected(module)
        graph.replay()
        torch.cuda.synchronize()
        for name, wanted in expected.items():
            assert _differing(call.tensors[name], wanted) == 0, name


@pytest.mark.parametrize("index", range(len(ROTATING)))
def test_one_kernel_a_call(get_module: GetModule, index: int) -> None:
    spec, module = ROTATING[index], get_module("rotating")
    call = Call(spec, 64)
    assert _launches(lambda: getattr(module, spec.op)(*call.arguments())) == 1


def test_the_python_api_takes_the_module(get_module: GetModule) -> None:
    """And checks positions and slots where it is asked to."""
    spec, module = ROTATING[1], get_module("rotating")
    call = Call(spec, 9)
    qknorm_tvm.use(module)
    names = [*spec.operation.signature[:7], "k_cache", "v_cache", "slot_mapping"]
    given = {name: call.tensors[name] for name in names}
    expected = call.expected(module)
    q_out, k_out = qknorm_tvm.qk_rms_norm_rope_cache(**given, head_dim=128)
    assert k_out is None
    assert _differing(q_out, expected["q_out"]) == 0
    assert _differing(given["k_cache"], expected["k_cache"]) == 0
    given["positions"] = given["positions"] + POSITIONS
    message = f"^positions must be less than cos_sin_cache's {POSITIONS} rows, and 0 or more, got "
    with pytest.raises(ValueError, match=message):
        qknorm_tvm.qk_rms_norm_rope_cache(**given, head_dim=128, validate=True)
    given["positions"] = call.tensors["positions"]
    given["slot_mapping"] = given["slot_mapping"] + 10**6
    with pytest.raises(ValueError, match=r"^slot_mapping must be less than k_cache's "):
        qknorm_tvm.qk_rms_norm_rope_cache(**given, head_dim=128, validate=True)
