"""Q and K of the CUDA kernels that add up rows: which warps go through which columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.backend.cuda.op import cuda_func_call

from ..declare.statistics import CHUNK, SLOTS, WARP
from .cuda import int64

#: Most warps of a block, and most vectors of a row that a thread holds.
_MAX_WARPS, _MAX_PARTS = 32, 4
#: Warps that go through a row of any length in rounds.
ROUND_WARPS = 8

# At least one, and not all: K's share of a row's chunks, rounded. Without a division, which would
# take longer than a short row.
_WARPS_OF_K = """(int64_t q_chunks, int64_t k_chunks) {
  int64_t warps = 1;
#pragma unroll
  for (int more = 1; more < WARPS - 1; ++more) {
    warps += 2 * WARPS * k_chunks >= (2 * more + 1) * (q_chunks + k_chunks);
  }
  return warps;
}
"""


@dataclasses.dataclass
class Operand:
    """Q or K, and the warps that go through its rows.

    In rounds it is known when the kernel runs how many warps that is.
    """

    tag: str
    x: tirx.Buffer
    warps: Any
    parts: int
    in_rounds: bool
    first_thread: Any = 0
    first_sum: int = 0

    @property
    def cols(self) -> tirx.Expr:
        return self.x.shape[1]

    @property
    def chunks(self) -> tirx.Expr:
        """Chunks of a row, the last of them perhaps not whole."""
        return tirx.floordiv(self.cols + (CHUNK - 1), int64(CHUNK))

    @property
    def step(self) -> Any:
        """How many chunks its warps hold at a time."""
        return self.warps * self.parts

    @property
    def room(self) -> int:
        """How many sums of a row there is room for: no warp has to test whether it has a chunk."""
        return SLOTS if self.in_rounds else self.step


def deal_chunks(chunks: Sequence[int], wanted: int) -> tuple[int, tuple[int, ...]] | None:
    """Deal out the chunks of Q and of K to the warps of a block.

    Parameters
    ----------
    chunks : sequence of int
        How many a row of each has.
    wanted : int
        Vectors of a row that a thread is to hold; it holds more where warps do not suffice.

    Returns
    -------
    (int, tuple of int) or None
        Vectors that a thread holds, and warps of each; None where a block cannot hold a row.
    """
    for parts in range(min(wanted, _MAX_PARTS), _MAX_PARTS + 1):
        warps = tuple(-(-count // parts) for count in chunks)
        if sum(warps) <= _MAX_WARPS:
            return parts, warps
    return None


def deal_out(params: dict[str, Any], wanted: int) -> list[Operand]:
    """Deal out warps: as many as chunks, or as many as a block may have."""
    xs = [params[tag] for tag in ("q", "k")]
    fixed = all(isinstance(x.shape[1], tirx.IntImm) for x in xs)
    dealt = deal_chunks([-(-int(x.shape[1]) // CHUNK) for x in xs], wanted) if fixed else None
    if dealt:
        parts, warps = dealt
        q, k = (
            Operand(tag, x, count, parts, False)
            for tag, x, count in zip("qk", xs, warps, strict=True)
        )
    else:
        parts = min(wanted, _MAX_PARTS)
        # A variable, or every index would have all that it is computed from in it.
        k_warps = tirx.Var("k_warps", "int64")
        q = Operand("q", xs[0], ROUND_WARPS - k_warps, parts, True)
        k = Operand("k", xs[1], k_warps, parts, True)
    k.first_thread = q.warps * WARP
    k.first_sum = q.room
    return [q, k]


def rounds(count: tirx.Expr, step: Any) -> tirx.Expr:
    """Return how many steps make a count of chunks, or of slots, which 32 bits hold."""
    short = [tirx.Cast("int32", one) for one in (count + (step - 1), step)]
    return tirx.Cast("int64", tirx.truncdiv(*short))


def warps_of_k(q: Operand, k: Operand) -> tirx.Expr:
    """Return how many of the warps K gets where that depends on the columns of a call."""
    code = _WARPS_OF_K.replace("WARPS", str(ROUND_WARPS))
    source = f"__device__ __forceinline__ int64_t qknorm_warps_of_k{code}"
    return cuda_func_call(
        "qknorm_warps_of_k", q.chunks, k.chunks, source_code=source, return_type="int64"
    )
