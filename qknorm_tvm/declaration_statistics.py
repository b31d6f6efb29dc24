"""The declared mean of squares of a row, and its one order of summation.

A float32 sum depends on its order. This one is part of the operation, whatever the schedule, so
that a row's result is the same alone and in a batch, on one thread and on many, in the operation
of its own and in the fused one::

    a row is cut into blocks of STEPS * LANES columns; in each, lane l of LANES adds the squares of
    columns l, l + LANES, l + 2 LANES, ...                           in that order, from zero
    each lane adds its blocks' sums                                  in order, from zero
    neighbouring lanes (2 p and 2 p + 1) are added,                  LANES / 2 sums
    then the second half to the first, until one is left
    which is divided by the number of columns

Each square is added by a fused multiply-add where the CPU has one (all but x86-64-v2); squares of
bfloat16 and float16 are exact in float32, so that this matters for float32 alone. No sum has more
than STEPS terms until there are as many blocks, and the lanes' errors average out: the error is
that of the last few additions, and no larger than that of torch's float32 mean. (Without blocks it
was: 6.6e-8 against 5.0e-8 in the mean at 6144 columns of bfloat16.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

#: Partial sums of a row. As many as keep four registers of 16 busy, the fewest that hide the
#: latency of an addition on AVX-512; AVX2 has registers for them too.
LANES = 64
#: Squares that a lane adds before it adds their sum to its total.
STEPS = 16
#: Columns of a block.
BLOCK = STEPS * LANES


def _halving(name: str, width: int) -> Callable[..., Any]:
    @T.inline
    def halve(half, whole, rows):
        for i, p in T.grid(rows, T.int64(width)):
            with T.sblock(name):
                vi, vp = T.axis.remap("SS", [i, p])
                half[vi, vp] = whole[vi, vp] + whole[vi, vp + width]

    return halve


def halvings(tag: str) -> list[str]:
    """Return the names of the blocks that add halves, widest first."""
    widths = []
    width = LANES // 4
    while width:
        widths.append(width)
        width //= 2
    return [f"sum{width}_{tag}" for width in widths]


def sum_of_squares(tag: str) -> Callable[..., Any]:
    """Return the statements that add up the squares of each row of `x`, as `total[row, 0]`.

    A factory, because TVM numbers the blocks of a second expansion of one inline function.
    """
    partial_name, lanes_name, pairs_name = f"partial_{tag}", f"lanes_{tag}", f"pairs_{tag}"
    x32_name = f"square_x32_{tag}"
    halve16, halve8, halve4, halve2, halve1 = (
        _halving(name, int(name.removeprefix("sum").partition("_")[0])) for name in halvings(tag)
    )

    @T.inline
    def add_up(total, x, rows, cols):
        # Zeros beyond the last column change no sum.
        x32 = T.sblock_alloc_buffer((rows, T.ceildiv(cols, BLOCK) * BLOCK), "float32")
        partial = T.sblock_alloc_buffer((rows, T.ceildiv(cols, BLOCK), T.int64(LANES)), "float32")
        lanes = T.sblock_alloc_buffer((rows, T.int64(LANES)), "float32")
        pairs = T.sblock_alloc_buffer((rows, T.int64(LANES // 2)), "float32")
        sums16 = T.sblock_alloc_buffer((rows, T.int64(16)), "float32")
        sums8 = T.sblock_alloc_buffer((rows, T.int64(8)), "float32")
        sums4 = T.sblock_alloc_buffer((rows, T.int64(4)), "float32")
        sums2 = T.sblock_alloc_buffer((rows, T.int64(2)), "float32")
        for i, j in T.grid(rows, T.ceildiv(cols, BLOCK) * BLOCK):
            with T.sblock(x32_name):
                vi, vj = T.axis.remap("SS", [i, j])
                x32[vi, vj] = T.if_then_else(vj < cols, T.Cast("float32", x[vi, vj]), T.float32(0))
        for i, block, lane, step in T.grid(
            rows, T.ceildiv(cols, BLOCK), T.int64(LANES), T.int64(STEPS)
        ):
            with T.sblock(partial_name):
                vi, vb, vl, vs = T.axis.remap("SSSR", [i, block, lane, step])
                with T.init():
                    partial[vi, vb, vl] = T.float32(0)
                partial[vi, vb, vl] = T.fma(
                    x32[vi, (vb * STEPS + vs) * LANES + vl],
                    x32[vi, (vb * STEPS + vs) * LANES + vl],
                    partial[vi, vb, vl],
                )
        for i, lane, block in T.grid(rows, T.int64(LANES), T.ceildiv(cols, BLOCK)):
            with T.sblock(lanes_name):
                vi, vl, vb = T.axis.remap("SSR", [i, lane, block])
                with T.init():
                    lanes[vi, vl] = T.float32(0)
                lanes[vi, vl] = lanes[vi, vl] + partial[vi, vb, vl]
        for i, p in T.grid(rows, T.int64(LANES // 2)):
            with T.sblock(pairs_name):
                vi, vp = T.axis.remap("SS", [i, p])
                pairs[vi, vp] = lanes[vi, vp * 2] + lanes[vi, vp * 2 + 1]
        halve16(sums16, pairs, rows)
        halve8(sums8, sums16, rows)
        halve4(sums4, sums8, rows)
        halve2(sums2, sums4, rows)
        halve1(total, sums2, rows)

    return add_up
