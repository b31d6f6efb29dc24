"""Arrays of CuPy, passed by DLPack as they are: every operation, new outputs, streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import qknorm_tvm
from qknorm_tvm import Module
from qknorm_tvm.check import reference

cupy = pytest.importorskip("cupy", reason="passes arrays of CuPy, and CuPy is not installed")

GetModule = Callable[[str], Module]
ROWS, Q_COLS, K_COLS = 300, 1536, 256
EPSILON = 1e-6


def _inputs(dtype: str) -> tuple[list[Any], Any, list[Any]]:
    """Return q and k, statistics, and gammas."""
    rng = np.random.default_rng(0)

    def values(*shape: int) -> Any:
        return cupy.asarray(rng.standard_normal(shape).astype(np.float32))

    x = [values(ROWS, cols).astype(dtype) for cols in (Q_COLS, K_COLS)]
    return x, cupy.abs(values(ROWS, 2)) + np.float32(0.1), [values(Q_COLS), values(K_COLS)]


def _graph(x: list[Any], qk_var: Any, gammas: list[Any], dtype: str) -> list[Any]:
    """Return the unfused graph in CuPy, whose rsqrt is compiled as the module's is."""
    rsqrt = cupy.ElementwiseKernel("float32 x", "float32 y", "y = rsqrtf(x)", "unfused_rsqrt")
    rs = rsqrt(qk_var + np.float32(EPSILON))
    return [
        ((operand.astype(np.float32) * rs[:, i : i + 1]) * gamma).astype(dtype)
        for i, (operand, gamma) in enumerate(zip(x, gammas, strict=True))
    ]


def _check(outputs: Any, wanted: list[Any]) -> None:
    cupy.cuda.Device().synchronize()
    for a, b in zip(outputs, wanted, strict=True):
        assert isinstance(a, cupy.ndarray)
        assert reference.differing(cupy.asnumpy(a), cupy.asnumpy(b)) == 0


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("given", [True, False], ids=["outputs given", "new outputs"])
def test_apply(get_module: GetModule, dtype: str, given: bool) -> None:
    qknorm_tvm.use(get_module("open"))
    x, qk_var, gammas = _inputs(dtype)
    outputs = {f"{tag}_out": cupy.empty_like(operand) for tag, operand in zip("qk", x, strict=True)}
    result = qknorm_tvm.apply_qk_rms_norm(
        *x, qk_var, *gammas, EPSILON, **(outputs if given else {})
    )  # fmt: skip
    _check(result, _graph(x, qk_var, gammas, dtype))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_statistics_and_the_layer(get_module: GetModule, dtype: str) -> None:
    qknorm_tvm.use(get_module("layer"))
    x, _, gammas = _inputs(dtype)
    qk_var = qknorm_tvm.row_mean_of_squares_qk(*x)
    wanted = reference.row_mean_of_squares_qk(*map(cupy.asnumpy, x), order="cuda")
    _check([qk_var], [cupy.asarray(wanted)])
    result = qknorm_tvm.qk_rms_norm(*x, *gammas, EPSILON)
    _check(result, _graph(x, qk_var, gammas, dtype))


def test_stream(get_module: GetModule) -> None:
    """A launch on another stream than the one asked for reads q before it is there."""
    qknorm_tvm.use(get_module("open"))
    (q, k), qk_var, gammas = _inputs("float32")
    outputs = {"q_out": cupy.empty_like(q), "k_out": cupy.empty_like(k)}
    wanted = _graph([q, k], qk_var, gammas, "float32")
    right = q.copy()
    q[...] = 0
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    busy = cupy.ones((4096, 4096), np.float32)
    with stream:
        for _ in range(10):
            busy = busy @ busy * np.float32(1e-4)
        q[...] = right
    result = qknorm_tvm.apply_qk_rms_norm(q, k, qk_var, *gammas, EPSILON, stream=stream, **outputs)
    stream.synchronize()
    _check(result, wanted)
