"""Statistics on CUDA: order and indexing of the generated kernels, run on the CPU.

What only a device shows, memory, streams and speed, is tested in ``gpu/``.
``QKNORM_TVM_CAMPAIGN=1`` takes more columns and dtypes.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

import numpy as np
import pytest
from cuda_emulation import Kernel
from support import DTYPES

from qknorm_tvm import KernelSpec
from qknorm_tvm.build import cuda as build_cuda
from qknorm_tvm.check import reference
from qknorm_tvm.check.cases import shape_case
from qknorm_tvm.check.expected import Graph, outputs_of
from qknorm_tvm.check.inputs import Activations, generate
from qknorm_tvm.check.layouts import PADDED, Placed, layouts_for
from qknorm_tvm.check.reference import NUMPY_DTYPES
from qknorm_tvm.declare import statistics as declared
from qknorm_tvm.declare.norm import declare
from qknorm_tvm.schedules.cuda_config import CudaConfig, CudaVariant
from qknorm_tvm.schedules.cuda_variants import default_variants

SM_90 = "cuda:sm_90"
STATISTICS, FUSED = "row_mean_of_squares_qk", "qk_rms_norm"
#: Whole chunks, a part of one, less than a vector, an odd number, more chunks than slots.
COLUMNS = ((1536, 256), (640, 128), (7, 1), (1537, 257), (8200, 64))

_SLOW = pytest.mark.slow
_CAMPAIGN = bool(os.environ.get("QKNORM_TVM_CAMPAIGN"))

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def test_the_reference_has_the_declared_order() -> None:
    """A reference that sums in another order proves nothing."""
    wanted = (declared.VECTOR, declared.WARP, declared.SLOTS)
    assert wanted == (reference.VECTOR, reference.WARP, reference.SLOTS)


@pytest.mark.parametrize(
    ("q_cols", "k_cols"),
    [
        (1537, 257),
        *(pytest.param(*cols, marks=_SLOW) for cols in (*COLUMNS[:3], (8200, 64), (17000, 3))),
    ],
)
def test_the_declaration_equals_the_reference(q_cols: int, k_cols: int) -> None:
    """The declaration of CUDA's order, compiled as it stands for this CPU."""
    import tvm

    from qknorm_tvm.targets import host_cpu_target

    if host_cpu_target() == "x86-64-v2":
        pytest.skip("this CPU has no fused multiply-add")
    spec = KernelSpec(op=STATISTICS, in_dtype="float32", q_cols=q_cols, k_cols=k_cols, target=SM_90)
    built = tvm.compile(
        tvm.IRModule({"main": declare(spec)}),
        target=tvm.target.Target({"kind": "llvm", "mcpu": host_cpu_target()}),
    )
    a = generate(5, q_cols, k_cols, "float32", seed=1)
    qk_var = np.zeros((5, 2), np.float32)
    arrays = [tvm.runtime.tensor(x) for x in (qk_var, a.q, a.k)]
    built["main"](*arrays, 5, q_cols, k_cols)
    wanted = reference.row_mean_of_squares_qk(a.q, a.k, order="cuda")
    assert reference.differing(arrays[0].numpy(), wanted) == 0


def _kernel(spec: KernelSpec, variant: CudaVariant) -> Kernel:
    func = build_cuda.scheduled_variant(spec, variant)
    return Kernel(build_cuda.cuda_source([("emulated", func)]))


def _fits(variant: CudaVariant, arrays: dict[str, Any]) -> bool:
    """Return whether the entry point would choose a kernel for a layout."""
    for name, x in arrays.items():
        if x.ctypes.data % (variant.alignment or 1) and name != "qk_var":
            return False
        if x.ndim == 2 and name != "qk_var":
            stride = x.strides[0] // x.itemsize if len(x) > 1 else x.shape[1]
            if stride % variant.stride_unit:
                return False
    return True


def _run(
    spec: KernelSpec, variant: CudaVariant, kernel: Kernel, arrays: dict[str, Any], reverse: bool
) -> None:
    rows = len(arrays["q"])
    strides = {
        f"{name}_stride": x.strides[0] // x.itemsize // (1 if name == "qk_var" else
                                                        variant.stride_unit)
        for name, x in arrays.items() if x.ndim == 2
    }  # fmt: skip
    scalars = {"epsilon": 1e-6, "row_tiles": rows}
    scalars |= {f"{tag}_cols": arrays[tag].shape[1] for tag in ("q", "k")}
    blocks = -(-rows // variant.config.rows)
    kernel(blocks, {**arrays, **strides, **scalars}, reverse=reverse)


def _check(spec: KernelSpec, variant: CudaVariant, cases: list[Activations]) -> int:
    """Check a kernel in every layout that it takes; return how many."""
    kernel, checked = _kernel(spec, variant), 0
    for number, a in enumerate(cases):
        outputs = outputs_of(Graph("cuda"), a, spec)
        for layout in (*layouts_for(spec), PADDED):
            placed = Placed(spec, a, layout, by_element=True)
            arrays = placed.arrays
            if not _fits(variant, arrays):
                continue
            checked += 1
            _run(spec, variant, kernel, arrays, reverse=number % 2 == 1)
            for name, wanted in zip(spec.operation.outputs, outputs, strict=True):
                assert reference.differing(arrays[name], wanted) == 0, layout
            assert placed.guards_intact(), layout
    return checked


def _cases(spec: KernelSpec, q_cols: int, k_cols: int, rows: int) -> list[Activations]:
    """Return ordinary rows, and rows with every kind of number."""
    special = shape_case(spec, rows, q_cols, k_cols, seed=rows).make()
    return [generate(rows, q_cols, k_cols, spec.in_dtype, seed=2), special]


def _different(variants: list[CudaVariant]) -> list[CudaVariant]:
    """Leave out kernels that differ in nothing that the emulation knows of."""
    by_code = {(v.config.rows, v.config.columns, v.alignment): v for v in variants}
    return list(by_code.values())


# Fast tests emulate kernels with these sums in those of rotation and of several ranks.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "dtype", "q_cols", "k_cols"),
    [
        (FUSED, "bfloat16", 1536, 256),
        (FUSED, "float32", 1537, 257),
        (STATISTICS, "bfloat16", 8200, 64),
        *(
            (op, dtype, *columns)
            for op in (STATISTICS, FUSED)
            for dtype in DTYPES
            for columns in COLUMNS
            if _CAMPAIGN
        ),
    ],
)
def test_default_kernels(op: str, dtype: str, q_cols: int, k_cols: int) -> None:
    """Another order of summation, a column left out or counted twice, a write beside an output."""
    spec = KernelSpec(op=op, in_dtype=dtype, q_cols=q_cols, k_cols=k_cols, target=SM_90)
    checked = {}
    for variant in _different(default_variants(spec)):
        cases = _cases(spec, q_cols, k_cols, 3)
        checked[variant.name] = _check(spec, variant, cases)
    assert all(checked.values()), checked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "q_cols", "k_cols"),
    [
        (FUSED, 64, 8200),
        *((op, 1537, 257) for op in (STATISTICS, FUSED) if _CAMPAIGN),
    ],
)
def test_open_columns(op: str, q_cols: int, k_cols: int) -> None:
    """Rounds over chunks: a slot's chunks in another order, or of another row."""
    kinds = (("bfloat16", True, True), ("float32", False, True))
    for dtype, open_q, open_k in kinds if _CAMPAIGN else kinds[:1]:
        spec = KernelSpec(
            op=op, in_dtype=dtype, target=SM_90,
            q_cols=None if open_q else q_cols, k_cols=None if open_k else k_cols,
        )  # fmt: skip
        for variant in _different(default_variants(spec)):
            assert _check(spec, variant, _cases(spec, q_cols, k_cols, 3))


@pytest.mark.slow
@pytest.mark.parametrize("op", [STATISTICS, FUSED])
def test_a_row_that_registers_do_not_hold(op: str) -> None:
    """More warps than a block may have, and more vectors than a thread holds."""
    spec = KernelSpec(op=op, q_cols=32768, k_cols=1024, target=SM_90)
    for variant in default_variants(spec)[:1]:
        assert _check(spec, variant, _cases(spec, 32768, 1024, 2))


@pytest.mark.slow
@pytest.mark.parametrize(("op", "vector"), [(STATISTICS, 1), (FUSED, 8)])
def test_the_order_does_not_depend_on_the_config(op: str, vector: int) -> None:
    """A choice of the schedule that changes results."""
    spec = KernelSpec(op=op, q_cols=1800, k_cols=520, target=SM_90)
    for rows, columns in ((1, 1), (1, 4), (3, 2)):
        config = CudaConfig(rows=rows, columns=columns, vector=vector, dependent_launch="off")
        variant = default_variants(spec, config)[0]
        assert _check(spec, variant, _cases(spec, 1800, 520, 4)[:1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("in_dtype", "out_dtype", "cast_before_gamma"),
    [("bfloat16", "float32", True), *([("float32", "float16", False)] if _CAMPAIGN else [])],
)
def test_other_outputs(in_dtype: str, out_dtype: str, cast_before_gamma: bool) -> None:
    """Strides of outputs counted in the inputs' elements; a rounding that is dropped."""
    spec = KernelSpec(
        op=FUSED, in_dtype=in_dtype, out_dtype=out_dtype, q_cols=1536, k_cols=264,
        cast_before_gamma=cast_before_gamma, target=SM_90,
    )  # fmt: skip
    for variant in _different(default_variants(spec)):
        assert _check(spec, variant, _cases(spec, 1536, 264, 3))


def test_a_difference_would_be_seen() -> None:
    """A comparison that compares nothing: sums in the CPU's order are others."""
    a = generate(64, 1536, 256, "bfloat16", seed=2)
    orders = [reference.row_mean_of_squares_qk(a.q, a.k, order=order) for order in ("cpu", "cuda")]
    assert reference.differing(*orders) > 0
    assert NUMPY_DTYPES["float32"] == orders[0].dtype


@pytest.mark.frameworks
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_that_of_torch(dtype: str) -> None:
    """A faster sum that is a worse one. Relative errors against float64, of 1,024 rows."""
    pytest.importorskip("torch", reason="torch is not installed")
    from support import to_torch

    from qknorm_tvm.check.reference_torch import row_mean_of_squares_qk as by_torch

    for cols in ((1536, 256), (6144, 1024), (640, 128)):
        a = generate(1024, *cols, dtype, seed=1)
        exact = np.stack([(x.astype(np.float64) ** 2).mean(axis=1) for x in (a.q, a.k)], axis=1)
        ours = reference.row_mean_of_squares_qk(a.q, a.k, order="cuda")
        torchs = by_torch(to_torch(a.q), to_torch(a.k)).numpy()
        ours, torchs = (np.abs(x.astype(np.float64) - exact) / exact for x in (ours, torchs))
        assert (ours.mean(axis=0) <= 1.05 * torchs.mean(axis=0)).all(), cols
        assert (ours.max(axis=0) <= torchs.max(axis=0) + 2.0**-24).all(), cols
