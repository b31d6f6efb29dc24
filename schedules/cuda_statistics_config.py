"""Which kernels the operations that add up rows get on CUDA by default. Imports no TVM.

Not measured yet: the borders are those of `cuda_config`, and the rest follows from it. A block is a
row's warps, so that many rows need several in one block (823 blocks start in a microsecond), and a
row of many warps needs several vectors a thread, so that a multiprocessor has several blocks of
which one loads while another adds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .cuda_config import (
    _BATCH_VECTORS,
    _MANY_BLOCKS,
    ACCESS_BYTES,
    CudaConfig,
    CudaVariant,
    _ceil_div,
    _reachable,
    _stream_rows,
)

if TYPE_CHECKING:
    from qknorm_tvm.spec import KernelSpec

#: Neighbouring columns of a thread, and the columns of a warp's vectors: the order of summation.
VECTOR, CHUNK = 8, 256
# Warps of a row from which a thread has two vectors of it where there are many rows.
_MANY_WARPS = 16
# Vectors of a row from which a thread normalises one row.
_LONG_ROW = 160


def stride_unit(spec: KernelSpec) -> int:
    """Return the elements to whose multiples row strides are aligned with every access."""
    narrowest = min(spec.in_bytes, spec.out_bytes) if spec.operation.normalises else spec.in_bytes
    return ACCESS_BYTES // narrowest


def has_whole_vectors(spec: KernelSpec) -> bool:
    """Return whether Q's and K's columns are fixed, and whole vectors."""
    return all(cols is not None and cols % VECTOR == 0 for cols in (spec.q_cols, spec.k_cols))


def _aligned(spec: KernelSpec, name: str, config: CudaConfig, min_rows: int = 1) -> CudaVariant:
    return CudaVariant(
        name=name,
        config=config,
        min_rows=min_rows,
        stride_unit=stride_unit(spec),
        alignment=ACCESS_BYTES,
    )


def _aligned_variants(spec: KernelSpec) -> list[CudaVariant]:
    cols = (spec.q_cols or 0, spec.k_cols or 0)
    vectors, warps = sum(cols) // VECTOR, sum(_ceil_div(one, CHUNK) for one in cols)
    columns = 2 if warps > _MANY_WARPS else 1
    if spec.operation.normalises:
        rows = 1 if vectors >= _LONG_ROW else 2 if vectors >= _LONG_ROW // 2 else 4
    else:
        rows = 4 // columns

    def variant(name: str, min_rows: int, **choices: Any) -> CudaVariant:
        return _aligned(spec, name, CudaConfig(**choices), min_rows)

    many: dict[str, Any] = {"rows": rows, "columns": columns}
    return [
        variant("prefill", max(_MANY_BLOCKS, _stream_rows(spec)), **many),
        variant("resident", _MANY_BLOCKS, **many, streaming_stores=True),
        variant(
            "batch",
            _ceil_div(_BATCH_VECTORS, vectors),
            columns=columns,
            dependent_launch="after_loads",
            streaming_stores=True,
        ),
        variant("decode", 1),
    ]


def _general_variants(spec: KernelSpec) -> list[CudaVariant]:
    choices: dict[str, Any] = {"vector": 1, "dependent_launch": "after_loads"}
    return [
        CudaVariant(
            name="general_prefill", config=CudaConfig(rows=2, **choices), min_rows=_MANY_BLOCKS
        ),
        CudaVariant(name="general", config=CudaConfig(**choices)),
    ]


def default_variants(spec: KernelSpec, config: CudaConfig | None) -> list[CudaVariant]:
    """Choose the kernels; see `cuda_config.default_variants`, which asks here.

    A given config of a vector of 1 is for any layout, any other for vectors of 8 columns.
    """
    general = _general_variants(spec)
    if config is None:
        return _reachable((_aligned_variants(spec) if has_whole_vectors(spec) else []) + general)
    if config.vector == 1:
        return [CudaVariant(name="given", config=config)]
    for name in ("q_cols", "k_cols"):
        cols = getattr(spec, name)
        if cols is None or cols % VECTOR:
            raise ValueError(
                f"{name} must be a multiple of {VECTOR} for accesses of several elements, got "
                f"{cols}"
            )
    return [_aligned(spec, "given", config), *general]
