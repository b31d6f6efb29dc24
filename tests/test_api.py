"""`qknorm_tvm.apply_qk_rms_norm`: what it takes, what it allocates, what it returns."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support import DTYPES, PAIRINGS, Case, from_torch, make_case, misaligned, to_torch

import qknorm_tvm
from qknorm_tvm.check import reference

ROWS, Q_COLS, K_COLS = 3, 32, 16


def _case(in_dtype: str = "float32", out_dtype: str | None = None) -> Case:
    return make_case(ROWS, Q_COLS, K_COLS, in_dtype, out_dtype)


def _apply(case: Case, **more: Any) -> tuple[Any, Any]:
    return qknorm_tvm.apply_qk_rms_norm(
        case.q, case.k, case.qk_var, case.gamma_q, case.gamma_k, case.epsilon, **more
    )


def _check(outputs: tuple[Any, Any], expected: tuple[np.ndarray, np.ndarray]) -> None:
    for got, wanted in zip(outputs, expected, strict=True):
        array = got if isinstance(got, np.ndarray) else from_torch(got)
        assert reference.differing(array, wanted) == 0


def _torch() -> Any:
    return pytest.importorskip("torch", reason="makes torch tensors, and torch is not installed")


# ---- outputs ----------------------------------------------------------------------------------


_MORE_PAIRINGS = [PAIRINGS[i] for i in (1, 2, 3, 4, 6, 8)]


@pytest.mark.frameworks
@pytest.mark.parametrize(
    ("in_dtype", "out_dtype"),
    [
        ("bfloat16", "bfloat16"),
        ("float16", "float32"),
        ("float32", "float16"),
        *(pytest.param(*pairing, marks=pytest.mark.slow) for pairing in _MORE_PAIRINGS),
    ],
)
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_every_pairing(framework: str, in_dtype: str, out_dtype: str) -> None:
    case = _case(in_dtype, out_dtype)
    expected = case.expected()
    _check(_apply(case, out_dtype=out_dtype), expected)
    if framework == "torch":
        torch = _torch()
        for name in ("q", "k", "qk_var", "gamma_q", "gamma_k", "q_out", "k_out"):
            setattr(case, name, to_torch(getattr(case, name)))
        outputs = _apply(case, out_dtype=out_dtype)
        assert all(out.dtype == getattr(torch, out_dtype) for out in outputs)
        _check(outputs, expected)
    q_out, k_out = _apply(case, q_out=case.q_out, k_out=case.k_out)
    assert q_out is case.q_out
    assert k_out is case.k_out
    _check((q_out, k_out), expected)


@pytest.mark.frameworks
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_allocated_outputs_are_packed(framework: str, rows: int) -> None:
    """A one-row slice of a QKV buffer whose output keeps the parent's row stride: a slow path."""
    fused = np.ones((rows, Q_COLS + 2 * K_COLS), np.float32)
    case = make_case(rows, Q_COLS, K_COLS, "float32")
    if framework == "torch":
        _torch()
        fused = to_torch(fused)
        for name in ("qk_var", "gamma_q", "gamma_k"):
            setattr(case, name, to_torch(getattr(case, name)))
    case.q, case.k = fused[:, :Q_COLS], fused[:, Q_COLS : Q_COLS + K_COLS]
    q_out, k_out = _apply(case)
    for out, cols in ((q_out, Q_COLS), (k_out, K_COLS)):
        assert tuple(out.shape) == (rows, cols)
        if framework == "torch":
            assert out.stride() == (cols, 1)
            assert out.is_contiguous()
        else:
            assert rows == 0 or out.strides == (4 * cols, 4)
            assert out.flags.c_contiguous
            assert out.flags.owndata


def test_allocated_outputs_are_new_each_time() -> None:
    """A buffer that two calls share: the first result changes under its owner."""
    case = _case()
    first = _apply(case)
    kept = [array.copy() for array in first]
    case.q, case.k = case.q + 1, case.k + 1
    second = _apply(case)
    assert not np.shares_memory(first[0], second[0])
    _check(first, (kept[0], kept[1]))


@pytest.mark.frameworks
@pytest.mark.parametrize(
    "form",
    ["float16", np.float16, np.dtype("float16"), "torch.float16", "torch"],
    ids=["str", "type", "dtype", "torch's text", "torch"],
)
def test_forms_of_out_dtype(form: Any) -> None:
    if form == "torch":
        form = _torch().float16
    case = _case("float32", "float16")
    _check(_apply(case, out_dtype=form), case.expected())


@pytest.mark.parametrize("form", ["bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16)])
def test_forms_of_bfloat16(form: Any) -> None:
    case = _case("float32", "bfloat16")
    _check(_apply(case, out_dtype=form), case.expected())


def test_out_dtype_defaults_to_the_inputs() -> None:
    for dtype in DTYPES:
        q_out, k_out = _apply(_case(dtype))
        assert q_out.dtype == k_out.dtype == reference.NUMPY_DTYPES[dtype]


@pytest.mark.parametrize("given", ["q_out", "k_out"])
def test_one_output_given_the_other_allocated(given: str) -> None:
    """An allocated output of another type than the given one."""
    case = _case("float32", "float16")
    expected = case.expected()
    outputs = _apply(case, **{given: getattr(case, given)})
    assert outputs[given == "k_out"] is getattr(case, given)
    _check(outputs, expected)


def test_in_place() -> None:
    case = _case("bfloat16")
    expected = case.expected()
    outputs = _apply(case, q_out=case.q, k_out=case.k)
    assert outputs[0] is case.q
    _check(outputs, expected)


# ---- inputs -----------------------------------------------------------------------------------


def test_read_only_inputs() -> None:
    """Memory-mapped weights are read-only, and are only read."""
    case = _case("bfloat16")
    expected = case.expected()
    for name in ("q", "k", "qk_var", "gamma_q", "gamma_k"):
        getattr(case, name).flags.writeable = False
    _check(_apply(case), expected)
    case.q = np.broadcast_to(case.q[:1], case.q.shape)
    _check(_apply(case), case.expected())


def test_memory_mapped_inputs(tmp_path: Any) -> None:
    case = _case()
    np.save(tmp_path / "q.npy", case.q)
    case.q = np.load(tmp_path / "q.npy", mmap_mode="r")
    _check(_apply(case), case.expected())


@pytest.mark.frameworks
@pytest.mark.parametrize(
    "as_torch", [("q",), ("k",), ("qk_var", "gamma_q"), ("q", "q_out"), ("k_out",), ("gamma_k",)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_frameworks(as_torch: tuple[str, ...], dtype: str) -> None:
    """One NumPy array among torch tensors: an error, or bits of bfloat16 taken for integers."""
    _torch()
    case = _case(dtype)
    expected = case.expected()
    for name in as_torch:
        setattr(case, name, to_torch(getattr(case, name)))
    outputs = _apply(case, q_out=case.q_out, k_out=case.k_out)
    _check(outputs, expected)


@pytest.mark.frameworks
def test_outputs_of_mixed_inputs_are_of_qs_framework() -> None:
    torch = _torch()
    case = _case()
    expected = case.expected()
    case.q = to_torch(case.q)
    outputs = _apply(case)
    assert all(isinstance(out, torch.Tensor) for out in outputs)
    _check(outputs, expected)


class _OnlyDLPack:
    """An array of a framework that nobody has heard of."""

    def __init__(self, array: np.ndarray):
        self._array = array
        self.shape, self.dtype = array.shape, array.dtype

    def __dlpack__(self, **arguments: Any) -> Any:
        return self._array.__dlpack__(**arguments)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def test_anything_with_dlpack() -> None:
    case = _case()
    expected = case.expected()
    q_out, k_out = case.q_out, case.k_out
    for name in ("q", "k", "qk_var", "gamma_q", "gamma_k", "q_out", "k_out"):
        setattr(case, name, _OnlyDLPack(getattr(case, name)))
    _apply(case, q_out=case.q_out, k_out=case.k_out)
    _check((q_out, k_out), expected)
    with pytest.raises(ValueError, match=r"^q_out and k_out must be given for _OnlyDLPack"):
        _apply(case)


@pytest.mark.parametrize(
    "epsilon",
    [1, 0, np.float32(1e-6), np.float64(1e-6), np.int64(2), np.array(1e-6), 10**30],
    ids=repr,
)
def test_epsilon_may_be_any_number(epsilon: Any) -> None:
    case = _case()
    case.epsilon = epsilon
    outputs = _apply(case)
    case.epsilon = float(epsilon)
    _check(outputs, case.expected())


@pytest.mark.frameworks
def test_epsilon_may_be_a_torch_scalar() -> None:
    case = _case()
    case.epsilon = _torch().tensor(0.5)
    outputs = _apply(case)
    case.epsilon = 0.5
    _check(outputs, case.expected())


@pytest.mark.frameworks
def test_subclasses_of_arrays_and_tensors() -> None:
    torch = _torch()
    case = _case()
    expected = case.expected()
    for name in ("q", "k", "qk_var"):
        setattr(case, name, to_torch(getattr(case, name)))
    for name in ("gamma_q", "gamma_k"):
        value = torch.nn.Parameter(to_torch(getattr(case, name)), requires_grad=False)
        setattr(case, name, value)
    _check(_apply(case), expected)


def test_misaligned_arrays() -> None:
    case = _case("bfloat16")
    for name in ("q", "k", "qk_var", "gamma_q", "gamma_k"):
        setattr(case, name, misaligned(getattr(case, name), 1))
    _check(_apply(case), case.expected())


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.frameworks
def test_tensors_that_require_grad_are_refused() -> None:
    """A forward without a backward: training would go on with no gradient and no word."""
    torch = _torch()
    case = _case()
    expected = case.expected()
    for name in ("q", "k", "qk_var", "gamma_q", "gamma_k"):
        setattr(case, name, to_torch(getattr(case, name)))
    case.gamma_q = torch.nn.Parameter(case.gamma_q)
    with pytest.raises(
        ValueError, match=r"^gamma_q must not require grad \(there is no backward\)"
    ):
        _apply(case)
    with torch.no_grad():
        _check(_apply(case), expected)
    with torch.inference_mode():
        _check(_apply(case), expected)


@pytest.mark.frameworks
@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("stream", [0, 7, "stream"])
def test_streams_are_refused_on_cpus(framework: str, stream: Any) -> None:
    """A stream that is ignored: its owner would wait for the wrong thing."""
    case = _case()
    if framework == "torch":
        _torch()
        for name in ("q", "k", "qk_var", "gamma_q", "gamma_k"):
            setattr(case, name, to_torch(getattr(case, name)))
    with pytest.raises(ValueError, match=r"^stream must be None for tensors on the CPU, got"):
        _apply(case, stream=stream)


def test_arguments_after_epsilon_are_named_only() -> None:
    case = _case()
    with pytest.raises(TypeError, match=r"takes from 5 to 6 positional arguments but 7 were given"):
        qknorm_tvm.apply_qk_rms_norm(*case.tensors)


def test_loaded_modules_serve_the_api_without_tvm(tmp_path):
    """Guards against `use` compiling all the same, where there is no compiler."""
    path = tmp_path / "given.so"
    qknorm_tvm.compile(qknorm_tvm.KernelSpec(in_dtype="float32", target="cpu")).export(path)
    code = """
import sys
import numpy as np
import qknorm_tvm
from qknorm_tvm.check import reference

qknorm_tvm.use(qknorm_tvm.load(sys.argv[1]))
x = [np.full((3, 8), 2, "f4"), np.full((3, 4), 3, "f4"), np.ones((3, 2), "f4")]
x += [np.ones(8, "f4"), np.ones(4, "f4")]
for actual, expected in zip(
    qknorm_tvm.apply_qk_rms_norm(*x), reference.apply_qk_rms_norm(*x), strict=True
):
    assert reference.differing(actual, expected) == 0
assert "tvm" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_use_takes_modules_only():
    """Guards against a path given to `use` failing only at the next call."""
    with pytest.raises(TypeError, match=r"module must be a qknorm_tvm\.Module, got str"):
        qknorm_tvm.use("qk.so")
