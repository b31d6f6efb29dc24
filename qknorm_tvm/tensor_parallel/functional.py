"""`qk_rms_norm` over a process group: local statistics, one all-reduce, apply."""

from __future__ import annotations

from typing import Any

import torch

import qknorm_tvm

from .agreement import Facts, disagreement, error_facts, exchange
from .arguments import Call, check_call
from .layout import HeadLayout
from .process_group import Members, members_of
from .reduction import reduce_checked


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise this rank's columns of Q and K by the mean squares of the whole rows.

    ::

        qk_var[:, 0] = mean of cast(Q, f32)^2 over the columns of all ranks       likewise K
        q_out = cast((cast(q, f32) * rsqrt(qk_var[:, 0] + epsilon)) * gamma_q, out_dtype)
        k_out = cast((cast(k, f32) * rsqrt(qk_var[:, 1] + epsilon)) * gamma_k, out_dtype)

    in two launches with one all-reduce of ``float32 [M, 2]`` between them; in one launch and
    without communication where the group has one rank. Given the reduced statistics the outputs
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
        The ranks that share the rows; by default the default group.
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
        Ask the other ranks first, in one small all-gather, whether all are called alike: rows,
        dtypes, epsilon and options are the same and columns add up. If not, or if one rank's
        arguments are wrong, *every* rank raises the same ``ValueError``. Costs a round trip and,
        on GPUs, a synchronisation: for the first call and for tests. The same on every rank.

    Returns
    -------
    (q_out, k_out)
        In the shapes of q and k.

    Raises
    ------
    RuntimeError
        The process group is not initialised.
    TypeError, ValueError
        An argument is wrong: the message says which, what was expected and what came. Nothing has
        been written. Without `validate` a rank that raises leaves the others waiting in the
        all-reduce until the group's timeout, and ranks that disagree may wait or compute nonsense.
    BuildError
        The code had to be compiled and could not be.
    """
    members = members_of(group)
    shared = validate and members.world_size > 1
    call = local = None
    facts = Facts()
    failure: Exception | None = None
    try:
        call = check_call(
            members,
            q,
            k,
            gamma_q,
            gamma_k,
            epsilon,
            q_out=q_out,
            k_out=k_out,
            out_dtype=out_dtype,
            layout=layout,
            q_cols_total=q_cols_total,
            k_cols_total=k_cols_total,
            k_replicas=k_replicas,
            statistics=statistics,
            cast_before_gamma=cast_before_gamma,
        )
        facts = call.facts
        # Before the ranks are asked: code that one of them cannot compile is found here.
        if not _is_one_launch(call, members):
            local = _local_statistics(call)
    except Exception as error:
        if not shared:
            raise
        facts, failure = error_facts(error), error
    if shared:
        wrong = disagreement(exchange(facts, members))
        if wrong is not None:
            raise ValueError(wrong) from failure
    assert call is not None, "a failure is raised on every rank"
    if local is None:
        found = qknorm_tvm.qk_rms_norm(
            call.q,
            call.k,
            gamma_q,
            gamma_k,
            epsilon,
            q_out=call.q_out,
            k_out=call.k_out,
            out_dtype=out_dtype,
            cast_before_gamma=cast_before_gamma,
        )
    else:
        found = qknorm_tvm.apply_qk_rms_norm(
            call.q,
            call.k,
            reduce_checked(local, members, call.q_weight, call.k_weight),
            gamma_q,
            gamma_k,
            epsilon,
            q_out=call.q_out,
            k_out=call.k_out,
            out_dtype=out_dtype,
            cast_before_gamma=cast_before_gamma,
        )
    return (
        found[0].view(q.shape) if q_out is None else q_out,
        found[1].view(k.shape) if k_out is None else k_out,
    )


def _is_one_launch(call: Call, members: Members) -> bool:
    return members.world_size == 1 and call.facts.statistics == "fused"


def _local_statistics(call: Call) -> torch.Tensor:
    if call.facts.statistics == "fused":
        return qknorm_tvm.row_mean_of_squares_qk(call.q, call.k)
    means = [x.float().pow(2).mean(-1) for x in (call.q, call.k)]
    return torch.stack(means, dim=1)
