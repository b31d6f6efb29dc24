"""The layer in one launch, with ranks that are streams of this process, or processes, on one GPU.

Results are compared bit for bit with torch's unfused graph on sums added in the order of ranks.
``QKNORM_TVM_STRESS`` is the number of launches of the stress test.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_calls import torch
from peer_calls import (
    EPSILON,
    Rank,
    bits,
    capture,
    everywhere,
    make_ranks,
    rank_ordered,
    statistics_of,
    sums_of_squares,
)
from test_cuda_rope import Call as RopeCall
from test_cuda_rope import _differing

import qknorm_tvm
from qknorm_tvm import Module
from qknorm_tvm import tensor_parallel as tp
from qknorm_tvm.errors import PeerError

ModulePath = Callable[[str], Path]
STRESS = int(os.environ.get("QKNORM_TVM_STRESS", "100000"))
PROCESSES = Path(__file__).with_name("peer_processes.py")


@pytest.fixture(autouse=True, scope="module")
def module(module_path: ModulePath) -> Module:
    loaded = qknorm_tvm.load(module_path("peers"))
    qknorm_tvm.use(loaded)
    return loaded


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 16])
def test_ranks_as_streams(count: int) -> None:
    """Sums in another order, of another rank or row; a launch that hangs; ranks that differ."""
    ranks = make_ranks(count, 64, 768, 128)
    wanted = [rank.expected(statistics_of(ranks)) for rank in ranks]
    for rows in (64, 1, 7, 0, 64, 33, 64):
        everywhere(ranks, lambda rank, rows=rows: rank.call(rows))
    assert [rank.differing(ours) for rank, ours in zip(ranks, wanted, strict=True)] == [0] * count
    for rank in ranks:
        rank.workspace.check()


@pytest.mark.parametrize(("q_cols", "k_cols"), [(1536, 256), (391, 7), (6144, 1024)])
def test_columns_and_rounds(q_cols: int, k_cols: int) -> None:
    """Rows beyond what a GPU holds at once; elements one by one; in place."""
    cast = {"cast_before_gamma": True} if q_cols == 6144 else {}
    ranks = make_ranks(2, 5000, q_cols, k_cols)
    qk_var = statistics_of(ranks)
    wanted = [list(rank.expected(qk_var)) for rank in ranks]
    if cast:
        for rank, outputs in zip(ranks, wanted, strict=True):
            for column, (x, gamma) in enumerate(((rank.q, rank.gamma_q), (rank.k, rank.gamma_k))):
                rs = torch.rsqrt(qk_var[:, column] + EPSILON)[:, None]
                scaled = (x.float() * rs).to(x.dtype).float()
                outputs[column] = (scaled * gamma).to(x.dtype)
    for rows in (5000, 17, 5000):
        everywhere(ranks, lambda rank, rows=rows: rank.call(rows, **cast))
    assert [rank.differing(ours) for rank, ours in zip(ranks, wanted, strict=True)] == [0, 0]
    for rank in ranks:
        rank.q_out, rank.k_out = rank.q, rank.k
    everywhere(ranks, lambda rank: rank.call(**cast))
    assert [rank.differing(ours) for rank, ours in zip(ranks, wanted, strict=True)] == [0, 0]


def test_unequal_shards_and_replicas() -> None:
    """A mean over this rank's columns; columns of K that two ranks hold counted twice."""
    workspaces = tp.PeerWorkspace.local(3, 16)
    sizes = ((1536, 256), (768, 128), (768, 128))
    ranks = [Rank(w, 16, *size) for w, size in zip(workspaces, sizes, strict=True)]
    ranks[2].k.copy_(ranks[1].k)
    totals, replicas = {"q_cols_total": 3072, "k_cols_total": 384}, (1, 2, 2)
    everywhere(
        ranks,
        lambda rank: rank.call(**totals, k_replicas=replicas[rank.workspace.rank]),
    )
    q = rank_ordered([(rank.q,) for rank in ranks], [3072.0])
    k = torch.zeros(16, device="cuda")
    for rank, copies in zip(ranks, replicas, strict=True):
        k = k + sums_of_squares(rank.k) * (1 / copies)
    qk_var = torch.cat([q, (k / 384)[:, None]], dim=1)
    assert [rank.differing(rank.expected(qk_var)) for rank in ranks] == [0, 0, 0]


@pytest.mark.parametrize("index", [4, 5], ids=["cache", "rope"])
def test_rotation_and_cache(module: Module, index: int) -> None:
    """Attention's input in one launch, of ranks with rows, slots and positions of their own."""
    from module_list import PEERS

    spec = PEERS[index].replace(statistics="given")
    for rows in (1, 17, 300):
        calls = [RopeCall(spec, rows) for _ in range(2)]
        for seed, call in enumerate(calls):
            for tag in "qk":
                call.tensors[tag].copy_(torch.randn_like(call.tensors[tag]) * (seed + 1))
        divisors = [2.0 * x for x in (spec.q_cols, spec.k_cols)]
        qk_var = rank_ordered([(c.tensors["q"], c.tensors["k"]) for c in calls], divisors)
        for call in calls:
            call.tensors["qk_var"] = qk_var
        wanted = [call.expected(module) for call in calls]
        workspaces = tp.PeerWorkspace.local(2, 300)
        streams = [torch.cuda.Stream() for _ in calls]
        torch.cuda.synchronize()
        for call, workspace, stream in zip(calls, workspaces, streams, strict=True):
            t = {name: x for name, x in call.tensors.items() if name != "qk_var"}
            layer = getattr(tp, spec.op)
            with torch.cuda.stream(stream):
                layer(**t, head_dim=spec.head_dim, epsilon=EPSILON, workspace=workspace)
        torch.cuda.synchronize()
        for call, outputs in zip(calls, wanted, strict=True):
            for name, value in outputs.items():
                if name in call.tensors:
                    assert _differing(call.tensors[name], value) == 0, (rows, name)


class _Log:
    """Launches of every rank in one order, each with its own outputs, which are compared together.

    Nothing but launches and delays is queued while ranks wait for one another: a kernel's first
    launch, or an allocation, may make the host wait for what runs.
    """

    def __init__(self, sets: list[list[Rank]], steps: list[tuple[int, int]]):
        self.sets, self.steps, self.ranks = sets, steps, sets[0]
        wanted = [[rank.expected(statistics_of(ranks)) for rank in ranks] for ranks in sets]
        self.outputs, self.wanted = [], []
        for rank, _ in enumerate(self.ranks):
            shapes = [x.shape for x in (sets[0][rank].q, sets[0][rank].k)]
            out = [torch.zeros(len(steps), *s, device="cuda").bfloat16() for s in shapes]
            self.outputs.append(out)
            values = [x.clone() for x in out]
            for place, (number, rows) in enumerate(steps):
                for x, value in zip(values, wanted[number][rank], strict=True):
                    x[place, :rows] = value[:rows]
            self.wanted.append([bits(x) for x in values])

    def launch(self, rank: int, place: int) -> None:
        number, rows = self.steps[place]
        inputs, (q_out, k_out) = self.sets[number][rank], self.outputs[rank]
        tp.qk_rms_norm(
            inputs.q[:rows], inputs.k[:rows], inputs.gamma_q, inputs.gamma_k, EPSILON,
            q_out=q_out[place, :rows], k_out=k_out[place, :rows], workspace=inputs.workspace,
        )  # fmt: skip

    def differing(self) -> int:
        """Count elements that are wrong, and forget all outputs."""
        wrong = 0
        for outputs, wanted in zip(self.outputs, self.wanted, strict=True):
            for x, value in zip(outputs, wanted, strict=True):
                wrong += int((bits(x) != value).sum())
                x.zero_()
        return wrong


def _stress(count: int, launches: int) -> tuple[int, int]:
    """Return how many launches of ranks were made, and how many elements were wrong."""
    rng, rows, length = random.Random(count), 64, 42
    ranks = make_ranks(count, rows, 768, 128)
    sets = [ranks]
    for seed in range(1, 5):
        more = [Rank(rank.workspace, rows, 768, 128, seed=seed) for rank in ranks]
        for rank, original in zip(more, ranks, strict=True):
            rank.stream = original.stream
        sets.append(more)

    def steps(of: int) -> list[tuple[int, int]]:
        counts = (1, 1, 2, 7, 16, 33, 64)
        return [(rng.randrange(len(sets)), rng.choice(counts)) for _ in range(of)]

    torch.cuda._sleep(1)
    graphs = []
    for kind in range(4):
        log = _Log(sets, steps(length))
        # The first is launches alone: each starts while the one before it still runs.
        delays = [[rng.randrange(length) for _ in range(3 * kind)] for _ in ranks]

        def work(rank: int, log: _Log = log, delays: list[list[int]] = delays) -> None:
            for place in range(length):
                if place in delays[rank]:
                    torch.cuda._sleep(10_000 + 10_000 * rank)
                log.launch(rank, place)

        captured = [capture(rank, lambda r=number: work(r)) for number, rank in enumerate(ranks)]
        graphs.append((log, captured))
    eager = _Log(sets, steps(12))
    made = wrong = 0
    while made < launches:
        order = rng.sample(range(count), count)
        torch.cuda.synchronize()
        first = rng.randrange(13)
        for number, (_, captured) in enumerate(rng.sample(graphs, len(graphs))):
            for rank in order:
                with torch.cuda.stream(ranks[rank].stream):
                    if rng.random() < 0.3:
                        torch.cuda._sleep(rng.randrange(1, 200_000))
                    captured[rank].replay()
            for place in range(12) if number == first % 4 else range(0):
                for rank in rng.sample(range(count), count):
                    with torch.cuda.stream(ranks[rank].stream):
                        eager.launch(rank, place)
        torch.cuda.synchronize()
        made += count * (length * len(graphs) + 12)
        wrong += sum(log.differing() for log, _ in graphs) + eager.differing()
        try:
            for rank in ranks:
                rank.workspace.check()
        except PeerError as error:
            pytest.fail(f"after {made} launches, {wrong} elements wrong: {error}")
    for _, captured in graphs:
        for graph in captured:
            graph.reset()
    return made, wrong


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_stress(count: int) -> None:
    """Slots and turns that get mixed up by delays, rows, graphs and eager launches."""
    made, wrong = _stress(count, STRESS // 4)
    print(f"{count} ranks: {made:,} launches, {wrong} elements differ")
    assert wrong == 0


def test_a_rank_that_does_not_come() -> None:
    """A GPU that hangs; outputs that look like results; a next call that hangs too."""
    ranks = make_ranks(3, 40, 768, 128, timeout=0.3)
    everywhere(ranks, lambda rank: rank.call())
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for rank in (ranks[0], ranks[2]):
        with torch.cuda.stream(rank.stream):
            start.record()
            rank.call(33)
            end.record()
    torch.cuda.synchronize()
    assert 250 < start.elapsed_time(end) < 2000
    for rank in (ranks[0], ranks[2]):
        assert rank.q_out[:33].isnan().all()
        assert rank.k_out[:33].isnan().all()
        assert not rank.q_out[33:].isnan().any()
        message = "rank 1 must send its sums within 0.3 s, got none of row"
        with pytest.raises(PeerError, match=message):
            rank.workspace.check()
        with pytest.raises(PeerError, match=message):
            rank.call()
    ranks[1].workspace.check()


def test_errors() -> None:
    ranks = make_ranks(2, 8, 768, 128)
    q, k, more = ranks[0].q, ranks[0].k, torch.zeros(9, 768, device="cuda").bfloat16()
    gammas = ranks[0].gamma_q, ranks[0].gamma_k
    with pytest.raises(ValueError, match="q must have at most 8 rows, the workspace's max_rows"):
        tp.qk_rms_norm(more, more[:, :128], *gammas, workspace=ranks[0].workspace)
    with pytest.raises(ValueError, match="statistics must be fused with a workspace"):
        ranks[0].call(statistics="torch")
    with pytest.raises(ValueError, match="q must be on cuda:0 like workspace, got cpu"):
        tp.qk_rms_norm(q.cpu(), k.cpu(), *(g.cpu() for g in gammas), workspace=ranks[0].workspace)
    with pytest.raises(
        TypeError, match="workspace must be a PeerWorkspace, 'auto' or None, got 'one'"
    ):
        tp.qk_rms_norm(q, k, *gammas, workspace="one")
    ranks[0].workspace.close()
    ranks[0].workspace.close()
    with pytest.raises(ValueError, match="workspace must be open, got one that was closed"):
        ranks[0].call()
    with pytest.raises(ValueError, match="workspace must be open"):
        ranks[0].workspace.check()


def test_entry_point_refuses(module: Module) -> None:
    """Wrong peers: a kernel that writes to addresses that are none."""
    rank = make_ranks(1, 8, 768, 128)[0]
    args = [rank.q_out, rank.k_out, rank.gamma_q, rank.gamma_k, rank.q, rank.k, EPSILON]
    peers = list(rank.workspace.arguments(768.0, 128.0, 1.0))
    module.qk_rms_norm(*args, *peers)

    def refuses(place: int, value: Any, error: type, message: str) -> None:
        changed = [value if i == place else peer for i, peer in enumerate(peers)]
        with pytest.raises(error, match=message):
            module.qk_rms_norm(*args, *changed)

    refuses(0, peers[0].int(), TypeError, "peers must be int64, got int32")
    refuses(0, peers[0].cpu(), ValueError, "peers must be on a CUDA device")
    refuses(1, peers[1][:-1], ValueError, "q must have at most 7 rows, for which peer_state has")
    refuses(2, 1, ValueError, "peer_rank must be from 0 to 0, got 1")
    refuses(3, 0, ValueError, "peer_share must be from 1 to 65536, got 0")
    refuses(4, 0.0, ValueError, "q_divisor must be over 0, got 0")
    refuses(6, float("nan"), ValueError, "k_weight must be over 0, got nan")
    with pytest.raises(TypeError, match="qk_rms_norm takes"):
        module.qk_rms_norm(*args, *peers[:3])
    torch.cuda.synchronize()


@pytest.mark.parametrize("how", ["all", "absent", "killed"])
def test_processes(module_path: ModulePath, how: str) -> None:
    """Two processes, by CUDA IPC on one GPU; one that stops, or dies, before the other is done."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        number = str(port.getsockname()[1])
    base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": number, "WORLD_SIZE": "2"}
    base |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROCESSES), str(module_path("peers")), how]
    ranks = [
        subprocess.Popen(
            command, env={**base, "RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = []
    try:
        for rank in ranks:
            outputs.append(rank.communicate(timeout=60)[0])
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    print(*outputs)
    killed = -9 if how == "killed" else 0
    assert [rank.returncode for rank in ranks] == [0, killed], outputs
    assert [output.count("done") for output in outputs] == [1, int(not killed)], outputs
