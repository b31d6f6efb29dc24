"""A rank as a process, for test_cuda_peers: MODULE, and ``all``, ``absent`` or ``killed``.

As under torchrun, by environment variables. With a GPU for each rank each has its own.
"""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch
import torch.distributed as dist
from peer_calls import Rank, rank_ordered

import qknorm_tvm
from qknorm_tvm import tensor_parallel as tp
from qknorm_tvm.errors import PeerError

LAUNCHES = 60


def main(module: str, how: str) -> None:
    qknorm_tvm.use(qknorm_tvm.load(module))
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    alone = torch.cuda.device_count() < world
    torch.cuda.set_device(0 if alone else rank)
    workspace = tp.PeerWorkspace(max_rows=32, timeout=20.0)
    # Everyone's inputs, to know what is wanted; one's own from its seed.
    everyone = []
    for other in range(world):
        workspace.members = type(workspace.members)(None, world, other)
        everyone.append(Rank(workspace, 32, 768, 128))
    workspace.members = type(workspace.members)(None, world, rank)
    own = everyone[rank]
    qk_var = rank_ordered(
        [(member.q, member.k) for member in everyone], [768.0 * world, 128.0 * world]
    )
    wanted = own.expected(qk_var)
    for launch in range(LAUNCHES):
        own.call(1 + launch * 7 % 32, validate=launch == 0)
    own.call()
    torch.cuda.synchronize()
    assert own.differing(wanted) == 0
    workspace.check()
    dist.barrier()
    if how == "killed" and rank == 1:
        for _ in range(3):
            own.call()
        os.kill(os.getpid(), signal.SIGKILL)
    if how != "all" and rank == 0:
        workspace.timeout = 1.0
        for _ in range(4):
            own.call()
        torch.cuda.synchronize()
        with pytest.raises(PeerError, match="rank 1 must send its sums within 1 s"):
            workspace.check()
        assert own.q_out.isnan().all()
    if how == "all":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for rows in (32, 1, 5, 32):
                own.call(rows)
        torch.cuda.synchronize()
        own.q_out.fill_(float("nan"))
        for _ in range(5):
            graph.replay()
            own.call(3)
        torch.cuda.synchronize()
        assert own.differing(wanted) == 0
    workspace.close()
    if how != "killed":
        dist.barrier()
        dist.destroy_process_group()
    print("done", flush=True)
    os._exit(0)  # without waiting for a rank that is not there


if __name__ == "__main__":
    main(*sys.argv[1:])
