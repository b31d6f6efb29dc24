"""What the layer takes in one launch, beside its three steps; results are checked first.

Ranks as streams of one GPU, and one rank beside the three steps with NCCL's all-reduce of one::

    python tests/gpu/peer_times.py --module peers.so

A process for each GPU, at MiniMax-M2's and OLMo-2 32B's columns on two ranks::

    torchrun --nproc-per-node 2 tests/gpu/peer_times.py --module peer_times.so

The modules are ``peers`` and ``peer_times`` of ``build_modules.py``; without one, code is compiled.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

from peer_calls import EPSILON, Rank, bits, capture, statistics_of  # noqa: I001
import torch
import torch.distributed as dist

import qknorm_tvm
from qknorm_tvm import tensor_parallel as tp

LAUNCHES, SAMPLES, HEAD_DIM, BLOCK_SIZE = 42, 21, 128, 16


class Attention:
    """A rank's attention input: the norm, or with rotation and cache."""

    def __init__(self, rank: Rank, rotary_dim: int):
        rows = len(rank.q)
        self.rank, device = rank, "cuda"
        blocks, heads = -(-rows // BLOCK_SIZE), rank.k.shape[1] // HEAD_DIM
        caches = torch.zeros(2, blocks, BLOCK_SIZE, heads, HEAD_DIM, device=device).bfloat16()
        order = torch.arange(rows, device=device)
        angles = torch.randn(max(rows, 64), rotary_dim, device=device).bfloat16()
        self.options = {
            "positions": order, "cos_sin_cache": angles, "k_cache": caches[0],
            "v_cache": caches[1], "slot_mapping": order, "head_dim": HEAD_DIM,
        }  # fmt: skip

    def norm(self, workspace: Any, group: Any = None) -> None:
        r = self.rank
        tp.qk_rms_norm(
            r.q, r.k, r.gamma_q, r.gamma_k, EPSILON, q_out=r.q_out, k_out=r.k_out,
            workspace=workspace, group=group,
        )  # fmt: skip

    def cache(self, workspace: Any, group: Any = None) -> None:
        r = self.rank
        tp.qk_rms_norm_rope_cache(
            q=r.q, k=r.k, v=r.v, gamma_q=r.gamma_q, gamma_k=r.gamma_k, epsilon=EPSILON,
            q_out=r.q_out, workspace=workspace, group=group, **self.options,
        )  # fmt: skip

    def three_steps(self, cache: bool, group: Any = None) -> None:
        """Do what the layer does without a workspace; of one rank with its all-reduce."""
        r = self.rank
        qk_var = qknorm_tvm.row_mean_of_squares_qk(r.q, r.k)
        tp.reduce_row_mean_of_squares(qk_var, group=group)
        if dist.get_world_size(group) == 1:
            # Not a sum: of one rank NCCL would do nothing.
            dist.all_reduce(qk_var, op=dist.ReduceOp.AVG, group=group)
        if cache:
            qknorm_tvm.qk_rms_norm_rope_cache(
                q=r.q, k=r.k, v=r.v, gamma_q=r.gamma_q, gamma_k=r.gamma_k, epsilon=EPSILON,
                q_out=r.q_out, qk_var=qk_var, **self.options,
            )  # fmt: skip
        else:
            qknorm_tvm.apply_qk_rms_norm(
                r.q, r.k, qk_var, r.gamma_q, r.gamma_k, EPSILON, q_out=r.q_out, k_out=r.k_out
            )


def unfused(layer: Attention) -> tuple[torch.Tensor, ...]:
    """Normalise as models do, with torch's own operations; all ranks' columns are equal."""
    r, outputs = layer.rank, []
    var = torch.stack([x.float().pow(2).mean(-1) for x in (r.q, r.k)], dim=1)
    dist.all_reduce(var, op=dist.ReduceOp.AVG)
    for column, (x, gamma) in enumerate(((r.q, r.gamma_q), (r.k, r.gamma_k))):
        rs = torch.rsqrt(var[:, column] + EPSILON)[:, None]
        outputs.append(((x.float() * rs) * gamma).to(x.dtype))
    return tuple(outputs)


def _timed(stream: torch.cuda.Stream, others: Callable[[], None], own: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    others()
    with torch.cuda.stream(stream):
        start.record()
        own()
        end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / LAUNCHES


def _line(name: str, times: Sequence[float]) -> None:
    q1, median, q3 = statistics.quantiles(times, n=4)
    print(f"{name}: {median:.2f} us ({q1:.2f}-{q3:.2f}, least {min(times):.2f})", flush=True)


# ---- ranks as streams of one GPU --------------------------------------------------------------


def streams(count: int, rows: int, cache: bool, q_cols: int = 1536, k_cols: int = 256) -> None:
    """Time `count` ranks of one GPU."""
    workspaces = tp.PeerWorkspace.local(count, rows, timeout=5.0)
    ranks = [Rank(workspace, rows, q_cols, k_cols) for workspace in workspaces]
    layers = [Attention(rank, 64) for rank in ranks]

    def call(layer: Attention) -> None:
        (layer.cache if cache else layer.norm)(layer.rank.workspace)

    torch.cuda.synchronize()
    for rank, layer in zip(ranks, layers, strict=True):
        with torch.cuda.stream(rank.stream):
            call(layer)
    torch.cuda.synchronize()
    if not cache:
        wanted = [rank.expected(statistics_of(ranks)) for rank in ranks]
        assert not any(r.differing(w) for r, w in zip(ranks, wanted, strict=True))
    graphs = [
        capture(rank, lambda layer=layer: [call(layer) for _ in range(LAUNCHES)])
        for rank, layer in zip(ranks, layers, strict=True)
    ]

    def others() -> None:
        for rank, graph in zip(ranks[1:], graphs[1:], strict=True):
            with torch.cuda.stream(rank.stream):
                graph.replay()

    times = [_timed(ranks[0].stream, others, graphs[0].replay) for _ in range(SAMPLES + 3)][3:]
    for rank in ranks:
        rank.workspace.check()
    _line(f"{count} ranks, M {rows}, {'norm, rope, cache' if cache else 'norm'}", times)


def one_gpu(only: int) -> None:
    """Ranks as streams; then one rank, and three steps, at more rows."""
    for count in (1, 2, 4, 8):
        for rows in (1, 16, 64):
            for cache in (True, False):
                if only in (0, count):
                    streams(count, rows, cache)
    if only:
        return
    dist.init_process_group("nccl", init_method="tcp://127.0.0.1:29611", world_size=1, rank=0)
    for rows in (1, 16, 64, 128, 256, 512, 1024):
        workspace = tp.PeerWorkspace.local(1, rows)[0]
        layer = Attention(Rank(workspace, rows, 1536, 256), 64)
        beside(layer, workspace, f"1 rank, M {rows}")
    dist.destroy_process_group()


# ---- one launch beside three steps ------------------------------------------------------------


def beside(
    layer: Attention, workspace: tp.PeerWorkspace, name: str, compiled: bool = False
) -> None:
    """Time calls of one layer in CUDA graphs; all ranks do the same."""
    qk_var = torch.rand(len(layer.rank.q), 2, device="cuda")
    timed = {
        "norm, one launch": lambda: layer.norm(workspace),
        "norm, three steps": lambda: layer.three_steps(False),
        "norm, rope, cache, one launch": lambda: layer.cache(workspace),
        "norm, rope, cache, three steps": lambda: layer.three_steps(True),
        "norm, unfused torch": lambda: unfused(layer),
        "all-reduce alone": lambda: dist.all_reduce(qk_var, op=dist.ReduceOp.AVG),
    }
    if compiled:
        torch.compiler.reset()
        by_torch = torch.compile(unfused, dynamic=False)
        timed["norm, torch.compile"] = lambda: by_torch(layer)
    graphs = {}
    for label, call in timed.items():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        graphs[label] = capture(layer.rank, lambda call=call: [call() for _ in range(LAUNCHES)])
    samples: dict[str, list[float]] = {label: [] for label in timed}
    for turn in range(SAMPLES + 2):
        for label, graph in graphs.items():

            def warm(graph: Any = graph) -> None:
                with torch.cuda.stream(layer.rank.stream):
                    graph.replay()  # the ranks meet in it

            took = _timed(layer.rank.stream, warm, graph.replay)
            if turn > 1:
                samples[label].append(took)
    for graph in graphs.values():
        graph.reset()
    workspace.check()
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, samples)
    if dist.get_rank() == 0:
        for label in timed:
            _line(
                f"{name}, {label}",
                max((of_rank[label] for of_rank in everyones), key=statistics.median),
            )


def processes(counts: Sequence[int], stress: int, compile_torch: bool) -> None:
    """Check and time a rank for each process, each on its own GPU."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    torch.set_default_device(None)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    workspace = tp.PeerWorkspace(max_rows=4096, timeout=20.0)
    if stress:
        _stress(workspace, stress)
    layouts = (("MiniMax-M2", 6144, 1024, 64), ("OLMo-2 32B", 5120, 1024, 128))
    for name, q_cols, k_cols, rotary_dim in layouts:
        for rows in counts:
            layer = Attention(Rank(workspace, rows, q_cols // world, k_cols // world), rotary_dim)
            layer.norm(None)
            three = [x.clone() for x in (layer.rank.q_out, layer.rank.k_out)]
            layer.norm(workspace)
            torch.cuda.synchronize()
            for ours, wanted in zip((layer.rank.q_out, layer.rank.k_out), three, strict=True):
                assert torch.allclose(ours.float(), wanted.float(), rtol=2**-7, atol=1e-6), (
                    "differs"
                )
            beside(layer, workspace, f"{world} GPUs, {name}, M {rows}", compile_torch)
    workspace.close()
    dist.destroy_process_group()


def _stress(workspace: tp.PeerWorkspace, launches: int) -> None:
    """Replay graphs of launches of other rows and inputs, with delays; compare every one."""
    rank, world, sets, rows = dist.get_rank(), dist.get_world_size(), 5, 64
    generator = torch.Generator().manual_seed(1)  # the same on all ranks
    everyone = []  # of each set, of each rank
    for number in range(sets):
        ranks = []
        for other in range(world):
            stand_in = types.SimpleNamespace(rank=other, world_size=world)
            ranks.append(Rank(stand_in, rows, 768, 128, seed=number))
        ranks[rank].workspace = workspace
        everyone.append(ranks)
    wanted = [ranks[rank].expected(statistics_of(ranks)) for ranks in everyone]
    own = [ranks[rank] for ranks in everyone]
    numbers = torch.randint(0, sets, (LAUNCHES,), generator=generator).tolist()
    counts = torch.randint(1, rows + 1, (LAUNCHES,), generator=generator).tolist()
    steps = list(zip(numbers, counts, strict=True))
    logs = [torch.zeros(LAUNCHES, *x.shape, device="cuda").bfloat16() for x in (own[0].q, own[0].k)]
    values = [x.clone() for x in logs]
    for place, (number, some) in enumerate(steps):
        for x, value in zip(values, wanted[number], strict=True):
            x[place, :some] = value[:some]

    def work(sleeps: bool) -> None:
        for place, (number, some) in enumerate(steps):
            if sleeps and (place + 5 * rank) % 11 == 0:
                torch.cuda._sleep(20_000)
            inputs, (q_out, k_out) = own[number], logs
            tp.qk_rms_norm(
                inputs.q[:some], inputs.k[:some], inputs.gamma_q, inputs.gamma_k, EPSILON,
                q_out=q_out[place, :some], k_out=k_out[place, :some], workspace=workspace,
            )  # fmt: skip

    work(False)
    torch.cuda.synchronize()
    graphs = [capture(own[0], lambda sleeps=sleeps: work(sleeps)) for sleeps in (False, True)]
    bad, start, made = torch.zeros((), dtype=torch.int64, device="cuda"), time.perf_counter(), 0
    while made < launches:
        for kind in range(3):
            for x in logs:
                x.zero_()
            if (made + rank + kind) % 7 == 0:
                torch.cuda._sleep(100_000)
            work(True) if kind == 2 else graphs[kind].replay()
            for x, value in zip(logs, values, strict=True):
                bad += (bits(x) != bits(value)).sum()
            made += LAUNCHES
        torch.cuda.synchronize()
    workspace.check()
    print(
        f"rank {rank}: {made:,} launches, {int(bad)} elements differ from the rank-ordered "
        f"reference, {time.perf_counter() - start:.1f} s",
        flush=True,
    )
    assert not bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--module", help="an exported module, where code cannot be compiled")
    parser.add_argument("--ranks", type=int, default=0, help="time only so many ranks as streams")
    parser.add_argument("--stress", type=int, default=0, help="launches compared, by processes")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 16, 64, 128, 256, 512, 1024, 4096],
        help="of launches that are timed, by processes",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    given = parser.parse_args()
    if given.module:
        qknorm_tvm.use(qknorm_tvm.load(given.module))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if "RANK" in os.environ:
        processes(given.rows, given.stress, given.compile)
    else:
        one_gpu(given.ranks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
