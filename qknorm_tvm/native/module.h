/* What the entry point (entry.c), the thread pool (pool.c) and the tables that the exporter writes
 * for each module (tables.c) share. SPDX-License-Identifier: Apache-2.0 */
#ifndef QKNORM_MODULE_H_
#define QKNORM_MODULE_H_

#include <stdint.h>
#include <tvm/ffi/c_api.h>

/* A function as TVM's code generator emits it. */
typedef int (*qkn_packed)(void* self, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result);

/* One scheduled function, and when it may be called. */
typedef struct {
  const char* name;
  qkn_packed call;
  int64_t min_rows;      /* rows from which it is chosen; at least row_tile */
  int64_t row_tile;      /* it takes a multiple of this many rows */
  int64_t stride_unit;   /* row strides of q, k and outputs are multiples of this many elements */
  int64_t alignment;     /* their data is aligned to this many bytes */
  int64_t min_out_bytes; /* the outputs have at least this many bytes, or a quarter of a cache's */
  int64_t bytes_per_task; /* CPUs: what one thread reads and writes at least */
  /* Of a kernel that waits for other ranks: how many of its blocks a GPU holds at once; else NULL. */
  int64_t (*resident_blocks)(int device);
} qkn_variant;

/* An instruction set: where cpuid reports it, and the register state it needs (see targets.py). */
typedef struct {
  const char* name;
  uint32_t leaf;
  uint32_t reg;
  uint32_t bit;
  uint32_t state;
  uint32_t subleaf;
} qkn_feature;

/* The functions for one spec and one CPU level (or for CUDA), first choice first. */
typedef struct {
  const qkn_variant* variants;
  int num_variants;
} qkn_code;

/* Dimensions that a call or a spec decides, by their names in operations.py; others are numbers.
 * Those from QKN_MAX_POSITION on are the tensor's own. Element types that a spec decides. */
enum {
  QKN_ROWS = -1,
  QKN_Q_COLS = -2,
  QKN_K_COLS = -3,
  QKN_KV_HEADS = -4,
  QKN_HEAD_DIM = -5,
  QKN_ROTARY_DIM = -6,
  QKN_SLOTS = -7,  /* at most as many as rows */
  QKN_SCALES = -8, /* 1, or one for each of kv_heads */
  QKN_MAX_POSITION = -9,
  QKN_BLOCKS = -10,
  QKN_BLOCK_SIZE = -11,
  QKN_RANKS = -12,     /* 1 to QKN_MAX_RANKS */
  QKN_PEER_WORDS = -13 /* QKN_PEER_TURNS, and one for each of as many rows as there may be */
};
enum { QKN_IN_DTYPE, QKN_OUT_DTYPE, QKN_ROTARY_DTYPE, QKN_CACHE_DTYPE, QKN_OWN_DTYPE };
enum { QKN_MAX_DIMS = 4 };

/* One tensor that an operation takes, see operations.py. */
typedef struct {
  int which; /* its name's place in qkn_names */
  int ndim;
  int64_t shape[QKN_MAX_DIMS];
  int dtype;
  DLDataType own_dtype;
  int is_output;
  int is_optional; /* a spec says whether it is given; otherwise it always is */
  int in_place_of; /* the input that an output may be all the same; -1: none */
  int is_stream;   /* rows of Q, K or V: their bytes are the work */
  int num_strides; /* functions take so many of its strides, the first ones */
} qkn_argument;

/* One scalar that an operation takes besides epsilon. */
typedef struct {
  const char* name;
  int is_int; /* otherwise float */
} qkn_scalar;

/* How an operation is called. */
typedef struct {
  const char* name;
  const char* summary; /* of what it takes, for messages */
  int num_outputs;     /* they come first */
  int num_tensors;
  int has_epsilon;
  const qkn_argument* arguments;
  const int* checked; /* places in arguments, in the order of the checks */
  /* What follows for a spec whose statistics are exchanged with other ranks. */
  int num_peer_tensors;
  int num_peer_scalars;
  const qkn_argument* peer_tensors;
  const qkn_scalar* peer_scalars;
} qkn_operation;

/* One spec held by the module; code[i] belongs to qkn_levels[i]. */
typedef struct {
  const char* text;
  int op;
  DLDataType in_dtype;
  DLDataType out_dtype;
  DLDataType rotary_dtype;
  DLDataType cache_dtype;
  int64_t q_cols; /* -1: open */
  int64_t k_cols;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t rotary_dim;
  uint64_t given; /* bit i: the operation's argument i is given; the bit after those: its peers */
  const qkn_code* code;
} qkn_spec;

/* One CPU level; a module for CUDA has a single one, without features. */
typedef struct {
  const char* name;
  const qkn_feature* features;
  int num_features;
} qkn_level;

/* What tables.c defines. */
#pragma GCC visibility push(hidden)
extern const qkn_spec qkn_specs[];
extern const int qkn_num_specs;
extern const qkn_level qkn_levels[];
extern const int qkn_num_levels;
extern const char* const qkn_metadata; /* JSON */
#pragma GCC visibility pop

/* The floating-point environment of a thread: how it rounds, flushes and traps, and its flags.
 *
 * Results must not depend on a caller's: code is run between these two, on every thread that runs
 * some. What a caller set up is as it was afterwards, its flags included. Writing the register is
 * what costs, so it is written only where it differs. */
#if defined(__x86_64__)
typedef uint32_t qkn_environment;
enum { QKN_FLAGS = 0x3f, QKN_DEFAULT_MODE = 0x1f80 }; /* of MXCSR */

static inline qkn_environment qkn_read_environment(void) {
  qkn_environment mxcsr;
  __asm__ volatile("stmxcsr %0" : "=m"(mxcsr) : : "memory");
  return mxcsr;
}

static inline void qkn_write_environment(qkn_environment mxcsr) {
  __asm__ volatile("ldmxcsr %0" : : "m"(mxcsr) : "memory");
}

static inline qkn_environment qkn_enter_environment(void) {
  qkn_environment caller = qkn_read_environment();
  if ((caller & ~(uint32_t)QKN_FLAGS) != QKN_DEFAULT_MODE) qkn_write_environment(QKN_DEFAULT_MODE);
  return caller;
}

static inline void qkn_leave_environment(qkn_environment caller) {
  if (qkn_read_environment() != caller) qkn_write_environment(caller);
}
#elif defined(__aarch64__)
typedef struct {
  uint64_t mode, flags; /* FPCR, whose default is 0, and FPSR */
} qkn_environment;

static inline qkn_environment qkn_read_environment(void) {
  qkn_environment environment;
  __asm__ volatile("mrs %0, fpcr" : "=r"(environment.mode) : : "memory");
  __asm__ volatile("mrs %0, fpsr" : "=r"(environment.flags) : : "memory");
  return environment;
}

static inline qkn_environment qkn_enter_environment(void) {
  qkn_environment caller = qkn_read_environment();
  if (caller.mode) __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0) : "memory");
  return caller;
}

static inline void qkn_leave_environment(qkn_environment caller) {
  qkn_environment own = qkn_read_environment();
  if (own.flags != caller.flags) {
    __asm__ volatile("msr fpsr, %0" : : "r"(caller.flags) : "memory");
  }
  if (own.mode != caller.mode) __asm__ volatile("msr fpcr, %0" : : "r"(caller.mode) : "memory");
}
#else
#error "no floating-point environment for this machine: add it here"
#endif

/* Thread pool: one in a process, whatever the number of modules loaded. */
typedef int (*qkn_task)(int task, void* group, void* closure);
void qkn_parallel(qkn_task task, void* closure, int num_tasks);
int qkn_get_num_threads(void);
void qkn_set_num_threads(int threads);

#endif
