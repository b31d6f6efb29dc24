"""The all-reduce of row statistics over a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .process_group import Members, members_of


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
        An argument is wrong; nothing was sent. The other ranks then wait for this one until the
        group's timeout.
    """
    members = members_of(group)
    _check_statistics(qk_var, members)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        _check_weight(name, weight)
    return reduce_checked(qk_var, members, q_weight, k_weight)


def reduce_checked(
    qk_var: torch.Tensor, members: Members, q_weight: float | None, k_weight: float | None
) -> torch.Tensor:
    """Do the work of `reduce_row_mean_of_squares` on arguments known to be right."""
    if qk_var.shape[0] == 0:
        return qk_var
    world = members.world_size
    equal = q_weight is None and k_weight is None
    if equal and world == 1:
        return qk_var
    op = dist.ReduceOp.SUM
    if not equal:
        share = 1 / world
        _scale(qk_var, q_weight or share, k_weight or share)
    elif members.backends.get(qk_var.device.type) == "nccl":
        op = dist.ReduceOp.AVG
    else:
        # Not times the reciprocal, which is rounded for counts that are no power of two.
        qk_var.div_(world)
    if world > 1:
        dist.all_reduce(qk_var, op=op, group=members.group)
    return qk_var


def _scale(qk_var: torch.Tensor, q_weight: float, k_weight: float) -> None:
    if q_weight == k_weight:
        if q_weight != 1:
            qk_var.mul_(q_weight)
        return
    # By column, not by a tensor of both: that would be copied to the device in every call.
    qk_var[:, 0].mul_(q_weight)
    qk_var[:, 1].mul_(k_weight)


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
        raise TypeError(f"qk_var must be float32, got {str(qk_var.dtype).rpartition('.')[2]}")
    if qk_var.dim() != 2 or qk_var.shape[1] != 2:
        raise ValueError(f"qk_var must have shape (M, 2), got {tuple(qk_var.shape)}")
    if not qk_var.is_contiguous():
        raise ValueError(f"qk_var must be contiguous, got strides {qk_var.stride()}")
    check_device("qk_var", qk_var, members)
    check_no_grad("qk_var", qk_var)


def check_device(name: str, tensor: torch.Tensor, members: Members) -> None:
    """Refuse a tensor on a device over which the group cannot communicate."""
    backends = members.backends
    if members.world_size > 1 and tensor.device.type not in backends:
        known = " or ".join(sorted(backends))
        raise ValueError(
            f"{name} must be on a device of the group's backends ({known}), got {tensor.device}"
        )


def check_no_grad(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor whose gradient is asked for: there is no backward."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must not require grad (there is no backward), got a tensor that does: "
            "call under torch.no_grad(), or pass a detached tensor"
        )
