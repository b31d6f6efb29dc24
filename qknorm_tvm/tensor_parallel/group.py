"""The process group of a call: who takes part, and what its ranks must agree on.

A rank that raises while the others enter a collective leaves them waiting. So under
``validate=True`` every rank first tells the others what it was called with, or that it cannot go
on; then all raise the same error or none does.
"""

from __future__ import annotations

import dataclasses
import fractions
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class Members:
    """A process group, seen from this process.

    Attributes
    ----------
    group : ProcessGroup or None
        What torch's collectives take; None is the default group.
    world_size, rank : int
    """

    group: Any
    world_size: int
    rank: int

    @property
    def backends(self) -> dict[str, str]:
        """The backend for each device type, such as ``{"cpu": "gloo", "cuda": "nccl"}``."""
        return _parsed(dist.get_backend_config(self.group))

    def check_device(self, name: str, tensor: torch.Tensor) -> None:
        """Refuse a tensor on a device over which the group cannot communicate."""
        if self.world_size > 1 and tensor.device.type not in self.backends:
            known = " or ".join(sorted(self.backends))
            raise ValueError(
                f"{name} must be on a device of the group's backends ({known}), got {tensor.device}"
            )


@functools.lru_cache(maxsize=16)
def _parsed(config: str) -> dict[str, str]:
    pairs = (part.partition(":") for part in config.lower().split(","))
    return {device: backend for device, _, backend in pairs}


def members_of(group: Any, *, may_be_alone: bool = False) -> Members:
    """Return who takes part in `group`, by default the default group.

    Parameters
    ----------
    group : ProcessGroup or None
    may_be_alone : bool
        Take this process for the only rank where torch.distributed is not initialised.

    Raises
    ------
    RuntimeError
        torch.distributed is not available or not initialised.
    TypeError, ValueError
        `group` is no process group, or one without this process.
    """
    initialised = dist.is_available() and dist.is_initialized()
    if not initialised and may_be_alone and group is None:
        return Members(None, 1, 0)
    if not dist.is_available():
        raise RuntimeError("torch must be built with torch.distributed, got one without it")
    if not initialised:
        raise RuntimeError(
            "the process group must be initialised, got none: "
            "call torch.distributed.init_process_group first"
        )
    if group is not None and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "group must be one that this process belongs to, got one that it is not in "
            f"(it is rank {dist.get_rank()} of the default group)"
        )
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}"
        )
    process_group = dist.group.WORLD if group is None else group
    assert process_group is not None, "it is initialised"
    return Members(group, process_group.size(), process_group.rank())


# ---- agreement --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Report:
    """What one rank tells the others.

    Attributes
    ----------
    alike : mapping
        What must be the same on every rank, by its name in messages; ``q_cols_total`` and
        ``k_cols_total`` among it.
    columns : mapping
        Of ``"q"`` and ``"k"``: this rank's columns, and how many ranks hold them.
    error : str
        Why this rank cannot go on; nothing else is there then.
    """

    alike: Mapping[str, object] = dataclasses.field(default_factory=dict)
    columns: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    error: str = ""


def gathered(mine: Any, members: Members) -> list[Any]:
    """Return what each rank gives, to every rank."""
    everyones: list[Any] = [mine] * members.world_size
    if members.world_size > 1:
        dist.all_gather_object(everyones, mine, group=members.group)
    return everyones


def disagreement(reports: Sequence[Report]) -> str | None:
    """Return what is wrong among the ranks, in the same words on each, or None."""
    failed = [
        f"on rank {rank}: {report.error}" for rank, report in enumerate(reports) if report.error
    ]
    if failed:
        return f"arguments must be right on every rank, got {'; '.join(failed)}"
    for name in reports[0].alike:
        values = [report.alike[name] for report in reports]
        if any(value != values[0] for value in values):
            return f"{name} must be the same on every rank, got {_by_rank(values)}"
    return _wrong_columns("q", reports) or _wrong_columns("k", reports)


def _wrong_columns(operand: str, reports: Sequence[Report]) -> str | None:
    columns, replicas = zip(*(report.columns[operand] for report in reports), strict=True)
    total = reports[0].alike[f"{operand}_cols_total"]
    if total is None:
        if len(set(columns)) == 1:
            return None
        return (
            f"columns of {operand} must be the same on every rank where {operand}_cols_total is "
            f"not given, got {_by_rank(columns)}"
        )
    held = sum(map(fractions.Fraction, columns, replicas))
    if held == total:
        return None
    shares = [
        f"{cols}" if copies == 1 else f"{cols} / {copies} replicas"
        for cols, copies in zip(columns, replicas, strict=True)
    ]
    return (
        f"columns of {operand} must add up to {operand}_cols_total ({total}), "
        f"got {held} in all: {_by_rank(shares)}"
    )


def _by_rank(values: Sequence[object]) -> str:
    """Say which ranks have which value: ``4 on ranks 0, 2; 5 on rank 1``."""
    ranks: dict[object, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    return "; ".join(
        f"{value} on rank{'s' if len(having) > 1 else ''} {', '.join(having)}"
        for value, having in ranks.items()
    )
