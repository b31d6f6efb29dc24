"""The checks of `qk_rms_norm`'s arguments on one rank, before anything is launched or sent."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from ..call.arrays import canonical_dtype
from ..spec import DTYPE_BYTES, MAX_COLS
from .agreement import Facts
from .layout import HeadLayout
from .process_group import Members
from .reduction import check_device, check_no_grad

STATISTICS = ("fused", "torch")


@dataclasses.dataclass(frozen=True)
class Call:
    """One rank's arguments, checked, as matrices.

    Attributes
    ----------
    q, k : torch.Tensor
        ``[M, N]``.
    q_out, k_out : torch.Tensor or None
        ``[M, N]`` on the memory of the outputs given.
    q_weight, k_weight : float or None
        What this rank counts; both None where all count the same by definition. That one rank's
        happens to be the average says nothing about the others, and all must reduce alike.
    facts : Facts
        What the other ranks must agree with.
    """

    q: torch.Tensor
    k: torch.Tensor
    q_out: torch.Tensor | None
    k_out: torch.Tensor | None
    q_weight: float | None
    k_weight: float | None
    facts: Facts


def check_call(
    members: Members,
    q: Any,
    k: Any,
    gamma_q: Any,
    gamma_k: Any,
    epsilon: Any,
    *,
    q_out: Any,
    k_out: Any,
    out_dtype: Any,
    layout: Any,
    q_cols_total: Any,
    k_cols_total: Any,
    k_replicas: Any,
    statistics: Any,
    cast_before_gamma: Any,
) -> Call:
    """Return the arguments of `qknorm_tvm.tensor_parallel.qk_rms_norm`, checked.

    Raises
    ------
    TypeError, ValueError
        One of them is wrong; the message names it.
    """
    _check_input("q", q)
    _check_input("k", k)
    if k.dtype != q.dtype:
        raise TypeError(f"k must be {_name(q.dtype)} like q, got {_name(k.dtype)}")
    if k.device != q.device:
        raise ValueError(f"k must be on {q.device} like q, got {k.device}")
    check_device("q", q, members)
    if k.shape[:-1] != q.shape[:-1]:
        raise ValueError(
            f"k must have the rows of q {tuple(q.shape[:-1])}, got {tuple(k.shape[:-1])}"
        )
    _check_gamma("gamma_q", gamma_q, "q", q)
    _check_gamma("gamma_k", gamma_k, "k", k)
    if not isinstance(statistics, str) or statistics not in STATISTICS:
        raise ValueError(f"statistics must be one of {', '.join(STATISTICS)}, got {statistics!r}")
    if not isinstance(cast_before_gamma, bool):
        raise TypeError(f"cast_before_gamma must be a bool, got {type(cast_before_gamma).__name__}")
    wanted = None if out_dtype is None else canonical_dtype("out_dtype", out_dtype)
    outputs = [
        _check_output("q_out", q_out, "q", q, wanted),
        _check_output("k_out", k_out, "k", k, wanted),
    ]
    given = [_name(one.dtype) for one in outputs if one is not None]
    if len(set(given)) > 1:
        raise TypeError(f"k_out must be {given[0]} like q_out, got {given[1]}")
    if layout is not None:
        if (q_cols_total, k_cols_total, k_replicas) != (None, None, 1):
            raise ValueError("layout must be None where column totals are given, got both")
        _check_layout(layout, members, q, k)
        q_cols_total, k_cols_total = layout.q_cols_total, layout.k_cols_total
        k_replicas = layout.kv_replicas
    weights = _weights(members, q, k, q_cols_total, k_cols_total, k_replicas)
    weighted = layout is None and weights != (None, None)
    if not weighted:
        weights = (None, None)
    rows = q.shape[:-1].numel()
    return Call(
        q=_as_matrix(q),
        k=_as_matrix(k),
        q_out=outputs[0],
        k_out=outputs[1],
        q_weight=weights[0],
        k_weight=weights[1],
        facts=Facts(
            rows=rows,
            dtype=_name(q.dtype),
            out_dtype=given[0] if given else wanted or _name(q.dtype),
            epsilon=repr(_number(epsilon)),
            statistics=statistics,
            weighted=weighted,
            q_cols_total=q_cols_total,
            k_cols_total=k_cols_total,
            cast_before_gamma=cast_before_gamma,
            q_cols=q.shape[-1],
            k_cols=k.shape[-1],
            k_replicas=k_replicas,
        ),
    )


@functools.cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).rpartition(".")[2]


def _number(epsilon: Any) -> float:
    if not isinstance(epsilon, (bool, str, bytes)):
        try:
            return float(epsilon)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            pass
    raise TypeError(f"epsilon must be a float, got {epsilon!r}")


def _check_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense tensor, got {kind}")
    check_no_grad(name, tensor)


def _check_input(name: str, tensor: Any) -> None:
    _check_tensor(name, tensor)
    if _name(tensor.dtype) not in DTYPE_BYTES:
        raise _not_a_dtype(name, tensor)
    if tensor.dim() < 2:
        raise ValueError(f"{name} must have at least 2 dimensions, got {tensor.dim()}")
    if tensor.shape[-1] < 1:
        raise ValueError(f"{name} must have at least 1 column, got 0")
    _check_columns(name, tensor)


def _not_a_dtype(name: str, tensor: torch.Tensor) -> TypeError:
    return TypeError(f"{name} must be one of {', '.join(DTYPE_BYTES)}, got {_name(tensor.dtype)}")


def _check_columns(name: str, tensor: torch.Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.numel() and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must have contiguous columns (stride 1), got stride {tensor.stride(-1)}"
        )


def _check_gamma(name: str, gamma: Any, of: str, tensor: torch.Tensor) -> None:
    _check_tensor(name, gamma)
    if gamma.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {_name(gamma.dtype)}")
    if tuple(gamma.shape) != (tensor.shape[-1],):
        raise ValueError(
            f"{name} must have shape ({tensor.shape[-1]},), the columns of {of}, "
            f"got {tuple(gamma.shape)}"
        )
    if gamma.device != tensor.device:
        raise ValueError(f"{name} must be on {tensor.device} like {of}, got {gamma.device}")
    _check_columns(name, gamma)


def _check_output(
    name: str, out: Any, of: str, tensor: torch.Tensor, wanted: str | None
) -> torch.Tensor | None:
    """Return an output as a matrix on the same memory, or None where it is to be allocated."""
    if out is None:
        return None
    _check_tensor(name, out)
    if wanted is not None and _name(out.dtype) != wanted:
        raise TypeError(f"{name} must be {wanted} like out_dtype, got {_name(out.dtype)}")
    if _name(out.dtype) not in DTYPE_BYTES:
        raise _not_a_dtype(name, out)
    if out.shape != tensor.shape:
        raise ValueError(
            f"{name} must have shape {tuple(tensor.shape)} like {of}, got {tuple(out.shape)}"
        )
    if out.device != tensor.device:
        raise ValueError(f"{name} must be on {tensor.device} like {of}, got {out.device}")
    _check_columns(name, out)
    try:
        return out if out.dim() == 2 else out.view(out.shape[:-1].numel(), out.shape[-1])
    except RuntimeError as error:
        raise ValueError(
            f"{name} must be viewable as a matrix of rows without a copy, got strides "
            f"{out.stride()}"
        ) from error


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _check_layout(layout: Any, members: Members, q: torch.Tensor, k: torch.Tensor) -> None:
    if not isinstance(layout, HeadLayout):
        raise TypeError(f"layout must be a HeadLayout, got {type(layout).__name__}")
    if (layout.world_size, layout.rank) != (members.world_size, members.rank):
        raise ValueError(
            f"layout must be for rank {members.rank} of {members.world_size} like the group, "
            f"got rank {layout.rank} of {layout.world_size}"
        )
    for name, tensor, cols in (("q", q, layout.q_cols), ("k", k, layout.k_cols)):
        if tensor.shape[-1] != cols:
            raise ValueError(
                f"{name} must have {cols} columns by its layout, got {tensor.shape[-1]}"
            )


def _weights(
    members: Members,
    q: torch.Tensor,
    k: torch.Tensor,
    q_cols_total: Any,
    k_cols_total: Any,
    k_replicas: Any,
) -> tuple[float | None, float | None]:
    """Return what this rank's mean squares count by the totals, None where there is none."""
    world = members.world_size
    _check_int("k_replicas", k_replicas, 1, world)
    if k_cols_total is None and k_replicas != 1:
        raise ValueError(f"k_replicas must be 1 where k_cols_total is not given, got {k_replicas}")
    weights: list[float | None] = []
    for which, tensor, total, replicas in (
        ("q", q, q_cols_total, 1),
        ("k", k, k_cols_total, k_replicas),
    ):
        if total is None:
            weights.append(None)
            continue
        cols = tensor.shape[-1]
        # One rank holds the whole rows.
        _check_int(f"{which}_cols_total", total, cols, cols if world == 1 else world * MAX_COLS)
        weights.append(cols / (total * replicas))
    return weights[0], weights[1]


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        expected = f"from {low} to {high}" if low < high else str(low)
        raise ValueError(f"{name} must be {expected}, got {value}")
