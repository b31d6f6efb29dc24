"""Norm, rotation and paged cache with torch tensors: the Python API and torch's operators.

Results are compared with an unfused torch graph, written here, in which each product and each sum
is an operation of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from support import from_torch, random_values, to_torch

import qknorm_tvm
from qknorm_tvm.check.reference import differing

torch = pytest.importorskip("torch", reason="calls with torch tensors, and torch is not installed")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from qknorm_tvm import torch_ops  # noqa: E402

pytestmark = pytest.mark.frameworks

HEAD_DIM, Q_HEADS, KV_HEADS, MAX_POSITION, BLOCK_SIZE = 16, 4, 2, 40, 4
Q_COLS, K_COLS = Q_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
OPS = torch.ops.qknorm_tvm
#: Arguments of `qk_rms_norm_rope` besides outputs.
ROPE = ("q", "k", "gamma_q", "gamma_k", "positions", "cos_sin_cache", "qk_var")
EPSILON = 1e-5
Arguments = dict[str, Any]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- arguments ----------------------------------------------------------------------------------


def tensors(rows: int = 5, dtype: str = "bfloat16", cos_dtype: str | None = None) -> Arguments:
    """Return the tensors of a call of `qk_rms_norm_rope_cache`, statistics included."""
    rng = np.random.default_rng(rows)
    qkv = to_torch(random_values(rng, (rows, Q_COLS + 2 * K_COLS), dtype))
    q, k, v = qkv.split([Q_COLS, K_COLS, K_COLS], dim=1)
    blocks = -(-2 * rows // BLOCK_SIZE) + 1
    caches = to_torch(random_values(rng, (blocks, 2, BLOCK_SIZE, KV_HEADS, HEAD_DIM), dtype))
    slots = rng.permutation(blocks * BLOCK_SIZE)[:rows]
    return {
        "q": q,
        "k": k,
        "v": v,
        "gamma_q": to_torch(random_values(rng, (Q_COLS,), "float32")),
        "gamma_k": to_torch(random_values(rng, (K_COLS,), "float32")),
        "positions": torch.from_numpy(rng.integers(0, MAX_POSITION, rows)),
        "cos_sin_cache": to_torch(random_values(rng, (MAX_POSITION, 8), cos_dtype or dtype)),
        "k_cache": caches[:, 0],
        "v_cache": caches[:, 1],
        "slot_mapping": torch.from_numpy(np.where(rng.random(rows) < 0.3, -1 - slots, slots)),
        "qk_var": to_torch(np.abs(random_values(rng, (rows, 2), "float32"))),
    }


def float8(given: Arguments, scales: int = 1) -> Arguments:
    """Return arguments with caches of float8, and scales for a tensor or for each head."""
    caches = {
        name: torch.zeros(given[name].shape, dtype=torch.float8_e4m3fn)
        for name in ("k_cache", "v_cache")
    }
    scale = torch.linspace(0.5, 3, scales)
    return given | caches | {"k_scale": scale, "v_scale": scale.flip(0)}


def rope_arguments(given: Arguments) -> Arguments:
    return {name: given[name] for name in ROPE}


# ---- the unfused graph --------------------------------------------------------------------------


def rotated(
    y: Any, cos: Any, sin: Any, *, interleaved: bool = False,
    sums: Callable[[Any, Any, Any, Any], Any] = lambda a, c, b, s: a * c + b * s,
) -> Any:  # fmt: skip
    """Rotate ``y [M, heads, head_dim]``; `sums` computes ``a * c + b * s`` from float32."""
    half = cos.shape[1]
    pairs = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    first, second = pairs if interleaved else (slice(0, half), slice(half, 2 * half))
    a, b = y[..., first].float(), y[..., second].float()
    c, s = cos.float()[:, None], sin.float()[:, None]
    out = y.clone()
    out[..., first] = sums(a, c, b, -s).to(y.dtype)
    out[..., second] = sums(b, c, a, s).to(y.dtype)
    return out


def unfused_rope(given: Arguments, *, interleaved: bool = False) -> tuple[Any, Any]:
    rs = (given["qk_var"] + EPSILON).rsqrt()
    outputs = []
    for column, tag in enumerate("qk"):
        x = given[tag]
        y = ((x.float() * rs[:, column, None]) * given[f"gamma_{tag}"]).to(x.dtype)
        heads = y.view(x.shape[0], x.shape[1] // HEAD_DIM, HEAD_DIM)
        if given["positions"] is not None:
            cos, sin = given["cos_sin_cache"][given["positions"]].chunk(2, dim=1)
            heads = rotated(heads, cos, sin, interleaved=interleaved)
        outputs.append(heads.reshape(x.shape))
    return outputs[0], outputs[1]


def unfused(given: Arguments, *, interleaved: bool = False) -> Arguments:
    """Return q_out, k_out and the caches after a call."""
    q_out, k_out = unfused_rope(given, interleaved=interleaved)
    results = {"q_out": q_out, "k_out": k_out}
    for tag, x in (("k", k_out), ("v", given["v"])):
        cache = given[f"{tag}_cache"].clone()
        heads = x.reshape(-1, KV_HEADS, HEAD_DIM)
        if cache.dtype == torch.float8_e4m3fn:
            quotient = heads.float() / given[f"{tag}_scale"][:, None]
            heads = quotient.clamp(-448, 448).to(cache.dtype)
        for row, slot in enumerate(given["slot_mapping"].tolist()):
            if slot >= 0:
                cache[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = heads[row]
        results[f"{tag}_cache"] = cache
    return results


def array(tensor: Any) -> Any:
    return from_torch(tensor.detach().contiguous())


def same(got: Any, wanted: Any) -> None:
    """Compare tensors, or tuples of them, bit by bit; NaN is equal to NaN."""
    got, wanted = (x if isinstance(x, tuple) else (x,) for x in (got, wanted))
    for a, b in zip(got, wanted, strict=True):
        assert differing(array(a), array(b)) == 0


def check(api: Any, given: Arguments, *, interleaved: bool = False, **outputs: Any) -> None:
    """Call the operation that stores, and compare all that it writes with the unfused graph."""
    wanted = unfused(given, interleaved=interleaved)
    caches = [given["k_cache"], given["v_cache"]]
    versions = [cache._version for cache in caches]
    q_out, k_out = api.qk_rms_norm_rope_cache(
        **given, **outputs, head_dim=HEAD_DIM, interleaved=interleaved, epsilon=EPSILON
    )
    same(q_out, wanted["q_out"])
    assert (k_out is None) == ("k_out" not in outputs)
    if k_out is not None:
        same(k_out, wanted["k_out"])
    for name, cache, version in zip(("k_cache", "v_cache"), caches, versions, strict=True):
        same(cache, wanted[name])
        # Views of one buffer have one version.
        writes = sum(x is cache or x._base is cache._base is not None for x in caches)
        assert cache._version == version + writes, name


APIS = pytest.mark.parametrize("api", [qknorm_tvm, torch_ops], ids=["api", "operators"])

# ---- bits ---------------------------------------------------------------------------------------


@APIS
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_equal_to_the_unfused_graph(api: Any, rows: int) -> None:
    given = tensors(rows)
    same(
        api.qk_rms_norm_rope(**rope_arguments(given), head_dim=HEAD_DIM, epsilon=EPSILON),
        unfused_rope(given),
    )
    check(api, given)


@APIS
@pytest.mark.parametrize("scales", [1, KV_HEADS])
def test_float8(api: Any, scales: int) -> None:
    """torch's float8 goes through DLPack, and is rounded as torch rounds it."""
    check(api, float8(tensors(17), scales))


@APIS
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "cos_dtype", "interleaved"),
    [
        ("float16", "float16", False),
        ("float16", "float32", True),
        ("bfloat16", "float32", False),
        ("bfloat16", "bfloat16", True),
        ("float32", "float32", False),
    ],
)
def test_types_and_pairs(api: Any, dtype: str, cos_dtype: str, interleaved: bool) -> None:
    check(api, tensors(17, dtype, cos_dtype), interleaved=interleaved)
    check(api, float8(tensors(17, dtype, cos_dtype)), interleaved=interleaved)


@APIS
@pytest.mark.slow
def test_without_a_rotation(api: Any) -> None:
    given = tensors() | {"positions": None, "cos_sin_cache": None}
    same(
        api.qk_rms_norm_rope(**rope_arguments(given), head_dim=HEAD_DIM, epsilon=EPSILON),
        unfused_rope(given),
    )
    check(api, given)


@APIS
@pytest.mark.slow
def test_statistics_of_the_launch(api: Any) -> None:
    given = tensors(9)
    local = {**given, "qk_var": None}
    wanted = tensors(9)
    wanted["qk_var"] = qknorm_tvm.row_mean_of_squares_qk(given["q"], given["k"])
    call = {"head_dim": HEAD_DIM, "epsilon": EPSILON}
    same(api.qk_rms_norm_rope(**rope_arguments(local), **call), unfused_rope(wanted))
    q_out, _ = api.qk_rms_norm_rope_cache(**local, **call)
    results = unfused(wanted)
    same(q_out, results["q_out"])
    same(given["k_cache"], results["k_cache"])


# ---- the three forms ----------------------------------------------------------------------------


@APIS
def test_outputs_given(api: Any) -> None:
    given = tensors()
    outputs = {
        "q_out": torch.empty(5, Q_COLS).bfloat16(),
        "k_out": torch.empty(5, K_COLS).bfloat16(),
    }
    q_out, k_out = api.qk_rms_norm_rope(
        **rope_arguments(given), **outputs, head_dim=HEAD_DIM, epsilon=EPSILON
    )
    assert q_out is outputs["q_out"]
    assert k_out is outputs["k_out"]
    same((q_out, k_out), unfused_rope(given))
    assert [out._version for out in outputs.values()] == [1, 1]
    q_out = torch.empty(5, Q_COLS).bfloat16()
    check(api, given, q_out=q_out)
    assert q_out._version == 1


@APIS
@pytest.mark.slow
def test_k_given_too(api: Any) -> None:
    q_out, k_out = torch.empty(5, Q_COLS).bfloat16(), torch.empty(5, K_COLS).bfloat16()
    check(api, tensors(), q_out=q_out, k_out=k_out)
    assert (q_out._version, k_out._version) == (1, 1)


def test_in_place() -> None:
    for api in (qknorm_tvm, torch_ops):
        given = tensors()
        wanted = unfused_rope(given)
        q, k = given["q"], given["k"]
        before = q._version  # of the whole projection: q and k are views of it
        if api is torch_ops:
            assert api.qk_rms_norm_rope_(**rope_arguments(given), head_dim=HEAD_DIM,
                                         epsilon=EPSILON) is None  # fmt: skip
        else:
            api.qk_rms_norm_rope(
                **rope_arguments(given), q_out=q, k_out=k, head_dim=HEAD_DIM, epsilon=EPSILON
            )
        same((q, k), wanted)
        assert q._version == before + 2
        given = tensors()
        results, k_before = unfused(given), given["k"].clone()
        if api is torch_ops:
            assert api.qk_rms_norm_rope_cache_(**given, head_dim=HEAD_DIM,
                                               epsilon=EPSILON) is None  # fmt: skip
        else:
            api.qk_rms_norm_rope_cache(
                **given, q_out=given["q"], head_dim=HEAD_DIM, epsilon=EPSILON
            )
        same(given["q"], results["q_out"])
        same(given["k"], k_before)
        for name in ("k_cache", "v_cache"):
            same(given[name], results[name])


def test_outputs_that_must_come_together() -> None:
    given = tensors()
    with pytest.raises(ValueError, match="given both or neither, got q_out alone"):
        torch_ops.qk_rms_norm_rope(**rope_arguments(given), head_dim=HEAD_DIM, q_out=given["q"])
    with pytest.raises(ValueError, match="q_out must be given with k_out, got k_out alone"):
        torch_ops.qk_rms_norm_rope_cache(**given, head_dim=HEAD_DIM, k_out=given["k"])


# ---- mistakes -----------------------------------------------------------------------------------

#: What is changed of `tensors`, and what it gets from eager code and from fake tensors.
MISTAKES: list[tuple[Callable[[Arguments], Arguments], str]] = [
    (lambda a: {"k": a["k"].half()}, "k must be bfloat16, got float16"),
    (lambda a: {"v": a["v"].float()}, "v must be bfloat16, got float32"),
    (lambda a: {"v": a["v"][:, 1:]}, "v must have 32 columns, got 31"),
    (lambda a: {"v": a["v"][1:]}, "v must have 5 rows like q, got 4"),
    (lambda a: {"gamma_q": a["gamma_q"][1:]}, "gamma_q must have 64 elements, got 63"),
    (lambda a: {"qk_var": a["qk_var"][:3]}, "qk_var must have 5 rows like q, got 3"),
    (lambda a: {"positions": a["positions"].int()}, "positions must be int64, got int32"),
    (lambda a: {"positions": a["positions"][:4]},
     "positions must have 5 elements like q's rows, got 4"),
    (lambda a: {"positions": a["positions"][None]}, "positions must have 1 dimension, got 2"),
    (lambda a: {"positions": None},
     "positions and cos_sin_cache must be given both or neither, got cos_sin_cache alone"),
    (lambda a: {"cos_sin_cache": None},
     "positions and cos_sin_cache must be given both or neither, got positions alone"),
    (lambda a: {"cos_sin_cache": a["cos_sin_cache"].half()},
     "rotary_dtype must be one of bfloat16, float32, got 'float16'"),
    (lambda a: {"cos_sin_cache": a["cos_sin_cache"][:, :7]},
     "cos_sin_cache must have an even number of columns, at most head_dim (16), got 7"),
    (lambda a: {"cos_sin_cache": torch.ones(40, 18).bfloat16()},
     "cos_sin_cache must have an even number of columns, at most head_dim (16), got 18"),
    (lambda a: {"cos_sin_cache": a["cos_sin_cache"][0]},
     "cos_sin_cache must have 2 dimensions, got 1"),
    (lambda a: {"slot_mapping": a["slot_mapping"].int()}, "slot_mapping must be int64, got int32"),
    (lambda a: {"slot_mapping": torch.arange(6)},
     "slot_mapping must have at most 5 elements like q's rows, got 6"),
    (lambda a: {"head_dim": 24}, "head_dim must divide q_cols, 64, got 24"),
    (lambda a: {"head_dim": 64}, "head_dim must divide k_cols, 32, got 64"),
    (lambda a: {"k_cache": a["k_cache"].float()},
     "k_cache must be bfloat16 like q, or float8_e4m3fn, got float32"),
    (lambda a: {"v_cache": a["v_cache"].float()}, "v_cache must be bfloat16, got float32"),
    (lambda a: {"k_cache": a["k_cache"][0]}, "k_cache must have 4 dimensions, got 3"),
    (lambda a: {"k_cache": a["k_cache"][:, :, :1]}, "k_cache must have 2 heads, got 1"),
    (lambda a: {"k_cache": a["k_cache"][..., :8]},
     "k_cache must have 16 columns in a head, got 8"),
    (lambda a: {"v_cache": a["v_cache"][1:]}, "v_cache must have 4 blocks like k_cache, got 3"),
    (lambda a: {"v_cache": a["v_cache"][:, :2]},
     "v_cache must have 4 slots in a block like k_cache, got 2"),
    (lambda a: {"v_cache": a["k_cache"]}, "v_cache must not overlap k_cache"),
    (lambda a: {"k_scale": torch.ones(1)},
     "k_scale must be None for a cache of bfloat16, got a scale"),
    (lambda a: float8(a) | {"v_scale": None},
     "v_scale must be given for a cache of float8_e4m3fn, got None"),
    (lambda a: float8(a) | {"v_scale": torch.ones(3)},
     "v_scale must have 1 or 2 elements like k's heads, got 3"),
    (lambda a: float8(a) | {"v_scale": torch.ones(1).double()},
     "v_scale must be float32, got float64"),
    (lambda a: float8(a) | {"v_scale": torch.ones(1, 1)}, "v_scale must have 1 dimension, got 2"),
    (lambda a: {"q_out": torch.empty(5, Q_COLS)}, "q_out must be bfloat16, got float32"),
    (lambda a: {"q_out": torch.empty(4, Q_COLS).bfloat16()},
     "q_out must have 5 rows like q, got 4"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[text for _, text in MISTAKES])
def test_mistakes(change: Callable[[Arguments], Arguments], message: str) -> None:
    """What is wrong is said in eager mode and by fake tensors alike, and nothing is written."""
    given = tensors()
    given |= {"q_out": torch.zeros(5, Q_COLS).bfloat16(), "head_dim": HEAD_DIM}
    given |= change(given)
    before = {name: x.clone() for name, x in given.items() if isinstance(x, torch.Tensor)}
    with pytest.raises((TypeError, ValueError)) as eager:
        torch_ops.qk_rms_norm_rope_cache(**given)
    for name, value in before.items():
        same(given[name].float(), value.float())
    with FakeTensorMode() as mode:
        fakes: dict[int, Any] = {}  # what is one tensor stays one
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                given[name] = fakes.setdefault(id(value), mode.from_tensor(value))
        with pytest.raises((TypeError, ValueError)) as fake:
            torch_ops.qk_rms_norm_rope_cache(**given)
    assert str(eager.value).startswith(message)
    assert str(fake.value).startswith(message)
    assert type(eager.value) is type(fake.value)


def test_positions_and_slots_out_of_range() -> None:
    """An index that only the data know: on CPUs the operators refuse it at the call."""
    given = tensors()
    given["positions"][2] = MAX_POSITION
    with pytest.raises(ValueError, match=r"^positions must be less than cos_sin_cache's 40 rows"):
        torch_ops.qk_rms_norm_rope_cache(**given, head_dim=HEAD_DIM)
    given = tensors()
    given["slot_mapping"][1] = 16
    with pytest.raises(ValueError, match=r"^slot_mapping must be less than k_cache's 16 slots"):
        torch_ops.qk_rms_norm_rope_cache(**given, head_dim=HEAD_DIM)


@pytest.mark.parametrize("name", ["positions", "slot_mapping"])
def test_validate_looks_at_dense_integers_alone(name: str) -> None:
    """torch's own error for ``min`` of such a tensor, which names no argument."""
    for change, message in (
        (lambda x: x.to("meta"), "on the CPU or a CUDA device, got meta"),
        (lambda x: x.to_sparse(), "a dense tensor, got torch.sparse_coo"),
        (lambda x: x.to(torch.complex64), "int64, got complex64"),
    ):
        given = tensors()
        given[name] = change(given[name])
        with pytest.raises((TypeError, ValueError), match=f"^{name} must be {message}"):
            qknorm_tvm.qk_rms_norm_rope_cache(**given, head_dim=HEAD_DIM, validate=True)


# ---- autograd -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ROPE, "v", "k_cache", "v_cache"])
@APIS
def test_an_argument_that_requires_grad(api: Any, name: str) -> None:
    given = tensors()
    if not given[name].is_floating_point():
        pytest.skip("a tensor of integers has no gradient")
    given[name] = given[name].clone().requires_grad_()
    with pytest.raises(ValueError, match=rf"^{name} must not require grad \("):
        api.qk_rms_norm_rope_cache(**given, head_dim=HEAD_DIM)
    if name in ROPE:
        with pytest.raises(ValueError, match=rf"^{name} must not require grad \("):
            api.qk_rms_norm_rope(**rope_arguments(given), head_dim=HEAD_DIM)
    with torch.no_grad():
        check(api, given)


@pytest.mark.parametrize("form", ["rope", "rope, in place", "cache", "cache, in place"])
@APIS
def test_a_derivative_asked_for_otherwise(api: Any, form: str) -> None:
    """torch.func.grad and forward mode: a gradient of 0, or a tangent dropped, without a word."""
    given = tensors()
    given = {n: x.nan_to_num(0, 0, 0) if x.is_floating_point() else x for n, x in given.items()}
    others = {name: x for name, x in given.items() if name != "q"}
    rope = {name: others[name] for name in ROPE[1:]}

    def function(q: Any) -> Any:
        if form == "rope":
            return api.qk_rms_norm_rope(q, **rope, head_dim=HEAD_DIM)[0].sum()
        if form == "cache":
            return api.qk_rms_norm_rope_cache(q, **others, head_dim=HEAD_DIM)[0].sum()
        q, k = q * 1, rope["k"].clone()
        changed = {"k": k, "head_dim": HEAD_DIM}
        if form == "rope, in place":
            if api is torch_ops:
                api.qk_rms_norm_rope_(q, **(rope | changed))
            else:
                api.qk_rms_norm_rope(q, **(rope | changed), q_out=q, k_out=k)
        elif api is torch_ops:
            api.qk_rms_norm_rope_cache_(q, **(others | changed))
        else:
            api.qk_rms_norm_rope_cache(q, **(others | changed), q_out=q)
        return q.sum()

    q = given["q"]
    with pytest.raises(ValueError, match=r"^q\w* must not require grad "):
        torch.func.grad(function)(q)
    with pytest.raises(ValueError, match=r"^q\w* must not have a tangent "):
        torch.func.jvp(function, (q,), (torch.ones_like(q),))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(ValueError, match=r"^q\w* must not have a tangent "),
    ):
        function(torch.autograd.forward_ad.make_dual(q, torch.ones_like(q)))
    function(q)  # and nothing is refused for good


def test_a_cache_saved_for_a_backward() -> None:
    """A cache that is overwritten before the backward reads it: a wrong gradient, unsaid."""
    for api in (qknorm_tvm, torch_ops):
        given = tensors()
        weight = torch.ones_like(given["k_cache"], requires_grad=True)
        total = (weight * given["k_cache"]).sum()
        api.qk_rms_norm_rope_cache(**given, head_dim=HEAD_DIM)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()


# ---- compiled -----------------------------------------------------------------------------------


def forms() -> list[tuple[str, tuple[str, ...], Callable[[], Arguments]]]:
    """Every form of both operators: its name, its positional tensors, and those by name."""
    cache = (
        "q", "k", "v", "gamma_q", "gamma_k", "positions", "cos_sin_cache", "slot_mapping", "qk_var",
        "k_scale", "v_scale",
    )  # fmt: skip
    outputs = {"q_out": Q_COLS, "k_out": K_COLS}

    def new(*names: str) -> Arguments:
        return {name: torch.zeros(5, outputs[name]).bfloat16() for name in names}

    return [
        ("qk_rms_norm_rope", ROPE, dict),
        ("qk_rms_norm_rope_out", ROPE, lambda: new("q_out", "k_out")),
        ("qk_rms_norm_rope_", ROPE, dict),
        ("qk_rms_norm_rope_cache", cache, dict),
        ("qk_rms_norm_rope_cache_out", cache, lambda: new("q_out")),
        ("qk_rms_norm_rope_cache_", cache, dict),
    ]


@pytest.mark.parametrize(("name", "inputs", "more"), forms(), ids=[form[0] for form in forms()])
def test_opcheck(name: str, inputs: tuple[str, ...], more: Callable[[], Arguments]) -> None:
    """torch's own tests: the schema is true, fake and real outputs agree, a compiler may trace."""
    given = tensors()
    for key in ("q", "k", "v", "qk_var", "k_cache", "v_cache", "cos_sin_cache"):
        given[key] = torch.rand_like(given[key])  # opcheck's tolerance is none that NaN meets
    options = more() | {"head_dim": HEAD_DIM}
    if "cache" in name:
        options |= {key: given[key] for key in ("k_cache", "v_cache")}
    arguments = [given.get(key) for key in inputs]
    torch.library.opcheck(getattr(OPS, name).default, (*arguments, EPSILON), options)


def attention_input(hidden: Any, weight: Any, given: Arguments, kind: str) -> Any:
    """Project, norm, rotate and store; then read what was stored."""
    q, k, v = (hidden @ weight).split([Q_COLS, K_COLS, K_COLS], dim=1)
    rest = {name: x for name, x in given.items() if name not in ("q", "k", "v")}
    # Written out: of a variable number torch begins with a graph for any, and starts again.
    call = {"head_dim": HEAD_DIM, "epsilon": 1e-5}
    before = given["k_cache"].float().sum()
    if kind == "new":
        q, _ = torch_ops.qk_rms_norm_rope_cache(q, k, v, **rest, **call)
    elif kind == "out":
        q_out = torch.zeros(hidden.shape[0], Q_COLS, dtype=hidden.dtype)
        torch_ops.qk_rms_norm_rope_cache(q, k, v, **rest, **call, q_out=q_out)
        q = q_out
    else:
        torch_ops.qk_rms_norm_rope_cache_(q, k, v, **rest, **call)
    after = given["k_cache"].float().sum() + given["v_cache"].float().sum()
    rope = {name: rest[name] for name in ROPE[2:]}
    again = torch_ops.qk_rms_norm_rope(k.repeat(1, 2), k, **rope, **call)
    return q + 1, before, after, *again


@pytest.mark.parametrize("kind", ["new", "out", "in place"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_for_any_number_of_rows(backend: str, kind: str) -> None:
    """Caches that a compiled graph does not write, or that it reads from before the write."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(attention_input, backend=counter, fullgraph=True, dynamic=True)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, Q_COLS + 2 * K_COLS, generator=generator).bfloat16()
    cache = tensors(30)
    for rows in (6, 3, 11, 9):
        hidden = torch.randn(rows, 24, generator=generator).bfloat16()
        given = tensors(rows)
        given |= {name: cache[name].nan_to_num(0, 0, 0).clone() for name in ("k_cache", "v_cache")}
        copy = {name: x.clone() for name, x in given.items()}
        wanted = attention_input(hidden, weight, given, kind)
        with torch._dynamo.config.patch(error_on_recompile=True):
            same(compiled(hidden, weight, copy, kind), wanted)
        for name in given:
            same(copy[name].float(), given[name].float())
    assert counter.frame_count == 1


def test_a_mistake_is_seen_when_traced() -> None:
    """A graph that compiles and fails at its first call, far from the line that is wrong."""
    given = tensors()
    compiled = torch.compile(torch_ops.qk_rms_norm_rope_cache, backend="aot_eager", fullgraph=True)
    given["v_cache"] = given["v_cache"][:, :2]
    with pytest.raises(Exception, match="v_cache must have 4 slots in a block like k_cache, got 2"):
        compiled(**given, head_dim=HEAD_DIM)


# ---- what engines compute -----------------------------------------------------------------------


def contracted(a: Any, c: Any, b: Any, s: Any) -> Any:
    """Return ``fma(a, c, b * s)``: the product of two float32 is exact in float64."""
    return (a.double() * c.double() + (b * s).double()).float()


def rounded_each(a: Any, c: Any, b: Any, s: Any) -> Any:
    """Return ``a * c + b * s`` as transformers does, each operation rounded to bfloat16."""
    return ((a * c).bfloat16().float() + (b * s).bfloat16().float()).bfloat16().float()


def angles(positions: Any, rotary_dim: int) -> tuple[Any, Any]:
    """Return float32 cosines and sines of RoPE with base 10,000."""
    frequencies = 10000.0 ** (-torch.arange(0, rotary_dim, 2).float() / rotary_dim)
    turns = positions[:, None].float() * frequencies
    return turns.cos(), turns.sin()


def every_pattern(dtype: Any) -> Any:
    """Return all finite numbers of 16 bits whose products with cosines stay normal."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    size = x.float().abs()
    return x[(size == 0) | ((size > 2.0**-80) & (size < 2.0**100))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_contraction_changes_nothing_with_16_bit_angles(dtype: Any) -> None:
    """vLLM's kernel, whose compiler may contract: products of 16-bit numbers are exact."""
    x = every_pattern(dtype)
    x = x[: len(x) // 64 * 64]
    partner = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
    near = x.roll(1)  # sums that cancel
    cos, sin = (angle.to(dtype) for angle in angles(torch.arange(len(x) // 64), 64))
    for other in (partner, near):
        y = torch.stack([x.view(-1, 64)[:, :32], other.view(-1, 64)[:, :32],
                         x.view(-1, 64)[:, 32:], other.view(-1, 64)[:, 32:]], 1)  # fmt: skip
        y = y.reshape(-1, 2, 64)
        same(rotated(y, cos, sin, sums=contracted), rotated(y, cos, sin))


def difference(wanted: Any, got: Any) -> tuple[float, float]:
    """Return the share of elements that differ, and the largest difference over a pair's length."""
    a, b = wanted.double(), got.double()
    half = a.shape[-1] // 2
    length = (a[..., :half] ** 2 + a[..., half:] ** 2).sqrt().repeat(1, 1, 2)
    return (a != b).double().mean().item(), ((a - b).abs() / length).max().item()


def test_what_other_engines_compute_differs() -> None:
    """The figures of docs/exactness.md, "Rotation and store"."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(4096, 4, 128, generator=generator).bfloat16()
    cos, sin = angles(torch.randint(0, 32768, (4096,), generator=generator), 128)
    ours = rotated(y, cos.bfloat16(), sin.bfloat16())
    exact = rotated(y, cos, sin)  # from the float32 cache
    share, largest = difference(exact, rotated(y, cos, sin, sums=contracted))
    print(f"float32 cache, contracted: {share:.2e} of the elements, by {largest:.2e}")
    assert 0 < share < 1e-4
    assert largest < 2**-7
    share, largest = difference(ours, exact)
    print(f"float32 cache against a bfloat16 one: {share:.3f}, by {largest:.2e}")
    assert 0.2 < share < 0.6
    assert largest < 2**-6
    got = rotated(y, cos.bfloat16(), sin.bfloat16(), sums=rounded_each)
    share, largest = difference(ours, got)
    print(f"each operation rounded to bfloat16: {share:.3f}, by {largest:.2e}")
    assert 0.1 < share < 0.6
    assert largest < 2**-6


# ---- CUDA ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs torch with CUDA and a GPU")
@pytest.mark.parametrize("cache", ["bfloat16", "float8"])
@torch.no_grad()
def test_cuda_graphs(cache: str) -> None:
    """Captured by hand: caches, positions and slots are read and written at every replay."""
    given = tensors(16) if cache == "bfloat16" else float8(tensors(16), KV_HEADS)
    on_gpu = {name: x.cuda() for name, x in given.items()}
    wanted = unfused(on_gpu)  # rsqrt is the hardware's there
    call = {"head_dim": HEAD_DIM, "epsilon": EPSILON}
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q_out, _ = torch_ops.qk_rms_norm_rope_cache(**on_gpu, **call)
    q_out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for name, got in (("q_out", q_out), *((n, on_gpu[n]) for n in ("k_cache", "v_cache"))):
        same(got.cpu(), wanted[name].cpu())
