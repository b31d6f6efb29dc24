"""Rounding on CPUs as expressions: float32 -> bfloat16 and float8, and bfloat16 -> float32.

In: a vector expression of a lowered function. Out: the same values by integer operations on words.

TVM's own float32 -> bfloat16 turns some NaNs into zeros (the carry of the rounding runs into the
sign: 0x7fffffff becomes -0), and widens each bfloat16 with a shuffle. Here

* every NaN stays a NaN. The carry cannot reach the exponent where the low half of a NaN is zero, as
  in every widened bfloat16; so the payloads of the other operands are cleared before they are
  multiplied: of rs once a row, of gamma once a row tile;
* a vector of 2n bfloat16 is read as n 32-bit words, whose halves are the even and the odd elements.
  A shift and a mask widen them, a shift and a ternary-logic instruction put them back: 14 vector
  instructions for 32 elements on AVX-512 instead of 23, and fewer still that need a shuffle port.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm import tirx
from tvm.ir import TensorLoad
from tvm_ffi import structural_map

from ..schedules.cpu_config import CONVERTED, SMALLEST_PAIRS
from . import cpu_convert

#: LLVM IR that `hidden` needs.
OPAQUE_IR = """
; Hides a constant from the optimiser.
define internal i32 @qknorm_opaque(i32 %value) alwaysinline nounwind memory(none) {
  %hidden = call i32 asm "", "=r,0"(i32 %value) nounwind memory(none)
  ret i32 %hidden
}
"""

_QUIET_NAN = 0x7FC00000
_HALF_ULP = 0x7FFF
_HIGH_HALF = 0xFFFF0000


# ---- vectors of words ----------------------------------------------------------------------------


def type_of(expr: tirx.Expr) -> tvm.DataType:
    """Return the element type and the number of lanes."""
    return tvm.DataType(str(expr.ty.dtype))


def vector_type(kind: str, lanes: int) -> str:
    """Return the name of a vector's type, or the scalar's where there is one lane."""
    return kind if lanes == 1 else f"{kind}x{lanes}"


def is_bfloat16(expr: tirx.Expr) -> bool:
    """Whether elements are bfloat16."""
    return str(type_of(expr)).startswith("bfloat16")


def is_float8(expr: tirx.Expr) -> bool:
    """Whether elements are a float8."""
    return str(type_of(expr)).startswith("float8")


def splat(value: int, lanes: int) -> tirx.Expr:
    """Return a word in every lane."""
    scalar = tirx.const(value, "uint32")
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def as_words(expr: tirx.Expr, lanes: int) -> tirx.Expr:
    """Return the bits of a vector as 32-bit words."""
    return tirx.reinterpret(vector_type("uint32", lanes), expr)


def as_floats(expr: tirx.Expr, lanes: int) -> tirx.Expr:
    """Return the bits of a vector as float32."""
    return tirx.reinterpret(vector_type("float32", lanes), expr)


def hidden(bits: int) -> tirx.Expr:
    """Return a 32-bit constant that the optimiser does not see."""
    return tirx.call_pure_extern("uint32", "qknorm_opaque", tirx.const(bits, "uint32"))


def every_second(vectors: Sequence[tirx.Expr], start: int) -> tirx.Expr:
    """Return every second element of vectors that follow each other, from `start` on."""
    lanes = sum(type_of(vector).lanes for vector in vectors)
    return tirx.Shuffle(list(vectors), list(range(start, lanes, 2)))


def interleaved(even: tirx.Expr, odd: tirx.Expr) -> tirx.Expr:
    """Return the vector of which two others are the even and the odd elements."""
    lanes = type_of(even).lanes
    return tirx.Shuffle([even, odd], [i + half for i in range(lanes) for half in (0, lanes)])


def clear_payload(expr: tirx.Expr, lanes: int) -> tirx.Expr:
    """Replace every NaN by the one whose low half is zero."""
    return tirx.Select(tirx.isnan(expr), as_floats(splat(_QUIET_NAN, lanes), lanes), expr)


# ---- bfloat16 ------------------------------------------------------------------------------------


def widened(words: tirx.Expr, parity: int) -> tirx.Expr:
    """Return the even (0) or the odd (1) bfloat16 of 32-bit words as float32."""
    lanes = type_of(words).lanes
    if parity:
        return as_floats(words & splat(_HIGH_HALF, lanes), lanes)
    return as_floats(words << splat(16, lanes), lanes)


def from_bfloat16(expr: tirx.Expr) -> tirx.Expr:
    """Widen a bfloat16 vector in order."""
    lanes = type_of(expr).lanes
    bits = tirx.reinterpret(vector_type("uint16", lanes), expr)
    return as_floats(tirx.Cast(vector_type("uint32", lanes), bits) << splat(16, lanes), lanes)


def rounded_words(expr: tirx.Expr, lanes: int, rounding: str) -> tirx.Expr:
    """Return words whose high half is `expr` rounded to bfloat16, half to even; no NaN payload."""
    bits = as_words(expr, lanes)
    if rounding == "mask":
        odd = tirx.NE(bits & splat(0x10000, lanes), splat(0, lanes))
        return tirx.Select(odd, bits + splat(_HALF_ULP + 1, lanes), bits + splat(_HALF_ULP, lanes))
    return bits + ((bits >> splat(16, lanes)) & splat(1, lanes)) + splat(_HALF_ULP, lanes)


def rounded_floats(expr: tirx.Expr, lanes: int, rounding: str) -> tirx.Expr:
    """Return `expr` rounded to bfloat16 as float32; no NaN payload."""
    return as_floats(rounded_words(expr, lanes, rounding) & splat(_HIGH_HALF, lanes), lanes)


def to_bfloat16(cast: tirx.Cast, rounding: str, *, hide: bool) -> tirx.Expr:
    """Round to bfloat16; with `hide`, the mask that packs pairs is hidden from the optimiser.

    From shift, and, or it makes one word permute on AVX-512, three micro-operations instead of two;
    on AArch64 one instruction.
    """
    lanes = type_of(cast).lanes
    value = cast.value
    if rounding == "convert" and lanes % CONVERTED == 0:
        return tirx.reinterpret(f"bfloat16x{lanes}", _converted(value, lanes))
    if lanes >= SMALLEST_PAIRS and isinstance(value, (tirx.Mul, tirx.Add, tirx.Sub)):
        half = lanes // 2
        parts = _even_odd(value, half, rounding)
        if rounding == "saturate":
            return tirx.reinterpret(f"bfloat16x{lanes}", _rounded_halves(*parts))
        even, odd = (rounded_words(part, half, rounding) for part in parts)
        high = hidden(_HIGH_HALF) if hide else tirx.const(_HIGH_HALF, "uint32")
        pairs = (even >> splat(16, half)) | (odd & tirx.Broadcast(high, half))
        return tirx.reinterpret(f"bfloat16x{lanes}", pairs)
    value = round_within(value, rounding, hide=hide)
    bits = rounded_words(clear_payload(value, lanes), lanes, "shift") >> splat(16, lanes)
    narrow = tirx.Cast(vector_type("uint16", lanes), bits)
    return tirx.reinterpret(vector_type("bfloat16", lanes), narrow)


def _rounded_halves(even: tirx.Expr, odd: tirx.Expr) -> tirx.Expr:
    """Return even and odd elements rounded to bfloat16, in order, as 16-bit words; no NaN payload.

    Both are rounded at once: of high halves h and low halves l, h grows by one where l is above
    half a unit, or is half a unit and h is odd. That is the top bit of l - 1 where h is even and of
    l where it is odd, if no difference falls below zero.
    """
    lanes = type_of(even).lanes
    both = 2 * lanes

    def blend(first: tirx.Expr, second: tirx.Expr) -> tirx.Expr:
        """Return the low halves of the first words and the high halves of the second ones."""
        parts = [tirx.reinterpret(f"uint16x{both}", part) for part in (first, second)]
        return tirx.Shuffle(parts, [i + both * (i % 2) for i in range(both)])

    def words(value: int) -> tirx.Expr:
        return tirx.Broadcast(tirx.const(value, "uint16"), both)

    even, odd = as_words(even, lanes), as_words(odd, lanes)
    high = blend(even >> splat(16, lanes), odd)
    low = blend(even, odd << splat(16, lanes))
    is_even = (high & words(1)) ^ words(1)
    return high + ((tirx.Max(low, is_even) - is_even) >> words(15))


def round_within(value: tirx.Expr, rounding: str, *, hide: bool) -> tirx.Expr:
    """Spell out roundings to bfloat16 within an expression, which TVM's legalisation drops."""

    def spell_out(cast: tirx.Cast) -> tirx.Expr:
        return to_bfloat16(cast, rounding, hide=hide) if is_bfloat16(cast) else cast

    return structural_map(value, (tirx.Cast, spell_out))


def _converted(expr: tirx.Expr, lanes: int) -> tirx.Expr:
    """Round to bfloat16 by the CPU's instruction; returns 16-bit words."""

    def in_order(expr: tirx.Expr) -> tirx.Expr:
        if isinstance(expr, (tirx.Add, tirx.Sub, tirx.Mul)):
            return type(expr)(in_order(expr.a), in_order(expr.b))
        if isinstance(expr, tirx.Cast) and is_bfloat16(expr.value):
            inner = expr.value
            if isinstance(inner, tirx.Cast):  # rounded to q's type before gamma
                return cpu_convert.widen(_converted(inner.value, lanes), lanes)
            if isinstance(inner, TensorLoad):
                return cpu_convert.widen(tirx.reinterpret(f"uint16x{lanes}", inner), lanes)
        return expr

    return cpu_convert.convert(in_order(expr), lanes)


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
        even, odd = _even_odd(expr.value.value, lanes, rounding)
        if is_bfloat16(expr.value):
            return rounded_floats(even, lanes, rounding), rounded_floats(odd, lanes, rounding)
        narrow = vector_type(str(type_of(expr.value)).split("x")[0], lanes)
        wide = vector_type("float32", lanes)
        return tirx.Cast(wide, tirx.Cast(narrow, even)), tirx.Cast(wide, tirx.Cast(narrow, odd))
    if isinstance(expr, tirx.Cast) and is_bfloat16(expr.value):
        words = as_words(expr.value, lanes)
        return widened(words, 0), widened(words, 1)
    if isinstance(expr, tirx.Broadcast):
        value = clear_payload(expr.value, 1)
        return tirx.Broadcast(value, lanes), tirx.Broadcast(value, lanes)
    if isinstance(expr, tirx.Shuffle):
        # Packed (`cpu_packing`): taken apart, and cleared, once for all rows of a task.
        even, odd = expr.vectors
        return even, odd
    halves = _halves(expr, lanes)
    even, odd = (clear_payload(every_second(halves, parity), lanes) for parity in (0, 1))
    return even, odd


def _halves(expr: tirx.Expr, lanes: int) -> tuple[tirx.Expr, tirx.Expr]:
    """Return the first and the second half of a vector that is loaded in order."""
    if isinstance(expr, tirx.Cast):
        low, high = _halves(expr.value, lanes)
        kind = vector_type(str(type_of(expr)).split("x")[0], lanes)
        return tirx.Cast(kind, low), tirx.Cast(kind, high)
    assert isinstance(expr, TensorLoad), type(expr)
    (ramp,) = expr.indices
    assert isinstance(ramp, tirx.Ramp), type(ramp)

    def half(offset: int) -> tirx.Expr:
        return tirx.BufferLoad(expr.source, [tirx.Ramp(ramp.base + offset, ramp.stride, lanes)])

    return half(0), half(lanes)


# ---- float8 --------------------------------------------------------------------------------------


def to_float8(cast: tirx.Cast) -> tirx.Expr:
    """Round float32 of at most float8_e4m3fn's range to it, half to even; NaN stays NaN."""
    lanes = type_of(cast).lanes

    def words(value: int) -> tirx.Expr:
        return splat(value, lanes)

    bits = as_words(cast.value, lanes)
    size = bits & words(0x7FFFFFFF)
    # Of a significand's 23 bits 3 are left; a carry goes into the exponent, whose bias becomes 7.
    normal = ((size + words(0x7FFFF) + ((size >> words(20)) & words(1))) >> words(20)) - words(960)
    # Below 2**-6 numbers are multiples of 2**-9, and so is the last bit of a sum with 2**14.
    scale = words(0x46800000)
    small = as_words(as_floats(size, lanes) + as_floats(scale, lanes), lanes) - scale
    number = tirx.Select(size < words(0x3C800000), small, normal)
    number = tirx.Select(size > words(0x7F800000), words(0x7F), number)
    number = number | ((bits >> words(24)) & words(0x80))
    narrow = tirx.Cast(vector_type("uint8", lanes), number)
    return tirx.reinterpret(vector_type("float8_e4m3fn", lanes), narrow)
