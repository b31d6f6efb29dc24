"""The CPU schedule of a row's mean of squares: vectors of lanes, then halves, all in registers.

Strategy. A row is read once, from left to right, a vector of all `LANES` columns a step, each added
to partial sums that stay in registers, and these to totals after each block; then the lanes are
added in halves. The declaration fixes the order, so there is nothing to choose: no vector width, no
tile of rows. Rows are short and independent, and the processor starts on the next while the last
additions of one are under way.

bfloat16 is read as 32-bit words, whose halves are the even and the odd columns of a step; their
partial sums are kept apart (the loop annotated with `PARITY`), which is what makes neighbouring
lanes the first pairs to be added.

Map from loops: ``block`` and ``step`` -> serial, ``lane`` -> SIMD lanes. Columns beyond the last
whole step are added one by one: heads of 64 and 128 columns leave none.
"""

from __future__ import annotations

from typing import Any

from tvm.s_tir import Schedule

from qknorm_tvm.declare.statistics import LANES, halvings

#: Annotation of the loop over blocks: which operand's columns it goes through.
BLOCKS = "statistics.blocks"
#: Annotation of the loop over the steps of a block.
STEP = "statistics.step"
#: Annotation of the loop over the even and the odd columns of a step.
PARITY = "statistics.parity"


def schedule_mean(sch: Schedule, tag: str, row: Any, *, pairs: bool) -> None:
    """Compute what a row's mean needs at the loop over rows around it.

    Parameters
    ----------
    sch : Schedule
    tag : str
        ``"q"`` or ``"k"``.
    row : LoopRV
        The loop over rows.
    pairs : bool
        Whether elements are bfloat16, of which a word holds two.
    """
    # From the last block to the first: each is computed where its consumer is.
    for name in (*reversed(halvings(tag)), f"pairs_{tag}"):
        block = sch.get_sblock(name)
        sch.compute_at(block, row, preserve_unit_loops=True)
        sch.vectorize(sch.get_loops(block)[-1])
    sch.compute_inline(sch.get_sblock(f"square_x32_{tag}"))
    lanes, partial = sch.get_sblock(f"lanes_{tag}"), sch.get_sblock(f"partial_{tag}")
    if pairs:
        sch.transform_layout(lanes, ("write", 0), lambda i, lane: (i, lane % 2, lane // 2))
        sch.transform_layout(
            partial, ("write", 0), lambda i, block, lane: (i, block, lane % 2, lane // 2)
        )
    sch.compute_at(lanes, row, preserve_unit_loops=True)
    block = _vectors(sch, lanes, pairs=pairs)
    sch.compute_at(partial, block, preserve_unit_loops=True)
    step = _vectors(sch, partial, pairs=pairs)
    if pairs:
        sch.annotate(sch.get_loops(partial)[-2], PARITY, 1)
    # `lower.cpu_statistics.split_blocks` takes the last, partial block apart: the others run
    # without a test.
    sch.annotate(block, BLOCKS, tag)
    sch.annotate(step, STEP, 1)
    for reduced, loop in ((lanes, block), (partial, step)):
        init = sch.decompose_reduction(reduced, loop)
        sch.vectorize(sch.get_loops(init)[-1])


def _vectors(sch: Schedule, block: Any, *, pairs: bool) -> Any:
    """Make the loop over lanes the innermost, and vectors; returns the loop that is reduced."""
    lane, reduced = sch.get_loops(block)[-2:]
    sch.reorder(reduced, lane)
    if pairs:
        pair, parity = sch.split(lane, [LANES // 2, 2])
        sch.reorder(parity, pair)
        sch.unroll(parity)
        lane = pair
    sch.vectorize(lane)
    return reduced
