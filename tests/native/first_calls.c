/* Calls modules for the first time from several threads at the same moment, in fresh processes.
 *
 *   first_calls libtvm_ffi.so rounds module.so module.so ...
 *
 * Each round is a process that loads the modules, each from a thread of its own, and makes each
 * thread set its module's number of threads. Then it sets one number through one of the modules:
 * one that does not know it has a pool of its own. Prints in how many rounds that happened.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

typedef int (*packed)(void* self, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result);

enum { kMaxModules = 16 };

static char** paths;
static void* modules[kMaxModules];
static int num_modules;
static atomic_int loaded, ready;

static packed function(int module, const char* name) {
  packed found = (packed)(intptr_t)dlsym(modules[module], name);
  if (!found) {
    fprintf(stderr, "first_calls: there is no %s\n", name);
    exit(2);
  }
  return found;
}

static void set_num_threads(packed set, int threads) {
  TVMFFIAny number = {.type_index = kTVMFFIInt, .v_int64 = threads}, nothing;
  memset(&nothing, 0, sizeof nothing);
  if (set(NULL, &number, 1, &nothing)) exit(2);
}

static void meet(atomic_int* count) {
  atomic_fetch_add(count, 1);
  /* Who waits is awake when the last one comes, as long as there are processors for all. */
  for (long spins = 0; atomic_load(count) < num_modules;) {
    if (++spins > 100000) sched_yield();
  }
}

static void* first_call(void* argument) {
  int index = (int)(intptr_t)argument;
  modules[index] = dlopen(paths[index], RTLD_NOW | RTLD_LOCAL);
  if (!modules[index]) {
    fprintf(stderr, "first_calls: %s\n", dlerror());
    exit(2);
  }
  packed set = function(index, "__tvm_ffi_qknorm_set_num_threads");
  meet(&loaded);
  meet(&ready); /* again: dlopen lets its callers go one after the other */
  set_num_threads(set, index + 2);
  return NULL;
}

static int round_in_this_process(void) {
  pthread_t threads[kMaxModules];
  for (int i = 0; i < num_modules; ++i) {
    if (pthread_create(&threads[i], NULL, first_call, (void*)(intptr_t)i)) return 2;
  }
  for (int i = 0; i < num_modules; ++i) pthread_join(threads[i], NULL);
  set_num_threads(function(0, "__tvm_ffi_qknorm_set_num_threads"), 77);
  for (int i = 0; i < num_modules; ++i) {
    TVMFFIAny result;
    memset(&result, 0, sizeof result);
    if (function(i, "__tvm_ffi_qknorm_get_num_threads")(NULL, NULL, 0, &result)) return 2;
    if (result.v_int64 != 77) return 1;
  }
  return 0;
}

int main(int argc, char** argv) {
  if (argc < 5 || argc - 3 > kMaxModules) return 2;
  paths = argv + 3;
  num_modules = argc - 3;
  if (!dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL)) {
    fprintf(stderr, "first_calls: %s\n", dlerror());
    return 2;
  }
  int wrong = 0;
  for (int round = atoi(argv[2]); round > 0; --round) {
    pid_t child = fork();
    if (child < 0) return 2;
    if (child == 0) _exit(round_in_this_process());
    int status;
    if (waitpid(child, &status, 0) < 0 || !WIFEXITED(status) || WEXITSTATUS(status) > 1) return 2;
    wrong += WEXITSTATUS(status);
  }
  printf("%d\n", wrong);
  return 0;
}
