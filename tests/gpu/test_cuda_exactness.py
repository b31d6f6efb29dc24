"""Every output equals the unfused torch graph on the same GPU, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from gpu_calls import check, make_call, torch
from module_list import DTYPES, FIXED, PAIRINGS

from qknorm_tvm import Module
from qknorm_tvm.check import expected
from qknorm_tvm.check.verification import Report, run_case
from qknorm_tvm.check.verification_cuda import Cuda

GetModule = Callable[[str], Module]


def _verify(module: Module, wanted: Callable[..., bool] = lambda spec: True) -> Report:
    report = Report()
    for spec in filter(wanted, module.specs):
        for case in Cuda().cases(module, spec):
            run_case(module, case, Cuda(), report)
    return report


@pytest.mark.parametrize(
    ("in_dtype", "out_dtype", "q_cols", "k_cols"), FIXED, ids=lambda value: str(value)
)
def test_fixed_columns(
    get_module: GetModule, in_dtype: str, out_dtype: str, q_cols: int, k_cols: int
) -> None:
    """Every pattern, special variances and gammas, odd rows, every layout, where kernels change."""
    module = get_module("fixed")
    wanted = (in_dtype, out_dtype, q_cols, k_cols)
    report = _verify(module, lambda s: (s.in_dtype, s.out_dtype, s.q_cols, s.k_cols) == wanted)
    assert report.groups["shapes and layouts"].torch_elements > 0
    assert report.exact, report.first_difference


@pytest.mark.parametrize(("in_dtype", "out_dtype"), PAIRINGS)
def test_open_columns(get_module: GetModule, in_dtype: str, out_dtype: str) -> None:
    """Columns 1, 7, 257, 1537, 1536, 8192 of Q and of K, in every pairing of dtypes."""
    report = _verify(
        get_module("open"), lambda s: (s.in_dtype, s.out_dtype) == (in_dtype, out_dtype)
    )
    assert report.exact, report.first_difference


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_reproducible_equals_the_cpu(get_module: GetModule, dtype: str) -> None:
    """rsqrt as 1 / sqrt: what the GPU writes is what NumPy computes, bit for bit."""
    report = _verify(get_module("reproducible"), lambda s: s.in_dtype == dtype)
    assert sum(tally.elements for tally in report.groups.values()) > 1_000_000
    assert report.exact, report.first_difference


@pytest.mark.parametrize("index", range(4))
def test_cast_before_gamma(get_module: GetModule, index: int) -> None:
    """A rounding that is dropped: MiniMax-M2's order of operations."""
    module = get_module("cast_before_gamma")
    report = _verify(module, lambda spec: spec == module.specs[index])
    assert report.groups["cast_before_gamma: shapes and layouts"].torch_elements > 0
    assert report.exact, report.first_difference


def test_a_difference_would_be_seen(get_module: GetModule) -> None:
    """A comparison that compares nothing."""
    module = get_module("single")
    (spec,) = module.specs
    case = next(Cuda().cases(module, spec))
    broken = expected.torch_outputs
    try:
        expected.torch_outputs = lambda a, *rest, **how: tuple(-x for x in broken(a, *rest, **how))
        report = Report()
        run_case(module, case, Cuda(), report)
    finally:
        expected.torch_outputs = broken
    assert not report.exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 64, 1024, 16384])
def test_many_rows(get_module: GetModule, dtype: str, rows: int) -> None:
    check(get_module("fixed"), make_call(rows, in_dtype=dtype))


def test_epsilon_of_zero_and_large(get_module: GetModule) -> None:
    for epsilon in (0.0, 1e-5, 1.0):
        call = make_call(33)
        call.epsilon = epsilon
        check(get_module("single"), call)


def test_code_for_an_older_gpu_runs(get_module: GetModule) -> None:
    """PTX of sm_80: launched without dependent launch, for which it does not wait."""
    for rows in (1, 17, 300, 2000):
        check(get_module("older_gpu"), make_call(rows))


def test_more_than_two_to_the_31_elements(get_module: GetModule) -> None:
    """32-bit indices, which overflow at M * Nq = 2^31."""
    rows = (1 << 31) // 1536 + 1000
    free, _ = torch.cuda.mem_get_info()
    needed = 2 * rows * (1536 + 256) * 2 + (2 << 30)
    if free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} GB are free")
    call = make_call(1)
    last = 4096
    q = torch.zeros(rows, 1536, dtype=torch.bfloat16, device="cuda")
    k = torch.zeros(rows, 256, dtype=torch.bfloat16, device="cuda")
    q[-last:] = torch.randn(last, 1536, device="cuda")
    k[-last:] = torch.randn(last, 256, device="cuda")
    call.q, call.k = q, k
    call.q_out, call.k_out = torch.empty_like(q), torch.empty_like(k)
    call.poison()
    call.qk_var = torch.rand(rows, 2, device="cuda") + 0.5
    call.run(get_module("single"))
    tail = make_call(last)
    tail.q, tail.k, tail.qk_var = q[-last:], k[-last:], call.qk_var[-last:]
    tail.gamma_q, tail.gamma_k = call.gamma_q, call.gamma_k
    tail.q_out, tail.k_out = call.q_out[-last:], call.k_out[-last:]
    assert tail.is_exact(tail.expected())
    assert not call.q_out[:-last].count_nonzero()
    assert not call.k_out[:-last].count_nonzero()
    del call, tail, q, k
    torch.cuda.empty_cache()
