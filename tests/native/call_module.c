/* Calls an exported module as a file says, for machines that the tests' Python does not run on.
 *
 *   call_module libtvm_ffi.so module.so requests answers
 *
 * Both files hold little-endian numbers without padding. Requests are a count, then each:
 *
 *   char[32] function; int32 threads (0: as they are); int32 has_epsilon; float64 epsilon;
 *   uint32 mode: FPCR of the caller
 *   int32 number of memories, each:  int64 size; int64 address modulo 64; its bytes
 *   int32 number of tensors, each:   int32 memory (-1: None), type code, bits, dimensions; int64
 *                                    offset in bytes, shape[4], strides[4]
 *
 * Answers are, for each request: int32 status (-1: an error was raised); int32 length and a text,
 * the error's "kind: message" or the function's own result; the bytes of every memory. A function
 * that leaves the caller another mode, or a floating-point flag, ends the program.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

typedef int (*packed)(void* self, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result);
typedef void (*move_from_raised)(TVMFFIObjectHandle* result);

enum { kMaxMemories = 16, kMaxTensors = 16, kMaxDims = 4 };

static void require(int ok, const char* what) {
  if (ok) return;
  fprintf(stderr, "call_module: %s\n", what);
  exit(2);
}

static void get(FILE* file, void* to, size_t size) {
  require(size == 0 || fread(to, size, 1, file) == 1, "the requests end too early");
}

static void put(FILE* file, const void* from, size_t size) {
  require(size == 0 || fwrite(from, size, 1, file) == 1, "cannot write the answers");
}

static int32_t get_int(FILE* file) {
  int32_t value;
  get(file, &value, sizeof value);
  return value;
}

static void describe(const TVMFFIAny* result, char* text, size_t size) {
  if (result->type_index == kTVMFFISmallStr) {
    snprintf(text, size, "%.*s", (int)result->small_str_len, result->v_bytes);
  } else if (result->type_index == kTVMFFIStr) {
    const TVMFFIByteArray* bytes =
        (const TVMFFIByteArray*)((const char*)result->v_obj + sizeof(TVMFFIObject));
    snprintf(text, size, "%.*s", (int)bytes->size, bytes->data);
  } else if (result->type_index == kTVMFFIInt) {
    snprintf(text, size, "%lld", (long long)result->v_int64);
  } else {
    require(result->type_index == kTVMFFINone, "a function returned what is not known here");
  }
}

static packed function(void* module, const char* name) {
  char symbol[64];
  snprintf(symbol, sizeof symbol, "__tvm_ffi_%s", name);
  packed found = (packed)dlsym(module, symbol);
  require(found != NULL, symbol);
  return found;
}

#ifdef __aarch64__
static void set_mode(uint64_t mode) {
  uint64_t none = 0;
  __asm__ volatile("msr fpcr, %0\n\tmsr fpsr, %1" : : "r"(mode), "r"(none) : "memory");
}

static void check_mode(uint64_t mode) {
  uint64_t found, flags;
  __asm__ volatile("mrs %0, fpcr\n\tmrs %1, fpsr" : "=r"(found), "=r"(flags) : : "memory");
  set_mode(0);
  if (found != mode) fprintf(stderr, "FPCR was %#lx and is %#lx\n", mode, found);
  require(found == mode, "a call changed its caller's floating-point mode");
  require(!flags, "a call left a floating-point flag");
}
#else
#error "sets the floating-point mode of AArch64 alone"
#endif

static void one_request(FILE* in, FILE* out, void* module, move_from_raised raised) {
  char name[32], text[4096] = "", *memory[kMaxMemories], *start[kMaxMemories];
  int64_t size[kMaxMemories];
  DLTensor tensors[kMaxTensors];
  int64_t extents[kMaxTensors][2 * kMaxDims];
  TVMFFIAny args[kMaxTensors + 1], result;
  double epsilon;
  uint32_t mode;
  memset(args, 0, sizeof args);
  memset(&result, 0, sizeof result);
  get(in, name, sizeof name);
  int32_t threads = get_int(in), has_epsilon = get_int(in);
  get(in, &epsilon, sizeof epsilon);
  get(in, &mode, sizeof mode);
  int32_t num_memories = get_int(in);
  require(num_memories <= kMaxMemories, "too many memories");
  for (int i = 0; i < num_memories; ++i) {
    int64_t modulo;
    get(in, &size[i], sizeof size[i]);
    get(in, &modulo, sizeof modulo);
    memory[i] = aligned_alloc(64, (size_t)(size[i] + 127) / 64 * 64);
    require(memory[i] != NULL, "no memory");
    start[i] = memory[i] + modulo;
    get(in, start[i], (size_t)size[i]);
  }
  int32_t num_args = get_int(in);
  require(num_args <= kMaxTensors, "too many tensors");
  for (int i = 0; i < num_args; ++i) {
    int32_t where = get_int(in), code = get_int(in), bits = get_int(in), ndim = get_int(in);
    int64_t offset;
    get(in, &offset, sizeof offset);
    get(in, extents[i], sizeof extents[i]);
    args[i].type_index = kTVMFFINone;
    if (where < 0) continue;
    tensors[i] = (DLTensor){.data = start[where] + offset,
                            .device = {kDLCPU, 0},
                            .ndim = ndim,
                            .dtype = {(uint8_t)code, (uint8_t)bits, 1},
                            .shape = extents[i],
                            .strides = extents[i] + kMaxDims};
    args[i].type_index = kTVMFFIDLTensorPtr;
    args[i].v_ptr = &tensors[i];
  }
  if (has_epsilon) {
    args[num_args].type_index = kTVMFFIFloat;
    args[num_args++].v_float64 = epsilon;
  }
  if (threads) {
    TVMFFIAny count = {.type_index = kTVMFFIInt, .v_int64 = threads}, nothing;
    require(!function(module, "qknorm_set_num_threads")(NULL, &count, 1, &nothing), "threads");
  }
  packed call = function(module, name);
  set_mode(mode);
  int32_t status = call(NULL, args, num_args, &result);
  check_mode(mode);
  if (status) {
    TVMFFIObjectHandle error = NULL;
    raised(&error);
    require(error != NULL, "a function failed and raised no error");
    const TVMFFIErrorCell* cell =
        (const TVMFFIErrorCell*)((const char*)error + sizeof(TVMFFIObject));
    snprintf(text, sizeof text, "%.*s: %.*s", (int)cell->kind.size, cell->kind.data,
             (int)cell->message.size, cell->message.data);
  } else {
    describe(&result, text, sizeof text);
  }
  int32_t length = (int32_t)strlen(text);
  put(out, &status, sizeof status);
  put(out, &length, sizeof length);
  put(out, text, (size_t)length);
  for (int i = 0; i < num_memories; ++i) {
    put(out, start[i], (size_t)size[i]);
    free(memory[i]);
  }
}

int main(int argc, char** argv) {
  require(argc == 5, "call_module libtvm_ffi.so module.so requests answers");
  void* ffi = dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL);
  require(ffi != NULL, dlerror());
  void* module = dlopen(argv[2], RTLD_NOW | RTLD_LOCAL);
  require(module != NULL, dlerror());
  move_from_raised raised = (move_from_raised)dlsym(ffi, "TVMFFIErrorMoveFromRaised");
  require(raised != NULL, "TVMFFIErrorMoveFromRaised");
  FILE *in = fopen(argv[3], "rb"), *out = fopen(argv[4], "wb");
  require(in && out, "cannot open the requests or the answers");
  for (int32_t left = get_int(in); left > 0; --left) one_request(in, out, module, raised);
  require(fclose(out) == 0, "cannot write the answers");
  return 0;
}
