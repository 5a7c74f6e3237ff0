/* Memory that a thread keeps from call to call, since the system takes long to give it pages again. */
#ifndef FP4DIT_SCRATCH_H
#define FP4DIT_SCRATCH_H

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

static _Thread_local void *scratch_memory;
static _Thread_local int64_t scratch_bytes;
static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

static void make_scratch_key(void) { pthread_key_create(&scratch_key, free); /* at the end of a thread */ }

/* At least `bytes`, aligned to 64; what it held before is undefined. NULL for lack of memory. */
static void *thread_scratch(int64_t bytes) {
    if (bytes <= scratch_bytes) return scratch_memory;
    pthread_once(&scratch_once, make_scratch_key);
    free(scratch_memory);
    scratch_memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    scratch_bytes = scratch_memory ? bytes : 0;
    pthread_setspecific(scratch_key, scratch_memory);
    return scratch_memory;
}

#endif
