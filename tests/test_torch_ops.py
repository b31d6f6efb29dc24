"""`qknorm_tvm.torch_ops`: the operators in eager mode, compiled, exported, and under autograd."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import DTYPES, from_torch, make_case, to_torch

import qknorm_tvm
from qknorm_tvm.check import reference

torch = pytest.importorskip("torch", reason="registers torch operators, and torch is not installed")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from qknorm_tvm import torch_ops  # noqa: E402
from qknorm_tvm.check import reference_torch  # noqa: E402

pytestmark = pytest.mark.frameworks
Q_COLS, K_COLS = 32, 16
OPS = torch.ops.qknorm_tvm
BACKENDS = ("inductor", "aot_eager")
#: Operators by what they compute, each with the names of its tensors.
INPUTS = {
    "row_mean_of_squares_qk": ("q", "k"),
    "apply_qk_rms_norm": ("q", "k", "qk_var", "gamma_q", "gamma_k"),
    "qk_rms_norm": ("q", "k", "gamma_q", "gamma_k"),
}
NORMS = ("apply_qk_rms_norm", "qk_rms_norm")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _tensors(rows: int = 5, dtype: str = "bfloat16", *, seed: int = 0) -> dict[str, Any]:
    case = make_case(rows, Q_COLS, K_COLS, dtype, seed=seed)
    return {name: to_torch(getattr(case, name)) for name in INPUTS["apply_qk_rms_norm"]}


def _inputs(op: str, rows: int = 5, dtype: str = "bfloat16", *, seed: int = 0) -> list[Any]:
    tensors = _tensors(rows, dtype, seed=seed)
    return [tensors[name] for name in INPUTS[op]]


def _outputs(op: str, rows: int = 5, dtype: str = "bfloat16") -> dict[str, Any]:
    if op == "row_mean_of_squares_qk":
        return {"qk_var": torch.full((rows, 2), 7.0)}
    kind = getattr(torch, dtype)
    return {
        "q_out": torch.full((rows, Q_COLS), 7, dtype=kind),
        "k_out": torch.full((rows, K_COLS), 7, dtype=kind),
    }


def _forms(op: str) -> tuple[str, ...]:
    return ("", "_out", "_") if op in NORMS else ("", "_out")


def _same(got: Any, wanted: Any) -> None:
    """Compare tensors, or tuples of them, bit by bit; NaN is equal to NaN."""
    got, wanted = (result if isinstance(result, tuple) else (result,) for result in (got, wanted))
    for a, b in zip(got, wanted, strict=True):
        assert reference.differing(from_torch(a.contiguous()), from_torch(b.contiguous())) == 0


# ---- eager ------------------------------------------------------------------------------------


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, qknorm_tvm; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_to_the_unfused_graph(dtype: str, rows: int) -> None:
    tensors = _tensors(rows, dtype)
    _same(torch_ops.apply_qk_rms_norm(**tensors), reference_torch.apply_qk_rms_norm(**tensors))


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("op", INPUTS)
def test_equal_to_the_python_api(op: str, rows: int) -> None:
    inputs = _inputs(op, rows)
    _same(getattr(torch_ops, op)(*inputs), getattr(qknorm_tvm, op)(*inputs))


@pytest.mark.parametrize("op", NORMS)
def test_options_reach_the_kernel(op: str) -> None:
    """An option that the operator takes and drops."""
    inputs = _inputs(op)
    options = {"out_dtype": torch.float32, "cast_before_gamma": True}
    got = getattr(torch_ops, op)(*inputs, 0.25, **options)
    _same(got, getattr(qknorm_tvm, op)(*inputs, 0.25, **options))
    assert got[0].dtype == torch.float32
    for other in ({}, {"out_dtype": torch.float32}):
        assert not torch.equal(got[0], getattr(torch_ops, op)(*inputs, 0.25, **other)[0].float())


@pytest.mark.parametrize("op", NORMS)
def test_outputs_given(op: str) -> None:
    inputs, outputs = _inputs(op), _outputs(op)
    wanted = getattr(torch_ops, op)(*inputs)
    got = getattr(torch_ops, op)(*inputs, **outputs)
    assert got[0] is outputs["q_out"]
    assert got[1] is outputs["k_out"]
    _same(got, wanted)
    assert getattr(OPS, op + "_out")(*inputs, **_outputs(op)) is None
    assert getattr(torch_ops, op + "_")(*inputs) is None
    _same((inputs[0], inputs[1]), wanted)


def test_mean_squares_given_an_output() -> None:
    q, k = _inputs("row_mean_of_squares_qk")
    qk_var = torch.empty(5, 2)
    assert torch_ops.row_mean_of_squares_qk(q, k, qk_var_out=qk_var) is qk_var
    _same(qk_var, torch_ops.row_mean_of_squares_qk(q, k))


def test_one_output_of_two() -> None:
    inputs, outputs = _inputs("qk_rms_norm"), _outputs("qk_rms_norm")
    for name in outputs:
        with pytest.raises(ValueError, match=f"given both or neither, got {name} alone"):
            torch_ops.qk_rms_norm(*inputs, **{name: outputs[name]})
    with pytest.raises(TypeError, match="q_out must be float32 like out_dtype, got bfloat16"):
        torch_ops.qk_rms_norm(*inputs, **outputs, out_dtype=torch.float32)


@pytest.mark.parametrize("op", NORMS)
def test_writes_are_counted(op: str) -> None:
    """A tensor saved for a backward and then overwritten: its gradient would be wrong, unsaid."""
    inputs, outputs = _inputs(op), _outputs(op)
    getattr(torch_ops, op)(*inputs, **outputs)
    assert all(out._version == 1 for out in outputs.values())
    getattr(torch_ops, op + "_")(*inputs)
    assert [tensor._version for tensor in inputs] == [1, 1] + [0] * (len(inputs) - 2)


# ---- autograd ---------------------------------------------------------------------------------


def _calls() -> Iterator[tuple[str, str, Callable[[dict[str, Any]], Any]]]:
    """Every operator with each of its arguments: operator, argument, call of the tensors."""
    for base, names in INPUTS.items():
        for form in _forms(base):
            outputs = tuple(_outputs(base)) if form == "_out" else ()
            for name in names + outputs:

                def call(
                    tensors: dict[str, Any], op: str = base + form, given: tuple = names,
                    outputs: tuple = outputs,
                ) -> Any:  # fmt: skip
                    arguments = [tensors[name] for name in given]
                    return getattr(OPS, op)(*arguments, **{name: tensors[name] for name in outputs})

                yield base + form, name, call


@pytest.mark.parametrize(
    ("op", "name", "call"), [pytest.param(*call, id=f"{call[0]}-{call[1]}") for call in _calls()]
)
def test_an_argument_that_requires_grad(op: str, name: str, call: Callable[..., Any]) -> None:
    """A result detached from its inputs in silence: a model that does not learn."""
    tensors = {**_tensors(), **_outputs("apply_qk_rms_norm")}
    plain = {key: tensor.clone() for key, tensor in tensors.items()}
    tensors[name] = tensors[name].clone().requires_grad_()
    message = (
        rf"^{name} must not require grad \(qknorm_tvm::{op} has no backward\), got a tensor that "
        r"does: call under torch\.no_grad\(\), or pass a detached tensor$"
    )
    with pytest.raises(ValueError, match=message):
        call(tensors)
    _same(tensors["q"].detach(), plain["q"])
    wanted = call(plain)
    with torch.no_grad():
        got = call(tensors)
    if wanted is not None:
        _same(got, wanted)


def _tangent(function: Callable[..., Any], q: Any) -> Any:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        return torch.autograd.forward_ad.unpack_dual(function(dual)).tangent


#: Ways to ask for a derivative by q other than `requires_grad`, and what is refused.
DERIVATIVES: dict[str, tuple[Callable[..., Any], str]] = {
    "grad": (lambda f, q: torch.func.grad(f)(q), "must not require grad"),
    "vjp": (lambda f, q: torch.func.vjp(f, q)[1](torch.tensor(1.0)), "must not require grad"),
    "jacrev": (lambda f, q: torch.func.jacrev(f)(q), "must not require grad"),
    "jvp": (lambda f, q: torch.func.jvp(f, (q,), (torch.ones_like(q),)), "must not have a tangent"),
    "jacfwd": (lambda f, q: torch.func.jacfwd(f)(q), "must not have a tangent"),
    "dual": (_tangent, "must not have a tangent"),
}


def _differentiated(api: Any, form: str, k: Any, gamma_q: Any, gamma_k: Any) -> Callable[..., Any]:
    """Return a function of q alone whose result is a number, by one form of the operation."""

    def function(q: Any) -> Any:
        if form == "new":
            return api.qk_rms_norm(q, k, gamma_q, gamma_k)[0].sum()
        if form == "in place":
            q_out, k_out = q * 1, k.clone()
            if api is torch_ops:
                api.qk_rms_norm_(q_out, k_out, gamma_q, gamma_k)
            else:
                api.qk_rms_norm(q_out, k_out, gamma_q, gamma_k, q_out=q_out, k_out=k_out)
        else:
            q_out, k_out = torch.empty(q.shape), torch.empty(k.shape)
            api.qk_rms_norm(q, k, gamma_q, gamma_k, q_out=q_out, k_out=k_out)
        return q_out.sum() + 0 * q.sum()

    return function


@pytest.mark.parametrize("way", DERIVATIVES)
@pytest.mark.parametrize("form", ["new", "given", "in place"])
@pytest.mark.parametrize("api", [torch_ops, qknorm_tvm], ids=["operators", "api"])
def test_a_derivative_asked_for_otherwise(api: Any, form: str, way: str) -> None:
    """A gradient of 0, or a tangent dropped, without a word."""
    q, *others = _inputs("qk_rms_norm", dtype="float32")
    function = _differentiated(api, form, *others)
    ask, message = DERIVATIVES[way]
    with pytest.raises(ValueError, match=rf"^\w+ {message} "):
        ask(function, q)
    function(q)  # and nothing is refused for good


def test_transforms_that_ask_for_no_derivative() -> None:
    """A refusal of what has been right: a constant within a differentiated function, and vmap."""
    inputs = _inputs("qk_rms_norm", dtype="float32")
    wanted = torch_ops.qk_rms_norm(*inputs)

    def constant(x: Any) -> Any:
        return (torch_ops.qk_rms_norm(*inputs)[0] * x).sum()

    _same(torch.func.grad(constant)(inputs[0]), wanted[0])
    batched = torch.func.vmap(lambda q: torch_ops.qk_rms_norm(q, *inputs[1:]))
    got = batched(torch.stack([inputs[0], inputs[0]]))
    _same((got[0][1], got[1][1]), wanted)
    with torch.autograd.forward_ad.dual_level():
        _same(torch_ops.qk_rms_norm(*inputs), wanted)
        _same(qknorm_tvm.qk_rms_norm(*inputs), wanted)


def test_a_wrapped_tensor_has_no_memory() -> None:
    """torch's "Cannot access data pointer", which names neither the argument nor the way out."""
    q, *others = _inputs("qk_rms_norm", dtype="float32")
    with pytest.raises(TypeError, match=r"^q must be a tensor in memory, got one that a transform"):
        torch.func.vmap(lambda x: qknorm_tvm.qk_rms_norm(x, *others))(torch.stack([q, q]))


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize("way", ["short", "long"])
def test_writes_of_the_python_api_are_counted(op: str, way: str) -> None:
    """A tensor saved for a backward and then overwritten: a wrong gradient without an error."""
    inputs, outputs = _inputs(op, dtype="float32"), _outputs(op, dtype="float32")
    if way == "long":  # numbers that the short way does not take
        inputs[0] = from_torch(inputs[0])
    keywords = {"qk_var": "qk_var_out"}
    weights = [torch.ones_like(out, requires_grad=True) for out in outputs.values()]
    saved = [(weight * out).sum() for weight, out in zip(weights, outputs.values(), strict=True)]
    getattr(qknorm_tvm, op)(*inputs, **{keywords.get(n, n): out for n, out in outputs.items()})
    assert [out._version for out in outputs.values()] == [1] * len(outputs)
    for total in saved:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()


def test_inference_mode() -> None:
    tensors = _tensors()
    wanted = torch_ops.apply_qk_rms_norm(**tensors)
    tensors["gamma_q"].requires_grad_()
    with torch.inference_mode():
        _same(torch_ops.apply_qk_rms_norm(**tensors), wanted)
        inside = {name: tensor.clone() for name, tensor in tensors.items()}
        torch_ops.apply_qk_rms_norm_(**inside)
        _same((inside["q"], inside["k"]), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_requires_grad_when_compiled(backend: str) -> None:
    """A traced graph that drops the gradient where eager code would have raised."""
    inputs = _inputs("qk_rms_norm")
    gamma_q = inputs[2].requires_grad_()
    compiled = torch.compile(torch_ops.qk_rms_norm, backend=backend, fullgraph=True)
    with pytest.raises(Exception, match=r"gamma_q must not require grad \(qknorm_tvm::qk_rms"):
        compiled(*inputs)
    assert gamma_q.grad is None
    with torch.no_grad():
        _same(compiled(*inputs), torch_ops.qk_rms_norm(*inputs))


# ---- fake tensors -----------------------------------------------------------------------------


@pytest.mark.parametrize("op", INPUTS)
def test_fake_tensors_are_like_the_real(op: str) -> None:
    inputs = _inputs(op)
    fused = torch.zeros(5, Q_COLS + 2 * K_COLS, dtype=torch.bfloat16)
    inputs[0], inputs[1] = fused[:, :Q_COLS], fused[:, Q_COLS : Q_COLS + K_COLS]
    options = {} if op == "row_mean_of_squares_qk" else {"out_dtype": torch.float16}
    real = getattr(torch_ops, op)(*inputs, **options)
    with FakeTensorMode() as mode:
        fake = getattr(torch_ops, op)(*(mode.from_tensor(tensor) for tensor in inputs), **options)
    meta = getattr(torch_ops, op)(*(tensor.to("meta") for tensor in inputs), **options)
    if isinstance(real, torch.Tensor):
        real, fake, meta = (real,), (fake,), (meta,)
    for a, b, c in zip(real, fake, meta, strict=True):
        seen = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in (a, b, c)]
        assert seen[0] == seen[1] == seen[2]


def _mistakes() -> list[Any]:
    bad = [
        ("q", lambda q: q[0], "q must have 2 dimensions, got 1"),
        ("q", lambda q: q.int(), "q must be one of bfloat16, float16, float32, got int32"),
        ("q", lambda q: q.t().contiguous().t(), "q must be contiguous in its last dimension"),
        ("k", lambda k: k[:4], "k must have 5 rows like q, got 4"),
        ("k", lambda k: k.half(), "k must be bfloat16, got float16"),
        ("k", lambda k: k[:, :0], "k must have at least 1 column, got 0"),
        ("qk_var", lambda v: v.double(), "qk_var must be float32, got float64"),
        ("qk_var", lambda v: v[:, :1], "qk_var must have 2 columns, got 1"),
        ("qk_var", lambda v: v[:3], "qk_var must have 5 rows like q, got 3"),
        ("gamma_q", lambda g: g[:-1], "gamma_q must have 32 elements, got 31"),
        ("gamma_k", lambda g: g[None], "gamma_k must have 1 dimension, got 2"),
        ("gamma_k", lambda g: g.bfloat16(), "gamma_k must be float32, got bfloat16"),
        ("q_out", lambda o: o[:, 1:], "q_out must have 32 columns, got 31"),
        ("q_out", lambda o: o.long(), "q_out must be one of bfloat16, float16, float32, got int64"),
        ("k_out", lambda o: o.float(), "k_out must be bfloat16, got float32"),
    ]
    return [pytest.param(*mistake, id=mistake[2]) for mistake in bad]


def _call_all(tensors: dict[str, Any]) -> None:
    OPS.apply_qk_rms_norm_out(
        *(tensors[name] for name in INPUTS["apply_qk_rms_norm"]),
        q_out=tensors["q_out"],
        k_out=tensors["k_out"],
    )


@pytest.mark.parametrize(("name", "change", "message"), _mistakes())
def test_mistakes(name: str, change: Callable[..., Any], message: str) -> None:
    """What is wrong is said in eager mode and by fake tensors alike."""
    tensors = {**_tensors(), **_outputs("apply_qk_rms_norm")}
    tensors[name] = change(tensors[name])
    with pytest.raises((TypeError, ValueError)) as eager:
        _call_all(tensors)
    with FakeTensorMode() as mode, pytest.raises((TypeError, ValueError)) as fake:
        _call_all({key: mode.from_tensor(tensor) for key, tensor in tensors.items()})
    assert message in str(eager.value)
    assert message in str(fake.value)
    assert type(eager.value) is type(fake.value)


def test_out_dtype_that_is_none_of_ours() -> None:
    inputs = _inputs("qk_rms_norm")
    message = "out_dtype must be one of bfloat16, float16, float32, got torch.float64"
    with pytest.raises(ValueError, match=message):
        torch_ops.qk_rms_norm(*inputs, out_dtype=torch.float64)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in inputs]
        with pytest.raises(ValueError, match=message):
            torch_ops.qk_rms_norm(*fake, out_dtype=torch.float64)


def test_a_mistake_is_seen_when_traced() -> None:
    """A graph that compiles and fails at its first call, far from the line that is wrong."""
    tensors = _tensors()
    compiled = torch.compile(torch_ops.apply_qk_rms_norm, backend="aot_eager", fullgraph=True)
    tensors["gamma_q"] = tensors["gamma_q"][:-1]
    with pytest.raises(Exception, match="gamma_q must have 32 elements, got 31"):
        compiled(**tensors)


# ---- opcheck ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "form"), [(op, form) for op in INPUTS for form in _forms(op)])
def test_opcheck(op: str, form: str) -> None:
    """torch's own tests: the schema is true, fake and real outputs agree, a compiler may trace."""
    # Ordinary numbers: opcheck compares with a tolerance that NaN does not meet.
    inputs = [torch.rand_like(tensor) for tensor in _inputs(op)]
    outputs = _outputs(op) if form == "_out" else {}
    torch.library.opcheck(getattr(OPS, op + form).default, tuple(inputs), outputs)


# ---- compiled ---------------------------------------------------------------------------------


def _compiled(function: Callable[..., Any], backend: str, **more: Any) -> Callable[..., Any]:
    return torch.compile(function, backend=backend, fullgraph=True, **more)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_equals_eager(dtype: str, backend: str) -> None:
    tensors = _tensors(5, dtype)
    got = _compiled(torch_ops.apply_qk_rms_norm, backend)(**tensors)
    _same(got, torch_ops.apply_qk_rms_norm(**tensors))
    _same(got, reference_torch.apply_qk_rms_norm(**tensors))


def _norms(qkv: Any, gamma_q: Any, gamma_k: Any) -> Any:
    """Every functional operator, on slices of one tensor."""
    q, k, v = qkv.split([Q_COLS, K_COLS, K_COLS], dim=1)
    qk_var = torch_ops.row_mean_of_squares_qk(q, k)
    q_out, k_out = torch_ops.apply_qk_rms_norm(q, k, qk_var, gamma_q, gamma_k, 1e-5)
    again = torch_ops.qk_rms_norm(q, k, gamma_q, gamma_k, 1e-5, out_dtype=torch.float32)
    return q_out, k_out, v.clone(), *again


def _attention(hidden: Any, weight: Any, gamma_q: Any, gamma_k: Any) -> Any:
    return _norms(hidden @ weight, gamma_q, gamma_k)


def _attention_inputs(rows: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(rows)
    tensors = _tensors(rows)
    weight = torch.randn(24, Q_COLS + 2 * K_COLS, generator=generator)
    return (
        torch.randn(rows, 24, generator=generator).bfloat16(),
        weight.bfloat16(),
        tensors["gamma_q"],
        tensors["gamma_k"],
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_rows_is_one_graph(backend: str) -> None:
    """A compilation for every batch size: seconds each, in the middle of serving."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(_attention, backend=counter, fullgraph=True, dynamic=True)
    for rows in (6, 3, 64, 7, 100):
        inputs = _attention_inputs(rows)
        _same(compiled(*inputs), _attention(*inputs))
    assert counter.frame_count == 1
    for rows in (1, 0):  # torch makes one graph each of these, always
        inputs = _attention_inputs(rows)
        _same(compiled(*inputs), _attention(*inputs))


def test_rows_that_only_the_data_know() -> None:
    """A mixture of experts: the number of rows is a result, without a value while tracing."""

    def chosen(mask: Any, tensors: dict[str, Any]) -> Any:
        q, k, qk_var = (tensors[name][mask] for name in ("q", "k", "qk_var"))
        return torch_ops.apply_qk_rms_norm(q, k, qk_var, tensors["gamma_q"], tensors["gamma_k"])

    tensors = _tensors(6, "float32")
    mask = torch.tensor([True, False, True, True, False, True])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = _compiled(chosen, "aot_eager")
        for condition in (mask, ~mask, torch.zeros_like(mask)):
            _same(compiled(condition, tensors), chosen(condition, tensors))


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_stay_contiguous(backend: str) -> None:
    """A compiler that lays an intermediate tensor out anew, as nothing says that it may not."""

    def transposed(q_t: Any, k: Any, gamma_q: Any, gamma_k: Any) -> Any:
        q = (q_t * 2).t().contiguous() + 1
        return torch_ops.qk_rms_norm(q, k * 2, gamma_q, gamma_k)

    q, *rest = _inputs("qk_rms_norm")
    inputs = (q.t().contiguous(), *rest)
    _same(_compiled(transposed, backend)(*inputs), transposed(*inputs))


def _in_place(q: Any, k: Any, gamma_q: Any, gamma_k: Any) -> Any:
    q, k = q + 1, k.clone()
    before = q * 2
    torch_ops.qk_rms_norm_(q, k, gamma_q, gamma_k)
    return before, q * 2, k


def _in_place_of_the_inputs(q: Any, k: Any, gamma_q: Any, gamma_k: Any) -> Any:
    torch_ops.qk_rms_norm_(q, k, gamma_q, gamma_k)
    return q.float().relu(), k + 0


def _in_place_of_slices(q: Any, k: Any, gamma_q: Any, gamma_k: Any) -> Any:
    qkv = torch.cat([q, k, k], dim=1)
    torch_ops.qk_rms_norm_(qkv[:, :Q_COLS], qkv[:, Q_COLS : Q_COLS + K_COLS], gamma_q, gamma_k)
    return qkv, qkv[:, :Q_COLS] + 1


def _given_outputs(q: Any, k: Any, gamma_q: Any, gamma_k: Any) -> Any:
    outputs = torch.zeros_like(q), torch.zeros_like(k)
    before = outputs[0] + 1
    torch_ops.qk_rms_norm(q, k, gamma_q, gamma_k, q_out=outputs[0], k_out=outputs[1])
    qk_var = torch.zeros(q.shape[0], 2)
    torch_ops.row_mean_of_squares_qk(q, k, qk_var_out=qk_var)
    torch_ops.apply_qk_rms_norm_(q, k, qk_var, gamma_q, gamma_k)
    return before, *outputs, qk_var, q, k


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "function", [_in_place, _in_place_of_the_inputs, _in_place_of_slices, _given_outputs]
)
def test_compiled_code_sees_writes(function: Callable[..., Any], backend: str) -> None:
    """A graph that reads q from before the write, or writes where the caller does not look."""
    inputs, copies = _inputs("qk_rms_norm"), [tensor.clone() for tensor in _inputs("qk_rms_norm")]
    wanted = function(*inputs)
    _same(_compiled(function, backend)(*copies), wanted)
    _same(tuple(copies), tuple(inputs))


def _overlapping_views(x: Any) -> tuple[Any, Any]:
    base = x + 1
    return base[:, :16], base[:, 8:24]


def _views_of_a_view(x: Any) -> tuple[Any, Any]:
    base = (x + 1).view(-1).view(x.shape)
    return base[:, :16], base[:, 8:24]


def _detached_view(x: Any) -> tuple[Any, Any]:
    base = x + 1
    return base[:, :16].detach(), base[:, 8:24]


def _views_of_other_strides(x: Any) -> tuple[Any, Any]:
    base = (x + 1).view(-1)
    return base[:64].view(4, 16), base.as_strided((4, 16), (24, 1), 40)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "views", [_overlapping_views, _views_of_a_view, _detached_view, _views_of_other_strides]
)
def test_overlap_is_refused_when_traced(views: Any, dynamic: bool, backend: str) -> None:
    """A compiler gives the kernel copies: it computes what eager code refuses."""
    if dynamic and views is _views_of_other_strides:
        pytest.skip("strides that differ, with rows that are not known, are left to the call")
    gamma = torch.ones(16)

    def function(x: Any) -> Any:
        q, k = views(x)
        torch_ops.qk_rms_norm_(q, k, gamma, gamma)
        return q * 2, k * 2

    message = "k_out must not overlap q_out, got tensors that share memory"
    with pytest.raises(ValueError, match=message):
        function(torch.ones(4, 32))
    compiled = _compiled(function, backend, dynamic=dynamic)
    with torch.no_grad(), pytest.raises(Exception, match=message):
        compiled(torch.ones(4, 32))


@pytest.mark.parametrize("dynamic", [False, True])
def test_views_that_do_not_overlap_are_traced(dynamic: bool) -> None:
    """A refusal of slices side by side, or of rows one after the other."""
    gamma = torch.ones(16)

    def function(x: Any) -> Any:
        base = x + 1
        torch_ops.qk_rms_norm_(base[:, :16], base[:, 16:32], gamma, gamma)
        torch_ops.qk_rms_norm_(base[:2, 8:24], base[2:4, 8:24], gamma, gamma)
        flat = base.view(-1)
        near, far = flat.as_strided((2, 8), (16, 1)), flat.as_strided((2, 8), (48, 1), 8)
        torch_ops.qk_rms_norm_(near, far, gamma[:8], gamma[:8])
        return base + 0

    x = torch.rand(4, 32)
    _same(_compiled(function, "aot_eager", dynamic=dynamic)(x), function(x))


# ---- exported ---------------------------------------------------------------------------------


class _Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        _, weight, gamma_q, gamma_k = _attention_inputs(4)
        self.weight = torch.nn.Parameter(weight)
        self.gamma_q, self.gamma_k = torch.nn.Parameter(gamma_q), torch.nn.Parameter(gamma_k)

    def forward(self, hidden: Any) -> Any:
        q, k, *_ = _attention(hidden, self.weight, self.gamma_q, self.gamma_k)
        torch_ops.qk_rms_norm_(q, k, self.gamma_q, self.gamma_k)
        return q, k


@torch.no_grad()
def test_export_save_load_run() -> None:
    model = _Attention()
    rows = {"hidden": {0: torch.export.Dim("rows", min=2, max=4096)}}
    program = torch.export.export(model, (_attention_inputs(4)[0],), dynamic_shapes=rows)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    programs = (program, torch.export.load(file), program.run_decompositions())
    for program in programs:
        assert "qknorm_tvm.apply_qk_rms_norm.default" in str(program.graph)
        for count in (2, 33):
            hidden = _attention_inputs(count)[0]
            _same(program.module()(hidden), model(hidden))


# ---- CUDA -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs torch with CUDA and a GPU")
@torch.no_grad()
def test_cuda_graphs() -> None:
    """Captured by hand, and by the compiler."""
    hidden, weight, *gammas = [tensor.cuda() for tensor in _attention_inputs(16)]
    qkv = hidden @ weight
    wanted = [tensor.cpu() for tensor in _norms(qkv, *gammas)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = _norms(qkv, *gammas)
    for tensor in got:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    _same(tuple(tensor.cpu() for tensor in got), tuple(wanted))
    compiled = torch.compile(_norms, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        got = compiled(qkv, *gammas)
        _same(tuple(tensor.cpu() for tensor in got), tuple(wanted))
