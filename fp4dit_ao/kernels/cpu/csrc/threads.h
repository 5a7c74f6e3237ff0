/* How work is shared out, and code that the compiler makes for several instruction sets. */
#ifndef FP4DIT_THREADS_H
#define FP4DIT_THREADS_H

#include <stdint.h>

/* OpenMP's GOMP_parallel: runs a function on some threads. */
typedef void (*parallel_function)(void (*)(void *), void *, unsigned, unsigned);

/* `worker` takes tasks until none is left; on one thread if `parallel` is NULL. */
static inline void run_on_threads(void (*worker)(void *), void *argument, parallel_function parallel, int threads,
                                  int64_t tasks) {
    if (threads > tasks) threads = (int)tasks;
    if (parallel && threads > 1) parallel(worker, argument, (unsigned)threads, 0);
    else worker(argument);
}

/* Plain loops, vectorised for what the processor has, chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__linux__)
#define EVERY_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define FMA_IS_FAST __builtin_cpu_supports("fma")
#else
#define EVERY_PROCESSOR
#ifdef __FP_FAST_FMAF
#define FMA_IS_FAST 1
#else
#define FMA_IS_FAST 0
#endif
#endif

#endif
