/* Attention of quantized q, k and v: the choice of a kernel, and tasks for all threads. attention.h says what is computed. */
#include "attention.h"

#include "processor.h"
#include "threads.h"
#include "tile.h"

enum { NO_MEMORY = 1, NO_KERNEL = 2 };

static const attention_kernel *const kernels[] = {
#if defined(__x86_64__)
#ifdef FP4DIT_AMX
    &attention_amx,
#endif
    &attention_avx512vnni,
#endif
    0,
};
enum { KERNELS = sizeof kernels / sizeof *kernels - 1 };

static int supported(const attention_kernel *kernel) {
#ifdef FP4DIT_AMX
    if (kernel == &attention_amx) return has_amx();
#endif
    return kernel && has_avx512vnni();
}

/* The name of kernel `index`, best first; NULL past the last. What this processor lacks is an empty name. */
const char *fp4dit_attention_kernel(int index) {
    static atomic_int known[KERNELS + 1]; /* 1 + whether it is supported: asking takes long */
    if (index < 0 || index >= KERNELS) return 0;
    if (!atomic_load(&known[index])) atomic_store(&known[index], 1 + supported(kernels[index]));
    return atomic_load(&known[index]) == 2 ? kernels[index]->name : "";
}

/* The `asked` kernel, or for -1 the best one; NULL if there is none that computes this. */
static const attention_kernel *choose(int asked, const attention_problem *p) {
    for (int i = asked < 0 ? 0 : asked; i < (asked < 0 ? KERNELS : asked + 1); i++) {
        const char *name = fp4dit_attention_kernel(i);
        if (name && *name && kernels[i]->fits(p)) return kernels[i];
    }
    return 0;
}

/* All arrays but bias are contiguous, in the order that `attention_problem` says; digits are 1 or 2 (levels such that no score
 * exceeds an int32). `half` allows bfloat16 weights; `kernel` is a number of fp4dit_attention_kernel, or -1.
 * Returns 0, or 1 for lack of memory, or 2 if no kernel computes this. */
int fp4dit_attention(const int8_t *q, const int8_t *k, const int8_t *v, const float *q_scale, const float *k_scale,
                     const float *v_scale, const float *bias, void *out, int64_t digits, int64_t batch, int64_t heads,
                     int64_t queries, int64_t keys, int64_t dim, int64_t bias_batch, int64_t bias_head, int64_t bias_query,
                     float scale, int32_t out_type, int32_t half, int32_t kernel, parallel_function parallel, int32_t threads) {
    attention_problem p = {.q = q, .k = k, .v = v, .q_scale = q_scale, .k_scale = k_scale, .v_scale = v_scale, .bias = bias,
                           .out = out, .digits = digits, .batch = batch, .heads = heads, .queries = queries, .keys = keys,
                           .dim = dim, .bias_batch = bias_batch, .bias_head = bias_head, .bias_query = bias_query,
                           .scale = scale, .out_type = out_type, .half = half && digits == 1};
    const attention_kernel *chosen = choose(kernel, &p);
    if (!chosen) return NO_KERNEL;
    const int64_t every = batch * heads, block = chosen->queries;
    if (!every || !queries || !dim) return 0;
    /* enough tasks for all threads, but packing the keys must stay small beside multiplying them */
    const int64_t wanted = (4 * threads + every - 1) / every, most = (queries + 255) / 256;
    p.chunks = wanted < most ? wanted : most;
    p.chunk = ((queries + p.chunks - 1) / p.chunks + block - 1) / block * block;
    p.chunks = (queries + p.chunk - 1) / p.chunk;
    run_on_threads(chosen->worker, &p, parallel, threads, every * p.chunks);
    return atomic_load(&p.failed) ? NO_MEMORY : 0;
}
