"""`row_mean_of_squares_qk` and `qk_rms_norm` on CPUs: exact order, accuracy, layouts, errors."""

from __future__ import annotations

import functools
import itertools
import os
from typing import Any

import numpy as np
import pytest
from support import (
    DTYPES,
    FIXED_COLUMNS,
    LEVELS,
    OWN,
    PAIRINGS,
    PLAIN,
    needs_level,
    statistics_and_fused,
)

import qknorm_tvm
from qknorm_tvm import KernelSpec, Module, compile, load
from qknorm_tvm.call import arrays
from qknorm_tvm.check import reference
from qknorm_tvm.check.calls import operation_arguments
from qknorm_tvm.check.cases import pattern_case, shape_case
from qknorm_tvm.check.inputs import Activations, generate
from qknorm_tvm.check.layouts import LAYOUTS, Placed
from qknorm_tvm.check.reference import NUMPY_DTYPES
from qknorm_tvm.declare.statistics import LANES, STEPS
from qknorm_tvm.targets import host_cpu_target

#: Beside `FIXED_COLUMNS`: through the module's open columns.
OPEN = ((1, 63), (64, 1024), (127, 640), (2111, 7))
ROWS = (0, 1, 3, 9)


@functools.cache
def module_of(in_dtype: str) -> Module:
    return load(statistics_and_fused(in_dtype))


def statistics(module: Module, q: Any, k: Any, out: Any = None) -> Any:
    """Call the entry point on NumPy arrays, whatever their layout."""
    out = np.full((len(q), 2), 7, np.float32) if out is None else out
    adapted = [arrays.adapter_of("q", x).view("q", x, writable=True) for x in (q, k)]
    module.row_mean_of_squares_qk(out, *adapted, 1)
    return out


def fused(module: Module, a: Activations, q_out: Any, k_out: Any) -> None:
    view = arrays.adapter_of("q", a.q).view
    given = (q_out, k_out, a.gamma_q, a.gamma_k, a.q, a.k)
    module.qk_rms_norm(*(view("q", x, writable=True) for x in given), a.epsilon, 1)


def apply_reference(a: Activations, qk_var: Any, out_dtype: str, **how: Any) -> Any:
    return reference.apply_qk_rms_norm(
        a.q, a.k, qk_var, a.gamma_q, a.gamma_k, a.epsilon, out_dtype, **how
    )


def test_the_reference_has_the_declared_order() -> None:
    """A reference that sums in another order proves nothing."""
    assert (reference.LANES, reference.STEPS) == (LANES, STEPS)


def test_the_reference_rounds_once() -> None:
    """Double rounding: a float64 sum that lies on a tie of float32 after it was rounded."""
    from fractions import Fraction

    rng = np.random.default_rng(0)
    total = np.exp2(rng.uniform(-60, 60, 4000)).astype(np.float32)
    x = np.exp2(rng.uniform(-40, 40, 4000)).astype(np.float32)
    # Squares of half a unit in the last place of the total: where roundings meet.
    x[::2] = np.sqrt(total[::2]) * np.float32(2.0**-12.5) * rng.choice([1, 1.5, 0.7071], 2000)
    sums = reference._add_square(x, total)
    for value, before, after in zip(x, total, sums, strict=True):
        exact = Fraction(float(value)) ** 2 + Fraction(float(before))
        near = [after, np.nextafter(after, np.float32(0)), np.nextafter(after, np.float32(np.inf))]
        gaps = [abs(Fraction(float(value)) - exact) for value in near]
        assert gaps[0] == min(gaps)


#: Without fused multiply-add the sum itself differs: one dtype shows it.
_DEFAULT = ((PLAIN, "float32"), (OWN, "bfloat16"))


@pytest.mark.parametrize(
    ("level", "in_dtype"),
    [
        pytest.param(*pair, marks=() if pair in _DEFAULT else pytest.mark.slow)
        for pair in itertools.product(LEVELS, DTYPES)
    ],
)
def test_statistics_and_fused_equal_the_reference(level: str, in_dtype: str) -> None:
    """Another order of summation on some level, tail, layout or number of threads."""
    needs_level(level)
    module = load(statistics_and_fused(in_dtype, level))
    set_threads = module.library.get_function("qknorm_set_num_threads")
    for cols in (*FIXED_COLUMNS, *OPEN):
        for rows in ROWS:
            case = shape_case(KernelSpec(in_dtype=in_dtype), rows, *cols, seed=rows)
            a = case.make()
            wanted = reference.row_mean_of_squares_qk(a.q, a.k, fused=level != "x86-64-v2")
            outputs = apply_reference(a, wanted, in_dtype)
            for layout in LAYOUTS:
                set_threads(1 if layout == "fused" else 0)
                placed = Placed(KernelSpec(op="qk_rms_norm", in_dtype=in_dtype), a, layout)
                given = placed.arrays
                qk_var = statistics(module, given["q"], given["k"])
                assert reference.differing(qk_var, wanted) == 0, (cols, rows, layout)
                module.qk_rms_norm(*operation_arguments("qk_rms_norm", given, a.epsilon))
                for name, expected in zip(("q_out", "k_out"), outputs, strict=True):
                    assert reference.differing(given[name], expected) == 0, (cols, rows, layout)
                assert placed.guards_intact()
    set_threads(0)


def test_epsilon_is_added_to_the_rounded_mean() -> None:
    """A mean over a power of two of columns, multiplied and added in one rounding.

    The mean lies between two denormals, and epsilon is the smallest.
    """
    spec = KernelSpec(
        op="qk_rms_norm", in_dtype="float32", q_cols=1024, k_cols=64, target=host_cpu_target()
    )
    q, k = np.zeros((1, 1024), np.float32), np.ones((1, 64), np.float32)
    q[0, :3] = 2.0**-70
    gammas = [np.ones(n, np.float32) for n in (1024, 64)]
    outs = [np.empty_like(q), np.empty_like(k)]
    compile(spec).module.qk_rms_norm(*outs, *gammas, q, k, 1e-45)
    var = reference.row_mean_of_squares_qk(q, k)
    wanted = reference.apply_qk_rms_norm(q, k, var, *gammas, 1e-45)
    for actual, expected in zip(outs, wanted, strict=True):
        assert reference.differing(actual, expected) == 0


_MORE_KINDS = (
    *((*pairing, False) for pairing in PAIRINGS[1:]),
    ("bfloat16", "bfloat16", True),
    ("float16", "bfloat16", True),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("in_dtype", "out_dtype", "cast_before_gamma"),
    [
        ("bfloat16", "bfloat16", False),
        ("bfloat16", "float32", True),
        *(_MORE_KINDS if os.environ.get("QKNORM_TVM_CAMPAIGN") else _MORE_KINDS[::2]),
    ],
)
def test_fused_is_statistics_then_apply(
    in_dtype: str, out_dtype: str, cast_before_gamma: bool
) -> None:
    """Two roundings where the two steps have one, for any bits and any pairing of types."""
    spec = KernelSpec(
        op="qk_rms_norm", in_dtype=in_dtype, out_dtype=out_dtype,
        cast_before_gamma=cast_before_gamma, q_cols=197, k_cols=64, target=host_cpu_target(),
    )  # fmt: skip
    apply_spec = spec.replace(op="apply_qk_rms_norm")
    module = compile(
        [spec, apply_spec, spec.replace(op="row_mean_of_squares_qk", out_dtype="float32",
                                        cast_before_gamma=False)]
    ).module  # fmt: skip
    makes = [shape_case(apply_spec, 37, 197, 64).make]
    makes += [pattern_case(apply_spec, 197, 64, gamma).make for gamma in (0, 2, 4)]
    for make in makes:
        a = make()
        qk_var = statistics(module, a.q, a.k)
        wanted = apply_reference(a, qk_var, out_dtype, cast_before_gamma=cast_before_gamma)
        outs = [np.empty(x.shape, NUMPY_DTYPES[out_dtype]) for x in (a.q, a.k)]
        fused(module, a, *outs)
        for actual, expected in zip(outs, wanted, strict=True):
            assert reference.differing(actual, expected) == 0
        # The same order in the operation that takes its statistics, with special ones too.
        view = arrays.adapter_of("q", a.q).view
        given = (*outs, a.gamma_q, a.gamma_k, a.qk_var, a.q, a.k)
        module.apply_qk_rms_norm(*(view("q", x, writable=True) for x in given), a.epsilon, 1)
        wanted = apply_reference(a, a.qk_var, out_dtype, cast_before_gamma=cast_before_gamma)
        for actual, expected in zip(outs, wanted, strict=True):
            assert reference.differing(actual, expected) == 0


@pytest.mark.slow
def test_a_row_depends_on_nothing_but_the_row() -> None:
    """A sum that changes with the batch: logits that change with who else is served."""
    module = module_of("float32")
    a = generate(4096, 1536, 256, "float32", seed=3)
    set_threads = module.library.get_function("qknorm_set_num_threads")
    set_threads(1)
    alone = np.concatenate(
        [statistics(module, a.q[i : i + 1], a.k[i : i + 1]) for i in range(0, 4096, 64)]
    )
    for threads in (1, 2, 3, 0):
        set_threads(threads)
        for _ in range(3):
            together = statistics(module, a.q, a.k)
            assert np.array_equal(together[::64], alone)
            assert np.array_equal(together[:100], statistics(module, a.q[:100], a.k[:100]))
    set_threads(0)


@pytest.mark.frameworks
@pytest.mark.parametrize("in_dtype", DTYPES)
def test_error_is_at_most_that_of_torch(in_dtype: str) -> None:
    """A faster sum that is a worse one. Relative errors against float64, of 4,096 rows."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from support import to_torch

    from qknorm_tvm.check.reference_torch import row_mean_of_squares_qk as by_torch

    module = module_of(in_dtype)
    for cols in ((1536, 256), (6144, 1024), (4096, 4096), (640, 128)):
        a = generate(4096, *cols, in_dtype, seed=1)
        exact = np.stack([(x.astype(np.float64) ** 2).mean(axis=1) for x in (a.q, a.k)], axis=1)
        errors = {
            name: np.abs(sums.astype(np.float64) - exact) / exact
            for name, sums in {
                "ours": statistics(module, a.q, a.k),
                "torch": by_torch(to_torch(a.q), to_torch(a.k)).numpy(),
            }.items()
        }
        assert torch.get_default_dtype() == torch.float32
        mean = {name: error.mean(axis=0) for name, error in errors.items()}
        worst = {name: error.max(axis=0) for name, error in errors.items()}
        # Two good sums differ by chance: 5 % of the mean error, a rounding of the worst.
        assert (mean["ours"] <= 1.05 * mean["torch"]).all(), (cols, mean)
        assert (worst["ours"] <= worst["torch"] + 2.0**-24).all(), (cols, worst)


@pytest.mark.slow
def test_api_takes_what_apply_takes() -> None:
    a = generate(5, 192, 64, "bfloat16", seed=2)
    qk_var = qknorm_tvm.row_mean_of_squares_qk(a.q, a.k)
    assert isinstance(qk_var, np.ndarray)
    assert reference.differing(qk_var, reference.row_mean_of_squares_qk(a.q, a.k)) == 0
    given = np.zeros((5, 2), np.float32)
    assert qknorm_tvm.row_mean_of_squares_qk(a.q, a.k, qk_var_out=given) is given
    assert np.array_equal(given, qk_var)
    for how in ({}, {"out_dtype": "float32"}, {"cast_before_gamma": True}):
        fused = qknorm_tvm.qk_rms_norm(a.q, a.k, a.gamma_q, a.gamma_k, a.epsilon, **how)
        separate = qknorm_tvm.apply_qk_rms_norm(
            a.q, a.k, qk_var, a.gamma_q, a.gamma_k, a.epsilon, **how
        )
        for actual, wanted in zip(fused, separate, strict=True):
            assert reference.differing(actual, wanted) == 0
    q, k = a.q.copy(), a.k.copy()
    out = qknorm_tvm.qk_rms_norm(q, k, a.gamma_q, a.gamma_k, q_out=q, k_out=k)
    assert out[0] is q
    wanted = qknorm_tvm.qk_rms_norm(a.q, a.k, a.gamma_q, a.gamma_k)
    assert reference.differing(q, wanted[0]) == reference.differing(k, wanted[1]) == 0


@pytest.mark.frameworks
def test_api_on_torch_tensors() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from qknorm_tvm.check.reference_torch import row_mean_of_squares_qk as by_torch

    qkv = torch.randn(6, 192 + 64 + 64).bfloat16()
    q, k = qkv[:, :192], qkv[:, 192:256]
    qk_var = qknorm_tvm.row_mean_of_squares_qk(q, k)
    assert isinstance(qk_var, torch.Tensor)
    torch.testing.assert_close(qk_var, by_torch(q, k), rtol=1e-6, atol=0)
    gammas = torch.rand(192), torch.rand(64)
    fused = qknorm_tvm.qk_rms_norm(q, k, *gammas)
    separate = qknorm_tvm.apply_qk_rms_norm(q, k, qk_var, *gammas)
    assert all(torch.equal(a, b) for a, b in zip(fused, separate, strict=True))
    with pytest.raises(ValueError, match=r"^q must not require grad"):
        qknorm_tvm.row_mean_of_squares_qk(q.float().requires_grad_(), k.float())


def _wrong(**changes: Any) -> dict[str, Any]:
    a = generate(4, 192, 64, "bfloat16", seed=0)
    return {"q": a.q, "k": a.k, "qk_var_out": np.zeros((4, 2), np.float32), **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": "text"}, TypeError, "q must be a NumPy array, .* got str"),
        ({"q": np.zeros((4, 192))}, TypeError, "q must be one of bfloat16, .* got float64"),
        ({"q": np.zeros(4, np.float32)}, ValueError, "q must have 2 dimensions, got 1"),
        ({"k": np.zeros((4, 64), np.float32)}, TypeError, "k must be bfloat16, got float32"),
        ({"k": np.zeros((3, 64), "bfloat16")}, ValueError, "k must have 4 rows like q, got 3"),
        ({"qk_var_out": np.zeros((4, 3), np.float32)}, ValueError, "qk_var must have 2 columns"),
        ({"qk_var_out": np.zeros((4, 2))}, TypeError, "qk_var must be float32, got float64"),
        ({"qk_var_out": np.zeros((3, 2), np.float32)}, ValueError, "qk_var must have 4 rows"),
        (
            {"qk_var_out": np.broadcast_to(np.zeros(2, np.float32), (4, 2))},
            ValueError,
            "qk_var_out must be writable",
        ),
        ({"stream": 1}, ValueError, "stream must be None for tensors on the CPU"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    """A wrong call that computes, or an error that does not say what is wrong."""
    import ml_dtypes

    changes = {
        name: value.astype(ml_dtypes.bfloat16) if getattr(value, "dtype", None) == "bfloat16"
        else value for name, value in changes.items()
    }  # fmt: skip
    arguments = _wrong(**changes)
    with pytest.raises(error, match=f"^{message}"):
        qknorm_tvm.row_mean_of_squares_qk(**arguments)
    out = arguments["qk_var_out"]
    assert not np.any(out)


def test_outputs_that_overlap_inputs_are_refused() -> None:
    """Statistics written over the rows that are still to be read."""
    memory = np.ones((4, 256), np.float32)
    with pytest.raises(ValueError, match=r"^qk_var must not overlap k, got tensors that share"):
        qknorm_tvm.row_mean_of_squares_qk(
            memory[:, :192].copy(), memory[:, 64:], qk_var_out=memory[:, 64:66]
        )
    gammas = np.ones(192, np.float32), np.ones(64, np.float32)
    with pytest.raises(ValueError, match=r"^q_out must be q itself"):
        qknorm_tvm.qk_rms_norm(
            memory[:, :192], memory[:, :64].copy(), *gammas, q_out=memory[:, 1:193],
            k_out=np.empty((4, 64), np.float32),
        )  # fmt: skip


def test_a_module_says_which_operations_it_has() -> None:
    """A call that lands in another operation, or an error from deep below."""
    module = module_of("float32")
    assert module.metadata["ops"] == ["qk_rms_norm", "row_mean_of_squares_qk"]
    with pytest.raises(AttributeError, match=r"holds qk_rms_norm, row_mean_.*, not apply"):
        _ = module.apply_qk_rms_norm
    with pytest.raises(TypeError, match=r"^row_mean_of_squares_qk takes 3 arguments \(qk_var, "):
        module.row_mean_of_squares_qk(1)
    with pytest.raises(TypeError, match=r"^qk_rms_norm takes 7 arguments \(q_out, k_out, "):
        module.qk_rms_norm(1)
