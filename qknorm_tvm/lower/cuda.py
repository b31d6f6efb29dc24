"""Lowering of a scheduled function to one CUDA kernel: what schedule primitives cannot say.

`schedules.cuda` leaves a loop over tiles of rows, in it one loop over threads for Q and one for K,
and in each a nest of small loops in which a thread loads, computes and stores. TensorIR has no
primitive that makes two loops share one range of threads, that moves a statement ahead of its
neighbours' loops, or that inserts an instruction. `join_operands` does these:

1. *Distribute*: every load of a thread comes before its first store, for all of its rows and
   vectors. Nothing else keeps several loads in flight: outputs may be the inputs themselves, so
   the compiler may not move a load over a store.
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

_Stage = tuple[str, tirx.Stmt]


# ---- 1. distribute ---------------------------------------------------------------------------


def _compact(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Shrink the buffers in registers to what one thread needs, by TVM's own passes.

    Predicates are set aside for that, since TVM bounds by them what a buffer holds, and a bound
    that depends on the number of rows cannot be in registers.
    """
    predicates: dict[str, tirx.Expr] = {}

    def set_aside(realize: SBlockRealize) -> SBlockRealize:
        predicates[realize.block.name_hint] = realize.predicate
        return SBlockRealize(realize.iter_values, tirx.IntImm("bool", 1), realize.block)

    def restore(realize: SBlockRealize) -> SBlockRealize:
        predicate = predicates.get(realize.block.name_hint, realize.predicate)
        return SBlockRealize(realize.iter_values, predicate, realize.block)

    func = func.with_body(tvm_ffi.structural_map(func.body, (SBlockRealize, set_aside)))
    passes = [
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
    ]
    func = tvm.transform.Sequential(passes)(tvm.IRModule({"main": func}))["main"]
    return func.with_body(tvm_ffi.structural_map(func.body, (SBlockRealize, restore)))


def _holds_several(stmt: tirx.Stmt) -> bool:
    if isinstance(stmt, tirx.For):
        return _holds_several(stmt.body)
    return isinstance(stmt, tirx.SeqStmt) or (
        isinstance(stmt, SBlockRealize) and not stmt.block.name_hint
    )


class _Distributor:
    """Splits a nest of loops into one nest for each block in it, named by the block."""

    def __init__(self) -> None:
        self.buffers: list[tirx.Buffer] = []
        self.stages: list[_Stage] = []
        # A buffer that was private to an iteration, what replaces it, and the loops around it.
        self._expanded: list[tuple[tirx.Var, tirx.Buffer, list[tirx.Var]]] = []

    def visit(self, stmt: tirx.Stmt, loops: list[tirx.For]) -> None:
        if isinstance(stmt, tirx.SeqStmt):
            for one in stmt.seq:
                self.visit(one, loops)
        elif isinstance(stmt, SBlockRealize) and not stmt.block.name_hint:
            for buffer in stmt.block.alloc_buffers:
                self._expand(buffer, loops)
            self.visit(stmt.block.body, loops)
        elif isinstance(stmt, tirx.For) and _holds_several(stmt):
            self.visit(stmt.body, [*loops, stmt])
        else:
            names: list[str] = []
            tvm_ffi.structural_walk(stmt, (SBlock, lambda block: names.append(block.name_hint)))
            if len(names) != 1:
                raise ValueError(f"expected one block in a statement of a thread, got {names}")
            self.stages.append((names[0], self._alone(stmt, loops)))

    def _expand(self, buffer: tirx.Buffer, loops: list[tirx.For]) -> None:
        bound = tvm.sym.Analyzer().const_int_bound
        shape = [loop.extent for loop in loops]
        shape += [T.int64(bound(extent).max_value) for extent in buffer.shape]
        expanded = tirx.decl_buffer(
            shape, buffer.dtype, buffer.name, scope=buffer.scope(), data_alignment=16
        )
        self.buffers.append(expanded)
        self._expanded.append((buffer, expanded, [loop.loop_var for loop in loops]))

    def _alone(self, stmt: tirx.Stmt, loops: list[tirx.For]) -> tirx.Stmt:
        simplify = tvm.sym.Analyzer().simplify

        def place(buffer: tirx.Var, indices: Any) -> tuple[tirx.Buffer, list[Any]] | None:
            for old, new, around in self._expanded:
                if buffer.same_as(old):
                    return new, [*around, *map(simplify, indices)]
            return None

        def load(node: TensorLoad) -> tirx.Expr:
            found = place(node.source, node.indices)
            return tirx.BufferLoad(*found) if found else node

        def store(node: tirx.BufferStore) -> tirx.Stmt:
            found = place(node.buffer, node.indices)
            return tirx.BufferStore(found[0], node.value, found[1]) if found else node

        def plain(node: SBlockRealize) -> tirx.Stmt:
            always = isinstance(node.predicate, tirx.IntImm) and node.predicate.value == 1
            # Computing on registers that were not loaded harms nothing, and has no branch.
            if always or node.block.name_hint.endswith("_out"):
                return node.block.body
            return tirx.IfThenElse(node.predicate, node.block.body, None)

        stmt = tvm_ffi.structural_map(
            stmt,
            (
                (TensorLoad, load),
                (tirx.BufferStore, store),
                (SBlockRealize, plain),
            ),
        )
        for loop in reversed(loops):
            var = tirx.Var(loop.loop_var.name, "int64")
            body = substitute(stmt, [(loop.loop_var, var)])
            stmt = tirx.For(var, loop.min, loop.extent, loop.kind, body)
        return stmt


# ---- 2. and 3. join and wait -------------------------------------------------------------------


def _dependency(action: str) -> tirx.Stmt:
    return tirx.Evaluate(cuda_device.grid_dependency(action))


def _vector_stores(stage: tirx.Stmt, streaming: bool) -> tirx.Stmt:
    """Spell out the vector accesses of a thread's stores to global memory."""

    def one_copy(store: tirx.BufferStore, lane: tirx.For) -> tirx.Stmt:
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
            guarded = one_copy(loop.body.then_case, loop)
            return tirx.IfThenElse(loop.body.condition, guarded, None)
        return one_copy(loop.body, loop)

    return tvm_ffi.structural_map(stage, (tirx.For, vectors))


def _one_thread(loop: tirx.For, tag: str, config: dict[str, Any]) -> tuple[list[tirx.Stmt], list]:
    """Return what one thread of an operand does, in order, and its registers."""
    nest = _Distributor()
    nest.visit(loop.body, [])
    stages: dict[str, list[tirx.Stmt]] = {}
    for name, stmt in nest.stages:
        stages.setdefault(name, []).append(stmt)
    expected = [f"gamma_{tag}_local", f"{tag}_local", f"rs_{tag}", f"{tag}_out", f"{tag}_out_local"]
    if sorted(stages) != sorted(expected):
        raise ValueError(f"expected blocks {sorted(expected)} for {tag}, got {sorted(stages)}")
    gamma, load, rs, compute, store = (stages[name] for name in expected)
    store = [_vector_stores(stage, bool(config["streaming_stores"])) for stage in store]
    loads = [*load, *gamma, *rs]
    if config["dependent_launch"] != "off":
        loads.insert(0, _dependency("wait"))
    if config["dependent_launch"] == "after_loads":
        loads.append(_dependency("launch_dependents"))
    return [*loads, *compute, *store], nest.buffers


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
    q_order, q_registers = _one_thread(first, "q", config)
    k_order, k_registers = _one_thread(second, "k", config)

    # 2. One range of threads, cut into blocks.
    thread, part = tirx.Var("thread", "int64"), tirx.Var("part", "int64")
    total = simplify(first.extent + second.extent)
    parts = simplify(tirx.floordiv(total + (threads - 1), T.int64(threads)))
    one_part = isinstance(parts, tirx.IntImm) and parts.value == 1
    place = thread if one_part else part * threads + thread
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
    if one_part:
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
