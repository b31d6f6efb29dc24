/* The entry points of an exported module, one for each operation that it holds. What each takes
 * comes from operations.py, by way of operations.h.
 *
 * Each checks every argument before anything is launched or written, returns at once for no rows,
 * picks the spec that fits the arguments and the generated function that fits this machine, the
 * number of rows and the layout, and calls it. So a caller from C++ gets the same checks and the
 * same choices as one from Python. It allocates nothing, computes in the default floating-point
 * mode whatever the caller's is, and leaves the caller's mode and flags as they were.
 *
 * operations.h, written by the exporter, is of the operations that a module holds: QKN_MAX_COLS,
 * QKN_CUDA, qkn_operations, the names of their tensors (qkn_names, and an enumeration: Q_OUT, ...),
 * and QKN_ENTRY_POINTS. What is of one module alone, its specs and functions, is in tables.c, which
 * module.h declares: so this file is compiled once for many modules.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <inttypes.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "module.h"
#include "operations.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define EXPORT __attribute__((visibility("default")))
/* For what every call goes through: compiled for each operation, whose tensors are then known. */
#define PER_OPERATION static inline __attribute__((always_inline))
/* For loops over its tensors, so that nothing is decided in a call that the table decides. */
#define UNROLLED _Pragma("GCC unroll 16")

/* One tensor, normalised: data with its offset, strides always there, in elements. */
typedef struct {
  int given; /* whether the call has it */
  char* data;
  DLDevice device;
  DLDataType dtype;
  int ndim;
  int64_t rows, cols; /* of two dimensions at the most: one has one row */
  int64_t item;       /* bytes of an element */
  int64_t shape[QKN_MAX_DIMS], strides[QKN_MAX_DIMS];
} tensor;

static int fail(const char* kind, const char* format, ...) {
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  TVMFFIErrorSetRaisedFromCStr(kind, message);
  return -1;
}

/* ---- what the machine can run -------------------------------------------------------------- */

static int active_level = -1;
static char unsupported[640]; /* why active_level is -1 */
static int64_t most_cached;   /* outputs of as many bytes may go past the caches */

#if defined(__x86_64__)
static int has_feature(const qkn_feature* feature) {
  uint32_t reg[4] = {0, 0, 0, 0};
  /* A list of features to do without, for tests and for a look at the other levels. */
  const char* disabled = getenv("QKNORM_TVM_DISABLE_CPU_FEATURES");
  size_t length = strlen(feature->name);
  for (const char* at = disabled; at && (at = strstr(at, feature->name)); at += length) {
    if ((at == disabled || at[-1] == ',') && (at[length] == ',' || !at[length])) return 0;
  }
  if (!__get_cpuid_count(feature->leaf, feature->subleaf, &reg[0], &reg[1], &reg[2], &reg[3])) {
    return 0;
  }
  if (!(reg[feature->reg] >> feature->bit & 1)) return 0;
  if (feature->state) {
    uint32_t leaf1[4] = {0, 0, 0, 0}, low, high;
    if (!__get_cpuid(1, &leaf1[0], &leaf1[1], &leaf1[2], &leaf1[3])) return 0;
    if (!(leaf1[2] >> 27 & 1)) return 0; /* the system does not save extended registers */
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & feature->state) != feature->state) return 0;
  }
  return 1;
}

/* A quarter of the last cache, in bytes; as much as there can be where the processor does not say.
 * (What sysconf says of AMD's is the sum of all that a socket has.) */
static int64_t most_cached_bytes(void) {
  uint32_t extended[4] = {0, 0, 0, 0}, reg[4];
  int64_t last = 0;
  unsigned leaf = 4; /* Intel's, of which AMD has a copy elsewhere */
  if (__get_cpuid(0x80000001, &extended[0], &extended[1], &extended[2], &extended[3]) &&
      (extended[2] >> 22 & 1)) {
    leaf = 0x8000001d;
  }
  for (unsigned i = 0; i < 8; ++i) {
    if (!__get_cpuid_count(leaf, i, &reg[0], &reg[1], &reg[2], &reg[3])) break;
    if (!(reg[0] & 31)) break; /* no more caches */
    int64_t line = (reg[1] & 0xfff) + 1, parts = (reg[1] >> 12 & 0x3ff) + 1;
    last = line * parts * ((int64_t)(reg[1] >> 22) + 1) * ((int64_t)reg[2] + 1);
  }
  return last ? last / 4 : INT64_MAX;
}
#else
static int has_feature(const qkn_feature* feature) { return (void)feature, 0; }
static int64_t most_cached_bytes(void) { return INT64_MAX; }
#endif

__attribute__((constructor)) static void choose_level(void) {
  size_t used = 0;
  most_cached = most_cached_bytes();
  for (int i = 0; i < qkn_num_levels; ++i) {
    const qkn_level* level = &qkn_levels[i];
    size_t before = used;
    int missing = 0;
    for (int f = 0; f < level->num_features; ++f) {
      if (has_feature(&level->features[f])) continue;
      used += (size_t)snprintf(unsupported + used, sizeof unsupported - used, "%s%s",
                               missing ? ", " : i ? "; " : "", level->features[f].name);
      if (used >= sizeof unsupported) used = sizeof unsupported - 1;
      ++missing;
    }
    if (!missing) {
      active_level = i;
      return;
    }
    if (i + 1 < qkn_num_levels) used = before; /* say what the least demanding level lacks */
  }
}

/* ---- reading arguments ---------------------------------------------------------------------- */

static const char* type_name(int32_t index) {
  switch (index) {
    case kTVMFFINone: return "None";
    case kTVMFFIInt: return "int";
    case kTVMFFIBool: return "bool";
    case kTVMFFIFloat: return "float";
    case kTVMFFIRawStr:
    case kTVMFFISmallStr:
    case kTVMFFIStr: return "str";
    case kTVMFFIOpaquePtr: return "a pointer";
    default: return "an object that is no tensor";
  }
}

static const char* dtype_name(DLDataType type, char* text, size_t size) {
  const char* base = type.code == kDLInt      ? "int"
                     : type.code == kDLUInt   ? "uint"
                     : type.code == kDLFloat  ? "float"
                     : type.code == kDLBfloat ? "bfloat"
                     : type.code == kDLBool   ? "bool"
                     : type.code == kDLComplex ? "complex"
                                               : NULL;
  if (base) {
    snprintf(text, size, type.lanes == 1 ? "%s%d" : "%s%dx%d", base, type.bits, type.lanes);
  } else {
    snprintf(text, size, "dtype(code %d, %d bits, %d lanes)", type.code, type.bits, type.lanes);
  }
  return text;
}

static const char* device_name(DLDevice device, char* text, size_t size) {
  switch (device.device_type) {
    case kDLCPU: snprintf(text, size, "the CPU"); break;
    case kDLCUDA: snprintf(text, size, "cuda:%d", device.device_id); break;
    case kDLCUDAHost: snprintf(text, size, "pinned host memory"); break;
    case kDLCUDAManaged: snprintf(text, size, "CUDA managed memory"); break;
    case kDLROCM: snprintf(text, size, "rocm:%d", device.device_id); break;
    default: snprintf(text, size, "device type %d", (int)device.device_type);
  }
  return text;
}

static int same_dtype(DLDataType a, DLDataType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

/* Bytes from a tensor's first row to its last: more than any machine has. */
static const int64_t kMaxSpan = (int64_t)1 << 58;

static __attribute__((noinline)) int read_tensor(const char* name, const TVMFFIAny* value, tensor* out) {
  const DLTensor* dl = NULL;
  if (value->type_index == kTVMFFITensor) {
    dl = (const DLTensor*)((const char*)value->v_obj + sizeof(TVMFFIObject));
  } else if (value->type_index == kTVMFFIDLTensorPtr) {
    dl = (const DLTensor*)value->v_ptr;
  }
  if (!dl) return fail("TypeError", "%s must be a tensor, got %s", name, type_name(value->type_index));
  out->given = 1;
  out->ndim = dl->ndim;
  out->dtype = dl->dtype;
  out->device = dl->device;
  out->item = (dl->dtype.bits * dl->dtype.lanes + 7) / 8;
  out->data = dl->data ? (char*)dl->data + dl->byte_offset : NULL;
  out->rows = dl->ndim == 2 ? dl->shape[0] : 1;
  out->cols = dl->ndim >= 1 ? dl->shape[dl->ndim - 1] : 1;
  if (dl->ndim == 1 || dl->ndim == 2) {
    out->shape[0] = dl->shape[0];
    out->strides[0] = dl->strides ? dl->strides[0] : dl->ndim == 2 ? out->cols : 1;
    if (dl->ndim == 2) {
      out->shape[1] = out->cols;
      out->strides[1] = dl->strides ? dl->strides[1] : 1;
    }
    return 0;
  }
  int64_t packed = 1;
  for (int d = dl->ndim - 1; d >= 0; --d) {
    if (d >= QKN_MAX_DIMS) continue; /* refused before anything looks at it */
    out->shape[d] = dl->shape[d];
    out->strides[d] = dl->strides ? dl->strides[d] : packed;
    if (__builtin_mul_overflow(packed, dl->shape[d], &packed)) packed = kMaxSpan;
  }
  return 0;
}

static int check_device(const char* name, const tensor* t, DLDevice first) {
  char got[64], wanted[64];
#if QKN_CUDA
  if (t->device.device_type != kDLCUDA) {
    return fail("ValueError", "%s must be on a CUDA device, got a tensor on %s", name,
                device_name(t->device, got, sizeof got));
  }
  if (t->device.device_id != first.device_id) {
    return fail("ValueError", "%s must be on %s like q, got a tensor on %s", name,
                device_name(first, wanted, sizeof wanted), device_name(t->device, got, sizeof got));
  }
#else
  (void)first, (void)wanted;
  if (t->device.device_type != kDLCPU && t->device.device_type != kDLCUDAHost) {
    return fail("ValueError", "%s must be on the CPU, got a tensor on %s", name,
                device_name(t->device, got, sizeof got));
  }
#endif
  return 0;
}

static int check_kind(const char* name, const tensor* t, int ndim, DLDataType dtype) {
  char got[64], wanted[64];
  if (t->ndim != ndim) {
    return fail("ValueError", "%s must have %d dimension%s, got %d", name, ndim,
                ndim == 1 ? "" : "s", t->ndim);
  }
  if (!same_dtype(t->dtype, dtype)) {
    return fail("TypeError", "%s must be %s, got %s", name, dtype_name(dtype, wanted, sizeof wanted),
                dtype_name(t->dtype, got, sizeof got));
  }
  return 0;
}

static int check_contiguous(const char* name, const tensor* t) {
  int64_t stride = t->strides[t->ndim - 1];
  if (t->cols <= 1 || stride == 1) return 0;
  return fail("ValueError",
              "%s must be contiguous in its last dimension (stride 1), got stride %" PRId64, name,
              stride);
}

static int check_data(const char* name, const tensor* t) {
  if (!t->data) return fail("ValueError", "%s must have data, got a null pointer", name);
#if QKN_CUDA
  if ((uintptr_t)t->data % (uintptr_t)t->item) {
    return fail("ValueError", "%s must be aligned to its %d-byte elements, got address %p", name,
                (int)t->item, (void*)t->data);
  }
#endif
  return 0;
}

/* Check a one-dimensional tensor, whose length is right where `fits`: in words, `bound` `count`
 * elements, like `whose`. */
static int check_list(const char* name, const tensor* t, DLDataType dtype, int fits,
                      const char* bound, int64_t count, const char* whose) {
  if (check_kind(name, t, 1, dtype)) return -1;
  if (!fits) {
    return fail("ValueError", "%s must have %s%" PRId64 " elements like %s, got %" PRId64, name,
                bound, count, whose, t->cols);
  }
  if (t->cols == 0) return 0;
  return check_contiguous(name, t) || check_data(name, t) ? -1 : 0;
}

/* Check dtype, rank, shape, strides and data of a tensor of rows; cols < 0 takes any. */
static int check_tensor(const char* name, tensor* t, int ndim, DLDataType dtype, int64_t rows,
                        int64_t cols, int is_output) {
  if (check_kind(name, t, ndim, dtype)) return -1;
  if (t->rows != rows && ndim == 2) {
    return fail("ValueError", "%s must have %" PRId64 " rows like q, got %" PRId64, name, rows,
                t->rows);
  }
  if (cols >= 0 && t->cols != cols) {
    return fail("ValueError", "%s must have %" PRId64 " %s, got %" PRId64, name, cols,
                ndim == 1 ? "elements" : "columns", t->cols);
  }
  if (rows < 0) return fail("ValueError", "%s must have 0 or more rows, got %" PRId64, name, rows);
  if (t->cols < 1 && cols != 0) {
    return fail("ValueError", "%s must have at least 1 column, got %" PRId64, name, t->cols);
  }
  if (t->cols > QKN_MAX_COLS) {
    return fail("ValueError", "%s must have at most %d columns, got %" PRId64, name, QKN_MAX_COLS,
                t->cols);
  }
  if (rows == 0) return 0; /* nothing will be touched */
  if (check_contiguous(name, t)) return -1;
  if (ndim == 1) return check_data(name, t);
  if (rows == 1) t->strides[0] = t->cols; /* a stride over one row means nothing */
  if (t->strides[0] < 0) {
    return fail("ValueError", "%s must have a row stride of 0 or more, got %" PRId64, name,
                t->strides[0]);
  }
  if (is_output && t->strides[0] < t->cols) {
    return fail("ValueError",
                "%s must have rows that do not overlap (row stride %" PRId64 " or more), got row "
                "stride %" PRId64,
                name, t->cols, t->strides[0]);
  }
  if (check_data(name, t)) return -1;
  /* From here on no address, and no sum over the tensors of a call, wraps. */
  int64_t span;
  if (__builtin_mul_overflow(rows - 1, t->strides[0], &span) ||
      __builtin_mul_overflow(span, t->item, &span) || span > kMaxSpan ||
      (uintptr_t)t->data > UINTPTR_MAX - (uintptr_t)(span + t->cols * t->item)) {
    return fail("ValueError",
                "%s must lie within the address space, got %" PRId64 " rows of row stride %" PRId64
                " at %p",
                name, rows, t->strides[0], (void*)t->data);
  }
  return 0;
}

/* Check a paged cache, [blocks, block_size, heads, head_dim]; the first two are `like`'s. */
static int check_cache(const char* name, tensor* t, DLDataType dtype, const int64_t* wanted,
                       const char* like) {
  if (check_kind(name, t, 4, dtype)) return -1;
  static const char* const dimensions[] = {"blocks", "slots in a block", "heads", "columns in a head"};
  for (int d = 0; d < 4; ++d) {
    if (wanted[d] >= 0 && t->shape[d] != wanted[d]) {
      return fail("ValueError", "%s must have %" PRId64 " %s%s%s, got %" PRId64, name, wanted[d],
                  dimensions[d], d < 2 ? " like " : "", d < 2 ? like : "", t->shape[d]);
    }
  }
  int64_t slots;
  if (t->shape[0] < 0 || t->shape[1] < 1 ||
      __builtin_mul_overflow(t->shape[0], t->shape[1], &slots) || slots > INT32_MAX) {
    return fail("ValueError",
                "%s must have 0 to %d slots, in blocks of 1 or more, got %" PRId64
                " blocks of %" PRId64,
                name, INT32_MAX, t->shape[0], t->shape[1]);
  }
  if (slots == 0) return 0; /* nothing can be stored */
  if (check_contiguous(name, t)) return -1;
  /* Two places are never the same if each stride reaches beyond what the smaller ones span. */
  int64_t ascending[3], extents[3], reach = t->shape[3], step = 0;
  int count = 0, overlaps = 0;
  for (int d = 0; d < 3; ++d) {
    if (t->shape[d] == 1) {
      t->strides[d] = 0; /* means nothing */
      continue;
    }
    int at = count++;
    for (; at > 0 && ascending[at - 1] > t->strides[d]; --at) {
      ascending[at] = ascending[at - 1];
      extents[at] = extents[at - 1];
    }
    ascending[at] = t->strides[d];
    extents[at] = t->shape[d];
  }
  for (int i = 0; i < count && !overlaps; ++i) {
    overlaps = ascending[i] < reach ||
               __builtin_mul_overflow(extents[i] - 1, ascending[i], &step) ||
               step > kMaxSpan / t->item - reach;
    if (!overlaps) reach += step;
  }
  if (overlaps || (uintptr_t)t->data > UINTPTR_MAX - (uintptr_t)(reach * t->item)) {
    return fail("ValueError",
                "%s must have slots that do not overlap, within the address space, got strides "
                "(%" PRId64 ", %" PRId64 ", %" PRId64 ", 1) for shape (%" PRId64 ", %" PRId64
                ", %" PRId64 ", %" PRId64 ")",
                name, t->strides[0], t->strides[1], t->strides[2], t->shape[0], t->shape[1],
                t->shape[2], t->shape[3]);
  }
  return check_data(name, t);
}

/* ---- overlap -------------------------------------------------------------------------------- */

/* One past the last byte of a tensor's memory. */
PER_OPERATION uintptr_t end_of(const tensor* t, int ndim) {
  int64_t last = t->cols;
  for (int d = 0; d < ndim - 1; ++d) last += (t->shape[d] - 1) * t->strides[d];
  return (uintptr_t)t->data + (uintptr_t)(last * t->item);
}

/* Whether two caches of one shape and strides, the second `distance` elements after the first,
 * share an element: whether a difference of two places is that distance. Strides are compared from
 * the largest on; each reaches beyond what the smaller ones span, so that two multiples of it can
 * be right at the most. */
static int shifted_overlap(const tensor* t, int64_t distance, int64_t below) {
  int largest = -1;
  for (int d = 0; d < 3; ++d) {
    if (t->shape[d] == 1 || t->strides[d] >= below) continue;
    if (largest < 0 || t->strides[d] > t->strides[largest]) largest = d;
  }
  if (largest < 0) return distance < t->cols && -distance < t->cols;
  int64_t stride = t->strides[largest], most = t->shape[largest] - 1;
  int64_t steps = distance / stride - (distance % stride < 0);
  for (int64_t n = steps; n <= steps + 1; ++n) {
    if (n < -most || n > most) continue;
    if (shifted_overlap(t, distance - n * stride, stride)) return 1;
  }
  return 0;
}

static int cache_overlap(const tensor* a, const tensor* b) {
  int64_t distance = (int64_t)((uintptr_t)b->data - (uintptr_t)a->data);
  int same = a->ndim == b->ndim && a->item == b->item && distance % a->item == 0;
  for (int d = 0; same && d < a->ndim; ++d) {
    same = a->shape[d] == b->shape[d] && a->strides[d] == b->strides[d];
  }
  /* Caches interleave; nothing else has a reason to lie between a cache's elements. */
  return same ? shifted_overlap(a, distance / a->item, INT64_MAX) : 1;
}

/* Whether any byte belongs to a row of both, whose memory from the first byte to the last has some
 * in common. Exactly: slices of one buffer may interleave. */
static __attribute__((noinline)) int overlap(const tensor* a, const tensor* b) {
  if (a->ndim > 2 || b->ndim > 2) return cache_overlap(a, b);
  uintptr_t a_start = (uintptr_t)a->data, b_start = (uintptr_t)b->data;
  uintptr_t a_row = (uintptr_t)(a->cols * a->item), b_row = (uintptr_t)(b->cols * b->item);
  uintptr_t a_step = a->rows > 1 ? (uintptr_t)(a->strides[0] * a->item) : 0;
  uintptr_t b_step = b->rows > 1 ? (uintptr_t)(b->strides[0] * b->item) : 0;
  if (a_step == b_step && a_step >= a_row + b_row) {
    /* Rows side by side in one buffer: compare places within its rows. */
    uintptr_t distance = a_start <= b_start ? (b_start - a_start) % a_step
                                            : a_step - 1 - (a_start - b_start - 1) % a_step;
    return distance < a_row || distance + b_row > a_step;
  }
  int64_t i = 0, j = 0;
  while (i < a->rows && j < b->rows) {
    uintptr_t at = a_start + (uintptr_t)i * a_step, bt = b_start + (uintptr_t)j * b_step;
    if (at + a_row <= bt) {
      if (a_step == 0) return 0;
      ++i;
    } else if (bt + b_row <= at) {
      if (b_step == 0) return 0;
      ++j;
    } else {
      return 1;
    }
  }
  return 0;
}

static int in_place(const tensor* out, const tensor* in) {
  return out->data == in->data && out->item == in->item &&
         (out->rows <= 1 || out->strides[0] == in->strides[0]);
}

/* Tensors without an element share nothing. Only some may have none where q has rows. */
PER_OPERATION int is_empty(const qkn_argument* a, const tensor* t) {
  if (a->is_optional && !t[a->which].given) return 1;
  if (a->shape[0] == QKN_SLOTS || a->shape[0] == QKN_BLOCKS) return t[a->which].shape[0] == 0;
  return a->shape[0] == QKN_MAX_POSITION && t[a->which].shape[0] == 0;
}

PER_OPERATION int check_overlap(const qkn_operation* op, const tensor* t) {
  uintptr_t start[NUM_TENSORS], end[NUM_TENSORS];
  UNROLLED
  for (int i = 0; i < op->num_tensors; ++i) {
    const tensor* s = &t[op->arguments[i].which];
    int empty = is_empty(&op->arguments[i], t);
    start[i] = empty ? UINTPTR_MAX : (uintptr_t)s->data;
    end[i] = empty ? 0 : end_of(s, op->arguments[i].ndim);
  }
  for (int o = 1; o < op->num_outputs; ++o) {
    for (int earlier = 0; earlier < o; ++earlier) {
      int out = op->arguments[o].which, other = op->arguments[earlier].which;
      if (end[o] <= start[earlier] || end[earlier] <= start[o]) continue;
      if (overlap(&t[out], &t[other])) {
        return fail("ValueError", "%s must not overlap %s, got tensors that share memory",
                    qkn_names[out], qkn_names[other]);
      }
    }
  }
  for (int o = 0; o < op->num_outputs; ++o) {
    int out = op->arguments[o].which, own = op->arguments[o].in_place_of;
    for (int i = op->num_outputs; i < op->num_tensors; ++i) {
      int in = op->arguments[i].which;
      if (end[o] <= start[i] || end[i] <= start[o]) continue;
      if ((in == own && in_place(&t[out], &t[in])) || !overlap(&t[out], &t[in])) continue;
      if (in == own) {
        return fail("ValueError",
                    "%s must be %s itself (same address, strides and element size) or not overlap "
                    "it, got tensors that share memory otherwise",
                    qkn_names[out], qkn_names[in]);
      }
      return fail("ValueError", "%s must not overlap %s, got tensors that share memory",
                  qkn_names[out], qkn_names[in]);
    }
  }
  return 0;
}

/* ---- calling -------------------------------------------------------------------------------- */

#if QKN_CUDA
/* In the generated CUDA file: 0, or an error raised, saying why the device cannot run this. */
int qkn_check_device(int device_id);
#else
static _Thread_local int call_tasks = 1;

/* What TVM's generated code calls for a parallel loop. */
static int parallel_launch(qkn_task task, void* closure, int num_task) {
  (void)num_task;
  qkn_parallel(task, closure, call_tasks);
  return 0;
}

/* TVM's code reaches the launch through this pointer, which it leaves weak and null. */
__attribute__((visibility("hidden"))) int (*__TVMBackendParallelLaunch)(qkn_task, void*, int) =
    parallel_launch;

static void set_tasks(const qkn_variant* v, int64_t bytes) {
  int64_t tasks = bytes / v->bytes_per_task;
  call_tasks = 1;
  if (tasks > 1) {
    int threads = qkn_get_num_threads();
    /* Two tasks a thread: a thread that is taken off its processor holds up less. */
    int64_t most = threads > 1 ? 2 * (int64_t)threads : 1;
    call_tasks = (int)(tasks < threads ? tasks : tasks < most ? threads : most);
  }
}
#endif

PER_OPERATION int fits(const qkn_variant* v, const qkn_operation* op, const tensor* t, int64_t rows,
                       int64_t out_bytes) {
  if (rows < v->min_rows) return 0;
  if (out_bytes < v->min_out_bytes && out_bytes < most_cached) return 0;
  UNROLLED
  for (int i = 0; i < op->num_tensors; ++i) {
    const tensor* s = &t[op->arguments[i].which];
    if (!op->arguments[i].num_strides || !s->given) continue;
    if ((uintptr_t)s->data % (uintptr_t)v->alignment) return 0;
    UNROLLED
    for (int d = 0; d < op->arguments[i].num_strides; ++d) {
      if (s->strides[d] % v->stride_unit) return 0;
    }
  }
#if !QKN_CUDA
  /* Past the caches pays for lines that are not in them; in place they just have been read. */
  if (v->min_out_bytes > 0 && (t[Q_OUT].data == t[Q].data || t[K_OUT].data == t[K].data)) return 0;
#endif
  /* Functions that rely on alignment read gamma as vectors too, of 16 bytes at the most. */
  if (v->alignment > 4 && t[GAMMA_Q].given) {
    uintptr_t gamma = (uintptr_t)(v->alignment < 16 ? v->alignment : 16);
    if ((uintptr_t)t[GAMMA_Q].data % gamma || (uintptr_t)t[GAMMA_K].data % gamma) return 0;
  }
  return 1;
}

/* What a call gives by which its launch exchanges statistics with other ranks. */
typedef struct {
  int given;
  int64_t rank, share; /* of those that its state is of; how many launches share the GPU */
  TVMFFIAny scalars[QKN_MAX_SCALARS];
} exchange;

static void pass_int(TVMFFIAny* args, int32_t* used, int64_t value) {
  args[*used] = (TVMFFIAny){.type_index = kTVMFFIInt};
  args[(*used)++].v_int64 = value;
}

#if QKN_CUDA
/* The blocks of a launch that waits for other ranks: all must run at once, beside those of others
 * that share the GPU, and where none does beside kernels of other streams. 0: there is no room. */
static int64_t blocks_of(const qkn_variant* v, const tensor* t, int64_t rows, int64_t share) {
  int64_t resident = v->resident_blocks(t[Q].device.device_id);
  int64_t most = resident / (share > 1 ? share : 2);
  return rows < most ? rows : most;
}
#endif

PER_OPERATION int call_variant(const qkn_variant* v, const qkn_operation* op, const tensor* t,
                               int64_t rows, double epsilon, const exchange* peers) {
  DLTensor dl[NUM_TENSORS];
  int64_t shape[NUM_TENSORS][QKN_MAX_DIMS], strides[NUM_TENSORS][QKN_MAX_DIMS];
  /* The tensors, scalars, the numbers of tiles and blocks, and strides: three a tensor at most. */
  TVMFFIAny args[4 * NUM_TENSORS + QKN_MAX_SCALARS + 3], result = {.type_index = kTVMFFINone};
  int32_t used = 0;
  UNROLLED
  for (int i = 0; i < op->num_tensors; ++i) {
    const tensor* s = &t[op->arguments[i].which];
    if (!s->given) continue;
    UNROLLED
    for (int d = 0; d < op->arguments[i].ndim; ++d) {
      shape[i][d] = op->arguments[i].shape[d] == QKN_ROWS ? rows : s->shape[d];
      strides[i][d] = s->strides[d];
    }
    strides[i][op->arguments[i].ndim - 1] = 1; /* of one column it means nothing */
    dl[i] = (DLTensor){.data = s->data,
                       .device = s->device,
                       .ndim = s->ndim,
                       .dtype = s->dtype,
                       .shape = shape[i],
                       .strides = strides[i],
                       .byte_offset = 0};
#if !QKN_CUDA
    dl[i].device = (DLDevice){kDLCPU, 0};
#endif
    args[used] = (TVMFFIAny){.type_index = kTVMFFIDLTensorPtr};
    args[used++].v_ptr = &dl[i];
  }
#if QKN_CUDA
  for (int i = 0; peers->given && i < op->num_peer_tensors; ++i) {
    const tensor* s = &t[op->peer_tensors[i].which];
    dl[op->num_tensors + i] = (DLTensor){.data = s->data,
                                         .device = s->device,
                                         .ndim = 1,
                                         .dtype = s->dtype,
                                         .shape = (int64_t*)s->shape,
                                         .strides = (int64_t*)s->strides,
                                         .byte_offset = 0};
    args[used] = (TVMFFIAny){.type_index = kTVMFFIDLTensorPtr};
    args[used++].v_ptr = &dl[op->num_tensors + i];
  }
#endif
  if (op->has_epsilon) {
    args[used] = (TVMFFIAny){.type_index = kTVMFFIFloat};
    args[used++].v_float64 = epsilon;
  }
#if QKN_CUDA
  for (int i = 0; peers->given && i < op->num_peer_scalars; ++i) args[used++] = peers->scalars[i];
#else
  (void)peers;
#endif
  pass_int(args, &used, rows / v->row_tile);
#if QKN_CUDA
  if (peers->given) {
    int64_t blocks = blocks_of(v, t, rows, peers->share);
    if (blocks < 1) {
      return fail("RuntimeError",
                  "cuda:%d must hold a block of each of %" PRId64 " launches that share it, got no "
                  "room for one",
                  t[Q].device.device_id, peers->share);
    }
    pass_int(args, &used, blocks);
  }
#endif
  UNROLLED
  for (int i = 0; i < op->num_tensors; ++i) {
    const tensor* s = &t[op->arguments[i].which];
    if (!s->given) continue;
    UNROLLED
    for (int d = 0; d < op->arguments[i].num_strides; ++d) {
      pass_int(args, &used, s->strides[d] / v->stride_unit);
    }
  }
  return v->call(NULL, args, used, &result);
}

PER_OPERATION int run(const qkn_code* code, const qkn_operation* op, tensor* t, int64_t rows,
                      double epsilon, const exchange* peers) {
  int64_t row_out_bytes = 0, row_bytes = 0;
  UNROLLED
  for (int i = 0; i < op->num_tensors; ++i) {
    const tensor* s = &t[op->arguments[i].which];
    if (!s->given) continue;
    if (op->arguments[i].ndim == 4) row_bytes += s->shape[2] * s->cols * s->item;
    if (!op->arguments[i].is_stream) continue;
    row_bytes += s->cols * s->item;
    if (op->arguments[i].is_output) row_out_bytes += s->cols * s->item;
  }
  int64_t out_bytes = rows * row_out_bytes;
  while (rows > 0) {
    const qkn_variant* chosen = NULL;
    for (int i = 0; i < code->num_variants && !chosen; ++i) {
      if (fits(&code->variants[i], op, t, rows, out_bytes)) chosen = &code->variants[i];
    }
    if (!chosen) return fail("RuntimeError", "this module has no code for this layout (a bug)");
    int64_t done = rows / chosen->row_tile * chosen->row_tile;
#if QKN_CUDA
    (void)row_bytes;
#else
    set_tasks(chosen, done * row_bytes);
#endif
    if (call_variant(chosen, op, t, done, epsilon, peers)) return -1;
    rows -= done;
    if (rows == 0) break;
    UNROLLED
    for (int i = 0; i < op->num_tensors; ++i) {
      tensor* s = &t[op->arguments[i].which];
      int64_t of_rows = op->arguments[i].shape[0];
      if (!s->given || (of_rows != QKN_ROWS && of_rows != QKN_SLOTS)) continue;
      int64_t steps = s->shape[0] < done ? s->shape[0] : done;
      s->data += steps * (s->ndim == 1 ? 1 : s->strides[0]) * s->item;
      s->shape[0] -= steps;
    }
  }
  return 0;
}

/* ---- exported functions --------------------------------------------------------------------- */

static DLDataType stored_dtype(DLDataType type) {
  if (type.code != kDLUInt || type.lanes != 1) return type;
  if (type.bits == 16) return (DLDataType){kDLBfloat, 16, 1};
  return type.bits == 8 ? (DLDataType){kDLFloat8_e4m3fn, 8, 1} : type;
}

/* With one more argument, of 1, tensors of bfloat16 come as uint16 and those of float8 as uint8:
 * NumPy has neither in a form that DLPack knows. (Its float16 comes as itself: taken for bfloat16's
 * storage too, one would pass for the other.) */
PER_OPERATION int read_flags(const qkn_operation* op, const TVMFFIAny* args, int32_t num_args,
                             int* bits16, int* has_peers) {
  int expected = op->num_tensors + op->has_epsilon;
  int peers = op->num_peer_tensors + op->num_peer_scalars;
  *bits16 = 0;
  *has_peers = QKN_CUDA && peers && num_args >= expected + peers;
  if (*has_peers) expected += peers;
  if (num_args == expected) return 0;
  if (num_args != expected + 1) {
    return fail("TypeError", "%s takes %s, got %d", op->name, op->summary, num_args);
  }
  if (args[expected].type_index != kTVMFFIInt && args[expected].type_index != kTVMFFIBool) {
    return fail("TypeError", "storage must be an int, got %s",
                type_name(args[expected].type_index));
  }
  *bits16 = args[expected].v_int64 == 1;
  return 0;
}

static int read_epsilon(const TVMFFIAny* value, double* epsilon) {
  if (value->type_index == kTVMFFIFloat) {
    *epsilon = value->v_float64;
  } else if (value->type_index == kTVMFFIInt) {
    *epsilon = (double)value->v_int64;
  } else {
    return fail("TypeError", "epsilon must be a float, got %s", type_name(value->type_index));
  }
  if (*epsilon != *epsilon) return fail("ValueError", "epsilon must be a number, got nan");
  return 0;
}

#if QKN_CUDA
/* Read and check what follows epsilon in a call with peers. */
static __attribute__((noinline)) int read_peers(const qkn_operation* op, const TVMFFIAny* args,
                                                tensor* t, exchange* peers) {
  static const DLDataType int64 = {kDLInt, 64, 1};
  for (int i = 0; i < op->num_peer_tensors; ++i) {
    int name = op->peer_tensors[i].which;
    if (read_tensor(qkn_names[name], &args[i], &t[name])) return -1;
    if (check_device(qkn_names[name], &t[name], t[Q].device)) return -1;
    if (check_kind(qkn_names[name], &t[name], 1, int64)) return -1;
    if (check_contiguous(qkn_names[name], &t[name]) || check_data(qkn_names[name], &t[name])) return -1;
    t[name].strides[0] = 1; /* of one element it means nothing */
  }
  int64_t ranks = t[PEERS].cols, most = t[PEER_STATE].cols - QKN_PEER_TURNS;
  if (ranks < 1 || ranks > QKN_MAX_RANKS) {
    return fail("ValueError", "peers must have 1 to %d elements, got %" PRId64, QKN_MAX_RANKS, ranks);
  }
  if (t[Q].rows > most) {
    return fail("ValueError",
                "q must have at most %" PRId64 " rows, for which peer_state has turns, got %" PRId64,
                most < 0 ? 0 : most, t[Q].rows);
  }
  for (int i = 0; i < op->num_peer_scalars; ++i) {
    const qkn_scalar* s = &op->peer_scalars[i];
    const TVMFFIAny* given = &args[op->num_peer_tensors + i];
    int is_int = given->type_index == kTVMFFIInt;
    peers->scalars[i] = *given;
    if (s->is_int ? !is_int : !is_int && given->type_index != kTVMFFIFloat) {
      return fail("TypeError", "%s must be %s, got %s", s->name, s->is_int ? "an int" : "a float",
                  type_name(given->type_index));
    }
    if (s->is_int) continue;
    double number = is_int ? (double)given->v_int64 : given->v_float64;
    if (!(number > 0)) return fail("ValueError", "%s must be over 0, got %g", s->name, number);
    peers->scalars[i] = (TVMFFIAny){.type_index = kTVMFFIFloat};
    peers->scalars[i].v_float64 = number;
  }
  peers->given = 1;
  peers->rank = peers->scalars[PEER_RANK].v_int64;
  peers->share = peers->scalars[PEER_SHARE].v_int64;
  if (peers->rank < 0 || peers->rank >= ranks) {
    return fail("ValueError", "peer_rank must be from 0 to %" PRId64 ", got %" PRId64, ranks - 1,
                peers->rank);
  }
  if (peers->share < 1 || peers->share > 1 << 16) {
    return fail("ValueError", "peer_share must be from 1 to %d, got %" PRId64, 1 << 16, peers->share);
  }
  return 0;
}
#endif

/* Whether a spec's choices are those that a call's tensors show. */
static int has_choices(const qkn_spec* s, const tensor* t, uint64_t given) {
  if (s->given != given) return 0;
  if (t[COS_SIN_CACHE].given && (!same_dtype(s->rotary_dtype, t[COS_SIN_CACHE].dtype) ||
                                 s->rotary_dim != t[COS_SIN_CACHE].cols)) {
    return 0;
  }
  return !t[K_CACHE].given || (same_dtype(s->cache_dtype, t[K_CACHE].dtype) &&
                               s->head_dim == t[K_CACHE].cols);
}

PER_OPERATION int find_spec(int op, const tensor* t, uint64_t given, int* index) {
  char in_type[64], out_type[64];
  int of_op = 0, by_type = -1, by_cols = -1, last = 0, has_out = t[Q_OUT].given;
  for (int i = 0; i < qkn_num_specs; ++i) {
    const qkn_spec* s = &qkn_specs[i];
    if (s->op != op) continue;
    ++of_op;
    last = i;
    if (!same_dtype(s->in_dtype, t[Q].dtype)) continue;
    if (has_out && !same_dtype(s->out_dtype, t[Q_OUT].dtype)) continue;
    by_type = i;
    if ((s->q_cols < 0 || s->q_cols == t[Q].cols) && (s->k_cols < 0 || s->k_cols == t[K].cols)) {
      by_cols = i;
      if (!has_choices(s, t, given)) continue;
      *index = i;
      return 0;
    }
  }
  if (of_op == 1) { /* its own check will say what does not fit */
    *index = last;
    return 0;
  }
  if (by_cols >= 0) {
    return fail("ValueError",
                "the tensors given, the dtypes and columns of cos_sin_cache and those of k_cache "
                "must be as in one of this module's specs (it has %d of this operation), got others",
                of_op);
  }
  if (by_type >= 0) {
    return fail("ValueError",
                "q and k must have the columns of one of this module's specs, got %" PRId64
                " and %" PRId64,
                t[Q].cols, t[K].cols);
  }
  dtype_name(t[Q].dtype, in_type, sizeof in_type);
  if (!has_out) {
    return fail("TypeError", "q must have the dtype of one of this module's specs, got %s", in_type);
  }
  return fail("TypeError", "q and q_out must have the dtypes of one of this module's specs, got %s "
              "and %s",
              in_type, dtype_name(t[Q_OUT].dtype, out_type, sizeof out_type));
}

/* Q and K have the columns of the spec, and all other tensors the columns of Q and K. */
PER_OPERATION int64_t extent(int64_t dimension, int which, const qkn_spec* spec, const tensor* t) {
  switch (dimension) {
    case QKN_Q_COLS: return which == Q ? spec->q_cols : t[Q].cols;
    case QKN_K_COLS: return which == K ? spec->k_cols : t[K].cols;
    case QKN_ROWS: return t[Q].rows;
    case QKN_KV_HEADS: return spec->kv_heads;
    case QKN_HEAD_DIM: return spec->head_dim;
    case QKN_ROTARY_DIM: return spec->rotary_dim;
    case QKN_BLOCKS: return which == K_CACHE ? -1 : t[K_CACHE].shape[0];
    case QKN_BLOCK_SIZE: return which == K_CACHE ? -1 : t[K_CACHE].shape[1];
    default: return dimension;
  }
}

PER_OPERATION int check_argument(const qkn_argument* a, const qkn_spec* spec, tensor* t) {
  const char* name = qkn_names[a->which];
  tensor* given = &t[a->which];
  DLDataType dtype = a->dtype == QKN_IN_DTYPE       ? spec->in_dtype
                     : a->dtype == QKN_OUT_DTYPE    ? spec->out_dtype
                     : a->dtype == QKN_ROTARY_DTYPE ? spec->rotary_dtype
                     : a->dtype == QKN_CACHE_DTYPE  ? spec->cache_dtype
                                                    : a->own_dtype;
  if (a->ndim == 4) {
    int64_t wanted[4];
    for (int d = 0; d < 4; ++d) wanted[d] = extent(a->shape[d], a->which, spec, t);
    return check_cache(name, given, dtype, wanted, qkn_names[K_CACHE]);
  }
  int64_t count = given->cols, q_rows = t[Q].rows;
  switch (a->shape[0]) {
    case QKN_SLOTS:
      return check_list(name, given, dtype, count <= q_rows, "at most ", q_rows, "q's rows");
    case QKN_SCALES: {
      int fits = count == 1 || count == spec->kv_heads;
      return check_list(name, given, dtype, fits, "1 or ", spec->kv_heads, "k's heads");
    }
    case QKN_ROWS:
      if (a->ndim == 1) {
        return check_list(name, given, dtype, count == q_rows, "", q_rows, "q's rows");
      }
  }
  int64_t rows = a->shape[0] == QKN_ROWS ? t[Q].rows : a->ndim == 2 ? given->rows : 1;
  int64_t cols = extent(a->shape[a->ndim - 1], a->which, spec, t);
  return check_tensor(name, given, a->ndim, dtype, rows, cols, a->is_output);
}

PER_OPERATION int check_arguments(const qkn_operation* op, const qkn_spec* spec, uint64_t given,
                                  tensor* t) {
  uint64_t others = spec->given ^ given;
  UNROLLED
  for (int i = 0; i < op->num_tensors; ++i) {
    const qkn_argument* a = &op->arguments[op->checked[i]];
    uint64_t bit = (uint64_t)1 << op->checked[i];
    if (others & bit) {
      return fail("ValueError",
                  spec->given & bit ? "%s must be a tensor for this module's spec (%s), got None"
                                    : "%s must be None for this module's spec (%s), got a tensor",
                  qkn_names[a->which], spec->text);
    }
    if ((given & bit) && check_argument(a, spec, t)) return -1;
  }
#if QKN_CUDA
  uint64_t peers = (uint64_t)1 << op->num_tensors;
  if (others & peers) {
    return fail("ValueError",
                spec->given & peers ? "peers must be given for this module's spec (%s), got none"
                                    : "peers must be none for this module's spec (%s), got some",
                spec->text);
  }
#endif
  return 0;
}

#if !QKN_CUDA
static int64_t number_at(const tensor* list, int64_t i) {
  int64_t number;
  memcpy(&number, list->data + i * list->item, sizeof number);
  return number;
}

/* Positions and slots, which the caller's memory holds: on GPUs they are not looked at. */
PER_OPERATION int check_indices(const tensor* t) {
  for (int64_t i = 0; t[POSITIONS].given && i < t[POSITIONS].cols; ++i) {
    int64_t position = number_at(&t[POSITIONS], i), end = t[COS_SIN_CACHE].rows;
    if (position < 0 || position >= end) {
      return fail("ValueError",
                  "positions must be less than cos_sin_cache's %" PRId64
                  " rows, and 0 or more, got %" PRId64 " in row %" PRId64,
                  end, position, i);
    }
  }
  for (int64_t i = 0; t[SLOT_MAPPING].given && i < t[SLOT_MAPPING].cols; ++i) {
    int64_t slot = number_at(&t[SLOT_MAPPING], i);
    int64_t end = t[K_CACHE].shape[0] * t[K_CACHE].shape[1];
    if (slot >= end) {
      return fail("ValueError",
                  "slot_mapping must be less than k_cache's %" PRId64 " slots, got %" PRId64
                  " in row %" PRId64,
                  end, slot, i);
    }
  }
  return 0;
}
#endif

PER_OPERATION int enter(int which, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result) {
  const qkn_operation* op = &qkn_operations[which];
  tensor t[NUM_TENSORS];
  double epsilon = 0;
  exchange peers;
  int bits16, has_peers, index = 0;
  if (active_level < 0) {
    return fail("RuntimeError",
                "this CPU cannot run this module: it lacks %s; export it with target='cpu', which "
                "holds code for every x86-64 level, or for this machine",
                unsupported);
  }
  if (read_flags(op, args, num_args, &bits16, &has_peers)) return -1;
  /* Of those that are not given an address is looked at too. */
  UNROLLED
  for (int i = 0; i < NUM_TENSORS; ++i) {
    t[i].given = 0;
    t[i].data = NULL;
  }
  uint64_t given = 0;
  UNROLLED
  for (int i = 0; i < op->num_tensors; ++i) {
    int name = op->arguments[i].which;
    if (op->arguments[i].is_optional && args[i].type_index == kTVMFFINone) continue;
    if (read_tensor(qkn_names[name], &args[i], &t[name])) return -1;
    given |= (uint64_t)1 << i;
  }
  if (op->has_epsilon && read_epsilon(&args[op->num_tensors], &epsilon)) return -1;
  for (int i = 0; bits16 && i < NUM_TENSORS; ++i) {
    if (t[i].given) t[i].dtype = stored_dtype(t[i].dtype);
  }
  UNROLLED
  for (int i = 0; i < op->num_tensors; ++i) {
    int name = op->arguments[op->checked[i]].which;
    if (t[name].given && check_device(qkn_names[name], &t[name], t[Q].device)) return -1;
  }
  peers.given = 0;
#if QKN_CUDA
  if (has_peers) {
    if (read_peers(op, &args[op->num_tensors + op->has_epsilon], t, &peers)) return -1;
    given |= (uint64_t)1 << op->num_tensors;
  }
#endif
  if (find_spec(which, t, given, &index)) return -1;
  const qkn_spec* spec = &qkn_specs[index];
  if (check_arguments(op, spec, given, t)) return -1;
  if (t[Q].rows > 0) {
    if (check_overlap(op, t)) return -1;
#if QKN_CUDA
    if (qkn_check_device(t[Q].device.device_id)) return -1;
#else
    if (check_indices(t)) return -1;
#endif
    if (run(&spec->code[active_level], op, t, t[Q].rows, epsilon, &peers)) return -1;
  }
  result->type_index = kTVMFFINone;
  result->zero_padding = 0;
  result->v_int64 = 0;
  return 0;
}

#define ENTRY_POINT(function, op)                                                               \
  EXPORT int __tvm_ffi_##function(void* self, const TVMFFIAny* args, int32_t num_args,          \
                                  TVMFFIAny* result) {                                          \
    (void)self;                                                                                 \
    qkn_environment caller = qkn_enter_environment();                                           \
    int failed = enter(op, args, num_args, result);                                             \
    qkn_leave_environment(caller);                                                              \
    return failed;                                                                              \
  }

QKN_ENTRY_POINTS(ENTRY_POINT)

static int return_text(const char* text, TVMFFIAny* result) {
  TVMFFIByteArray bytes = {text, strlen(text)};
  return TVMFFIStringFromByteArray(&bytes, result);
}

/* What the module holds, as JSON. */
EXPORT int __tvm_ffi_qknorm_metadata(void* self, const TVMFFIAny* args, int32_t num_args,
                                     TVMFFIAny* result) {
  (void)self, (void)args, (void)num_args;
  return return_text(qkn_metadata, result);
}

/* The level chosen for this machine; empty when it can run none. */
EXPORT int __tvm_ffi_qknorm_active_level(void* self, const TVMFFIAny* args, int32_t num_args,
                                         TVMFFIAny* result) {
  (void)self, (void)args, (void)num_args;
  return return_text(active_level < 0 ? "" : qkn_levels[active_level].name, result);
}

#if !QKN_CUDA
/* The outputs from which on a call stores past the caches, whatever a larger threshold says. */
EXPORT int __tvm_ffi_qknorm_most_cached_bytes(void* self, const TVMFFIAny* args, int32_t num_args,
                                              TVMFFIAny* result) {
  (void)self, (void)args, (void)num_args;
  result->type_index = kTVMFFIInt;
  result->zero_padding = 0;
  result->v_int64 = most_cached;
  return 0;
}

EXPORT int __tvm_ffi_qknorm_get_num_threads(void* self, const TVMFFIAny* args, int32_t num_args,
                                            TVMFFIAny* result) {
  (void)self, (void)args, (void)num_args;
  result->type_index = kTVMFFIInt;
  result->zero_padding = 0;
  result->v_int64 = qkn_get_num_threads();
  return 0;
}

/* set_num_threads(n): n < 1 returns to the default. */
EXPORT int __tvm_ffi_qknorm_set_num_threads(void* self, const TVMFFIAny* args, int32_t num_args,
                                            TVMFFIAny* result) {
  (void)self;
  if (num_args != 1 || args[0].type_index != kTVMFFIInt) {
    return fail("TypeError", "threads must be an int, got %s",
                num_args < 1 ? "nothing" : type_name(args[0].type_index));
  }
  int64_t threads = args[0].v_int64;
  qkn_set_num_threads(threads > 1 << 20 ? 1 << 20 : threads < 1 ? 0 : (int)threads);
  result->type_index = kTVMFFINone;
  result->zero_padding = 0;
  result->v_int64 = 0;
  return 0;
}
#endif
