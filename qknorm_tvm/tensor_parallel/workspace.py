"""`PeerWorkspace`: the memory through which ranks exchange their sums within a launch."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import socket
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import peers
from ..errors import PeerError, warn_caller
from .group import Members, gathered, members_of
from .layout import check_int


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a rank is, as it tells the others; `error` is why it cannot take part."""

    host: str = ""
    gpu: str = ""
    index: int = 0
    max_rows: int = 0
    error: str = ""


#: Workspaces that live, by what a graph of torch.compile knows them by.
_handles = itertools.count(1)
_by_handle: weakref.WeakValueDictionary[int, PeerWorkspace] = weakref.WeakValueDictionary()


class PeerWorkspace:
    """Slots in every rank's GPU memory, through which launches exchange sums without all-reduce.

    All ranks of a group make it together; their hosts do not communicate when it is used. All ranks
    make the same launches, in the same order, with the same number of rows. Several layers and
    streams may share a workspace: a launch waits for the one before it, on whatever stream that
    was queued. While a graph is captured, and between replays, the order is up to the caller.

    It lives as long as somebody refers to it, and must outlive the graphs that captured its
    launches. Ranks may drop it at different times: a launch of another rank writes to this rank's
    memory only if this rank makes that launch too.

    Where every rank has a GPU of its own the memory is that of
    ``torch.distributed._symmetric_memory``; where all ranks share one, of CUDA IPC. Ranks that
    share a GPU take turns on it, so that their launches take milliseconds: good for tests.

    Parameters
    ----------
    group : ProcessGroup, optional
        By default the default group. At most 16 ranks, on one host.
    max_rows : int
        Most rows of a launch; each takes 392 bytes of GPU memory on each rank.
    device : torch.device, optional
        This rank's GPU; by default the current one.
    timeout : float
        Seconds after which a launch that waits for another rank gives up: the outputs of the rows
        that wait become NaN, and the next launch or `check` raises. 0: never.

    Attributes
    ----------
    rank, world_size, max_rows : int
    device : torch.device
    handle : int
        By which `workspace_of` finds it in this process.

    Raises
    ------
    RuntimeError
        The process group is not initialised.
    ValueError
        An argument is wrong, on any rank: all raise.
    PeerError
        The ranks cannot reach one another's memory: they are too many, on several hosts, some share
        a GPU and others do not, or GPUs have no peer access to one another. All ranks raise.
    """

    def __init__(
        self,
        group: Any = None,
        max_rows: int = 1024,
        *,
        device: Any = None,
        timeout: float = 30.0,
    ):
        members = members_of(group)
        place, failure = _Place(), None
        try:
            check_int("max_rows", max_rows, 1, 1 << 24)
            check_timeout(timeout)
            device = _cuda_device(device)
            place = _place(device, max_rows)
        except Exception as error:
            place, failure = _Place(error=f"{type(error).__name__}: {error}"), error
        places = gathered(place, members)
        wrong = _unreachable(places)
        if wrong is not None:
            argument = any(place.error.startswith(("TypeError", "ValueError")) for place in places)
            raise (ValueError if argument else PeerError)(wrong) from failure
        shares_gpu = members.world_size > 1 and places[0].gpu == places[-1].gpu
        slots: Any = None
        pointers: list[int] = []
        error_text = ""
        try:
            if shares_gpu or members.world_size == 1:
                slots, pointers = _ipc_slots(members, max_rows, device)
            else:
                slots, pointers = _symmetric_slots(members, max_rows, device)
        except Exception as error:
            error_text, failure = f"{type(error).__name__}: {error}", error
        failed = by_rank([*gathered(error_text, members)])
        if failed:
            raise PeerError(f"ranks must have access to one another's memory, got {failed}") from (
                failure
            )
        self._set_up(
            members, max_rows, device, timeout, slots, pointers,
            share=members.world_size if shares_gpu else 1,
        )  # fmt: skip

    @classmethod
    def local(
        cls, ranks: int, max_rows: int = 1024, *, device: Any = None, timeout: float = 30.0
    ) -> list[PeerWorkspace]:
        """Return the workspaces of ranks that are streams of this process, on one GPU.

        For tests and benchmarks: launches of several ranks run at the same time if each is on a
        stream of its own.
        """
        check_int("ranks", ranks, 1, peers.MAX_RANKS)
        check_int("max_rows", max_rows, 1, 1 << 24)
        check_timeout(timeout)
        device = _cuda_device(device)
        slots = [_empty_slots(max_rows, device) for _ in range(ranks)]
        pointers = [rank_slots.data_ptr() for rank_slots in slots]
        workspaces = []
        for rank in range(ranks):
            workspace = cls.__new__(cls)
            workspace._set_up(
                Members(None, ranks, rank), max_rows, device, timeout, slots, pointers, share=ranks
            )
            workspaces.append(workspace)
        return workspaces

    def _set_up(
        self,
        members: Members,
        max_rows: int,
        device: torch.device,
        timeout: float,
        memory: Any,
        pointers: Sequence[int],
        *,
        share: int,
    ) -> None:
        self.members = members
        self.max_rows = max_rows
        self.device = device
        self._memory = memory
        self._share = share
        self._timeout = timeout
        self._stream: Any = None
        self._lock = threading.Lock()
        self.handle = next(_handles)
        _by_handle[self.handle] = self
        # Pinned: the GPU writes to it, and the host looks without waiting for the GPU.
        self._report = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        self._reported = ctypes.c_int64.from_address(self._report.data_ptr())
        state = torch.zeros(peers.TURNS + max_rows, dtype=torch.int64)
        state[peers.TIMEOUT] = round(timeout * 1e9)
        state[peers.REPORT] = self._report.data_ptr()
        self._state: Any = state.to(device)
        self._peers: Any = torch.tensor(list(pointers), dtype=torch.int64, device=device)
        torch.cuda.synchronize(device)

    @property
    def rank(self) -> int:
        """This rank."""
        return self.members.rank

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self.members.world_size

    @property
    def timeout(self) -> float:
        """Seconds after which a launch gives up, also one that a graph has captured; 0: never."""
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        check_timeout(seconds)
        self._check_open()
        self._state[peers.TIMEOUT].fill_(round(seconds * 1e9))
        self._timeout = seconds

    def check(self) -> None:
        """Raise if a launch has given up; does not wait for those that still run.

        Raises
        ------
        PeerError
            One has; the message names the rank that it waited for, and the row.
        ValueError
            The workspace is closed.
        """
        self._check_open()
        word = self._reported.value
        if word:
            rank, row = peers.failure_of(word)
            raise PeerError(
                f"rank {rank} must send its sums within {self._timeout:g} s, got none of row {row} "
                f"on rank {self.rank}; outputs of that launch are NaN, and the ranks need a new "
                "workspace"
            )

    def close(self) -> None:
        """Wait for this rank's launches, then give the memory back; a second time does nothing.

        For those of graphs that were replayed on other streams the caller waits.

        Every rank may do so once it has made its launches: none writes to another's memory after
        the other's last launch has ended.
        """
        with self._lock:
            if self._state is None:
                return
            # Not the whole device: another rank of this process may not have been called yet.
            if self._stream is not None:
                self._stream.synchronize()
            self._memory = self._state = self._peers = None

    def __del__(self) -> None:
        # While the interpreter ends, torch may be gone already.
        with contextlib.suppress(Exception):
            self.close()

    @property
    def is_closed(self) -> bool:
        """Whether the memory has been given back."""
        return self._state is None

    def _check_open(self) -> None:
        if self._state is None:
            raise ValueError("workspace must be open, got one that was closed")

    def arguments(self, q_divisor: float, k_divisor: float, k_weight: float) -> tuple[Any, ...]:
        """Return what a launch takes after everything else (`operations`), in order.

        Raises
        ------
        ValueError, PeerError
            As `check`.
        """
        self.check()
        if not torch.cuda.is_current_stream_capturing():
            stream = torch.cuda.current_stream(self.device)
            if self._stream is not None and self._stream != stream:
                stream.wait_stream(self._stream)
            self._stream = stream
        return (
            self._peers, self._state, self.rank, self._share, q_divisor, k_divisor, k_weight,
        )  # fmt: skip

    def check_use(self, group: Any, q: torch.Tensor, rows: int) -> None:
        """Check that a call is one of this workspace's.

        Raises
        ------
        ValueError
            It is closed, or of another group, device or size.
        """
        self._check_open()
        if group is not None and _resolved(group) is not _resolved(self.members.group):
            raise ValueError("workspace must be of the call's group, got one of another group")
        if q.device != self.device:
            raise ValueError(f"q must be on {self.device} like workspace, got {q.device}")
        if rows > self.max_rows:
            raise ValueError(
                f"q must have at most {self.max_rows} rows, the workspace's max_rows, got {rows}"
            )


def workspace_of(handle: int) -> PeerWorkspace:
    """Return the workspace of a handle that lives in this process.

    Raises
    ------
    ValueError
        There is none.
    """
    workspace = _by_handle.get(handle)
    if workspace is None:
        raise ValueError(f"workspace must live, got handle {handle} of one that does not")
    return workspace


# ---- those that are made where they are wanted ------------------------------------------------

#: Rows up to which one launch is faster than three steps, see docs/tensor-parallel.md.
AUTO_ROWS = 512
#: A group, and its workspace or None where its ranks cannot have one; by its name and device.
_automatic: dict[tuple[str, torch.device], tuple[Any, PeerWorkspace | None]] = {}


def automatic_workspace(group: Any, device: torch.device) -> PeerWorkspace | None:
    """Return a group's own workspace for launches of up to `AUTO_ROWS` rows.

    It is made at the first call, by all ranks together, and kept as long as the process. Where the
    ranks cannot reach one another's memory a warning says why, once, and there is none.
    """
    group = _resolved(group)
    key = (group.group_name, device)
    made_for, workspace = _automatic.get(key, (None, None))
    if made_for is not group:
        if torch.cuda.is_current_stream_capturing():
            return None  # it takes a synchronisation; the graph has three steps
        try:
            workspace = PeerWorkspace(group, AUTO_ROWS, device=device)
        except PeerError as error:
            workspace = None
            warn_caller(f"the layer takes three steps instead of one launch: {error}")
        _automatic[key] = group, workspace
    return workspace


def _resolved(group: Any) -> Any:
    return dist.group.WORLD if group is None else group


def check_timeout(timeout: Any) -> None:
    """Refuse what is no number of seconds."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a float, got {type(timeout).__name__}")
    if not 0 <= timeout <= 1e9:
        raise ValueError(f"timeout must be from 0 to 1e9 seconds, got {timeout}")


def _cuda_device(device: Any) -> torch.device:
    if not torch.cuda.is_available():
        raise PeerError(f"a CUDA device is needed, got none (torch {torch.__version__})")
    device = torch.device("cuda" if device is None else device)
    if device.type != "cuda":
        raise ValueError(f"device must be a CUDA device, got {device}")
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", index)


def _place(device: torch.device, max_rows: int) -> _Place:
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"
    gpu = str(torch.cuda.get_device_properties(device).uuid)
    return _Place(host, gpu, int(device.index or 0), max_rows)


def by_rank(values: Sequence[object]) -> str:
    """Say what ranks have, but for those that have nothing."""
    return "; ".join(f"{value} on rank {rank}" for rank, value in enumerate(values) if value)


def _unreachable(places: Sequence[_Place]) -> str | None:
    """Return why the ranks have no common memory, in the same words on each, or None."""
    failed = by_rank([place.error for place in places])
    if failed:
        return f"every rank must be able to take part, got {failed}"
    if len(places) > peers.MAX_RANKS:
        return f"group must have at most {peers.MAX_RANKS} ranks, got {len(places)}"
    hosts = [place.host.partition(" ")[0] for place in places]
    if len({place.host for place in places}) > 1:
        return f"all ranks must be on one host, got {by_rank(hosts)}"
    rows = [place.max_rows for place in places]
    if len(set(rows)) > 1:
        return f"max_rows must be the same on every rank, got {by_rank(rows)}"
    count = len({place.gpu for place in places})
    if 1 < count < len(places):
        gpus = [place.gpu for place in places]
        return f"ranks must have a GPU each, or all share one, got {by_rank(gpus)}"
    return None


def _empty_slots(max_rows: int, device: torch.device, make: Any = None) -> torch.Tensor:
    make = make or torch.empty
    slots = make(peers.slot_count(max_rows), dtype=torch.float32, device=device)
    slots.view(torch.int32).fill_(peers.EMPTY - (1 << 32))
    torch.cuda.synchronize(device)  # before another rank knows of it
    return slots


def _ipc_slots(
    members: Members, max_rows: int, device: torch.device
) -> tuple[list[torch.Tensor], list[int]]:
    from torch.multiprocessing.reductions import reduce_tensor

    own = _empty_slots(max_rows, device)
    everyones = gathered(reduce_tensor(own), members)
    slots = [
        own if rank == members.rank else rebuild(*arguments)
        for rank, (rebuild, arguments) in enumerate(everyones)
    ]
    for rank, rank_slots in enumerate(slots):
        if rank_slots.device != device:
            raise PeerError(
                "CUDA_VISIBLE_DEVICES must be alike on all ranks that share a GPU, got "
                f"{rank_slots.device} of rank {rank} as {device}"
            )
    return slots, [rank_slots.data_ptr() for rank_slots in slots]


def _symmetric_slots(
    members: Members, max_rows: int, device: torch.device
) -> tuple[Any, list[int]]:
    from torch.distributed import _symmetric_memory

    own = _empty_slots(max_rows, device, _symmetric_memory.empty)
    handle = _symmetric_memory.rendezvous(own, _resolved(members.group))
    return (own, handle), [int(pointer) for pointer in handle.buffer_ptrs]
