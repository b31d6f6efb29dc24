"""Where a rank that torchrun started runs, and over what it talks to the others."""

from __future__ import annotations

import dataclasses
import datetime
import os
from typing import Any

import torch
import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class Place:
    """One rank.

    Attributes
    ----------
    device : str
        ``"cpu"`` or ``"cuda:0"``.
    backend : str
        Of the default group: ``"gloo"`` or ``"nccl"``.
    world, rank : int
    control : ProcessGroup
        Always gloo: what ranks tell each other that is neither tested nor timed.
    """

    device: str
    backend: str
    world: int
    rank: int
    control: Any

    @property
    def captures(self) -> bool:
        """Whether CUDA graphs take the group's collectives; gloo's go through the host."""
        return self.backend == "nccl"

    def everywhere(self, value: Any) -> list[Any]:
        """Return every rank's value."""
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def say(self, *parts: Any) -> None:
        """Print, once for all ranks."""
        if self.rank == 0:
            print(*parts, flush=True)


def join(device: str | None, share_gpu: bool, timeout: float) -> Place:
    """Join the group of all ranks.

    Parameters
    ----------
    device : str or None
        ``"cpu"``, ``"cuda"``, or by what there is.
    share_gpu : bool
        All ranks on the first GPU, over gloo: NCCL refuses two on one.
    timeout : float
        Seconds after which a collective that waits for a rank is an error.

    Raises
    ------
    ValueError
        Not started by torchrun, or too few GPUs.
    """
    if "RANK" not in os.environ:
        raise ValueError("this script must be started by torchrun, got no RANK")
    world, rank, local = (int(os.environ[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    on_one_host = int(os.environ["LOCAL_WORLD_SIZE"])
    if on_one_host == world:  # off the network
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Multicast over NVLink stays off unless asked for: not every host has it in order.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    backend, index = "gloo", None
    if share_gpu or device == "cuda" or (device is None and torch.cuda.is_available()):
        needed, count = 1 if share_gpu else on_one_host, torch.cuda.device_count()
        if count < needed:
            instead = "" if share_gpu else "--share-gpu for one GPU, or "
            raise ValueError(
                f"GPUs must be {needed} for {on_one_host} ranks, got {count}: "
                f"give {instead}--device cpu"
            )
        backend, index = ("gloo", 0) if share_gpu else ("nccl", local)
        torch.cuda.set_device(index)
    else:
        torch.set_num_threads(1)
        os.environ.setdefault("TVM_NUM_THREADS", "1")
    dist.init_process_group(
        backend,
        timeout=datetime.timedelta(seconds=timeout),
        # The communicator is made at once: it cannot be while a graph is captured.
        device_id=torch.device("cuda", index) if backend == "nccl" else None,
    )
    control = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
    return Place("cpu" if index is None else f"cuda:{index}", backend, world, rank, control)


def leave(place: Place) -> None:
    """Leave the group, when all have come here."""
    if place.device != "cpu":
        torch.cuda.synchronize()
    place.everywhere(None)
    dist.destroy_process_group()
