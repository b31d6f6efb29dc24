"""Lowering of scheduled CPU functions: TVM's passes, and between them what they get wrong or lack.

In: a scheduled function, bound to a CPU target. Out: a function that LLVM's code generator takes.
Between TVM's passes

* float32 becomes bfloat16 and float8 exactly, and in fewer instructions (`cpu_rounding`);
* the sums of a row run without tests (`cpu_statistics`);
* what rotates keeps its products apart and its pairs together (`cpu_rotation`);
* outputs are stored past the caches where a variant asks for it (here).

The arithmetic on each element, and so each result, stays the declaration's.
"""

from __future__ import annotations

import struct

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import TensorLoad
from tvm_ffi import structural_map

from ..operations import TensorArgument
from ..schedules.cpu_config import CpuConfig
from ..spec import KernelSpec
from . import cpu_convert
from .cpu_packing import pack_gammas
from .cpu_rotation import interleaved_pairs, keep_bits, round_products
from .cpu_rounding import (
    OPAQUE_IR,
    as_floats,
    as_words,
    hidden,
    is_bfloat16,
    is_float8,
    round_within,
    to_bfloat16,
    to_float8,
    type_of,
)
from .cpu_statistics import read_words, split_blocks

#: Bytes to which rows must be aligned to be stored past the caches: a cache line.
STREAM_ALIGNMENT = 64

#: What TensorIR cannot say, as LLVM IR that is linked into the code and inlined. Names carry the
#: number of lanes: functions of one module may need several.
_INVARIANT_IR = """
; Reads what no store of this call changes, though the compiler cannot see that of a stream's.
define internal <LANES x float> @qknorm_invariant_LANES(ptr %place) alwaysinline nounwind {
  %value = load <LANES x float>, ptr %place, align 4, !invariant.load !0
  ret <LANES x float> %value
}
"""
_STREAM_IR = """
; Stores past the caches.
define internal i32 @qknorm_stream_WORDS(ptr %place, <WORDS x i32> %value) alwaysinline nounwind {
  store <WORDS x i32> %value, ptr %place, align ALIGN, !nontemporal !1
  ret i32 0
}
"""
_METADATA_IR = """
!0 = !{}
!1 = !{i32 1}
"""


class _Arguments:
    """Tells which argument of the operation a buffer of a flattened function is."""

    def __init__(self, func: tirx.PrimFunc, spec: KernelSpec) -> None:
        self._buffers: list[tuple[tirx.Var, TensorArgument]] = []
        params = list(zip(func.params, spec.tensors, strict=False))

        def declared(node: tirx.DeclBuffer) -> None:
            # Declared on a parameter's memory, `buffer_data(parameter)`.
            for param, argument in params:
                if param.same_as(node.data.args[0]):
                    self._buffers.append((node.buffer, argument))

        tvm_ffi.structural_walk(func.body, (tirx.DeclBuffer, declared))

    def __call__(self, buffer: tirx.Var) -> TensorArgument | None:
        """Return the argument, or None for a buffer of the function's own."""
        return next((argument for own, argument in self._buffers if own.same_as(buffer)), None)


def _stream_outputs(func: tirx.PrimFunc, spec: KernelSpec) -> tuple[tirx.Stmt, str]:
    """Store whole vectors of outputs past the caches, and load gammas as invariant.

    Returns the LLVM IR that this needs, too.
    """
    argument_of = _Arguments(func, spec)
    lanes_of_loads: set[int] = set()
    words_of_stores: set[int] = set()

    def load(expr: TensorLoad) -> tirx.Expr:
        (index,) = expr.indices
        argument = argument_of(expr.source)
        # An output shares no memory with a list, such as a gamma, which serves all rows.
        is_list = argument is not None and len(argument.shape) == 1
        if not (isinstance(index, tirx.Ramp) and is_list):
            return expr
        place = tirx.address_of(tirx.BufferLoad(expr.source, [index.base]))
        lanes = type_of(expr).lanes
        lanes_of_loads.add(lanes)
        return tirx.call_pure_extern(f"float32x{lanes}", f"qknorm_invariant_{lanes}", place)

    def store(node: tirx.BufferStore) -> tirx.Stmt:
        (index,) = node.indices
        argument = argument_of(node.buffer)
        if not (isinstance(index, tirx.Ramp) and argument is not None and argument.is_output):
            return node
        value = structural_map(node.value, (TensorLoad, load))
        words = type_of(value).lanes * type_of(value).bits // 32
        words_of_stores.add(words)
        place = tirx.address_of(tirx.BufferLoad(node.buffer, [index.base]))
        return tirx.Evaluate(
            tirx.call_extern("int32", f"qknorm_stream_{words}", place, as_words(value, words))
        )

    body = structural_map(func.body, (tirx.BufferStore, store))
    loads = [_INVARIANT_IR.replace("LANES", str(lanes)) for lanes in sorted(lanes_of_loads)]
    stores = [
        _STREAM_IR.replace("WORDS", str(words)).replace(
            "ALIGN", str(min(4 * words, STREAM_ALIGNMENT))
        )
        for words in sorted(words_of_stores)
    ]
    return body, "".join([*loads, *stores, _METADATA_IR])


def _divide(div: tirx.Div) -> tirx.Expr:
    """Return a division that stays one.

    LLVM multiplies where the divisor is a power of two, and would then fuse that product with the
    addition of epsilon: another result where the mean and epsilon are denormal.
    """
    if not isinstance(div.b, tirx.FloatImm):
        return div
    (bits,) = struct.unpack("<I", struct.pack("<f", div.b.value))
    return tirx.Div(div.a, as_floats(hidden(bits), 1))


def rewrite_stores(config: CpuConfig, spec: KernelSpec, *, streaming: bool) -> tvm.transform.Pass:
    """Make the pass that rounds exactly, and streams; run after vectorising."""
    hide = spec.parsed_target.machine == "x86_64"

    def exact(value: tirx.Expr) -> tirx.Expr:
        if isinstance(value, tirx.Cast) and is_bfloat16(value):
            return to_bfloat16(value, config.rounding, hide=hide)
        if isinstance(value, tirx.Cast) and is_float8(value):
            return to_float8(value)
        if spec.cast_before_gamma or spec.operation.rotates:
            return round_within(value, config.rounding, hide=hide)
        return value

    def store(node: tirx.BufferStore) -> tirx.Stmt:
        value = exact(node.value)
        same = value is node.value
        return node if same else tirx.BufferStore(node.buffer, value, node.indices)

    @tirx.transform.prim_func_pass(opt_level=0, name="qknorm.RewriteStores")
    def rewrite(func: tirx.PrimFunc, _mod: tvm.IRModule, _ctx: object) -> tirx.PrimFunc:
        llvm_ir = OPAQUE_IR
        func = func.with_body(structural_map(func.body, (tirx.BufferStore, store)))
        body = func.body
        if streaming:
            body, stream_ir = _stream_outputs(func, spec)
            llvm_ir += stream_ir
        body = structural_map(body, (tirx.Div, _divide))
        if spec.operation.rotates:
            body, products_ir = round_products(keep_bits(body, exact))
            llvm_ir += products_ir
        imported = tvm.ir.StringImm(llvm_ir + cpu_convert.functions(body))
        return func.with_body(tirx.AttrStmt(tirx.const(0), "pragma_import_llvm", imported, body))

    return rewrite


def lower(
    mod: tvm.IRModule,
    config: CpuConfig,
    spec: KernelSpec,
    *,
    streaming: bool = False,
    packed: bool = False,
) -> tvm.IRModule:
    """Lower a scheduled function, bound to a CPU target, to what LLVM's code generator takes.

    With `streaming`, whole vectors are stored past the caches; their places must be aligned to
    `STREAM_ALIGNMENT` bytes, or to a vector where that is less.

    No check of an argument is generated: the module's entry point has made them all.

    LLVM takes every pointer to be free of aliases (``tirx.noalias``), although an output may be an
    input all the same. That is sound, because what is stored at an element is computed of loads of
    that element, or of its pair's before either is stored: no order that LLVM may choose gives
    another result. Without it gamma would be read again for every row of a tile: 2,024 instructions
    instead of 1,931 in the functions for bfloat16, 1536/256, x86-64-v4.
    """
    mod = tvm.IRModule(
        {name: func.with_attr("tirx.noalias", True) for name, func in mod.functions.items()}
    )
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
                *([pack_gammas(spec, config)] if packed else []),
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
