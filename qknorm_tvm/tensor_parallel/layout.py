"""`HeadLayout`: which query and KV heads, and so which columns and scales, a rank holds."""

from __future__ import annotations

import dataclasses
from typing import Any


def check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Refuse what is no int from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {low if low == high else expected}, got {value}")


@dataclasses.dataclass(frozen=True)
class HeadLayout:
    """The heads of one attention layer, and those of them that one tensor-parallel rank holds.

    Ranks hold whole heads, in order. With ``world_size <= kv_heads`` each holds
    ``kv_heads / world_size`` KV heads. With more ranks than KV heads every KV head is replicated on
    ``world_size / kv_heads`` neighbouring ranks, those that hold its query heads: rank ``r`` holds
    KV head ``r * kv_heads // world_size`` and *that head's* slice of K's scales. Slicing the scales
    by rank instead gives garbled output or a model that does not load, which is what happened in
    vLLM (pull request 38191), SGLang (20967), Megatron-Bridge (3458) and mlx-lm (898).

    Every rank holds equally many columns. Shards of unequal width have no layout: give their column
    totals to `qknorm_tvm.tensor_parallel.qk_rms_norm`.

    Parameters
    ----------
    q_heads, kv_heads : int
        Heads of the whole layer; `q_heads` is a multiple of `kv_heads`.
    head_dim : int
        Columns of one head.
    world_size, rank : int
        Ranks that share the layer, and which of them this is, from 0.

    Raises
    ------
    TypeError, ValueError
        A field is no int or out of range, or the heads do not divide over the ranks; the message
        names the field, what was expected and what came.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    world_size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        for name in ("q_heads", "kv_heads", "head_dim", "world_size"):
            check_int(name, getattr(self, name), 1)
        check_int("rank", self.rank, 0, self.world_size - 1)
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"q_heads must be a multiple of kv_heads ({self.kv_heads}), got {self.q_heads}"
            )
        uneven = "for uneven shards give column totals to tensor_parallel.qk_rms_norm"
        if self.q_heads % self.world_size:
            raise ValueError(
                f"q_heads must be a multiple of world_size ({self.world_size}), "
                f"got {self.q_heads}; {uneven}"
            )
        if self.kv_heads % self.world_size and self.world_size % self.kv_heads:
            raise ValueError(
                f"kv_heads must be a multiple or a divisor of world_size ({self.world_size}), "
                f"got {self.kv_heads}; {uneven}"
            )

    # ---- heads --------------------------------------------------------------------------------

    @property
    def q_heads_local(self) -> int:
        """Query heads on each rank."""
        return self.q_heads // self.world_size

    @property
    def kv_heads_local(self) -> int:
        """KV heads on each rank."""
        return max(1, self.kv_heads // self.world_size)

    @property
    def kv_replicas(self) -> int:
        """Ranks that hold the same KV head."""
        return max(1, self.world_size // self.kv_heads)

    @property
    def first_q_head(self) -> int:
        """The first query head on this rank."""
        return self.rank * self.q_heads_local

    @property
    def first_kv_head(self) -> int:
        """The first KV head on this rank, by head and not by rank."""
        return self.rank * self.kv_heads // self.world_size

    # ---- columns ------------------------------------------------------------------------------

    @property
    def q_cols(self) -> int:
        """Columns of Q on this rank."""
        return self.q_heads_local * self.head_dim

    @property
    def k_cols(self) -> int:
        """Columns of K on this rank."""
        return self.kv_heads_local * self.head_dim

    @property
    def q_cols_total(self) -> int:
        """Columns of the whole Q."""
        return self.q_heads * self.head_dim

    @property
    def k_cols_total(self) -> int:
        """Columns of the whole K, each head counted once."""
        return self.kv_heads * self.head_dim

    @property
    def q_slice(self) -> slice:
        """This rank's columns of the whole Q: of its scales, and rows of its projection weight."""
        start = self.first_q_head * self.head_dim
        return slice(start, start + self.q_cols)

    @property
    def k_slice(self) -> slice:
        """This rank's columns of the whole K: of its scales, and rows of its projection weight."""
        start = self.first_kv_head * self.head_dim
        return slice(start, start + self.k_cols)

    @property
    def weights(self) -> tuple[float, float]:
        """Weights of this rank's mean of squares in the whole layer's, for Q and for K.

        A replicated KV head counts once, shared by its replicas. Both weights are
        ``1 / world_size``, as the layout gives every rank equally many columns.
        """
        return (
            self.q_cols / self.q_cols_total,
            self.k_cols / (self.k_cols_total * self.kv_replicas),
        )

    # ---- scales -------------------------------------------------------------------------------

    def shard_gamma_q(self, gamma_q: Any) -> Any:
        """Return this rank's part of the whole layer's scales of Q.

        Parameters
        ----------
        gamma_q : array, ``[q_cols_total]``
            A torch tensor, a NumPy array, or anything with a shape that slices.

        Returns
        -------
        array, ``[q_cols]``
            What slicing returns: a view of torch's and NumPy's.

        Raises
        ------
        TypeError, ValueError
            It has no shape, or not the whole layer's.
        """
        return _shard("gamma_q", gamma_q, self.q_cols_total, self.q_slice)

    def shard_gamma_k(self, gamma_k: Any) -> Any:
        """Return this rank's part of the whole layer's scales of K: its KV heads'.

        As `shard_gamma_q`, for ``[k_cols_total]`` and ``[k_cols]``.
        """
        return _shard("gamma_k", gamma_k, self.k_cols_total, self.k_slice)


def _shard(name: str, gamma: Any, total: int, part: slice) -> Any:
    shape = getattr(gamma, "shape", None)
    if shape is None:
        raise TypeError(f"{name} must be an array with a shape, got {type(gamma).__name__}")
    if tuple(shape) != (total,):
        raise ValueError(f"{name} must have the whole layer's shape ({total},), got {tuple(shape)}")
    return gamma[part]
