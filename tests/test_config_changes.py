"""Changing fields of the heuristic's config: which make a difference, and what stays."""

from __future__ import annotations

import dataclasses
import functools

import pytest

import qknorm_tvm
from qknorm_tvm import KernelSpec
from qknorm_tvm.build import cpu, cuda
from qknorm_tvm.schedules import cpu_config, cuda_variants
from qknorm_tvm.schedules.cpu_config import CpuConfig
from qknorm_tvm.schedules.cuda_config import CudaConfig
from qknorm_tvm.schedules.cuda_variants import changed_variants, default_variants

APPLY, STATISTICS, FUSED = "apply_qk_rms_norm", "row_mean_of_squares_qk", "qk_rms_norm"

CPU_SPECS = (
    KernelSpec(op=APPLY, in_dtype="float32", q_cols=96, k_cols=32),
    KernelSpec(op=STATISTICS, q_cols=96, k_cols=32),
    KernelSpec(op=APPLY, q_cols=96, k_cols=32),
)
CPU_BASE = CpuConfig(vector=16, row_tile=2, rounding="shift")
CPU_OTHER = {
    "vector": 32, "row_tile": 4, "rounding": "mask", "bytes_per_task": 1 << 12,
    "streaming_bytes": 0,
}  # fmt: skip


@functools.cache
def _cpu_code(spec: KernelSpec, config: CpuConfig) -> tuple:
    """Return the machine code of a spec, and what the entry point is told of it."""
    variants = cpu.variants_of(spec, config, "f")
    module = cpu.generate("x86-64-v3", [(spec, config, variant) for variant in variants])
    return module.inspect_source("asm"), tuple(dataclasses.astuple(variant) for variant in variants)


@pytest.mark.parametrize("field", CPU_OTHER)
@pytest.mark.parametrize("spec", CPU_SPECS, ids=str)
def test_cpu_fields_that_count_are_those_that_change_code(spec: KernelSpec, field: str) -> None:
    """A choice that is taken and does nothing; a choice that works and is refused."""
    changed = dataclasses.replace(CPU_BASE, **{field: CPU_OTHER[field]})
    differs = _cpu_code(spec, CPU_BASE) != _cpu_code(spec, changed)
    assert differs is (field in cpu_config.fields_used(spec))


CUDA_SPECS = tuple(
    KernelSpec(op=op, q_cols=1024, k_cols=512, target="cuda:sm_90") for op in (STATISTICS, FUSED)
)
CUDA_BASE = CudaConfig()
CUDA_OTHER = {
    "threads": 64, "columns": 2, "rows": 2, "dependent_launch": "off", "grid_order": "rows",
    "streaming_stores": True,
}  # fmt: skip


@functools.cache
def _cuda_code(spec: KernelSpec, config: CudaConfig) -> str:
    (variant, *_) = default_variants(spec, config)
    return cuda.cuda_source([("f", cuda.scheduled_variant(spec, variant))])


@pytest.mark.parametrize("field", CUDA_OTHER)
@pytest.mark.parametrize(
    "spec", [CUDA_SPECS[0], pytest.param(CUDA_SPECS[1], marks=pytest.mark.slow)], ids=str
)
def test_cuda_fields_that_count_are_those_that_change_code(spec: KernelSpec, field: str) -> None:
    changed = dataclasses.replace(CUDA_BASE, **{field: CUDA_OTHER[field]})
    differs = _cuda_code(spec, CUDA_BASE) != _cuda_code(spec, changed)
    assert differs is (field in cuda_variants.fields_used(spec))


@pytest.mark.parametrize("op", [APPLY, STATISTICS, FUSED])
def test_cuda_changes_keep_what_is_not_named(op: str) -> None:
    spec = KernelSpec(op=op, q_cols=1536, k_cols=256, target="cuda:sm_90")
    changed = changed_variants(spec, {"dependent_launch": "off"})
    before = default_variants(spec)
    assert [variant.name for variant in changed] == [variant.name for variant in before]
    for new, old in zip(changed, before, strict=True):
        assert new.config == dataclasses.replace(old.config, dependent_launch="off")
        assert (new.min_rows, new.alignment) == (old.min_rows, old.alignment)


def test_cuda_vector_is_for_aligned_rows() -> None:
    spec = KernelSpec(q_cols=1536, k_cols=256, target="cuda:sm_90")
    general = [variant for variant in default_variants(spec) if variant.alignment is None]
    narrow = changed_variants(spec, {"vector": 4, "rows": 3})
    for variant in narrow:
        assert variant.config.rows == 3
        assert (variant.config.vector, variant.stride_unit) == (
            (1, 1) if variant.alignment is None else (4, 4)
        )
    assert changed_variants(spec, {"vector": 1}) == general
    with pytest.raises(ValueError, match="q_cols must be a multiple of the config's vector of 8"):
        changed_variants(spec.replace(q_cols=1537), {"vector": 8})
    # Columns that the widest accesses do not fit still have narrower ones.
    odd = changed_variants(spec.replace(q_cols=1540), {"vector": 4})
    assert odd[0].config.vector == 4


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"colour": 1}, ValueError, r"config must have fields of CpuConfig, vector, .*'colour'"),
        ({"rounding": "mask"}, ValueError, r"config must not have rounding for .*float32"),
        ({"vector": 3}, ValueError, "vector must be a power of two, got 3"),
        ({"row_tile": "2"}, TypeError, "row_tile must be an int, got str"),
    ],
)
def test_wrong_changes_are_refused(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        qknorm_tvm.compile(CPU_SPECS[0], config=changes)
