"""Lowering of gammas on CPUs: each task takes them apart into even and odd elements once.

In: a vectorised function whose loop over tiles is parallel. Out: the same, in which a task first
packs the gammas into memory of its own, a vector's even elements before its odd ones, and then
takes its share of the tiles. No primitive says what a task does before its share of a loop.
"""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import TensorLoad
from tvm_ffi import structural_map

from ..schedules.cpu_config import CpuConfig
from ..spec import KernelSpec
from .cpu_rounding import clear_payload, every_second, interleaved, is_bfloat16, type_of

#: TVM's attribute of what becomes one parallel launch: a loop in it is shared among the tasks.
_LAUNCH = "pragma_parallel_launch_point"


def pack_gammas(spec: KernelSpec, config: CpuConfig) -> tvm.transform.Pass:
    """Make the pass that packs gammas; run after vectorising, before roundings are spelt out.

    Columns beyond the last whole vector are read as they are.
    """
    vector, simplify = config.vector, tvm.sym.Analyzer().simplify
    columns = {"gamma_q": spec.q_cols, "gamma_k": spec.k_cols}
    whole = {name: cols // vector * vector for name, cols in columns.items() if cols}

    @tirx.transform.prim_func_pass(opt_level=0, name="qknorm.PackGammas")
    def rewrite(func: tirx.PrimFunc, _mod: tvm.IRModule, _ctx: object) -> tirx.PrimFunc:
        params = {str(param.name): param for param in func.params}
        packed: list[tuple[tirx.Var, tirx.Var]] = []

        def declared(node: tirx.DeclBuffer) -> None:
            for name, cols in whole.items():
                if cols and params[name].same_as(node.data.args[0]):
                    shape, kind = (cols * 2 // vector,), f"float32x{vector // 2}"
                    own = tirx.decl_buffer(shape, kind, f"packed_{name}")
                    packed.append((node.buffer, own))

        tvm_ffi.structural_walk(func.body, (tirx.DeclBuffer, declared))

        def load(expr: TensorLoad) -> tirx.Expr:
            (index,) = expr.indices
            if not isinstance(index, tirx.Ramp) or int(index.lanes) != vector:
                return expr
            own = next((own for gamma, own in packed if gamma.same_as(expr.source)), None)
            if own is None:
                return expr
            panel, within = (
                simplify(part(index.base, vector)) for part in (tirx.floordiv, tirx.floormod)
            )
            if not isinstance(within, tirx.IntImm) or int(within.value):
                return expr
            even, odd = (tirx.BufferLoad(own, [panel * 2 + parity]) for parity in (0, 1))
            return interleaved(even, odd)

        def pack(value: tirx.Expr) -> tirx.Expr:
            if not (is_bfloat16(value) and type_of(value).lanes == vector):
                return value
            return structural_map(value, (TensorLoad, load))

        def store(node: tirx.BufferStore) -> tirx.Stmt:
            return tirx.BufferStore(node.buffer, pack(node.value), node.indices)

        def bind(node: tirx.Bind) -> tirx.Stmt:
            return tirx.Bind(node.var, pack(node.value))

        def launch(loop: tirx.For) -> tirx.Stmt:
            if loop.kind != tirx.ForKind.PARALLEL:
                return loop
            first = [part for gamma, own in packed for part in _pack(gamma, own, vector)]
            return tirx.AttrStmt(
                tirx.const(0), _LAUNCH, tirx.const(1), tirx.SeqStmt([*first, loop])
            )

        body = structural_map(func.body, (tirx.BufferStore, store))
        body = structural_map(body, (tirx.Bind, bind))
        return func.with_body(structural_map(body, (tirx.For, launch)) if packed else body)

    return rewrite


def _pack(gamma: tirx.Var, own: tirx.Var, vector: int) -> list[tirx.Stmt]:
    """Return the statements that allocate and fill a packed gamma."""
    panel, half = tirx.Var("panel", "int64"), vector // 2
    halves = [
        tirx.BufferLoad(gamma, [tirx.Ramp(panel * vector + start, 1, half)]) for start in (0, half)
    ]
    parts = [
        tirx.BufferStore(
            own, clear_payload(every_second(halves, parity), half), [panel * 2 + parity]
        )
        for parity in (0, 1)
    ]
    panels = tirx.const(int(own.shape[0]) // 2, "int64")
    loop = tirx.For(panel, tirx.const(0, "int64"), panels, tirx.ForKind.SERIAL, tirx.SeqStmt(parts))
    # Without the annotation TVM asks its runtime for memory in each task.
    return [tirx.AllocBuffer(own, {"disable_lower_builtin": tirx.const(1, "bool")}), loop]
