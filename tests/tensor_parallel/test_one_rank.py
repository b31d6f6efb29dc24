"""The layer in one process: what it refuses, what it calls, its module. Ranks: test_many_ranks."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")

import torch
import torch.distributed as dist

import qknorm_tvm
from qknorm_tvm import tensor_parallel as tp
from qknorm_tvm.tensor_parallel import one_launch
from qknorm_tvm.tensor_parallel.functional import _reduce
from qknorm_tvm.tensor_parallel.group import Members

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.skipif(
        not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
    ),
]
EPSILON = 1e-6
Q_COLS, K_COLS = 64, 16


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    """A default group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", world_size=1, rank=0)
    yield dist.group.WORLD
    dist.destroy_process_group()


@functools.cache
def inputs() -> tuple[Any, Any, Any, Any]:
    generator = torch.Generator().manual_seed(5)
    q, k = ((torch.randn(6, cols, generator=generator) * 3).bfloat16() for cols in (Q_COLS, K_COLS))
    return q, k, *(torch.randn(cols, generator=generator) for cols in (Q_COLS, K_COLS))


def wanted() -> tuple[Any, Any]:
    return qknorm_tvm.qk_rms_norm(*inputs(), EPSILON)


def check_same(got: Any, wanted: Any) -> None:
    for x, other in zip(got, wanted, strict=True):
        assert x.dtype == other.dtype
        assert torch.equal(x.reshape(other.shape), other)


# ---- the group ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: tp.qk_rms_norm(*inputs()),
        lambda: tp.qk_rms_norm(*inputs(), validate=True),
        lambda: tp.qk_rms_norm(*inputs(), layout=tp.HeadLayout(4, 1, 16, 2, 0)),
        lambda: tp.reduce_row_mean_of_squares(torch.ones(1, 2)),
    ],
)
def test_without_a_process_group(call: Any) -> None:
    """Nobody has said that this rank holds all columns: its own means may not be the rows'."""
    with pytest.raises(RuntimeError, match=r"got none: call torch.distributed.init_process_group"):
        call()


def test_a_layout_of_one_rank_needs_no_process_group() -> None:
    """A model of one process would have to start torch.distributed for its norms."""
    q, k, *gammas = inputs()
    norm = tp.TensorParallelQKNorm(4, 1, 16, EPSILON)
    norm.load_full(*gammas)
    check_same(norm(q, k), wanted())
    for options in ({}, {"validate": True}, {"statistics": "torch"}):
        tp.qk_rms_norm(q, k, *gammas, EPSILON, layout=tp.HeadLayout(4, 1, 16), **options)
    with pytest.raises(ValueError, match=r"^q must have 64 columns by its layout, got 32"):
        norm(q[:, :32], k)


@pytest.mark.usefixtures("group")
def test_a_group_of_another_type() -> None:
    with pytest.raises(TypeError, match=r"^group must be a torch.distributed.ProcessGroup or None"):
        tp.qk_rms_norm(*inputs(), group="nccl")


def test_one_rank_is_one_launch(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without other ranks, no statistics of its own, no second launch and nothing sent."""
    result = wanted()

    def unexpected(*_: Any, **__: Any) -> None:
        raise AssertionError("called")

    for name in ("row_mean_of_squares_qk", "apply_qk_rms_norm"):
        monkeypatch.setattr(qknorm_tvm, name, unexpected)
    for name in ("all_reduce", "all_gather"):
        monkeypatch.setattr(dist, name, unexpected)
    layout = tp.HeadLayout(4, 1, 16)
    for options in ({}, {"group": group}, {"layout": layout}, {"validate": True}):
        check_same(tp.qk_rms_norm(*inputs(), EPSILON, **options), result)
    check_same(tp.qk_rms_norm(*inputs(), q_cols_total=Q_COLS, k_cols_total=K_COLS), result)


@pytest.mark.parametrize("others", ["", "no TVM there"])
def test_code_that_a_rank_lacks(monkeypatch: pytest.MonkeyPatch, others: str) -> None:
    """A rank without the module raised, and the others waited for it on their GPUs."""
    asked = []

    def gathered(mine: str, members: object) -> list[str]:
        asked.append(mine)
        return [mine, others]

    monkeypatch.setattr(one_launch, "gathered", gathered)
    monkeypatch.setattr(one_launch, "_everywhere", {})
    spec = qknorm_tvm.KernelSpec(
        op="qk_rms_norm", q_cols=64, k_cols=16, statistics="peers", target="cuda:sm_90"
    )
    for handle, mine in enumerate(("", "no module here")):

        def module_for(spec: object, mine: str = mine) -> None:
            if mine:
                raise qknorm_tvm.BuildError(mine)

        monkeypatch.setattr(one_launch, "module_for", module_for)
        workspace: Any = types.SimpleNamespace(handle=handle, members=None)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not one_launch.is_everywhere(workspace, spec)
        assert len(asked) == handle
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        missing = [f"{text} on rank {rank}" for rank, text in enumerate((mine, others)) if text]
        told = (
            pytest.warns(RuntimeWarning, match=f"every rank must have its code, got {missing[0]}")
            if missing
            else contextlib.nullcontext()
        )
        with told:
            assert one_launch.is_everywhere(workspace, spec) == (not missing)
        assert one_launch.is_everywhere(workspace, spec) == (not missing)
    assert asked == ["", "no module here"]


@pytest.mark.usefixtures("group")
def test_statistics_by_torch_on_one_rank() -> None:
    q, k, *gammas = inputs()
    qk_var = torch.stack([x.float().pow(2).mean(-1) for x in (q, k)], 1)
    got = tp.qk_rms_norm(q, k, *gammas, EPSILON, statistics="torch")
    check_same(got, qknorm_tvm.apply_qk_rms_norm(q, k, qk_var, *gammas, EPSILON))


# ---- shapes and outputs ---------------------------------------------------------------------


@pytest.mark.usefixtures("group")
def test_leading_dimensions() -> None:
    """Viewable or not, a result has the input's shape."""
    q, k, *gammas = inputs()
    got = tp.qk_rms_norm(q.view(1, 2, 3, -1), k.view(1, 2, 3, -1), *gammas)
    assert got[0].shape == (1, 2, 3, Q_COLS)
    check_same(got, wanted())
    turned = [x.view(2, 3, -1).transpose(0, 1) for x in (q, k)]  # no view as rows
    got = tp.qk_rms_norm(*turned, *gammas)
    assert got[1].shape == (3, 2, K_COLS)
    check_same([x.transpose(0, 1).reshape(6, -1) for x in got], wanted())
    empty = tp.qk_rms_norm(q[:0].view(2, 0, Q_COLS), k[:0].view(2, 0, K_COLS), *gammas)
    assert [tuple(x.shape) for x in empty] == [(2, 0, Q_COLS), (2, 0, K_COLS)]


@pytest.mark.usefixtures("group")
def test_outputs_given_and_in_place() -> None:
    q, k, *gammas = inputs()
    for statistics in ("fused", "torch"):
        result = tp.qk_rms_norm(q, k, *gammas, statistics=statistics)
        q_out = torch.empty(2, 3, Q_COLS, dtype=torch.bfloat16)
        k_out = torch.empty(2, 3, K_COLS, dtype=torch.bfloat16)
        outputs = {"q_out": q_out, "k_out": k_out}
        got = tp.qk_rms_norm(
            q.view(2, 3, -1), k.view(2, 3, -1), *gammas, statistics=statistics, **outputs
        )
        assert got[0] is q_out
        assert got[1] is k_out
        check_same(got, result)
        mine = q.clone(), k.clone()
        check_same(
            tp.qk_rms_norm(*mine, *gammas, statistics=statistics, q_out=mine[0], k_out=mine[1]),
            result,
        )
        check_same(mine, result)
    for dtype in ("float32", torch.float32):
        assert tp.qk_rms_norm(*inputs(), out_dtype=dtype)[1].dtype == torch.float32


# ---- wrong arguments ------------------------------------------------------------------------


def ones(*shape: int, dtype: Any = torch.bfloat16, **options: Any) -> Any:
    return torch.ones(*shape, dtype=dtype, **options)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q must be a torch.Tensor, got list"),
        ({"k": inputs()[1].float().numpy()}, TypeError, "k must be a torch.Tensor, got ndarray"),
        (
            {"q": ones(6, 64, dtype=torch.float64)},
            TypeError,
            "q must be one of bfloat16, .* float64",
        ),
        (
            {"k": ones(6, 16, dtype=torch.float16)},
            TypeError,
            "k must be bfloat16 like q, got float16",
        ),
        ({"q": ones(64)}, ValueError, "q must have at least 2 dimensions, got 1"),
        ({"k": ones(6, 0)}, ValueError, "k must have at least 1 column, got 0"),
        ({"k": ones(5, 16)}, ValueError, r"k must have the rows of q \(6,\), got \(5,\)"),
        (
            {"q": ones(64, 6).T},
            ValueError,
            r"q must have contiguous columns \(stride 1\), got stride 6",
        ),
        (
            {"q": ones(6, 64).to_sparse()},
            TypeError,
            "q must be a dense tensor, got torch.sparse_coo",
        ),
        ({"k": ones(6, 16, device="meta")}, ValueError, "k must be on cpu like q, got meta"),
        ({"q": ones(6, 64, requires_grad=True)}, ValueError, "q must not require grad"),
        ({"gamma_q": ones(64)}, TypeError, "gamma_q must be float32, got bfloat16"),
        (
            {"gamma_k": torch.ones(64)},
            ValueError,
            r"gamma_k must have shape \(16,\), the columns of k, got",
        ),
        ({"gamma_q": None}, TypeError, "gamma_q must be a torch.Tensor, got NoneType"),
        ({"epsilon": "small"}, TypeError, "epsilon must be a float, got 'small'"),
        ({"epsilon": True}, TypeError, "epsilon must be a float, got True"),
        (
            {"statistics": "exact"},
            ValueError,
            "statistics must be one of fused, torch, got 'exact'",
        ),
        ({"cast_before_gamma": 1}, TypeError, "cast_before_gamma must be a bool, got int"),
        ({"out_dtype": "int8"}, ValueError, "out_dtype must be one of bfloat16, .*'int8'"),
        (
            {"q_out": ones(6, 16)},
            ValueError,
            r"q_out must have shape \(6, 64\) like q, got \(6, 16\)",
        ),
        (
            {"k_out": ones(6, 16), "out_dtype": "float32"},
            TypeError,
            "k_out must be float32 like out_dtype",
        ),
        (
            {"q_out": ones(6, 64), "k_out": ones(6, 16, dtype=torch.float32)},
            TypeError,
            "k_out must be bfloat16 like q_out, got float32",
        ),
        ({"q_cols_total": 65}, ValueError, "q_cols_total must be 64, got 65"),
        ({"k_cols_total": 16.0}, TypeError, "k_cols_total must be an int, got float"),
        ({"k_replicas": 2}, ValueError, "k_replicas must be 1, got 2"),
        ({"layout": (4, 1, 16)}, TypeError, "layout must be a HeadLayout, got tuple"),
        (
            {"layout": tp.HeadLayout(4, 2, 16)},
            ValueError,
            "k must have 32 columns by its layout, got 16",
        ),
        (
            {"layout": tp.HeadLayout(8, 2, 16, 2, 1)},
            ValueError,
            "layout must be for rank 0 of 1 like the group, got rank 1 of 2",
        ),
        (
            {"layout": tp.HeadLayout(4, 1, 16), "q_cols_total": 64},
            ValueError,
            "layout must be None where column totals are given, got both",
        ),
    ],
)
def test_a_wrong_argument(
    changes: dict[str, Any], error: type, message: str, validate: bool
) -> None:
    names = ("q", "k", "gamma_q", "gamma_k")
    arguments = {**dict(zip(names, inputs(), strict=True)), **changes}
    with pytest.raises(error, match=f"^{message}"):
        tp.qk_rms_norm(**arguments, validate=validate)


@pytest.mark.usefixtures("group")
def test_an_output_that_is_no_matrix_is_refused() -> None:
    """A view of it as rows does not exist, and a copy would not be what the caller gave."""
    q, k, *gammas = inputs()
    q_out = torch.empty(3, 2, Q_COLS, dtype=torch.bfloat16).transpose(0, 1)
    with pytest.raises(ValueError, match=r"^q_out must be viewable as a matrix of rows without"):
        tp.qk_rms_norm(q.view(2, 3, -1), k.view(2, 3, -1), *gammas, q_out=q_out)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("qk_var", "weights", "error", "message"),
    [
        ([[1.0, 1.0]], {}, TypeError, "qk_var must be a torch.Tensor, got list"),
        (ones(2, 2), {}, TypeError, "qk_var must be float32, got bfloat16"),
        (torch.ones(2, 3), {}, ValueError, r"qk_var must have shape \(M, 2\), got \(2, 3\)"),
        (torch.ones(2, 5).T, {}, ValueError, r"qk_var must be contiguous, got strides \(1, 5\)"),
        (torch.ones(2, 2), {"q_weight": 0}, ValueError, "q_weight must be over 0 and at most 1"),
        (torch.ones(2, 2), {"k_weight": 1.5}, ValueError, "k_weight must be over 0 and at most 1"),
        (torch.ones(2, 2), {"q_weight": float("nan")}, ValueError, "q_weight must be over 0"),
        (torch.ones(2, 2), {"k_weight": "1"}, TypeError, "k_weight must be a float or None, got"),
        (ones(2, 2, dtype=torch.float32, requires_grad=True), {}, ValueError, "qk_var must not"),
    ],
)
def test_wrong_statistics(qk_var: Any, weights: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        tp.reduce_row_mean_of_squares(qk_var, **weights)


# ---- derivatives ----------------------------------------------------------------------------


def with_tangent(f: Any, q: Any) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(q, q))


DERIVATIVES = {
    "grad": lambda f, q: torch.func.grad(f)(q),
    "vjp": lambda f, q: torch.func.vjp(f, q)[1](torch.ones(())),
    "jacrev": lambda f, q: torch.func.jacrev(f)(q),
    "jvp": lambda f, q: torch.func.jvp(f, (q,), (q,)),
    "jacfwd": lambda f, q: torch.func.jacfwd(f)(q),
    "dual": lambda f, q: with_tangent(f, q),
}
CALLS = {
    "layer": lambda q: tp.qk_rms_norm(q, *inputs()[1:])[0].float().sum(),
    "statistics by torch": lambda q: tp.qk_rms_norm(q, *inputs()[1:], statistics="torch")[0].sum(),
    "module": lambda q: tp.TensorParallelQKNorm(4, 1, 16)(q, inputs()[1])[0].sum(),
    "reduction": lambda q: tp.reduce_row_mean_of_squares(q[:, :2].float().contiguous()).sum(),
}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_derivatives(derivative: str, name: str) -> None:
    """There is none: 0, or a tangent that is dropped, is a wrong number without a word."""
    with pytest.raises(ValueError, match=r"^(q|qk_var) must not (require grad|have a tangent)"):
        DERIVATIVES[derivative](CALLS[name], inputs()[0])


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", CALLS)
def test_vmap(name: str) -> None:
    """A batch that the operation does not see: one row's memory would pass for all."""
    with pytest.raises(TypeError, match=r"^(q|qk_var) must be a tensor in memory, got one that a"):
        torch.vmap(CALLS[name])(inputs()[0][None])


@pytest.mark.usefixtures("group")
def test_writes_are_counted() -> None:
    """A tensor saved for someone else's backward and written since: its gradient is wrong."""
    q, k, *gammas = inputs()
    for statistics in ("fused", "torch"):
        q_out, k_out = q.float(), k.float()
        w = torch.ones(Q_COLS, requires_grad=True)
        loss = (w * q_out).sum()  # saves q_out
        with torch.no_grad():
            tp.qk_rms_norm(q, k, *gammas, q_out=q_out, k_out=k_out, statistics=statistics)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# ---- how the ranks' means are joined --------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "weights", "op", "sent"),
    [
        ("nccl", (None, None), "AVG", (8.0, 4.0)),
        ("gloo", (None, None), "SUM", (2.0, 1.0)),
        # AVG on one rank and SUM on another would be nonsense: given weights, always SUM.
        ("nccl", (0.25, 0.25), "SUM", (2.0, 1.0)),
        ("nccl", (0.5, 0.25), "SUM", (4.0, 1.0)),
        ("gloo", (0.5, None), "SUM", (4.0, 1.0)),
    ],
)
def test_one_all_reduce(
    monkeypatch: pytest.MonkeyPatch, backend: str, weights: tuple, op: str, sent: tuple
) -> None:
    """NCCL averages by itself; what other backends sum is weighted first."""
    calls = []
    monkeypatch.setattr(dist, "get_backend_config", lambda _: f"cpu:{backend},cuda:other")
    monkeypatch.setattr(
        dist,
        "all_reduce",
        lambda tensor, op, group: calls.append((op, tuple(tensor[0].tolist()), group)),
    )
    qk_var = torch.tensor([[8.0, 4.0]])
    _reduce(qk_var, Members("group", 4, 0), *weights)
    assert calls == [(getattr(dist.ReduceOp, op), sent, "group")]
    calls.clear()
    _reduce(qk_var[:0], Members("group", 4, 0), *weights)
    assert calls == [], "nothing to send"


# ---- the module -----------------------------------------------------------------------------


@pytest.fixture
def norm(group: Any) -> Any:
    norm = tp.TensorParallelQKNorm(4, 1, 16, EPSILON)
    norm.load_full(*inputs()[2:])
    return norm


def test_module(norm: Any) -> None:
    q, k, *_ = inputs()
    check_same(norm(q, k), wanted())
    check_same(copy.deepcopy(norm)(q, k), wanted())
    assert {name: tuple(x.shape) for name, x in norm.state_dict().items()} == {
        "gamma_q": (Q_COLS,),
        "gamma_k": (K_COLS,),
    }
    assert not any(gamma.requires_grad for gamma in norm.parameters())
    assert str(norm) == (
        "TensorParallelQKNorm(q_heads=4, kv_heads=1, head_dim=16, rank=0 of 1, epsilon=1e-06, "
        "statistics='fused', cast_before_gamma=False)"
    )


def test_scales_stay_float32(norm: Any) -> None:
    """`model.bfloat16()` must not round them, nor make the next call fail."""
    q, k, *_ = inputs()
    for change in (norm.bfloat16, norm.half, lambda: norm.to(torch.float16)):
        assert change() is norm
        check_same(norm(q, k), wanted())
    assert norm.to("meta").gamma_q.device.type == "meta"


def test_a_state_dict_of_another_dtype_is_widened(norm: Any) -> None:
    rounded = {name: gamma.bfloat16() for name, gamma in norm.state_dict().items()}
    norm.load_state_dict(rounded)
    for name, gamma in norm.named_parameters():
        assert gamma.dtype == torch.float32
        assert torch.equal(gamma, rounded[name].float())


@pytest.mark.parametrize(
    ("gamma_k", "error", "message"),
    [
        (torch.ones(64), ValueError, r"gamma_k must have the whole layer's shape \(16,\), got"),
        (torch.ones(16).int(), TypeError, "gamma_k must have a floating-point type, got torch.int"),
        ([1.0] * 16, TypeError, "gamma_k must be a torch.Tensor, got list"),
    ],
)
def test_load_full_takes_both_or_none(norm: Any, gamma_k: Any, error: type, message: str) -> None:
    before = norm.gamma_q.clone()
    with pytest.raises(error, match=f"^{message}"):
        norm.load_full(torch.zeros(Q_COLS), gamma_k)
    assert torch.equal(norm.gamma_q, before)


# ---- torch.compile --------------------------------------------------------------------------


@pytest.mark.parametrize("with_group", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(with_group: bool, backend: str, request: pytest.FixtureRequest) -> None:
    """A model compiles in one graph, and for any number of rows once."""
    torch._dynamo.reset()
    q, k, *gammas = inputs()
    group = request.getfixturevalue("group") if with_group else None
    norm = tp.TensorParallelQKNorm(4, 1, 16, EPSILON, group=group)
    norm.load_full(*gammas)

    def attention_inputs(qkv: Any) -> Any:
        q, k, v = qkv.split([Q_COLS, K_COLS, K_COLS], dim=-1)
        q_out, k_out = norm(q, k)
        return q_out * 2, k_out, v

    compiled = torch.compile(attention_inputs, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad():
        for rows in (6, 4):
            qkv = torch.cat([q, k, k], 1)[:rows]
            torch._dynamo.mark_dynamic(qkv, 0)
            q_out, k_out, _ = compiled(qkv)
            check_same((q_out / 2, k_out), [x[:rows] for x in wanted()])
        with pytest.raises(Exception, match=r"q must have 64 columns by its layout, got 63"):
            torch.compile(norm, fullgraph=True, backend=backend)(q[:, :63], k)
    torch._dynamo.reset()


@pytest.mark.usefixtures("group")
def test_compiled_calls() -> None:
    """The function itself, with all that it takes: outputs, totals, another type, in place."""
    torch._dynamo.reset()
    q, k, *gammas = inputs()
    compiled = torch.compile(tp.qk_rms_norm, fullgraph=True, backend="aot_eager")
    totals = {"q_cols_total": Q_COLS, "k_cols_total": K_COLS}
    with torch.no_grad():
        for options in (
            {},
            totals,
            {"out_dtype": torch.float32},
            {"out_dtype": "float32", "cast_before_gamma": True},
            {"statistics": "torch", "layout": tp.HeadLayout(4, 1, 16), "validate": True},
        ):
            check_same(
                compiled(q.view(2, 3, -1), k.view(2, 3, -1), *gammas, 1e-5, **options),
                tp.qk_rms_norm(q.view(2, 3, -1), k.view(2, 3, -1), *gammas, 1e-5, **options),
            )
        mine = q.clone(), k.clone()
        got = compiled(*mine, *gammas, EPSILON, q_out=mine[0], k_out=mine[1])
        check_same(got, wanted())
        check_same(mine, wanted())
    torch._dynamo.reset()


def _overlapping_outputs(x: Any) -> tuple[Any, ...]:
    base = x + 1
    return base[:, :16].clone(), base[:, 16:32].clone(), base[:, :16], base[:, 8:24]


def _overlapping_in_place(x: Any) -> tuple[Any, ...]:
    base = x + 1
    return base[:, :16], base[:, 8:24], base[:, :16], base[:, 8:24]


def _output_over_the_other_input(x: Any) -> tuple[Any, ...]:
    base = x + 1
    return base[:, :16].clone(), base[:, 16:32], base[:, 8:24], base[:, 24:].clone()


def _output_over_part_of_its_input(x: Any) -> tuple[Any, ...]:
    base = x + 1
    return base[:, :16], base[:, 16:32].clone(), base[:, 4:20], base[:, 16:32].clone()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    ("views", "message"),
    [
        (_overlapping_outputs, "k_out must not overlap q_out, got tensors that share memory"),
        (_overlapping_in_place, "k_out must not overlap q_out, got tensors that share memory"),
        (_output_over_the_other_input, "q_out must not overlap k, got tensors that share memory"),
        (_output_over_part_of_its_input, "q_out must be q itself .* or not overlap it"),
    ],
)
def test_overlap_is_refused_when_traced(views: Any, message: str, backend: str) -> None:
    """A compiler gives the operator copies: it computes what eager code refuses."""
    torch._dynamo.reset()
    gamma = torch.ones(16)

    def function(x: Any) -> Any:
        q, k, q_out, k_out = views(x)
        k_out = k_out if k_out.shape[1] == 16 else k_out[:, :16]
        tp.qk_rms_norm(q, k, gamma, gamma, q_out=q_out, k_out=k_out)
        return q_out * 2, k_out * 2

    with torch.no_grad():
        with pytest.raises(ValueError, match=message):
            function(torch.ones(4, 48))
        with pytest.raises(Exception, match=message):
            torch.compile(function, fullgraph=True, backend=backend)(torch.ones(4, 48))
    torch._dynamo.reset()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("statistics", ["fused", "torch"])
def test_a_write_is_counted_once(statistics: str) -> None:
    """A version of the outputs that is not raised, or twice by two who both think it theirs."""
    q, k, *gammas = inputs()
    outputs = q.clone(), k.clone()
    before = [out._version for out in outputs]
    tp.qk_rms_norm(
        q, k, *gammas, EPSILON, q_out=outputs[0], k_out=outputs[1], statistics=statistics
    )
    assert [out._version for out in outputs] == [version + 1 for version in before]
