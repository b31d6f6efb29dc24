"""Statistics and the fused operation on a GPU: order, layouts, streams, graphs, accuracy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gpu_calls import equal_bits, torch
from module_list import STATISTICS
from test_cuda_calls import _launches
from test_cuda_streams import _capture

import qknorm_tvm
from qknorm_tvm import Module
from qknorm_tvm.check import reference
from qknorm_tvm.check.reference_torch import row_mean_of_squares_qk as torch_mean
from qknorm_tvm.check.reference_torch import to_numpy
from qknorm_tvm.check.verification import Report, run_case
from qknorm_tvm.check.verification_cuda import Cuda

GetModule = Callable[[str], Module]
OPS = ("row_mean_of_squares_qk", "qk_rms_norm")
ROWS = (1, 3, 64, 200, 1100, 2000, 16384)


def _inputs(rows: int, q_cols: int = 1536, k_cols: int = 256, dtype: str = "bfloat16") -> Any:
    generator = torch.Generator(device="cuda").manual_seed(rows)
    kind = getattr(torch, dtype)
    return [
        torch.randn(rows, cols, device="cuda", generator=generator).to(kind)
        for cols in (q_cols, k_cols)
    ]


def _gammas(q: Any, k: Any) -> list[Any]:
    return [1 + torch.randn(x.shape[1], device="cuda") / 8 for x in (q, k)]


def _statistics(module: Module, q: Any, k: Any) -> Any:
    out = torch.full((len(q), 2), float("nan"), device="cuda")
    module.row_mean_of_squares_qk(out, q, k)
    return out


def _verify(module: Module, wanted: Callable[..., bool]) -> Report:
    report = Report()
    for spec in filter(wanted, module.specs):
        for case in Cuda().cases(module, spec):
            run_case(module, case, Cuda(), report)
    assert report.groups
    return report


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("dtype", "q_cols", "k_cols"), STATISTICS, ids=lambda value: str(value))
def test_order_and_outputs(
    get_module: GetModule, op: str, dtype: str, q_cols: int | None, k_cols: int | None
) -> None:
    """Another order of summation in some kernel, for some bits, rows or layout."""
    wanted = (op, dtype, q_cols, k_cols)
    report = _verify(
        get_module("layer"), lambda s: (s.op, s.in_dtype, s.q_cols, s.k_cols) == wanted
    )
    assert report.exact, report.first_difference


def test_other_outputs(get_module: GetModule) -> None:
    report = _verify(get_module("layer_other_outputs"), lambda spec: True)
    assert report.exact, report.first_difference


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("rows", ROWS)
def test_fused_is_statistics_then_apply(get_module: GetModule, rows: int, dtype: str) -> None:
    """Statistics in registers that are not those in memory."""
    module = get_module("layer")
    q, k = _inputs(rows, dtype=dtype)
    gammas = _gammas(q, k)
    fused, two = ([torch.empty_like(x) for x in (q, k)] for _ in range(2))
    qk_var = _statistics(module, q, k)
    module.apply_qk_rms_norm(*two, *gammas, qk_var, q, k, 1e-6)
    module.qk_rms_norm(*fused, *gammas, q, k, 1e-6)
    assert all(equal_bits(a, b) for a, b in zip(fused, two, strict=True))
    module.qk_rms_norm(q, k, *gammas, q, k, 1e-6)  # in place
    assert all(equal_bits(a, b) for a, b in zip((q, k), two, strict=True))


def test_a_row_depends_on_nothing_but_the_row(get_module: GetModule) -> None:
    """A sum that changes with the batch, the kernel or the run."""
    module = get_module("layer")
    q, k = _inputs(16384)
    wanted = _statistics(module, q, k)
    for rows in (1, 7, 64, 300, 1100, 2001, 16383, 16384):
        for _ in range(3):
            assert equal_bits(_statistics(module, q[:rows], k[:rows]), wanted[:rows])
    # And rows that only the kernel for any layout takes.
    odd = [torch.empty(512, x.shape[1] + 3, device="cuda", dtype=x.dtype)[:, 3:] for x in (q, k)]
    for to, x in zip(odd, (q, k), strict=True):
        to.copy_(x[:512])
    assert equal_bits(_statistics(module, *odd), wanted[:512])


@pytest.mark.parametrize("cols", [(1536, 256), (6144, 1024), (640, 128)])
def test_error_is_at_most_that_of_torch(get_module: GetModule, cols: tuple[int, int]) -> None:
    """A faster sum that is a worse one. Relative errors against float64, of 16,384 rows."""
    q, k = _inputs(16384, *cols)
    exact = torch.stack([x.double().pow(2).mean(-1) for x in (q, k)], dim=1)

    def errors(means: Any) -> Any:
        return (means.double() - exact).abs() / exact

    ours, theirs = errors(_statistics(get_module("layer"), q, k)), errors(torch_mean(q, k))
    assert (ours.mean(dim=0) <= 1.05 * theirs.mean(dim=0)).all()
    assert (ours.amax(dim=0) <= theirs.amax(dim=0) + 2.0**-24).all()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("rows", [0, 1, 300, 2000])
def test_launches(get_module: GetModule, rows: int) -> None:
    """No rows launch nothing; else one kernel a call."""
    module = get_module("layer")
    q, k = _inputs(rows)
    gammas, outs = _gammas(q, k), [torch.empty_like(x) for x in (q, k)]
    var = torch.empty(rows, 2, device="cuda")
    calls = (
        functools.partial(module.row_mean_of_squares_qk, var, q, k),
        functools.partial(module.qk_rms_norm, *outs, *gammas, q, k, 1e-6),
    )
    for call in calls:
        call()
        assert _launches(call) == min(rows, 1)


def _chain_is_right(module: Module, rows: int, dtype: str, *, length: int = 20) -> bool:
    """Run statistics, apply and the fused operation, each reading what the one before wrote."""
    q, k = _inputs(rows, dtype=dtype)
    gammas = _gammas(q, k)
    made, expected = [], []
    current = (q, k)
    for _ in range(length):
        var = torch.empty(rows, 2, device="cuda")
        outs = [[torch.empty_like(x) for x in (q, k)] for _ in range(2)]
        made.append((current, var, *outs))
        current = outs[1]

    def run(wait: bool) -> None:
        for (a, b), var, applied, fused in made:
            module.row_mean_of_squares_qk(var, a, b)
            if wait:
                torch.cuda.synchronize()
            module.apply_qk_rms_norm(*applied, *gammas, var, a, b, 1e-6)
            if wait:
                torch.cuda.synchronize()
            module.qk_rms_norm(*fused, *gammas, *applied, 1e-6)
            if wait:
                torch.cuda.synchronize()

    def written() -> list[Any]:
        return [x for _, var, applied, fused in made for x in (var, *applied, *fused)]

    run(wait=True)
    expected = [x.clone() for x in written()]
    graph = _capture(lambda: run(wait=False))
    for _ in range(5):
        for x in written():
            x.fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        if not all(equal_bits(a, b) for a, b in zip(written(), expected, strict=True)):
            return False
    return True


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rows", [1, 16, 300, 1100, 2000])
def test_a_chain_reads_what_the_kernel_before_wrote(
    get_module: GetModule, rows: int, dtype: str
) -> None:
    """A load before the wait for the previous kernel, under programmatic dependent launch."""
    assert _chain_is_right(get_module("layer"), rows, dtype)


def test_the_chain_test_fails_without_the_wait(get_module: GetModule) -> None:
    module = get_module("layer_without_wait")
    assert not all(_chain_is_right(module, rows, "float16") for rows in (1, 16, 300, 1100, 2000))


def test_stream_of_torch_and_given_streams(get_module: GetModule) -> None:
    """A launch on the default stream."""
    qknorm_tvm.use(get_module("layer"))
    q, k = _inputs(64)
    wanted = reference.row_mean_of_squares_qk(*(to_numpy(x.cpu()) for x in (q, k)), order="cuda")
    slow = torch.randn(6000, 6000, device="cuda")
    stream, right = torch.cuda.Stream(), q.clone()
    for given in (True, False):
        q.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            late = slow @ slow @ slow
            q.copy_(right + (late.sum() * 0).nan_to_num().to(q.dtype))
            if not given:
                qk_var = qknorm_tvm.row_mean_of_squares_qk(q, k)
        if given:
            qk_var = qknorm_tvm.row_mean_of_squares_qk(q, k, stream=stream)
        stream.synchronize()
        assert np.array_equal(qk_var.cpu().numpy(), wanted)


def test_api(get_module: GetModule) -> None:
    """Slices of a fused projection, outputs allocated on the device."""
    qknorm_tvm.use(get_module("layer"))
    qkv = torch.randn(65, 1536 + 2 * 256, device="cuda").to(torch.bfloat16)
    q, k = qkv[:, :1536], qkv[:, 1536:1792]
    gammas = _gammas(q, k)
    qk_var = qknorm_tvm.row_mean_of_squares_qk(q, k)
    fused = qknorm_tvm.qk_rms_norm(q, k, *gammas)
    applied = qknorm_tvm.apply_qk_rms_norm(q, k, qk_var, *gammas)
    assert all(equal_bits(a, b) for a, b in zip(fused, applied, strict=True))
    assert qk_var.device == q.device
