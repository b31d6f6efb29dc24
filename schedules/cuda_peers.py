"""The exchange of a launch with other ranks: its protocol, and what the device does for it.

Each row is exchanged by itself. A block's first warp writes the row's sums of squares, of Q from
its first 16 lanes and of K from the others, to slots in every rank's memory, a lane for each rank;
then it reads its own rank's slots, a line of 128 bytes, until none is empty, and adds them up in
the order of ranks. So all ranks have the same bits, and no block waits for another one of its own
launch.

A row has three sets of slots, which its launches use in turn: ``set`` is counted in the rank's own
memory, row by row, so that launches of a graph, replays and eager ones agree. While a launch uses a
set it empties the one before, ``(set + 2) % 3``. All reads of that have ended, with the launch
before; and no other rank writes to it yet: it would be two launches of this row ahead, for each of
which it needs a sum of this rank's. (Emptying ``(set + 1) % 3`` would erase what a faster rank has
written already.) `tests/test_peer_protocol.py` searches all orders of small cases.

**No order of blocks, launches or ranks deadlocks**, if all ranks make the same launches with as
many rows each:

1. All blocks of a launch can be resident at once, beside those of the other ranks that share the
   GPU: the entry point launches no more. A block takes tiles of rows in increasing order. So every
   block of a launch that may start becomes resident.
2. A launch may start once the one before it on its stream has ended, or has let its dependents
   start: only after the sums of its blocks' last rows have come (``after_loads``: they are loaded
   last). By then all its blocks have become resident, and those of the same launch on the other
   ranks. So at most one launch of a stream has resident blocks while it waits for other ranks, and
   (1) counts it. Dependents that start at once would pile up: their resident blocks would keep out
   the blocks of another rank on this GPU for which they all wait.
3. Take the first launch that has not ended on some rank, and in it the first tile that waits for
   ever on some rank. All ranks run this launch, by (2) and (1). On each, the block of that tile has
   ended its earlier tiles, none of which waits for ever; so it has written its sums, and the tile
   does not wait.

A launch that waits longer than the state's timeout gives up: its sums are NaN, and it says which
rank's sum of which row did not come. Launches after it do not wait.

What was measured (H200, 1536/256 with rotation and cache, ranks as streams of one GPU, 42 launches
in a graph; ``tests/gpu/peer_times.py``; docs/tensor-parallel.md has all of it):

* Slots 8 bytes apart that every warp of a block polls: 3.64 us on one rank at M = 64, on eight
  5.47. A line of 128 bytes for each row instead, polled by every warp: 2.76 and 5.00; by one warp,
  which passes the sums on behind a second barrier: 3.02 and 4.51. At M = 1 the second barrier costs
  0.1 to 0.3 us.
* One launch falls behind three steps above 512 rows, on one GPU and on two: a block waits for the
  other ranks' sums of a row before it loads its next one.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.backend.cuda.op import cuda_func_call
from tvm.script import tirx as T

from qknorm_tvm.peers import EMPTY, FAILURE, MAX_RANKS, REPORT, SETS, TIMEOUT, TURNS

from .cuda_device import device_call

#: Reads between two looks at the clock: some hundred microseconds.
_READS = 512


def row_slots(state: Any, turn: Any, row: Any) -> Any:
    """Return where a row's slots begin in a rank's memory, in bytes."""
    rows = state.shape[0] - TURNS
    return (turn * rows + row) * (2 * MAX_RANKS * 4)


def next_turn(turn: Any) -> Any:
    """Return the set after one."""
    return T.Select(turn == T.int64(SETS - 1), T.int64(0), turn + 1)


def turn_before(turn: Any) -> Any:
    """Return the set before one."""
    return T.Select(turn == T.int64(0), T.int64(SETS - 1), turn - 1)


# Relaxed, of the system's scope: neither the compiler nor a cache keeps one back.
_STORE_SLOT = """(int64_t address, float sum) {
  asm volatile("st.relaxed.sys.global.f32 [%0], %1;" : : "l"(address), "f"(sum) : "memory");
}
"""


def store_slot(address: Any, total: Any) -> tirx.Expr:
    """Write a sum to a slot."""
    return device_call("qknorm_store_slot", address, total, code=_STORE_SLOT)


def empty_slot(address: Any) -> tirx.Expr:
    """Empty a slot."""
    return store_slot(address, T.reinterpret("float32", T.uint32(EMPTY)))


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
_GATHER = f"""(int64_t address, int64_t ranks, int64_t row, int64_t failure, int64_t* state) {{
  int rank = threadIdx.x % {MAX_RANKS}, first = threadIdx.x % 32 - rank;
  float sum = 0.0f;
  if (rank < ranks) {{
    uint64_t start = 0;
    bool waits = failure == 0;
    sum = __uint_as_float(0x{EMPTY:x}u);
    for (unsigned reads = 1; waits; ++reads) {{
      asm volatile("ld.relaxed.sys.global.f32 %0, [%1];" : "=f"(sum) : "l"(address) : "memory");
      waits = __float_as_uint(sum) == 0x{EMPTY:x}u;
      if (waits && reads % {_READS} == 0) waits = !qknorm_gives_up(state, &start, rank, row);
    }}
    if (__float_as_uint(sum) == 0x{EMPTY:x}u) sum = __uint_as_float(0x7fffffffu);
  }}
  float total = 0.0f;
  for (int other = 0; other < ranks; other += 4) {{
#pragma unroll
    for (int i = 0; i < 4; ++i) total += __shfl_sync(0xffffffffu, sum, first + other + i);
  }}
  return total;
}}
"""


def gather_sums(address: Any, ranks: Any, row: Any, failure: Any, state: tirx.Buffer) -> tirx.Expr:
    """Wait for the sums of all ranks, and return their sum: of Q in a warp's first half, of K.

    Parameters
    ----------
    address : int64
        The lane's slot in this rank's memory.
    ranks, row : int64
    failure : int64
        The state's word: nothing is waited for after a failure.
    state : tirx.Buffer
    """
    name = "qknorm_gather_sums"
    source = f"{_GIVES_UP}\n__device__ __forceinline__ float {name}{_GATHER}"
    words = T.address_of(tirx.BufferLoad(state, [T.int64(0)]))
    return cuda_func_call(
        name, address, ranks, row, failure, words, source_code=source, return_type="float32"
    )
