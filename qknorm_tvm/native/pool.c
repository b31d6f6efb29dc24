/* The thread pool of exported CPU modules: one in a process.
 *
 * Code that TVM generates for a parallel loop calls TVMBackendParallelLaunch. TVM's own lies in
 * libtvm_runtime.so; a module that needs it crashes where only tvm-ffi is installed, and uses half
 * of the processors by default. This one is inside the module and needs nothing but pthreads.
 *
 * A launch publishes tasks. Each thread claims its own share first, the same at every launch, so
 * that rows stay in the cache of the processor that had them before; then whatever is left of the
 * others', so that a worker that wakes late costs nothing. Workers spin for some tens of
 * microseconds after a launch, then sleep in a futex. A launch that finds the pool busy (another
 * thread is in it) runs its tasks itself.
 *
 * Where the process has OpenMP loaded (torch brings it), its threads draw the tasks instead: they
 * are awake from the operation before, and a second set of threads would fight them for the same
 * processors. QKNORM_TVM_OPENMP=0 in the environment forbids that. A forked child never uses it:
 * libgomp does not survive a fork.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "module.h"

enum { kMaxThreads = 1024, kMaxTasks = 2 * kMaxThreads, kSpins = 1000, kSpinsBeforeYield = 4000 };

/* The layout that generated code reads: the number of tasks in this launch. */
typedef struct {
  void* sync_handle;
  int32_t num_task;
} group_env;

typedef struct {
  /* Tasks of the current launch that nobody has claimed are 1; all others 0. */
  _Alignas(64) atomic_uchar waiting[kMaxTasks];
  _Alignas(64) atomic_int remaining;
  _Alignas(64) atomic_uint epoch; /* changes with every launch; workers wait on it */
  atomic_int sleepers;
  _Alignas(64) qkn_task task;
  void* closure;
  atomic_int num_tasks;
  atomic_int team; /* threads among which the tasks are shared out */
  pthread_mutex_t busy;
  int num_workers;         /* threads started; guarded by busy */
  int most_workers;        /* that the system let start; 0: it has refused none; guarded by busy */
  atomic_int num_threads;  /* threads to use, the caller included; 0: not decided yet */
} pool_state;

/* The functions through which one module uses the pool of another. */
typedef struct {
  void (*parallel)(qkn_task, void*, int);
  int (*get_num_threads)(void);
  void (*set_num_threads)(int);
} pool_api;

static pool_state pool = {.busy = PTHREAD_MUTEX_INITIALIZER};

/* GNU OpenMP's entry point, which LLVM's and Intel's OpenMP have too. */
typedef void (*openmp_parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
static int openmp_forbidden = -1; /* -1: not decided yet; guarded by busy */

static inline void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static inline void run_task(qkn_task task, int index, int num_tasks, void* closure) {
  group_env env = {NULL, num_tasks};
  task(index, &env, closure);
#if defined(__x86_64__)
  __builtin_ia32_sfence(); /* stores past the caches are not ordered by anything else */
#endif
}

/* Claim and run tasks until none is left; `member` is this thread's place in the team. */
static void draw_tasks(int member) {
  /* A worker starts in the mode of the thread that started it; OpenMP's have one of their own. */
  qkn_environment own = qkn_enter_environment();
  /* These two may be an earlier launch's: they only say where to begin to look. */
  int num_tasks = atomic_load_explicit(&pool.num_tasks, memory_order_relaxed);
  int team = atomic_load_explicit(&pool.team, memory_order_relaxed);
  int share = team > 0 ? (num_tasks + team - 1) / team : num_tasks;
  int first = member * share < num_tasks ? member * share : 0;
  for (int i = 0; i < num_tasks; ++i) {
    int index = first + i < num_tasks ? first + i : first + i - num_tasks;
    if (!atomic_load_explicit(&pool.waiting[index], memory_order_relaxed)) continue;
    if (!atomic_exchange_explicit(&pool.waiting[index], 0, memory_order_acquire)) continue;
    /* A task claimed is not yet done: the launch it belongs to cannot have ended, so what is read
     * here is its own. */
    int total = atomic_load_explicit(&pool.num_tasks, memory_order_relaxed);
    run_task(pool.task, index, total, pool.closure);
    atomic_fetch_sub_explicit(&pool.remaining, 1, memory_order_release);
  }
  qkn_leave_environment(own);
}

static void* work(void* argument) {
  int index = (int)(intptr_t)argument;
  unsigned seen = atomic_load_explicit(&pool.epoch, memory_order_acquire);
  draw_tasks(index + 1); /* the launch that started this thread */
  for (;;) {
    unsigned epoch;
    int spins = 0;
    while ((epoch = atomic_load_explicit(&pool.epoch, memory_order_acquire)) == seen) {
      if (++spins < kSpins) {
        relax();
        continue;
      }
      atomic_fetch_add(&pool.sleepers, 1);
      syscall(SYS_futex, &pool.epoch, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
      atomic_fetch_sub(&pool.sleepers, 1);
    }
    seen = epoch;
    if (index < atomic_load_explicit(&pool.num_threads, memory_order_relaxed) - 1) {
      draw_tasks(index + 1);
    }
  }
  return NULL;
}

static int (*openmp_member)(void); /* omp_get_thread_num */

static void draw_tasks_in_team(void* unused) {
  (void)unused;
  draw_tasks(openmp_member());
}

static openmp_parallel find_openmp(void) {
  static openmp_parallel parallel;
  if (openmp_forbidden < 0) {
    const char* text = getenv("QKNORM_TVM_OPENMP");
    openmp_forbidden = text && !strcmp(text, "0");
  }
  if (openmp_forbidden) return NULL;
  /* Asked again as long as there is none: torch may be imported later. */
  if (!parallel) {
    openmp_member = (int (*)(void))(intptr_t)dlsym(RTLD_DEFAULT, "omp_get_thread_num");
    if (openmp_member) parallel = (openmp_parallel)(intptr_t)dlsym(RTLD_DEFAULT, "GOMP_parallel");
  }
  return parallel;
}

/* Only the thread that forked lives on in the child: it starts workers of its own. */
static void after_fork_in_child(void) {
  openmp_forbidden = 1;
  pool.num_workers = 0;
  pool.most_workers = 0;
  atomic_store(&pool.sleepers, 0);
  atomic_store(&pool.remaining, 0);
  for (int i = 0; i < kMaxTasks; ++i) atomic_store(&pool.waiting[i], 0);
  pthread_mutex_init(&pool.busy, NULL);
}

/* What a task needs, beside what the system takes of a thread's stack for itself: the process's
 * thread-local storage lies there, which may be any size. 0: not known, take the default size. */
static size_t stack_size(const pthread_attr_t* attributes) {
  size_t (*least)(const pthread_attr_t*) = (size_t (*)(const pthread_attr_t*))(intptr_t)dlsym(
      RTLD_DEFAULT, "__pthread_get_minstack");
  return least ? least(attributes) + (256 << 10) : 0;
}

static void start_workers(int wanted) {
  if (pool.most_workers && wanted > pool.most_workers - 1) wanted = pool.most_workers - 1;
  if (pool.num_workers >= wanted) return;
  sigset_t all, old;
  sigfillset(&all); /* signals are for the program's own threads */
  pthread_sigmask(SIG_SETMASK, &all, &old);
  while (pool.num_workers < wanted) {
    pthread_t thread;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    size_t size = stack_size(&attributes);
    if (size) pthread_attr_setstacksize(&attributes, size);
    int failed = pthread_create(&thread, &attributes, work, (void*)(intptr_t)pool.num_workers);
    pthread_attr_destroy(&attributes);
    if (failed) { /* fewer threads, same result; not tried again at each call */
      pool.most_workers = pool.num_workers + 1;
      fprintf(stderr,
              "qknorm-tvm: %d of %d threads could be started (%s): large calls are slower\n",
              pool.num_workers + 1, wanted + 1, strerror(failed));
      break;
    }
    ++pool.num_workers;
  }
  pthread_sigmask(SIG_SETMASK, &old, NULL);
}

static void run_alone(qkn_task task, void* closure) { run_task(task, 0, 1, closure); }

static int own_get_num_threads(void);

static void own_parallel(qkn_task task, void* closure, int num_tasks) {
  if (num_tasks > kMaxTasks) num_tasks = kMaxTasks;
  if (num_tasks <= 1 || pthread_mutex_trylock(&pool.busy)) {
    run_alone(task, closure);
    return;
  }
  static int registered = 0;
  if (!registered) {
    registered = 1;
    pthread_atfork(NULL, NULL, after_fork_in_child);
  }
  pool.task = task;
  pool.closure = closure;
  atomic_store_explicit(&pool.remaining, num_tasks, memory_order_relaxed);
  int helpers = own_get_num_threads() - 1;
  if (helpers > num_tasks - 1) helpers = num_tasks - 1;
  atomic_store_explicit(&pool.num_tasks, num_tasks, memory_order_relaxed);
  atomic_store_explicit(&pool.team, helpers + 1, memory_order_relaxed);
  for (int i = 0; i < num_tasks; ++i) {
    atomic_store_explicit(&pool.waiting[i], 1, memory_order_release);
  }
  openmp_parallel openmp = find_openmp();
  if (openmp && helpers > 0) {
    openmp(draw_tasks_in_team, NULL, (unsigned)helpers + 1, 0);
  } else {
    atomic_fetch_add_explicit(&pool.epoch, 1, memory_order_seq_cst);
    if (atomic_load_explicit(&pool.sleepers, memory_order_seq_cst) > 0) {
      syscall(SYS_futex, &pool.epoch, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    }
    if (pool.num_workers < helpers) start_workers(helpers);
    draw_tasks(0);
  }
  /* Of OpenMP's team too: a worker of ours that woke late may have claimed a task. */
  for (int spins = 0; atomic_load_explicit(&pool.remaining, memory_order_acquire) > 0;) {
    if (++spins < kSpinsBeforeYield) {
      relax();
    } else {
      sched_yield(); /* a worker has been taken off its processor in the middle of a task */
    }
  }
  pthread_mutex_unlock(&pool.busy);
}

/* Processors worth of time that a cgroup's quota grants, rounded up; 0 when there is none. */
static int cgroup_quota(void) {
  long long quota = 0, period = 0;
  char line[4096], path[4400];
  FILE* file = fopen("/proc/self/cgroup", "r");
  int best = 0;
  if (!file) return 0;
  while (fgets(line, sizeof line, file)) {
    line[strcspn(line, "\n")] = 0;
    char* controllers = strchr(line, ':');
    if (!controllers) continue;
    char* group = strchr(++controllers, ':');
    if (!group) continue;
    *group++ = 0;
    int unified = !*controllers;
    if (!unified && !strstr(controllers, "cpu")) continue;
    /* Inside a container the group's own path is not mounted: its root then is the group. */
    for (;;) {
      int is_limited = 0;
      if (unified) {
        snprintf(path, sizeof path, "/sys/fs/cgroup%s/cpu.max", group);
        FILE* limit = fopen(path, "r");
        if (limit) {
          is_limited = fscanf(limit, "%lld %lld", &quota, &period) == 2;
          fclose(limit);
        }
      } else {
        snprintf(path, sizeof path, "/sys/fs/cgroup/cpu%s/cpu.cfs_quota_us", group);
        FILE* limit = fopen(path, "r");
        if (limit) {
          is_limited = fscanf(limit, "%lld", &quota) == 1 && quota > 0;
          fclose(limit);
        }
        snprintf(path, sizeof path, "/sys/fs/cgroup/cpu%s/cpu.cfs_period_us", group);
        limit = is_limited ? fopen(path, "r") : NULL;
        if (limit) {
          is_limited = fscanf(limit, "%lld", &period) == 1;
          fclose(limit);
        }
      }
      if (is_limited && period > 0) {
        long long cpus = (quota + period - 1) / period;
        if (cpus >= 1 && (!best || cpus < best)) best = (int)(cpus > kMaxThreads ? kMaxThreads : cpus);
      }
      char* slash = strrchr(group, '/'); /* a parent's quota binds too */
      if (!slash || !*group) break;
      *slash = 0;
    }
  }
  fclose(file);
  return best;
}

static int default_num_threads(void) {
  const char* text = getenv("TVM_NUM_THREADS");
  if (text) {
    int given = atoi(text);
    if (given >= 1) return given < kMaxThreads ? given : kMaxThreads;
  }
  int threads = 1;
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) threads = CPU_COUNT(&set);
  int quota = cgroup_quota();
  if (quota && quota < threads) threads = quota;
  return threads < 1 ? 1 : threads < kMaxThreads ? threads : kMaxThreads;
}

static int own_get_num_threads(void) {
  int threads = atomic_load_explicit(&pool.num_threads, memory_order_relaxed);
  if (threads == 0) {
    int none = 0;
    threads = default_num_threads();
    if (!atomic_compare_exchange_strong(&pool.num_threads, &none, threads)) threads = none;
  }
  return threads;
}

static void own_set_num_threads(int threads) {
  if (threads > kMaxThreads) threads = kMaxThreads;
  atomic_store(&pool.num_threads, threads < 1 ? default_num_threads() : threads);
}

/* The pool of the module that was loaded first serves all of them, of those whose pools promise the
 * same: version 2 runs tasks in the default floating-point mode. A symbol of this kind is one in a
 * process, however its modules are loaded (they are never unloaded), and each module's constructor
 * tries to put its own pool there: so it is decided before a module can be called. */
__asm__(
    ".pushsection .bss.qknorm_tvm_thread_pool_v2, \"aw\", %nobits\n"
    ".globl qknorm_tvm_thread_pool_v2\n"
    ".type qknorm_tvm_thread_pool_v2, %gnu_unique_object\n"
    ".size qknorm_tvm_thread_pool_v2, 8\n"
    ".balign 8\n"
    "qknorm_tvm_thread_pool_v2: .zero 8\n"
    ".popsection\n");
extern __attribute__((visibility("default"))) _Atomic(const pool_api*) qknorm_tvm_thread_pool_v2;

static const pool_api own_api = {own_parallel, own_get_num_threads, own_set_num_threads};

__attribute__((constructor)) static void offer_pool(void) {
  const pool_api* none = NULL;
  atomic_compare_exchange_strong(&qknorm_tvm_thread_pool_v2, &none, &own_api);
}

static inline const pool_api* api(void) {
  return atomic_load_explicit(&qknorm_tvm_thread_pool_v2, memory_order_acquire);
}

void qkn_parallel(qkn_task task, void* closure, int num_tasks) {
  if (num_tasks <= 1) {
    run_alone(task, closure);
  } else {
    api()->parallel(task, closure, num_tasks);
  }
}

int qkn_get_num_threads(void) { return api()->get_num_threads(); }

void qkn_set_num_threads(int threads) { api()->set_num_threads(threads); }
