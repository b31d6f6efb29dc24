"""Lowering of rotation on CPUs: pairs of neighbouring columns, products, values in variables.

In: a vectorised function of an operation that rotates. Out: the same with

* pairs of neighbouring columns read and stored as whole vectors (`interleaved_pairs`);
* values of bfloat16 that are bound to variables kept as bits (`keep_bits`);
* products rounded before they are added, which LLVM would fuse (`round_products`).
"""

from __future__ import annotations

from collections.abc import Callable

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import TensorLoad
from tvm_ffi import structural_map

from .cpu_rounding import (
    as_words,
    clear_payload,
    every_second,
    from_bfloat16,
    interleaved,
    is_bfloat16,
    is_float8,
    rounded_floats,
    rounded_words,
    splat,
    to_float8,
    type_of,
    vector_type,
    widened,
)
from .substitution import substitute

_PRODUCT_IR = """
; A product that is rounded: LLVM fuses no addition with it.
define internal <LANES x float> @qknorm_product_LANES(<LANES x float> %product)
    alwaysinline nounwind memory(none) {
  %rounded = call <LANES x float> @llvm.arithmetic.fence.vLANESf32(<LANES x float> %product)
  ret <LANES x float> %rounded
}
declare <LANES x float> @llvm.arithmetic.fence.vLANESf32(<LANES x float>)
"""


def _product_ir(lanes: int) -> str:
    text = _PRODUCT_IR.replace("LANES", str(lanes))
    return text if lanes > 1 else text.replace("<1 x float>", "float").replace("v1f32", "f32")


def round_products(body: tirx.Stmt) -> tuple[tirx.Stmt, str]:
    """Round products before they are added; returns the LLVM IR that this needs, too."""
    lanes_of_products: set[int] = set()

    def product(expr: tirx.Expr) -> tirx.Expr:
        if not isinstance(expr, tirx.Mul):
            return expr
        lanes = type_of(expr).lanes
        lanes_of_products.add(lanes)
        return tirx.call_pure_extern(vector_type("float32", lanes), f"qknorm_product_{lanes}", expr)

    def add(expr: tirx.Add | tirx.Sub) -> tirx.Expr:
        if not str(type_of(expr)).startswith("float32"):
            return expr
        return type(expr)(product(expr.a), product(expr.b))

    body = structural_map(body, (tirx.Add, add))
    body = structural_map(body, (tirx.Sub, add))
    return body, "".join(map(_product_ir, sorted(lanes_of_products)))


def keep_bits(body: tirx.Stmt, exact: Callable[[tirx.Expr], tirx.Expr]) -> tirx.Stmt:
    """Keep bfloat16 that is bound to a variable as bits, and widen it where it is used.

    TVM's legalisation of bfloat16 leaves such values out.

    Parameters
    ----------
    body : tirx.Stmt
    exact : callable
        Spells the rounding of a value out; where that is a bfloat16, it returns bits reinterpreted.
    """
    bits: list[tuple[tirx.Var, tirx.Var]] = []

    def bind(node: tirx.Bind) -> tirx.Stmt:
        value = exact(node.value)
        if not is_bfloat16(value):
            return tirx.Bind(node.var, value)
        kind = str(type_of(value)).replace("bfloat16", "uint16")
        bits.append((node.var, tirx.Var(node.var.name, kind)))
        (value,) = value.args
        value = value if str(type_of(value)) == kind else tirx.reinterpret(kind, value)
        return tirx.Bind(bits[-1][1], value)

    def widen(cast: tirx.Cast) -> tirx.Expr:
        return from_bfloat16(cast.value) if is_bfloat16(cast.value) else cast

    body = structural_map(body, (tirx.Bind, bind))
    body = structural_map(body, (tirx.Cast, widen))
    return substitute(body, [(var, tirx.reinterpret(var.ty.dtype, own)) for var, own in bits])


# ---- pairs of neighbouring columns ---------------------------------------------------------------


def interleaved_pairs(rounding: str) -> tvm.transform.Pass:
    """Make the pass that loads and stores pairs of neighbouring columns as whole vectors.

    Run after vectorising: the first elements of pairs then are a ramp of stride 2.
    """

    @tirx.transform.prim_func_pass(opt_level=0, name="qknorm.InterleavedPairs")
    def rewrite(func: tirx.PrimFunc, _mod: tvm.IRModule, _ctx: object) -> tirx.PrimFunc:
        pairs = _Pairs(rounding)
        body = structural_map(func.body, (tirx.Bind, pairs.bind))
        return func.with_body(structural_map(body, (tirx.SeqStmt, pairs.store)))

    return rewrite


def _every_second(expr: tirx.Expr) -> bool:
    """Whether an expression loads every second element, or an index is of every second one."""
    index = expr.indices[0] if isinstance(expr, TensorLoad) else expr
    if not isinstance(index, tirx.Ramp) or not isinstance(index.stride, tirx.IntImm):
        return False
    return int(index.stride.value) == 2


class _Pairs:
    """Rewrites what is computed of neighbouring columns, each pair's two elements apart."""

    def __init__(self, rounding: str) -> None:
        self.rounding = rounding
        self.simplify = tvm.sym.Analyzer().simplify
        #: Values in the high halves of words, by the variable that holds them as bfloat16.
        self.words: list[tuple[tirx.Var, tirx.Var]] = []

    def _follows(self, base: tirx.Expr, other: tirx.Expr) -> bool:
        distance = self.simplify(base - other)
        return isinstance(distance, tirx.IntImm) and distance.value == 1

    def bind(self, node: tirx.Bind) -> tirx.Stmt:
        """Read whole vectors, of which each value takes its half of the elements."""
        loads: list[TensorLoad] = []
        tvm_ffi.structural_walk(node.value, (TensorLoad, loads.append))
        loads = [load for load in loads if _every_second(load)]
        if not loads:
            return node

        def split(load: TensorLoad) -> tuple[tirx.Expr, int]:
            """Return the whole vector, and whether its odd elements are meant."""
            (index,) = load.indices
            parity = int(
                any(
                    other.source.same_as(load.source)
                    and self._follows(index.base, other.indices[0].base)
                    for other in loads
                )
            )
            whole = tirx.Ramp(index.base - parity, 1, 2 * index.lanes)
            return tirx.BufferLoad(load.source, [whole]), parity

        # No payload of a NaN may reach what is rounded; a bfloat16's is no trouble.
        is_rounded = is_bfloat16(node.value)

        def clear(value: tirx.Broadcast) -> tirx.Expr:
            is_float = str(type_of(value)).startswith("float32")
            if not (is_rounded and is_float):
                return value
            return tirx.Broadcast(clear_payload(value.value, 1), value.lanes)

        def narrow(load: TensorLoad) -> tirx.Expr:
            lanes = type_of(load).lanes
            if not _every_second(load):
                is_float = str(type_of(load)) == f"float32x{lanes}"
                return clear_payload(load, lanes) if is_rounded and is_float else load
            if is_bfloat16(load):
                return load
            whole, parity = split(load)
            half = every_second([whole], parity)
            return clear_payload(half, lanes) if is_rounded else half

        def widen(cast: tirx.Cast) -> tirx.Expr:
            if not is_bfloat16(cast.value):
                return cast
            lanes = type_of(cast).lanes
            if isinstance(cast.value, TensorLoad) and _every_second(cast.value):
                whole, parity = split(cast.value)
                return widened(as_words(whole, lanes), parity)
            if isinstance(cast.value, tirx.Cast):
                return rounded_floats(cast.value.value, lanes, self.rounding)
            return cast

        value = structural_map(node.value, (tirx.Broadcast, clear))
        value = structural_map(value, (TensorLoad, narrow))
        value = structural_map(value, (tirx.Cast, widen))
        if not is_rounded:
            return tirx.Bind(node.var, value)
        lanes = type_of(value).lanes
        words = tirx.Var(f"{node.var.name}_words", f"uint32x{lanes}")
        self.words.append((node.var, words))
        exact = rounded_words(value.value, lanes, self.rounding)
        bits = tirx.Cast(f"uint16x{lanes}", words >> splat(16, lanes))
        return tirx.SeqStmt(
            [
                tirx.Bind(words, exact),
                tirx.Bind(node.var, tirx.reinterpret(f"bfloat16x{lanes}", bits)),
            ]
        )

    def store(self, sequence: tirx.SeqStmt) -> tirx.Stmt:
        """Store both elements of pairs as one vector."""
        statements: list[tirx.Stmt] = []
        for statement in sequence:
            last = statements[-1] if statements else None
            if (
                isinstance(statement, tirx.BufferStore)
                and isinstance(last, tirx.BufferStore)
                and _every_second(statement.indices[0])
                and _every_second(last.indices[0])
                and last.buffer.same_as(statement.buffer)
                and self._follows(statement.indices[0].base, last.indices[0].base)
            ):
                statements[-1] = self._both(last, statement)
            else:
                statements.append(statement)
        return tirx.SeqStmt(statements) if len(statements) > 1 else statements[0]

    def _both(self, first: tirx.BufferStore, second: tirx.BufferStore) -> tirx.Stmt:
        (index,) = first.indices
        lanes = int(index.lanes)
        words = [
            words
            for value in (first.value, second.value)
            for var, words in self.words
            if var.same_as(value)
        ]
        if len(words) == 2:
            pairs = (words[0] >> splat(16, lanes)) | (words[1] & splat(0xFFFF0000, lanes))
            value = tirx.reinterpret(f"bfloat16x{2 * lanes}", pairs)
        elif is_float8(first.value):
            value = interleaved(to_float8(first.value), to_float8(second.value))
        else:
            value = interleaved(first.value, second.value)
        return tirx.BufferStore(first.buffer, value, [tirx.Ramp(index.base, 1, 2 * lanes)])
