"""`Call`: the arguments of `qk_rms_norm` on one rank, and their checks before anything is sent."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch

from ..call.arrays import canonical_dtype
from ..call.torch_autograd import is_wrapped, refuse_derivative
from ..spec import DTYPE_BYTES, MAX_COLS
from .group import Members, Report
from .layout import HeadLayout, check_int

STATISTICS = ("fused", "torch")


@dataclasses.dataclass(frozen=True)
class Checked:
    """Arguments that are right, with more than two dimensions joined to rows.

    Attributes
    ----------
    q, k : torch.Tensor, ``[M, Nq_local]`` and ``[M, Nk_local]``
    outputs : dict of str to torch.Tensor
        Those of ``q_out`` and ``k_out`` that are given.
    out_dtype : str or None
    weights : tuple of float or None
        What this rank's mean squares of Q and of K count; None where all ranks' count the same.
        A weight that happens to be the average is not None: other ranks' may differ, and all must
        reduce alike.
    """

    q: torch.Tensor
    k: torch.Tensor
    outputs: dict[str, torch.Tensor]
    out_dtype: str | None
    weights: tuple[float | None, float | None]


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of `qk_rms_norm` on one rank, as given; `workspace` is a `PeerWorkspace`."""

    q: Any
    k: Any
    gamma_q: Any
    gamma_k: Any
    epsilon: Any
    q_out: Any
    k_out: Any
    out_dtype: Any
    layout: Any
    q_cols_total: Any
    k_cols_total: Any
    k_replicas: Any
    statistics: Any
    cast_before_gamma: Any
    workspace: Any = None
    group: Any = None

    @property
    def outputs(self) -> dict[str, Any]:
        """The outputs that are given, by name."""
        given = (("q_out", self.q_out), ("k_out", self.k_out))
        return {name: out for name, out in given if out is not None}

    def check(self, members: Members) -> Checked:
        """Check every argument.

        Raises
        ------
        TypeError, ValueError
            One of them is wrong; the message names it.
        """
        q, k, outputs = self.q, self.k, self.outputs
        tensors = {"q": q, "k": k, "gamma_q": self.gamma_q, "gamma_k": self.gamma_k, **outputs}
        for name, tensor in tensors.items():
            _check_dense(name, tensor)
        check_no_derivative(tensors)
        _check_input("q", q)
        _check_input("k", k)
        if k.dtype != q.dtype:
            raise TypeError(f"k must be {dtype_name(q.dtype)} like q, got {dtype_name(k.dtype)}")
        if k.device != q.device:
            raise ValueError(f"k must be on {q.device} like q, got {k.device}")
        if self.workspace is None:
            members.check_device("q", q)
        if k.shape[:-1] != q.shape[:-1]:
            raise ValueError(
                f"k must have the rows of q {tuple(q.shape[:-1])}, got {tuple(k.shape[:-1])}"
            )
        self._check_options()
        out_dtype = None
        if self.out_dtype is not None:
            out_dtype = canonical_dtype("out_dtype", self.out_dtype)
        weights = self._weights(members)
        for operand, x in (("q", q), ("k", k)):
            name = f"gamma_{operand}"
            gamma = tensors[name]
            if gamma.dtype != torch.float32:
                raise TypeError(f"{name} must be float32, got {dtype_name(gamma.dtype)}")
            _check_place(name, gamma, x.shape[-1:], f", the columns of {operand}", operand, x)
        matrices = {}
        for name, out in outputs.items():
            operand = name[0]
            if out_dtype is not None and dtype_name(out.dtype) != out_dtype:
                raise TypeError(
                    f"{name} must be {out_dtype} like out_dtype, got {dtype_name(out.dtype)}"
                )
            _check_dtype(name, out)
            x = tensors[operand]
            _check_place(name, out, x.shape, f" like {operand}", operand, x)
            matrices[name] = _as_matrix(name, out, copy=False)
        if len(outputs) == 2 and self.q_out.dtype != self.k_out.dtype:
            got = dtype_name(self.k_out.dtype)
            raise TypeError(f"k_out must be {dtype_name(self.q_out.dtype)} like q_out, got {got}")
        q, k = _as_matrix("q", q), _as_matrix("k", k)
        if self.workspace is not None:
            self.workspace.check_use(self.group, q, q.shape[0])
        return Checked(q, k, matrices, out_dtype, weights)

    def divisors(self, members: Members) -> tuple[float, float, float]:
        """Return the divisors of the summed squares of Q and of K, and K's weight in its sum.

        Without totals all ranks have equally many columns, and copies of KV heads are counted too.
        """
        world = members.world_size
        q_total, k_total, k_replicas = self.q_cols_total, self.k_cols_total, self.k_replicas
        return (
            float(self.q.shape[-1] * world if q_total is None else q_total),
            float(self.k.shape[-1] * world if k_total is None else k_total),
            1 / k_replicas,
        )

    def _check_options(self) -> None:
        if not _is_number(self.epsilon):
            raise TypeError(f"epsilon must be a float, got {self.epsilon!r}")
        if not isinstance(self.statistics, str) or self.statistics not in STATISTICS:
            known = ", ".join(STATISTICS)
            raise ValueError(f"statistics must be one of {known}, got {self.statistics!r}")
        if self.workspace is not None and self.statistics != "fused":
            raise ValueError(f"statistics must be fused with a workspace, got {self.statistics!r}")
        if not isinstance(self.cast_before_gamma, bool):
            got = type(self.cast_before_gamma).__name__
            raise TypeError(f"cast_before_gamma must be a bool, got {got}")

    def _weights(self, members: Members) -> tuple[float | None, float | None]:
        """Check the columns against the layout or the totals; return `Checked.weights`."""
        if self.layout is not None:
            self._check_layout(members)
            return None, None
        world = members.world_size
        check_int("k_replicas", self.k_replicas, 1, world)
        if self.k_cols_total is None and self.k_replicas != 1:
            raise ValueError(
                f"k_replicas must be 1 where k_cols_total is not given, got {self.k_replicas}"
            )

        def weight(operand: str, total: Any, replicas: int) -> float | None:
            if total is None:
                return None
            cols = getattr(self, operand).shape[-1]
            # One rank holds the whole rows.
            most = cols if world == 1 else world * MAX_COLS
            check_int(f"{operand}_cols_total", total, cols, most)
            return float(cols / (total * replicas))

        return weight("q", self.q_cols_total, 1), weight("k", self.k_cols_total, self.k_replicas)

    def _check_layout(self, members: Members) -> None:
        layout, world = self.layout, members.world_size
        if not isinstance(layout, HeadLayout):
            raise TypeError(f"layout must be a HeadLayout, got {type(layout).__name__}")
        if (self.q_cols_total, self.k_cols_total, self.k_replicas) != (None, None, 1):
            raise ValueError("layout must be None where column totals are given, got both")
        if layout.world_size != world or layout.rank != members.rank:
            raise ValueError(
                f"layout must be for rank {members.rank} of {world} like the group, "
                f"got rank {layout.rank} of {layout.world_size}"
            )
        for operand, x, cols in (("q", self.q, layout.q_cols), ("k", self.k, layout.k_cols)):
            if x.shape[-1] != cols:
                raise ValueError(
                    f"{operand} must have {cols} columns by its layout, got {x.shape[-1]}"
                )

    def report(self, checked: Checked) -> Report:
        """Return what the other ranks must agree with."""
        dtype = dtype_name(self.q.dtype)
        given = [dtype_name(out.dtype) for out in self.outputs.values()]
        totals = self if self.layout is None else self.layout
        k_replicas = self.k_replicas if self.layout is None else self.layout.kv_replicas
        return Report(
            alike={
                "rows of q and k": checked.q.shape[0],
                "dtype of q and k": dtype,
                "dtype of the outputs": given[0] if given else checked.out_dtype or dtype,
                "epsilon": repr(float(self.epsilon)),
                "statistics": self.statistics,
                "cast_before_gamma": self.cast_before_gamma,
                "one launch": self.workspace is not None,
                "weighting by column totals": checked.weights != (None, None),
                "q_cols_total": totals.q_cols_total,
                "k_cols_total": totals.k_cols_total,
            },
            columns={"q": (checked.q.shape[1], 1), "k": (checked.k.shape[1], k_replicas)},
        )


def check_no_derivative(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors whose derivative is asked for: there is none, and 0 would pass for it."""
    for name, tensor in tensors.items():
        refuse_derivative(name, tensor)
        if is_wrapped(tensor):
            raise TypeError(
                f"{name} must be a tensor in memory, got one that a transform of torch.func wraps: "
                "call outside of it"
            )


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without its module, such as ``"bfloat16"``."""
    return str(dtype).rpartition(".")[2]


def _is_number(value: Any) -> bool:
    if isinstance(value, (bool, str, bytes)):
        return False
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False
    return True


def _check_dense(name: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense tensor, got {kind}")


def _check_dtype(name: str, tensor: torch.Tensor) -> None:
    dtype = dtype_name(tensor.dtype)
    if dtype not in DTYPE_BYTES:
        raise TypeError(f"{name} must be one of {', '.join(DTYPE_BYTES)}, got {dtype}")


def _check_stride(name: str, tensor: torch.Tensor) -> None:
    stride = tensor.stride(-1)
    if stride != 1 and tensor.shape[-1] > 1 and tensor.numel():
        raise ValueError(f"{name} must have contiguous columns (stride 1), got stride {stride}")


def _check_input(name: str, tensor: torch.Tensor) -> None:
    _check_dtype(name, tensor)
    if tensor.dim() < 2:
        raise ValueError(f"{name} must have at least 2 dimensions, got {tensor.dim()}")
    if tensor.shape[-1] < 1:
        raise ValueError(f"{name} must have at least 1 column, got 0")
    _check_stride(name, tensor)


def _check_place(
    name: str, tensor: torch.Tensor, shape: Any, why: str, operand: str, like: torch.Tensor
) -> None:
    """Check shape, device and strides of a tensor that goes with q or k."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}{why}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like {operand}, got {tensor.device}")
    _check_stride(name, tensor)


def _as_matrix(name: str, tensor: torch.Tensor, *, copy: bool = True) -> torch.Tensor:
    if tensor.dim() == 2:
        return tensor
    shape = (tensor.shape[:-1].numel(), tensor.shape[-1])
    try:
        return tensor.reshape(shape) if copy else tensor.view(shape)
    except RuntimeError as error:
        raise ValueError(
            f"{name} must be viewable as a matrix of rows without a copy, got strides "
            f"{tensor.stride()}"
        ) from error
