"""What the threads of a warp do together in the CUDA kernels that add up rows, in CUDA."""

from __future__ import annotations

from tvm import tirx
from tvm.backend.cuda.op import cuda_func_call

from ..declare.statistics import CHUNK, SLOTS
from .cuda import device_call, int64
from .cuda_operands import Operand

# In CUDA, as TVM would put barriers of the block around shared memory that it knows of.
_HAND_ON = """(const TYPE* held, TYPE* vector) {
  __shared__ alignas(16) TYPE chunks[ROOM];
  TYPE* chunk = chunks + threadIdx.x / 32 * 256;
  int lane = threadIdx.x % 32;
  /* What was handed on before has been taken. */
  __syncwarp();
#pragma unroll
  for (int e = 0; e < 8; ++e) chunk[e * 32 + lane] = held[e];
  __syncwarp();
#pragma unroll
  for (int e = 0; e < 8; ++e) vector[e] = chunk[lane * 8 + e];
}
"""
_CUDA_TYPES = {"bfloat16": "nv_bfloat16", "float16": "half", "float32": "float"}
_WARP_SUM = """(float value) {
#pragma unroll
  for (int half = 16; half > 0; half /= 2) value += __shfl_xor_sync(0xffffffffu, value, half);
  return value;
}
"""
_SLOT_SUM = """(const float* sums, int count) {
  int slot = threadIdx.x % WIDTH;
  float value = 0.0f;
#pragma unroll
  for (int chunk = slot; chunk < count; chunk += SLOTS) value += sums[chunk];
#pragma unroll
  for (int half = WIDTH / 2; half > 0; half /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, half);
  }
  return value;
}
"""


def _float_call(name: str, *args: tirx.Expr, code: str) -> tirx.Expr:
    source = f"__device__ __forceinline__ float {name}{code}"
    return cuda_func_call(name, *args, source_code=source, return_type="float32")


def warp_sum(value: tirx.Expr) -> tirx.Expr:
    """Return the sum of a value of each lane, by halves."""
    return _float_call("qknorm_warp_sum", value, code=_WARP_SUM)


def slot_sum(sums: tirx.Buffer, first: int, one: Operand) -> tirx.Expr:
    """Return the sum of what an operand's warps have left for a row, from `first` on."""
    width, count = SLOTS, tirx.min(int64(SLOTS), one.chunks)
    if not one.in_rounds:
        chunks = -(-int(one.cols) // CHUNK)
        width, count = min(SLOTS, 1 << (chunks - 1).bit_length()), int64(chunks)
    code = _SLOT_SUM.replace("WIDTH", str(width)).replace("SLOTS", str(SLOTS))
    place = tirx.address_of(tirx.BufferLoad(sums, [int64(first)]))
    return _float_call(f"qknorm_slot_sum_{width}", place, tirx.Cast("int32", count), code=code)


def hand_on(held: tirx.BufferLoad, vector: tirx.BufferLoad, dtype: str, room: int) -> tirx.Stmt:
    """Give each thread of a warp its neighbouring columns of the chunk that the warp holds.

    Parameters
    ----------
    held, vector : tirx.BufferLoad
        The first of the elements that a thread holds, every 32nd of the chunk; and where to put the
        neighbours.
    dtype : str
        Of the elements.
    room : int
        Elements that a block of threads holds at a time.
    """
    code = _HAND_ON.replace("TYPE", _CUDA_TYPES[dtype]).replace("ROOM", str(room))
    places = map(tirx.address_of, (held, vector))
    return device_call(f"qknorm_hand_on_{dtype}_{room}", *places, code=code)
