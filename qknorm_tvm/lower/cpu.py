"""Lowering of scheduled CPU functions: TVM's passes, with an exact, short float32 -> bfloat16.

TVM's own float32 -> bfloat16 turns some NaNs into zeros (the carry of the rounding runs into the
sign: 0x7fffffff becomes -0), and widens each bfloat16 with a shuffle. Here

* every NaN stays a NaN. The carry cannot reach the exponent where the low half of a NaN is zero, as
  in every widened bfloat16; so the payloads of the other operands are cleared before they are
  multiplied: of rs once a row, of gamma once a row tile;
* a vector of 2n bfloat16 is read as n 32-bit words, whose halves are the even and the odd elements.
  A shift and a mask widen them, a shift and a ternary-logic instruction put them back: 14 vector
  instructions for 32 elements on AVX-512 instead of 23, and fewer still that need a shuffle port.

* where an operation rotates, products are rounded before they are added, which LLVM would fuse;
  pairs of neighbouring columns are read and stored as whole vectors; float8 is rounded by integer
  operations.

The arithmetic on each element, and so each result, stays the declaration's.
"""

from __future__ import annotations

import struct

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import Call, TensorLoad
from tvm_ffi import structural_map

from ..declare.statistics import BLOCK, LANES
from ..schedules.cpu_config import CpuConfig
from ..schedules.cpu_statistics import BLOCKS, PARITY, STEP
from ..spec import KernelSpec
from .substitution import substitute

#: Bytes to which rows must be aligned to be stored past the caches: a cache line.
STREAM_ALIGNMENT = 64

_QUIET_NAN = 0x7FC00000
_HALF_ULP = 0x7FFF

#: What TensorIR cannot say, as LLVM IR that is linked into the code and inlined. Names carry the
#: number of lanes: functions of one module may need several.
_OPAQUE_IR = """
; Hides a constant from the optimiser.
define internal i32 @qknorm_opaque(i32 %value) alwaysinline nounwind memory(none) {
  %hidden = call i32 asm "", "=r,0"(i32 %value) nounwind memory(none)
  ret i32 %hidden
}
"""
_PRODUCT_IR = """
; A product that is rounded: LLVM fuses no addition with it.
define internal <LANES x float> @qknorm_product_LANES(<LANES x float> %product)
    alwaysinline nounwind memory(none) {
  %rounded = call <LANES x float> @llvm.arithmetic.fence.vLANESf32(<LANES x float> %product)
  ret <LANES x float> %rounded
}
declare <LANES x float> @llvm.arithmetic.fence.vLANESf32(<LANES x float>)
"""
_STREAM_IR = """
; Reads what no store of this call changes, though the compiler cannot see that of a stream's.
define internal <LANES x float> @qknorm_invariant_LANES(ptr %place) alwaysinline nounwind {
  %value = load <LANES x float>, ptr %place, align 4, !invariant.load !0
  ret <LANES x float> %value
}
; Stores past the caches.
define internal i32 @qknorm_stream_WORDS(ptr %place, <WORDS x i32> %value) alwaysinline nounwind {
  store <WORDS x i32> %value, ptr %place, align ALIGN, !nontemporal !1
  ret i32 0
}
!0 = !{}
!1 = !{i32 1}
"""
#: Fewest elements of a vector that is taken apart into even and odd ones.
_SMALLEST_PAIRS = 4


def _type(expr: tirx.Expr) -> tvm.DataType:
    return tvm.DataType(str(expr.ty.dtype))


def _splat(value: int, lanes: int) -> tirx.Expr:
    scalar = tirx.const(value, "uint32")
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def _words(expr: tirx.Expr, lanes: int) -> tirx.Expr:
    return tirx.reinterpret("uint32" if lanes == 1 else f"uint32x{lanes}", expr)


def _floats(expr: tirx.Expr, lanes: int) -> tirx.Expr:
    return tirx.reinterpret("float32" if lanes == 1 else f"float32x{lanes}", expr)


def _clear_payload(expr: tirx.Expr, lanes: int) -> tirx.Expr:
    """Replace every NaN by the one whose low half is zero."""
    return tirx.Select(tirx.isnan(expr), _floats(_splat(_QUIET_NAN, lanes), lanes), expr)


def _is_bfloat16(expr: tirx.Expr) -> bool:
    return str(_type(expr)).startswith("bfloat16")


def _widened(words: tirx.Expr, parity: int) -> tirx.Expr:
    """Return the even (0) or the odd (1) bfloat16 of 32-bit words as float32."""
    lanes = _type(words).lanes
    if parity:
        return _floats(words & _splat(0xFFFF0000, lanes), lanes)
    return _floats(words << _splat(16, lanes), lanes)


def _even_odd(expr: tirx.Expr, lanes: int, rounding: str) -> tuple[tirx.Expr, tirx.Expr]:
    """Return the even and the odd elements of a float32 vector of twice `lanes` elements.

    A vector that is stored in order is read as two halves and shuffled; it is one of the operands
    shared by the rows of a tile, so that the shuffle is too.
    """
    if isinstance(expr, (tirx.Add, tirx.Sub, tirx.Mul)):
        (a_even, a_odd), (b_even, b_odd) = (
            _even_odd(operand, lanes, rounding) for operand in (expr.a, expr.b)
        )
        return type(expr)(a_even, b_even), type(expr)(a_odd, b_odd)
    if isinstance(expr, tirx.Cast) and isinstance(expr.value, tirx.Cast):
        # Rounded to q's type before gamma.
        halves = _even_odd(expr.value.value, lanes, rounding)
        if _is_bfloat16(expr.value):
            high = _splat(0xFFFF0000, lanes)
            return tuple(  # type: ignore[return-value]
                _floats(_rounded(part, lanes, rounding) & high, lanes) for part in halves
            )
        kind = str(_type(expr.value)).split("x")[0]
        return tuple(  # type: ignore[return-value]
            tirx.Cast(f"float32x{lanes}", tirx.Cast(f"{kind}x{lanes}", part)) for part in halves
        )
    if isinstance(expr, tirx.Cast) and _is_bfloat16(expr.value):
        return _widened(_words(expr.value, lanes), 0), _widened(_words(expr.value, lanes), 1)
    if isinstance(expr, tirx.Broadcast):
        value = _clear_payload(expr.value, 1)
        return tirx.Broadcast(value, lanes), tirx.Broadcast(value, lanes)
    low, high = _halves(expr, lanes)
    return tuple(  # type: ignore[return-value]
        _clear_payload(tirx.Shuffle([low, high], list(range(start, 2 * lanes, 2))), lanes)
        for start in (0, 1)
    )


def _halves(expr: tirx.Expr, lanes: int) -> tuple[tirx.Expr, tirx.Expr]:
    """Return the first and the second half of a vector that is loaded in order."""
    if isinstance(expr, tirx.Cast):
        low, high = _halves(expr.value, lanes)
        kind = str(_type(expr)).split("x")[0]
        return tirx.Cast(f"{kind}x{lanes}", low), tirx.Cast(f"{kind}x{lanes}", high)
    assert isinstance(expr, TensorLoad), type(expr)
    (ramp,) = expr.indices
    assert isinstance(ramp, tirx.Ramp), type(ramp)
    return tuple(  # type: ignore[return-value]
        tirx.BufferLoad(expr.source, [tirx.Ramp(ramp.base + offset, ramp.stride, lanes)])
        for offset in (0, lanes)
    )


def _rounded(expr: tirx.Expr, lanes: int, rounding: str) -> tirx.Expr:
    """Return words whose high half is `expr` rounded to bfloat16, half to even; no NaN payload."""
    bits = _words(expr, lanes)
    if rounding == "mask":
        odd = tirx.NE(bits & _splat(0x10000, lanes), _splat(0, lanes))
        return tirx.Select(
            odd, bits + _splat(_HALF_ULP + 1, lanes), bits + _splat(_HALF_ULP, lanes)
        )
    return bits + ((bits >> _splat(16, lanes)) & _splat(1, lanes)) + _splat(_HALF_ULP, lanes)


def _hidden(bits: int) -> tirx.Expr:
    """Return a 32-bit constant that the optimiser does not see."""
    return tirx.call_pure_extern("uint32", "qknorm_opaque", tirx.const(bits, "uint32"))


def _divide(div: tirx.Div) -> tirx.Expr:
    """Return a division that stays one.

    LLVM multiplies where the divisor is a power of two, and would then fuse that product with the
    addition of epsilon: another result where the mean and epsilon are denormal.
    """
    if not isinstance(div.b, tirx.FloatImm):
        return div
    (bits,) = struct.unpack("<I", struct.pack("<f", div.b.value))
    return tirx.Div(div.a, _floats(_hidden(bits), 1))


def _inner_rounded(value: tirx.Expr, rounding: str, *, hide: bool) -> tirx.Expr:
    """Spell out roundings to bfloat16 within an expression, which TVM's legalisation drops."""

    def inner(cast: tirx.Cast) -> tirx.Expr:
        return _to_bfloat16(cast, rounding, hide=hide) if _is_bfloat16(cast) else cast

    return structural_map(value, (tirx.Cast, inner))


def _to_bfloat16(cast: tirx.Cast, rounding: str, *, hide: bool) -> tirx.Expr:
    """Round to bfloat16; with `hide`, the mask that packs pairs is hidden from the optimiser.

    From shift, and, or it makes one word permute on AVX-512, three micro-operations instead of two;
    on AArch64 one instruction.
    """
    lanes = _type(cast).lanes
    value = cast.value
    if lanes >= _SMALLEST_PAIRS and isinstance(value, (tirx.Mul, tirx.Add, tirx.Sub)):
        half = lanes // 2
        even, odd = (_rounded(part, half, rounding) for part in _even_odd(value, half, rounding))
        high = _hidden(0xFFFF0000) if hide else tirx.const(0xFFFF0000, "uint32")
        pairs = (even >> _splat(16, half)) | (odd & tirx.Broadcast(high, half))
        return tirx.reinterpret(f"bfloat16x{lanes}", pairs)
    value = _inner_rounded(value, rounding, hide=hide)
    bits = _rounded(_clear_payload(value, lanes), lanes, "shift") >> _splat(16, lanes)
    suffix = "" if lanes == 1 else f"x{lanes}"
    return tirx.reinterpret(f"bfloat16{suffix}", tirx.Cast(f"uint16{suffix}", bits))


def _stream(node: tirx.BufferStore) -> tirx.Stmt:
    """Return the store of a whole vector as one past the caches, and gamma's loads as invariant."""

    def load(expr: TensorLoad) -> tirx.Expr:
        (index,) = expr.indices
        if not (isinstance(index, tirx.Ramp) and expr.source.name.startswith("gamma")):
            return expr
        place = tirx.address_of(tirx.BufferLoad(expr.source, [index.base]))
        lanes = _type(expr).lanes
        return tirx.call_pure_extern(f"float32x{lanes}", f"qknorm_invariant_{lanes}", place)

    (index,) = node.indices
    if not isinstance(index, tirx.Ramp):
        return node
    value = structural_map(node.value, (TensorLoad, load))
    words = _type(value).lanes * _type(value).bits // 32
    place = tirx.address_of(tirx.BufferLoad(node.buffer, [index.base]))
    return tirx.Evaluate(
        tirx.call_extern("int32", f"qknorm_stream_{words}", place, _words(value, words))
    )


def _to_float8(cast: tirx.Cast) -> tirx.Expr:
    """Round float32 of at most float8_e4m3fn's range to it, half to even; NaN stays NaN."""
    lanes = _type(cast).lanes

    def splat(value: int) -> tirx.Expr:
        return _splat(value, lanes)

    bits = _words(cast.value, lanes)
    size = bits & splat(0x7FFFFFFF)
    # Of a significand's 23 bits 3 are left; a carry goes into the exponent, whose bias becomes 7.
    normal = ((size + splat(0x7FFFF) + ((size >> splat(20)) & splat(1))) >> splat(20)) - splat(960)
    # Below 2**-6 numbers are multiples of 2**-9, and so is the last bit of a sum with 2**14.
    scale = splat(0x46800000)
    small = _words(_floats(size, lanes) + _floats(scale, lanes), lanes) - scale
    number = tirx.Select(size < splat(0x3C800000), small, normal)
    number = tirx.Select(size > splat(0x7F800000), splat(0x7F), number)
    suffix = "" if lanes == 1 else f"x{lanes}"
    number = number | ((bits >> splat(24)) & splat(0x80))
    return tirx.reinterpret(f"float8_e4m3fn{suffix}", tirx.Cast(f"uint8{suffix}", number))


def _is_float8(expr: tirx.Expr) -> bool:
    return str(_type(expr)).startswith("float8")


def _product_ir(lanes: int) -> str:
    text = _PRODUCT_IR.replace("LANES", str(lanes))
    return text if lanes > 1 else text.replace("<1 x float>", "float").replace("v1f32", "f32")


def _products(body: tirx.Stmt) -> tuple[tirx.Stmt, set[int]]:
    """Round products before they are added; returns the lanes of which there are some, too."""
    found: set[int] = set()

    def product(expr: tirx.Expr) -> tirx.Expr:
        if not isinstance(expr, tirx.Mul):
            return expr
        lanes = _type(expr).lanes
        found.add(lanes)
        suffix = "" if lanes == 1 else f"x{lanes}"
        return tirx.call_pure_extern(f"float32{suffix}", f"qknorm_product_{lanes}", expr)

    def add(expr: tirx.Add | tirx.Sub) -> tirx.Expr:
        if not str(_type(expr)).startswith("float32"):
            return expr
        return type(expr)(product(expr.a), product(expr.b))

    body = structural_map(body, (tirx.Add, add))
    return structural_map(body, (tirx.Sub, add)), found


def rewrite_stores(config: CpuConfig, spec: KernelSpec, *, streaming: bool) -> tvm.transform.Pass:
    """Make the pass that rounds exactly, and streams; run after vectorising."""
    output = {"q_out", "k_out"}
    hide = spec.parsed_target.machine == "x86_64"

    def exact(value: tirx.Expr) -> tirx.Expr:
        if isinstance(value, tirx.Cast) and _is_bfloat16(value):
            return _to_bfloat16(value, config.rounding, hide=hide)
        if isinstance(value, tirx.Cast) and _is_float8(value):
            return _to_float8(value)
        if spec.cast_before_gamma or spec.operation.rotates:
            return _inner_rounded(value, config.rounding, hide=hide)
        return value

    def store(node: tirx.BufferStore) -> tirx.Stmt:
        value = exact(node.value)
        if value is not node.value:
            node = tirx.BufferStore(node.buffer, value, node.indices)
        written = node.buffer.name.removesuffix("_1")
        return _stream(node) if streaming and written in output else node

    def with_exact_values(body: tirx.Stmt) -> tirx.Stmt:
        # TVM's legalisation of bfloat16 leaves out what is bound to a variable, which is kept as
        # bits, and widened here.
        bits: list[tuple[tirx.Var, tirx.Var]] = []

        def bind(node: tirx.Bind) -> tirx.Stmt:
            value = exact(node.value)
            if not _is_bfloat16(value):
                return tirx.Bind(node.var, value)
            kind = str(_type(value)).replace("bfloat16", "uint16")
            bits.append((node.var, tirx.Var(node.var.name, kind)))
            # `exact` has made it of bits.
            (value,) = value.args
            value = value if str(_type(value)) == kind else tirx.reinterpret(kind, value)
            return tirx.Bind(bits[-1][1], value)

        def widen(cast: tirx.Cast) -> tirx.Expr:
            return _from_bfloat16(cast.value) if _is_bfloat16(cast.value) else cast

        body = structural_map(body, (tirx.Bind, bind))
        body = structural_map(body, (tirx.Cast, widen))
        values = [(var, tirx.reinterpret(var.ty.dtype, own)) for var, own in bits]
        return substitute(body, values)

    text = _OPAQUE_IR
    if streaming:
        vector_bytes = config.vector * spec.out_bytes
        pairs = spec.out_dtype == "bfloat16" and config.vector >= _SMALLEST_PAIRS
        text += (
            _STREAM_IR.replace("LANES", str(config.vector // 2 if pairs else config.vector))
            .replace("WORDS", str(vector_bytes // 4))
            .replace("ALIGN", str(min(vector_bytes, STREAM_ALIGNMENT)))
        )

    @tirx.transform.prim_func_pass(opt_level=0, name="qknorm.RewriteStores")
    def rewrite(func: tirx.PrimFunc, _mod: tvm.IRModule, _ctx: object) -> tirx.PrimFunc:
        body = structural_map(func.body, (tirx.BufferStore, store))
        body = structural_map(body, (tirx.Div, _divide))
        code = text
        if spec.operation.rotates:
            body = with_exact_values(body)
            body, lanes = _products(body)
            for number in sorted(lanes):
                code += _product_ir(number)
        ir = tvm.ir.StringImm(code)
        return func.with_body(tirx.AttrStmt(tirx.const(0), "pragma_import_llvm", ir, body))

    return rewrite


@tirx.transform.prim_func_pass(opt_level=0, name="qknorm.SplitBlocks")
def split_blocks(func: tirx.PrimFunc, _mod: tvm.IRModule, _ctx: object) -> tirx.PrimFunc:
    """Take the columns beyond the last whole block of a row's sum apart; a TVM pass.

    Run before vectorising. The loop over whole blocks then has no test; in the last block whole
    steps have none, and the other columns are added by a loop of their own.
    """
    columns = {str(one.name): one.shape[1] for one in func.params if len(_shape(one)) == 2}
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


def _shape(param: tirx.Var) -> list[tirx.Expr]:
    return list(param.shape) if hasattr(param, "shape") else []


@tirx.transform.prim_func_pass(opt_level=0, name="qknorm.ReadWords")
def read_words(func: tirx.PrimFunc, _mod: tvm.IRModule, _ctx: object) -> tirx.PrimFunc:
    """Expand the loops over even and odd columns, and read their bfloat16 as words; a TVM pass.

    Run after vectorising: every second element of a vector then is a ramp of stride 2.
    """

    even = tirx.const(0, "int64")

    def one_half(loop: tirx.For, parity: int) -> tirx.Stmt:
        def widen(cast: tirx.Cast) -> tirx.Expr:
            load = cast.value
            if not (isinstance(load, TensorLoad) and _is_bfloat16(load)):
                return cast
            (index,) = load.indices
            if not isinstance(index, tirx.Ramp):
                return cast
            if not (isinstance(index.stride, tirx.IntImm) and index.stride.value == 2):
                raise ValueError(f"expected a vector of every second element, got {index}")
            first = tirx.Ramp(substitute(index.base, [(loop.loop_var, even)]), 1, 2 * index.lanes)
            words = _words(tirx.BufferLoad(load.source, [first]), int(index.lanes))
            return _widened(words, parity)

        body = structural_map(loop.body, (tirx.Cast, widen))
        return substitute(body, [(loop.loop_var, tirx.const(parity, "int64"))])

    def expand(loop: tirx.For) -> tirx.Stmt:
        if PARITY not in loop.annotations:
            return loop
        return tirx.SeqStmt([one_half(loop, 0), one_half(loop, 1)])

    return func.with_body(structural_map(func.body, (tirx.For, expand)))


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
        is_rounded = _is_bfloat16(node.value)

        def clear(value: tirx.Broadcast) -> tirx.Expr:
            is_float = str(_type(value)).startswith("float32")
            if not (is_rounded and is_float):
                return value
            return tirx.Broadcast(_clear_payload(value.value, 1), value.lanes)

        def narrow(load: TensorLoad) -> tirx.Expr:
            if (
                is_rounded
                and str(_type(load)) == f"float32x{_type(load).lanes}"
                and not (_every_second(load))
            ):
                return _clear_payload(load, _type(load).lanes)
            if not _every_second(load) or _is_bfloat16(load):
                return load
            whole, parity = split(load)
            half = tirx.Shuffle([whole], list(range(parity, _type(whole).lanes, 2)))
            return _clear_payload(half, _type(load).lanes) if is_rounded else half

        def widen(cast: tirx.Cast) -> tirx.Expr:
            lanes = _type(cast).lanes
            if isinstance(cast.value, TensorLoad):
                if not _is_bfloat16(cast.value):
                    return cast
                if not _every_second(cast.value):
                    return cast
                whole, parity = split(cast.value)
                return _widened(_words(whole, lanes), parity)
            if isinstance(cast.value, tirx.Cast) and _is_bfloat16(cast.value):
                high = _splat(0xFFFF0000, lanes)
                return _floats(_rounded(cast.value.value, lanes, self.rounding) & high, lanes)
            return cast

        value = structural_map(node.value, (tirx.Broadcast, clear))
        value = structural_map(value, (TensorLoad, narrow))
        value = structural_map(value, (tirx.Cast, widen))
        if not _is_bfloat16(value):
            return tirx.Bind(node.var, value)
        lanes = _type(value).lanes
        words = tirx.Var(f"{node.var.name}_words", f"uint32x{lanes}")
        self.words.append((node.var, words))
        exact = _rounded(value.value, lanes, self.rounding)
        narrowed = tirx.Cast(f"uint16x{lanes}", words >> _splat(16, lanes))
        return tirx.SeqStmt(
            [
                tirx.Bind(words, exact),
                tirx.Bind(node.var, tirx.reinterpret(f"bfloat16x{lanes}", narrowed)),
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
            pairs = (words[0] >> _splat(16, lanes)) | (words[1] & _splat(0xFFFF0000, lanes))
            value = tirx.reinterpret(f"bfloat16x{2 * lanes}", pairs)
        elif _is_float8(first.value):
            value = _interleave(_to_float8(first.value), _to_float8(second.value), lanes)
        else:
            value = _interleave(first.value, second.value, lanes)
        return tirx.BufferStore(first.buffer, value, [tirx.Ramp(index.base, 1, 2 * lanes)])


def _interleave(first: tirx.Expr, second: tirx.Expr, lanes: int) -> tirx.Expr:
    return tirx.Shuffle([first, second], [i + half for i in range(lanes) for half in (0, lanes)])


def _from_bfloat16(expr: tirx.Expr) -> tirx.Expr:
    """Widen a bfloat16 vector in order."""
    lanes = _type(expr).lanes
    suffix = "" if lanes == 1 else f"x{lanes}"
    bits = tirx.Cast(f"uint32{suffix}", tirx.reinterpret(f"uint16{suffix}", expr))
    return _floats(bits << _splat(16, lanes), lanes)


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


def lower(
    mod: tvm.IRModule, config: CpuConfig, spec: KernelSpec, *, streaming: bool = False
) -> tvm.IRModule:
    """Lower a scheduled function, bound to a CPU target, to what LLVM's code generator takes.

    With `streaming`, whole vectors are stored past the caches; their places must be aligned to
    `STREAM_ALIGNMENT` bytes, or to a vector where that is less.

    No check of an argument is generated: the module's entry point has made them all.
    """
    with tvm.transform.PassContext(config={"s_tir.LoopPartition": {"partition_const_loop": True}}):
        return tvm.transform.Sequential(
            [
                s_tir.transform.CanonicalizeLoop(),
                s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
                s_tir.transform.ConvertBlocksToOpaque(),
                s_tir.transform.CompactBufferAllocation(),
                split_blocks,
                s_tir.transform.StmtSimplify(),
                s_tir.transform.LowerOpaqueBlock(),
                tirx.transform.FlattenBuffer(),
                s_tir.transform.LoopPartition(),
                tirx.transform.VectorizeLoop(True),
                read_words,
                *([interleaved_pairs(config.rounding)] if spec.interleaved else []),
                rewrite_stores(config, spec, streaming=streaming),
                tirx.transform.BF16ComputeLegalize(),
                tirx.transform.UnrollLoop(),
                tirx.transform.StmtSimplify(),
                tirx.transform.RemoveNoOp(),
                tirx.transform.VerifyMemory(),
                tirx.transform.SplitHostDevice(),
                tirx.transform.MakePackedAPI(),
                tirx.transform.BF16StorageLegalize(),
                tirx.transform.SkipAssert(),
                tirx.transform.LowerTVMBuiltin(),
                tirx.transform.LowerIntrin(),
            ]
        )(mod)
