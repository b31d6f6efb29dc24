"""float32 -> bfloat16 by AVX512-BF16's instruction, and bfloat16 -> float32 in the same order.

In: expressions of whole vectors of `CONVERTED` lanes, in the order of the columns. Out: calls of
functions in LLVM IR, which is linked into the code and inlined.

The instruction rounds half to even and keeps every NaN one, whatever its payload, but takes a
denormal float32 for a zero. So a vector with a zero among its results is rounded again by integer
operations: only there can the instruction be wrong. One test serves all the lanes of a function.

Widening takes one byte permute of AVX512-VBMI for 16 elements, where TVM's way takes a widening
move through the same port and a shift. In order no gamma is taken apart, and nothing put together.
"""

from __future__ import annotations

import re

import tvm_ffi
from tvm import tirx
from tvm.ir import Call, StringImm

from ..schedules.cpu_config import CONVERTED

_CONVERT = "qknorm_convert_"
_WIDEN = "qknorm_widen_"

_DECLARATIONS = """
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
declare <64 x i8> @llvm.x86.avx512.permvar.qi.512(<64 x i8>, <64 x i8>)
declare i1 @llvm.expect.i1(i1, i1)
"""


def widen(bits: tirx.Expr, lanes: int) -> tirx.Expr:
    """Return bfloat16, given as 16-bit words, as float32."""
    return tirx.call_pure_extern(f"float32x{lanes}", f"{_WIDEN}{lanes}", bits)


def convert(value: tirx.Expr, lanes: int) -> tirx.Expr:
    """Return float32 rounded to bfloat16, half to even, as 16-bit words; NaN stays NaN."""
    return tirx.call_pure_extern(f"uint16x{lanes}", f"{_CONVERT}{lanes}", value)


def functions(body: tirx.Stmt) -> str:
    """Return the LLVM IR of the functions of this file that a body calls."""
    used: set[tuple[str, int]] = set()

    def call(expr: Call) -> None:
        for argument in expr.args:
            if isinstance(argument, StringImm):
                match = re.fullmatch(rf"({_CONVERT}|{_WIDEN})(\d+)", argument.value)
                if match:
                    used.add((match[1], int(match[2])))

    tvm_ffi.structural_walk(body, (Call, call))
    if not used:
        return ""
    write = {_CONVERT: _convert_ir, _WIDEN: _widen_ir}
    return "".join([_DECLARATIONS, *(write[name](lanes) for name, lanes in sorted(used))])


def _constant(kind: str, values: list[int]) -> str:
    return f"<{', '.join(f'{kind} {value}' for value in values)}>"


def _part(name: str, kind: str, lanes: int, source: str, start: int, size: int) -> str:
    """Return the line that takes `size` lanes from `start` on."""
    places = _constant("i32", list(range(start, start + size)))
    return (
        f"  %{name} = shufflevector <{lanes} x {kind}> {source}, <{lanes} x {kind}> poison, "
        f"<{size} x i32> {places}"
    )


def _joined(name: str, kind: str, size: int, parts: list[str]) -> list[str]:
    """Return the lines that make one vector, `name`, of parts of `size` lanes."""
    lines, level = [], 0
    while len(parts) > 1:
        pairs = []
        for i in range(0, len(parts), 2):
            own = name if len(parts) == 2 else f"{name}_{level}_{i}"
            places = _constant("i32", list(range(2 * size)))
            lines.append(
                f"  %{own} = shufflevector <{size} x {kind}> {parts[i]}, "
                f"<{size} x {kind}> {parts[i + 1]}, <{2 * size} x i32> {places}"
            )
            pairs.append(f"%{own}")
        parts, size, level = pairs, 2 * size, level + 1
    return lines


def _convert_ir(lanes: int) -> str:
    wide, narrow = f"<{lanes} x i32>", f"<{lanes} x i16>"
    lines = [
        f"define internal {narrow} @{_CONVERT}{lanes}(<{lanes} x float> %x) alwaysinline nounwind",
        "    memory(none) {",
        "start:",
    ]
    parts = []
    for i in range(lanes // CONVERTED):
        low, high = (f"x{2 * i + half}" for half in (0, 1))
        lines += [
            _part(low, "float", lanes, "%x", 32 * i, 16),
            _part(high, "float", lanes, "%x", 32 * i + 16, 16),
            f"  %converted{i} = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512("
            f"<16 x float> %{high}, <16 x float> %{low})",
            f"  %words{i} = bitcast <32 x bfloat> %converted{i} to <32 x i16>",
            # Hidden, or LLVM widens all of it for a test of bfloat16.
            f'  %bits{i} = call <32 x i16> asm "", "=v,0"(<32 x i16> %words{i}) '
            "nounwind memory(none)",
            f"  %size{i} = and <32 x i16> %bits{i}, splat (i16 32767)",
            f"  %zero{i} = icmp eq <32 x i16> %size{i}, zeroinitializer",
        ]
        parts.append(f"%bits{i}")
    zeros = "%zero0"
    for i in range(1, lanes // CONVERTED):
        lines.append(f"  %zeros{i} = or <32 x i1> {zeros}, %zero{i}")
        zeros = f"%zeros{i}"
    lines += _joined("all", "i16", CONVERTED, parts)
    rounded = "%all" if len(parts) > 1 else parts[0]
    lines += [
        f"  %mask = bitcast <32 x i1> {zeros} to i32",
        "  %any = icmp ne i32 %mask, 0",
        "  %seldom = call i1 @llvm.expect.i1(i1 %any, i1 false)",
        "  br i1 %seldom, label %again, label %done",
        "again:",
        f"  %nan = fcmp uno <{lanes} x float> %x, zeroinitializer",
        f"  %words = bitcast <{lanes} x float> %x to {wide}",
        f"  %high = lshr {wide} %words, splat (i32 16)",
        f"  %odd = and {wide} %high, splat (i32 1)",
        f"  %half = add {wide} %words, splat (i32 32767)",
        f"  %sum = add {wide} %half, %odd",
        f"  %number = lshr {wide} %sum, splat (i32 16)",
        f"  %chosen = select <{lanes} x i1> %nan, {wide} splat (i32 32704), {wide} %number",
        f"  %exact = trunc {wide} %chosen to {narrow}",
        "  br label %done",
        "done:",
        f"  %result = phi {narrow} [{rounded}, %start], [%exact, %again]",
        f"  ret {narrow} %result",
        "}\n",
    ]
    return "\n".join(lines)


def _widen_ir(lanes: int) -> str:
    # Which byte of 64 goes where: each element's two bytes become the upper half of a word. Hidden,
    # or LLVM takes the permute for a widening move and a shift.
    lines = [
        f"define internal <{lanes} x float> @{_WIDEN}{lanes}(<{lanes} x i16> %x) alwaysinline",
        "    nounwind memory(none) {",
    ]
    lines += [
        '  %bytes = call i64 asm "", "=r,0"(i64 u0xCCCCCCCCCCCCCCCC) nounwind memory(none)',
        "  %is_high = bitcast i64 %bytes to <64 x i1>",
    ]
    for half in (0, 1):
        places = [32 * half + 2 * word + byte for word in range(16) for byte in (0, 1, 0, 1)]
        lines.append(
            f'  %places{half} = call <64 x i8> asm "", "=v,0"(<64 x i8> {_constant("i8", places)}) '
            "nounwind memory(none)"
        )
    parts = []
    for i in range(lanes // CONVERTED):
        lines += [
            _part(f"x{i}", "i16", lanes, "%x", CONVERTED * i, CONVERTED),
            f"  %bytes{i} = bitcast <32 x i16> %x{i} to <64 x i8>",
        ]
        for half in (0, 1):
            own = f"{i}_{half}"
            lines += [
                f"  %moved{own} = call <64 x i8> @llvm.x86.avx512.permvar.qi.512("
                f"<64 x i8> %bytes{i}, <64 x i8> %places{half})",
                f"  %word{own} = select <64 x i1> %is_high, <64 x i8> %moved{own}, "
                "<64 x i8> zeroinitializer",
                f"  %float{own} = bitcast <64 x i8> %word{own} to <16 x float>",
            ]
            parts.append(f"%float{own}")
    lines += _joined("all", "float", 16, parts)
    return "\n".join([*lines, f"  ret <{lanes} x float> %all", "}\n"])
