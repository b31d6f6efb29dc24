"""Device code of the CUDA kernels for which TensorIR has no statement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import tirx
from tvm.backend.cuda.op import cuda_func_call
from tvm.script import tirx as T

from .cuda_config import ACCESS_BYTES

#: TVM's name for the blocks of a kernel that a multiprocessor is to hold at least.
MIN_BLOCKS_ATTR = "tirx.launch_bounds_min_blocks_per_sm"
#: Attribute of a function: whether it is to be launched as a dependent of the kernel before it.
DEPENDENT_ATTR = "qknorm.dependent_launch"


def aligned_elements(buffer: tirx.Buffer) -> int:
    """Return how many elements the promised alignment of a buffer spans, up to 16 bytes."""
    item = tvm.DataType(str(buffer.dtype)).bits // 8
    return max(1, min(ACCESS_BYTES, int(buffer.data_alignment)) // item)


def device_call(name: str, *args: tirx.Expr, code: str) -> tirx.Expr:
    """Call a device function, given as its CUDA code from the list of parameters on."""
    source = f"__device__ __forceinline__ void {name}{code}"
    return cuda_func_call(name, *args, source_code=source)


def grid_dependency(action: str) -> tirx.Expr:
    """Return ``griddepcontrol``, which machine code for GPUs before sm_90 does not have.

    Parameters
    ----------
    action : str
        ``"wait"`` for the previous kernel, or ``"launch_dependents"``: the next one may start.
    """
    code = f"""() {{
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.{action};" : : : "memory");
#endif
}}
"""
    return device_call(f"qknorm_{action}", code=code)


def store_vector(
    to: tirx.Buffer, index: Sequence[Any], source: tirx.Buffer, place: Sequence[Any], lanes: int,
    streaming: bool,
) -> tirx.Expr:  # fmt: skip
    """Store neighbouring registers in one access: left to itself nvcc 13.0 makes four of some.

    Parameters
    ----------
    to, index
        Where the first element goes, in global memory.
    source, place
        Where it is, in registers.
    lanes : int
        Elements, of 4, 8 or 16 bytes together.
    streaming : bool
        Mark the place as not used again soon.
    """
    item = tvm.DataType(str(to.dtype)).bits // 8
    count = lanes * item // 4
    store = T.ptx.st.global_.cs if streaming else T.ptx.st.global_
    store = {1: store.b32, 2: store.v2.b32, 4: store.v4.b32}[count]
    *outer, first = place
    words = []
    for word in range(count):
        start = first + word * (4 // item)
        if item < 4:
            start = tirx.Ramp(start, T.int64(1), 4 // item)
        words.append(T.reinterpret("uint32", tirx.BufferLoad(source, [*outer, start])))
    return store(T.address_of(tirx.BufferLoad(to, list(index))), *words)


_EXCHANGE = """(const TYPE* held, TYPE* neighbours) {
  /* In CUDA, as TVM would put barriers of the block around shared memory that it knows of. */
  __shared__ alignas(16) TYPE chunks[ELEMENTS];
  TYPE* chunk = chunks + threadIdx.x / 32 * 256;
  int lane = threadIdx.x % 32;
  /* What was exchanged before has been taken. */
  __syncwarp();
#pragma unroll
  for (int e = 0; e < 8; ++e) chunk[e * 32 + lane] = held[e];
  __syncwarp();
#pragma unroll
  for (int e = 0; e < 8; ++e) neighbours[e] = chunk[lane * 8 + e];
}
"""
_CUDA_TYPES = {"bfloat16": "nv_bfloat16", "float16": "half", "float32": "float"}


def exchange(
    held: tirx.Buffer, place: Sequence[Any], neighbours: tirx.Buffer, threads: int
) -> tirx.Expr:
    """Give each thread of a warp 8 neighbours of the 256 columns that the warp holds.

    Parameters
    ----------
    held, place
        Registers with every 32nd of the columns.
    neighbours
        Registers for 8 neighbouring ones.
    threads : int
        Of the block.
    """
    dtype, elements = str(held.dtype), threads * 8
    code = _EXCHANGE.replace("TYPE", _CUDA_TYPES[dtype]).replace("ELEMENTS", str(elements))
    source = T.address_of(tirx.BufferLoad(held, [*place, T.int64(0)]))
    to = T.address_of(tirx.BufferLoad(neighbours, [T.int64(0)]))
    return device_call(f"qknorm_exchange_{dtype}_{elements}", source, to, code=code)


_SHUFFLE = """(const TYPE* own, TYPE* partner) {
#pragma unroll
  for (int word = 0; word < WORDS; ++word) {
    reinterpret_cast<unsigned*>(partner)[word] = __shfl_xor_sync(
        0xffffffffu, reinterpret_cast<const unsigned*>(own)[word], LANES);
  }
}
"""


def shuffle_vector(
    own: tirx.Buffer, partner: tirx.Buffer, place: Sequence[Any], lanes: int
) -> tirx.Expr:
    """Give each lane of a warp the 8 elements of the lane whose number differs by one bit.

    Parameters
    ----------
    own, partner, place
        Registers of the lane, and those for the other lane's.
    lanes : int
        The bit.
    """
    dtype = str(own.dtype)
    words = 8 * tvm.DataType(dtype).bits // 32
    code = _SHUFFLE.replace("TYPE", _CUDA_TYPES[dtype])
    code = code.replace("WORDS", str(words)).replace("LANES", str(lanes))
    first = [*place, T.int64(0)]
    source, to = (T.address_of(tirx.BufferLoad(buffer, first)) for buffer in (own, partner))
    return device_call(f"qknorm_shuffle_{dtype}_{lanes}", source, to, code=code)


# nvcc's own division branches to a subroutine, once an element, for numbers near the ends of
# float32's range. Here scales are brought into its middle, and dividends with them, by a power of
# two: that leaves a quotient as it is, or beyond what float8 tells apart.
_OVER_SCALES = """(const float* x, const float* given, unsigned char* float8) {
  float scales[COUNT], inverses[COUNT], units[COUNT], quotients[8];
#pragma unroll
  for (int e = 0; e < COUNT; ++e) {
    float size = fabsf(given[e]);
    float power = size < 0x1p-60f ? 0x1p96f : size > 0x1p60f ? 0x1p-64f : 1.0f;
    float scale = size * power, inverse;
    /* Over infinity everything is 0, over 0 infinite. */
    if (size == INFINITY || size == 0.0f) {
      scale = 1.0f;
      power = size == 0.0f ? INFINITY : 0.0f;
    }
    asm("rcp.approx.f32 %0, %1;" : "=f"(inverse) : "f"(scale));
    inverse = __fmaf_rn(__fmaf_rn(-scale, inverse, 1.0f), inverse, inverse);
    /* Now the nearest, but for the largest below a power of two. */
    unsigned last = (__float_as_uint(scale) & 0x7fffff) == 0x7fffff;
    scales[e] = scale;
    inverses[e] = __uint_as_float(__float_as_uint(inverse) | last);
    units[e] = copysignf(power, given[e]);
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    float scale = scales[e % COUNT], inverse = inverses[e % COUNT];
    float dividend = __fmul_rn(x[e], units[e % COUNT]);
    float first = __fmul_rn(dividend, inverse);
    float excess = __fmaf_rn(first, scale, -dividend);
    float second = __fmaf_rn(-inverse, excess, first);
    /* Infinity minus infinity is NaN; the largest float8 is 448. */
    quotients[e] = fabsf(first) < 1024.0f ? second : first;
  }
#pragma unroll
  for (int e = 0; e < 8; e += 2) {
    reinterpret_cast<unsigned short*>(float8)[e / 2] = __nv_cvt_float2_to_fp8x2(
        make_float2(quotients[e], quotients[e + 1]), __NV_SATFINITE, __NV_E4M3);
  }
}
"""


def over_scales(
    x: tirx.Buffer, scales: tirx.Buffer, part: Any, single: bool, float8: tirx.Buffer,
    place: Sequence[Any],
) -> tirx.Expr:  # fmt: skip
    """Divide 8 float32 numbers by their scales and round to float8_e4m3fn, to nearest even.

    As ``cast(clamp(x / scale, -448, 448), float8_e4m3fn)`` with a correctly rounded division: NaN
    stays NaN. The scale's reciprocal is the GPU's approximation and a step of Newton's, which is
    the nearest float32 for all but one significand (P. Markstein, "Computation of elementary
    functions on the IBM RISC System/6000 processor", 1990). The product with it, corrected once by
    what is left over, is within 2^-45 of the quotient before it is rounded: it may still round to
    the quotient's neighbour. Where that would decide between two float8, half a unit beside one of
    their midpoints, come two scales at most for each x; the tests divide by all of them.

    In CUDA, as TVM computes with float8 as with other types, element by element.

    Parameters
    ----------
    x
        Registers.
    scales, part
        Registers with 8 scales, or one, for each part.
    single : bool
        Whether there is one scale for all.
    float8, place
        Registers of the result, bytes.
    """
    code = _OVER_SCALES.replace("COUNT", "1" if single else "8")
    zero = T.int64(0)
    places = ((x, [zero]), (scales, [part, zero]), (float8, [*place, zero]))
    registers = [T.address_of(tirx.BufferLoad(buffer, index)) for buffer, index in places]
    return device_call(f"qknorm_over_{'scale' if single else 'scales'}", *registers, code=code)


# At least one, and not all. Without a division, which would take longer than a short row; a call,
# as TVM would put an expression into every index.
_WARPS_OF_K = """(int64_t q_chunks, int64_t k_chunks) {
  int64_t warps = 1;
#pragma unroll
  for (int more = 1; more < WARPS - 1; ++more) {
    warps += 2 * WARPS * k_chunks >= (2 * more + 1) * (q_chunks + k_chunks);
  }
  return warps;
}
"""


def warps_of_k(q_chunks: tirx.Expr, k_chunks: tirx.Expr, warps: int) -> tirx.Expr:
    """Return how many of a block's warps K gets: its share of a row's chunks, rounded."""
    code = _WARPS_OF_K.replace("WARPS", str(warps))
    name = f"qknorm_warps_of_k_{warps}"
    source = f"__device__ __forceinline__ int64_t {name}{code}"
    return cuda_func_call(name, q_chunks, k_chunks, source_code=source, return_type="int64")


def _fma(call: tirx.Call) -> tirx.Expr:
    """Fuse whatever the compiler's options: TVM has no CUDA code for ``fma``."""
    return tirx.call_pure_extern("float32", "__fmaf_rn", *call.args)


tirx.op.register_intrin_lowering("tirx.fma", target="cuda", f=_fma)
