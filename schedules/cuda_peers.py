"""The exchange of a launch with other ranks: its protocol, and what the device does for it.

A row's sums of squares of Q and of K are exchanged by themselves, and each row by itself. Of a row,
the operand's first warp writes its sum to a slot in every rank's memory, 4 bytes each; then each of
its warps reads its own rank's slots until none is empty, and adds them up in the order of ranks. So
all ranks, and all warps, have the same bits, and no block waits for another one of its own launch.

A row has three sets of slots, which its launches use in turn: ``set`` is counted in the rank's own
memory, row by row, so that launches of a graph, replays and eager ones agree. While a launch uses a
set it empties the one before, ``(set + 2) % 3``. All reads of that have ended, with the launch
before; and no other rank writes to it yet: it would be two launches of this row ahead, for each of
which it needs a sum of this rank's. (Emptying ``(set + 1) % 3`` would erase what a faster rank has
written already.) `tests/test_peer_protocol.py` searches all orders of small cases.

**No order of blocks, launches or ranks deadlocks**, if all ranks make the same launches with as
many rows each:

1. The blocks of a launch all fit on the GPU at once, beside those of the other ranks that share it:
   the entry point makes no more blocks than that, and a block takes tiles of rows in increasing
   order. So every block of a launch that may run does get to run.
2. A launch may run once the one before it on its stream has ended. It lets its dependents start
   only after the sums of its block's last row have come (``after_loads``: they are what it loads
   last). By then all its blocks, and those of the other ranks' same launch, run and need no room.
   So of a stream at most one launch holds room while it waits for other ranks, and (1) counts it.
   Dependents that start at once would pile up, each holding room that another rank of this GPU
   needs for the launch that they all wait for.
3. Take the first launch that has not ended on some rank, and in it the first tile that waits for
   ever on some rank. All ranks run this launch, by (2) and (1). On each, the block of that tile has
   ended its earlier tiles, which are before it in the order; so it has written its sums, and the
   tile does not wait.

A launch that waits longer than the state's timeout gives up: its sums are NaN, and it says which
rank's sum of which row did not come. Launches after it do not wait.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.backend.cuda.op import cuda_func_call
from tvm.script import tirx as T

from qknorm_tvm.peers import EMPTY, FAILURE, REPORT, SETS, TIMEOUT, TURNS

from .cuda_device import device_call

#: Reads between two looks at the clock: some hundred microseconds.
_READS = 512


def first_slot(state: Any, ranks: Any, turn: Any, row: Any, operand: int) -> Any:
    """Return the place of the first rank's slot of a row, counted in slots."""
    rows = state.shape[0] - TURNS
    return ((turn * rows + row) * 2 + operand) * ranks


def next_turn(turn: Any) -> Any:
    """Return the set after one."""
    return T.Select(turn == T.int64(SETS - 1), T.int64(0), turn + 1)


def turn_before(turn: Any) -> Any:
    """Return the set before one."""
    return T.Select(turn == T.int64(0), T.int64(SETS - 1), turn - 1)


# Relaxed, of the system's scope: neither the compiler nor a cache keeps one back.
_STORE_SLOT = """(int64_t slots, int64_t slot, float sum) {
  int64_t address = slots + slot * 4;
  asm volatile("st.relaxed.sys.global.f32 [%0], %1;" : : "l"(address), "f"(sum) : "memory");
}
"""


def store_slot(slots: Any, slot: Any, total: Any) -> tirx.Expr:
    """Write a sum to the slot of a rank, whose memory begins at the address `slots`."""
    return device_call("qknorm_store_slot", slots, slot, total, code=_STORE_SLOT)


def empty_slot(slots: Any, slot: Any) -> tirx.Expr:
    """Empty a slot."""
    return store_slot(slots, slot, T.reinterpret("float32", T.uint32(EMPTY)))


_GIVES_UP = f"""
/* Whether a launch that waits since `start` is to wait no longer. */
__device__ __forceinline__ bool qknorm_gives_up(int64_t* state, uint64_t* start, int64_t rank,
                                                int64_t row) {{
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  volatile int64_t* words = state;
  if (words[{FAILURE}] != 0) return true;
  if (*start == 0) *start = now;
  int64_t timeout = words[{TIMEOUT}];
  if (timeout == 0 || now - *start < (uint64_t)timeout) return false;
  unsigned long long failure = (unsigned long long)(rank + 1) << 32 | (unsigned long long)row;
  if (atomicCAS((unsigned long long*)&state[{FAILURE}], 0ull, failure) == 0ull) {{
    *(volatile unsigned long long*)words[{REPORT}] = failure;
    __threadfence_system();
  }}
  return true;
}}
"""

# Sums are 0 or more, so that those of lanes beyond the ranks, +0, change no sum.
_GATHER = f"""(int64_t slots, int64_t slot, int64_t ranks, int64_t row, int64_t failure,
               int64_t* state) {{
  int lane = threadIdx.x % 32;
  float sum = 0.0f;
  if (lane < ranks) {{
    int64_t address = slots + (slot + lane) * 4;
    uint64_t start = 0;
    bool waits = failure == 0;
    sum = __uint_as_float(0x{EMPTY:x}u);
    for (unsigned reads = 1; waits; ++reads) {{
      asm volatile("ld.relaxed.sys.global.f32 %0, [%1];" : "=f"(sum) : "l"(address) : "memory");
      waits = __float_as_uint(sum) == 0x{EMPTY:x}u;
      if (waits && reads % {_READS} == 0) waits = !qknorm_gives_up(state, &start, lane, row);
    }}
    if (__float_as_uint(sum) == 0x{EMPTY:x}u) sum = __uint_as_float(0x7fffffffu);
  }}
  float total = 0.0f;
  for (int first = 0; first < ranks; first += 4) {{
#pragma unroll
    for (int i = 0; i < 4; ++i) total += __shfl_sync(0xffffffffu, sum, first + i);
  }}
  return total;
}}
"""


def gather_sums(
    slots: Any, slot: Any, ranks: Any, row: Any, failure: Any, state: tirx.Buffer
) -> tirx.Expr:
    """Wait for the sums of all ranks, and return their sum, in every lane of a warp.

    Parameters
    ----------
    slots : int64
        Address of this rank's memory.
    slot : int64
        The first rank's, see `first_slot`.
    ranks, row : int64
    failure : int64
        The state's word: nothing is waited for after a failure.
    state : tirx.Buffer
    """
    name = "qknorm_gather_sums"
    source = f"{_GIVES_UP}\n__device__ __forceinline__ float {name}{_GATHER}"
    words = T.address_of(tirx.BufferLoad(state, [T.int64(0)]))
    return cuda_func_call(
        name, slots, slot, ranks, row, failure, words, source_code=source, return_type="float32"
    )
