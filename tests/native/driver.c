/* Calls an exported CPU module as a C program would, for a sanitizer or valgrind to watch.
 *
 *   driver MODULE.so MAX_ROWS CALLERS FMA IN-OUT-Q_COLS-K_COLS...      such as bf16-f32-33-5
 *
 * FMA is 1 where the module adds squares by a fused multiply-add, otherwise 0. Every operation that
 * the module has is called.
 *
 * Every tensor is a heap block of exactly its bytes, and so is every shape, every list of strides
 * and of arguments: one byte too far is an error of the sanitizer. Between the rows of a strided
 * tensor valgrind lets nobody read or write. Every result is compared bit by bit; calls that must
 * be refused have to be, with their outputs untouched. With CALLERS above 0 that many threads do
 * all of it at once while another keeps changing the number of threads. With -1 a list of arguments
 * is too short by one, with -2 an output by a byte: whoever watches must notice.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <tvm/ffi/c_api.h>

#if __has_include(<valgrind/memcheck.h>)
#include <valgrind/memcheck.h>
#else
#define VALGRIND_MAKE_MEM_NOACCESS(start, bytes) ((void)(start), (void)(bytes))
#define VALGRIND_MAKE_MEM_DEFINED(start, bytes) ((void)(start), (void)(bytes))
#endif

typedef int (*entry_point)(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);

enum { Q_OUT, K_OUT, GAMMA_Q, GAMMA_K, QK_VAR, Q, K, NUM_TENSORS };

typedef struct {
  const char* symbol;
  int num_outputs, num_tensors, has_epsilon;
  int tensors[NUM_TENSORS]; /* in the order of the call, outputs first */
} operation;

static const operation kOperations[] = {
    {"__tvm_ffi_apply_qk_rms_norm", 2, 7, 1, {Q_OUT, K_OUT, GAMMA_Q, GAMMA_K, QK_VAR, Q, K}},
    {"__tvm_ffi_row_mean_of_squares_qk", 1, 3, 0, {QK_VAR, Q, K}},
    {"__tvm_ffi_qk_rms_norm", 2, 6, 1, {Q_OUT, K_OUT, GAMMA_Q, GAMMA_K, Q, K}},
};
enum { APPLY, STATISTICS, FUSED, NUM_OPERATIONS };

typedef struct {
  char* block; /* NULL where another tensor owns it */
  DLTensor* dl;
} tensor;

typedef struct {
  DLDataType in, out;
  int64_t q_cols, k_cols;
} kind;

/* How the arguments of one call lie in memory. */
typedef struct {
  const char* name;
  int64_t gap;   /* elements between rows */
  int64_t shift; /* bytes before the first element */
  int in_place, broadcast, no_strides, byte_offset;
} layout;

static const layout kLayouts[] = {
    {.name = "packed"},
    {.name = "packed, no strides", .no_strides = 1},
    {.name = "gap of 1", .gap = 1},
    {.name = "gap of 64", .gap = 64},
    {.name = "odd address", .shift = 1},
    {.name = "one element on, gap of 3", .shift = 4, .gap = 3},
    {.name = "in place", .in_place = 1},
    {.name = "in place, gap of 5", .in_place = 1, .gap = 5},
    {.name = "one input row for all", .broadcast = 1},
    {.name = "byte offset", .byte_offset = 1, .shift = 8},
};

static const DLDataType kFloat32 = {kDLFloat, 32, 1}, kBFloat16 = {kDLBfloat, 16, 1};
static const float kEpsilon = 1e-6f;
static entry_point entries[NUM_OPERATIONS], set_threads;
static int fuses; /* squares are added by a fused multiply-add */
static atomic_llong calls, compared;
static int short_arguments, short_output;

static void die(const char* what, const char* why) {
  fprintf(stderr, "%s: %s\n", what, why);
  exit(1);
}

static int64_t item_of(DLDataType type) { return type.bits / 8; }

static uint32_t next_random(uint32_t* state) { return *state = *state * 1664525u + 1013904223u; }

static float read_element(const char* at, DLDataType type) {
  uint32_t bits = 0;
  if (type.bits == 16) {
    uint16_t half;
    memcpy(&half, at, sizeof half);
    bits = (uint32_t)half << 16;
  } else {
    memcpy(&bits, at, sizeof bits);
  }
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static uint32_t rounded_bits(float value, DLDataType type) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (type.bits == 32) return bits;
  if (isnan(value)) return 0x7fc0;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static void* exact(size_t bytes) {
  void* block = malloc(bytes ? bytes : 1);
  if (!block) die("malloc", "no memory");
  return block;
}

static char* first_element(const tensor* t) {
  return t->dl->data ? (char*)t->dl->data + t->dl->byte_offset : NULL;
}

/* A tensor over `data`, or over a block of its own that ends with its last element. */
static tensor make(DLDataType type, int ndim, int64_t rows, int64_t cols, int64_t row_stride,
                   const layout* l, const tensor* same, int64_t missing) {
  tensor t = {NULL, exact(sizeof(DLTensor))};
  int64_t* shape = exact((size_t)ndim * sizeof *shape);
  int64_t* strides = l->no_strides ? NULL : exact((size_t)ndim * sizeof *strides);
  shape[ndim - 1] = cols;
  if (strides) strides[ndim - 1] = 1;
  if (ndim == 2) {
    shape[0] = rows;
    if (strides) strides[0] = row_stride;
  }
  int64_t item = item_of(type), steps = ndim == 2 ? rows - 1 : 0;
  void* data = NULL;
  uint64_t offset = 0;
  if (same) {
    data = same->dl->data;
    offset = same->dl->byte_offset;
  } else if (steps >= 0) {
    size_t bytes = (size_t)((steps * row_stride + cols) * item - missing);
    t.block = exact(bytes + (size_t)l->shift);
    data = t.block + (l->byte_offset ? 0 : l->shift);
    offset = l->byte_offset ? (uint64_t)l->shift : 0;
    VALGRIND_MAKE_MEM_NOACCESS(t.block, bytes + (size_t)l->shift);
  }
  *t.dl = (DLTensor){data, {kDLCPU, 0}, ndim, type, shape, strides, offset};
  return t;
}

static char* row_of(const tensor* t, int64_t row) {
  int64_t cols = t->dl->shape[t->dl->ndim - 1];
  int64_t stride = t->dl->strides && t->dl->ndim == 2 ? t->dl->strides[0] : cols;
  return first_element(t) + row * stride * item_of(t->dl->dtype);
}

static int64_t rows_of(const tensor* t) { return t->dl->ndim == 2 ? t->dl->shape[0] : 1; }

/* With `summed`, three rows of four are of ordinary numbers: one that is not hides the others. */
static void fill(const tensor* t, uint32_t seed, int summed) {
  int64_t cols = t->dl->shape[t->dl->ndim - 1], item = item_of(t->dl->dtype);
  for (int64_t row = 0; row < rows_of(t); ++row) {
    char* at = row_of(t, row);
    VALGRIND_MAKE_MEM_DEFINED(at, (size_t)(cols * item));
    for (int64_t c = 0; c < cols; ++c, at += item) {
      uint32_t bits = next_random(&seed);
      /* One in 16 of any bits at all, the others from 2^-8 to 2^8. */
      if (bits >> 28 || (summed && row % 4 < 3)) bits = (bits & 0x80ffffffu) | (0x3b000000u + (bits >> 29 << 24));
      uint16_t half = (uint16_t)(bits >> 16);
      memcpy(at, item == 2 ? (void*)&half : (void*)&bits, (size_t)item);
    }
  }
}

static void paint(const tensor* t) {
  size_t bytes = (size_t)(t->dl->shape[1] * item_of(t->dl->dtype));
  for (int64_t row = 0; row < rows_of(t); ++row) {
    VALGRIND_MAKE_MEM_DEFINED(row_of(t, row), bytes);
    memset(row_of(t, row), 0xa5, bytes);
  }
}

static void check_painted(const tensor* t, const char* what) {
  for (int64_t row = 0; row < rows_of(t); ++row) {
    const unsigned char* at = (unsigned char*)row_of(t, row);
    for (int64_t i = 0; i < t->dl->shape[1] * item_of(t->dl->dtype); ++i) {
      if (at[i] != 0xa5) die(what, "a refused call wrote");
    }
  }
}

static void release(tensor* t) {
  if (!t->dl) return;
  free(t->dl->shape);
  free(t->dl->strides);
  free(t->dl);
  free(t->block);
}

static void release_all(tensor* t) {
  for (int i = 0; i < NUM_TENSORS; ++i) release(&t[i]);
}

static void make_all(tensor* t, int op, const kind* k, int64_t rows, const layout* l) {
  const layout plain = {.shift = l->shift, .no_strides = l->no_strides};
  int64_t in_q = l->broadcast ? 0 : k->q_cols + l->gap, in_k = l->broadcast ? 0 : k->k_cols + l->gap;
  int64_t in_var = l->broadcast && op == APPLY ? 0 : 2 + l->gap;
  memset(t, 0, NUM_TENSORS * sizeof *t);
  if (op != FUSED) t[QK_VAR] = make(kFloat32, 2, rows, 2, in_var, l, NULL, 0);
  t[Q] = make(k->in, 2, rows, k->q_cols, in_q, l, NULL, 0);
  t[K] = make(k->in, 2, rows, k->k_cols, in_k, l, NULL, 0);
  if (op != STATISTICS) {
    const tensor *same_q = l->in_place ? &t[Q] : NULL, *same_k = l->in_place ? &t[K] : NULL;
    t[GAMMA_Q] = make(kFloat32, 1, 1, k->q_cols, 1, &plain, NULL, 0);
    t[GAMMA_K] = make(kFloat32, 1, 1, k->k_cols, 1, &plain, NULL, 0);
    t[Q_OUT] = make(k->out, 2, rows, k->q_cols, k->q_cols + l->gap, l, same_q, 0);
    t[K_OUT] = make(k->out, 2, rows, k->k_cols, k->k_cols + l->gap, l, same_k, short_output);
  }
  for (int i = 0; i < kOperations[op].num_tensors; ++i) {
    int which = kOperations[op].tensors[i], is_output = i < kOperations[op].num_outputs;
    if (is_output && (l->in_place || short_output)) continue;
    if (is_output) paint(&t[which]);
    else fill(&t[which], (uint32_t)(which + 7 * rows), op != APPLY && which >= Q);
  }
}

static int call(int op, const tensor* t, double epsilon) {
  const operation* about = &kOperations[op];
  int count = about->num_tensors + about->has_epsilon, held = count - short_arguments;
  TVMFFIAny* args = exact((size_t)held * sizeof *args);
  TVMFFIAny result;
  memset(args, 0, (size_t)held * sizeof *args);
  memset(&result, 0, sizeof result);
  for (int i = 0; i < about->num_tensors; ++i) {
    args[i].type_index = kTVMFFIDLTensorPtr;
    args[i].v_ptr = t[about->tensors[i]].dl;
  }
  if (held > about->num_tensors) {
    args[about->num_tensors].type_index = kTVMFFIFloat;
    args[about->num_tensors].v_float64 = epsilon;
  }
  int status = entries[op](NULL, args, count, &result);
  free(args);
  atomic_fetch_add(&calls, 1);
  return status;
}

static void check_error(const char* what, const char* wanted_kind) {
  TVMFFIObjectHandle error = NULL;
  TVMFFIErrorMoveFromRaised(&error);
  if (!error) die(what, "refused without an error");
  const TVMFFIErrorCell* cell = (TVMFFIErrorCell*)((char*)error + sizeof(TVMFFIObject));
  if (cell->kind.size != strlen(wanted_kind) ||
      memcmp(cell->kind.data, wanted_kind, cell->kind.size) || cell->message.size < 16) {
    fprintf(stderr, "%.*s: %.*s\n", (int)cell->kind.size, cell->kind.data, (int)cell->message.size,
            cell->message.data);
    die(what, "refused with another error");
  }
  TVMFFIObjectDecRef(error);
}

enum { LANES = 64, BLOCK = 16 * LANES };

/* The mean of squares of a row, in the order of summation that declaration_statistics.py states. */
static float mean_of_squares(const tensor* x, int64_t row) {
  int64_t cols = x->dl->shape[1], item = item_of(x->dl->dtype);
  const char* at = row_of(x, row);
  float lanes[LANES] = {0};
  for (int64_t first = 0; first < cols; first += BLOCK) {
    float partial[LANES] = {0};
    for (int64_t c = first; c < cols && c < first + BLOCK; ++c) {
      float value = read_element(at + c * item, x->dl->dtype), *sum = &partial[c % LANES];
      *sum = fuses ? fmaf(value, value, *sum) : value * value + *sum;
    }
    for (int i = 0; i < LANES; ++i) lanes[i] += partial[i];
  }
  for (int i = 0; i < LANES / 2; ++i) lanes[i] = lanes[2 * i] + lanes[2 * i + 1];
  for (int half = LANES / 4; half; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0] / (float)cols;
}

static uint32_t bits_of(float value, DLDataType type) {
  return isnan(value) ? 0x7fc00000u : rounded_bits(value, type);
}

/* The bits that an output must hold, row after row; before the call, which may be in place. */
static uint32_t* expected_of(int op, const tensor* t, int out, DLDataType type) {
  if (out == QK_VAR) {
    int64_t rows = rows_of(&t[Q]);
    uint32_t* bits = exact((size_t)rows * 2 * sizeof *bits);
    for (int64_t i = 0; i < 2 * rows; ++i) {
      bits[i] = bits_of(mean_of_squares(&t[i % 2 ? K : Q], i / 2), kFloat32);
    }
    return bits;
  }
  int operand = out == Q_OUT ? Q : K, gamma = out == Q_OUT ? GAMMA_Q : GAMMA_K;
  int64_t rows = rows_of(&t[operand]), cols = t[operand].dl->shape[1];
  int64_t item = item_of(t[operand].dl->dtype);
  uint32_t* bits = exact((size_t)(rows * cols) * sizeof *bits);
  for (int64_t row = 0; row < rows; ++row) {
    float var = op == FUSED
                    ? mean_of_squares(&t[operand], row)
                    : read_element(row_of(&t[QK_VAR], row) + 4 * (out == K_OUT), kFloat32);
    float rs = 1.0f / sqrtf(var + kEpsilon);
    for (int64_t c = 0; c < cols; ++c) {
      float scaled = read_element(row_of(&t[operand], row) + c * item, t[operand].dl->dtype) * rs;
      float weighted = scaled * read_element(first_element(&t[gamma]) + 4 * c, kFloat32);
      bits[row * cols + c] = bits_of(weighted, type);
    }
  }
  return bits;
}

static void compare(const tensor* t, const uint32_t* bits, const char* what) {
  int64_t cols = t->dl->shape[1], item = item_of(t->dl->dtype);
  for (int64_t row = 0; row < rows_of(t); ++row) {
    for (int64_t c = 0; c < cols; ++c) {
      const char* at = row_of(t, row) + c * item;
      uint32_t got = 0, want = bits[row * cols + c];
      memcpy(&got, at, (size_t)item);
      if (want == 0x7fc00000u ? !isnan(read_element(at, t->dl->dtype)) : got != want) {
        fprintf(stderr, "row %lld, column %lld: %#x, must be %#x\n", (long long)row, (long long)c,
                got, want);
        die(what, "wrong bits");
      }
    }
  }
  atomic_fetch_add(&compared, rows_of(t) * cols);
}

static void check_result(int op, const kind* k, int64_t rows, const layout* l) {
  const operation* about = &kOperations[op];
  tensor t[NUM_TENSORS];
  uint32_t* bits[2];
  if (l->in_place && (op == STATISTICS || item_of(k->in) != item_of(k->out))) return;
  make_all(t, op, k, rows, l);
  for (int i = 0; i < about->num_outputs; ++i) {
    bits[i] = expected_of(op, t, about->tensors[i], k->out);
  }
  int status = call(op, t, kEpsilon);
  if (status) check_error(l->name, "none");
  for (int i = 0; i < about->num_outputs; ++i) {
    if (!status) compare(&t[about->tensors[i]], bits[i], l->name);
    free(bits[i]);
  }
  release_all(t);
}

/* One mistake at a time in each argument. Its data is never to be looked at: it is freed first. */
static void check_refusals(int op, const kind* k) {
  static const char* const kWhat[] = {"columns", "dtype", "rank", "device", "column stride",
                                      "row stride", "no data", "rows"};
  enum { kMistakes = sizeof kWhat / sizeof *kWhat };
  const layout packed = {.name = "packed"};
  for (int mistake = 0; mistake < kMistakes; ++mistake) {
    for (int n = 0; n < kOperations[op].num_tensors; ++n) {
      int i = kOperations[op].tensors[n];
      tensor t[NUM_TENSORS];
      make_all(t, op, k, 3, &packed);
      DLTensor* dl = t[i].dl;
      int last = dl->ndim - 1, type_error = 0;
      int64_t only_row[1] = {dl->shape[last]};
      int64_t *shape = dl->shape, *strides = dl->strides;
      switch (mistake) {
        case 0: dl->shape[last] = i == QK_VAR ? 3 : 0; break;
        case 1: dl->dtype = (DLDataType){kDLFloat, 64, 1}, type_error = 1; break;
        case 2: dl->ndim = 0, dl->shape = last ? only_row : dl->shape, dl->strides = NULL; break;
        case 3: dl->device.device_type = kDLCUDA; break;
        case 4: dl->strides[last] = 2; break;
        case 5: dl->strides[0] = last ? -dl->strides[0] : 3; break;
        case 6: dl->data = NULL; break;
        default: dl->shape[0] += last ? 1 : 2;
      }
      /* A column of one element has no stride that counts. */
      int legal = (mistake == 4 || (mistake == 5 && !last)) && dl->shape[last] == 1;
      if (!legal) {
        if (!call(op, t, kEpsilon)) die(kWhat[mistake], "accepted");
        check_error(kWhat[mistake], type_error ? "TypeError" : "ValueError");
        dl->ndim = last + 1, dl->shape = shape, dl->strides = strides;
        for (int j = 0; j < kOperations[op].num_outputs; ++j) {
          int out = kOperations[op].tensors[j];
          if (i != out) check_painted(&t[out], kWhat[mistake]);
        }
      }
      dl->shape = shape, dl->strides = strides;
      release_all(t);
    }
  }
}

static void check_argument_lists(int op, const kind* k) {
  const operation* about = &kOperations[op];
  tensor t[NUM_TENSORS];
  make_all(t, op, k, 1, &kLayouts[0]);
  for (int count = 0; count < about->num_tensors + about->has_epsilon; ++count) {
    TVMFFIAny* args = exact((size_t)count * sizeof *args);
    TVMFFIAny result;
    memset(args, 0, (size_t)count * sizeof *args);
    for (int i = 0; i < count; ++i) {
      args[i].type_index = kTVMFFIDLTensorPtr;
      args[i].v_ptr = t[about->tensors[i]].dl;
    }
    if (!entries[op](NULL, args, count, &result)) die("too few arguments", "accepted");
    check_error("too few arguments", "TypeError");
    free(args);
  }
  if (about->has_epsilon) {
    if (!call(op, t, NAN)) die("epsilon of NaN", "accepted");
    check_error("epsilon of NaN", "ValueError");
  }
  check_painted(&t[about->tensors[0]], "arguments");
  release_all(t);
}

static void use_threads(int count) {
  TVMFFIAny argument, result;
  memset(&argument, 0, sizeof argument);
  memset(&result, 0, sizeof result);
  argument.type_index = kTVMFFIInt;
  argument.v_int64 = count;
  if (set_threads(NULL, &argument, 1, &result)) check_error("qknorm_set_num_threads", "none");
}

static void check_kind(int op, const kind* k, int64_t max_rows) {
  static const int64_t kRows[] = {0, 1, 2, 3, 7, 8, 9, 17, 0};
  int64_t row_bytes = (k->q_cols + k->k_cols) * (item_of(k->in) + item_of(k->out));
  int64_t many = 700000 / row_bytes + 1; /* several threads' worth */
  for (size_t i = 0; i < sizeof kRows / sizeof *kRows; ++i) {
    int64_t rows = i + 1 < sizeof kRows / sizeof *kRows ? kRows[i] : many;
    if (rows > max_rows) continue;
    for (size_t j = 0; j < sizeof kLayouts / sizeof *kLayouts; ++j) {
      /* Rows are shared out alike in every operation: fewer of the long cases for the others. */
      if (rows == many && op != APPLY && j % 3) continue;
      check_result(op, k, rows, &kLayouts[j]);
    }
  }
  check_refusals(op, k);
  check_argument_lists(op, k);
}

typedef struct {
  const kind* kinds;
  int count;
  int64_t max_rows;
} work;

static atomic_int stopped;

static void* check_all(void* argument) {
  const work* w = argument;
  for (int op = 0; op < NUM_OPERATIONS; ++op) {
    if (!entries[op]) continue;
    for (int i = 0; i < w->count; ++i) {
      /* Statistics have no dtype but q's. */
      int seen = 0;
      for (int j = 0; op == STATISTICS && j < i; ++j) {
        const kind *a = &w->kinds[i], *b = &w->kinds[j];
        seen |= a->in.bits == b->in.bits && a->q_cols == b->q_cols && a->k_cols == b->k_cols;
      }
      if (!seen) check_kind(op, &w->kinds[i], w->max_rows);
    }
  }
  return NULL;
}

static void* keep_changing_threads(void* unused) {
  for (unsigned i = 0; !atomic_load(&stopped); ++i) {
    use_threads((int)(i % 5)); /* 0 is the default */
    struct timespec moment = {0, 200000};
    nanosleep(&moment, NULL);
  }
  return unused;
}

int main(int argc, char** argv) {
  if (argc < 6) die("usage", "driver MODULE.so MAX_ROWS CALLERS FMA IN-OUT-Q_COLS-K_COLS...");
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) die(argv[1], dlerror());
  for (int op = 0; op < NUM_OPERATIONS; ++op) {
    entries[op] = (entry_point)(intptr_t)dlsym(library, kOperations[op].symbol);
  }
  fuses = atoi(argv[4]);
  set_threads = (entry_point)(intptr_t)dlsym(library, "__tvm_ffi_qknorm_set_num_threads");
  if (!entries[APPLY] || !set_threads) die(argv[1], "lacks an entry point");
  int count = argc - 5, callers = atoi(argv[3]);
  kind* kinds = exact((size_t)count * sizeof *kinds);
  for (int i = 0; i < count; ++i) {
    char in[8], out[8];
    long long q, k;
    if (sscanf(argv[5 + i], "%7[a-z0-9]-%7[a-z0-9]-%lld-%lld", in, out, &q, &k) != 4) {
      die(argv[5 + i], "must look like bf16-f32-33-5");
    }
    kinds[i] = (kind){strcmp(in, "bf16") ? kFloat32 : kBFloat16,
                      strcmp(out, "bf16") ? kFloat32 : kBFloat16, q, k};
  }
  work w = {kinds, count, atoll(argv[2])};
  if (callers < 0) {
    short_arguments = callers == -1, short_output = callers == -2;
    tensor t[NUM_TENSORS];
    make_all(t, APPLY, &kinds[0], 1, &kLayouts[0]);
    call(APPLY, t, kEpsilon);
    release_all(t);
  } else if (callers == 0) {
    for (int threads = 1; threads <= 3; threads += 2) {
      use_threads(threads);
      check_all(&w);
    }
  } else {
    pthread_t changer, *threads = exact((size_t)callers * sizeof *threads);
    if (pthread_create(&changer, NULL, keep_changing_threads, NULL)) die("pthread", "no thread");
    for (int i = 0; i < callers; ++i) {
      if (pthread_create(&threads[i], NULL, check_all, &w)) die("pthread", "no thread");
    }
    for (int i = 0; i < callers; ++i) pthread_join(threads[i], NULL);
    atomic_store(&stopped, 1);
    pthread_join(changer, NULL);
    free(threads);
  }
  free(kinds);
  printf("%lld calls, %lld elements exact\n", atomic_load(&calls), atomic_load(&compared));
  return 0;
}
