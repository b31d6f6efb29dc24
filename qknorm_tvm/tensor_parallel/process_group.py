"""The process group of a call: who takes part, and over which backend."""

from __future__ import annotations

import dataclasses
import functools
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

    def exchange_device(self) -> torch.device:
        """Return a device for small messages, by the group alone and so alike on every rank."""
        if "cpu" in self.backends:
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())


@functools.lru_cache(maxsize=16)
def _parsed(config: str) -> dict[str, str]:
    pairs = (part.partition(":") for part in config.lower().split(","))
    return {device: backend for device, _, backend in pairs}


def members_of(group: Any) -> Members:
    """Return who takes part in `group`, by default the default group.

    Raises
    ------
    RuntimeError
        torch.distributed is not available or not initialised.
    TypeError, ValueError
        `group` is no process group, or one without this process.
    """
    if not dist.is_available():
        raise RuntimeError("torch must be built with torch.distributed, got one without it")
    if not dist.is_initialized():
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
    return Members(group, dist.get_world_size(group), dist.get_rank(group))
