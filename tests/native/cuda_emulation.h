/* Runs a generated CUDA kernel on the CPU, thread by thread: each is a fiber that gives way at every
 * shuffle and barrier. Shows indexing, guards and the order of arithmetic; nothing of the device, its
 * memory model or its speed.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <vector>

using std::max;
using std::min;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
/* One block runs at a time. */
#define __shared__ static

struct dim3_like {
  unsigned x;
};
static dim3_like threadIdx, blockIdx;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
typedef unsigned int uint;
typedef unsigned char uchar;
typedef _Float16 half;

struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  explicit nv_bfloat16(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    /* To nearest, ties to even; NaN stays NaN. */
    bits = value != value ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
  }
  explicit operator float() const {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
  }
};

struct alignas(4) nv_bfloat162 {
  nv_bfloat16 x, y;
};
struct alignas(4) half2 {
  half x, y;
};
struct alignas(8) nv_bfloat164 {
  nv_bfloat16 x, y, z, w;
};
struct alignas(8) half4 {
  half x, y, z, w;
};

static inline nv_bfloat16 __float2bfloat16_rn(float x) { return nv_bfloat16(x); }
static inline half __float2half_rn(float x) { return (half)x; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fmul_rn(float a, float b) { return a * b; }
/* Off by a unit in the last place, as a GPU's may be, or not: by turns. */
static inline float approximate_reciprocal(float x) {
  static int turn = 0;
  float inverse = 1.0f / x;
  turn = (turn + 1) % 3;
  return turn == 2 ? inverse : std::nextafterf(inverse, turn * 2 * inverse);
}
static inline float2 make_float2(float x, float y) { return {x, y}; }

enum { __NV_SATFINITE, __NV_E4M3 };
static inline unsigned char round_to_e4m3(float x) {
  unsigned char sign = signbit(x) ? 0x80 : 0;
  if (x != x) return sign | 0x7f;
  float size = fabsf(x);
  if (size >= 448) return sign | 0x7e;
  int exponent = std::max(size > 0 ? ilogbf(size) : -6, -6);
  /* Eighths, to nearest even; sixteen of them are the next exponent's eight. */
  int eighths = (int)rintf(ldexpf(size, 3 - exponent));
  return sign | (exponent + 6) * 8 + eighths;
}
static inline unsigned short __nv_cvt_float2_to_fp8x2(float2 x, int, int) {
  return round_to_e4m3(x.x) | round_to_e4m3(x.y) << 8;
}
/* For the stores that the kernels spell in PTX: a vector of words must be aligned to its size. */
template <typename... W>
static inline void STORE(const void* to, W... values) {
  uint32_t words[] = {values...};
  if ((uintptr_t)to % sizeof words) __builtin_trap();
  memcpy(const_cast<void*>(to), words, sizeof words);
}

namespace emulation {

constexpr int kWarp = 32, kMostThreads = 1024, kStack = 1 << 16;

struct barrier {
  int waiting = 0, members = 0;
  unsigned turn = 0;
};
static ucontext_t scheduler, fibers[kMostThreads];
static bool finished[kMostThreads];
static std::vector<char> stacks;
static barrier block, warps[kMostThreads / kWarp];
static uint32_t exchanged[2][kMostThreads];
static unsigned current;
static bool progress;
static std::function<void()> body;

static void wait_at(barrier* at) {
  unsigned turn = at->turn;
  if (++at->waiting == at->members) {
    at->waiting = 0;
    ++at->turn;
    progress = true;
  }
  while (at->turn == turn) swapcontext(&fibers[current], &scheduler);
}

static void run_fiber() {
  body();
  finished[current] = true;
  progress = true;
}

/* Returns whether every thread got to its end. */
static bool run_block(int threads, bool reverse) {
  stacks.resize((size_t)threads * kStack);
  block = {0, threads, 0};
  for (int warp = 0; warp < threads / kWarp; ++warp) warps[warp] = {0, kWarp, 0};
  for (int i = 0; i < threads; ++i) {
    finished[i] = false;
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = &stacks[(size_t)i * kStack];
    fibers[i].uc_stack.ss_size = kStack;
    fibers[i].uc_link = &scheduler;
    makecontext(&fibers[i], run_fiber, 0);
  }
  for (int left = threads; left > 0;) {
    progress = false;
    left = 0;
    for (int i = 0; i < threads; ++i) {
      current = reverse ? threads - 1 - i : i;
      if (finished[current]) continue;
      threadIdx.x = current;
      swapcontext(&scheduler, &fibers[current]);
      left += !finished[current];
    }
    if (left && !progress) return false; /* a barrier that not all threads come to */
  }
  return true;
}

}  // namespace emulation

static inline void __syncthreads() { emulation::wait_at(&emulation::block); }

static inline void __syncwarp() {
  using namespace emulation;
  wait_at(&warps[current / kWarp]);
}

/* Returns what the thread `source` of the same warp gives. */
template <typename T>
static inline T shuffle(unsigned mask, T value, unsigned source) {
  using namespace emulation;
  static_assert(sizeof(T) == 4);
  unsigned own = current;
  barrier* warp = &warps[own / kWarp];
  uint32_t* words = exchanged[warp->turn & 1];
  if (mask != 0xffffffffu) __builtin_trap();
  memcpy(&words[own], &value, 4);
  wait_at(warp);
  memcpy(&value, &words[source], 4);
  return value;
}

template <typename T>
static inline T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return shuffle(mask, value, emulation::current ^ lanes);
}

template <typename T>
static inline T __shfl_sync(unsigned mask, T value, int lane) {
  using namespace emulation;
  return shuffle(mask, value, current / kWarp * kWarp + lane % kWarp);
}

/* Ranks are threads of this process; each runs a library of its own. */
static inline float __uint_as_float(uint32_t word) {
  float value;
  memcpy(&value, &word, 4);
  return value;
}
static inline uint32_t __float_as_uint(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  return word;
}
static inline void PEER_STORE(int64_t address, float sum) {
  __atomic_store_n((uint32_t*)address, __float_as_uint(sum), __ATOMIC_RELAXED);
}
/* Other threads of the block go on while one waits, and other ranks. */
static inline void PEER_LOAD(float& sum, int64_t address) {
  using namespace emulation;
  sum = __uint_as_float(__atomic_load_n((uint32_t*)address, __ATOMIC_RELAXED));
  progress = true;
  sched_yield();
  swapcontext(&fibers[current], &scheduler);
}
static inline void PEER_CLOCK(uint64_t& now) {
  timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  now = at.tv_sec * 1000000000ull + at.tv_nsec;
}
static inline unsigned long long atomicCAS(unsigned long long* at, unsigned long long expected,
                                           unsigned long long value) {
  __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}
static inline void __threadfence_system() {}

/* Runs a grid; 0, or -1 where a block never ends. */
static int emulate(int64_t blocks, int threads, int reverse, std::function<void()> kernel) {
  emulation::body = kernel;
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx.x = (unsigned)(reverse ? blocks - 1 - i : i);
    if (!emulation::run_block(threads, reverse)) return -1;
  }
  return 0;
}
