"""Arrays of JAX, passed by DLPack as they are: results, and what is refused.

Those of CuPy, which are on a GPU, are in ``gpu/test_cuda_cupy.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import DTYPES, PAIRINGS, Case, bits_of, filled, make_case

import qknorm_tvm
from qknorm_tvm.check import reference

pytestmark = pytest.mark.frameworks
Q_COLS, K_COLS = 32, 16
INPUTS = ("q", "k", "qk_var", "gamma_q", "gamma_k")


def _apply(case: Case, **more: Any) -> tuple[Any, Any]:
    return qknorm_tvm.apply_qk_rms_norm(
        case.q, case.k, case.qk_var, case.gamma_q, case.gamma_k, case.epsilon, **more
    )


@pytest.fixture(scope="module")
def jax() -> Any:
    """Return JAX, on the CPU whatever else there is."""
    jax = pytest.importorskip("jax", reason="passes arrays of JAX, and JAX is not installed")
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield jax


def _jax_case(jax: Any, rows: int, in_dtype: str, out_dtype: str | None = None) -> Case:
    """Return a case whose inputs are JAX's and whose outputs, to be written, are NumPy's."""
    case = make_case(rows, Q_COLS, K_COLS, in_dtype, out_dtype)
    for name in INPUTS:
        array = getattr(case, name)
        moved = jax.numpy.asarray(array)
        assert bits_of(np.asarray(moved)) == bits_of(array), "the inputs are the same, NaNs too"
        setattr(case, name, moved)
    return case


def _check(case: Case, expected: tuple[np.ndarray, np.ndarray]) -> None:
    for name, wanted in zip(("q_out", "k_out"), expected, strict=True):
        assert reference.differing(getattr(case, name), wanted) == 0


@pytest.mark.parametrize(("in_dtype", "out_dtype"), PAIRINGS)
def test_jax_every_pairing(jax: Any, in_dtype: str, out_dtype: str) -> None:
    expected = make_case(5, Q_COLS, K_COLS, in_dtype, out_dtype).expected()
    case = _jax_case(jax, 5, in_dtype, out_dtype)
    before = [bits_of(np.asarray(getattr(case, name))) for name in INPUTS]
    q_out, k_out = _apply(case, q_out=case.q_out, k_out=case.k_out)
    assert q_out is case.q_out
    assert k_out is case.k_out
    _check(case, expected)
    assert [bits_of(np.asarray(getattr(case, name))) for name in INPUTS] == before


@pytest.mark.parametrize("rows", [0, 1, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_jax_rows(jax: Any, dtype: str, rows: int) -> None:
    expected = make_case(rows, Q_COLS, K_COLS, dtype).expected()
    case = _jax_case(jax, rows, dtype)
    _apply(case, q_out=case.q_out, k_out=case.k_out)
    _check(case, expected)


@pytest.mark.parametrize("jax_names", [("q",), ("k", "gamma_q"), ("qk_var", "gamma_k")])
def test_jax_among_others(jax: Any, jax_names: tuple[str, ...]) -> None:
    """Scales kept as JAX arrays, activations from elsewhere: bfloat16 is spelt in two ways."""
    case = make_case(5, Q_COLS, K_COLS, "bfloat16")
    expected = case.expected()
    for name in jax_names:
        setattr(case, name, jax.numpy.asarray(getattr(case, name)))
    for _ in range(2):  # the second call takes the shorter way, if there is one
        case.q_out, case.k_out = filled((5, Q_COLS), "bfloat16"), filled((5, K_COLS), "bfloat16")
        _apply(case, q_out=case.q_out, k_out=case.k_out)
        _check(case, expected)


def test_jax_results_that_are_not_there_yet(jax: Any) -> None:
    """JAX computes in the background: memory taken before it has written it."""
    rows, cols = 256, 512
    rng = np.random.default_rng(0)
    start = jax.numpy.asarray(rng.standard_normal((rows, cols)).astype(np.float32))
    weight = jax.numpy.asarray(rng.standard_normal((cols, cols)).astype(np.float32) / 22)

    @jax.jit
    def slow(x: Any) -> Any:
        for _ in range(60):
            x = jax.numpy.tanh(x @ weight)
        return x

    slow(start).block_until_ready()
    gamma, qk_var = jax.numpy.ones(cols), jax.numpy.ones((rows, 2))
    for seed in range(3):
        outputs = filled((rows, cols), "float32"), filled((rows, cols), "float32")
        q, k = slow(start + seed), slow(start - seed)
        qknorm_tvm.apply_qk_rms_norm(
            q, k, qk_var, gamma, gamma, 0.0, q_out=outputs[0], k_out=outputs[1]
        )
        assert outputs[0].tobytes() == np.asarray(q).tobytes()
        assert outputs[1].tobytes() == np.asarray(k).tobytes()


def test_jax_needs_outputs(jax: Any) -> None:
    case = _jax_case(jax, 5, "bfloat16")
    message = "q_out and k_out must be given for JAX arrays, which cannot be written to, got None"
    with pytest.raises(ValueError, match=message):
        _apply(case)


@pytest.mark.parametrize("name", ["q_out", "k_out"])
def test_jax_outputs_are_not_written(jax: Any, name: str) -> None:
    """An immutable array that changes: under everyone who holds it, or its constant in a jit."""
    case = _jax_case(jax, 5, "float32")
    outputs = {"q_out": case.q_out, "k_out": case.k_out}
    outputs[name] = jax.numpy.asarray(outputs[name])
    before = bits_of(np.asarray(outputs[name]))
    with pytest.raises(ValueError, match=f"{name} must be writable, got a JAX array"):
        _apply(case, **outputs)
    assert bits_of(np.asarray(outputs[name])) == before


def test_jax_mistakes(jax: Any) -> None:
    """The same words as for NumPy's arrays, and nothing is written."""
    for name, bad, error, message in (
        ("k", lambda k: k[:4], ValueError, "k must have 5 rows like q, got 4"),
        ("k", lambda k: k.astype("float16"), TypeError, "k must be bfloat16, got float16"),
        ("q", lambda q: q.astype("int32"), TypeError, "q must be one of .* got int32"),
        ("gamma_q", lambda g: g[:-1], ValueError, "gamma_q must have 32 elements, got 31"),
        ("qk_var", lambda v: v[:, 0], ValueError, "qk_var must have 2 dimensions, got 1"),
    ):
        case = _jax_case(jax, 5, "bfloat16")
        setattr(case, name, bad(getattr(case, name)))
        before = bits_of(case.q_out), bits_of(case.k_out)
        with pytest.raises(error, match=message):
            _apply(case, q_out=case.q_out, k_out=case.k_out)
        assert (bits_of(case.q_out), bits_of(case.k_out)) == before


def test_jax_inside_jit(jax: Any) -> None:
    """A traced array has no memory: that must be said, not crash."""
    case = _jax_case(jax, 5, "float32")

    def traced(q: Any) -> Any:
        case.q = q
        _apply(case, q_out=case.q_out, k_out=case.k_out)
        return q

    with pytest.raises((TypeError, ValueError), match=r"^q (must be|cannot be passed)"):
        jax.jit(traced)(case.q)
