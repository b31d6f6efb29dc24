"""Calls of ranks that are streams of this process, and their references, for tests and timing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

# Streams that share a queue of the GPU would wait for one another: more than there are ranks.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import torch

from qknorm_tvm import tensor_parallel as tp
from qknorm_tvm.check.reference import SLOTS, VECTOR, WARP

EPSILON = 1e-6


def _halves(sums: torch.Tensor) -> torch.Tensor:
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


def sums_of_squares(x: torch.Tensor) -> torch.Tensor:
    """Return each row's float32 sum of squares of 16-bit elements, in the order of the modules."""
    rows, cols = x.shape
    vectors = -(-cols // VECTOR)
    chunks = -(-vectors // WARP)
    turns = -(-chunks // SLOTS)
    lanes, slots = (1 << (min(n, 32) - 1).bit_length() for n in (vectors, chunks))
    padded = torch.zeros(rows, turns * slots * lanes * VECTOR, device=x.device)
    padded[:, :cols] = x  # squares of 16-bit elements are exact
    columns = padded.view(rows, turns, slots, lanes, VECTOR)
    total = torch.zeros(columns.shape[:-1], device=x.device)
    for e in range(VECTOR):
        total = columns[..., e] * columns[..., e] + total
    sums, total = _halves(total), torch.zeros(rows, slots, device=x.device)
    for turn in range(turns):
        total = total + sums[:, turn]
    return _halves(total)


def rank_ordered(
    operands: Sequence[Sequence[torch.Tensor]], divisors: Sequence[float], k_weight: float = 1.0
) -> torch.Tensor:
    """Return the mean squares of whole rows from each rank's q and k."""
    columns = []
    for column, divisor in enumerate(divisors):
        total = torch.zeros(len(operands[0][0]), device=operands[0][0].device)
        for rank in operands:
            sums = sums_of_squares(rank[column])
            total = total + (sums * k_weight if column else sums)
        columns.append(total / torch.tensor(divisor, device=total.device))
    return torch.stack(columns, dim=1)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


class Rank:
    """One rank of a layer: its stream, workspace and inputs."""

    def __init__(
        self, workspace: tp.PeerWorkspace, rows: int, q_cols: int, k_cols: int, seed: int = 0
    ):
        generator = torch.Generator("cuda").manual_seed(100 * seed + workspace.rank)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device="cuda", generator=generator)

        self.workspace, self.stream = workspace, torch.cuda.Stream()
        self.qkv = (2 * random(rows, q_cols + 2 * k_cols)).bfloat16()
        self.q, self.k, self.v = self.qkv.split([q_cols, k_cols, k_cols], dim=1)
        self.gamma_q, self.gamma_k = 1 + random(q_cols) / 8, 1 + random(k_cols) / 8
        self.q_out = torch.full_like(self.q, float("nan"), memory_format=torch.contiguous_format)
        self.k_out = torch.full_like(self.k, float("nan"), memory_format=torch.contiguous_format)

    def call(self, rows: int | None = None, **options: Any) -> None:
        """Launch the norm of the first rows on the current stream."""
        tp.qk_rms_norm(
            self.q[:rows], self.k[:rows], self.gamma_q, self.gamma_k, EPSILON,
            q_out=self.q_out[:rows], k_out=self.k_out[:rows], workspace=self.workspace, **options,
        )  # fmt: skip

    def expected(self, qk_var: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs, given the statistics of whole rows."""
        outputs = []
        for column, (x, gamma) in enumerate(((self.q, self.gamma_q), (self.k, self.gamma_k))):
            rs = torch.rsqrt(qk_var[:, column] + EPSILON)[:, None]
            outputs.append(((x.float() * rs) * gamma).to(x.dtype))
        return outputs[0], outputs[1]

    def differing(self, wanted: Sequence[torch.Tensor], rows: int | None = None) -> int:
        """Count elements of the outputs that are not those bits."""
        pairs = zip((self.q_out, self.k_out), wanted, strict=True)
        return sum(int((bits(a[:rows]) != bits(b[:rows])).sum()) for a, b in pairs)


def make_ranks(
    count: int, rows: int, q_cols: int = 1536, k_cols: int = 256, *, timeout: float = 20.0
) -> list[Rank]:
    """Return ranks, inputs and workspaces."""
    workspaces = tp.PeerWorkspace.local(count, rows, timeout=timeout)
    return [Rank(workspace, rows, q_cols, k_cols) for workspace in workspaces]


def everywhere(ranks: Sequence[Rank], work: Callable[[Rank], None]) -> None:
    """Queue the same on every rank's stream, then wait for all."""
    torch.cuda.synchronize()
    for rank in ranks:
        with torch.cuda.stream(rank.stream):
            work(rank)
    torch.cuda.synchronize()


def statistics_of(ranks: Sequence[Rank]) -> torch.Tensor:
    """Return the mean squares of whole rows, by shards of equal columns."""
    count = len(ranks)
    divisors = [float(count * x.shape[1]) for x in (ranks[0].q, ranks[0].k)]
    return rank_ordered([(rank.q, rank.k) for rank in ranks], divisors)


def capture(rank: Rank, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Capture on the rank's stream; nothing is run before, as other ranks would have to run too."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=rank.stream, capture_error_mode="thread_local"):
        work()
    return graph
