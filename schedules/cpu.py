"""The CPU schedule: one parallel loop over row tiles, vectors of columns inside.

Strategy. Q and K are one loop over tiles of ``row_tile`` rows, cut into tasks by the module's entry
point (one task when the call is small). Inside a tile, first Q and then K: panels of ``vector``
columns; in a panel, row by row, one vector statement: widen, times rs, times gamma, round, store.
rs is computed once a row, at the head of its tile. Nothing is stored between: every intermediate
lives in a register.

Where the CPU converts to bfloat16 (AVX512-BF16, `qknorm_tvm.lower.cpu_convert`), columns stay in
order and gamma is an operand in memory: nothing to share. Elsewhere the use of gamma costs a
shuffle into even and odd elements and a test for NaNs, which rows share in one of two ways. Without
AVX-512, where its size is known and bfloat16 is stored, each task packs the gammas once, into at
most 64 KiB of its stack (`qknorm_tvm.lower.cpu_packing`), and tiles are of one row: rows follow
each other as in memory. Otherwise the panel comes before the row, so that one shuffle serves all
rows of a tile.

Tiles of several rows depend on addresses. Rows of 2048, 4096, 6144 or 8192 columns of 16 bits lie
in the same cache sets, so that eight rows and their outputs are sixteen lines of one set, and a
load waits for a store to the same offset of another page. They remain where statistics are computed
before, as four short rows hide the latency of their last additions; where gammas are not packed;
and, four rows, with the CPU's conversion, for loads of gamma. Stores past the caches go row by row,
but for gammas that are shuffled for a tile.

Map from loops: ``tile`` -> tasks of the thread pool, ``panel`` -> serial, ``row`` -> unrolled,
``lane`` -> SIMD lanes. Columns beyond the last whole vector are a partition of ``panel`` of their
own, so the vector loop carries no test.

Operations that rotate go by heads and, in a head, by panels of pairs and then of the other columns:
``tile`` -> ``head`` -> ``panel`` -> ``row`` -> ``lane``. What rows have one of comes first in a
tile: rs, and where the row goes in the caches. V is a third part of the tile. With one row a
tile LLVM widens a row's cosines once for all heads; panels outside heads gain nothing.

What was tried on an AMD EPYC (Zen 3, AVX2, 32 KiB of L1, 512 KiB of L2, 32 MiB of L3; one thread,
TVM 0.27, x86-64-v3, bfloat16; times over memcpy of the same bytes, median and worst of 16 offsets
between inputs and outputs in a page; beside it the best of 30 hand-written AVX2 kernels):

* Packed, one row: 1536/256 at M = 64, 256, 1024: 2.22, 1.71, 1.64, by hand 2.15, 1.70, 1.60;
  tiles of four rows with a shuffle each: 3.39, 2.43, 2.58. At M = 16 2.72 and 2.41: the call itself
  is 0.3 us.
* Stores past the caches by tiles of four rows: 4096/4096 at M = 1024 0.90 in the median, 12.7 at
  the worst offset; one row 0.75 and 0.89.
* Packed, but columns in chunks of 64 to 1,024 with several rows a chunk: as fast in L2, up to
  twice the time beyond it.
* ``"saturate"`` (8 instructions for 16 elements) instead of ``"shift"`` (11): 4 to 7 %. In order by
  unpacking, without even and odd elements: 1.9 at M = 64 where even and odd take 1.57.
* When to stream, 1536/256: stores past the caches take 1.26 of a copy where others take 1.25 at 5.5
  MB of outputs, 1.20 and 1.22 at 7.3, 0.89 and 1.01 at 9.2, 0.76 and 1.03 at 11: the threshold is
  8 MiB, a quarter of L3.
* Rotation and caches (1536/256, 64 of 128 rotated): 1.6 to 1.75 of apply and a copy of V up to M =
  1024, where tiles of four rows took 2.0 to 2.6; 195 instructions a head, apply's 140: in the
  caches the roundings and products of the rotation are the difference, and none can be left out.

What was tried on an Intel Xeon (Emerald Rapids, 2 MiB of L2, 300 MiB of L3; one thread, TVM 0.27,
bfloat16; times over memcpy of the same bytes, median and worst of 16 offsets, in turns with kernels
in AVX-512 intrinsics, rs known before the call). Predicted for the conversion by the instructions
for 32 elements, 11 instead of 19: 0.6 of the time in L1; it is 0.8.

* 1536/256 at M = 16, 64, 256: converted, four rows 1.46, 1.36, 1.28; one row 1.52, 1.43, 1.33;
  ``"mask"``, eight rows 1.79, 1.70, 1.52; by hand without the conversion at best 1.52, 1.54, 1.44;
  with it, by even and odd elements, 1.59, 1.61, 1.51, and in order 1.34, 1.36, 1.31. 4096/4096 at
  M = 16 and 64: four rows 1.55 and 1.25, one row 1.89 and 1.38.
* At M = 4096, 1536/256, below the threshold for stores past the caches, the worst offset takes 1.05
  with one row, 1.5 with four, 2.5 with eight, by hand too.
* Packed gammas without the conversion (``"saturate"``, four rows): 0.97 of tiles of eight rows at
  1536/256, 1.10 at 4096/4096 and M = 16. They are left to CPUs without AVX-512.
* When to stream, 1536/256: past the caches 0.66 of a copy where others take 1.0 to 1.2 from M = 512
  (3.7 MB read and written) on. But with a reader of the outputs behind it both take 1.50 and 1.03
  at M = 512, 1.07 and 1.00 at 1024, 0.94 and 1.09 only at 59 MB of outputs (6144/1024, M = 4096):
  what is past the caches is read from memory. Hence a quarter of the last cache, as on the EPYC,
  and 16 MiB at most.
* Stores past the caches, rows in order and eight at a time, median and worst: 1536/256 at M = 16384
  0.75, 1.02 and 0.78, 1.73; 4096/4096 at M = 4096 0.72, 1.07 and 0.58, 0.75. In order all the same:
  on the EPYC tiles took up to 12.7, and this level is for its successors too.
* Rotation (64 of 128): one row 0.89 of ``"mask"`` at M = 16 and 64, 0.95 beyond; four rows 0.95.
* Statistics before, four rows: 0.94 to 1.05 of both operations alone at M = 16 to 256, 0.75 beyond.

Earlier, on another of that kind (3.0 GHz; times over those of numpy.copyto):

* bfloat16, M = 256 (in L2): TVM's widening and rounding, one row: 1.95; even and odd elements, one
  row: 1.70 to 1.75; two rows a tile 1.57, four 1.46, eight 1.38, sixteen 1.41. The port limit of 14
  vector instructions for 32 elements is 1.15.
* The ``"shift"`` rounding (four instructions) instead of ``"mask"`` (three): 1.69 against 1.53 with
  four rows, on a busy machine.
* Packing that LLVM turns into ``vpermt2w`` (three micro-operations) instead of shift and ternary
  logic: no gain from even and odd elements at all.
* Stores past the caches, M = 16384: 0.59 to 0.86 of a copy, against 1.15 to 1.23 without; at
  M = 1024 still 0.73 against 0.90, but the outputs then have left the caches that the next
  operation reads them from.
* float32 and float16: one row and one register of float32 is best (M = 64 to 16384: 1.00 to 1.04,
  and 1.00 to 1.34 with float16); four rows cost 3 to 30 %.
* x86-64-v3, eight rows, stores past the caches: 3.4, half lines of eight rows do not combine; four
  rows 1.07.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.s_tir import SBlock, Schedule

from .cpu_config import CpuConfig
from .cpu_statistics import schedule_mean

#: Head of the annotations by which a sampled schedule says which config it is.
NOTE = "qknorm."


def schedule(func: tirx.PrimFunc, config: CpuConfig, *, row_tile: int) -> tirx.PrimFunc:
    """Schedule a declared function for LLVM.

    Parameters
    ----------
    func : tirx.PrimFunc
        From `qknorm_tvm.declare.norm.declare`, declared with the same `row_tile`.
    config : CpuConfig
        Vector width and the rest.
    row_tile : int
        Rows handled together: ``config.row_tile``, or 1 in the function for the rows that are left.

    Returns
    -------
    tirx.PrimFunc
        Scheduled, for `qknorm_tvm.lower.cpu.lower`.

    Raises
    ------
    tvm.error.ScheduleError
        The function has no block of a name that the declaration gives.
    """
    sch = Schedule(func)
    schedule_body(sch, vector=config.vector, row_tile=row_tile)
    return sch.mod["main"]


def sample(
    sch: Schedule,
    choices: Mapping[str, Sequence[int]],
    decisions: Mapping[str, int] | None = None,
) -> None:
    """Schedule with fields that MetaSchedule samples, each from its choices.

    Every sampled value is annotated on the loop over tiles as ``qknorm.<field>``, also of fields
    that act in lowering or in the entry point: so a record's trace says the whole config.

    Parameters
    ----------
    sch : Schedule
        Of a specialised instance of the declared function.
    choices : mapping
        Values by field of `CpuConfig`; ``rounding`` as an index into `cpu_config.ROUNDINGS`.
    decisions : mapping, optional
        The value to take for each field; by default MetaSchedule draws them.
    """
    fields: dict[str, Any] = {
        name: sch.sample_categorical(
            list(values),
            [1 / len(values)] * len(values),
            None if decisions is None else values.index(decisions[name]),
        )
        for name, values in choices.items()
    }
    tile = schedule_body(sch, vector=fields["vector"], row_tile=fields["row_tile"])
    for name, value in fields.items():
        sch.annotate(tile, NOTE + name, value)


def schedule_body(sch: Schedule, *, vector: Any, row_tile: Any) -> Any:
    """Schedule with the given numbers, or MetaSchedule's random variables; returns the tile loop.

    No Python test of a number may stand here: a trace would freeze its outcome.
    """
    blocks = {str(block.name_hint) for block in _blocks(sch)}
    dtypes = {tag: _element_type(sch, tag) for tag in ("q", "k")}
    if "heads_q" in blocks:
        return _schedule_heads(sch, blocks, dtypes, vector=vector, row_tile=row_tile)
    if "q_out" not in blocks:
        return _schedule_statistics(sch, dtypes, row_tile=row_tile)
    tiles = []
    for tag in ("q", "k"):
        # 1. One statement an element: the intermediates inline, in the order of the contract.
        for name in ("x32", "scaled", "weighted"):
            sch.compute_inline(sch.get_sblock(f"{name}_{tag}"))
        # 2. Rows into tiles, columns into vectors.
        row, column = sch.get_loops(sch.get_sblock(f"{tag}_out"))
        tile, row_in_tile = sch.split(row, [None, row_tile])
        panel, lane = sch.split(column, [None, vector])
        sch.reorder(tile, panel, row_in_tile, lane)
        sch.unroll(row_in_tile)
        sch.vectorize(lane)
        # The last, partial panel apart: the others run without a test.
        sch.annotate(panel, "pragma_loop_partition_hint", True)
        tiles.append(tile)
    # 3. Q and K in one loop, one parallel launch.
    tile = sch.merge(*tiles)
    _schedule_tiles(sch, tile, ("rs_q", "rs_k"), blocks, dtypes)
    return tile


def _schedule_tiles(
    sch: Schedule, tile: Any, heads: Sequence[str], blocks: set[str], dtypes: Mapping[str, str]
) -> None:
    """Make the tile loop parallel; at the head of a tile compute each row's own values, `heads`."""
    for name in heads:
        head = sch.get_sblock(name)
        # A tile of one row keeps its loop: a trace must find the same loops whatever is sampled.
        sch.compute_at(head, tile, preserve_unit_loops=True)
        sch.unroll(sch.get_loops(head)[-1])
    sch.parallel(tile)
    if "mean_q" in blocks:
        # The rows are in L1 when they are normalised.
        for tag in ("q", "k"):
            mean = sch.get_sblock(f"mean_{tag}")
            sch.compute_at(mean, tile, preserve_unit_loops=True)
            schedule_mean(sch, tag, sch.get_loops(mean)[-1], pairs=dtypes[tag] == "bfloat16")


def _schedule_heads(
    sch: Schedule, blocks: set[str], dtypes: Mapping[str, str], *, vector: Any, row_tile: Any
) -> Any:
    """Schedule an operation that rotates; returns the tile loop."""
    tiles = []
    for tag in ("q", "k", "v"):
        if f"heads_{tag}" not in blocks:
            continue
        # Pairs into vectors, and the columns that are not rotated.
        row, head, unit = sch.get_loops(sch.get_sblock(f"heads_{tag}"))
        tile, row_in_tile = sch.split(row, [None, row_tile])
        panel, lane = sch.split(unit, [None, vector])
        sch.reorder(tile, head, panel, row_in_tile, lane)
        sch.unroll(row_in_tile)
        sch.vectorize(lane)
        sch.annotate(panel, "pragma_loop_partition_hint", True)
        tiles.append(tile)
    tile = sch.merge(*tiles)
    # Of the caches' blocks and slots, two divisions a row.
    places = [name for name in ("place_block", "place_offset") if name in blocks]
    _schedule_tiles(sch, tile, ("rs_q", "rs_k", *places), blocks, dtypes)
    return tile


def _schedule_statistics(sch: Schedule, dtypes: Mapping[str, str], *, row_tile: Any) -> Any:
    """Schedule the operation that only computes statistics; returns the tile loop."""
    row, column = sch.get_loops(sch.get_sblock("mean"))
    tile, row = sch.split(row, [None, row_tile], preserve_unit_iters=True)
    sch.parallel(tile)
    sch.unroll(column)
    for tag in ("q", "k"):
        schedule_mean(sch, tag, row, pairs=dtypes[tag] == "bfloat16")
    return tile


def _blocks(sch: Schedule) -> list[Any]:
    blocks: list[Any] = []
    tvm_ffi.structural_walk(sch.mod["main"].body, (SBlock, blocks.append))
    return blocks


def _element_type(sch: Schedule, name: str) -> str:
    """Return the element type of a parameter."""
    params = {str(param.name): param for param in sch.mod["main"].params}
    return str(params[name].dtype)
