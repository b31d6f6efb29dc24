"""One rank's part of a layer, each way to compute it, and the layer replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from rank_cases import EPSILON, Case, check_same
from rank_place import Place

import qknorm_tvm
from qknorm_tvm import tensor_parallel as tp
from qknorm_tvm.bench.cuda import capture
from qknorm_tvm.check import reference_torch


class RankLayer:
    """The tensors of one rank, packed, with outputs that are used again.

    Attributes
    ----------
    inputs : list of torch.Tensor
        q, k, gamma_q and gamma_k of this rank.
    outputs : list of torch.Tensor
        q_out and k_out.
    qk_var : torch.Tensor, ``[M, 2]``
        Any statistics, for the all-reduce alone.
    """

    def __init__(self, place: Place, case: Case):
        layout = tp.HeadLayout(case.q_heads, case.kv_heads, case.head_dim, place.world, place.rank)
        q, k, gamma_q, gamma_k = case.whole_layer()
        self.place, self.layout = place, layout
        self.inputs = [
            q[:, layout.q_slice].contiguous(),
            k[:, layout.k_slice].contiguous(),
            layout.shard_gamma_q(gamma_q),
            layout.shard_gamma_k(gamma_k),
        ]
        self.outputs = [torch.empty_like(x) for x in self.inputs[:2]]
        self.qk_var = torch.ones(case.rows, 2, device=case.device)
        self._into = dict(zip(("q_out", "k_out"), self.outputs, strict=True))

    def layer(self) -> None:
        """Call the layer as models do. Of one rank that is one launch and no all-reduce."""
        tp.qk_rms_norm(*self.inputs, EPSILON, layout=self.layout, **self._into)

    def steps(self) -> None:
        """Take the layer's steps one by one, the all-reduce of one rank among them."""
        self._apply(self.mean_over_ranks(self.local_statistics()))

    def without_all_reduce(self) -> None:
        """Take the steps that are ours."""
        self._apply(self.local_statistics())

    @property
    def with_all_reduce(self) -> Callable[[], None]:
        """`layer`, but for one rank, where it leaves the all-reduce out."""
        return self.layer if self.place.world > 1 else self.steps

    def all_reduce(self) -> None:
        """Reduce statistics, and nothing else."""
        self.mean_over_ranks(self.qk_var)

    def torch_layer(
        self, q: torch.Tensor, k: torch.Tensor, gamma_q: torch.Tensor, gamma_k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the layer in torch, operation by operation."""
        qk_var = self.mean_over_ranks(reference_torch.row_mean_of_squares_qk(q, k))
        return reference_torch.apply_qk_rms_norm(q, k, qk_var, gamma_q, gamma_k, EPSILON)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return unfused torch's outputs, given the reduced statistics."""
        qk_var = self.mean_over_ranks(self.local_statistics())
        q, k, *gammas = self.inputs
        return reference_torch.apply_qk_rms_norm(q, k, qk_var, *gammas, EPSILON)

    def local_statistics(self) -> torch.Tensor:
        """Return the mean squares of this rank's columns."""
        return qknorm_tvm.row_mean_of_squares_qk(*self.inputs[:2])

    def mean_over_ranks(self, qk_var: torch.Tensor) -> torch.Tensor:
        """Average statistics in place, by one all-reduce whatever the number of ranks."""
        if self.place.backend == "nccl":
            dist.all_reduce(qk_var, op=dist.ReduceOp.AVG)
        else:  # gloo has no average
            qk_var.div_(self.place.world)
            dist.all_reduce(qk_var)
        return qk_var

    def _apply(self, qk_var: torch.Tensor) -> None:
        q, k, *gammas = self.inputs
        qknorm_tvm.apply_qk_rms_norm(q, k, qk_var, *gammas, EPSILON, **self._into)

    def poison(self) -> None:
        """Fill the outputs with what no result is."""
        for out in self.outputs:
            out.fill_(float("nan"))

    def check_outputs(self, wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Compare the outputs, bit for bit."""
        for out, value in zip(self.outputs, wanted, strict=True):
            check_same(out, value)


def check_replays(place: Place, case: Case) -> None:
    """Eager calls and replays, the all-reduce inside, give the bits of the unfused graph.

    Replays on other inputs in the same memory too: statistics kept from the capture would show.
    """
    rank_layer = RankLayer(place, case)
    call = rank_layer.with_all_reduce
    rank_layer.poison()
    call()
    rank_layer.check_outputs(rank_layer.expected())
    graph = capture(lambda _: call(), 1)
    for _ in range(2):
        wanted = rank_layer.expected()
        for _ in range(3):
            rank_layer.poison()
            graph.replay()
            rank_layer.check_outputs(wanted)
        for x in rank_layer.inputs[:2]:
            x.mul_(3)
    # A communicator is not destroyed before the graphs that use it.
    graph.reset()
