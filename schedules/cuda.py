"""The CUDA schedule: one kernel for Q and K together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import IRModule
from tvm.s_tir import Schedule

from .cuda_config import NOTE, WARP
from .cuda_device import aligned_elements

if TYPE_CHECKING:
    from tvm import tirx
    from tvm.s_tir.schedule import LoopRV, SBlockRV

    from .cuda_config import CudaConfig

_OPERANDS = ("q", "k")


def schedule(func: tirx.PrimFunc, config: CudaConfig) -> tirx.PrimFunc:
    """Schedule a function of `qknorm_tvm.declare.norm.declare` for CUDA.

    Strategy: a thread loads its vectors of x, its gamma and the variance of its rows, then
    computes, then stores; nothing is shared between threads, so there is no shared memory and no
    barrier. All that matters is how many bytes are in flight, how many blocks have to be started,
    and when the next kernel may be.

    Loops of Q, and likewise of K, to threads::

        row    -> tile, row_in_tile      tile: blockIdx
        column -> thread, lane           thread: blockIdx and threadIdx.x; lane: a vector access
        column -> warp, part, in_warp, lane    the same with several vectors (parts) a thread

    The threads of Q and K form one range, Q's first, so that none idles within a row and there is
    one launch; blocks cut that range. A schedule primitive for that does not exist: loops over
    threads are annotated with the config, and `qknorm_tvm.lower.cuda` joins them.

    Tried, and lost: microseconds a launch in a CUDA graph of 40 on H100 80GB HBM3 (torch 2.11, CUDA
    13.0, driver 580.159), bfloat16, columns 1536/256 unless said otherwise. The same buffers each
    time where they fit L2, three sets in turn otherwise. Compared figures are of one run.

    - Rows a thread, 1 and 2, of 224 threads, the next kernel after the loads: 1.26 and 1.34 at
      M = 256, 2.34 and 2.13 at M = 1024; but at once 2.01 and 2.56 there. Only where blocks, of
      which 823 start in a microsecond, are too many, more rows gain: 3.49 and 3.31 at M = 2048,
      5.62 and 5.39 at 4096. Columns 768/128 at M = 4096: 5.37 and 3.39; columns 256/64 at M = 16384
      with 1, 2, 4: 20.2, 10.2, 5.2.
    - Threads: 128 at M = 256 1.50 against 1.23 with a block for each row; at M = 1024 2.74 against
      2.01; at M = 16384 and 6144/1024 164 against 157.
    - The next kernel starts at once, after the loads, as blocks exit, after the end, with 224
      threads: 0.86, 0.91, 1.01, 1.28 at M = 1; 1.49, 1.18, 1.40, 1.73 at M = 256; 2.02, 2.34, 2.14,
      2.49 at M = 1024.
    - Gamma before the wait: 0.77 and 0.77 at M = 1, 0.96 and 0.96 at M = 64, also when it is not in
      L2; wrong should an unfinished kernel write gamma. Prefetched to L2: 1.13 against 0.96 at
      M = 64, 144 against 40 at M = 16384.
    - Plain stores at 6144/1024 and M = 256, 512, 1024: 2.09, 3.86, 6.42 against 1.91, 3.13, 5.34
      with streaming ones; but 156.8 against 157.1 at M = 16384. ``L1::no_allocate`` on loads too:
      1.91, 3.13, 5.48, and at M = 16384 either 156.6 or 159.4, by what ran before.
    - Neighbouring blocks on neighbouring rows: 160.2 against 156.8 at 6144/1024 and M = 16384.
    - Columns 1537/257 at M = 16384, element by element: 128 (1 vector), 74 (2), 48.6 (4), 50.5 (8);
      with two rows 99.6, 62.0, 45.9, 45.2. Neighbouring elements instead: 76.9 (2), 50.4 (4).

    Parameters
    ----------
    func : tirx.PrimFunc
        A declared function with ``row_tile=1``. Its alignment and stride unit decide how wide
        accesses are; the config's vector must divide its columns if it is more than 1.
    config : CudaConfig
        The choices.

    Returns
    -------
    tirx.PrimFunc
        Loops over threads for Q and for K, which `qknorm_tvm.lower.cuda.join_operands` makes one
        kernel.

    Raises
    ------
    ValueError
        The function lacks a block that the declaration has.
    """
    sch = Schedule(IRModule({"main": func}))
    sch.work_on("main")
    schedule_body(sch, config)
    return sch.mod["main"]


def schedule_body(sch: Schedule, config: CudaConfig) -> None:
    """Apply the schedule's primitives, all of which a trace records.

    `qknorm_tvm.lower.cuda.join_operands` completes the result, of a trace applied again too.
    """
    func = sch.mod["main"]
    aligned = {
        param.name: aligned_elements(param) for param in func.params if hasattr(param, "shape")
    }

    # 1. One statement an element: inline the intermediates, in the order of the contract.
    tiles = []
    for tag in _OPERANDS:
        for name in ("x32", "scaled", "weighted"):
            sch.compute_inline(sch.get_sblock(f"{name}_{tag}"))
        # 2. Split rows into tiles, and columns into what one thread handles.
        tiles.append(_split(sch, sch.get_sblock(f"{tag}_out"), config))

    # 3. One loop over tiles of rows for both operands.
    sch.merge(*tiles)

    for tag in _OPERANDS:
        # 4. Stage x, gamma, rs and the outputs in registers.
        out = sch.get_sblock(f"{tag}_out")
        thread, *inner = sch.get_loops(out)[1:-1]
        part = inner[0] if config.columns > 1 else thread
        store = sch.cache_write(out, 0, "local")
        sch.reverse_compute_at(store, part)
        reads = [region.source.name for region in sch.get(out).reads]
        for name in (f"gamma_{tag}", tag):
            load = sch.cache_read(out, reads.index(name), "local")
            sch.compute_at(load, part)
            _vectorise(sch, load, min(config.vector, aligned[name]), config.vector)
        lanes = min(config.vector, aligned[f"{tag}_out"])
        _vectorise(sch, store, lanes, config.vector)
        rs = sch.get_sblock(f"rs_{tag}")
        sch.compute_at(rs, thread)
        sch.set_scope(rs, 0, "local")
        for block in (rs, out):
            for loop in sch.get_loops(block)[2:]:
                sch.unroll(loop)

        # 5. Say what the loop over threads is to become.
        for field, value in config.to_dict().items():
            sch.annotate(thread, NOTE + field, value)


def _split(sch: Schedule, out: SBlockRV, config: CudaConfig) -> LoopRV:
    """Split the loops of one operand to (tile, thread, [part,] row in tile, lane)."""
    row, column = sch.get_loops(out)
    tile, row_in_tile = sch.split(row, [None, config.rows])
    if config.columns == 1:
        thread, lane = sch.split(column, [None, config.vector])
        sch.reorder(tile, thread, row_in_tile, lane)
        return tile
    factors = [None, config.columns, WARP, config.vector]
    warp, part, in_warp, lane = sch.split(column, factors)
    sch.reorder(tile, warp, in_warp, part, row_in_tile, lane)
    sch.fuse(warp, in_warp)
    return tile


def _vectorise(sch: Schedule, copy: SBlockRV, lanes: int, vector: int) -> None:
    """Make a copy of `vector` elements one of accesses of `lanes` elements."""
    *outer, lane = sch.get_loops(copy)[2:] if vector > 1 else (*sch.get_loops(copy)[2:], None)
    for loop in outer:
        sch.unroll(loop)
    if lane is None:
        return
    if lanes < vector:
        part, lane = sch.split(lane, [None, lanes])
        sch.unroll(part)
    if lanes > 1:
        sch.vectorize(lane)
    else:
        sch.unroll(lane)
