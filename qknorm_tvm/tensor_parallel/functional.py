"""`qk_rms_norm` over a process group: local statistics, one all-reduce, apply."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from ..call import api
from ..call.arrays import canonical_dtype
from ..call.torch_autograd import count_writes
from ..call.torch_overlap import check_overlap
from ..operations import OPERATIONS
from . import one_launch
from .arguments import Call, Checked, check_no_derivative, dtype_name
from .group import Members, Report, disagreement, gathered, members_of
from .layout import HeadLayout
from .workspace import AUTO_ROWS, PeerWorkspace, automatic_workspace, workspace_of


def qk_rms_norm(
    q: torch.Tensor,
    k: torch.Tensor,
    gamma_q: torch.Tensor,
    gamma_k: torch.Tensor,
    epsilon: float = 1e-6,
    *,
    group: Any = None,
    q_cols_total: int | None = None,
    k_cols_total: int | None = None,
    k_replicas: int = 1,
    layout: HeadLayout | None = None,
    statistics: str = "fused",
    cast_before_gamma: bool = False,
    q_out: torch.Tensor | None = None,
    k_out: torch.Tensor | None = None,
    out_dtype: Any = None,
    validate: bool = False,
    workspace: PeerWorkspace | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise this rank's columns of Q and K by the mean squares of the whole rows.

    ::

        qk_var[:, 0] = mean of cast(Q, f32)^2 over the columns of all ranks       likewise K
        q_out = cast((cast(q, f32) * rsqrt(qk_var[:, 0] + epsilon)) * gamma_q, out_dtype)
        k_out = cast((cast(k, f32) * rsqrt(qk_var[:, 1] + epsilon)) * gamma_k, out_dtype)

    in two launches with one all-reduce of ``float32 [M, 2]`` between them; in one launch and
    without communication where the group has one rank; in one launch with a `workspace`, by which
    the ranks exchange their sums within it. Given the reduced statistics the outputs
    equal the unfused float32 graph bit for bit, and copies of a KV head on several ranks come out
    the same. Everything runs on torch's current stream.

    The mean of the whole row is the weighted mean of the ranks'. By default all ranks hold equally
    many columns. Otherwise say how many there are in all: `q_cols_total`, `k_cols_total` and, where
    a rank's columns of K are on other ranks too, `k_replicas`.

    Parameters
    ----------
    q, k : torch.Tensor, ``[M, Nq_local]`` and ``[M, Nk_local]``, bfloat16, float16 or float32
        This rank's columns, on one device. Rows may be strided; columns must be contiguous. More
        leading dimensions stand for rows, copied where they cannot be viewed as one. M is the same
        on every rank and may be 0.
    gamma_q, gamma_k : torch.Tensor, ``[Nq_local]`` and ``[Nk_local]``, float32
        Scales of these columns; `HeadLayout.shard_gamma_q` and `shard_gamma_k` cut them.
    epsilon : float
        Added to the mean squares, as float32.
    group : ProcessGroup, optional
        The ranks that share the rows; by default the default group. Where `layout` is of one rank
        none need exist.
    q_cols_total, k_cols_total : int, optional
        Columns of the whole Q, and of the whole K without copies. By default those of this rank
        times the number of ranks (for K: by the copies).
    k_replicas : int
        On how many ranks this rank's columns of K are; may differ from rank to rank. Only with
        `k_cols_total`.
    layout : HeadLayout, optional
        Instead of totals: checks the columns and the group against it.
    statistics : {"fused", "torch"}
        ``"fused"``: one launch for both mean squares. ``"torch"``: as models compute them,
        ``x.float().pow(2).mean(-1)``, whose rounding differs.
    cast_before_gamma : bool
        Round to the input's dtype before the multiplication by gamma, as MiniMax-M2's own code
        does.
    q_out, k_out : torch.Tensor, optional
        Where to write, in the shape of q and k; ``q_out is q`` and ``k_out is k`` are allowed.
    out_dtype : torch.dtype or str, optional
        Element type of outputs allocated here; by default q's.
    validate : bool
        Ask the other ranks first, in small all-gathers, whether all are called alike: rows, dtypes,
        epsilon and options are the same and columns add up. Each also tries the last step, and
        gives the outputs their values back. If a rank differs, or cannot go on, *every* rank raises
        the same ``ValueError``. Costs round trips, a second launch and, on GPUs, a
        synchronisation: for the first call and for tests. The same on every rank.
    workspace : PeerWorkspace or "auto", optional
        Of the same ranks, on q's GPU: one launch, whose sums are added in the order of ranks. M is
        at most its `max_rows`. ``"auto"``: one that the group's ranks make at the first call, where
        they can and the launch is the faster way: on CUDA with several ranks, fused statistics and
        up to `workspace.AUTO_ROWS` rows; otherwise three steps, whose all-reduce adds in the
        backend's order. The same on every rank.

    Returns
    -------
    (q_out, k_out)
        In the shapes of q and k.

    Raises
    ------
    RuntimeError
        The process group is not initialised.
    TypeError, ValueError
        An argument is wrong, or requires a derivative: the message says which, what was expected
        and what came. Nothing has been written. Without `validate` a rank that raises leaves the
        others waiting in the all-reduce until the group's timeout. Ranks that disagree may wait,
        compute nonsense or, with unequal rows over gloo, be aborted.
    BuildError
        The code had to be compiled and could not be.
    PeerError
        An earlier launch of `workspace` has given up waiting for a rank.
    """
    call = Call(
        q, k, gamma_q, gamma_k, epsilon, q_out, k_out, out_dtype, layout,
        q_cols_total, k_cols_total, k_replicas, statistics, cast_before_gamma, workspace, group,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        new_q, new_k = _trace(call, Norm(), validate)
        assert new_k is not None
        return new_q, new_k
    new_q, new_k = _layer(call, Norm(), validate)
    assert new_k is not None
    return (
        new_q.view(q.shape) if q_out is None else q_out,
        new_k.view(k.shape) if k_out is None else k_out,
    )


def qk_rms_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    gamma_q: torch.Tensor,
    gamma_k: torch.Tensor,
    positions: torch.Tensor | None,
    cos_sin_cache: torch.Tensor | None,
    *,
    head_dim: int,
    interleaved: bool = False,
    epsilon: float = 1e-6,
    group: Any = None,
    q_cols_total: int | None = None,
    k_cols_total: int | None = None,
    k_replicas: int = 1,
    layout: HeadLayout | None = None,
    statistics: str = "fused",
    cast_before_gamma: bool = False,
    q_out: torch.Tensor | None = None,
    k_out: torch.Tensor | None = None,
    validate: bool = False,
    workspace: PeerWorkspace | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise this rank's columns as `qk_rms_norm` does, and rotate their heads, in its launches.

    Parameters
    ----------
    positions, cos_sin_cache, head_dim, interleaved
        As for `qknorm_tvm.qk_rms_norm_rope`; q and k have two dimensions.
    q, k, gamma_q, gamma_k, epsilon
        As for `qk_rms_norm`, and so are all others.

    Returns
    -------
    (q_out, k_out)

    Raises
    ------
    RuntimeError, TypeError, ValueError, BuildError, PeerError
        As `qk_rms_norm`.
    """
    call = Call(
        q, k, gamma_q, gamma_k, epsilon, q_out, k_out, None, layout, q_cols_total, k_cols_total,
        k_replicas, statistics, cast_before_gamma, workspace, group,
    )  # fmt: skip
    rotation = Rotation(positions, cos_sin_cache, head_dim, interleaved)
    run = _trace if torch.compiler.is_compiling() else _layer
    new_q, new_k = run(call, rotation, validate)
    assert new_k is not None
    return new_q, new_k


def qk_rms_norm_rope_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gamma_q: torch.Tensor,
    gamma_k: torch.Tensor,
    positions: torch.Tensor | None,
    cos_sin_cache: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    head_dim: int,
    interleaved: bool = False,
    epsilon: float = 1e-6,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    group: Any = None,
    q_cols_total: int | None = None,
    k_cols_total: int | None = None,
    k_replicas: int = 1,
    layout: HeadLayout | None = None,
    statistics: str = "fused",
    cast_before_gamma: bool = False,
    q_out: torch.Tensor | None = None,
    k_out: torch.Tensor | None = None,
    validate: bool = False,
    workspace: PeerWorkspace | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Normalise and rotate as `qk_rms_norm_rope`, and store K and V in this rank's paged cache.

    Parameters
    ----------
    v, k_cache, v_cache, slot_mapping, k_scale, v_scale
        As for `qknorm_tvm.qk_rms_norm_rope_cache`: of this rank's heads.
    q, k, gamma_q, gamma_k, positions, cos_sin_cache, head_dim, interleaved, epsilon
        As for `qk_rms_norm_rope`, and so are all others.

    Returns
    -------
    (q_out, k_out)
        `k_out` is None where none is given.

    Raises
    ------
    RuntimeError, TypeError, ValueError, BuildError, PeerError
        As `qk_rms_norm`.
    """
    call = Call(
        q, k, gamma_q, gamma_k, epsilon, q_out, k_out, None, layout, q_cols_total, k_cols_total,
        k_replicas, statistics, cast_before_gamma, workspace, group,
    )  # fmt: skip
    store = Store(
        positions, cos_sin_cache, head_dim, interleaved, v, k_cache, v_cache, slot_mapping,
        k_scale, v_scale,
    )  # fmt: skip
    run = _trace if torch.compiler.is_compiling() else _layer
    return run(call, store, validate)


# ---- what follows the statistics --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Norm:
    """The last step of a layer that only normalises; `Rotation` and `Store` do more."""

    op = "qk_rms_norm"

    @property
    def tensors(self) -> dict[str, torch.Tensor | None]:
        """The tensors that only this step takes, by name."""
        return {}

    @property
    def trial(self) -> Norm:
        """The same step, storing nothing."""
        return self

    def choices(self, call: Call, checked: Checked) -> dict[str, Any]:
        """Return the fields of the step's `KernelSpec` that q, k and q_out do not show."""
        return {"cast_before_gamma": call.cast_before_gamma}

    def new_outputs(self, checked: Checked) -> dict[str, torch.Tensor]:
        """Return the outputs that are not given."""
        given, new = checked.outputs, {}
        other = next(iter(given.values())).dtype if given else checked.q.dtype
        dtype = getattr(torch, checked.out_dtype) if checked.out_dtype else other
        for name, x in (("q_out", checked.q), ("k_out", checked.k)):
            if name not in given:
                new[name] = torch.empty(x.shape, dtype=dtype, device=x.device)
        return new

    def apply(
        self, call: Call, checked: Checked, qk_var: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run it on statistics, or by itself where there are none."""
        scales = (call.gamma_q, call.gamma_k, call.epsilon)
        options = {"out_dtype": checked.out_dtype, "cast_before_gamma": call.cast_before_gamma}
        options |= checked.outputs
        if qk_var is None:
            return api.qk_rms_norm(checked.q, checked.k, *scales, **options)
        return api.apply_qk_rms_norm(checked.q, checked.k, qk_var, *scales, **options)


@dataclasses.dataclass(frozen=True)
class Rotation(Norm):
    """Norm, then rotation."""

    positions: Any
    cos_sin_cache: Any
    head_dim: Any
    interleaved: Any

    op = "qk_rms_norm_rope"

    @property
    def tensors(self) -> dict[str, torch.Tensor | None]:
        return {"positions": self.positions, "cos_sin_cache": self.cos_sin_cache}

    def choices(self, call: Call, checked: Checked) -> dict[str, Any]:
        rotation = api.rotation_fields(
            self.positions, self.cos_sin_cache, self.head_dim, self.interleaved
        )
        return {"cast_before_gamma": call.cast_before_gamma, **rotation}

    def apply(
        self, call: Call, checked: Checked, qk_var: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return api.qk_rms_norm_rope(
            checked.q, checked.k, call.gamma_q, call.gamma_k, self.positions, self.cos_sin_cache,
            **self._options(call, checked, qk_var),
        )  # fmt: skip

    def _options(self, call: Call, checked: Checked, qk_var: torch.Tensor | None) -> dict[str, Any]:
        options = {"head_dim": self.head_dim, "interleaved": self.interleaved}
        options |= {"epsilon": call.epsilon, "cast_before_gamma": call.cast_before_gamma}
        return options | {"qk_var": qk_var} | checked.outputs


@dataclasses.dataclass(frozen=True)
class Store(Rotation):
    """Norm, rotation, and the store into a paged cache."""

    v: Any
    k_cache: Any
    v_cache: Any
    slot_mapping: Any
    k_scale: Any
    v_scale: Any

    op = "qk_rms_norm_rope_cache"

    @property
    def tensors(self) -> dict[str, torch.Tensor | None]:
        scales = {"k_scale": self.k_scale, "v_scale": self.v_scale}
        scales = {n: None if s is None else api.as_list(s) for n, s in scales.items()}
        caches = {"v": self.v, "k_cache": self.k_cache, "v_cache": self.v_cache}
        return super().tensors | caches | {"slot_mapping": self.slot_mapping} | scales

    @property
    def trial(self) -> Store:
        return dataclasses.replace(self, slot_mapping=self.slot_mapping[:0])

    def choices(self, call: Call, checked: Checked) -> dict[str, Any]:
        dtype = api.cache_dtype_of(checked.q, self.k_cache, self.k_scale, self.v_scale)
        stores = {"cache_dtype": dtype, "writes_k_out": "k_out" in checked.outputs}
        return super().choices(call, checked) | stores

    def new_outputs(self, checked: Checked) -> dict[str, torch.Tensor]:
        new = super().new_outputs(checked)
        new.pop("k_out", None)
        return new

    def apply(
        self, call: Call, checked: Checked, qk_var: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return api.qk_rms_norm_rope_cache(
            checked.q, checked.k, self.v, call.gamma_q, call.gamma_k, self.positions,
            self.cos_sin_cache, self.k_cache, self.v_cache, self.slot_mapping,
            k_scale=self.k_scale, v_scale=self.v_scale, **self._options(call, checked, qk_var),
        )  # fmt: skip


def _layer(call: Call, last: Norm, validate: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a layer: in one launch with a workspace, else by statistics, all-reduce and last step."""
    workspace = _workspace(call)
    is_automatic = workspace is not call.workspace
    call = dataclasses.replace(call, workspace=workspace)
    members = _members(call.group, call.layout) if workspace is None else workspace.members
    if validate and members.world_size > 1 and dist.is_initialized():
        checked, qk_var = _check_together(call, members, last)
    else:
        checked = call.check(members)
        qk_var = None if workspace else _local_statistics(call, checked, members)
    if workspace is not None:
        outputs = checked.outputs | last.new_outputs(checked)
        launch = _launch(call, checked, outputs, last)
        if not is_automatic or launch.is_possible():
            launch.queue(call.epsilon, call.divisors(members))
            return outputs["q_out"], outputs.get("k_out")
        if qk_var is None:
            qk_var = _local_statistics(call, checked, members)
    if qk_var is not None:
        _reduce(qk_var, members, *checked.weights)
    return last.apply(call, checked, qk_var)


def _workspace(call: Call) -> PeerWorkspace | None:
    """Return the workspace of a call, if it has one."""
    given, q = call.workspace, call.q
    if given is None or isinstance(given, PeerWorkspace):
        return given
    if not isinstance(given, str) or given != "auto":
        raise TypeError(f"workspace must be a PeerWorkspace, 'auto' or None, got {given!r}")
    suits = isinstance(q, torch.Tensor) and q.is_cuda and call.statistics == "fused"
    if not suits or q.shape[:-1].numel() > AUTO_ROWS:
        return None
    members = _members(call.group, call.layout)
    return automatic_workspace(call.group, q.device) if members.world_size > 1 else None


def _launch(
    call: Call, checked: Checked, outputs: dict[str, torch.Tensor], last: Norm
) -> one_launch.Launch:
    tensors = {
        "q": checked.q, "k": checked.k, "gamma_q": call.gamma_q, "gamma_k": call.gamma_k,
        **last.tensors, **outputs,
    }  # fmt: skip
    check_no_derivative({n: x for n, x in last.tensors.items() if isinstance(x, torch.Tensor)})
    return one_launch.Launch(call.workspace, last.op, tensors, last.choices(call, checked))


def _members(group: Any, layout: Any) -> Members:
    # A layout says that one rank holds all columns. Without it, one of several may have forgotten
    # to initialise the group.
    alone = isinstance(layout, HeadLayout) and layout.world_size == 1
    return members_of(group, may_be_alone=alone)


def _check_together(
    call: Call, members: Members, last: Norm
) -> tuple[Checked, torch.Tensor | None]:
    """Check this rank's call, and that of all others; return the local statistics too."""
    failure = None
    try:
        checked = call.check(members)
        qk_var = _local_statistics(call, checked, members)
        # Only the last step knows its code, and which memory may overlap.
        before = {name: out.clone() for name, out in checked.outputs.items()}
        last.trial.apply(call, checked, qk_var)
        for name, out in checked.outputs.items():
            out.copy_(before[name])
        report = call.report(checked)
    except Exception as error:
        report, failure = Report(error=f"{type(error).__name__}: {error}"), error
    wrong = disagreement(gathered(report, members))
    if wrong is not None:
        raise ValueError(wrong) from failure
    return checked, qk_var


def _local_statistics(call: Call, checked: Checked, members: Members) -> torch.Tensor | None:
    """Return the mean squares of this rank's columns; None where the fused operation serves."""
    if call.statistics == "torch":
        return torch.stack([x.float().pow(2).mean(-1) for x in (checked.q, checked.k)], dim=1)
    if members.world_size == 1:
        return None
    return api.row_mean_of_squares_qk(checked.q, checked.k)


# ---- the all-reduce ---------------------------------------------------------------------------


def reduce_row_mean_of_squares(
    qk_var: torch.Tensor,
    *,
    group: Any = None,
    q_weight: float | None = None,
    k_weight: float | None = None,
) -> torch.Tensor:
    """Turn each rank's mean squares into those of the whole rows, in place, in one all-reduce.

    ::

        qk_var[:, 0] = sum over ranks of q_weight * qk_var[:, 0]      column 1 with k_weight

    Statistics are weighted before they are summed. So weights that are powers of two, as those of
    2, 4, 8 or 16 equal ranks, add no rounding, and a sum does not overflow where the mean would
    not. On NCCL equal ranks use its own average, which does the same without a launch for it.

    Parameters
    ----------
    qk_var : torch.Tensor, ``[M, 2]``, float32, contiguous
        Mean of squares of this rank's columns of Q and of K, on a device that the group
        communicates on. M is the same on every rank; with ``M == 0`` nothing is sent.
    group : ProcessGroup, optional
        By default the default group.
    q_weight, k_weight : float, optional
        What this rank's statistics count, over 0 and up to 1; over the ranks they add up to 1. For
        columns that are on one rank only it is local columns / total columns; where ``n`` ranks
        hold copies of the same ones, that / ``n``. By default 1 / number of ranks. Weights are
        given on every rank or on none.

    Returns
    -------
    torch.Tensor
        `qk_var` itself, the same bits on every rank.

    Raises
    ------
    RuntimeError
        The process group is not initialised.
    TypeError, ValueError
        An argument is wrong, or requires a derivative; nothing was sent. The other ranks then wait
        for this one until the group's timeout.
    """
    members = members_of(group)
    _check_statistics(qk_var, members)
    _check_weight("q_weight", q_weight)
    _check_weight("k_weight", k_weight)
    _reduce(qk_var, members, q_weight, k_weight)
    return qk_var


def _reduce(
    qk_var: torch.Tensor, members: Members, q_weight: float | None, k_weight: float | None
) -> None:
    """Do the work of `reduce_row_mean_of_squares` on arguments known to be right."""
    if qk_var.shape[0] == 0:
        return
    world = members.world_size
    op = dist.ReduceOp.SUM
    if q_weight is not None or k_weight is not None:
        q_factor, k_factor = q_weight or 1 / world, k_weight or 1 / world
        if q_factor != k_factor:
            # By column, not by a tensor of both: that would be copied to the device in every call.
            qk_var[:, 0].mul_(q_factor)
            qk_var[:, 1].mul_(k_factor)
        elif q_factor != 1:
            qk_var.mul_(q_factor)
    elif world > 1 and members.backends.get(qk_var.device.type) == "nccl":
        op = dist.ReduceOp.AVG
    elif world > 1:
        # Not times the reciprocal, which is rounded for counts that are no power of two.
        qk_var.div_(world)
    if world > 1:
        dist.all_reduce(qk_var, op=op, group=members.group)
        count_writes((qk_var,))


def _check_weight(name: str, weight: Any) -> None:
    if weight is None:
        return
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"{name} must be a float or None, got {type(weight).__name__}")
    if not 0 < weight <= 1:
        raise ValueError(f"{name} must be over 0 and at most 1, got {weight}")


def _check_statistics(qk_var: Any, members: Members) -> None:
    if not isinstance(qk_var, torch.Tensor):
        raise TypeError(f"qk_var must be a torch.Tensor, got {type(qk_var).__name__}")
    if qk_var.dtype != torch.float32:
        raise TypeError(f"qk_var must be float32, got {dtype_name(qk_var.dtype)}")
    if qk_var.dim() != 2 or qk_var.shape[1] != 2:
        raise ValueError(f"qk_var must have shape (M, 2), got {tuple(qk_var.shape)}")
    if not qk_var.is_contiguous():
        raise ValueError(f"qk_var must be contiguous, got strides {qk_var.stride()}")
    members.check_device("qk_var", qk_var)
    check_no_derivative({"qk_var": qk_var})


# ---- in a graph of torch.compile ----------------------------------------------------------------

_COMMON = (
    "ScalarType? out_dtype, str group_name, int[]? layout, int? q_cols_total, int? k_cols_total, "
    "int k_replicas, str statistics, bool cast_before_gamma, bool validate, str workspace"
)
_HEADS = "Tensor? positions, Tensor? cos_sin_cache, int head_dim, bool interleaved"
#: What the operator of each last step takes besides q, k, gamma_q, gamma_k and epsilon.
_SCHEMAS = {
    Norm: "Tensor(a!) q_out, Tensor(b!) k_out",
    Rotation: f"Tensor(a!) q_out, Tensor(b!) k_out, {_HEADS}",
    Store: (
        f"Tensor(a!) q_out, Tensor(b!)? k_out, Tensor(c!) k_cache, Tensor(d!) v_cache, {_HEADS}, "
        "Tensor v, Tensor slot_mapping, Tensor? k_scale, Tensor? v_scale"
    ),
}
_library = torch.library.Library("qknorm_tvm", "FRAGMENT")
_LAYOUT_FIELDS = tuple(field.name for field in dataclasses.fields(HeadLayout))


def _trace(call: Call, last: Norm, validate: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Put the whole layer into the graph as one operator, which checks its arguments itself."""
    outputs: list[torch.Tensor | None] = []
    dtype = None
    for x, out, other in ((call.q, call.q_out, call.k_out), (call.k, call.k_out, call.q_out)):
        dtype = call.out_dtype
        if dtype is None:
            dtype = x.dtype if other is None else other.dtype
        elif not isinstance(dtype, torch.dtype):
            dtype = getattr(torch, canonical_dtype("out_dtype", dtype))
        # Packed row by row: empty_like would keep a slice's row stride.
        outputs.append(x.new_empty(x.shape, dtype=dtype) if out is None else out)
    if call.k_out is None and isinstance(last, Store):
        outputs[1] = None
    heads = call.layout
    if heads is not None:
        heads = [getattr(heads, name) for name in _LAYOUT_FIELDS]
    fields = {field.name: getattr(last, field.name) for field in dataclasses.fields(last)}
    workspace = call.workspace
    if isinstance(workspace, PeerWorkspace):
        workspace = str(workspace.handle)
    operator = getattr(torch.ops.qknorm_tvm, f"tensor_parallel_{last.op}").default
    operator(
        call.q, call.k, call.gamma_q, call.gamma_k, call.epsilon, q_out=outputs[0],
        k_out=outputs[1], out_dtype=None if call.out_dtype is None else dtype,
        group_name="" if call.group is None else call.group.group_name, layout=heads,
        q_cols_total=call.q_cols_total, k_cols_total=call.k_cols_total,
        k_replicas=call.k_replicas, statistics=call.statistics,
        cast_before_gamma=call.cast_before_gamma, validate=validate, workspace=workspace or "",
        **fields,
    )  # fmt: skip
    assert outputs[0] is not None
    return outputs[0], outputs[1]


def _call_of(
    step: type[Norm], arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Call, Norm, bool]:
    """Return an operator's call, its last step, and whether it asks the other ranks."""
    last = step(**{field.name: options.pop(field.name) for field in dataclasses.fields(step)})
    group_name, layout = options.pop("group_name"), options["layout"]
    workspace, validate = options["workspace"], options.pop("validate")
    # Groups are found as the operators of torch's functional collectives find theirs.
    options["group"] = _resolve_process_group(group_name) if group_name else None
    options["layout"] = None if layout is None else HeadLayout(*layout)
    options["workspace"] = (
        workspace_of(int(workspace)) if workspace.isdecimal() else workspace or None
    )
    call = Call(*arguments, **options)
    return call, last, validate


def _register(step: type[Norm]) -> None:
    """Register the operator of layers that end with a step."""
    name = f"tensor_parallel_{step.op}"
    _library.define(
        f"{name}(Tensor q, Tensor k, Tensor gamma_q, Tensor gamma_k, float epsilon, *, "
        f"{_SCHEMAS[step]}, {_COMMON}) -> ()",
        tags=(
            torch.Tag.pt2_compliant_tag,
            # Compilers may lay intermediate tensors out anew, column by column too, but not for
            # this.
            getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),
        ),
    )

    def operator(*arguments: Any, **options: Any) -> None:
        _layer(*_call_of(step, arguments, options))

    def fake(*arguments: Any, **options: Any) -> None:
        call, last, _ = _call_of(step, arguments, options)
        # Nothing of a workspace is asked for: its own check is at run time.
        call = dataclasses.replace(call, workspace=None)
        checked = call.check(_members(call.group, call.layout))
        tensors = {"q": checked.q, "k": checked.k, "gamma_q": call.gamma_q}
        tensors |= {"gamma_k": call.gamma_k, **last.tensors, **checked.outputs}
        given = {n: x for n, x in tensors.items() if isinstance(x, torch.Tensor)}
        check_overlap(OPERATIONS[step.op], given)

    for key in ("CPU", "CUDA"):
        _library.impl(name, operator, key)
    torch.library.register_fake(f"qknorm_tvm::{name}", fake, lib=_library)


for _step in _SCHEMAS:
    _register(_step)
