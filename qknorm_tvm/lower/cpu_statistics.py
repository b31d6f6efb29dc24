"""Lowering of a row's sum on CPUs: what `schedules.cpu_statistics` marks by annotations.

In: loops annotated with `BLOCKS`, `STEP` and `PARITY`. Out: loops without tests, over columns that
are read as whole words. The order of the additions stays the declaration's.
"""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.ir import Call, TensorLoad
from tvm_ffi import structural_map

from ..declare.statistics import BLOCK, LANES
from ..schedules.cpu_statistics import BLOCKS, PARITY, STEP
from .cpu_rounding import as_words, is_bfloat16, widened
from .substitution import substitute


@tirx.transform.prim_func_pass(opt_level=0, name="qknorm.SplitBlocks")
def split_blocks(func: tirx.PrimFunc, _mod: tvm.IRModule, _ctx: object) -> tirx.PrimFunc:
    """Take the columns beyond the last whole block of a row's sum apart; a TVM pass.

    Run before vectorising. The loop over whole blocks then has no test; in the last block whole
    steps have none, and the other columns are added by a loop of their own.
    """
    # The annotation names the operand, as the table of operations does.
    columns = {
        str(param.name): param.shape[1]
        for param in func.params
        if hasattr(param, "shape") and len(param.shape) == 2
    }
    simplify = tvm.sym.Analyzer().simplify
    zero = tirx.const(0, "int64")

    def without_test(call: Call) -> tirx.Expr:
        is_test = str(getattr(call.op, "name", "")).endswith("if_then_else")
        return call.args[1] if is_test else call

    def last_block(body: tirx.Stmt, block: tirx.Var, cols: tirx.Expr) -> tirx.Stmt:
        """Return the body for the last block: its loop over steps cut short, columns after it."""
        whole = simplify(tirx.floordiv(tirx.floormod(cols, BLOCK), LANES))
        rest = simplify(tirx.floormod(cols, LANES))

        def cut(loop: tirx.For) -> tirx.Stmt:
            if STEP not in loop.annotations:
                return loop
            main = tirx.For(loop.loop_var, loop.min, whole, loop.kind, loop.body)
            if isinstance(rest, tirx.IntImm) and rest.value == 0:
                return main
            column = tirx.Var("column", "int64")
            body, loops = loop.body, []
            while isinstance(body, tirx.For):
                loops.append(body)
                body = body.body
            values = [(loop.loop_var, whole)]
            if len(loops) == 2:  # even and odd columns, pairs
                values.append((loops[0].loop_var, tirx.floormod(column, 2)))
                values.append((loops[1].loop_var, tirx.floordiv(column, 2)))
            else:
                values.append((loops[0].loop_var, column))
            body = substitute(body, values)
            return tirx.SeqStmt([main, tirx.For(column, zero, rest, tirx.ForKind.SERIAL, body)])

        def renamed(loop: tirx.For) -> tirx.For:
            var = tirx.Var(loop.loop_var.name, "int64")
            body = substitute(loop.body, [(loop.loop_var, var)])
            return tirx.For(
                var, loop.min, loop.extent, loop.kind, body, annotations=loop.annotations
            )

        index = simplify(tirx.floordiv(cols, BLOCK))
        body = structural_map(body, (tirx.For, cut))
        body = substitute(body, [(block, index)])
        # A loop variable belongs to one loop.
        return structural_map(body, (tirx.For, renamed))

    def split(loop: tirx.For) -> tirx.Stmt:
        if BLOCKS not in loop.annotations:
            return loop
        cols = columns[str(loop.annotations[BLOCKS])]
        body = structural_map(loop.body, (Call, without_test))
        whole = tirx.For(loop.loop_var, zero, tirx.floordiv(cols, BLOCK), loop.kind, body)
        if isinstance(cols, tirx.IntImm) and cols.value % BLOCK == 0:
            return whole
        last = last_block(body, loop.loop_var, cols)
        if isinstance(cols, tirx.IntImm) and cols.value < BLOCK:
            return last
        return tirx.SeqStmt([whole, last])

    return func.with_body(structural_map(func.body, (tirx.For, split)))


@tirx.transform.prim_func_pass(opt_level=0, name="qknorm.ReadWords")
def read_words(func: tirx.PrimFunc, _mod: tvm.IRModule, _ctx: object) -> tirx.PrimFunc:
    """Expand the loops over even and odd columns, and read their bfloat16 as words; a TVM pass.

    Run after vectorising: every second element of a vector then is a ramp of stride 2.
    """
    even = tirx.const(0, "int64")

    def columns_of(loop: tirx.For, parity: int) -> tirx.Stmt:
        def widen(cast: tirx.Cast) -> tirx.Expr:
            load = cast.value
            if not (isinstance(load, TensorLoad) and is_bfloat16(load)):
                return cast
            (index,) = load.indices
            if not isinstance(index, tirx.Ramp):
                return cast
            if not (isinstance(index.stride, tirx.IntImm) and index.stride.value == 2):
                raise ValueError(f"expected a vector of every second element, got {index}")
            first = tirx.Ramp(substitute(index.base, [(loop.loop_var, even)]), 1, 2 * index.lanes)
            words = as_words(tirx.BufferLoad(load.source, [first]), int(index.lanes))
            return widened(words, parity)

        body = structural_map(loop.body, (tirx.Cast, widen))
        return substitute(body, [(loop.loop_var, tirx.const(parity, "int64"))])

    def expand(loop: tirx.For) -> tirx.Stmt:
        if PARITY not in loop.annotations:
            return loop
        return tirx.SeqStmt([columns_of(loop, 0), columns_of(loop, 1)])

    return func.with_body(structural_map(func.body, (tirx.For, expand)))
