"""Lowering of a scheduled function to one CUDA kernel: what schedule primitives cannot say.

In: from `schedules.cuda`, a loop over tiles of rows, in it one loop over threads for Q and one for
K, and in each what a thread does: load, compute and store, by parts of its columns. Out: one loop
over the grid. TensorIR has no primitive that makes two loops share one range of threads, that
distributes a loop over the statements in it, or that inserts an instruction. `join_operands` does
these:

1. *Distribute*: every load of a thread comes before its first store, for all parts of its columns.
   Nothing else keeps several loads in flight: outputs may be the inputs themselves, so the compiler
   may not move a load over a store.
2. *Join*: the threads of Q and then those of K become one range, cut into blocks of the kernel.
3. *Wait*: for programmatic dependent launch, a thread waits for the previous kernel before its
   first load, and lets the next one start where the config says.

It reads the config from annotations on the loops over threads, so that a schedule found by
MetaSchedule, whose trace holds them, is lowered by the same function.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import Range, TensorLoad
from tvm.s_tir import SBlock, SBlockRealize
from tvm.script import tirx as T

from ..schedules import cuda_device
from ..schedules.cuda_config import NOTE
from .substitution import substitute

# ---- 1. distribute ---------------------------------------------------------------------------


def _compact(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Shrink the buffers in registers to what one thread needs, by TVM's own passes."""
    passes = [
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
    ]
    return tvm.transform.Sequential(passes)(tvm.IRModule({"main": func}))["main"]


def _in_stages(thread: tirx.For) -> tuple[dict[str, tirx.Stmt], list[tirx.Buffer]]:
    """Return a thread's statements, by the names of their blocks, and its registers.

    `compute_at` places each block inside the loop over the parts of a thread's columns. It cannot
    place blocks outside of that loop, at the thread: parts are not neighbours, so that registers
    would hold all columns between them too. So that loop is distributed over its blocks here.
    """
    simplify, bound = tvm.sym.Analyzer().simplify, tvm.sym.Analyzer().const_int_bound
    # A buffer of the thread or of a part, what replaces it, and the index that comes first then.
    registers: list[tuple[tirx.Var, tirx.Buffer, list[tirx.Var]]] = []
    stages: dict[str, tirx.Stmt] = {}

    def keep(buffer: tirx.Buffer, part: tirx.For | None) -> None:
        shape = [part.extent] if part else []
        shape += [T.int64(bound(extent).max_value) for extent in buffer.shape]
        kept = tirx.decl_buffer(
            shape, buffer.dtype, buffer.name, scope=buffer.scope(), data_alignment=16
        )
        registers.append((buffer, kept, [part.loop_var] if part else []))

    def place(buffer: tirx.Var, indices: Any) -> tuple[tirx.Buffer, list[Any]] | None:
        for own, kept, first in registers:
            if buffer.same_as(own):
                return kept, [*first, *map(simplify, indices)]
        return None

    def load(node: TensorLoad) -> tirx.Expr:
        placed = place(node.source, node.indices)
        return tirx.BufferLoad(*placed) if placed else node

    def store(node: tirx.BufferStore) -> tirx.Stmt:
        placed = place(node.buffer, node.indices)
        return tirx.BufferStore(placed[0], node.value, placed[1]) if placed else node

    def guarded(node: SBlockRealize) -> tirx.Stmt:
        always = isinstance(node.predicate, tirx.IntImm) and node.predicate.value == 1
        touched = [region.source for region in (*node.block.reads, *node.block.writes)]
        # Computing on registers that were not loaded harms nothing, and has no branch.
        if always or all(buffer.scope() == "local" for buffer in touched):
            return node.block.body
        return tirx.IfThenElse(node.predicate, node.block.body, None)

    def add(stmt: tirx.Stmt, part: tirx.For | None) -> None:
        names: list[str] = []
        tvm_ffi.structural_walk(stmt, (SBlock, lambda block: names.append(block.name_hint)))
        if len(names) != 1 or names[0] in stages:
            raise ValueError(f"expected each block in a statement of a thread, got {names}")
        stmt = tvm_ffi.structural_map(
            stmt, ((TensorLoad, load), (tirx.BufferStore, store), (SBlockRealize, guarded))
        )
        if part:
            var = tirx.Var(part.loop_var.name, "int64")
            body = substitute(stmt, [(part.loop_var, var)])
            stmt = tirx.For(var, part.min, part.extent, part.kind, body)
        stages[names[0]] = stmt

    def visit(realize: SBlockRealize, part: tirx.For | None) -> None:
        for buffer in realize.block.alloc_buffers:
            keep(buffer, part)
        for stmt in realize.block.body.seq:
            if isinstance(stmt, tirx.For) and _is_unnamed(stmt.body):
                visit(stmt.body, stmt)
            else:
                add(stmt, part)

    if not _is_unnamed(thread.body):
        raise ValueError(f"expected a thread's buffers around its statements, got {thread.body}")
    visit(thread.body, None)
    return stages, [kept for _, kept, _ in registers]


def _is_unnamed(stmt: tirx.Stmt) -> bool:
    """Whether a statement is the block that TVM puts around buffers and what uses them."""
    return isinstance(stmt, SBlockRealize) and not stmt.block.name_hint


# ---- 2. and 3. join and wait -------------------------------------------------------------------


def _dependency(action: str) -> tirx.Stmt:
    return tirx.Evaluate(cuda_device.grid_dependency(action))


def _vector_stores(stage: tirx.Stmt, streaming: bool) -> tirx.Stmt:
    """Spell out the vector accesses of a thread's stores to global memory."""

    def copy(store: tirx.BufferStore, lane: tirx.For) -> tirx.Stmt:
        first = [(lane.loop_var, T.int64(0))]
        index = [substitute(term, first) for term in store.indices]
        registers = substitute(store.value, first)
        place, lanes = registers.indices, int(lane.extent)
        return tirx.Evaluate(
            cuda_device.store_vector(store.buffer, index, registers.source, place, lanes, streaming)
        )

    def vectors(loop: tirx.For) -> tirx.Stmt:
        if loop.kind != tirx.ForKind.VECTORIZED:
            return loop
        if isinstance(loop.body, tirx.IfThenElse):
            guarded = copy(loop.body.then_case, loop)
            return tirx.IfThenElse(loop.body.condition, guarded, None)
        return copy(loop.body, loop)

    return tvm_ffi.structural_map(stage, (tirx.For, vectors))


def _thread_of(loop: tirx.For, tag: str, config: dict[str, Any]) -> tuple[list[tirx.Stmt], list]:
    """Return what one thread of an operand does, in order, and its registers."""
    stages, registers = _in_stages(loop)
    expected = [f"gamma_{tag}_local", f"{tag}_local", f"rs_{tag}", f"{tag}_out", f"{tag}_out_local"]
    if sorted(stages) != sorted(expected):
        raise ValueError(f"expected blocks {sorted(expected)} for {tag}, got {sorted(stages)}")
    gamma, load, rs, compute, store = (stages[name] for name in expected)
    loads = [load, gamma, rs]
    if config["dependent_launch"] != "off":
        loads.insert(0, _dependency("wait"))
    if config["dependent_launch"] == "after_loads":
        loads.append(_dependency("launch_dependents"))
    return [*loads, compute, _vector_stores(store, bool(config["streaming_stores"]))], registers


def bind_axis(var: tirx.Var, extent: tirx.Expr, tag: str, body: tirx.Stmt) -> tirx.For:
    """Return a loop over an axis of the grid or the block."""
    axis = tirx.IterVar(
        Range(T.int64(0), extent), tirx.Var(tag, "int64"), tirx.IterVar.ThreadIndex, tag
    )
    return tirx.For(var, T.int64(0), extent, tirx.ForKind.THREAD_BINDING, body, axis)


def config_of(loop: tirx.For) -> dict[str, Any]:
    """Return the fields of the config with which a schedule annotated a loop."""
    config = {
        str(name).removeprefix(NOTE): value
        for name, value in loop.annotations.items()
        if str(name).startswith(NOTE)
    }
    if "threads" not in config:
        raise ValueError(f"loop {loop.loop_var.name} carries no {NOTE}threads annotation")
    return config


def join_operands(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Make one kernel of what `schedules.cuda.schedule_body` leaves.

    Parameters
    ----------
    func : tirx.PrimFunc
        A loop over tiles of rows whose body is a loop over threads for Q and one for K, both
        annotated with the fields of the config.

    Returns
    -------
    tirx.PrimFunc
        The function with its loops bound to the grid.

    Raises
    ------
    ValueError
        The function is not of that form; the message says what was expected.
    """
    func = _compact(func)
    root = func.body.block
    tiles = root.body
    if not isinstance(tiles, tirx.For) or not isinstance(tiles.body, tirx.SeqStmt):
        raise ValueError("expected one loop over rows that holds a loop for Q and one for K")
    first, second = tiles.body.seq
    config = config_of(first)
    threads = int(config["threads"])
    simplify = tvm.sym.Analyzer().simplify

    # 1. Every thread's statements, loads first.
    q_order, q_registers = _thread_of(first, "q", config)
    k_order, k_registers = _thread_of(second, "k", config)

    # 2. One range of threads, cut into blocks.
    thread, part = tirx.Var("thread", "int64"), tirx.Var("part", "int64")
    total = simplify(first.extent + second.extent)
    parts = simplify(tirx.floordiv(total + (threads - 1), T.int64(threads)))
    whole_row = isinstance(parts, tirx.IntImm) and parts.value == 1
    place = thread if whole_row else part * threads + thread
    q_body = substitute(tirx.SeqStmt(q_order), [(first.loop_var, place)])
    k_body = substitute(tirx.SeqStmt(k_order), [(second.loop_var, place - first.extent)])
    if not (isinstance(total, tirx.IntImm) and total.value % threads == 0):
        k_body = tirx.IfThenElse(place < total, k_body, None)
    body: tirx.Stmt = tirx.IfThenElse(place < first.extent, q_body, k_body)

    # 3. Let the next kernel start at once, if the config says so.
    if config["dependent_launch"] == "first":
        body = tirx.SeqStmt([_dependency("launch_dependents"), body])
    registers = [tirx.AllocBuffer(buffer) for buffer in (*q_registers, *k_registers)]
    body = bind_axis(thread, T.int64(threads), "threadIdx.x", tirx.SeqStmt([*registers, body]))
    if whole_row:
        body = bind_axis(tiles.loop_var, tiles.extent, "blockIdx.x", body)
    elif config["grid_order"] == "rows":
        body = bind_axis(part, parts, "blockIdx.y", body)
        body = bind_axis(tiles.loop_var, tiles.extent, "blockIdx.x", body)
    else:
        block = tirx.Var("block", "int64")
        body = substitute(
            body,
            [
                (tiles.loop_var, tirx.floordiv(block, parts)),
                (part, tirx.floormod(block, parts)),
            ],
        )
        body = bind_axis(block, tiles.extent * parts, "blockIdx.x", body)
    func = func.with_body(SBlockRealize([], True, SBlock([], [], [], "root", body)))
    return func.with_attr(cuda_device.DEPENDENT_ATTR, config["dependent_launch"] != "off")
