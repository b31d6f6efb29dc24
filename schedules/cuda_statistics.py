"""The CUDA schedule of a row's mean of squares, alone and before Q and K are normalised with it.

Strategy. A block of threads holds whole rows of Q and of K, in registers: it reads them once, adds
up the squares in the order of `qknorm_tvm.declare.statistics`, whose vectors are what a thread
reads in one access and whose chunks are what a warp has, and normalises what it still holds.

Map from the declaration's loops (`qknorm_tvm.lower.cuda_statistics` makes it)::

    row    -> tile, row_in_tile           tile: blockIdx.x
    chunk  -> round, part, warp           warp: threadIdx.x // 32, Q's warps and then K's
    lane   -> threadIdx.x % 32            sums of halves: shuffles between the lanes of a warp
    column -> one vector access
    slot   -> the lanes of a warp, which read the chunks' sums from shared memory

Primitives inline the intermediates, so that each block is one statement an element, and note the
config. What is left has no primitive: a sum in a given order over the threads of a warp and over
its warps, two operands in one block of threads, and registers that are read by the statements
before the sum and after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import IRModule
from tvm.s_tir import Schedule

from qknorm_tvm.lower import cuda as lowering_cuda
from qknorm_tvm.lower import cuda_statistics as lowering_cuda_statistics

if TYPE_CHECKING:
    from tvm import tirx

    from .cuda_config import CudaConfig


def schedule(func: tirx.PrimFunc, config: CudaConfig) -> tirx.PrimFunc:
    """Schedule ``row_mean_of_squares_qk`` or ``qk_rms_norm`` for CUDA.

    Parameters
    ----------
    func : tirx.PrimFunc
        A function of `qknorm_tvm.declare.norm.declare` with ``row_tile=1``, in the order of CUDA.
        Its alignment decides how wide accesses are.
    config : CudaConfig
        ``rows``, ``columns`` (vectors of a thread in a row; more where a block would have more than
        1024 threads), ``dependent_launch`` and ``streaming_stores``. The order of summation fixes
        the rest: vectors of 8 columns, and as many threads as that makes.

    Returns
    -------
    tirx.PrimFunc
        The function bound to one grid, ready for `qknorm_tvm.build.cuda.cuda_source`.

    Raises
    ------
    ValueError
        The function lacks a block that the declaration has.
    """
    sch = Schedule(IRModule({"main": func}))
    sch.work_on("main")
    schedule_body(sch, config)
    return lowering_cuda_statistics.join_rows(sch.mod["main"])


def adds_rows(sch: Schedule) -> bool:
    """Whether a schedule is of a function that adds up rows."""
    return "square_x32_q" in lowering_cuda_statistics.blocks_of(sch.mod["main"])


def schedule_body(sch: Schedule, config: CudaConfig) -> None:
    """Apply the schedule's primitives, all of which a trace records.

    No field changes them, so that a trace holds for every config; `lowering_cuda_statistics`
    completes the result.
    """
    normalises = "q_out" in lowering_cuda_statistics.blocks_of(sch.mod["main"])
    for tag in ("q", "k"):
        sch.compute_inline(sch.get_sblock(f"square_x32_{tag}"))
        for name in ("x32", "scaled", "weighted") if normalises else ():
            sch.compute_inline(sch.get_sblock(f"{name}_{tag}"))
    row = sch.get_loops(sch.get_sblock("q_out" if normalises else "mean"))[0]
    for field, value in config.to_dict().items():
        sch.annotate(row, lowering_cuda.NOTE + field, value)
