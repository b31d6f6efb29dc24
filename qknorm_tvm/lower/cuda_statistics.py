"""Lowering of the operations that add up rows to one CUDA kernel.

`schedules.cuda_statistics` leaves one statement an element, block by block. `join_rows` gives them
to the threads of one kernel:

1. *Load*: every thread loads its vectors of all of its rows, and gamma, before anything else.
2. *Add*: it adds its squares, a warp its threads' sums, by shuffles. They are a butterfly: addition
   commutes, so that every lane has the bits of the declared sum of halves.
3. *Share*: each warp leaves its chunks' sums in shared memory, and all wait for one another once.
4. *Finish*: the slots' sums, by shuffles again; the mean; and the outputs, of the vectors that a
   thread still holds.

Where a row's columns are open, or more than registers hold, the warps go through its chunks in
rounds, slot by slot, and read them again for the outputs unless they hold all of them at once.

Where nothing is known of alignment, elements are read and written one by one: by each thread every
32nd of a chunk, so that a warp's accesses are to neighbours, and for the sum a warp hands on in
shared memory to each thread the 8 neighbouring columns that the order of summation gives it.

Lanes without columns, and chunks that a row does not have, hold zeros as in the declaration; sums
that would only add such zeros are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import TensorLoad
from tvm.s_tir import SBlock, SBlockRealize

from ..declare.statistics import CHUNK, SLOTS, VECTOR, WARP, cuda_blocks
from . import cuda as lowering_cuda
from .cuda import aligned_elements, bind_axis, config_of, int64
from .cuda_operands import ROUND_WARPS, Operand, deal_out, rounds, warps_of_k
from .cuda_sums import hand_on, slot_sum, warp_sum
from .substitution import substitute

# ---- the declaration's statements --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Use:
    """What stands for a buffer of the declaration in a thread: registers, and where in them."""

    old: tirx.Var
    new: tirx.Buffer
    indices: Sequence[tirx.Expr]


def blocks_of(func: tirx.PrimFunc) -> dict[str, SBlock]:
    """Return a function's blocks by name."""
    found: list[SBlock] = []
    tvm_ffi.structural_walk(func.body, (SBlock, found.append))
    return {str(block.name_hint): block for block in found}


def _statement(block: SBlock, values: Sequence[Any], uses: Sequence[_Use]) -> tirx.BufferStore:
    """Return a block's statement for one element.

    Conditions on columns that a row does not have go: the element has one.
    """
    simplify = tvm.sym.Analyzer().simplify

    def use_of(buffer: tirx.Var) -> _Use | None:
        return next((use for use in uses if buffer.same_as(use.old)), None)

    def load(node: TensorLoad) -> tirx.Expr:
        use = use_of(node.source)
        return tirx.BufferLoad(use.new, list(use.indices)) if use else node

    def store(node: tirx.BufferStore) -> tirx.Stmt:
        use = use_of(node.buffer)
        return tirx.BufferStore(use.new, node.value, list(use.indices)) if use else node

    def call(node: tvm.ir.Call) -> tirx.Expr:
        name = getattr(node.op, "name", "")
        if name == "tirx.if_then_else":
            condition = simplify(node.args[0])
            never = isinstance(condition, tirx.IntImm) and condition.value == 0
            return node.args[2] if never else node.args[1]
        if name == "tirx.fma":  # fused whatever the compiler's options
            return tirx.call_extern("float32", "__fmaf_rn", *node.args)
        return node

    variables = [one.var for one in block.iter_vars]
    body = substitute(block.body, list(zip(variables, values, strict=True)))
    return tvm_ffi.structural_map(
        body, ((TensorLoad, load), (tirx.BufferStore, store), (tvm.ir.Call, call))
    )


# ---- what a thread has -------------------------------------------------------------------------


def _unrolled(extents: Sequence[int], body: Callable[..., tirx.Stmt]) -> tirx.Stmt:
    """Return unrolled loops around what `body` makes of their variables."""
    names = [tirx.Var(name, "int64") for name in ("i", "j", "e")[: len(extents)]]
    stmt = body(*names)
    for var, extent in reversed(list(zip(names, extents, strict=True))):
        stmt = tirx.For(var, int64(0), int64(extent), tirx.ForKind.UNROLLED, stmt)
    return stmt


def _serial(var: tirx.Var, extent: tirx.Expr, body: tirx.Stmt) -> tirx.Stmt:
    return tirx.For(var, int64(0), extent, tirx.ForKind.SERIAL, body)


def _if(conditions: Sequence[tirx.Expr], stmt: tirx.Stmt) -> tirx.Stmt:
    """Guard a statement; a condition that always holds is none."""
    simplify = tvm.sym.Analyzer().simplify
    kept = [one for one in map(simplify, conditions) if not isinstance(one, tirx.IntImm)]
    return tirx.IfThenElse(tirx.all(*kept), stmt, None) if kept else stmt


class _Thread:
    """The statements of a thread.

    Parameters
    ----------
    func : tirx.PrimFunc
        With the intermediates inlined.
    config : dict
        The fields of the config.
    """

    def __init__(self, func: tirx.PrimFunc, config: dict[str, Any]):
        self.params = {str(one.name): one for one in func.params}
        self.blocks = blocks_of(func)
        self.normalises = "q_out" in self.blocks
        self.rows = int(config["rows"])
        self.streaming = bool(config["streaming_stores"])
        self.operands = deal_out(self.params, int(config["columns"]))
        self.parts = self.operands[0].parts
        in_rounds = self.operands[0].in_rounds
        self.threads = WARP * (
            ROUND_WARPS if in_rounds else sum(one.warps for one in self.operands)
        )
        self.thread, self.tile = tirx.Var("thread", "int64"), tirx.Var("tile", "int64")
        self.total_rows = self.params["q"].shape[0]
        self._check()
        x = self.params["q"]
        held = [self.rows, self.parts]
        # K's threads are others than Q's: they share the names of registers.
        self.x = self._buffer("x_local", [*held, VECTOR], str(x.dtype))
        self.sums = self._buffer("sums_local", held)
        self.slots = self._buffer("slots_local", held)
        self.row_sums = self._buffer("total_local", [self.rows])
        self.room = sum(one.room for one in self.operands)
        self.shared = self._buffer("sums_shared", [self.rows * self.room], scope="shared")
        self.buffers = [self.x, self.sums, self.slots, self.row_sums, self.shared]
        if not all(map(self._aligned, self.operands)):
            self.vector = self._buffer("vector_local", [VECTOR], str(x.dtype))
            self.buffers.append(self.vector)
        if self.normalises:
            out = str(self.params["q_out"].dtype)
            self.gamma = self._buffer("gamma_local", [self.parts, VECTOR])
            self.var = self._buffer("var_local", [self.rows])
            self.rs = self._buffer("rs_local", [self.rows])
            self.out = self._buffer("out_local", [*held, VECTOR], out)
            self.buffers += [self.gamma, self.var, self.rs, self.out]

    def _check(self) -> None:
        tags = ("q", "k")
        wanted = [name for tag in tags for name in cuda_blocks(tag)]
        if self.normalises:
            for tag in tags:
                wanted += [f"mean_{tag}", f"rs_{tag}", f"{tag}_out"]
        else:
            wanted.append("mean")
        if sorted(wanted) != sorted(set(self.blocks) - {"root"}):
            raise ValueError(f"expected blocks {sorted(wanted)}, got {sorted(self.blocks)}")

    @staticmethod
    def _buffer(
        name: str, shape: Sequence[int], dtype: str = "float32", scope: str = "local"
    ) -> Any:
        extents = [int64(one) for one in shape]
        return tirx.decl_buffer(extents, dtype, name, scope=scope, data_alignment=16)

    # Where things are. `part` is which of its vectors a thread handles, `first` the chunk of the
    # operand's first warp.

    def _place(self, one: Operand) -> tirx.Expr:
        return self.thread - one.first_thread

    def _warp(self, one: Operand) -> tirx.Expr:
        return tirx.floordiv(self._place(one), int64(WARP))

    def _chunk(self, one: Operand, part: tirx.Expr, first: tirx.Expr) -> tirx.Expr:
        return first + part * one.warps + self._warp(one)

    def _vector_column(self, one: Operand, part: tirx.Expr, first: tirx.Expr) -> tirx.Expr:
        """Return the first of the columns whose squares a thread adds."""
        return ((first + part * one.warps) * WARP + self._place(one)) * VECTOR

    def _column(self, one: Operand, part: tirx.Expr, first: tirx.Expr) -> tirx.Expr:
        """Return the first of the columns that a thread holds, `_step` apart."""
        if self._aligned(one):
            return self._vector_column(one, part, first)
        return self._chunk(one, part, first) * CHUNK + self._lane()

    def _step(self, one: Operand) -> int:
        return 1 if self._aligned(one) else WARP

    def _lane(self) -> tirx.Expr:
        return tirx.floormod(self.thread, int64(WARP))

    def _row(self, row: tirx.Expr) -> tirx.Expr:
        return self.tile * self.rows + row

    def _row_is_there(self, row: tirx.Expr) -> list[tirx.Expr]:
        return [] if self.rows == 1 else [self._row(row) < self.total_rows]

    def _column_is_there(self, one: Operand, column: tirx.Expr) -> list[tirx.Expr]:
        whole = not one.in_rounds and int(one.cols) == one.step * CHUNK
        return [] if whole else [column < one.cols]

    def _held(self, body: Callable[..., tirx.Stmt]) -> tirx.Stmt:
        """Do something with each vector that the thread holds."""
        return _unrolled([self.rows, self.parts], body)

    def _copy(
        self, one: Operand, source: tirx.Buffer, leading: Sequence[Any], to: tirx.Buffer,
        place: Sequence[Any], column: tirx.Expr, conditions: Sequence[tirx.Expr],
    ) -> tirx.Stmt:  # fmt: skip
        """Copy a vector to or from registers, in accesses as wide as its alignment allows.

        `source` is in global memory with `leading` indices; it is written where `to` is an output's
        registers.
        """
        aligned, step = self._aligned(one), self._step(one)
        writes = self.normalises and to.same_as(self.out)

        def copy(offset: tirx.Expr) -> tirx.Stmt:
            inner, outer = [*place, offset], [*leading, column + offset * step]
            if writes:
                return tirx.BufferStore(source, tirx.BufferLoad(to, inner), outer)
            return tirx.BufferStore(to, tirx.BufferLoad(source, outer), inner)

        def element(e: tirx.Expr) -> tirx.Stmt:
            there = self._column_is_there(one, column + e * step)
            if not aligned:
                return _if([*conditions, *there], copy(e))
            if not to.same_as(self.x):
                return _if(there, copy(e))
            # Part of a vector, all of which is added.
            zero = tirx.Cast(str(to.dtype), tirx.FloatImm("float32", 0.0))
            none = tirx.BufferStore(to, zero, [*place, e])
            return tirx.IfThenElse(tirx.all(*there), copy(e), none)

        if not aligned:
            return _unrolled([VECTOR], element)
        lane, lanes = tirx.Var("lane", "int64"), min(VECTOR, aligned_elements(source))

        def access(first: tirx.Expr) -> tirx.Stmt:
            return tirx.For(
                lane, int64(0), int64(lanes), tirx.ForKind.VECTORIZED, copy(first * lanes + lane)
            )

        stmt = _unrolled([VECTOR // lanes], access) if lanes < VECTOR else access(int64(0))
        if writes:
            stmt = lowering_cuda.vector_stores(stmt, self.streaming)
        if not isinstance(one.cols, tirx.IntImm):
            rest = _unrolled([VECTOR], element)
            stmt = tirx.IfThenElse(column + VECTOR <= one.cols, stmt, rest)
        return _if([*conditions, *self._column_is_there(one, column)], stmt)

    def _aligned(self, one: Operand) -> bool:
        """Whether vectors are accessed as such: all of them, or all but the last of a row."""
        whole = not isinstance(one.cols, tirx.IntImm) or int(one.cols) % VECTOR == 0
        return aligned_elements(one.x) > 1 and whole

    # What is done.

    def _load_x(self, one: Operand, first: tirx.Expr, slot: tirx.Expr | None = None) -> tirx.Stmt:
        def load(i: tirx.Expr, j: tirx.Expr) -> tirx.Stmt:
            there = self._row_is_there(i)
            if slot is not None:
                there = [*there, self._chunk(one, j, slot) < SLOTS]
            column = self._column(one, j, first)
            return self._copy(one, one.x, [self._row(i)], self.x, [i, j], column, there)

        return self._held(load)

    def _load_gamma(self, one: Operand, first: tirx.Expr) -> tirx.Stmt:
        gamma = self.params[f"gamma_{one.tag}"]
        return _unrolled(
            [self.parts],
            lambda j: self._copy(
                one, gamma, [], self.gamma, [j], self._column(one, j, first), []
            ),
        )  # fmt: skip

    def load(self, one: Operand) -> tirx.Stmt:
        """Read what the thread holds; in rounds, gamma alone, where it holds a row's."""
        stmts = [] if one.in_rounds else [self._load_x(one, int64(0))]
        if self.normalises:
            gamma = self._load_gamma(one, int64(0))
            stmts.append(_if([one.chunks <= one.step] if one.in_rounds else [], gamma))
        if not stmts:
            return tirx.Evaluate(0)
        return tirx.SeqStmt(stmts) if len(stmts) > 1 else stmts[0]

    def _add_squares(
        self, one: Operand, first: tirx.Expr, slot: tirx.Expr | None = None
    ) -> tirx.Stmt:
        block = self.blocks[f"vector_{one.tag}"]
        partial = block.writes[0].source
        aligned = self._aligned(one)

        def vector(i: tirx.Expr, j: tirx.Expr) -> tirx.Stmt:
            column = self._vector_column(one, j, first)
            chunk, lane = self._chunk(one, j, first), self._lane()

            def square(e: tirx.Expr) -> tirx.Stmt:
                x = _Use(one.x, self.x, [i, j, e]) if aligned else _Use(one.x, self.vector, [e])
                uses = [x, _Use(partial, self.sums, [i, j])]
                stmt = _statement(self._updated(block), [self._row(i), chunk, lane, e], uses)
                return _if([] if aligned else self._column_is_there(one, column + e), stmt)

            zero = tirx.BufferStore(self.sums, tirx.FloatImm("float32", 0.0), [i, j])
            there = self._column_is_there(one, column) if aligned else []
            if slot is not None:
                there = [*there, chunk - first + slot < SLOTS]
            add = _if([*there, *self._row_is_there(i)], _unrolled([VECTOR], square))
            return tirx.SeqStmt([zero, *([] if aligned else [self._hand_on(i, j)]), add])

        return self._held(vector)

    def _hand_on(self, i: tirx.Expr, j: tirx.Expr) -> tirx.Stmt:
        """Give each thread of a warp its neighbouring columns of the chunk that the warp holds."""
        held = tirx.BufferLoad(self.x, [i, j, int64(0)])
        vector = tirx.BufferLoad(self.vector, [int64(0)])
        return hand_on(held, vector, str(self.x.dtype), self.threads * VECTOR)

    @staticmethod
    def _updated(block: SBlock) -> SBlock:
        if not isinstance(block.body, tirx.BufferStore):
            raise ValueError(f"expected one statement in block {block.name_hint}")
        return block

    def _add_warps(self, *, to_slots: bool) -> tirx.Stmt:
        def add(i: tirx.Expr, j: tirx.Expr) -> tirx.Stmt:
            value = warp_sum(tirx.BufferLoad(self.sums, [i, j]))
            if to_slots:
                value = tirx.BufferLoad(self.slots, [i, j]) + value
            return tirx.BufferStore(self.slots, value, [i, j])

        return self._held(add)

    def _share(self, one: Operand, first: tirx.Expr) -> tirx.Stmt:
        """Leave a warp's sums in shared memory."""

        def share(i: tirx.Expr, j: tirx.Expr) -> tirx.Stmt:
            chunk = self._chunk(one, j, first)
            place = i * self.room + one.first_sum + chunk
            store = tirx.BufferStore(self.shared, tirx.BufferLoad(self.slots, [i, j]), [place])
            return _if([chunk < SLOTS] if one.in_rounds else [], store)

        return tirx.IfThenElse(tirx.EQ(self._lane(), int64(0)), self._held(share), None)

    def add(self, one: Operand) -> tirx.Stmt:
        """Add up the squares, and leave the sums of chunks, or of slots, in shared memory."""
        if not one.in_rounds:
            sums = [self._add_squares(one, int64(0)), self._add_warps(to_slots=False)]
            return tirx.SeqStmt([*sums, self._share(one, int64(0))])
        group, turn = tirx.Var("group", "int64"), tirx.Var("turn", "int64")
        slot, none = group * one.step, int64(0)
        first = turn * SLOTS + slot
        steps = [self._load_x(one, first, slot), self._add_squares(one, first, slot)]
        chunks = tirx.SeqStmt([*steps, self._add_warps(to_slots=True)])
        # All threads of a warp, or none: its sums are shuffles.
        chunks = tirx.IfThenElse(self._chunk(one, none, first) * CHUNK < one.cols, chunks, None)
        turns = tirx.floordiv(one.cols + (CHUNK * SLOTS - 1), int64(CHUNK * SLOTS))
        zero = tirx.FloatImm("float32", 0.0)
        body = tirx.SeqStmt(
            [
                self._held(lambda i, j: tirx.BufferStore(self.slots, zero, [i, j])),
                _serial(turn, turns, chunks),
                self._share(one, slot),
            ]
        )
        return _serial(group, rounds(tirx.min(int64(SLOTS), one.chunks), one.step), body)

    def _total(self, one: Operand, row: int) -> tirx.Stmt:
        first = row * self.room + one.first_sum
        value = slot_sum(self.shared, first, one)
        return tirx.BufferStore(self.row_sums, value, [int64(row)])

    def _mean(self, one: Operand, row: int) -> tirx.Stmt:
        """Return the statement that divides, of either operation."""
        at = int64(row)
        total_use = _Use(self._total_buffer(one), self.row_sums, [at])
        if self.normalises:
            block = self.blocks[f"mean_{one.tag}"]
            uses = [total_use, _Use(block.writes[0].source, self.var, [at])]
            return _statement(self._updated(block), [self._row(at)], uses)
        block = self.blocks["mean"]
        values = [self._row(at), int64(0 if one.tag == "q" else 1)]
        return _statement(self._updated(block), values, [total_use])

    def _total_buffer(self, one: Operand) -> tirx.Var:
        return self.blocks[cuda_blocks(one.tag)[-1]].writes[0].source

    def write_means(self, one: Operand) -> tirx.Stmt:
        """Write the statistics: row by row, each by another warp."""
        stmts = []
        for row in range(self.rows):
            there = self._row_is_there(int64(row))
            write = _if([tirx.EQ(self._lane(), int64(0)), *there], self._mean(one, row))
            both = tirx.SeqStmt([self._total(one, row), write])
            warp = 0 if one.in_rounds else row % one.warps
            stmts.append(_if([tirx.EQ(self._warp(one), int64(warp))], both))
        return tirx.SeqStmt(stmts) if len(stmts) > 1 else stmts[0]

    def normalise(self, one: Operand) -> tirx.Stmt:
        """Write the outputs."""
        stmts: list[tirx.Stmt] = []
        rs_block, out_block = self.blocks[f"rs_{one.tag}"], self.blocks[f"{one.tag}_out"]
        var = self.blocks[f"mean_{one.tag}"].writes[0].source
        rs, out = rs_block.writes[0].source, self.params[f"{one.tag}_out"]
        gamma = self.params[f"gamma_{one.tag}"]
        for row in range(self.rows):
            uses = [_Use(var, self.var, [int64(row)]), _Use(rs, self.rs, [int64(row)])]
            root = _statement(self._updated(rs_block), [self._row(int64(row))], uses)
            stmts += [self._total(one, row), self._mean(one, row), root]

        def write(first: tirx.Expr) -> list[tirx.Stmt]:
            def compute(i: tirx.Expr, j: tirx.Expr, e: tirx.Expr) -> tirx.Stmt:
                uses = [
                    _Use(one.x, self.x, [i, j, e]),
                    _Use(rs, self.rs, [i]),
                    _Use(gamma, self.gamma, [j, e]),
                    _Use(out, self.out, [i, j, e]),
                ]
                values = [self._row(i), self._column(one, j, first) + e * self._step(one)]
                return _statement(self._updated(out_block), values, uses)

            def store(i: tirx.Expr, j: tirx.Expr) -> tirx.Stmt:
                column, there = self._column(one, j, first), self._row_is_there(i)
                return self._copy(one, out, [self._row(i)], self.out, [i, j], column, there)

            return [_unrolled([self.rows, self.parts, VECTOR], compute), self._held(store)]

        if not one.in_rounds:
            return tirx.SeqStmt([*stmts, *write(int64(0))])
        turn = tirx.Var("turn", "int64")
        first = turn * one.step
        again = tirx.SeqStmt([self._load_x(one, first), self._load_gamma(one, first)])
        # A row that the warps hold at once is still there.
        again = tirx.IfThenElse(one.chunks > one.step, again, None)
        body = tirx.SeqStmt([again, *write(first)])
        return tirx.SeqStmt([*stmts, _serial(turn, rounds(one.chunks, one.step), body)])

    def deal_out_warps(self) -> list[tirx.Stmt]:
        """Say how many warps each operand has, where that depends on the columns of a call."""
        q, k = self.operands
        if not q.in_rounds:
            return []
        return [tirx.Bind(k.warps, warps_of_k(q, k))]

    def for_both(self, what: Callable[[Operand], tirx.Stmt]) -> tirx.Stmt:
        """Do something in the threads of Q and in those of K."""
        q, k = self.operands
        return tirx.IfThenElse(self.thread < k.first_thread, what(q), what(k))


def join_rows(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Make one kernel of what `schedules.cuda_statistics.schedule` leaves.

    Parameters
    ----------
    func : tirx.PrimFunc
        The declared blocks, intermediates inlined; a loop over rows carries the config.

    Returns
    -------
    tirx.PrimFunc
        The function with its loops bound to the grid.

    Raises
    ------
    ValueError
        The function does not have the declaration's blocks.
    """
    noted: list[tirx.For] = []
    tvm_ffi.structural_walk(
        func.body, (tirx.For, lambda loop: noted.append(loop) if loop.annotations else None)
    )
    config = config_of(noted[0])
    it = _Thread(func, config)
    launch = str(config["dependent_launch"])
    dependency = lowering_cuda.grid_dependency
    barrier = tirx.Evaluate(tirx.call_intrin("", "tirx.tvm_storage_sync", "shared"))
    body: list[tirx.Stmt] = [tirx.AllocBuffer(buffer) for buffer in it.buffers]
    body += it.deal_out_warps()
    if launch == "first":
        body.append(dependency("launch_dependents"))
    if launch != "off":
        body.append(dependency("wait"))
    # 1. Load.
    body.append(it.for_both(it.load))
    if launch == "after_loads":
        body.append(dependency("launch_dependents"))
    # 2. and 3. Add, and share.
    body += [it.for_both(it.add), barrier]
    # 4. Finish.
    body.append(it.for_both(it.normalise if it.normalises else it.write_means))
    block = bind_axis(it.thread, int64(it.threads), "threadIdx.x", tirx.SeqStmt(body))
    tiles = tirx.floordiv(it.total_rows + (it.rows - 1), int64(it.rows))
    grid = bind_axis(it.tile, tvm.sym.Analyzer().simplify(tiles), "blockIdx.x", block)
    func = func.with_body(SBlockRealize([], True, SBlock([], [], [], "root", grid)))
    return func.with_attr(lowering_cuda.DEPENDENT_ATTR, launch != "off")
