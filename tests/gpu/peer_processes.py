"""A rank as a process, for test_cuda_peers: MODULE, and ``all`` or ``absent``; under torchrun."""

from __future__ import annotations

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
    qk_var = rank_ordered([(one.q, one.k) for one in everyone], [768.0 * world, 128.0 * world])
    wanted = own.expected(qk_var)
    for launch in range(LAUNCHES):
        own.call(1 + launch * 7 % 32, validate=launch == 0)
    own.call()
    torch.cuda.synchronize()
    assert own.differing(wanted) == 0
    workspace.check()
    dist.barrier()
    if how == "absent" and rank == 0:
        workspace.timeout = 1.0
        own.call()
        torch.cuda.synchronize()
        with pytest.raises(PeerError, match="rank 1 must send its sums within 1 s"):
            workspace.check()
    if how == "all":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for rows in (32, 1, 5, 32):
                own.call(rows)
        own.q_out.fill_(float("nan"))
        for _ in range(5):
            graph.replay()
            own.call(3)
        torch.cuda.synchronize()
        assert own.differing(wanted) == 0
    workspace.close()
    dist.barrier()
    dist.destroy_process_group()
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
