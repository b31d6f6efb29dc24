"""The declared mean of squares of a row, and its order of summation: one for CPUs, one for CUDA.

A float32 sum depends on its order. This one is part of the operation, whatever the schedule, so
that a row's result is the same alone and in a batch, on one thread and on many, in the operation
of its own and in the fused one. On CPUs::

    a row is cut into blocks of STEPS * LANES columns; in each, lane l of LANES adds the squares of
    columns l, l + LANES, l + 2 LANES, ...                           in that order, from zero
    each lane adds its blocks' sums                                  in order, from zero
    neighbouring lanes (2 p and 2 p + 1) are added,                  LANES / 2 sums
    then the second half to the first, until one is left
    which is divided by the number of columns

and on GPUs, where a thread reads neighbouring columns and 32 threads add up what each has::

    a row is cut into vectors of VECTOR columns; in each, the squares are added
                                                                     in order, from zero
    WARP neighbouring vectors are a chunk: the second half of their sums is added to the first,
    until one is left
    slot l of SLOTS adds the sums of chunks l, l + SLOTS, l + 2 SLOTS, ...
                                                                     in that order, from zero
    the second half of the slots is added to the first, until one is left
    which is divided by the number of columns

It is the same for every type of element, layout, number of rows, grid and config.

Each square is added by a fused multiply-add where the device has one (all but x86-64-v2);
squares of bfloat16 and float16 are exact in float32, so that this matters for float32 alone. No sum
has more than STEPS (CUDA: VECTOR) terms until there are as many blocks (rounds of chunks), and the
lanes' errors average out: the error is that of the last few additions, and no larger than that of
torch's float32 mean. (Without blocks it would be: 6.6e-8 against 5.0e-8 in the mean at 6144
columns of bfloat16.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from . import steps

#: Partial sums of a row. As many as keep four registers of 16 busy, the fewest that hide the
#: latency of an addition on AVX-512; AVX2 has registers for them too.
LANES = 64
#: Squares that a lane adds before it adds their sum to its total.
STEPS = 16
#: Columns of a block.
BLOCK = STEPS * LANES

#: CUDA: neighbouring columns whose squares one thread adds; 16 bytes of 16-bit elements.
VECTOR = 8
#: CUDA: neighbouring vectors that are added in halves; the threads of a warp.
WARP = 32
#: CUDA: columns of a chunk.
CHUNK = VECTOR * WARP
#: CUDA: partial sums of a row's chunks.
SLOTS = 32


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


def sum_of_squares(tag: str, kind: str = "cpu") -> Callable[..., Any]:
    """Return the statements that add up the squares of each row of `x`, as `total[row, 0]`.

    A factory, because TVM numbers the blocks of a second expansion of one inline function.

    Parameters
    ----------
    tag : str
        ``"q"`` or ``"k"``, which ends the blocks' names.
    kind : str
        Whose order: ``"cpu"`` or ``"cuda"``, a target's kind.
    """
    return {"cpu": _sum_on_cpu, "cuda": _sum_on_cuda}[kind](tag)


def row_mean(tag: str) -> Callable[..., Any]:
    """Return the statement that divides sums (`sum_of_squares`) by columns, as `var[row, 0]`."""
    mean_name = f"mean_{tag}"

    @T.inline
    def mean(var, total, rows, cols):
        for i in range(rows):
            with T.sblock(mean_name):
                vi = T.axis.spatial(rows, i)
                var[vi, T.int64(0)] = steps.mean(total[vi, T.int64(0)], cols)

    return mean


def _sum_on_cpu(tag: str) -> Callable[..., Any]:
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
                x32[vi, vj] = T.if_then_else(vj < cols, steps.widened(x[vi, vj]), T.float32(0))
        for i, block, lane, step in T.grid(
            rows, T.ceildiv(cols, BLOCK), T.int64(LANES), T.int64(STEPS)
        ):
            with T.sblock(partial_name):
                vi, vb, vl, vs = T.axis.remap("SSSR", [i, block, lane, step])
                with T.init():
                    partial[vi, vb, vl] = T.float32(0)
                partial[vi, vb, vl] = steps.add_square(
                    partial[vi, vb, vl], x32[vi, (vb * STEPS + vs) * LANES + vl]
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


def cuda_blocks(tag: str) -> list[str]:
    """Return the names of the blocks that add up a row on CUDA, in order, without `square_x32`."""
    widths = (16, 8, 4, 2, 1)
    chunks, slots = ([f"{name}{width}_{tag}" for width in widths] for name in ("chunk", "slot"))
    return [f"vector_{tag}", *chunks, f"slots_{tag}", *slots]


def _chunk_halving(name: str, width: int) -> Callable[..., Any]:
    @T.inline
    def halve(half, whole, rows, chunks):
        for i, chunk, p in T.grid(rows, chunks, T.int64(width)):
            with T.sblock(name):
                vi, vc, vp = T.axis.remap("SSS", [i, chunk, p])
                half[vi, vc, vp] = whole[vi, vc, vp] + whole[vi, vc, vp + width]

    return halve


def _sum_on_cuda(tag: str) -> Callable[..., Any]:
    x32_name, vector_name, slots_name = f"square_x32_{tag}", f"vector_{tag}", f"slots_{tag}"
    names = cuda_blocks(tag)
    chunk16, chunk8, chunk4, chunk2, chunk1 = (
        _chunk_halving(name, width)
        for name, width in zip(names[1:6], (16, 8, 4, 2, 1), strict=True)
    )
    slot16, slot8, slot4, slot2, slot1 = (
        _halving(name, width) for name, width in zip(names[7:], (16, 8, 4, 2, 1), strict=True)
    )

    @T.inline
    def add_up(total, x, rows, cols):
        # Rounds of SLOTS chunks. Zeros beyond the last column change no sum.
        rounds = T.meta_var(T.ceildiv(cols, CHUNK * SLOTS))
        chunks = T.meta_var(T.ceildiv(cols, CHUNK * SLOTS) * SLOTS)
        x32 = T.sblock_alloc_buffer((rows, chunks * CHUNK), "float32")
        vectors = T.sblock_alloc_buffer((rows, chunks, T.int64(WARP)), "float32")
        chunks16 = T.sblock_alloc_buffer((rows, chunks, T.int64(16)), "float32")
        chunks8 = T.sblock_alloc_buffer((rows, chunks, T.int64(8)), "float32")
        chunks4 = T.sblock_alloc_buffer((rows, chunks, T.int64(4)), "float32")
        chunks2 = T.sblock_alloc_buffer((rows, chunks, T.int64(2)), "float32")
        sums = T.sblock_alloc_buffer((rows, chunks, T.int64(1)), "float32")
        slots = T.sblock_alloc_buffer((rows, T.int64(SLOTS)), "float32")
        slots16 = T.sblock_alloc_buffer((rows, T.int64(16)), "float32")
        slots8 = T.sblock_alloc_buffer((rows, T.int64(8)), "float32")
        slots4 = T.sblock_alloc_buffer((rows, T.int64(4)), "float32")
        slots2 = T.sblock_alloc_buffer((rows, T.int64(2)), "float32")
        for i, j in T.grid(rows, chunks * CHUNK):
            with T.sblock(x32_name):
                vi, vj = T.axis.remap("SS", [i, j])
                x32[vi, vj] = T.if_then_else(vj < cols, steps.widened(x[vi, vj]), T.float32(0))
        for i, chunk, lane, column in T.grid(rows, chunks, T.int64(WARP), T.int64(VECTOR)):
            with T.sblock(vector_name):
                vi, vc, vl, vj = T.axis.remap("SSSR", [i, chunk, lane, column])
                with T.init():
                    vectors[vi, vc, vl] = T.float32(0)
                vectors[vi, vc, vl] = steps.add_square(
                    vectors[vi, vc, vl], x32[vi, (vc * WARP + vl) * VECTOR + vj]
                )
        chunk16(chunks16, vectors, rows, chunks)
        chunk8(chunks8, chunks16, rows, chunks)
        chunk4(chunks4, chunks8, rows, chunks)
        chunk2(chunks2, chunks4, rows, chunks)
        chunk1(sums, chunks2, rows, chunks)
        for i, slot, turn in T.grid(rows, T.int64(SLOTS), rounds):
            with T.sblock(slots_name):
                vi, vs, vt = T.axis.remap("SSR", [i, slot, turn])
                with T.init():
                    slots[vi, vs] = T.float32(0)
                slots[vi, vs] = slots[vi, vs] + sums[vi, vt * SLOTS + vs, T.int64(0)]
        slot16(slots16, slots, rows)
        slot8(slots8, slots16, rows)
        slot4(slots4, slots8, rows)
        slot2(slots2, slots4, rows)
        slot1(total, slots2, rows)

    return add_up
